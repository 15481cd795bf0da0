"""Answers a question about every image of a folder or table, in one process or, with torchrun, in several.

    flashsloth caption photos --question "Describe the picture." --output captions
    torchrun --nproc_per_node 8 --no-python flashsloth caption table.jsonl --output captions

Images come from a folder, including its subfolders, or from the column `image` of a `.json`, `.jsonl` or `.parquet`
file or of a data set; a column `question` there overrides `--question`. `answers.jsonl` has one line per row, in order.
For an image that cannot be read, the line has an `error` instead of an `answer` and is also written to `errors.jsonl`.

The processes share only the output folder. Of N processes, process n answers the batches n, n + N, n + 2N … and appends
them to its own file, one line each. Start an interrupted run again to resume it, with any number of processes; the
process that finds all batches done writes the answers.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import distributed
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import BatchFeature

from ..modeling_flashsloth import FlashSlothForConditionalGeneration
from ..processing_flashsloth import FlashSlothProcessor
from ..training import load_rows, normalize_row
from ..training.data import PLACEHOLDER, Rows

TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}  # escapes file names that are not UTF-8, as JSON does
TABLES = (".json", ".jsonl", ".parquet")
NUM_ID_PARTS = 2  # of a data set on the Hub: USER/NAME
LOCAL_RANK = "LOCAL_RANK"  # environment variable of torchrun


class Settings(NamedTuple):
    """What the answers depend on, besides the images.

    Attributes:
        model: Folder or Hub id.
        question: Question about every image that has none of its own.
        batch_size: Images per batch.
        max_new_tokens: Maximum length of an answer.
        do_image_splitting: Whether to split images into five tiles. `None`: the processor's setting.
    """

    model: str
    question: str
    batch_size: int
    max_new_tokens: int
    do_image_splitting: bool | None


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
        settings: The question and the batch size.
        numbers: Indices of the batches.
    """

    def __init__(
        self,
        source: Rows,
        folder: Path,
        processor: FlashSlothProcessor,
        settings: Settings,
        numbers: Sequence[int],
    ) -> None:
        self.source, self.folder, self.processor = source, folder, processor
        self.settings, self.numbers = settings, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> Batch:
        number, size = self.numbers[position], self.settings.batch_size
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
        wanted["caption"] = row.get("question", self.settings.question).replace(PLACEHOLDER, "").strip()
        wanted["caption"].encode()  # raises for a lone surrogate, which tokenizers do not accept
        asked = normalize_row(wanted, image_folder=self.folder)
        content = [{"type": "image", "image": self._load(image)} for image in asked["image"]]
        return [{"role": "user", "content": [*content, {"type": "text", "text": asked["caption"]}]}]

    def _load(self, image: Any) -> Image.Image:
        image_processor = self.processor.image_processor
        return image_processor.process_image(image_processor.fetch_images(image))

    def _prepare(self, conversations: list) -> BatchFeature:
        images_kwargs = {"do_image_splitting": self.settings.do_image_splitting}
        return self.processor.encode_conversations(conversations, padding=True, images_kwargs=images_kwargs)


