"""The tiny checkpoint's data: drawn scenes with questions and answers.

A scene has one to four objects in a loose 2x2 layout: coloured shapes, at most one sign (a word on a coloured board,
which takes a row) and at most one number (which takes a cell). Split and index determine everything:

    scene = scene_at("train", 7)
    image = draw(scene, 96)
    conversation = questions(scene, random.Random(7))

Images of the split "train" never contain one of `HELD_OUT_PAIRS`; those of other splits may.
"""

import colorsys
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (214, 36, 36),
    "orange": (244, 128, 16),
    "yellow": (250, 222, 40),
    "green": (36, 148, 60),
    "blue": (36, 84, 208),
    "purple": (132, 44, 164),
    "black": (22, 22, 22),
    "white": (248, 248, 248),
}
HELD_OUT_PAIRS = frozenset({("red", "star"), ("blue", "circle"), ("yellow", "triangle"), ("green", "heart")})
_WORD_LIST = """
    STOP OPEN CAFE EXIT TAXI SALE PARK BANK FOOD SHOP HOTEL MUSIC PIZZA BOOKS FRUIT TRAIN BREAD WATER BEACH PHONE
    GO UP IN OUT BUS BAR ZOO TEA GYM SPA PUSH PULL FIRE BIKE GATE HELP JAZZ KIWI MILK LAKE VET QUIZ SLOW TOWN
"""
WORDS = tuple(_WORD_LIST.split())
MAX_CHARACTERS = max(map(len, WORDS))
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono-Bold.ttf",
    "STIXGeneralBol.ttf",
    None,  # Pillow's default font
)
BACKGROUNDS = ("plain", "gradient", "stripes", "noise")
QUESTION_KINDS = ("colour", "shape", "count", "left of", "above", "place", "read word", "read number", "describe")
WORDINGS = {
    "describe": ("Describe the picture.", "Describe the image.", "What is in the picture?", "What do you see?"),
    "colour": ("What colour is the {0}?", "What color is the {0}?", "Which colour is the {0}?"),
    "shape of colour": ("Which shape is {0}?", "What shape is {0}?", "What shape is the {0} one?"),
    "shape at place": ("Which shape is {0}?", "What shape is at the {0}?", "Which shape is at the {0}?"),
    "count": ("How many {0} are there?", "How many {0} do you see?", "Count the {0}."),
    "count of colour": ("How many shapes are {0}?", "How many {0} shapes are there?", "Count the {0} shapes."),
    "read word": ("What does the sign say?", "What is written on the sign?", "Read the sign."),
    "read number": ("What is the number?", "Which number is there?", "What number do you see?"),
    "place": ("What is {0}?", "What is at the {0}?", "What do you see at the {0}?"),
    "neighbour": ("What is {0} the {1}?", "Which thing is {0} the {1}?"),
    "relation": ("Is the {0} {1} the {2}?", "Does the {0} stand {1} the {2}?"),
}
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
_REFERENCE_FONT_SIZE = 100


@dataclass(frozen=True)
class Thing:
    """An object of a scene; lengths are fractions of the image's side.

    Attributes:
        name: One of `SHAPES`, "sign" (a word on a board) or "number".
        colour: A key of `COLOURS`; for a sign, the colour of its board.
        paint: Red, green and blue as drawn, 0 to 255, close to the named colour.
        row: 0 for the top, 1 for the bottom.
        column: 0 for the left, 1 for the right, None for a sign, which takes its whole row.
        centre: x and y.
        half_size: Half the width and half the height.
        tilt: Rotation of a shape, in degrees.
        text: Text of a sign or a number, else "".
        font: Index into `FONTS`.
    """

    name: str
    colour: str
    paint: tuple[int, int, int]
    row: int
    column: int | None
    centre: tuple[float, float]
    half_size: tuple[float, float]
    tilt: float = 0.0
    text: str = ""
    font: int = 0

    @property
    def place(self) -> str:
        """Position: "top left", or "top" for a sign."""
        row = ("top", "bottom")[self.row]
        return row if self.column is None else f"{row} {('left', 'right')[self.column]}"

    @property
    def phrase(self) -> str:
        """Description: "a red circle", "an orange sign"."""
        return f"{'an' if self.colour == 'orange' else 'a'} {self.colour} {self.name}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom."""
        (x, y), (width, height) = self.centre, self.half_size
        return x - width, y - height, x + width, y + height


@dataclass(frozen=True)
class Scene:
    """Objects on a background.

    Attributes:
        things: The objects in reading order: top row first, left before right.
        background: One of `BACKGROUNDS`.
        background_colours: The background's two similar colours, 0 to 255.
        background_seed: Seed of the background's noise, stripes and gradient.
    """

    things: tuple[Thing, ...]
    background: str
    background_colours: tuple[tuple[int, int, int], tuple[int, int, int]]
    background_seed: int


