"""The tiny checkpoint's images: scenes of shapes, things (emoji art) and printed text on all kinds of ground.

Split and index determine a scene:

    art = Art(folder)  # see art.py
    scene = scene_at("train", 7, art)
    image, masks = draw(scene, art)

Nothing here depends on the questions (`questions.py`) or on the size of a tile: a scene's canvas has an aspect ratio
from 1:3 to 3:1, and the image processor squashes it.
"""

import io
import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from art import FONTS, SLUGS, STYLES, font_files
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
THINGS = tuple(SLUGS)
COLOURS = {  # what people paint with: CSS names, Material, Tailwind, plotting libraries
    "red": ((255, 0, 0), (220, 20, 60), (229, 57, 53), (239, 68, 68), (198, 40, 40), (214, 39, 40), (178, 34, 34)),
    "orange": ((255, 165, 0), (255, 140, 0), (251, 140, 0), (249, 115, 22), (244, 128, 16), (255, 127, 14)),
    "yellow": ((255, 255, 0), (255, 235, 59), (250, 204, 21), (255, 221, 51), (250, 222, 40), (255, 215, 0)),
    "green": ((0, 128, 0), (0, 255, 0), (76, 175, 80), (34, 197, 94), (46, 125, 50), (44, 160, 44), (0, 100, 0)),
    "blue": ((0, 0, 255), (33, 150, 243), (59, 130, 246), (25, 118, 210), (31, 119, 180), (0, 0, 139), (65, 105, 225)),
    "purple": ((128, 0, 128), (156, 39, 176), (148, 103, 189), (126, 34, 206), (138, 43, 226), (106, 27, 154)),
    "pink": ((255, 192, 203), (255, 105, 180), (255, 20, 147), (244, 143, 177), (236, 72, 153), (227, 119, 194)),
    "brown": ((165, 42, 42), (139, 69, 19), (121, 85, 72), (140, 86, 75), (160, 82, 45), (101, 67, 33)),
    "black": ((0, 0, 0), (22, 22, 22), (33, 33, 33)),
    "white": ((255, 255, 255), (248, 248, 248)),
    "grey": ((128, 128, 128), (158, 158, 158), (127, 127, 127), (169, 169, 169), (105, 105, 105)),
}
UPPER, LOWER, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz", "0123456789"
CHARACTERS = UPPER + LOWER + DIGITS
MAX_CHARACTERS = 8
GROUNDS = ("plain", "gradient", "stripes", "checks", "grid", "lines", "noise", "blur")
SIGN_MARGIN = 1.35  # height of a sign, as a multiple of its text's
PAINT_JITTER = 4  # of every channel; with more, red and brown would overlap
MIN_BRIGHTNESS = 0.88  # of a darkened picture; with less, white would be grey
MIN_CONTRAST = 130.0  # distance of a paint from the ground, in weighted RGB units from 0 to about 760
_MATPLOTLIB_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
_BUNDLED_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold", "STIXGeneralBol")
_SYLLABLES = re.findall(
    "..",
    "babebocacodadedifafigagohaheinkakilalelomamemimonanenopapeporarerirosasesotatetitounvavevi"
    "wazastchshtherenaroranonalel",
)


