"""The configuration: defaults, round trips, and impossible combinations."""

import json
import logging
import warnings

import pytest
import torch
from conftest import VISION
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from flashsloth import FlashSlothConfig, FlashSlothModel
from flashsloth.configuration_flashsloth import is_flashsloth_config, is_original_config


def test_defaults_are_the_released_model():
    config = FlashSlothConfig()
    config.validate_architecture()
    text, vision = config.text_config, config.vision_config
    assert (text.model_type, text.hidden_size, text.num_hidden_layers, text.vocab_size) == ("phi", 2560, 32, 51200)
    assert text.rope_parameters["partial_rotary_factor"] == 0.4
    assert (vision.model_type, vision.hidden_size, vision.num_hidden_layers) == ("siglip_vision_model", 1152, 26)
    assert (config.patch_grid_size, config.num_patches, config.image_seq_length) == (27, 729, 81)
    assert (config.query_layer_idx, config.query_hidden_size, config.num_query_heads) == (7, 576, 32)
    assert (config.num_query_tokens, config.query_anchor_token_id, config.lm_head_bias) == (9, 764, True)


def test_a_saved_config_loads_equal(make_config, tmp_path):
    config = make_config("qwen3", num_query_heads=2)
    config.save_pretrained(tmp_path)
    saved, loaded = config.to_dict(), AutoConfig.from_pretrained(tmp_path).to_dict()
    assert loaded["model_type"] == "flashsloth"
    for name in set(saved) - {"architectures", "_name_or_path"}:
        assert loaded[name] == saved[name], name


def test_a_saved_config_names_its_code(make_config, tmp_path):
    make_config().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
    }


def test_heads_and_head_bias_follow_the_decoder(make_config):
    assert make_config("phi").lm_head_bias is True
    assert make_config("llama").lm_head_bias is False
    assert make_config("llama").num_query_heads == 4
    assert make_config("qwen3").tie_word_embeddings is True


IMPOSSIBLE = [
    ({"pooling_window_size": 3}, r"`pooling_window_size`=3 must divide .* 4"),
    ({"pooling_window_size": 0}, r"`pooling_window_size`=0"),
    ({"query_layer_idx": 4}, r"`query_layer_idx`=4 must be from 0 to 3"),
    ({"query_layer_idx": -1}, r"`query_layer_idx`=-1"),
    ({"query_hidden_size": 25}, r"`query_hidden_size`=25 must be a multiple of `num_query_heads`=4"),
    ({"num_query_heads": 3}, r"`vision_config.hidden_size`=32 must be a multiple of `num_query_heads`=3"),
    ({"num_query_heads": 0}, r"`num_query_heads`=0"),
    ({"num_query_tokens": 0}, r"`num_query_tokens` must be at least 1"),
    ({"pooling_dropout": 1.0}, r"`pooling_dropout` must be in \[0, 1\)"),
    ({"image_token_id": 264}, r"`image_token_id`=264 is outside the decoder's vocabulary of 264"),
    ({"query_token_id": -1}, r"`query_token_id`=-1 is outside"),
    ({"query_anchor_token_id": 1000}, r"`query_anchor_token_id`=1000 is outside"),
    ({"instruction_start_ids": [[1, 999]]}, r"`instruction_start_ids.*`=999 is outside"),
    ({"instruction_start_ids": []}, r"at least one non-empty id pattern"),
    ({"instruction_start_ids": [[1], []]}, r"at least one non-empty id pattern"),
    ({"query_token_id": 258}, r"must differ"),
]


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_impossible_combinations_are_refused(make_config, change, message):
    config = make_config()
    assert config.image_token_id == 258
    with pytest.raises(StrictDataclassError, match=message):
        FlashSlothConfig(**{**config.to_dict(), **change})
    for name, value in change.items():
        setattr(config, name, value)  # as `from_pretrained(..., name=value)` does, past the check at construction
    with pytest.raises(ValueError, match=message):
        FlashSlothModel(config)


@pytest.mark.parametrize(
    "vision_config",
    [{**VISION, "image_size": [32, 40]}, {"model_type": "siglip2_vision_model", "num_attention_heads": 4}],
)
def test_a_tower_without_a_square_grid_is_refused(make_config, vision_config):
    with pytest.raises(StrictDataclassError, match=r"square images and patches.*choose another tower"):
        make_config(vision_config=vision_config)


def test_a_decoder_without_layers_is_refused(make_config):
    text = {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 264}
    with pytest.raises(TypeError, match="needs a decoder with a list `layers`, but GPT2Model has none"):
        FlashSlothModel(make_config(text_config=text))


