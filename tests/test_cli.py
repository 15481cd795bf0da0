"""The command line: answers on standard output, one clear line on standard error, exit codes."""

import functools
import http.server
import io
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from original_checkpoint import make_original, original_tensors, write_json
from PIL import Image
from safetensors.torch import load_file, save_file

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor, cli
from flashsloth.cli import convert

PROGRAM = str(Path(sys.executable).parent / "flashsloth")
QUESTION = "What is it?"
NUM_TOKENS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_model, processor):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.radial_gradient("L").resize((40, 30)).convert("RGB").save(file)
    return file


@pytest.fixture
def run(capsys):
    """Runs a command line in this process; gives exit code, standard output and standard error."""

    def run_main(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run_main


@pytest.fixture
def refused(run):
    """Runs a command line that must fail with one line on standard error; gives the line."""

    def run_refused(*arguments):
        code, output, errors = run(*arguments)
        assert (code, output) == (2, "")
        assert errors.startswith("flashsloth: error: ")
        assert errors.count("\n") == 1
        assert errors.endswith("\n")
        return errors

    return run_refused


def expected_answer(folder, picture, **images_kwargs):
    model, processor = (c.from_pretrained(folder) for c in (FlashSlothForConditionalGeneration, FlashSlothProcessor))
    content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=images_kwargs,
    )
    ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS)[:, inputs["input_ids"].shape[1] :]
    return processor.post_process_image_text_to_text(ids)[0]


def test_ask_prints_the_answer(run, checkpoint, picture):
    code, output, errors = run("ask", picture, QUESTION, "--model", checkpoint, "--max-new-tokens", NUM_TOKENS)
    assert (code, output.strip(), errors) == (0, expected_answer(checkpoint, picture), "")
    assert output.endswith("\n")
    assert output == output.lstrip()


def test_ask_reads_five_tiles_with_hd(run, checkpoint, picture):
    arguments = ["ask", picture, QUESTION, "--model", checkpoint, "--max-new-tokens", NUM_TOKENS, "--hd"]
    code, output, _ = run(*arguments)
    answer = expected_answer(checkpoint, picture, do_image_splitting=True)
    assert (code, output.strip()) == (0, answer)
    assert answer != expected_answer(checkpoint, picture)


def test_ask_opens_urls(run, refused, checkpoint, picture):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=picture.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        arguments = [QUESTION, "--model", checkpoint, "--max-new-tokens", NUM_TOKENS]
        code, output, _ = run("ask", f"{url}/{picture.name}", *arguments)
        assert (code, output.strip()) == (0, expected_answer(checkpoint, picture))
        assert "404" in refused("ask", f"{url}/nothing.png", *arguments)
        assert "not a picture" in refused("ask", url, *arguments)
    finally:
        server.shutdown()
        server.server_close()
    assert "cannot be read" in refused("ask", f"{url}/{picture.name}", *arguments)


def test_ask_loads_an_original_release(run, tmp_path, picture):
    source = make_original(tmp_path / "original")
    code, output, errors = run("ask", picture, QUESTION, "--model", source, "--max-new-tokens", NUM_TOKENS)
    assert (code, errors) == (0, "")
    assert output.strip() == expected_answer(source, picture)


def test_the_shipped_checkpoint_is_the_default(run, checkpoint, picture, monkeypatch):
    monkeypatch.setattr(cli, "SHIPPED_CHECKPOINT", checkpoint)
    code, output, _ = run("ask", picture, QUESTION, "--max-new-tokens", NUM_TOKENS)
    assert (code, output.strip()) == (0, expected_answer(checkpoint, picture))


def test_pictures_that_cannot_be_read_are_one_clear_line(refused, tmp_path, checkpoint, picture):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(picture.read_bytes()[:300])
    for image, reason in {
        tmp_path / "nothing.png": "no such file",
        tmp_path / "text.png": "not a picture",
        tmp_path / "half.png": "cannot be read",
        tmp_path: "cannot be read",
        "http://127.0.0.1:x/": "cannot be read",
    }.items():
        line = refused("ask", image, QUESTION, "--model", checkpoint)
        assert reason in line
        assert str(image) in line


def test_an_empty_question_is_answered(run, checkpoint, picture):
    assert run("ask", picture, "", "--model", checkpoint, "--max-new-tokens", NUM_TOKENS)[0] == 0


