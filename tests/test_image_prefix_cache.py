"""Questions about a known image get the answers of a fresh prompt, without the image being encoded again."""

import copy
import sys
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model

GREEDY = {"do_sample": False, "max_new_tokens": 6}


def scores_of(model, inputs):
    output = model.generate(**inputs, **GREEDY, output_scores=True, return_dict_in_generate=True)
    return torch.stack(output.scores)


@pytest.fixture
def encodings(any_model):
    """How many tiles the vision tower has encoded, call by call."""
    calls = []
    hook = any_model.model.vision_tower.register_forward_hook(lambda _, __, output: calls.append(len(output[0])))
    yield calls
    hook.remove()


def conversations_about(images):
    yield [(images[:1], "What is it?")]
    yield [(images[:1], "\nIs it so? Or is it otherwise?")]
    yield [(images[:1], "")]
    yield [(images[:1], "What is it?", "A dog."), ([], "And what does it do?")]
    yield [(images[1:3], "Which?")]
    yield [(images[1:3], "Which one of them?")]


def test_answers_are_those_of_a_fresh_prompt(any_model, ask, images, encodings):
    cache = any_model.image_prefix_cache()
    for conversation in conversations_about(images):
        inputs = ask(conversation)
        fresh = scores_of(any_model, inputs)
        encodings.clear()
        torch.testing.assert_close(scores_of(any_model, cache(inputs)), fresh, atol=1e-4, rtol=0)
        num_encoded = sum(encodings)
        torch.testing.assert_close(scores_of(any_model, cache(inputs)), fresh, atol=1e-4, rtol=0)
        assert sum(encodings) == num_encoded <= 2
    assert len(cache.known) == 2  # one image, and two


@pytest.mark.parametrize(("family", "passes"), [("phi", 1), ("qwen3", 1), ("gemma3_text", 2)])
def test_a_first_question_is_one_pass_and_keeps_its_prefix(make_model, ask, images, family, passes):
    """With sliding windows, as in Gemma 3, it is two passes."""
    prompt, other = (ask([(images[:1], question)]) for question in ("What is it?", "Why so?"))
    model, fed = make_model(family), []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    cache = model.image_prefix_cache()
    fresh = scores_of(model, prompt)
    fed.clear()
    first = scores_of(model, cache(prompt))
    lengths = [length for length in fed if length > 1]
    assert len(lengths) == passes
    assert sum(lengths) == prompt["input_ids"].shape[1]
    fed.clear()
    scores_of(model, cache(other))
    hook.remove()
    (known,) = cache.known.values()
    assert fed[0] == other["input_ids"].shape[1] - known.key_values.get_seq_length() < lengths[0]
    if passes == 1:
        assert torch.equal(first, fresh)
        keys = known.key_values.layers[0].keys
        assert keys.untyped_storage().nbytes() == keys.nbytes  # the first answer is not kept in memory


@pytest.mark.parametrize(
    ("max_cache_len", "first"),
    [
        (None, {"num_beams": 3, "do_sample": False}),
        (None, {"num_return_sequences": 2, "do_sample": True}),
        (None, {"prompt_lookup_num_tokens": 2, "do_sample": False}),
        (None, {"max_new_tokens": 1, "do_sample": False}),
        (200, {"max_new_tokens": 1, "do_sample": False}),
        (200, {"do_sample": False}),
    ],
    ids=["beams", "several", "assisted", "one token", "static, one token", "static"],
)
def test_any_first_call_keeps_the_same_prefix(model, ask, images, max_cache_len, first):
    cache = model.image_prefix_cache(max_cache_len=max_cache_len)
    inputs, other = (ask([(images[:1], question)]) for question in ("What is it?", "Why so?"))
    with torch.inference_mode():
        answer = model.generate(**cache(inputs), **({"max_new_tokens": 5} | first))
    if not first["do_sample"]:
        assert torch.equal(answer, model.generate(**inputs, **({"max_new_tokens": 5} | first)))
    (known,) = cache.known.values()
    assert len(known.key_values.layers[0].keys) == 1
    torch.testing.assert_close(scores_of(model, cache(other)), scores_of(model, other), atol=1e-4, rtol=0)


