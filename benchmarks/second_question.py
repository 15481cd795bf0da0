"""What a second question about an image costs, beside the first, with `model.image_prefix_cache()`.

    python benchmarks/second_question.py --output benchmarks/results/second_question_cpu.md

Time from inputs on the device to the first token, for a question of 40 tokens, batch 1, random weights in bfloat16:
without a cache, for the first question to an empty cache, which encodes the image, and for another question. Medians
of rounds in which the three take turns; ratios are to no cache. What the cache keeps is in the last column.
"""

import argparse
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from latency import Candidate, build_filled, hardware
from peers import PEERS, QUESTION_IDS

logger = logging.getLogger(__name__)

MODELS = ("FlashSloth-3.2B", "FlashSloth-HD-3.2B", "FlashSloth + Qwen3-1.7B", "FlashSloth + Qwen3-0.6B")
ROUNDS = 5
SIDE = 384  # pixels; every image becomes tiles of one size


def seconds_to_first_token(model: Any, inputs: dict[str, Any], cache: Any = None) -> float:
    """Time of one prefill by `generate`, with the cache's own work."""
    start = time.perf_counter()
    ready = inputs if cache is None else cache(inputs)
    model.generate(**ready, max_new_tokens=1).tolist()  # which waits for the device
    return time.perf_counter() - start


def measure(candidate: Candidate, rounds: int) -> tuple[list[float], int]:
    """Median seconds without a cache, for a first and for a second question; and the bytes that are kept."""
    first = candidate.inputs(SIDE, 1)
    ids = first["input_ids"]
    is_question = (ids >= QUESTION_IDS[0]) & (ids < QUESTION_IDS[1])
    second = first | {"input_ids": ids + is_question.long()}
    times: list[list[float]] = []
    for turn in range(rounds + 1):
        cache = candidate.model.image_prefix_cache()
        done = [
            seconds_to_first_token(candidate.model, first),
            seconds_to_first_token(candidate.model, first, cache),
            seconds_to_first_token(candidate.model, second, cache),
        ]
        (known,) = cache.known.values()
        times += [done] if turn else []
    return [statistics.median(column) for column in zip(*times, strict=True)], known.num_bytes


def main() -> None:
    """Measure all models, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    lines = [
        f"{hardware(args.device)}; medians of {args.rounds} rounds; made by benchmarks/second_question.py.",
        "",
        "| model | no cache, ms | first question | ratio | second question | ratio | kept, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for peer in (peer for peer in PEERS if peer.name in args.models):
        (plain, first, second), num_bytes = measure(Candidate(peer, build_filled(peer, args.device)), args.rounds)
        cells = [f"{plain * 1e3:.0f}"]
        cells += [cell for value in (first, second) for cell in (f"{value * 1e3:.0f}", f"{value / plain:.2f}")]
        lines.append(f"| {' | '.join([peer.name, *cells, f'{num_bytes / 1e6:.1f}'])} |")
        logger.info("%s", lines[-1])
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
