"""Whether the maps of docs/inference.md show the object of a question, and what the Embedded Query module contributes.

    python benchmarks/maps.py --art ART --output benchmarks/results/maps.md --image docs/saliency.png

The small checkpoint answers questions about one object in scenes of several objects, which are drawn by
`examples/tiny` and were not used in training.

- An object has the largest share of a map if the map's sum over its box is larger than over any other object's box.
  *By chance* is the expected number of hits of a map that is independent of scene and question.
- The second table shows how often each kind of object has the largest share of the queries' map, among the scenes with
  such an object.
- The image shows `examples/scene.png` with three maps for "Read the sign.": the patches that the answer depends on,
  those that the queries attended to, and the weights of the pooling.
- With the Embedded Query module switched off, queries pass through it unchanged. The questions are those of
  `examples/tiny/score.py` about scenes, and about small things and texts, each asked alone.
"""

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from PIL import Image
from report import build_parser, describe_machine, markdown_table, write_report
from tqdm import tqdm

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.saliency_flashsloth import overlay

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny"))
from scenes import SHAPES, Art, Scene, Thing, draw, scene_at  # noqa: E402
from score import SPLIT, Item, answer, build_inputs, evaluate, scene_items, small_items  # noqa: E402

SCENES, IMAGES, BATCH_SIZE = 180, 200, 30
PANEL_SIDE, PANEL_GAP = 192, 8  # pixels
# A question, the object's attribute that it names, and the names of the objects that it may be about, as long as no
# other shape shares the attribute.
QUESTIONS = (
    ("How many {} shapes are there?", "colour", SHAPES),
    ("Which shape is {}?", "colour", SHAPES),
    ("What colour is the {}?", "name", SHAPES),
    ("What colour is the {}?", "name", ("sign",)),
    ("What colour is the {}?", "name", ("number",)),
    ("Read the sign.", "name", ("sign",)),
    ("What is the number?", "name", ("number",)),
)
KINDS = {"a shape": SHAPES, "the sign": ("sign",), "the number": ("number",)}


class Asked(NamedTuple):
    """A question about one object of a scene."""

    scene: Scene
    thing: Thing
    text: str


def questions_about_one_thing(wording: str, attribute: str, names: tuple[str, ...]) -> Iterator[Asked]:
    """Ask one of `QUESTIONS` about every scene with several objects, one of them fitting; never ends."""
    for index in count():
        scene = scene_at(SPLIT, index)
        values = Counter(getattr(thing, attribute) for thing in scene.things if thing.name in SHAPES)
        things = [thing for thing in scene.things if thing.name in names and values[getattr(thing, attribute)] < 2]
        if things and len(scene.things) > 1:
            thing = things[index % len(things)]
            yield Asked(scene, thing, wording.format(getattr(thing, attribute)))


def most_of(heat: torch.Tensor, scene: Scene) -> Thing:
    """The object with the largest share of a map, `(height, width)`."""
    height, width = heat.shape

    def sum_over(thing: Thing) -> float:
        left, top, right, bottom = thing.box
        rows = slice(max(0, round(top * height)), round(bottom * height))
        return heat[rows, max(0, round(left * width)) : round(right * width)].sum().item()

    return max(scene.things, key=sum_over)


