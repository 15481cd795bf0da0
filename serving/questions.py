"""Runs the Embedded Query module on the questions of a step, all of them together.

Within a step of vLLM's scheduler:

    forward ─ writes ids and patches into the token cache, finds questions, inserts query tokens into the embeddings
    decoder layers up to `query_layer_idx` ─ meanwhile, the sizes of the questions are copied to the host
    `update_queries`, a custom op ─ writes the states of all tokens into the token cache; query tokens read their
        questions and patches from there and are updated
    remaining decoder layers
"""

import inspect
from typing import NamedTuple

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from flashsloth import FlashSlothConfig
from flashsloth.modeling_flashsloth import EmbeddedQuery, PromptSpans

from .token_cache import TokenCache, TokenCacheMetadata

MAX_PATCHES = 2**15
"""Patches that are read at a time, padding included, unless a single request has more."""


class QuestionSizes(NamedTuple):
    """How much the query tokens of a request read in a step.

    Attributes:
        num_queries: Query tokens to update.
        start: Position of the first token that any of them reads.
        end: Position after the last such token.
        num_image_tokens: Image tokens whose patches they read.
    """

    num_queries: int
    start: int
    end: int
    num_image_tokens: int


class StepQuestions:
    """Query tokens whose prompt is computed in a step, and what they may read; row by row.

    Everything is computed on the device, from the ids in the token cache. The host learns the sizes of the questions
    when it asks for them, in the middle of the decoder, so that the device never idles.

    Args:
        metadata: Where the step's tokens are; it must have prefill rows.
        cache: The token cache, with the ids of this step's tokens.
        config: Config of the model.
    """

    def __init__(self, metadata: TokenCacheMetadata, cache: TokenCache, config: FlashSlothConfig) -> None:
        device = metadata.slot_mapping.device
        fields = [(row.row, row.first_token, row.num_computed, row.num_tokens) for row in metadata.prefill_rows]
        rows, first_token, num_computed, num_tokens = _to_device(fields, device).unsqueeze(-1).unbind(1)
        self.block_table = metadata.block_table[rows.squeeze(1)]
        length = max(row.num_tokens for row in metadata.prefill_rows)
        positions = torch.arange(length, device=device).expand(len(fields), -1)  # (num_rows, length)
        token_ids = cache.read_ids(cache.slots(self.block_table, positions))
        self.spans = spans = PromptSpans(torch.where(positions < num_tokens, token_ids, -1), config)
        self.is_query = spans.query_mask & (positions >= num_computed)
        self.is_updated = self.is_query & (spans.num_tiles_before > 0)
        self.token_index = first_token + positions - num_computed  # among all tokens of the step
        self._copied: torch.cuda.Event | None = None
        self._sizes = self._copy_sizes(config.image_seq_length)

    def _copy_sizes(self, image_seq_length: int) -> torch.Tensor:
        spans, is_updated = self.spans, self.is_updated
        length = is_updated.shape[1]
        sizes = QuestionSizes(
            num_queries=is_updated.sum(dim=1),
            start=torch.where(is_updated, spans.instruction_start, length).amin(dim=1).clamp(min=0),
            end=torch.where(is_updated, spans.query_start, 0).amax(dim=1),
            num_image_tokens=torch.where(is_updated, spans.num_tiles_before, 0).amax(dim=1) * image_seq_length,
        )
        on_device = torch.stack(list(sizes), dim=1)
        on_host = on_device.to("cpu", non_blocking=on_device.is_cuda)
        if on_device.is_cuda:
            self._copied = torch.cuda.current_stream(on_device.device).record_event()
        return on_host

    def sizes(self) -> list[QuestionSizes]:
        """Sizes of every row's questions; waits until the device has computed them."""
        if self._copied is not None:
            self._copied.synchronize()
        return [QuestionSizes(*row) for row in self._sizes.tolist()]

    def insert_queries(self, inputs_embeds: torch.Tensor, queries: torch.Tensor) -> None:
        """Write query tokens into the embeddings of the step's tokens.

        Args:
            inputs_embeds: `(num_tokens, hidden_size)`, changed in place: vLLM's graphs read this memory.
            queries: Embeddings of the query tokens of one question, `(num_query_tokens, hidden_size)`.
        """
        num_tokens = inputs_embeds.shape[0]
        index = torch.where(self.is_query, self.token_index, num_tokens)
        ranks = index.new_full((num_tokens + 1,), -1)
        ranks = ranks.scatter(0, index.flatten(), self.spans.query_rank.flatten())[:num_tokens].unsqueeze(-1)
        inputs_embeds.copy_(torch.where(ranks >= 0, queries[ranks.squeeze(-1).clamp(min=0)], inputs_embeds))


