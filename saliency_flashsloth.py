"""Heat maps: where the model looked, and which patches its answers depend on.

output = model.generate(**inputs, output_attentions=True, return_dict_in_generate=True)
sizes = [(image.height, image.width)]
maps = model.heat_maps(output, inputs["input_ids"], sizes)
overlay(image, maps.questions[0][0])  # where the first question's query tokens looked, on the first image
overlay(image, model.answer_maps(inputs, output.sequences, sizes)[0])  # which patches the answer depends on
"""

import math
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from .configuration_flashsloth import FlashSlothConfig
from .image_processing_flashsloth import tile_boxes

# Red, green and blue (0 to 255) and opacity (0 to 1) of `overlay`, from no heat to the maximum.
HEAT_COLOURS = ((0, 0, 0, 0.6), (130, 0, 40, 0.55), (235, 70, 30, 0.5), (255, 190, 40, 0.55), (255, 255, 200, 0.7))

# Attention of the prompts in the current call of `generate`, which cannot return more than its own outputs, and copies
# its arguments for an assistant. A context variable is private to a call and its thread.
_prompt_attentions: ContextVar[list[dict[str, torch.Tensor]] | None] = ContextVar("prompt_attentions", default=None)


class HeatMaps(NamedTuple):
    """Attention over the pixels of images, `(height, width)` each, float32.

    Attributes:
        questions: One list per question, with a map of every image before it in its row. The maps of a question sum to
            1, minus the share on the padding of tiles.
        pooling: One map per image. Every window of a tile sums to 1, minus the share on padding.
    """

    questions: list[list[torch.Tensor]]
    pooling: list[torch.Tensor]


