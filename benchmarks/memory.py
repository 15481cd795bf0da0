"""Memory of a prefill of FlashSloth-3.2B with many images, and time and memory of loading it.

    python benchmarks/memory.py --output benchmarks/results/memory_cpu.md

- Prefill: peak bytes of all live tensors except weights and inputs, in bfloat16 without gradients. They are counted on
  fake tensors, which have shapes but no data; temporary memory inside kernels does not count. The columns are the
  vision tower's pass; the rest of the model, given the tower's patch features; both in one call; and keys and values,
  which are part of the two columns before and remain afterwards.
- Loading: random weights of the released size (6.4 GB) are written to a temporary folder, and new processes load it one
  after another; figures are medians, with the files in the system's page cache. Private memory of a process is all that
  is not a mapped file; the bytes it has read are the pages of mapped files that it has touched.
"""

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from argparse import SUPPRESS
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from latency import Candidate, build_filled, kernel_bytes
from peers import PEERS, QUESTION_TOKENS, TILE_SIDE
from report import build_parser, describe_machine, markdown_table, write_report
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.generation_flashsloth import CACHE_NAME
from flashsloth.modeling_flashsloth import PromptSpans

logger = logging.getLogger(__name__)

MARK_ID, TEXT_ID = 198, 1000
ROUNDS = 3
SECONDS = {"imports": "imports_s", "loading": "loading_s", "first token": "first_token_s", "total": "total_s"}


class Prompts(NamedTuple):
    """Rows of one call.

    Attributes:
        name: Name in the table.
        num_rows: Number of rows.
        tiles_per_row: Tiles of each row; a split image has 5.
    """

    name: str
    num_rows: int
    tiles_per_row: int

    @property
    def num_tiles(self) -> int:
        """Tiles of all rows."""
        return self.num_rows * self.tiles_per_row


PROMPTS = (
    Prompts("one image", 1, 1),
    Prompts("one image in HD", 1, 5),
    Prompts("8 rows, an image each", 8, 1),
    Prompts("8 rows, an image in HD each", 8, 5),
    Prompts("16 rows, an image in HD each", 16, 5),
    Prompts("one row of 24 images", 1, 24),
    Prompts("24 rows, an image each", 24, 1),
)