class Box(NamedTuple):
    """Edges, as fractions of the canvas's width and height."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def centre(self) -> tuple[float, float]:
        """X and y."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    def overlap(self, other: "Box") -> float:
        """Common area, as a fraction of the smaller box."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        if width <= 0 or height <= 0:
            return 0.0
        areas = [(box.right - box.left) * (box.bottom - box.top) for box in (self, other)]
        return width * height / min(areas)

    def moved(self, left: float, top: float, width: float, height: float) -> "Box":
        """The box on a part of the canvas, cut at its edges.

        Args:
            left: Left edge of the part, as a fraction of the part's width.
            top: Top edge of the part, as a fraction of the part's height.
            width: Width of the canvas, as a multiple of the part's.
            height: Height of the canvas, as a multiple of the part's.
        """
        edges = (
            self.left * width - left,
            self.top * height - top,
            self.right * width - left,
            self.bottom * height - top,
        )
        return Box(*(min(1.0, max(0.0, edge)) for edge in edges))


@dataclass(frozen=True)
class Thing:
    """An object of a scene.

    Attributes:
        name: A key of `THINGS`, one of `SHAPES`, or "sign" (text on a board), "number" (digits) or "word" (other text).
        colour: A key of `COLOURS`: of a shape, of a sign's board, of the ink of other text; "" for things.
        paint: Red, green and blue as drawn, 0 to 255.
        box: Where it is.
        text: Text of a sign, a number or a word, else "".
        ground: Colour of the ground where it is, or of the board that a sign is on.
        seed: Determines how it is drawn: pen, outline, style, font.
    """

    name: str
    colour: str
    paint: tuple[int, int, int]
    box: Box
    text: str
    ground: tuple[int, int, int]
    seed: int


@dataclass(frozen=True)
class Scene:
    """Things on a ground.

    Attributes:
        things: The things, those in front last.
        size: Width and height of the canvas, in pixels.
        ground: One of `GROUNDS`.
        colours: Two colours of the ground.
        seed: Determines the details of the ground and of the picture's quality.
    """

    things: tuple[Thing, ...]
    size: tuple[int, int]
    ground: str
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]
    seed: int


@dataclass(frozen=True)
class Layout:
    """What scenes are drawn.

    Attributes:
        num_things: Smallest and largest number of things.
        sides: Smallest and largest side of a thing, as a fraction of the geometric mean of the canvas's sides.
        share_shapes: Share of the things that are shapes.
        share_texts: Share of the things that are text.
        cells: Number of cells along a side, with one thing in each; 0: things are anywhere.
        share_wide: Share of the canvases that are not square.
        quality: Probability of each of several flaws: JPEG, blur, noise, coarse edges.
        art_changes: Probability of each of several changes of emoji art.
        drawn: Smallest and largest canvas: geometric mean of its sides, in pixels.
        emoji_side: Smallest side of an emoji, as a fraction of the geometric mean of the canvas's sides; smaller things
            are shapes.
        text_height: Smallest height of a text, as a fraction of the canvas's; a character is at least half as wide, as
            a fraction of its width.
        lines: Smallest and largest number of lines of text; 0: texts are anywhere.
        share_empty: Share of the scenes that have nothing in them.
    """

    num_things: tuple[int, int] = (1, 6)
    sides: tuple[float, float] = (0.12, 0.6)
    share_shapes: float = 0.42
    share_texts: float = 0.2
    cells: int = 0
    share_wide: float = 0.5
    quality: float = 0.12
    art_changes: float = 0.1
    drawn: tuple[float, float] = (144.0, 320.0)
    emoji_side: float = 1 / 6
    text_height: float = 1 / 6
    lines: tuple[int, int] = (0, 0)
    share_empty: float = 0.015


class Art:
    """Emoji art and fonts of a folder written by art.py; without a folder, matplotlib's fonts and no emoji.

    Args:
        folder: The folder.
        styles: Styles of emoji to use.
        fonts: Fonts to use.
    """

    def __init__(
        self, folder: Path | None = None, styles: Sequence[str] = STYLES, fonts: Sequence[str] = FONTS
    ) -> None:
        self.drawings: dict[str, tuple[Path, ...]] = {}
        if folder is None:
            self.font_files = tuple(_MATPLOTLIB_FONTS / f"{name}.ttf" for name in _BUNDLED_FONTS)
            return
        self.font_files = tuple(font_files(Path(folder), fonts))
        for name, slugs in SLUGS.items():
            files = (Path(folder) / "emoji" / style / f"{slug}.png" for style in styles for slug in slugs)
            if found := tuple(file for file in files if file.exists()):
                self.drawings[name] = found


def scene_at(split: str, index: int, art: Art | None = None, layout: Layout | None = None) -> Scene:
    """The scene with an index in a split, "train" or any other name."""
    return sample_scene(random.Random(f"{split}:{index}"), art or Art(), layout or Layout())


def sample_scene(rng: random.Random, art: Art, layout: Layout) -> Scene:
    """Sample a scene."""
    size = _sample_size(rng, layout)
    ground, colours = _sample_ground(rng)
    if layout.lines[1]:
        return Scene(tuple(_sample_lines(rng, size, colours, layout)), size, ground, colours, rng.randrange(2**31))
    if layout.cells:
        boxes = _grid_boxes(rng, layout)
    else:
        boxes = [] if rng.random() < layout.share_empty else _free_boxes(rng, size, layout)
    things: list[Thing] = []
    for box in boxes:
        if not any(thing.text and thing.box.overlap(box) for thing in things):  # text is never covered
            things.append(_sample_thing(rng, box, size, colours, things, art, layout))
    return Scene(tuple(things), size, ground, colours, rng.randrange(2**31))


def _sample_size(rng: random.Random, layout: Layout) -> tuple[int, int]:
    side = math.exp(rng.uniform(*map(math.log, layout.drawn)))
    stretch = math.exp(rng.uniform(-0.5, 0.5) * math.log(3)) if rng.random() < layout.share_wide else 1.0
    return round(side * stretch), round(side / stretch)


def _sample_ground(rng: random.Random) -> tuple[str, tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """A kind of ground and its two colours; every third ground is plain white."""
    kind = rng.random()
    if kind < 0.33:
        return "plain", ((255, 255, 255), (255, 255, 255))
    if kind < 0.58:
        paper = rng.choice(((253, 246, 227), (255, 253, 240), (245, 245, 245), (230, 230, 230), (211, 211, 211)))
        dark = rng.choice(((0, 0, 0), (34, 34, 34), (30, 30, 60), (18, 40, 24), (60, 60, 60)))
        base = _jitter(rng, paper if rng.random() < 0.6 else dark, 6)
    elif kind < 0.75:
        base = _jitter(rng, rng.choice(rng.choice(tuple(COLOURS.values()))), 15)
    else:
        base = tuple(rng.randrange(256) for _ in range(3))
    if rng.random() < 0.4:
        return "plain", (base, base)
    return rng.choice(GROUNDS[1:]), (base, _jitter(rng, base, 45))


def _jitter(rng: random.Random, colour: Sequence[int], reach: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, part + rng.randint(-reach, reach))) for part in colour)
    return red, green, blue


def contrast(first: Sequence[int], second: Sequence[int]) -> float:
    """Distance of two colours that allows for how bright each primary looks, 0 to 765 (Riemersma's "redmean")."""
    mean = (first[0] + second[0]) / 2
    red, green, blue = (a - b for a, b in zip(first, second, strict=True))
    return math.sqrt((2 + mean / 256) * red**2 + 4 * green**2 + (2 + (255 - mean) / 256) * blue**2)


def _grid_boxes(rng: random.Random, layout: Layout) -> list[Box]:
    """A box of random size and place in every cell; the layout's sides are fractions of a cell."""
    boxes = []
    for cell in range(layout.cells**2):
        row, column = divmod(cell, layout.cells)
        side = rng.uniform(*layout.sides)
        left, top = (rng.uniform(0, 1 - side) for _ in range(2))
        edges = (column + left, row + top, column + left + side, row + top + side)
        boxes.append(Box(*(edge / layout.cells for edge in edges)))
    return boxes


def _free_boxes(rng: random.Random, size: tuple[int, int], layout: Layout) -> list[Box]:
    """Boxes anywhere on the canvas; in some scenes they touch or cover each other in part."""
    number = rng.randint(*layout.num_things)
    overlap = 0.25 if rng.random() < 0.12 else 0.0
    mean = math.sqrt(size[0] * size[1])
    largest = min(layout.sides[1], 1.1 / math.sqrt(number))
    boxes: list[Box] = []
    for _ in range(number):
        for attempt in range(30):
            side = math.exp(rng.uniform(math.log(layout.sides[0]), math.log(largest))) * 0.97**attempt
            side = min(max(side, layout.sides[0]) * mean, 0.92 * min(size))
            width, height = side / size[0], side / size[1]
            left, top = rng.uniform(0.01, 0.99 - width), rng.uniform(0.01, 0.99 - height)
            box = Box(left, top, left + width, top + height)
            if all(box.overlap(other) <= overlap for other in boxes):
                boxes.append(box)
                break
    return boxes


def _sample_thing(
    rng: random.Random,
    box: Box,
    size: tuple[int, int],
    grounds: Sequence[tuple[int, int, int]],
    earlier: Sequence[Thing],
    art: Art,
    layout: Layout,
) -> Thing:
    seed = rng.randrange(2**31)
    kind = rng.random()
    if kind < layout.share_texts and (layout.cells or not any(thing.text for thing in earlier) or rng.random() < 0.3):
        text, is_sign = sample_string(rng, 2 if layout.cells else MAX_CHARACTERS), rng.random() < 0.45
        smallest = layout.text_height * (SIGN_MARGIN if is_sign else 1)
        room = box if layout.cells else _text_box(rng, box, size, len(text), earlier, smallest)
        if room is not None:
            return _sample_text(rng, room, text, is_sign, grounds, seed)
    side = math.sqrt((box.right - box.left) * (box.bottom - box.top))
    if kind > 1 - layout.share_shapes or side < layout.emoji_side or not art.drawings:
        shape, colour = _sample_pair(rng, earlier)
        colour, paint = _sample_paint(rng, grounds, colour)
        return Thing(shape, colour, paint, box, "", grounds[0], seed)
    name = rng.choice(tuple(art.drawings))
    if earlier and rng.random() < 0.12:
        name = rng.choice([thing.name for thing in earlier if thing.name in SLUGS] or [name])
    return Thing(name, "", (0, 0, 0), box, "", grounds[0], seed)


def _sample_lines(
    rng: random.Random, size: tuple[int, int], grounds: Sequence[tuple[int, int, int]], layout: Layout
) -> list[Thing]:
    """Lines of text, one or two texts in each, which fill most of the canvas."""
    things, number = [], rng.randint(*layout.lines)
    for line in range(number):
        split = rng.uniform(0.35, 0.65) if rng.random() < 0.4 else 1.0
        for left, right in ((0.0, split), (split, 1.0))[: 2 if split < 1 else 1]:
            text, is_sign = sample_string(rng), rng.random() < 0.3
            height = rng.uniform(0.6, 0.92) / number
            aspect = size[1] / size[0] * rng.uniform(0.55, 0.9)  # of a character's place
            width = min(0.97 * (right - left), (len(text) + 0.3) * height * aspect)
            x, y = rng.uniform(left, right - width), line / number + rng.uniform(0.02 / number, 0.98 / number - height)
            box = Box(x, y, x + width, y + height)
            things.append(_sample_text(rng, box, text, is_sign, grounds, rng.randrange(2**31)))
    return things


def _sample_pair(rng: random.Random, earlier: Sequence[Thing]) -> tuple[str, str]:
    """A shape and a colour; often one of them is that of an earlier shape, so that counting means something."""
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    known = [thing for thing in earlier if thing.name in SHAPES]
    if known and rng.random() < 0.45:
        return (rng.choice(known).name, colour) if rng.random() < 0.6 else (shape, rng.choice(known).colour)
    return shape, colour


def _sample_paint(
    rng: random.Random, grounds: Sequence[tuple[int, int, int]], colour: str = ""
) -> tuple[str, tuple[int, int, int]]:
    """A colour, if possible the given one, whose paint stands out from the grounds."""
    for attempt in range(40):
        named = colour if colour and attempt < 8 else rng.choice(tuple(COLOURS))
        paint = _jitter(rng, rng.choice(COLOURS[named]), PAINT_JITTER)
        if min(contrast(paint, ground) for ground in grounds) >= MIN_CONTRAST:
            break
    return named, paint


def sample_string(rng: random.Random, max_length: int = MAX_CHARACTERS) -> str:
    """A string of one to `max_length` letters or digits; O, I and l do not occur alone or beside digits."""
    while True:
        text = _sample_any_string(rng, max_length)
        if not set(text) <= set("OoIl"):  # might be a number
            return text


def _sample_any_string(rng: random.Random, max_length: int) -> str:
    length, kind = rng.randint(1, max_length), rng.random()
    if kind < 0.22:
        return "".join(rng.choice(DIGITS) for _ in range(min(length, 6)))
    if kind < 0.3:
        return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(length))
    if kind < 0.6:
        text = "".join(rng.choice(UPPER) for _ in range(length))
    else:
        text = ""
        while len(text) < length:
            text += rng.choice(_SYLLABLES)
        text = text[:length].upper()
    case = rng.random()
    if length == 1 or set(text) <= set("COSUVWXZ"):  # could be either case
        return text
    return text if case < 0.6 else text.lower() if case < 0.8 else text.capitalize()


