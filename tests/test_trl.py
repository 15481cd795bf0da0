"""With TRL's trainers, every row sees only its own images: its numbers in a batch equal those of the row alone."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from processes import run_alone, run_processes
from trl import (
    DistillationConfig,
    DistillationTrainer,
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
from trl.trainer.utils import remove_none_values

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.training import FlashSlothDataCollator
from flashsloth.training.lora import LORA_TARGET_MODULES

CLOSE = 2e-4  # float32, in one batch and alone
QUESTIONS = ("What?", "Who are you?", "Which of them?", "And you?")
ANSWERS = ("yes", "me", "both", "no one")
FIXED = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
FIXED |= {"logging_steps": 1, "learning_rate": 1e-5}


@pytest.fixture(scope="module")
def source(make_model, processor, tmp_path_factory):
    """A folder with model and processor: TRL loads reference models from the model's own path."""
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
def image_rows(images):
    """Images of each row: one, none, two, none."""
    return [images[:1], [], images[1:3], []]


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("encoded", [False, True])
def test_rows_without_images_may_be_none(encoded, any_processor, image_rows):
    """TRL passes such rows; `datasets` passes images that were inside messages as dicts."""
    text, placeholders = [f"a{i}" for i in range(4)], [any_processor.image_token * len(row) for row in image_rows]
    text = [placeholder + part for placeholder, part in zip(placeholders, text, strict=True)]
    expected = any_processor(images=image_rows, text=text, padding=True, return_tensors="pt")
    rows = [[{"bytes": _png(image), "path": None} for image in row] for row in image_rows] if encoded else image_rows
    found = any_processor(images=[row or None for row in rows], text=text, padding=True, return_tensors="pt")
    assert set(found) == set(expected)
    assert all(found[name].equal(expected[name]) for name in expected)


def _png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def test_rows_that_are_all_none_have_no_tiles(any_processor, load):
    for image_rows in ([None, None], [None, []]):
        inputs = any_processor(images=image_rows, text=["one", "two"], return_tensors="pt")
        assert inputs["pixel_values"].shape == (0, 3, 32, 32)
        logits = load()(**inputs).logits
        assert logits.equal(load()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits)
    assert load().generate(**inputs, max_new_tokens=2, num_return_sequences=2, do_sample=True).shape == (4, 5)


@pytest.mark.parametrize("nested", [False, True])
def test_an_image_among_images_cannot_be_none(nested, processor, images):
    image_rows = [[images[0]], [None]] if nested else [images[0], None]
    with pytest.raises(TypeError, match=r"found NoneType.*If a row has no images, pass `\[\]`"):
        processor.image_processor(image_rows)


@pytest.mark.parametrize("return_tensors", ["pt", None])
def test_the_image_processor_counts_tiles_as_trl_asks(return_tensors, any_processor, image_rows):
    options = {"crop_to_patches": True, "return_tensors": return_tensors}
    counted = any_processor.image_processor(images=[row or None for row in image_rows], **options)
    tiles = any_processor.image_processor.get_number_of_image_patches(0, 0)
    assert counted["num_patches"].tolist() == [tiles] * 3
    plain = any_processor.image_processor(image_rows, return_tensors=return_tensors)
    assert set(plain) == {"pixel_values"}
    assert (plain["pixel_values"] == counted["pixel_values"]).all()


def test_broken_bytes_are_refused(processor):
    with pytest.raises(ValueError, match="found 4 bytes that Pillow cannot read"):
        processor.image_processor([{"bytes": b"oops", "path": None}])
    with pytest.raises(TypeError, match="found dict"):
        processor.image_processor([{"bytes": None, "path": "examples/scene.png"}])


def prompts(image_rows):
    """Rows without an image have `None` or an empty list."""
    rows = zip(QUESTIONS, [image_rows[0], None, *image_rows[2:]], strict=True)
    return Dataset.from_list([{"prompt": user(question), "images": images} for question, images in rows])


