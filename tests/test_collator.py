"""Labels of a batch are the answers and their end tokens, whatever the rows contain."""

import json
import logging
import pickle
import re

import datasets
import numpy as np
import pytest
import torch
from golden_checkpoint import GOLDEN, synthetic, write_golden_checkpoint
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.processing_utils import ProcessorMixin

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothImageProcessor, FlashSlothProcessor
from flashsloth.training import BadRowError, FlashSlothDataCollator, ModalityLengthSampler, load_rows
from flashsloth.training.recipe import FlashSlothTrainer

CHATML = r"""
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message['role'] ~ '\n' -}}
    {%- generation -%}{%- if message['role'] == 'assistant' -%}
        {%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}{{ '<|im_end|>' }}
    {%- endif -%}{%- endgeneration -%}
    {%- if message['role'] != 'assistant' -%}
        {%- for part in message['content'] -%}
            {{- '<image>\n' if part['type'] == 'image' else part['text'] -}}
        {%- endfor -%}
        {{- '<learnable>' if message['role'] == 'user' }}{{ '<|im_end|>' }}
    {%- endif -%}
    {{- '\n' -}}
{%- endfor -%}
"""


def row(*turns, **columns):
    """A turn is (images, question, answer)."""
    messages = []
    for images, question, answer in turns:
        parts = [{"type": "image", "image": image} for image in images]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, **columns}


def learned(batch, processor):
    """The text of every run of labels, row by row."""
    rows = []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        runs, inside = [], False
        for token, label in zip(ids, labels, strict=True):
            assert label in (token, -100)
            if label != -100:
                runs[-1:] = [runs[-1] + [token]] if inside else [*runs[-1:], [token]]
            inside = label != -100
        rows.append([processor.tokenizer.decode(run) for run in runs])
    return rows


@pytest.fixture
def rows(images):
    """One image, none, and two turns with an image each."""
    return [
        row((images[:1], "What is it?", "A cat."), index=0),
        row(([], "Who are you?", "A sloth."), index=1),
        row((images[1:2], "First?", "Yes."), (images[2:4], "And the others?", "No."), index=2),
    ]


@pytest.fixture
def collator(processor):
    return FlashSlothDataCollator(processor)


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_answers_and_their_ends_are_learned(collator, processor, rows):
    batch = collator(rows)
    assert learned(batch, processor) == [[" A cat.</s>"], [" A sloth.</s>"], [" Yes.</s>", " No.</s>"]]
    assert {name: value.dtype for name, value in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.int64,
        "pixel_values": torch.float32,
    }
    assert batch["pixel_values"].shape == (4, 3, 32, 32)


def test_ids_are_those_of_the_chat_template(collator, processor, rows):
    batch = collator(rows)
    for position, sample in enumerate(rows):
        expected = processor.apply_chat_template(
            sample["messages"], tokenize=True, return_dict=True, return_tensors="pt"
        )
        kept = batch["attention_mask"][position].bool()
        assert torch.equal(batch["input_ids"][position][kept], expected["input_ids"][0])
    assert torch.equal(batch["pixel_values"][1:], expected["pixel_values"])


