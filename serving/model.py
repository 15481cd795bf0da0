"""FlashSloth as a model of vLLM: the package's own modules around one of vLLM's decoders.

    pixel_values ─ vision tower ─ patches ─ pooling, projector ─ image tokens ┐ one wide row per image token: itself and
                                         └──────────────── patches ─────────┘ the patches of its window

vLLM computes these rows once per image and hands them over with the tokens that they belong to, however it divides a
prompt into steps. `token_cache` keeps the patches, `questions` does the rest.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from flashsloth import FlashSlothConfig
from flashsloth.configuration_flashsloth import ORIGINAL_KEY_MAPPING
from flashsloth.modeling_flashsloth import (
    EmbeddedQuery,
    FlashSlothMultiModalProjector,
    SpatialAttentionPooling,
    build_vision_tower,
)

from .images import FlashSlothDummyInputs, FlashSlothImages, FlashSlothProcessingInfo
from .questions import OP_NAME, QuestionUpdater, register_update
from .token_cache import TokenCache

UNUSED_TOWER_WEIGHTS = r"^model\.vision_tower\.(post_layernorm|head)\."


@MULTIMODAL_REGISTRY.register_processor(
    FlashSlothImages, info=FlashSlothProcessingInfo, dummy_inputs=FlashSlothDummyInputs
)
class FlashSlothForVllm(nn.Module, SupportsMultiModal):
    """FlashSloth with one of vLLM's decoders.

    Args:
        vllm_config: Config of the engine, checked by `settings`.
        prefix: Prefix of the names of all layers.
    """

    requires_raw_input_tokens = True
    suppressed_ids: torch.Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: FlashSlothConfig = vllm_config.model_config.hf_config
        self.config.validate_architecture()
        text_config, vision_config = self.config.text_config, self.config.vision_config
        with self._mark_tower_model(vllm_config, "image"), initialization.no_init_weights():
            self.vision_tower = build_vision_tower(vision_config).to(vllm_config.model_config.dtype)
            self.spatial_attention_pooling = SpatialAttentionPooling(
                hidden_size=vision_config.hidden_size,
                window_size=self.config.pooling_window_size,
                dropout=self.config.pooling_dropout,
            )
            self.multi_modal_projector = FlashSlothMultiModalProjector(self.config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config,
                prefix=maybe_prefix(prefix, "language_model"),
                hf_config=text_config,
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config.model_type]],
            )
        self.query_tokens = nn.Parameter(torch.empty(self.config.num_query_tokens, text_config.hidden_size))
        self.embedded_query = EmbeddedQuery(self.config)
        # The name needs exactly one number, and one that no decoder layer has.
        name = maybe_prefix(prefix, f"token_cache.{text_config.num_hidden_layers}")
        cache = TokenCache(self.config, vllm_config=vllm_config, name=name)
        self.updater = QuestionUpdater(
            self.config,
            embedded_query=self.embedded_query,
            cache=cache,
            max_model_len=vllm_config.model_config.max_model_len,
        )
        register_update(self.language_model.model.layers[self.config.query_layer_idx], name)
        splitting_ops = vllm_config.compilation_config.splitting_ops
        if splitting_ops and f"vllm::{OP_NAME}" not in splitting_ops:
            splitting_ops.append(f"vllm::{OP_NAME}")
        self._image_tokens: tuple[torch.Tensor, torch.Tensor] | None = None  # of the coming step: indices and patches
        self.register_buffer("suppressed_ids", torch.tensor(self._suppressed_ids(vllm_config)), persistent=False)

    def _suppressed_ids(self, vllm_config: VllmConfig) -> list[int]:
        """Image and query tokens, and what the checkpoint's generation config suppresses, which vLLM does not read."""
        suppressed = vllm_config.model_config.try_get_generation_config().get("suppress_tokens") or ()
        return sorted({self.config.image_token_id, self.config.query_token_id, *suppressed})

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Text of an image in a prompt."""
        return "<image>" if modality == "image" else None

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Encode images.

        Args:
            **kwargs: `pixel_values`, `(num_tiles, 3, height, width)`, and `num_tiles` of every image,
                `(num_images,)`, on the host.

        Returns:
            For every image, a row per image token: the token and the patches of its window,
            `(num_image_tokens, hidden_size + window² · vision_hidden_size)`.
        """
        pixel_values, num_tiles = kwargs["pixel_values"], kwargs["num_tiles"].flatten().tolist()
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True)
        patches = outputs.last_hidden_state[:, -self.config.num_patches :]  # class and register tokens come first
        image_tokens = self.multi_modal_projector(self.spatial_attention_pooling(patches))
        windows = self.spatial_attention_pooling.to_windows(patches).flatten(2)
        rows = torch.cat([image_tokens, windows], dim=-1)  # (num_tiles, image_seq_length, …)
        return [tiles.flatten(0, 1) for tiles in rows.split(num_tiles)]

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed the tokens of a step, and keep the patches of its image tokens for `forward`.

        Args:
            input_ids: `(num_tokens,)`.
            multimodal_embeddings: The image tokens of the step, from `embed_multimodal`.
            is_multimodal: True at image tokens, `(num_tokens,)`, on the host.
        """
        inputs_embeds = self.language_model.embed_input_ids(input_ids)
        self._image_tokens = None
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            rows = torch.cat(list(multimodal_embeddings))
            indices = is_multimodal.nonzero().flatten()
            if input_ids.is_cuda and not indices.is_cuda:
                indices = indices.pin_memory()
            indices = indices.to(input_ids.device, non_blocking=True)
            image_tokens, patches = rows.split([inputs_embeds.shape[-1], rows.shape[-1] - inputs_embeds.shape[-1]], -1)
            inputs_embeds = inputs_embeds.index_copy(0, indices, image_tokens.to(inputs_embeds.dtype))
            self._image_tokens = indices, patches
        return inputs_embeds

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute the last hidden states of a step's tokens.

        Args:
            input_ids: Ids, `(num_tokens,)`, perhaps with padding.
            positions: Positions in their requests, `(num_tokens,)`.
            intermediate_tensors: Unused: there is no pipeline parallelism.
            inputs_embeds: Embeddings from `embed_input_ids`, `(num_tokens, hidden_size)`; query tokens are inserted
                in place.
            **kwargs: Unused.

        Returns:
            `(num_tokens, hidden_size)`.
        """
        image_tokens, patches = self._image_tokens or (None, None)
        self._image_tokens = None
        self.updater.begin_step(input_ids, image_tokens, patches)
        if self.updater.questions is not None:
            self.updater.questions.insert_queries(inputs_embeds, self._query_embeddings())
        return self.language_model(None, positions, intermediate_tensors, inputs_embeds)

    def _query_embeddings(self) -> torch.Tensor:
        if self.config.query_anchor_token_id is None:
            return self.query_tokens
        anchor = torch.full((1,), self.config.query_anchor_token_id, device=self.query_tokens.device)
        return self.query_tokens + self.language_model.embed_input_ids(anchor)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Compute logits `(num_tokens, vocab_size)`; tokens that must not be generated get minus infinity."""
        logits = self.language_model.compute_logits(hidden_states)
        return None if logits is None else logits.index_fill_(-1, self.suppressed_ids, float("-inf"))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint in this package's layout or in that of the original releases.

        Returns:
            Names of the parameters that were loaded.
        """
        unused_layer = self.config.vision_config.num_hidden_layers
        unused = [UNUSED_TOWER_WEIGHTS, rf"^model\.vision_tower\.encoder\.layers\.{unused_layer}\."]
        # An original release names its tower first, so renamed tensors can still be unused.
        renamed = {re.compile(pattern): new for pattern, new in ORIGINAL_KEY_MAPPING.items()}
        mapper = WeightsMapper(
            orig_to_new_regex=renamed | self._tower_renamings() | {re.compile(pattern): None for pattern in unused},
            orig_to_new_prefix={
                "model.language_model.": "language_model.model.",
                "lm_head.": "language_model.lm_head.",
                "model.": "",
            },
        )
        return AutoWeightsLoader(self).load_weights(weights, mapper=mapper)

    def _tower_renamings(self) -> dict[re.Pattern, str]:
        """How transformers renames the weights of towers whose modules have other names than their files."""
        return {
            re.compile(rf"^(model\.vision_tower\..*?){source}"): rf"\g<1>{target}"
            for conversion in get_model_conversion_mapping(self.vision_tower)
            if isinstance(conversion, WeightRenaming)
            for source, target in zip(conversion.source_patterns, conversion.target_patterns, strict=True)
        }
