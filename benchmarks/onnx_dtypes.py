"""Answers and sizes of the ONNX graphs in every data type.

    python benchmarks/onnx_dtypes.py --output benchmarks/results/onnx_dtypes.md

The shipped checkpoint answers the questions of `examples/tiny/score.py` with the graphs of `flashsloth onnx`, run by
onnxruntime. The table counts right answers, those that are the same as in float32, and the bytes of the graphs.
"""

import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from report import build_parser, describe_machine, markdown_table, write_report

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli import ONNX_DTYPES
from flashsloth.cli.onnx import convert_graphs, export_onnx

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "tiny")]
from ask_onnx import OnnxFlashSloth  # noqa: E402
from score import MAX_ANSWER_TOKENS, Item, build_inputs, scene_items  # noqa: E402

logger = logging.getLogger(__name__)

IMAGES, BATCH_SIZE = 200, 25


class Answers(NamedTuple):
    """Answers of one data type to all questions."""

    dtype: str
    texts: list[str]
    num_bytes: int


def compare(num_images: int, dtypes: Sequence[str]) -> Iterator[Answers]:
    """Export the checkpoint, and answer the questions in every data type."""
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    asked = list(scene_items(num_images))
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / ONNX_DTYPES[0]
        model = FlashSlothForConditionalGeneration.from_pretrained(ROOT)
        export_onnx(model, processor, plain)
        for dtype in dtypes:
            graphs = Path(folder) / dtype
            if graphs != plain:
                graphs.mkdir()
                convert_graphs(plain, graphs, dtype)
                model.generation_config.save_pretrained(graphs)
            num_bytes = sum(file.stat().st_size for file in graphs.glob("*.onnx*"))
            texts = answer(OnnxFlashSloth(graphs), processor, asked)
            num_right = sum(text == question.answer for text, question in zip(texts, asked, strict=True))
            logger.info("%s: %d of %d right, %.1f MB", dtype, num_right, len(asked), num_bytes / 1e6)
            yield Answers(dtype, texts, num_bytes)


def answer(model: OnnxFlashSloth, processor: FlashSlothProcessor, asked: list[Item]) -> list[str]:
    """Answer questions, each about its own image."""
    texts = []
    for start in range(0, len(asked), BATCH_SIZE):
        inputs = build_inputs(processor, asked[start : start + BATCH_SIZE])
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        texts += processor.post_process_image_text_to_text(_cut(model.generate(arrays, MAX_ANSWER_TOKENS), model))
    return texts


def _cut(answers: list, model: OnnxFlashSloth) -> list[list[int]]:
    """Token ids up to the first end token; after it, the example repeats the last one."""
    rows = [row.tolist() for row in answers]
    ends = set(model.end_ids.tolist())
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def table(rows: list[Answers], expected: list[str]) -> str:
    """Format the figures; `rows` begins with float32."""
    head = ["", "exact match", "same as float32", "graphs"]
    cells = [
        [
            row.dtype,
            _share(row.texts, expected),
            _share(row.texts, rows[0].texts),
            f"{row.num_bytes / 1e6:.1f} MB",
        ]
        for row in rows
    ]
    return markdown_table(head, cells)


def _share(texts: list[str], expected: list[str]) -> str:
    num_equal = sum(text == other for text, other in zip(texts, expected, strict=True))
    return f"{num_equal} of {len(expected)}, {num_equal / len(expected):.2%}"


def main() -> None:
    """Answer the questions in every data type, and write a table."""
    parser = build_parser(__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--dtypes", nargs="+", choices=ONNX_DTYPES, default=ONNX_DTYPES, help="besides float32")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = list(compare(args.images, [ONNX_DTYPES[0], *(dtype for dtype in args.dtypes if dtype != ONNX_DTYPES[0])]))
    expected = [question.answer for question in scene_items(args.images)]
    write_report(
        args.output,
        f"{describe_machine(dtype='ONNX')}; made by benchmarks/onnx_dtypes.py.",
        f"Answers of the small checkpoint to questions about {args.images} images.",
        table(rows, expected),
    )


if __name__ == "__main__":
    main()
