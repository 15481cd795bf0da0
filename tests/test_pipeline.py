"""`pipeline("image-text-to-text")` on the shipped checkpoint, with the package and, in a second run, by remote code."""

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from processes import serve_folder
from transformers import TextIteratorStreamer, pipeline

ROOT = Path(__file__).parents[1]
SCENE, SHAPES = ROOT / "examples" / "scene.png", ROOT / "examples" / "shapes.png"
SHAPES_TEXT = (
    "a yellow star top left, an orange square top right, a green circle bottom left, a purple cross bottom right"
)
BASE64 = base64.b64encode(SCENE.read_bytes()).decode()
HIDE_PACKAGE = "import sys, pytest; sys.modules['flashsloth'] = None; sys.exit(pytest.main(sys.argv[1:]))"
IS_PACKAGE_HIDDEN = sys.modules.get("flashsloth", ...) is None


@pytest.fixture(scope="module")
def pipe():
    made = pipeline("image-text-to-text", model=str(ROOT), trust_remote_code=True if IS_PACKAGE_HIDDEN else None)
    modules = [type(part).__module__ for part in (made.model, made.processor, made.processor.image_processor)]
    start = "transformers_modules." if IS_PACKAGE_HIDDEN else "flashsloth."
    assert [module for module in modules if not module.startswith(start)] == []
    return made


@pytest.fixture(scope="module")
def website():
    """Address of a web server that has the images of `examples`."""
    with serve_folder(ROOT / "examples") as address:
        yield address


def user(*parts):
    shown = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": str(part)}
        for part in parts
    ]
    return {"role": "user", "content": shown}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def answer(pipe, messages, **kwargs):
    return pipe(text=messages, return_full_text=False, **kwargs)[0]["generated_text"].strip()


@pytest.mark.parametrize(
    "image",
    [
        {"type": "image", "image": Image.open(SCENE)},
        {"type": "image", "path": str(SCENE)},
        {"type": "image", "image": str(SCENE)},
        {"type": "image", "url": SCENE.as_uri()},
        {"type": "image", "url": "WEBSITE/scene.png"},
        {"type": "image", "base64": BASE64},
        {"type": "image", "url": f"data:image/png;base64,{BASE64}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}},
        {"type": "image_url", "image_url": {"url": "WEBSITE/scene.png"}},
    ],
    ids=["pil", "path", "string", "file url", "http url", "base64", "data url", "openai data url", "openai http url"],
)
def test_every_source_of_an_image_is_read(pipe, website, image):
    def at_website(value):
        if isinstance(value, dict):
            return {name: at_website(part) for name, part in value.items()}
        return value.replace("WEBSITE", website) if isinstance(value, str) else value

    content = [at_website(image), {"type": "text", "text": "Read the sign."}]
    assert answer(pipe, [{"role": "user", "content": content}]) == "PULL"


@pytest.mark.parametrize(
    ("url", "reason"),
    [("WEBSITE/none.png", "the server answered 404"), ("http://localhost:1/x.png", "Connection refused")],
)
def test_an_image_that_cannot_be_fetched_is_refused_clearly(pipe, website, url, reason):
    url = url.replace("WEBSITE", website)
    content = [{"type": "image", "url": url}, {"type": "text", "text": "Why?"}]
    with pytest.raises(ValueError, match=f"complete image, found '{url}'.*{reason}"):
        answer(pipe, [{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "img", "image": str(SCENE)}, "of type 'img'"),
        ({"type": "image"}, "should have one of image, url, path, base64, image_url, but has none"),
        ({"type": "text", "text": None}, "a string as `text`, but has None"),
    ],
)
def test_a_part_that_would_vanish_is_refused(pipe, part, reason):
    with pytest.raises(ValueError, match=reason):
        answer(pipe, [{"role": "user", "content": [part, {"type": "text", "text": "Read the sign."}]}])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_conversations_with_different_numbers_of_images_can_share_a_batch(pipe, batch_size):
    conversations = [
        [user(SCENE, "Read the sign.")],
        [user(SCENE, SHAPES, "Describe the picture.")],
        [user(SHAPES, "Describe the picture."), assistant(SHAPES_TEXT), user("Which colour is the circle?")],
        [user(SHAPES, "Describe the picture.")],
    ]
    outputs = pipe(text=conversations, batch_size=batch_size, return_full_text=False)
    answers = [rows[0]["generated_text"].strip() for rows in outputs]
    assert [answers[0], *answers[2:]] == ["PULL", "green", SHAPES_TEXT]
    assert answers[1] == answer(pipe, conversations[1])


@pytest.mark.parametrize("content", ["Hello", [{"type": "text", "text": "Hello"}]])
def test_text_alone_gets_an_answer(pipe, content):
    assert answer(pipe, [{"role": "user", "content": content}], max_new_tokens=5)


def test_an_answer_can_be_streamed(pipe):
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    whole = answer(pipe, [user(SHAPES, "Describe the picture.")], generate_kwargs={"streamer": streamer})
    pieces = list(streamer)
    assert len(pieces) > 10
    assert "".join(pieces).strip() == whole == SHAPES_TEXT


def test_a_started_answer_is_continued(pipe):
    begun = [user(SHAPES, "Describe the picture."), assistant("a yellow star top left, an")]
    full = pipe(text=begun)[0]["generated_text"]
    assert full == [begun[0], assistant(SHAPES_TEXT)]
    rest = pipe(text=begun, return_full_text=False)[0]["generated_text"]
    assert "a yellow star top left, an" + rest == SHAPES_TEXT
    as_string = [begun[0], {"role": "assistant", "content": "a yellow star top left, an"}]
    assert pipe(text=as_string, return_full_text=False)[0]["generated_text"] == rest


def test_a_returned_conversation_can_be_continued(pipe):
    messages = pipe(text=[user(SCENE, "Read the sign.")])[0]["generated_text"]
    assert messages[-1]["content"].strip() == "PULL"
    messages.append(user("Which colour is the star?"))
    assert answer(pipe, messages) == "green"
    prompt = pipe.processor.apply_chat_template(messages, add_generation_prompt=True)
    assert "ASSISTANT: PULL</s>" in prompt  # with one space before the answer


def test_an_answer_can_be_kept_short(pipe):
    assert answer(pipe, [user(SHAPES, "Describe the picture.")], max_new_tokens=3) == "a yellow star"


@pytest.mark.parametrize("image", [Image.open(SCENE), str(SCENE)], ids=["pil", "path"])
def test_images_and_a_raw_prompt_can_be_passed_separately(pipe, image):
    prompt = "USER: <image>\nRead the sign.<learnable> ASSISTANT:"
    assert pipe(images=image, text=prompt)[0]["generated_text"] == f"{prompt} PULL"
    outputs = pipe(images=[image, SHAPES.as_posix()], text=[prompt] * 2, return_full_text=False)
    assert outputs[0]["generated_text"].strip() == "PULL"


def test_an_image_can_be_read_as_five_tiles(pipe):
    messages = [user(SCENE, "Read the sign.")]
    output = pipe(text=messages, processor_kwargs={"do_image_splitting": True}, return_tensors=True)[0]
    num_image_tokens = output["generated_token_ids"].tolist().count(pipe.processor.image_token_id)
    assert num_image_tokens == 5 * pipe.processor.image_seq_length


def test_the_page_prints_what_it_says(monkeypatch, capsys):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE))
    monkeypatch.chdir(ROOT)
    exec(compile(code, "serving.md", "exec"), {})
    said = re.findall(r"^# (.*)$", code, flags=re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == said
    assert said


@pytest.mark.slow
@pytest.mark.skipif(IS_PACKAGE_HIDDEN, reason="this is the second run")
def test_all_of_this_works_by_remote_code_without_the_package(tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    tests = ["--confcutdir", str(ROOT / "tests"), "-c", str(ROOT / "pyproject.toml"), __file__]
    arguments = ["--noconftest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        [sys.executable, "-c", HIDE_PACKAGE, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "1 skipped" in done.stdout
