"""Checks a data set before training: which rows cannot be used, and how long the others are."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset

from .collator import FlashSlothDataCollator


class RowReport(NamedTuple):
    """Result of checking a row.

    Attributes:
        index: Index of the row in its source.
        error: Why the row cannot be used, or `None`.
        num_tokens: Tokens of the whole row, including image and query tokens.
        num_images: Images of the whole row.
        is_cut: Whether training truncates it to `max_length`.
    """

    index: int
    error: str | None = None
    num_tokens: int = 0
    num_images: int = 0
    is_cut: bool = False


def check_rows(rows: Any, collator: FlashSlothDataCollator, *, num_workers: int = 0) -> Iterator[RowReport]:
    """Read rows as training does, including their images.

    Args:
        rows: The output of `load_rows`.
        collator: The collator used for training; its `on_bad_row` is ignored.
        num_workers: Number of processes that read rows; this process always reads a stream itself.

    Yields:
        A report on every row, in order.

    Example:
    ```python
    >>> bad = [report for report in check_rows(load_rows("conversations.json"), collator) if report.error]
    ```
    """
    if isinstance(rows, IterableDataset):
        yield from (_examine(index, lambda _, row=row: row, collator) for index, row in enumerate(rows))
        return
    examine = partial(_examine, get_row=rows.__getitem__, collator=collator)
    yield from DataLoader(range(len(rows)), batch_size=None, collate_fn=examine, num_workers=num_workers)


def _examine(index: int, get_row: Callable[[int], Any], collator: FlashSlothDataCollator) -> RowReport:
    try:
        sample = collator.prepare(get_row(index))
    except Exception as error:  # a bad row may raise anything
        return RowReport(index, error=str(error).strip() or type(error).__name__)
    is_cut = len(sample.input_ids) < sample.whole_length
    return RowReport(index, None, sample.whole_length, sample.num_images, is_cut)
