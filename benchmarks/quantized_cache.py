"""What keys and values in few bits do to the answers of the small checkpoint, and to their memory.

    pip install optimum-quanto hqq
    python benchmarks/quantized_cache.py --output benchmarks/results/quantized_cache_cpu.md

Every question of `examples/tiny/score.py` is asked alone, with its image, with each of transformers' caches.
*Same* are answers that equal those with exact keys and values. Bytes are those of the cache when the first token is
there.
"""

import argparse
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from latency import hardware
from quantization import bytes_of
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.generation_flashsloth import CACHE_NAME

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny"))
from score import Question, answer, build_inputs, evaluation_set  # noqa: E402

logger = logging.getLogger(__name__)

CACHES: dict[str, dict[str, Any] | None] = {
    "bfloat16": None,
    "8 bits, HQQ": {"backend": "hqq", "nbits": 8},
    "float8": {"backend": "fp8"},
    "4 bits, quanto": {"backend": "quanto", "nbits": 4},
    "4 bits, HQQ": {"backend": "hqq", "nbits": 4},
    "2 bits, HQQ": {"backend": "hqq", "nbits": 2},
    "2 bits, quanto": {"backend": "quanto", "nbits": 2},
}
IMAGES = 100


def settings_for(cache: str) -> dict[str, Any]:
    """Arguments of `generate`."""
    config = CACHES[cache]
    return {} if config is None else {"cache_implementation": "quantized", "cache_config": config}


def prompt_bytes(model: FlashSlothForConditionalGeneration, inputs: dict[str, torch.Tensor], cache: str) -> int:
    """Memory of what a cache keeps of a prompt."""
    output = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, **settings_for(cache))
    parts = tree_leaves([vars(layer) for layer in output[CACHE_NAME].layers])
    return sum(bytes_of(part) for part in parts if isinstance(part, torch.Tensor))


def compare(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    questions: list[Question],
    caches: Iterable[str] = CACHES,
) -> str:
    """Answer questions, one at a time, with every cache.

    Args:
        model: The model.
        processor: Its processor.
        questions: What is asked; memory is that of the first one's prompt.
        caches: Names of `CACHES`, exact keys and values first.

    Returns:
        A Markdown table.
    """
    inputs = build_inputs(processor, questions[:1]).to(model.device)
    length = inputs["input_ids"].shape[1]
    lines = [f"| cache | right | same | bytes, {length} tokens | a token |", "|---|---:|---:|---:|---:|"]
    exact: list[str] | None = None
    for cache in caches:
        settings = settings_for(cache)
        found = [answer(model, processor, [question], **settings)[0] for question in tqdm(questions, desc=cache)]
        exact = exact or found
        right = sum(text == question.answer for text, question in zip(found, questions, strict=True))
        same = sum(text == other for text, other in zip(found, exact, strict=True))
        size = prompt_bytes(model, inputs, cache)
        shares = (f"{number / len(questions):.1%}" for number in (right, same))
        lines.append(f"| {' | '.join([cache, *shares, f'{size:,}', f'{size / length:,.0f}'])} |")
        logger.info("%s", lines[-1])
    return "\n".join(lines)


def main() -> None:
    """Compare all caches, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--images", type=int, default=IMAGES, help="with about seven questions each")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT, dtype=torch.bfloat16).eval()
    questions = list(evaluation_set(args.images))
    table = compare(model, FlashSlothProcessor.from_pretrained(ROOT), questions)
    title = f"{hardware('cpu')}; {len(questions)} questions; made by benchmarks/quantized_cache.py."
    args.output.write_text(f"{title}\n\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
