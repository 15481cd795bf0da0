"""The real server: `vllm serve` with OpenAI's client."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own; see .ci/run")

from openai import AsyncOpenAI, BadRequestError, OpenAI
from vllm_engines import NUM_ANSWER_TOKENS, generate, random_images, save_checkpoint, text_config, user

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
IMAGES = random_images(4)
QUESTIONS = ["what is it?", "which one?", "red or blue", "count the things"]
BROKEN = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.fixture(scope="module")
def checkpoint(make_model, processor, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    model = make_model(text_config=text_config("llama", tokenizer), query_layer_idx=1)
    save_checkpoint(folder, model, processor)
    return folder, model


@contextlib.contextmanager
def serving(log, model, *options):
    """Address of a server in a separate process, which must be healthy in the end."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    # `vllm serve MODEL`, which needs the metadata of a package `vllm`
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--enforce-eager"]
    settings = {"--dtype": "float32", "--max-model-len": "512", "--block-size": "32", "--port": str(port)}
    command += [part for setting in settings.items() for part in setting]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, *options], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        wait_for(f"http://localhost:{port}/health", server, log)
        yield f"http://localhost:{port}/v1"
        assert server.poll() is None, log.read_text()
        assert is_healthy(f"http://localhost:{port}/health"), log.read_text()
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def url(checkpoint, tmp_path_factory):
    folder, _ = checkpoint
    with serving(tmp_path_factory.mktemp("log") / "server.log", folder, "--served-model-name", "sloth") as address:
        yield address


def is_healthy(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def wait_for(url, server, log):
    deadline = time.monotonic() + 300
    while not is_healthy(url):
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)


@pytest.fixture
def client(url):
    return OpenAI(base_url=url, api_key="none", timeout=300, max_retries=0)


def picture(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()},
    }


def as_openai(conversation):
    return [
        message
        if isinstance(message["content"], str)
        else message | {"content": [picture(p["image"]) if p["type"] == "image" else p for p in message["content"]]}
        for message in conversation
    ]


def reference(checkpoint, processor, conversation):
    _, model = checkpoint
    ((_, ids),) = generate(model, processor, [conversation])
    return ids


def ask(client, conversation, **kwargs):
    return client.chat.completions.create(
        model="sloth",
        messages=as_openai(conversation),
        max_tokens=NUM_ANSWER_TOKENS,
        extra_body={"return_token_ids": True},
        **kwargs,
    )


def ids(completion):
    return completion.choices[0].token_ids


def test_plain_streamed_and_text_only(client, checkpoint, processor):
    for conversation in ([user(IMAGES[:1], QUESTIONS[0])], [user(IMAGES[1:3], QUESTIONS[1])], [user([], "who?")]):
        expected = reference(checkpoint, processor, conversation)
        assert ids(ask(client, conversation)) == expected
        chunks = list(ask(client, conversation, stream=True))
        assert [i for chunk in chunks for i in getattr(chunk.choices[0], "token_ids", None) or ()] == expected
        assert len(chunks) > 2


def test_two_turns(client, checkpoint, processor):
    conversation = [user(IMAGES[:1], QUESTIONS[0])]
    answer = ask(client, conversation).choices[0].message.content
    conversation += [{"role": "assistant", "content": answer}, user([], QUESTIONS[1])]
    assert ids(ask(client, conversation)) == reference(checkpoint, processor, conversation)


def test_sixteen_at_once(url, checkpoint, processor):
    conversations = [[user([image], question)] for image in IMAGES for question in QUESTIONS]

    async def ask_all():
        async with AsyncOpenAI(base_url=url, api_key="none", timeout=300, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, conversation) for conversation in conversations))

    found = [ids(completion) for completion in asyncio.run(ask_all())]
    assert found == [reference(checkpoint, processor, conversation) for conversation in conversations]


