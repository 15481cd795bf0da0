"""FlashSloth in vLLM, in engines in this process, compared with `generate`."""

import copy
import json
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("vllm", reason="vLLM has an environment of its own; see .ci/run")

from golden_checkpoint import write_golden_checkpoint
from original_checkpoint import make_original, original_tensors
from vllm import SamplingParams
from vllm.compilation.backends import split_graph
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import override_forward_context
from vllm.sampling_params import StructuredOutputsParams
from vllm_engines import (
    answer,
    as_messages,
    engine,
    generate,
    metric,
    random_conversations,
    random_images,
    save_checkpoint,
    text_config,
    user,
)

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth import serving as flashsloth_serving
from flashsloth.serving.questions import OP_NAME, register_update

pytestmark = pytest.mark.slow

IMAGES = random_images(5)
CHUNKED = {"max_num_batched_tokens": 13, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def make_checkpoint(make_model, processor, tokenizer, tmp_path_factory):
    """Writes a checkpoint of a family of decoders, once; returns folder and model."""
    known = {}

    def make(family="llama"):
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            # Gemma multiplies its embeddings by the root of their width; unless they are small, it repeats its prompt.
            is_gemma = family.startswith("gemma")
            changes = {"initializer_range": 0.2} if is_gemma else {}
            model = make_model(text_config=text_config(family, tokenizer, **changes), query_layer_idx=1)
            save_checkpoint(folder, model, processor, embedding_scale=0.02 if is_gemma else 1)
            known[family] = folder, model
        return known[family]

    return make


@pytest.fixture(scope="module")
def conversations():
    return random_conversations(10, seed=0, images=IMAGES)


def without_queries(model):
    """A copy of a model whose Embedded Query module adds nothing."""
    model = copy.deepcopy(model)
    for parameter in model.model.embedded_query.out_proj.parameters():
        parameter.data.zero_()
    return model


def test_vllm_finds_the_plugin():
    (plugin,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "flashsloth"]
    assert plugin.load() is flashsloth_serving.register


def check_that_queries_matter(model, processor, conversations, expected):
    """The control: answers without what queries add are others."""
    control = generate(without_queries(model), processor, conversations)
    assert sum(ours != zeroed for ours, zeroed in zip(expected, control, strict=True)) >= 2


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gemma3_text"])
def test_answers_are_those_of_generate(family, make_checkpoint, processor, conversations):
    folder, model = make_checkpoint(family)
    expected = generate(model, processor, conversations)
    check_that_queries_matter(model, processor, conversations, expected)
    with engine(folder, **CHUNKED) as llm:
        assert answer(llm, conversations) == expected
        assert answer(llm, conversations) == expected  # from the prefix cache


@pytest.mark.parametrize("tower", ["clip_vision_model", "dinov2"])
def test_towers_with_a_class_token(tower, make_model, processor, tokenizer, conversations, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    vision_config = {"model_type": tower, "intermediate_size": 48, **sizes}
    model = make_model(text_config=text_config("llama", tokenizer), vision_config=vision_config, query_layer_idx=1)
    save_checkpoint(tmp_path, model, processor)
    expected = generate(model, processor, conversations)
    check_that_queries_matter(model, processor, conversations, expected)
    with engine(tmp_path, **CHUNKED) as llm:
        assert answer(llm, conversations) == expected


def test_phi_and_the_original_releases(make_checkpoint, processor, conversations, tmp_path):
    """One test: vLLM has no Phi of its own and changes that of transformers, which then no longer works without it."""
    folder, model = make_checkpoint("phi")
    expected = generate(model, processor, conversations)
    check_that_queries_matter(model, processor, conversations, expected)
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    releases = [write_golden_checkpoint(tmp_path / "golden")]
    config = json.loads((releases[0] / "config.json").read_text())
    # vLLM's attention on a CPU needs heads of a multiple of 32.
    changed = config | {"num_attention_heads": 4, "num_key_value_heads": 4}
    (releases[0] / "config.json").write_text(json.dumps(changed))
    for name, as_bin in (("safetensors", False), ("bin", True)):
        releases.append(make_original(tmp_path / name, original_tensors(**sizes), as_bin=as_bin, **sizes))
    asked = [[user(IMAGES[:1], "USER: star")], [user(IMAGES[1:3], "red")], [user([], "who")]]
    references = []
    for release in releases:
        release_processor = FlashSlothProcessor.from_pretrained(release)
        release_model = FlashSlothForConditionalGeneration.from_pretrained(release, dtype=torch.float32).eval()
        references.append(generate(release_model, release_processor, asked))
    with engine(folder, **CHUNKED) as llm:
        assert answer(llm, conversations) == expected
        assert answer(llm, conversations) == expected
    for release, reference in zip(releases, references, strict=True):
        with engine(release, max_num_batched_tokens=64, max_num_seqs=8) as llm:
            assert answer(llm, asked) == reference


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 1, "max_num_seqs": 1},
        {"num_gpu_blocks_override": 22, "max_num_batched_tokens": 64, "disable_log_stats": False},
    ],
    ids=["whole prompts", "one token at a time", "preemption"],
)
def test_scheduling_does_not_change_answers(settings, make_checkpoint, processor, conversations):
    folder, model = make_checkpoint()
    expected = generate(model, processor, conversations, num_tokens=40)
    with engine(folder, **settings) as llm:
        assert answer(llm, conversations, num_tokens=40) == expected
        if "num_gpu_blocks_override" in settings:
            assert metric(llm, "num_preemptions") > 0