def scene_at(split: str, index: int) -> Scene:
    """Scene number `index` of a split; the same on every machine."""
    return sample_scene(random.Random(f"{split}:{index}"), split)


def sample_scene(rng: random.Random, split: str) -> Scene:
    """Sample a scene; those of the split "train" contain none of `HELD_OUT_PAIRS`."""
    cells = [(row, column) for row in (0, 1) for column in (0, 1)]
    things = []
    if rng.random() < 0.45:
        row = rng.randrange(2)
        cells = [cell for cell in cells if cell[0] != row]
        things.append(_sample_sign(rng, row))
    if rng.random() < 0.35:
        things.append(_sample_number(rng, *cells.pop(rng.randrange(len(cells)))))
    rng.shuffle(cells)
    num_shapes = rng.randint(0 if things else 1, len(cells))
    pairs: list[tuple[str, str]] = []
    for row, column in cells[:num_shapes]:
        pairs.append(_sample_pair(rng, pairs, split))
        things.append(_sample_shape(rng, pairs[-1], row, column))
    things.sort(key=lambda thing: (thing.row, thing.column or 0))
    hue, saturation, value = rng.random(), rng.uniform(0.0, 0.25), rng.uniform(0.5, 0.76)
    other = min(0.78, max(0.46, value + rng.uniform(-0.1, 0.1)))
    background_colours = tuple(
        tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, v)) for v in (value, other)
    )
    return Scene(tuple(things), rng.choice(BACKGROUNDS), background_colours, rng.randrange(2**31))


def _sample_pair(rng: random.Random, earlier: list[tuple[str, str]], split: str) -> tuple[str, str]:
    """Sample a colour and a shape; often one of them is that of an earlier shape, to make counting non-trivial."""
    while True:
        colour, shape = rng.choice(tuple(COLOURS)), rng.choice(SHAPES)
        if earlier and rng.random() < 0.4:
            colour, shape = rng.choice([(rng.choice(earlier)[0], shape), (colour, rng.choice(earlier)[1])])
        if split != "train" or (colour, shape) not in HELD_OUT_PAIRS:
            return colour, shape


def _sample_shape(rng: random.Random, pair: tuple[str, str], row: int, column: int) -> Thing:
    colour, shape = pair
    half = rng.choice((0.11, 0.15, 0.19)) * rng.uniform(0.93, 1.07)
    tilt = rng.uniform(-14, 14)
    return Thing(
        shape, colour, _paint(rng, colour), row, column, _centre(rng, row, column, half, half), (half, half), tilt
    )


def _sample_number(rng: random.Random, row: int, column: int) -> Thing:
    text, font, colour = str(rng.randrange(100)), rng.randrange(len(FONTS)), rng.choice(tuple(COLOURS))
    height = rng.uniform(0.12, 0.17)
    width = min(0.21, height * _text_length(font, text) / _text_height(font))
    half_size = (width, width * _text_height(font) / _text_length(font, text))
    centre = _centre(rng, row, column, *half_size)
    return Thing("number", colour, _paint(rng, colour), row, column, centre, half_size, text=text, font=font)


def _sample_sign(rng: random.Random, row: int) -> Thing:
    text, font, colour = rng.choice(WORDS), rng.randrange(len(FONTS)), rng.choice(tuple(COLOURS))
    height = rng.uniform(0.15, 0.19)
    text_width = (height - 0.05) * _text_length(font, text) / _text_height(font)
    half_size = (min(0.47, text_width + 0.05), height)
    shift = 0.48 - half_size[0]
    centre = (0.5 + rng.uniform(-shift, shift), (0.26, 0.74)[row] + rng.uniform(-0.04, 0.04))
    return Thing("sign", colour, _paint(rng, colour), row, None, centre, half_size, text=text, font=font)


def _paint(rng: random.Random, colour: str) -> tuple[int, int, int]:
    return tuple(min(255, max(0, part + rng.randint(-12, 12))) for part in COLOURS[colour])


def _centre(rng: random.Random, row: int, column: int, half_width: float, half_height: float) -> tuple[float, float]:
    """Sample a centre that keeps the object inside its cell, 0.01 from the edges."""
    x_shift, y_shift = max(0.0, 0.24 - half_width), max(0.0, 0.24 - half_height)
    return (
        (0.25, 0.75)[column] + rng.uniform(-x_shift, x_shift),
        (0.25, 0.75)[row] + rng.uniform(-y_shift, y_shift),
    )


def describe(scene: Scene) -> str:
    """Describe a scene: its objects in reading order, each with its phrase, text and place."""
    return ", ".join(" ".join(filter(None, (thing.phrase, thing.text, thing.place))) for thing in scene.things)


