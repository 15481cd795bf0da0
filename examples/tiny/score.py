"""Exact match of a tiny checkpoint on what it was not trained on, by suite and kind of question.

    python examples/tiny/score.py . ART --output evaluation.json

Suites: scenes of the training program that are not in its training data, asked alone, as a second and third question,
in five tiles, and beside another image; drawings of another program (`other_drawings.py`); one thing on white, by style
of emoji art, two of which are never trained on; words in fonts that are never trained on; and foreign images.
"""

import argparse
import itertools
import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from art import STYLES, TEST_FONTS, TEST_STYLES
from foreign import KINDS as FOREIGN_KINDS
from foreign import ForeignImages
from other_drawings import draw_svg
from PIL import Image
from questions import REFUSAL, Question, find_kind, questions, questions_on_two
from scenes import THINGS, Art, Box, Layout, Scene, Thing, draw, sample_string, scene_at
from transformers import BatchFeature

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli.devices import working_dtype

logger = logging.getLogger(__name__)

SPLIT = "untouched"  # not used in training or for learning curves, which use "evaluation"
MAX_ANSWER_TOKENS = 96
NOT_REFUSED = "known, not refused"
WEAKEST = "weakest"
LEAST_ASKED = 20  # questions of a kind that may be called a suite's weakest
# What is summarised: description, suite, kind, least share (below 0: difference from all scenes; 0: no aim).
AIMS = (
    ("scenes that it was not trained on", "scenes", "all", 0.97),
    ("the same, the weakest kind ({})", "scenes", WEAKEST, 0.92),
    ('the same, "is there …?"', "scenes", "is there", 0.95),
    ("the same, what is not there", "scenes", "absent", 0.95),
    ("the same, asked as the second question", "as second question", "all", -0.02),
    ("the same, asked as the third question", "as third question", "all", -0.02),
    ("the same, in five tiles", "five tiles", "all", -0.02),
    ("two images", "two images", "all", -0.02),
    ("small things and texts", "small", "all", 0.0),
    ("the same, in five tiles", "small, five tiles", "all", 0.0),
    ("drawings of another program", "other program", "all", 0.95),
    ("one thing, styles of emoji that it learned", "naming", "all", 0.97),
    ("one thing, a style that it did not learn: fxemoji", "naming, fxemoji", "all", 0.8),
    ("one thing, a style that it did not learn: openmoji", "naming, openmoji", "all", 0.5),
    ("1 to 5 characters, fonts that it did not learn", "unseen fonts", "1 to 5", 0.9),
    ("6 to 8 characters, fonts that it did not learn", "unseen fonts", "6 to 8", 0.75),
    ("what it does not know, such as photographs (refused)", "foreign", "all", 0.9),
    ("all of what it knows (not refused)", NOT_REFUSED, "all", 0.99),
)
NUM_SHOWN = 4  # right and wrong answers of a suite, on the page
STRIP_HEIGHT, STRIP_GAP = 144, 4  # pixels
PAGE_NOTE = (
    "Chosen at random by `examples/tiny/score.py`; wrong answers are bold. After an arrow comes the next question."
)
WHITE = ((255, 255, 255), (255, 255, 255))


@dataclass(frozen=True)
class Item:
    """A question of a suite.

    Attributes:
        suite: The suite.
        kind: The kind of question, or what it is about.
        images: The images that it is about.
        question: The question.
        answer: The only right answer.
        before: Earlier questions of the conversation and their right answers.
        is_split: Whether the image is split into five tiles.
    """

    suite: str
    kind: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str
    before: tuple[tuple[str, str], ...] = ()
    is_split: bool = False


@dataclass
class Counts:
    """Questions asked, and those answered correctly."""

    asked: int = 0
    right: int = 0


def one_of_each_kind(asked: Sequence[Question], rng: random.Random) -> list[Question]:
    """One question of every kind, in random order."""
    kinds = list(dict.fromkeys(question.kind for question in asked))
    rng.shuffle(kinds)
    return [rng.choice(find_kind(asked, kind)) for kind in kinds]


def scene_items(number: int, art: Art | None = None, split: str = SPLIT) -> Iterator[Item]:
    """Questions about scenes, one of every kind about each; without art, about shapes and text."""
    for index in range(number):
        rng = random.Random(f"{split} questions:{index}")
        scene = scene_at(split, index, art)
        image = draw(scene, art)
        for kind, text, answer, _ in one_of_each_kind(questions(scene, rng), rng):
            yield Item("scenes", kind, (image,), text, answer)


