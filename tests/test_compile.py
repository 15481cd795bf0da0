"""The device waits only once before the first token, and decoding is compiled once for all images and questions."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache

pytestmark = pytest.mark.usefixtures("num_graphs")  # every test begins with no graphs

GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
MAX_CACHE_LEN = 360  # more than any prompt below and its answer
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}


class ReadOperations(TorchDispatchMode):
    """Records every operation whose result or size the host would wait for on an accelerator."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        selects = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in READS or selects:
            self.events.append(name)
        return func(*args, **(kwargs or {}))


class ReadMethods(TorchFunctionMode):
    """Records methods that read a tensor's memory without dispatching an operation."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            self.events.append(func.__name__)
        return func(*args, **(kwargs or {}))


def compiled(backend="eager"):
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # `generate` compiles on accelerators only, if not told otherwise
    return config


@pytest.fixture
def prompts(ask, images):
    """Questions about four images, plain and in five tiles, with prompts of several lengths."""
    return [
        ask([(images[:1], "What is it?")]),
        ask([(images[1:2], "What is it? Or is it something else?")]),
        ask([(images[:1], "Why?")]),
        ask([(images[2:3], "Is it so?")], do_image_splitting=True),
        ask([(images[3:], "And what is this?")]),
    ]


@pytest.mark.parametrize("num_rows", [1, 3])
@torch.no_grad()
def test_the_only_read_before_the_first_token_follows_the_vision_tower(any_model, ask, images, num_rows):
    inputs = ask(*[[([image], "What is it?")] for image in images[:num_rows]])
    positions = inputs["attention_mask"].cumsum(dim=1) - 1
    cache = DynamicCache(config=any_model.config.get_text_config())
    events = []
    hook = any_model.model.vision_tower.register_forward_hook(lambda *_: events.append("vision tower"))
    with ReadOperations(events), ReadMethods(events):
        any_model(**inputs, position_ids=positions, cache=cache, logits_to_keep=1)
    hook.remove()
    assert events == ["vision tower", "tolist"]


@pytest.mark.slow
def test_decoding_is_compiled_once_for_all_images_and_questions(make_model, prompts, num_graphs):
    model = make_model("phi")
    for number, inputs in enumerate(prompts):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            answer = model.generate(
                **inputs,
                **GREEDY,
                cache_implementation="static",
                max_cache_len=MAX_CACHE_LEN,
                compile_config=compiled(),
            )
        assert torch.equal(answer, model.generate(**inputs, **GREEDY))
    assert num_graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["phi", "qwen3"])
def test_decoding_from_cached_prefixes_is_compiled_once(make_model, prompts, num_graphs, family):
    model = make_model(family)
    cache = model.image_prefix_cache(max_cache_len=MAX_CACHE_LEN)
    for number, inputs in enumerate(prompts):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            answer = model.generate(**cache(inputs), **GREEDY, compile_config=compiled())
        assert torch.equal(answer, model.generate(**inputs, **GREEDY))
    assert num_graphs() == 1
    assert len(cache.known) == 4


def test_an_image_that_a_static_cache_cannot_hold_is_refused(make_model, model, ask, images):
    inputs = ask([(images[:1], "What is it?")])
    with pytest.raises(ValueError, match=r"more than `max_cache_len`=32"):
        model.image_prefix_cache(max_cache_len=32)(inputs)
    sliding = make_model("gemma3_text")
    with pytest.raises(ValueError, match=r"sliding window of the decoder.*omit it"):
        sliding.image_prefix_cache(max_cache_len=MAX_CACHE_LEN)(inputs)


def test_beams_from_a_static_cache_are_refused(model, ask, images):
    known = model.image_prefix_cache(max_cache_len=MAX_CACHE_LEN)(ask([(images[:1], "What is it?")]))
    expected = r"need a DynamicCache to continue from, found a StaticPrefixCache.*without `max_cache_len`"
    with pytest.raises(ValueError, match=expected):
        model.generate(**known, **GREEDY, num_beams=2)


@pytest.mark.slow
def test_inductor_gives_the_same_answers(make_model, prompts):
    model = make_model()
    for inputs in prompts:
        static = {"cache_implementation": "static", "max_cache_len": MAX_CACHE_LEN}
        answer = model.generate(**inputs, **GREEDY, **static, compile_config=compiled("inductor"))
        assert torch.equal(answer, model.generate(**inputs, **GREEDY))
