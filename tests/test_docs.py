"""What docs/training.md shows is what happens: its commands and its code are run, in order, in a clone."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flashsloth.cli import main as flashsloth

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
SCRIPT = "examples/train.py"


def blocks(language):
    """Language and content of the blocks in the languages of a pattern."""
    return re.findall(rf"^```({language})\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def commands(block):
    return [shlex.split(line) for line in block.replace("\\\n", "").splitlines()]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with everything of the repository, where nothing is left behind."""
    for entry in ROOT.iterdir():
        if entry.name not in {".git", "build", "runs", "data"}:
            (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def run(command, monkeypatch):
    """Run a command; Python's in this process, which has imported everything."""
    if command[0] == "flashsloth":
        assert flashsloth(command[1:]) == 0, command
    elif command[0] == "python":
        monkeypatch.setattr(sys, "argv", command[1:])
        runpy.run_path(command[1], run_name="__main__")
    else:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.slow
def test_everything_on_the_page_runs(clone, monkeypatch):
    shown = blocks("sh|python")
    assert len(shown) > 5
    for language, block in shown:
        if language == "python":
            exec(compile(block, "training.md", "exec"), {})
        else:
            for command in commands(block):
                run(command, monkeypatch)


def test_what_the_page_names_is_there():
    names = re.findall(r"\b(?:examples|docs|benchmarks)/[\w/.-]*\w", PAGE) + re.findall(
        r"\]\((?!http|#)([^)#]+)\)", PAGE
    )
    assert "examples/recipes/stage1.yaml" in names
    assert [name for name in names if not any((start / name).exists() for start in (ROOT, ROOT / "docs"))] == []


def test_commands_for_gpus_give_options_that_the_script_has(monkeypatch, capsys):
    shown = [command for _, block in blocks("bash") for command in commands(block) if SCRIPT in command]
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    used = {word for command in shown for word in command[command.index(SCRIPT) :] if word.startswith("--")}
    assert used
    assert used <= known
