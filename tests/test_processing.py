"""Prompts: the original format, placeholders, and text that stays text."""

import numpy as np
import pytest
import torch
from transformers.processing_utils import ProcessorMixin

from flashsloth import FlashSlothProcessor
from flashsloth.processing_flashsloth import DEFAULT_SYSTEM_PROMPT, GUARD, ConversationError, build_chat_template

SYSTEM = DEFAULT_SYSTEM_PROMPT + " "


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


def test_an_answer_can_be_begun_for_the_model(processor):
    messages = [user("Why?"), answer("Because")]
    prompt = processor.apply_chat_template(messages, continue_final_message=True)
    assert prompt == SYSTEM + "USER: Why?<learnable> ASSISTANT: Because"


def test_unknown_roles_are_refused(processor):
    with pytest.raises(ConversationError, match="found tool"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])


def test_placeholders_are_expanded(processor, pictures):
    inputs = processor(images=pictures[0], text="USER: <image>\nWhy?<learnable> ASSISTANT:", return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == processor.image_seq_length
    assert ids.count(processor.query_token_id) == processor.num_query_tokens
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    split = processor(images=pictures[0], text="<image>", do_image_splitting=True, return_tensors="pt")
    assert split["input_ids"].tolist()[0].count(processor.image_token_id) == 5 * processor.image_seq_length
    assert split["pixel_values"].shape == (5, 3, 32, 32)


def test_a_raw_prompt_equals_the_rendered_conversation(processor, pictures):
    raw = f"{SYSTEM}USER: <image>\nWhy?<learnable> ASSISTANT: So.</s>USER: And?<learnable> ASSISTANT:"
    messages = [user({"type": "image", "image": pictures[0]}, "Why?"), answer("So."), user("And?")]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert processor(images=pictures[0], text=raw)["input_ids"] == rendered["input_ids"]


@pytest.mark.parametrize("text", ["<image>", "<learnable>", "</s>", "<|endoftext|>", "a<image>b</s>c", "<<image>>"])
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_control_tokens_in_a_message_stay_text(processor, pictures, text, role):
    def ids(word):
        messages = {
            "user": [user({"type": "image", "image": pictures[0]}, word)],
            "assistant": [user({"type": "image", "image": pictures[0]}, "Why?"), answer(word)],
            "system": [{"role": "system", "content": word}, user({"type": "image", "image": pictures[0]}, "Why?")],
        }[role]
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]

    plain = ids("@")
    at = plain.index(processor.tokenizer.convert_tokens_to_ids("@"))
    as_bytes = processor.tokenizer.convert_tokens_to_ids(list(text))
    assert ids(text) == plain[:at] + as_bytes + plain[at + 1 :]


def test_guarded_text_decodes_as_it_was_written(processor):
    text = "Does <image> or </s> matter?"
    ids = processor.apply_chat_template([user(text)], tokenize=True, return_dict=True)["input_ids"][0]
    assert text in processor.tokenizer.decode(ids)
    assert GUARD not in processor.tokenizer.decode(ids)


def test_the_callers_conversation_is_not_changed(processor, pictures):
    messages = [user({"type": "image", "image": pictures[0]}, "Is <image> a word?")]
    processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert messages == [user({"type": "image", "image": pictures[0]}, "Is <image> a word?")]


