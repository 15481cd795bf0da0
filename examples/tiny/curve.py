"""Learning curves: share of questions that a model answers correctly during training, by suite.

    python examples/tiny/curve.py tiny-flashsloth-work --output docs/learning_curve

collects the points that the stages of `make_checkpoint.py` wrote into OUTPUT.json, and plots them as OUTPUT.png.
"""

import argparse
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from score import Item, answer, evaluate
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor

logger = logging.getLogger(__name__)

FILE_NAME = "learning_curve.jsonl"
STAGES = ("captions", "conversations", "refinement", "whole", "hardest")
STEPS_BETWEEN = 300  # points of a curve, a multiple of the steps between checkpoints


class LearningCurve(TrainerCallback):
    """Evaluates a model at some of its checkpoints and at the last one, and appends the counts to a file.

    Args:
        processor: The model's processor.
        items: Questions, of another split than the final evaluation's.
    """

    def __init__(self, processor: FlashSlothProcessor, items: list[Item]) -> None:
        self.processor, self.items = processor, items

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: FlashSlothForConditionalGeneration,
        **kwargs: Any,
    ) -> None:
        """See `TrainerCallback`."""
        is_due = state.global_step % STEPS_BETWEEN == 0 or state.global_step == state.max_steps
        if not (is_due and self.items and state.is_world_process_zero):
            return
        model.eval()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            result = evaluate(self.items, lambda batch: answer(model, self.processor, batch))
        model.train()
        seen = state.global_step * args.per_device_train_batch_size * args.world_size
        right = {suite: [kinds["all"].right, kinds["all"].asked] for suite, kinds in result.items()}
        point = {"stage": Path(args.output_dir).name, "step": state.global_step, "images": seen, "right": right}
        with (Path(args.output_dir) / FILE_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
        shares = ", ".join(f"{suite} {counts[0] / counts[1]:.1%}" for suite, counts in right.items())
        logger.info("step %d: %s", state.global_step, shares)
        kinds = ", ".join(f"{kind} {found.right / found.asked:.0%}" for kind, found in result["scenes"].items())
        logger.info("scenes: %s", kinds)


def read_curve(work: Path, stages: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read the points of all stages, in order; `images` counts from the start of the first stage."""
    points: list[dict[str, Any]] = []
    for stage in stages:
        before = points[-1]["images"] if points else 0
        lines = (work / stage / FILE_NAME).read_text(encoding="utf-8").splitlines()
        own = {point["step"]: point for point in map(json.loads, lines)}  # an interrupted run may record a step twice
        points += [point | {"images": before + point["images"]} for _, point in sorted(own.items())]
    return points


def plot(points: list[dict[str, Any]], file: Path) -> None:
    """Plot the share of exact answers against the images seen, with a line for every suite."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="thousand images", ylabel="exact answers, %")
    seen = [point["images"] / 1000 for point in points]
    for suite in points[0]["right"]:
        shares = [100 * point["right"][suite][0] / point["right"][suite][1] for point in points]
        axes.plot(seen, shares, label=suite, linewidth=1.5)
    start = 0.0
    for stage, group in itertools.groupby(points, key=lambda point: point["stage"]):
        end = max(point["images"] for point in group) / 1000
        axes.axvline(end, color="0.7", linestyle="dotted")
        axes.text((start + end) / 2, 102, stage, ha="center", color="0.4")
        start = end
    axes.set(xlim=(0, start), ylim=(0, 101))
    axes.legend(loc="lower right", ncols=2, fontsize="small")
    figure.savefig(file, dpi=100)


def main() -> None:
    """Collect the points of a run, and plot them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the `--work` folder of `make_checkpoint.py`")
    parser.add_argument("--stages", nargs="+", default=STAGES, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="path without a suffix")
    args = parser.parse_args()
    points = read_curve(args.work, args.stages)
    text = ",\n".join(json.dumps(point) for point in points)
    args.output.with_suffix(".json").write_text(f"[\n{text}\n]\n", encoding="utf-8")
    plot(points, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
