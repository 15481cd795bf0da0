"""Speed of FlashSloth compared with the models that its users would pick instead.

    python benchmarks/latency.py --counts-only --output benchmarks/results/counts
    python benchmarks/latency.py --output benchmarks/results/latency_cpu

All models of `peers.py` are built from their configs, with random weights in bfloat16, or in float32 with `--dtype`.
Each answers a question of 40 tokens about an image with `generate` and its usual settings (greedy, default cache, one
device), with a fixed number of new tokens. The script writes OUTPUT.md and OUTPUT.json after every case, OUTPUT.png at
the end, and every finished case to a file in the folder OUTPUT. An interrupted run resumes there: a case with the same
settings, hardware and versions is not measured again. Delete the folder after changing the models.

- Counts are computed without running the models. FLOPs are those of the matrix products, attention and convolutions of
  a prompt, by `torch.utils.flop_counter`, which counts attention as if it were not causal. Vision is everything outside
  the decoder, prefill is decoder and head, and a token is one decoding step after the prompt. KV is the KV cache of the
  whole prompt except the question: the image, the marks around it, and the queries.
- Times are medians over rounds in which a model and FlashSloth-3.2B, or another `--reference` if that does not fit into
  memory beside it, take turns in one process; ratios are to that reference. Time to first token starts with the inputs
  on the device and excludes preprocessing.
- Peak memory is the increase during `generate` plus the weights. On a CPU it is the resident memory that Linux reports,
  without memory that an earlier run returned to the allocator but not to the system.
- The roofline is, for each of vision, prefill and a token, the longer of two times: FLOPs at the measured rate of a
  large matrix product, and bytes of weights (for a token, also of the KV cache) at the measured bandwidth of a copy.

For all models, the hidden state that the head reads is made contiguous; otherwise torch copies the head's whole matrix
on a CPU.
"""

