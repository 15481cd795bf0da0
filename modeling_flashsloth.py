r"""FlashSloth: a vision-language model whose decoder sees an image as a few tokens, and looks back when it is asked.

Paper: "FlashSloth: Lightning Multimodal Large Language Models via Embedded Visual Compression", arXiv 2412.04317.
With the released sizes, for one tile (a plain image is one tile, a high-definition image five):

    pixel_values (3, 384, 384) ─ vision tower ─ patch features (729, 1152)
      ├─ SpatialAttentionPooling over 3×3 windows ─ (81, 1152) ─ projector ─ 81 image tokens (81, 2560) of the prompt
      └─ kept, unpooled, for EmbeddedQuery
    prompt: … USER: <image>×81 \n question <query>×9 ASSISTANT: …
    decoder layers 0–6 ─ EmbeddedQuery updates the query tokens from question and patches ─ decoder layers 7–31

Which tokens are images, queries and questions follows from `input_ids` alone, by masks over the sequence: no loops,
no padding copies, nothing kept between calls.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.import_utils import is_tracing

from .backbones_flashsloth import CACHE_NAME, CACHE_NAMES, build_decoder, build_vision_tower, one_cache, scale_logits
from .configuration_flashsloth import FlashSlothConfig
from .generation_flashsloth import FlashSlothGenerationMixin
from .original_flashsloth import ORIGINAL_KEY_MAPPING, leave_original_layout
from .prompt_flashsloth import PromptSizes, PromptSpans
from .saliency_flashsloth import FlashSlothSaliencyMixin, QueryRecorder
from .training_flashsloth import FlashSlothTrainingMixin

FUSED_HEAD_DIM_MULTIPLE = 8  # what the fused CUDA attention kernels take
PACKING = ("cu_seq_lens_q", "seq_idx")  # how transformers' collators mark packed samples, besides positions
RECORDS = ("output_attentions", "output_hidden_states")  # what a call or a config may ask for


@dataclass
class FlashSlothModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `FlashSlothModel`.

    Attributes:
        image_hidden_states: Image tokens of all tiles, `(num_tiles, image_seq_length, hidden_size)`.
        image_outputs: What `get_image_features` gives of all tiles; `None`: there are none. Recent models of
            transformers have it, too.
        pooling_attentions: With `output_attentions`, weights of the patches of every pooling window, which sum to 1,
            `(num_tiles, num_windows, pooling_window_size**2)`, float32.
        query_attentions: With `output_attentions`, attention of the queries of every question, row by row, to the
            patches of its row, `(num_questions, num_query_heads, num_query_tokens, tiles_per_row * num_patches)`,
            float32; sums to 1 over the patches that the question may see, and is 0 elsewhere.
    """

    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    pooling_attentions: torch.FloatTensor | None = None
    query_attentions: torch.FloatTensor | None = None


