"""Speed and memory of a training step, compared with the same model with all patches in the prompt.

    python benchmarks/step_cost.py --output benchmarks/results/step_cost_cpu

Both models are built from config with random weights. *All patches* has the same tower, projector and decoder, but no
pooling, no queries and no Embedded Query module, so each of the image's 729 patches is a token of the prompt. Both
train the same modules, those of a stage of the recipe, on the same images and text, with AdamW. The script writes
OUTPUT.md and OUTPUT.json.

- Speed: both models are in one process, and their steps take turns; figures are medians. Tokens are the decoder's.
- Memory per row: peak memory of forward and backward pass at two batch sizes; the difference of the peaks divided by
  the difference of the sizes. On a GPU it is read from the allocator. On a CPU it is counted at the released size, on
  fake tensors, which have shapes but no data; temporary memory inside kernels does not count.
- Memory in total: weights and AdamW's state in float32, plus that peak at 8 rows, which includes the gradients.

On a CPU, speed is measured with a small model whose image and prompt have as many tokens as those of the released one;
on a GPU, with the released size.
"""

import gc
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from latency import medians_in_turns
from memory import CountedMemory
from report import add_device_option, build_parser, describe_machine, markdown_table, write_report
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm
from transformers.initialization import no_init_weights

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration
from flashsloth.modeling_flashsloth import PromptSpans
from flashsloth.training.recipe import freeze_for_stage

logger = logging.getLogger(__name__)

MODELS = ("FlashSloth", "all patches")
STAGES = (1, 2)
TEXT_TOKENS = {1: 40, 2: 256}  # a caption; a short conversation
TOTAL_ROWS = 8
ONE_TILE = (1, FlashSlothConfig.num_query_tokens)  # tiles and query tokens per row
ROWS = {"cpu": (64, 128), "cuda": (8, 16)}  # with few rows the gradients may set the peak; more do not fit on a GPU
SMALL = {  # every width about a tenth of the released one
    "text_config": {
        "model_type": "phi",
        "vocab_size": 5120,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 430,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "image_token_id": 5118,
    "query_token_id": 5119,
    "query_anchor_token_id": 764,
    "instruction_start_ids": [[5118, 198]],
    "query_layer_idx": 2,
    "query_hidden_size": 64,
}


class Case(NamedTuple):
    """A model, a stage of the recipe, and whether activations are recomputed."""

    model: str
    stage: int
    checkpointing: bool


def build_config(case: Case, size: str) -> FlashSlothConfig:
    """Build the released config, or a small one with as many tokens; "all patches" has windows of one patch."""
    fields = SMALL if size == "small" else {}
    return FlashSlothConfig(**fields | ({"pooling_window_size": 1} if case.model == "all patches" else {}))


def build_model(case: Case, size: str, device: str) -> FlashSlothForConditionalGeneration:
    """Build a model with random weights in training mode; only what the stage trains is not frozen."""
    torch.manual_seed(0)
    with torch.device(device):
        model = FlashSlothForConditionalGeneration(build_config(case, size)).train()
    freeze_for_stage(model, case.stage)
    if case.model == "all patches":
        _remove_compression(model)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _remove_compression(model: FlashSlothForConditionalGeneration) -> None:
    """Remove pooling and Embedded Query module: the projector reads the patches themselves."""
    base = model.model
    base.spatial_attention_pooling = torch.nn.Identity()
    base.embedded_query.requires_grad_(False)
    base.embedded_query.forward = lambda hidden_states, context: hidden_states


def build_batch(case: Case, size: str, batch_size: int) -> dict[str, torch.Tensor]:
    """Build rows of one image and text; in stage 2, FlashSloth's rows also hold a question's queries."""
    config = build_config(case, size)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1000, 5000, (batch_size, TEXT_TOKENS[case.stage]), generator=generator)
    image = torch.full((batch_size, config.image_seq_length), config.image_token_id)
    parts, labels = [image, text], [torch.full_like(image, -100), text]
    if case.stage == 2:
        question = torch.tensor(config.instruction_start_ids[0][1:]).expand(batch_size, -1)
        num_queries = config.num_query_tokens if case.model == "FlashSloth" else 0
        queries = torch.full((batch_size, num_queries), config.query_token_id)
        half = text.shape[1] // 2  # the first half asks, the second answers
        parts = [image, question, text[:, :half], queries, text[:, half:]]
        labels = [torch.full_like(part, -100) for part in parts[:-1]] + [parts[-1]]
    side = config.vision_config.image_size
    pixels = torch.rand(batch_size, 3, side, side, generator=generator) * 2 - 1
    return {"input_ids": torch.cat(parts, dim=1), "labels": torch.cat(labels, dim=1), "pixel_values": pixels}


class Training:
    """A model, its optimizer and a batch, trained step by step."""

    def __init__(self, case: Case, size: str, batch_size: int, device: str) -> None:
        self.device = device
        self.model = build_model(case, size, device)
        batch = build_batch(case, size, batch_size)
        self.batch = {name: torch.empty_like(part, device=device).copy_(part) for name, part in batch.items()}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, fused=True)

    def step(self) -> None:
        """Run one optimizer step."""
        self.compute_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def compute_gradients(self) -> None:
        """Run forward and backward pass, with bfloat16 autocast."""
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model(**self.batch).loss
        loss.backward()

    def state_bytes(self) -> int:
        """Memory of weights, and of AdamW's two moments of each trained weight."""
        parameters = list(self.model.parameters())
        return sum(p.nbytes * (3 if p.requires_grad else 1) for p in parameters)