def other_ways(items: Sequence[Item]) -> Iterator[Item]:
    """The questions of `scene_items` after one and two others about the same scene, and in five tiles."""
    for _, group in itertools.groupby(items, key=lambda item: id(item.images[0])):
        asked = list(group)
        for place, item in enumerate(asked):
            others = [other for other in asked[place + 1 :] + asked[:place] if other.kind != "describe"]
            before = tuple((other.question, other.answer) for other in others)
            yield replace(item, suite="as second question", before=before[:1])
            yield replace(item, suite="as third question", before=before[:2])
            yield replace(item, suite="five tiles", is_split=True)


def small_items(number: int, art: Art | None = None, split: str = SPLIT) -> Iterator[Item]:
    """Questions about small things and texts, in one tile and in five; without art, about shapes and texts."""
    layout = Layout(
        num_things=(3, 6), sides=(0.07, 0.16), share_texts=0.4, emoji_side=0.09, text_height=0.09, quality=0.0
    )
    for index in range(number):
        rng = random.Random(f"{split} small:{index}")
        scene = scene_at(f"{split} small", index, art, layout)
        images = (draw(scene, art, layout),)
        asked = [question for question in questions(scene, rng) if question.kind in ("read", "thing", "place", "shape")]
        for kind, text, answer, _ in one_of_each_kind(asked, rng):
            yield Item("small", kind, images, text, answer)
            yield Item("small, five tiles", kind, images, text, answer, is_split=True)


def pair_items(number: int, art: Art, split: str = SPLIT) -> Iterator[Item]:
    """Questions about one of two images, and about which of them has something."""
    for index in range(number):
        rng = random.Random(f"{split} pair:{index}")
        first, second = (scene_at(f"{split} pair", 2 * index + place, art) for place in range(2))
        images = (draw(first, art), draw(second, art))
        for kind, text, answer, _ in one_of_each_kind(questions_on_two(first, second, rng), rng):
            if kind != "describe":
                yield Item("two images", kind, images, text, answer)


def drawing_items(number: int, split: str = SPLIT) -> Iterator[Item]:
    """Questions about drawings of the other program."""
    for index in range(number):
        rng = random.Random(f"{split} drawing:{index}")
        scene, image = draw_svg(rng)
        for kind, text, answer, _ in one_of_each_kind(questions(scene, rng), rng):
            if kind != "describe":
                yield Item("other program", kind, (image,), text, answer)


def naming_items(folder: Path) -> Iterator[Item]:
    """One thing on white, as large as 60 % of the image, for every style that has it."""
    for style in (*STYLES, *TEST_STYLES):
        art = Art(folder, styles=(style,))
        for number, name in enumerate(THINGS):
            if name in art.drawings:
                thing = Thing(name, "", (0, 0, 0), Box(0.2, 0.2, 0.8, 0.8), "", (255, 255, 255), number)
                scene = Scene((thing,), (256, 256), "plain", WHITE, 0)
                layout = Layout(quality=0.0, art_changes=0.0)
                suite = "naming" if style in STYLES else f"naming, {style}"
                yield Item(suite, style, (draw(scene, art, layout),), "What is this?", name)


def word_items(number: int, folder: Path, split: str = SPLIT) -> Iterator[Item]:
    """Words in fonts that training does not use, black on white, a quarter of the image high."""
    art = Art(folder, fonts=TEST_FONTS)
    for index in range(number):
        rng = random.Random(f"{split} word:{index}")
        for shortest, longest in ((1, 5), (6, 8)):
            text = ""
            while not shortest <= len(text) <= longest:
                text = sample_string(rng)
            width = min(0.94, 0.2 * len(text))
            left, top = rng.uniform(0.02, 0.98 - width), rng.uniform(0.02, 0.73)
            box = Box(left, top, left + width, top + 0.25)
            name = "number" if text.isdigit() else "word"
            scene = Scene((Thing(name, "black", (0, 0, 0), box, text, WHITE[0], index),), (320, 320), "plain", WHITE, 0)
            image = draw(scene, art, Layout(quality=0.0))
            yield Item("unseen fonts", f"{shortest} to {longest}", (image,), f"Read the {name}.", text)


def foreign_items(number: int, folder: Path, art: Art) -> Iterator[Item]:
    """Foreign images that training does not use."""
    foreign = ForeignImages(sorted((folder / "test-photographs").glob("*.*")), art.font_files)
    wordings = ("What is this?", "Describe the picture.", "How many shapes are there?", "Read the text.")
    for index in range(number):
        for kind in FOREIGN_KINDS:
            rng = random.Random(f"{SPLIT} foreign:{kind}:{index}")
            yield Item("foreign", kind, (foreign.sample(rng, kind),), rng.choice(wordings), REFUSAL)