@dataclass
class FlashSlothCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `FlashSlothForConditionalGeneration`; for its own attributes see `FlashSlothModelOutputWithPast`."""

    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    pooling_attentions: torch.FloatTensor | None = None
    query_attentions: torch.FloatTensor | None = None


class SpatialAttentionPooling(nn.Module):
    """Pools every window of the patch grid into one feature, by attention inside the window (paper, section 3.2).

    Args:
        hidden_size: Width of the patch features.
        window_size: Side of a window, in patches.
        dropout: Dropout between the two layers that score a patch.
    """

    def __init__(self, *, hidden_size: int, window_size: int, dropout: float) -> None:
        super().__init__()
        self.window_size = window_size
        self.fc1 = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_size, 1)

    def window_weights(self, patch_features: torch.Tensor) -> torch.Tensor:
        """Attention weights inside every window.

        Args:
            patch_features: `(num_tiles, num_patches, hidden_size)`, patches row by row.

        Returns:
            `(num_tiles, num_windows, window_size**2)`, float32; the last axis sums to 1.
        """
        scores = self.fc2(self.dropout(nn.functional.relu(self.fc1(patch_features))))
        return self._to_windows(scores).squeeze(-1).float().softmax(dim=-1)

    def forward(self, patch_features: torch.Tensor) -> torch.Tensor:
        """Pool patch features.

        Args:
            patch_features: `(num_tiles, num_patches, hidden_size)`, patches row by row.

        Returns:
            `(num_tiles, num_windows, hidden_size)`, windows row by row.
        """
        weights = self.window_weights(patch_features).to(patch_features.dtype)
        return torch.einsum("twp,twpd->twd", weights, self._to_windows(patch_features))

    def _to_windows(self, patches: torch.Tensor) -> torch.Tensor:
        num_tiles, num_patches, width = patches.shape
        side = self.window_size
        windows = math.isqrt(num_patches) // side
        patches = patches.view(num_tiles, windows, side, windows, side, width).transpose(2, 3)
        return patches.reshape(num_tiles, windows**2, side**2, width)


class FlashSlothMultiModalProjector(nn.Module):
    """Two linear layers with an exact GELU between them, from the tower's width to the decoder's."""

    def __init__(self, config: FlashSlothConfig) -> None:
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, hidden_size)
        self.act = ACT2FN["gelu"]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """Project `(…, vision_hidden_size)` to `(…, hidden_size)`."""
        return self.linear_2(self.act(self.linear_1(image_features)))


class CrossAttention(nn.Module):
    """Multi-head attention without output projection, whose values may be wider than its queries and keys."""

    def __init__(self, *, hidden_size: int, value_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(value_size, value_size)

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Attend.

        The head dimensions are padded with zeros to a common multiple of 8, so that CUDA takes a fused kernel; all
        of them do the softmax in float32.

        Args:
            queries: `(batch, num_queries, hidden_size)`.
            keys: What `k_proj` gave, `(batch, num_keys, hidden_size)`.
            values: What `v_proj` gave, `(batch, num_keys, value_size)`.
            mask: True where a query may look, `(batch, num_queries, num_keys)`.

        Returns:
            `(batch, num_queries, value_size)`; zeros for queries that may look at nothing.
        """
        value_size = values.shape[-1]
        queries, keys, values = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (batch, num_heads, length, head_dim)
            for states in (self.q_proj(queries), keys, values)
        )
        query_dim, value_dim = queries.shape[-1], values.shape[-1]
        padded_dim = -(-max(query_dim, value_dim) // FUSED_HEAD_DIM_MULTIPLE) * FUSED_HEAD_DIM_MULTIPLE
        queries, keys, values = (
            nn.functional.pad(states, (0, padded_dim - states.shape[-1])) for states in (queries, keys, values)
        )
        sees_any = mask.any(dim=-1, keepdim=True)
        # A row of a softmax needs something to look at, or its gradient is NaN; its output is dropped below.
        attended = nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=(mask | ~sees_any).unsqueeze(1), scale=query_dim**-0.5
        )
        attended = attended[..., :value_dim].transpose(1, 2).reshape(*sees_any.shape[:2], value_size)
        return attended.masked_fill(~sees_any, 0.0)


class QueryContext(NamedTuple):
    """What the Embedded Query module needs of one forward call, beside the hidden states.

    It travels as a keyword argument through the decoder, and is gone with the call.

    Attributes:
        patch_features: Of all tiles of all rows, `(num_tiles, num_patches, vision_hidden_size)`.
        tiles: Which tiles belong to a row, `(batch, tiles_per_row)`.
        query_positions: Where a row's queries are, and other tokens if it has fewer, `(batch, queries_per_row)`.
        patch_mask: True where a query may read a patch, `(batch, queries_per_row, tiles_per_row * num_patches)`.
        instruction_mask: True where a query may read a token, `(batch, queries_per_row, seq_length)`.
        update_mask: True at the queries that have an image before them, `(batch, queries_per_row)`.
        recorder: Takes down where the queries look, if somebody asked.
    """

    patch_features: torch.Tensor
    tiles: torch.LongTensor
    query_positions: torch.LongTensor
    patch_mask: torch.Tensor
    instruction_mask: torch.Tensor
    update_mask: torch.Tensor
    recorder: QueryRecorder | None = None