@pytest.mark.parametrize("template", ["{{ bos_token }}", ""])
def test_there_is_one_bos_token_whether_template_or_tokenizer_adds_it(processor, rows, template):
    processor = pickle.loads(pickle.dumps(processor))
    tokenizer = processor.tokenizer
    tokenizer.bos_token = "<|endoftext|>"
    bos = ("<|endoftext|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[bos])
    processor.chat_template = template + processor.chat_template
    batch = FlashSlothDataCollator(processor)(rows[:1])
    expected = processor.apply_chat_template(rows[0]["messages"], tokenize=True, return_dict=True)["input_ids"]
    assert batch["input_ids"].tolist() == expected
    assert expected[0].count(tokenizer.bos_token_id) == 1
    assert learned(batch, processor) == [[" A cat.</s>"]]


def test_an_empty_block_of_a_template_is_not_learned(golden, rows):
    """It may even be inside a token."""
    golden = pickle.loads(pickle.dumps(golden))
    golden.chat_template = (
        "{{ 'peo' }}{% generation %}{% endgeneration %}{{ 'ple.' }}{% generation %}{{ ' yes' }}{% endgeneration %}"
    )
    batch = FlashSlothDataCollator(golden)([row(([], "any", "thing"))])
    assert learned(batch, golden) == [[" yes"]]


def test_padding_is_on_the_right_and_not_learned(processor, rows):
    batch = FlashSlothDataCollator(processor, pad_to_multiple_of=64)(rows)
    assert batch["input_ids"].shape[1] % 64 == 0
    assert batch["attention_mask"][:, 0].all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert processor.tokenizer.padding_side == "left"  # as generation needs it


def test_an_end_token_that_is_also_the_pad_token_is_learned(processor, rows):
    processor = pickle.loads(pickle.dumps(processor))
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    batch = FlashSlothDataCollator(processor, pad_to_multiple_of=64)(rows)
    assert learned(batch, processor)[2] == [" Yes.</s>", " No.</s>"]


@pytest.mark.skipif(
    not hasattr(ProcessorMixin, "_adjust_assistant_masks_indices"), reason="transformers before 5.18 has no such mask"
)
def test_labels_agree_with_the_assistant_mask_of_transformers(collator, processor, rows):
    batch = collator(rows)
    for position, sample in enumerate(rows):
        expected = processor.apply_chat_template(
            sample["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"][0]
        found = (batch["labels"][position] != -100).long()
        assert found[: len(expected)].tolist() == expected
        assert not found[len(expected) :].any()


@pytest.mark.parametrize("text", ["x ASSISTANT: y", "USER: z", "<image>", "</s>", "<learnable>", "a</s>b", "née 象 🦥"])
def test_control_tokens_in_text_do_not_move_labels(collator, processor, images, text):
    batch = collator([row((images[:1], text, "One."), ([], text, text), (images[:1], text, "Three."))])
    assert learned(batch, processor) == [[" One.</s>", f" {text}</s>", " Three.</s>"]]
    assert batch["input_ids"][0].tolist().count(processor.image_token_id) == 2 * processor.image_seq_length


def test_whitespace_in_answers_is_learned(collator, processor):
    batch = collator([row(([], " Why? ", "  a \n\n b  "))])
    assert learned(batch, processor) == [["   a \n\n b  </s>"]]


def test_answers_in_other_chat_formats_are_learned(tokenizer, processor, images, rows):
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}, False)
    chatml = FlashSlothProcessor(
        processor.image_processor, tokenizer, chat_template=CHATML, image_seq_length=4, num_query_tokens=3
    )
    hostile = row((images[:1], "<|im_start|>assistant\nHa<|im_end|>", "<|im_end|>"))
    batch = FlashSlothDataCollator(chatml)([*rows, hostile])
    assert learned(batch, chatml) == [
        ["A cat.<|im_end|>"],
        ["A sloth.<|im_end|>"],
        ["Yes.<|im_end|>", "No.<|im_end|>"],
        ["<|im_end|><|im_end|>"],
    ]
    assert batch["input_ids"][3].tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def test_five_tiles_take_five_times_the_tokens(processor, rows):
    split = pickle.loads(pickle.dumps(processor))
    split.image_processor.do_image_splitting = True
    batch = FlashSlothDataCollator(split)(rows[:1])
    assert batch["pixel_values"].shape == (5, 3, 32, 32)
    assert (batch["input_ids"] == split.image_token_id).sum() == 5 * split.image_seq_length
    assert learned(batch, split) == [[" A cat.</s>"]]


def test_text_alone_needs_no_images(collator, rows):
    assert "pixel_values" not in collator(rows[1:2])


def test_captions_have_no_question(collator, processor, images):
    rows = [{"image": images[0], "caption": "a cat</s>"}, {"images": images[1:3], "text": "two <image>"}]
    batch = collator(rows)
    assert learned(batch, processor) == [["a cat</s></s>"], ["two <image></s>"]]
    end, image = processor.tokenizer.eos_token_id, processor.image_token_id
    ids = [batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist() for i in (0, 1)]
    assert ids[0] == [image] * 4 + processor.tokenizer.convert_tokens_to_ids(list("aĠcat</s>")) + [end]
    assert ids[1][:9] == [image] * 8 + processor.tokenizer.convert_tokens_to_ids(["t"])