def test_a_cached_prefix_may_end_inside_a_question(make_checkpoint, processor):
    folder, model = make_checkpoint()
    common = "which of these two things is left of the red star and what is its colour, "
    asked = [[user(IMAGES[:1], common + end)] for end in ("exactly?", "please", "or not", "if any")]
    expected = generate(model, processor, asked)
    assert len({tuple(ids) for _, ids in expected}) > 1
    with engine(folder, disable_log_stats=False) as llm:
        found = [answer(llm, [conversation])[0] for conversation in asked]
        hits = metric(llm, "prefix_cache_hits")
    assert found == expected
    prompt = expected[0][0]
    question_start = len(prompt) - prompt[::-1].index(model.config.image_token_id)
    assert hits / (len(asked) - 1) > question_start


@pytest.mark.parametrize("seed", range(4))
def test_fuzz(seed, make_checkpoint, processor):
    """Random conversations and scheduling; the first engines have so few blocks that requests are preempted."""
    generator = np.random.default_rng(seed)
    folder, model = make_checkpoint(["qwen3", "llama", "gemma3_text", "qwen2"][seed])
    asked = random_conversations(60, seed=100 + seed, images=IMAGES, max_words=20)
    expected = generate(model, processor, asked, num_tokens=24)
    settings = {
        "max_num_seqs": int(generator.integers(8, 16)),
        "max_num_batched_tokens": int(generator.integers(20, 150)),
        "num_gpu_blocks_override": int(generator.integers(*((20, 30) if seed < 2 else (100, 140)))),
        "enable_prefix_caching": seed != 3,
    }
    with engine(folder, disable_log_stats=False, **settings) as llm:
        assert answer(llm, asked, num_tokens=24) == expected
        assert metric(llm, "num_preemptions") > 0 or seed >= 2
        assert metric(llm, "prefix_cache_hits") > 0 or seed == 3


def test_tensor_parallel(make_checkpoint, processor, conversations, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # both processes on the same cores
    folder, model = make_checkpoint("qwen2")
    expected = generate(model, processor, conversations)
    with engine(folder, tensor_parallel_size=2, max_num_batched_tokens=24, max_num_seqs=8) as llm:
        assert answer(llm, conversations) == expected
        assert answer(llm, conversations) == expected


def test_compiled(make_checkpoint, processor, conversations):
    folder, model = make_checkpoint()
    expected = generate(model, processor, conversations)
    with engine(folder, enforce_eager=False, **CHUNKED) as llm:
        assert answer(llm, conversations) == expected


class Layer(torch.nn.Module):
    """A decoder layer with the interface of vLLM's."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, positions, hidden_states, residual):
        residual = hidden_states + residual
        return self.linear(residual), residual


class Decoder(torch.nn.Module):
    """Two layers; query tokens are updated before the second."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])
        register_update(self.layers[1], "cache.0")

    def forward(self, hidden_states):
        residual = torch.zeros_like(hidden_states)
        for layer in self.layers:
            hidden_states, residual = layer(None, hidden_states, residual)
        return hidden_states + residual


def test_piecewise_graphs_leave_out_the_update_of_queries():
    """vLLM cuts a compiled decoder at the update, which writes into the memory that the next piece reads."""
    torch.manual_seed(0)
    decoder, inputs, pieces, seen = Decoder(), torch.randn(3, 4), [], []

    def update_queries(hidden_states, residual):
        seen.append(hidden_states + residual)
        hidden_states[1] += 5

    def cut(graph, _):
        whole, items = split_graph(graph, [f"vllm::{OP_NAME}"])
        pieces.extend(item.is_splitting_graph for item in items)
        return whole

    cache = SimpleNamespace(update_queries=update_queries)
    with override_forward_context(SimpleNamespace(no_compile_layers={"cache.0": cache})), torch.no_grad():
        expected = decoder(inputs)
        assert torch.equal(torch.compile(decoder, backend=cut, fullgraph=True)(inputs), expected)
    assert pieces == [False, True, False]
    assert len(seen) == 2 and torch.equal(*seen)


def test_five_tiles_for_one_request_and_for_all(make_checkpoint, processor):
    folder, model = make_checkpoint()
    asked = [[user(IMAGES[:1], "what is it?")], [user(IMAGES[1:3], "which one?")]]
    plain = generate(model, processor, asked)
    split = generate(model, processor, asked, do_image_splitting=True)
    with engine(folder, **CHUNKED) as llm:
        assert answer(llm, asked) == plain
        assert answer(llm, asked, mm_processor_kwargs={"do_image_splitting": True}) == split
    with engine(folder, mm_processor_kwargs={"do_image_splitting": True}) as llm:
        assert answer(llm, asked) == split


def test_images_of_every_mode_are_read_as_by_the_processor(make_checkpoint, processor):
    folder, model = make_checkpoint()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    deep = Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40)
    images = [Image.fromarray(pixels, "RGBA"), Image.fromarray(pixels[..., 0]), deep]
    asked = [[user([image], "what is the colour?")] for image in images]
    expected = generate(model, processor, asked)
    with engine(folder) as llm:
        assert answer(llm, asked) == expected


