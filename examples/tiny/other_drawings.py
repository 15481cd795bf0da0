"""A second drawing program, for tests only: shapes as SVG files, rendered by resvg.

It shares no outline, paint, ground, pen or canvas with `scenes.py`, which the checkpoint is trained on.
"""

import io
import math
import random

import numpy as np
from PIL import Image
from scenes import SHAPES, Box, Scene, Thing

PAINTS = {  # Open Color, and CSS names that scenes.py does not use
    "red": ("#fa5252", "#c92a2a", "#e03131", "firebrick"),
    "orange": ("#fd7e14", "#e8590c", "darkorange"),
    "yellow": ("#fcc419", "#ffd43b", "#ffec00"),
    "green": ("#40c057", "#2b8a3e", "limegreen", "forestgreen"),
    "blue": ("#228be6", "#1864ab", "dodgerblue", "mediumblue"),
    "purple": ("#9c36b5", "#862e9c", "darkviolet"),
    "pink": ("#f06595", "#faa2c1", "hotpink"),
    "brown": ("#7b4f2c", "saddlebrown", "#6d4c41"),
    "black": ("#000", "#212529"),
    "white": ("#fff",),
    "grey": ("#868e96", "#7f8c8d", "dimgray"),
}
GROUNDS = {  # and the colours that cannot be told from them
    "#ffffff": ("white",),
    "#fff9db": ("white", "yellow"),
    "#e9ecef": ("white", "grey"),
    "#343a40": ("black", "brown", "grey"),
    "#0b1d51": ("black", "blue", "purple"),
    "#96f2d7": ("green", "white"),
    "#d0bfff": ("purple", "pink", "white"),
    "#ffc9c9": ("pink", "red", "white"),
    "paper": ("white", "grey"),
    "dots": ("white", "grey"),
    "sky": ("white", "blue", "grey"),
}
_SKY = (
    '<linearGradient id="g" x2="0" y2="1"><stop offset="0" stop-color="#a5d8ff"/>'
    '<stop offset="1" stop-color="#fff"/></linearGradient>'
)
_DOTS = (
    '<pattern id="g" width="18" height="18" patternUnits="userSpaceOnUse"><rect width="18" height="18" fill="#fff"/>'
    '<circle cx="5" cy="5" r="1.5" fill="#ced4da"/></pattern>'
)
_PAPER = (
    '<pattern id="g" width="24" height="24" patternUnits="userSpaceOnUse"><rect width="24" height="24" fill="#fffef8"/>'
    '<path d="M0 .5H24M.5 0V24" stroke="#d0ebff"/></pattern>'
)
DEFINITIONS = {"sky": _SKY, "dots": _DOTS, "paper": _PAPER}


def outline(shape: str, rng: random.Random) -> str:
    """An SVG element of a shape around the origin with a radius of about 50."""
    if shape == "circle":
        return '<circle r="48"/>'
    if shape == "square":
        return f'<rect x="-44" y="-44" width="88" height="88" rx="{rng.choice((0, 0, 4, 10))}"/>'
    if shape == "triangle":
        return rng.choice(
            ('<path d="M0-48 46 40H-46Z"/>', '<path d="M-44-44V44H44Z"/>', '<path d="M0-46 40 46H-40Z"/>')
        )
    if shape == "cross":
        arm = rng.choice((12, 15, 19))
        return f'<path d="M{-arm}-48H{arm}V{-arm}H48V{arm}H{arm}V48H{-arm}V{arm}H-48V{-arm}H{-arm}Z"/>'
    if shape == "star":
        inner = rng.choice((19, 21, 24))
        radii = (50, inner) * 5
        corners = (
            (radius * math.sin(math.pi * step / 5), -radius * math.cos(math.pi * step / 5))
            for step, radius in enumerate(radii)
        )
        return '<path d="M' + " ".join(f"{x:.1f},{y:.1f}" for x, y in corners) + 'Z"/>'
    return '<path d="M0 44C-70-4-38-56 0-24 38-56 70-4 0 44Z"/>'


def draw_svg(rng: random.Random) -> tuple[Scene, Image.Image]:
    """Draw one to six shapes.

    Returns:
        The scene, for questions; its `Thing.paint` and similar fields are not set. And the image.
    """
    width, height = rng.choice(((400, 400), (512, 512), (640, 360), (360, 640), (300, 200), (600, 240), (240, 600)))
    ground = rng.choice([*GROUNDS, *["#ffffff"] * 5])
    number = rng.randint(1, 6)
    boxes: list[Box] = []
    parts, things = [], []
    for _ in range(number):
        box = _place(rng, width, height, boxes, number)
        if box is None:
            continue
        boxes.append(box)
        shape = rng.choice(SHAPES)
        colour = rng.choice([colour for colour in PAINTS if colour not in GROUNDS[ground]])
        parts.append(_element(shape, rng.choice(PAINTS[colour]), box, (width, height), rng))
        things.append(Thing(shape, colour, (0, 0, 0), box, "", (0, 0, 0), 0))
    fill = "url(#g)" if ground in DEFINITIONS else ground
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"><defs>{DEFINITIONS.get(ground, "")}'
        f'</defs><rect width="{width}" height="{height}" fill="{fill}"/>{"".join(parts)}</svg>'
    )
    return Scene(tuple(things), (width, height), "plain", ((0, 0, 0), (0, 0, 0)), 0), rasterize(svg)


def rasterize(svg: str) -> Image.Image:
    """Render an SVG file as an RGB image."""
    import resvg_py

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGB")


def _place(rng: random.Random, width: int, height: int, boxes: list[Box], number: int) -> Box | None:
    """A square place, 12 to 60 % of the smaller side, that covers no other one; None if there is no room."""
    for _ in range(60):
        side = min(width, height) * rng.uniform(0.12, min(0.6, 1.2 / math.sqrt(number)))
        left, top = rng.uniform(0.02, 0.98 - side / width), rng.uniform(0.02, 0.98 - side / height)
        box = Box(left, top, left + side / width, top + side / height)
        if all(box.overlap(other) == 0 for other in boxes):
            return box
    return None


def _element(shape: str, paint: str, box: Box, size: tuple[int, int], rng: random.Random) -> str:
    """A shape: filled, filled with a dark edge, or a thick or thin outline."""
    scale = (box.right - box.left) * size[0] / 106
    x, y = np.array(box.centre) * size
    turn = rng.choice((0, 0, 0, rng.uniform(-15, 15)))
    style = rng.choice(("fill", "fill", "fill", "edge", "thin", "thick"))
    look = {
        "fill": f'fill="{paint}"',
        "edge": f'fill="{paint}" stroke="#111" stroke-width="4"',
        "thin": f'fill="none" stroke="{paint}" stroke-width="5"',
        "thick": f'fill="none" stroke="{paint}" stroke-width="11"',
    }[style]
    if style == "edge" and paint in PAINTS["black"]:
        look = f'fill="{paint}"'
    join = rng.choice(("round", "miter"))
    place = f"translate({x:.1f} {y:.1f}) rotate({turn:.1f}) scale({0.93 * scale:.3f})"
    return f'<g transform="{place}" {look} stroke-linejoin="{join}">{outline(shape, rng)}</g>'
