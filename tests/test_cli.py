"""The command line: answers on standard output, one clear line on standard error, exit codes."""

import io
import json
import os
import platform
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from original_checkpoint import make_original, original_tensors, write_json
from PIL import Image
from processes import serve_folder
from safetensors.torch import load_file, save_file

import flashsloth
from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor, cli
from flashsloth.cli import convert
from flashsloth.cli.devices import choose_device

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
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("images") / "image.png"
    Image.radial_gradient("L").resize((40, 30)).convert("RGB").save(file)
    return file


@pytest.fixture
def run(capsys):
    """Runs a command line in this process; returns exit code, standard output and standard error."""

    def run_main(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run_main


@pytest.fixture
def refused(run):
    """Runs a command line that must fail with one line on standard error; returns the line."""

    def run_refused(*arguments):
        code, output, errors = run(*arguments)
        assert (code, output) == (2, "")
        assert errors.startswith("flashsloth: error: ")
        assert errors.count("\n") == 1
        assert errors.endswith("\n")
        return errors

    return run_refused


def expected_answer(folder, *images, **images_kwargs):
    model, processor = (c.from_pretrained(folder) for c in (FlashSlothForConditionalGeneration, FlashSlothProcessor))
    content = [{"type": "image", "image": Image.open(image)} for image in images]
    content.append({"type": "text", "text": QUESTION})
    inputs = processor.encode_conversations([{"role": "user", "content": content}], **images_kwargs)
    ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS)[:, inputs["input_ids"].shape[1] :]
    return processor.post_process_image_text_to_text(ids)[0]


def test_ask_prints_the_answer(run, checkpoint, image):
    code, output, errors = run("ask", image, QUESTION, "--model", checkpoint, "--max-new-tokens", NUM_TOKENS)
    assert (code, output.strip(), errors) == (0, expected_answer(checkpoint, image), "")
    assert output.endswith("\n")
    assert output == output.lstrip()


def test_ask_reads_five_tiles_with_hd(run, checkpoint, image):
    arguments = ["ask", image, QUESTION, "--model", checkpoint, "--max-new-tokens", NUM_TOKENS, "--hd"]
    code, output, _ = run(*arguments)
    answer = expected_answer(checkpoint, image, do_image_splitting=True)
    assert (code, output.strip()) == (0, answer)
    assert answer != expected_answer(checkpoint, image)


def test_ask_reads_several_images(run, refused, checkpoint, image, tmp_path):
    other = tmp_path / "other.png"
    Image.linear_gradient("L").convert("RGB").save(other)
    options = ["--model", checkpoint, "--max-new-tokens", NUM_TOKENS]
    code, output, _ = run("ask", image, other, QUESTION, *options)
    assert (code, output.strip()) == (0, expected_answer(checkpoint, image, other))
    assert output.strip() != expected_answer(checkpoint, image)
    assert "standard input has one image" in refused("ask", "-", image, "-", QUESTION, *options)


def test_ask_says_how_to_ask_about_a_folder(run, refused, checkpoint, image, tmp_path):
    """And the command that it names works."""
    line = refused("ask", image.parent, QUESTION, "--model", checkpoint)
    program, command, source, *options = shlex.split(line.split("`")[1])
    assert (program, command, source) == ("flashsloth", "caption", str(image.parent))
    arguments = [{"QUESTION": QUESTION, "DIR": str(tmp_path / "out")}.get(word, word) for word in options]
    assert run(command, source, *arguments, "--model", checkpoint, "--loaders", "0")[0] == 0
    assert (tmp_path / "out" / "answers.jsonl").exists()


def test_ask_uses_the_device_that_is_named(run, refused, checkpoint, image):
    arguments = ["ask", image, QUESTION, "--model", checkpoint, "--max-new-tokens", NUM_TOKENS, "--device"]
    assert run(*arguments, "cpu")[1].strip() == expected_answer(checkpoint, image)
    for name in ("cuda:99", "mps:1", "nothing", "meta"):
        assert f"there is no device {name!r}; PyTorch finds cpu" in refused(*arguments, name)