def _sample_text(
    rng: random.Random,
    box: Box,
    text: str,
    is_sign: bool,
    grounds: Sequence[tuple[int, int, int]],
    seed: int,
) -> Thing:
    if is_sign:
        colour, paint = _sample_paint(rng, grounds)
        return Thing("sign", colour, paint, box, text, grounds[0], seed)
    wanted = "black" if rng.random() < 0.5 else "white" if rng.random() < 0.3 else ""
    colour, paint = _sample_paint(rng, grounds, wanted)
    return Thing("number" if text.isdigit() else "word", colour, paint, box, text, grounds[0], seed)


def _text_box(
    rng: random.Random, box: Box, size: tuple[int, int], length: int, earlier: Sequence[Thing], smallest: float
) -> Box | None:
    """Give a box the shape of a text that can be read, without covering what is there; None if there is no room."""
    height = max(smallest, (box.bottom - box.top) * rng.uniform(0.5, 0.9))
    width = min(0.97, height * size[1] / size[0] * (0.75 * length + 0.6))
    narrowest = min(0.97, 0.5 * smallest * (length + 0.5))
    places = [box.centre, *((rng.random(), rng.random()) for _ in range(8))]
    for (x, y), shrink in itertools.product(places, (1.0, 0.75, 0.5)):
        part, high = max(narrowest, shrink * width), max(smallest, shrink * height)
        left = min(max(0.015, x - part / 2), 0.985 - part)
        top = min(max(0.015, y - high / 2), 0.985 - high)
        wide = Box(left, top, left + part, top + high)
        if all(wide.overlap(thing.box) == 0 for thing in earlier):
            return wide
    return None


