"""The compiled prefill gives the same answers, and one graph serves all images and questions of its size."""

import copy
import gc

import pytest
import torch
from transformers import CompileConfig

pytestmark = pytest.mark.usefixtures("num_graphs")  # every test begins with no graphs

GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
MAX_CACHE_LEN = 400  # more than any prompt below and its answer
SIZES = {"max_cache_len": MAX_CACHE_LEN, "prompt_lengths": (96, 256, 320), "tile_counts": (1, 5)}


def compiling(backend="eager"):
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # `generate` compiles on accelerators only, if not told otherwise
    return config


def prefill_of(model, backend="eager", **changes):
    return model.compiled_prefill(**SIZES | {"compile_config": compiling(backend)} | changes)


def first_logits(model, inputs, **options):
    """Logits of the first token, before any processing."""
    options = {"return_dict_in_generate": True, "output_logits": True, **options}
    return model.generate(**inputs, do_sample=False, max_new_tokens=1, **options).logits[0]


@pytest.fixture
def plain(ask, images):
    """Prompts of several lengths, with one tile each."""
    questions = ("What is it?", "What is it? Or is it something else?", "Why?", "And what is this?")
    return [ask([([image], question)]) for image, question in zip(images, questions, strict=True)]


@pytest.fixture
def split(ask, images):
    """The same with five tiles each."""
    return [ask([([image], question)], do_image_splitting=True) for image, question in zip(images, "AB", strict=False)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["phi", "qwen3"])
def test_one_graph_serves_all_images_and_questions_of_its_size(make_model, plain, split, num_graphs, family):
    model = make_model(family)
    compiled = prefill_of(model)
    for prompts, total in ((plain, 3), (split, 5)):  # tower, prefill and decoding; tower and prefill
        for number, inputs in enumerate(prompts):
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                answer = model.generate(**compiled(inputs), **GREEDY, compile_config=compiling())
            assert torch.equal(answer, model.generate(**inputs, **GREEDY))
            assert num_graphs() == total
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):  # the right one of several graphs is still found
        for inputs in (*split, *plain):
            answer = model.generate(**compiled(inputs), **GREEDY, compile_config=compiling())
            assert torch.equal(answer, model.generate(**inputs, **GREEDY))
    assert num_graphs() == 5


@pytest.mark.slow
def test_a_prompt_of_another_size_needs_another_graph(model, plain, num_graphs):
    lengths = [inputs["input_ids"].shape[1] for inputs in plain]
    compiled = prefill_of(model, prompt_lengths=[min(lengths), max(lengths)])
    for inputs in plain:
        first_logits(model, compiled(inputs))
    assert num_graphs() == 1 + 2  # tower, and a prefill of both lengths


@pytest.mark.slow
@pytest.mark.parametrize("family", ["phi", "qwen3"])
def test_inductor_gives_the_same_answers(make_model, ask, images, plain, split, family):
    model = make_model(family)
    compiled = prefill_of(model, "inductor")
    for inputs in (*plain[:2], split[0], ask([(images[:3], "Which?")])):
        options = {"return_dict_in_generate": True, "output_logits": True}
        found = model.generate(**compiled(inputs), **GREEDY, **options, compile_config=compiling("inductor"))
        expected = model.generate(**inputs, **GREEDY, **options)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_rows_with_any_images_padding_and_several_questions(model, ask, conversations, num_graphs):
    compiled = prefill_of(model, tile_counts=[6])
    for rows in (conversations, conversations[::-1]):
        inputs = ask(*rows)
        assert not inputs["attention_mask"].all()
        torch.testing.assert_close(first_logits(model, compiled(inputs)), first_logits(model, inputs))
        assert num_graphs() == 2


@pytest.mark.slow
def test_a_batch_is_decoded_after_padding_on_both_sides(model, ask, conversations):
    inputs = ask(*conversations)
    answer = model.generate(**prefill_of(model)(inputs), **GREEDY, compile_config=compiling())
    assert torch.equal(answer, model.generate(**inputs, **GREEDY))


@pytest.mark.slow
def test_tiles_are_padded_to_the_next_count(model, ask, images, num_graphs):
    compiled = prefill_of(model)
    for several in (images[:2], images[:3], images):
        inputs = ask([(several, "Which?")])
        torch.testing.assert_close(first_logits(model, compiled(inputs)), first_logits(model, inputs))
    assert num_graphs() == 2  # a tower, and a prefill of five tiles


def test_text_alone_needs_no_tower(model, ask, num_graphs):
    compiled, inputs = prefill_of(model), ask([([], "Hello there, who are you?")])
    torch.testing.assert_close(first_logits(model, compiled(inputs)), first_logits(model, inputs))
    assert num_graphs() == 1


@pytest.mark.slow
def test_questions_about_a_cached_image_share_a_graph(make_model, ask, images, num_graphs):
    model = make_model()
    compiled = prefill_of(model)
    cache = model.image_prefix_cache(compiled=compiled)
    questions = ("What is it?", "Is it so? Or is it otherwise?", "Why?", "")
    for turn, image in enumerate(images[:2]):
        for number, question in enumerate(questions):
            inputs = ask([([image], question)])
            with torch._dynamo.config.patch(error_on_recompile=turn > 0 or number > 1):
                answer = model.generate(**cache(inputs), **GREEDY, compile_config=compiling())
            assert torch.equal(answer, model.generate(**inputs, **GREEDY)), question
    assert len(cache.known) == 2
    assert num_graphs() == 4  # tower, prefill of a first and of a further question, decoding