ORIGINAL = {  # as on the Hub, where `mm_vision_tower` is a path on the authors' machine
    "model_type": "phi",
    "architectures": ["FlashSlothForCausalLM"],
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 10240,
    "vocab_size": 51200,
    "partial_rotary_factor": 0.4,
    "eos_token_id": 50256,
    "resid_pdrop": 0.1,
    "torch_dtype": "float16",
    "tokenizer_model_max_length": 3072,
    "transformers_version": "4.38.0",
    "mm_vision_tower": "checkpoints/base/siglip-so400m-patch14-384",
    "mm_hidden_size": 1152,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "mlp2x_gelu",
    "image_aspect_ratio": "square",
}
FIELDS = ("hidden_size", "num_hidden_layers", "rope_parameters", "vocab_size", "eos_token_id", "pad_token_id")
VARIANTS = {  # fields that differ; None: absent
    "as on the Hub": {},
    "of the authors' class": {"model_type": "flashsloth"},
    "without a model_type": {"model_type": None},
    "of an unknown model_type": {"model_type": "llava_phi"},
    "without an architecture": {"architectures": None},
    "without a tower": {"mm_vision_tower": None},
    "without any mm_ field": {name: None for name in ORIGINAL if name.startswith("mm_")},
    "of the class of another version": {"architectures": ["FlashSlothForConditionalGenerationV2"]},
    "with newer fields": {"image_hd": True, "image_token_index": 50297, "use_cache": False},
}


def write_original(folder, **changes):
    config = {name: value for name, value in (ORIGINAL | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("kind", VARIANTS)
def test_an_original_config_is_translated(tmp_path, caplog, kind):
    content = write_original(tmp_path, **VARIANTS[kind])
    default = FlashSlothConfig()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            configs = [
                FlashSlothConfig.from_pretrained(tmp_path),
                FlashSlothConfig.from_pretrained(tmp_path / "config.json"),
                FlashSlothConfig.from_json_file(tmp_path / "config.json"),
                FlashSlothConfig.from_dict(content),
            ]
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []
    for config in configs:
        assert config.to_dict()["model_type"] == "flashsloth"
        assert config.vision_config.to_diff_dict() == default.vision_config.to_diff_dict()
        assert config.text_config.resid_pdrop == 0.1
        assert (config.dtype, config.image_token_id) == (torch.float16, 50297)
        assert config.text_config.use_cache
        for name in FIELDS:
            assert getattr(config.text_config, name) == getattr(default.text_config, name), name


def test_the_tower_is_found_in_a_subfolder_too(tmp_path):
    (tmp_path / "release" / "tower").mkdir(parents=True)
    write_original(tmp_path / "release", mm_vision_tower="tower")
    tower = {"hidden_size": 64, "num_hidden_layers": 3, "image_size": 48}
    (tmp_path / "release" / "tower" / "config.json").write_text(json.dumps(tower))
    for config in (
        FlashSlothConfig.from_pretrained(tmp_path / "release"),
        FlashSlothConfig.from_pretrained(tmp_path, subfolder="release"),
    ):
        assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (64, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type.*'linear'"),
        ({"mm_vision_select_layer": -40}, "`mm_vision_select_layer`=-40 is not a layer"),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, r"`architectures` must be \['FlashSlothForCausalLM'\]"),
        ({"hidden_size": "2560"}, "`hidden_size` must be a whole number from 1, but is '2560'"),
        ({"image_hd": "yes"}, "`image_hd` must be true or false, but is 'yes'"),
        ({"torch_dtype": "half precision"}, "`torch_dtype` must be a type of torch"),
    ],
)
def test_an_original_config_of_another_model_is_refused(tmp_path, change, message):
    write_original(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        FlashSlothConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("loader", [FlashSlothConfig, AutoConfig])
def test_a_config_does_not_store_where_it_was_read_from(make_config, tmp_path, loader):
    config = make_config("qwen3")
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert loaded.to_dict() == FlashSlothConfig.from_dict(config.to_dict()).to_dict()
    assert "_name_or_path" not in loaded.to_dict()


def test_a_config_of_another_model_is_no_release():
    for config in ({}, {"model_type": "phi", "architectures": ["PhiForCausalLM"]}, {"architectures": None}):
        assert not is_original_config(config)
        assert not is_flashsloth_config(config)
    assert not is_original_config({"model_type": "flashsloth"})
    assert is_flashsloth_config({"model_type": "flashsloth"})


@pytest.mark.parametrize("field", ["num_query_tokens", "image_token_id", "lm_head_bias", "instruction_start_ids"])
def test_a_field_of_a_wrong_type_is_named(make_config, field):
    with pytest.raises(StrictDataclassError, match=f"Validation error for field '{field}'"):
        make_config(**{field: "a"})
