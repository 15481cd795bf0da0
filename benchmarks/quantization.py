"""Accuracy in 8 and 4 bits, and speed of these precisions, and on a CPU of float32 and several threads.

    python benchmarks/quantization.py --output benchmarks/results/quantization_cpu.md
    python benchmarks/quantization.py --images 0 --precisions bfloat16 float32 --output float32_cpu.md
    python benchmarks/quantization.py --images 0 --device cuda --precisions bfloat16 int8 int4 nf4 --output bits_cuda.md

The decoder's layers are quantised as in docs/converting.md.

- Accuracy: the shipped checkpoint answers the questions of `examples/tiny/score.py`. In addition, logits of the
  synthetic checkpoint behind tests/golden/ are compared with those of the original implementation in float32: root mean
  square of the difference, relative to that of the logits.
- Speed: FlashSloth-3.2B with random weights answers a question of 40 tokens about one image by `generate`. Precisions
  take turns at every number of threads, after one warm-up round. Figures are medians; ratios are to bfloat16 with the
  same number of threads, and to the fewest threads at the same precision. All precisions are in memory at once:
  bfloat16 takes 6.4 GB, and float32, which is measured only on request, 12.8 GB.
"""

import logging
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from latency import Candidate, answer, build_filled, medians_in_turns
from peers import PEERS, TILE_SIDE, Peer
from report import build_parser, describe_machine, markdown_table, write_report
from safetensors.torch import load_file
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers import BitsAndBytesConfig, TorchAoConfig

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.training.lora import LORA_TARGET_MODULES, UNQUANTIZED_MODULES

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples" / "tiny"), str(ROOT / "tests")]
import score  # noqa: E402
from golden_checkpoint import CASES, GOLDEN, read_case, write_golden_checkpoint  # noqa: E402

logger = logging.getLogger(__name__)

SKIPPED = list(UNQUANTIZED_MODULES)
TORCHAO = {"int8": Int8WeightOnlyConfig(version=2), "int4": PrototypeInt4WeightOnlyConfig(group_size=32)}
TORCHAO_CUDA = {"int4": Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d")}  # needs no further package
PRECISIONS = ("bfloat16", *TORCHAO)
RECIPES = {
    "bfloat16": None,
    **{f"torchao {name}": TorchAoConfig(config, modules_to_not_convert=SKIPPED) for name, config in TORCHAO.items()},
    "bitsandbytes 8-bit": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=SKIPPED),
    "bitsandbytes 4-bit (nf4)": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=SKIPPED,
    ),
}
IMAGES, NEW_TOKENS, ROUNDS = 200, 16, 3
FIGURES = ("first_token_s", "token_s")


class Answers(NamedTuple):
    """Accuracy and memory of a recipe."""

    recipe: str
    num_right: int
    num_asked: int
    num_bytes: int
    num_layer_bytes: int
    golden_difference: float


class Times(NamedTuple):
    """Median seconds of one precision with a number of threads."""

    precision: str
    num_threads: int
    first_token_s: float
    token_s: float


def compare_answers(num_images: int) -> Iterator[Answers]:
    """Answer the questions and compute the golden logits with every recipe."""
    plain = load(ROOT, None)
    names = [name for name, _ in plain.named_parameters()]
    layers = [name for name in names if re.fullmatch(LORA_TARGET_MODULES, name.rpartition(".")[0])]
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    asked = list(score.scene_items(num_images))
    for name, recipe in RECIPES.items():
        model = load(ROOT, recipe)
        sizes = {parameter: bytes_of(tensor) for parameter, tensor in model.named_parameters()}
        layer_bytes = sum(sizes[parameter] for parameter in layers)
        counts = score.evaluate(asked, partial(score.answer, model, processor))["scenes"]["all"]
        difference = golden_difference(recipe)
        yield Answers(name, counts.right, counts.asked, sum(sizes.values()), layer_bytes, difference)


def load(folder: Path, recipe: Any) -> FlashSlothForConditionalGeneration:
    """Load a checkpoint, quantised by a recipe if there is one."""
    quantization = {} if recipe is None else {"quantization_config": recipe}
    return FlashSlothForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, **quantization).eval()


def bytes_of(tensor: torch.Tensor) -> int:
    """Memory of a tensor, or of the parts of a quantised one."""
    if not hasattr(tensor, "__tensor_flatten__") or type(tensor) is torch.nn.Parameter:
        return tensor.nbytes
    return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


@torch.no_grad()
def golden_difference(recipe: Any) -> float:
    """Relative difference between the logits of all golden cases and the recorded ones."""
    with tempfile.TemporaryDirectory() as folder:
        model = load(write_golden_checkpoint(Path(folder) / "golden"), recipe)
    squares = torch.zeros(2, dtype=torch.float64)
    for name in CASES:
        _, inputs = read_case(name, model.config)
        mask = inputs["attention_mask"].bool()
        found = model(**inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}).logits[..., ::401][mask]
        expected = load_file(GOLDEN / f"{name}.safetensors")["logits_cols"][mask]
        squares += torch.stack([(found - expected).double().square().sum(), expected.double().square().sum()])
    return (squares[0] / squares[1]).sqrt().item()


