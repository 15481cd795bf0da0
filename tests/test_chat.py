"""`flashsloth chat`: several turns about images that are encoded once, in a real terminal and without one."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image
from terminal import Terminal
from transformers import TextStreamer

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor, cli
from flashsloth.cli.chat import HELP, Chat

ROOT = Path(__file__).parents[1]
SCENE = ROOT / "examples" / "scene.png"
PROGRAM = Path(sys.executable).parent / "flashsloth"
QUESTIONS = ["What is it?", "Why?"]
NUM_TOKENS = 6
ENDLESS = 1_000_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_model, processor):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def endless(tmp_path_factory, make_model, processor, make_config):
    """A checkpoint that answers with the letter a and spaces, until it is stopped."""
    folder = tmp_path_factory.mktemp("endless")
    letters = processor.tokenizer.encode("a ", add_special_tokens=False)
    text_config = make_config().text_config.to_dict() | {"max_position_embeddings": 2 * ENDLESS}
    model = make_model(text_config=text_config)
    others = sorted({*range(model.config.text_config.vocab_size)} - {*letters})
    model.generation_config.update(suppress_tokens=others, do_sample=True, temperature=100.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("images") / "image.png"
    Image.radial_gradient("L").resize((40, 30)).convert("RGB").save(file)
    return file


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """Makes text the standard input of this process."""

    def give(content):
        (tmp_path / "typed").write_bytes(content)
        monkeypatch.setattr(sys, "stdin", (tmp_path / "typed").open(encoding="utf-8"))

    return give


def expected_answers(folder, image, questions):
    """Answers of `generate` to the questions of one conversation, which contains the whole image every time."""
    model, processor = (c.from_pretrained(folder) for c in (FlashSlothForConditionalGeneration, FlashSlothProcessor))
    messages, answers = [], []
    for question in questions:
        content = [{"type": "text", "text": question}]
        messages.append(
            {"role": "user", "content": content if messages else [{"type": "image", "image": image}, *content]}
        )
        inputs = processor.encode_conversations(messages)
        ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS)[:, inputs["input_ids"].shape[1] :]
        answers.append(processor.post_process_image_text_to_text(ids)[0].strip())
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_every_line_of_standard_input_is_a_question_of_one_conversation(capsys, typed, checkpoint, image):
    typed("\n".join([QUESTIONS[0], "   ", QUESTIONS[1]]).encode())
    assert cli.main(["chat", str(image), "--model", str(checkpoint), "--max-new-tokens", str(NUM_TOKENS)]) == 0
    output, errors = capsys.readouterr()
    assert output.splitlines() == expected_answers(checkpoint, Image.open(image), QUESTIONS)
    assert errors == ""


def test_images_are_encoded_once(model, processor, images):
    encoded = []
    hook = model.model.vision_tower.register_forward_hook(lambda _, __, output: encoded.append(len(output[0])))
    try:
        chat = Chat(model, processor, images[:2], NUM_TOKENS)
        for question in QUESTIONS:
            chat.ask(question, None, threading.Event())
    finally:
        hook.remove()
    assert sum(encoded) == 2
    assert [question for question, _ in chat.turns] == QUESTIONS


def test_a_stopped_answer_is_a_part_of_the_conversation(model, processor, images):
    class StopAfter(TextStreamer):
        num_tokens = 0

        def put(self, value):
            self.num_tokens += 1
            if self.num_tokens == 1 + 3:  # the first is the prompt
                stop.set()

    stop = threading.Event()
    chat, whole = (Chat(model, processor, images[:1], 50) for _ in range(2))
    answer = chat.ask(QUESTIONS[0], StopAfter(processor.tokenizer), stop)
    assert 0 < len(answer) < len(whole.ask(QUESTIONS[0], None, threading.Event()))
    assert whole.turns[0][1].startswith(answer)
    assert chat.turns == [(QUESTIONS[0], answer)]


def test_a_question_without_an_answer_is_explained_and_not_kept(capsys, typed, checkpoint, image):
    typed(b"\n".join([b"why " * 500, b"\xff?", QUESTIONS[0].encode()]))
    assert cli.main(["chat", str(image), "--model", str(checkpoint), "--max-new-tokens", str(NUM_TOKENS)]) == 0
    output, errors = capsys.readouterr()
    assert output.splitlines()[1] == expected_answers(checkpoint, Image.open(image), ["\ufffd?", QUESTIONS[0]])[1]
    assert errors.startswith(
        "flashsloth: error: the question cannot be answered: This conversation is too long: it has"
    )
    assert errors.count("\n") == 1


def test_standard_input_cannot_be_an_image_as_well(capsys, checkpoint):
    assert cli.main(["chat", "-", "--model", str(checkpoint)]) == 2
    assert "standard input has the questions" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_interrupts_stop_the_answer_and_not_the_chat(endless, image):
    command = [PROGRAM, "chat", image, "--model", endless, "--max-new-tokens", ENDLESS, "--device", "cpu"]
    with Terminal(command) as terminal:
        terminal.wait_for(HELP)
        for question in QUESTIONS:
            terminal.wait_for("> ")
            terminal.type(f"{question}\n")
            terminal.wait_for(f"{question}\r\n")
            for _ in range(3):  # the answer streams
                terminal.wait_for("a ")
            terminal.type(Terminal.CTRL_C)
        terminal.wait_for("> ")
        terminal.type("half a ques")
        terminal.wait_for("half a ques")
        terminal.press_until(Terminal.CTRL_C, "> ")  # at the prompt, it drops the line
        terminal.type(Terminal.CTRL_D)
        assert terminal.wait_for_exit() == 0
    assert "Traceback" not in terminal.seen
    assert "flashsloth: error" not in terminal.seen


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_program_without_a_model_ends_before_the_prompt(image):
    with Terminal([PROGRAM, "chat", image, "--model", "someone/nothing"]) as terminal:
        assert terminal.wait_for_exit() == 2
    assert "no such model: someone/nothing" in terminal.seen
    assert HELP not in terminal.seen


@pytest.mark.slow
def test_people_with_the_package_alone_can_chat_with_the_shipped_checkpoint():
    questions = b"Read the sign.\nWhich colour is the star?\n"
    done = subprocess.run([PROGRAM, "chat", SCENE], input=questions, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    asked = ["Read the sign.", "Which colour is the star?"]
    assert done.stdout.decode().splitlines() == expected_answers(ROOT, Image.open(SCENE), asked)
    assert cli.SHIPPED_CHECKPOINT_NOTE in done.stderr.decode()