def test_a_prompt_that_was_never_generated_from_costs_only_its_patches(any_model, ask, images, encodings):
    cache, inputs = any_model.image_prefix_cache(), ask([(images[:1], "What is it?")])
    ready = [cache(inputs), copy.deepcopy(cache(inputs)), cache(inputs)]
    answers = [scores_of(any_model, given) for given in [*ready, cache(inputs)]]
    assert encodings == [1]
    for answer in answers:
        torch.testing.assert_close(answer, scores_of(any_model, inputs), atol=1e-4, rtol=0)


def test_an_image_of_a_later_turn_is_seen(any_model, ask, images):
    cache = any_model.image_prefix_cache()
    answered = (images[:1], "First?", "Yes.")
    for second in images[1:3]:
        inputs = ask([answered, ([second], "And this one?")])
        torch.testing.assert_close(scores_of(any_model, cache(inputs)), scores_of(any_model, inputs), atol=1e-4, rtol=0)


def test_five_tiles_are_kept_as_well(model, ask, images):
    cache = model.image_prefix_cache()
    for question in ("What is it?", "Why?"):
        inputs = ask([(images[:1], question)], do_image_splitting=True)
        torch.testing.assert_close(scores_of(model, cache(inputs)), scores_of(model, inputs), atol=1e-4, rtol=0)
    assert len(cache.known) == 1


def test_beams_and_several_answers_work(model, ask, images):
    cache, inputs = model.image_prefix_cache(), ask([(images[:1], "What is it?")])
    beams = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    assert torch.equal(model.generate(**cache(inputs), **beams), model.generate(**inputs, **beams))


def test_text_alone_passes_through(model, ask):
    cache, inputs = model.image_prefix_cache(), ask([([], "Hello there, who are you?")])
    assert torch.equal(scores_of(model, cache(inputs)), scores_of(model, inputs))
    assert not cache.known


def test_memory_is_bounded_and_the_least_recently_used_image_is_dropped(model, ask, images):
    cache = model.image_prefix_cache()
    inputs = [ask([([image], "What is it?")]) for image in images]
    scores_of(model, cache(inputs[0]))
    (size,) = (known.num_bytes for known in cache.known.values())
    keys_and_values = model.config.text_config.num_hidden_layers * 2 * model.config.text_config.hidden_size
    assert size >= 4 * keys_and_values * model.config.image_seq_length
    cache.max_bytes = 2 * size
    for position in (1, 0, 2):
        scores_of(model, cache(inputs[position]))
    assert all(known.num_bytes == size for known in cache.known.values())
    kept = list(cache.known)
    cache(inputs[0])
    assert set(cache.known) == set(kept)  # the second one went
    tiny = model.image_prefix_cache(max_bytes=size - 1)
    assert torch.equal(scores_of(model, tiny(inputs[3])), scores_of(model, cache(inputs[3])))
    assert not tiny.known


def test_generating_does_not_change_the_cached_prefix(model, ask, images):
    cache, inputs = model.image_prefix_cache(), ask([(images[:1], "What is it?")])
    scores_of(model, cache(inputs))
    (known,) = cache.known.values()
    before = copy.deepcopy(known)
    scores_of(model, cache(inputs))
    assert known.key_values.get_seq_length() == before.key_values.get_seq_length()
    assert torch.equal(known.key_values.layers[0].keys, before.key_values.layers[0].keys)


def test_a_cache_with_use_cache_false_is_refused(model, ask, images):
    inputs = ask([(images[:1], "What is it?")])
    with pytest.raises(ValueError, match=r"a DynamicPrefixCache and `use_cache=False`.*Pass only one of them"):
        model.generate(**model.image_prefix_cache()(inputs), **GREEDY, use_cache=False)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), expected)


