"""Speed of FlashSloth-3.2B with and without compilation, compared with what the machine's rates allow.

    python benchmarks/compiled.py --output benchmarks/results/compiled_cuda.md

A model with random weights in bfloat16 answers a question of 40 tokens about one image, plain and in HD, at batch 1, by
`generate`: without compilation; with compiled decoding (a static cache); with `model.compiled_prefill()`; and with that
and `torch.compiler.set_stance(skip_guard_eval_unsafe=True)`, which spares PyTorch the check that graphs still fit the
model. They take turns; figures are medians, and the roofline is that of `latency.py`.

- *first token* and *a token* are timed at a streamer, as in `latency.py`. *a token, no streamer* is the difference
  between an answer and its first token, divided by the other tokens.
- *prefill* is vision tower and prefill alone, up to the id of the first token on the host, without the preparations of
  `generate`.
- *first call* is the time of the first answer, with its compilation. Graphs are those compiled so far.
- *same tokens* counts the leading tokens that an answer shares with that of the first way. Rounding may change a token
  of a model with random weights.

The profile at the end shows on which kernels the time of compiled answers goes. The report is written after every
image.
"""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from latency import (
    Candidate,
    answer,
    build_filled,
    count,
    describe_rounds,
    measure_ceilings,
    medians_in_turns,
    roofline,
)
from peers import PEERS, TILE_SIDE
from report import add_device_option, build_parser, describe_machine, markdown_table, write_report
from torch.profiler import ProfilerActivity, profile
from transformers import CompileConfig

from flashsloth.generation_flashsloth import CACHE_NAME

logger = logging.getLogger(__name__)

MODELS = ("FlashSloth-3.2B", "FlashSloth-HD-3.2B")
NEW_TOKENS, ROUNDS = 64, 5
MAX_CACHE_LEN = 576  # HD, a question and an answer
WARM_UPS = 3  # a graph is compiled, then recorded, then replayed
PROFILED_TOKENS, PROFILED_ROWS = 8, 15
LAUNCHES = {"graphs": "cudaGraphLaunch", "kernels": "cudaLaunchKernel"}


class Way(NamedTuple):
    """A way to answer.

    Attributes:
        prepare: Turns the inputs into arguments of `generate`.
        prefill: Runs vision tower and prefill alone, and returns logits.
        is_guarded: Whether graphs are checked before they run.
    """

    prepare: Callable[[dict], dict]
    prefill: Callable[[dict], torch.Tensor]
    is_guarded: bool = True

    def active(self) -> AbstractContextManager:
        """Makes the way active."""
        return nullcontext() if self.is_guarded else torch.compiler.set_stance(skip_guard_eval_unsafe=True)


def compile_config(device: str, backend: str) -> CompileConfig:
    """`generate`'s own config on a GPU; on a CPU, where it would not compile, one that makes it do so."""
    config = CompileConfig(fullgraph=True, backend=backend)
    if device == "cpu":
        config.mode = None
        config._compile_all_devices = True
    return config


def build_ways(model: Any, config: CompileConfig) -> dict[str, Way]:
    """The ways; all compiled ones share their caches, and so the graph of a decoding step."""
    compiled = model.compiled_prefill(MAX_CACHE_LEN, compile_config=config)

    def static(inputs: dict) -> dict:
        return inputs | {CACHE_NAME: compiled.empty_cache(), "compile_config": config}

    def all_compiled(inputs: dict) -> dict:
        return compiled(inputs) | {"compile_config": config}

    def prefill(prepare: Callable[[dict], dict], inputs: dict) -> torch.Tensor:
        given = prepare(inputs)
        given.pop("compile_config", None)
        positions = given["attention_mask"].cumsum(dim=1) - 1  # as `generate` passes them
        return model(**given, position_ids=positions, use_cache=True, logits_to_keep=1).logits

    ways = {"eager": dict, "compiled decoding": static, "all compiled": all_compiled}
    built = {name: Way(prepare, partial(prefill, prepare)) for name, prepare in ways.items()}
    return built | {"all compiled, unguarded": built["all compiled"]._replace(is_guarded=False)}


@torch.no_grad()
def measure_way(model: Any, inputs: dict, new_tokens: int, way: Way) -> dict[str, float | None]:
    """Measure one answer, its prefill alone, and decoding without a streamer, in seconds."""
    start = time.perf_counter()
    way.prefill(inputs).argmax().item()  # waits for the device
    figures = {"prefill_s": time.perf_counter() - start}
    figures |= answer(model, inputs, new_tokens, way.prepare)
    seconds = []
    for length in (1, new_tokens):
        start = time.perf_counter()
        model.generate(**way.prepare(inputs), max_new_tokens=length).tolist()
        seconds.append(time.perf_counter() - start)
    return figures | {"silent_token_s": (seconds[1] - seconds[0]) / max(1, new_tokens - 1)}


