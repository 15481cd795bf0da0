r"""FlashSloth: a vision-language model that reads an image as a few tokens and looks up details per question.

Paper: "FlashSloth: Lightning Multimodal Large Language Models via Embedded Visual Compression", arXiv 2412.04317.
With the released sizes, for one tile (a plain image is one tile, FlashSloth-HD cuts an image into five):

    pixel_values (3, 384, 384) ─ vision tower ─ patch features (729, 1152)
      ├─ SpatialAttentionPooling over 3×3 windows ─ (81, 1152) ─ projector ─ 81 image tokens (81, 2560) in the prompt
      └─ kept unpooled for EmbeddedQuery
    prompt: … USER: <image>×81 \n question <query>×9 ASSISTANT: …
    decoder layers 0–6 ─ EmbeddedQuery updates the query tokens from question and patches ─ decoder layers 7–31

The file follows that order: pooling, projector, Embedded Query, the layout of a prompt (`PromptSpans`), the two
backbones, the model, and the model with its language-modelling head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.cache_utils import Cache
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.import_utils import is_tracing

from .configuration_flashsloth import ORIGINAL_KEY_MAPPING, FlashSlothConfig, original_generation_config
from .generation_flashsloth import CACHE_NAME, CACHE_NAMES, OPTIONAL_OUTPUTS, CompiledCache, FlashSlothGenerationMixin
from .saliency_flashsloth import FlashSlothSaliencyMixin

FUSED_HEAD_DIM_MULTIPLE = 8  # required by the fused CUDA attention kernels
PACKING_ARGUMENTS = ("cu_seq_lens_q", "seq_idx")  # mark packed samples in transformers' collators, besides positions
UNUSED_TOWER_PARTS = ("post_layernorm", "layernorm", "norm", "rms_norm", "pooler", "head")
SHARDED_CLASS_PREFIX = "FSDP"  # PyTorch's `fully_shard` replaces a model's class by a subclass with this prefix


@dataclass
class FlashSlothModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `FlashSlothModel`.

    Attributes:
        image_hidden_states: Image tokens of all tiles, `(num_tiles, image_seq_length, hidden_size)`.
        image_outputs: Output of `get_image_features` for all tiles; `None` if there are none.
        pooling_attentions: With `output_attentions`, weights of the patches in every pooling window, which sum to 1,
            `(num_tiles, num_windows, pooling_window_size**2)`, float32.
        query_attentions: With `output_attentions`, attention of every question's query tokens, row by row, to the
            patches of its row, `(num_questions, num_query_heads, num_query_tokens, tiles_per_row * num_patches)`,
            float32; sums to 1 over the patches that the question may see and is 0 elsewhere.
    """

    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    pooling_attentions: torch.FloatTensor | None = None
    query_attentions: torch.FloatTensor | None = None


@dataclass
class FlashSlothCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `FlashSlothForConditionalGeneration`; see `FlashSlothModelOutputWithPast` for the four fields."""

    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    pooling_attentions: torch.FloatTensor | None = None
    query_attentions: torch.FloatTensor | None = None


class SpatialAttentionPooling(nn.Module):
    """Pools every window of the patch grid into one feature by attention within the window (paper, section 3.2).

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
        """Compute the attention weights within every window.

        Args:
            patch_features: `(num_tiles, num_patches, hidden_size)`, patches row by row.

        Returns:
            `(num_tiles, num_windows, window_size**2)`, float32; the last axis sums to 1.
        """
        scores = self.fc2(self.dropout(nn.functional.relu(self.fc1(patch_features))))
        return self.to_windows(scores).squeeze(-1).float().softmax(dim=-1)

    def forward(self, patch_features: torch.Tensor) -> torch.Tensor:
        """Pool patch features.

        Args:
            patch_features: `(num_tiles, num_patches, hidden_size)`, patches row by row.

        Returns:
            `(num_tiles, num_windows, hidden_size)`, windows row by row.
        """
        weights = self.window_weights(patch_features).to(patch_features.dtype)
        return torch.einsum("twp,twpd->twd", weights, self.to_windows(patch_features))

    def to_windows(self, patches: torch.Tensor) -> torch.Tensor:
        """Group patches `(num_tiles, num_patches, width)` as `(num_tiles, num_windows, window_size**2, width)`."""
        num_tiles, num_patches, width = patches.shape
        side = self.window_size
        windows = math.isqrt(num_patches) // side
        patches = patches.view(num_tiles, windows, side, windows, side, width).transpose(2, 3)
        return patches.reshape(num_tiles, windows**2, side**2, width)


class FlashSlothMultiModalProjector(nn.Module):
    """Two linear layers with an exact GELU between them, from the vision tower's width to the decoder's."""

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
    """Multi-head attention without an output projection; values may be wider than queries and keys."""

    def __init__(self, *, hidden_size: int, value_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(value_size, value_size)

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Attend from queries to keys.

        Head dimensions are padded with zeros to a common multiple of 8, so that CUDA selects a fused kernel; all of
        these kernels compute the softmax in float32.

        Args:
            queries: `(batch, num_queries, hidden_size)`.
            keys: Output of `k_proj`, `(batch, num_keys, hidden_size)`.
            values: Output of `v_proj`, `(batch, num_keys, value_size)`.
            mask: True where a query may attend to a key, `(batch, num_queries, num_keys)`.

        Returns:
            `(batch, num_queries, value_size)`; zeros for queries that may attend to no key.
        """
        value_size = values.shape[-1]
        queries, keys, values = (self._split_heads(states) for states in (self.q_proj(queries), keys, values))
        query_dim, value_dim = queries.shape[-1], values.shape[-1]
        padded_dim = -(-max(query_dim, value_dim) // FUSED_HEAD_DIM_MULTIPLE) * FUSED_HEAD_DIM_MULTIPLE
        queries, keys, values = (
            nn.functional.pad(states, (0, padded_dim - states.shape[-1])) for states in (queries, keys, values)
        )
        has_key = mask.any(dim=-1, keepdim=True)
        # The softmax of a fully masked row has a NaN gradient, so such a row attends to all keys and is zeroed below.
        attended = nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=(mask | ~has_key).unsqueeze(1), scale=query_dim**-0.5
        )
        attended = attended[..., :value_dim].transpose(1, 2).reshape(*has_key.shape[:2], value_size)
        return attended.masked_fill(~has_key, 0.0)

    def weights(self, queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute the attention weights, which the fused kernels of `forward` do not return.

        Takes the arguments of `forward` and returns `(batch, num_heads, num_queries, num_keys)`, float32.
        """
        queries, keys = (self._split_heads(states.float()) for states in (self.q_proj(queries), keys))
        scores = queries @ keys.mT * queries.shape[-1] ** -0.5
        mask = mask.unsqueeze(1)
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1) * mask

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (batch, num_heads, length, head_dim)


