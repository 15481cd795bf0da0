"""Training: data sets, the collator that turns rows into batches with labels, and a sampler.

Running a model needs none of this. `load_rows` needs the package `datasets` for everything but JSON files:
`pip install datasets`.
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
