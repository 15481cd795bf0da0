"""Pretraining of the tiny vision tower on what the drawing program knows of every patch.

It plays the part that SigLIP's pretraining plays for the released checkpoints. Each patch under a thing predicts that
thing's name, colour and place; each patch under a text predicts its characters one by one and the one that it lies on.
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
END = len(CHARACTERS)  # the class of a position behind a text's last character
NUM_CLASSES = (len(NAMES), len(COLOUR_NAMES), len(PLACES), *(MAX_CHARACTERS + 1) * (len(CHARACTERS) + 1,))
TARGET_WEIGHTS = (4.0, 2.0, 1.0, *(MAX_CHARACTERS + 1) * (1.0,))
TARGET_NAMES = ("name", "colour", "place", *(f"character {i + 1}" for i in range(MAX_CHARACTERS)), "character on patch")


def patch_targets(scene: Scene, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """What every patch should say of a scene.

    Args:
        scene: The scene.
        grid: Patches along a side.

    Returns:
        Class indices `(grid * grid, 3 + MAX_CHARACTERS + 1)`: name, colour, place, the text's characters in order, the
        character on the patch; `IGNORED` for the place of nothing, and for the characters of a patch without a text.
        And the weight of every patch, `(grid * grid,)`: those of a thing add up to 1, however large it is, and so do
        those of the background.
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
    """Rows and columns of the patches whose centre a box covers."""
    left, top, right, bottom = (round(edge * grid) for edge in box)
    return slice(top, max(top + 1, bottom)), slice(left, max(left + 1, right))


class PatchDataset(Dataset):
    """Images with `patch_targets`, drawn when asked for.

    Some are grey and ask for no colours: a shape has to be known whatever its colour, also in a colour that it never
    had in training.

    Args:
        split: Where the scenes come from.
        length: Number of images.
        config: Says how large an image and a patch are.
        preprocess: Makes pixel values of an image.
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
    """Sines and cosines of the rows and columns of a patch grid, `(grid * grid, width)`, each from -1 to 1.

    A tower that begins with them finds a patch's neighbours sooner than one whose positions begin as noise, for the
    step to a neighbour is the same rotation everywhere.
    """
    frequencies = 40.0 ** -torch.linspace(0, 1, width // 4)  # the longest wave spans the grid several times
    angles = torch.arange(grid).unsqueeze(1) * frequencies  # (grid, width // 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width // 2)
    rows, columns = axis.repeat_interleave(grid, dim=0), axis.repeat(grid, 1)
    return torch.cat([rows, columns], dim=1)


class TowerForPatches(nn.Module):
    """A vision tower and one linear head for everything that a patch should say.

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
        """Add up the cross entropies of all targets, weighted by `TARGET_WEIGHTS`.

        Args:
            pixel_values: `(batch, 3, image_size, image_size)`, in [-1, 1].
            labels: `(batch, num_patches, num_targets)` from `patch_targets`.
            weights: `(batch, num_patches)` from `patch_targets`.

        Returns:
            `loss`, and `hits` `(batch, num_patches, num_targets)`: 1 right, 0 wrong, `IGNORED` where nothing is asked.
        """
        features = self.vision_tower(pixel_values=pixel_values).last_hidden_state
        logits = self.head(self.norm(features)).float().flatten(0, 1)
        labels, weights = labels.flatten(0, 1), weights.flatten()
        loss, hits = logits.new_zeros(()), torch.full_like(labels, IGNORED)
        for target, part in enumerate(logits.split(NUM_CLASSES, dim=-1)):
            asked = labels[:, target] != IGNORED
            part, right, weight = part[asked], labels[asked, target], weights[asked]
            losses = weight * nn.functional.cross_entropy(part, right, reduction="none")
            loss = loss + TARGET_WEIGHTS[target] * losses.sum() / weight.sum().clamp(min=1e-6)  # a batch without texts
            hits[asked, target] = (part.argmax(-1) == right).long()
        return ModelOutput(loss=loss, hits=hits.view(*features.shape[:2], -1))


class TowerTrainer(Trainer):
    """A Trainer whose log shows the share of right patches of every target in the last batch."""

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
