"""The folder `space/` is a Space: its header and requirements are valid, and its app starts as the Hub starts it."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest
import yaml
from huggingface_hub import SpaceCard
from local_hub import local_hub
from packaging.requirements import Requirement
from PIL import Image
from stranger import META, Stranger, words

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "space"
SCENE = ROOT / "examples" / "scene.png"
HUB_ID = "USER/tiny-sloth"
QUESTION = "Read the sign."
START_TIMEOUT = 240  # seconds
FIELDS = {  # of the Hub's reference of Spaces' configuration
    *("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "license"),
    *("short_description", "models", "preload_from_hub", "pinned"),
}
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


@pytest.fixture(scope="module")
def card():
    return SpaceCard.load(SPACE / "README.md").data


def test_the_header_has_the_fields_that_the_hub_reads(card):
    assert set(card.to_dict()) == FIELDS
    assert {card.colorFrom, card.colorTo} <= COLORS
    assert (card.sdk, card.app_file) == ("gradio", "app.py")
    assert card.models == card.preload_from_hub == [HUB_ID]
    assert len(card.short_description) <= 60
    assert isinstance(yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])["python_version"], str)


def test_its_versions_are_those_of_the_package(card):
    (gradio,) = (one for one in map(Requirement, requires("flashsloth")) if one.name == "gradio" and "demo" in str(one))
    assert gradio.specifier.contains(card.sdk_version)
    python = Requirement(f"python{metadata('flashsloth')['Requires-Python']}")
    assert python.specifier.contains(f"{card.python_version}.0")


def test_its_requirements_install_the_package_from_the_hub():
    (line,) = (SPACE / "requirements.txt").read_text().splitlines()
    wanted = Requirement(line)
    assert (wanted.name, wanted.url) == ("flashsloth", f"git+https://huggingface.co/{HUB_ID}")
    assert wanted.extras <= set(metadata("flashsloth").get_all("Provides-Extra"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(folder, home, hub, **variables):
    """The address of the app, in a separate process with the environment of a Space."""
    space = shutil.copytree(SPACE, folder / "app")
    port, log = free_port(), folder / "log.txt"
    environment = hub.environment | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "SYSTEM": "spaces"}
    environment |= {"SPACE_ID": "USER/flashsloth", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": str(port)}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=space, env=environment | variables, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(2 * START_TIMEOUT):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=30):
                break
            assert process.poll() is None, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)
    logged = log.read_text()
    expected = logged.count("RuntimeError: `spaces` package is required")  # the Hub installs it next to Gradio
    assert logged.count("Traceback") == expected, logged[-4000:]


def answer(checkpoint):
    model, processor = (
        found.from_pretrained(checkpoint) for found in (FlashSlothForConditionalGeneration, FlashSlothProcessor)
    )
    content = [{"type": "image", "image": Image.open(SCENE)}, {"type": "text", "text": QUESTION}]
    inputs = processor.encode_conversations([{"role": "user", "content": content}])
    output = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
    return processor.post_process_image_text_to_text(output)[0]


@pytest.mark.slow
def test_it_starts_as_a_space_and_answers_with_the_model_of_the_hub(tmp_path):
    pytest.importorskip("gradio")
    with local_hub() as hub:
        checkpoint = tmp_path / "checkpoint"
        checkpoint.mkdir()
        for file in [*ROOT.glob("*.json"), *ROOT.glob("*.safetensors"), *ROOT.glob("*.jinja")]:
            shutil.copy(file, checkpoint)
        hub.add(HUB_ID, checkpoint)
        with running(tmp_path, tmp_path / "home", hub) as address:
            visitor = Stranger(address)
            reply = visitor.ask({"path": visitor.upload(SCENE.read_bytes()), "meta": META}, QUESTION)
            page = visitor.get("/config")
    assert words(reply) == answer(ROOT)
    assert HUB_ID in page
    assert "scene.png" in page  # an example to click on
    assert list((tmp_path / "home").rglob("snapshots/*/model.safetensors"))


@pytest.mark.slow
def test_its_variable_names_another_model(tmp_path):
    pytest.importorskip("gradio")
    environment = os.environ | {"MODEL": "someone/nothing", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, SPACE / "app.py"], env=environment, capture_output=True, check=False)
    assert done.returncode == 2
    assert re.search(r"no such model: someone/nothing", done.stderr.decode())
