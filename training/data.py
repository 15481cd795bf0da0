"""Reads data sets of images and text (LLaVA's JSON, chat data sets with `messages`, captions) into one form.

A bad row is detected when it is used. It then becomes `{"index": …, "error": reason}`, so that it does not stop the
data loader; `FlashSlothDataCollator` raises or skips it, as configured.
"""

import io
import json
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from ..image_processing_flashsloth import open_image
from ..processing_flashsloth import PART_TYPES, SOURCE_KEYS, is_absent

PLACEHOLDER = "<image>"
"""Placeholder of an image in the text of LLaVA's data sets."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
CHARACTERS_PER_TOKEN = 4  # of English text, roughly


def load_rows(
    source: str | Path,
    *,
    image_folder: str | Path | None = None,
    split: str = "train",
    streaming: bool = False,
    as_captions: bool = False,
) -> Dataset | IterableDataset:
    """Read a data set into rows for `FlashSlothDataCollator`.

    Args:
        source: A `.json`, `.jsonl` or `.parquet` file, or a folder or Hub id for `datasets.load_dataset`.
        image_folder: Folder of relative image paths. Default: the folder of `source`.
        split: Split of a folder or Hub id, also a slice such as `train[:100]`. A file has only `train`.
        streaming: Whether to read rows on demand, in order, as a `datasets.IterableDataset`.
        as_captions: Whether to use the first answer of a conversation as a caption: for stage 1 on files such as
            LLaVA's `blip_laion_cc_sbu_558k.json`.

    Returns:
        Rows in the form of `normalize_row`, with `index`, their index in the source. If several workers read a stream,
        each counts its own rows.

    Raises:
        FileNotFoundError: If the file does not exist.
        ImportError: If the package `datasets` is missing, unless `source` is a JSON file and is not streamed.
        ValueError: If a JSON file does not contain a list, or another split of a file is requested.

    Example:
    ```python
    >>> rows = load_rows("llava_v1_5_mix665k.json", image_folder="images")
    >>> rows[0]["messages"][0]["content"][0]
    {'type': 'image', 'image': 'images/coco/train2017/000000033471.jpg'}
    ```
    """
    suffix = Path(source).suffix
    is_file = suffix in (".json", ".jsonl", ".parquet")
    if is_file and not Path(source).is_file():
        raise FileNotFoundError(f"There is no file {source}.")
    if image_folder is None and Path(source).exists():
        image_folder = Path(source).parent if is_file else source
    normalize = partial(_normalize_or_report, image_folder=image_folder, as_captions=as_captions)
    if suffix not in (".json", ".jsonl"):
        records = _load_dataset(source, is_file=is_file, split=split, streaming=streaming)
    elif split != "train":
        raise ValueError(
            f"{source} has only the split `train`, not `{split}`; split it with `torch.utils.data.Subset`."
        )
    else:
        records = JsonLines(source) if suffix == ".jsonl" else _read_json(source)
        if streaming:  # as whole rows, because later records may have other columns than the first
            rows = Rows(records, normalize)
            return _import_datasets(source).IterableDataset.from_generator(_iterate, gen_kwargs={"rows": [rows]})
    if not streaming:
        return Rows(records, normalize)
    columns = records.column_names or list(next(iter(records), {}))
    return records.map(normalize, with_indices=True, remove_columns=columns)


class Rows(Dataset):
    """Records of a data set, normalised on access.

    Args:
        records: A sequence of records: a list, `JsonLines` or `datasets.Dataset`.
        normalize: Function that turns a record and its index into a row.
    """

    def __init__(self, records: Any, normalize: Any) -> None:
        self.normalize = normalize
        # The Arrow format keeps embedded images encoded, so that a broken one affects only its row.
        self.is_arrow = hasattr(records, "with_format")
        self.records = records.with_format("arrow") if self.is_arrow else records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        return self.normalize(self.record(index), index)

    def record(self, index: int) -> dict[str, Any]:
        """Read a record from the source, without normalising it."""
        record = self.records[index]
        return record.to_pylist()[0] if self.is_arrow else record


class JsonLines:
    """Reads the non-blank lines of a file by index; only their positions are kept in memory."""

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self.starts = array("q")
        with self.file.open("rb") as lines:
            start = 0
            for line in lines:
                if line.strip():
                    self.starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.file.open("rb") as lines:
            lines.seek(self.starts[index])
            line = lines.readline()
        try:
            return json.loads(line)
        except ValueError as error:
            return {"error": f"the line is not JSON: {error}"}


def normalize_row(row: dict[str, Any], *, image_folder: str | Path | None = None, as_captions: bool = False) -> dict:
    """Convert a row to the form that the collator reads.

    Supported columns:

    - `conversations` with `from` and `value`, and `image`, a path or a list of paths (LLaVA). The human's text must
      have one `<image>` per image; images are placed before the text of their message.
    - `messages` with `role` and `content`. Parts `{"type": "image"}` without an image take the next one of the column
      `images` (or `image`). If the content is only text, images are placed at `<image>`, or else before the first
      question (TRL's convention).
    - `caption` or `text`, with `image` or `images`.

    Images may be paths, URLs, PIL images, arrays, or encoded: `bytes`, or a dict with `bytes` or `path`.

    Args:
        row: A row; one that is already normalised stays the same.
        image_folder: Folder of relative image paths. Default: the working directory.
        as_captions: Whether to use the first answer of a conversation as a caption of its images.

    Returns:
        `{"messages": [{"role", "content": [part, ...]}, ...]}` with parts `{"type": "image", "image": image}` and
        `{"type": "text", "text": str}`, as `processor.apply_chat_template` reads them, or
        `{"image": [image, ...], "caption": str}`. An image is a PIL image, an array, a path or a URL.

    Raises:
        ValueError: If the row has none of these forms, or not as many placeholders as images.
        TypeError: If a text is not a string, or an image of an unsupported type.
        OSError: If an encoded image is broken.
    """
    _check_dict(row, "a row")
    if row.get("error") is not None:
        raise ValueError(row["error"])
    images = [_read_image(value, image_folder) for value in _image_column(row)]
    caption = row.get("caption", row.get("text"))
    if row.get("messages") is not None:
        messages = [_read_message(message, "role", "content", image_folder) for message in row["messages"]]
        messages = _place_images(
            messages, images, at_placeholders=bool(images) and any(map(_count_placeholders, messages))
        )
    elif row.get("conversations") is not None:
        messages = [_read_message(message, "from", "value", image_folder) for message in row["conversations"]]
        messages = _place_images(messages, images, at_placeholders=True)
    elif caption is not None:
        return _caption_row(images, caption)
    else:
        raise ValueError(
            f"the row has the columns {sorted(row)}, but must have `messages`, `conversations`, or `caption` (or "
            "`text`) and `image`; rename the columns"
        )
    return _as_caption_row(messages) if as_captions else {"messages": messages}


def row_lengths(rows: Sequence[dict[str, Any]] | Dataset, *, tokens_per_image: int) -> tuple[list[int], list[bool]]:
    """Estimate the lengths of rows for `ModalityLengthSampler`, without opening images.

    Args:
        rows: Rows of `load_rows` without `streaming`, or in any form that `normalize_row` reads.
        tokens_per_image: Image tokens per image: `image_seq_length`, times 5 with `do_image_splitting`.

    Returns:
        Estimated number of tokens of every row, and whether each row has images.
    """
    if isinstance(rows, Rows):
        columns = _image_counts(rows.records) if rows.is_arrow else {}
        texts = rows.records.remove_columns(list(columns)) if rows.is_arrow else rows.records
        counted = [sum(counts) for counts in zip(*columns.values(), strict=True)] if columns else [0] * len(rows)
        rows = Rows(texts, normalize=None)
        sizes = [_size(rows.record(index), num) for index, num in enumerate(counted)]
    else:
        sizes = [_size(rows[index]) for index in range(len(rows))]
    lengths = [characters // CHARACTERS_PER_TOKEN + num * tokens_per_image for characters, num in sizes]
    return lengths, [num > 0 for _, num in sizes]


def is_url(image: str) -> bool:
    """Whether the source of an image is a URL, not a path."""
    return image.startswith(("http://", "https://", "file://", "data:"))


def text_of(parts: list[dict[str, Any]]) -> str:
    """Text of a message's parts, without its images."""
    return "".join(part["text"] for part in parts if part["type"] == "text")


def _import_datasets(source: str | Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"Reading {source} needs the package `datasets`; only `.json` and `.jsonl` files without streaming do not. "
            "Install it with `pip install datasets`."
        ) from error
    return datasets


def _load_dataset(source: str | Path, *, is_file: bool, split: str, streaming: bool) -> Any:
    datasets = _import_datasets(source)
    where = {"path": "parquet", "data_files": {"train": str(source)}} if is_file else {"path": str(source)}
    records = datasets.load_dataset(**where, split=split, streaming=streaming)
    # A stream without known columns never decodes images.
    return records.decode(False) if streaming and records.features else records


def _read_json(file: str | Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}. If it has one row per line, name it `.jsonl`.") from error
    if not isinstance(records, list):
        raise ValueError(f"{file} must contain a list of rows, but contains a {type(records).__name__}.")
    return records


def _iterate(rows: list[Any]) -> Any:
    """Yield all rows of the data sets in a list, which `datasets` divides among the workers of a stream."""
    for records in rows:
        yield from (records[index] for index in range(len(records)))


def _normalize_or_report(record: dict, index: int, **options: Any) -> dict[str, Any]:
    try:
        return normalize_row(record, **options) | {"index": index}
    except Exception as error:  # a bad row may raise anything
        return {"error": str(error), "index": index}


def _check_dict(value: Any, what: str) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{what} must be a dict, but is of type {type(value).__name__}")


def _image_column(row: dict[str, Any]) -> list:
    for name in ("images", "image"):
        value = row.get(name)
        if isinstance(value, (list, tuple)):
            return list(value)
        if value is not None and not (isinstance(value, str) and value == ""):
            return [value]
    return []


def _read_image(value: Any, image_folder: str | Path | None) -> Any:
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path") is None:
            raise TypeError(f"an image must have `bytes` or `path`, but has {sorted(value)}")
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return open_image(io.BytesIO(value))
    if isinstance(value, (str, Path)):
        return value if is_url(str(value)) else str(Path(image_folder or "") / value)
    if isinstance(value, Image.Image) or hasattr(value, "shape"):
        return value
    raise TypeError(
        "an image must be a PIL image, an array, a path, a URL or the bytes of an image file, but is of type "
        f"{type(value).__name__}"
    )


def _read_message(message: dict, role_key: str, content_key: str, image_folder: str | Path | None) -> dict[str, Any]:
    """A message with a known role, whose content is text, or parts without the empty fields that Arrow adds."""
    _check_dict(message, "a message")
    role = message.get(role_key, message.get("role"))
    content = message.get(content_key, message.get("content"))
    if role not in ROLES:
        raise ValueError(f"a message has the role {role!r}, but must have one of {', '.join(ROLES)}")
    if isinstance(content, (list, tuple)):
        content = [_read_part(part, image_folder) for part in content]
    elif not isinstance(content, str):
        raise TypeError(
            f"the content of a message of {role!r} must be text or a list of parts, but is of type "
            f"{type(content).__name__}"
        )
    return {"role": ROLES[role], "content": content}


def _read_part(part: dict, image_folder: str | Path | None) -> dict[str, Any]:
    _check_dict(part, "a part of a message")
    kind = PART_TYPES.get(part.get("type"))
    if kind not in ("text", "image"):
        raise ValueError(f"a message has a part of type {part.get('type')!r}, but must have text or image")
    sources = {key: part[key] for key in SOURCE_KEYS["image"] if not is_absent(part.get(key))}
    if kind == "text":
        if sources:
            raise ValueError(f"a part of type text also has {', '.join(sources)}; move it to a part of type image")
        return _text_part(part.get("text"))
    if not sources:
        return {"type": "image"}
    key, value = next(iter(sources.items()))
    value = value["url"] if isinstance(value, dict) and "url" in value else value
    return {"type": "image", "image": _read_image(f"data:;base64,{value}" if key == "base64" else value, image_folder)}


def _count_placeholders(message: dict) -> int:
    is_user_text = message["role"] == "user" and isinstance(message["content"], str)
    return message["content"].count(PLACEHOLDER) if is_user_text else 0


def _place_images(messages: list[dict], images: list, *, at_placeholders: bool) -> list[dict]:
    """Convert contents to parts, with images in empty image parts, at placeholders, or before the first question.

    Args:
        messages: Messages whose content is text or a list of parts.
        images: Images to place, in order.
        at_placeholders: Whether `<image>` in a user's text is a placeholder.
    """
    waiting = [part for message in messages for part in _parts(message) if part == {"type": "image"}]
    num_leading = 0 if at_placeholders or waiting else len(images)
    placed = []
    for message in messages:
        parts = message["content"]
        if isinstance(parts, str):
            text, num_images = parts, _count_placeholders(message) if at_placeholders else 0
            if num_images:
                text = text.replace(PLACEHOLDER, "").strip()
            elif message["role"] == "user":
                num_images, num_leading = num_leading, 0
            parts = [*({"type": "image"} for _ in range(num_images)), _text_part(text)]
        placed.append({"role": message["role"], "content": parts})
    waiting = [part for message in placed for part in message["content"] if part == {"type": "image"}]
    if len(waiting) != len(images):
        raise ValueError(
            f"the row has {len(images)} images, but {len(waiting)} places for them (`{PLACEHOLDER}` in the user's "
            "text, or parts of type image without an image); add one place per image"
        )
    for part, image in zip(waiting, images, strict=True):
        part["image"] = image
    return placed


def _parts(message: dict) -> list[dict]:
    return [] if isinstance(message["content"], str) else message["content"]


def _text_part(text: Any) -> dict[str, str]:
    if not isinstance(text, str):
        raise TypeError(f"a text must be a string, but is of type {type(text).__name__}")
    return {"type": "text", "text": text}


def _as_caption_row(messages: list[dict]) -> dict[str, Any]:
    parts = [part for message in messages for part in message["content"]]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("the conversation has no answer to use as a caption")
    return _caption_row([part["image"] for part in parts if part["type"] == "image"], text_of(answers[0]))


def _caption_row(images: list, caption: Any) -> dict[str, Any]:
    text = _text_part(caption)["text"].strip()
    if not images or not text:
        raise ValueError(f"a caption needs an image and text, but has {len(images)} images and the text {text!r}")
    return {"image": images, "caption": text}


def _image_counts(records: Any) -> dict[str, list[int]]:
    """Number of images in every row, for each image column of an Arrow table, without reading images."""
    import pyarrow.compute

    counts = {}
    for name in {"image", "images"} & set(records.column_names):
        column = records.data.column(name)
        is_list = pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)
        lengths = pyarrow.compute.list_value_length(column) if is_list else pyarrow.compute.is_valid(column)
        counts[name] = [int(length or 0) for length in lengths.to_pylist()]
    return counts


def _size(record: dict[str, Any], num_images: int = 0) -> tuple[int, int]:
    """Number of characters and of images of a row in any form; 0 for a bad row."""
    try:
        texts, num_parts = [record.get("caption") or record.get("text") or ""], 0
        for message in record.get("messages") or record.get("conversations") or []:
            content = message.get("content") or message.get("value") or ""
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            num_parts += sum(PART_TYPES.get(part["type"]) == "image" for part in parts)
            texts += [part.get("text") or "" for part in parts]
        return sum(map(len, texts)), max(num_images, num_parts, len(_image_column(record)))
    except (AttributeError, KeyError, TypeError):
        return 0, 0