def test_control_tokens_in_messages_stay_text(make_checkpoint, processor):
    folder, model = make_checkpoint()
    asked = [
        [user(IMAGES[:1], "a <image> and <learnable></s> b")],
        [user([], "<image>")],
        [user([], "one"), {"role": "assistant", "content": "<learnable>"}, user(IMAGES[:1], "two <learnable>")],
    ]
    expected = generate(model, processor, asked)
    with engine(folder) as llm:
        assert answer(llm, asked) == expected


def test_image_and_query_tokens_are_never_generated(make_checkpoint, processor, tmp_path, make_model, tokenizer):
    model = make_model(text_config=text_config("llama", tokenizer, tie_word_embeddings=False))
    special = [model.config.image_token_id, model.config.query_token_id]
    with torch.no_grad():
        model.lm_head.weight[special] = 10 * model.lm_head.weight.abs().max()
        model.lm_head.weight[special[1]] *= -1
    save_checkpoint(tmp_path, model, processor)
    asked = [[user(IMAGES[:1], "what is it?")], [user([], "who?")]]
    expected = generate(model, processor, asked)
    with engine(tmp_path) as llm:
        assert answer(llm, asked) == expected
        outputs = llm.chat(as_messages(asked[0]), SamplingParams(max_tokens=20, temperature=2, n=4), use_tqdm=False)
    assert not {token for output in outputs[0].outputs for token in output.token_ids}.intersection(special)


@pytest.fixture(scope="module")
def served(make_checkpoint):
    folder, _ = make_checkpoint()
    with engine(folder, max_num_batched_tokens=512, seed=0) as llm:
        yield llm


def spell(tokenizer, *pieces):
    return [i for piece in pieces for i in (piece if isinstance(piece, list) else tokenizer.encode(piece))]


TORN = {
    "a query block that was cut": (["USER: hello", [263] * 2, " ASSISTANT:"], 0, "whole blocks"),
    "an image without its picture": (["USER: ", [262], "\nhello", [263], " ASSISTANT:"], 0, "image tokens"),
    "half an image": (["USER: ", [262] * 3, "\nhello", [263], " ASSISTANT:"], 0, "image"),
    "a question without its start": ([[262], "hello", [263], " ASSISTANT:"], 1, "question does not begin"),
    "two pictures for one placeholder": (["USER: ", [262], "\nhello", [263], " ASSISTANT:"], 2, "2 images"),
    "a picture without placeholder": (["USER: hello", [263], " ASSISTANT:"], 1, "1 images"),
}


@pytest.mark.parametrize("name", TORN)
def test_torn_prompts_are_refused_before_they_reach_the_engine(name, served, tokenizer):
    pieces, num_images, reason = TORN[name]
    special = {262: tokenizer.convert_tokens_to_ids("<image>"), 263: tokenizer.convert_tokens_to_ids("<learnable>")}
    pieces = [[special[i] for i in piece] if isinstance(piece, list) else piece for piece in pieces]
    prompt = {"prompt_token_ids": spell(tokenizer, *pieces)}
    if num_images:
        prompt["multi_modal_data"] = {"image": IMAGES[:num_images]}
    with pytest.raises(VLLMValidationError, match=reason):
        served.generate(prompt, SamplingParams(max_tokens=2), use_tqdm=False)


