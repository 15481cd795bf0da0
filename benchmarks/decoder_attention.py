"""What plain attention and a static cache in the decoder are worth on a CPU, beside transformers' defaults.

    python benchmarks/decoder_attention.py --output benchmarks/results/decoder_attention_cpu.md

The same work as in `latency.py`, by `generate`: FlashSloth-3.2B with random weights in bfloat16, a question of 40
tokens. PyTorch's fused attention reads the cache slowly there when it has a single query, as in a step of decoding, and
transformers' default cache is copied at every step. Medians of rounds in which the ways to do it take turns; ratios are
to the defaults. That the answers do not depend on it is tested in `tests/test_checkpoint.py`.
"""

import argparse
import logging
import statistics
from pathlib import Path
from typing import Any

from latency import Candidate, answer, build_filled, count_rounds, hardware
from peers import PEERS

logger = logging.getLogger(__name__)

WORK = (("FlashSloth-3.2B", 1), ("FlashSloth-HD-3.2B", 1), ("FlashSloth-3.2B", 8))  # batch sizes
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults: sdpa, dynamic cache": ("sdpa", {}),
    "eager": ("eager", {}),
    "static cache": ("sdpa", {"cache_implementation": "static"}),
    "eager, static cache": ("eager", {"cache_implementation": "static"}),
}
"""The decoder's `attn_implementation`, and arguments of `generate`."""

SIDE = 384  # pixels; every image becomes tiles of one size


def measure(candidate: Candidate, batch_size: int, new_tokens: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds to the first token and of a token, of every way; after a round that is not counted."""
    inputs = candidate.inputs(SIDE, batch_size)
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for turn in range(rounds + 1):
        for way, (attention, arguments) in WAYS.items():
            candidate.model.set_attn_implementation({"text_config": attention})
            run = answer(candidate.model, inputs | arguments, new_tokens if turn else 2)
            runs[way] += [run] if turn else []
    return {
        way: tuple(statistics.median(run[name] for run in done) for name in ("first_token_s", "token_s"))
        for way, done in runs.items()
    }


def main() -> None:
    """Measure, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    lines = [
        f"{hardware('cpu')}; {args.new_tokens} tokens, {count_rounds(args.rounds)}; made by "
        "benchmarks/decoder_attention.py.",
        "",
        "| model | batch | decoder | first token, ms | ratio | ms a token | ratio |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for name, batch_size in WORK:
        peer = next(peer for peer in PEERS if peer.name == name)
        measured = measure(Candidate(peer, build_filled(peer, "cpu")), batch_size, args.new_tokens, args.rounds)
        default = next(iter(measured.values()))
        for way, times in measured.items():
            pairs = ((f"{own * 1e3:.0f}", f"{own / first:.2f}") for own, first in zip(times, default, strict=True))
            cells = [cell for pair in pairs for cell in pair]
            lines.append(f"| {' | '.join([name, str(batch_size), way, *cells])} |")
            logger.info("%s", lines[-1])
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
