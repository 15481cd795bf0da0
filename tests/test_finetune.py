"""`examples/finetune.py` follows the paper, and the usual tools train a FlashSloth."""

import copy
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from datasets import Dataset
from original_checkpoint import make_original
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from processes import run_alone, run_processes
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli import main as flashsloth
from flashsloth.training import FlashSlothDataCollator, load_rows
from flashsloth.training.collator import IGNORED
from flashsloth.training.lora import LORA_TARGET_MODULES, PAPER_MODULES
from flashsloth.training.recipe import FlashSlothTrainer, freeze_for_stage

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "finetune.py"
RECIPES = ROOT / "examples" / "recipes"
NEW_PARTS = {f"model.{name}" for name in ("spatial_attention_pooling", "multi_modal_projector")}
ALL_PARTS = NEW_PARTS | {
    "model.vision_tower",
    "model.language_model",
    "model.embedded_query",
    "model.query_tokens",
    "lm_head",
}
SMALL = {
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_num_workers": 0,
    "max_steps": 2,
    "global_batch_size": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "logging_steps": 1,
}
NEEDED = ["--model_name_or_path", "model", "--train_data", "rows.json", "--use_cpu"]
LOADS_ALONE = """
import sys

sys.modules["flashsloth"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
content = [{"type": "image", "path": sys.argv[2]}, {"type": "text", "text": "What?"}]
inputs = processor.encode_conversations([{"role": "user", "content": content}])
assert getattr(model.config, "use_cache", True) and model.config.text_config.use_cache
assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
"""


@pytest.fixture(scope="module")
def recipe():
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("flashsloth_recipe", SCRIPT)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base(make_model, processor, tmp_path_factory):
    """Folder of an untrained model."""
    folder = tmp_path_factory.mktemp("base")
    make_model("phi").save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(images, tmp_path_factory):
    """Folder with `captions.jsonl` and `conversations.jsonl`: two turns, one turn, text only, in turn."""
    folder = tmp_path_factory.mktemp("data")
    captions, conversations = [], []
    for i in range(12):
        image = f"{i}.png"
        images[i % 4].rotate(90 * (i // 4)).save(folder / image)
        captions.append({"image": image, "caption": "thing " * (1 + i % 3) + str(i)})
        turns = [("<image>\nWhat?" if i % 3 else "Hello", f"a {i}"), ("And now?", "more " * (i % 4) + "x")]
        row = {"conversations": []} | ({"image": image} if i % 3 else {})
        for question, answer in turns[: 1 + i % 2]:
            row["conversations"] += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        conversations.append(row)
    for name, rows in (("captions", captions), ("conversations", conversations)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def arguments(base, data):
    """Command line of a small run."""

    def build(name, output, *more_recipes, **changes):
        rows = "captions" if "stage1" in name else "conversations"
        options = {"model_name_or_path": base, "train_data": data / f"{rows}.jsonl", "output_dir": output}
        recipes = [str(RECIPES / f"{file}.yaml") for file in (name, *more_recipes)]
        return recipes + [
            text for key, value in (options | SMALL | changes).items() for text in (f"--{key}", str(value))
        ]

    return build


@pytest.fixture(scope="module")
def stage2(recipe, arguments, data, tmp_path_factory):
    """A finished run of stage 2, with evaluation."""
    folder = tmp_path_factory.mktemp("stage2")
    evaluation = {"eval_data": data / "conversations.jsonl", "eval_steps": 1, "num_eval_answers": 4}
    recipe.main(arguments("stage2", folder, **evaluation))
    return folder


def history(folder):
    """Logged values of every step, without timings."""
    states = folder.glob("checkpoint-*/trainer_state.json")
    last = max(states, key=lambda state: int(state.parent.name.partition("-")[2]))
    return [
        {name: value for name, value in entry.items() if not name.endswith(("runtime", "per_second"))}
        for entry in json.loads(last.read_text())["log_history"]
    ]


def changed_parts(before, after):
    weights = [FlashSlothForConditionalGeneration.from_pretrained(folder).state_dict() for folder in (before, after)]
    names = [name for name in weights[0] if not weights[0][name].equal(weights[1][name])]
    return {part for part in ALL_PARTS if any(name.startswith(part) for name in names)}


@pytest.mark.parametrize(
    ("name", "stage", "do_image_splitting", "learning_rate", "batch_size"),
    [
        ("stage1", 1, False, 1e-3, 256),
        ("stage1_hd", 1, True, 1e-3, 256),
        ("stage2", 2, False, 2e-5, 128),
        ("stage2_hd", 2, True, 2e-5, 128),
    ],
)
def test_the_recipes_are_the_papers(recipe, name, stage, do_image_splitting, learning_rate, batch_size):
    model_args, _, args = recipe.parse([str(RECIPES / f"{name}.yaml"), *NEEDED])
    assert (model_args.stage, model_args.do_image_splitting) == (stage, do_image_splitting)
    assert args.learning_rate == learning_rate
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == batch_size
    assert (args.num_train_epochs, args.lr_scheduler_type, args.warmup_steps) == (1, "cosine", 0.03)
    assert args.bf16
    assert args.gradient_checkpointing
    assert args.train_sampling_strategy == ("random" if stage == 1 else "group_by_length")
    assert args.report_to == ["tensorboard"]


def test_the_command_line_overrides_a_recipe(recipe, arguments, tmp_path):
    _, _, args = recipe.parse(arguments("stage2", tmp_path, learning_rate=1e-5))
    assert args.learning_rate == 1e-5


def test_a_later_recipe_changes_an_earlier_one(recipe):
    recipes = [str(RECIPES / f"{name}.yaml") for name in ("stage2", "lora")]
    model_args, _, args = recipe.parse([*recipes, *NEEDED])
    assert (model_args.lora_modules_to_save, args.learning_rate) == (list(PAPER_MODULES), 2e-4)


def test_an_impossible_global_batch_is_rejected(recipe, arguments, tmp_path):
    with pytest.raises(ValueError, match="global_batch_size=5 must be a multiple"):
        recipe.parse(arguments("stage2", tmp_path, global_batch_size=5))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"load_in_8bit": True}, "in 8 bits can be trained with adapters only"),
        ({"load_in_4bit": True}, "in 4 bits can be trained with adapters only"),
        ({"load_in_8bit": True, "load_in_4bit": True, "lora_rank": 4}, "remove --load_in_8bit or --load_in_4bit"),
        ({"stage": 1, "lora_rank": 4}, "does not train the language model"),
        ({"train_vision_tower": True, "lora_rank": 4}, "remove --train_vision_tower"),
        ({"streaming": True, "max_steps": -1}, "--streaming needs --max_steps"),
        ({"fp16": True, "bf16": False}, "fp16 needs a GPU"),
        ({"fp16": True, "bf16": False, "dtype": "bfloat16", "check_data": True}, "set it to float32"),
        ({"lerning_rate": 1}, "unknown argument --lerning_rate; did you mean --learning_rate?"),
        ({"learning_rate": "much"}, "invalid float value: 'much'; --help lists all arguments"),
    ],
)
def test_contradictory_arguments_are_rejected(recipe, arguments, tmp_path, changes, error):
    with pytest.raises(ValueError, match=error):
        recipe.parse(arguments("stage2", tmp_path, **changes))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_training_on_a_cpu_must_be_requested(recipe):
    with pytest.raises(recipe.UsageError, match=r"no GPU with bfloat16.* add `--use_cpu true`.*fp16\.yaml"):
        recipe.parse([str(RECIPES / "stage2.yaml"), *NEEDED[:-1]])


