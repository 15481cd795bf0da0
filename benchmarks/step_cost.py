"""Speed and memory of training, beside the same model with all patches in the prompt.

    python benchmarks/step_cost.py --output benchmarks/results/step_cost_cpu

builds FlashSloth from its config with random weights, and *all patches*: the same tower, projector and decoder, but no
pooling, no queries and no Embedded Query module, so that each of the image's 729 patches is a token of the prompt.
Both train on the same images and text, with what a stage of the recipe trains and with AdamW. It writes OUTPUT.md and
OUTPUT.json.

- Speed: both models live in one process and their steps take turns; medians. Tokens are those in the decoder.
- Memory a row: the peak of forward and backward pass at two batches; the difference divided by the difference of the
  batches. On a GPU the allocator says it. On a CPU it is counted: every tensor that the passes make at the released
  size, as fake tensors, which have shapes but no data; what kernels need inside is not in it.
- Memory in all: weights and AdamW's state in float32, and that peak at 8 rows, of which gradients are a part.

On a CPU the speed is that of a small model in which image and prompt have as many tokens as in the released one; on a
GPU it is that of the released size.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from latency import hardware
from memory import CountedMemory
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
ROWS = {"cpu": (64, 128), "cuda": (8, 16)}  # with few rows the peak may be that of the gradients, with many none fits
SMALL = {  # every width a tenth of the released one, or nearly
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
    """What is measured: a model, a stage of the recipe, and whether activations are recomputed."""

    model: str
    stage: int
    checkpointing: bool


def build_config(case: Case, size: str) -> FlashSlothConfig:
    """The released architecture, or a small one with as many tokens; with windows of one patch for all patches."""
    fields = SMALL if size == "small" else {}
    return FlashSlothConfig(**fields | ({"pooling_window_size": 1} if case.model == "all patches" else {}))


def build_model(case: Case, size: str, device: str) -> FlashSlothForConditionalGeneration:
    """A model with random weights, frozen as the stage says, in training mode."""
    torch.manual_seed(0)
    with torch.device(device):
        model = FlashSlothForConditionalGeneration(build_config(case, size)).train()
    freeze_for_stage(model, case.stage)
    if case.model == "all patches":
        _leave_out_compression(model)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _leave_out_compression(model: FlashSlothForConditionalGeneration) -> None:
    """Take pooling and Embedded Query module away: patches reach the projector as they are, and no one looks back."""
    base = model.model
    base.spatial_attention_pooling = torch.nn.Identity()
    base.embedded_query.requires_grad_(False)
    base.embedded_query.forward = lambda hidden_states, context: hidden_states


def build_batch(case: Case, size: str, batch_size: int) -> dict[str, torch.Tensor]:
    """Rows of one image and text; in stage 2 FlashSloth's rows hold a question's queries, too."""
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
    """A model in training, step by step."""

    def __init__(self, case: Case, size: str, batch_size: int, device: str) -> None:
        self.device = device
        self.model = build_model(case, size, device)
        batch = build_batch(case, size, batch_size)
        self.batch = {name: torch.empty_like(part, device=device).copy_(part) for name, part in batch.items()}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, fused=True)

    def step(self) -> None:
        """One step of the optimiser."""
        self.compute_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def compute_gradients(self) -> None:
        """Forward and backward pass, in bfloat16 but for the weights."""
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model(**self.batch).loss
        loss.backward()

    def state_bytes(self) -> int:
        """Memory of weights, and of the two moments that AdamW keeps of what trains."""
        parameters = list(self.model.parameters())
        return sum(p.nbytes * (3 if p.requires_grad else 1) for p in parameters)


def peak_memory(case: Case, size: str, batch_size: int, device: str) -> tuple[int, int]:
    """Bytes of weights and optimiser, and those that forward and backward pass take beside them at their peak."""
    if device == "cuda":
        training = Training(case, size, batch_size, device)
        training.step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        training.compute_gradients()
        return training.state_bytes(), torch.cuda.max_memory_allocated() - before
    # Fake tensors have no values to begin with or to count; a row of this benchmark has one tile.
    with FakeTensorMode(), no_init_weights(), mock.patch.object(PromptSpans, "bounds", return_value=ONE_TILE):
        training = Training(case, size, batch_size, device)
        with CountedMemory() as memory:
            training.compute_gradients()
    return training.state_bytes(), memory.peak


def memory(case: Case, device: str) -> dict[str, float]:
    """What a row costs, and what training takes in all, in bytes at the released size."""
    few, many = ROWS[device]
    (_, peak), (_, higher_peak) = (peak_memory(case, "3.2b", num_rows, device) for num_rows in (few, many))
    total = sum(peak_memory(case, "3.2b", TOTAL_ROWS, device))
    return {"bytes_per_sample": (higher_peak - peak) / (many - few), "bytes": total}


def step_times(cases: list[Case], size: str, batch_size: int, device: str, num_steps: int) -> dict[Case, float]:
    """Median seconds of a step of every case; their steps take turns."""
    trainings = {case: Training(case, size, batch_size, device) for case in cases}
    times: dict[Case, list[float]] = {case: [] for case in cases}
    for step in range(num_steps + 1):
        for case, training in trainings.items():
            start = time.perf_counter()
            training.step()
            if step:  # the first one allocates
                times[case].append(time.perf_counter() - start)
    return {case: statistics.median(seconds) for case, seconds in times.items()}


def measure(size: str, device: str, batch_size: int, num_steps: int) -> Iterator[dict]:
    """Measure every case.

    Yields:
        For each its `model`, `stage`, `checkpointing`, `decoder_tokens` a row, `tokens_per_second`,
        `samples_per_second`, `bytes_per_sample` and `bytes`.
    """
    for stage in STAGES:
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
    """Markdown; ratios are to FlashSloth in the same case."""
    head = "| stage | checkpointing | model | tokens a row | tokens/s | rows/s | ratio | MB a row | ratio | GB in all |"
    lines = [head, "|---|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    own = {(row["stage"], row["checkpointing"]): row for row in rows if row["model"] == "FlashSloth"}
    for row in rows:
        reference = own[row["stage"], row["checkpointing"]]
        speed = row["samples_per_second"] / reference["samples_per_second"]
        memory = row["bytes_per_sample"] / reference["bytes_per_sample"]
        lines.append(
            f"| {row['stage']} | {'on' if row['checkpointing'] else 'off'} | {row['model']} | {row['decoder_tokens']} "
            f"| {row['tokens_per_second']:.0f} | {row['samples_per_second']:.2f} | {speed:.2f} "
            f"| {row['bytes_per_sample'] / 1e6:.0f} | {memory:.2f} | {row['bytes'] / 1e9:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--output", type=Path, default=Path(f"training_{device}"), help="path without its ending")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--batch-size", type=int, default=2, help="rows of a timed step")
    parser.add_argument("--steps", type=int, default=9, help="timed steps")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = "3.2b" if args.device == "cuda" else "small"
    measured = measure(size, args.device, args.batch_size, args.steps)
    rows = list(tqdm(measured, total=len(MODELS) * len(STAGES) * 2, unit="case"))
    how = "measured" if args.device == "cuda" else "counted"
    title = (
        f"{hardware(args.device)} by autocast. Speed: size {size}, batch {args.batch_size}, median of {args.steps} "
        f"steps that take turns. Memory: size 3.2b, {how}. Ratios: to FlashSloth in the same case."
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps({"machine": title, "rows": rows}, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(f"{title}\n\n{as_table(rows)}\n", encoding="utf-8")
    logger.info("%s\n%s", title, as_table(rows))


if __name__ == "__main__":
    main()
