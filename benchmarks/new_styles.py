"""From how many styles and names a vision tower learns to name things in a style of emoji art that it never saw.

    python benchmarks/new_styles.py --art ART --compile --output benchmarks/results/new_styles.md

The small checkpoint's vision tower is trained from scratch by the first stage of its recipe, windows of 48 pixels with
one thing each (`examples/tiny/make_checkpoint.py`), but without shapes and texts, and with some of the styles or names
only. Then it names things on white, one drawing of each in four sizes: the name with the largest mean logit over the
patches is its answer. All towers see the same number of windows. Names are a random order's first ones; "52 names"
counts only images of the first 52, with only these names as answers, so that these figures can be compared.

Windows with one thing are a small part of the recipe, so the shares are far below those of the finished checkpoint.
"""

import json
import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from report import build_parser, describe_machine, markdown_table, write_report
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from flashsloth import FlashSlothConfig, FlashSlothImageProcessor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny"))
from art import STYLES, TEST_STYLES  # noqa: E402
from make_checkpoint import (  # noqa: E402
    BATCH_SIZE,
    DENSE,
    PATCH_SIZE,
    SEED,
    TOWER_STAGES,
    WINDOW_SIZE,
    build_optimizer,
    compile_layers,
    training_arguments,
)
from scenes import THINGS, Art, Box, Layout, Scene, Thing, draw  # noqa: E402
from score import WHITE  # noqa: E402
from tower import NAMES, PatchDataset, TowerForPatches, TowerTrainer  # noqa: E402

ORDER = ("noto", "twemoji", "fluent-emoji-flat", "streamline-emojis")  # unlike each other; the others follow
ORDER += tuple(style for style in STYLES if style not in ORDER)
ALL, FEWEST = len(THINGS), 52
TOWERS = ((1, ALL), (2, ALL), (4, ALL), (8, ALL), (8, 104), (8, FEWEST))  # numbers of styles and of names
SIZES = (0.6, 0.7, 0.8, 0.9)  # of a thing, as a fraction of its window
LAYOUT = replace(DENSE, share_shapes=0.0, share_texts=0.0)


def first_names(number: int) -> list[str]:
    """The first names of a random order."""
    return random.Random(SEED).sample(THINGS, len(THINGS))[:number]


def load_art(folder: Path, styles: Sequence[str], names: Sequence[str]) -> Art:
    """The art of some styles and names."""
    art = Art(folder, styles=styles)
    art.drawings = {name: art.drawings[name] for name in names if name in art.drawings}
    return art


def train_tower(art: Art, folder: Path, num_steps: int, compiled: bool) -> TowerForPatches:
    """Train a tower on windows with one thing each."""
    set_seed(SEED)
    stage = TOWER_STAGES[0]
    tower = TowerForPatches(FlashSlothConfig.from_pretrained(ROOT).vision_config, stage.window)
    if compiled:
        compile_layers(tower.vision_tower)
    images = PatchDataset(
        0,
        num_steps * BATCH_SIZE,
        (LAYOUT,),
        size=stage.size,
        patch_size=PATCH_SIZE,
        preprocess=FlashSlothImageProcessor.from_pretrained(ROOT),
        art=art,
    )
    args = training_arguments(
        folder, num_steps, batch_size=BATCH_SIZE, learning_rate=stage.learning_rate, lr_scheduler_type="linear"
    )
    trainer = TowerTrainer(tower, args, train_dataset=images, optimizers=(build_optimizer(tower, args), None))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    return tower.eval()


@torch.no_grad()
def count_right(tower: TowerForPatches, art: Art, names: Sequence[str]) -> tuple[int, int]:
    """Let a tower choose among names for every one that is drawn.

    Returns:
        The numbers of right answers and of images.
    """
    preprocess = FlashSlothImageProcessor.from_pretrained(ROOT)
    side = WINDOW_SIZE * PATCH_SIZE
    drawn = [name for name in names if name in art.drawings]
    right = 0
    for number, name in enumerate(drawn):
        images = []
        for size in SIZES:
            box = Box(*(0.5 + sign * size / 2 for sign in (-1, -1, 1, 1)))
            scene = Scene((Thing(name, "", (0, 0, 0), box, "", WHITE[0], number),), (192, 192), "plain", WHITE, 0)
            images.append(draw(scene, art, Layout(quality=0.0, art_changes=0.0)))
        pixels = preprocess(images, size={"height": side, "width": side}, return_tensors="pt")["pixel_values"]
        logits = tower.head(tower.norm(tower.encode(pixels, torch.zeros(2, dtype=torch.long)))).mean(1)
        best = logits[:, [NAMES.index(one) for one in names]].argmax(-1)
        right += sum(names[place] == name for place in best.tolist())
    return right, len(drawn) * len(SIZES)


def main() -> None:
    """Train and test every tower; a run that was interrupted goes on."""
    parser = build_parser(__doc__)
    parser.add_argument("--art", type=Path, required=True, help="the folder that examples/tiny/art.py fills")
    parser.add_argument("--work", type=Path, default=Path("runs/new_styles"), help="folder for every tower's figures")
    parser.add_argument("--steps", type=int, default=400, help=f"steps of {4 * BATCH_SIZE} windows")
    parser.add_argument("--compile", action="store_true", help="compile the layers: faster, needs a C++ compiler")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for num_styles, num_names in TOWERS:
        styles, names = ORDER[:num_styles], first_names(num_names)
        folder = args.work / f"{num_styles}-styles-{num_names}-names-{args.steps}-steps"
        figures = folder / "right.json"
        if not figures.exists():
            tower = train_tower(load_art(args.art, styles, names), folder, args.steps, args.compile)
            tested = {"learned styles": styles, **{style: (style,) for style in TEST_STYLES}}
            counts = {
                f"{test}, {len(chosen)} names": count_right(tower, load_art(args.art, some, chosen), chosen)
                for chosen in (names, names[:FEWEST])
                for test, some in tested.items()
            }
            figures.write_text(json.dumps(counts))
        counts = json.loads(figures.read_text())
        rows.append([num_styles, num_names, *(
            f"{right / asked:.1%} of {asked}"
            for number in (num_names, FEWEST)
            for test in ("learned styles", *TEST_STYLES)
            for right, asked in [counts[f"{test}, {number} names"]]
        )])  # fmt: skip
    head = ("styles", "names", "learned styles", *TEST_STYLES)
    head += tuple(f"{test}, {FEWEST} names" for test in ("learned styles", *TEST_STYLES))
    write_report(
        args.output,
        f"{describe_machine()}; {args.steps} steps of {4 * BATCH_SIZE} windows for every tower.",
        markdown_table(head, rows, text_columns=()),
    )


if __name__ == "__main__":
    main()
