"""What eight and four bits do to the answers, and they, float32 and threads to the speed, on a CPU.

    python benchmarks/quantization.py --output benchmarks/results/quantization_cpu.md
    python benchmarks/quantization.py --images 0 --precisions bfloat16 float32 --output float32_cpu.md

The decoder's layers are quantised as docs/converting.md does.

- Answers: the checkpoint in the root answers the questions of `examples/tiny/score.py`. Beside it, logits of the
  checkpoint that tests/golden/ was recorded on (synthetic weights) are compared with those of the original
  implementation in float32: root of the mean squared difference, as a share of that of the logits.
- Speed: FlashSloth-3.2B with random weights answers a question of 40 tokens about one image by `generate`. Precisions
  take turns, at every number of threads, after a round that is not counted. Figures are medians; ratios are to bfloat16
  with as many threads, and to one thread at the same precision. All of them are in memory at once: 6.4 GB in bfloat16,
  12.8 GB in float32, which is compared only if it is asked for.
"""

import argparse
import logging
import re
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from latency import Candidate, answer, build_filled, hardware
from peers import PEERS, Peer
from safetensors.torch import load_file
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import BitsAndBytesConfig, TorchAoConfig

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.training.lora import LORA_TARGET_MODULES, UNQUANTIZED_MODULES

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples" / "tiny"), str(ROOT / "tests")]
from golden_checkpoint import CASES, GOLDEN, read_case, write_golden_checkpoint  # noqa: E402
from score import evaluate  # noqa: E402

logger = logging.getLogger(__name__)

SKIPPED = list(UNQUANTIZED_MODULES)
TORCHAO = {"int8": Int8WeightOnlyConfig(version=2), "int4": PrototypeInt4WeightOnlyConfig(group_size=32)}
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
IMAGES, NEW_TOKENS, ROUNDS = 500, 16, 3
SIDE = 384  # pixels; every image becomes tiles of one size
FIGURES = ("first_token_s", "token_s")


class Answers(NamedTuple):
    """What a recipe does to answers and memory."""

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
    """Answer the questions, and compute the golden logits, with every recipe."""
    plain = load(ROOT, None)
    names = [name for name, _ in plain.named_parameters()]
    layers = [name for name in names if re.fullmatch(LORA_TARGET_MODULES, name.rpartition(".")[0])]
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    for name, recipe in RECIPES.items():
        model = load(ROOT, recipe)
        sizes = {parameter: bytes_of(tensor) for parameter, tensor in model.named_parameters()}
        layer_bytes = sum(sizes[parameter] for parameter in layers)
        counts = evaluate(model, processor, num_images, with_second_turns=False)["all"]
        difference = golden_difference(recipe)
        yield Answers(name, counts["right"], counts["asked"], sum(sizes.values()), layer_bytes, difference)


def load(folder: Path, recipe: Any) -> FlashSlothForConditionalGeneration:
    """A checkpoint with a recipe."""
    quantization = {} if recipe is None else {"quantization_config": recipe}
    return FlashSlothForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, **quantization).eval()


def bytes_of(tensor: torch.Tensor) -> int:
    """Memory of a tensor, or of the parts that a quantised one is made of."""
    if not hasattr(tensor, "__tensor_flatten__") or type(tensor) is torch.nn.Parameter:
        return tensor.nbytes
    return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


@torch.no_grad()
def golden_difference(recipe: Any) -> float:
    """How far the logits of all golden cases are from the recorded ones."""
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


def build(peer: Peer, precision: str) -> Candidate:
    """The model with random weights: all in float32, or its decoder's layers in another precision than bfloat16."""
    candidate = Candidate(peer, build_filled(peer, "cpu"))
    if precision == "float32":
        candidate.model.float()
    if precision in TORCHAO:
        quantize_(candidate.model.model.language_model.layers, TORCHAO[precision])
    return candidate


def compare_times(
    peer: Peer, threads: list[int], new_tokens: int, rounds: int, precisions: Sequence[str] = PRECISIONS
) -> Iterator[Times]:
    """Let precisions, of which one is bfloat16, answer in turns."""
    candidates = {precision: build(peer, precision) for precision in precisions}
    inputs = candidates["bfloat16"].inputs(SIDE, batch_size=1)
    before = torch.get_num_threads()
    try:
        for num_threads in threads:
            torch.set_num_threads(num_threads)
            runs: dict[str, list[dict[str, Any]]] = {precision: [] for precision in candidates}
            for turn in range(rounds + 1):
                for precision, candidate in candidates.items():
                    run = answer(candidate.model, inputs, new_tokens if turn else 2)
                    runs[precision] += [run] if turn else []
            for precision, done in runs.items():
                yield Times(precision, num_threads, *(statistics.median(run[name] for run in done) for name in FIGURES))
    finally:
        torch.set_num_threads(before)


def answers_table(rows: list[Answers]) -> str:
    """Markdown; memory of the decoder's layers is a share of the first row's."""
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
    return _table(head, cells)


def times_table(rows: list[Times]) -> str:
    """Markdown, with ratios."""
    known = {(row.precision, row.num_threads): row for row in rows}
    fewest = min(row.num_threads for row in rows)
    ratios = ("to bfloat16", f"to {fewest} thread{'s' * (fewest > 1)}")
    head = ["", "threads"]
    for name in ("first token", "a token"):
        head += [f"{name}, ms", *ratios]
    cells = []
    for row in rows:
        cells.append([row.precision, str(row.num_threads)])
        for name in FIGURES:
            own = getattr(row, name)
            others = known["bfloat16", row.num_threads], known[row.precision, fewest]
            cells[-1] += [f"{own * 1e3:.0f}", *(f"{own / getattr(other, name):.2f}" for other in others)]
    return _table(head, cells)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = (head, ["---", *["---:"] * (len(head) - 1)], *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _logged(rows: Iterable[Any]) -> Iterator[Any]:
    for row in rows:
        logger.info("%s", row)
        yield row


def main() -> None:
    """Compare answers and times, and write tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--images", type=int, default=IMAGES, help="with about seven questions each; 0: no answers")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=(*PRECISIONS, "float32"),
        default=PRECISIONS,
        help="of the speed's comparison",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the speed's comparison; 0: no speed")
    args = parser.parse_args()
    if "bfloat16" not in args.precisions:
        parser.error("the others are compared with bfloat16; name it among the --precisions")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parts = [f"{hardware('cpu')}; made by benchmarks/quantization.py."]
    if args.images:
        parts += [
            f"## Answers of the small checkpoint to questions about {args.images} images",
            answers_table(list(_logged(compare_answers(args.images)))),
        ]
    if args.rounds:
        times = compare_times(PEERS[0], args.threads, args.new_tokens, args.rounds, args.precisions)
        parts += [
            f"## Speed of {PEERS[0].name}, batch 1, {args.new_tokens} tokens, medians of {args.rounds} rounds",
            times_table(list(_logged(times))),
        ]
    args.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
