"""Pretraining of the tiny vision tower to predict the content of every patch.

It replaces SigLIP's pretraining of the released checkpoints. Every patch of a thing predicts the thing's name and
colour and where its middle is, from the patch and in the image; each half of a patch of a text predicts the character
that it shows and which one of the text that is.
"""

import logging
import random
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from foreign import ForeignImages
from PIL import Image
from scenes import (
    CHARACTERS,
    COLOURS,
    MAX_CHARACTERS,
    SHAPES,
    THINGS,
    Art,
    Box,
    Layout,
    Scene,
    character_boxes,
    draw_with_masks,
    scene_at,
)
from torch import nn
from torch.utils.data import Dataset
from transformers import BaseImageProcessor, SiglipVisionConfig, SiglipVisionModel, Trainer
from transformers.modeling_outputs import ModelOutput

logger = logging.getLogger(__name__)

IGNORED = -100
MIN_COVER = 0.2  # share of a patch that a thing must cover
FOREIGN = "foreign"  # neither drawing nor emoji nor printed word
NAMES = ("nothing", *SHAPES, *THINGS, "sign", "number", "word", FOREIGN)
COLOUR_NAMES = tuple(COLOURS)
CLASSES = {"name": len(NAMES), "colour": len(COLOUR_NAMES)}
for _half in ("left", "right"):  # halves of a patch, since two characters may share one
    CLASSES |= {f"{_half} character": len(CHARACTERS), f"{_half} number": MAX_CHARACTERS}
WEIGHTS = {"name": 2.0, "colour": 1.0} | {name: 0.5 if "number" in name else 1.0 for name in tuple(CLASSES)[2:]}
PLACE_WEIGHT = 1.0
NUM_PLACES = 6  # offset of the middle, width and height, the middle
MAX_THINGS = 16


class PatchTargets(NamedTuple):
    """Targets of every patch of an image.

    Attributes:
        labels: Class indices of `CLASSES`, `(num_patches, 6)`, or `IGNORED`.
        places: From the patch's middle to the thing's, the thing's width and height, and its middle from the image's,
            as fractions of the image, `(num_patches, 6)`; NaN for the ground.
        owners: Number of the thing, `(num_patches,)`; `MAX_THINGS` for the ground.
    """

    labels: np.ndarray
    places: np.ndarray
    owners: np.ndarray


def find_patch_targets(scene: Scene, masks: list[Image.Image], grid: int, art: Art) -> PatchTargets:
    """Find the targets of every patch.

    Args:
        scene: The scene.
        masks: Where each thing is seen.
        grid: Number of patches along a side.
        art: Art that the scene was drawn with.
    """
    labels = np.full((grid, grid, len(CLASSES)), IGNORED, np.int64)
    labels[..., 0] = 0
    places = np.full((grid, grid, NUM_PLACES), np.nan, np.float32)
    owners = np.full((grid, grid), MAX_THINGS, np.int64)
    best = np.full((grid, grid), MIN_COVER, np.float32)
    middles = (np.arange(grid, dtype=np.float32) + 0.5) / grid
    for number, (thing, mask) in enumerate(zip(scene.things, masks, strict=True)):
        cover = np.asarray(mask.resize((grid, grid), Image.Resampling.BOX), np.float32) / 255
        taken = cover >= np.minimum(best, max(cover.max(), 0.02))
        if thing.text:
            inside = (middles > thing.box.left) & (middles < thing.box.right)
            taken |= inside[None, :] & ((middles > thing.box.top) & (middles < thing.box.bottom))[:, None]
        best = np.where(taken, np.maximum(cover, best), best)
        owners[taken] = number
        labels[taken, 0] = NAMES.index(thing.name)
        labels[taken, 1:] = IGNORED
        if thing.colour:
            labels[taken, 1] = COLOUR_NAMES.index(thing.colour)
        x, y = thing.box.centre
        size = np.array([thing.box.right - thing.box.left, thing.box.bottom - thing.box.top], np.float32)
        shift = np.stack(np.broadcast_arrays(x - middles[None, :], y - middles[:, None]), axis=-1)
        rest = np.concatenate([size, np.array([x - 0.5, y - 0.5], np.float32)])
        places[taken] = np.concatenate([shift[taken], np.broadcast_to(rest, (taken.sum(), 4))], axis=-1)
        if thing.text:
            _label_characters(labels, owners == number, character_boxes(thing, scene.size, art), thing.text)
    flat = grid * grid
    return PatchTargets(labels.reshape(flat, -1), places.reshape(flat, -1), owners.reshape(flat))