def names_of(thing: Thing, scene: Scene) -> list[str]:
    """Unambiguous names of an object: "circle", "red circle"."""
    names = []
    if [other.name for other in scene.things].count(thing.name) == 1:
        names.append(thing.name)
    if [(other.colour, other.name) for other in scene.things].count((thing.colour, thing.name)) == 1:
        names.append(f"{thing.colour} {thing.name}")
    return names


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """All questions about a scene that have exactly one right answer.

    Args:
        scene: The scene.
        rng: Chooses the wordings and what to count.

    Returns:
        Triples of a kind from `QUESTION_KINDS`, a question and its answer.
    """
    references = {thing: names for thing in scene.things if (names := names_of(thing, scene))}
    return [
        ("describe", _word("describe", rng), describe(scene)),
        *_property_questions(scene, references, rng),
        *_place_questions(scene, rng),
        *_count_questions(scene, rng),
        *_position_questions(scene, references, rng),
    ]


def _word(question: str, rng: random.Random, *parts: str) -> str:
    return rng.choice(WORDINGS[question]).format(*parts)


def _property_questions(
    scene: Scene, references: dict[Thing, list[str]], rng: random.Random
) -> list[tuple[str, str, str]]:
    """Questions about the colour, shape and text of objects."""
    asked = []
    colours = [thing.colour for thing in scene.things]
    for thing in scene.things:
        if thing.name in references.get(thing, ()):
            asked.append(("colour", _word("colour", rng, thing.name), thing.colour))
        if thing.name == "sign":
            asked.append(("read word", _word("read word", rng), thing.text))
        elif thing.name == "number":
            asked.append(("read number", _word("read number", rng), thing.text))
        else:
            asked.append(("shape", _word("shape at place", rng, thing.place), thing.name))
            if colours.count(thing.colour) == 1:
                asked.append(("shape", _word("shape of colour", rng, thing.colour), thing.name))
    return asked