def caption(
    source: Path,
    output: Path,
    settings: Settings,
    *,
    load_model: Callable[[], tuple[FlashSlothForConditionalGeneration, FlashSlothProcessor]],
    num_loaders: int = 0,
) -> str | None:
    """Answer all unanswered batches, together with the other processes of torchrun if it started this one.

    Args:
        source: Folder of images, table or data set.
        output: Folder for the answers.
        settings: Model, question and sizes.
        load_model: Returns model and processor. It is called only if a batch is unanswered.
        num_loaders: Number of processes that read images; 0: this one does.

    Returns:
        A summary, or `None` if another process gives it.

    Raises:
        ImportError: If the package `datasets` is missing and the source is neither a folder of images nor JSON.
        ValueError: If there are no images, or the output has answers of a run with other settings.
    """
    with _process_group() as (rank, num_processes):
        rows, folder = open_source(source)
        parts = output / "parts"
        parts.mkdir(parents=True, exist_ok=True)
        _check_settings(output, settings, source, rows)
        num_batches = -(-len(rows) // settings.batch_size)
        done = find_batches(parts)
        was_whole = len(done) == num_batches
        if num_processes > 1:
            distributed.barrier()  # so that all processes find the same batches done
        if numbers := [number for number in range(rank, num_batches, num_processes) if number not in done]:
            model, processor = load_model()
            batches = Batches(rows, folder, processor, settings, numbers)
            append(parts / f"{uuid.uuid4().hex}.jsonl", _answers(batches, model, num_loaders))
            done = find_batches(parts)
        if len(done) < num_batches:
            others = f"{len(done)} of {num_batches} batches are done; other processes are still running"
            return others if rank == 0 else None
        num_rows, num_errors = merge(output, done)
        is_first = rank == 0 if was_whole else claim(parts, done)
        if is_first or num_processes == 1:
            return f"{output / 'answers.jsonl'}: {num_rows} rows, {num_errors} with errors"
        return None


@contextlib.contextmanager
def _process_group() -> Iterator[tuple[int, int]]:
    """Join the processes of torchrun, each with its own accelerator; yields rank and number of processes."""
    if not distributed.is_torchelastic_launched():
        yield 0, 1
        return
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ[LOCAL_RANK]) % torch.accelerator.device_count())
    distributed.init_process_group("gloo")
    try:
        yield distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def _answers(batches: Batches, model: FlashSlothForConditionalGeneration, num_loaders: int) -> Iterator[Batch]:
    loader = DataLoader(batches, batch_size=None, num_workers=num_loaders, worker_init_fn=_end_quietly)
    for batch in tqdm(loader, unit="batch", disable=os.environ.get(LOCAL_RANK, "0") != "0"):
        yield answer(batch, model, batches.processor, batches.settings.max_new_tokens)


def _end_quietly(_worker: int) -> None:
    """Leave Ctrl-C to the process that ends the workers, and do not report that it no longer takes what they send."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    report = sys.excepthook

    def report_others(kind: type[BaseException], *details: Any) -> None:
        if not issubclass(kind, (EOFError, OSError)):  # of the thread that sends images; other errors are passed on
            report(kind, *details)

    sys.excepthook = report_others


def open_source(source: Path) -> tuple[Rows, Path]:
    """Open a folder of images or a table.

    Returns:
        Its rows, and the base folder of their image paths.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If there are no rows, or it is a file of another type.
    """
    if source.is_file() and source.suffix not in TABLES:
        raise ValueError(f"expected a folder, a {', '.join(TABLES)} file or a data set, found {source}.")
    if not source.exists() and len(source.parts) != NUM_ID_PARTS:
        raise FileNotFoundError(f"there is no folder or file {source}.")
    is_folder = source.is_dir() and not any(source.rglob("*.parquet"))
    if is_folder:
        suffixes = Image.registered_extensions()
        files = (file for file in source.rglob("*") if file.suffix.lower() in suffixes)
        rows = Rows(Images(sorted(file.relative_to(source).as_posix() for file in files)), None)
    else:
        rows = load_rows(source)
    if not len(rows):
        raise ValueError(f"there are no images in {source}.")
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


def _check_settings(output: Path, chosen: Settings, source: Path, rows: Rows) -> None:
    """Reject an output folder of other images, questions or models: only the index identifies a batch."""
    settings = {"num_rows": len(rows), "source": _identify(source, rows), **chosen._asdict()}
    file = output / "settings.json"
    if not file.exists():
        draft = file.with_name(f".settings-{uuid.uuid4().hex}")
        draft.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        draft.replace(file)
    known = json.loads(file.read_text(encoding="utf-8"))
    if changed := sorted(name for name in settings if settings[name] != known.get(name)):
        raise ValueError(
            f"{output} has answers of a run with a different {', '.join(changed)} (see {file}); choose another "
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
