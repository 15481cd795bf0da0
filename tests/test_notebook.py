"""`notebook.ipynb` runs from top to bottom: in a clone without a network, and anywhere with the Hub."""

import importlib.util
import json
import os
import re
import shutil
from importlib.metadata import requires
from pathlib import Path

import pytest
from local_hub import local_hub
from packaging.requirements import Requirement
from PIL import Image
from test_docs import undefined_names

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient", reason="running a notebook needs nbclient and ipykernel")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
FILE = ROOT / "notebook.ipynb"
HUB_ID = "USER/tiny-sloth"
SECONDS_PER_CELL = 600


@pytest.fixture
def notebook():
    return nbformat.read(FILE, as_version=4)


def execute(notebook, folder, monkeypatch, **variables):
    """Run all cells in a fresh kernel, in a folder; returns what each code cell printed and displayed."""
    for name, value in {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "ACCELERATE_USE_CPU": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    client = nbclient.NotebookClient(notebook, timeout=SECONDS_PER_CELL, resources={"metadata": {"path": str(folder)}})
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    return printed, images


def answer(question):
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT, dtype="float32")
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    content = [{"type": "image", "image": Image.open(ROOT / "examples" / "scene.png")}]
    inputs = processor.encode_conversations(
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    )
    output = model.generate(**inputs, max_new_tokens=50)[:, inputs["input_ids"].shape[1] :]
    return processor.post_process_image_text_to_text(output)[0]


def check(printed, images):
    assert f"Read the sign. {answer('Read the sign.')}\n" in printed
    assert re.findall(r"tiles encoded so far: (\d)", printed) == ["1", "1", "1"]
    before, after = (int(number) for number in re.findall(r"^(\d+) of 20 right", printed, flags=re.MULTILINE))
    assert after >= 15 > before
    assert f"what it knew is still there: {answer('Read the sign.')}" in printed
    assert len(images) == 5  # the scene, three maps, and a drawing


@pytest.mark.slow
def test_it_runs_in_a_clone_without_a_network(notebook, tmp_path, monkeypatch):
    for name in ("config.json", "generation_config.json", "model.safetensors", "examples", "chat_template.jinja"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(ROOT / name)
    check(*execute(notebook, tmp_path, monkeypatch, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home")))


@pytest.mark.slow
def test_it_runs_anywhere_with_the_model_of_the_hub(notebook, tmp_path, monkeypatch):
    """As in Colab, except that the packages are installed already."""
    published, folder = tmp_path / "published", tmp_path / "empty"
    folder.mkdir()
    shutil.copytree(ROOT / "examples", published / "examples", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for file in [*ROOT.glob("*.json"), *ROOT.glob("*.safetensors"), *ROOT.glob("*.jinja")]:
        shutil.copy(file, published)
    cells = [cell for cell in notebook.cells if "Trainer" not in cell.source and "adapted" not in cell.source]
    notebook.cells = cells  # the training is tested above
    with local_hub() as hub:
        hub.add(HUB_ID, published)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        changed = {name: value for name, value in hub.environment.items() if os.environ.get(name) != value}
        printed, images = execute(notebook, folder, monkeypatch, **changed | {"HF_HOME": str(tmp_path / "home")})
    assert f"Read the sign. {answer('Read the sign.')}\n" in printed
    assert len(images) == 4
    assert list((tmp_path / "home").rglob("snapshots/*/model.safetensors"))


def test_it_installs_what_is_missing_from_the_hub(notebook, monkeypatch):
    (cell,) = (cell for cell in notebook.cells if "%pip" in cell.source)
    code = cell.source.replace("%pip install -q {missing}", "installed.append(missing)")
    for find_spec, expected in (
        (lambda name: None, [f"git+https://huggingface.co/{HUB_ID} peft accelerate"]),
        (lambda name: None if name == "peft" else name, ["peft"]),
        (lambda name: name, []),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(importlib.util, "find_spec", find_spec)
            exec(code, {"installed": (installed := [])})
        assert installed == expected
    training = {one.name for one in map(Requirement, requires("flashsloth")) if "train" in str(one.marker)}
    assert {"peft", "accelerate"} <= training


def test_it_is_as_the_hub_wants_it(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
    assert len(FILE.read_bytes()) < 20_000
    assert json.loads(FILE.read_text(encoding="utf-8"))["nbformat"] == 4


def test_its_cells_use_only_names_of_earlier_cells(notebook):
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    code = "\n".join(cells).replace("%pip install -q {missing}", "pass")
    assert undefined_names(code) == {"display"}  # IPython's own
