"""Speed of FlashSloth's image processor beside transformers' own for SigLIP, both on Pillow.

    python benchmarks/preprocessing.py --output benchmarks/results/preprocessing_cpu.md

Medians of rounds in which the processors take turns on the same images, in one process; ratios are to SigLIP's, which
makes one tile of 384×384 pixels of every image. Images are RGB already, but for the photo, which is decoded from a
JPEG by whoever gets it. Batches are worked on in as many threads as torch may use.
"""

import argparse
import io
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
import transformers
from latency import hardware
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from flashsloth import FlashSlothImageProcessor

logger = logging.getLogger(__name__)

ROUNDS = 9
CELL = 32  # pixels between the random colours of an image; smooth in between, as photos are
CASES = {  # width, height, number of images, whether they are JPEG files
    "336×336": (336, 336, 1, False),
    "1344×1344": (1344, 1344, 1, False),
    "photo of 12 megapixels": (4000, 3000, 1, True),
    "16 of 1344×1344": (1344, 1344, 16, False),
}


def draw(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """A smooth image of random colours."""
    colours = generator.integers(0, 256, (height // CELL, width // CELL, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def opener(width: int, height: int, number: int, is_file: bool) -> Callable[[], list[Image.Image]]:
    """What opens the images of a case afresh."""
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


def table(results: dict[str, dict[str, float]]) -> str:
    """The report, in Markdown."""
    lines = [
        f"{hardware('cpu').partition(',')[0]}, {torch.get_num_threads()} threads, "
        f"transformers {transformers.__version__}, Pillow {PIL.__version__}; made by benchmarks/preprocessing.py.",
        "",
        "| images | SigLIP, ms | FlashSloth | ratio | FlashSloth-HD, 5 tiles | ratio |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, (siglip, plain, high) in ((name, times.values()) for name, times in results.items()):
        figures = (f"{1e3 * siglip:.1f}", f"{1e3 * plain:.1f}", f"{plain / siglip:.2f}", f"{1e3 * high:.1f}")
        lines.append(f"| {' | '.join((name, *figures, f'{high / siglip:.2f}'))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file to write the table to")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results = {}
    for name, case in CASES.items():
        results[name] = measure(opener(*case), arguments.rounds)
        logger.info("%s: %s", name, results[name])
    arguments.output.write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
