"""Saved folders load in a fresh process, with and without the package."""

import json

import pytest
import torch
from accelerate import dispatch_model
from processes import run_alone
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothModel, FlashSlothProcessor

WITHOUT_PACKAGE = """
import sys

sys.modules["flashsloth"] = None  # as if the package were not installed
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
folder, inputs, outputs = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
assert type(processor).__module__.startswith("transformers_modules"), type(processor).__module__
assert type(processor.image_processor).__module__.startswith("transformers_modules")
images, messages = torch.load(inputs, weights_only=False)
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    torch.save((dict(inputs), model(**inputs).logits), outputs)
model.save_pretrained(folder + "-again")
processor.save_pretrained(folder + "-again")
"""


@pytest.fixture
def saved(model, processor, tmp_path):
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def messages(images):
    return [{"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "Why?"}]}]


def logits_of(model, processor, messages):
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.slow
def test_a_folder_loads_in_a_fresh_process_without_the_package(saved, model, processor, messages, tmp_path):
    torch.save(([], messages), tmp_path / "inputs.pt")
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_PACKAGE)
    for folder in (saved, saved.with_name("saved-again")):  # the second one was saved by remote code
        run_alone(script, folder, tmp_path / "inputs.pt", tmp_path / "out.pt", folder=tmp_path)
        _, logits = torch.load(tmp_path / "out.pt", weights_only=False)
        torch.testing.assert_close(logits, logits_of(model, processor, messages))


@pytest.mark.parametrize(
    "auto_class", [AutoModelForImageTextToText, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModel]
)
def test_auto_classes_find_the_installed_package(saved, model, processor, messages, auto_class):
    loaded = auto_class.from_pretrained(saved)
    assert isinstance(loaded, FlashSlothModel if auto_class is AutoModel else FlashSlothForConditionalGeneration)
    assert isinstance(AutoProcessor.from_pretrained(saved), FlashSlothProcessor)
    if auto_class is not AutoModel:
        torch.testing.assert_close(
            logits_of(loaded, processor, messages), logits_of(model, processor, messages), atol=0, rtol=0
        )


def test_a_folder_names_its_code(saved):
    processor_config = json.loads((saved / "processor_config.json").read_text())
    assert processor_config["auto_map"]["AutoProcessor"] == "processing_flashsloth.FlashSlothProcessor"
    image_map = processor_config["image_processor"]["auto_map"]["AutoImageProcessor"]
    assert image_map == "image_processing_flashsloth.FlashSlothImageProcessor"
    assert json.loads((saved / "tokenizer_config.json").read_text())["padding_side"] == "left"
    assert {path.name for path in saved.glob("*.py")} == {
        "configuration_flashsloth.py",
        "generation_flashsloth.py",
        "image_processing_flashsloth.py",
        "modeling_flashsloth.py",
        "processing_flashsloth.py",
        "saliency_flashsloth.py",
        "video_processing_flashsloth.py",
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_loaded_in_the_requested_dtype(saved, processor, messages, dtype):
    model = AutoModelForImageTextToText.from_pretrained(saved, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert logits_of(model, processor, messages).isfinite().all()


def test_device_map_auto_works(saved, model, processor, messages):
    loaded = AutoModelForImageTextToText.from_pretrained(saved, device_map="auto")
    torch.testing.assert_close(logits_of(loaded, processor, messages), logits_of(model, processor, messages))


def test_offloaded_parts_work(saved, model, processor, messages, tmp_path):
    """Every part on its own device, with accelerate's hooks between them: here, all but two on the disk."""
    loaded = AutoModelForImageTextToText.from_pretrained(saved)
    device_map = {"model.vision_tower": "cpu", "model.spatial_attention_pooling": "disk", "lm_head": "disk"}
    device_map |= {"model.multi_modal_projector": "disk", "model.embedded_query": "disk", "model.query_tokens": "cpu"}
    device_map |= {"model.language_model": "disk"}
    dispatched = dispatch_model(loaded, device_map, main_device="cpu", offload_dir=tmp_path / "offload")
    torch.testing.assert_close(logits_of(dispatched, processor, messages), logits_of(model, processor, messages))


def test_missing_weights_are_initialised(model, make_config, tmp_path):
    """Missing tensors must not stay uninitialised memory."""
    state = {name: tensor for name, tensor in model.state_dict().items() if "embedded_query" not in name}
    del state["model.query_tokens"]
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = FlashSlothForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert "model.query_tokens" in info["missing_keys"]
    std = AutoConfig.from_pretrained(tmp_path).text_config.initializer_range
    assert 0.5 * std < loaded.model.query_tokens.std() < 2 * std
    assert loaded.model.embedded_query.query_norm.weight.eq(1).all()


def test_a_pipeline_answers_like_generate(saved, model, processor, messages):
    pipe = pipeline("image-text-to-text", model=str(saved))
    answer = pipe(text=messages, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    inputs = processor.encode_conversations(messages)
    ids = model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    assert answer.strip() == processor.post_process_image_text_to_text(ids)[0]
