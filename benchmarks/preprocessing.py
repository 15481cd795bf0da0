"""Speed of FlashSloth's image processor, compared with transformers' SigLIP processor; both use Pillow.

    python benchmarks/preprocessing.py --output benchmarks/results/preprocessing_cpu.md

The processors take turns on the same images in one process; times are medians over rounds, and ratios are to SigLIP's,
which makes one tile of 384×384 pixels from every image. Images are already RGB, except the photo: it is a JPEG file
that each processor decodes anew. Batches are processed with as many threads as torch may use.
"""

import io
import logging
import statistics
import time
from collections.abc import Callable

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from report import build_parser, cpu_name, markdown_table, write_report
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from flashsloth import FlashSlothImageProcessor

logger = logging.getLogger(__name__)

ROUNDS = 9
CELL = 32  # pixels between the random colours of an image; smooth in between, like a photo
CASES = {  # width, height, number of images, whether they are JPEG files
    "336×336": (336, 336, 1, False),
    "1344×1344": (1344, 1344, 1, False),
    "photo of 12 megapixels": (4000, 3000, 1, True),
    "16 of 1344×1344": (1344, 1344, 16, False),
}


def draw(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """Draw a smooth image of random colours."""
    colours = generator.integers(0, 256, (height // CELL, width // CELL, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def opener(width: int, height: int, number: int, is_file: bool) -> Callable[[], list[Image.Image]]:
    """Return a function that opens the images of a case anew."""
    generator = np.random.default_rng(0)
    images = [draw(width, height, generator) for _ in range(number)]
    if not is_file:
        return lambda: images
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        image.save(file, "JPEG", quality=90)
    return lambda: [Image.open(io.BytesIO(file.getvalue())) for file in files]


def measure(open_images: Callable[[], list[Image.Image]], rounds: int) -> dict[str, float]:
    """Median seconds of every processor."""
    size = {"height": 384, "width": 384}
    processors = {
        "SigLIP": SiglipImageProcessorPil(size=size, resample=Image.Resampling.BICUBIC),
        "FlashSloth": FlashSlothImageProcessor(),
        "FlashSloth-HD": FlashSlothImageProcessor(do_image_splitting=True),
    }
    times: dict[str, list[float]] = {name: [] for name in processors}
    for _ in range(rounds):
        for name, processor in processors.items():
            images = open_images()
            start = time.perf_counter()
            processor(images, return_tensors="pt")
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def as_table(results: dict[str, dict[str, float]]) -> str:
    """Format the times of all cases as Markdown."""
    rows = []
    for name, times in results.items():
        siglip, plain, high = times.values()
        figures = (f"{1e3 * siglip:.1f}", f"{1e3 * plain:.1f}", f"{plain / siglip:.2f}", f"{1e3 * high:.1f}")
        rows.append((name, *figures, f"{high / siglip:.2f}"))
    head = ("images", "SigLIP, ms", "FlashSloth", "ratio", "FlashSloth-HD, 5 tiles", "ratio")
    return markdown_table(head, rows)


def main() -> None:
    """Measure all cases, and write a table."""
    parser = build_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results = {}
    for name, case in CASES.items():
        results[name] = measure(opener(*case), args.rounds)
        logger.info("%s: %s", name, results[name])
    title = (
        f"{cpu_name()}, {torch.get_num_threads()} threads, transformers {transformers.__version__}, Pillow "
        f"{PIL.__version__}; made by benchmarks/preprocessing.py."
    )
    write_report(args.output, title, as_table(results))


if __name__ == "__main__":
    main()
