"""Sampler whose batches have rows of similar length, either all with images or all without."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

MEGABATCH_SIZE = 50
"""Number of batches whose rows are sorted by length together; fewer need more padding, more shuffle less."""


class ModalityLengthSampler(Sampler[int]):
    """Orders rows so that consecutive ones form batches of similar rows; the order changes in every epoch.

    Rows with images and rows without are shuffled separately, sorted by length within megabatches of 50 batches, and
    split into batches; then the batches of both kinds are shuffled together. Rows that do not fill a batch come last,
    those with images first, so only there may a batch mix both kinds.

    The sampler yields the rows of all processes. accelerate distributes device batches to the processes in turn, so the
    rows of one step are similar on all processes if `batch_size` counts the rows of a whole step.

    Args:
        lengths: Length of every row, in any unit (see `row_lengths`).
        has_image: Whether each row has images (see `row_lengths`).
        batch_size: Rows per optimiser step: rows per device × accumulated batches × processes.
        seed: Seed of the order, together with the epoch.

    Raises:
        ValueError: If the lists differ in length or `batch_size` is not positive.
    """

    def __init__(self, lengths: Sequence[int], has_image: Sequence[bool], *, batch_size: int, seed: int = 0) -> None:
        if len(lengths) != len(has_image):
            raise ValueError(
                f"`lengths` and `has_image` must have the same number of rows, but have {len(lengths)} and "
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
        """Set the epoch, counted from 0; accelerate's data loaders call this."""
        self.epoch = epoch

    def _grouped(self, rows: list[int]) -> tuple[list[int], list[int]]:
        """Rows sorted by length within megabatches, and the remaining rows, which do not fill a batch."""
        num_whole = len(rows) - len(rows) % self.batch_size
        size = self.batch_size * MEGABATCH_SIZE
        whole, rest = rows[:num_whole], rows[num_whole:]
        groups = [sorted(whole[i : i + size], key=self.lengths.__getitem__) for i in range(0, num_whole, size)]
        return [row for group in groups for row in group], rest

    @staticmethod
    def _shuffled(count: int, generator: torch.Generator) -> list[int]:
        return torch.randperm(count, generator=generator).tolist()
