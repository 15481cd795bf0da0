"""TRL's trainers see what a FlashSloth sees: each row alone, with its own images, gives the numbers of the batch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.training.lora import LORA_TARGET_MODULES

CLOSE = 2e-4  # float32, in one batch and alone
QUESTIONS = ("What?", "Who are you?", "Which of them?", "And you?")
ANSWERS = ("yes", "me", "both", "no one")
FIXED = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
FIXED |= {"logging_steps": 1, "learning_rate": 1e-5}


@pytest.fixture(scope="module")
def source(make_model, processor, tmp_path_factory):
    """A folder with model and processor: TRL loads reference models from where the model came from."""
    folder = tmp_path_factory.mktemp("source")
    make_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def load(source):
    return lambda: FlashSlothForConditionalGeneration.from_pretrained(source)


@pytest.fixture(params=["plain", "hd"])
def any_processor(request, source):
    return FlashSlothProcessor.from_pretrained(source, do_image_splitting=request.param == "hd")


@pytest.fixture(scope="module")
def images(pictures):
    """Of each row: one, none, two, none."""
    return [pictures[:1], [], pictures[1:3], []]


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def prompts(images):
    """Rows without an image have `None` or an empty list."""
    rows = zip(QUESTIONS, [images[0], None, *images[2:]], strict=True)
    return Dataset.from_list([{"prompt": user(question), "images": pictures} for question, pictures in rows])


def log_probs_alone(model, processor, images, question, answer_ids):
    """Log-probabilities of an answer's tokens, with nothing else in the batch, `(num_tokens,)`."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    answer_ids = torch.as_tensor(answer_ids).view(1, -1)
    ids = torch.cat([inputs["input_ids"], answer_ids], dim=1)
    with torch.no_grad():
        logits = model(ids, pixel_values=inputs.get("pixel_values")).logits[:, -answer_ids.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(-1, answer_ids.unsqueeze(-1))[0, :, 0]


def answer_log_probs(model, processor, images, answers=ANSWERS):
    """The same of every row, with the answers and end tokens that a data set gives."""
    tokenizer = processor.tokenizer
    answer_ids = tokenizer([f" {answer}{tokenizer.eos_token}" for answer in answers])["input_ids"]
    rows = zip(images, QUESTIONS, answer_ids, strict=True)
    return [log_probs_alone(model.eval(), processor, *row) for row in rows]


def reward(completions, **kwargs):
    """No two answers get the same, or there would be nothing to learn."""
    return [float(sum(map(ord, completion[0]["content"])) % 97) for completion in completions]


def compared(trainer_class):
    """The trainer, which compares all log-probabilities it computes with those of every row alone."""

    class Compared(trainer_class):
        differences, models = (), ()

        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
            found = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
            model = self.accelerator.unwrap_model(model)
            for row, log_probs in enumerate(found[0].detach()):
                prompt = self.processing_class.decode(input_ids[row][attention_mask[row] == 1])
                question = re.search(r"USER: (?:<image>|\n)*(.*?)<learnable>", prompt)[1]
                kept = attention_mask[row, -logits_to_keep:] == 1
                answer_ids = input_ids[row, -logits_to_keep:][kept]
                alone = log_probs_alone(model, self.processing_class, self.images[question], question, answer_ids)
                self.differences += ((log_probs[kept] - alone).abs().max().item(),)
            self.models += (model,)
            return found

    return Compared


def check_log(trainer):
    """Every step learned something, from numbers."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == trainer.args.max_steps
    assert all(0 < entry["grad_norm"] < 1e4 for entry in steps)


POLICY_TRAINERS = [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)]


def policy_trainer(trainer, config, model, processor, dataset, folder, images, **changes):
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    answers = {"num_generations": 2, "max_completion_length": 5, "disable_dropout": True}
    peft_config = changes.pop("peft_config", None)
    eval_dataset = changes.pop("eval_dataset", None)
    args = config(str(folder), **(FIXED | sizes | answers | changes))
    made = compared(trainer)(
        model, reward, args, dataset, eval_dataset, processing_class=processor, peft_config=peft_config
    )
    made.images = dict(zip(QUESTIONS, images, strict=True))
    return made


@pytest.mark.parametrize(("trainer", "config"), POLICY_TRAINERS)
def test_policy_and_reference_see_each_rows_own_images(trainer, config, load, any_processor, images, tmp_path):
    """Batches of every mixture, dealt out anew, twice: a generation batch has two rows of images and two without."""
    sizes = {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 4, "beta": 0.1}
    made = policy_trainer(trainer, config, load(), any_processor, prompts(images), tmp_path, images, **sizes)
    made.train()
    assert len(set(made.models)) == 2
    assert len(made.differences) >= 4 * 4 * 2
    assert max(made.differences) < CLOSE
    check_log(made)


@pytest.mark.parametrize(("trainer", "config"), POLICY_TRAINERS)
def test_policy_trainers_train_adapters(trainer, config, load, any_processor, images, tmp_path):
    """The reference is the model without its adapter."""
    peft_config = LoraConfig(r=2, target_modules=LORA_TARGET_MODULES, init_lora_weights=False)
    options = {"peft_config": peft_config, "beta": 0.1, "eval_dataset": prompts(images), "eval_strategy": "steps"}
    options |= {"eval_steps": 1, "per_device_eval_batch_size": 2, "num_generations_eval": 1}
    made = policy_trainer(trainer, config, load(), any_processor, prompts(images), tmp_path, images, **options)
    made.train()
    check_log(made)
    assert [entry["eval_reward"] for entry in made.state.log_history if "eval_reward" in entry]


@pytest.mark.parametrize(("trainer", "config"), POLICY_TRAINERS)
@pytest.mark.parametrize("none", [None, []])
def test_policies_learn_on_batches_without_images(none, trainer, config, load, any_processor, images, tmp_path):
    dataset = prompts(images).select([1, 3]).map(lambda row: {"images": none})
    made = policy_trainer(trainer, config, load(), any_processor, dataset, tmp_path, images)
    made.train()
    assert max(made.differences) < CLOSE
    check_log(made)


@pytest.mark.parametrize(("trainer", "config"), POLICY_TRAINERS)
def test_policies_never_answer_with_query_tokens(trainer, config, load, processor, images, tmp_path):
    """TRL's own list of tokens that must not be generated has the image token only."""
    model = load()
    with torch.no_grad():
        model.lm_head.bias[model.config.query_token_id] += 50
    policy_trainer(trainer, config, model, processor, prompts(images), tmp_path, images).train()


@pytest.mark.parametrize(("trainer", "config"), POLICY_TRAINERS)
def test_policy_trainers_take_a_column_of_one_image(trainer, config, load, any_processor, images, tmp_path):
    rows = [{"prompt": user(QUESTIONS[i]), "image": images[i][0] if images[i] else None} for i in (0, 1, 3)]
    made = policy_trainer(trainer, config, load(), any_processor, Dataset.from_list(rows), tmp_path, images)
    made.train()
    assert max(made.differences) < CLOSE
    check_log(made)


def answered(images, answers=ANSWERS, *, none=None):
    """Prompts and answers."""
    rows = zip(QUESTIONS, images, answers, strict=True)
    return [
        {"prompt": user(question), "completion": assistant(answer), "images": pictures or none}
        for question, pictures, answer in rows
    ]


def first_step(trainer):
    """What is logged of the first step, before which the weights are the given ones."""
    trainer.train()
    check_log(trainer)
    return trainer.state.log_history[0]


OTHERS = ("no", "you", "neither", "me")
WHOLE = {"per_device_train_batch_size": 4, "max_steps": 2, "max_length": None}


def mean_sum(log_probs):
    return sum(row.sum().item() for row in log_probs) / len(log_probs)


@pytest.mark.parametrize("with_adapters", [False, True])
def test_dpo_compares_answers_to_each_rows_own_images(with_adapters, load, any_processor, images, tmp_path):
    rows = [row | {"rejected": assistant(other)} for row, other in zip(answered(images), OTHERS, strict=True)]
    dataset = Dataset.from_list(rows).rename_column("completion", "chosen")
    peft_config = LoraConfig(r=2, target_modules=LORA_TARGET_MODULES) if with_adapters else None
    args = DPOConfig(str(tmp_path), eval_strategy="steps", eval_steps=1, **FIXED, **WHOLE)
    trainer = DPOTrainer(
        load(),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=any_processor,
        peft_config=peft_config,
    )
    log = first_step(trainer)
    model = load()
    for name, answers in (("chosen", ANSWERS), ("rejected", OTHERS)):
        alone = answer_log_probs(model, any_processor, images, answers)
        assert log[f"logps/{name}"] == pytest.approx(mean_sum(alone), abs=1e-3)
        assert log[f"rewards/{name}"] == pytest.approx(0, abs=1e-4)  # as the reference
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


def test_kto_weighs_answers_to_each_rows_own_images(load, any_processor, images, tmp_path):
    rows = [row | {"label": i % 2 == 0} for i, row in enumerate(answered(images))]
    args = KTOConfig(str(tmp_path), **FIXED, **WHOLE)
    trainer = KTOTrainer(load(), args=args, train_dataset=Dataset.from_list(rows), processing_class=any_processor)
    log = first_step(trainer)
    alone = answer_log_probs(load(), any_processor, images)
    assert log["logps/chosen"] == pytest.approx(mean_sum(alone[::2]), abs=1e-3)
    assert log["logps/rejected"] == pytest.approx(mean_sum(alone[1::2]), abs=1e-3)


def sft(model, processor, dataset, folder, **changes):
    args = SFTConfig(str(folder), **(FIXED | WHOLE | changes))
    return SFTTrainer(
        model, args, train_dataset=dataset, eval_dataset=dataset.select(range(3)), processing_class=processor
    )


@pytest.mark.parametrize("form", ["completion", "messages"])
def test_sft_learns_answers_from_each_rows_own_images(form, load, any_processor, images, tmp_path):
    if form == "messages" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("TRL wants transformers 5.18 for assistant_only_loss")
    rows = answered(images)
    if form == "messages":
        rows = [{"messages": row["prompt"] + row["completion"], "images": row["images"]} for row in rows]
    model = load()
    model.config.pooling_dropout = 0.0
    model.model.spatial_attention_pooling.dropout.p = 0.0
    options = {"assistant_only_loss": form == "messages", "eval_strategy": "steps", "eval_steps": 1}
    trainer = sft(model, any_processor, Dataset.from_list(rows), tmp_path, **options)
    log = first_step(trainer)
    alone = torch.cat(answer_log_probs(load(), any_processor, images))
    assert log["loss"] == pytest.approx(-alone.mean().item(), abs=1e-4)
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


@pytest.fixture(scope="module")
def trained_by_processes(make_model, processor, tmp_path_factory):
    """The source, and what one process and two made of it."""
    folder = tmp_path_factory.mktemp("processes")
    make_model("llama", pooling_dropout=0.0).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for number in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
        done = subprocess.run(
            [
                *launch,
                str(Path(__file__).with_name("trl_training.py")),
                str(folder / "model"),
                str(folder / str(number)),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_two_processes_with_different_numbers_of_images_train_as_one(name, trained_by_processes):
    one, two = (json.loads((trained_by_processes / number / "logs.json").read_text())[name] for number in "12")
    assert len(one) == 4 + 2 + 1
    for expected, found in zip(one, two, strict=True):
        for key in {"loss", "eval_loss"} & set(expected):
            assert found[key] == pytest.approx(expected[key], abs=1e-4)
    one, two, before = (
        FlashSlothForConditionalGeneration.from_pretrained(trained_by_processes / folder).state_dict()
        for folder in (f"1/{name}", f"2/{name}", "model")
    )
    assert not one["model.query_tokens"].equal(before["model.query_tokens"])
    for key, expected in one.items():
        torch.testing.assert_close(two[key], expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.slow
def test_policies_of_two_processes_see_each_rows_own_images(trained_by_processes):
    *steps, compared_with_alone = json.loads((trained_by_processes / "2" / "logs.json").read_text())["grpo"]
    assert len(steps) == 4
    assert max(compared_with_alone["differences"]) < CLOSE
