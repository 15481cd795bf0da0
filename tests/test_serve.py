"""`transformers serve` on the shipped checkpoint, as docs/serving.md starts it, asked by the `openai` client."""

import base64
import contextlib
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from openai import BadRequestError, OpenAI
from PIL import Image
from processes import serve_folder
from scenes import Layout, draw, scene_at

pytestmark = pytest.mark.slow  # starts a server

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
SHAPES_TEXT = (
    "a yellow star top left, an orange square top right, a green circle bottom left, a purple cross bottom right"
)
START_TIMEOUT = 240  # seconds


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(home, *options):
    """Address of a server that runs the page's command in a separate process, without the installed package."""
    command = next(line for block in blocks("bash") for line in block.splitlines() if line.startswith("transformers "))
    port, log = free_port(), home / "log.txt"
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program, *arguments = shlex.split(command)
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name(program)), *arguments, "--port", str(port), *options],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(2 * START_TIMEOUT):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/health"):
                break
            assert process.poll() is None, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://localhost:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(home):
    with serving(home) as url:
        yield OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def website():
    """Address of a server with the example images."""
    with serve_folder(ROOT / "examples") as address:
        yield address


def data_url(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def shown(name):
    return data_url((ROOT / "examples" / f"{name}.png").read_bytes())


def user(*parts):
    """A turn of texts and of URLs of images."""
    return {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": part}} if ":" in part else {"type": "text", "text": part}
            for part in parts
        ],
    }


def ask(client, *messages, model=".", **kwargs):
    completion = client.chat.completions.create(model=model, messages=messages, max_tokens=50, **kwargs)
    return completion.choices[0].message.content.strip()


def stream(client, *messages, **kwargs):
    chunks = client.chat.completions.create(model=".", messages=messages, max_tokens=50, stream=True, **kwargs)
    return [chunk.choices[0].delta.content or "" for chunk in chunks]


def test_a_question_about_an_image_is_answered(client, home):
    completion = client.chat.completions.create(
        model=".", messages=[user(shown("scene"), "Read the sign.")], max_tokens=50
    )
    assert completion.choices[0].message.content.strip() == "PULL"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.prompt_tokens > 16, "the image's tokens count"
    assert list(home.glob("modules/transformers_modules/**/processing_flashsloth.py")), "it is remote code that runs"


def test_an_answer_is_streamed(client):
    pieces = stream(client, user(shown("shapes"), "Describe the picture."))
    assert len(pieces) > 10
    assert "".join(pieces).strip() == SHAPES_TEXT


def test_a_second_turn_asks_about_the_image_of_the_first(client):
    first = user(shown("scene"), "Read the sign.")
    answer = client.chat.completions.create(model=".", messages=[first], max_tokens=50).choices[0].message
    assert ask(client, first, answer, user("Which colour is the star?")) == "green"


def test_images_may_be_in_one_turn_or_in_several(client):
    question = "Which colour is the circle in the second image?"
    one, other = user(shown("scene"), "Read the sign."), user(shown("shapes"), question)
    both = user(shown("scene"), shown("shapes"), question)
    assert ask(client, both) == "green"
    assert ask(client, one, {"role": "assistant", "content": "PULL"}, other) == "green"
    usage = [client.chat.completions.create(model=".", messages=[turn], max_tokens=5).usage for turn in (other, both)]
    assert usage[1].prompt_tokens == usage[0].prompt_tokens + 9 + 1, "9 tokens and a line break more"


def test_text_alone_gets_an_answer(client):
    assert ask(client, {"role": "user", "content": "Hello"})
    assert ask(client, {"role": "system", "content": "Be brief."}, user("Hello"))


