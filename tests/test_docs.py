"""What the pages of docs/ show is what happens: their commands and their code are run, in order, in a clone."""

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
PAGES = sorted((ROOT / "docs").glob("*.md"))
SCRIPT = "examples/train.py"


def blocks(page, language):
    """Language and content of a page's blocks in the languages of a pattern."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```({language})\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(block):
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", "").splitlines()]


RUNNABLE = [page for page in PAGES if blocks(page, "sh|python")]


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
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_everything_on_a_page_runs(page, clone, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    namespace = {}
    for language, block in blocks(page, "sh|python"):
        if language == "python":
            exec(compile(block, page.name, "exec"), namespace)
        else:
            for command in filter(None, commands(block)):
                run(command, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"\b(?:examples|docs|benchmarks)/[\w/.-]*\w", text) + re.findall(
        r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", text
    )
    assert [name for name in names if not any((start / name).exists() for start in (ROOT, ROOT / "docs"))] == []


def test_commands_for_gpus_give_options_that_the_script_has(monkeypatch, capsys):
    page = ROOT / "docs" / "training.md"
    shown = [command for _, block in blocks(page, "bash") for command in commands(block) if SCRIPT in command]
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    used = {word for command in shown for word in command[command.index(SCRIPT) :] if word.startswith("--")}
    assert used
    assert used <= known