# Drawing


def draw(scene: Scene, art: Art | None = None, layout: Layout | None = None) -> Image.Image:
    """Draw a scene as an RGB image; see `draw_with_masks`."""
    return draw_with_masks(scene, art, layout)[0]


def draw_with_masks(
    scene: Scene, art: Art | None = None, layout: Layout | None = None
) -> tuple[Image.Image, list[Image.Image]]:
    """Draw a scene, and where its things are.

    Args:
        scene: The scene.
        art: Emoji art and fonts; those that the scene was sampled with.
        layout: Determines how often the image has flaws and art is changed.

    Returns:
        The canvas, an RGB image; and for every thing a mask of the canvas, mode "L": 255 where it is seen.
    """
    art, layout = art or Art(), layout or Layout()
    rng = random.Random(scene.seed)
    canvas = draw_ground(scene.ground, scene.colours, scene.size, rng.randrange(2**31))
    coarse = rng.random() < layout.quality
    masks = []
    for thing in scene.things:
        layer, corner = _draw_thing(thing, scene.size, art, layout, coarse)
        mask = Image.new("L", scene.size)
        canvas.paste(layer.convert("RGB"), corner, layer.getchannel("A"))
        mask.paste(layer.getchannel("A"), corner)
        for number, earlier in enumerate(masks):
            if scene.things[number].box.overlap(thing.box):
                masks[number] = ImageChops.subtract(earlier, mask)
        masks.append(mask)
    return _spoil(canvas, rng, layout.quality), masks


