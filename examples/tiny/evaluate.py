"""Exact match of a tiny checkpoint on pictures that training never saw, for every kind of question.

    python examples/tiny/evaluate.py . --output evaluation.json

Every question is asked alone, with its picture, through `generate`. Some of the pictures hold a pair of colour and
shape that no training picture holds; the last column counts only the questions on those.
"""

import argparse
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from scenes import HELD_OUT_PAIRS, QUESTION_KINDS, draw, questions, scene_at

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor

logger = logging.getLogger(__name__)

PICTURE_SIZE = 96
SPLIT = "untouched"  # neither trained on, nor looked at while the recipe was made; "evaluation" was
MAX_ANSWER_TOKENS = 64


class Question(NamedTuple):
    """A question of the evaluation set."""

    kind: str
    picture: Image.Image
    text: str
    answer: str
    is_held_out: bool


def evaluation_set(num_pictures: int) -> Iterator[Question]:
    """One question of every kind that a picture allows, for the first pictures of `SPLIT`."""
    for index in range(num_pictures):
        scene = scene_at(SPLIT, index)
        picture = draw(scene, PICTURE_SIZE)
        is_held_out = any((thing.colour, thing.name) in HELD_OUT_PAIRS for thing in scene.things)
        rng = random.Random(f"questions:{index}")
        asked = questions(scene, rng)
        rng.shuffle(asked)
        for kind, text, answer in {kind: (kind, text, answer) for kind, text, answer in asked}.values():
            yield Question(kind, picture, text, answer, is_held_out)


@torch.inference_mode()
def answer(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, batch: list[Question]
) -> list[str]:
    """Answer questions, each on its own picture, by greedy decoding."""
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": question.picture}, {"type": "text", "text": question.text}],
            }
        ]
        for question in batch
    ]
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device)
    generated = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
    return processor.post_process_image_text_to_text(generated[:, inputs["input_ids"].shape[1] :])


def evaluate(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    num_pictures: int = 500,
    batch_size: int = 100,
) -> dict[str, dict[str, int]]:
    """Count right answers.

    Args:
        model: The model, in evaluation mode.
        processor: Its processor.
        num_pictures: Pictures of `SPLIT`.
        batch_size: Questions answered at once.

    Returns:
        For every kind of question and for "all": how many were `asked` and `right`, and of those on pictures with a
        held-out pair `held_out_asked` and `held_out_right`.
    """
    asked = sorted(evaluation_set(num_pictures), key=lambda question: QUESTION_KINDS.index(question.kind))
    result = {
        kind: dict.fromkeys(("asked", "right", "held_out_asked", "held_out_right"), 0)
        for kind in (*QUESTION_KINDS, "all")
    }
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
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
    """A Markdown table of what `evaluate` returned."""
    rows = ["| kind | questions | exact match | with held-out pairs |", "|---|---:|---:|---:|"]
    for kind, counts in result.items():
        share = counts["right"] / max(1, counts["asked"])
        held_out = counts["held_out_right"] / max(1, counts["held_out_asked"])
        rows.append(f"| {kind} | {counts['asked']} | {share:.1%} | {held_out:.1%} of {counts['held_out_asked']} |")
    return "\n".join(rows)


def main() -> None:
    """Evaluate a checkpoint folder or Hub id."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder or Hub id")
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    parser.add_argument("--verbose", action="store_true", help="log wrong answers")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logger.setLevel(logging.DEBUG if args.verbose else logging.INFO)
    model = FlashSlothForConditionalGeneration.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    result = evaluate(model, FlashSlothProcessor.from_pretrained(args.model), args.pictures)
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    logger.info("%s", as_table(result))


if __name__ == "__main__":
    main()