def _label_characters(labels: np.ndarray, owned: np.ndarray, boxes: list[Box], text: str) -> None:
    """Label the halves of patches whose middle is on a character, or that are nearest to it."""
    grid = len(labels)
    columns_at = (np.arange(2 * grid) + 0.5) / (2 * grid)  # middles of halves
    rows_at = (np.arange(grid) + 0.5) / grid
    margin = 0.15 / grid
    for number, (box, character) in enumerate(zip(boxes, text, strict=True)):
        columns = np.flatnonzero((columns_at > box.left) & (columns_at < box.right))
        rows = np.flatnonzero((rows_at > box.top - margin) & (rows_at < box.bottom + margin))
        if not len(columns):
            columns = np.abs(columns_at - (box.left + box.right) / 2).argmin()[None]
        if not len(rows):
            rows = np.abs(rows_at - (box.top + box.bottom) / 2).argmin()[None]
        for column in columns:
            patch, half = divmod(int(column), 2)
            found = rows[owned[rows, patch]]
            labels[found, patch, 2 + 2 * half] = CHARACTERS.index(character)
            labels[found, patch, 3 + 2 * half] = number


class PatchDataset(Dataset):
    """Images with `PatchTargets`, drawn on access.

    Args:
        start: Index of the first scene.
        length: Number of images.
        layouts: Scenes are drawn from one of these, in turn.
        size: Side of an image, in pixels.
        patch_size: Side of a patch, in pixels.
        preprocess: Converts an image to pixel values.
        art: Emoji art and fonts.
        foreign: Images that are nothing that the model knows; `None`: there are none.
        share_foreign: Share of foreign images.
        share_crops: Share of scenes of which a part is shown, as in a tile of an image that is split.
    """

    def __init__(
        self,
        start: int,
        length: int,
        layouts: tuple[Layout, ...],
        *,
        size: int,
        patch_size: int,
        preprocess: BaseImageProcessor,
        art: Art,
        foreign: ForeignImages | None = None,
        share_foreign: float = 0.0,
        share_crops: float = 0.0,
    ) -> None:
        self.start, self.length, self.layouts = start, length, layouts
        self.size, self.grid = size, size // patch_size
        self.preprocess, self.art, self.foreign = preprocess, art, foreign
        self.share_foreign, self.share_crops = share_foreign, share_crops

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index += self.start
        rng = random.Random(f"patches:{index}")
        if self.foreign is not None and rng.random() < self.share_foreign:
            image = self.foreign.sample(rng)
            targets = _foreign_targets(self.grid)
        else:
            layout = self.layouts[index % len(self.layouts)]
            scene = scene_at("train", index, self.art, layout)
            image, masks = draw_with_masks(scene, self.art, layout)
            if rng.random() < self.share_crops:
                scene, image, masks = crop(scene, image, masks, rng)
            targets = find_patch_targets(scene, masks, self.grid, self.art)
        pixels = self.preprocess(image, size={"height": self.size, "width": self.size}, return_tensors="pt")
        return {
            "pixel_values": pixels["pixel_values"][0],
            "corner": torch.tensor([rng.randrange(64), rng.randrange(64)]),
            **{name: torch.from_numpy(array) for name, array in targets._asdict().items()},
        }


def _foreign_targets(grid: int) -> PatchTargets:
    labels = np.full((grid * grid, len(CLASSES)), IGNORED, np.int64)
    labels[:, 0] = NAMES.index(FOREIGN)
    return PatchTargets(labels, np.full((grid * grid, NUM_PLACES), np.nan, np.float32), np.zeros(grid * grid, np.int64))


