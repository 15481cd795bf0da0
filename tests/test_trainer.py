"""transformers' own `Trainer` works with FlashSloth: metrics, label smoothing, NEFTune, packed samples."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.training import FlashSlothDataCollator


@pytest.fixture(scope="module")
def rows(images):
    """Rows with one image, none and two."""
    made = []
    for number, count in enumerate([1, 0, 2, 1, 0, 1]):
        parts = [{"type": "image", "image": image} for image in images[:count]]
        question = {"role": "user", "content": [*parts, {"type": "text", "text": f"Question {number}?"}]}
        made.append({"messages": [question, {"role": "assistant", "content": f"Answer {number}"}]})
    return made


def make_trainer(model, processor, rows, folder, *, collator=None, **changes):
    callbacks = {name: changes.pop(name) for name in ("compute_metrics",) if name in changes}
    callbacks |= {n: changes.pop(n) for n in ("preprocess_logits_for_metrics",) if n in changes}
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 1,
        "use_cpu": True,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return Trainer(
        model,
        TrainingArguments(**settings | changes),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator or FlashSlothDataCollator(processor),
        **callbacks,
    )


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("num_rows", [6, 2])
def test_metrics_get_only_logits(make_model, processor, rows, tmp_path, attn_implementation, num_rows):
    model, seen = make_model("qwen3", attn_implementation), []
    if attn_implementation == "eager":
        model.config.output_attentions = True
    model.config.output_hidden_states = True
    rows = rows[-num_rows:]

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"rows": len(prediction.predictions)}

    trainer = make_trainer(model, processor, rows, tmp_path, compute_metrics=compute_metrics)
    assert trainer.evaluate()["eval_rows"] == num_rows
    logits, labels = seen[0].predictions, seen[0].label_ids
    assert logits.shape == (*labels.shape, model.config.text_config.vocab_size)
    for row, found in zip(rows, logits, strict=True):
        batch = FlashSlothDataCollator(processor)([row])
        with torch.no_grad():
            expected = model(**batch).logits[0]
        torch.testing.assert_close(torch.from_numpy(found[: len(expected)]), expected, atol=1e-4, rtol=0)


def test_logits_may_be_reduced_before_they_are_gathered(make_model, processor, rows, tmp_path):
    model = make_model("phi")
    trainer = make_trainer(
        model,
        processor,
        rows,
        tmp_path,
        compute_metrics=lambda prediction: {"tokens": prediction.predictions.size},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
    )
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape == predicted.label_ids.shape
    assert predicted.metrics["test_tokens"] == predicted.predictions.size
    for row, found in zip(rows, predicted.predictions, strict=True):
        with torch.no_grad():
            expected = model(**FlashSlothDataCollator(processor)([row])).logits[0].argmax(dim=-1).tolist()
        assert found[: len(expected)].tolist() == expected


class Derived(FlashSlothForConditionalGeneration):
    """A user's subclass."""


@pytest.mark.parametrize("kind", ["own", "derived", "adapters"])
def test_label_smoothing_shifts_the_labels(make_model, processor, rows, tmp_path, kind):
    model = make_model("phi", pooling_dropout=0.0)
    if kind == "derived":
        model.__class__ = Derived
    if kind == "adapters":
        model = get_peft_model(model, LoraConfig(target_modules=r".*\.q_proj"))
    trainer = make_trainer(model, processor, rows, tmp_path, label_smoothing_factor=0.1)
    batch = FlashSlothDataCollator(processor)(rows[:3])
    with torch.no_grad():
        found = trainer.compute_loss(model, dict(batch))
        logits = model(**batch).logits
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    expected = smoothed(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_label_smoothing_teaches_the_answers(make_model, processor, rows, tmp_path):
    model = make_model("phi", pooling_dropout=0.0)
    collator = FlashSlothDataCollator(processor)
    batch = collator(rows)
    settings = {"label_smoothing_factor": 0.1, "max_steps": 40, "learning_rate": 0.01, "per_device_train_batch_size": 6}
    before = float(model(**batch).loss.detach())
    make_trainer(model, processor, rows, tmp_path, **settings).train()
    assert float(model.eval()(**batch).loss.detach()) < 0.06 * before  # measured: 0.02


def test_neftune_adds_equal_noise_to_every_token(make_model, processor, rows, tmp_path):
    """The released models add an anchor token's embedding to their queries; it gets the same noise as the others."""
    model = make_model("phi")
    assert model.config.query_anchor_token_id is not None
    noise = []
    embeddings = model.get_input_embeddings()
    trainer = make_trainer(model, processor, rows, tmp_path, neftune_noise_alpha=5.0)

    class WithNoise(Trainer):
        def training_step(self, *args, **kwargs):
            hook = embeddings.register_forward_hook(
                lambda module, ids, output: noise.append(float((output - module.weight[ids[0]]).detach().abs().max()))
            )
            loss = super().training_step(*args, **kwargs)
            hook.remove()
            return loss

    trainer.__class__ = WithNoise
    assert trainer.train().training_loss > 0
    assert len(noise) == 2
    assert noise[0] > 0
    assert noise[1] == pytest.approx(noise[0], rel=0.01)  # the largest of many random values


def test_more_than_one_gpu_in_a_process_is_refused(make_model, processor, rows, tmp_path):
    """`Trainer` would wrap the model in `nn.DataParallel`, whose copies FlashSloth refuses to run in."""
    batch = FlashSlothDataCollator(processor)(rows[:2])
    model = make_model("phi").train()
    with pytest.raises(RuntimeError, match=r"cannot run under `nn.DataParallel`"):
        model._replicate_for_data_parallel().model._replicate_for_data_parallel()(**batch)


def test_rows_without_padding_train_as_padded_ones(make_model, processor, rows, tmp_path):
    losses = []
    for padding_free in (False, True):
        model = make_model("qwen3", pooling_dropout=0.0)
        collator = FlashSlothDataCollator(processor, padding_free=padding_free)
        trainer = make_trainer(
            model, processor, rows, tmp_path, collator=collator, max_steps=4, logging_steps=1, learning_rate=1e-3
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_padding_free_batches_are_one_row(model, processor, rows):
    padded = FlashSlothDataCollator(processor)(rows)
    batch = FlashSlothDataCollator(processor, padding_free=True)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids", "pixel_values"}
    total = int(padded["attention_mask"].sum())
    assert all(batch[name].shape == (1, total) for name in ("input_ids", "labels", "position_ids"))
    assert torch.equal(batch["input_ids"][0], padded["input_ids"][padded["attention_mask"].bool()])
    assert int((batch["position_ids"] == 0).sum()) == len(rows)
    assert torch.equal(batch["pixel_values"], padded["pixel_values"])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**padded).loss, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="`pad_to_multiple_of` and `padding_free`"):
        FlashSlothDataCollator(processor, padding_free=True, pad_to_multiple_of=8)