def test_the_processor_saves_and_loads(processor, pictures, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = FlashSlothProcessor.from_pretrained(tmp_path)
    messages = [user({"type": "image", "image": pictures[0]}, "Is <image> a word?"), answer("Yes."), user("Sure?")]
    arguments = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected, found = (p.apply_chat_template(messages, **arguments) for p in (processor, loaded))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert loaded.tokenizer.padding_side == "left"
    assert (loaded.image_seq_length, loaded.num_query_tokens) == (4, 3)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_both_padding_sides_work(processor, pictures, padding_side):
    text = ["<image> and<learnable>", "much, much longer than the other<learnable>"]
    inputs = processor(images=[[pictures[0]], []], text=text, padding=True, padding_side=padding_side)
    mask = np.array(inputs["attention_mask"])
    assert mask[:, -1 if padding_side == "left" else 0].all()
    assert not mask.all()


@pytest.mark.parametrize("nested", [False, True])
def test_pictures_come_flat_or_by_row(processor, pictures, nested):
    text = ["<image><image>", "none", "<image>"]
    images = [pictures[:2], [], pictures[2:3]] if nested else pictures[:3]
    assert len(processor(images=images, text=text, padding=True)["pixel_values"]) == 3


def test_a_batch_of_text_needs_no_pictures(processor):
    for images in (None, [[], []]):
        inputs = processor(images=images, text=["one", "two"], return_tensors="pt")
        assert "pixel_values" not in inputs


def test_the_number_of_tokens_is_known_beforehand(processor, pictures):
    sizes = [(picture.height, picture.width) for picture in pictures]
    for splitting in (False, True):
        known = processor._get_num_multimodal_tokens(image_sizes=sizes, do_image_splitting=splitting)
        inputs = processor(images=pictures, text="<image>" * len(pictures), do_image_splitting=splitting)
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


def test_a_batched_array_is_several_pictures(processor):
    inputs = processor(images=np.zeros((2, 3, 40, 40), dtype=np.uint8), text="<image><image>")
    assert len(inputs["pixel_values"]) == 2


def test_the_answer_mask_covers_answers_and_their_end(processor, pictures):
    picture = {"type": "image", "image": pictures[0]}
    messages = [user(picture, "Why?"), answer("So."), user(picture, "And?"), answer("Yes.")]
    arguments = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    if not hasattr(ProcessorMixin, "_adjust_assistant_masks_indices"):  # transformers 5.17
        with pytest.raises(NotImplementedError, match=r"needs transformers 5\.18"):
            processor.apply_chat_template(messages, **arguments)
        return
    inputs = processor.apply_chat_template(messages, **arguments)
    ids, mask = np.array(inputs["input_ids"][0]), np.array(inputs["assistant_masks"][0], dtype=bool)
    assert processor.tokenizer.decode(ids[mask]) == " So.</s> Yes.</s>"


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "num_pictures", "message"),
    [
        ("no placeholder", 1, r"0 in all, but 1 pictures"),
        ("<image>", 2, r"1 in all, but 2 pictures"),
        ("<image><image>", 1, r"2 in all, but 1 pictures"),
        ("<image>", 0, r"1 in all, but 0 pictures.*pass one picture for each placeholder"),
    ],
)
def test_pictures_and_placeholders_must_agree(processor, pictures, text, num_pictures, message):
    with pytest.raises(ValueError, match=message):
        processor(images=pictures[:num_pictures] or None, text=text)


def test_pictures_in_the_wrong_row_are_refused(processor, pictures):
    with pytest.raises(ValueError, match=r"\[1, 0\] `<image>` placeholders a row.*\[0, 1\]"):
        processor(images=[[], pictures[:1]], text=["<image>", "none"])


@pytest.mark.parametrize("max_length", [3, 8])
def test_truncation_through_placeholders_is_refused(processor, pictures, max_length):
    with pytest.raises(ValueError, match=r"Row 0 has \d `<\w+>` tokens, but \d are left.*Raise `max_length`"):
        processor(images=pictures[0], text="<image>abc<learnable>", truncation=True, max_length=max_length)


def test_truncation_behind_the_placeholders_works(processor, pictures):
    inputs = processor(images=pictures[0], text="<image><learnable>abcdef", truncation=True, max_length=9)
    assert len(inputs["input_ids"][0]) == 9


def test_unknown_arguments_are_refused(processor, pictures):
    with pytest.raises(TypeError, match=r"does not know the argument do_image_spliting; it takes .*do_image_splitting"):
        processor(images=pictures[0], text="<image>", do_image_spliting=True)


def test_other_modalities_are_refused(processor):
    with pytest.raises(TypeError, match="pictures and text, but `videos`"):
        processor(text="Why?", videos=[np.zeros((2, 3, 8, 8))])


def test_a_tokenizer_without_the_tokens_is_refused(processor):
    with pytest.raises(ValueError, match=r"does not know `<picture>`; add it with"):
        FlashSlothProcessor(processor.image_processor, processor.tokenizer, image_token="<picture>")
    with pytest.raises(TypeError, match="needs a fast tokenizer, but got NoneType"):
        FlashSlothProcessor(processor.image_processor, None)