import argparse
import gc
import inspect
import itertools
import json
import logging
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peers import PEERS, QUESTION_TOKENS, Peer
from PIL import Image
from report import (
    add_device_option,
    build_parser,
    describe_machine,
    describe_rounds,
    describe_versions,
    markdown_table,
    save_report,
    write_report,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.initialization import no_init_weights

from flashsloth.generation_flashsloth import CACHE_NAME

logger = logging.getLogger(__name__)

IMAGES = (1344, 336)
BATCH_SIZES = (1, 8, 32)
NEW_TOKENS = 64
ROUNDS = 5
BLOCK_SIZE = 2**24 + 1  # random numbers that fill the weights; 34 MB, more than a CPU's cache holds
MARGIN_BYTES = 2 * 10**9  # activations and code, in addition to weights and KV cache
CEILING_SIZES = {"cpu": (2048, 2**28), "cuda": (8192, 2**30)}  # side of a matrix; bytes of a copy
META = torch.device("meta")


class Settings(NamedTuple):
    """What a measured case depends on, in addition to model, image and batch size."""

    device: str
    new_tokens: int
    rounds: int
    hardware: str
    dtype: str = "bfloat16"
    reference: str = PEERS[0].name


class RealIntegers(TorchDispatchMode):
    """Runs a model with floating-point tensors on the meta device (shapes only) and integers with real values.

    Models branch on integers, such as image sizes and positions of image tokens, so integer tensors stay on the CPU
    regardless of the requested device. Results computed from a meta tensor are on the meta device. A comparison with a
    meta tensor assumes random values: nothing is equal.
    """

    COMPARISONS = {torch.ops.aten.eq: torch.zeros, torch.ops.aten.ne: torch.ones}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation on the device of its data."""
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            return self._without_data(func, args, kwargs)
        if kwargs.get("device") is None or torch.device(kwargs["device"]) != META:
            return func(*args, **kwargs)
        made = func(*args, **kwargs | {"device": "cpu"})
        return made.to(META) if made.is_floating_point() else made

    def _without_data(self, func: Any, args: tuple, kwargs: dict) -> Any:
        packet = func.overloadpacket
        if packet in self.COMPARISONS:
            shapes = [leaf.shape for leaf in args if isinstance(leaf, torch.Tensor)]
            return self.COMPARISONS[packet](torch.broadcast_shapes(*shapes), dtype=torch.bool)
        if packet is torch.ops.aten.index:
            args = (args[0], _as_positions(args[1]))
        if "device" in kwargs:
            kwargs["device"] = META
        args, kwargs = tree_map(lambda leaf: leaf.to(META) if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
        return func(*args, **kwargs)


def _as_positions(indices: list) -> list:
    """Replace boolean masks with positions, so that the size of the selection is known."""
    positions = []
    for index in indices:
        is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool
        positions += index.nonzero(as_tuple=True) if is_mask else [index]
    return positions


def count(peer: Peer, side: int, dtype: str = "bfloat16") -> dict[str, Any]:
    """Count what one row costs, without running the model.

    Args:
        peer: The model.
        side: Side of the square image, in pixels.
        dtype: Data type of the weights and the KV cache.

    Returns:
        `dtype`; `visual_tokens`, `prompt_tokens`, `parameters`; `vision_flops`, `prefill_flops`, `token_flops`;
        `vision_bytes` and `decoder_bytes` of the weights that vision and a decoding step read; `kv_token_bytes` and
        `kv_image_bytes` of the KV cache.
    """
    with META:
        model = peer.build_model(getattr(torch, dtype))
    inputs = {
        name: part.to(META, model.dtype) if part.is_floating_point() else part
        for name, part in peer.build_inputs(model.config, side, batch_size=1).items()
    }
    decoder, total, cache = _count_flops(model, **inputs)
    prompt_tokens = inputs["input_ids"].shape[1]
    kv_token_bytes = _cache_bytes(cache, prompt_tokens) / prompt_tokens
    token, _, _ = _count_flops(model, input_ids=inputs["input_ids"][:, -1:], **{CACHE_NAME: cache})
    return {
        "dtype": dtype,
        "visual_tokens": peer.layout(model.config, side).num_image_tokens,
        "prompt_tokens": prompt_tokens,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "vision_flops": total - decoder,
        "prefill_flops": decoder,
        "token_flops": token,
        **_weight_bytes(model),
        "kv_token_bytes": kv_token_bytes,
        "kv_image_bytes": kv_token_bytes * (prompt_tokens - QUESTION_TOKENS),
    }


def weight_bytes(peer: Peer, dtype: str = "bfloat16") -> int:
    """Bytes of all weights."""
    with META:
        return sum(weight.nbytes for weight in peer.build_model(getattr(torch, dtype)).parameters())


def _count_flops(model: PreTrainedModel, **inputs: Any) -> tuple[int, int, Any]:
    """FLOPs of decoder and head, FLOPs of the whole model, and the KV cache."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    with torch.no_grad(), RealIntegers(), FlopCounterMode(display=False) as counter:
        outputs = model(**inputs, use_cache=True)
    flops = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    parts = (model.get_decoder(), model.get_output_embeddings())
    names = [f"{type(model).__name__}.{name}" for name, module in model.named_modules() if module in parts]
    return sum(flops.get(name, 0) for name in names), flops["Global"], outputs[CACHE_NAME]


def _cache_bytes(cache: Any, length: int) -> int:
    """Bytes of keys and values; states whose size does not grow with the prompt do not count."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(part.nbytes for part in tensors if isinstance(part, torch.Tensor) and part.shape[-2] == length)


def _weight_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes that vision and a decoding step read. Of embeddings not tied to the head, a step reads one row."""
    parts = (model.get_decoder(), model.get_output_embeddings())
    decoder = {id(weight): weight for part in parts for weight in part.parameters()}
    vision = sum(weight.nbytes for weight in model.parameters() if id(weight) not in decoder)
    tables = [module.weight for module in model.get_decoder().modules() if isinstance(module, torch.nn.Embedding)]
    unread = {id(table) for table in tables} - {id(model.get_output_embeddings().weight)}
    read = sum(weight.nbytes for key, weight in decoder.items() if key not in unread)
    return {"vision_bytes": vision, "decoder_bytes": read}


def build_filled(peer: Peer, device: str, dtype: str = "bfloat16") -> PreTrainedModel:
    """Build a model with random weights, each in its own memory, whose `generate` runs to the last token."""
    with torch.device(device), no_init_weights():
        model = peer.build_model(getattr(torch, dtype))
    block = (torch.randn(BLOCK_SIZE, device=device) * 0.02).to(model.dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                weight.fill_(float(name.endswith("weight")))  # norms, and biases
                continue
            for part in weight.view(-1).split(len(block)):
                part.copy_(block[: len(part)])
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    model.get_output_embeddings().register_forward_pre_hook(_make_contiguous)
    return model


def _make_contiguous(_head: torch.nn.Module, args: tuple) -> tuple:
    return tuple(states.clone(memory_format=torch.contiguous_format) for states in args)


class TokenClock(BaseStreamer):
    """Records when `generate` passes on the prompt, and then each token of all rows, on the CPU."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Record the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""


class PeakMemory:
    """Measures the peak memory while it is active, above the memory in use before; `above` is `None` if unknown."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.above: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif (reset := Path("/proc/self/clear_refs")).exists():
            reset.write_text("5")  # resets the peak to the current use
            self.before = kernel_bytes("/proc/self/status", "VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        if self.device == "cuda":
            self.above = torch.cuda.max_memory_allocated() - self.before
        elif (peak := kernel_bytes("/proc/self/status", "VmHWM")) is not None:
            self.above = peak - self.before


def kernel_bytes(file: str, field: str) -> int | None:
    """Read a field of a file in which Linux reports memory, in bytes."""
    if not Path(file).exists():
        return None
    found = re.search(rf"^{field}:\s*(\d+) kB", Path(file).read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def answer(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    new_tokens: int,
    prepare: Callable[[dict], dict] = dict,
) -> dict[str, float | None]:
    """Measure one answer of a model.

    Args:
        model: The model.
        inputs: What it is given.
        new_tokens: Length of the answer.
        prepare: Turns the inputs into arguments of `generate`; its time counts.

    Returns:
        `first_token_s`; `token_s`, the median time between two tokens, `None` if there is only one; `tokens_per_s` of
        all rows, including the prefill; `peak_bytes`.
    """
    clock, device = TokenClock(), model.device.type
    if device == "cuda":
        torch.cuda.synchronize()
    with PeakMemory(device) as memory:
        start = time.perf_counter()
        model.generate(**prepare(inputs), max_new_tokens=new_tokens, streamer=clock)
    tokens = clock.times[1:]  # without the prompt
    if len(tokens) != new_tokens:
        raise RuntimeError(
            f"expected {new_tokens} tokens, but `generate` made {len(tokens)}; remove the end token from the "
            "generation config."
        )
    steps = [after - before for before, after in itertools.pairwise(tokens)]
    weights = sum(weight.nbytes for weight in model.parameters())
    return {
        "first_token_s": tokens[0] - start,
        "token_s": statistics.median(steps) if steps else None,
        "tokens_per_s": new_tokens * len(inputs["input_ids"]) / (tokens[-1] - start),
        "peak_bytes": None if memory.above is None else memory.above + weights,
    }


class Candidate(NamedTuple):
    """A model in memory."""

    peer: Peer
    model: PreTrainedModel

    def inputs(self, side: int, batch_size: int) -> dict[str, torch.Tensor]:
        """Inputs on the model's device, floating-point tensors in its data type."""
        parts = self.peer.build_inputs(self.model.config, side, batch_size)
        precision = {name: self.model.dtype for name, part in parts.items() if part.is_floating_point()}
        return {name: part.to(self.model.device, precision.get(name)) for name, part in parts.items()}


def medians_in_turns(works: Mapping[Any, Callable[[bool], dict[str, float | None]]], rounds: int) -> dict[Any, dict]:
    """Call functions in turns for a warm-up round and several measured ones.

    Args:
        works: Functions by name; each takes whether this is the warm-up round, and returns its figures.
        rounds: Number of measured rounds.

    Returns:
        The medians of every function's figures.
    """
    runs: dict[Any, list[dict]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            run = work(turn == 0)
            runs[name] += [run] if turn else []
    return {name: {figure: _median(run[figure] for run in done) for figure in done[0]} for name, done in runs.items()}


def _median(values: Iterable[float | None]) -> float | None:
    values = list(values)
    return None if None in values else statistics.median(values)


def answers_in_turns(candidates: list[Candidate], side: int, batch_size: int, settings: Settings) -> dict[str, dict]:
    """Medians of `answer` by the models' names."""

    def work(candidate: Candidate, inputs: dict[str, torch.Tensor], is_warmup: bool) -> dict[str, float | None]:
        return answer(candidate.model, inputs, min(2, settings.new_tokens) if is_warmup else settings.new_tokens)

    works = {
        candidate.peer.name: partial(work, candidate, candidate.inputs(side, batch_size)) for candidate in candidates
    }
    return medians_in_turns(works, settings.rounds)


def preprocessing_in_turns(candidates: list[Candidate], side: int, rounds: int) -> dict[str, dict]:
    """Median `preprocessing_s` of an image by the models' names; `None` where the image processor is not available."""
    generator = torch.Generator().manual_seed(0)
    image = Image.fromarray(torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8).numpy())

    def work(processor: Callable | None, _is_warmup: bool) -> dict[str, float | None]:
        start = time.perf_counter()
        if processor is not None:
            processor(image, return_tensors="pt")
        return {"preprocessing_s": None if processor is None else time.perf_counter() - start}

    works = {candidate.peer.name: partial(work, candidate.peer.build_image_processor()) for candidate in candidates}
    return medians_in_turns(works, rounds)


def measure_ceilings(device: str, dtype: str = "bfloat16") -> dict[str, float]:
    """Measure `flops_per_s` of a matrix product, and `bytes_per_s` that a copy reads and writes."""
    side, size = CEILING_SIZES[device]
    matrix = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return {
        "flops_per_s": 2 * side**3 / _shortest(lambda: matrix @ matrix, device),
        "bytes_per_s": 2 * size / _shortest(lambda: target.copy_(source), device),
    }


def _shortest(work: Callable, device: str, repeats: int = 10) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def roofline(counts: dict, batch_size: int, new_tokens: int, ceilings: dict[str, float]) -> dict[str, float]:
    """Least seconds to the first token and per token at the ceilings, with the KV cache of half the new tokens."""

    def least(flops: float, num_bytes: float) -> float:
        return max(flops / ceilings["flops_per_s"], num_bytes / ceilings["bytes_per_s"])

    vision = least(counts["vision_flops"] * batch_size, counts["vision_bytes"])
    prefill = least(counts["prefill_flops"] * batch_size, counts["decoder_bytes"])
    cache = counts["kv_token_bytes"] * (counts["prompt_tokens"] + new_tokens / 2) * batch_size
    return {
        "first_token_s": vision + prefill,
        "token_s": least(counts["token_flops"] * batch_size, counts["decoder_bytes"] + cache),
    }


class Benchmark:
    """Counts and measures the cases that are not in its folder yet.

    Args:
        folder: Folder of finished cases.
        peers: Models; all are compared with the settings' reference.
        settings: What measuring depends on; `None` to count only.
    """

    def __init__(self, folder: Path, peers: tuple[Peer, ...], settings: Settings | None) -> None:
        self.folder = folder
        self.peers = peers
        self.settings = settings
        self.ceilings = measure_ceilings(settings.device, settings.dtype) if settings else {}
        self.dtype = settings.dtype if settings else "bfloat16"
        self.reference = next((p for p in peers if settings and p.name == settings.reference), peers[0])
        self.loaded: dict[str, Candidate] = {}

    def run(self, chosen: list[Peer], images: list[int], batch_sizes: list[int]) -> Iterator[dict]:
        """Count and measure.

        Yields:
            One case for each model, image and batch size: `model`, `side`, `batch_size`, `counts`, and if measured
            `settings`, `ceilings`, `roofline`, `measured` and `reference` (that model's figures, measured in turns
            with this one); or `skipped`, the reason.
        """
        for peer in chosen:
            for side in images:
                for batch_size in batch_sizes:
                    yield self.case(peer, side, batch_size)
            if peer is not self.reference and self.loaded.pop(peer.name, None):
                gc.collect()  # modules refer to each other
                torch.cuda.empty_cache()

    def case(self, peer: Peer, side: int, batch_size: int) -> dict:
        """Return one case, from its file if it is finished."""
        file = self.folder / f"{slug(peer.name)}_{side}_{batch_size}.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        wanted = self.settings._asdict() if self.settings else known.get("settings")
        if known and "skipped" not in known and known.get("settings") == wanted:
            return known
        case = {"model": peer.name, "side": side, "batch_size": batch_size}
        try:
            case["counts"] = self._counts(peer, side)
            if self.settings:
                case |= self._measure(peer, side, batch_size, case["counts"])
        except (ImportError, MemoryError, torch.OutOfMemoryError) as error:
            case["skipped"] = " ".join(str(error).split())
            logger.warning("%s, %d px, batch %d: skipped: %s", peer.name, side, batch_size, case["skipped"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(case, indent=2) + "\n")
        return case

    def _counts(self, peer: Peer, side: int) -> dict:
        for file in self.folder.glob(f"{slug(peer.name)}_{side}_*.json"):
            known = json.loads(file.read_text()).get("counts", {})
            if known.get("dtype") == self.dtype:
                return known
        return count(peer, side, self.dtype)

    def _measure(self, peer: Peer, side: int, batch_size: int, counts: dict) -> dict:
        self._check_memory(peer, batch_size, counts)
        reference = self._load(self.reference)
        candidates = [reference] if peer is self.reference else [reference, self._load(peer)]
        answers = answers_in_turns(candidates, side, batch_size, self.settings)
        preprocessing = preprocessing_in_turns(candidates, side, self.settings.rounds)
        measured = {name: answers[name] | preprocessing[name] for name in answers}
        return {
            "settings": self.settings._asdict(),
            "ceilings": self.ceilings,
            "roofline": roofline(counts, batch_size, self.settings.new_tokens, self.ceilings),
            "reference": measured[reference.peer.name],
            "measured": measured[peer.name],
        }

    def _load(self, peer: Peer) -> Candidate:
        if peer.name not in self.loaded:
            self.loaded[peer.name] = Candidate(peer, build_filled(peer, self.settings.device, self.dtype))
        return self.loaded[peer.name]

    def _check_memory(self, peer: Peer, batch_size: int, counts: dict) -> None:
        length = counts["prompt_tokens"] + self.settings.new_tokens
        needed = MARGIN_BYTES + batch_size * length * counts["kv_token_bytes"]
        missing = {other.name: other for other in (self.reference, peer) if other.name not in self.loaded}
        needed += sum(weight_bytes(other, self.dtype) for other in missing.values())
        free = _free_bytes(self.settings.device)
        if free is not None and free < needed:
            raise MemoryError(f"needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free")


def _free_bytes(device: str) -> int | None:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else kernel_bytes("/proc/meminfo", "MemAvailable")


def slug(name: str) -> str:
    """A model's name in names of files."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def as_markdown(cases: list[dict], peers: tuple[Peer, ...] = PEERS) -> str:
    """Format models, counts, and the measurements of every image and batch size."""
    parts = [_models_table(cases, peers), _counts_table(cases, peers)]
    measured = [case for case in cases if "measured" in case]
    for side, batch_size in dict.fromkeys((case["side"], case["batch_size"]) for case in measured):
        rows = [case for case in measured if (case["side"], case["batch_size"]) == (side, batch_size)]
        parts.append(f"### {side}×{side}, batch {batch_size}\n\n{_measured_table(rows)}")
    skipped = [
        f"- {c['model']}, {c['side']} px, batch {c['batch_size']}: {c['skipped']}" for c in cases if "skipped" in c
    ]
    if skipped:
        parts.append("### Skipped\n\n" + "\n".join(skipped))
    return "\n\n".join(parts)


def _models_table(cases: list[dict], peers: tuple[Peer, ...]) -> str:
    parameters = {case["model"]: case["counts"]["parameters"] for case in cases if "counts" in case}
    rows = [(peer.name, f"{parameters[peer.name] / 1e9:.2f}", peer.source) for peer in peers if peer.name in parameters]
    head = ("model", "parameters, billions", "dimensions from")
    return "### Models\n\n" + markdown_table(head, rows, text_columns=(0, 2))


def _counts_table(cases: list[dict], peers: tuple[Peer, ...]) -> str:
    counted = {(case["model"], case["side"]): case["counts"] for case in cases if "counts" in case}
    head = (
        "model | image, px | image tokens | prompt | TFLOPs: vision | prefill | to first token | ratio | "
        "GFLOPs a token | KV MB an image"
    )
    rows = []
    for (name, side), counts in counted.items():
        total = counts["vision_flops"] + counts["prefill_flops"]
        own = counted.get((peers[0].name, side))
        rows.append(
            (
                name,
                side,
                counts["visual_tokens"],
                counts["prompt_tokens"],
                f"{counts['vision_flops'] / 1e12:.2f}",
                f"{counts['prefill_flops'] / 1e12:.2f}",
                f"{total / 1e12:.2f}",
                f"{total / (own['vision_flops'] + own['prefill_flops']):.2f}" if own else "–",
                f"{counts['token_flops'] / 1e9:.2f}",
                f"{counts['kv_image_bytes'] / 1e6:.1f}",
            )
        )
    return "### Counts, for one row\n\n" + markdown_table(head.split(" | "), rows)


def _measured_table(cases: list[dict]) -> str:
    columns = (  # name, unit, factor
        ("preprocessing_s", "preprocessing, ms", 1e3),
        ("first_token_s", "first token, ms", 1e3),
        ("token_s", "ms a token", 1e3),
        ("tokens_per_s", "tokens/s", 1),
        ("peak_bytes", "peak, GB", 1e-9),
    )
    head = ["model"] + [title for _, name, _ in columns for title in (name, "ratio")]
    head += ["first token: times the roofline", "token: times the roofline"]
    rows = []
    for case in cases:
        row = [case["model"]]
        for name, _, factor in columns:
            value, own = case["measured"][name], case["reference"][name]
            row += [_figure(value, factor), _figure(value, 1 / own) if own else "–"]
        is_own = case["model"].startswith("FlashSloth")
        for name in ("first_token_s", "token_s"):
            row.append(_figure(case["measured"][name], 1 / case["roofline"][name]) if is_own else "–")
        rows.append(row)
    return markdown_table(head, rows)


def _figure(value: float | None, factor: float) -> str:
    return "n/a" if value is None else f"{value * factor:.3g}"


def plot(cases: list[dict], file: Path) -> None:
    """Plot time to first token against image tokens, at the smallest batch; FLOPs if nothing was measured."""
    from matplotlib.figure import Figure

    measured = [case for case in cases if "measured" in case]
    shown = measured or [case for case in cases if "counts" in case]
    if not shown:
        return
    smallest = min(case["batch_size"] for case in shown)
    sides, names = (list(dict.fromkeys(case[key] for case in shown)) for key in ("side", "model"))
    figure = Figure(figsize=(4.5 * len(sides) + 2.5, 4.5), layout="constrained")
    panels = figure.subplots(ncols=len(sides), sharex=True, sharey=True, squeeze=False)[0]
    for side, axes in zip(sides, panels, strict=True):
        axes.set(title=f"{side}×{side} px, batch {smallest}", xscale="log", yscale="log", xlabel="image tokens")
        for case in (case for case in shown if (case["side"], case["batch_size"]) == (side, smallest)):
            name = case["model"]
            marker = "*" if name.startswith("FlashSloth") else "osD"[names.index(name) // 10]
            style = {"color": f"C{names.index(name) % 10}", "marker": marker, "s": 70, "label": name}
            axes.scatter(case["counts"]["visual_tokens"], _height(case), **style)
    what = (
        f"time to first token, {measured[0]['settings']['reference']} = 1"
        if measured
        else "FLOPs to first token, TFLOPs"
    )
    panels[0].set_ylabel(what)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(file, dpi=120)


def _height(case: dict) -> float:
    if "measured" in case:
        return case["measured"]["first_token_s"] / case["reference"]["first_token_s"]
    return (case["counts"]["vision_flops"] + case["counts"]["prefill_flops"]) * case["batch_size"] / 1e12


def describe(settings: Settings | None, ceilings: dict[str, float]) -> str:
    """Hardware, versions and settings, for the first line of the report."""
    if settings is None:
        return f"Counted on the meta device; {describe_versions()}."
    return (
        f"{settings.hardware}; {settings.new_tokens} tokens, {describe_rounds(settings.rounds)}. Measured ceilings: "
        f"{ceilings['flops_per_s'] / 1e12:.3g} TFLOP/s, {ceilings['bytes_per_s'] / 1e9:.3g} GB/s. "
        f"Ratios: to {settings.reference}, measured again next to each."
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = build_parser(__doc__, "path without a suffix (default: %(default)s)", default_output=Path("latency"))
    names = [peer.name for peer in PEERS]
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--images", nargs="+", type=int, choices=IMAGES, default=IMAGES, help="sides, in pixels")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    add_device_option(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--reference", choices=names, default=names[0], metavar="NAME", help="default: %(default)s")
    parser.add_argument("--counts-only", action="store_true", help="count, and measure nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, peers: tuple[Peer, ...] = PEERS) -> None:
    """Count and measure, and write tables and a plot."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = None
    if not args.counts_only:
        hardware = describe_machine(args.device, args.dtype)
        settings = Settings(args.device, args.new_tokens, args.rounds, hardware, args.dtype, args.reference)
    batch_sizes = [1] if args.counts_only else args.batch_sizes
    chosen = [peer for peer in peers if peer.name in args.models]
    benchmark = Benchmark(args.output, peers, settings)
    title = describe(settings, benchmark.ceilings)
    total = len(chosen) * len(args.images) * len(batch_sizes)
    cases = []
    with logging_redirect_tqdm():
        for case in tqdm(benchmark.run(chosen, args.images, batch_sizes), total=total, unit="case"):
            cases.append(case)
            args.output.with_suffix(".json").write_text(json.dumps({"machine": title, "cases": cases}, indent=2) + "\n")
            save_report(args.output.with_suffix(".md"), title, as_markdown(cases, peers))
    write_report(args.output.with_suffix(".md"), title, as_markdown(cases, peers))
    plot(cases, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
