"""Pretraining of the tiny vision tower to predict the content of every patch.

It replaces SigLIP's pretraining of the released checkpoints. Each patch on an object predicts the object's name, colour
and place; each patch on a text predicts all characters of the text, and the character that the patch is on.
"""

import logging
import random

import numpy as np
import torch
from scenes import CHARACTERS, COLOURS, MAX_CHARACTERS, SHAPES, Scene, character_edges, draw, scene_at, text_box
from torch import nn
from torch.utils.data import Dataset
from transformers import BaseImageProcessor, SiglipVisionConfig, SiglipVisionModel, Trainer
from transformers.modeling_outputs import ModelOutput

logger = logging.getLogger(__name__)

IGNORED = -100
SHARE_GREY = 0.2
NAMES = ("nothing", *SHAPES, "sign", "number")
COLOUR_NAMES = ("nothing", *COLOURS)
PLACES = ("top left", "top right", "bottom left", "bottom right", "top", "bottom")
END = len(CHARACTERS)  # the class of positions after a text's last character
NUM_CLASSES = (len(NAMES), len(COLOUR_NAMES), len(PLACES), *(MAX_CHARACTERS + 1) * (len(CHARACTERS) + 1,))
TARGET_WEIGHTS = (4.0, 2.0, 1.0, *(MAX_CHARACTERS + 1) * (1.0,))
TARGET_NAMES = ("name", "colour", "place", *(f"character {i + 1}" for i in range(MAX_CHARACTERS)), "character on patch")


def patch_targets(scene: Scene, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """The targets of every patch of a scene.

    Args:
        scene: The scene.
        grid: Number of patches along a side.

    Returns:
        Class indices, `(grid * grid, 3 + MAX_CHARACTERS + 1)`: name, colour, place, the text's characters in order, and
        the character on the patch; `IGNORED` for the place of background patches, and for the characters of patches
        without text. And the weight of every patch, `(grid * grid,)`: the weights of an object's patches sum to 1,
        whatever its size, and so do those of the background.
    """
    targets = np.full((grid, grid, len(NUM_CLASSES)), IGNORED, np.int64)
    targets[..., :2] = 0
    weights = np.full((grid, grid), np.nan, np.float32)
    for thing in scene.things:
        rows, columns = _covered(thing.box, grid)
        properties = NAMES.index(thing.name), COLOUR_NAMES.index(thing.colour), PLACES.index(thing.place)
        targets[rows, columns, :3] = properties
        weights[rows, columns] = 1 / weights[rows, columns].size
        if thing.text:
            rows, columns = _covered(text_box(thing), grid)
            characters = [CHARACTERS.index(character) for character in thing.text]
            targets[rows, columns, 3:-1] = characters + [END] * (MAX_CHARACTERS - len(characters))
            centres = (np.arange(grid)[columns] + 0.5) / grid
            under = np.searchsorted(character_edges(thing)[1:-1], centres)
            targets[rows, columns, -1] = np.array(characters)[under]
    background = np.isnan(weights)
    weights[background] = 1 / background.sum()
    return targets.reshape(grid * grid, -1), weights.reshape(-1)


def _covered(box: tuple[float, float, float, float], grid: int) -> tuple[slice, slice]:
    """Rows and columns of the patches whose centre is in a box."""
    left, top, right, bottom = (round(edge * grid) for edge in box)
    return slice(top, max(top + 1, bottom)), slice(left, max(left + 1, right))


class PatchDataset(Dataset):
    """Images with `patch_targets`, drawn on access.

    Some images are grey and have no colour targets, so that the tower learns to recognise shapes independently of their
    colour, including pairs that never occur in training.

    Args:
        split: Split of the scenes.
        length: Number of images.
        config: Determines the size of images and patches.
        preprocess: Converts an image to pixel values.
    """

    def __init__(
        self,
        split: str,
        length: int,
        config: SiglipVisionConfig,
        preprocess: BaseImageProcessor,
    ) -> None:
        self.split, self.length = split, length
        self.size, self.grid = config.image_size, config.image_size // config.patch_size
        self.preprocess = preprocess

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        scene = scene_at(self.split, index)
        image = draw(scene, self.size)
        labels, weights = patch_targets(scene, self.grid)
        if random.Random(f"grey:{index}").random() < SHARE_GREY:
            image = image.convert("L").convert("RGB")
            labels[:, 1] = IGNORED
        return {
            "pixel_values": self.preprocess(image, return_tensors="pt")["pixel_values"][0],
            "labels": torch.from_numpy(labels),
            "weights": torch.from_numpy(weights),
        }


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
    """

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.vision_tower = SiglipVisionModel(config)
        self.vision_tower.post_layernorm = nn.Identity()
        positions = self.vision_tower.embeddings.position_embedding.weight
        positions.data.copy_(0.5 * sine_positions(config.image_size // config.patch_size, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, sum(NUM_CLASSES))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> ModelOutput:
        """Sum the cross entropies of all targets, weighted by `TARGET_WEIGHTS`.

        Args:
            pixel_values: `(batch, 3, image_size, image_size)`, in [-1, 1].
            labels: `(batch, num_patches, num_targets)` from `patch_targets`.
            weights: `(batch, num_patches)` from `patch_targets`.

        Returns:
            `loss`, and `hits` `(batch, num_patches, num_targets)`: 1 right, 0 wrong, `IGNORED` without a target.
        """
        features = self.vision_tower(pixel_values=pixel_values).last_hidden_state
        logits = self.head(self.norm(features)).float().flatten(0, 1)
        labels, weights = labels.flatten(0, 1), weights.flatten()
        loss, hits = logits.new_zeros(()), torch.full_like(labels, IGNORED)
        for target, part in enumerate(logits.split(NUM_CLASSES, dim=-1)):
            asked = labels[:, target] != IGNORED
            part, right, weight = part[asked], labels[asked, target], weights[asked]
            losses = weight * nn.functional.cross_entropy(part, right, reduction="none")
            loss = loss + TARGET_WEIGHTS[target] * losses.sum() / weight.sum().clamp(min=1e-6)  # 0 without texts
            hits[asked, target] = (part.argmax(-1) == right).long()
        return ModelOutput(loss=loss, hits=hits.view(*features.shape[:2], -1))


class TowerTrainer(Trainer):
    """A Trainer that logs the accuracy of every target in the last batch."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: object
    ) -> torch.Tensor | tuple[torch.Tensor, ModelOutput]:
        """See `Trainer`."""
        outputs = model(**inputs)
        if self.state.global_step % self.args.logging_steps == 0 and self.is_world_process_zero():
            self._log_hits(outputs.hits, inputs["labels"])
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _log_hits(self, hits: torch.Tensor, labels: torch.Tensor) -> None:
        on_thing = labels[..., 0] != 0
        shares = [
            (hits[..., target] == 1)[on_thing & (hits[..., target] != IGNORED)].float().mean().item()
            for target in range(hits.shape[-1])
        ]
        report = ", ".join(f"{name} {share:.3f}" for name, share in zip(TARGET_NAMES, shares, strict=True))
        logger.info("step %d: %s", self.state.global_step, report)