def build(peer: Peer, precision: str, device: str = "cpu") -> Candidate:
    """Build a model with random weights, all in float32, or in bfloat16 with the decoder's layers quantised."""
    candidate = Candidate(peer, build_filled(peer, device))
    layers = candidate.model.model.language_model.layers
    if precision == "float32":
        candidate.model.float()
    if precision in TORCHAO:
        quantize_(layers, (TORCHAO | TORCHAO_CUDA if device == "cuda" else TORCHAO)[precision])
    if precision == "nf4":
        quantize_with_bitsandbytes(layers)
    return candidate


def quantize_with_bitsandbytes(layers: torch.nn.Module) -> None:
    """Replace all linear modules by bitsandbytes' with weights in nf4."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(layers.modules()):
        for name, linear in parent.named_children():
            if type(linear) is not torch.nn.Linear:
                continue
            has_bias, dtype = linear.bias is not None, linear.weight.dtype
            small = Linear4bit(
                linear.in_features, linear.out_features, bias=has_bias, compute_dtype=dtype, quant_type="nf4"
            )
            small.weight = Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            small.bias = linear.bias
            setattr(parent, name, small.to(linear.weight.device))  # moving it quantises it


def compare_times(
    peer: Peer,
    threads: list[int],
    new_tokens: int,
    rounds: int,
    precisions: Sequence[str] = PRECISIONS,
    device: str = "cpu",
) -> Iterator[Times]:
    """Let all precisions, which must include bfloat16, answer in turns."""
    candidates = {}
    for precision in precisions:
        try:
            candidates[precision] = build(peer, precision, device)
        except ImportError as error:
            logger.warning("%s is skipped: %s", precision, error)
    inputs = candidates["bfloat16"].inputs(TILE_SIDE, batch_size=1)

    def work(candidate: Candidate, is_warmup: bool) -> dict[str, float | None]:
        return answer(candidate.model, inputs, 2 if is_warmup else new_tokens)

    before = torch.get_num_threads()
    try:
        for num_threads in threads:
            torch.set_num_threads(num_threads)
            works = {precision: partial(work, candidate) for precision, candidate in candidates.items()}
            for precision, figures in medians_in_turns(works, rounds).items():
                yield Times(precision, num_threads, *(figures[name] for name in FIGURES))
    finally:
        torch.set_num_threads(before)


def answers_table(rows: list[Answers]) -> str:
    """Format accuracy and memory; that of the decoder's layers is relative to the first row."""
    head = ["", "exact match", "memory of all weights", "of the decoder's layers", "golden logits differ by"]
    cells = [
        [
            row.recipe,
            f"{row.num_right} of {row.num_asked}, {row.num_right / row.num_asked:.1%}",
            f"{row.num_bytes / 1e6:.1f} MB",
            f"{row.num_layer_bytes / rows[0].num_layer_bytes:.0%}",
            f"{row.golden_difference:.1%}",
        ]
        for row in rows
    ]
    return markdown_table(head, cells)


def times_table(rows: list[Times]) -> str:
    """Format times and ratios."""
    known = {(row.precision, row.num_threads): row for row in rows}
    fewest = min(row.num_threads for row in rows)
    ratios = ("to bfloat16", f"to {fewest} thread{'s' * (fewest > 1)}")
    head = ["", "threads"]
    for name in ("first token", "a token"):
        head += [f"{name}, ms", *ratios]
    cells = []
    for row in rows:
        cells.append([row.precision, row.num_threads])
        for name in FIGURES:
            own = getattr(row, name)
            others = known["bfloat16", row.num_threads], known[row.precision, fewest]
            cells[-1] += [f"{own * 1e3:.0f}", *(f"{own / getattr(other, name):.2f}" for other in others)]
    return markdown_table(head, cells)


def _log_rows(rows: Iterable[Any]) -> Iterator[Any]:
    for row in rows:
        logger.info("%s", row)
        yield row


def main() -> None:
    """Compare answers and times, and write tables."""
    parser = build_parser(__doc__)
    parser.add_argument("--images", type=int, default=IMAGES, help="images for the accuracy; 0: speed only")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=(*PRECISIONS, "nf4", "float32"),
        default=PRECISIONS,
        help="precisions for the speed",
    )
    parser.add_argument("--threads", type=int, nargs="+", help="default: one and all; on a GPU, all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for the speed")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds for the speed; 0: accuracy only")
    args = parser.parse_args()
    if args.threads is None:
        args.threads = sorted({1, torch.get_num_threads()})[-1 if args.device == "cuda" else 0 :]
    if "bfloat16" not in args.precisions:
        parser.error("--precisions must include bfloat16, which the others are compared with")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parts = [f"{describe_machine(args.device)}; made by benchmarks/quantization.py."]
    if args.images:
        parts += [
            f"## Answers of the small checkpoint to questions about {args.images} images",
            answers_table(list(_log_rows(compare_answers(args.images)))),
        ]
    if args.rounds:
        times = compare_times(PEERS[0], args.threads, args.new_tokens, args.rounds, args.precisions, args.device)
        parts += [
            f"## Speed of {PEERS[0].name}, batch 1, {args.new_tokens} tokens, medians of {args.rounds} rounds",
            times_table(list(_log_rows(times))),
        ]
    write_report(args.output, *parts)


if __name__ == "__main__":
    main()
