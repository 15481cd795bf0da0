r"""Where images, questions and queries stand in a batch of prompts.

    … USER: <image>×81 \n question <query>×9 ASSISTANT: answer </s>USER: question 2 <query>×9 ASSISTANT:
                         └instruction┘└block┘                         └instruction┘└block┘

All of it follows from the ids, by masks over the sequence: no loops over rows, no padding copies, and nothing waits for
the device: what the host has to know, to refuse prompts that cannot be answered right, is copied to it on the side.
Several samples may be packed in one row, if `position_ids` start anew with each: a question reads its own sample only.
"""

from typing import NamedTuple

import torch
from torch import nn

from .configuration_flashsloth import FlashSlothConfig


class PromptSpans(NamedTuple):
    """Where images, questions and queries stand in a batch of prompts, as masks and indices over the sequence.

    Attributes:
        image_mask: True at image tokens, `(batch, seq_length)`.
        query_mask: True at query tokens, `(batch, seq_length)`.
        query_rank: Which query of its block a query token is, from 0, `(batch, seq_length)`.
        query_start: Where the block of a query token begins, `(batch, seq_length)`.
        instruction_start: Where an instruction begins that ends here, `(batch, seq_length)`; -1: nowhere in this call.
        num_tiles_before: Tiles of the row that stand before a position or are in the cache, `(batch, seq_length)`.
        num_image_tokens: Image tokens of every row, `(batch,)`.
        num_cached_tiles: Tiles of every row that are in the cache, `(batch,)`.
        first_tile: Index of every row's first tile among all tiles, `(batch,)`.
        is_complete: Whether nothing of the prompt is in the cache, as far as the caller said.
        sample_start: Where the sample of a token begins, in packed rows, `(batch, seq_length)`; `None`: every row is
            one sample.
        num_foreign_tiles: Tiles of the row that stand in samples before that one, `(batch, seq_length)`; `None`: none.
    """

    image_mask: torch.Tensor
    query_mask: torch.Tensor
    query_rank: torch.Tensor
    query_start: torch.Tensor
    instruction_start: torch.Tensor
    num_tiles_before: torch.Tensor
    num_image_tokens: torch.Tensor
    num_cached_tiles: torch.Tensor
    first_tile: torch.Tensor
    is_complete: bool
    sample_start: torch.Tensor | None = None
    num_foreign_tiles: torch.Tensor | None = None

    @classmethod
    def find(
        cls,
        input_ids: torch.LongTensor,
        config: FlashSlothConfig,
        num_cached_tiles: torch.LongTensor | None = None,
        begins_instruction: torch.BoolTensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> "PromptSpans":
        """Derive the spans from the ids, without reading a value of them on the host.

        Args:
            input_ids: `(batch, seq_length)`.
            config: Ids, id patterns and counts.
            num_cached_tiles: Tiles of every row that are in the cache, `(batch,)`; `None`: none.
            begins_instruction: Whether an instruction starts with a row's first token, for what is in the cache ends
                like one of `instruction_start_ids`, `(batch,)`; `None`: no.
            position_ids: Of rows in which samples may be packed, `(batch, seq_length)`: a sample begins wherever a
                position does not follow the one before it. `None`: every row is one sample.
        """
        image_mask = input_ids == config.image_token_id
        query_mask = input_ids == config.query_token_id
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        query_rank = (query_mask.cumsum(dim=1) - 1) % config.num_query_tokens
        sample_start = None
        if position_ids is not None:
            breaks = sample_breaks(position_ids).expand_as(input_ids)
            sample_start = torch.where(breaks, positions, 0).cummax(dim=1).values
        starts = torch.where(instruction_starts(input_ids, config, sample_start), positions + 1, -1)
        if begins_instruction is not None:
            first = torch.where(starts[:, 0] < 0, begins_instruction.long() - 1, starts[:, 0])
            starts = torch.cat([first.unsqueeze(1), starts[:, 1:]], dim=1)
        num_image_tokens = image_mask.sum(dim=1)
        is_complete = num_cached_tiles is None
        if is_complete:
            num_cached_tiles = torch.zeros_like(num_image_tokens)
        num_tiles = num_image_tokens // config.image_seq_length + num_cached_tiles
        tiles_here = image_mask.cumsum(dim=1) // config.image_seq_length
        instruction_start, num_foreign_tiles = starts.cummax(dim=1).values, None
        if sample_start is not None:
            instruction_start = torch.where(instruction_start > sample_start, instruction_start, -1)
            num_foreign_tiles = nn.functional.pad(tiles_here[:, :-1], (1, 0)).gather(1, sample_start)
        return cls(
            image_mask=image_mask,
            query_mask=query_mask,
            query_rank=query_rank,
            query_start=positions - query_rank,
            instruction_start=instruction_start,
            num_tiles_before=tiles_here + num_cached_tiles.unsqueeze(1),
            num_image_tokens=num_image_tokens,
            num_cached_tiles=num_cached_tiles,
            first_tile=num_tiles.cumsum(dim=0) - num_tiles,
            is_complete=is_complete,
            sample_start=sample_start,
            num_foreign_tiles=num_foreign_tiles,
        )

    def bounds(self, config: FlashSlothConfig, num_tiles: int) -> "PromptSizes":
        """What the shapes alone tell, for graphs that are traced once for prompts of many kinds.

        A row has room for so many tiles, unless some of them are in the cache.
        """
        if self.is_complete:
            num_tiles = min(num_tiles, self.image_mask.shape[1] // config.image_seq_length)
        is_packed = self.sample_start is not None
        return PromptSizes(num_tiles, queries_per_row=self.query_mask.shape[1], is_padded=True, is_packed=is_packed)

    def query_positions(self, queries_per_row: int) -> torch.LongTensor:
        """Where the queries of every row are, in order, and behind them positions of other tokens.

        Args:
            queries_per_row: How many positions of a row are wanted, at least as many as it has queries.

        Returns:
            `(batch, queries_per_row)`; no position comes twice.
        """
        batch_size, length = self.query_mask.shape
        if queries_per_row == length:  # a traced graph, which cannot know how many there are
            return torch.arange(length, device=self.query_mask.device).expand(batch_size, -1)
        return self.query_mask.int().argsort(dim=1, descending=True, stable=True)[:, :queries_per_row]

    def count(
        self,
        config: FlashSlothConfig,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> "PromptCounts":
        """Begin to copy to the host what tells whether the prompts can be answered.

        Args:
            config: Counts.
            attention_mask: `(batch, any_length)`, 0 at padding; `None`: there is none.
            position_ids: `(batch, seq_length)`, of a call without a cache; `None`: not given.
        """
        has_tiles = self.num_tiles_before > (0 if self.num_foreign_tiles is None else self.num_foreign_tiles)
        after_query = nn.functional.pad(self.query_mask[:, :-1], (1, 0))
        torn = self.query_mask & (self.query_rank > 0) & ~after_query
        lost = self.query_mask & has_tiles & (self.instruction_start < 0)
        facts = {
            "num_image_tokens": self.num_image_tokens,
            "num_cached_tiles": self.num_cached_tiles,
            "num_queries": self.query_mask.sum(dim=1),
        }
        if attention_mask is not None:
            facts["is_padded"] = (attention_mask == 0).any(dim=1)
            if position_ids is not None:
                starts_anew = (position_ids[:, 1:] < position_ids[:, :-1]).any(dim=1)
                facts["is_ambiguous"] = starts_anew & ~facts["is_padded"]
        if self.sample_start is not None:
            image_tokens = nn.functional.pad(self.image_mask[:, :-1].cumsum(dim=1), (1, 0))
            facts["is_cut"] = (image_tokens.gather(1, self.sample_start) % config.image_seq_length > 0).any(dim=1)
            facts["is_packed"] = (self.sample_start > 0).any(dim=1)
            torn = torn | (self.query_mask & (self.query_start < self.sample_start))
        facts |= {"is_torn": torn.any(dim=1), "is_lost": lost.any(dim=1)}
        return PromptCounts(facts)


class PromptSizes(NamedTuple):
    """Sizes of a batch of prompts.

    Attributes:
        tiles_per_row: How many tiles the row with most of them reads; 0 if there are neither image nor query tokens.
        queries_per_row: How many query tokens the row with most of them has, but at least 1.
        is_padded: Whether there may be padding.
        is_packed: Whether a row may hold several samples.
    """

    tiles_per_row: int
    queries_per_row: int
    is_padded: bool
    is_packed: bool = False


class PromptRow(NamedTuple):
    """What the host has to know of a row; see `PromptSpans`."""

    num_image_tokens: int
    num_cached_tiles: int
    num_queries: int
    is_torn: int
    is_lost: int
    is_padded: int = 0
    is_cut: int = 0
    is_packed: int = 0
    is_ambiguous: int = 0


class PromptCounts:
    """A few numbers of every row, on their way to the host.

    Whoever queues work for the device before asking for them does not keep it waiting: they arrive before that work
    begins.

    Args:
        facts: By the names of `PromptRow`, `(batch,)` each.
    """

    def __init__(self, facts: dict[str, torch.Tensor]) -> None:
        counts = torch.stack(list(facts.values()), dim=1)
        self._names = list(facts)
        self._rows = counts.to("cpu", non_blocking=counts.is_cuda)
        self._arrival = torch.cuda.current_stream(counts.device).record_event() if counts.is_cuda else None

    def check(self, config: FlashSlothConfig, num_tiles: int) -> PromptSizes:
        """Refuse prompts that cannot be answered right.

        Args:
            config: Counts.
            num_tiles: Tiles in `pixel_values`.

        Raises:
            ValueError: If image tokens and images differ in number, image or query tokens were cut, or a query
                block has lost its question.
        """
        if self._arrival is not None:
            self._arrival.synchronize()
        rows = [PromptRow(**dict(zip(self._names, row, strict=True))) for row in self._rows.tolist()]
        for number, row in enumerate(rows):
            _check_row(number, row, config)
        _check_tile_count(rows, config, num_tiles)
        is_used = any(row.num_image_tokens or row.num_queries for row in rows)
        tiles = [row.num_image_tokens // config.image_seq_length + row.num_cached_tiles for row in rows]
        return PromptSizes(
            tiles_per_row=max(tiles) if is_used else 0,
            queries_per_row=max(1, *(row.num_queries for row in rows)),
            is_padded=any(row.is_padded for row in rows),
            is_packed=any(row.is_packed for row in rows),
        )


def _check_row(number: int, row: PromptRow, config: FlashSlothConfig) -> None:
    if row.num_image_tokens % config.image_seq_length or row.is_cut:
        raise ValueError(
            f"Row {number} has {row.num_image_tokens} image tokens{', cut between packed samples' * row.is_cut}, but a "
            f"tile has {config.image_seq_length}: the prompt was truncated, or split by a chunked prefill, inside a "
            "image. Raise `max_length`, or leave `prefill_chunk_size` out."
        )
    if row.num_queries % config.num_query_tokens or row.is_torn:
        raise ValueError(
            f"Row {number} has {row.num_queries} query tokens that are not in whole blocks of "
            f"{config.num_query_tokens}: the prompt was truncated, or not built by `FlashSlothProcessor`."
        )
    if row.is_ambiguous:
        raise ValueError(
            f"`position_ids` of row {number} start anew within it, as for packed samples, but `attention_mask` says "
            "that all its tokens belong together; leave `attention_mask` out to keep packed samples apart."
        )
    layers = set(getattr(config.text_config, "layer_types", None) or ())
    mixing = sorted(kind for kind in layers if not kind.endswith("_attention") or kind == "linear_attention")
    if row.is_packed and mixing:
        raise ValueError(
            f"`position_ids` of row {number} start anew within it, as for packed samples, but the decoder "
            f"({config.text_config.model_type}) has layers of type {', '.join(mixing)}, which would mix them; pad rows "
            "of one sample each instead."
        )
    if row.is_lost:
        raise ValueError(
            f"Row {number} has query tokens, but their question does not begin in this call (none of "
            f"`instruction_start_ids`={config.instruction_start_ids} before them): a chunked prefill or a "
            "cached prefix must not part a question from its queries, and a raw prompt needs the original "
            "format, `USER: <image>\\nQUESTION<learnable> ASSISTANT:`."
        )


def _check_tile_count(rows: list[PromptRow], config: FlashSlothConfig, num_tiles: int) -> None:
    num_image_tokens, num_cached, num_queries = (sum(row[i] for row in rows) for i in range(3))
    expected = num_image_tokens // config.image_seq_length + num_cached
    if num_tiles == expected or (num_tiles == 0 and num_image_tokens == 0 and num_queries == 0):
        return
    where = f" and {num_cached} tiles in the cache" if num_cached else ""
    hint = "pass the pixels of all images again when you continue on a cache, and to TRL as a column `images`"
    if num_tiles > expected:
        hint = "keep prompts whole (TRL cuts them at its `max_length`, which may be None)"
    raise ValueError(
        f"`input_ids` has {num_image_tokens} image tokens{where}, so {expected} tiles are expected, but "
        f"`pixel_values` gives {num_tiles} ({num_tiles * config.image_seq_length} features); build both with "
        f"`FlashSlothProcessor`, {hint}, and leave `prefill_chunk_size` out."
    )


def instruction_starts(
    input_ids: torch.LongTensor, config: FlashSlothConfig, sample_start: torch.Tensor | None = None
) -> torch.BoolTensor:
    """True at tokens after which an instruction starts, `(batch, seq_length)`.

    Args:
        input_ids: `(batch, seq_length)`.
        config: Id patterns.
        sample_start: Where the sample of a token begins, `(batch, seq_length)`, in which its pattern has to begin as
            well; `None`: every row is one sample.
    """
    ends = torch.zeros_like(input_ids, dtype=torch.bool)
    for pattern in config.instruction_start_ids:
        found = _ends_of(pattern, input_ids)
        if sample_start is not None:
            begins = torch.arange(input_ids.shape[1], device=input_ids.device) - (len(pattern) - 1)
            found = found & (begins >= sample_start)
        ends = ends | found
    return ends


def sample_breaks(position_ids: torch.LongTensor) -> torch.BoolTensor:
    """True where a position does not follow the one before it, as transformers finds packed samples.

    Args:
        position_ids: `(batch, seq_length)`.
    """
    follows = position_ids[:, 1:] == position_ids[:, :-1] + 1
    return nn.functional.pad(~follows, (1, 0))


def _ends_of(pattern: list[int], input_ids: torch.LongTensor) -> torch.Tensor:
    """True where an id pattern ends, `(batch, seq_length)`."""
    length = input_ids.shape[1]
    if length < len(pattern):
        return torch.zeros_like(input_ids, dtype=torch.bool)
    matches = input_ids[:, : length - len(pattern) + 1] == pattern[0]
    for offset, token_id in enumerate(pattern[1:], start=1):
        matches = matches & (input_ids[:, offset : length - len(pattern) + 1 + offset] == token_id)
    return nn.functional.pad(matches, (len(pattern) - 1, 0))