def warm_up(model: Any, inputs: dict, way: Way) -> dict[str, float]:
    """Answer until all graphs are recorded; return the seconds of the first answer, and the graphs so far."""
    seconds = []
    for _ in range(WARM_UPS):
        start = time.perf_counter()
        model.generate(**way.prepare(inputs), max_new_tokens=4).tolist()
        seconds.append(time.perf_counter() - start)
    return {"first_call_s": seconds[0], "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def same_tokens(model: Any, inputs: dict, new_tokens: int, ways: dict[str, Way]) -> dict[str, int]:
    """How many leading tokens of each way's answer are those of the first way's."""
    answers = {}
    for name, way in ways.items():
        with way.active():
            answers[name] = model.generate(**way.prepare(inputs), max_new_tokens=new_tokens)[0, -new_tokens:].tolist()
    first = next(iter(answers.values()))
    pairs = {name: zip(first, tokens, strict=True) for name, tokens in answers.items()}
    return {name: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs[name])) for name in answers}


def measure(candidate: Candidate, ways: dict[str, Way], new_tokens: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Figures of all ways, by name."""
    inputs = candidate.inputs(TILE_SIDE, 1)
    started = {name: warm_up(candidate.model, inputs, way) for name, way in ways.items()}

    def work(way: Way, _is_warmup: bool) -> dict[str, float | None]:
        with way.active():
            return measure_way(candidate.model, inputs, new_tokens, way)

    works = {name: partial(work, way) for name, way in ways.items()}
    same = same_tokens(candidate.model, inputs, new_tokens, ways)
    measured = medians_in_turns(works, rounds)
    return {name: started[name] | {"same_tokens": same[name]} | figures for name, figures in measured.items()}


def as_rows(image: str, measured: dict[str, dict], least: dict[str, float]) -> list[list[Any]]:
    """Rows of the table; ratios are to the first way, and to the roofline."""
    rows = []
    first = next(iter(measured.values()))
    for name, figures in measured.items():
        row = [image, name]
        for figure, limit in (
            ("first_token_s", "first_token_s"),
            ("prefill_s", "first_token_s"),
            ("token_s", "token_s"),
            ("silent_token_s", "token_s"),
        ):
            value = figures[figure]
            row += [f"{value * 1e3:.2f}", f"{value / first[figure]:.2f}", f"{value / least[limit]:.2f}"]
        rows.append([*row, f"{figures['first_call_s']:.1f}", figures["graphs"], figures["same_tokens"]])
    return rows


def as_table(rows: list[list[Any]]) -> str:
    """Format all rows."""
    head = ["image", "way"]
    for name in ("first token", "prefill", "a token", "a token, no streamer"):
        head += [f"{name}, ms", "ratio", "times the roofline"]
    return markdown_table([*head, "first call, s", "graphs", "same tokens"], rows, text_columns=(0, 1))


@torch.no_grad()
def profile_way(candidate: Candidate, way: Way, new_tokens: int) -> str:
    """What launches and kernels the prefill and an answer consist of, as Markdown."""
    inputs, device = candidate.inputs(TILE_SIDE, 1), candidate.model.device.type
    works = {
        "Prefill": lambda: way.prefill(inputs).argmax().item(),
        f"An answer of {new_tokens} tokens": lambda: candidate.model.generate(
            **way.prepare(inputs), max_new_tokens=new_tokens
        ).tolist(),
    }
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    parts = []
    for name, work in works.items():
        with way.active(), profile(activities=activities) as profiled:
            work()
        events = profiled.key_averages()
        counts = {what: sum(e.count for e in events if key in e.key) for what, key in LAUNCHES.items()}
        busy = sum(getattr(event, f"self_{'device' if device == 'cuda' else 'cpu'}_time_total") for event in events)
        launches = ", ".join(f"{count} {what}" for what, count in counts.items())
        table = events.table(sort_by=f"self_{device}_time_total", row_limit=PROFILED_ROWS, max_name_column_width=60)
        parts.append(f"{name}: {launches} launched; the device works for {busy / 1e3:.2f} ms.\n\n```\n{table}\n```")
    return "\n\n".join(parts)


def main() -> None:
    """Measure and profile, and write a report."""
    parser = build_parser(__doc__)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    add_device_option(parser)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ceilings, model = measure_ceilings(args.device), None
    title = (
        f"{describe_machine(args.device)}; {args.new_tokens} tokens, {describe_rounds(args.rounds)}; measured "
        f"ceilings: {ceilings['flops_per_s'] / 1e12:.3g} TFLOP/s, {ceilings['bytes_per_s'] / 1e9:.3g} GB/s; made by "
        "benchmarks/compiled.py."
    )
    rows: list[list[Any]] = []
    profiles: list[str] = []
    for peer in (peer for name in MODELS for peer in PEERS if peer.name == name):
        if model is None:  # both images go to the same model
            model = build_filled(peer, args.device)
            ways = build_ways(model, compile_config(args.device, args.backend))
        candidate = Candidate(peer, model)
        least = roofline(count(peer, TILE_SIDE), 1, args.new_tokens, ceilings)
        rows += as_rows(peer.name, measure(candidate, ways, args.new_tokens, args.rounds), least)
        write_report(args.output, title, as_table(rows), *profiles)
        shown = profile_way(candidate, list(ways.values())[-1], PROFILED_TOKENS)
        profiles.append(f"## Profile of {peer.name}, {list(ways)[-1]}\n\n{shown}")
        write_report(args.output, title, as_table(rows), *profiles)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    write_report(args.output, title, as_table(rows), f"Graphs that CUDA could not record: {skipped}.", *profiles)


if __name__ == "__main__":
    main()