def test_an_accelerator_is_named_with_its_numbers(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert [choose_device(name) for name in ("cuda", "cuda:1", "cpu", None)] == [
        torch.device(name) for name in ("cuda", "cuda:1", "cpu", "cuda")
    ]
    with pytest.raises(ValueError, match="there is no device 'cuda:2'; PyTorch finds cpu, cuda:0, cuda:1 on this"):
        choose_device("cuda:2")


def test_version_shows_what_a_report_of_a_bug_needs(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        f"flashsloth {flashsloth.__version__}",
        f"transformers {transformers.__version__}",
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
    ]


def test_demo_without_gradio_says_how_to_install_it(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "flashsloth.cli.demo", raising=False)
    monkeypatch.delattr(cli, "demo", raising=False)
    assert refused("demo") == "flashsloth: error: the demo needs Gradio: pip install gradio\n"


def test_demo_reports_a_port_in_use_in_one_line(run, checkpoint):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, errors = run("demo", "--model", checkpoint, "--port", port)
    assert code == 2
    assert errors.splitlines()[-1].startswith("flashsloth: error: Cannot find empty port")
    assert str(port) in errors


def test_demo_reports_a_model_that_cannot_be_loaded(refused, tmp_path):
    pytest.importorskip("gradio")
    assert "has no config.json" in refused("demo", "--model", tmp_path)


def test_ask_opens_urls(run, refused, checkpoint, image):
    arguments = [QUESTION, "--model", checkpoint, "--max-new-tokens", NUM_TOKENS]
    with serve_folder(image.parent) as url:
        code, output, _ = run("ask", f"{url}/{image.name}", *arguments)
        assert (code, output.strip()) == (0, expected_answer(checkpoint, image))
        assert "404" in refused("ask", f"{url}/nothing.png", *arguments)
        assert "not an image" in refused("ask", url, *arguments)
    assert "cannot be read" in refused("ask", f"{url}/{image.name}", *arguments)


RELEASES = {  # fields that differ from those of a release's config; None: absent
    "as on the Hub": {},
    "of the authors' class": {"model_type": "flashsloth"},
    "without a model_type": {"model_type": None},
    "without an architecture": {"architectures": None},
    "without padding or sampling": {"resid_pdrop": None, "tokenizer_padding_side": None, "image_aspect_ratio": None},
    "in high definition": {"image_hd": True, "image_token_index": 50297},
}


@pytest.mark.parametrize("kind", RELEASES)
def test_ask_loads_an_original_release(run, tmp_path, image, kind):
    source = make_original(tmp_path / "original", **RELEASES[kind])
    config = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", {name: value for name, value in config.items() if value is not None})
    code, output, errors = run("ask", image, QUESTION, "--model", source, "--max-new-tokens", NUM_TOKENS)
    assert (code, errors) == (0, "")
    assert output.strip() == expected_answer(source, image)


def test_the_shipped_checkpoint_is_the_default(run, checkpoint, image, monkeypatch):
    monkeypatch.setattr(cli, "SHIPPED_CHECKPOINT", checkpoint)
    code, output, errors = run("ask", image, QUESTION, "--max-new-tokens", NUM_TOKENS)
    assert (code, output.strip()) == (0, expected_answer(checkpoint, image))
    assert errors == f"flashsloth: {cli.SHIPPED_CHECKPOINT_NOTE} Choose another with --model.\n"
    assert "\n" not in cli.SHIPPED_CHECKPOINT_NOTE


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("nothing.png", "no such file"),
        ("text.png", "not an image"),
        ("half.png", "cannot be read"),
        (".", "is a folder; to ask about every image in it, use `flashsloth caption"),
        ("http://127.0.0.1:x/", "cannot be read"),
    ],
)
def test_an_image_that_cannot_be_read_is_one_clear_line(refused, tmp_path, checkpoint, image, source, reason):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(image.read_bytes()[:300])
    source = source if "://" in source else tmp_path / source
    line = refused("ask", source, QUESTION, "--model", checkpoint)
    assert reason in line
    assert str(source) in line


def test_an_empty_question_is_answered(run, checkpoint, image):
    assert run("ask", image, "", "--model", checkpoint, "--max-new-tokens", NUM_TOKENS)[0] == 0


