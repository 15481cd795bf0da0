"""The commands that the pages show for the Hub work: real clients in fresh processes, with a local Hub."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from base_models import make_decoder, make_tower
from local_hub import local_hub
from original_checkpoint import make_original
from terminal import Terminal

from flashsloth import FlashSlothForConditionalGeneration

ROOT = Path(__file__).parents[1]
SCENE = str(ROOT / "examples" / "scene.png")
pytestmark = pytest.mark.slow


def block(page, start):
    """The block of a page that starts with this text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.search(rf"^```\w+\n({re.escape(start)}.*?)^```", text, flags=re.DOTALL | re.MULTILINE)[1]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with local_hub() as served:
        served.home = tmp_path_factory.mktemp("home")
        yield served


@pytest.fixture
def run(hub, tmp_path):
    """Run a command against this Hub and return its output."""

    def run(*command, fails=False, **environment):
        settings = hub.environment | {"HF_HOME": str(hub.home), "OMP_NUM_THREADS": "1", **environment}
        settings["PATH"] = f"{Path(sys.executable).parent}:{settings['PATH']}"
        done = subprocess.run(command, env=settings, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert bool(done.returncode) == fails, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stderr if fails else done.stdout

    return run


@pytest.fixture(scope="module")
def published(hub):
    """The checkpoint of this repository, exported and uploaded with the commands of docs/converting.md."""
    export = shlex.split(block("docs/converting.md", "flashsloth export"))
    upload = shlex.split(block("docs/converting.md", "hf upload"))
    folder = hub.home / "clone"
    folder.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in {".git", "build", "runs"}:
            (folder / entry.name).symlink_to(entry)
    for command in (export, upload):
        program = Path(sys.executable).parent / command[0]
        settings = hub.environment | {"HF_HOME": str(hub.home)}
        done = subprocess.run([program, *command[1:]], env=settings, cwd=folder, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:].decode()
    return upload[2], folder / upload[3]


def test_everything_that_was_exported_is_uploaded(hub, published):
    repository, folder = published
    (files,) = hub.repositories[repository].values()
    assert files == {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.*")} | {
        "LICENSE": (folder / "LICENSE").read_bytes()
    }


def test_a_question_is_answered_by_a_hub_id(run, published):
    assert run("flashsloth", "ask", SCENE, "Read the sign.", "--model", published[0]) == "PULL\n"
    said = run("flashsloth", "ask", SCENE, "Read the sign.", "--model", "USER/nothing", fails=True)
    assert said.splitlines()[-1].startswith("flashsloth: error: no such model: USER/nothing")


def test_the_readmes_snippet_works_with_a_hub_id(run, hub, published, tmp_path):
    """Without a clone, and without importing the package."""
    code = block("README.md", "from transformers import")
    assert f'"{published[0]}"' in code
    (tmp_path / "ask.py").write_text(code)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "scene.png").symlink_to(SCENE)
    assert run(sys.executable, "ask.py").splitlines() == re.findall("^# (.*)$", code, flags=re.MULTILINE)


ASK = """
{loading}
content = [{{"type": "image", "path": {scene!r}}}, {{"type": "text", "text": "Read the sign."}}]
inputs = processor.encode_conversations([{{"role": "user", "content": content}}])
output = model.generate(**inputs, max_new_tokens=20)
print(processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])[0])
print(type(model).__module__)
"""


def test_only_the_code_of_a_pinned_commit_runs(run, hub, published, tmp_path):
    """As docs/converting.md pins it: code that is pushed later is not run."""
    repository, _ = published
    first = next(iter(hub.repositories[repository]))
    code = hub.repositories[repository][first]["modeling_flashsloth.py"]
    hub.commit(repository, {"modeling_flashsloth.py": code + b"\nraise SystemExit('other code ran')\n"})
    loading = block("docs/converting.md", "from huggingface_hub import model_info")
    for name, revision in (("pinned", first), ("latest", None)):
        pinned = re.sub(r'^revision = "\w+"', f"revision = {revision!r}", loading, flags=re.MULTILINE)
        assert pinned != loading
        (tmp_path / f"{name}.py").write_text(ASK.format(loading=pinned, scene=SCENE))
    latest, answer, module = run(sys.executable, "pinned.py").splitlines()
    assert latest == list(hub.repositories[repository])[-1] != first
    assert answer == "PULL"
    assert module == f"transformers_modules.USER.tiny_hyphen_sloth.{first}.modeling_flashsloth"
    assert "other code ran" in run(sys.executable, "latest.py", fails=True)