class EmbeddedQuery(nn.Module):
    """The Embedded Query module (paper, section 3.3): queries read their question, then the patches of its images."""

    def __init__(self, config: FlashSlothConfig) -> None:
        super().__init__()
        width, vision_width = config.query_hidden_size, config.vision_config.hidden_size
        hidden_size, num_heads = config.text_config.hidden_size, config.num_query_heads
        self.text_proj = nn.Linear(hidden_size, width)
        self.image_proj = nn.Linear(vision_width, width)
        self.query_norm = nn.LayerNorm(width)
        self.text_norm = nn.LayerNorm(width)
        self.image_norm = nn.LayerNorm(width)
        self.text_attention = CrossAttention(hidden_size=width, value_size=width, num_heads=num_heads)
        self.image_attention = CrossAttention(hidden_size=width, value_size=vision_width, num_heads=num_heads)
        self.out_proj = nn.Linear(vision_width, hidden_size)

    def forward(self, hidden_states: torch.Tensor, context: QueryContext) -> torch.Tensor:
        """Update the queries.

        Args:
            hidden_states: What enters the decoder layer, `(batch, seq_length, hidden_size)`.
            context: Which positions are queries, and what they may read.

        Returns:
            The hidden states, changed at the queries of `context.update_mask` only; a new tensor.
        """
        positions = context.query_positions.unsqueeze(-1)  # (batch, queries_per_row, 1)
        text = self.text_proj(hidden_states)
        instruction = self.text_norm(text)
        guided = self.text_attention(
            self.query_norm(text.gather(1, positions.expand(-1, -1, text.shape[-1]))),
            self.text_attention.k_proj(instruction),
            self.text_attention.v_proj(instruction),
            context.instruction_mask,
        )
        # Every tile once, then gathered into rows: (batch, tiles_per_row * num_patches, width)
        patch_keys = self.image_attention.k_proj(self.image_norm(self.image_proj(context.patch_features)))
        patch_values = self.image_attention.v_proj(context.patch_features)
        keys, values = (states[context.tiles].flatten(1, 2) for states in (patch_keys, patch_values))
        seen = self.image_attention(guided, keys, values, context.patch_mask)
        if context.recorder is not None:
            num_heads = self.image_attention.num_heads
            context.recorder.record(self.image_attention.q_proj(guided), keys, context.patch_mask, num_heads)
        positions = positions.expand(-1, -1, hidden_states.shape[-1])
        queries = hidden_states.gather(1, positions)
        queries = torch.where(context.update_mask.unsqueeze(-1), queries + self.out_proj(seen), queries)
        return hidden_states.scatter(1, positions, queries)