class FlashSlothSaliencyMixin(GenerationMixin):
    """Returns the attention of `generate` to a prompt, and turns attention into maps."""

    config: FlashSlothConfig

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; see `GenerationMixin.generate`.

        With `output_attentions=True` and `return_dict_in_generate=True`, the output also has the prompt's
        `pooling_attentions` and `query_attentions`, one set per generated row.
        """
        attentions: list[dict[str, torch.Tensor]] = []
        token = _prompt_attentions.set(attentions)
        try:
            output = super().generate(*args, **kwargs)
        finally:
            _prompt_attentions.reset(token)
        if attentions and isinstance(output, ModelOutput):
            for name, weights in attentions[-1].items():
                output[name] = weights
        return output

    def _update_model_kwargs_for_generation(self, outputs: ModelOutput, *args: Any, **kwargs: Any) -> dict[str, Any]:
        attentions = _prompt_attentions.get()
        if attentions is not None and outputs.get("query_attentions") is not None:
            attentions.append({name: outputs[name] for name in ("pooling_attentions", "query_attentions")})
        return super()._update_model_kwargs_for_generation(outputs, *args, **kwargs)

    def heat_maps(
        self,
        outputs: ModelOutput,
        input_ids: torch.LongTensor,
        image_sizes: Sequence[tuple[int, int]],
        head: int | None = None,
    ) -> HeatMaps:
        """Map where the model looked.

        Args:
            outputs: Output of the model or of `generate` with `output_attentions=True`.
            input_ids: The processor's prompts, `(batch, seq_length)`. If a single prompt continued from a KV cache,
                the outputs may cover only its last questions.
            image_sizes: Height and width in pixels of all images of all rows, in order.
            head: Index of a head of the Embedded Query module; default: the mean of all heads. The query tokens of a
                question are averaged.

        Returns:
            Maps of every question and of every image, each `(height, width)` of its image, float32.

        Raises:
            ValueError: If the outputs have no attention to patches, or do not fit prompts and images.
        """
        pooling, queries = outputs.get("pooling_attentions"), outputs.get("query_attentions")
        if pooling is None or queries is None:
            raise ValueError(
                "The outputs have no `query_attentions`; call the model with `output_attentions=True`, and `generate` "
                "also with `return_dict_in_generate=True`, on prompts with an image."
            )
        pooling_maps = self._image_maps(pooling_to_patches(pooling), image_sizes)
        tiles_per_image = len(pooling) // len(image_sizes)
        spans = self.model.find_spans(input_ids)
        asked = (spans.query_mask & (spans.query_rank == 0)).nonzero()  # (num_questions, 2)
        if len(asked) > len(queries) and len(input_ids) == 1:
            asked = asked[len(asked) - len(queries) :]
        if len(asked) != len(queries):
            raise ValueError(
                f"The outputs have attention of {len(queries)} questions, but `input_ids` has {len(asked)}; pass the "
                "ids that belong to the outputs, with each row repeated as often as `generate` repeated it."
            )
        weights = queries.mean(dim=2)
        weights = weights.mean(dim=1) if head is None else weights[:, head]
        weights = weights.unflatten(-1, (-1, self.config.num_patches))  # (num_questions, tiles_per_row, num_patches)
        questions = []
        for tiles, (row, position) in zip(weights, asked.tolist(), strict=True):
            num_tiles, first = int(spans.num_tiles_before[row, position]), int(spans.first_tile[row])
            sizes = image_sizes[first // tiles_per_image : (first + num_tiles) // tiles_per_image]
            questions.append(self._image_maps(tiles[:num_tiles], sizes))
        return HeatMaps(questions, pooling_maps)

    def answer_maps(
        self, inputs: Mapping[str, Any], sequences: torch.LongTensor, image_sizes: Sequence[tuple[int, int]]
    ) -> list[torch.Tensor]:
        """Map which patches the answers depend on, through the image tokens or through the query tokens.

        Attention tells where a module looks, but not whether that matters. This is the norm of the gradient of an
        answer's log-probability with respect to the features of every patch, from one forward and backward pass over
        prompt and answer.

        Args:
            inputs: Output of the processor, or of an `ImagePrefixCache` for it.
            sequences: Output of `generate` for them: prompts and answers, `(batch, longer_seq_length)`.
            image_sizes: Height and width in pixels of all images of all rows, in order.

        Returns:
            One map per image, `(height, width)`, float32. The maps of a row sum to 1, minus the share on the padding
            of tiles.

        Raises:
            ValueError: If there is no image, or the arguments do not belong together.
        """
        prompts, patches = inputs["input_ids"].to(self.device), inputs.get("patch_features")
        if (patches is None and inputs.get("pixel_values") is None) or len(prompts) != len(sequences):
            raise ValueError(
                f"Answer maps need images and one prompt per answer, but found {len(prompts)} prompts, "
                f"{len(sequences)} answers and inputs {sorted(inputs)}; repeat prompts as often as `generate` did."
            )
        if patches is None:
            with torch.no_grad():
                patches = self.get_image_features(inputs["pixel_values"].to(self.device)).last_hidden_state
        answers = sequences[:, prompts.shape[1] :]
        is_answer = answers != self.generation_config.pad_token_id
        mask = inputs.get("attention_mask", torch.ones_like(prompts)).to(self.device)
        with torch.inference_mode(False), torch.enable_grad():  # copies: inference tensors have no gradients
            patches, answers, is_answer = patches.detach().clone().requires_grad_(), answers.clone(), is_answer.clone()
            logits = self(
                input_ids=sequences.clone(),
                attention_mask=torch.cat([mask, torch.ones_like(answers)], dim=1),
                patch_features=patches,
                logits_to_keep=answers.shape[1] + 1,
                use_cache=False,
            ).logits[:, :-1]
            log_probs = logits.float().log_softmax(dim=-1).gather(-1, answers.unsqueeze(-1)).squeeze(-1)
            (gradient,) = torch.autograd.grad((log_probs * is_answer).sum(), patches)
        weights = gradient.float().norm(dim=-1)  # (num_tiles, num_patches)
        num_tiles = (prompts == self.config.image_token_id).sum(dim=1) // self.config.image_seq_length
        rows = [row / row.sum().clamp(min=torch.finfo(row.dtype).tiny) for row in weights.split(num_tiles.tolist())]
        return self._image_maps(torch.cat(rows), image_sizes)

    def _image_maps(self, weights: torch.Tensor, image_sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Map every image, from the weights of all tiles, `(num_tiles, num_patches)`."""
        num_tiles = len(weights) // max(len(image_sizes), 1)
        if num_tiles * len(image_sizes) != len(weights):
            raise ValueError(
                f"{len(image_sizes)} images cannot have {len(weights)} tiles; pass the height and width "
                "of every image of every row, in order, as `image_sizes`."
            )
        patch_size = float(np.ravel(self.config.vision_config.patch_size)[0] / self.config.tile_size[0])
        parts = (weights[i * num_tiles : (i + 1) * num_tiles] for i in range(len(image_sizes)))
        return [heat_map(part, size, patch_size) for part, size in zip(parts, image_sizes, strict=True)]


