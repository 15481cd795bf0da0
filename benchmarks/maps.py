"""Do the maps of docs/inference.md show what a question is about? And what does the Embedded Query module do?

    python benchmarks/maps.py --output benchmarks/results/maps.md --image docs/saliency.png

The small checkpoint answers questions that are about one thing, in scenes of two to four things, which training never
saw, of `examples/tiny`.

- A thing holds most of a map if the sum of the map over its box is greater than over any other thing's. *By chance* is
  what a map would reach that has nothing to do with scene and question.
- The queries' map once more: which kind of thing holds most of it, of the scenes that have such a thing.
- The image shows `examples/scene.png`, and what the answer to "Read the sign." depends on, where its queries looked,
  and how its patches were pooled.
- With the Embedded Query module switched off, queries pass through it unchanged; the questions are those of
  `examples/tiny/score.py`, each asked alone.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from latency import hardware
from PIL import Image
from tqdm import tqdm

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.saliency_flashsloth import overlay

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny"))
from scenes import SHAPES, Scene, Thing, draw, scene_at  # noqa: E402
from score import IMAGE_SIZE, SPLIT, Question, build_inputs, evaluate  # noqa: E402

logger = logging.getLogger(__name__)

SCENES, IMAGES, BATCH_SIZE = 180, 500, 30
PANEL_SIDE, PANEL_GAP = 192, 8  # pixels


# A question, the attribute of a thing that goes into it, and the things that it may be about, if no other shape has the
# same attribute.
QUESTIONS = (
    ("How many shapes are {}?", "colour", SHAPES),
    ("Which shape is {}?", "colour", SHAPES),
    ("What colour is the {}?", "name", SHAPES),
    ("What colour is the {}?", "name", ("sign",)),
    ("What colour is the {}?", "name", ("number",)),
    ("Read the sign.", "name", ("sign",)),
    ("What is the number?", "name", ("number",)),
)
KINDS = {"a shape": SHAPES, "the sign": ("sign",), "the number": ("number",)}


class Asked(NamedTuple):
    """A question about one thing of a scene."""

    scene: Scene
    thing: Thing
    text: str


def questions_about_one_thing(wording: str, attribute: str, names: tuple[str, ...]) -> Iterator[Asked]:
    """One of `QUESTIONS` about every scene of several things that has such a thing, without end."""
    for index in count():
        scene = scene_at(SPLIT, index)
        values = Counter(getattr(thing, attribute) for thing in scene.things if thing.name in SHAPES)
        things = [thing for thing in scene.things if thing.name in names and values[getattr(thing, attribute)] < 2]
        if things and len(scene.things) > 1:
            thing = things[index % len(things)]
            yield Asked(scene, thing, wording.format(getattr(thing, attribute)))


def most_of(heat: torch.Tensor, scene: Scene) -> Thing:
    """The thing that holds most of a map, `(height, width)`."""
    height, width = heat.shape

    def sum_over(thing: Thing) -> float:
        left, top, right, bottom = thing.box
        rows = slice(max(0, round(top * height)), round(bottom * height))
        return heat[rows, max(0, round(left * width)) : round(right * width)].sum().item()

    return max(scene.things, key=sum_over)


def maps_of(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, asked: list[Asked]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each question where its queries looked, and what the answer depends on, both `(height, width)`."""
    for start in range(0, len(asked), BATCH_SIZE):
        batch = asked[start : start + BATCH_SIZE]
        images = [draw(question.scene, IMAGE_SIZE) for question in batch]
        texts = [question.text for question in batch]
        rows = [Question("", *row, "", False, ("", "")) for row in zip(images, texts, strict=True)]
        inputs = build_inputs(processor, rows)
        output = model.generate(**inputs, max_new_tokens=20, output_attentions=True, return_dict_in_generate=True)
        sizes = [(IMAGE_SIZE, IMAGE_SIZE)] * len(batch)
        looked = model.heat_maps(output, inputs["input_ids"], sizes)
        answered = model.answer_maps(inputs, output.sequences, sizes)
        yield from ((maps[0], heat) for maps, heat in zip(looked.questions, answered, strict=True))