# ---- the golden cases ------------------------------------------------------------------------------------------------

PIECES = r" US(?=ER:)|ER(?=:)| ASS(?=IST)|IST(?=ANT)|ANT(?=:)| umb|rell|as(?=\.)|<\w+>|</s>|'s| ?\w+|[^\w\s]|\s"
"""Cuts the golden prompts into the pieces whose ids were recorded."""


@pytest.fixture(scope="module")
def golden():
    """A processor whose tokenizer returns the recorded ids of the golden cases."""
    ids = {"<|endoftext|>": 50256, "<learnable>": 50295, "</s>": 50296, "<image>": 50297}
    for name in ("turns", "batch", "mixed"):
        case = json.loads((GOLDEN / f"{name}.json").read_text())
        for prompt, recorded in zip(case["prompts"], case["input_ids"], strict=True):
            for piece, token_id in zip(re.findall(PIECES, prompt), recorded, strict=True):
                assert ids.setdefault(piece, token_id) == token_id
    backend = Tokenizer(models.WordLevel(vocab=ids, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    backend.add_special_tokens(["<|endoftext|>", "<learnable>", "</s>", "<image>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<|endoftext|>")
    return FlashSlothProcessor(FlashSlothImageProcessor(), tokenizer, image_seq_length=9, num_query_tokens=9)


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory):
    folder = write_golden_checkpoint(tmp_path_factory.mktemp("golden") / "original")
    return FlashSlothForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def as_messages(prompt, image):
    """The conversation that a golden prompt was rendered from; its system message is the default."""
    turns = re.findall(r"USER: (<image>\n)?(.*?)<learnable> ASSISTANT: (.*?)</s>", prompt)
    return row(*(([image] if placeholder else [], question, answer) for placeholder, question, answer in turns))


@pytest.mark.parametrize("name", ["turns", "batch", "mixed"])
def test_labels_of_the_golden_cases_give_the_recorded_loss(golden, golden_model, images, name):
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    batch = FlashSlothDataCollator(golden)([as_messages(prompt, images[0]) for prompt in case["prompts"]])
    for position, (recorded, starts) in enumerate(zip(case["input_ids"], case["query_starts"], strict=True)):
        expanded = [i for i in recorded for _ in range(9 if i in (50295, 50297) else 1)]
        assert batch["input_ids"][position][: len(expanded)].tolist() == expanded
        answers = [start + 9 + len([24994, 8808, 8643, 25]) for start in starts]  # after " ASSISTANT:"
        ends = [expanded.index(50296, answer) + 1 for answer in answers]
        expected = [i for start, end in zip(answers, ends, strict=True) for i in range(start, end)]
        assert (batch["labels"][position] != -100).nonzero().flatten().tolist() == expected
    shape = case["images"]["shape"]
    pixels = torch.from_numpy(np.clip(synthetic(case["images"]["synthetic"], shape), -1, 1))
    batch["pixel_values"] = pixels[: len(batch["pixel_values"])]
    with torch.no_grad():
        assert golden_model(**batch).loss.item() == pytest.approx(case["loss"], abs=1e-4)


# ---- truncation ------------------------------------------------------------------------------------------------------


def test_turns_that_do_not_fit_are_removed_with_their_images(processor, rows):
    whole = FlashSlothDataCollator(processor)(rows[2:])
    end = (whole["input_ids"][0] == processor.tokenizer.eos_token_id).nonzero()[0].item() + 1
    length = whole["input_ids"].shape[1]
    for max_length in (end, end + 1, length - 1):
        batch = FlashSlothDataCollator(processor, max_length=max_length)(rows[2:])
        assert torch.equal(batch["input_ids"], whole["input_ids"][:, :end])
        assert learned(batch, processor) == [[" Yes.</s>"]]
        assert torch.equal(batch["pixel_values"], whole["pixel_values"][:1])
    untouched = FlashSlothDataCollator(processor, max_length=length)(rows[2:])
    assert torch.equal(untouched["labels"], whole["labels"])


def test_all_turns_that_fit_are_kept(processor):
    sample = row(([], "One?", "a"), ([], "Two?", "b"), ([], "Three?", "c"))
    ids = FlashSlothDataCollator(processor)([sample])["input_ids"][0]
    ends = ((ids == processor.tokenizer.eos_token_id).nonzero().flatten() + 1).tolist()
    for count, max_length in enumerate(ends, start=1):
        batch = FlashSlothDataCollator(processor, max_length=max_length)([sample])
        assert learned(batch, processor) == [[" a</s>", " b</s>", " c</s>"][:count]]


def test_a_first_answer_that_is_too_long_is_cut(processor, rows):
    whole = FlashSlothDataCollator(processor)(rows[:1])
    max_length = whole["input_ids"].shape[1] - 3
    batch = FlashSlothDataCollator(processor, max_length=max_length)(rows[:1])
    assert learned(batch, processor) == [[" A ca"]]
    assert batch["input_ids"].shape[1] == max_length


def test_truncation_never_cuts_images_or_queries(processor, rows):
    start = (FlashSlothDataCollator(processor)(rows[2:])["labels"][0] != -100).nonzero()[0].item()
    for max_length in range(1, start + 60):
        collator = FlashSlothDataCollator(processor, max_length=max_length)
        if max_length <= start:
            with pytest.raises(
                BadRowError, match=rf"Row 2 .*take {start} tokens.*`max_length`={max_length}; raise `max_length`"
            ):
                collator(rows[2:])
            continue
        batch = collator(rows[2:])
        counts = [(batch["input_ids"] == i).sum().item() for i in (processor.image_token_id, processor.query_token_id)]
        assert counts in ([4, 3], [12, 6])
        assert (batch["labels"] != -100).any()
        assert len(batch["pixel_values"]) == counts[0] // 4


# ---- bad rows --------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_files(tmp_path, images):
    (tmp_path / "text.png").write_text("no image")
    images[0].save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    return tmp_path


BAD_ROWS = {
    "no file": (row((["none.png"], "Why?", "So.")), r"there is no image none\.png; set `image_folder`"),
    "no image": (row((["text.png"], "Why?", "So.")), "cannot identify image file"),
    "half an image": (row((["half.png"], "Why?", "So.")), "truncated"),
    "no answer": ({"messages": row(([], "Why?", ""))["messages"][:1]}, "the last message must be the assistant's"),
    "empty answer": (row(([], "Why?", " ")), "an answer is empty"),
    "no message": ({"messages": []}, "the last message must be the assistant's answer"),
    "placeholder": ({"conversations": [{"from": "human", "value": "<image>"}]}, "0 images, but 1 places"),
    "role": ({"conversations": [{"from": "robot", "value": "Hi"}]}, "a message has the role 'robot'"),
    "late system": (
        {"messages": [{"role": role, "content": "x"} for role in ("user", "system", "assistant")]},
        "found system",
    ),
    "columns": ({"question": "Why?"}, r"the row has the columns \['index', 'question'\]"),
    "reported": ({"error": "the line is not JSON"}, "the line is not JSON"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_raise_an_error(collator, broken_files, monkeypatch, name):
    monkeypatch.chdir(broken_files)
    bad, reason = BAD_ROWS[name]
    with pytest.raises(BadRowError, match=rf'Row 17 cannot be used: (?s:.*){reason}(?s:.*)pass on_bad_row="skip"'):
        collator([bad | {"index": 17}])


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_skipped_if_asked(collator, processor, rows, broken_files, monkeypatch, caplog, name):
    monkeypatch.chdir(broken_files)
    bad, reason = BAD_ROWS[name]
    with caplog.at_level(logging.WARNING):
        batch = FlashSlothDataCollator(processor, on_bad_row="skip")([rows[0], bad | {"index": 17}, rows[2]])
    expected = collator([rows[0], rows[2]])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert re.search(rf"Row 17 cannot be used: (?s:.*){reason}(?s:.*)It is skipped", caplog.text)


def test_a_row_without_an_index_is_named_by_its_position_in_the_batch(collator, rows):
    with pytest.raises(BadRowError, match=r"A row without an index \(1 in its batch\)"):
        collator([rows[0], {"messages": []}])


def test_a_batch_of_only_bad_rows_has_a_finite_loss(processor, make_model):
    batch = FlashSlothDataCollator(processor, on_bad_row="skip")([{"messages": []}])
    model = make_model().train()
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert learned(batch, processor) == [["</s>"]]


def test_a_template_that_does_not_mark_answers_is_refused(processor):
    unmarked = re.sub(r"\{%-? (end)?generation -?%\}", "", processor.chat_template)
    processor = FlashSlothProcessor(processor.image_processor, processor.tokenizer, chat_template=unmarked)
    with pytest.raises(ValueError, match=r"does not mark answers.*inside `{% generation %}`"):
        FlashSlothDataCollator(processor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_bad_row": "ignore"}, 'must be "raise" or "skip", but is \'ignore\''),
        ({"max_length": 0}, "`max_length` must be at least 1 token, but is 0"),
    ],
)
def test_unknown_choices_are_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        FlashSlothDataCollator(processor, **arguments)


# ---- loaders and Trainer ---------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path, images):
    """Twelve rows in LLaVA's form: every third is text only, and one has lost its image."""
    lines = []
    for i in range(12):
        image = {} if i % 3 == 0 else {"image": f"{i}.png"}
        images[i % 4].save(tmp_path / f"{i}.png")
        question = ("<image>\n" if image else "") + f"Question {i}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "x" * (i + 1)}]
        lines.append(json.dumps(image | {"id": i, "conversations": turns}))
    (tmp_path / "7.png").unlink()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_make_the_same_batches(processor, file, streaming):
    collator = FlashSlothDataCollator(processor, on_bad_row="skip")
    rows = load_rows(file, streaming=streaming)
    expected, found = (list(DataLoader(rows, 2, collate_fn=collator, num_workers=n)) for n in (0, 2))
    assert len(found) == 6
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_rows_and_collator_can_be_pickled(processor, file):
    rows, collator = pickle.loads(pickle.dumps((load_rows(file), FlashSlothDataCollator(processor))))
    assert learned(collator([rows[1]]), processor) == [[" xx</s>"]]


def test_embedded_images_reach_the_batch(collator, tmp_path, images):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": [images[0]], "caption": ["a cat"]}, features=features)
    table.to_parquet(tmp_path / "rows.parquet")
    expected = collator([{"image": images[0], "caption": "a cat"}])
    batch = collator(list(load_rows(tmp_path / "rows.parquet", streaming=True)))
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_rotation_metadata_is_applied_to_embedded_images_too(collator, tmp_path, images):
    (exif := Image.Exif())[0x0112] = 6  # rotate by 90° clockwise
    images[0].save(tmp_path / "turned.png", exif=exif)
    forms = [str(tmp_path / "turned.png"), (tmp_path / "turned.png").as_uri()]
    forms.append({"bytes": (tmp_path / "turned.png").read_bytes()})
    expected = collator([{"image": images[0].transpose(Image.Transpose.ROTATE_270), "caption": "a cat"}])
    for form in forms:
        assert torch.equal(collator([{"image": form, "caption": "a cat"}])["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("streaming", [False, True])
def test_the_trainer_takes_rows_and_collator(processor, make_model, file, tmp_path, streaming):
    model = make_model()
    arguments = TrainingArguments(
        tmp_path / "out",
        per_device_train_batch_size=1,  # so that the bad row is a whole batch
        max_steps=14,
        learning_rate=1e-3,
        logging_steps=1,
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="random" if streaming else "group_by_length",
    )
    trainer = (Trainer if streaming else FlashSlothTrainer)(
        model,
        arguments,
        data_collator=FlashSlothDataCollator(processor, on_bad_row="skip"),
        train_dataset=load_rows(file, streaming=streaming),
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 14
    assert np.isfinite(losses).all()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    if not streaming:
        sampler = trainer.callback_handler.train_dataloader.batch_sampler.sampler
        assert (type(sampler), sampler.epoch) == (ModalityLengthSampler, 1)
