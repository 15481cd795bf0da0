"""Speed of eager attention and a static cache in the decoder on a CPU, compared with transformers' defaults.

    python benchmarks/decoder_attention.py --output benchmarks/results/decoder_attention_cpu.md

The workload is that of `latency.py`: FlashSloth-3.2B with random weights in bfloat16 answers a question of 40 tokens by
`generate`. On a CPU, PyTorch's fused attention reads the KV cache slowly when there is a single query, as in a decoding
step, and transformers' default cache is copied in every step. The combinations take turns; times are medians over
rounds, and ratios are to the defaults. `tests/test_checkpoint.py` tests that they all give the same answers.
"""

import logging
from functools import partial
from typing import Any

from latency import Candidate, answer, build_filled, medians_in_turns
from peers import PEERS, TILE_SIDE
from report import build_parser, describe_machine, describe_rounds, markdown_table, write_report

logger = logging.getLogger(__name__)

WORK = (("FlashSloth-3.2B", 1), ("FlashSloth-HD-3.2B", 1), ("FlashSloth-3.2B", 8))  # batch sizes
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults: sdpa, dynamic cache": ("sdpa", {}),
    "eager": ("eager", {}),
    "static cache": ("sdpa", {"cache_implementation": "static"}),
    "eager, static cache": ("eager", {"cache_implementation": "static"}),
}
"""The decoder's `attn_implementation`, and arguments of `generate`."""


def measure(candidate: Candidate, batch_size: int, new_tokens: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds to the first token and per token of every combination, after one warm-up round."""
    inputs = candidate.inputs(TILE_SIDE, batch_size)

    def work(attention: str, arguments: dict[str, Any], is_warmup: bool) -> dict[str, float | None]:
        candidate.model.set_attn_implementation({"text_config": attention})
        return answer(candidate.model, inputs | arguments, 2 if is_warmup else new_tokens)

    medians = medians_in_turns({way: partial(work, *settings) for way, settings in WAYS.items()}, rounds)
    return {way: (figures["first_token_s"], figures["token_s"]) for way, figures in medians.items()}


def main() -> None:
    """Measure, and write a table."""
    parser = build_parser(__doc__)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for name, batch_size in WORK:
        peer = next(peer for peer in PEERS if peer.name == name)
        measured = measure(Candidate(peer, build_filled(peer, "cpu")), batch_size, args.new_tokens, args.rounds)
        default = next(iter(measured.values()))
        for way, times in measured.items():
            pairs = ((f"{own * 1e3:.0f}", f"{own / first:.2f}") for own, first in zip(times, default, strict=True))
            rows.append([name, batch_size, way, *(cell for pair in pairs for cell in pair)])
            logger.info("%s", rows[-1])
    title = (
        f"{describe_machine()}; {args.new_tokens} tokens, {describe_rounds(args.rounds)}; made by "
        "benchmarks/decoder_attention.py."
    )
    head = ("model", "batch", "decoder", "first token, ms", "ratio", "ms a token", "ratio")
    write_report(args.output, title, markdown_table(head, rows, text_columns=(0, 2)))


if __name__ == "__main__":
    main()