def heat_map(weights: torch.Tensor, image_size: tuple[int, int], patch_size: float) -> torch.Tensor:
    """Spread the weights of an image's patches evenly over the pixels that they cover.

    Args:
        weights: `(num_tiles, num_patches)` of one image, which has one tile or five.
        image_size: Height and width of the image in pixels.
        patch_size: Side of a patch as a fraction of the tile's. (Patches need not fill a tile: 27 of 14 pixels are 378
            of 384.)

    Returns:
        `(height, width)`, float32: the sum of all tiles. It sums to the sum of the weights, minus the share on padding.

    Raises:
        ValueError: If an image cannot have that number of tiles.
    """
    height, width = image_size
    heat = weights.new_zeros(height, width, dtype=torch.float32)
    grids = weights.float().unflatten(1, (math.isqrt(weights.shape[1]), -1))
    for grid, (left, top, right, bottom) in zip(grids, tile_boxes(height, width, len(grids)), strict=True):
        rows = _shares(len(grid), top, patch_size * (bottom - top), height)
        columns = _shares(len(grid), left, patch_size * (right - left), width)
        heat += rows.T.to(grid) @ grid @ columns.to(grid)
    return heat


def _shares(num_patches: int, start: float, patch_size: float, num_pixels: int) -> torch.Tensor:
    """Share of every patch on every pixel along one axis, `(num_patches, num_pixels)`; a patch sums to at most 1."""
    patches = start + patch_size * torch.arange(num_patches + 1, dtype=torch.float64)
    pixels = torch.arange(num_pixels + 1, dtype=torch.float64)
    begin = torch.maximum(patches[:-1].unsqueeze(1), pixels[:-1])
    end = torch.minimum(patches[1:].unsqueeze(1), pixels[1:])
    return (end - begin).clamp(min=0) / patch_size


def pooling_to_patches(weights: torch.Tensor) -> torch.Tensor:
    """Reorder the weights of windows, `(num_tiles, num_windows, window_size**2)`, by patches.

    Returns:
        `(num_tiles, num_patches)`, patches row by row.
    """
    num_tiles, num_windows, area = weights.shape
    windows, side = math.isqrt(num_windows), math.isqrt(area)
    return weights.view(num_tiles, windows, windows, side, side).transpose(2, 3).reshape(num_tiles, -1)


def overlay(image: Image.Image, heat: torch.Tensor) -> Image.Image:
    """Draw a heat map over its image: dark where there is no heat, bright at the maximum.

    Args:
        image: The image, of any mode.
        heat: `(height, width)` of the image, not negative; scaled so that its maximum is the brightest.

    Returns:
        A new RGB image of the same size.

    Raises:
        ValueError: If image and map differ in size.
    """
    levels = heat.detach().float().cpu().numpy()
    if levels.shape != (image.height, image.width):
        raise ValueError(
            f"The map is {levels.shape[1]}x{levels.shape[0]} pixels, but the image {image.width}x{image.height}; "
            "pass the (height, width) of this image to `heat_maps`."
        )
    levels = levels / max(levels.max(), np.finfo(levels.dtype).tiny)
    steps = np.linspace(0, 1, len(HEAT_COLOURS))
    glow = np.stack([np.interp(levels, steps, values) for values in zip(*HEAT_COLOURS, strict=True)], axis=-1)
    colours, opacity = glow[..., :3], glow[..., 3:]
    pixels = np.asarray(image.convert("RGB")) * (1 - opacity) + colours * opacity
    return Image.fromarray(pixels.round().astype(np.uint8))