def log_probs_alone(model, processor, image_rows, question, answer_ids):
    """Log-probabilities of an answer's tokens in a batch of one, `(num_tokens,)`."""
    content = [*({"type": "image", "image": image} for image in image_rows), {"type": "text", "text": question}]
    inputs = processor.encode_conversations([{"role": "user", "content": content}])
    answer_ids = torch.as_tensor(answer_ids).view(1, -1)
    ids = torch.cat([inputs["input_ids"], answer_ids], dim=1)
    with torch.no_grad():
        logits = model(ids, pixel_values=inputs.get("pixel_values")).logits[:, -answer_ids.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(-1, answer_ids.unsqueeze(-1))[0, :, 0]


def answer_log_probs(model, processor, image_rows, answers=ANSWERS):
    """The same for every row, with the data set's answers and end tokens."""
    tokenizer = processor.tokenizer
    answer_ids = tokenizer([f" {answer}{tokenizer.eos_token}" for answer in answers])["input_ids"]
    rows = zip(image_rows, QUESTIONS, answer_ids, strict=True)
    return [log_probs_alone(model.eval(), processor, *row) for row in rows]


def reward(completions, **kwargs):
    """Rewards that differ, because equal rewards teach nothing."""
    return [float(sum(map(ord, completion[0]["content"])) % 97) for completion in completions]


def compared(trainer_class):
    """The trainer, with all its log-probabilities compared with those of every row alone."""

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
                alone = log_probs_alone(model, self.processing_class, self.image_rows[question], question, answer_ids)
                self.differences += ((log_probs[kept] - alone).abs().max().item(),)
            self.models += (model,)
            return found

    return Compared


def check_log(trainer):
    """Every step has a finite, non-zero gradient."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == trainer.args.max_steps
    assert all(0 < entry["grad_norm"] < 1e4 for entry in steps)


POLICY_TRAINERS = [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)]


def policy_trainer(trainer, config, model, processor, dataset, folder, image_rows, **changes):
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    answers = {"num_generations": 2, "max_completion_length": 5, "disable_dropout": True}
    peft_config = changes.pop("peft_config", None)
    eval_dataset = changes.pop("eval_dataset", None)
    args = config(str(folder), **(FIXED | sizes | answers | changes))
    made = compared(trainer)(
        model, reward, args, dataset, eval_dataset, processing_class=processor, peft_config=peft_config
    )
    made.image_rows = dict(zip(QUESTIONS, image_rows, strict=True))
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "config"), POLICY_TRAINERS)
def test_policy_and_reference_see_each_rows_own_images(trainer, config, load, any_processor, image_rows, tmp_path):
    """Batches of every mixture, shuffled twice: a generation batch has two rows with images and two without."""
    sizes = {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 4, "beta": 0.1}
    made = policy_trainer(trainer, config, load(), any_processor, prompts(image_rows), tmp_path, image_rows, **sizes)
    made.train()
    assert len(set(made.models)) == 2
    assert len(made.differences) >= 4 * 4 * 2
    assert max(made.differences) < CLOSE
    check_log(made)


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "config"), POLICY_TRAINERS)
def test_policy_trainers_train_adapters(trainer, config, load, any_processor, image_rows, tmp_path):
    """The reference is the model without its adapter."""
    peft_config = LoraConfig(r=2, target_modules=LORA_TARGET_MODULES, init_lora_weights=False)
    options = {"peft_config": peft_config, "beta": 0.1, "eval_dataset": prompts(image_rows), "eval_strategy": "steps"}
    options |= {"eval_steps": 1, "per_device_eval_batch_size": 2, "num_generations_eval": 1}
    made = policy_trainer(trainer, config, load(), any_processor, prompts(image_rows), tmp_path, image_rows, **options)
    made.train()
    check_log(made)
    assert [entry["eval_reward"] for entry in made.state.log_history if "eval_reward" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "config"), POLICY_TRAINERS)
@pytest.mark.parametrize("none", [None, []])
def test_policies_learn_on_batches_without_images(none, trainer, config, load, any_processor, image_rows, tmp_path):
    dataset = prompts(image_rows).select([1, 3]).map(lambda row: {"images": none})
    made = policy_trainer(trainer, config, load(), any_processor, dataset, tmp_path, image_rows)
    made.train()
    assert max(made.differences) < CLOSE
    check_log(made)


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "config"), POLICY_TRAINERS)
def test_policies_never_answer_with_query_tokens(trainer, config, load, processor, image_rows, tmp_path):
    """TRL bans only image tokens. FlashSloth bans query tokens too: a single one would be refused as input."""
    model = load()
    with torch.no_grad():
        model.lm_head.bias[model.config.query_token_id] += 50
    made = policy_trainer(trainer, config, model, processor, prompts(image_rows), tmp_path, image_rows)
    made.train()
    check_log(made)


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "config"), POLICY_TRAINERS)
def test_policy_trainers_take_a_column_of_one_image(trainer, config, load, any_processor, image_rows, tmp_path):
    rows = [{"prompt": user(QUESTIONS[i]), "image": image_rows[i][0] if image_rows[i] else None} for i in (0, 1, 3)]
    made = policy_trainer(trainer, config, load(), any_processor, Dataset.from_list(rows), tmp_path, image_rows)
    made.train()
    assert max(made.differences) < CLOSE
    check_log(made)


def answered(image_rows, answers=ANSWERS, *, none=None):
    """Prompts and answers."""
    rows = zip(QUESTIONS, image_rows, answers, strict=True)
    return [
        {"prompt": user(question), "completion": assistant(answer), "images": images or none}
        for question, images, answer in rows
    ]


def first_step(trainer):
    """The log of the first step, which starts from the given weights."""
    trainer.train()
    check_log(trainer)
    return trainer.state.log_history[0]


OTHERS = ("no", "you", "neither", "me")
WHOLE = {"per_device_train_batch_size": 4, "max_steps": 2, "max_length": None}


def mean_sum(log_probs):
    return sum(row.sum().item() for row in log_probs) / len(log_probs)


@pytest.mark.slow
@pytest.mark.parametrize("with_adapters", [False, True])
def test_dpo_compares_answers_to_each_rows_own_images(with_adapters, load, any_processor, image_rows, tmp_path):
    rows = [row | {"rejected": assistant(other)} for row, other in zip(answered(image_rows), OTHERS, strict=True)]
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
        alone = answer_log_probs(model, any_processor, image_rows, answers)
        assert log[f"logps/{name}"] == pytest.approx(mean_sum(alone), abs=1e-3)
        assert log[f"rewards/{name}"] == pytest.approx(0, abs=1e-4)  # as the reference
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.slow
def test_kto_weighs_answers_to_each_rows_own_images(load, any_processor, image_rows, tmp_path):
    rows = [row | {"label": i % 2 == 0} for i, row in enumerate(answered(image_rows))]
    args = KTOConfig(str(tmp_path), **FIXED, **WHOLE)
    trainer = KTOTrainer(load(), args=args, train_dataset=Dataset.from_list(rows), processing_class=any_processor)
    log = first_step(trainer)
    alone = answer_log_probs(load(), any_processor, image_rows)
    assert log["logps/chosen"] == pytest.approx(mean_sum(alone[::2]), abs=1e-3)
    assert log["logps/rejected"] == pytest.approx(mean_sum(alone[1::2]), abs=1e-3)


def sft(model, processor, dataset, folder, **changes):
    args = SFTConfig(str(folder), **(FIXED | WHOLE | changes))
    return SFTTrainer(
        model, args, train_dataset=dataset, eval_dataset=dataset.select(range(3)), processing_class=processor
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["completion", "messages"])
def test_sft_learns_answers_from_each_rows_own_images(form, load, any_processor, image_rows, tmp_path):
    if form == "messages" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("TRL wants transformers 5.18 for assistant_only_loss")
    rows = answered(image_rows)
    if form == "messages":
        rows = [{"messages": row["prompt"] + row["completion"], "images": row["images"]} for row in rows]
    model = load()
    model.config.pooling_dropout = 0.0
    model.model.spatial_attention_pooling.dropout.p = 0.0
    options = {"assistant_only_loss": form == "messages", "eval_strategy": "steps", "eval_steps": 1}
    trainer = sft(model, any_processor, Dataset.from_list(rows), tmp_path, **options)
    log = first_step(trainer)
    alone = torch.cat(answer_log_probs(load(), any_processor, image_rows))
    assert log["loss"] == pytest.approx(-alone.mean().item(), abs=1e-4)
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.slow
def test_text_is_packed_right(load, processor, tmp_path):
    """TRL packs text-only samples into rows; each sample reads only itself."""
    answers = ("yes", "me, as ever", "both of them", "no one at all")
    rows = zip(QUESTIONS, answers, strict=True)
    dataset = Dataset.from_list([{"messages": user(question) + assistant(answer)} for question, answer in rows])
    losses = []
    for options in ({}, {"packing": True, "max_length": 2048}, {"padding_free": True}):
        trainer = sft(load(), processor, dataset, tmp_path, **options)
        losses.append(first_step(trainer)["loss"])
        packed = trainer.train_dataset if options.get("packing") else None
        assert packed is None or len(packed) == 1
    assert losses[1:] == pytest.approx(losses[:1] * 2, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_images_are_not_packed(load, processor, image_rows, tmp_path, name):
    dataset = Dataset.from_list(answered(image_rows))
    with pytest.raises(ValueError, match="not supported for vision datasets"):
        sft(load(), processor, dataset, tmp_path, **{name: True})


@pytest.mark.parametrize(
    ("form", "message"), [("completion", "TRL truncates them to its `max_length`"), ("messages", "Raise `max_length`")]
)
def test_a_prompt_that_trl_cuts_is_refused(load, processor, image_rows, tmp_path, form, message):
    row = answered(image_rows)[0]
    row = row if form == "completion" else {"messages": row["prompt"] + row["completion"], "images": image_rows[0]}
    trainer = sft(load(), processor, Dataset.from_list([row] * 4), tmp_path, max_length=155)
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("teacher_is_student", [True, False])
def test_distillation_shows_images_to_student_and_teacher(
    teacher_is_student, load, any_processor, image_rows, source, tmp_path
):
    """A student that is its own teacher has nothing to learn."""
    teacher = load()
    if not teacher_is_student:
        with torch.no_grad():
            teacher.model.vision_tower.embeddings.patch_embedding.weight.mul_(-1)
    teacher.save_pretrained(tmp_path / "teacher")
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    args = DistillationConfig(
        str(tmp_path), max_completion_length=4, disable_dropout=True, **(FIXED | sizes | {"learning_rate": 0.0})
    )
    trainer = DistillationTrainer(
        load(), str(tmp_path / "teacher"), args=args, train_dataset=prompts(image_rows), processing_class=any_processor
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert (max(losses) < 1e-5) == teacher_is_student


# How `datasets` returns parts with different keys, as in published data sets.
EXTRA_KEYS = {
    "filled": ({"text": None}, {}),
    "numbered": ({"text": None, "index": 0}, {"index": None}),
    "with image keys": ({"text": None, "image": None}, {"image": None}),
}


def in_parts(rows, keys):
    """Rows whose prompts are lists of parts, with placeholders for images."""
    of_image, of_text = EXTRA_KEYS[keys]
    found = []
    for row in rows:
        parts = [{"type": "image", **of_image} for _ in row["images"] or []]
        parts.append({"type": "text", "text": row["prompt"][0]["content"], **of_text})
        changed = {"prompt": [{"role": "user", "content": parts}]}
        for name in {"completion", "chosen", "rejected"} & set(row):
            text = {"type": "text", "text": row[name][0]["content"], **of_text}
            changed[name] = [{"role": "assistant", "content": [text]}]
        found.append(row | changed)
    dataset = Dataset.from_list(found)
    return dataset.with_transform(remove_none_values) if "image" in of_image else dataset


@pytest.mark.slow
@pytest.mark.parametrize("keys", list(EXTRA_KEYS))
def test_parts_with_more_keys_are_read_like_text(keys, load, processor, image_rows, tmp_path):
    plain = [row | {"rejected": assistant(other)} for row, other in zip(answered(image_rows), OTHERS, strict=True)]
    filled = in_parts(plain, keys)
    assert None in filled.with_format(None)[0]["prompt"][0]["content"][0].values()
    made = policy_trainer(
        GRPOTrainer, GRPOConfig, load(), processor, filled.select_columns(["prompt", "images"]), tmp_path, image_rows
    )
    made.train()
    assert max(made.differences) < CLOSE
    sft_args, dpo_args = SFTConfig(str(tmp_path), **FIXED, **WHOLE), DPOConfig(str(tmp_path), **FIXED, **WHOLE)
    for trainer_class, args, names in (
        (SFTTrainer, sft_args, {"completion": "completion"}),
        (DPOTrainer, dpo_args, {"completion": "chosen", "rejected": "rejected"}),
    ):
        batches = []
        for dataset in (Dataset.from_list(plain), filled):
            dataset = dataset.select_columns(["prompt", "images", *names]).rename_columns(names)
            trainer = trainer_class(load(), args=args, train_dataset=dataset, processing_class=processor)
            trainer.train()
            batches.append(trainer.data_collator([dataset[i] for i in range(4)]))
        assert set(batches[0]) == set(batches[1])
        assert all(batches[0][name].equal(batches[1][name]) for name in batches[0])


@pytest.mark.slow
def test_images_in_parts(load, processor, image_rows, tmp_path):
    """`datasets` encodes them. GRPO and, with our collator, SFT accept them; otherwise TRL reads only its column."""
    rows = [
        {"prompt": [{"role": "user", "content": [*({"type": "image", "image": i} for i in images), text]}]}
        for images, question in zip(image_rows, QUESTIONS, strict=True)
        for text in [{"type": "text", "text": question}]
    ]
    dataset = Dataset.from_list(rows)
    assert set(dataset[0]["prompt"][0]["content"][0]["image"]) == {"bytes", "path"}
    made = policy_trainer(GRPOTrainer, GRPOConfig, load(), processor, dataset, tmp_path, image_rows)
    made.train()
    assert max(made.differences) < CLOSE
    rows = [
        {"messages": row["prompt"] + [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]}
        for row, answer in zip(rows, ANSWERS, strict=True)
    ]
    dataset = Dataset.from_list(rows)
    with pytest.raises(ValueError, match="in TRL as a column `images`"):
        sft(load(), processor, dataset, tmp_path).train()
    model = load()
    options = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), **FIXED, **WHOLE, **options),
        train_dataset=dataset,
        data_collator=FlashSlothDataCollator(processor),
        processing_class=processor,
    )
    model.model.spatial_attention_pooling.dropout.p = 0.0
    alone = torch.cat(answer_log_probs(load(), processor, image_rows))
    assert first_step(trainer)["loss"] == pytest.approx(-alone.mean().item(), abs=1e-4)


def test_an_image_that_is_missing_is_refused(load, processor, image_rows, tmp_path):
    rows = [
        {"messages": user(question) + assistant("so"), "image": image}
        for question, image in zip(QUESTIONS, [image_rows[0][0], None, None, None], strict=True)
    ]
    with pytest.raises(ValueError, match=r"of type .image. should have one of"):
        sft(load(), processor, Dataset.from_list(rows), tmp_path).train()


@pytest.mark.slow
def test_a_folder_is_trained_without_the_package(source, images, tmp_path):
    """Model, reference and processor by name, with code from the folder; the result is trained again."""
    images[0].save(tmp_path / "image.png")
    script = f"""
import sys
sys.modules["flashsloth"] = None
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
options = {FIXED | {"max_steps": 1, "per_device_train_batch_size": 2, "trust_remote_code": True}}
row = {{"prompt": [{{"role": "user", "content": "What?"}}], "images": ["image.png"]}}
config = GRPOConfig("runs", num_generations=2, max_completion_length=3, beta=0.1, **options)
trainer = GRPOTrainer({str(source)!r}, lambda completions, **kwargs: [0.0, 1.0], config, Dataset.from_list([row] * 2))
trainer.train()
trainer.save_model("again")
row["completion"] = [{{"role": "assistant", "content": "So."}}]
SFTTrainer("again", SFTConfig("runs", max_length=None, **options), train_dataset=Dataset.from_list([row] * 2)).train()
"""
    run_alone("-c", script, folder=tmp_path)


@pytest.fixture(scope="module")
def trained_by_processes(make_model, processor, tmp_path_factory):
    """The source, and the results of one process and of two."""
    folder = tmp_path_factory.mktemp("processes")
    make_model("llama", pooling_dropout=0.0).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for number in (1, 2):
        script = Path(__file__).with_name("trl_training.py")
        run_processes(script, folder / "model", folder / str(number), number=number)
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