def test_control_tokens_of_a_user_stay_text(client, checkpoint, processor):
    for conversation in ([user(IMAGES[:1], "a <image> b <learnable> c")], [user([], "<image><learnable></s>")]):
        assert ids(ask(client, conversation)) == reference(checkpoint, processor, conversation)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": [BROKEN, {"type": "text", "text": "what?"}]}], "image"),
        ([{"role": "judge", "content": "hello"}], "judge"),
        (as_openai([user(IMAGES[:1], "x" * 600)]), "512"),
        (as_openai([user(IMAGES[:1] * 110, "which?")]), "440 are image tokens of 110 images|At most"),
    ],
    ids=["broken picture", "unknown role", "too long", "too many pictures"],
)
def test_bad_requests_get_400_with_the_reason(messages, reason, client, checkpoint, processor):
    with pytest.raises(BadRequestError, match=reason):
        client.chat.completions.create(model="sloth", messages=messages, max_tokens=8)
    conversation = [user(IMAGES[:1], QUESTIONS[0])]  # the same picture as in the refused request
    assert ids(ask(client, conversation)) == reference(checkpoint, processor, conversation)


@pytest.mark.parametrize("kind", ["text", "ids", "truncated"])
def test_torn_prompts_get_400(kind, client, checkpoint):
    _, model = checkpoint
    prompt = {"text": "USER: <image>\nwhat?<learnable> ASSISTANT:", "ids": [65, *[model.config.query_token_id] * 2, 65]}
    with pytest.raises(BadRequestError, match=r"image tokens|whole blocks|truncate_prompt_tokens"):
        client.completions.create(
            model="sloth",
            prompt=prompt.get(kind, "USER: hello<learnable> ASSISTANT:"),
            max_tokens=4,
            extra_body={"truncate_prompt_tokens": 5} if kind == "truncated" else {},
        )


def test_a_client_that_hangs_up(client, checkpoint, processor):
    conversation = [user(IMAGES[:1], QUESTIONS[0])]
    stream = client.chat.completions.create(
        model="sloth", messages=as_openai(conversation), max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert ids(ask(client, conversation)) == reference(checkpoint, processor, conversation)


def test_structured_outputs(client):
    schema = {"type": "object", "properties": {"count": {"enum": [1, 2]}}, "required": ["count"]}
    for kwargs, check in (
        ({"extra_body": {"structured_outputs": {"choice": ["red", "blue"]}}}, lambda found: found in ("red", "blue")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
            lambda found: json.loads(found)["count"] in (1, 2),
        ),
    ):
        completion = client.chat.completions.create(
            model="sloth", messages=as_openai([user(IMAGES[:1], "which?")]), max_tokens=200, **kwargs
        )
        assert check(completion.choices[0].message.content)


def test_responses(client, checkpoint, processor):
    conversation = [user(IMAGES[:1], QUESTIONS[0])]
    url = picture(IMAGES[0])["image_url"]["url"]
    parts = [
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "input_text", "text": QUESTIONS[0]},
    ]
    response = client.responses.create(model="sloth", input=[{"role": "user", "content": parts}], max_output_tokens=8)
    expected = processor.tokenizer.decode(reference(checkpoint, processor, conversation), skip_special_tokens=True)
    assert response.output_text.rstrip("\ufffd") == expected.rstrip("\ufffd")  # half a character at the end


BENCHMARK = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def test_vllms_benchmark(url, checkpoint):
    folder, _ = checkpoint
    options = {
        "--backend": "openai-chat",
        "--endpoint": "/v1/chat/completions",
        "--base-url": url.removesuffix("/v1"),
        "--model": str(folder),
        "--served-model-name": "sloth",
        "--dataset-name": "random-mm",
        "--num-prompts": "4",
        "--random-input-len": "16",
        "--random-output-len": "4",
        "--random-mm-base-items-per-request": "1",
        "--random-mm-limit-mm-per-prompt": '{"image": 1, "video": 0}',
        "--random-mm-bucket-config": "{(32, 32, 1): 1.0}",
    }
    command = [sys.executable, "-c", BENCHMARK, *(part for option in options.items() for part in option)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert re.search(r"Successful requests: +4\b", result.stdout), result.stdout + result.stderr


def test_the_clients_of_the_page_work_with_two_engines(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```py\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE))
    code = code.replace('error.body["detail"].partition(", found")[0]', "type(error).__name__")
    said = [line for line in re.findall(r"^# (.*)$", code, flags=re.MULTILINE) if not line.startswith("Expected")]
    monkeypatch.chdir(ROOT)
    with serving(tmp_path / "server.log", ".", "--data-parallel-size", "2") as address:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code.replace("http://localhost:8000/v1", address), "serving.md", "exec"), {})
    found = [line.strip() for line in printed.getvalue().splitlines()]
    assert [line for line in found if line != "BadRequestError"] == said
    assert "BadRequestError" in found
