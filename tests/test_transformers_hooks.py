"""Importing the package fails if the installed transformers lacks something that FlashSloth overrides."""

import importlib
import inspect
import subprocess
import sys

import pytest

import flashsloth
from flashsloth import generation_flashsloth, saliency_flashsloth
from flashsloth.configuration_flashsloth import TRANSFORMERS_HOOKS, check_transformers
from flashsloth.training import recipe

MODULES = [
    flashsloth.configuration_flashsloth,
    flashsloth.image_processing_flashsloth,
    flashsloth.modeling_flashsloth,
    flashsloth.processing_flashsloth,
    flashsloth.video_processing_flashsloth,
    generation_flashsloth,
    recipe,
    saliency_flashsloth,
]
HOOKS = [(path, name) for path, names in TRANSFORMERS_HOOKS.items() for name in names]
IMPORT_WITHOUT = """
from transformers.generation import GenerationMixin

del GenerationMixin._update_model_kwargs_for_generation
import flashsloth
"""


def overridden(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"transformers.{module}"), name)


@pytest.mark.parametrize(("path", "name"), HOOKS)
def test_a_hook_that_is_gone_is_named(monkeypatch, path, name):
    check_transformers(path)
    owners = [base for base in overridden(path).__mro__ if name in vars(base)]
    assert owners
    for owner in owners:
        monkeypatch.delattr(owner, name)
    with pytest.raises(ImportError, match=rf"overrides {path.rpartition('.')[2]}\.{name}, but.*install a version"):
        check_transformers(path)


def test_every_private_override_is_listed():
    listed = {name for names in TRANSFORMERS_HOOKS.values() for name in names}
    ours = {
        value
        for module in MODULES
        for value in vars(module).values()
        if getattr(value, "__module__", "") == module.__name__
    }
    found = {
        name
        for cls in filter(inspect.isclass, ours)
        for name in vars(cls)
        if name.startswith("_") and not name.startswith("__")
        for base in cls.__mro__[1:]
        if base.__module__.startswith("transformers.") and name in vars(base)
    }
    assert len(found) > 15
    assert found <= listed


def test_the_import_fails():
    done = subprocess.run([sys.executable, "-c", IMPORT_WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: FlashSloth overrides GenerationMixin._update_model_kwargs_for_generation, but transformers"
    )
