"""Answers a question about every image of a folder or table, in one process or, with torchrun, in several.

    python examples/caption.py photos --question "Describe the picture." --output captions
    torchrun --nproc_per_node 8 examples/caption.py table.jsonl --question "Describe the picture." --output captions

Images come from a folder, including its subfolders, or from the column `image` of a `.json`, `.jsonl` or `.parquet`
file or of a data set; a column `question` there overrides `--question`. `answers.jsonl` has one line per row, in order.
For an image that cannot be read, the line has an `error` instead of an `answer` and is also written to `errors.jsonl`.

The processes share only the output folder. Of N processes, process n answers the batches n, n + N, n + 2N … and appends
them to its own file, one line each. Start an interrupted run again to resume it, with any number of processes; the
process that finds all batches done writes the answers.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import sys
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import BatchFeature
from transformers.utils.logging import disable_progress_bar

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli.devices import working_dtype
from flashsloth.training import load_rows, normalize_row
from flashsloth.training.data import PLACEHOLDER, Rows

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}  # escapes file names that are not UTF-8, as JSON does
NUM_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SETTINGS = ("model", "question", "batch_size", "max_new_tokens", "do_image_splitting")


class Batch(NamedTuple):
    """Consecutive rows of the source.

    Attributes:
        number: Index of the batch.
        rows: Output rows; those without an error get an answer later.
        inputs: Model inputs of the rows without an error; `None` if there are none.
    """

    number: int
    rows: list[dict[str, Any]]
    inputs: BatchFeature | None


class Images:
    """Image file names as records."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"image": self.names[index]}