@pytest.mark.parametrize("page", ["README.md", "docs/converting.md"])
@pytest.mark.parametrize("as_bin", [False, True], ids=["safetensors", "bin"])
def test_an_original_release_is_converted_by_its_hub_id(run, hub, tmp_path, page, as_bin):
    command = shlex.split(block(page, "flashsloth convert"))
    release = make_original(tmp_path / "release", as_bin=as_bin, num_shards=2)
    (release / "training_args.bin").write_bytes(b"not for us")
    hub.repositories.pop(command[2], None)
    hub.add(command[2], release)
    run(*command, "--vision-config", str(release / "siglip-tower"), HF_HOME=str(tmp_path / "home"))
    converted, original = (
        FlashSlothForConditionalGeneration.from_pretrained(folder).state_dict()
        for folder in (tmp_path / command[3], release)
    )
    assert converted.keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in converted.items())
    downloaded = {file.name for file in (tmp_path / "home").rglob("snapshots/*/*")}
    assert "config.json" in downloaded
    assert "training_args.bin" not in downloaded


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_base_models_are_joined_by_their_hub_ids(run, hub, tmp_path, page):
    command = shlex.split(block(page, "flashsloth init my-sloth"))
    tower, decoder = (command[command.index(option) + 1] for option in ("--vision", "--language"))
    make_tower(tmp_path / "tower", "siglip_vision_model")
    make_decoder(tmp_path / "decoder", "qwen3" if "Qwen" in decoder else "phi", spare_rows=8)
    for repository, name in ((tower, "tower"), (decoder, "decoder")):
        hub.repositories.pop(repository, None)
        hub.add(repository, tmp_path / name)
    run(*command, HF_HOME=str(tmp_path / "home"))
    card = (tmp_path / "my-sloth" / "README.md").read_text()
    assert tower in card
    assert decoder in card


def test_a_base_model_can_be_pinned_to_a_commit(run, hub, tmp_path):
    page = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    download, init = (shlex.split(line) for line in re.findall(r"^ *((?:hf download|flashsloth init) .*)", page, re.M))
    make_tower(tmp_path / "tower", "siglip_vision_model")
    make_decoder(tmp_path / "decoder", "phi", spare_rows=8)
    tower, decoder = download[2], init[init.index("--language") + 1]
    for repository in (tower, decoder):
        hub.repositories.pop(repository, None)
    pinned = hub.add(tower, tmp_path / "tower")
    hub.commit(tower, {"config.json": b"{}"})
    hub.add(decoder, tmp_path / "decoder")
    download[download.index("--revision") + 1] = pinned
    for command in (download, init):
        run(*command, HF_HOME=str(tmp_path / "home"))
    vision = FlashSlothForConditionalGeneration.from_pretrained(tmp_path / init[2]).config.vision_config
    assert vision.model_type == "siglip_vision_model"


def test_a_terminal_shows_the_progress_of_a_download_and_a_pipe_does_not(hub, published, tmp_path):
    command = [Path(sys.executable).parent / "flashsloth", "ask", SCENE, "Read the sign.", "--model", published[0]]
    with Terminal(command, **hub.environment | {"HF_HOME": str(tmp_path / "one"), "HF_HUB_OFFLINE": "0"}) as terminal:
        assert terminal.wait_for_exit() == 0
    assert re.search(r"model\.safetensors.*100%", terminal.seen)
    settings = hub.environment | {"HF_HOME": str(tmp_path / "two")}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert (done.returncode, "%|" in done.stderr) == (0, False)
    assert done.stdout.strip() in terminal.seen
