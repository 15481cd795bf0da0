"""`generate` gives the same answer in every mode, with any batch, padding and cache."""

import copy
import functools

import pytest
import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache, TextIteratorStreamer

from flashsloth.generation_flashsloth import CACHE_NAME, CACHE_NAMES

NEW = 8
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def answers(model, inputs, **kwargs):
    """New tokens of every row."""
    output = model.generate(**inputs, **{**GREEDY, **kwargs})
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def scores_of(model, inputs, **kwargs):
    """Scores of every step, `(batch, steps, vocabulary)`."""
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True, **kwargs)
    return torch.stack(output.logits, dim=1)


def test_a_batch_answers_like_its_rows(any_model, ask, conversations):
    together = scores_of(any_model, ask(*conversations))
    for row, conversation in zip(together, conversations, strict=True):
        torch.testing.assert_close(row, scores_of(any_model, ask(conversation))[0], atol=1e-4, rtol=0)


def test_the_cache_changes_nothing(any_model, ask, conversations):
    inputs = ask(*conversations)
    torch.testing.assert_close(
        scores_of(any_model, inputs), scores_of(any_model, inputs, use_cache=False), atol=1e-4, rtol=0
    )


def test_a_static_cache_changes_nothing(any_model, ask, conversations):
    inputs = ask(*conversations)
    static = scores_of(any_model, inputs, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(static, scores_of(any_model, inputs), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["phi", "qwen3"])
def test_compiled_decoding_changes_nothing(make_model, ask, conversations, family):
    model, inputs = make_model(family), ask(*conversations)
    expected = answers(model, inputs)
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    assert answers(model, inputs, cache_implementation="static", compile_config=compile_config) == expected


def test_generated_tokens_agree_with_the_forward_pass(any_model, ask, conversations):
    inputs = ask(*conversations)
    sequences = any_model.generate(**inputs, **GREEDY)
    start = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(sequences), NEW, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = any_model(
            input_ids=sequences, attention_mask=mask, position_ids=positions, pixel_values=inputs["pixel_values"]
        ).logits
    logits[..., any_model.generation_config.suppress_tokens] = -torch.inf
    logits[..., any_model.generation_config.eos_token_id] = -torch.inf  # min_new_tokens
    assert torch.equal(logits[:, start - 1 : -1].argmax(dim=-1), sequences[:, start:])


def test_image_and_query_tokens_are_never_generated(any_model, ask, conversations):
    generated = any_model.generate(**ask(*conversations), max_new_tokens=40, do_sample=True, temperature=5.0)
    prompt = ask(*conversations)["input_ids"]
    new = generated[:, prompt.shape[1] :]
    assert not torch.isin(new, torch.tensor(any_model.generation_config.suppress_tokens)).any()


@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_beams_of_a_batch_equal_beams_of_its_rows(any_model, ask, conversations, num_return_sequences):
    beams = {"num_beams": 3, "num_return_sequences": num_return_sequences}
    together = answers(any_model, ask(*conversations), **beams)
    alone = [row for conversation in conversations for row in answers(any_model, ask(conversation), **beams)]
    assert together == alone


@pytest.mark.parametrize("mode", [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}])
def test_beams_do_not_depend_on_the_cache(any_model, ask, conversations, mode):
    inputs = ask(*conversations)
    assert answers(any_model, inputs, num_beams=3, **mode) == answers(any_model, inputs, num_beams=3)


def test_several_samples_a_row_use_that_rows_images(any_model, ask, conversations):
    """Sampling from only the most likely token is greedy search, so every sample must be its row's greedy answer."""
    inputs = ask(*conversations)
    expected = [row for row in answers(any_model, inputs) for _ in range(2)]
    assert answers(any_model, inputs, do_sample=True, top_k=1, num_return_sequences=2) == expected


def test_sampling_repeats_with_its_seed(any_model, ask, conversations):
    samples = []
    for _ in range(2):
        torch.manual_seed(1)
        samples.append(answers(any_model, ask(*conversations), do_sample=True))
    assert samples[0] == samples[1]


def test_streaming_gives_the_same_text(model, processor, ask, images):
    inputs = ask([(images[:1], "What is it?")])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    expected = processor.tokenizer.decode(answers(model, inputs)[0])
    model.generate(**inputs, **GREEDY, streamer=streamer)
    assert "".join(streamer) == expected


def test_prompt_lookup_changes_nothing(any_model, ask, images):
    inputs = ask([(images[:1], "What is it? What is it? What is it?")])
    assert answers(any_model, inputs, prompt_lookup_num_tokens=3) == answers(any_model, inputs)


def test_an_assistant_changes_nothing(make_model, ask, images):
    model, assistant = make_model("llama"), make_model("llama")
    with torch.no_grad():
        for parameter in assistant.lm_head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    inputs = ask([(images[:1], "What is it?")])
    assert answers(model, inputs, assistant_model=assistant) == answers(model, inputs)


def test_embeddings_instead_of_ids_answer_the_same(any_model, ask, conversations):
    inputs = dict(ask(*conversations))
    expected = answers(any_model, inputs)
    inputs["inputs_embeds"] = any_model.get_input_embeddings()(inputs.pop("input_ids"))
    assert any_model.generate(**inputs, **GREEDY).tolist() == expected
    beams = {"num_beams": 2, "num_return_sequences": 2}
    with_ids = answers(any_model, ask(*conversations), **beams)
    assert any_model.generate(**inputs, **GREEDY, **beams).tolist() == with_ids


