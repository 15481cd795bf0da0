"""Weight files of a checkpoint, read and written one tensor at a time.

Whole shards never lie in memory: of a safetensors file the bytes are copied in chunks, a `.bin` file is mapped, and a
safetensors file is written behind a header that is known beforehand, which safetensors' own `save_file` cannot do.
"""

import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TORCH_DTYPES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
HEADER_LENGTH_BYTES = 8  # safetensors: a little-endian length, that many bytes of JSON, the data
CHUNK_BYTES = 2**22
JSON_FILES = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
)
MAX_MAPPED_BYTES = 2**25  # of a mapped file, what was read stays in memory as long as the map


class TensorInfo(NamedTuple):
    """What a file says about a tensor without reading it.

    Attributes:
        shape: Its shape.
        dtype: Its dtype, by the name that safetensors has for it.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return torch.Size(self.shape).numel() * SAFETENSORS_DTYPES[self.dtype].itemsize


def find_weight_files(folder: Path) -> list[Path]:
    """Weight files of a checkpoint; safetensors are preferred to `.bin`.

    Args:
        folder: The checkpoint's folder.

    Raises:
        ValueError: If there are none, the index is broken, or a file that it names is missing.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index, whole = folder / f"{stem}{suffix}.index.json", folder / f"{stem}{suffix}"
        if index.is_file():
            return _read_index(index, suffix)
        if files := [whole] if whole.is_file() else sorted(folder.glob(f"{stem}-*-of-*{suffix}")):
            return files
    raise ValueError(f"{folder} holds no weights: neither model*.safetensors nor pytorch_model*.bin.")


def _read_index(index: Path, suffix: str) -> list[Path]:
    """The files that an index names, all of which lie beside it."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index.name} should hold a `weight_map` of tensor names to file names, but does not.")
    for name in names.values():
        if not isinstance(name, str) or not name.endswith(suffix) or Path(name).name != name or "\\" in name:
            raise ValueError(
                f"{index.name} should name files `*{suffix}` that lie beside it, without a folder, but names {name!r}."
            )
    files = [index.with_name(name) for name in sorted(set(names.values()))]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index.name} names {', '.join(absent)}, but there is no such file in {index.parent}.")
    return files


def read_json(file: Path) -> dict:
    """Read a JSON file that holds an object.

    Args:
        file: The file.

    Raises:
        ValueError: If it cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a JSON file that can be read: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} should hold a JSON object, but holds a {type(content).__name__}.")
    return content


def check_json_files(folder: Path) -> None:
    """Refuse a folder in which a file that is going to be read holds no JSON object.

    Args:
        folder: A checkpoint's folder.

    Raises:
        ValueError: If there is such a file; names it.
    """
    for name in JSON_FILES:
        if (folder / name).is_file():
            read_json(folder / name)


def read_tensor_infos(file: Path) -> dict[str, TensorInfo]:
    """Shapes and dtypes of the tensors in a weight file, by name; no data is read.

    Args:
        file: A safetensors file, or what `torch.save` wrote, which is read without running code from it.

    Raises:
        ValueError: If the file is damaged, or holds anything but tensors.
    """
    if file.suffix == ".safetensors":
        header, _ = _read_header(file)
        return {name: TensorInfo(tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
    tensors = _load_bin(file, map_location="meta")
    return {name: TensorInfo(tuple(t.shape), TORCH_DTYPES.get(t.dtype, str(t.dtype))) for name, t in tensors.items()}


def read_tensors(file: Path, names: Iterable[str]) -> Iterator[tuple[str, Iterator[memoryview]]]:
    """Data of tensors, in the order asked for; each as an iterator of chunks, to be used up before the next.

    Args:
        file: A weight file.
        names: Which tensors.
    """
    if file.suffix == ".safetensors":
        header, data_start = _read_header(file)
        with file.open("rb") as stream:
            for name in names:
                start, end = header[name]["data_offsets"]
                stream.seek(data_start + start)
                yield name, _stream_chunks(stream, end - start)
        return
    is_mapped, num_bytes_read, tensors = zipfile.is_zipfile(file), 0, _load_bin(file, map_location="cpu")
    for name in names:
        if is_mapped and num_bytes_read > MAX_MAPPED_BYTES:
            tensors, num_bytes_read = _load_bin(file, map_location="cpu"), 0  # a fresh map has nothing in memory
        num_bytes_read += tensors[name].nbytes
        yield name, _tensor_chunks(tensors[name])


def write_safetensors(file: Path, infos: dict[str, TensorInfo], data: Iterable[Iterator[memoryview]]) -> Iterator[int]:
    """Write a safetensors file, tensor by tensor.

    Args:
        file: Where to.
        infos: Its tensors, in the order of `storage_order`.
        data: Their data, in the same order.

    Yields:
        The number of bytes that were just written.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in infos.items():
        end = offset + info.num_bytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % HEADER_LENGTH_BYTES)  # so that the data are aligned
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(HEADER_LENGTH_BYTES, "little") + encoded)
        for chunks in data:
            for chunk in chunks:
                yield stream.write(chunk)


def storage_order(infos: dict[str, TensorInfo]) -> list[str]:
    """Names in the order in which safetensors stores tensors: wide dtypes first, so that all stay aligned."""

    def key(name: str) -> tuple[int, str]:
        dtype = SAFETENSORS_DTYPES.get(infos[name].dtype)
        return (0 if dtype is None else -dtype.itemsize, name)

    return sorted(infos, key=key)


def _read_header(file: Path) -> tuple[dict[str, dict], int]:
    try:
        with safe_open(file, framework="pt"):  # checks that header and data are whole
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
            header = json.loads(stream.read(length))
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}. Download it again.") from error
    header.pop("__metadata__", None)
    return header, HEADER_LENGTH_BYTES + length


def _load_bin(file: Path, *, map_location: str) -> dict[str, torch.Tensor]:
    # Files in the format from before torch 1.6 cannot be mapped.
    try:
        tensors = torch.load(file, map_location=map_location, weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is damaged or holds more than tensors, such as code, which is not run; get the weights as "
            "safetensors, or from a source that you trust."
        ) from error
    except Exception as error:  # whatever the bytes of a broken pickle happen to say
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(f"{file} is damaged or not written by torch.save: {reason}. Download it again.") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{file} should hold a dict of tensors by name, as a model's `state_dict()`, but does not.")
    return tensors


def _stream_chunks(stream: BinaryIO, num_bytes: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(num_bytes, CHUNK_BYTES)))
    while num_bytes:
        count = stream.readinto(buffer[: min(num_bytes, CHUNK_BYTES)])
        if not count:
            raise OSError(f"{stream.name} ended while it was read.")
        yield buffer[:count]
        num_bytes -= count


def _tensor_chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    if tensor.numel():
        data = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]
