"""Two processes train like one, even if one of them has no image, and save models that load without the package."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run_alone, run_processes
from sharded_training import LEARNING_RATE, MOMENTUM, NUM_STEPS

from flashsloth import FlashSlothForConditionalGeneration

TESTS = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, make_model, ask, images):
    """A model, and batches for every step and process: both, one or none of the processes have images."""
    folder = tmp_path_factory.mktemp("two_processes")
    make_model("llama", pooling_dropout=0.0).save_pretrained(folder / "model")
    seeing = ask([(images[:1], "What is it?")], [(images[1:3], "Which?")])
    reading = ask([([], "Hello there, who are you?")], [([], "Why?")])
    for step, batches in enumerate([(seeing, reading), (reading, seeing), (reading, reading), (seeing, seeing)]):
        for rank, batch in enumerate(batches):
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            torch.save({**batch, "labels": labels}, folder / f"batch_{step}_{rank}.pt")
    return folder


@pytest.fixture(scope="module")
def trained_alone(prepared):
    """A model trained with the same steps in one process, and the losses of the first process's batches."""
    model = FlashSlothForConditionalGeneration.from_pretrained(prepared / "model").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    losses = []
    for step in range(NUM_STEPS):
        parts = [model(**torch.load(prepared / f"batch_{step}_{rank}.pt")).loss for rank in range(2)]
        (sum(parts) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parts[0].item())
    return model, losses


def test_sharded_training_equals_that_of_one_process(prepared, trained_alone):
    model, losses = trained_alone
    run_processes(TESTS / "sharded_training.py", prepared)
    found = json.loads((prepared / "losses.json").read_text())
    assert found["straight"] == pytest.approx(losses, abs=1e-5)
    assert found["resumed"] == found["straight"][NUM_STEPS // 2 :]
    sharded = FlashSlothForConditionalGeneration.from_pretrained(prepared / "trained")
    for (name, expected), parameter in zip(model.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_model_saved_by_sharded_training_loads_without_the_package(prepared, tmp_path):
    """It has its class name and code, although `fully_shard` changes the class of the model."""
    config = json.loads((prepared / "trained" / "config.json").read_text())
    assert config["architectures"] == ["FlashSlothForConditionalGeneration"]
    code, expected = ({path.name for path in (prepared / name).glob("*.py")} for name in ("trained", "model"))
    assert code == expected
    script = (
        "import sys; sys.modules['flashsloth'] = None; from transformers import AutoModelForImageTextToText as Auto;"
        "model, report = Auto.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True);"
        "assert type(model).__name__ == 'FlashSlothForConditionalGeneration', type(model);"
        "assert not report['missing_keys'] and not report['unexpected_keys'], report"
    )
    run_alone("-c", script, prepared / "trained", folder=tmp_path)


def test_the_plain_loop_trains_like_one_process_and_resumes(prepared, processor, images, tmp_path):
    processor.save_pretrained(prepared / "model")
    rows = []
    for number, (image, answer) in enumerate(zip(images[:3], ("red", "a green one", "blue it is"), strict=True)):
        image.convert("RGB").save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": answer})
    rows.append(
        {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello to you."}]}
    )
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))

    def losses(name, number, *args):
        arguments = (prepared / "model", data, tmp_path / name, "--num_steps", 4, "--save_steps", 2, *args)
        said = run_processes(TESTS.parent / "examples" / "fsdp2.py", *arguments, "--learning_rate", 1e-3, number=number)
        return [float(loss) for loss in re.findall(r"step \d: loss (.*)", said)]

    expected = losses("one", 1, "--batch_size", 4)
    assert len(expected) == 4
    assert expected[-1] < expected[0]
    found = losses("two", 2, "--batch_size", 2)
    assert found == pytest.approx(expected, abs=1e-4)
    shutil.copytree(tmp_path / "two" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert losses("resumed", 2, "--batch_size", 2) == found[2:]
    straight, resumed = (
        FlashSlothForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("two", "resumed")
    )
    assert all(torch.equal(straight[name], tensor) for name, tensor in resumed.items())


@pytest.mark.parametrize("how", [[], ["stream"], ["plain-stream"]], ids=["rows", "stream", "plain stream"])
def test_data_parallel_training_equals_one_process_with_the_whole_batch(prepared, processor, tmp_path, how):
    processor.save_pretrained(prepared / "model")
    script = TESTS / "parallel_training.py"
    run_processes(script, prepared / "model", tmp_path / "two", *how)
    subprocess.run([sys.executable, str(script), str(prepared / "model"), str(tmp_path / "one"), *how], check=True)
    one, two = (FlashSlothForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("one", "two"))
    before = FlashSlothForConditionalGeneration.from_pretrained(prepared / "model")
    assert not torch.equal(one.model.query_tokens, before.model.query_tokens)
    for (name, expected), parameter in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_metrics_are_gathered_from_processes_with_different_numbers_of_images(prepared, processor, tmp_path):
    processor.save_pretrained(prepared / "model")
    for number in (1, 2):
        run_processes(TESTS / "parallel_evaluation.py", prepared / "model", tmp_path / f"{number}.pt", number=number)
    one, two = (torch.load(tmp_path / f"{number}.pt") for number in (1, 2))
    kept = [found["labels"] != -100 for found in (one, two)]
    assert kept[0].sum() > 20
    assert torch.equal(one["labels"][kept[0]], two["labels"][kept[1]])
    torch.testing.assert_close(one["logits"][kept[0]], two["logits"][kept[1]], atol=1e-4, rtol=0)
