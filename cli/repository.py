"""Folders of model repositories: checks of their files, and writing a folder so that it is complete or absent.

A repository is written into a hidden folder next to the output, which is renamed when it is complete. The process holds
a lock in the hidden folder. If it is killed, the folder stays; the next process that writes the same output removes it,
because its lock is free.
"""

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: folders of killed processes are not removed
    fcntl = None

LOCK = ".flashsloth-lock"
JSON_FILES = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
)


class RepositoryError(ValueError):
    """A model repository cannot be built; nothing was written."""


def read_json(file: Path) -> dict:
    """Read a JSON file that contains an object.

    Args:
        file: The file.

    Raises:
        ValueError: If it cannot be read, or does not contain an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a readable JSON file: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must contain a JSON object, but contains a {type(content).__name__}.")
    return content


def check_json_files(folder: Path) -> None:
    """Check that every JSON file that transformers reads contains an object.

    Args:
        folder: A checkpoint's folder.

    Raises:
        ValueError: If one does not; the message names the file.
    """
    for name in JSON_FILES:
        if (folder / name).is_file():
            read_json(folder / name)


def find_weight_files(folder: Path) -> list[Path]:
    """Find the weight files of a checkpoint; safetensors are preferred to `.bin`.

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
    raise ValueError(f"{folder} contains no weights: neither model*.safetensors nor pytorch_model*.bin.")


def _read_index(index: Path, suffix: str) -> list[Path]:
    """The files that an index names. All must be in its folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index.name} must contain a `weight_map` of tensor names to file names, but does not.")
    for name in names.values():
        if not isinstance(name, str) or not name.endswith(suffix) or Path(name).name != name or "\\" in name:
            raise ValueError(f"{index.name} must name `*{suffix}` files in its own folder, but names {name!r}.")
    files = [index.with_name(name) for name in sorted(set(names.values()))]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index.name} names {', '.join(absent)}, but there is no such file in {index.parent}.")
    return files


def unused_folder(output: str | Path) -> Path:
    """Check that a folder can be written.

    Args:
        output: The folder.

    Returns:
        Its absolute path.

    Raises:
        RepositoryError: If it is not empty, or is a file.
    """
    output = Path(output).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RepositoryError(f"{output} exists already; choose a folder that is empty or does not exist.")
    return output


@contextlib.contextmanager
def complete_or_absent(output: Path, num_bytes: int) -> Iterator[Path]:
    """Create a hidden folder that becomes the output when the block ends, or is removed if the block fails.

    Hidden folders that killed processes left for the same output are removed first.

    Args:
        output: The path that `unused_folder` returned.
        num_bytes: Size of the weights, in bytes.

    Yields:
        The hidden folder.

    Raises:
        RepositoryError: If the disk has no room for the weights.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output)
    free = shutil.disk_usage(output.parent).free
    if free < num_bytes:
        raise RepositoryError(
            f"{output.parent} has {free / 1e9:.1f} GB free, but the weights need {num_bytes / 1e9:.1f} GB."
        )
    workplace = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        with _lock(workplace):
            partial = workplace / output.name  # with the umask's permissions; `mkdtemp` gives access to the owner only
            partial.mkdir()
            yield partial
            if output.exists():
                output.rmdir()
            partial.rename(output)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


@contextlib.contextmanager
def _lock(workplace: Path) -> Iterator[None]:
    """Hold a lock in a folder. The system releases it when the process ends, even if it is killed."""
    descriptor = None
    if fcntl is not None:
        with contextlib.suppress(OSError):  # the file system has no locks
            descriptor = os.open(workplace / "lock", os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (workplace / "lock").rename(workplace / LOCK)  # after locking, so that no other process finds it unlocked
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _remove_abandoned(output: Path) -> None:
    """Remove the hidden folders that killed processes left for the same output."""
    if fcntl is None:
        return
    for workplace in output.parent.glob(f".{glob.escape(output.name)}-*"):
        with contextlib.suppress(OSError):  # another program's folder, without a lock, or one that is being written
            descriptor = os.open(workplace / LOCK, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(workplace)
            finally:
                os.close(descriptor)


def copy_code(folder: Path) -> None:
    """Copy the modules that the repository needs without the package, and the handler for Inference Endpoints.

    Args:
        folder: The repository.
    """
    package = Path(__file__).parents[1]
    for module in (*sorted(package.glob("*_flashsloth.py")), package / "handler.py"):
        shutil.copyfile(module, folder / module.name)