class QueryRecord:
    """Receives the attention weights of `EmbeddedQuery` in one forward call that asked for them.

    A class and not a list, because FSDP and accelerate rebuild the lists among a module's arguments.

    Attributes:
        weights: `(batch, num_query_heads, queries_per_row, tiles_per_row * num_patches)`, float32.
    """

    weights: torch.Tensor


class QueryContext(NamedTuple):
    """Inputs of the Embedded Query module in one forward call, besides the hidden states.

    The decoder passes them to its layers as one keyword argument; nothing here outlives the call.

    Attributes:
        patch_features: Patch features of all tiles of all rows, `(num_tiles, num_patches, vision_hidden_size)`.
        tiles: Indices of a row's tiles, `(batch, tiles_per_row)`.
        query_positions: Positions of a row's query tokens, padded with other positions, `(batch, queries_per_row)`.
        patch_mask: True where a query token may read a patch, `(batch, queries_per_row, tiles_per_row * num_patches)`.
        instruction_mask: True where a query token may read a token, `(batch, queries_per_row, seq_length)`.
        update_mask: True at query tokens with an image before them, `(batch, queries_per_row)`.
        tile_positions: Places of the tiles in their samples, from 0, `(num_tiles,)`; `None`: all alike.
        record: Receives the attention weights, if the caller asked for them.
    """

    patch_features: torch.Tensor
    tiles: torch.Tensor
    query_positions: torch.Tensor
    patch_mask: torch.Tensor
    instruction_mask: torch.Tensor
    update_mask: torch.Tensor
    tile_positions: torch.Tensor | None = None
    record: QueryRecord | None = None


class TilePositions(nn.Module):
    """Vectors for the places of tiles: a Fourier basis, projected by a weight that starts at zero.

    In the basis, the vectors of different places are orthogonal, however near they are, and twice as many places as its
    width have vectors of their own.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))  # not a linear layer, which would be quantised

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Vectors `(…, width)` of places `(…)` from 0."""
        width = self.weight.shape[1]
        frequencies = torch.arange(1, width + 1, 2, device=positions.device) * (math.pi / width)
        angles = positions.unsqueeze(-1) * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)[..., :width]
        return nn.functional.linear(waves.to(self.weight.dtype), self.weight)


