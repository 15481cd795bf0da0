"""How many requests a GPU serves: an estimate from counts, without running anything.

    python benchmarks/capacity.py --output benchmarks/results/capacity.md

The counts are those of `latency.py --counts-only`. A request is a question of 40 tokens about an image, answered in 64
tokens, in bfloat16. With `q` questions about an image, the prefix cache of the server holds the image after the first:

    tokens of a prompt that are computed   P for the first question, then S = 64: the question, its query tokens, and
                                           what its last cached block lacks
    FLOPs before the first token           (vision + prefill + (q - 1) * prefill * S / P) / q + look-up
    look-up of the query tokens            2 * patches * (C * W + W**2 + C**2): patches are projected for each question
    bytes of the KV cache of a request     ((P + (q - 1) * S) / q + A / 2) * (KV + token cache)
    concurrent requests                    (0.9 * memory - weights - 4 GB) / bytes of a request, at most 256
    seconds of a request                   FLOPs / (0.5 * peak FLOPs) + A * step / concurrent requests
    step of decoding, seconds              (weights + concurrent requests * KV bytes) / (0.7 * bandwidth)

`C` and `W` are the widths of patches and of the Embedded Query module. The token cache is the further layer of the KV
cache that FlashSloth has in vLLM (`serving/token_cache.py`); decoding does not read it. 0.5 and 0.7 are assumptions on
what a server reaches of the peaks, the same for all models.
"""

import json
from pathlib import Path
from typing import NamedTuple

from report import build_parser, markdown_table, write_report

from flashsloth import FlashSlothConfig

COUNTS = Path(__file__).parent / "results" / "counts.json"
ANSWER_TOKENS, SUFFIX_TOKENS = 64, 64
MAX_REQUESTS = 256
RESERVED_BYTES, MEMORY_SHARE = 4e9, 0.9
FLOPS_SHARE, BANDWIDTH_SHARE = 0.5, 0.7
TOKEN_CACHE_MULTIPLE = 16
BYTES_PER_VALUE = 2
QUESTIONS = (1, 100)
ROWS = [
    ("FlashSloth-3.2B", 1344),
    ("FlashSloth-HD-3.2B", 1344),
    ("FlashSloth + Qwen3-1.7B", 1344),
    ("FlashSloth + Qwen3-0.6B", 1344),
    ("Qwen2-VL-2B", 336),
    ("Qwen2-VL-2B", 1344),
    ("SmolVLM2-2.2B", 1344),
]


class Gpu(NamedTuple):
    """A GPU: memory in bytes, bandwidth in bytes per second, dense bfloat16 FLOPs per second."""

    name: str
    memory: float
    bandwidth: float
    flops: float


GPUS = [Gpu("H100", 80e9, 3.35e12, 989e12), Gpu("H200", 141e9, 4.8e12, 989e12)]


class Estimate(NamedTuple):
    """Requests that a GPU serves per second and at once, and what limits them."""

    per_second: float
    concurrent: float
    bound: str


def token_cache_bytes(config: FlashSlothConfig) -> int:
    """Bytes per token of the token cache in vLLM."""
    width = 3 + config.query_hidden_size + config.pooling_window_size**2 * config.vision_config.hidden_size
    return -(-width // TOKEN_CACHE_MULTIPLE) * TOKEN_CACHE_MULTIPLE * BYTES_PER_VALUE


def look_up_flops(config: FlashSlothConfig, visual_tokens: int) -> float:
    """FLOPs of projecting the patches that the query tokens of a question read."""
    width, vision_width = config.query_hidden_size, config.vision_config.hidden_size
    num_patches = visual_tokens * config.pooling_window_size**2
    return 2 * num_patches * (vision_width * width + width**2 + vision_width**2)


def estimate(name: str, counts: dict[str, float], gpu: Gpu, questions: int) -> Estimate:
    """Estimate what a GPU serves.

    Args:
        name: Name of the model.
        counts: Its counts, from `latency.py`.
        gpu: The GPU.
        questions: Questions about each image.
    """
    is_flashsloth = name.startswith("FlashSloth")
    config = FlashSlothConfig()
    prompt = counts["prompt_tokens"]
    later = min(SUFFIX_TOKENS, prompt)
    prefill = counts["prefill_flops"] * (1 + (questions - 1) * later / prompt) / questions
    look_up = look_up_flops(config, int(counts["visual_tokens"])) if is_flashsloth else 0
    seconds = (counts["vision_flops"] / questions + prefill + look_up) / (FLOPS_SHARE * gpu.flops)
    tokens = (prompt + (questions - 1) * later) / questions + ANSWER_TOKENS / 2
    stored = tokens * (counts["kv_token_bytes"] + (token_cache_bytes(config) if is_flashsloth else 0))
    free = MEMORY_SHARE * gpu.memory - counts["parameters"] * BYTES_PER_VALUE - RESERVED_BYTES
    concurrent = min(free / stored, MAX_REQUESTS)
    read = (prompt + ANSWER_TOKENS / 2) * counts["kv_token_bytes"]
    step = (counts["decoder_bytes"] + concurrent * read) / (BANDWIDTH_SHARE * gpu.bandwidth)
    decoding = ANSWER_TOKENS * step / concurrent
    decoding_bound = "KV memory" if concurrent < MAX_REQUESTS else "decode bandwidth"
    bound = decoding_bound if decoding > seconds else "FLOPs before the first token"
    return Estimate(1 / (seconds + decoding), concurrent, bound)


def as_table(cases: list[dict]) -> str:
    """The table, from the cases in `counts.json`."""
    counts = {(case["model"], case["side"]): case["counts"] for case in cases}
    rows = []
    for name, side in ROWS:
        for questions in QUESTIONS:
            found = [estimate(name, counts[name, side], gpu, questions) for gpu in GPUS]
            sizes = "any" if name.startswith(("FlashSloth", "SmolVLM2")) else str(side)
            numbers = [f"{one.per_second:.0f}" for one in found] + [f"{one.concurrent:.0f}" for one in found]
            rows.append([name, sizes, questions, *numbers, found[0].bound])
    head = ["model", "image, px", "questions an image"]
    head += [f"requests per second, {gpu.name}" for gpu in GPUS] + [f"at once, {gpu.name}" for gpu in GPUS]
    return markdown_table((*head, "bound first (H100)"), rows, text_columns=(0, len(head)))


def main() -> None:
    """Write the table."""
    args = build_parser(__doc__).parse_args()
    title = "Computed, not measured; the formulas are in benchmarks/capacity.py."
    write_report(args.output, title, as_table(json.loads(COUNTS.read_text(encoding="utf-8"))["cases"]))


if __name__ == "__main__":
    main()
