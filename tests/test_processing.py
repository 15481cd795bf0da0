"""Prompts have the original format, placeholders are expanded, and the user's text stays text."""

import base64
import copy
import dataclasses
import io
import json
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from jinja2 import TemplateError
from transformers.utils import logging

from flashsloth import FlashSlothProcessor
from flashsloth.processing_flashsloth import DEFAULT_SYSTEM_PROMPT, GUARD, ConversationError, build_chat_template

ROOT = Path(__file__).parents[1]
SYSTEM = DEFAULT_SYSTEM_PROMPT + " "
TOKENIZED = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def answer(text):
    return {"role": "assistant", "content": text}


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([user(IMAGE, "Why?")], "USER: <image>\nWhy?<learnable>"),
        ([user("Why?")], "USER: Why?<learnable>"),
        ([{"role": "user", "content": "Why?"}], "USER: Why?<learnable>"),
        ([user(IMAGE, "")], "USER: <image>\n<learnable>"),
        ([user(IMAGE, IMAGE, "Why?")], "USER: <image>\n<image>\nWhy?<learnable>"),
        ([user("Why?", IMAGE)], "USER: <image>\nWhy?<learnable>"),
        (
            [user(IMAGE, "Why?"), answer("So."), user("And?")],
            "USER: <image>\nWhy?<learnable> ASSISTANT: So.</s>USER: And?<learnable>",
        ),
    ],
)
def test_conversations_have_the_original_format(processor, messages, prompt):
    assert processor.apply_chat_template(messages) == SYSTEM + prompt
    asked = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert asked == SYSTEM + prompt + " ASSISTANT:"


def test_a_system_message_replaces_the_default(processor):
    messages = [{"role": "system", "content": "Be brief."}, user("Why?")]
    assert processor.apply_chat_template(messages) == "Be brief. USER: Why?<learnable>"
    empty = processor.apply_chat_template([user("Why?")], chat_template=build_chat_template(""))
    assert empty == "USER: Why?<learnable>"


def test_a_started_answer_ends_the_prompt(processor):
    messages = [user("Why?"), answer("Because")]
    prompt = processor.apply_chat_template(messages, continue_final_message=True)
    assert prompt == SYSTEM + "USER: Why?<learnable> ASSISTANT: Because"


def test_unknown_roles_are_refused(processor):
    with pytest.raises(ConversationError, match="found tool"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])


def test_placeholders_are_expanded(processor, images):
    inputs = processor(images=images[0], text="USER: <image>\nWhy?<learnable> ASSISTANT:", return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == processor.image_seq_length
    assert ids.count(processor.query_token_id) == processor.num_query_tokens
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    split = processor(images=images[0], text="<image>", do_image_splitting=True, return_tensors="pt")
    assert split["input_ids"].tolist()[0].count(processor.image_token_id) == 5 * processor.image_seq_length
    assert split["pixel_values"].shape == (5, 3, 32, 32)


def test_a_raw_prompt_equals_the_rendered_conversation(processor, images):
    raw = f"{SYSTEM}USER: <image>\nWhy?<learnable> ASSISTANT: So.</s>USER: And?<learnable> ASSISTANT:"
    messages = [user({"type": "image", "image": images[0]}, "Why?"), answer("So."), user("And?")]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert processor(images=images[0], text=raw)["input_ids"] == rendered["input_ids"]


@pytest.mark.parametrize("text", ["<image>", "<learnable>", "</s>", "<|endoftext|>", "a<image>b</s>c", "<<image>>"])
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_control_tokens_in_a_message_stay_text(processor, images, text, role):
    def ids(word):
        messages = {
            "user": [user({"type": "image", "image": images[0]}, word)],
            "assistant": [user({"type": "image", "image": images[0]}, "Why?"), answer(word)],
            "system": [{"role": "system", "content": word}, user({"type": "image", "image": images[0]}, "Why?")],
        }[role]
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]

    plain = ids("@")
    at = plain.index(processor.tokenizer.convert_tokens_to_ids("@"))
    as_bytes = processor.tokenizer.convert_tokens_to_ids(list(text))
    assert ids(text) == plain[:at] + as_bytes + plain[at + 1 :]