def test_a_batch_is_refused(model, ask, images):
    with pytest.raises(ValueError, match="one conversation without padding, but found 2 rows"):
        model.image_prefix_cache()(ask([(images[:1], "What?")], [(images[:1], "Why?")]))


def test_patch_features_of_another_shape_or_next_to_pixels_are_refused(model, ask, images):
    inputs = dict(ask([(images[:1], "What is it?")]))
    features = model.get_image_features(inputs["pixel_values"]).last_hidden_state
    with pytest.raises(ValueError, match=r"\(num_tiles, 16, 32\).*next to `pixel_values`; pass `last_hidden_state`"):
        model(**inputs, patch_features=features)
    del inputs["pixel_values"]
    for wrong in (features[0], features[:, 1:], features[..., 1:]):
        with pytest.raises(ValueError, match=r"\(num_tiles, 16, 32\) and replace `pixel_values`, but"):
            model(**inputs, patch_features=wrong)


def test_patch_features_replace_pixels(any_model, ask, conversations):
    inputs = dict(ask(*conversations))
    expected = scores_of(any_model, inputs)
    with torch.no_grad():
        features = any_model.get_image_features(inputs.pop("pixel_values")).last_hidden_state
    torch.testing.assert_close(scores_of(any_model, {**inputs, "patch_features": features}), expected)


def train_a_step(model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def load_other_weights(model):
    model.load_state_dict({name: 1.1 * tensor for name, tensor in model.state_dict().items()})


def shrink(model):
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.mul_(0.5)


@pytest.mark.parametrize("change", [train_a_step, load_other_weights, shrink, torch.nn.Module.double])
def test_other_weights_invalidate_the_cache(make_model, ask, images, change):
    model, inputs = make_model("phi"), ask([(images[:1], "What is it?")])
    cache = model.image_prefix_cache()
    before = scores_of(model, cache(inputs))
    change(model)
    expected = scores_of(model, inputs)
    torch.testing.assert_close(scores_of(model, cache(inputs)), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(before.to(expected), expected, atol=1e-6)


def test_changes_of_adapters_invalidate_the_cache(make_model, ask, images):
    inputs = ask([(images[:1], "What is it?")])
    config = LoraConfig(target_modules=r".*\.(q_proj|v_proj|fc1)", init_lora_weights=False)
    model = get_peft_model(make_model("phi"), config)
    model.add_adapter("other", config)
    cache = model.image_prefix_cache()

    def check():
        torch.testing.assert_close(scores_of(model, cache(inputs)), scores_of(model, inputs), atol=1e-4, rtol=0)

    check()
    with model.disable_adapter():
        check()
    check()
    model.set_adapter("other")
    check()
    model.merge_adapter()
    check()
    model.unmerge_adapter()
    check()
    model.unload()
    check()


def test_an_unnoticed_change_needs_a_clear(make_model, ask, images):
    model, inputs = make_model("phi"), ask([(images[:1], "What is it?")])
    cache = model.image_prefix_cache()
    scores_of(model, cache(inputs))
    model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.data.mul_(0.5)
    cache.clear()
    torch.testing.assert_close(scores_of(model, cache(inputs)), scores_of(model, inputs), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_threads_can_share_a_cache(model, ask, images):
    inputs = [ask([([image], "What is it?")]) for image in images]
    expected = [scores_of(model, given) for given in inputs]
    cache = model.image_prefix_cache()
    scores_of(model, cache(inputs[0]))
    cache.max_bytes = 2 * next(iter(cache.known.values())).num_bytes
    errors = []

    def work(first):
        try:
            for step in range(12):
                index = (first + step) % len(inputs)
                torch.testing.assert_close(scores_of(model, cache(inputs[index])), expected[index], atol=1e-4, rtol=0)
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