def test_the_recipe_for_gpus_without_bfloat16_scales_gradients_of_float32(recipe):
    files = [str(RECIPES / f"{name}.yaml") for name in ("stage2", "fp16")]
    model_args, _, args = recipe.parse([*files, *NEEDED, "--check_data"])  # the only use of fp16 on a CPU
    assert (args.fp16, args.bf16, model_args.dtype) == (True, False, "float32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_float16_trains_on_a_gpu(recipe, arguments, base, tmp_path):
    """The first steps are skipped until the loss scale is small enough."""
    recipe.main(arguments("stage2", tmp_path, "fp16", use_cpu=False, max_steps=20, report_to="none"))
    assert changed_parts(base, tmp_path) == ALL_PARTS - {"model.vision_tower"}
    weights = load_file(tmp_path / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_of_checkpointing_work_in_every_version(recipe, name):
    arguments = [*NEEDED, f"--{name}", "true", f"--{name}_kwargs", '{"use_reentrant": false}']
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        _, _, args = recipe.parse(arguments)
    assert args.gradient_checkpointing
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_more_workers_than_cpus_are_not_started(recipe, monkeypatch):
    cpus = len(os.sched_getaffinity(0))
    for processes, expected in ((1, cpus), (1000, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert recipe.parse([*NEEDED, "--dataloader_num_workers", "1000"])[2].dataloader_num_workers == expected


def run_script(*arguments, **environment):
    """Exit code and stderr of the script, without warnings of bitsandbytes and torchao at import."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    installation = "torchao|torch/utils/_pytree|kernels"
    said = [line for line in done.stderr.splitlines() if line and not re.search(installation, line)]
    return done.returncode, said


WRONG = {
    "no recipe": ({"recipe": "none.yaml"}, "there is no recipe none.yaml"),
    "a broken recipe": ({"recipe": "broken.yaml"}, "the recipe broken.yaml cannot be read: while parsing"),
    "a list": ({"recipe": "list.yaml"}, "expected lines `argument: value` in the recipe list.yaml, found a list"),
    "no model": ({"model_name_or_path": "no/model"}, "no such model: no/model (neither a folder nor a Hub id"),
    "another model": ({"model_name_or_path": "llama"}, "llama is not a FlashSloth"),
    "no data": ({"train_data": "none.json"}, "--train_data none.json cannot be read: There is no file"),
    "broken data": ({"train_data": "rows.parquet"}, "--train_data rows.parquet cannot be read: Parquet file"),
    "empty data": ({"train_data": "empty.jsonl"}, "--train_data empty.jsonl has no rows"),
    "no data for the evaluation": ({"eval_data": "none.json"}, "--eval_data none.json cannot be read: There is no"),
    "no folder of images": ({"image_folder": "nowhere"}, "there is no folder nowhere (--image_folder)"),
    "no output": ({"output_dir": ""}, "set --output_dir, the folder for checkpoints"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_that_a_user_can_fix_are_one_line_before_weights_are_loaded(
    recipe, arguments, tmp_path, monkeypatch, capsys, name
):
    changes, error = WRONG[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    for file, text in {"broken.yaml": "a: [1,", "list.yaml": "[1]", "rows.parquet": "?", "empty.jsonl": ""}.items():
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(recipe, "load_model", None)
    files = [changes["recipe"]] if "recipe" in changes else []
    changes = {key: value for key, value in changes.items() if key != "recipe"}
    monkeypatch.setattr(sys, "argv", ["finetune.py", *files, *arguments("stage2", tmp_path / "out", **changes)])
    assert recipe.command() == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"finetune.py: error: {error}") or error in said[-1]
    assert not any("Traceback" in line for line in said)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_bad_row_ends_the_run_with_one_line_also_from_a_worker(arguments, data, tmp_path):
    bad = tmp_path / "rows.jsonl"
    bad.write_text((data / "conversations.jsonl").read_text().replace("7.png", "none.png"))
    for workers in (0, 1):
        changes = {"train_data": bad, "image_folder": data, "dataloader_num_workers": workers, "max_steps": 6}
        code, said = run_script(*arguments("stage2", tmp_path / "out", report_to="none", **changes))
        assert code == 2
        assert re.match(r"finetune\.py: error: Row 7 cannot be used: there is no image .*--check_data lists", said[-1])
        assert not any("Traceback" in line for line in said)


@pytest.mark.slow
def test_a_run_and_its_repetition_log_only_the_result(base, data, arguments, make_model, processor):
    """With tied weights, gradient checkpointing and more workers than CPUs; 5.17's warning on tokens is allowed."""
    tied = base.parent / "tied"
    make_model("qwen3").save_pretrained(tied)
    processor.save_pretrained(tied)
    output = base.parent / "quiet"
    changes = {"model_name_or_path": tied, "dataloader_num_workers": 8, "max_steps": 4, "save_steps": 2}
    changes |= {"eval_data": data / "conversations.jsonl", "num_eval_answers": 2, "eval_steps": 2}
    # As transformers logs them; CI has no prefix, and checkpoints written within a second have no order by time.
    logged = r"(\[transformers\] )?(The tokenizer has new PAD/BOS/EOS|mtime may not be reliable)"
    usual = rf"Loading weights|Writing model shards|{logged}"
    found = []
    for _ in range(2):
        code, said = run_script(*arguments("stage2", output, **changes))
        assert code == 0, said
        found.append([line for line in said if not re.match(usual, line)])
        shutil.rmtree(output / "checkpoint-4", ignore_errors=True)
    end = f"The model is in {output}. To use it: flashsloth ask IMAGE QUESTION --model {output}"
    assert found == [[end], [end]]


def test_the_model_cannot_be_overwritten_by_its_own_training(recipe, arguments, base):
    with pytest.raises(ValueError, match="choose another --output_dir"):
        recipe.main(arguments("stage2", base))


def test_an_unknown_stage_is_rejected(model):
    with pytest.raises(ValueError, match="but is 3"):
        freeze_for_stage(model, 3)


def test_stage_1_trains_pooling_and_projector(recipe, arguments, base, tmp_path):
    recipe.main(arguments("stage1", tmp_path))
    assert changed_parts(base, tmp_path) == NEW_PARTS


@pytest.mark.slow
def test_stage_2_trains_all_but_the_tower(base, stage2):
    assert changed_parts(base, stage2) == ALL_PARTS - {"model.vision_tower"}


@pytest.mark.slow
def test_stage_2_in_high_definition_trains_all(recipe, arguments, base, tmp_path):
    recipe.main(arguments("stage2_hd", tmp_path))
    assert changed_parts(base, tmp_path) == ALL_PARTS
    assert FlashSlothProcessor.from_pretrained(tmp_path).image_processor.do_image_splitting


@pytest.mark.slow
def test_the_tower_can_stay_frozen_in_high_definition(recipe, arguments, base, tmp_path):
    """As in the authors' code."""
    recipe.main(arguments("stage2_hd", tmp_path, train_vision_tower=False))
    assert changed_parts(base, tmp_path) == ALL_PARTS - {"model.vision_tower"}


@pytest.mark.slow
def test_an_original_release_can_be_trained(recipe, arguments, tmp_path):
    make_original(tmp_path / "original")
    changes = {"model_name_or_path": tmp_path / "original", "report_to": "none"}
    recipe.main(arguments("stage2", tmp_path / "trained", **changes))
    trained = FlashSlothForConditionalGeneration.from_pretrained(tmp_path / "trained")
    original = FlashSlothForConditionalGeneration.from_pretrained(tmp_path / "original")
    queries = [model.model.query_tokens for model in (original, trained)]
    assert 0 < (queries[1] - queries[0]).abs().max() < 0.1  # two steps with a learning rate of 0.01


@pytest.mark.slow
def test_a_finished_folder_loads_without_the_package(stage2, data, tmp_path):
    run_alone("-c", LOADS_ALONE, stage2, data / "0.png", folder=tmp_path)
    card = (stage2 / "README.md").read_text()
    assert "stage 2" in card
    assert "pipeline_tag: image-text-to-text" in card


@pytest.mark.slow
def test_training_is_evaluated_and_logged(stage2):
    evaluated = [entry for entry in history(stage2) if "eval_loss" in entry]
    answered = [entry["eval_exact_match"] for entry in history(stage2) if "eval_exact_match" in entry]
    assert [entry["step"] for entry in evaluated] == [1, 2]
    assert len(answered) == 2
    assert list(stage2.glob("runs/*/events.out.tfevents.*"))


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(recipe, arguments, tmp_path):
    """Losses, gradients and weights are bitwise the same; the run is killed in its second epoch or later."""
    many = {"max_steps": 16, "save_steps": 4, "eval_strategy": "no", "report_to": "none"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    script = [sys.executable, str(SCRIPT), *arguments("stage2", killed, **many)]
    # With as many threads as this process has: a sum by two threads has other rounding than one by one.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    running = subprocess.Popen(script, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and not (killed / "checkpoint-4" / "trainer_state.json").exists():
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (killed / "model.safetensors").exists()

    recipe.main(arguments("stage2", killed, **many))
    recipe.main(arguments("stage2", whole, **many))
    assert [entry["step"] for entry in history(whole)] == [*range(1, 17)]
    assert history(killed) == history(whole)
    weights = [load_file(folder / "model.safetensors") for folder in (killed, whole)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_a_stream_resumes_exactly(recipe, arguments, tmp_path):
    """In its second pass over the rows; a pass has three steps."""
    command = arguments("stage2", tmp_path, streaming=True, max_steps=6, save_steps=4, report_to="none")
    recipe.main(command)
    found = history(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-6")
    recipe.main(command)
    assert [entry["step"] for entry in found] == [*range(1, 7)]
    assert history(tmp_path) == found


LENGTHS = {
    "steps in the middle of an epoch": {"max_steps": 4},
    "one epoch and a half": {"max_steps": -1, "num_train_epochs": 1.5},
    "whole epochs": {"max_steps": -1, "num_train_epochs": 1},
    "a stream": {"max_steps": 4, "streaming": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LENGTHS)
def test_a_finished_run_is_not_trained_further(recipe, arguments, tmp_path, caplog, name):
    """It is only saved again: it may have been killed after its last checkpoint."""
    command = arguments("stage2", tmp_path, report_to="none", **LENGTHS[name])
    recipe.main(command)
    found, weights = history(tmp_path), load_file(tmp_path / "model.safetensors")
    steps = {folder.name for folder in tmp_path.glob("checkpoint-*")}
    (tmp_path / "model.safetensors").unlink()
    caplog.clear()
    recipe.main(command)
    assert re.search(r"Step (\d) of \1 has already been reached, so nothing is trained", caplog.text)
    assert {folder.name for folder in tmp_path.glob("checkpoint-*")} == steps
    assert history(tmp_path) == found
    again = load_file(tmp_path / "model.safetensors")
    assert all(again[name].equal(weights[name]) for name in weights)


@pytest.mark.slow
def test_a_finished_run_continues_with_more_steps(recipe, arguments, tmp_path):
    for max_steps in (2, 3):
        recipe.main(arguments("stage2", tmp_path, report_to="none", max_steps=max_steps))
        assert history(tmp_path)[-1]["step"] == max_steps


@pytest.mark.slow
def test_data_are_checked_without_training(recipe, arguments, data, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(recipe, "load_model", None)  # no weights are needed
    lines = (data / "conversations.jsonl").read_text().splitlines()
    lines[4] = "no JSON"
    lines[7] = lines[7].replace("7.png", "none.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    command = arguments("stage2", out, train_data=tmp_path / "rows.jsonl", image_folder=data, check_data=True)
    command += ["--eval_data", str(data / "conversations.jsonl"), "--max_length", "400"]
    for more in ([], ["--dataloader_num_workers", "2"], ["--streaming", "--max_steps", "-1"]):
        assert recipe.main([*command, *more]) == 1
        written = capfd.readouterr().out
        checked, evaluated = written.split(f"{data / 'conversations.jsonl'} (eval_data)")
        assert "rows.jsonl (train_data): 12 rows, 2 bad, 0 cut to 400 tokens\n" in checked
        assert "bad row 4: the line is not JSON" in checked
        assert "bad row 7: there is no image" in checked
        assert ": 12 rows, 0 bad" in evaluated
        lengths = [
            tuple(map(int, found)) for found in re.findall(r"long row (\d+): (\d+) tokens, [01] images?\n", checked)
        ]
        assert len(lengths) == 5
        assert lengths == sorted(lengths, key=lambda one: -one[1])
    assert not out.exists()
    whole = FlashSlothDataCollator(
        FlashSlothProcessor.from_pretrained(command[command.index("--model_name_or_path") + 1])
    )
    longest = [len(whole.prepare(row).input_ids) for row in load_rows(data / "conversations.jsonl")]
    assert lengths[0][1] == max(length for row, length in enumerate(longest) if row not in (4, 7))


def test_a_check_reports_rows_that_are_cut_or_too_long_for_the_model(recipe, arguments, tmp_path, capfd):
    turns = [{"role": role, "content": "word " * 60} for role in ("user", "assistant")] * 2
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    command = arguments("stage2", tmp_path, train_data=tmp_path / "rows.jsonl", check_data=True)
    assert recipe.main(command) == 0
    assert "the model has 512 positions; cut longer rows with --max_length 512" in capfd.readouterr().out
    assert recipe.main([*command, "--max_length", "900"]) == 0
    written = capfd.readouterr().out
    assert "1 cut to 900 tokens" in written
    assert "the model has 512 positions" in written
    assert recipe.main([*command, "--max_length", "512"]) == 0
    assert "positions" not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="5.17 cannot resume it on CPUs")
def test_two_processes_resume_exactly(arguments, tmp_path):
    """The run resumes in the second epoch, whose rows are in a different order."""
    command = arguments("stage2", tmp_path, max_steps=6, save_steps=4, report_to="none")
    found = []
    for _ in range(2):
        run_processes(SCRIPT, *command)
        found.append(history(tmp_path))
        shutil.rmtree(tmp_path / "checkpoint-6")
    assert [entry["step"] for entry in found[0]] == [*range(1, 7)]
    assert found[0] == found[1]


@pytest.mark.slow
def test_an_incomplete_checkpoint_is_skipped(recipe, tmp_path):
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_st'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert recipe.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert recipe.last_checkpoint(tmp_path / "checkpoint-2") is None


def train(model, processor, rows, folder, **changes):
    """Train with `FlashSlothTrainer` and plain settings."""
    arguments = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1}
    fixed = {"use_cpu": True, "remove_unused_columns": False, "report_to": [], "save_strategy": "no"}
    args = TrainingArguments(str(folder), **fixed, disable_tqdm=True, **(arguments | changes))
    collator = FlashSlothDataCollator(processor)
    trainer = FlashSlothTrainer(model, args, train_dataset=rows, data_collator=collator, processing_class=processor)
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def rows(data):
    return load_rows(data / "conversations.jsonl")


@pytest.mark.slow
def test_accumulated_batches_equal_one_big_batch(make_model, processor, rows, tmp_path):
    """Answers differ in length, so a mean of means would be a different loss."""
    trained = []
    for size in (1, 4):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "optim": "sgd"}
        trained.append(train(make_model(pooling_dropout=0.0), processor, rows, tmp_path, **changes, learning_rate=0.1))
    assert losses(trained[0]) == pytest.approx(losses(trained[1]), abs=1e-5)
    weights = [trainer.model.state_dict() for trainer in trained]
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=0)
    untrained = make_model(pooling_dropout=0.0).state_dict()
    assert any((weights[0][name] - untrained[name]).abs().max() > 1e-3 for name in untrained)


@pytest.mark.slow
def test_checkpointing_and_half_precision_train_alike(make_model, processor, rows, tmp_path):
    plain = losses(train(make_model(), processor, rows, tmp_path))
    checkpointed = losses(train(make_model(), processor, rows, tmp_path, gradient_checkpointing=True))
    assert checkpointed == pytest.approx(plain, abs=1e-6)
    half = train(make_model(), processor, rows, tmp_path, bf16=True)
    assert losses(half) == pytest.approx(plain, rel=0.007)  # measured: 0.0023
    assert losses(half) != plain
    assert half.model.dtype == torch.float32


def test_reentrant_checkpointing_is_rejected_by_the_recipe(recipe, arguments, tmp_path):
    reentrant = {"gradient_checkpointing_kwargs": json.dumps({"use_reentrant": True})}
    with pytest.raises(ValueError, match="use_reentrant=False"):
        recipe.main(arguments("stage2", tmp_path, **reentrant))


def test_batches_are_of_one_kind(make_model, processor, rows, tmp_path):
    sizes = {"per_device_train_batch_size": 2, "train_sampling_strategy": "group_by_length"}
    trainer = train(make_model(), processor, rows, tmp_path, max_steps=1, **sizes)
    kinds = [
        {any(part["type"] == "image" for part in rows[index]["messages"][0]["content"]) for index in batch}
        for batch in torch.tensor(list(trainer._get_train_sampler())).view(-1, 2).tolist()
    ]
    assert sorted(map(str, kinds)) == ["{False}"] * 2 + ["{True}"] * 4


def test_the_trainer_keeps_the_columns_of_rows_and_does_not_dispatch_batches(make_model, processor, rows, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    collator = FlashSlothDataCollator(processor)
    trainer = FlashSlothTrainer(make_model(), args, collator, rows, processing_class=processor)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape[1:] == (3, 32, 32)
    assert not trainer.args.remove_unused_columns
    assert not trainer.accelerator.dispatch_batches
    with pytest.raises(ValueError, match="`dispatch_batches` must be False"):
        train(make_model(), processor, rows, tmp_path, accelerator_config={"dispatch_batches": True})


FORMS = {
    "rows": load_rows,
    "a stream": lambda file: load_rows(file, streaming=True),
    "a list": lambda file: [load_rows(file)[index] for index in range(12)],
    "a data set": lambda file: Dataset.from_list([{"caption": "a", "image": str(file.parent / "0.png")}] * 12),
    "a data set with labels": lambda file: Dataset.from_list([{"caption": "a", "image": "0.png", "labels": 1}] * 12),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_a_plain_trainer_that_removes_columns_names_the_flag(
    make_model, processor, data, tmp_path, caplog, form, on_bad_row
):
    """`on_bad_row="skip"` must not turn this into a training without data."""
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    collator = FlashSlothDataCollator(processor, on_bad_row=on_bad_row)
    dataset = FORMS[form](data / "conversations.jsonl")
    trainer = Trainer(make_model(), args, train_dataset=dataset, data_collator=collator, processing_class=processor)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer.train()


@pytest.mark.parametrize("enable", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
def test_gradient_checkpointing_is_enabled_and_disabled_without_a_warning(make_model, processor, rows, caplog, enable):
    model = make_model().train()
    if not hasattr(model, enable):
        pytest.skip("transformers has no such name")
    batch = FlashSlothDataCollator(processor)([rows[0], rows[1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(model, enable)()
        assert model.is_gradient_checkpointing
        output = model(**batch)
        output.loss.backward()
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing
    assert not {"cache", "past_key_values"} & output.keys()  # nobody would read it
    assert not caplog.records


def test_a_tied_weight_may_be_missing_in_a_state_dict(make_model, tmp_path):
    model = make_model("qwen3")
    model.save_pretrained(tmp_path)
    saved = {name: 2 * tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert "lm_head.weight" not in saved
    result = model.load_state_dict(saved)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.equal(saved["model.language_model.embed_tokens.weight"])
    del saved["model.language_model.embed_tokens.weight"]
    assert model.load_state_dict(saved, strict=False).missing_keys == [
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
    ]


@pytest.mark.slow
def test_exact_answers_are_counted(make_model, processor, rows, data, tmp_path):
    asked = [rows[index] for index in (0, 1, 2)]
    trainer = train(make_model(), processor, asked, tmp_path, max_steps=40, per_device_train_batch_size=3)
    trainer.num_eval_answers = 3
    other = copy.deepcopy(asked)
    other[2]["messages"][-1]["content"] = [{"type": "text", "text": "something else"}]
    assert trainer.evaluate(asked)["eval_exact_match"] == 1
    assert trainer.evaluate(other)["eval_exact_match"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="rows with `messages` that end with an answer"):
        trainer.evaluate(load_rows(data / "captions.jsonl"))


def test_the_target_pattern_names_the_decoders_linear_layers_only(any_model):
    linear = {name for name, module in any_model.named_modules() if isinstance(module, nn.Linear)}
    matched = {name for name, _ in any_model.named_modules() if re.fullmatch(LORA_TARGET_MODULES, name)}
    assert matched == {name for name in linear if name.startswith("model.language_model.layers.")}
    assert any(name.endswith("q_proj") for name in linear - matched)


def lora_config(**changes):
    return LoraConfig(r=4, target_modules=LORA_TARGET_MODULES, modules_to_save=list(PAPER_MODULES), **changes)


def logits(model, ask, conversations):
    with torch.no_grad():
        return model.eval()(**ask(*conversations)).logits


@pytest.mark.slow
def test_adapters_are_trained_saved_reloaded_and_merged(any_model, processor, rows, ask, conversations, tmp_path):
    before = logits(any_model, ask, conversations)
    adapted = get_peft_model(copy.deepcopy(any_model), lora_config())
    train(adapted, processor, rows, tmp_path)
    after = logits(adapted, ask, conversations)
    assert (after - before).abs().max() > 0.1
    adapted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(any_model), tmp_path)
    torch.testing.assert_close(logits(reloaded, ask, conversations), after, atol=0, rtol=0)
    torch.testing.assert_close(logits(reloaded.merge_and_unload(), ask, conversations), after, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_recipe_for_adapters_saves_them_and_the_merged_model(recipe, arguments, base, ask, conversations, tmp_path):
    recipe.main(arguments("stage2", tmp_path, "lora"))
    merged = FlashSlothForConditionalGeneration.from_pretrained(tmp_path)
    original = FlashSlothForConditionalGeneration.from_pretrained(base)
    adapted = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "adapter")
    found = logits(merged, ask, conversations)
    torch.testing.assert_close(found, logits(adapted, ask, conversations), atol=1e-4, rtol=0)
    assert (found - logits(original, ask, conversations)).abs().max() > 0.1


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


@pytest.fixture(params=[8, 4])
def load_in_few_bits(request, recipe, base, bitsandbytes):
    """Load the model in 8 or in 4 bits, as the recipe does."""
    option = f"load_in_{request.param}bit"

    def load(source=base):
        model_args, _, args = recipe.parse([*NEEDED, f"--{option}", "--lora_rank", "4", "--bf16"])
        quantization = recipe.quantization(model_args, args)
        return FlashSlothForConditionalGeneration.from_pretrained(source, quantization_config=quantization)

    load.option = option
    load.layer = bitsandbytes.nn.Linear8bitLt if request.param == 8 else bitsandbytes.nn.Linear4bit
    return load


def test_only_the_language_model_is_quantized(load_in_few_bits):
    model = load_in_few_bits()
    quantised = {name for name, module in model.named_modules() if isinstance(module, load_in_few_bits.layer)}
    assert quantised == {name for name, _ in model.named_modules() if re.fullmatch(LORA_TARGET_MODULES, name)}
    kept = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    assert kept == {name for name, _ in model.named_parameters()} - {f"{name}.weight" for name in quantised}


@pytest.mark.slow
def test_an_evaluation_does_not_change_gradients(recipe, base, processor, rows, load_in_few_bits, tmp_path):
    """On some CPUs, bitsandbytes blocks gradients of a 4-bit layer after generation."""
    model_args, _, args = recipe.parse([*NEEDED, f"--{load_in_few_bits.option}", "--lora_rank", "4"])
    model_args.model_name_or_path, args.output_dir = str(ROOT), str(tmp_path)
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    model = recipe.load_model(model_args, args, do_image_splitting=False)
    collator = FlashSlothDataCollator(processor)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = FlashSlothTrainer(model, args, collator, eval_dataset=[rows[1]], processing_class=processor)

    def gradients():
        model.zero_grad()
        model.train()(**collator([rows[1]])).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    torch.manual_seed(0)
    before = gradients()
    trainer.evaluate()
    torch.manual_seed(0)
    after = gradients()
    assert any(gradient.abs().max() > 0 for gradient in before.values())
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())


def batch_logits(model, processor, rows):
    with torch.no_grad():
        return model.eval()(**FlashSlothDataCollator(processor)(rows)).logits.float()


@pytest.mark.slow
def test_adapters_train_on_a_quantized_language_model(recipe, arguments, data, load_in_few_bits, tmp_path, caplog):
    """With evaluation between the steps; on the shipped model, whose widths all kernels support."""
    lora = "qlora" if load_in_few_bits.option == "load_in_4bit" else "lora"
    changes = {"eval_data": data / "conversations.jsonl", "eval_steps": 1, "num_eval_answers": 2, "save_steps": 2}
    changes |= {load_in_few_bits.option: True, "model_name_or_path": ROOT, "max_steps": 4, "report_to": "none"}
    command = arguments("stage2", tmp_path, lora, **changes)
    recipe.main(command)
    assert not (tmp_path / "model.safetensors").exists()
    assert f"flashsloth export {tmp_path / 'adapter'}" in caplog.text
    assert "MatMul8bitLt" not in caplog.text
    found = [entry["loss"] for entry in history(tmp_path) if "loss" in entry]
    assert found[-1] < found[0]

    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-4")
    recipe.main(command)  # resumes at step 2
    again = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert [entry["loss"] for entry in history(tmp_path) if "loss" in entry] == pytest.approx(found, rel=0.02)
    assert trained.keys() == again.keys()

    processor, rows = FlashSlothProcessor.from_pretrained(ROOT), list(load_rows(data / "conversations.jsonl"))[:4]
    quantised = load_in_few_bits(ROOT)
    before = batch_logits(quantised, processor, rows)
    reloaded = batch_logits(PeftModel.from_pretrained(quantised, tmp_path / "adapter"), processor, rows)
    assert (reloaded - before).abs().max() > 0.1
    assert flashsloth(["export", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = FlashSlothForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    whole = FlashSlothForConditionalGeneration.from_pretrained(ROOT, dtype=torch.float32)
    exact = batch_logits(PeftModel.from_pretrained(whole, tmp_path / "adapter"), processor, rows)
    assert (batch_logits(merged, processor, rows) - exact).abs().max() < 0.1 * (exact - before).abs().max()


def chat_rows(data, *, as_prompts):
    """Rows for TRL: images are in a separate column."""
    found = []
    for row in load_rows(data / "conversations.jsonl"):
        images = [part["image"] for m in row["messages"] for part in m["content"] if part["type"] == "image"]
        messages = [{"role": m["role"], "content": m["content"][-1]["text"]} for m in row["messages"]]
        split = {"prompt": messages[:-1], "completion": messages[-1:]} if as_prompts else {"messages": messages}
        found.append(split | {"images": [Image.open(image) for image in images]})
    return Dataset.from_list(found)


def sft_trainer(model, processor, dataset, folder, **changes):
    fixed = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    small = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.01, "logging_steps": 1}
    collator = changes.pop("data_collator", None)
    args = SFTConfig(str(folder), max_length=None, **fixed, **small, **changes)
    return SFTTrainer(model, args, train_dataset=dataset, processing_class=processor, data_collator=collator)


def answers_learned(batch, tokenizer):
    return [tokenizer.decode(labels[labels != IGNORED]) for labels in batch["labels"]]


def check_training(trainer):
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.slow
@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="TRL wants transformers 5.18 for it")
def test_trl_learns_the_answers_of_every_turn(make_model, processor, rows, data, tmp_path):
    dataset = chat_rows(data, as_prompts=False)
    trainer = sft_trainer(make_model(), processor, dataset, tmp_path, assistant_only_loss=True)
    ours = FlashSlothDataCollator(processor)([rows[i] for i in range(len(rows))])
    theirs = trainer.data_collator([dataset[i] for i in range(len(rows))])
    assert answers_learned(theirs, processor.tokenizer) == answers_learned(ours, processor.tokenizer)
    assert theirs["pixel_values"].equal(ours["pixel_values"])
    check_training(trainer)


@pytest.mark.slow
def test_trl_learns_completions(make_model, processor, data, tmp_path):
    dataset = chat_rows(data, as_prompts=True)
    trainer = sft_trainer(make_model(), processor, dataset, tmp_path)
    learned = answers_learned(trainer.data_collator([dataset[i] for i in range(4)]), processor.tokenizer)
    assert learned == [f" {row['completion'][0]['content']}</s>" for row in dataset.select(range(4))]
    check_training(trainer)


@pytest.mark.slow
def test_trl_takes_our_collator(make_model, processor, data, tmp_path):
    """It also learns the answers of every turn with transformers 5.17."""
    options = {"data_collator": FlashSlothDataCollator(processor), "dataset_kwargs": {"skip_prepare_dataset": True}}
    dataset = chat_rows(data, as_prompts=False)
    check_training(sft_trainer(make_model(), processor, dataset, tmp_path, remove_unused_columns=False, **options))


def test_the_zero_3_file_leaves_sizes_to_the_recipe(model):
    config = HfDeepSpeedConfig(RECIPES / "zero3.json")
    assert config.is_zero3()
    assert not config.is_offload()
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16.enabled"):
        assert config.get_value(name) == "auto"


def test_the_fsdp_2_file_wraps_the_modules_that_the_model_names(any_model):
    launched = load_config_from_file(str(RECIPES / "fsdp2.yaml"))
    assert (launched.distributed_type, launched.mixed_precision) == ("FSDP", "bf16")
    options = {name.removeprefix("fsdp_"): value for name, value in launched.fsdp_config.items()}
    options["fsdp_version"] = options.pop("version")
    options["cpu_offload"] = options.pop("offload_params")
    plugin = FullyShardedDataParallelPlugin(**options)
    plugin.set_auto_wrap_policy(any_model)
    assert plugin.fsdp_version == 2
    divided = {name for name, module in any_model.named_modules() if plugin.auto_wrap_policy(module, False, 0)}
    assert divided >= {"model.spatial_attention_pooling", "model.embedded_query"}
    assert divided >= {f"model.language_model.layers.{i}" for i in range(4)}
    assert divided >= {f"model.vision_tower.encoder.layers.{i}" for i in range(2)}