def test_guarded_text_decodes_unchanged(processor):
    text = "Does <image> or </s> matter?"
    ids = processor.apply_chat_template([user(text)], tokenize=True, return_dict=True)["input_ids"][0]
    assert text in processor.tokenizer.decode(ids)
    assert GUARD not in processor.tokenizer.decode(ids)


def test_the_callers_conversation_is_not_changed(processor, images):
    messages = [user({"type": "image", "image": images[0]}, "Is <image> a word?")]
    processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert messages == [user({"type": "image", "image": images[0]}, "Is <image> a word?")]


def test_the_processor_saves_and_loads(processor, images, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = FlashSlothProcessor.from_pretrained(tmp_path)
    messages = [user({"type": "image", "image": images[0]}, "Is <image> a word?"), answer("Yes."), user("Sure?")]
    arguments = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected, found = (p.apply_chat_template(messages, **arguments) for p in (processor, loaded))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert loaded.tokenizer.padding_side == "left"
    assert (loaded.image_seq_length, loaded.num_query_tokens) == (4, 3)


def test_a_tokenizer_without_model_max_length_gets_the_models_positions(tmp_path):
    for name in ("config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja"):
        shutil.copy(ROOT / name, tmp_path)
    settings = json.loads((ROOT / "tokenizer_config.json").read_text())
    assert settings.pop("model_max_length") == 1024
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert FlashSlothProcessor.from_pretrained(tmp_path).tokenizer.model_max_length == 1024


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_both_padding_sides_work(processor, images, padding_side):
    text = ["<image> and<learnable>", "much, much longer than the other<learnable>"]
    inputs = processor(images=[[images[0]], []], text=text, padding=True, padding_side=padding_side)
    mask = np.array(inputs["attention_mask"])
    assert mask[:, -1 if padding_side == "left" else 0].all()
    assert not mask.all()


def test_encode_conversations_pads_on_the_left_and_passes_its_options_on(processor, images):
    conversations = [[user({"type": "image", "image": images[0]}, "Why?")], [user("A longer question, or so?")]]
    arguments = {"add_generation_prompt": True, **TOKENIZED}
    for splitting in (False, True):
        images_kwargs = {"do_image_splitting": splitting}
        expected = processor.apply_chat_template(
            conversations,
            processor_kwargs={"padding": True, "padding_side": "left", "images_kwargs": images_kwargs},
            **arguments,
        )
        found = processor.encode_conversations(conversations, padding=True, images_kwargs=images_kwargs)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    expected, found = (
        processor.apply_chat_template(conversations[0], **arguments),
        processor.encode_conversations(conversations[0]),
    )
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("nested", [False, True])
def test_images_may_be_a_flat_list_or_a_list_per_row(processor, images, nested):
    text = ["<image><image>", "none", "<image>"]
    given = [images[:2], [], images[2:3]] if nested else images[:3]
    assert len(processor(images=given, text=text, padding=True)["pixel_values"]) == 3


def test_a_batch_of_text_needs_no_images(processor):
    for images in (None, [[], []]):
        inputs = processor(images=images, text=["one", "two"], return_tensors="pt")
        assert "pixel_values" not in inputs


def test_the_number_of_tokens_is_known_without_the_images(processor, images):
    sizes = [(image.height, image.width) for image in images]
    for splitting in (False, True):
        known = processor._get_num_multimodal_tokens(image_sizes=sizes, do_image_splitting=splitting)
        inputs = processor(images=images, text="<image>" * len(images), do_image_splitting=splitting)
        assert sum(known["num_image_tokens"]) == inputs["input_ids"][0].count(processor.image_token_id)
        assert sum(known["num_image_patches"]) == len(inputs["pixel_values"])


def test_answers_are_decoded_without_control_tokens(processor):
    ids = processor.tokenizer(["<image>USER: Why?<learnable> ASSISTANT: So.</s><|endoftext|>"])["input_ids"]
    assert processor.post_process_image_text_to_text(ids) == ["USER: Why? ASSISTANT: So."]


def test_replacement_offsets_point_at_the_expanded_text(processor):
    text = "a <image> b<learnable> c<image>"
    (expanded,), (offsets,) = processor.get_text_with_replacements([text], ["IMAGE1", "2"])
    assert expanded == "a IMAGE1 b" + "<learnable>" * 3 + " c2"
    for offset in offsets:
        assert text[slice(*offset["span"])] == offset["text"]
        assert expanded[slice(*offset["new_span"])] == offset["replacement"]


def test_an_array_with_a_batch_axis_is_several_images(processor):
    inputs = processor(images=np.zeros((2, 3, 40, 40), dtype=np.uint8), text="<image><image>")
    assert len(inputs["pixel_values"]) == 2


def test_the_answer_mask_covers_answers_and_their_end(processor, images):
    image = {"type": "image", "image": images[0]}
    messages = [user(image, "Why?"), answer("So."), user(image, "And?"), answer("Yes.")]
    arguments = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    if transformers.__version__.startswith("5.17"):
        with pytest.raises(NotImplementedError, match=r"needs transformers 5\.18"):
            processor.apply_chat_template(messages, **arguments)
        return
    inputs = processor.apply_chat_template(messages, **arguments)
    ids, mask = np.array(inputs["input_ids"][0]), np.array(inputs["assistant_masks"][0], dtype=bool)
    assert processor.tokenizer.decode(ids[mask]) == " So.</s> Yes.</s>"


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "num_images", "message"),
    [
        ("no placeholder", 1, r"0 in total, but 1 images"),
        ("<image>", 2, r"1 in total, but 2 images"),
        ("<image><image>", 1, r"2 in total, but 1 images"),
        ("<image>", 0, r"1 in total, but 0 images.*pass one image for each placeholder"),
    ],
)
def test_images_and_placeholders_must_agree(processor, images, text, num_images, message):
    with pytest.raises(ValueError, match=message):
        processor(images=images[:num_images] or None, text=text)