CACHES = {"dynamic": DynamicCache, "static": functools.partial(StaticCache, max_cache_len=256)}


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_passed_by_either_of_its_names(any_model, ask, images, name):
    inputs = ask([(images[:1], "What is it?")])
    cache = DynamicCache(config=any_model.config.get_text_config())
    with torch.no_grad():
        output = any_model(**inputs, **{name: cache}, use_cache=True)
    assert output[CACHE_NAME] is cache
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_two_caches_are_refused(model, ask, images):
    first, second = (DynamicCache(config=model.config.get_text_config()) for _ in range(2))
    with pytest.raises(ValueError, match=r"two names of the KV cache.*pass one of them"):
        model(**ask([(images[:1], "What is it?")]), cache=first, past_key_values=second)


@pytest.mark.parametrize("new_image", [False, True])
@pytest.mark.parametrize("kind", CACHES)
def test_a_chat_reuses_its_kv_cache(any_model, ask, images, processor, new_image, kind):
    first = ask([(images[:1], "First?")])
    cache = CACHES[kind](config=any_model.config.get_text_config())
    sequence = any_model.generate(**first, **GREEDY, **{CACHE_NAME: cache}, disable_compile=True)
    answer = sequence[:, first["input_ids"].shape[1] :]
    turn = ([images[1]] if new_image else [], "And the second one?")
    rest = ask([(images[:1], "First?", "@"), turn])
    # The conversation in full, with the ids of the answer as they were generated.
    marker = first["input_ids"].shape[1]
    ids = rest["input_ids"][:, marker:]
    placeholder = processor.tokenizer.encode(" @", add_special_tokens=False)
    assert ids[0, : len(placeholder)].tolist() == placeholder
    full = torch.cat([first["input_ids"], answer, ids[:, len(placeholder) :]], dim=1)
    inputs = {"input_ids": full, "attention_mask": torch.ones_like(full), "pixel_values": rest["pixel_values"]}
    afresh = scores_of(any_model, inputs)
    assert 0 < cache.get_seq_length() < full.shape[1]
    continued = scores_of(any_model, inputs, **{CACHE_NAME: cache}, disable_compile=True)
    torch.testing.assert_close(continued, afresh, atol=1e-4, rtol=0)


def test_a_batch_of_chats_with_different_images_reuses_its_kv_cache(any_model, ask, images):
    inputs = ask([(images[:1], "Is it so?")], [(images[1:3], "It is?")])
    question = ask([([], "And the second one?")])["input_ids"]
    system = ask([([], "")])["input_ids"].shape[1]
    turn = question[:, system - len("USER: ") - 3 - len(" ASSISTANT:") :].expand(2, -1)
    full = torch.cat([inputs["input_ids"], turn], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(turn)], dim=1)
    whole = {"input_ids": full, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
    cache = DynamicCache(config=any_model.config.get_text_config())
    positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        any_model(**inputs, position_ids=positions, cache=cache, use_cache=True)
    continued = scores_of(any_model, whole, **{CACHE_NAME: cache})
    torch.testing.assert_close(continued, scores_of(any_model, whole), atol=1e-4, rtol=0)


def test_a_cached_image_without_its_pixels_is_refused(model, ask, images):
    first = ask([(images[:1], "First?")])
    cache = DynamicCache(config=model.config.get_text_config())
    model.generate(**first, **GREEDY, **{CACHE_NAME: cache})
    rest = dict(ask([(images[:1], "First?", "yes, that is so"), ([], "Second?")]))
    del rest["pixel_values"]
    with pytest.raises(ValueError, match=r"1 tiles in the cache.*pixels of all images again"):
        model.generate(**rest, **GREEDY, **{CACHE_NAME: cache})


@pytest.mark.parametrize("chunk_size", [5, 60, 152, 160])
def test_chunked_prefill_through_an_image_is_refused(model, ask, images, chunk_size):
    inputs = ask([(images[:1], "What is it?")])
    assert chunk_size < inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match=r"prefill_chunk_size"):
        model.generate(**inputs, **GREEDY, prefill_chunk_size=chunk_size)


def test_chunked_prefill_of_text_changes_nothing(model, ask):
    inputs = ask([([], "Hello there, who are you?")])
    chunk = inputs["input_ids"].shape[1] - 4
    assert answers(model, inputs, prefill_chunk_size=chunk) == answers(model, inputs)


def test_generation_keeps_the_callers_inputs(model, ask, conversations):
    inputs = ask(*conversations)
    before = copy.deepcopy(dict(inputs))
    answers(model, inputs, num_beams=2)
    assert all(torch.equal(before[name], inputs[name]) for name in before)


def test_beams_refuse_more_images_than_placeholders(model, ask, images):
    inputs = ask([(images[:1], "What is it?")])
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"]] * 2)
    with pytest.raises(ValueError, match=r"1 tiles are expected.*gives 2"):
        answers(model, inputs, num_beams=2)


@pytest.mark.parametrize("asked", [{"suppress_tokens": [50]}, {"suppress_tokens": []}, {"suppress_tokens": None}, {}])
def test_image_and_query_tokens_stay_suppressed_with_others(make_model, ask, images, asked):
    model, inputs = make_model("phi"), ask([(images[:1], "What is it?")])
    placeholders = [model.config.image_token_id, model.config.query_token_id]
    with torch.no_grad():  # without suppression, the model would generate only these
        model.lm_head.bias[placeholders] += 1000
        model.lm_head.bias[50] += 500
    model.generation_config.suppress_tokens = None
    banned = asked.get("suppress_tokens") or []
    for kwargs in (GREEDY | asked, {"generation_config": GenerationConfig(**GREEDY, **asked)}):
        output = model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]
        found = set(output.flatten().tolist())
        assert not found.intersection([*placeholders, *banned])
        assert banned or found == {50}
    assert model.generation_config.suppress_tokens is None