@pytest.mark.slow
def test_prefixes_of_all_kinds_are_cached(model, ask, images):
    cache = model.image_prefix_cache(compiled=prefill_of(model))
    for conversation in (
        [(images[:1], "What is it?")],
        [(images[:1], "What is it?", "A dog."), ([], "And what does it do?")],
        [(images[:1], "First?", "Yes."), (images[1:2], "And this one?")],
        [(images[1:3], "Which?")],
        [([], "Hello?", "Yes."), (images[:1], "What is it?")],
        [([], "Hello there, who are you?")],
    ):
        inputs = ask(conversation)
        for _ in range(2):
            torch.testing.assert_close(first_logits(model, cache(inputs)), first_logits(model, inputs))
    split = ask([(images[:1], "What is it?")], do_image_splitting=True)
    for _ in range(2):
        torch.testing.assert_close(first_logits(model, cache(split)), first_logits(model, split))
    assert len(cache.known) == 4


def test_a_cache_returns_to_its_place_in_memory(model, plain):
    compiled = prefill_of(model)

    def address(cache):
        return cache.layers[0].keys.data_ptr()

    first = compiled(plain[0])
    second = compiled(plain[1])  # both are in use
    caches = [next(part for part in ready.values() if hasattr(part, "layers")) for ready in (first, second)]
    assert address(caches[0]) != address(caches[1])
    answers = [first_logits(model, ready) for ready in (first, second)]
    for answer, inputs in zip(answers, plain, strict=False):
        torch.testing.assert_close(answer, first_logits(model, inputs))
    known = {address(cache) for cache in caches}
    del first, second, caches
    gc.collect()
    assert address(compiled.empty_cache()) in known
    assert {address(cache) for cache in [compiled.empty_cache(), compiled.empty_cache()]} == known


def test_calls_in_turn_share_a_cache(model, plain):
    """A graph is tied to the addresses of its cache; a cache that waits for the garbage collector costs a new one."""
    compiled = prefill_of(model)
    known = model.image_prefix_cache(compiled=compiled)
    gc.collect()
    gc.disable()
    try:
        for inputs in (plain[0], plain[0], plain[1]):
            for prepare in (compiled, known):
                model.generate(**prepare(inputs), **GREEDY)
                model.generate(**prepare(inputs), **GREEDY, return_dict_in_generate=True, output_scores=True)
        assert len(compiled._free[1]) == 1
    finally:
        gc.enable()


def test_what_a_cache_held_before_does_not_matter(model, plain):
    compiled = prefill_of(model)
    cache = compiled.empty_cache()
    for layer in cache.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.inf)
    del cache
    answer = model.generate(**compiled(plain[0]), **GREEDY)
    assert torch.equal(answer, model.generate(**plain[0], **GREEDY))


def test_inference_mode_leaves_usable_caches(model, plain):
    compiled = prefill_of(model)
    with torch.inference_mode():
        first_logits(model, compiled(plain[0]))
    torch.testing.assert_close(first_logits(model, compiled(plain[1])), first_logits(model, plain[1]))


@pytest.mark.slow
def test_what_is_too_large_runs_without_a_graph(model, plain, split, num_graphs):
    compiled = prefill_of(model, prompt_lengths=[64], tile_counts=[1])
    for inputs in (plain[0], split[0]):
        torch.testing.assert_close(first_logits(model, compiled(inputs)), first_logits(model, inputs))
    assert num_graphs() == 1  # the tower with one tile


def test_further_outputs_and_the_model_itself_need_no_graph(make_model, plain):
    model = make_model(attn_implementation="eager")
    compiled = prefill_of(model)
    for request in ("output_attentions", "output_hidden_states"):
        options = {"return_dict_in_generate": True, "do_sample": False, "max_new_tokens": 2, request: True}
        found, expected = (model.generate(**given, **options) for given in (compiled(plain[0]), plain[0]))
        name = request.removeprefix("output_")
        length = expected.sequences.shape[1] - 2
        for state, other in zip(found[name][0], expected[name][0], strict=True):
            torch.testing.assert_close(state[..., :length], other) if name == "attentions" else (
                torch.testing.assert_close(state, other)
            )
        assert torch.equal(found.sequences, expected.sequences)
    with torch.no_grad():
        torch.testing.assert_close(model(**compiled(plain[0])).logits, model(**plain[0]).logits)
    copy.deepcopy(model)


def test_contradictions_are_refused_before_they_reach_a_graph(model, ask, images):
    compiled, inputs = prefill_of(model), ask([(images[:2], "Which?")])
    with pytest.raises(ValueError, match="so 2 tiles are expected, but `pixel_values` gives 1"):
        compiled({**inputs, "pixel_values": inputs["pixel_values"][:1]})
    with pytest.raises(ValueError, match="so 2 tiles are expected, but `pixel_values` gives 1"):
        model.image_prefix_cache(compiled=compiled)({**inputs, "pixel_values": inputs["pixel_values"][:1]})
    with pytest.raises(ValueError, match=r"has \d+ tokens, more than `max_cache_len`=100; raise it"):
        prefill_of(model, max_cache_len=100)(inputs)


def test_what_cannot_be_compiled_is_refused(make_model, model, plain):
    with pytest.raises(ValueError, match=r"full attention in all layers.*gemma3_text.*cache_implementation"):
        prefill_of(make_model("gemma3_text"))
    other = make_model()
    other.config.text_config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"needs one of \('sdpa', 'eager'\).*found.*flex_attention.*call `model.set"):
        prefill_of(other)
    other = make_model()
    other.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"a model on one device.*found devices \['0', 'cpu'\]"):
        prefill_of(other)
    compiled = prefill_of(model)
    for several in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        with pytest.raises(ValueError, match=r"need a DynamicCache.*found a CompiledCache.*no compiled prefill"):
            model.generate(**compiled(plain[0]), max_new_tokens=2, **several)
