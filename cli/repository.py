"""Model repositories that are complete or not there at all.

A repository is written into a hidden folder beside it, which is locked as long as its process lives. A process that is
killed leaves the folder behind; whoever writes the same repository next removes what is locked no more.
"""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what killed processes left is not removed
    fcntl = None

LOCK = ".flashsloth-lock"


class RepositoryError(ValueError):
    """A model repository cannot be made; nothing was written."""


def unused_folder(output: str | Path) -> Path:
    """The absolute path of a folder that is to be written.

    Args:
        output: The folder.

    Raises:
        RepositoryError: If it is in use.
    """
    output = Path(output).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RepositoryError(f"{output} exists already; choose a folder that does not exist or is empty.")
    return output


@contextlib.contextmanager
def complete_or_absent(output: Path, num_bytes: int) -> Iterator[Path]:
    """A folder beside the output, which becomes the output when the block ends, and vanishes when it fails.

    What an earlier process that was killed left of the same output is removed.

    Args:
        output: What `unused_folder` gave.
        num_bytes: Size of the weights.

    Raises:
        RepositoryError: If there is no room for the weights.
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
            partial = workplace / output.name  # `mkdtemp` is for its owner only; this one has the usual permissions
            partial.mkdir()
            yield partial
            if output.exists():
                output.rmdir()
            partial.rename(output)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


@contextlib.contextmanager
def _lock(workplace: Path) -> Iterator[None]:
    """Hold a lock in a folder, which the system releases when the process ends, however it ends."""
    descriptor = None
    if fcntl is not None:
        with contextlib.suppress(OSError):  # of a file system without locks
            descriptor = os.open(workplace / "lock", os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (workplace / "lock").rename(workplace / LOCK)  # so that it is never there unlocked
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _remove_abandoned(output: Path) -> None:
    """Remove what killed processes left of the same output."""
    if fcntl is None:
        return
    for workplace in output.parent.glob(f".{glob.escape(output.name)}-*"):
        with contextlib.suppress(OSError):  # no lock in it, so it is none of ours; or a living process holds it
            descriptor = os.open(workplace / LOCK, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(workplace)
            finally:
                os.close(descriptor)


def copy_code(folder: Path) -> None:
    """Copy the modules that a repository needs to load without the package, and the handler of Inference Endpoints.

    Args:
        folder: The repository.
    """
    package = Path(__file__).parents[1]
    for module in (*sorted(package.glob("*_flashsloth.py")), package / "handler.py"):
        shutil.copyfile(module, folder / module.name)