def test_images_in_the_wrong_row_are_refused(processor, images):
    with pytest.raises(ValueError, match=r"\[1, 0\] `<image>` placeholders per row.*\[0, 1\]"):
        processor(images=[[], images[:1]], text=["<image>", "none"])


@pytest.mark.parametrize("max_length", [3, 8])
def test_truncation_through_placeholders_is_refused(processor, images, max_length):
    with pytest.raises(ValueError, match=r"Row 0 has \d `<\w+>` tokens, but only \d after.*Raise `max_length`"):
        processor(images=images[0], text="<image>abc<learnable>", truncation=True, max_length=max_length)


def test_truncation_after_the_placeholders_works(processor, images):
    inputs = processor(images=images[0], text="<image><learnable>abcdef", truncation=True, max_length=9)
    assert len(inputs["input_ids"][0]) == 9


def test_unknown_arguments_are_refused(processor, images):
    with pytest.raises(TypeError, match=r"does not know the argument do_image_spliting; it takes .*do_image_splitting"):
        processor(images=images[0], text="<image>", do_image_spliting=True)


def test_other_modalities_are_refused(processor):
    with pytest.raises(TypeError, match="images and text, but `videos`"):
        processor(text="Why?", videos=[np.zeros((2, 3, 8, 8))])


def test_a_tokenizer_without_the_placeholder_tokens_is_refused(processor):
    with pytest.raises(ValueError, match=r"has no token `<img>`; add it with"):
        FlashSlothProcessor(processor.image_processor, processor.tokenizer, image_token="<img>")
    with pytest.raises(TypeError, match="needs a fast tokenizer, but got NoneType"):
        FlashSlothProcessor(processor.image_processor, None)


TEXT = {"type": "text", "text": "Why?"}


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"type": "img", "image": "x.png"}, TEXT], "Part 0 of message 0 .*'text', 'image' or 'video'.*type 'img'"),
        ([TEXT, {"type": "picture"}], "Part 1 of message 0 .*of type 'picture'"),
        ([{"type": "audio", "audio": "x.wav"}, TEXT], "of type 'audio'"),
        ([{"type": ["image"]}, TEXT], r"of type \['image'\]"),
        ([{"type": None, "text": "Why?"}], "`type`.*is {'type': None"),
        ([{"text": "Why?"}], "`type`.*but is {'text': 'Why\\?'}"),
        ([{"image": "x.png"}, TEXT], "`type`.*but is {'image': 'x.png'}"),
        (["Why?"], "`type`.*such as {'type': 'text', 'text': '...'}, but is 'Why\\?'"),
        ([[TEXT]], "`type`.*but is "),
        ([None], "`type`.*but is None"),
        ([{"type": "text"}], "a string as `text`, but has None"),
        ([{"type": "text", "text": None}], "a string as `text`, but has None"),
        ([{"type": "text", "text": 42}], "a string as `text`, but has 42"),
        ([{"type": "text", "text": ["Why?"]}], "a string as `text`"),
        ([{"type": "text", "text": "Why?", "image": "x.png"}], "type 'text', but also has image"),
        ([{"type": "image", "image": "x.png", "text": "Why?"}], "type 'image', but also has `text`"),
        ([{"type": "image", "image": "x.png", "url": "y.png"}, TEXT], "one of image, url, .*, but has image, url"),
        ([{"type": "image", "video": "x.gif"}, TEXT], "one of image, url, .*, but has video"),
        ([{"type": "video", "file": "x.gif"}, TEXT], "one of video, url, path, video_url, but has none"),
        ([TEXT, {"type": "image", "image": 3}], "Part 1 of message 0, of type 'image'.*a base64 string, but has 3"),
        ([{"type": "image", "image": {"file": "x.png"}}], "of type 'image'.*but has {'file': 'x.png'}"),
        ([], "has neither text nor an image"),
        ((), "has neither text nor an image"),
        (None, "`content` of message 0 should be text or a list of parts, but is None"),
        (42, "`content` of message 0 .*is 42"),
        (TEXT, "`content` of message 0 .*is {'type'"),
    ],
)
def test_content_that_would_vanish_or_become_none_is_refused(processor, content, reason, tokenize):
    with pytest.raises(ConversationError, match=reason):
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=tokenize)


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([], "at least one message, but is \\[\\]"),
        ([[]], "messages of conversation 0 should be a list with at least one message, but are \\[\\]"),
        (user("Why?"), r"list.*such as \[\{'role'"),
        ("Why?", r"list.*such as .*is 'Why\?'|is 'Why\?'"),
        (None, "is None"),
        ([[[user("Why?")]]], "Message 0 of conversation 0 should be a dict"),
        ([[user("Why?")], user("Why?")], "messages of conversation 1 should be a list"),
        ([user("Why?"), [user("Why?")]], "Message 1 should be a dict"),
        (["Why?"], "Message 0 should be a dict with a `role`.*is 'Why"),
        ([{"content": "Why?"}], "Message 0 should be a dict with a `role`"),
        ([{"role": None, "content": "Why?"}], "Message 0 should be a dict with a `role`"),
        ([{"role": "user"}], "`content` of message 0 .*is None"),
        ([user("Why?"), answer(None)], "`content` of message 1 .*is None"),
        ([{"role": "system", "content": None}, user("Why?")], "`content` of message 0 .*is None"),
        ([{"role": "User", "content": "Why?"}], "found User"),
        ([user("Why?"), {"role": "system", "content": "Be brief."}], "system in the first message"),
        ([user("Why?"), {"role": "assistant", "content": [IMAGE]}], "of role 'assistant'.*only in user messages"),
        ([{"role": "system", "content": [IMAGE]}, user("Why?")], "of role 'system'.*only in user messages"),
        ([user("Why?"), {"role": "assistant", "content": [{"type": "video", "path": "x"}]}], "of role 'assistant'"),
        ([user({"type": "video", "video": 3}, "Why?")], "Expected a video as a path.*found int"),
    ],
)
@pytest.mark.parametrize("tokenize", [False, True])
def test_a_malformed_conversation_is_refused(processor, conversation, reason, tokenize):
    with pytest.raises(ConversationError, match=reason):
        processor.apply_chat_template(conversation, tokenize=tokenize)


