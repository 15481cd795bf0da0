"""What `generate` must know of FlashSloth: which pixels go with which call, and with which row."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin

from .prompt_flashsloth import PromptSpans


class FlashSlothGenerationMixin(GenerationMixin):
    """`generate` for a model whose `pixel_values` are flat: all tiles of all rows, in order."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        pixel_values: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step of `generate`: pixels go with every call that may hold image or query tokens."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if next_sequence_length == 1 and not is_first_iteration:
            return model_inputs
        prompt, fed = input_ids, model_inputs["input_ids"]
        if model_inputs.get("inputs_embeds") is not None:
            prompt, fed = self.model.find_special_ids(inputs_embeds), model_inputs["inputs_embeds"]
        cached = prompt[:, : prompt.shape[1] - fed.shape[1]]
        model_inputs["pixel_values"] = pixel_values
        if cached.shape[1]:
            num_cached_tokens = (cached == self.config.image_token_id).sum(dim=1)
            model_inputs["num_cached_tiles"] = num_cached_tokens // self.config.image_seq_length
        return model_inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        """Repeat every row `expand_size` times, with its own tiles; rows may have different numbers of them."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1:
            embeds = model_kwargs.get("inputs_embeds")
            prompt = input_ids if embeds is None else self.model.find_special_ids(embeds)
            spans = PromptSpans.find(prompt, self.config, None)
            spans.check(self.config, len(pixel_values))
            tiles_of_row = pixel_values.split((spans.num_image_tokens // self.config.image_seq_length).tolist())
            pixel_values = torch.cat([tiles.repeat(expand_size, 1, 1, 1) for tiles in tiles_of_row])
        # By name: a static method in transformers 5.17, an ordinary one since.
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs
