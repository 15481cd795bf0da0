"""Exact match of a tiny checkpoint on images that were not used in training, by kind of question.

    python examples/tiny/score.py . --output evaluation.json

Every question is asked twice with its image: alone, and as the second question of a conversation, after another
question about the same image and its right answer. Some images contain a pair of colour and shape that no training
image contains; the last column counts only the questions asked alone about those.
"""

import argparse
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from scenes import HELD_OUT_PAIRS, QUESTION_KINDS, draw, questions, scene_at
from transformers import BatchFeature

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli.devices import working_dtype

logger = logging.getLogger(__name__)

IMAGE_SIZE = 96
SPLIT = "untouched"  # used neither in training nor for learning curves, which use "evaluation"
MAX_ANSWER_TOKENS = 64


class Question(NamedTuple):
    """A question of the evaluation set.

    Attributes:
        kind: One of `QUESTION_KINDS`.
        image: The image that it is about.
        text: The question.
        answer: The only right answer.
        is_held_out: Whether the image contains one of `HELD_OUT_PAIRS`.
        before: Another question about the same image, of another kind than this one and "describe", and its answer.
    """

    kind: str
    image: Image.Image
    text: str
    answer: str
    is_held_out: bool
    before: tuple[str, str]


def evaluation_set(num_images: int, split: str = SPLIT) -> Iterator[Question]:
    """One question of every possible kind for each of the first images of a split."""
    for index in range(num_images):
        scene = scene_at(split, index)
        image = draw(scene, IMAGE_SIZE)
        is_held_out = any((thing.colour, thing.name) in HELD_OUT_PAIRS for thing in scene.things)
        rng = random.Random(f"questions:{index}")
        asked = questions(scene, rng)
        rng.shuffle(asked)
        by_kind = {kind: (text, answer) for kind, text, answer in asked}
        kinds = list(by_kind)
        for place, kind in enumerate(kinds):
            following = kinds[place + 1 :] + kinds[:place]
            before = next(by_kind[other] for other in following if other != "describe")
            yield Question(kind, image, *by_kind[kind], is_held_out, before)


def build_inputs(
    processor: FlashSlothProcessor, batch: list[Question], *, is_second_turn: bool = False
) -> BatchFeature:
    """Build prompts of questions, each with its own image.

    Args:
        processor: The model's processor.
        batch: The questions.
        is_second_turn: Whether `before` and its answer precede every question.
    """
    conversations = []
    for question in batch:
        texts = [*question.before, question.text] if is_second_turn else [question.text]
        first, *others = ({"type": "text", "text": text} for text in texts)
        contents = [[{"type": "image", "image": question.image}, first], *([part] for part in others)]
        roles = ("user", "assistant") * len(contents)
        conversations.append([{"role": role, "content": part} for role, part in zip(roles, contents, strict=False)])
    return processor.encode_conversations(conversations, padding=True)


@torch.inference_mode()
def answer(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    batch: list[Question],
    *,
    is_second_turn: bool = False,
    **kwargs: Any,
) -> list[str]:
    """Answer questions, each about its own image, by greedy decoding.

    Args:
        model: The model.
        processor: Its processor.
        batch: The questions.
        is_second_turn: Whether `before` and its answer precede every question.
        **kwargs: Arguments of `generate`.
    """
    inputs = build_inputs(processor, batch, is_second_turn=is_second_turn).to(model.device)
    generated = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False, **kwargs)
    return processor.post_process_image_text_to_text(generated[:, inputs["input_ids"].shape[1] :])


def evaluate(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    num_images: int = 500,
    batch_size: int = 100,
    *,
    split: str = SPLIT,
    with_second_turns: bool = True,
) -> dict[str, dict[str, int]]:
    """Count right answers.

    Args:
        model: The model, in evaluation mode.
        processor: Its processor.
        num_images: Number of images.
        batch_size: Number of questions answered at once.
        split: Split of the images.
        with_second_turns: Whether every question is also asked as a second one.

    Returns:
        Counts for every kind of question and for "all": `asked` and `right` when asked alone, `right_as_second`
        question, and `held_out_asked` and `held_out_right` when asked alone about images with a held-out pair.
    """
    asked = sorted(evaluation_set(num_images, split), key=lambda question: QUESTION_KINDS.index(question.kind))
    counted = ("asked", "right", *["right_as_second"] * with_second_turns, "held_out_asked", "held_out_right")
    result = {kind: dict.fromkeys(counted, 0) for kind in (*QUESTION_KINDS, "all")}
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        if with_second_turns:
            for question, text in zip(batch, answer(model, processor, batch, is_second_turn=True), strict=True):
                for counts in (result[question.kind], result["all"]):
                    counts["right_as_second"] += text == question.answer
        for question, text in zip(batch, answer(model, processor, batch), strict=True):
            is_right = text == question.answer
            if not is_right:
                logger.debug("%s: %s expected %r, found %r", question.kind, question.text, question.answer, text)
            for counts in (result[question.kind], result["all"]):
                counts["asked"] += 1
                counts["right"] += is_right
                counts["held_out_asked"] += question.is_held_out
                counts["held_out_right"] += is_right and question.is_held_out
    return result


def as_table(result: dict[str, dict[str, int]]) -> str:
    """Format the counts of `evaluate` as a Markdown table."""
    rows = [
        "| kind | questions | exact match | as second question | with held-out pairs |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, counts in result.items():
        shares = (
            f"{counts[right] / max(1, counts[asked]):.1%}" if right in counts else "not asked"
            for right, asked in (("right", "asked"), ("right_as_second", "asked"), ("held_out_right", "held_out_asked"))
        )
        first, second, held_out = shares
        rows.append(f"| {kind} | {counts['asked']} | {first} | {second} | {held_out} of {counts['held_out_asked']} |")
    return "\n".join(rows)


def main() -> None:
    """Evaluate a checkpoint folder or Hub id."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder or Hub id")
    parser.add_argument("--images", type=int, default=500, help="number of images (default: %(default)s)")
    parser.add_argument("--split", default=SPLIT, help="use 'evaluation' for tuning (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    parser.add_argument("--verbose", action="store_true", help="log wrong answers")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logger.setLevel(logging.DEBUG if args.verbose else logging.INFO)
    model = FlashSlothForConditionalGeneration.from_pretrained(args.model, dtype=working_dtype("cpu")).eval()
    result = evaluate(model, FlashSlothProcessor.from_pretrained(args.model), args.images, split=args.split)
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    logger.info("%s", as_table(result))


if __name__ == "__main__":
    main()