def crop(
    scene: Scene, image: Image.Image, masks: list[Image.Image], rng: random.Random
) -> tuple[Scene, Image.Image, list[Image.Image]]:
    """Cut a quarter or so out of a scene; things of which less than a third is left are not labelled."""
    width, height = scene.size
    share = rng.uniform(0.45, 0.75)
    new = max(16, round(share * width)), max(16, round(share * height))
    left, top = rng.randint(0, width - new[0]), rng.randint(0, height - new[1])
    edges = left, top, left + new[0], top + new[1]
    things, parts = [], []
    for thing, mask in zip(scene.things, masks, strict=True):
        part = mask.crop(edges)
        whole, rest = (np.asarray(seen, np.float32).sum() for seen in (mask, part))
        if rest < (0.98 if thing.text else 0.34) * whole or not rest:
            continue
        box = thing.box.moved(left / new[0], top / new[1], width / new[0], height / new[1])
        things.append(replace(thing, box=box))
        parts.append(part)
    return replace(scene, things=tuple(things), size=new), image.crop(edges), parts


def sine_positions(grid: int, width: int) -> torch.Tensor:
    """Sinusoidal position embeddings of a patch grid, `(grid * grid, width)`, from -1 to 1.

    Initialized with these, a tower learns a patch's neighbourhood sooner than from random position embeddings, since
    the offset to a neighbour is the same rotation everywhere.
    """
    frequencies = 40.0 ** -torch.linspace(0, 1, width // 4)  # the longest wave spans the grid several times
    angles = torch.arange(grid).unsqueeze(1) * frequencies  # (grid, width // 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width // 2)
    rows, columns = axis.repeat_interleave(grid, dim=0), axis.repeat(grid, 1)
    return torch.cat([rows, columns], dim=1)


class TowerForPatches(nn.Module):
    """A vision tower with one linear head for all targets of a patch.

    FlashSloth reads the tower's last hidden state without the final norm, so the tower is trained without it.

    Args:
        config: The tower's config.
        window: Side of the windows that a patch sees, in patches; 0: it sees all of the image.
    """

    def __init__(self, config: SiglipVisionConfig, window: int = 0) -> None:
        super().__init__()
        self.vision_tower = SiglipVisionModel(config)
        self.vision_tower.post_layernorm = nn.Identity()
        self.grid, self.window = config.image_size // config.patch_size, window
        positions = self.vision_tower.embeddings.position_embedding.weight
        positions.data.copy_(0.5 * sine_positions(self.grid, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, sum(CLASSES.values()) + NUM_PLACES)

    def encode(self, pixel_values: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
        """Patch features `(batch, num_patches, hidden_size)` of images that are as large as a part of a tile or all.

        Args:
            pixel_values: `(batch, 3, side, side)`, in [-1, 1].
            corner: Where in a tile's patch grid the images are, two integers, modulo the possible places.
        """
        patches = self.vision_tower.embeddings.patch_embedding(pixel_values).permute(0, 2, 3, 1)
        batch, side, _, width = patches.shape
        row, column = (int(place) % (self.grid - side + 1) for place in corner)
        positions = self.vision_tower.embeddings.position_embedding.weight.view(self.grid, self.grid, width)
        patches = patches + positions[row : row + side, column : column + side]
        window = self.window or side
        cut = patches.view(batch, side // window, window, side // window, window, width).transpose(2, 3)
        features = self.vision_tower.encoder(inputs_embeds=cut.reshape(-1, window * window, width)).last_hidden_state
        return features.view(cut.shape).transpose(2, 3).reshape(batch, side * side, width)

    def forward(
        self,
        pixel_values: torch.Tensor,
        corner: torch.Tensor,
        labels: torch.Tensor,
        places: torch.Tensor,
        owners: torch.Tensor,
    ) -> ModelOutput:
        """Sum the losses of all targets; every thing counts the same, whatever its size.

        Args:
            pixel_values: `(batch, 3, side, side)`, in [-1, 1].
            corner: `(batch, 2)`; the first row counts for all.
            labels: `PatchTargets.labels` of the images, and so on.
            places: See `labels`.
            owners: See `labels`.

        Returns:
            `loss`, and `shares`, the shares of the things and characters that are recognized, `(7,)`: name by the mean
            logits of its patches, then each of `CLASSES` by each patch.
        """
        logits = self.head(self.norm(self.encode(pixel_values, corner[0]))).float().flatten(0, 1)
        batch = len(owners)
        group = (torch.arange(batch, device=owners.device)[:, None] * (MAX_THINGS + 1) + owners).flatten()
        sizes = torch.zeros(batch * (MAX_THINGS + 1), device=logits.device).index_add(
            0, group, logits.new_ones(group.shape)
        )
        weights = 1 / sizes[group]
        labels, places = labels.flatten(0, 1), places.flatten(0, 1)
        *parts, found = logits.split((*CLASSES.values(), NUM_PLACES), dim=-1)
        loss, shares = logits.new_zeros(()), []
        for number, (name, part) in enumerate(zip(CLASSES, parts, strict=True)):
            asked = labels[:, number] != IGNORED
            counts = weights[asked] if name in ("name", "colour") else weights[asked].sqrt()  # texts are of many parts
            share = nn.functional.cross_entropy(part[asked], labels[asked, number], reduction="none") * counts
            loss = loss + WEIGHTS[name] * share.sum() / counts.sum().clamp(min=1e-6)
            known = asked & (labels[:, 0] != 0)
            shares.append(_share(part[known].argmax(-1) == labels[known, number], weights[known]))
        means = torch.zeros(len(sizes), parts[0].shape[1], device=logits.device).index_add(
            0, group, parts[0] * weights[:, None]
        )
        names = torch.zeros(len(sizes), dtype=torch.long, device=logits.device).index_copy(0, group, labels[:, 0])
        things = (sizes > 0) & (names > 0)
        loss = loss + WEIGHTS["name"] * nn.functional.cross_entropy(means[things], names[things])
        shares.insert(0, (means[things].argmax(-1) == names[things]).float().mean())
        placed = ~places[:, 0].isnan()
        known = slice(NUM_PLACES - 2 if self.window else NUM_PLACES)  # a part of a tile may be anywhere in it
        errors = nn.functional.smooth_l1_loss(
            found[placed, known], 4 * places[placed, known], beta=0.2, reduction="none"
        ).mean(-1)
        loss = loss + PLACE_WEIGHT * (errors * weights[placed]).sum() / weights[placed].sum().clamp(min=1e-6)
        return ModelOutput(loss=loss, shares=torch.stack(shares).detach())


def _share(right: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (right * weights).sum() / weights.sum().clamp(min=1e-6)


class TowerTrainer(Trainer):
    """A Trainer that logs what is recognized in the last batches."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: object
    ) -> torch.Tensor | tuple[torch.Tensor, ModelOutput]:
        """See `Trainer`."""
        outputs = model(**inputs)
        self.shares = [*getattr(self, "shares", []), outputs.shares]
        if self.state.global_step % self.args.logging_steps == 0 and self.is_world_process_zero():
            names = ("thing", *CLASSES)
            means = torch.stack(self.shares).mean(0).tolist()
            report = ", ".join(f"{name} {share:.3f}" for name, share in zip(names, means, strict=True))
            logger.info("step %d: loss %.3f, %s", self.state.global_step, outputs.loss.item(), report)
            self.shares = []
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def scale_features(tower: SiglipVisionModel, factor: float) -> None:
    """Multiply the last hidden state of a tower, before its final norm, by a factor.

    All that layers add to the hidden states is scaled. Since they normalize what they read, nothing else changes.
    """
    embeddings = tower.embeddings
    scaled = [embeddings.patch_embedding, embeddings.position_embedding]
    for layer in tower.encoder.layers:
        scaled += [layer.self_attn.out_proj, layer.mlp.fc2]
    with torch.no_grad():
        for module in scaled:
            for parameter in module.parameters():
                parameter.mul_(factor)


@torch.no_grad()
def feature_deviation(tower: SiglipVisionModel, pixel_values: torch.Tensor) -> float:
    """Standard deviation of a tower's last hidden state before its final norm, which the tower must not apply."""
    return tower(pixel_values).last_hidden_state.float().std().item()