def test_the_responses_api_answers_plain_and_streamed(client):
    image = {"type": "input_image", "image_url": shown("scene")}
    question = [{"role": "user", "content": [image, {"type": "input_text", "text": "Read the sign."}]}]
    response = client.responses.create(model=".", input=question, max_output_tokens=50, stream=False)
    assert response.output_text.strip() == "PULL"
    events = list(client.responses.create(model=".", input=question, max_output_tokens=50, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta").strip() == "PULL"
    assert events[-1].type == "response.completed"


def test_an_answer_ends_at_a_stop_string(client):
    answer = ask(client, user(shown("shapes"), "Describe the picture."), stop=["square"])
    assert answer == SHAPES_TEXT[: SHAPES_TEXT.index("square") + len("square")]


def test_answers_are_greedy_unless_the_request_says_otherwise(client):
    question = user(shown("shapes"), "Describe the picture.")
    assert ask(client, question, temperature=5.0, seed=1) == SHAPES_TEXT
    sampled = json.dumps({"do_sample": True, "temperature": 5.0, "max_new_tokens": 50})
    assert ask(client, question, extra_body={"generation_config": sampled}, seed=1) != SHAPES_TEXT


def test_an_image_can_be_read_as_five_tiles(client):
    def num_tokens(**kwargs):
        question = [user(shown("scene"), "Read the sign.")]
        return client.chat.completions.create(model=".", messages=question, max_tokens=5, **kwargs).usage.prompt_tokens

    options = {"chat_template_kwargs": {"processor_kwargs": {"do_image_splitting": True}}}
    assert num_tokens(extra_body=options) == num_tokens() + 4 * 9


def test_a_video_is_read_as_its_frames(client, tmp_path):
    frames = [Image.open(ROOT / "examples" / f"{name}.png") for name in ("scene", "shapes")]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])

    def num_tokens(*parts, **kwargs):
        question = [{"role": "user", "content": [*parts, {"type": "text", "text": "Why?"}]}]
        completion = client.chat.completions.create(model=".", messages=question, max_tokens=5, **kwargs)
        return completion.usage.prompt_tokens

    image = {"type": "image_url", "image_url": {"url": shown("scene")}}
    clip = {"type": "video_url", "video_url": {"url": str(tmp_path / "clip.gif")}}
    assert num_tokens(clip) == num_tokens(image, image)
    assert num_tokens(clip, extra_body={"chat_template_kwargs": {"num_frames": 1}}) == num_tokens(image)


def test_another_model_is_refused_by_name(client):
    with pytest.raises(BadRequestError) as refusal:
        ask(client, user("Hello"), model="gpt-5")
    assert "pinned to '.'" in refusal.value.body["detail"]
    assert "'gpt-5'" in refusal.value.body["detail"]
    assert ask(client, user(shown("scene"), "Read the sign.")) == "PULL"


@pytest.mark.parametrize("call", [ask, stream])
@pytest.mark.parametrize(
    "url",
    [
        data_url(b"no image"),
        shown("scene")[:2000],
        "data:image/png;base64,@",
        "file:///none.png",
        "http://localhost:1/",
    ],
    ids=["no image", "cut short", "no base64", "no file", "no website"],
)
def test_a_broken_image_is_refused_and_the_server_keeps_running(client, url, call):
    with pytest.raises(BadRequestError) as refusal:
        call(client, user(url, "Read the sign."))
    assert "Expected the path, URL or base64 string of a complete image" in refusal.value.body["detail"]
    assert ask(client, user(shown("scene"), "Read the sign.")) == "PULL"


@pytest.mark.parametrize("call", [ask, stream])
def test_a_url_without_an_image_is_refused_with_the_servers_answer(client, website, call):
    with pytest.raises(BadRequestError) as refusal:
        call(client, user(f"{website}/nothing.png", "Read the sign."))
    assert "the server answered 404" in refusal.value.body["detail"]
    assert f"{website}/nothing.png" in refusal.value.body["detail"]
    assert ask(client, user(f"{website}/scene.png", "Read the sign.")) == "PULL"


@pytest.mark.parametrize("call", [ask, stream])
@pytest.mark.parametrize("image", [[], [shown("scene")]], ids=["text", "image"])
def test_a_prompt_longer_than_the_model_is_refused_with_both_numbers(client, image, call):
    with pytest.raises(BadRequestError) as refusal:
        call(client, user(*image, "star " * 15_000))
    detail = refusal.value.body["detail"]
    assert int(re.search(r"prompt has (\d+) tokens", detail)[1]) > 15_000
    assert "made for 1024" in detail
    assert "horten" in detail
    assert ask(client, user(shown("scene"), "Read the sign.")) == "PULL"


def test_a_prompt_may_fill_all_but_one_position(client):
    def num_tokens(num_words):
        turn = user("star " * num_words)
        return client.chat.completions.create(model=".", messages=[turn], max_tokens=1).usage.prompt_tokens

    step = num_tokens(11) - num_tokens(10)
    assert step > 0
    most = 10 + (1023 - num_tokens(10)) // step
    assert num_tokens(most) > 1023 - step
    with pytest.raises(BadRequestError):
        num_tokens(most + 1)


