"""The package computes what the original FlashSloth computes: the golden cases, from a converted checkpoint.

`golden/` holds what the original implementation gave in float32 on a small checkpoint with synthetic weights.
"""

import json
import logging
import re

import pytest
import torch
from golden_checkpoint import CASES, GOLDEN, read_case, write_golden_checkpoint
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration, FlashSlothModel, FlashSlothProcessor
from flashsloth.cli.convert import convert
from flashsloth.configuration_flashsloth import ORIGINAL_KEY_MAPPING

TOLERANCE = 1e-4
ASSISTANT = [24994, 8808, 8643, 25]  # " ASSISTANT:"
END = 50296  # "</s>"


@pytest.fixture(scope="module", params=["converted", "original layout"])
def golden_model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    source = write_golden_checkpoint(folder / "original")
    if request.param == "converted":
        convert(source, folder / "converted")
        source = folder / "converted"
    model = FlashSlothForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    model.model.vision_tower.requires_grad_(False)  # as it was when the gradients were recorded
    return model


def answer_labels(input_ids):
    """Labels after every `ASSISTANT:`, up to and including its end token."""
    labels = torch.full_like(input_ids, -100)
    for row, ids in enumerate(input_ids.tolist()):
        inside = False
        for i, token in enumerate(ids):
            if inside:
                labels[row, i] = token
            inside = (inside and token != END) or ids[max(0, i - 3) : i + 1] == ASSISTANT
    return labels


@pytest.mark.parametrize("load", [AutoConfig.from_pretrained, FlashSlothConfig.from_pretrained])
def test_auto_classes_read_the_original_layout_where_its_model_type_is_ours(tmp_path, load):
    source = write_golden_checkpoint(tmp_path / "original")
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(content | {"model_type": "flashsloth"}))
    config = load(source)
    assert (config.text_config.hidden_size, config.vision_config.num_hidden_layers) == (128, 2)
    assert AutoProcessor.from_pretrained(source).image_seq_length == config.image_seq_length


def test_a_release_of_model_type_phi_loads_without_a_warning(tmp_path, caplog, recwarn):
    """transformers' auto classes load it as a Phi; this package's classes and config do not."""
    source = write_golden_checkpoint(tmp_path / "original")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert AutoConfig.from_pretrained(source).model_type == "phi"
        processor = FlashSlothProcessor.from_pretrained(source)
        config = FlashSlothConfig.from_pretrained(source)
        models = [
            FlashSlothForConditionalGeneration.from_pretrained(source),
            AutoModelForImageTextToText.from_pretrained(source, config=config),
        ]
        FlashSlothModel.from_pretrained(source)
        assert caplog.messages == []
        pipe = pipeline("image-text-to-text", model=models[0], processor=processor)
        content = [{"type": "image", "image": Image.new("RGB", (20, 30))}, {"type": "text", "text": "What is it?"}]
        pipe(text=[{"role": "user", "content": content}], max_new_tokens=2)
    finally:
        logger.removeHandler(caplog.handler)
    # transformers' pipelines cause warnings about arguments that they set themselves.
    assert all("argument" in message or "max_length" in message for message in caplog.messages)
    assert [str(warning.message) for warning in recwarn] == []
    assert {type(model) for model in models} == {FlashSlothForConditionalGeneration}
    states = [model.state_dict() for model in models]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert processor.image_seq_length == config.image_seq_length


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_the_original(golden_model, name):
    _, inputs = read_case(name, golden_model.config)
    expected = load_file(GOLDEN / f"{name}.safetensors")
    seen = {}

    def record(key):
        def hook(_, args, kwargs):
            seen[key] = args[0] if args else kwargs["hidden_states"]

        return hook

    decoder = golden_model.model.language_model
    hooks = [decoder.layers[i].register_forward_pre_hook(record(i), with_kwargs=True) for i in (0, 7)]
    with torch.no_grad():
        last = golden_model.model(**inputs).last_hidden_state
        logits = golden_model(**inputs).logits
    for hook in hooks:
        hook.remove()
    mask = inputs["attention_mask"].bool()
    found = {"hidden_in": seen[0], "hidden_embq": seen[7], "hidden_last": last, "logits_cols": logits[..., ::401]}
    for key, value in found.items():
        assert (value - expected[key])[mask].abs().max() < TOLERANCE, key
    assert torch.equal(logits.argmax(dim=-1)[mask], expected["argmax"][mask])


@pytest.mark.parametrize("name", CASES)
def test_vision_equals_the_original(golden_model, name):
    _, inputs = read_case(name, golden_model.config)
    expected = load_file(GOLDEN / f"{name}.safetensors")
    with torch.no_grad():
        features = golden_model.get_image_features(inputs["pixel_values"])
        pooled = golden_model.model.spatial_attention_pooling(features.last_hidden_state)
    found = {"vision": features.last_hidden_state[:, ::7, ::31], "sap": pooled[..., ::7]}
    found["projected"] = features.pooler_output
    for key, value in found.items():
        reference = expected[key].reshape(-1, *value.shape[1:])[: len(value)]
        assert (value - reference).abs().max() < TOLERANCE, key


@pytest.mark.parametrize("name", [case for case in CASES if case != "single"])  # has no answer
def test_loss_and_gradients_equal_the_original(golden_model, name):
    case, inputs = read_case(name, golden_model.config)
    golden_model.zero_grad()
    loss = golden_model(**inputs, labels=answer_labels(inputs["input_ids"])).loss
    loss.backward()
    assert abs(loss.item() - case["loss"]) < TOLERANCE
    parameters = dict(golden_model.named_parameters())
    for original_name, expected in case["grad_norms"].items():
        for pattern, replacement in ORIGINAL_KEY_MAPPING.items():
            original_name = re.sub(pattern, replacement, original_name)
        norm = parameters[original_name].grad.double().norm().item()
        # The gradients of some biases, such as those of keys, are only rounding errors: softmax ignores common offsets.
        assert norm == pytest.approx(expected, rel=TOLERANCE, abs=1e-8), original_name


@pytest.mark.parametrize("name", ["generate", "generate_hd"])
def test_greedy_tokens_equal_the_original(golden_model, name):
    case, inputs = read_case(name, golden_model.config)
    # The original always generates 16 tokens.
    output = golden_model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=-1)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == case["new_tokens"]
