"""`docker/Dockerfile` builds a server: with Docker where it runs, and otherwise by running its steps in a folder."""

import base64
import contextlib
import fnmatch
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import pytest
from openai import OpenAI
from PIL import Image

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
SCENE = ROOT / "examples" / "scene.png"
QUESTION = "Read the sign."
START_TIMEOUT = 240  # seconds
CHECKPOINT = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "chat_template.jinja"}


def instructions():
    """Name and arguments of every instruction."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def arguments_of(name):
    return [arguments for instruction, arguments in instructions() if instruction == name]


def context():
    """Files that Docker copies: those of the ignore file's exceptions."""
    patterns = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert patterns[0] == "*"
    kept = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    for file in ROOT.rglob("*"):
        name = file.relative_to(ROOT).as_posix()
        is_kept = any(fnmatch.fnmatch(name, one) and name.count("/") == one.count("/") for one in kept)
        if file.is_file() and (is_kept or name.partition("/")[0] in kept) and "__pycache__" not in name:
            yield name


def test_the_image_has_the_package_and_the_checkpoint_and_nothing_else():
    names = set(context())
    assert CHECKPOINT | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "modeling_flashsloth.py"} <= names
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert "cli" in packages
    assert {name.partition("/")[0] for name in names if "/" in name} == {"examples", *packages}
    assert not any(name.startswith((".", "tests/", "docs/")) for name in names)


def test_the_server_is_not_root_and_is_checked():
    assert arguments_of("USER") == ["1000"]
    assert arguments_of("EXPOSE") == ["8000"]
    assert len(arguments_of("HEALTHCHECK")) == 1
    assert {"BASE=python:3.12-slim"} <= set(arguments_of("ARG"))


def test_the_commands_in_its_comments_set_arguments_that_it_has():
    text = re.sub(r"\\\n# +", "", DOCKERFILE.read_text(encoding="utf-8"))
    commands = [shlex.split(line) for line in re.findall(r"^# {5}(docker .*)$", text, flags=re.MULTILINE)]
    assert [command[1] for command in commands] == ["build", "run", "build", "run"]
    known = {name.partition("=")[0] for name in arguments_of("ARG")}
    for command in commands:
        given = [command[index + 1] for index, word in enumerate(command) if word == "--build-arg"]
        assert {name.partition("=")[0] for name in given} <= known


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def wait_until_healthy(port, is_running):
    for _ in range(2 * START_TIMEOUT):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/health"):
            return
        assert is_running()
        time.sleep(0.5)
    pytest.fail("the server did not start")


def ask(port):
    content = base64.b64encode(SCENE.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]
    client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=120)
    return (
        client.chat.completions.create(model=".", messages=messages, max_tokens=50).choices[0].message.content.strip()
    )


def answer():
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT)
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    content = [{"type": "image", "image": Image.open(SCENE)}, {"type": "text", "text": QUESTION}]
    inputs = processor.encode_conversations([{"role": "user", "content": content}]).to(dtype=model.dtype)
    output = model.generate(**inputs, max_new_tokens=50)[:, inputs["input_ids"].shape[1] :]
    return processor.post_process_image_text_to_text(output)[0]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="runs the steps in a shell")
def test_its_steps_build_a_server_that_answers(tmp_path):
    """The steps run in a folder instead of an image; the packages that this process has need no installation."""
    folder, port = tmp_path / "flashsloth", free_port()
    for name in context():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    settings = dict(setting.split("=", 1) for setting in arguments_of("ENV") + arguments_of("ARG") if "=" in setting)
    settings |= {"VIRTUAL_ENV": f"{tmp_path}/venv", "HF_HOME": f"{tmp_path}/huggingface", "TORCH_INDEX": f"{tmp_path}"}
    settings["HOME"] = str(tmp_path)
    settings |= {"HOST": "127.0.0.1", "PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    programs = f"{tmp_path}/venv/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    packages = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    environment = os.environ | settings | {"PATH": programs, "PYTHONPATH": packages}
    steps = arguments_of("RUN")
    assert len(steps) == 3
    for step in steps:
        done = subprocess.run(
            step, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{step}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert list((tmp_path / "venv").rglob("site-packages/flashsloth/modeling_flashsloth.py"))
    (command,) = arguments_of("CMD")
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, shell=True, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_until_healthy(port, lambda: process.poll() is None)
            (check,) = (one.partition(" CMD ")[2] for one in arguments_of("HEALTHCHECK"))
            assert subprocess.run(check, shell=True, env=environment, check=False).returncode == 0
            assert ask(port) == answer()
        finally:
            process.terminate()
            process.wait(timeout=60)
    assert subprocess.run(check, shell=True, env=environment, stderr=subprocess.DEVNULL, check=False).returncode != 0


def docker(*arguments):
    return subprocess.run(["docker", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("docker") or docker("info").returncode != 0, reason="needs a Docker daemon")
def test_docker_builds_an_image_that_answers():
    name, port = f"flashsloth-test-{uuid.uuid4().hex[:8]}", free_port()
    built = docker("build", "-f", str(DOCKERFILE), "-t", name, ".")
    assert built.returncode == 0, built.stderr[-4000:]
    try:
        started = docker("run", "--detach", "--name", name, "-p", f"127.0.0.1:{port}:8000", name)
        assert started.returncode == 0, started.stderr
        wait_until_healthy(port, lambda: name in docker("ps", "--format", "{{.Names}}").stdout)
        assert ask(port) == answer()
    finally:
        docker("rm", "--force", name)
        docker("image", "rm", "--force", name)