@pytest.mark.parametrize("part", [{"type": "image"}, {"type": "image", "source": "x.png"}, {"type": "image_url"}])
def test_an_image_without_a_source_is_allowed_only_if_images_are_passed_separately(processor, images, part):
    messages = [user(part, "Why?")]
    prompt = processor.apply_chat_template(messages)
    assert prompt == f"{SYSTEM}USER: <image>\nWhy?<learnable>"
    assert "pixel_values" in processor(text=prompt, images=images[0])
    with pytest.raises(ConversationError, match="should have one of image, url, path, base64, image_url, but has "):
        processor.apply_chat_template(messages, tokenize=True)


def encoded(image):
    image.save(file := io.BytesIO(), "png")
    return base64.b64encode(file.getvalue()).decode()


def test_every_key_of_an_image_is_read_and_keys_that_are_none_are_ignored(processor, images, tmp_path):
    image, text = images[0], encoded(images[0])
    image.save(file := tmp_path / "1.png")
    url = f"data:image/png;base64,{text}"
    as_datasets_fills_it = dict.fromkeys(["image", "url", "path", "base64", "image_url", "text", "video", "index"])
    parts = [
        {"type": "image", "image": image},
        {"type": "image", "image": str(file), "detail": "low", "index": 0},
        {"type": "image", "path": file},
        {"type": "image", "url": file.as_uri()},
        {"type": "image", "base64": text},
        {"type": "image", "image_url": {"url": url}},
        {"type": "image_url", "image_url": {"url": url, "detail": None}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {**as_datasets_fills_it, "type": "image", "image": image},
        {**as_datasets_fills_it, "type": "image", "path": str(file), "image_url": {"url": None}, "text": ""},
    ]
    expected = processor.apply_chat_template([user(parts[0], "Why?")], **TOKENIZED)
    texts = [
        TEXT,
        {**as_datasets_fills_it, **TEXT},
        {**TEXT, "image": "", "image_url": {"url": None}},
        {"type": "input_text", "text": "Why?"},
    ]
    for part, question in [*((part, TEXT) for part in parts), *((parts[0], text) for text in texts)]:
        given = [{"role": "user", "content": [part, question], "name": None, "tool_calls": None}]
        found = processor.apply_chat_template(given, **TOKENIZED)
        assert all(torch.equal(expected[name], found[name]) for name in expected), part


def test_rows_of_datasets_are_conversations(processor, images):
    datasets = pytest.importorskip("datasets")
    messages = [user({"type": "image", "url": f"data:;base64,{encoded(images[0])}"}, "Why?"), answer("So.")]
    messages[1]["content"] = [{"type": "text", "text": "So."}]
    row = datasets.Dataset.from_list([{"messages": messages}])[0]
    assert row["messages"][0]["content"][1] == {"type": "text", "url": None, "text": "Why?"}
    expected, found = (processor.apply_chat_template(m, **TOKENIZED) for m in (messages, row["messages"]))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_messages_may_be_objects_whose_text_stays_text(processor):
    @dataclasses.dataclass
    class Message:
        role: str
        content: str
        tool_calls: list | None = None

    pydantic = pytest.importorskip("pydantic")
    made = pydantic.create_model("Said", role=(str, "assistant"), content=(str, "So</s>"), refusal=(None, None))()
    messages = [Message("user", "Is <image> a word?"), made, user("Sure?")]
    prompt = processor.apply_chat_template(messages)
    assert prompt.replace(GUARD, "") == (
        f"{SYSTEM}USER: Is <image> a word?<learnable> ASSISTANT: So</s></s>USER: Sure?<learnable>"
    )
    assert prompt.count(GUARD) == 2


@pytest.mark.parametrize("text", [42, ["Why?", None], [None], [42], [["Why?"]]])
def test_a_text_that_is_not_a_string_is_refused(processor, images, text):
    for given in (None, images[0]):
        with pytest.raises(TypeError, match=r"must be a string or a list of strings.*but has (None|42|\['Why\?'\])"):
            processor(text=text, images=given)
    with pytest.raises(ValueError, match="at least one input"):
        processor(text=None)


def test_an_answer_or_a_system_message_may_be_empty(processor):
    for empty in ("", []):
        messages = [{"role": "system", "content": empty}, user("Why?"), {"role": "assistant", "content": empty}]
        assert processor.apply_chat_template(messages) == "USER: Why?<learnable> ASSISTANT: </s>"


@pytest.mark.parametrize(
    "part", [{"type": "img"}, {"type": "picture", "image": "x.png"}, {"text": "Why?"}, {"type": "text", "text": None}]
)
def test_the_chat_template_itself_refuses_parts_that_it_would_drop(processor, part):
    render = processor.tokenizer.apply_chat_template
    with pytest.raises(TemplateError, match="FlashSloth reads parts of type text"):
        render([user(part, "Why?")], chat_template=processor.chat_template, tokenize=False)
    with pytest.raises(TemplateError, match="a part of type image in a message of role assistant"):
        messages = [user("Why?"), {"role": "assistant", "content": [IMAGE]}]
        render(messages, chat_template=processor.chat_template, tokenize=False)


def test_the_shipped_chat_template_is_the_one_that_is_built():
    assert (ROOT / "chat_template.jinja").read_text(encoding="utf-8") == build_chat_template("")


# ---- prompts without query tokens ------------------------------------------------------------------------------------


@pytest.fixture
def warnings_of(caplog, monkeypatch):
    """Calls a function and returns the warnings that it logs."""
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)

    def call(function, *args, **kwargs):
        logging.get_logger("flashsloth").warning_once.cache_clear()
        caplog.clear()
        function(*args, **kwargs)
        return [record.getMessage() for record in caplog.records]

    return call