class FlashSlothPreTrainedModel(FlashSlothTrainingMixin):
    """Loading, saving and initialisation, common to all FlashSloth models."""

    config_class = FlashSlothConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: FlashSlothConfig) -> None:
        super().__init__(config)
        # An original release holds the whole tower; what FlashSloth does not use of it is not worth a warning.
        unused_layer = config.vision_config.num_hidden_layers
        self._keys_to_ignore_on_load_unexpected = [
            r"vision_tower\.(post_layernorm|head)\.",
            rf"vision_tower\.encoder\.layers\.{unused_layer}\.",
        ]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Tower and decoder take what `set_attn_implementation` sets; transformers would guess from the source."""
        return True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlashSlothModel):
            init.normal_(module.query_tokens, std=getattr(self.config.text_config, "initializer_range", None) or 0.02)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a FlashSloth, in this package's layout or in that of the original releases.

        See `PreTrainedModel.from_pretrained`. Tensors under their original names are renamed while they are read.
        """
        kwargs.setdefault("key_mapping", ORIGINAL_KEY_MAPPING)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        leave_original_layout(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded


class FlashSlothModel(FlashSlothPreTrainedModel):
    """FlashSloth without the language-modelling head."""

    def __init__(self, config: FlashSlothConfig) -> None:
        config.validate_architecture()
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected.append(r"^lm_head\.")  # of a checkpoint of the whole model
        self.vision_tower = build_vision_tower(config.vision_config)
        self.spatial_attention_pooling = SpatialAttentionPooling(
            hidden_size=config.vision_config.hidden_size,
            window_size=config.pooling_window_size,
            dropout=config.pooling_dropout,
        )
        self.multi_modal_projector = FlashSlothMultiModalProjector(config)
        self.language_model = build_decoder(config.text_config)
        self.query_tokens = nn.Parameter(torch.empty(config.num_query_tokens, config.text_config.hidden_size))
        self.embedded_query = EmbeddedQuery(config)
        # A bound method, so that a deep copy of the model calls its own module.
        layer = self.language_model.layers[config.query_layer_idx]
        layer.register_forward_pre_hook(self._update_queries, with_kwargs=True)
        self.post_init()

    def _update_queries(self, _layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        context = kwargs.pop("query_context", None)
        if context is None:
            return None
        if args:
            return (self.embedded_query(args[0], context), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.embedded_query(kwargs["hidden_states"], context)}

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """Encode tiles.

        Args:
            pixel_values: `(num_tiles, 3, height, width)`, in [-1, 1] with the usual mean and deviation of 0.5.
            **kwargs: Passed on to the vision tower, such as `output_hidden_states`; `return_dict=False` gives a tuple.

        Returns:
            `last_hidden_state`: patch features, `(num_tiles, num_patches, vision_hidden_size)`; `pooler_output`: image
            tokens, `(num_tiles, image_seq_length, hidden_size)`; if asked for, the tower's `hidden_states` and
            `attentions`, with the tokens that it has besides patches.

        Raises:
            ValueError: If the images are not of the size that the tower takes.
        """
        features = self._encode(pixel_values, **self._with_config_defaults(kwargs))
        features.pooler_output = self._pool(features.last_hidden_state)
        return features

    def _encode(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        grid, size = self.config.patch_grid_size, self.config.tile_size
        if pixel_values.ndim != 4 or pixel_values.shape[-2:] != size:
            raise ValueError(
                f"`pixel_values` must be (num_tiles, channels, {size[0]}, {size[1]}), but is "
                f"{tuple(pixel_values.shape)}; build it with `FlashSlothProcessor`, whose image processor's `size` "
                "must be the vision tower's."
            )
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state[:, -(grid**2) :],  # class and register tokens stand in front
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def _image_features(
        self, pixel_values: torch.Tensor | None, patch_features: torch.Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling | None:
        """What the tower makes of the tiles, or made of them before; not pooled yet."""
        if patch_features is None:
            records = _without_fused_attentions({name: kwargs.get(name) for name in RECORDS}, self.vision_tower)
            return self._encode(pixel_values, **records) if pixel_values is not None and len(pixel_values) else None
        expected = (self.config.num_patches, self.config.vision_config.hidden_size)
        if pixel_values is not None or patch_features.shape[1:] != expected:
            raise ValueError(
                f"`patch_features` must be (num_tiles, {expected[0]}, {expected[1]}) and stand in the place of "
                f"`pixel_values`, but are {tuple(patch_features.shape)}"
                f"{'' if pixel_values is None else ' beside `pixel_values`'}; give `last_hidden_state` of "
                "`get_image_features`, and one of the two."
            )
        return BaseModelOutputWithPooling(last_hidden_state=patch_features)

    def _pool(self, patch_features: torch.Tensor) -> torch.Tensor:
        return self.multi_modal_projector(self.spatial_attention_pooling(patch_features))

    def find_special_ids(self, inputs_embeds: torch.Tensor) -> torch.LongTensor:
        """Recover the ids that matter to FlashSloth from token embeddings.

        Args:
            inputs_embeds: Embeddings as the decoder's own table gives them, `(batch, seq_length, hidden_size)`.

        Returns:
            `(batch, seq_length)`: the id of every image token, query token and part of an instruction pattern; -1
            elsewhere.
        """
        config = self.config
        special = {config.image_token_id, config.query_token_id, *(i for p in config.instruction_start_ids for i in p)}
        ids = inputs_embeds.new_full(inputs_embeds.shape[:2], -1, dtype=torch.long)
        for token_id in sorted(special):
            embedding = self.get_input_embeddings()(ids.new_full((1, 1), token_id))
            ids = torch.where((inputs_embeds == embedding).all(dim=-1), token_id, ids)
        return ids

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_cached_tiles: torch.LongTensor | None = None,
        begins_instruction: torch.BoolTensor | None = None,
        patch_features: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | FlashSlothModelOutputWithPast:
        """Run the model.

        Args:
            input_ids: Prompt with expanded placeholders, `(batch, seq_length)`: `image_seq_length` image tokens a tile
                and `num_query_tokens` query tokens a question.
            pixel_values: All tiles of all images of all rows, in order, `(num_tiles, 3, height, width)`. How many
                belong to a row follows from its image tokens. Rows may have any number.
            attention_mask: `(batch, seq_length)`, 0 at padding, on either side.
            position_ids: `(batch, seq_length)`. Without `attention_mask` and cache, a row may hold several samples, one
                after the other: each begins where the positions start anew, and reads nothing of the others. Such a
                call leaves no cache.
            past_key_values: Cache of what came before. A question on an image that is in the cache needs
                `pixel_values` again, for the queries read its patches.
            inputs_embeds: Token embeddings instead of `input_ids`, `(batch, seq_length, hidden_size)`; placeholders are
                recognised by their embeddings.
            num_cached_tiles: Number of tiles of every row whose image tokens are in the cache, `(batch,)`; their
                pixels come first in the row's part of `pixel_values`. `generate` sets it.
            begins_instruction: Whether a question starts with a row's first token, as the cache tells, `(batch,)`.
                `generate` sets it.
            patch_features: Instead of `pixel_values`, what the vision tower made of them: `last_hidden_state` of
                `get_image_features`, `(num_tiles, num_patches, vision_hidden_size)`.
            cache: Another name of `past_key_values`, that of transformers since 5.24.
            **kwargs: Passed on to the decoder.

        Returns:
            Last hidden state `(batch, seq_length, hidden_size)`, cache, image tokens.

        Raises:
            ValueError: If ids and images contradict each other, a prompt was cut between a question and its queries,
                there are two caches, or samples are packed in a way that would mix them.
            RuntimeError: If this is a copy that `nn.DataParallel` made.
        """
        self._check_call(input_ids, inputs_embeds, position_ids, kwargs)
        cache, kwargs = one_cache(cache, past_key_values), self._decoder_kwargs(kwargs)
        is_prompt = (input_ids if inputs_embeds is None else inputs_embeds).shape[1] > 1
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        elif is_prompt:
            input_ids = self.find_special_ids(inputs_embeds)
        features = context = None
        if is_prompt:  # a single token is a step of `generate`, and holds neither image nor question
            is_plain_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
            positions = position_ids if cache is None and getattr(position_ids, "ndim", 0) == 2 else None
            packed_positions = None if is_plain_mask else positions
            spans = PromptSpans.find(input_ids, self.config, num_cached_tiles, begins_instruction, packed_positions)
            mask = attention_mask if is_plain_mask else None
            counts = None if is_tracing(inputs_embeds) else spans.count(self.config, mask, positions)
            features = self._image_features(pixel_values, patch_features, **kwargs)
            num_tiles = 0 if features is None else len(features.last_hidden_state)
            sizes = spans.bounds(self.config, num_tiles) if counts is None else counts.check(self.config, num_tiles)
            inputs_embeds, features, context = self._embed_prompt(inputs_embeds, features, spans, sizes)
            if features is not None and kwargs.get("output_attentions"):
                context = self._recorded(context, spans)
            # The decoder would read the mask to see that it is not needed. Without a cache, it needs one beside
            # `position_ids`, from which it would guess at packed sequences otherwise.
            if is_plain_mask and not sizes.is_padded and (position_ids is None or cache is not None):
                attention_mask = None
            if sizes.is_packed:
                kwargs["use_cache"] = False  # with a cache of its own the decoder would not keep samples apart
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            query_context=context,
            **{CACHE_NAME: cache},
            **_without_fused_attentions(kwargs, self.language_model),
        )
        return FlashSlothModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **self._image_outputs(features, context),
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _check_call(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "FlashSloth cannot run under `nn.DataParallel`, which would divide the tiles of a batch without regard "
                "to whose they are; `Trainer` uses it if one process sees several GPUs. Start one process for each "
                "GPU, `torchrun --nproc_per_node NUM_GPUS train.py`, or show it one only: `CUDA_VISIBLE_DEVICES=0`."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("`input_ids` or `inputs_embeds` is needed, and not both; leave one of them out.")
        if position_ids is None and (packing := [name for name in PACKING if kwargs.get(name) is not None]):
            raise ValueError(
                f"`{packing[0]}` says that samples are packed, but there are no `position_ids`, from which FlashSloth "
                "tells them apart; give positions that start anew with each sample."
            )

    def _with_config_defaults(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the config says of a call, where the call says nothing."""
        asked = {name: True for name in RECORDS if getattr(self.config, name, False)}
        return asked | {name: value for name, value in kwargs.items() if value is not None}

    def _decoder_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = self._with_config_defaults(kwargs)
        # Layers that are recomputed would warn of a cache. Others keep it: without one, the decoder looks for packed
        # samples, for which it waits for the device, and where it is traced it builds a mask.
        if self.training and getattr(self.language_model, "gradient_checkpointing", False):
            kwargs.setdefault("use_cache", False)
        return kwargs

    def _recorded(self, context: QueryContext, spans: PromptSpans) -> QueryContext:
        is_query = spans.query_mask.gather(1, context.query_positions)
        return context._replace(recorder=QueryRecorder(is_query, self.config.num_query_tokens))

    def _image_outputs(self, features: BaseModelOutputWithPooling | None, context: QueryContext | None) -> dict:
        """What a call gives besides the decoder's outputs, if there are images."""
        if features is None:
            return {}
        outputs = {"image_hidden_states": features.pooler_output, "image_outputs": features}
        if context.recorder is not None:
            outputs["pooling_attentions"] = self.spatial_attention_pooling.window_weights(features.last_hidden_state)
            outputs["query_attentions"] = context.recorder.weights
        return outputs

    def _embed_prompt(
        self,
        inputs_embeds: torch.Tensor,
        features: BaseModelOutputWithPooling | None,
        spans: PromptSpans,
        sizes: PromptSizes,
    ) -> tuple[torch.Tensor, BaseModelOutputWithPooling | None, QueryContext | None]:
        """Put query and image tokens in their places, and gather what the Embedded Query module needs."""
        inputs_embeds = self._insert_query_tokens(inputs_embeds, spans)
        is_blank = not sizes.tiles_per_row
        if is_blank:
            if not self.touches_every_module():
                return inputs_embeds, None, None
            # An image that no token stands for and no query reads: all its gradients are zero.
            features, sizes = self._encode(self._blank_tile(inputs_embeds)), sizes._replace(tiles_per_row=1)
        patches = features.last_hidden_state
        features.pooler_output = self._pool(patches).to(inputs_embeds)
        inputs_embeds = self._insert_image_tokens(inputs_embeds, features.pooler_output, spans)
        return inputs_embeds, None if is_blank else features, self._query_context(patches, spans, sizes)

    def _blank_tile(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        num_channels = getattr(self.config.vision_config, "num_channels", 3)
        return inputs_embeds.new_zeros(1, num_channels, *self.config.tile_size)

    def _insert_query_tokens(self, inputs_embeds: torch.Tensor, spans: PromptSpans) -> torch.Tensor:
        queries = self.query_tokens.to(inputs_embeds)
        if self.config.query_anchor_token_id is not None:
            # As long as a row, so that the noise of NEFTune, which goes by length, is the same as on other tokens.
            anchor = spans.query_start.new_full((1, inputs_embeds.shape[1]), self.config.query_anchor_token_id)
            queries = queries[spans.query_rank] + self.get_input_embeddings()(anchor)
        else:
            queries = queries[spans.query_rank]  # (batch, seq_length, hidden_size)
        return torch.where(spans.query_mask.unsqueeze(-1), queries, inputs_embeds)

    def _insert_image_tokens(
        self, inputs_embeds: torch.Tensor, image_tokens: torch.Tensor, spans: PromptSpans
    ) -> torch.Tensor:
        first_token = (spans.first_tile + spans.num_cached_tiles) * self.config.image_seq_length  # (batch,)
        ranks = first_token.unsqueeze(1) + spans.image_mask.cumsum(dim=1) - 1
        image_tokens = image_tokens.flatten(0, 1)
        image_tokens = image_tokens[ranks.clamp(0, image_tokens.shape[0] - 1)]  # (batch, seq_length, hidden_size)
        return torch.where(spans.image_mask.unsqueeze(-1), image_tokens, inputs_embeds)

    def _query_context(self, patches: torch.Tensor, spans: PromptSpans, sizes: PromptSizes) -> QueryContext:
        slots = torch.arange(sizes.tiles_per_row, device=spans.query_mask.device)
        tiles = (spans.first_tile.unsqueeze(1) + slots).clamp(max=patches.shape[0] - 1)  # (batch, tiles_per_row)
        query_positions = spans.query_positions(sizes.queries_per_row)

        def at_queries(fact: torch.Tensor) -> torch.Tensor:
            return fact.gather(1, query_positions).unsqueeze(-1)  # (batch, queries_per_row, 1)

        is_query, num_tiles = at_queries(spans.query_mask), at_queries(spans.num_tiles_before)
        instruction_start, instruction_end = at_queries(spans.instruction_start), at_queries(spans.query_start)
        is_read = slots < num_tiles
        if spans.num_foreign_tiles is not None:
            is_read = is_read & (slots >= at_queries(spans.num_foreign_tiles))
        tokens = torch.arange(spans.query_mask.shape[1], device=spans.query_mask.device)
        instruction = (tokens >= instruction_start) & (tokens < instruction_end)
        return QueryContext(
            patch_features=patches,
            tiles=tiles,
            query_positions=query_positions,
            patch_mask=is_read.repeat_interleave(patches.shape[1], dim=-1),
            instruction_mask=instruction & is_query,
            update_mask=(is_query & is_read.any(dim=-1, keepdim=True)).squeeze(-1),
        )


class FlashSlothForConditionalGeneration(FlashSlothPreTrainedModel, FlashSlothSaliencyMixin, FlashSlothGenerationMixin):
    """FlashSloth with its language-modelling head: answers questions about images."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: FlashSlothConfig) -> None:
        super().__init__(config)
        self.model = FlashSlothModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def _get_name(self) -> str:
        """The name by which `Trainer` knows that `label_smoothing_factor` has to shift labels; subclasses keep it."""
        return FlashSlothForConditionalGeneration.__name__

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """Encode tiles; see `FlashSlothModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        patch_features: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | FlashSlothCausalLMOutputWithPast:
        """Run the model and its head; see `FlashSlothModel.forward` for what both take.

        Args:
            input_ids: `(batch, seq_length)`.
            pixel_values: `(num_tiles, 3, height, width)`.
            attention_mask: `(batch, seq_length)`.
            position_ids: `(batch, seq_length)`.
            past_key_values: Cache of what came before.
            inputs_embeds: `(batch, seq_length, hidden_size)`, instead of `input_ids`.
            patch_features: `(num_tiles, num_patches, vision_hidden_size)`, instead of `pixel_values`.
            cache: Another name of `past_key_values`.
            labels: Ids to predict, `(batch, seq_length)`, -100 where nothing is to be learned; not shifted.
            logits_to_keep: Number of last positions whose logits are wanted, or their indices; 0: all.
            **kwargs: Passed on to the decoder and to the loss, such as `num_items_in_batch`.

        Returns:
            Loss if there are labels, logits `(batch, seq_length, vocab_size)`, cache, image tokens.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            patch_features=patch_features,
            cache=cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = scale_logits(self.lm_head(outputs.last_hidden_state[:, kept]), self.config.text_config)
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        kept_outputs = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return FlashSlothCausalLMOutputWithPast(loss=loss, logits=logits, **kept_outputs)


def _without_fused_attentions(kwargs: dict[str, Any], backbone: PreTrainedModel) -> dict[str, Any]:
    """Arguments of a backbone; fused attention has no `output_attentions` to give, and would warn."""
    is_eager = backbone.config._attn_implementation == "eager"
    return {name: value for name, value in kwargs.items() if is_eager or name != "output_attentions"}


__all__ = ["FlashSlothForConditionalGeneration", "FlashSlothModel", "FlashSlothPreTrainedModel"]