def build_inputs(processor: FlashSlothProcessor, batch: Sequence[Item]) -> BatchFeature:
    """Build the prompts of questions, with the conversations before them; all are split into tiles, or none."""
    conversations = []
    for item in batch:
        messages: list[dict] = []
        for text, reply in (*item.before, (item.question, None)):
            content: list[dict] = [{"type": "image", "image": image} for image in item.images] if not messages else []
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": text}]})
            if reply is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
        conversations.append(messages)
    return processor.encode_conversations(conversations, padding=True, do_image_splitting=batch[0].is_split)


@torch.inference_mode()
def answer(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, batch: Sequence[Item], **kwargs: Any
) -> list[str]:
    """Answer questions by greedy decoding.

    Args:
        model: The model, in evaluation mode.
        processor: Its processor.
        batch: The questions; all are split into tiles, or none.
        **kwargs: Arguments of `generate`.
    """
    inputs = build_inputs(processor, batch).to(model.device)
    generated = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False, **kwargs)
    return processor.post_process_image_text_to_text(generated[:, inputs["input_ids"].shape[1] :])


def ask(items: Sequence[Item], reply: Callable[[Sequence[Item]], list[str]], batch_size: int = 64) -> list[str]:
    """Answer questions in batches of the same shape.

    Args:
        items: The questions.
        reply: Answers a batch; all of a batch are split into tiles, or none.
        batch_size: Number of questions in a batch.

    Returns:
        The answers, in the order of `items`.
    """

    def shape(place: int) -> tuple[bool, int, int]:
        item = items[place]
        return item.is_split, len(item.images), len(item.before)

    found = [""] * len(items)
    for (is_split, *_), group in itertools.groupby(sorted(range(len(items)), key=shape), key=shape):
        places = list(group)
        size = max(1, batch_size // 4) if is_split else batch_size
        for start in range(0, len(places), size):
            batch = places[start : start + size]
            for place, text in zip(batch, reply([items[place] for place in batch]), strict=True):
                found[place] = text
    return found


def count_right(items: Sequence[Item], texts: Sequence[str]) -> dict[str, dict[str, Counts]]:
    """Count right answers by suite and kind; "all" counts a suite.

    A suite more, `NOT_REFUSED`, counts the answers about images that are not foreign and that are no refusals.
    """
    result: dict[str, dict[str, Counts]] = {}
    for item, text in zip(items, texts, strict=True):
        entries = [(item.suite, item.kind, text == item.answer), (item.suite, "all", text == item.answer)]
        if item.answer != REFUSAL:
            entries.append((NOT_REFUSED, "all", text != REFUSAL))
        for suite, kind, is_right in entries:
            counts = result.setdefault(suite, {}).setdefault(kind, Counts())
            counts.asked += 1
            counts.right += is_right
    return result


def evaluate(items: Sequence[Item], reply: Callable[[Sequence[Item]], list[str]]) -> dict[str, dict[str, Counts]]:
    """Answer questions and count the right answers; see `ask` and `count_right`."""
    return count_right(items, ask(items, reply))


def all_items(number: int, folder: Path, split: str = SPLIT) -> list[Item]:
    """All suites; `number` is the number of scenes."""
    art = Art(folder)
    scenes = list(scene_items(number, art, split))
    return [
        *scenes,
        *other_ways(scenes),
        *small_items(number, art, split),
        *pair_items(number, art, split),
        *drawing_items(2 * number, split),
        *naming_items(folder),
        *word_items(2 * number, folder, split),
        *foreign_items(number // 5, folder, art),
    ]


def as_counts(result: dict[str, dict[str, Counts]]) -> dict[str, dict[str, dict[str, int]]]:
    """The numbers of questions and right answers, for a JSON file."""
    return {
        suite: {kind: {"asked": found.asked, "right": found.right} for kind, found in kinds.items()}
        for suite, kinds in result.items()
    }


def curve_items(number: int, folder: Path) -> list[Item]:
    """A few questions of the suites that show progress, for learning curves; `number` is the number of scenes."""
    art = Art(folder)
    scenes = list(scene_items(number, art, "evaluation"))
    items = [
        *scenes,
        *(replace(item, suite="five tiles", is_split=True) for item in scenes),
        *pair_items(number // 2, art, "evaluation"),
        *drawing_items(number, "evaluation"),
        *word_items(number, folder, "evaluation"),
    ]
    named = [item for item in naming_items(folder) if item.kind not in TEST_STYLES]
    return items + random.Random(0).sample(named, min(len(named), 2 * number))


def as_table(result: dict[str, dict[str, Counts]]) -> str:
    """Format counts as a Markdown table."""
    rows = ["| suite | kind | questions | exact match |", "|---|---|---:|---:|"]
    for suite, kinds in result.items():
        for kind, counts in sorted(kinds.items(), key=lambda entry: entry[0] != "all"):
            rows.append(f"| {suite} | {kind} | {counts.asked} | {counts.right / counts.asked:.1%} |")
    return "\n".join(rows)


def as_summary(result: dict[str, dict[str, Counts]]) -> str:
    """Format counts as a Markdown table with a row for each of `AIMS`, without those of suites that were not asked."""
    rows = ["| questions about | number | aim | exact match |", "|---|---:|---:|---:|"]
    for name, suite, kind, aim in AIMS:
        if kind == WEAKEST:
            asked = [
                kind for kind, found in result.get(suite, {}).items() if found.asked >= LEAST_ASKED and kind != "all"
            ]
            kind = min(asked, key=lambda kind: _share(result[suite][kind]), default="")
        if kind in result.get(suite, {}):
            counts = result[suite][kind]
            least = _share(result["scenes"]["all"]) + aim if aim < 0 and "scenes" in result else aim
            shown = f"{least:.1%}" if aim else ""
            rows.append(f"| {name.format(kind)} | {counts.asked} | {shown} | {_share(counts):.1%} |")
    return "\n".join(rows)


def _share(counts: Counts) -> float:
    return counts.right / counts.asked


def write_page(items: Sequence[Item], texts: Sequence[str], page: Path) -> None:
    """Write a Markdown page with some right and wrong answers of every suite; its images go into a folder of its name.

    Args:
        items: The questions.
        texts: Their answers.
        page: The page's file.
    """
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    result = count_right(items, texts)
    lines = ["# Right and wrong answers of the small checkpoint", "", PAGE_NOTE, "", as_summary(result)]
    for suite in dict.fromkeys(item.suite for item in items):
        pairs = [(item, text) for item, text in zip(items, texts, strict=True) if item.suite == suite]
        shown = []
        for is_right in (True, False):
            found = [(item, text) for item, text in pairs if (text == item.answer) == is_right]
            shown += random.Random(suite).sample(found, min(NUM_SHOWN, len(found)))
        file = folder / f"{re.sub('[^a-z]+', '_', suite)}.webp"
        save_strip([image for item, _ in shown for image in item.images], file)
        lines += [
            "",
            f"## {suite.capitalize()}",
            "",
            f"![Images of the questions below]({folder.name}/{file.name})",
            "",
        ]
        lines += ["| question | right answer | answer |", "|---|---|---|"]
        for item, text in shown:
            asked = " → ".join([*(question for question, _ in item.before), item.question])
            lines.append(f"| {asked} | {item.answer} | {'the same' if text == item.answer else f'**{text}**'} |")
    lines += ["", "## All figures", "", as_table(result)]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def save_strip(images: Sequence[Image.Image], file: Path) -> None:
    """Save images side by side, equally high."""
    scaled = [image.resize((round(STRIP_HEIGHT * image.width / image.height), STRIP_HEIGHT)) for image in images]
    strip = Image.new("RGB", (sum(image.width + STRIP_GAP for image in scaled), STRIP_HEIGHT), "magenta")
    left = 0
    for image in scaled:
        strip.paste(image, (left, 0))
        left += image.width + STRIP_GAP
    strip.save(file, quality=80)


def main() -> None:
    """Evaluate a checkpoint folder or Hub id."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder or Hub id")
    parser.add_argument("art", type=Path, help="folder written by art.py")
    parser.add_argument("--scenes", type=int, default=200, help="number of scenes (default: %(default)s)")
    parser.add_argument("--split", default=SPLIT, help="use 'evaluation' for tuning (default: %(default)s)")
    parser.add_argument("--suites", nargs="+", help="only these suites")
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    parser.add_argument("--page", type=Path, help="Markdown file for right and wrong answers")
    parser.add_argument("--verbose", action="store_true", help="log wrong answers")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = FlashSlothForConditionalGeneration.from_pretrained(args.model, dtype=working_dtype("cpu")).eval()
    processor = FlashSlothProcessor.from_pretrained(args.model)
    items = all_items(args.scenes, args.art, args.split)
    items = [item for item in items if item.suite in (args.suites or [item.suite])]
    texts = ask(items, lambda batch: answer(model, processor, batch))
    if args.output:
        args.output.write_text(json.dumps(as_counts(count_right(items, texts)), indent=2) + "\n", encoding="utf-8")
    if args.page:
        write_page(items, texts, args.page)
    logger.info("%s", as_table(count_right(items, texts)))
    if args.verbose:
        for item, text in zip(items, texts, strict=True):
            if text != item.answer:
                logger.info("%s: %r: expected %r, found %r", item.suite, item.question, item.answer, text)


if __name__ == "__main__":
    main()
