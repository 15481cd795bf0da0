"""Quantised language models: the recipes of docs/converting.md, on the CPU, with the shipped checkpoint."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BitsAndBytesConfig, TorchAoConfig

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.training.lora import LORA_TARGET_MODULES, UNQUANTIZED_MODULES

ROOT = Path(__file__).parents[1]
SKIPPED = list(UNQUANTIZED_MODULES)
DECODER = "model.language_model."
LOGIT_TOLERANCE = {"torchao int8": 0.01, "torchao int4": 0.07, "bitsandbytes 8-bit": 0.015, "bitsandbytes 4-bit": 0.12}
"""The longest difference of the logits, relative to their own length; measured: 0.004, 0.033, 0.006 and 0.071."""
SHARES = {"torchao int8": 0.55, "torchao int4": 0.35, "bitsandbytes 8-bit": 0.55, "bitsandbytes 4-bit": 0.35}
"""The most memory that the decoder's layers may take, relative to bfloat16."""


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2), modules_to_not_convert=SKIPPED)


def torchao_int4():
    quantization = pytest.importorskip("torchao.prototype.quantization.int4")
    return TorchAoConfig(quantization.PrototypeInt4WeightOnlyConfig(group_size=32), modules_to_not_convert=SKIPPED)


def bitsandbytes_8bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=SKIPPED)


def bitsandbytes_4bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=SKIPPED,
    )


RECIPES = {
    "torchao int8": torchao_int8,
    "torchao int4": torchao_int4,
    "bitsandbytes 8-bit": bitsandbytes_8bit,
    "bitsandbytes 4-bit": bitsandbytes_4bit,
}


def load(source=ROOT, quantization_config=None):
    kwargs = {} if quantization_config is None else {"quantization_config": quantization_config}
    return FlashSlothForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16, **kwargs).eval()


def ask(image, question):
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    content = [{"type": "image", "image": Image.open(ROOT / "examples" / image)}, {"type": "text", "text": question}]
    return processor, processor.encode_conversations([{"role": "user", "content": content}])


def answer(model, image, question):
    processor, inputs = ask(image, question)
    ids = model.generate(**inputs, max_new_tokens=40)[:, inputs["input_ids"].shape[1] :]
    return processor.post_process_image_text_to_text(ids)[0]


@torch.no_grad()
def logits(model):
    return model(**ask("shapes.png", "Describe the picture.")[1]).logits[0, -1].float()


def num_bytes(tensor):
    """Memory of a tensor, or of the parts of a quantised one."""
    if not hasattr(tensor, "__tensor_flatten__") or type(tensor) is torch.nn.Parameter:
        return tensor.nbytes
    return sum(num_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def layer_bytes(model):
    names = (
        name for name, _ in load().named_parameters() if re.fullmatch(LORA_TARGET_MODULES, name.rpartition(".")[0])
    )
    parameters = dict(model.named_parameters())
    return sum(num_bytes(parameters[name]) for name in names)


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request):
    return request.param


@pytest.fixture(scope="module")
def quantised(recipe):
    return load(quantization_config=RECIPES[recipe]())


@pytest.fixture(scope="module")
def plain():
    return load()


def test_only_the_decoders_layers_are_quantised(quantised, plain):
    before, after = (dict(model.named_parameters()) for model in (plain, quantised))
    changed = {name for name, parameter in after.items() if type(parameter) is not type(before[name])}
    changed |= {name for name, parameter in after.items() if parameter.dtype is not torch.bfloat16}
    linear = {name for name, _ in plain.named_modules() if re.fullmatch(LORA_TARGET_MODULES, name)}
    assert changed == {f"{name}.weight" for name in linear}


def test_answers_stay_right_and_logits_close(quantised, plain, recipe):
    assert answer(quantised, "scene.png", "Read the sign.") == "PULL"
    assert answer(quantised, "shapes.png", "Describe the picture.").endswith("a purple cross bottom right")
    difference = (logits(quantised) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < difference < LOGIT_TOLERANCE[recipe]


def test_memory_shrinks(recipe, plain):
    assert layer_bytes(load(quantization_config=RECIPES[recipe]())) < SHARES[recipe] * layer_bytes(plain)


def test_a_saved_model_loads_quantised(recipe, quantised, tmp_path):
    model = load(quantization_config=RECIPES[recipe]())  # on the CPU, bitsandbytes repacks 4-bit weights when they run
    if recipe == "torchao int4":
        with pytest.raises(ValueError, match="Unsupported tensor type"):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    loaded = FlashSlothForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(quantised), atol=0, rtol=0)
