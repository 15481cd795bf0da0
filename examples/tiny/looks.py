"""Where queries should look: attention to the patches of what a question is about, as a second loss.

The drawing program knows which things a question is about (`Question.about`). Without this loss, the queries of so
small a model learn late where to look, since they begin with attention to everything.
"""

from collections.abc import Sequence
from typing import Any

import torch
from questions import Question
from scenes import Art, Box, character_boxes
from transformers import Trainer

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.image_processing_flashsloth import tile_boxes
from flashsloth.modeling_flashsloth import QueryContext, QueryRecord

LOOKS_WEIGHT = 0.2
MAX_PARTS = 8
Part = Sequence[tuple[int, Box]]  # boxes, each with the place of its image


def parts_of(question: Question, sizes: Sequence[tuple[int, int]], art: Art, apart: bool) -> list[Part]:
    """The parts of what a question is about.

    Args:
        question: The question.
        sizes: Width and height of its images, in pixels.
        art: The art that they are drawn with.
        apart: Whether things are parts of their own, in the question's order, and the characters of texts that the
            answer spells as well. Otherwise, all things are one part, and a description has none.

    Returns:
        At most `MAX_PARTS` parts.
    """
    if not apart:
        whole = [(place, thing.box) for place, thing in question.about]
        return [whole] if whole and question.kind != "describe" else []
    answered = question.answer.replace(",", "").split() if question.kind != "count" else []
    spelled = [(place, thing) for place, thing in question.about if thing.text in answered]
    parts = [[(place, thing.box)] for place, thing in question.about if len(question.about) > 1 or not spelled]
    for place, thing in spelled:
        parts += [[(place, box)] for box in character_boxes(thing, sizes[place], art)]
    return parts[:MAX_PARTS]


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


def boxes_in_tile(boxes: Sequence[Box], size: tuple[int, int], tile: int, num_tiles: int) -> list[Box]:
    """Boxes within a tile of their image, cut at its edges; without those that are not in it.

    Args:
        boxes: Boxes in the image.
        size: Width and height of the image, in pixels.
        tile: Number of the tile.
        num_tiles: Number of the image's tiles, 1 or 5.
    """
    width, height = size
    left, top, right, bottom = tile_boxes(height, width, num_tiles)[tile]
    scale_x, scale_y = width / (right - left), height / (bottom - top)
    moved = [box.moved(left / (right - left), top / (bottom - top), scale_x, scale_y) for box in boxes]
    return [box for box in moved if box.right > box.left and box.bottom > box.top]


def looks_of(
    rows: Sequence[tuple[Sequence[Sequence[Part]], Sequence[tuple[int, int]]]], grid: int, num_tiles: int
) -> torch.Tensor:
    """The patches of the parts of what each question of a batch is about.

    Args:
        rows: Of every row, the parts of its questions, and the sizes of its images.
        grid: Number of patches along a side of a tile.
        num_tiles: Number of tiles of an image.

    Returns:
        `(num_questions, MAX_PARTS, most_tiles * grid**2)`; its last dimension is that of `query_attentions`. All False
        where a question has fewer parts.
    """
    most = max(len(sizes) for _, sizes in rows)
    asked = [(parts, sizes) for questions, sizes in rows for parts in questions]
    looks = torch.zeros(len(asked), MAX_PARTS, most, num_tiles, grid**2, dtype=torch.bool)
    for number, (parts, sizes) in enumerate(asked):
        for part, boxes in enumerate(parts):
            for image in {place for place, _ in boxes}:
                there = [box for place, box in boxes if place == image]
                for tile in range(num_tiles):
                    seen = boxes_in_tile(there, sizes[image], tile, num_tiles)
                    looks[number, part, image, tile] = patches_of(seen, grid)
    return looks.flatten(2)


def looks_loss(attentions: torch.Tensor, looks: torch.Tensor) -> torch.Tensor:
    """Mean over questions, and over their parts, of the negative logarithm of the attention to what they are about.

    With `n` parts, every `n`-th query token should look at the same part.

    Args:
        attentions: The model's `query_attentions`, `(num_questions, num_heads, num_query_tokens, num_patches)`.
        looks: See `looks_of`.
    """
    num_parts = looks.any(dim=2).sum(dim=1)
    asked = num_parts > 0
    looks, num_parts = looks[asked], num_parts[asked]
    parts = torch.arange(attentions.shape[2], device=looks.device) % num_parts[:, None]  # of every query
    wanted = looks.gather(1, parts[:, :, None].expand(-1, -1, looks.shape[2]))
    seen = (attentions.mean(dim=1)[asked] * wanted).sum(dim=2)
    shares = torch.nn.functional.one_hot(parts, looks.shape[1]).to(seen.dtype)
    shares = shares / shares.sum(dim=1, keepdim=True).clamp(min=1)
    means = torch.einsum("qn,qnp->qp", seen, shares)
    losses = -means.clamp(min=1e-6).log() * looks.any(dim=2)
    return (losses.sum(dim=1) / num_parts).sum() / max(1, len(losses))


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
