"""The pages of docs/ are true: each block runs on its own in a fresh clone, unless it needs a network, a GPU or hours.

A comment right before a block tells these tests what the block needs in addition to a clone, as the page does in words:
`<!-- setup -->` marks the one block that runs before each of the others, and `<!-- continues -->` a block that runs in
the folder of the block before it. Blocks share no Python names.
"""

import ast
import builtins
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.metadata import metadata
from itertools import takewhile
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as run_script_parser

from flashsloth.cli import build_parser
from flashsloth.cli import main as flashsloth

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TASK = re.compile(r"^(?:task|group): *[\"']?([\w-]+)", flags=re.MULTILINE)


def blocks(page, language):
    """Language and content of the blocks of a page whose language matches a pattern."""
    return [(language, block) for _, language, block in marked_blocks(page, language)]


def marked_blocks(page, language):
    """Mark (or ""), language and content of the blocks of a page whose language matches a pattern."""
    pattern = rf"(?:^<!-- (setup|continues) -->\n)?^```({language})\n(.*?)^```"
    return re.findall(pattern, page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def runs(page):
    """The runs of a page, each in a separate folder: lists of blocks, as language and content."""
    setup, found = [], []
    for mark, *block in marked_blocks(page, "sh|python"):
        if mark == "setup":
            setup.append(block)
        elif mark == "continues":
            found[-1].append(block)
        else:
            found.append([block])
    return [[*setup, *one] for one in found]


def commands(block):
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", "").splitlines()]


SHELL = re.compile(r"\w+\(\) {|}|[A-Z]+=.*")  # a function begins or ends, a variable is set
RUNS = [pytest.param(page, run, id=f"{page.stem}-{i}") for page in PAGES for i, run in enumerate(runs(page), start=1)]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with everything in the repository, whose new files are easy to find."""
    for entry in ROOT.iterdir():
        if entry.name not in {".git", "build", "runs", "data"}:
            (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def run(command, monkeypatch):
    """Run a command; Python commands run in this process, which has already imported everything."""
    if command[0] == "flashsloth":
        assert flashsloth(command[1:]) == 0, command
    elif command[0] == "python":
        monkeypatch.setattr(sys, "argv", command[1:])
        monkeypatch.setattr(sys, "path", [str(Path(command[1]).resolve().parent), *sys.path])  # as Python itself does
        runpy.run_path(command[1], run_name="__main__")
    else:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's configs pass it
@pytest.mark.parametrize(("page", "shown"), RUNS)
def test_every_block_of_a_page_runs_on_its_own(page, shown, clone, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    for language, block in shown:
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(block, page.name, "exec"), {"__name__": "__main__"})
            if said := re.findall(r"^# (.*)$", block, flags=re.MULTILINE):
                assert printed.getvalue().splitlines() == said
        else:
            for command in filter(None, commands(block)):
                run(command, monkeypatch)
    assert not_ignored(f"{entry.name}/x" if entry.is_dir() else entry.name for entry in new_entries(clone)) == []


def new_entries(clone):
    """New files in a clone, whose original entries are symbolic links."""
    return [entry for entry in clone.iterdir() if not entry.is_symlink()]


def not_ignored(paths):
    """The paths, relative to the root, that git would show as new; none if this is not a git checkout."""
    if not (ROOT / ".git").exists():
        return []
    paths = list(paths)
    command = ["git", "-C", str(ROOT), "check-ignore", "--stdin"]
    ignored = subprocess.run(command, input="\n".join(paths), capture_output=True, text=True, check=False)
    assert ignored.returncode in (0, 1), ignored.stderr
    return sorted({*paths} - {*ignored.stdout.splitlines()})


def undefined_names(code):
    """Names that code reads but never sets: they are missing if a reader copies only this block."""
    read, known = set(), set(dir(builtins))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else known).add(node.id)
        elif isinstance(node, ast.alias):
            known.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            known.add(node.name)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            known.add(node.name)
    return read - known


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_no_block_reads_names_of_another(page):
    for _, block in blocks(page, "python|py"):
        assert undefined_names(block) == set(), block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_marks_precede_a_block_that_runs(page):
    text = page.read_text(encoding="utf-8")
    marks = [mark for mark, *_ in marked_blocks(page, "sh|python") if mark]
    assert re.findall(r"<!-- (setup|continues)\b", text) == marks
    assert marks.count("setup") <= 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"\b(?:examples|docs|benchmarks)/[\w/.-]*\w", text) + re.findall(
        r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", text
    )
    assert [name for name in names if not any((start / name).exists() for start in (ROOT, ROOT / "docs"))] == []


def anchors(page):
    """The anchors of a page, as GitHub and the Hub derive them from its headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_into_pages_lead_to_headings(page):
    links = re.findall(r"\]\((?!http)([^)#]*)#([^)]*)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if link[1] not in anchors(page.parent / link[0] if link[0] else page)] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_extras_are_installed_from_the_clone(page):
    """`flashsloth` is not on PyPI."""
    assert re.findall(r"pip install [^&`\n]*flashsloth\b.*", page.read_text(encoding="utf-8")) == []


def shown_commands():
    """The commands of all pages and the README that need a network, a GPU or hours."""
    for page in (ROOT / "README.md", *PAGES):
        for block in re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", "").splitlines():
                for part in line.split("&&"):
                    words = shlex.split(part, comments=True)
                    if words and not SHELL.fullmatch(" ".join(words)):
                        yield pytest.param(words, id=f"{page.stem}: {' '.join(words)}"[:60])


OUTPUT = re.compile(r"--(?:output|output_dir|output_path|use_cache|local-dir)[ =]\"?([\w.-][\w./-]*)")


def test_what_shown_commands_write_into_a_clone_is_ignored():
    """For the commands that the tests do not run, and those in the docstrings of the examples."""
    outputs = []
    for words in (param.values[0] for param in shown_commands()):
        if words[0] == "flashsloth":
            outputs.append(getattr(build_parser().parse_args(words[1:]), "output", None))
        outputs += OUTPUT.findall(" ".join(words))
    for script in [*ROOT.glob("examples/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        outputs += OUTPUT.findall(ast.get_docstring(ast.parse(script.read_text("utf-8"))) or "")
    new = {f"{output}/x" for output in outputs if output and not (ROOT / output).parent.is_relative_to(ROOT / "docs")}
    assert {"my-sloth/x", "flashsloth-3.2b/x", "captions/x", "stage2/x", "cache/x"} <= new
    assert not_ignored(new) == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_nothing_that_belongs_to_the_repository_is_ignored():
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


def script_and_arguments(words):
    """The script or module that a command runs, and its arguments, as the launcher's own parser reads them."""
    if words[0] == "python":
        return words[1], words[2:]
    if words[0] == "torchrun":
        read = run_script_parser().parse_args(words[1:])
    else:
        read = launch_command_parser().parse_args(words[2:])
    return read.training_script, read.training_script_args


@pytest.mark.parametrize("words", [*shown_commands()])
def test_programs_accept_the_commands_that_cannot_run_here(words, monkeypatch, capsys):
    match words:
        case ["hf" | "transformers" | "docker" | "vllm", *_] | ["pytest", *_]:
            pass  # their own tests run them, and this is pytest
        case ["npm", "--prefix", folder, *command]:
            scripts = json.loads((ROOT / folder / "package.json").read_text(encoding="utf-8"))["scripts"]
            assert command == ["ci"] or command[1] in scripts
        case ["pip", "install", *wanted]:
            extras = {name for one in wanted for name in re.findall(r"\[(.*)\]", one)}
            assert extras <= set(metadata("flashsloth").get_all("Provides-Extra"))
        case ["flashsloth", *arguments]:
            build_parser().parse_args(takewhile(lambda word: word not in ("<", ">"), arguments))
        case ["evaluate", task]:
            folder = Path(pytest.importorskip("lmms_eval").__file__).parent / "tasks"
            names = {name for file in folder.rglob("*.yaml") for name in TASK.findall(file.read_text("utf-8"))}
            assert task in names
        case ["lmms-eval", *arguments]:
            check_options("lmms_eval", arguments, monkeypatch, capsys)
        case ["python" | "torchrun", *_] | ["accelerate", "launch", *_]:
            check_options(*script_and_arguments(words), monkeypatch, capsys)
        case _:
            pytest.fail(f"nothing checks {words}")


def check_options(script, arguments, monkeypatch, capsys):
    """Check that the help of a script or module lists all options, or that our own parser accepts them."""
    if script == "flashsloth":
        build_parser().parse_args(arguments)
        return
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    if script == "lmms_eval":
        module = pytest.importorskip("lmms_eval.__main__")
    with pytest.raises(SystemExit) as left:
        module.parse_eval_args() if script == "lmms_eval" else runpy.run_path(str(ROOT / script), run_name="__main__")
    assert left.value.code == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert {word for word in arguments if word.startswith("--")} <= known