class QuestionUpdater:
    """Calls the Embedded Query module of a model in every step of the scheduler.

    Args:
        config: Config of the model.
        embedded_query: Its Embedded Query module.
        cache: Its token cache.
        max_model_len: Longest prompt and answer, in tokens.
    """

    def __init__(
        self, config: FlashSlothConfig, *, embedded_query: EmbeddedQuery, cache: TokenCache, max_model_len: int
    ) -> None:
        self.config, self.embedded_query, self.cache = config, embedded_query, cache
        self.max_patches = max(MAX_PATCHES, max_model_len * cache.num_window_patches)
        self.questions: StepQuestions | None = None
        cache.update_queries = self.update_queries

    def begin_step(
        self, input_ids: torch.Tensor, image_tokens: torch.Tensor | None, patches: torch.Tensor | None
    ) -> None:
        """Store ids and patches, and find the questions.

        Args:
            input_ids: Ids of the step's tokens, perhaps with padding after them, `(num_tokens,)`.
            image_tokens: Indices of the image tokens among them; `None`: there are none.
            patches: Patches of these image tokens' windows, `(num_image_tokens, window² · vision_hidden_size)`.
        """
        self.questions = None
        metadata = self.cache.metadata()
        if metadata is None:
            return
        slots = metadata.slot_mapping
        self.cache.write_ids(slots, input_ids[: len(slots)])
        if image_tokens is not None:
            self.cache.write_patches(slots[image_tokens], patches)
        if metadata.prefill_rows:
            self.questions = StepQuestions(metadata, self.cache, self.config)

    def update_queries(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Store the states of a step's tokens, and update its query tokens.

        Args:
            hidden_states: First part of the input of the decoder layer `query_layer_idx`, `(…, num_tokens,
                hidden_size)`; changed in place.
            residual: Second part, if the decoder keeps it apart; the layer's input is the sum of both.
        """
        metadata = self.cache.metadata()
        if metadata is None:
            self._reserve_memory(hidden_states)
            return
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        slots = metadata.slot_mapping
        inputs = hidden_states[: len(slots)]
        if residual is not None:
            inputs = inputs + residual.view(hidden_states.shape)[: len(slots)]
        text = self.embedded_query.text_proj(inputs)
        self.cache.write_text(slots, text)
        questions, self.questions = self.questions, None
        if questions is None:
            return
        sizes = questions.sizes()
        for group in _groups(sizes, MAX_PATCHES // self.cache.num_window_patches):
            self._update(hidden_states, text, questions, group, [sizes[row] for row in group])

    def _update(
        self,
        hidden_states: torch.Tensor,
        text: torch.Tensor,
        questions: StepQuestions,
        group: list[int],
        sizes: list[QuestionSizes],
    ) -> None:
        """Update the query tokens of some rows."""
        rows = _to_device(group, text.device)
        block_table, spans = questions.block_table[rows], questions.spans
        is_updated = questions.is_updated[rows]
        queries = _first(is_updated, max(size.num_queries for size in sizes))  # positions, (num_rows, num_queries)

        def at_queries(values: torch.Tensor) -> torch.Tensor:
            return values[rows].gather(1, queries).unsqueeze(-1)  # (num_rows, num_queries, 1)

        is_real = is_updated.gather(1, queries).unsqueeze(-1)
        token_index = torch.where(is_real, at_queries(questions.token_index), 0).squeeze(-1)

        start, end = _to_device([(size.start, size.end) for size in sizes], text.device).unsqueeze(-1).unbind(1)
        tokens = start + torch.arange(max(size.end - size.start for size in sizes), device=text.device)
        read = self.cache.read_text(self.cache.slots(block_table, tokens.clamp(max=is_updated.shape[1] - 1)))
        # Memory outside the question may hold anything, also NaN, which a mask would not keep out.
        read = read.masked_fill((tokens >= end).unsqueeze(-1), 0)  # (num_rows, num_tokens, query_hidden_size)
        token_positions = tokens.unsqueeze(1)
        is_read = (token_positions >= at_queries(spans.instruction_start)) & (
            token_positions < at_queries(spans.query_start)
        )
        guided = self.embedded_query.read_question(text[token_index], read, is_read & is_real)

        patches, is_seen = self._read_patches(block_table, spans.image_mask[rows], [s.num_image_tokens for s in sizes])
        tiles = torch.arange(patches.shape[1], device=text.device) // self.config.image_seq_length
        patch_mask = is_seen.unsqueeze(1) & (tiles < at_queries(spans.num_tiles_before)) & is_real
        patches = self.embedded_query.mark_tiles(patches, tiles)
        keys, values = self.embedded_query.project_patches(patches.flatten(1, 2))
        patch_mask = patch_mask.repeat_interleave(patches.shape[2], dim=-1)
        gain = self.embedded_query.out_proj(self.embedded_query.image_attention(guided, keys, values, patch_mask))
        gain = torch.where(is_real, gain, 0.0).to(hidden_states.dtype)
        hidden_states.index_add_(0, token_index.flatten(), gain.flatten(0, 1))

    def _read_patches(
        self, block_table: torch.Tensor, image_mask: torch.Tensor, num_image_tokens: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches of the first image tokens of some rows, and which of them were asked for.

        Returns:
            `(num_rows, num_image_tokens, num_window_patches, vision_hidden_size)`, zero at padding, and
            `(num_rows, num_image_tokens)`, False at padding.
        """
        longest = max(num_image_tokens)
        counts = _to_device(num_image_tokens, image_mask.device).unsqueeze(-1)
        is_seen = torch.arange(longest, device=image_mask.device) < counts
        patches = self.cache.read_patches(self.cache.slots(block_table, _first(image_mask, longest)))
        return patches.masked_fill(~is_seen[..., None, None], 0), is_seen

    def _reserve_memory(self, hidden_states: torch.Tensor) -> None:
        """Allocate as much memory as `_update` may need, while vLLM measures how much is left for the KV cache."""
        attention = self.embedded_query.image_attention
        width, vision_width = self.config.query_hidden_size, self.config.vision_config.hidden_size
        heads = max(width, vision_width) + 8 * attention.num_heads  # padded copies of keys and values
        values_per_patch = 3 * vision_width + 3 * width + 2 * heads
        torch.empty(self.max_patches * values_per_patch, dtype=hidden_states.dtype, device=hidden_states.device)


def _groups(sizes: list[QuestionSizes], max_image_tokens: int) -> list[list[int]]:
    """Divide the rows with queries into groups of similar size, whose padded image tokens fit the limit."""
    rows = sorted((row for row, size in enumerate(sizes) if size.num_queries), key=lambda row: sizes[row][-1])
    groups: list[list[int]] = []
    for row in rows:
        if groups and (len(groups[-1]) + 1) * sizes[row].num_image_tokens <= max_image_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _first(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the first True values of every row, padded with other positions, `(num_rows, count)`."""
    return mask.int().argsort(dim=1, descending=True, stable=True)[:, :count]


def _to_device(values: list, device: torch.device) -> torch.Tensor:
    """Copy whole numbers to the device without waiting for it."""
    on_host = torch.tensor(values, dtype=torch.long, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def update_queries(hidden_states: torch.Tensor, residual: torch.Tensor | None, cache_name: str) -> None:
    """Update the query tokens of the current step; see `QuestionUpdater.update_queries`.

    A custom op: `torch.compile` does not look into it, and vLLM's piecewise CUDA graphs leave it out.
    """
    get_forward_context().no_compile_layers[cache_name].update_queries(hidden_states, residual)


def _fake_update_queries(hidden_states: torch.Tensor, residual: torch.Tensor | None, cache_name: str) -> None:
    """What the op returns, for tracing."""


OP_NAME = "flashsloth_update_queries"
direct_register_custom_op(OP_NAME, update_queries, mutates_args=["hidden_states"], fake_impl=_fake_update_queries)


def register_update(layer: nn.Module, cache_name: str) -> None:
    """Update query tokens in the input of a decoder layer.

    Args:
        layer: The decoder layer `query_layer_idx`, whose `forward` takes `hidden_states` and perhaps `residual`.
        cache_name: Name of the model's token cache.

    Raises:
        TypeError: If the layer has another interface.
    """
    names = list(inspect.signature(layer.forward).parameters)
    if "hidden_states" not in names:
        raise TypeError(
            f"FlashSloth updates `hidden_states` before a decoder layer, but vLLM's {type(layer).__name__} takes "
            f"{', '.join(names)}; choose another `text_config`, such as phi, llama, qwen2 or qwen3."
        )
    op = getattr(torch.ops.vllm, OP_NAME)

    def argument(name: str, args: tuple, kwargs: dict) -> torch.Tensor | None:
        if name in kwargs:
            return kwargs[name]
        index = names.index(name) if name in names else len(args)
        return args[index] if index < len(args) else None

    def hook(_layer: nn.Module, args: tuple, kwargs: dict) -> None:
        op(argument("hidden_states", args, kwargs), argument("residual", args, kwargs), cache_name)

    layer.register_forward_pre_hook(hook, with_kwargs=True)