def peak_memory(case: Case, size: str, batch_size: int, device: str) -> tuple[int, int]:
    """Bytes of weights and optimizer, and the additional bytes of forward and backward pass at their peak."""
    if device == "cuda":
        training = Training(case, size, batch_size, device)
        training.step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        training.compute_gradients()
        return training.state_bytes(), torch.cuda.max_memory_allocated() - before
    # Fake tensors have no token ids from which to find the number of tiles; every row has one.
    with FakeTensorMode(), no_init_weights(), mock.patch.object(PromptSpans, "bounds", return_value=ONE_TILE):
        training = Training(case, size, batch_size, device)
        with CountedMemory() as memory:
            training.compute_gradients()
    return training.state_bytes(), memory.peak


def memory(case: Case, device: str) -> dict[str, float]:
    """Memory per row and in total, in bytes, at the released size."""
    few, many = ROWS[device]
    (_, peak), (_, higher_peak) = (peak_memory(case, "3.2b", num_rows, device) for num_rows in (few, many))
    total = sum(peak_memory(case, "3.2b", TOTAL_ROWS, device))
    return {"bytes_per_sample": (higher_peak - peak) / (many - few), "bytes": total}


def step_times(cases: list[Case], size: str, batch_size: int, device: str, num_steps: int) -> dict[Case, float]:
    """Median seconds of a step of every case; the cases take turns if they fit into memory together."""

    def work(training: Training, _is_warmup: bool) -> dict[str, float]:
        start = time.perf_counter()
        training.step()
        return {"seconds": time.perf_counter() - start}

    works: dict[Case, Callable] = {}
    try:
        for case in cases:
            works[case] = partial(work, Training(case, size, batch_size, device))
        return {case: figures["seconds"] for case, figures in medians_in_turns(works, num_steps).items()}
    except torch.OutOfMemoryError:
        if len(cases) == 1:
            raise
    logger.warning("The models do not fit side by side, and are measured one after another.")
    works.clear()
    gc.collect()  # modules refer to each other
    return {case: step_times([case], size, batch_size, device, num_steps)[case] for case in cases}


def measure(size: str, device: str, batch_size: int, num_steps: int, stages: Sequence[int] = STAGES) -> Iterator[dict]:
    """Measure every case of some stages.

    Yields:
        Its `model`, `stage`, `checkpointing`, `decoder_tokens` per row, `tokens_per_second`, `samples_per_second`,
        `bytes_per_sample` and `bytes`.
    """
    for stage in stages:
        for checkpointing in (False, True):
            cases = [Case(model, stage, checkpointing) for model in MODELS]
            times = step_times(cases, size, batch_size, device, num_steps)
            for case in cases:
                num_tokens = build_batch(case, size, 1)["input_ids"].shape[1]
                speed = {
                    "decoder_tokens": num_tokens,
                    "samples_per_second": batch_size / times[case],
                    "tokens_per_second": batch_size * num_tokens / times[case],
                }
                yield case._asdict() | speed | memory(case, device)


def as_table(rows: list[dict]) -> str:
    """Format all cases; ratios are to FlashSloth in the same case."""
    head = "stage | checkpointing | model | tokens a row | tokens/s | rows/s | ratio | MB a row | ratio | GB in total"
    cells = []
    own = {(row["stage"], row["checkpointing"]): row for row in rows if row["model"] == "FlashSloth"}
    for row in rows:
        reference = own[row["stage"], row["checkpointing"]]
        speed = row["samples_per_second"] / reference["samples_per_second"]
        memory = row["bytes_per_sample"] / reference["bytes_per_sample"]
        cells.append(
            (
                row["stage"],
                "on" if row["checkpointing"] else "off",
                row["model"],
                row["decoder_tokens"],
                f"{row['tokens_per_second']:.0f}",
                f"{row['samples_per_second']:.2f}",
                f"{speed:.2f}",
                f"{row['bytes_per_sample'] / 1e6:.0f}",
                f"{memory:.2f}",
                f"{row['bytes'] / 1e9:.1f}",
            )
        )
    return markdown_table(head.split(" | "), cells, text_columns=(0, 1, 2))


def main() -> None:
    """Measure, and write the table."""
    parser = build_parser(__doc__, "path without a suffix")
    add_device_option(parser)
    parser.add_argument("--batch-size", type=int, default=2, help="rows of a timed step")
    parser.add_argument("--steps", type=int, default=9, help="timed steps")
    parser.add_argument("--stages", type=int, nargs="+", choices=STAGES, default=STAGES)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = "3.2b" if args.device == "cuda" else "small"
    measured = measure(size, args.device, args.batch_size, args.steps, args.stages)
    rows = list(tqdm(measured, total=len(MODELS) * len(args.stages) * 2, unit="case"))
    how = "measured" if args.device == "cuda" else "counted"
    title = (
        f"{describe_machine(args.device)} by autocast. Speed: size {size}, batch {args.batch_size}, median of "
        f"{args.steps} steps that take turns. Memory: size 3.2b, {how}. Ratios: to FlashSloth in the same case."
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps({"machine": title, "rows": rows}, indent=2) + "\n")
    write_report(args.output.with_suffix(".md"), title, as_table(rows))


if __name__ == "__main__":
    main()
