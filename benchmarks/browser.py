"""Times of the page of web/ in headless Chromium, beside those of PyTorch and onnxruntime on the same machine.

    npm --prefix web ci
    python benchmarks/browser.py --output benchmarks/results/browser.md

The shipped checkpoint describes a drawn scene. Every candidate answers once to warm up and then `--rounds` times, and
candidates take turns. Figures are medians: encoding the image, the time from the question to the first token (without
the encoding), and the time per further token.
"""

import argparse
import logging
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from report import build_parser, describe_machine, markdown_table, write_report

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli.onnx import convert_graphs, export_onnx

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]
IMAGE, QUESTION = ROOT / "examples" / "shapes.png", "Describe the picture."
ROUNDS = 5
DTYPES = ("float32", "int8")

logger = logging.getLogger(__name__)


class Times(NamedTuple):
    """Seconds of one answer; `encode` includes the image's preprocessing, `first_token` begins after it."""

    encode: float
    first_token: float
    token: float


def time_torch(dtype: torch.dtype) -> Callable[[], Times]:
    """Answers of PyTorch, with the image encoded once."""
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT, dtype=dtype).eval()
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    content = [{"type": "image", "image": Image.open(IMAGE)}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]

    def generate(patches: torch.Tensor, inputs: dict[str, torch.Tensor], num_tokens: int) -> tuple[float, int]:
        begin = time.perf_counter()
        output = model.generate(**inputs, patch_features=patches, max_new_tokens=num_tokens)
        return time.perf_counter() - begin, output.shape[1] - inputs["input_ids"].shape[1]

    @torch.inference_mode()
    def run() -> Times:
        begin = time.perf_counter()
        inputs = dict(processor.encode_conversations(messages))
        patches = model.get_image_features(inputs.pop("pixel_values").to(dtype)).last_hidden_state
        encode = time.perf_counter() - begin
        first, _ = generate(patches, inputs, 1)
        whole, num_tokens = generate(patches, inputs, 64)
        return Times(encode, first, (whole - first) / max(num_tokens - 1, 1))

    return run


def time_onnxruntime(folder: Path) -> Callable[[], Times]:
    """Answers of onnxruntime in Python, with the image encoded once."""
    from ask_onnx import OnnxFlashSloth

    model, processor = OnnxFlashSloth(folder), FlashSlothProcessor.from_pretrained(ROOT)
    content = [{"type": "image", "image": Image.open(IMAGE)}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    vision = model.vision

    def generate(inputs: dict[str, np.ndarray], num_tokens: int) -> tuple[float, int]:
        begin = time.perf_counter()
        answers = model.generate(inputs, num_tokens)
        return time.perf_counter() - begin, answers.shape[1]

    def run() -> Times:
        begin = time.perf_counter()
        inputs = {name: tensor.numpy() for name, tensor in processor.encode_conversations(messages).items()}
        encoded = vision.run(None, {"pixel_values": inputs["pixel_values"]})
        encode = time.perf_counter() - begin
        model.vision = SimpleNamespace(run=lambda *_: encoded)
        first, _ = generate(inputs, 1)
        whole, num_tokens = generate(inputs, 64)
        return Times(encode, first, (whole - first) / max(num_tokens - 1, 1))

    return run


@contextmanager
def open_page(url: str) -> Iterator[Callable[[], Times]]:
    """Answers of the page at an address."""
    from web_page import Page, open_browser

    with tempfile.TemporaryDirectory() as profile:
        browser = open_browser(profile)
        try:
            page = Page(browser, url)

            def run() -> Times:
                page.show(IMAGE)
                encode = float(page.script("return document.querySelector('#timings').dataset.encoded"))
                page.ask(QUESTION)
                timings = page.timings()
                return Times(encode, timings["firstToken"], timings["perToken"])

            yield run
        finally:
            browser.quit()


def measure(candidates: dict[str, Callable[[], Times]], rounds: int) -> dict[str, Times]:
    """Medians of all candidates, which take turns."""
    found: dict[str, list[Times]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            times = run()
            logger.info("%s: %s", name, times)
            if number:
                found[name].append(times)
    return {name: Times(*map(statistics.median, zip(*rows, strict=True))) for name, rows in found.items()}


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Times]:
    """Export the checkpoint, build and serve the page, and measure everything."""
    from web_page import ISOLATION, Site, build

    page = folder / "page"
    build(page)
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT)
    export_onnx(model, FlashSlothProcessor.from_pretrained(ROOT), page / "float32")
    shutil.copytree(page / "float32", page / "int8", ignore=shutil.ignore_patterns("*.onnx*"))
    convert_graphs(page / "float32", page / "int8", "int8")
    site = Site(page, ISOLATION)
    with ExitStack() as stack:
        stack.callback(site.stop)
        candidates: dict[str, Any] = {}
        for dtype in (torch.float32, torch.bfloat16):
            candidates[f"PyTorch, {str(dtype).removeprefix('torch.')}"] = time_torch(dtype)
        for dtype in DTYPES:
            candidates[f"onnxruntime in Python, {dtype}"] = time_onnxruntime(page / dtype)
        for dtype in DTYPES:
            for threads in sorted({1, torch.get_num_threads()}):
                name = f"Chromium, WebAssembly, {threads} thread{'s' * (threads > 1)}, {dtype}"
                url = f"{site.url}?model=./{dtype}/&backend=wasm&threads={threads}"
                candidates[name] = stack.enter_context(open_page(url))
        return measure(candidates, args.rounds)


def table(rows: dict[str, Times]) -> str:
    """Format the times."""
    head = ["", "image, ms", "first token, ms", "a token, ms"]
    cells = [[name, *(f"{1e3 * seconds:.1f}" for seconds in times)] for name, times in rows.items()]
    return markdown_table(head, cells)


def main() -> None:
    """Measure, and write a table."""
    parser = build_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(args, Path(folder))
    write_report(
        args.output,
        f"{describe_machine(dtype='see below')}; made by benchmarks/browser.py.",
        f"The small checkpoint answers {QUESTION!r}; medians of {args.rounds} rounds.",
        table(rows),
    )


if __name__ == "__main__":
    main()
