"""The shipped checkpoint is small, answers correctly, and answers the same in every generation mode, in bfloat16."""

import copy
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import run_alone
from questions import KINDS
from safetensors import safe_open
from score import answer, build_inputs, evaluate, scene_items
from test_hub import WITHOUT_PACKAGE
from transformers import CompileConfig

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli.devices import working_dtype

ROOT = Path(__file__).parents[1]
NUM_QUESTIONS = 16


@pytest.fixture(scope="module")
def shipped():
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT, dtype=torch.bfloat16).eval()
    return model, FlashSlothProcessor.from_pretrained(ROOT)


@pytest.fixture(scope="module")
def prompts(shipped):
    """Renders the first questions of the evaluation set, as one batch or alone."""
    questions = list(itertools.islice(scene_items(8), NUM_QUESTIONS))
    return lambda rows: build_inputs(shipped[1], [questions[row] for row in rows])


def answers(model, inputs, **kwargs):
    """New tokens of every row, up to the end token."""
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False, **kwargs)
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    end = model.generation_config.eos_token_id
    return [row[: row.index(end)] if end in row else row for row in rows]


def test_it_is_small():
    with safe_open(ROOT / "model.safetensors", "pt") as file:
        tensors = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
        assert {tensor.get_dtype() for tensor in tensors} == {"BF16"}
        assert sum(torch.Size(tensor.get_shape()).numel() for tensor in tensors) <= 14e6
    assert (ROOT / "model.safetensors").stat().st_size <= 28e6


@pytest.mark.slow
def test_a_fresh_clone_loads_by_remote_code(shipped, images, tmp_path):
    content = [{"type": "image", "image": images[0]}, {"type": "text", "text": "Why?"}]
    messages = [{"role": "user", "content": content}]
    torch.save(([], messages), tmp_path / "inputs.pt")
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_PACKAGE.replace('folder + "-again"', f'"{tmp_path}/again"'))
    run_alone(script, ROOT, tmp_path / "inputs.pt", tmp_path / "out.pt", folder=tmp_path)
    inputs, logits = torch.load(tmp_path / "out.pt", weights_only=False)
    with torch.no_grad():
        torch.testing.assert_close(logits, shipped[0](**inputs).logits)


@pytest.mark.slow
def test_it_answers_most_questions(shipped):
    """A part of the evaluation set; `examples/tiny/evaluation.json` has all of it."""
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT, dtype=working_dtype("cpu")).eval()
    result = evaluate(list(scene_items(40)), partial(answer, model, shipped[1]))["scenes"]
    assert set(result) == {*KINDS, "all"} - {"refuse"}
    assert result["all"].right >= 0.93 * result["all"].asked  # measured: 318 of 335


@pytest.fixture(scope="module")
def alone(shipped, prompts):
    return [answers(shipped[0], prompts([row]))[0] for row in range(NUM_QUESTIONS)]


def test_a_batch_answers_like_its_rows_in_bf16(shipped, prompts, alone):
    assert answers(shipped[0], prompts(range(NUM_QUESTIONS))) == alone


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 1, "prefill_chunk_size": 4096},
    ],
)
def test_every_cache_answers_the_same_in_bf16(shipped, prompts, alone, mode):
    assert answers(shipped[0], prompts(range(NUM_QUESTIONS)), **mode) == alone


@pytest.mark.parametrize("mode", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_unfused_attention_in_the_decoder_answers_the_same_in_bf16(shipped, prompts, alone, mode):
    model = copy.deepcopy(shipped[0])
    model.set_attn_implementation({"text_config": "eager"})
    assert answers(model, prompts(range(NUM_QUESTIONS)), **mode) == alone


@pytest.mark.slow
def test_compiled_decoding_answers_the_same_in_bf16(shipped, prompts, alone):
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    mode = {"cache_implementation": "static", "compile_config": compile_config}
    assert answers(shipped[0], prompts(range(NUM_QUESTIONS)), **mode) == alone


def test_prompt_lookup_answers_the_same_in_bf16(shipped, prompts, alone):
    for row in range(4):
        assert answers(shipped[0], prompts([row]), prompt_lookup_num_tokens=3)[0] == alone[row]


def test_an_assistant_answers_the_same_in_bf16(shipped, prompts, alone):
    for row in range(4):
        assert answers(shipped[0], prompts([row]), assistant_model=shipped[0])[0] == alone[row]
