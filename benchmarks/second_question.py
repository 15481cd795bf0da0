"""Time to the first token of a second question about an image, with `model.image_prefix_cache()`.

    python benchmarks/second_question.py --output benchmarks/results/second_question_cpu.md

With `--compiled`, all three run with `model.compiled_prefill()`.

Measured from inputs on the device to the first token, for questions of 40 tokens, batch 1, random weights in bfloat16:
without a cache; for the first question to an empty cache, which encodes the image; and for another question about the
same image. The three take turns; times are medians over rounds, and ratios are to the time without a cache. The last
column is the memory that the cache keeps.
"""

import logging
import statistics
import time
from typing import Any

from compiled import MAX_CACHE_LEN, WARM_UPS, compile_config
from latency import Candidate, build_filled
from peers import PEERS, QUESTION_IDS, TILE_SIDE
from report import add_device_option, build_parser, describe_machine, markdown_table, write_report

logger = logging.getLogger(__name__)

MODELS = ("FlashSloth-3.2B", "FlashSloth-HD-3.2B", "FlashSloth + Qwen3-1.7B", "FlashSloth + Qwen3-0.6B")
ROUNDS = 5


def seconds_to_first_token(model: Any, inputs: dict[str, Any], cache: Any = None) -> float:
    """Time of a prefill by `generate`, including the work of the image prefix cache."""
    start = time.perf_counter()
    ready = inputs if cache is None else cache(inputs)
    model.generate(**ready, max_new_tokens=1).tolist()  # `tolist` waits for the device
    return time.perf_counter() - start


def measure(candidate: Candidate, rounds: int, compiled: Any = None) -> tuple[list[float], int]:
    """Median seconds without a cache, for a first and for a second question; and the bytes that the cache keeps."""
    warm_ups = 1 if compiled is None else WARM_UPS
    first = candidate.inputs(TILE_SIDE, 1)
    ids = first["input_ids"]
    is_question = (ids >= QUESTION_IDS[0]) & (ids < QUESTION_IDS[1])
    second = first | {"input_ids": ids + is_question.long()}
    times: list[list[float]] = []
    for turn in range(rounds + warm_ups):
        cache = candidate.model.image_prefix_cache(compiled=compiled)
        done = [
            seconds_to_first_token(candidate.model, first, compiled),
            seconds_to_first_token(candidate.model, first, cache),
            seconds_to_first_token(candidate.model, second, cache),
        ]
        (known,) = cache.known.values()
        times += [done] if turn >= warm_ups else []
    return [statistics.median(column) for column in zip(*times, strict=True)], known.num_bytes


def main() -> None:
    """Measure all models, and write a table."""
    parser = build_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--compiled", nargs="?", const="inductor", metavar="BACKEND", help="backend of torch.compile")
    add_device_option(parser)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for peer in (peer for peer in PEERS if peer.name in args.models):
        candidate = Candidate(peer, build_filled(peer, args.device))
        compiled = None
        if args.compiled:
            config = compile_config(args.device, args.compiled)
            compiled = candidate.model.compiled_prefill(MAX_CACHE_LEN, compile_config=config)
        (plain, first, second), num_bytes = measure(candidate, args.rounds, compiled)
        ratios = (cell for value in (first, second) for cell in (f"{value * 1e3:.0f}", f"{value / plain:.2f}"))
        rows.append([peer.name, f"{plain * 1e3:.0f}", *ratios, f"{num_bytes / 1e6:.1f}"])
        logger.info("%s", rows[-1])
    title = (
        f"{describe_machine(args.device)}; medians of {args.rounds} rounds"
        f"{', compiled' if args.compiled else ''}; made by benchmarks/second_question.py."
    )
    head = ("model", "no cache, ms", "first question", "ratio", "second question", "ratio", "kept, MB")
    write_report(args.output, title, markdown_table(head, rows))


if __name__ == "__main__":
    main()
