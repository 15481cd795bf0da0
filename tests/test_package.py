"""The package as others install and use it: its metadata, its types, and the deprecations that its tests refuse."""

import importlib
import re
import runpy
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers.utils import logging

import flashsloth

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(["flashsloth", *file.relative_to(ROOT).with_suffix("").parts])
    for pattern in ("*_flashsloth.py", "handler.py", "cli/*.py", "evaluation/*.py", "training/*.py")
    for file in ROOT.glob(pattern)
    if file.name != "__init__.py"
)
SCRIPTS = sorted([*(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])


def test_the_package_says_that_it_is_typed():
    assert (Path(flashsloth.__file__).parent / "py.typed").exists()
    assert '"py.typed"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_the_metadata_has_the_version_of_the_package():
    assert version("flashsloth") == flashsloth.__version__


@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_imported(module):
    if module == "flashsloth.evaluation.model":
        pytest.importorskip("lmms_eval")
    importlib.import_module(module)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.relative_to(ROOT).as_posix())
def test_every_script_is_imported_without_doing_anything(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])  # as Python does for a script
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(str(script))["__doc__"]
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_pre_commit_runs_the_ruff_that_ci_runs():
    (rev,) = re.findall(r"rev: v(.+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert f'"ruff=={rev}"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_a_deprecated_call_of_transformers_is_noticed(deprecations):
    logging.get_logger("transformers.test").warning_once("`old` is deprecated! Use `new` instead!")
    logging.get_logger("transformers.test").warning_once("`old` is slow.")
    assert deprecations.messages == ["`old` is deprecated! Use `new` instead!"]
    deprecations.messages.clear()


def test_pytest_turns_deprecations_of_our_code_into_errors():
    filters = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert {"error::DeprecationWarning:flashsloth", "error::FutureWarning:flashsloth"} <= {*filters["filterwarnings"]}


def test_the_package_is_imported_once():
    models = {name for name in sys.modules if name.endswith(".modeling_flashsloth")}
    assert {name for name in models if not name.startswith("transformers_modules.")} == {
        "flashsloth.modeling_flashsloth"
    }
