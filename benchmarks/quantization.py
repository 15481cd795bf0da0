"""What eight and four bits, and threads, do to the speed of FlashSloth-3.2B on a CPU.

    python benchmarks/quantization.py --output benchmarks/results/quantization_cpu.md

Random weights; the decoder's layers are quantised by torchao as docs/converting.md does. All answer a question of 40
tokens about one picture by `generate`, and take turns, at every number of threads. Figures are medians; ratios are to
bfloat16 with as many threads, and to one thread at the same precision.
"""

import argparse
import logging
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from latency import Candidate, answer, build_filled, hardware
from peers import PEERS, Peer
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_

logger = logging.getLogger(__name__)

PRECISIONS = {
    "bfloat16": None,
    "int8": Int8WeightOnlyConfig(version=2),
    "int4": PrototypeInt4WeightOnlyConfig(group_size=32),
}
FIGURES = ("first_token_s", "token_s")
NEW_TOKENS, ROUNDS = 16, 3
SIDE = 384  # pixels; every picture becomes tiles of one size


class Row(NamedTuple):
    """Median seconds of one precision with a number of threads."""

    precision: str
    num_threads: int
    first_token_s: float
    token_s: float


def build(peer: Peer, precision: str) -> Candidate:
    """The model with random weights, its decoder's layers in a precision."""
    candidate = Candidate(peer, build_filled(peer, "cpu"))
    if config := PRECISIONS[precision]:
        quantize_(candidate.model.model.language_model.layers, config)
    return candidate


def measure(peer: Peer, threads: list[int], new_tokens: int, rounds: int, batch_size: int) -> Iterator[Row]:
    """Let all precisions answer in turns, after a round that is not counted."""
    candidates = {precision: build(peer, precision) for precision in PRECISIONS}
    inputs = candidates["bfloat16"].inputs(SIDE, batch_size)
    before = torch.get_num_threads()
    try:
        for num_threads in threads:
            torch.set_num_threads(num_threads)
            runs: dict[str, list[dict[str, Any]]] = {precision: [] for precision in PRECISIONS}
            for turn in range(rounds + 1):
                for precision, candidate in candidates.items():
                    run = answer(candidate.model, inputs, new_tokens if turn else 2)
                    runs[precision] += [run] if turn else []
            for precision, done in runs.items():
                yield Row(precision, num_threads, *(statistics.median(run[name] for run in done) for name in FIGURES))
    finally:
        torch.set_num_threads(before)


def table(rows: list[Row]) -> str:
    """Markdown, with ratios."""
    known = {(row.precision, row.num_threads): row for row in rows}
    fewest = min(row.num_threads for row in rows)
    ratios = ("to bfloat16", f"to {fewest} thread{'s' * (fewest > 1)}")
    head = ["precision", "threads"]
    for name in ("first token", "a token"):
        head += [f"{name}, ms", *ratios]
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * (len(head) - 1))]
    for row in rows:
        cells = [row.precision, str(row.num_threads)]
        for name in FIGURES:
            own = getattr(row, name)
            others = known["bfloat16", row.num_threads], known[row.precision, fewest]
            cells += [f"{own * 1e3:.0f}", *(f"{own / getattr(other, name):.2f}" for other in others)]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    """Measure, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    machine = hardware("cpu")
    rows = []
    for row in measure(PEERS[0], args.threads, args.new_tokens, args.rounds, args.batch_size):
        logger.info("%s", row)
        rows.append(row)
    title = (
        f"{PEERS[0].name}, batch {args.batch_size}, {machine}; {args.new_tokens} tokens, medians of {args.rounds} "
        "rounds; made by benchmarks/quantization.py."
    )
    args.output.write_text(f"{title}\n\n{table(rows)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
