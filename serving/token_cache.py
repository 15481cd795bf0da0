"""What query tokens may have to read later, kept in vLLM's paged KV cache as one further layer.

A question can reach the model in pieces: its prompt's beginning may be cached from another request, long prompts are
computed in chunks, and a preempted request starts anew. So a question's query tokens may have to read image patches and
words that were computed in earlier steps. For every token, this layer keeps

    id (3 digits) | its state as the Embedded Query module reads it (query_hidden_size) | patches of its window

The patches are those of an image token (window² · vision_hidden_size); other tokens leave them empty. vLLM allocates,
shares and frees the layer's blocks together with those of the decoder's layers, so that prefix caching, chunked prefill
and preemption need no special case.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec, MLAAttentionSpec

from flashsloth import FlashSlothConfig

ID_BASE, NUM_ID_DIGITS = 256, 3  # the largest whole numbers that bfloat16 represents without gaps go up to 256
WIDTH_MULTIPLE = 16


@dataclass
class PrefillRow:
    """A request of which this step computes part of the prompt.

    Attributes:
        row: Its row in the block table.
        first_token: Index of its first token in this step among all tokens of the step.
        num_computed: Tokens of the request before this step.
        num_tokens: Tokens of the request up to and including this step.
    """

    row: int
    first_token: int
    num_computed: int
    num_tokens: int


@dataclass
class TokenCacheMetadata(AttentionMetadata):
    """Where the tokens of a step are.

    Attributes:
        slot_mapping: Slot of every token of the step, negative at padding, `(num_tokens,)`.
        block_table: Blocks of every request, `(num_requests, max_blocks)`.
        prefill_rows: The requests whose prompt is being computed.
    """

    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    prefill_rows: list[PrefillRow]


class TokenCacheMetadataBuilder(AttentionMetadataBuilder[TokenCacheMetadata]):
    """Builds `TokenCacheMetadata` from what vLLM knows on the host, without waiting for the device."""

    # The only graphs that would contain the Embedded Query module are those of whole decoding steps, and vLLM also
    # replays these for a prompt of which a single token is left to compute, which may be a query token.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TokenCacheMetadata:
        """Build the metadata of a step."""
        common = common_attn_metadata
        rows: list[PrefillRow] = []
        if common.is_prefilling is not None and common.is_prefilling.any():
            starts = common.query_start_loc_cpu.tolist()
            num_tokens = common.seq_lens_cpu_upper_bound.tolist()  # exact for prompts
            for row in common.is_prefilling[: len(num_tokens)].nonzero().flatten().tolist():
                first, end = starts[row : row + 2]
                if first < end:
                    rows.append(PrefillRow(row, first, num_tokens[row] - (end - first), num_tokens[row]))
        return TokenCacheMetadata(common.slot_mapping, common.block_table_tensor, rows)


class TokenCacheImpl(AttentionImpl):
    """No attention: the layer only stores."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Never called."""
        raise NotImplementedError("The token cache computes no attention.")


class TokenCacheBackend(AttentionBackend):
    """Tells vLLM how the layer's metadata is built; any block size and layout will do."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's logs."""
        return "FLASHSLOTH_TOKEN_CACHE"

    @staticmethod
    def get_impl_cls() -> type[TokenCacheImpl]:
        """Class of the attention, which there is none of."""
        return TokenCacheImpl

    @staticmethod
    def get_builder_cls() -> type[TokenCacheMetadataBuilder]:
        """Class of the metadata builder."""
        return TokenCacheMetadataBuilder


class TokenCache(nn.Module, AttentionLayerBase):
    """The layer. It has no weights, and every tensor parallel process has all of it.

    Args:
        config: Config of the model.
        vllm_config: Config of the engine, in which the layer registers itself.
        name: Name of the layer; vLLM needs exactly one number in it.
    """

    kv_cache: torch.Tensor  # (num_blocks, 1, block_size, width)

    def __init__(self, config: FlashSlothConfig, *, vllm_config: VllmConfig, name: str) -> None:
        super().__init__()
        self.name = name
        self.dtype = vllm_config.model_config.dtype
        self.impl = TokenCacheImpl()
        self.kv_cache = torch.tensor([])
        self.num_window_patches = config.pooling_window_size**2
        text_end = NUM_ID_DIGITS + config.query_hidden_size
        patches_end = text_end + self.num_window_patches * config.vision_config.hidden_size
        self.ids, self.text = slice(0, NUM_ID_DIGITS), slice(NUM_ID_DIGITS, text_end)
        self.patches = slice(text_end, patches_end)
        self.width = -(-patches_end // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The backend that builds the layer's metadata."""
        return TokenCacheBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """What vLLM has to allocate: one vector per token, like the latent vector of multi-head latent attention."""
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            max_tp_shards=1,
            head_size=self.width,
            dtype=self.dtype,
        )

    def metadata(self) -> TokenCacheMetadata | None:
        """Metadata of the current step; `None` while vLLM measures memory or compiles."""
        metadata = get_forward_context().attn_metadata
        return metadata.get(self.name) if isinstance(metadata, dict) else None

    def slots(self, block_table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Slots of tokens.

        Args:
            block_table: `(num_rows, max_blocks)`.
            positions: Positions of tokens in their requests, `(num_rows, num_positions)`.

        Returns:
            `(num_rows, num_positions)`.
        """
        block_size = self.kv_cache.shape[2]
        return block_table.long().gather(1, positions // block_size) * block_size + positions % block_size

    def write_ids(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Store token ids, `(num_tokens,)`."""
        digits = [token_ids // ID_BASE**power % ID_BASE for power in reversed(range(NUM_ID_DIGITS))]
        self._write(slots, self.ids, torch.stack(digits, dim=-1))

    def write_text(self, slots: torch.Tensor, text: torch.Tensor) -> None:
        """Store outputs of the Embedded Query module's `text_proj`, `(num_tokens, query_hidden_size)`."""
        self._write(slots, self.text, text)

    def write_patches(self, slots: torch.Tensor, patches: torch.Tensor) -> None:
        """Store the patches of image tokens' windows, `(num_tokens, window² · vision_hidden_size)`."""
        self._write(slots, self.patches, patches)

    def read_ids(self, slots: torch.Tensor) -> torch.Tensor:
        """Read token ids of slots of any shape."""
        digits = self._read(slots, self.ids).long()
        weights = [ID_BASE**power for power in reversed(range(NUM_ID_DIGITS))]
        return sum(digits[..., index] * weight for index, weight in enumerate(weights))

    def read_text(self, slots: torch.Tensor) -> torch.Tensor:
        """Read what `write_text` stored, `(…, query_hidden_size)`."""
        return self._read(slots, self.text)

    def read_patches(self, slots: torch.Tensor) -> torch.Tensor:
        """Read the patches of image tokens, `(…, num_window_patches, vision_hidden_size)`."""
        return self._read(slots, self.patches).unflatten(-1, (self.num_window_patches, -1))

    def _write(self, slots: torch.Tensor, part: slice, values: torch.Tensor) -> None:
        # vLLM marks padding with negative slots. Block 0 belongs to no request, so its slot 0 can take padding.
        slots, block_size = slots.clamp(min=0), self.kv_cache.shape[2]
        self.kv_cache[slots // block_size, 0, slots % block_size, part] = values.to(self.kv_cache.dtype)

    def _read(self, slots: torch.Tensor, part: slice) -> torch.Tensor:
        block_size = self.kv_cache.shape[2]
        return self.kv_cache[slots // block_size, 0, slots % block_size, part]
