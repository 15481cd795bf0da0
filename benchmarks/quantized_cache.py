"""Accuracy and memory of a quantised KV cache, with the small checkpoint.

    pip install optimum-quanto hqq
    python benchmarks/quantized_cache.py --output benchmarks/results/quantized_cache_cpu.md

Every question of `examples/tiny/score.py` is asked alone, with its image, with each of transformers' caches. *Same* is
the share of answers that equal those with exact keys and values. Bytes are the size of the cache at the first token.
"""

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from quantization import bytes_of
from report import build_parser, describe_machine, markdown_table, write_report
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.generation_flashsloth import CACHE_NAME

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny"))
from score import Item, answer, build_inputs, scene_items  # noqa: E402

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
    """Arguments of `generate` for a cache."""
    config = CACHES[cache]
    return {} if config is None else {"cache_implementation": "quantized", "cache_config": config}


def prompt_bytes(model: FlashSlothForConditionalGeneration, inputs: dict[str, torch.Tensor], cache: str) -> int:
    """Memory of a prompt's KV cache."""
    output = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, **settings_for(cache))
    parts = tree_leaves([vars(layer) for layer in output[CACHE_NAME].layers])
    return sum(bytes_of(part) for part in parts if isinstance(part, torch.Tensor))


def compare(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    questions: list[Item],
    caches: Iterable[str] = CACHES,
) -> str:
    """Answer questions, one at a time, with every cache.

    Args:
        model: The model.
        processor: Its processor.
        questions: The questions; memory is measured on the first one's prompt.
        caches: Names of `CACHES`, exact keys and values first.

    Returns:
        A Markdown table.
    """
    inputs = build_inputs(processor, questions[:1]).to(model.device)
    length = inputs["input_ids"].shape[1]
    rows = []
    exact: list[str] | None = None
    for cache in caches:
        settings = settings_for(cache)
        found = [answer(model, processor, [question], **settings)[0] for question in tqdm(questions, desc=cache)]
        exact = exact or found
        right = sum(text == question.answer for text, question in zip(found, questions, strict=True))
        same = sum(text == other for text, other in zip(found, exact, strict=True))
        size = prompt_bytes(model, inputs, cache)
        shares = (f"{number / len(questions):.1%}" for number in (right, same))
        rows.append((cache, *shares, f"{size:,}", f"{size / length:,.0f}"))
        logger.info("%s", rows[-1])
    return markdown_table(("cache", "right", "same", f"bytes, {length} tokens", "a token"), rows)


def main() -> None:
    """Compare all caches, and write a table."""
    parser = build_parser(__doc__)
    parser.add_argument("--images", type=int, default=IMAGES, help="images, with about seven questions each")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT, dtype=torch.bfloat16).eval()
    questions = list(scene_items(args.images))
    table = compare(model, FlashSlothProcessor.from_pretrained(ROOT), questions)
    title = f"{describe_machine()}; {len(questions)} questions; made by benchmarks/quantized_cache.py."
    write_report(args.output, title, table)


if __name__ == "__main__":
    main()