class EmbeddedQuery(nn.Module):
    """The Embedded Query module (paper, section 3.3): query tokens read their question, then the images' patches.

    The paper's module cannot know which image or tile a patch comes from. With `encode_tile_positions`, a vector for
    the tile's place in the prompt is added to its patches.
    """

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
        self.tile_positions = TilePositions(vision_width) if config.encode_tile_positions else None

    def forward(self, hidden_states: torch.Tensor, context: QueryContext) -> torch.Tensor:
        """Update the query tokens.

        Args:
            hidden_states: Input of the decoder layer, `(batch, seq_length, hidden_size)`.
            context: Positions of the query tokens and what they may read.

        Returns:
            A new tensor that differs from `hidden_states` only at the query tokens in `context.update_mask`.
        """
        positions = context.query_positions.unsqueeze(-1)  # (batch, queries_per_row, 1)
        text = self.text_proj(hidden_states)
        queries = text.gather(1, positions.expand(-1, -1, text.shape[-1]))
        guided = self.read_question(queries, text, context.instruction_mask)
        # Project every tile once, then gather tiles into rows: (batch, tiles_per_row * num_patches, width)
        patches = self.project_patches(self.mark_tiles(context.patch_features, context.tile_positions))
        keys, values = (states[context.tiles].flatten(1, 2) for states in patches)
        seen = self.image_attention(guided, keys, values, context.patch_mask)
        if context.record is not None:
            context.record.weights = self.image_attention.weights(guided, keys, context.patch_mask)
        positions = positions.expand(-1, -1, hidden_states.shape[-1])
        queries = hidden_states.gather(1, positions)
        queries = torch.where(context.update_mask.unsqueeze(-1), queries + self.out_proj(seen), queries)
        return hidden_states.scatter(1, positions, queries)

    def read_question(self, queries: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Let query tokens read their question.

        Args:
            queries: Outputs of `text_proj` at the query tokens, `(batch, num_queries, query_hidden_size)`.
            text: Outputs of `text_proj` at the tokens that they may read, `(batch, num_tokens, query_hidden_size)`.
            mask: True where a query token may read a token, `(batch, num_queries, num_tokens)`.

        Returns:
            What each query token looks for in the images, `(batch, num_queries, query_hidden_size)`.
        """
        text = self.text_norm(text)
        keys, values = self.text_attention.k_proj(text), self.text_attention.v_proj(text)
        return self.text_attention(self.query_norm(queries), keys, values, mask)

    def mark_tiles(self, patches: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Add to patches the vector of their tile's place, if the config says so.

        Args:
            patches: `(…, num_tiles, num_patches, vision_hidden_size)`.
            positions: Places of the tiles in their samples, from 0, `(num_tiles,)`; `None` only if they are unused.
        """
        return patches if self.tile_positions is None else patches + self.tile_positions(positions).unsqueeze(-2)

    def project_patches(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `(…, query_hidden_size)` and values `(…, vision_hidden_size)` of patches `(…, vision_hidden_size)`."""
        keys = self.image_attention.k_proj(self.image_norm(self.image_proj(patches)))
        return keys, self.image_attention.v_proj(patches)


class PromptSpans:
    r"""Where image tokens, questions and query tokens are in a batch of prompts.

        … USER: <image>×81 \n question <query>×9 ASSISTANT: answer </s>USER: question 2 <query>×9 ASSISTANT:
                             └instruction┘└block┘                         └instruction┘└block┘

    Everything is computed from the token ids with masks over the sequence, without loops over rows or padded copies.
    The host needs a few counts per row, to size tensors and to reject prompts that cannot be answered correctly.
    `copy_counts` starts copying them and `check` waits for them; the vision tower is queued in between, so that the
    device never idles.

    Args:
        input_ids: `(batch, seq_length)`.
        config: Config of the model.
        num_cached_tiles: Tiles of every row whose image tokens are in the KV cache, `(batch,)`; `None`: no cache.
        begins_instruction: True if a row's first token begins an instruction, because the cached tokens end with one
            of `instruction_start_ids`, `(batch,)`; `None`: no.
        position_ids: Positions of rows that may hold several packed samples, `(batch, seq_length)`; a sample begins
            wherever a position does not follow the one before it. `None`: every row is one sample.

    Attributes:
        image_mask: True at image tokens, `(batch, seq_length)`.
        query_mask: True at query tokens, `(batch, seq_length)`.
        query_rank: Index of a query token in its block, `(batch, seq_length)`.
        query_start: Position where the block of a query token begins, `(batch, seq_length)`.
        instruction_start: Position where the latest instruction begins, `(batch, seq_length)`; -1: not in this call.
        image_seq_length: Image tokens of a tile.
        num_tiles_before: Tiles of the row before a position, cached ones included, `(batch, seq_length)`.
        num_image_tokens: Image tokens of every row, `(batch,)`.
        has_cache: Whether `num_cached_tiles` was given.
        num_cached_tiles: Cached tiles of every row, `(batch,)`.
        first_tile: Index of every row's first tile among all tiles, `(batch,)`.
        sample_start: Position where a token's packed sample begins, `(batch, seq_length)`; `None`: not packed.
        num_foreign_tiles: Tiles of the row in earlier samples, `(batch, seq_length)`; `None`: not packed.
        tiles_per_row: Largest number of tiles in a row; 0 if there are neither image nor query tokens. Set by `check`,
            as are the next three.
        queries_per_row: Largest number of query tokens in a row, at least 1.
        is_padded: Whether there may be padding.
        is_packed: Whether a row may hold several samples.
    """

    tiles_per_row: int
    queries_per_row: int
    is_padded: bool
    is_packed: bool

    def __init__(
        self,
        input_ids: torch.LongTensor,
        config: FlashSlothConfig,
        *,
        num_cached_tiles: torch.LongTensor | None = None,
        begins_instruction: torch.BoolTensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> None:
        self.config, self.image_seq_length = config, config.image_seq_length
        self.image_mask = input_ids == config.image_token_id
        self.query_mask = input_ids == config.query_token_id
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        self.query_rank = (self.query_mask.cumsum(dim=1) - 1) % config.num_query_tokens
        self.query_start = positions - self.query_rank
        self.num_image_tokens = self.image_mask.sum(dim=1)
        self.has_cache = num_cached_tiles is not None
        self.num_cached_tiles = num_cached_tiles if self.has_cache else torch.zeros_like(self.num_image_tokens)
        num_tiles = self.num_image_tokens // self.image_seq_length + self.num_cached_tiles
        self.first_tile = num_tiles.cumsum(dim=0) - num_tiles
        tiles_here = self.image_mask.cumsum(dim=1) // self.image_seq_length
        self.num_tiles_before = tiles_here + self.num_cached_tiles.unsqueeze(1)
        self.sample_start = self.num_foreign_tiles = None
        if position_ids is not None:
            is_start = nn.functional.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
            self.sample_start = torch.where(is_start.expand_as(input_ids), positions, 0).cummax(dim=1).values
            self.num_foreign_tiles = nn.functional.pad(tiles_here[:, :-1], (1, 0)).gather(1, self.sample_start)
        starts = torch.where(self._ends_instruction_start(input_ids), positions + 1, -1)
        if begins_instruction is not None:
            first = torch.where(starts[:, 0] < 0, begins_instruction.long() - 1, starts[:, 0])
            starts = torch.cat([first.unsqueeze(1), starts[:, 1:]], dim=1)
        self.instruction_start = starts.cummax(dim=1).values
        if self.sample_start is not None:
            is_own = self.instruction_start > self.sample_start
            self.instruction_start = torch.where(is_own, self.instruction_start, -1)
        self._total_length: int | None = None  # of cached and new tokens
        self._counts: torch.Tensor | None = None  # (batch, num_counts), on the host once `_copied` is reached
        self._count_names: list[str] = []
        self._copied: torch.cuda.Event | None = None

    def _ends_instruction_start(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """True at the last token of one of `instruction_start_ids` within a sample, `(batch, seq_length)`."""
        length = input_ids.shape[1]
        found = torch.zeros_like(input_ids, dtype=torch.bool)
        for pattern in self.config.instruction_start_ids:
            num_places = length - len(pattern) + 1
            if num_places < 1:
                continue
            matches = input_ids[:, :num_places] == pattern[0]
            for offset, token_id in enumerate(pattern[1:], start=1):
                matches = matches & (input_ids[:, offset : num_places + offset] == token_id)
            if self.sample_start is not None:
                places = torch.arange(num_places, device=input_ids.device)
                matches = matches & (places >= self.sample_start[:, len(pattern) - 1 :])
            found = found | nn.functional.pad(matches, (len(pattern) - 1, 0))
        return found

    def query_positions(self) -> torch.Tensor:
        """Positions of every row's query tokens in order, padded with other positions, `(batch, queries_per_row)`."""
        batch_size, length = self.query_mask.shape
        if self.queries_per_row == length:  # a traced graph cannot know how many there are
            return torch.arange(length, device=self.query_mask.device).expand(batch_size, -1)
        return self.query_mask.int().argsort(dim=1, descending=True, stable=True)[:, : self.queries_per_row]

    def tile_positions(self, num_tiles: int) -> torch.Tensor:
        """Place of every tile among those of its sample, from 0, `(num_tiles,)`."""
        first = self.first_tile.unsqueeze(1)  # of every sample, at one token or more
        if self.num_foreign_tiles is not None:
            first = first + self.num_foreign_tiles
        tiles = torch.arange(num_tiles, device=first.device)
        first = first.flatten()
        return tiles - torch.where(first <= tiles.unsqueeze(1), first, 0).amax(dim=1)

    def copy_counts(
        self, attention_mask: torch.Tensor | None = None, position_ids: torch.LongTensor | None = None
    ) -> None:
        """Start copying to the host what `check` needs, unless the call is traced.

        Args:
            attention_mask: `(batch, any_length)`, 0 at padding; `None`: there is none.
            position_ids: Positions in a call without a cache, `(batch, seq_length)`; `None`: not given.
        """
        self._total_length = None if attention_mask is None else attention_mask.shape[1]
        if is_tracing(self.image_mask):
            return
        has_tiles = self.num_tiles_before > (0 if self.num_foreign_tiles is None else self.num_foreign_tiles)
        follows_query = nn.functional.pad(self.query_mask[:, :-1], (1, 0))
        splits_block = self.query_mask & (self.query_rank > 0) & ~follows_query
        lacks_question = self.query_mask & has_tiles & (self.instruction_start < 0)
        counts = {
            "num_image_tokens": self.num_image_tokens,
            "num_cached_tiles": self.num_cached_tiles,
            "num_queries": self.query_mask.sum(dim=1),
        }
        if attention_mask is not None:
            counts["is_padded"] = (attention_mask == 0).any(dim=1)
            if position_ids is not None:
                restarts = (position_ids[:, 1:] < position_ids[:, :-1]).any(dim=1)
                counts["restarts_despite_mask"] = restarts & ~counts["is_padded"]
        if self.sample_start is not None:
            image_tokens = nn.functional.pad(self.image_mask[:, :-1].cumsum(dim=1), (1, 0))
            tokens_before = image_tokens.gather(1, self.sample_start)
            counts["splits_image"] = (tokens_before % self.image_seq_length > 0).any(dim=1)
            counts["is_packed"] = (self.sample_start > 0).any(dim=1)
            splits_block = splits_block | (self.query_mask & (self.query_start < self.sample_start))
        counts |= {"splits_block": splits_block.any(dim=1), "lacks_question": lacks_question.any(dim=1)}
        self._count_names = list(counts)
        on_device = torch.stack(list(counts.values()), dim=1)  # (batch, num_counts)
        self._counts = on_device.to("cpu", non_blocking=on_device.is_cuda)
        if on_device.is_cuda:
            self._copied = torch.cuda.current_stream(on_device.device).record_event()

    def check(self, num_tiles: int) -> None:
        """Reject prompts that cannot be answered correctly, and set the sizes of the batch.

        Args:
            num_tiles: Tiles in `pixel_values`.

        Raises:
            ValueError: If image tokens and images differ in number, image or query tokens were cut, or a query block
                has lost its question.
        """
        if self._counts is None:
            self.tiles_per_row, self.queries_per_row = self.bounds(num_tiles)
            self.is_padded, self.is_packed = True, self.sample_start is not None
            return
        if self._copied is not None:
            self._copied.synchronize()
        rows = [dict(zip(self._count_names, row, strict=True)) for row in self._counts.tolist()]
        for number, row in enumerate(rows):
            self._check_row(number, row)
        totals = {
            name: sum(row[name] for row in rows) for name in ("num_image_tokens", "num_cached_tiles", "num_queries")
        }
        self._check_tile_count(num_tiles, **totals)
        tiles = [row["num_image_tokens"] // self.image_seq_length + row["num_cached_tiles"] for row in rows]
        is_used = any(row["num_image_tokens"] or row["num_queries"] for row in rows)
        self.tiles_per_row = max(tiles) if is_used else 0
        self.queries_per_row = max(1, *(row["num_queries"] for row in rows))
        self.is_padded, self.is_packed = (any(row.get(name) for row in rows) for name in ("is_padded", "is_packed"))

    def bounds(self, num_tiles: int) -> tuple[int, int]:
        """Upper bounds of `tiles_per_row` and `queries_per_row` for traced graphs, from shapes alone."""
        length = self.image_mask.shape[1]
        if self.has_cache and self._total_length is None:
            return num_tiles, length
        total_length = length if self._total_length is None else self._total_length
        return torch.sym_min(num_tiles, total_length // self.image_seq_length), length

    def _check_row(self, number: int, row: dict[str, int]) -> None:
        config = self.config
        if row["num_image_tokens"] % self.image_seq_length or row.get("splits_image"):
            raise ValueError(
                f"Row {number} has {row['num_image_tokens']} image tokens"
                f"{', cut between packed samples' if row.get('splits_image') else ''}, but a tile has "
                f"{self.image_seq_length}: the prompt was truncated, or split by a chunked prefill, inside an image. "
                "Raise `max_length`, or omit `prefill_chunk_size`."
            )
        if row["num_queries"] % config.num_query_tokens or row["splits_block"]:
            raise ValueError(
                f"Row {number} has {row['num_queries']} query tokens that are not in whole blocks of "
                f"{config.num_query_tokens}: the prompt was truncated, or not built by `FlashSlothProcessor`."
            )
        if row.get("restarts_despite_mask"):
            raise ValueError(
                f"`position_ids` of row {number} restart within it, as for packed samples, but `attention_mask` marks "
                "all its tokens as one sample; omit `attention_mask` to keep packed samples apart."
            )
        layers = set(getattr(config.text_config, "layer_types", None) or ())
        mixing = sorted(kind for kind in layers if not kind.endswith("_attention") or kind == "linear_attention")
        if row.get("is_packed") and mixing:
            raise ValueError(
                f"`position_ids` of row {number} restart within it, as for packed samples, but the decoder "
                f"({config.text_config.model_type}) has layers of type {', '.join(mixing)}, which would mix them; put "
                "one sample into each row and pad the rows instead."
            )
        if row["lacks_question"]:
            raise ValueError(
                f"Row {number} has query tokens, but their question does not begin in this call (none of "
                f"`instruction_start_ids`={config.instruction_start_ids} before them): a chunked prefill or a cached "
                "prefix must not separate a question from its query tokens, and a raw prompt needs the original "
                "format, `USER: <image>\\nQUESTION<learnable> ASSISTANT:`."
            )

    def _check_tile_count(
        self, num_tiles: int, *, num_image_tokens: int, num_cached_tiles: int, num_queries: int
    ) -> None:
        expected = num_image_tokens // self.image_seq_length + num_cached_tiles
        if num_tiles == expected or not (num_tiles or num_image_tokens or num_queries):
            return
        where = f" and {num_cached_tiles} tiles in the cache" if num_cached_tiles else ""
        hint = "pass the pixels of all images again with a KV cache, and in TRL as a column `images`"
        if num_tiles > expected:
            hint = "do not truncate prompts (TRL truncates them to its `max_length`, which may be None)"
        raise ValueError(
            f"`input_ids` has {num_image_tokens} image tokens{where}, so {expected} tiles are expected, but "
            f"`pixel_values` gives {num_tiles} ({num_tiles * self.image_seq_length} features); build both with "
            f"`FlashSlothProcessor`, {hint}, and omit `prefill_chunk_size`."
        )


class NoPooling(nn.Module):
    """Replaces a vision tower's pooler or head, which FlashSloth does not use."""

    def forward(self, *_args: Any, **_kwargs: Any) -> None:
        """Return no pooled feature."""


def build_vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a vision tower without final norm, pooler and head: FlashSloth reads the output of its last layer.

    Args:
        config: Config of the tower, of any type that `AutoModel` knows.
    """
    tower = AutoModel.from_config(config)
    for name in UNUSED_TOWER_PARTS:
        if isinstance(getattr(tower, name, None), nn.Module):
            setattr(tower, name, NoPooling() if name in ("pooler", "head") else nn.Identity())
    if isinstance(embeddings := getattr(tower, "embeddings", None), nn.Module):
        embeddings.register_forward_hook(_make_contiguous)
    return tower


def _make_contiguous(_module: nn.Module, _args: tuple, patches: Any) -> Any:
    """The patch convolution leaves its output transposed in memory, and every norm of every layer would copy it."""
    return patches.contiguous() if isinstance(patches, torch.Tensor) else patches


def build_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a decoder.

    Args:
        config: Config of the decoder, of any type that `AutoModel` knows.

    Raises:
        TypeError: If the decoder has no list `layers`, before one of which the query tokens are updated.
    """
    decoder = AutoModel.from_config(config)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise TypeError(
            f"FlashSloth needs a decoder with a list `layers`, but {type(decoder).__name__} has none; choose another "
            "`text_config`, such as phi, llama or qwen3."
        )
    for module in list(decoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):  # Phi's: the same function in one kernel instead of eight
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])
    return decoder


def scale_logits(logits: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Scale or cap logits as the heads of some decoders do: Granite divides them, Gemma 2 soft-caps them.

    Args:
        logits: `(…, vocab_size)`.
        config: Config of the decoder, which may have `logits_scaling` or `final_logit_softcapping`.

    Returns:
        `(…, vocab_size)`.
    """
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


class FlashSlothPreTrainedModel(PreTrainedModel):
    """Loading, saving, initialisation and activation checkpointing, common to all FlashSloth models."""

    config: FlashSlothConfig
    config_class = FlashSlothConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    # Modules that are sharded, or placed on a device, as a whole, in addition to the layers of tower and decoder.
    _no_split_modules = ["SpatialAttentionPooling", "EmbeddedQuery"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: FlashSlothConfig) -> None:
        super().__init__(config)
        # An original release has the whole tower; do not warn about the parts that FlashSloth does not use.
        unused_layer = config.vision_config.num_hidden_layers
        self._keys_to_ignore_on_load_unexpected = [
            r"vision_tower\.(post_layernorm|head)\.",
            rf"vision_tower\.encoder\.layers\.{unused_layer}\.",
        ]

    def post_init(self) -> None:
        """Finish the constructor; see `PreTrainedModel.post_init`."""
        super().post_init()
        # Tower and decoder list the classes of their whole families; accelerate's FSDP rejects a class that has no
        # module in the model.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}  # type: ignore[operator]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Return True: tower and decoder apply the setting; transformers would look for it in this file's source."""
        return True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TilePositions):
            init.zeros_(module.weight)  # a model that gains them answers as before
        if isinstance(module, FlashSlothModel):
            init.normal_(module.query_tokens, std=getattr(self.config.text_config, "initializer_range", None) or 0.02)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a FlashSloth in this package's layout or in that of the original releases.

        See `PreTrainedModel.from_pretrained`. Tensors with original names are renamed while they are read.
        """
        # Not `register_checkpoint_conversion_mapping`: it also renames back whatever a new model saves.
        kwargs.setdefault("key_mapping", ORIGINAL_KEY_MAPPING)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        used = {pattern for conversion in model._weight_conversions or () for pattern in conversion.source_patterns}
        if not used.isdisjoint(ORIGINAL_KEY_MAPPING):
            model._weight_conversions = None  # with it, transformers would save under the names that it read
            if model.can_generate():  # an original generation config is Phi-2's and does not end answers at `</s>`
                model.generation_config = original_generation_config(model.generation_config.to_dict(), model.config)
        return loaded

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights; see `torch.nn.Module.load_state_dict`.

        A tied weight may be missing, as `save_pretrained` omits it; it is taken from the weight that it is tied to.
        """
        tied = getattr(self, "all_tied_weights_keys", {}).items()
        missing = {copy: state_dict[source] for copy, source in tied if copy not in state_dict and source in state_dict}
        return super().load_state_dict({**state_dict, **missing} if missing else state_dict, *args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save weights, config and code; see `PreTrainedModel.save_pretrained`."""
        # PyTorch's `fully_shard` (FSDP2) replaces a model's class by one named FSDP…, and transformers saves the name
        # and the code of the class that it finds, which could not be loaded. So the class has its original name and
        # module while it is saved.
        sharded = type(self)
        own = next(base for base in sharded.__mro__ if not base.__name__.startswith(SHARDED_CLASS_PREFIX))
        names = {name: getattr(sharded, name) for name in ("__module__", "__name__")}
        try:
            for name in names:
                setattr(sharded, name, getattr(own, name))
            super().save_pretrained(*args, **kwargs)
        finally:
            for name, value in names.items():
                setattr(sharded, name, value)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute activations in the backward pass, always with `use_reentrant=False`.

        The newer `activation_checkpointing_enable` calls this; peft, TRL and transformers 5.17 use this name.

        Args:
            gradient_checkpointing_kwargs: Arguments of `torch.utils.checkpoint.checkpoint`.
            **kwargs: Further arguments of transformers, such as `every_n_layers`.

        Raises:
            ValueError: If `use_reentrant=True` is requested.
        """
        checkpointing_kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if checkpointing_kwargs["use_reentrant"]:
            raise ValueError(
                "FlashSloth needs `use_reentrant=False`: reentrant checkpointing loses the gradients of the image "
                "features, which reach a decoder layer by keyword. Remove the argument, or set it to False."
            )
        # Versions with the newer name deprecate the base class's method of this name, so call what it calls.
        enable = getattr(super(), "_activation_checkpointing_enable", super().gradient_checkpointing_enable)
        enable(checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Stop recomputing activations."""
        getattr(super(), "_activation_checkpointing_disable", super().gradient_checkpointing_disable)()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())


class FlashSlothModel(FlashSlothPreTrainedModel):
    """FlashSloth without the language-modelling head."""

    def __init__(self, config: FlashSlothConfig) -> None:
        config.validate_architecture()
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected.append(r"^lm_head\.")  # in a checkpoint of the whole model
        self.vision_tower = build_vision_tower(config.vision_config)  # type: ignore[arg-type]
        self.spatial_attention_pooling = SpatialAttentionPooling(
            hidden_size=config.vision_config.hidden_size,
            window_size=config.pooling_window_size,
            dropout=config.pooling_dropout,
        )
        self.multi_modal_projector = FlashSlothMultiModalProjector(config)
        self.language_model = build_decoder(config.text_config)  # type: ignore[arg-type]
        self.query_tokens = nn.Parameter(torch.empty(config.num_query_tokens, config.text_config.hidden_size))
        self.embedded_query = EmbeddedQuery(config)
        # A bound method, so that a deep copy of the model calls its own module.
        layer = self.language_model.layers[config.query_layer_idx]  # type: ignore[index]
        layer.register_forward_pre_hook(self._update_queries, with_kwargs=True)
        self.post_init()

    def _update_queries(self, _layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Run the Embedded Query module on the input of the decoder layer `query_layer_idx`."""
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
            tokens, `(num_tiles, image_seq_length, hidden_size)`; on request, the tower's `hidden_states` and
            `attentions`, which include its class and register tokens.

        Raises:
            ValueError: If the tiles do not have the size that the tower takes.
        """
        features = self._encode(pixel_values, **self._with_config_defaults(kwargs))
        features.pooler_output = self._to_image_tokens(features.last_hidden_state)
        return features

    def _encode(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        size = self.config.tile_size
        if pixel_values.ndim != 4 or pixel_values.shape[-2:] != size:
            raise ValueError(
                f"`pixel_values` must be (num_tiles, channels, {size[0]}, {size[1]}), but is "
                f"{tuple(pixel_values.shape)}; build it with `FlashSlothProcessor`, whose image processor's `size` "
                "must be the vision tower's."
            )
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state[:, -self.config.num_patches :],  # class and registers first
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def _to_image_tokens(self, patch_features: torch.Tensor) -> torch.Tensor:
        return self.multi_modal_projector(self.spatial_attention_pooling(patch_features))

    def find_spans(self, input_ids: torch.LongTensor, **kwargs: Any) -> PromptSpans:
        """Find where image tokens, questions and query tokens are; see `PromptSpans`."""
        return PromptSpans(input_ids, self.config, **kwargs)

    def find_special_ids(self, inputs_embeds: torch.Tensor) -> torch.LongTensor:
        """Recover the ids of placeholders and instruction patterns from token embeddings.

        Args:
            inputs_embeds: Embeddings from the decoder's own table, `(batch, seq_length, hidden_size)`.

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
        return ids  # type: ignore[return-value]

    @can_return_tuple
    def forward(  # type: ignore[misc]
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
            input_ids: Prompt with expanded placeholders, `(batch, seq_length)`: `image_seq_length` image tokens per
                tile and `num_query_tokens` query tokens per question.
            pixel_values: All tiles of all images of all rows, in order, `(num_tiles, 3, height, width)`. The
                number of a row's tiles follows from its image tokens and may differ between rows.
            attention_mask: `(batch, seq_length)`, 0 at padding, on either side.
            position_ids: `(batch, seq_length)`. Without `attention_mask` and cache, a row may hold several packed
                samples: each begins where the positions restart and cannot attend to the others. Such a call
                returns no cache.
            past_key_values: KV cache of the preceding tokens. A question about a cached image needs `pixel_values`
                again, because its query tokens read the patches.
            inputs_embeds: Token embeddings instead of `input_ids`, `(batch, seq_length, hidden_size)`; placeholders are
                recognised by their embeddings.
            num_cached_tiles: Tiles of every row whose image tokens are in the cache, `(batch,)`; their pixels come
                first in the row's part of `pixel_values`. `generate` sets it.
            begins_instruction: True if a question begins with a row's first token, according to the cached tokens,
                `(batch,)`. `generate` sets it.
            patch_features: Output of the vision tower instead of `pixel_values`: `last_hidden_state` of
                `get_image_features`, `(num_tiles, num_patches, vision_hidden_size)`.
            cache: The name of `past_key_values` in transformers since 5.24.
            **kwargs: Passed on to the decoder.

        Returns:
            Last hidden state `(batch, seq_length, hidden_size)`, cache, image tokens.

        Raises:
            ValueError: If ids and images contradict each other, a prompt was cut between a question and its query
                tokens, two caches are given, or samples are packed in a way that would mix them.
            RuntimeError: If this is a copy made by `nn.DataParallel`.
        """
        self._check_call(input_ids, inputs_embeds, position_ids, kwargs)
        cache, kwargs = _one_cache(cache, past_key_values), self._decoder_kwargs(kwargs)
        is_prompt = (input_ids if inputs_embeds is None else inputs_embeds).shape[1] > 1
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        elif is_prompt:
            input_ids = self.find_special_ids(inputs_embeds)
        features = context = spans = None
        if is_prompt:  # a decoding step has a single token, which is neither an image nor a query token
            mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 else None
            positions = position_ids if cache is None and getattr(position_ids, "ndim", 0) == 2 else None
            spans = self.find_spans(
                input_ids,
                num_cached_tiles=num_cached_tiles,
                begins_instruction=begins_instruction,
                position_ids=positions if mask is None else None,
            )
            spans.copy_counts(mask, positions)
            features = self._image_features(pixel_values, patch_features, **kwargs)
            spans.check(0 if features is None else features.last_hidden_state.shape[0])
            record = QueryRecord() if features is not None and kwargs.get("output_attentions") else None
            inputs_embeds, features, context = self._embed_prompt(inputs_embeds, features, spans, record)
            # Without padding, drop the mask: the decoder would copy it to the host to find that out. With
            # `position_ids` and no cache, keep it: the decoder would look for packed samples in the positions.
            if mask is not None and not spans.is_padded and (position_ids is None or cache is not None):
                attention_mask = None
            if spans.is_packed:
                kwargs["use_cache"] = False  # with a cache, the decoder would not keep the samples apart
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            query_context=context,
            **{CACHE_NAME: cache},
            **_backbone_kwargs(kwargs, self.language_model),
        )
        return FlashSlothModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **self._image_outputs(features, context, spans),
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
                "FlashSloth cannot run under `nn.DataParallel`, which divides the tiles of a batch without regard to "
                "their rows; `Trainer` uses it if one process sees several GPUs. Start one process per GPU, "
                "`torchrun --nproc_per_node NUM_GPUS finetune.py`, or show it a single one: `CUDA_VISIBLE_DEVICES=0`."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either `input_ids` or `inputs_embeds`, and not both.")
        packing = [name for name in PACKING_ARGUMENTS if kwargs.get(name) is not None]
        if position_ids is None and packing:
            raise ValueError(
                f"`{packing[0]}` marks packed samples, but there are no `position_ids`, by which FlashSloth "
                "tells them apart; pass positions that restart with each sample."
            )

    def _with_config_defaults(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a call that are not `None`, and the optional outputs that the config requests."""
        requested = {name: True for name in OPTIONAL_OUTPUTS if getattr(self.config, name, False)}
        return requested | {name: value for name, value in kwargs.items() if value is not None}

    def _decoder_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = self._with_config_defaults(kwargs)
        # Layers that recompute activations warn about a cache. Otherwise, training keeps it: without one, the decoder
        # looks for packed samples, which makes it wait for the device, and builds a mask when it is traced.
        if self.training and getattr(self.language_model, "gradient_checkpointing", False):
            kwargs.setdefault("use_cache", False)
        return kwargs

    def _image_features(
        self, pixel_values: torch.Tensor | None, patch_features: torch.Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling | None:
        """Patch features of the tiles, from the tower or from the caller, without image tokens yet."""
        if patch_features is None:
            if pixel_values is None or not len(pixel_values):
                return None
            requested = {name: kwargs.get(name) for name in OPTIONAL_OUTPUTS}
            return self._encode(pixel_values, **_backbone_kwargs(requested, self.vision_tower))
        expected = (self.config.num_patches, self.config.vision_config.hidden_size)
        if pixel_values is not None or patch_features.shape[1:] != expected:
            raise ValueError(
                f"`patch_features` must be (num_tiles, {expected[0]}, {expected[1]}) and replace `pixel_values`, but "
                f"are {tuple(patch_features.shape)}{'' if pixel_values is None else ' next to `pixel_values`'}; pass "
                "`last_hidden_state` of `get_image_features`, and only one of the two."
            )
        return BaseModelOutputWithPooling(last_hidden_state=patch_features)

    def _embed_prompt(
        self,
        inputs_embeds: torch.Tensor,
        features: BaseModelOutputWithPooling | None,
        spans: PromptSpans,
        record: QueryRecord | None = None,
    ) -> tuple[torch.Tensor, BaseModelOutputWithPooling | None, QueryContext | None]:
        """Insert query and image tokens, and collect the inputs of the Embedded Query module."""
        inputs_embeds = self._insert_query_tokens(inputs_embeds, spans)
        is_blank = not spans.tiles_per_row
        if is_blank:
            if not self._must_touch_every_module():
                return inputs_embeds, None, None
            # A tile that no image token represents and no query reads: all its gradients are zero.
            num_channels = getattr(self.config.vision_config, "num_channels", 3)
            features = self._encode(inputs_embeds.new_zeros(1, num_channels, *self.config.tile_size))
            spans.tiles_per_row = 1
        patches = features.last_hidden_state
        features.pooler_output = self._to_image_tokens(patches).to(inputs_embeds)
        inputs_embeds = self._insert_image_tokens(inputs_embeds, features.pooler_output, spans)
        context = self._query_context(patches, spans)._replace(record=record)
        return inputs_embeds, None if is_blank else features, context

    def _must_touch_every_module(self) -> bool:
        """Whether a batch without images must run all modules, from vision tower to Embedded Query, on a blank tile.

        In training, every trained parameter needs a gradient in every process, or the processes deadlock. If
        parameters are gathered from other processes (ZeRO-3, FSDP), this also holds in evaluation.
        """
        if (self.training and torch.is_grad_enabled()) or is_deepspeed_zero3_enabled():
            return True
        return any(type(module).__name__.startswith(SHARDED_CLASS_PREFIX) for module in self.modules())

    def _insert_query_tokens(self, inputs_embeds: torch.Tensor, spans: PromptSpans) -> torch.Tensor:
        queries = self.query_tokens.to(inputs_embeds)[spans.query_rank]  # (batch, seq_length, hidden_size)
        if self.config.query_anchor_token_id is not None:
            # One anchor per position: NEFTune divides its noise by the square root of the sequence length, so a single
            # anchor would get more noise than other tokens.
            anchor = spans.query_start.new_full((1, inputs_embeds.shape[1]), self.config.query_anchor_token_id)
            queries = queries + self.get_input_embeddings()(anchor)
        return torch.where(spans.query_mask.unsqueeze(-1), queries, inputs_embeds)

    def _insert_image_tokens(
        self, inputs_embeds: torch.Tensor, image_tokens: torch.Tensor, spans: PromptSpans
    ) -> torch.Tensor:
        first_token = (spans.first_tile + spans.num_cached_tiles) * spans.image_seq_length  # (batch,)
        ranks = first_token.unsqueeze(1) + spans.image_mask.cumsum(dim=1) - 1
        image_tokens = image_tokens.flatten(0, 1)
        image_tokens = image_tokens[ranks.clamp(0, image_tokens.shape[0] - 1)]  # (batch, seq_length, hidden_size)
        return torch.where(spans.image_mask.unsqueeze(-1), image_tokens, inputs_embeds)

    def _query_context(self, patches: torch.Tensor, spans: PromptSpans) -> QueryContext:
        slots = torch.arange(spans.tiles_per_row, device=spans.query_mask.device)
        tiles = (spans.first_tile.unsqueeze(1) + slots).clamp(max=patches.shape[0] - 1)  # (batch, tiles_per_row)
        query_positions = spans.query_positions()

        def at_queries(values: torch.Tensor) -> torch.Tensor:
            return values.gather(1, query_positions).unsqueeze(-1)  # (batch, queries_per_row, 1)

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
            tile_positions=spans.tile_positions(patches.shape[0]) if self.config.encode_tile_positions else None,
        )

    def _image_outputs(
        self,
        features: BaseModelOutputWithPooling | None,
        context: QueryContext | None,
        spans: PromptSpans | None,
    ) -> dict[str, Any]:
        """Outputs of a call in addition to the decoder's; none without images."""
        if features is None:
            return {}
        outputs = {"image_hidden_states": features.pooler_output, "image_outputs": features}
        if context.record is not None:
            is_query = spans.query_mask.gather(1, context.query_positions)
            weights = context.record.weights.transpose(1, 2)[is_query]  # (num_queries, num_heads, num_keys)
            outputs["query_attentions"] = weights.unflatten(0, (-1, self.config.num_query_tokens)).transpose(1, 2)
            outputs["pooling_attentions"] = self.spatial_attention_pooling.window_weights(features.last_hidden_state)
        return outputs


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
        """The name by which `Trainer` decides whether to shift labels for label smoothing; subclasses keep it."""
        return FlashSlothForConditionalGeneration.__name__

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """Encode tiles; see `FlashSlothModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(  # type: ignore[misc]  # noqa: D417 (the other arguments are described once, at `FlashSlothModel.forward`)
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
        """Run the model and its head; see `FlashSlothModel.forward` for the arguments that are not listed here.

        Args:
            labels: Token ids to predict, `(batch, seq_length)`, not shifted; -100 at tokens without a loss.
            logits_to_keep: Number of last positions whose logits are computed, or their indices; 0: all.
            **kwargs: Passed on to the decoder and to the loss, such as `num_items_in_batch`.

        Returns:
            Loss if there are labels, logits `(batch, num_kept_positions, vocab_size)`, cache, image tokens.
        """
        cache = _one_cache(cache, past_key_values)
        is_plain = all(given is None for given in (labels, inputs_embeds, pixel_values))
        if is_plain and isinstance(cache, CompiledCache) and not torch.compiler.is_compiling():
            given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
            given |= {"position_ids": position_ids, "patch_features": patch_features, "logits_to_keep": logits_to_keep}
            made: dict[str, Any] = {"logits": cache.compiled.prefill(cache, **given), CACHE_NAME: cache}
            if made["logits"] is not None:
                return FlashSlothCausalLMOutputWithPast(**made)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            patch_features=patch_features,
            cache=cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = scale_logits(self.lm_head(outputs.last_hidden_state[:, kept]), self.config.text_config)  # type: ignore[arg-type]
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        kept_outputs = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return FlashSlothCausalLMOutputWithPast(loss=loss, logits=logits, **kept_outputs)


def _one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The KV cache, passed under either of its two names."""
    if cache is not None and past_key_values is not None:
        raise ValueError(
            "`cache` and `past_key_values` are two names of the KV cache, but both were given; pass one of them. "
            f"`generate` of the installed transformers takes `{CACHE_NAME}`."
        )
    return past_key_values if cache is None else cache


def _backbone_kwargs(kwargs: dict[str, Any], backbone: PreTrainedModel) -> dict[str, Any]:
    """Drop `output_attentions` unless attention is eager: fused kernels return no weights, and would warn."""
    is_eager = backbone.config._attn_implementation == "eager"
    return {name: value for name, value in kwargs.items() if is_eager or name != "output_attentions"}


__all__ = ["FlashSlothForConditionalGeneration", "FlashSlothModel", "FlashSlothPreTrainedModel"]
