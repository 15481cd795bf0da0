"""Shared by all benchmarks: command line, description of the machine, and Markdown reports."""

import argparse
import logging
import platform
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from flashsloth.cli.devices import default_device, has_bfloat16

logger = logging.getLogger(__name__)


def build_parser(
    description: str | None, output_help: str = "Markdown file to write", default_output: Path | None = None
) -> argparse.ArgumentParser:
    """Build a parser that shows a script's docstring as its help, and has the option `--output`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=default_output is None, default=default_output, help=output_help
    )
    return parser


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add `--device`. Memory is measured on CPU and CUDA only, so other accelerators cannot be chosen."""
    default = "cuda" if default_device().type == "cuda" else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)


def describe_machine(device: str = "cpu", dtype: str = "bfloat16") -> str:
    """Processor, versions and data type, for the first line of a report."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}; {describe_versions(dtype)}"
    lacks = "" if has_bfloat16("cpu") else ", without bfloat16 instructions"
    return f"{cpu_name()}{lacks}, {torch.get_num_threads()} threads; {describe_versions(dtype)}"


def describe_versions(dtype: str = "bfloat16") -> str:
    """Versions of torch and transformers, and the data type."""
    return f"torch {torch.__version__}, transformers {transformers.__version__}; {dtype}"


def cpu_name() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor()


def describe_rounds(rounds: int) -> str:
    """How many rounds were measured, in words."""
    return "one round" if rounds == 1 else f"medians of {rounds} rounds"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]], text_columns: Collection[int] = (0,)) -> str:
    """Format a table.

    Args:
        head: Titles of the columns.
        rows: Cells of every row.
        text_columns: Columns that are aligned on the left; the others hold numbers.
    """
    alignment = ["---" if column in text_columns else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, alignment, *rows))


def save_report(file: Path, *parts: str) -> str:
    """Write paragraphs, headings and tables, separated by blank lines, and return the text."""
    text = "\n\n".join(parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n", encoding="utf-8")
    return text


def write_report(file: Path, *parts: str) -> None:
    """Write paragraphs, headings and tables, separated by blank lines, and log them."""
    logger.info("%s", save_report(file, *parts))
