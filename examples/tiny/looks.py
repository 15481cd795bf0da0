"""Where queries should look: attention to the patches of what a question is about, as a second loss.

The drawing program knows which things a question is about (`Question.about`). Without this loss, the queries of so
small a model learn late where to look, since they begin with attention to everything.
"""

from collections.abc import Sequence
from typing import Any

import torch
from scenes import Box, Thing
from transformers import Trainer

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.image_processing_flashsloth import tile_boxes
from flashsloth.modeling_flashsloth import QueryContext, QueryRecord

LOOKS_WEIGHT = 0.2
About = tuple[tuple[int, Thing], ...]


def patches_of(boxes: Sequence[Box], grid: int) -> torch.Tensor:
    """The patches whose middle is in one of several boxes of a tile, or the one nearest to a box, `(grid * grid,)`."""
    middles = (torch.arange(grid) + 0.5) / grid
    found = torch.zeros(grid, grid, dtype=torch.bool)
    for box in boxes:
        x, y = box.centre
        columns = ((middles > box.left) & (middles < box.right)) | (middles == middles[(middles - x).abs().argmin()])
        rows = ((middles > box.top) & (middles < box.bottom)) | (middles == middles[(middles - y).abs().argmin()])
        found |= rows[:, None] & columns
    return found.flatten()


def boxes_in_tile(things: Sequence[Thing], size: tuple[int, int], tile: int, num_tiles: int) -> list[Box]:
    """The boxes of things within a tile of their image, cut at its edges; without those that are not in it.

    Args:
        things: The things.
        size: Width and height of the image, in pixels.
        tile: Number of the tile.
        num_tiles: Number of the image's tiles, 1 or 5.
    """
    width, height = size
    left, top, right, bottom = tile_boxes(height, width, num_tiles)[tile]
    scale_x, scale_y = width / (right - left), height / (bottom - top)
    boxes = [thing.box.moved(left / (right - left), top / (bottom - top), scale_x, scale_y) for thing in things]
    return [box for box in boxes if box.right > box.left and box.bottom > box.top]


def looks_of(
    rows: Sequence[tuple[Sequence[About], Sequence[tuple[int, int]]]], grid: int, num_tiles: int
) -> torch.Tensor:
    """The patches that each question of a batch is about.

    Args:
        rows: Of every row, what its questions are about, and the sizes of its images.
        grid: Number of patches along a side of a tile.
        num_tiles: Number of tiles of an image.

    Returns:
        `(num_questions, most_tiles * grid**2)`, like `query_attentions`; all False if a question is about nothing.
    """
    most = max(len(sizes) for _, sizes in rows)
    looks = []
    for questions, sizes in rows:
        for about in questions:
            tiles = []
            for image in range(most):
                things = [thing for place, thing in about if place == image]
                for tile in range(num_tiles):
                    boxes = boxes_in_tile(things, sizes[image], tile, num_tiles) if things else []
                    tiles.append(patches_of(boxes, grid))
            looks.append(torch.cat(tiles))
    return torch.stack(looks)


def looks_loss(attentions: torch.Tensor, looks: torch.Tensor) -> torch.Tensor:
    """Mean over questions of the negative logarithm of the attention to what they are about.

    Args:
        attentions: The model's `query_attentions`, `(num_questions, num_heads, num_query_tokens, num_patches)`.
        looks: See `looks_of`.
    """
    asked = looks.any(dim=1)
    seen = (attentions * looks[:, None, None]).sum(dim=-1).mean(dim=(1, 2))[asked]
    return -seen.clamp(min=1e-4).log().sum() / max(1, len(seen))


class LooksTrainer(Trainer):
    """A Trainer that adds `looks_loss` to the model's loss.

    Asking the model for `output_attentions` would also return the decoder's, so the record of the queries' attention is
    put into the call of the Embedded Query module.
    """

    def __init__(self, model: FlashSlothForConditionalGeneration, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.num_query_tokens = model.config.num_query_tokens
        self._seen: tuple[QueryRecord, QueryContext] | None = None
        self._hook = model.model.embedded_query.register_forward_pre_hook(self._record)

    def _record(
        self, module: torch.nn.Module, args: tuple[torch.Tensor, QueryContext]
    ) -> tuple[torch.Tensor, QueryContext] | None:
        if not module.training:
            return None
        hidden_states, context = args
        record = QueryRecord()
        self._seen = record, context
        return hidden_states, context._replace(record=record)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """See `Trainer`."""
        looks = inputs.pop("looks")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        record, context = self._seen
        weights = record.weights.transpose(1, 2)[context.update_mask]  # (num_queries, num_heads, num_patches)
        attentions = weights.unflatten(0, (-1, self.num_query_tokens)).transpose(1, 2)
        loss = loss + LOOKS_WEIGHT * looks_loss(attentions, looks)
        return (loss, outputs) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer`; afterwards, the model no longer keeps its attention."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._hook.remove()
