"""An order of rows in which batches hold rows of like length and of one kind, with images or without."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

MEGABATCH_SIZE = 50
"""Batches whose rows are sorted by length together; fewer would pad more, more would leave less to chance."""


class ModalityLengthSampler(Sampler[int]):
    """Indices of rows, so that consecutive ones make batches of like rows; another order in every epoch.

    Rows with images and rows without are shuffled, sorted by length within megabatches of 50 batches, cut into
    batches, and the batches of both kinds shuffled together. What does not fill a batch comes last, rows with
    images first: only there may one batch hold both kinds.

    It is a plain sampler of all rows: accelerate deals whole device batches out to the processes in turn, so the rows
    of one step are like each other on all of them if `batch_size` counts them all.

    Args:
        lengths: Length of every row, in any unit (`row_lengths`).
        has_image: Whether a row has images (`row_lengths`).
        batch_size: Rows that one optimiser step takes: rows of a device's batch × accumulated batches × processes.
        seed: The order depends on seed and epoch only.

    Raises:
        ValueError: If the lists differ in length or `batch_size` is not positive.
    """

    def __init__(self, lengths: Sequence[int], has_image: Sequence[bool], *, batch_size: int, seed: int = 0) -> None:
        if len(lengths) != len(has_image):
            raise ValueError(
                f"`lengths` and `has_image` must be of as many rows, but are of {len(lengths)} and "
                f"{len(has_image)}; take both from `row_lengths`."
            )
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, but is {batch_size}.")
        self.lengths = list(lengths)
        self.has_image = [bool(has) for has in has_image]
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        batches, rest = [], []
        for kind in (True, False):
            rows = [row for row in self._shuffled(len(self), generator) if self.has_image[row] is kind]
            rows, left = self._grouped(rows)
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            rest += left
        for batch in self._shuffled(len(batches), generator):
            yield from batches[batch]
        yield from rest

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0; accelerate's data loaders call it."""
        self.epoch = epoch

    def _grouped(self, rows: list[int]) -> tuple[list[int], list[int]]:
        """Rows sorted by length within megabatches, and those that fill no batch."""
        num_whole = len(rows) - len(rows) % self.batch_size
        size = self.batch_size * MEGABATCH_SIZE
        whole, rest = rows[:num_whole], rows[num_whole:]
        groups = [sorted(whole[i : i + size], key=self.lengths.__getitem__) for i in range(0, num_whole, size)]
        return [row for group in groups for row in group], rest

    @staticmethod
    def _shuffled(count: int, generator: torch.Generator) -> list[int]:
        return torch.randperm(count, generator=generator).tolist()
