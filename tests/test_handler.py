"""The handler of Inference Endpoints, called as an endpoint does: from a repository's folder, without the package."""

import base64
import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flashsloth.cli.export import export

ROOT = Path(__file__).parents[1]
SCENE, SHAPES = (ROOT / "examples" / name for name in ("scene.png", "shapes.png"))
ENDPOINT = """
import importlib.util
import json
import sys

sys.modules["flashsloth"] = None  # as if the package were not installed
import torch

torch.set_num_threads(1)
folder, requests, responses = sys.argv[1:]
spec = importlib.util.spec_from_file_location("handler", folder + "/handler.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
handler, answers = module.EndpointHandler(folder), {}
for name, body in json.load(open(requests)).items():
    try:
        answers[name] = handler(body)
    except ValueError as error:
        answers[name] = str(error)
json.dump(answers, open(responses, "w"))
"""


def encoded(file):
    return base64.b64encode(file.read_bytes()).decode()


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(words):
    return {"type": "text", "text": words}


SCENE_URL = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(SCENE)}"}}
FIRST_TURN = [user(SCENE_URL, text("Read the sign.")), {"role": "assistant", "content": "PULL"}]
SIGN = {"image": encoded(SCENE), "text": "Read the sign."}
DESCRIPTION = (
    "a yellow star top left, an orange square top right, a green circle bottom left, a purple cross bottom right"
)
ANSWERED = {
    "base64": ({"inputs": SIGN}, "PULL"),
    "list of pictures": ({"inputs": {"images": [encoded(SHAPES)], "text": "Describe the picture."}}, DESCRIPTION),
    "url": ({"inputs": {"image": "http://SERVER/scene.png", "text": "Read the sign."}}, "PULL"),
    "OpenAI's messages": ({"messages": FIRST_TURN[:1]}, "PULL"),
    "second turn": ({"inputs": {"messages": [*FIRST_TURN, user(text("Which colour is the star?"))]}}, "green"),
    "list of messages": (
        {"inputs": [user({"type": "image", "base64": encoded(SCENE)}, text("Read the sign."))]},
        "PULL",
    ),
    "short": (
        {"inputs": {"image": encoded(SHAPES), "text": "Describe the picture."}, "parameters": {"max_new_tokens": 3}},
        "a yellow star",
    ),
    "whole numbers": ({"inputs": SIGN, "parameters": {"repetition_penalty": 1, "temperature": 2}}, "PULL"),
    "parameters": ({"inputs": SIGN, "parameters": {"num_beams": 2, "max_new_tokens": 20, "top_k": None}}, "PULL"),
}
REFUSED = {
    "nothing": ({}, "there is no `text`"),
    "wrong text": ({"inputs": {"text": 3}}, "`text` is 3"),
    "no messages": ({"inputs": {"messages": []}}, "should be a list of messages, but is []"),
    "no role": ({"messages": [{"content": "Hello"}]}, "a message should have a `role`"),
    "unknown role": ({"messages": [{"role": "wizard", "content": "Hello"}]}, "wizard"),
    "unknown part": ({"messages": [user({"type": "audio", "audio": "x"})]}, "a part of a message should be"),
    "broken base64": ({"inputs": {"image": "no picture", "text": "?"}}, "the picture 'no picture' is neither"),
    "half a picture": ({"inputs": {"image": encoded(SCENE)[:200], "text": "?"}}, "a picture that can be read"),
    "a file of the server": ({"inputs": {"image": str(SCENE), "text": "?"}}, "neither base64 nor a URL"),
    "a number": ({"inputs": {"image": 5, "text": "?"}}, "should be base64 or a URL, but is 5"),
    "no such url": ({"inputs": {"image": "http://SERVER/nothing.png", "text": "?"}}, "a picture that can be read"),
    "unknown parameter": ({"inputs": "Hi", "parameters": {"max_tokens": 5}}, "max_tokens, which nothing reads"),
    "wrong parameter": (
        {"inputs": SIGN, "parameters": {"max_new_tokens": "many"}},
        "`max_new_tokens` should be a whole number",
    ),
    "half a beam": ({"inputs": SIGN, "parameters": {"num_beams": 1.5}}, "`num_beams` should be a whole number"),
    "no beams": ({"inputs": SIGN, "parameters": {"num_beams": 0}}, "the request cannot be answered"),
    "no flag": ({"inputs": SIGN, "parameters": {"do_image_splitting": 1}}, "should be true or false, but is 1"),
    "endless": ({"inputs": SIGN, "parameters": {"temperature": 1e999}}, "`temperature` should be a number from 0"),
    "too cold": (
        {"inputs": SIGN, "parameters": {"do_sample": True, "temperature": 1e-40}},
        "the request cannot be answered",
    ),
    "list of requests": ([{"inputs": SIGN}], "a request should be an object with `inputs`"),
    "wrong parameters": ({"inputs": SIGN, "parameters": [1]}, "should be an object, but is [1]"),
    "no tokens": ({"inputs": SIGN, "parameters": {"max_new_tokens": -1}}, "`max_new_tokens` should be a whole number"),
}


@pytest.fixture(scope="module")
def server():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            """Says nothing."""

    pictures = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SCENE.parent))
    threading.Thread(target=pictures.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{pictures.server_port}"
    pictures.shutdown()
    pictures.server_close()


@pytest.fixture(scope="module")
def responses(tmp_path_factory, server):
    folder = tmp_path_factory.mktemp("endpoint")
    export(ROOT, folder / "repository")
    requests = {name: body for name, (body, _) in (ANSWERED | REFUSED).items()}
    (folder / "requests.json").write_text(json.dumps(requests).replace("http://SERVER", server))
    (folder / "script.py").write_text(ENDPOINT)
    arguments = [folder / "repository", folder / "requests.json", folder / "responses.json"]
    environment = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]}
    command = [sys.executable, folder / "script.py", *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "responses.json").read_text())


@pytest.mark.parametrize("name", ANSWERED)
def test_requests_are_answered(responses, name):
    assert responses[name] == [{"generated_text": ANSWERED[name][1]}]


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_refused_with_the_reason(responses, name):
    assert isinstance(responses[name], str), responses[name]
    assert REFUSED[name][1] in responses[name]
    assert len(responses[name]) < 400
