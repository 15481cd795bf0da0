"""Model repositories that are complete or not there at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


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

    Args:
        output: What `unused_folder` gave.
        num_bytes: Size of the weights.

    Raises:
        RepositoryError: If there is no room for the weights.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < num_bytes:
        raise RepositoryError(
            f"{output.parent} has {free / 1e9:.1f} GB free, but the weights need {num_bytes / 1e9:.1f} GB."
        )
    workplace = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        partial = workplace / output.name  # `mkdtemp` is for its owner only; this one has the usual permissions
        partial.mkdir()
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def copy_code(folder: Path) -> None:
    """Copy the modules that a repository needs to load without the package, and the handler of Inference Endpoints.

    Args:
        folder: The repository.
    """
    package = Path(__file__).parents[1]
    for module in (*sorted(package.glob("*_flashsloth.py")), package / "handler.py"):
        shutil.copyfile(module, folder / module.name)