def test_an_image_is_an_image_url_or_an_input_image_and_nothing_else(client):
    """The server itself drops parts that it does not know, as docs/serving.md says."""
    ways = {"image_url": {"url": shown("scene")}, "input_image": shown("scene"), "image": shown("scene")}

    def num_tokens(*parts):
        turn = {"role": "user", "content": [*parts, {"type": "text", "text": "Read the sign."}]}
        return client.chat.completions.create(model=".", messages=[turn], max_tokens=5).usage.prompt_tokens

    blind = num_tokens()
    seen = {kind: num_tokens({"type": kind, "image_url": url}) > blind for kind, url in ways.items()}
    assert seen == {"image_url": True, "input_image": True, "image": False}


def test_the_responses_api_refuses_a_prompt_that_is_too_long(client):
    with pytest.raises(BadRequestError) as refusal:
        client.responses.create(model=".", input="star " * 15_000, stream=False)
    assert "made for 1024" in refusal.value.body["detail"]


def test_an_image_of_sixteen_bits_is_scaled_not_clipped(client):
    with Image.open(ROOT / "examples" / "shapes.png") as image:
        grey = np.asarray(image.convert("L"))
    urls = []
    for levels in (grey, grey.astype(np.uint16) * 257, np.full_like(grey, 255)):
        Image.fromarray(levels).save(buffer := io.BytesIO(), "png")
        urls.append(data_url(buffer.getvalue()))
    eight, sixteen, white = (ask(client, user(url, "Describe the picture.")) for url in urls)
    assert eight == sixteen != white


def test_a_question_without_text_and_image_is_refused(client):
    with pytest.raises(BadRequestError) as refusal:
        ask(client, {"role": "user", "content": [{"type": "picture", "url": shown("scene")}]})
    assert "neither text nor an image" in refusal.value.body["detail"]


def test_an_unknown_role_is_refused_by_name(client):
    with pytest.raises(BadRequestError) as refusal:
        ask(client, user("Hello"), {"role": "critic", "content": "Hm."})
    assert "found critic" in refusal.value.body["detail"]


def test_twenty_concurrent_requests_get_their_own_answers(client):
    layout = Layout(num_things=(1, 1), sides=(0.5, 0.7), share_shapes=0.0, share_texts=1.0, quality=0.0)
    drawn = (scene_at("test", index, layout=layout) for index in range(300))
    scenes = [
        scene
        for scene in drawn
        if [(thing.name, 1 < len(thing.text) < 5) for thing in scene.things] == [("sign", True)]
    ]
    words = [scene.things[0].text for scene in scenes]

    def read(index):
        buffer = io.BytesIO()
        draw(scenes[index]).save(buffer, "png")
        question = user(data_url(buffer.getvalue()), "Read the sign.")
        return "".join(stream(client, question)).strip() if index % 2 else ask(client, question)

    alone = list(map(read, range(20)))
    assert len(set(alone)) > 15
    assert sum(answer == word for answer, word in zip(alone, words, strict=False)) >= 17
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(read, range(20))) == alone


def test_a_client_that_hangs_up_does_not_keep_the_next_one_waiting(client):
    num_tokens = 100_000  # take longer than the timeout of the next request
    endless = json.dumps({"min_new_tokens": num_tokens, "max_new_tokens": num_tokens, "suppress_tokens": [2, 3]})
    long_answer = client.chat.completions.create(
        model=".", messages=[user("Hello")], stream=True, extra_body={"generation_config": endless}
    )
    assert len(list(islice(long_answer, 50))) == 50
    long_answer.close()
    assert ask(client.with_options(timeout=60), user(shown("scene"), "Read the sign.")) == "PULL"


def test_the_clients_of_the_page_print_what_the_page_says(client, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, printed = "\n".join(blocks("py")), io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace("http://localhost:8000/v1", str(client.base_url)), "serving.md", "exec"), {})
    said = re.findall(r"^# (.*)$", code, flags=re.MULTILINE)
    assert [line.strip() for line in printed.getvalue().splitlines()] == said
    assert said


@pytest.mark.parametrize("options", ["--continuous-batching", "--compile", "--attn-implementation eager"])
def test_options_of_the_server_do_not_change_the_answer(tmp_path, options):
    with serving(tmp_path, *options.split()) as url:
        client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        assert ask(client, user(shown("shapes"), "Describe the picture.")) == SHAPES_TEXT