def test_models_that_cannot_be_loaded_are_one_clear_line(refused, tmp_path, checkpoint, picture):
    other, partial, broken, empty = (tmp_path / name for name in ("other", "partial", "broken", "empty"))
    for folder in (other, partial, broken, empty):
        folder.mkdir()
    write_json(other / "config.json", {"model_type": "phi"})
    for folder in (partial, broken):
        for file in checkpoint.iterdir():
            if file.suffix != ".py":
                (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.query_tokens"]
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (broken / "model.safetensors").write_bytes(b"broken")
    for model, reason in {
        tmp_path / "nothing": "no such model",
        "someone/nothing": "no such model",
        empty: "has no config.json",
        other: "is not a FlashSloth",
        partial: "model.query_tokens",
        broken: "cannot be loaded",
    }.items():
        line = refused("ask", picture, QUESTION, "--model", model)
        assert reason in line
        assert str(model) in line


def test_convert_says_what_it_wrote_and_shows_progress(run, tmp_path):
    code, output, errors = run("convert", make_original(tmp_path / "in", num_shards=2), tmp_path / "out")
    assert code == 0
    assert output.startswith(f"{tmp_path / 'out'}: 5,034,393 parameters in 199 tensors, float32, 20.1 MB in 2 shards")
    assert "100%" in errors


def test_convert_names_wrong_tensors_and_writes_nothing(run, tmp_path):
    tensors = original_tensors()
    del tensors["lm_head.bias"]
    source = make_original(tmp_path / "in", tensors | {"model.extra": torch.zeros(1)})
    code, output, errors = run("convert", source, tmp_path / "out")
    assert (code, output) == (2, "")
    assert errors.splitlines()[1:] == [
        "  missing: lm_head.bias, expected shape (50304,)",
        "  unexpected: model.extra, shape (1,)",
    ]
    assert list(tmp_path.iterdir()) == [source]


def test_convert_refuses_in_one_line(refused, tmp_path):
    source = make_original(tmp_path / "in")
    assert "no such folder" in refused("convert", tmp_path / "nothing", tmp_path / "out")
    assert "exists already" in refused("convert", source, source)
    assert "--vision-config" not in refused("convert", source, tmp_path / "out", "--vision-config", tmp_path / "no")
    blocked = tmp_path / "in" / "config.json" / "out"
    assert "config.json" in refused("convert", source, blocked)


def test_a_terminated_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    def terminated(*args):
        yield 1
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(convert, "write_safetensors", terminated)
    handler, source = signal.getsignal(signal.SIGTERM), make_original(tmp_path / "in")
    with pytest.raises(SystemExit) as error:
        cli.main(["convert", str(source), str(tmp_path / "out")])
    assert error.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == [source]
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize("arguments", [[], ["ask"], ["dance"], ["ask", "a", "b", "--max-new-tokens", "0"]])
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["--help"])
    assert error.value.code == 0
    assert {"ask", "convert", "init", "export", "onnx"} <= set(capsys.readouterr().out.split())


def test_a_picture_comes_from_standard_input(checkpoint, picture):
    arguments = ["ask", "-", QUESTION, "--model", checkpoint, "--max-new-tokens", NUM_TOKENS]
    command = [PROGRAM, *map(str, arguments)]
    result = subprocess.run(command, input=picture.read_bytes(), capture_output=True)
    assert (result.returncode, b"flashsloth" in result.stderr) == (0, False)  # torchao logs when it is imported
    assert result.stdout.decode().strip() == expected_answer(checkpoint, picture)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_the_type_of_the_weights_is_the_one_asked_for_or_the_one_that_the_cpu_multiplies(monkeypatch, has_bfloat16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bfloat16}, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    shipped = str(cli.SHIPPED_CHECKPOINT)
    assert cli._load_model(shipped, "auto")[0].dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    assert cli._load_model(shipped, "bfloat16")[0].dtype == torch.bfloat16


def test_an_error_is_one_line_and_exit_code_2_of_the_process(checkpoint):
    command = [PROGRAM, "ask", "-", QUESTION, "--model", str(checkpoint)]
    result = subprocess.run(command, input=b"no picture", capture_output=True)
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.decode().endswith(
        "flashsloth: error: standard input is not a picture, or of a format that Pillow does not know.\n"
    )


def test_the_answer_is_streamed(monkeypatch, tokenizer):
    class Recorder(io.StringIO):
        writes = []

        def write(self, text):
            self.writes.append(text)
            return super().write(text)

    recorder = Recorder()
    monkeypatch.setattr(sys, "stdout", recorder)
    streamer = cli._build_streamer(tokenizer)
    streamer.put(torch.tensor([tokenizer.encode("prompt")]))
    for token_id in tokenizer.encode(" A small red circle."):
        streamer.put(torch.tensor([token_id]))
    streamer.end()
    assert recorder.getvalue() == "A small red circle.\n"
    assert sum(1 for text in recorder.writes if text.strip()) >= 4