class Batches(Dataset):
    """Unanswered batches, whose images are read on access.

    Args:
        source: Rows with a column `image`.
        folder: Base folder of relative image paths.
        processor: Converts images and questions to model inputs.
        options: Command-line options.
        numbers: Indices of the batches.
    """

    def __init__(
        self,
        source: Rows,
        folder: Path,
        processor: FlashSlothProcessor,
        options: argparse.Namespace,
        numbers: Sequence[int],
    ) -> None:
        self.source, self.folder, self.processor = source, folder, processor
        self.options, self.numbers = options, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> Batch:
        number, size = self.numbers[position], self.options.batch_size
        rows, conversations = [], []
        for index in range(number * size, min((number + 1) * size, len(self.source))):
            row: dict[str, Any] = {"row": index}
            try:
                conversations.append(self._read(self.source.record(index), row))
            except Exception as error:  # broken images raise errors of many classes
                row["error"] = str(error) or type(error).__name__
            rows.append(row)
        return Batch(number, rows, self._prepare(conversations) if conversations else None)

    def _read(self, record: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
        """Convert a record to a conversation, and copy its id, question and image name to the output row."""
        row |= {name: record[name] for name in ("id", "question") if record.get(name) is not None}
        if not isinstance(row.get("question", ""), str):
            raise TypeError(f"question must be a string, but is {row['question']!r}")
        if isinstance(record.get("image"), str):
            row["image"] = record["image"]
        wanted = {name: record[name] for name in ("image", "error") if name in record}
        wanted["caption"] = row.get("question", self.options.question).replace(PLACEHOLDER, "").strip()
        wanted["caption"].encode()  # raises for a lone surrogate, which tokenizers do not accept
        asked = normalize_row(wanted, image_folder=self.folder)
        content = [{"type": "image", "image": self._load(image)} for image in asked["image"]]
        return [{"role": "user", "content": [*content, {"type": "text", "text": asked["caption"]}]}]

    def _load(self, image: Any) -> Image.Image:
        image_processor = self.processor.image_processor
        return image_processor.process_image(image_processor.fetch_images(image))

    def _prepare(self, conversations: list) -> BatchFeature:
        images_kwargs = {"do_image_splitting": self.options.do_image_splitting}
        return self.processor.encode_conversations(conversations, padding=True, images_kwargs=images_kwargs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer all unanswered batches.

    Args:
        arguments: Command-line arguments. Default: those of the process.
    """
    options = _parse(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)  # for this script only; other libraries log every download
    state = PartialState(cpu=not torch.accelerator.is_available())
    if not state.is_local_main_process:
        disable_progress_bar()
    source, folder = open_source(options.source)
    parts = options.output / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    _check_settings(options, source)
    num_batches = -(-len(source) // options.batch_size)
    done = find_batches(parts)
    was_whole = len(done) == num_batches
    state.wait_for_everyone()  # so that all processes find the same batches done
    mine = range(state.process_index, num_batches, state.num_processes)
    if numbers := [number for number in mine if number not in done]:
        processor = FlashSlothProcessor.from_pretrained(options.model)
        dtype = working_dtype(state.device)
        model = FlashSlothForConditionalGeneration.from_pretrained(options.model, dtype=dtype).to(state.device).eval()
        batches = Batches(source, folder, processor, options, numbers)
        loader = DataLoader(batches, batch_size=None, num_workers=options.loaders)
        bar = tqdm(loader, unit="batch", disable=not state.is_local_main_process)
        answered = (answer(batch, model, processor, options.max_new_tokens) for batch in bar)
        append(parts / f"{uuid.uuid4().hex}.jsonl", answered)
        done = find_batches(parts)
    if len(done) == num_batches:
        num_rows, num_errors = merge(options.output, done)
        is_first = state.is_main_process if was_whole else claim(parts, done)
        if is_first or state.num_processes == 1:
            logger.info("%s: %d rows, %d with errors", options.output / "answers.jsonl", num_rows, num_errors)
    elif state.is_main_process:
        logger.info("%d of %d batches are done; other processes are still running", len(done), num_batches)
    state.destroy_process_group()


def open_source(source: Path) -> tuple[Rows, Path]:
    """Open a folder of images or a table.

    Returns:
        Its rows, and the base folder of their image paths.

    Raises:
        ValueError: If there are no rows.
    """
    is_folder = source.is_dir() and not any(source.rglob("*.parquet"))
    if is_folder:
        suffixes = Image.registered_extensions()
        files = (file for file in source.rglob("*") if file.suffix.lower() in suffixes)
        rows = Rows(Images(sorted(file.relative_to(source).as_posix() for file in files)), None)
    else:
        rows = load_rows(source)
    if not len(rows):
        raise ValueError(f"Found no images in {source}.")
    return rows, source if source.is_dir() else source.parent


@torch.no_grad()
def answer(
    batch: Batch, model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, max_new_tokens: int
) -> Batch:
    """Add the answers to the rows of a batch."""
    if batch.inputs is not None:
        inputs = batch.inputs.to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = iter(processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :]))
        for row in batch.rows:
            if "error" not in row:
                row["answer"] = next(texts)
    return batch


def append(part: Path, batches: Iterable[Batch]) -> None:
    """Write batches to a new file; each is on disk before the next one is computed."""
    with part.open("x", **TEXT) as file:
        for batch in batches:
            file.write(json.dumps({"batch": batch.number, "rows": batch.rows}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def find_batches(parts: Path) -> dict[int, tuple[Path, int]]:
    """Find the answered batches: file and byte offset by index."""
    places: dict[int, tuple[Path, int]] = {}
    for part in sorted(parts.glob("*.jsonl")):
        with part.open("rb") as lines:
            start = 0
            for line in lines:
                with contextlib.suppress(ValueError):  # a killed process leaves an incomplete last line
                    places.setdefault(json.loads(line)["batch"], (part, start))
                start += len(line)
    return places


def merge(output: Path, places: dict[int, tuple[Path, int]]) -> tuple[int, int]:
    """Write `answers.jsonl` and `errors.jsonl` in the order of the source, each replaced atomically.

    Returns:
        Number of rows, and of rows with errors.
    """
    counts = {"answers": 0, "errors": 0}
    with contextlib.ExitStack() as stack:
        drafts = {name: output / f".{name}-{uuid.uuid4().hex}" for name in counts}
        files = {name: stack.enter_context(draft.open("w", **TEXT)) for name, draft in drafts.items()}
        for _, (part, start) in sorted(places.items()):
            for row in _read_batch(part, start)["rows"]:
                for name in ("answers", "errors") if "error" in row else ("answers",):
                    files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
                    counts[name] += 1
    for name, draft in drafts.items():
        draft.replace(output / f"{name}.jsonl")
    return counts["answers"], counts["errors"]


def claim(parts: Path, places: dict[int, tuple[Path, int]]) -> bool:
    """Whether this process is the first to find these batches done; true for exactly one of several at once."""
    names = sorted({part.name for part, _ in places.values()})
    try:
        (parts / f"done-{hashlib.sha256(''.join(names).encode()).hexdigest()[:16]}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _read_batch(part: Path, start: int) -> dict[str, Any]:
    with part.open("rb") as lines:
        lines.seek(start)
        return json.loads(lines.readline())


def _check_settings(options: argparse.Namespace, source: Rows) -> None:
    """Reject an output folder of other images, questions or models: only the index identifies a batch."""
    settings = {"num_rows": len(source), "source": _identify(options.source, source)}
    settings |= {name: getattr(options, name) for name in SETTINGS}
    file = options.output / "settings.json"
    if not file.exists():
        draft = file.with_name(f".settings-{uuid.uuid4().hex}")
        draft.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        draft.replace(file)
    known = json.loads(file.read_text(encoding="utf-8"))
    if changed := sorted(name for name in settings if settings[name] != known.get(name)):
        raise ValueError(
            f"{options.output} has answers of a run with a different {', '.join(changed)} (see {file}); choose another "
            "output folder, or use the same settings."
        )


def _identify(path: Path, source: Rows) -> str:
    """Hash of a source's path and of its image names, or of the size and modification time of its files."""
    names = getattr(source.records, "names", None)
    known = [str(path.resolve() if path.exists() else path), *(names or [])]
    if names is None:
        for file in [path] if path.is_file() else sorted(path.rglob("*.parquet")):
            known.append(f"{file.relative_to(path)} {file.stat().st_size} {file.stat().st_mtime_ns}")
    return hashlib.sha256("\n".join(known).encode(errors="surrogateescape")).hexdigest()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="folder of images; .json, .jsonl or .parquet file; data set")
    parser.add_argument("--output", type=Path, required=True, help="folder for the answers, shared by all processes")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: the shipped checkpoint)")
    parser.add_argument("--question", default="Describe the picture.", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="images per batch (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="maximum length of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--hd", dest="do_image_splitting", action="store_const", const=True, help="split every image into five tiles"
    )
    parser.add_argument(
        "--loaders",
        type=int,
        default=min(2, NUM_CPUS),
        help="worker processes that read images (default: %(default)s)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