@pytest.mark.parametrize(
    "prompt", ["USER: <image>\nWhy? ASSISTANT:", "<image>Why?", "Why? <image>", "<image>\nA</s>B:"]
)
def test_a_prompt_with_an_image_but_no_query_tokens_causes_one_warning(processor, images, warnings_of, prompt):
    def ask():
        for _ in range(3):
            processor(text=[prompt, f"{prompt}<learnable>"], images=images[:2], padding=True)

    (warning,) = warnings_of(ask)
    assert (
        "Add `<learnable>` after every question, as in 'USER: <image>\\nWhat is it?<learnable> ASSISTANT:'" in warning
    )


@pytest.mark.parametrize(
    "prompt", ["<image>a red cube</s>", "<image>a red cube</s>\n", "<image>", "<image><learnable>"]
)
def test_training_captions_need_no_query_tokens_and_cause_no_warning(processor, images, warnings_of, prompt):
    assert warnings_of(processor, text=prompt, images=images[0]) == []
    assert warnings_of(processor, text="Why?") == []


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def frequent_thread_switches():
    """Switch between threads as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("frequent_thread_switches")
def test_threads_with_different_padding_do_not_affect_each_other(processor, images):
    texts = ["<image>Why?<learnable>", "a" * 500]
    given = [images[:1], []]
    calls = [
        lambda: processor(text=texts, images=given, padding=True, return_tensors="pt"),
        lambda: processor(text=texts, images=given),
        lambda: processor(text=texts, images=given, padding=True, truncation=True, max_length=100),
        lambda: processor.tokenizer(texts, padding="max_length", max_length=600),
        lambda: processor.post_process_image_text_to_text([list(range(20))] * 4),
    ]
    plain = [str(call()) for call in calls]

    def work(thread):
        numbers = [(thread + turn) % len(calls) for turn in range(40)]
        return [number for number in numbers if str(calls[number]()) != plain[number]]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(8))) == [[]] * 8


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copied_processor_works_and_is_independent(processor, images, duplicate):
    twin = duplicate(processor)
    assert twin.tokenizer is not processor.tokenizer
    twin.tokenizer.add_tokens(["zebra"])
    assert twin.tokenizer.convert_ids_to_tokens(twin(text="zebra")["input_ids"][0]) == ["zebra"]
    assert len(processor(text="zebra")["input_ids"][0]) == 5
    messages = [user({"type": "image", "image": images[0]}, "Why?")]
    expected, found = (p.apply_chat_template(messages, **TOKENIZED) for p in (processor, twin))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