@pytest.fixture(scope="module")
def unloadable(tmp_path_factory, checkpoint):
    """A folder of models, each unloadable for a different reason."""
    folder = tmp_path_factory.mktemp("unloadable")
    other, partial, broken, empty = (folder / name for name in ("other", "partial", "broken", "empty"))
    for model in (other, partial, broken, empty):
        model.mkdir()
    write_json(other / "config.json", {"model_type": "phi"})
    for model in (partial, broken):
        for file in checkpoint.iterdir():
            if file.suffix != ".py":
                (model / file.name).write_bytes(file.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.query_tokens"]
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (broken / "model.safetensors").write_bytes(b"broken")
    return folder


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("nothing", "no such model"),
        ("someone/nothing", "no such model"),
        ("empty", "has no config.json"),
        ("other", "is not a FlashSloth"),
        ("partial", "model.query_tokens"),
        ("broken", "cannot be loaded"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_clear_line(refused, unloadable, image, model, reason):
    model = model if "/" in model else unloadable / model
    line = refused("ask", image, QUESTION, "--model", model)
    assert reason in line
    assert str(model) in line


BROKEN = {  # file, content, part of the message
    "config is a list": ("config.json", "[]", "must contain a JSON object, but contains a list"),
    "config is no JSON": ("config.json", "{", "is not a readable JSON file"),
    "text_config is a number": ("config.json", '{"model_type": "flashsloth", "text_config": 3}', "cannot be loaded"),
    "a field is text": (
        "config.json",
        '{"model_type": "flashsloth", "num_query_tokens": "4"}',
        "Validation error for field 'num_query_tokens': TypeError: Field 'num_query_tokens' expected int, got str",
    ),
    "a decoder is unknown": (
        "config.json",
        '{"model_type": "flashsloth", "text_config": {"model_type": "nothing"}}',
        "cannot be loaded",
    ),
    "another model": ("config.json", '{"model_type": "phi", "architectures": ["PhiForCausalLM"]}', "its model_type is"),
    "index without a map": ("model.safetensors.index.json", "{}", "must contain a `weight_map`"),
    "index names a file outside": (
        "model.safetensors.index.json",
        '{"weight_map": {"model.query_tokens": "../outside.safetensors"}}',
        "in its own folder, but names '../outside.safetensors'",
    ),
    "tokenizer is broken": ("tokenizer.json", "{}", "cannot be loaded"),
    "tokenizer is a list": ("tokenizer.json", "[]", "tokenizer.json must contain a JSON object, but contains a list"),
    "processor is a list": ("processor_config.json", "[]", "processor_config.json must contain a JSON object"),
    "processor's sizes are text": ("processor_config.json", '{"image_processor": {"size": "a"}}', "cannot be loaded"),
    "generation config is a list": (
        "generation_config.json",
        "[]",
        "generation_config.json must contain a JSON object",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("command", ["ask", "export", "onnx"])
def test_broken_checkpoints_are_one_clear_line(refused, tmp_path, checkpoint, image, command, kind):
    folder = shutil.copytree(checkpoint, tmp_path / "broken", ignore=shutil.ignore_patterns("*.py"))
    file, content, part = BROKEN[kind]
    (folder / file).write_text(content)
    arguments = {"ask": [image, QUESTION, "--model", folder], "export": [folder, tmp_path / "out"]}
    line = refused(command, *arguments.get(command, [folder, tmp_path / "out"]))
    assert str(folder) in line
    if command == "export":
        part = part.replace("cannot be loaded", "cannot be exported")
    assert part in line
    assert list(tmp_path.iterdir()) == [folder]


def test_convert_describes_its_output_and_shows_progress(run, tmp_path):
    code, output, errors = run("convert", make_original(tmp_path / "in", num_shards=2), tmp_path / "out")
    assert code == 0
    assert output.startswith(f"{tmp_path / 'out'}: 5,034,393 parameters in 199 tensors, float32, 20.1 MB in 1 shard\n")
    assert "Writing model shards: 100%" in errors


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


def test_a_terminated_conversion_leaves_no_files(tmp_path, monkeypatch):
    def terminated(self, folder, **kwargs):
        (folder / "model.safetensors").write_text("half")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(convert.FlashSlothForConditionalGeneration, "save_pretrained", terminated)
    handler, source = signal.getsignal(signal.SIGTERM), make_original(tmp_path / "in")
    with pytest.raises(SystemExit) as error:
        cli.main(["convert", str(source), str(tmp_path / "out")])
    assert error.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == [source]
    assert signal.getsignal(signal.SIGTERM) == handler


WRITES = f"""
import runpy, sys
from pathlib import Path

complete_or_absent = runpy.run_path({str(Path(cli.__file__).with_name("repository.py"))!r})["complete_or_absent"]
with complete_or_absent(Path(sys.argv[1]), 0) as folder:
    (folder / "model.safetensors").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writing():
    """Starts a process that stops halfway through writing an output; returns it and its hidden folder."""
    processes = []

    def start(output):
        command = [sys.executable, "-c", WRITES, str(output)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        folder = Path(process.stdout.readline().strip())
        assert (folder / "model.safetensors").is_file()
        return process, folder.parent

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_the_next_run_removes_what_a_killed_one_left_and_nothing_else(run, writing, tmp_path):
    source, output = make_original(tmp_path / "in"), tmp_path / "out"
    _, alive = writing(output)
    killed, abandoned = writing(output)
    killed.kill()
    killed.wait()
    _, other_output = writing(tmp_path / "out-2")
    own = tmp_path / ".out-backup"
    own.mkdir()
    assert abandoned.is_dir()  # as `kill -9` leaves it
    assert run("convert", source, output)[0] == 0
    assert set(tmp_path.iterdir()) == {source, output, alive, other_output, own}
    assert (alive / "out" / "model.safetensors").read_text() == "half"


def test_two_runs_that_write_one_folder_leave_one_of_them_whole(writing, tmp_path):
    output = tmp_path / "out"
    (first, _), (second, _) = writing(output), writing(output)
    assert (first.communicate()[0], first.returncode) == ("", 0)
    second.communicate()
    assert second.returncode != 0
    assert list(tmp_path.iterdir()) == [output]
    assert [file.name for file in output.iterdir()] == ["model.safetensors"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs `kill -9`")
def test_a_killed_onnx_export_is_cleared_by_the_next_one(run, checkpoint, tmp_path):
    pytest.importorskip("onnxscript")
    command = [PROGRAM, "onnx", str(checkpoint), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out-*/out")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert len(list(tmp_path.iterdir())) == 1
    code, output, errors = run("onnx", checkpoint, tmp_path / "out")
    assert (code, output.count("differs from the model")) == (0, 3)
    assert all(name in errors for name in ("vision.onnx", "decoder.onnx", "decoder_step.onnx", "comparing"))
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


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
    names = {"ask", "chat", "caption", "demo", "convert", "init", "export", "onnx"}
    assert names <= set(capsys.readouterr().out.split())


@pytest.mark.slow
def test_an_image_comes_from_standard_input(checkpoint, image):
    arguments = ["ask", "-", QUESTION, "--model", checkpoint, "--max-new-tokens", NUM_TOKENS]
    command = [PROGRAM, *map(str, arguments)]
    result = subprocess.run(command, input=image.read_bytes(), capture_output=True)
    assert (result.returncode, b"flashsloth" in result.stderr) == (0, False)  # torchao logs when it is imported
    assert result.stdout.decode().strip() == expected_answer(checkpoint, image)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_the_default_dtype_is_bfloat16_only_if_the_cpu_supports_it(monkeypatch, has_bfloat16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bfloat16}, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    shipped = str(cli.SHIPPED_CHECKPOINT)
    assert cli._load_model(shipped, "auto")[0].dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    assert cli._load_model(shipped, "bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.slow
def test_an_error_is_one_line_and_exit_code_2_of_the_process(checkpoint):
    command = [PROGRAM, "ask", "-", QUESTION, "--model", str(checkpoint)]
    result = subprocess.run(command, input=b"no image", capture_output=True)
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.decode().endswith(
        "flashsloth: error: standard input is not an image in a format that Pillow reads.\n"
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
