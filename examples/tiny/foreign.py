"""Images that the tiny checkpoint knows nothing about: photographs, pages of text, charts, noise, abstract patterns."""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

KINDS = ("photograph", "page", "chart", "noise", "pattern")
_SHARES = (0.5, 0.15, 0.1, 0.12, 0.13)
_LETTERS = "etaoinshrdlucmfwypvbgk"


class ForeignImages:
    """Samples images from a folder of photographs, and draws others.

    Args:
        photographs: Files of photographs.
        fonts: Files of fonts, for pages of text.
    """

    def __init__(self, photographs: Sequence[Path], fonts: Sequence[Path]) -> None:
        self.photographs, self.fonts = tuple(photographs), tuple(fonts)
        self._loaded: dict[Path, Image.Image] = {}

    def sample(self, rng: random.Random, kind: str = "") -> Image.Image:
        """Sample an image, of any kind of `KINDS` if none is given."""
        kind = kind or rng.choices(KINDS, _SHARES)[0]
        side, stretch = rng.uniform(150, 400), math.exp(rng.uniform(-0.35, 0.35))
        size = round(side * stretch), round(side / stretch)
        if kind == "photograph" and self.photographs:
            return self._photograph(rng, size)
        if kind == "page":
            return self._page(rng, size)
        if kind == "chart":
            return _chart(rng, size)
        if kind == "pattern":
            return _pattern(rng, size)
        return _noise(rng, size)

    def _photograph(self, rng: random.Random, size: tuple[int, int]) -> Image.Image:
        file = rng.choice(self.photographs)
        if file not in self._loaded:
            image = Image.open(file).convert("RGB")
            image.thumbnail((900, 900))
            self._loaded[file] = image
        image = self._loaded[file]
        image = _part(image, size, rng)
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
        if rng.random() < 0.1:
            image = ImageOps.grayscale(image).convert("RGB")
        image = ImageEnhance.Color(image).enhance(rng.uniform(0.5, 1.4))
        return ImageEnhance.Brightness(image).enhance(rng.uniform(0.6, 1.25))

    def _page(self, rng: random.Random, size: tuple[int, int]) -> Image.Image:
        paper, ink = ((250, 250, 245), (20, 20, 20)) if rng.random() < 0.75 else ((24, 24, 32), (220, 220, 220))
        image = Image.new("RGB", size, paper)
        canvas = ImageDraw.Draw(image)
        height = rng.uniform(0.02, 0.05) * size[1]
        font = ImageFont.truetype(str(rng.choice(self.fonts)), max(6, round(height)))
        top = rng.uniform(0, 0.1) * size[1]
        while top < size[1]:
            words = ("".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 9))) for _ in range(rng.randint(6, 22)))
            canvas.text((0.06 * size[0], top), " ".join(words), font=font, fill=ink)
            top += height * (1.4 if rng.random() < 0.9 else 2.8)
        return image


def _part(photograph: Image.Image, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """A part of a photograph, not of its sky or another plain area if there is more to see."""
    for _ in range(5):
        share = rng.uniform(0.35, 1)
        width, height = round(share * photograph.width), round(share * photograph.height)
        left, top = rng.randint(0, photograph.width - width), rng.randint(0, photograph.height - height)
        edges = left, top, left + width, top + height
        part = photograph.resize(size, Image.Resampling.BILINEAR, edges, reducing_gap=2.0)
        if np.asarray(part.convert("L").resize((32, 32)), np.float32).std() > 20:
            break
    return part


def _chart(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """Axes with bars or lines."""
    image = Image.new("RGB", size, (255, 255, 255))
    canvas = ImageDraw.Draw(image)
    left, top, right, bottom = 0.12 * size[0], 0.08 * size[1], 0.95 * size[0], 0.88 * size[1]
    for tick in range(6):
        height = top + (bottom - top) * tick / 5
        canvas.line((left, height, right, height), fill=(220, 220, 220))
        canvas.line((left - 4, height, left, height), fill=(0, 0, 0))
    canvas.line((left, top, left, bottom, right, bottom), fill=(0, 0, 0), width=2)
    number = rng.randint(5, 14)
    step = (right - left) / number
    for _ in range(rng.randint(1, 4)):
        paint = tuple(rng.randrange(230) for _ in range(3))
        heights = [bottom - rng.uniform(0.05, 0.95) * (bottom - top) for _ in range(number)]
        if rng.random() < 0.5:
            points = [(left + (place + 0.5) * step, height) for place, height in enumerate(heights)]
            canvas.line(points, fill=paint, width=rng.randint(1, 4), joint="curve")
        else:
            shift, width = rng.uniform(0, 0.5) * step, rng.uniform(0.2, 0.5) * step
            for place, height in enumerate(heights):
                edge = left + place * step + shift
                canvas.rectangle((edge, height, edge + width, bottom), fill=paint)
    return image


def _noise(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """Noise of one or several scales."""
    random_numbers = np.random.default_rng(rng.randrange(2**31))
    finest = rng.choice((3, 5, 6, 7, 8))
    total = np.zeros((size[1], size[0], 3), np.float32)
    for scale in range(1, finest + 1):
        strength = 1.0 if scale == finest else rng.choice((0.0, 2.0 ** -(0.5 * scale)))
        if strength:
            coarse = random_numbers.integers(0, 256, (2**scale, 2**scale, rng.choice((1, 3)))).astype(np.uint8)
            coarse = np.broadcast_to(coarse, (*coarse.shape[:2], 3))
            total += strength * np.asarray(Image.fromarray(np.ascontiguousarray(coarse)).resize(size), np.float32)
    total -= total.min()
    return Image.fromarray((total / max(1.0, total.max()) * 255).astype(np.uint8))


def _pattern(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """Many lines, curves or facets, one over another."""
    image = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    canvas = ImageDraw.Draw(image)
    kind = rng.choice(("lines", "facets", "arcs"))
    base = [rng.randrange(256) for _ in range(3)]
    for _ in range(rng.randint(60, 220)):
        paint = tuple(min(255, max(0, part + rng.randint(-90, 90))) for part in base)
        x, y, reach = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(0.08, 0.35) * size[0]
        points = [(x + rng.uniform(-reach, reach), y + rng.uniform(-reach, reach)) for _ in range(3)]
        if kind == "facets":
            canvas.polygon(points, fill=paint)
        elif kind == "lines":
            canvas.line(points, fill=paint, width=rng.randint(1, 4))
        else:
            edges = (x - reach, y - reach, x + reach, y + reach)
            canvas.arc(edges, rng.uniform(0, 360), rng.uniform(0, 360), fill=paint, width=rng.randint(1, 5))
    return image