def maps_of(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, asked: list[Asked]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each question, the maps of its queries and of its answer, both `(height, width)`."""
    for start in range(0, len(asked), BATCH_SIZE):
        batch = asked[start : start + BATCH_SIZE]
        images = [draw(question.scene) for question in batch]
        rows = [Item("", "", (image,), one.text, "") for image, one in zip(images, batch, strict=True)]
        inputs = build_inputs(processor, rows)
        output = model.generate(**inputs, max_new_tokens=20, output_attentions=True, return_dict_in_generate=True)
        sizes = [(image.height, image.width) for image in images]
        looked = model.heat_maps(output, inputs["input_ids"], sizes)
        answered = model.answer_maps(inputs, output.sequences, sizes)
        yield from ((maps[0], heat) for maps, heat in zip(looked.questions, answered, strict=True))


def maps_tables(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, num_scenes: int
) -> tuple[str, str]:
    """Count which objects have the largest share of the maps.

    Returns:
        Two tables: how often it is the object of the question; and of which kind it is in the queries' map.
    """
    hits, held = [], []
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
        hits.append((name, f"{chance:.0f}", queries, f"{answers} of {len(asked)}"))
        cells = []
        for kind in KINDS.values():
            there = [
                thing.name in kind
                for (thing, _), one in zip(most, asked, strict=True)
                if any(other.name in kind for other in one.scene.things)
            ]
            cells.append(f"{sum(there)} of {len(there)}")
        held.append((name, *cells))
    hits_table = markdown_table(("question", "by chance", "queries", "answer"), hits)
    return hits_table, markdown_table(("question", *KINDS), held)


def panels(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, image: Image.Image, text: str
) -> Image.Image:
    """An image next to its maps: of the answer to a question, of the question's queries, of pooling."""
    inputs = build_inputs(processor, [Item("", "", (image,), text, "")])
    output = model.generate(**inputs, max_new_tokens=20, output_attentions=True, return_dict_in_generate=True)
    sizes = [(image.height, image.width)]
    looked = model.heat_maps(output, inputs["input_ids"], sizes)
    maps = [*model.answer_maps(inputs, output.sequences, sizes), looked.questions[0][0], looked.pooling[0]]
    shown = [image.convert("RGB"), *(overlay(image, heat) for heat in maps)]
    strip = Image.new("RGB", (len(shown) * (PANEL_SIDE + PANEL_GAP) - PANEL_GAP, PANEL_SIDE), "white")
    for place, panel in enumerate(shown):
        strip.paste(panel.resize((PANEL_SIDE, PANEL_SIDE)), (place * (PANEL_SIDE + PANEL_GAP), 0))
    return strip


def ablation_table(model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, asked: list[Item]) -> str:
    """Count exact answers with and without the Embedded Query module."""
    module = model.model.embedded_query
    reply = partial(answer, model, processor)
    whole = evaluate(asked, reply)
    with mock.patch.object(module, "forward", lambda hidden_states, *args, **kwargs: hidden_states):
        without = evaluate(asked, reply)
    rows = [
        (suite, kind, counts.asked, counts.right, without[suite][kind].right)
        for suite in dict.fromkeys(item.suite for item in asked)
        for kind, counts in whole[suite].items()
    ]
    return markdown_table(("suite", "kind", "questions", "right", "right without the module"), rows)


def main() -> None:
    """Compare maps with scenes, and write tables."""
    parser = build_parser(__doc__)
    parser.add_argument("--model", default=str(ROOT), help="folder of a tiny checkpoint (default: the shipped one)")
    parser.add_argument("--image", type=Path, help="image file to write")
    parser.add_argument("--scenes", type=int, default=SCENES, help="scenes for each question")
    parser.add_argument("--images", type=int, default=IMAGES, help="images of each suite without the module")
    parser.add_argument("--art", type=Path, help="folder written by examples/tiny/art.py, for scenes with emoji")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = FlashSlothForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = FlashSlothProcessor.from_pretrained(args.model)
    if args.image:
        panels(model, processor, Image.open(ROOT / "examples" / "scene.png"), "Read the sign.").save(args.image)
    hits, held = maps_tables(model, processor, args.scenes)
    art = Art(args.art) if args.art else None
    asked = [*scene_items(args.images, art), *(one for one in small_items(args.images, art) if not one.is_split)]
    write_report(
        args.output,
        f"{describe_machine(dtype='float32')}; made by benchmarks/maps.py.",
        "## How often the object of the question has the largest share of the map",
        hits,
        "## What has the largest share of the queries' map",
        held,
        f"## Exact answers, {args.images} images",
        ablation_table(model, processor, asked),
    )


if __name__ == "__main__":
    main()