def _place_questions(scene: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """Questions about the content of each cell, except those of a sign's row."""
    by_place = {thing.place: thing.phrase for thing in scene.things}
    return [
        ("place", _word("place", rng, f"{row} {side}"), by_place.get(f"{row} {side}", "nothing"))
        for row in ("top", "bottom")
        for side in ("left", "right")
        if row not in by_place
    ]


def _count_questions(scene: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """Questions about the number of shapes: all of them, those of one kind, those of one colour."""
    shapes = [thing for thing in scene.things if thing.name in SHAPES]
    shape = rng.choice([thing.name for thing in shapes] + [rng.choice(SHAPES)])
    colour = rng.choice([thing.colour for thing in shapes] + [rng.choice(tuple(COLOURS))])
    plural = f"{shape}es" if shape.endswith("s") else f"{shape}s"
    return [
        ("count", _word("count", rng, "shapes"), str(len(shapes))),
        ("count", _word("count", rng, plural), str(sum(thing.name == shape for thing in shapes))),
        ("count", _word("count of colour", rng, colour), str(sum(thing.colour == colour for thing in shapes))),
    ]


def _position_questions(
    scene: Scene, references: dict[Thing, list[str]], rng: random.Random
) -> list[tuple[str, str, str]]:
    """Questions about relative positions; only objects in the same row or column are compared."""
    asked = []
    for anchor, names in references.items():
        neighbours = [(relation, other) for other in scene.things if (relation := _relation(other, anchor))]
        for relation, other in neighbours:
            kind = "left of" if relation in ("left of", "right of") else "above"
            anchor_name = rng.choice(names)
            if [found for found, _ in neighbours].count(relation) == 1:
                asked.append((kind, _word("neighbour", rng, relation, anchor_name), other.phrase))
            if other in references:
                asked.append((kind, *_relation_question(rng.choice(references[other]), relation, anchor_name, rng)))
    return asked


def _relation_question(name: str, relation: str, anchor_name: str, rng: random.Random) -> tuple[str, str]:
    """A question that offers two relations, or one to confirm or deny; and its answer."""
    if rng.random() < 0.5:
        choice = "above or below" if relation in ("above", "below") else "left or right of"
        return _word("relation", rng, name, choice, anchor_name), relation.removesuffix(" of")
    stated = rng.choice((relation, OPPOSITES[relation]))
    return _word("relation", rng, name, stated, anchor_name), "yes" if stated == relation else "no"


def _relation(thing: Thing, anchor: Thing) -> str | None:
    """Relation of an object to another one in its row or column; None if they are the same or diagonal."""
    if thing.row == anchor.row:
        if thing.column == anchor.column:
            return None
        return "left of" if thing.column < anchor.column else "right of"
    if thing.column is None or anchor.column is None or thing.column == anchor.column:
        return "above" if thing.row < anchor.row else "below"
    return None


@lru_cache(maxsize=1024)
def _font(index: int, size: int) -> ImageFont.FreeTypeFont:
    name = FONTS[index]
    return ImageFont.load_default(size) if name is None else ImageFont.truetype(str(_FONT_FOLDER / name), size)


@lru_cache(maxsize=4096)
def _text_length(font: int, text: str) -> float:
    """Width of a text at `_REFERENCE_FONT_SIZE`, in pixels."""
    return _font(font, _REFERENCE_FONT_SIZE).getlength(text)


@lru_cache(maxsize=len(FONTS))
def _text_height(font: int) -> float:
    """Height of a capital letter at `_REFERENCE_FONT_SIZE`, in pixels."""
    _, top, _, bottom = _font(font, _REFERENCE_FONT_SIZE).getbbox("H")
    return bottom - top


def text_box(thing: Thing) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the text of a sign or a number."""
    margin = 0.04 if thing.name == "sign" else 0.0
    half_width, half_height = thing.half_size[0] - margin, thing.half_size[1] - margin
    ratio = _text_length(thing.font, thing.text) / _text_height(thing.font)
    half_height = min(half_height, half_width / ratio)
    x, y = thing.centre
    return x - half_height * ratio, y - half_height, x + half_height * ratio, y + half_height


def character_edges(thing: Thing) -> list[float]:
    """Horizontal edges of a text's characters, from left to right: one more than there are characters."""
    left, _, right, _ = text_box(thing)
    scale = (right - left) / _text_length(thing.font, thing.text)
    return [left + scale * _text_length(thing.font, thing.text[:end]) for end in range(len(thing.text) + 1)]


def draw(scene: Scene, size: int) -> Image.Image:
    """Draw a scene.

    Args:
        scene: The scene.
        size: Side of the square image, in pixels.

    Returns:
        An RGB image; it is drawn at twice the size and reduced, for smooth edges.
    """
    image = _draw_background(scene, 2 * size)
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        if thing.text:
            _draw_text(canvas, thing, 2 * size)
        else:
            _draw_shape(canvas, thing, 2 * size)
    return image.reduce(2)


def _draw_background(scene: Scene, size: int) -> Image.Image:
    first, second = (np.array(colour, np.float32) for colour in scene.background_colours)
    rng = np.random.default_rng(scene.background_seed)
    grid = np.linspace(0, 1, 48, dtype=np.float32)
    if scene.background == "plain":
        mix = np.zeros((48, 48), np.float32)
    elif scene.background == "noise":
        mix = rng.random((48, 48), np.float32)
    else:
        angle = rng.uniform(0, 2 * np.pi)
        along = np.cos(angle) * grid[None, :] + np.sin(angle) * grid[:, None]
        mix = along - along.min() if scene.background == "gradient" else np.sin(along * rng.uniform(15, 40)) > 0
    pixels = first + (second - first) * np.clip(mix, 0, 1)[..., None]
    return Image.fromarray(pixels.astype(np.uint8)).resize((size, size), Image.Resampling.BILINEAR)


def _draw_text(canvas: ImageDraw.ImageDraw, thing: Thing, size: int) -> None:
    colour = thing.paint
    if thing.name == "sign":
        canvas.rounded_rectangle([size * edge for edge in thing.box], radius=0.03 * size, fill=thing.paint)
        colour = (16, 16, 16) if thing.colour in ("white", "yellow", "orange") else (252, 252, 252)
    left, top, _, bottom = text_box(thing)
    font = _font(thing.font, max(1, round(_REFERENCE_FONT_SIZE * size * (bottom - top) / _text_height(thing.font))))
    canvas.text((size * left, size * bottom), thing.text, font=font, fill=colour, anchor="ls")


def _draw_shape(canvas: ImageDraw.ImageDraw, thing: Thing, size: int) -> None:
    if thing.name == "circle":
        canvas.ellipse([size * edge for edge in thing.box], fill=thing.paint)
        return
    turn = np.deg2rad(thing.tilt)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    outline = (_outline(thing.name) @ rotation.T * thing.half_size[0] + thing.centre) * size
    canvas.polygon([tuple(point) for point in outline.tolist()], fill=thing.paint)


@lru_cache(maxsize=len(SHAPES))
def _outline(shape: str) -> np.ndarray:
    """Corners `(num_corners, 2)` of a shape around the origin, y downwards, with a radius of about 1."""
    if shape == "square":
        return 0.85 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "triangle":
        return np.array([(0, -1), (1, 0.8), (-1, 0.8)])
    if shape == "cross":
        arm = 0.36
        quarter = np.array([(-arm, -arm), (-arm, -1), (arm, -1)])
        quarter_turn = np.array([[0, 1], [-1, 0]])
        return np.concatenate([quarter @ np.linalg.matrix_power(quarter_turn, turn) for turn in range(4)])
    if shape == "star":
        angle = np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2, 0.45, 1.08)
        return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    heart = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    return np.stack([np.sin(angle) ** 3, -heart / 16], axis=1)
