"""Training: data sets, the collator that makes batches and labels of them, and how to order them.

Nothing here is needed to run a model. `load_rows` needs the package `datasets` for everything but JSON files:
`pip install "flashsloth[train]"`.
"""

from .check import RowReport, check_rows
from .collator import BadRowError, FlashSlothDataCollator
from .data import load_rows, normalize_row, row_lengths
from .sampler import ModalityLengthSampler

__all__ = [
    "BadRowError",
    "FlashSlothDataCollator",
    "ModalityLengthSampler",
    "RowReport",
    "check_rows",
    "load_rows",
    "normalize_row",
    "row_lengths",
]