def test_raw_prompts_are_answered(served, make_checkpoint, processor):
    _, model = make_checkpoint()
    text = "USER: <image>\nWhat is it?<learnable> ASSISTANT:"
    inputs = processor(text=text, images=IMAGES[:1], return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()
    prompt = {"prompt": text, "multi_modal_data": {"image": IMAGES[0]}}
    (output,) = served.generate(prompt, SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert output.prompt_token_ids + list(output.outputs[0].token_ids) == expected


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "judge", "content": "hello"}], "judge"),
        ([user(IMAGES[:1], "x" * 600)], "512"),
        (
            [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}]}],
            "video",
        ),
        (
            [{"role": "system", "content": [{"type": "image_pil", "image_pil": IMAGES[0]}]}, user([], "a")],
            "role system",
        ),
    ],
    ids=["unknown role", "too long", "video", "image of the system"],
)
def test_bad_conversations_are_refused(messages, reason, served):
    with pytest.raises((ValueError, VLLMValidationError), match=reason):
        served.chat(as_messages(messages), SamplingParams(max_tokens=2), use_tqdm=False)


def test_greedy_unless_asked_otherwise(served):
    assert served.get_default_sampling_params().temperature == 0


def test_what_vllm_gives_for_nothing(served, make_checkpoint, processor):
    _, model = make_checkpoint()
    messages = as_messages([user(IMAGES[:1], "which one?")])
    ((_, expected),) = generate(model, processor, [[user(IMAGES[:1], "which one?")]])

    def chat(**kwargs):
        return served.chat(messages, SamplingParams(**kwargs), use_tqdm=False)[0].outputs

    choices = chat(max_tokens=9, structured_outputs=StructuredOutputsParams(choice=["red", "blue"]))
    assert choices[0].text in ("red", "blue")
    expression = chat(max_tokens=9, structured_outputs=StructuredOutputsParams(regex=r"[0-9]{3}"))
    assert expression[0].text.isdecimal() and len(expression[0].text) == 3
    schema = {"type": "object", "properties": {"count": {"enum": [1, 2]}}, "required": ["count"]}
    found = chat(max_tokens=60, structured_outputs=StructuredOutputsParams(json=schema, disable_any_whitespace=True))
    assert json.loads(found[0].text)["count"] in (1, 2)
    assert len({output.text for output in chat(n=4, temperature=2, max_tokens=8, seed=1)}) > 1
    assert [output.text for output in chat(n=2, temperature=2, max_tokens=8, seed=1)] == [
        output.text for output in chat(n=2, temperature=2, max_tokens=8, seed=1)
    ]
    (output,) = chat(temperature=0, max_tokens=3, logprobs=2)
    inputs = processor.encode_conversations([[user(IMAGES[:1], "which one?")]])
    reference = model(**inputs).logits[0, -1].double()
    reference[[model.config.image_token_id, model.config.query_token_id]] = -torch.inf
    top = output.logprobs[0][expected[0]]
    assert top.rank == 1 and top.logprob == pytest.approx(reference.log_softmax(-1).max().item(), abs=1e-4)
    stop = processor.tokenizer.decode(expected[2:3])
    (output,) = chat(temperature=0, max_tokens=8, stop=[stop])
    assert stop not in output.text and list(output.token_ids)[:2] == expected[:2]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"enable_lora": True}, "enable-lora"),
        ({"pipeline_parallel_size": 2}, "pipeline-parallel-size"),
        ({"kv_cache_dtype": "fp8"}, "kv-cache-dtype fp8"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative-config"),
        ({"enable_prompt_embeds": True}, "enable-prompt-embeds"),
        ({"limit_mm_per_prompt": {"image": 0}}, "limit-mm-per-prompt"),
        ({"quantization": "fp8"}, "quantization fp8"),
        ({"tokenizer_mode": "slow"}, "tokenizer-mode slow"),
    ],
)
def test_untested_settings_are_refused_at_start(settings, name, make_checkpoint):
    folder, _ = make_checkpoint()
    with pytest.raises(ValueError, match=name), engine(folder, **settings):
        pass


def test_a_decoder_whose_head_would_lose_its_bias_is_refused(make_model, tokenizer, processor, tmp_path):
    model = make_model(text_config=text_config("llama", tokenizer), lm_head_bias=True)
    save_checkpoint(tmp_path, model, processor)
    with pytest.raises(ValueError, match="lm_head_bias"), engine(tmp_path):
        pass


def test_an_untested_version_of_vllm_is_refused_by_name(make_checkpoint):
    with pytest.raises(ImportError, match=r"0\.32 and 0\.33, but vLLM 0\.99\.1"):
        flashsloth_serving.check_version("0.99.1")
    flashsloth_serving.check_version("0.33.0")
    flashsloth_serving.check_version("0.32.0+cpu")
    folder, _ = make_checkpoint()
    code = f"""
import flashsloth.serving
flashsloth.serving.TESTED_VERSIONS = ("0.1",)
from vllm import LLM
LLM({str(folder)!r}, dtype="float32", enforce_eager=True, max_model_len=256, block_size=32)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode and "FlashSloth runs in vLLM 0.1, but vLLM 0.32.0" in done.stderr, done.stderr[-3000:]