def pixel_area(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Edges of a box on a canvas of a size in pixels; it is at least 4 pixels wide and high."""
    left, top = round(box.left * size[0]), round(box.top * size[1])
    return left, top, max(left + 4, round(box.right * size[0])), max(top + 4, round(box.bottom * size[1]))


def _draw_thing(
    thing: Thing, size: tuple[int, int], art: Art, layout: Layout, coarse: bool
) -> tuple[Image.Image, tuple[int, int]]:
    """Draw a thing: an RGBA image, and the corner of the canvas where it is pasted."""
    rng = random.Random(thing.seed)
    left, top, right, bottom = pixel_area(thing.box, size)
    area = right - left, bottom - top
    if thing.text:
        layer = _draw_text(thing, area, art, rng)
    elif thing.name in SHAPES:
        layer = _draw_shape(thing, area, rng, coarse)
    else:
        layer = _draw_emoji(thing, area, art, layout, rng)
    return layer, (left, top)


def draw_ground(kind: str, colours: Sequence[Sequence[int]], size: tuple[int, int], seed: int) -> Image.Image:
    """Draw a ground of a kind of `GROUNDS`."""
    first, second = (np.array(colour, np.float32) for colour in colours)
    if kind == "plain":
        return Image.new("RGB", size, tuple(int(part) for part in first))
    rng = np.random.default_rng(seed)
    rows, columns = np.meshgrid(
        np.linspace(0, 1, 96, dtype=np.float32), np.linspace(0, 1, 96, dtype=np.float32), indexing="ij"
    )
    angle, number = rng.uniform(0, 2 * np.pi), rng.uniform(3, 14)
    along = np.cos(angle) * columns + np.sin(angle) * rows
    if kind == "gradient":
        mix = (along - along.min()) / np.ptp(along)
    elif kind == "stripes":
        mix = (np.sin(2 * np.pi * number * along) > 0).astype(np.float32)
    elif kind == "checks":
        mix = ((np.floor(number * rows) + np.floor(number * columns)) % 2).astype(np.float32)
    elif kind in ("grid", "lines"):
        thin = rng.uniform(0.06, 0.2)
        mix = ((number * rows) % 1 < thin).astype(np.float32)
        if kind == "grid":
            mix = np.maximum(mix, (number * columns) % 1 < thin)
    elif kind == "noise":
        mix = rng.random((96, 96), np.float32)
    else:
        mix = rng.random((rng.integers(3, 9), rng.integers(3, 9)), np.float32)
    pixels = (first + (second - first) * mix[..., None]).astype(np.uint8)
    smooth = Image.Resampling.BICUBIC if kind in ("blur", "gradient", "noise") else Image.Resampling.BILINEAR
    return Image.fromarray(pixels).resize(size, smooth)


def outline(shape: str, rng: random.Random) -> np.ndarray:
    """Corners `(num_corners, 2)` of a shape within [-1, 1], y downwards, with proportions that vary."""
    if shape == "circle":
        angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if shape == "square":
        return np.array([(-1.0, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "triangle":
        tip = rng.choice((0.0, 0.0, 0.0, rng.uniform(-1, 1)))
        return np.array([(tip, -1), (1, rng.uniform(0.7, 1)), (-1, rng.uniform(0.7, 1))])
    if shape == "cross":
        arm = rng.uniform(0.2, 0.42)
        quarter = np.array([(-arm, -arm), (-arm, -1), (arm, -1)])
        turns = [np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), turn) for turn in range(4)]
        return np.concatenate([quarter @ turn for turn in turns])
    if shape == "star":
        points = rng.choice((5, 5, 5, 5, 5, 6, 4, 8))
        angle = np.arange(2 * points) * np.pi / points
        inner = rng.uniform(0.3, 0.42) if points == 4 else rng.uniform(0.36, 0.58)
        radius = np.where(np.arange(2 * points) % 2, inner, 1.0)
        return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)
    return _heart(rng)


def _heart(rng: random.Random) -> np.ndarray:
    if rng.random() < 0.5:  # the well-known curve
        angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        height = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
        points = np.stack([np.sin(angle) ** 3, -height / 16], axis=1)
    else:  # two arcs above a triangle
        centre, lift = rng.uniform(0.46, 0.52), rng.uniform(-0.5, -0.35)
        arc = np.linspace(np.pi * 0.98, -0.12 * np.pi, 18)
        right = np.stack([centre + (1 - centre) * np.cos(arc), lift - (1 - centre) * np.sin(arc)], axis=1)
        left = right[::-1] * (-1, 1)
        points = np.concatenate([right, [(0, 1)], left])
    low, high = points.min(0), points.max(0)
    return 2 * (points - low) / (high - low) - 1


def _shape_points(thing: Thing, area: tuple[int, int], rng: random.Random) -> np.ndarray:
    """Corners of a shape in an area, turned and, by a wobbly hand, shaken."""
    points = outline(thing.name, rng)
    turn = math.radians(rng.choice((0, 0, rng.uniform(-20, 20), rng.uniform(-180, 180))))
    if thing.name == "heart":
        turn = max(-0.6, min(0.6, turn))
    if rng.random() < 0.15:
        points = points * (rng.uniform(0.7, 1), 1)
    points = points @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    if rng.random() < 0.15:
        points = _shake(points, rng)
    return points / np.abs(points).max() * 0.98 * np.array(area) / 2 + np.array(area) / 2


def _shake(points: np.ndarray, rng: random.Random) -> np.ndarray:
    """Put more points on the edges and move them as an unsteady hand does."""
    following = np.roll(points, -1, axis=0)
    steps = max(2, 48 // len(points))
    share = np.arange(steps)[None, :, None] / steps
    dense = (points[:, None] * (1 - share) + following[:, None] * share).reshape(-1, 2)
    noise = np.random.default_rng(rng.randrange(2**31)).normal(size=dense.shape)
    smooth = sum(np.roll(noise, shift, axis=0) for shift in range(-3, 4)) / 7
    return dense + smooth * rng.uniform(0.03, 0.12)


def _draw_shape(thing: Thing, area: tuple[int, int], rng: random.Random, coarse: bool) -> Image.Image:
    """Draw a shape: filled, filled with a border, or as an outline."""
    factor = 1 if coarse else 2
    points = [tuple(point) for point in (_shape_points(thing, area, rng) * factor).tolist()]
    size = area[0] * factor, area[1] * factor
    filled = Image.new("L", size)
    ImageDraw.Draw(filled).polygon(points, fill=255)
    style = rng.random()
    if style < 0.6:
        return _painted(filled, thing.paint, area)
    width = max(factor, round(factor * max(1.6, min(area) * rng.choice((0.03, 0.06, 0.1, 0.14)))))
    pen = Image.new("L", size)
    ImageDraw.Draw(pen).line([*points, points[0], points[1]], fill=255, width=width, joint="curve")
    if style < 0.78:  # a border is darker, black, white or grey
        paint = rng.choice(((0, 0, 0), (30, 30, 30), tuple(part // 2 for part in thing.paint), (255, 255, 255)))
        layer = _painted(ImageChops.lighter(filled, pen), thing.paint, area)
        edge = _painted(pen, paint, area).getchannel("A")
        layer.paste(paint, (0, 0, *area), edge)
        return layer
    return _painted(pen, thing.paint, area)  # not filled with white: that would also be a white shape with a border


def _painted(mask: Image.Image, paint: Sequence[int], area: tuple[int, int]) -> Image.Image:
    """One colour behind a mask, which is reduced to an area."""
    layer = Image.new("RGBA", area, (*paint, 0))
    layer.putalpha(mask if mask.size == area else mask.resize(area, Image.Resampling.BOX))
    return layer


@lru_cache(maxsize=4096)
def _drawing(file: Path) -> Image.Image:
    """A drawing without the empty space around it."""
    image = Image.open(file).convert("RGBA")
    return image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 20)).getbbox())


def _draw_emoji(thing: Thing, area: tuple[int, int], art: Art, layout: Layout, rng: random.Random) -> Image.Image:
    drawing = _drawing(rng.choice(art.drawings[thing.name]))
    chance = layout.art_changes
    if rng.random() < 0.5:
        drawing = ImageOps.mirror(drawing)
    if rng.random() < 2 * chance:
        drawing = drawing.rotate(rng.uniform(-18, 18), Image.Resampling.BILINEAR, expand=True)
    if rng.random() < chance:
        drawing = _with_changed_colours(drawing, rng)
    if rng.random() < chance:
        drawing = _as_line_art(drawing, rng)
    scale = min(area[0] / drawing.width, area[1] / drawing.height)
    size = max(2, round(drawing.width * scale)), max(2, round(drawing.height * scale))
    drawing = drawing.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    layer = Image.new("RGBA", area, (0, 0, 0, 0))
    layer.paste(drawing, ((area[0] - size[0]) // 2, (area[1] - size[1]) // 2))
    is_dark = max(np.asarray(drawing.convert("RGB").resize((1, 1))).ravel()) < 60
    if is_dark and contrast(thing.ground, (0, 0, 0)) < 250:  # black art on a dark ground: as a negative
        layer = Image.merge("RGBA", (*ImageOps.invert(layer.convert("RGB")).split(), layer.getchannel("A")))
    return layer


def _with_changed_colours(drawing: Image.Image, rng: random.Random) -> Image.Image:
    alpha, flat = drawing.getchannel("A"), drawing.convert("RGB")
    kind = rng.random()
    if kind < 0.35:
        flat = ImageOps.grayscale(flat).convert("RGB")
    elif kind < 0.7:
        hue, saturation, value = flat.convert("HSV").split()
        shift = rng.randint(-20, 20)
        flat = Image.merge("HSV", (hue.point(lambda level: (level + shift) % 256), saturation, value)).convert("RGB")
    else:
        flat = ImageOps.posterize(flat, rng.choice((1, 2, 3)))
    flat = ImageEnhance.Color(flat).enhance(rng.uniform(0.5, 1.6))
    return Image.merge("RGBA", (*flat.split(), alpha))


def _as_line_art(drawing: Image.Image, rng: random.Random) -> Image.Image:
    """Black lines where a drawing's colours or its silhouette change, filled with its colours, white or nothing."""
    drawing = ImageOps.expand(drawing, 4, (0, 0, 0, 0))
    alpha = drawing.getchannel("A")
    white = Image.new("RGB", drawing.size, (255, 255, 255))
    flat = Image.composite(drawing.convert("RGB"), white, alpha).filter(ImageFilter.MedianFilter(3))
    thick = rng.choice((3, 3, 5))
    edges = ImageChops.subtract(flat.filter(ImageFilter.MaxFilter(thick)), flat.filter(ImageFilter.MinFilter(thick)))
    inner = ImageChops.lighter(ImageChops.lighter(*edges.split()[:2]), edges.getchannel("B"))
    outer = ImageChops.subtract(alpha.filter(ImageFilter.MaxFilter(thick)), alpha.filter(ImageFilter.MinFilter(thick)))
    threshold = rng.randint(40, 90)
    ink = ImageChops.lighter(inner.point(lambda level: min(255, max(0, 4 * (level - threshold)))), outer)
    filling = rng.random()
    if filling < 0.35:
        layer = Image.merge("RGBA", (*ImageEnhance.Brightness(flat).enhance(1.15).split(), alpha))
    elif filling < 0.7:
        layer = Image.merge("RGBA", (*white.split(), alpha))
    else:
        layer = Image.new("RGBA", drawing.size, (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (0, 0), ink)
    layer.putalpha(ImageChops.lighter(layer.getchannel("A"), ink))
    return layer


@lru_cache(maxsize=4096)
def _font(file: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(file), size)


@lru_cache(maxsize=512)
def has_small_letters(file: Path) -> bool:
    """Whether a font's small letters differ from its capitals."""
    font = _font(file, 40)

    def bitmap(letter: str) -> np.ndarray:
        mask = Image.new("L", (80, 80))
        ImageDraw.Draw(mask).text((20, 60), letter, font=font, fill=255, anchor="ls")
        return np.asarray(mask.crop(mask.getbbox()).resize((24, 24)), np.float32) / 255

    return sum(np.abs(bitmap(letter) - bitmap(letter.upper())).mean() > 0.15 for letter in "aegrt") >= 3


def text_font(thing: Thing, art: Art) -> Path:
    """The font of a text; small letters are never printed in fonts that have only capitals."""
    rng = random.Random(f"font:{thing.seed}")
    while True:
        file = rng.choice(art.font_files)
        if thing.text == thing.text.upper() or has_small_letters(file):
            return file


def text_rectangle(thing: Thing, area: tuple[int, int], art: Art) -> tuple[ImageFont.FreeTypeFont, Box]:
    """The font of a text, and the edges of its ink in an area, in pixels; a sign has a margin around it."""
    rng = random.Random(f"margin:{thing.seed}")
    margin = rng.uniform(0.08, 0.2) if thing.name == "sign" else 0.02
    width, height = (max(3.0, side - 2 * margin * min(area)) for side in area)
    file = text_font(thing, art)
    box = _font(file, 40).getbbox(thing.text, anchor="ls")
    scale = min(width / max(1, box[2] - box[0]), height / max(1, box[3] - box[1]))
    size = max(4, int(40 * scale))
    font = _font(file, size - size % (2 if size < 40 else 4))  # few sizes, since loading a font takes a millisecond
    box = font.getbbox(thing.text, anchor="ls")
    left, top = (area[0] - box[2] + box[0]) / 2, (area[1] - box[3] + box[1]) / 2
    return font, Box(left, top, left + box[2] - box[0], top + box[3] - box[1])


def _draw_text(thing: Thing, area: tuple[int, int], art: Art, rng: random.Random) -> Image.Image:
    """Draw a text that fills its area, or a board with the text on it."""
    font, box = text_rectangle(thing, area, art)
    mask = Image.new("L", area)
    ink_left, ink_top, _, _ = font.getbbox(thing.text, anchor="ls")
    ImageDraw.Draw(mask).text((box.left - ink_left, box.top - ink_top), thing.text, font=font, fill=255, anchor="ls")
    if thing.name != "sign":
        return _painted(mask, thing.paint, area)
    board = Image.new("L", area)
    edges, radius = (0, 0, area[0] - 1, area[1] - 1), rng.choice((0, 0.1, 0.3)) * min(area)
    ImageDraw.Draw(board).rounded_rectangle(edges, radius, fill=255)
    layer, ink = _painted(board, thing.paint, area), ink_of(thing.paint)
    if rng.random() < 0.2:
        ImageDraw.Draw(layer).rounded_rectangle(edges, radius, outline=ink, width=max(1, min(area) // 25))
    layer.paste(ink, (0, 0, *area), mask)
    return layer


def ink_of(board: Sequence[int]) -> tuple[int, int, int]:
    """Black or white, whichever is easier to read on a board."""
    black, white = (0, 0, 0), (255, 255, 255)
    return black if contrast(board, black) > contrast(board, white) else white


def character_boxes(thing: Thing, size: tuple[int, int], art: Art) -> list[Box]:
    """The boxes of a text's characters on a canvas of a size in pixels, from left to right, as high as the text."""
    area = pixel_area(thing.box, size)
    font, ink = text_rectangle(thing, (area[2] - area[0], area[3] - area[1]), art)
    lengths = [font.getlength(thing.text[:end]) for end in range(len(thing.text) + 1)]
    edges = [area[0] + ink.left + (ink.right - ink.left) * length / max(1.0, lengths[-1]) for length in lengths]
    top, bottom = ((area[1] + edge) / size[1] for edge in (ink.top, ink.bottom))
    return [Box(left / size[0], top, right / size[0], bottom) for left, right in itertools.pairwise(edges)]


def _spoil(canvas: Image.Image, rng: random.Random, chance: float) -> Image.Image:
    """Add the flaws of pictures that were photographed, saved or sent."""
    if rng.random() < chance:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.4) * max(canvas.size) / 300))
    if rng.random() < chance:
        noise = np.random.default_rng(rng.randrange(2**31)).normal(0, rng.uniform(3, 14), (*canvas.size[::-1], 3))
        canvas = Image.fromarray(np.clip(np.asarray(canvas) + noise, 0, 255).astype(np.uint8))
    if rng.random() < chance:
        canvas = ImageEnhance.Brightness(canvas).enhance(rng.uniform(MIN_BRIGHTNESS, 1.15))
    if rng.random() < 1.5 * chance:
        file = io.BytesIO()
        canvas.save(file, "JPEG", quality=rng.randint(25, 90))
        canvas = Image.open(file).convert("RGB")
    return canvas