def maps_tables(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, num_scenes: int
) -> tuple[str, str]:
    """Markdown: how often the thing that was asked for holds most; and what holds most of the queries' map."""
    hits = ["| question | by chance | queries | answer |", "|---|---:|---:|---:|"]
    held = [f"| question | {' | '.join(KINDS)} |", f"|---{'|---:' * len(KINDS)}|"]
    for wording, attribute, names in tqdm(QUESTIONS):
        asked = list(islice(questions_about_one_thing(wording, attribute, names), num_scenes))
        most = [
            [most_of(heat, one.scene) for heat in heats]
            for one, heats in zip(asked, maps_of(model, processor, asked), strict=True)
        ]
        name = wording.format({"colour": "red", "name": "star" if names is SHAPES else names[0]}[attribute])
        chance = sum(1 / len(one.scene.things) for one in asked)
        queries, answers = (
            sum(thing is one.thing for thing, one in zip(column, asked, strict=True))
            for column in zip(*most, strict=True)
        )
        hits.append(f"| {name} | {chance:.0f} | {queries} | {answers} of {len(asked)} |")
        cells = []
        for kind in KINDS.values():
            there = [
                thing.name in kind
                for (thing, _), one in zip(most, asked, strict=True)
                if any(other.name in kind for other in one.scene.things)
            ]
            cells.append(f"{sum(there)} of {len(there)}")
        held.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(hits), "\n".join(held)


def panels(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, image: Image.Image, text: str
) -> Image.Image:
    """An image beside its maps: of the answer to a question, of the question's queries, of pooling."""
    inputs = build_inputs(processor, [Question("", image, text, "", False, ("", ""))])
    output = model.generate(**inputs, max_new_tokens=20, output_attentions=True, return_dict_in_generate=True)
    sizes = [(image.height, image.width)]
    looked = model.heat_maps(output, inputs["input_ids"], sizes)
    maps = [*model.answer_maps(inputs, output.sequences, sizes), looked.questions[0][0], looked.pooling[0]]
    shown = [image.convert("RGB"), *(overlay(image, heat) for heat in maps)]
    strip = Image.new("RGB", (len(shown) * (PANEL_SIDE + PANEL_GAP) - PANEL_GAP, PANEL_SIDE), "white")
    for place, panel in enumerate(shown):
        strip.paste(panel.resize((PANEL_SIDE, PANEL_SIDE)), (place * (PANEL_SIDE + PANEL_GAP), 0))
    return strip


def ablation_table(model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, num_images: int) -> str:
    """Markdown: exact answers with the Embedded Query module, and without."""
    module = model.model.embedded_query
    whole = evaluate(model, processor, num_images, with_second_turns=False)
    with mock.patch.object(module, "forward", lambda hidden_states, *args, **kwargs: hidden_states):
        without = evaluate(model, processor, num_images, with_second_turns=False)
    lines = ["| kind | questions | right | right without the module |", "|---|---:|---:|---:|"]
    lines += [
        f"| {kind} | {counts['asked']} | {counts['right']} | {without[kind]['right']} |"
        for kind, counts in whole.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Compare maps and scenes, and write tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--model", default=str(ROOT), help="a tiny checkpoint's folder (default: the one in the root)")
    parser.add_argument("--image", type=Path, help="image to write")
    parser.add_argument("--scenes", type=int, default=SCENES, help="for each question")
    parser.add_argument("--images", type=int, default=IMAGES, help="with about seven questions each")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = FlashSlothForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = FlashSlothProcessor.from_pretrained(args.model)
    if args.image:
        panels(model, processor, Image.open(ROOT / "examples" / "scene.png"), "Read the sign.").save(args.image)
    hits, held = maps_tables(model, processor, args.scenes)
    parts = [
        f"{hardware('cpu').replace('bfloat16', 'float32')}; made by benchmarks/maps.py.",
        "## How often the thing that was asked for holds most of the map",
        hits,
        "## What holds most of the queries' map",
        held,
        f"## Exact answers, {args.images} images",
        ablation_table(model, processor, args.images),
    ]
    text = "\n\n".join(parts)
    logger.info("%s", text)
    args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
