r"""Where pictures, questions and queries stand in a batch of prompts.

    … USER: <image>×81 \n question <query>×9 ASSISTANT: answer </s>USER: question 2 <query>×9 ASSISTANT:
                         └instruction┘└block┘                         └instruction┘└block┘

All of it follows from the ids, by masks over the sequence: no loops over rows, no padding copies, and nothing waits for
the device: what the host has to know, to refuse prompts that cannot be answered right, is copied to it on the side.
"""

from typing import NamedTuple

import torch
from torch import nn

from .configuration_flashsloth import FlashSlothConfig


class PromptSpans(NamedTuple):
    """Where pictures, questions and queries stand in a batch of prompts, as masks and indices over the sequence.

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

    @classmethod
    def find(
        cls,
        input_ids: torch.LongTensor,
        config: FlashSlothConfig,
        num_cached_tiles: torch.LongTensor | None = None,
        begins_instruction: torch.BoolTensor | None = None,
    ) -> "PromptSpans":
        """Derive the spans from the ids, without reading a value of them on the host.

        Args:
            input_ids: `(batch, seq_length)`.
            config: Ids, id patterns and counts.
            num_cached_tiles: Tiles of every row that are in the cache, `(batch,)`; `None`: none.
            begins_instruction: Whether an instruction starts with a row's first token, for what is in the cache ends
                like one of `instruction_start_ids`, `(batch,)`; `None`: no.
        """
        image_mask = input_ids == config.image_token_id
        query_mask = input_ids == config.query_token_id
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        query_rank = (query_mask.cumsum(dim=1) - 1) % config.num_query_tokens
        starts = torch.where(instruction_starts(input_ids, config), positions + 1, -1)
        if begins_instruction is not None:
            first = torch.where(starts[:, 0] < 0, begins_instruction.long() - 1, starts[:, 0])
            starts = torch.cat([first.unsqueeze(1), starts[:, 1:]], dim=1)
        num_image_tokens = image_mask.sum(dim=1)
        is_complete = num_cached_tiles is None
        if is_complete:
            num_cached_tiles = torch.zeros_like(num_image_tokens)
        num_tiles = num_image_tokens // config.image_seq_length + num_cached_tiles
        tiles_here = image_mask.cumsum(dim=1) // config.image_seq_length
        return cls(
            image_mask=image_mask,
            query_mask=query_mask,
            query_rank=query_rank,
            query_start=positions - query_rank,
            instruction_start=starts.cummax(dim=1).values,
            num_tiles_before=tiles_here + num_cached_tiles.unsqueeze(1),
            num_image_tokens=num_image_tokens,
            num_cached_tiles=num_cached_tiles,
            first_tile=num_tiles.cumsum(dim=0) - num_tiles,
            is_complete=is_complete,
        )

    def bounds(self, config: FlashSlothConfig, num_tiles: int) -> "PromptSizes":
        """What the shapes alone tell, for graphs that are traced once for prompts of many kinds.

        A row has room for so many tiles, unless some of them are in the cache.
        """
        if self.is_complete:
            num_tiles = min(num_tiles, self.image_mask.shape[1] // config.image_seq_length)
        return PromptSizes(num_tiles, queries_per_row=self.query_mask.shape[1], is_padded=True)

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

    def count(self, attention_mask: torch.Tensor | None = None) -> "PromptCounts":
        """Begin to copy to the host what tells whether the prompts can be answered.

        Args:
            attention_mask: `(batch, any_length)`, 0 at padding; `None`: there is none.
        """
        after_query = nn.functional.pad(self.query_mask[:, :-1], (1, 0))
        torn = (self.query_mask & (self.query_rank > 0) & ~after_query).any(dim=1)
        lost = (self.query_mask & (self.num_tiles_before > 0) & (self.instruction_start < 0)).any(dim=1)
        facts = (self.num_image_tokens, self.num_cached_tiles, self.query_mask.sum(dim=1), torn, lost)
        has_padding = torch.zeros_like(torn) if attention_mask is None else (attention_mask == 0).any(dim=1)
        return PromptCounts(torch.stack((*facts, has_padding), dim=1))


class PromptSizes(NamedTuple):
    """Sizes of a batch of prompts.

    Attributes:
        tiles_per_row: How many tiles the row with most of them reads; 0 if there are neither image nor query tokens.
        queries_per_row: How many query tokens the row with most of them has, but at least 1.
        is_padded: Whether there may be padding.
    """

    tiles_per_row: int
    queries_per_row: int
    is_padded: bool


class PromptCounts:
    """A few numbers of every row, on their way to the host.

    Whoever queues work for the device before asking for them does not keep it waiting: they arrive before that work
    begins.

    Args:
        counts: Whole numbers, `(batch, 6)`.
    """

    def __init__(self, counts: torch.Tensor) -> None:
        self._rows = counts.to("cpu", non_blocking=counts.is_cuda)
        self._arrival = torch.cuda.current_stream(counts.device).record_event() if counts.is_cuda else None

    def check(self, config: FlashSlothConfig, num_tiles: int) -> PromptSizes:
        """Refuse prompts that cannot be answered right.

        Args:
            config: Counts.
            num_tiles: Tiles in `pixel_values`.

        Raises:
            ValueError: If image tokens and pictures differ in number, image or query tokens were cut, or a query
                block has lost its question.
        """
        if self._arrival is not None:
            self._arrival.synchronize()
        rows = self._rows.tolist()
        for row, (num_image_tokens, _, num_queries, is_torn, is_lost, _) in enumerate(rows):
            if num_image_tokens % config.image_seq_length:
                raise ValueError(
                    f"Row {row} has {num_image_tokens} image tokens, but a tile has {config.image_seq_length}: the "
                    "prompt was truncated, or split by a chunked prefill, inside a picture. Raise `max_length`, or "
                    "leave `prefill_chunk_size` out."
                )
            if num_queries % config.num_query_tokens or is_torn:
                raise ValueError(
                    f"Row {row} has {num_queries} query tokens that are not in whole blocks of "
                    f"{config.num_query_tokens}: the prompt was truncated, or not built by `FlashSlothProcessor`."
                )
            if is_lost:
                raise ValueError(
                    f"Row {row} has query tokens, but their question does not begin in this call (none of "
                    f"`instruction_start_ids`={config.instruction_start_ids} before them): a chunked prefill or a "
                    "cached prefix must not part a question from its queries, and a raw prompt needs the original "
                    "format, `USER: <image>\\nQUESTION<learnable> ASSISTANT:`."
                )
        _check_tile_count(rows, config, num_tiles)
        is_used = any(row[0] or row[2] for row in rows)
        tiles_per_row = max(row[0] // config.image_seq_length + row[1] for row in rows) if is_used else 0
        queries_per_row = max(1, *(row[2] for row in rows))
        return PromptSizes(tiles_per_row, queries_per_row, is_padded=any(row[-1] for row in rows))


def _check_tile_count(rows: list[list[int]], config: FlashSlothConfig, num_tiles: int) -> None:
    num_image_tokens, num_cached, num_queries = (sum(row[i] for row in rows) for i in range(3))
    expected = num_image_tokens // config.image_seq_length + num_cached
    if num_tiles == expected or (num_tiles == 0 and num_image_tokens == 0 and num_queries == 0):
        return
    where = f" and {num_cached} tiles in the cache" if num_cached else ""
    raise ValueError(
        f"`input_ids` has {num_image_tokens} image tokens{where}, so {expected} tiles are expected, but "
        f"`pixel_values` gives {num_tiles} ({num_tiles * config.image_seq_length} features); build both with "
        "`FlashSlothProcessor`, pass the pixels of all pictures again when you continue on a cache, and leave "
        "`prefill_chunk_size` out."
    )


def instruction_starts(input_ids: torch.LongTensor, config: FlashSlothConfig) -> torch.BoolTensor:
    """True at tokens behind which an instruction starts, `(batch, seq_length)`."""
    ends = torch.zeros_like(input_ids, dtype=torch.bool)
    for pattern in config.instruction_start_ids:
        ends = ends | _ends_of(pattern, input_ids)
    return ends


def _ends_of(pattern: list[int], input_ids: torch.LongTensor) -> torch.Tensor:
    """True where an id pattern ends, `(batch, seq_length)`."""
    length = input_ids.shape[1]
    if length < len(pattern):
        return torch.zeros_like(input_ids, dtype=torch.bool)
    matches = input_ids[:, : length - len(pattern) + 1] == pattern[0]
    for offset, token_id in enumerate(pattern[1:], start=1):
        matches = matches & (input_ids[:, offset : length - len(pattern) + 1 + offset] == token_id)
    return nn.functional.pad(matches, (len(pattern) - 1, 0))
