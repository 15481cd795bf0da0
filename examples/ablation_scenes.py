"""Data of the ablation: drawn images, the content of their patches, questions and answers.

Every image shows one large shape, a sign of three letters and small dots at random positions on a plain background;
letters and dots are about the size of a patch. Two of the `TASKS` depend on such details, two do not. Images of the
split "tower", which have no questions, show two signs.
"""

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

SIZE, PATCH = 72, 8  # pixels
GRID = SIZE // PATCH
IGNORED = -100
COLOURS = {
    "red": (214, 36, 36),
    "orange": (244, 128, 16),
    "yellow": (230, 200, 30),
    "green": (36, 148, 60),
    "blue": (36, 84, 208),
    "purple": (132, 44, 164),
}
BACKGROUNDS = {"black": (24, 24, 24), "grey": (140, 140, 140), "white": (244, 244, 244), "pink": (250, 180, 200)}
SHAPES = ("circle", "square", "triangle", "cross")
LETTERS = "ACEHKLNRTX"
CODE_LENGTH = 3
MAX_COUNT = 5
DOT_RADIUS = 3
FONT = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf", 14)
LETTER_WIDTH, LETTER_HEIGHT, MARGIN = FONT.getlength("A"), 10, 3
SIGN_SIZE = (CODE_LENGTH * LETTER_WIDTH + 2 * MARGIN, LETTER_HEIGHT + 2 * MARGIN)

TASKS = {
    "read": "read a small sign",
    "count": "count small dots",
    "shape": "name the large shape",
    "background": "colour of the background",
}
PAD, END, IMAGE, QUERY, USER, ASSISTANT = "<pad>", "</s>", "<image>", "<query>", "USER:", "ASSISTANT:"
WORDS = (PAD, END, IMAGE, QUERY, USER, ASSISTANT, *TASKS, *BACKGROUNDS, *SHAPES, *LETTERS)
VOCABULARY = {word: i for i, word in enumerate((*WORDS, *map(str, range(1, MAX_COUNT + 1))))}

NAMES = (*BACKGROUNDS, *SHAPES, "sign", "dot")  # contents of a patch
NUM_CLASSES = (len(NAMES), len(COLOURS), len(LETTERS), CODE_LENGTH)  # the last one: position of the letter on its sign


@dataclass(frozen=True)
class Thing:
    """An object of an image.

    Attributes:
        name: One of `SHAPES`, "sign" or "dot".
        colour: A key of `COLOURS`.
        box: Left, top, right and bottom, in pixels.
        text: Text of a sign, else "".
    """

    name: str
    colour: str
    box: tuple[float, float, float, float]
    text: str = ""


@dataclass(frozen=True)
class Scene:
    """A large shape, signs and some dots, without overlap, on a background (a key of `BACKGROUNDS`)."""

    background: str
    things: tuple[Thing, ...]


@lru_cache(maxsize=2**14)
def scene_at(split: str, index: int) -> Scene:
    """Scene number `index` of a split; the same on every machine."""
    rng = random.Random(f"{split}:{index}")
    while True:
        if scene := _sample_scene(rng, num_signs=2 if split == "tower" else 1):
            return scene


def _sample_scene(rng: random.Random, num_signs: int) -> Scene | None:
    """Sample a scene; `None` if the objects do not fit."""
    side, (shape_colour, dot_colour) = rng.uniform(24, 30), rng.choices(list(COLOURS), k=2)
    wanted = [(rng.choice(SHAPES), shape_colour, (side, side), "")]
    for colour in rng.sample(list(COLOURS), num_signs):
        wanted.append(("sign", colour, SIGN_SIZE, "".join(rng.choices(LETTERS, k=CODE_LENGTH))))
    wanted += [("dot", dot_colour, (2 * DOT_RADIUS, 2 * DOT_RADIUS), "")] * rng.randint(1, MAX_COUNT)
    things: list[Thing] = []
    for name, colour, size, text in wanted:
        for _ in range(30):
            left, top = (rng.uniform(1, SIZE - 1 - length) for length in size)
            box = (left, top, left + size[0], top + size[1])
            if not any(_are_near(box, thing.box) for thing in things):
                things.append(Thing(name, colour, box, text))
                break
        else:
            return None
    return Scene(rng.choice(list(BACKGROUNDS)), tuple(things))


def _are_near(box: tuple, other: tuple, gap: float = 3) -> bool:
    """Whether two boxes overlap or are less than `gap` pixels apart; the gap keeps two dots off the same patch."""
    return all(box[i] < other[i + 2] + gap and other[i] < box[i + 2] + gap for i in (0, 1))


def draw(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of `SIZE` × `SIZE` pixels."""
    image = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        (left, top, right, bottom), paint = thing.box, COLOURS[thing.colour]
        middle, third = (left + right) / 2, (right - left) / 3
        if thing.name in ("circle", "dot"):
            canvas.ellipse(thing.box, fill=paint)
        elif thing.name == "triangle":
            canvas.polygon([(middle, top), (right, bottom), (left, bottom)], fill=paint)
        elif thing.name == "cross":
            canvas.rectangle((left + third, top, right - third, bottom), fill=paint)
            canvas.rectangle((left, top + third, right, bottom - third), fill=paint)
        else:
            canvas.rectangle(thing.box, fill=paint)
        if thing.text:
            canvas.text((left + MARGIN, bottom - MARGIN), thing.text, font=FONT, fill=(255, 255, 255), anchor="ls")
    return image


def pixels_of(scene: Scene) -> torch.Tensor:
    """Pixel values of a scene, `(3, SIZE, SIZE)`, in [-1, 1]."""
    return torch.from_numpy(np.asarray(draw(scene), np.float32).transpose(2, 0, 1) / 127.5 - 1)


def patch_targets(scene: Scene) -> torch.Tensor:
    """The content of every patch: local information only, neither a sign's whole text nor the number of dots.

    Returns:
        Classes `(GRID * GRID, 4)`: index into `NAMES`, colour, letter, position of the letter on its sign; `IGNORED`
        where a patch has none. A patch shows the object at its centre, or the dot whose centre is on the patch.
    """
    targets = np.full((GRID, GRID, len(NUM_CLASSES)), IGNORED, np.int64)
    targets[..., 0] = NAMES.index(scene.background)
    centres = (np.arange(GRID) + 0.5) * PATCH
    for thing in scene.things:
        left, top, right, bottom = thing.box
        covered = np.ix_((centres > top) & (centres < bottom), (centres > left) & (centres < right))
        if thing.name == "dot":
            covered = np.ix_([int((top + bottom) / 2 / PATCH)], [int((left + right) / 2 / PATCH)])
        targets[(*covered, 0)], targets[(*covered, 1)] = NAMES.index(thing.name), list(COLOURS).index(thing.colour)
        rows = (centres > top + MARGIN) & (centres < bottom - MARGIN)
        for position, letter in enumerate(thing.text):
            start = left + MARGIN + position * LETTER_WIDTH
            under = np.ix_(rows, (centres > start) & (centres < start + LETTER_WIDTH))
            targets[(*under, 2)], targets[(*under, 3)] = LETTERS.index(letter), position
    return torch.from_numpy(targets.reshape(GRID * GRID, -1))


def questions(scene: Scene) -> dict[str, tuple[list[str], list[str]]]:
    """Question and answer of every task, both in words of `VOCABULARY`."""
    shape, sign, *dots = scene.things
    return {
        "read": (["read"], list(sign.text)),
        "count": (["count"], [str(len(dots))]),
        "shape": (["shape"], [shape.name]),
        "background": (["background"], [scene.background]),
    }
