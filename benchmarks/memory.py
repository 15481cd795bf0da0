"""What FlashSloth-3.2B needs beside its weights for many images, and what loading it reads.

    python benchmarks/memory.py --output benchmarks/results/memory_cpu.md

- Prefill: bytes of all tensors that are alive at once, beside weights and inputs, in bfloat16 without gradients. They
  are counted on fake tensors, which have shapes but no data; what kernels need inside is not in it. The columns are the
  vision tower's own pass; what comes behind it, on patches that are there already; both in one call; and keys and
  values, which are a part of the two before and stay.
- Loading: random weights of that size are written to a folder (6.4 GB), and new processes load it, one after another;
  medians. The system has the files in its cache then. Memory of a process's own is what is no mapped file; what it has
  read are the pages of mapped files that it has touched.
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from latency import Candidate, build_filled, hardware, kernel_bytes
from peers import PEERS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.generation_flashsloth import CACHE_NAME
from flashsloth.modeling_flashsloth import PromptSpans

logger = logging.getLogger(__name__)

QUESTION_TOKENS, MARK_ID, TEXT_ID = 40, 198, 1000
ROUNDS = 3
SIDE = 384
SECONDS = {"imports": "imports_s", "loading": "loading_s", "first token": "first_token_s", "all": "total_s"}


class Prompts(NamedTuple):
    """Rows of one call.

    Attributes:
        name: What the table calls them.
        num_rows: How many.
        tiles_per_row: Tiles that each of them has, 5 for an image in high definition.
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
    """Counts the bytes of all tensors that are made while it is active, and are alive at the same time.

    Args:
        beside: Tensors of which views are not counted.
    """

    def __init__(self, beside: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.storages = weakref.WeakSet(tensor.untyped_storage() for tensor in beside)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation, and count what it made."""
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
    """Images, a question, and its queries."""
    row = [config.image_token_id] * (config.image_seq_length * prompts.tiles_per_row)
    row += [MARK_ID, *[TEXT_ID] * QUESTION_TOKENS, *[config.query_token_id] * config.num_query_tokens]
    pixels = torch.zeros(prompts.num_tiles, 3, *config.tile_size, dtype=torch.bfloat16)
    return {"input_ids": torch.tensor([row] * prompts.num_rows), "pixel_values": pixels}


def count_prefill(model: FlashSlothForConditionalGeneration, prompts: Prompts) -> dict[str, int]:
    """Count the bytes of a prefill.

    Args:
        model: With fake weights, in an active `FakeTensorMode`.
        prompts: What is read.

    Returns:
        `tower`, `behind` and `peak`: most bytes that are alive at once; `kept`: keys and values.
    """
    inputs = build_inputs(prompts, model.config)
    bounds = (prompts.tiles_per_row, model.config.num_query_tokens)
    given = [*model.parameters(), *model.buffers(), *inputs.values()]
    with torch.no_grad(), mock.patch.object(PromptSpans, "bounds", return_value=bounds):
        with CountedMemory(given) as tower:
            patches = model.get_image_features(inputs["pixel_values"]).last_hidden_state
        with CountedMemory([*given, patches]) as behind:
            model(input_ids=inputs["input_ids"], patch_features=patches, logits_to_keep=1)
        with CountedMemory(given) as whole:
            cache = model(**inputs, logits_to_keep=1)[CACHE_NAME]
    kept = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    return {"tower": tower.peak, "behind": behind.peak, "peak": whole.peak, "kept": kept}


def prefill_table() -> str:
    """Markdown."""
    lines = [
        "| prompt | tiles | vision tower, GB | behind it, GB | both in one call, GB | keys and values, GB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    with FakeTensorMode(), no_init_weights():
        model = PEERS[0].build_model().eval()
        for prompts in PROMPTS:
            counted = count_prefill(model, prompts)
            cells = [prompts.name, str(prompts.num_tiles), *(f"{value / 1e9:.3f}" for value in counted.values())]
            lines.append(f"| {' | '.join(cells)} |")
            logger.info("%s", lines[-1])
    return "\n".join(lines)


def probe(folder: Path, started: float) -> dict[str, float]:
    """Load the model in this process, and answer with one token.

    Args:
        folder: The weights.
        started: When the process was started, `time.time()`.

    Returns:
        Seconds until the imports were done, of loading, of the first token, and in all; bytes of their own that loading
        took, and bytes of the files that were read by then and after the first token.
    """
    imported = time.time()
    own, read = _own_and_read()
    model = FlashSlothForConditionalGeneration.from_pretrained(folder).eval()
    loaded = time.time()
    own_after, read_after = _own_and_read()
    inputs = Candidate(PEERS[0], model).inputs(SIDE, 1)
    ready = time.time()
    model.generate(**inputs, max_new_tokens=1)
    answered = time.time()
    return {
        "imports_s": imported - started,
        "loading_s": loaded - imported,
        "first_token_s": answered - ready,
        "total_s": answered - started,
        "own_bytes": own_after - own,
        "read_by_loading_bytes": read_after - read,
        "read_bytes": _own_and_read()[1] - read,
    }


def _own_and_read() -> tuple[int, int]:
    own, read = (kernel_bytes("/proc/self/status", name) for name in ("RssAnon", "RssFile"))
    if own is None or read is None:
        raise RuntimeError("What a process reads is told by Linux only.")
    return own, read


def loading_table(folder: Path, rounds: int) -> str:
    """Markdown; medians of new processes."""
    if not (folder / "config.json").exists():
        build_filled(PEERS[0], "cpu").save_pretrained(folder)
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
        "memory of its own that loading takes": f"{median['own_bytes'] / 1e6:.1f} MB",
        "read by loading": f"{median['read_by_loading_bytes'] / 1e6:.1f} MB",
        "read until the first token": f"{median['read_bytes'] / 1e9:.2f} GB",
    }
    return "\n".join(["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows.items())])


def main() -> None:
    """Count and measure, and write tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--folder", type=Path, help="for the weights, which stay there (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        folder, started = args.probe
        sys.stdout.write(json.dumps(probe(Path(folder), float(started))) + "\n")
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as temporary:
        parts = [
            f"{hardware('cpu')}; made by benchmarks/memory.py.",
            "## Prefill of FlashSloth-3.2B, beside weights and inputs",
            prefill_table(),
            f"## Loading FlashSloth-3.2B in a new process, medians of {args.rounds}",
            loading_table(args.folder or Path(temporary), args.rounds),
        ]
    args.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