class CountedMemory(TorchDispatchMode):
    """Counts the live bytes of all tensors that are created while it is active, and their peak.

    Args:
        excluded: Existing tensors; their views do not count.
    """

    def __init__(self, excluded: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.storages = weakref.WeakSet(tensor.untyped_storage() for tensor in excluded)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation, and count its results."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.storages:
            return
        self.storages.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.alive -= size


def build_inputs(prompts: Prompts, config: Any) -> dict[str, torch.Tensor]:
    """Build rows of images, a question, and its queries."""
    row = [config.image_token_id] * (config.image_seq_length * prompts.tiles_per_row)
    row += [MARK_ID, *[TEXT_ID] * QUESTION_TOKENS, *[config.query_token_id] * config.num_query_tokens]
    pixels = torch.zeros(prompts.num_tiles, 3, *config.tile_size, dtype=torch.bfloat16)
    return {"input_ids": torch.tensor([row] * prompts.num_rows), "pixel_values": pixels}


def count_prefill(model: FlashSlothForConditionalGeneration, prompts: Prompts) -> dict[str, int]:
    """Count the bytes of a prefill.

    Args:
        model: A model with fake weights, in an active `FakeTensorMode`.
        prompts: The rows.

    Returns:
        Peak bytes of the vision `tower`, of the `rest` of the model and of `both`; and `kept`, keys and values.
    """
    inputs = build_inputs(prompts, model.config)
    bounds = (prompts.tiles_per_row, model.config.num_query_tokens)
    given = [*model.parameters(), *model.buffers(), *inputs.values()]
    with torch.no_grad(), mock.patch.object(PromptSpans, "bounds", return_value=bounds):
        with CountedMemory(given) as tower:
            patches = model.get_image_features(inputs["pixel_values"]).last_hidden_state
        with CountedMemory([*given, patches]) as rest:
            model(input_ids=inputs["input_ids"], patch_features=patches, logits_to_keep=1)
        with CountedMemory(given) as both:
            cache = model(**inputs, logits_to_keep=1)[CACHE_NAME]
    kept = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    return {"tower": tower.peak, "rest": rest.peak, "both": both.peak, "kept": kept}


def prefill_table() -> str:
    """Count the prefill of all `PROMPTS`, as Markdown."""
    rows = []
    with FakeTensorMode(), no_init_weights():
        model = PEERS[0].build_model().eval()
        for prompts in PROMPTS:
            counted = count_prefill(model, prompts)
            rows.append([prompts.name, prompts.num_tiles, *(f"{value / 1e9:.3f}" for value in counted.values())])
            logger.info("%s", rows[-1])
    head = ("prompt", "tiles", "vision tower, GB", "rest, GB", "both in one call, GB", "keys and values, GB")
    return markdown_table(head, rows)


def probe(folder: Path, started: float) -> dict[str, float]:
    """Load the model in this process, and answer with one token.

    Args:
        folder: Folder of the weights.
        started: When the process was started, as `time.time()`.

    Returns:
        Seconds of the imports, of loading, of the first token, and in total; private bytes that loading took; bytes of
        the files that were read by loading, and until the first token.
    """
    imported = time.time()
    private, read = _private_and_read()
    model = FlashSlothForConditionalGeneration.from_pretrained(folder).eval()
    loaded = time.time()
    private_after, read_after = _private_and_read()
    inputs = Candidate(PEERS[0], model).inputs(TILE_SIDE, 1)
    ready = time.time()
    model.generate(**inputs, max_new_tokens=1)
    answered = time.time()
    return {
        "imports_s": imported - started,
        "loading_s": loaded - imported,
        "first_token_s": answered - ready,
        "total_s": answered - started,
        "private_bytes": private_after - private,
        "read_by_loading_bytes": read_after - read,
        "read_bytes": _private_and_read()[1] - read,
    }


def _private_and_read() -> tuple[int, int]:
    private, read = (kernel_bytes("/proc/self/status", name) for name in ("RssAnon", "RssFile"))
    if private is None or read is None:
        raise RuntimeError("The memory of a process can be read from Linux only; run this benchmark on Linux.")
    return private, read


def loading_table(folder: Path, rounds: int) -> str:
    """Load the model of a folder in new processes; return the medians as Markdown."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    runs = []
    for turn in range(rounds + 1):
        command = [sys.executable, __file__, "--output", ".", "--probe", str(folder), str(time.time())]
        done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        runs += [json.loads(done.splitlines()[-1])] if turn else []
        logger.info("%s", done)
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    rows = {
        "size of the files": f"{size / 1e9:.2f} GB",
        **{f"seconds: {name}": f"{median[figure]:.2f}" for name, figure in SECONDS.items()},
        "private memory of loading": f"{median['private_bytes'] / 1e6:.1f} MB",
        "read by loading": f"{median['read_by_loading_bytes'] / 1e6:.1f} MB",
        "read until the first token": f"{median['read_bytes'] / 1e9:.2f} GB",
    }
    return markdown_table(("", ""), rows.items())


def main() -> None:
    """Count and measure, and write tables."""
    parser = build_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--probe", nargs=2, help=SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        folder, started = args.probe
        sys.stdout.write(json.dumps(probe(Path(folder), float(started))) + "\n")
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        build_filled(PEERS[0], "cpu").save_pretrained(folder)
        parts = [
            f"{describe_machine()}; made by benchmarks/memory.py.",
            "## Prefill of FlashSloth-3.2B, without weights and inputs",
            prefill_table(),
            f"## Loading FlashSloth-3.2B in a new process, medians of {args.rounds}",
            loading_table(Path(folder), args.rounds),
        ]
    write_report(args.output, *parts)


if __name__ == "__main__":
    main()
