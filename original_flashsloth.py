"""The layout of the original FlashSloth releases: their sizes, their flat config, their tensor names."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PHI_2 = {
    "model_type": "phi",
    "vocab_size": 51200,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "partial_rotary_factor": 0.4,
    "max_position_embeddings": 2048,
    "bos_token_id": 50256,
    "eos_token_id": 50296,
    "pad_token_id": 50256,
}
SIGLIP_SO400M_384 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
ORIGINAL_ARCHITECTURE, ORIGINAL_TOWER_FIELD = "FlashSlothForCausalLM", "mm_vision_tower"
NUM_UNUSED_TOWER_LAYERS = 1  # FlashSloth reads what enters the tower's last layer
PHI_INSTRUCTION_STARTS = [[50297, 198], [29904, 25], [1294, 1137, 25]]  # "<image>\n", "USER:", " USER:"

ORIGINAL_KEY_MAPPING = {
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.pooling\.mlp\.0\.": "model.spatial_attention_pooling.fc1.",
    r"^model\.pooling\.mlp\.3\.": "model.spatial_attention_pooling.fc2.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.learnable_tokens\.token$": "model.query_tokens",
    r"^model\.lqformer\.down_projector_learnable_text\.": "model.embedded_query.text_proj.",
    r"^model\.lqformer\.down_projector_image\.": "model.embedded_query.image_proj.",
    r"^model\.lqformer\.up_projector\.": "model.embedded_query.out_proj.",
    r"^model\.lqformer\.layers\.0\.t2q_attn\.": "model.embedded_query.text_attention.",
    r"^model\.lqformer\.layers\.0\.i2q_attn\.": "model.embedded_query.image_attention.",
    r"^model\.lqformer\.layers\.0\.ln_q\.": "model.embedded_query.query_norm.",
    r"^model\.lqformer\.layers\.0\.ln_text\.": "model.embedded_query.text_norm.",
    r"^model\.lqformer\.layers\.0\.ln_kv\.": "model.embedded_query.image_norm.",
    r"^model\.(embed_tokens|layers|final_layernorm)\.": r"model.language_model.\1.",
}
"""Tensor names of the original releases, as regular expressions, and what they are called here."""


def is_original_config(config: dict) -> bool:
    """Whether a `config.json` is that of an original release.

    Its architecture or its vision tower tells; its `model_type` does not, which is Phi's in the authors' releases.

    Args:
        config: What the file holds.
    """
    return ORIGINAL_TOWER_FIELD in config or ORIGINAL_ARCHITECTURE in _architectures(config)


def is_flashsloth_config(config: dict) -> bool:
    """Whether a `config.json` is a FlashSloth's, in this package's layout or in that of the original releases.

    Args:
        config: What the file holds.
    """
    return config.get("model_type") == "flashsloth" or is_original_config(config)


def translate_original_config(original: dict, *, folder: Path, vision_config: Path | None = None) -> dict:
    """Translate the config of an original FlashSloth release.

    Args:
        original: The release's `config.json`: Phi's fields, flat, and `mm_*` fields, of which any may be absent.
        folder: The release's folder; a relative `mm_vision_tower` is looked for in it.
        vision_config: Folder or file of the vision tower's own config. Default: what `mm_vision_tower` points to, or
            SigLIP-so400m/14 at 384 px, the tower of all releases, if nothing is there.

    Returns:
        The fields of a `FlashSlothConfig`.

    Raises:
        ValueError: If the release is of a kind that FlashSloth does not have, or a field is of a wrong type.
    """
    _check_architecture(original)
    projector = _field(original, "mm_projector_type", _TEXT, "mlp2x_gelu")
    if projector != "mlp2x_gelu":
        raise ValueError(f"`mm_projector_type` must be 'mlp2x_gelu' in an original FlashSloth, but is {projector!r}.")
    named = _field(original, ORIGINAL_TOWER_FIELD, _TEXT, None)
    tower = SIGLIP_SO400M_384
    if vision_config or named:
        tower = read_tower_config(vision_config or folder / named, required=bool(vision_config))
    splits_images(original)
    config = {
        "model_type": "flashsloth",
        "architectures": ["FlashSlothForConditionalGeneration"],
        "text_config": _translate_decoder(original),
        "vision_config": tower | {"num_hidden_layers": _num_read_layers(original, tower), "vision_use_head": False},
        "dtype": _field(original, "dtype", _DTYPE, _field(original, "torch_dtype", _DTYPE, None)),
    }
    if (image_token_id := _field(original, "image_token_index", _COUNT, None)) is not None:
        config["image_token_id"] = image_token_id
    return config


def splits_images(original: dict) -> bool:
    """Whether an original release cuts images into five tiles.

    Args:
        original: The release's `config.json`.

    Raises:
        ValueError: If it does not say so by true or false.
    """
    return _field(original, "image_hd", _FLAG, False)


def _architectures(config: dict) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _check_architecture(original: dict) -> None:
    """Refuse other models of the LLaVA family, whose configs have the same fields."""
    names = _architectures(original)
    if names and not any(name.startswith(("FlashSloth", "Phi")) for name in names):
        raise ValueError(
            f"`architectures` must be ['{ORIGINAL_ARCHITECTURE}'] in an original FlashSloth, but is {names}."
        )


def _field(config: dict, name: str, kind: str, default: Any) -> Any:
    """A field of a config, which may be absent or null."""
    value = config.get(name)
    if value is not None and not _KINDS[kind](value):
        raise ValueError(f"`{name}` must be {kind}, but is {value!r}.")
    return default if value is None else value


def _translate_decoder(original: dict) -> dict:
    fields = {name: _field(original, name, kind, None) for name, kind in _DECODER_FIELDS.items()}
    fields = {name: value for name, value in fields.items() if value is not None}
    return fields | {name: PHI_2[name] for name in ("model_type", "eos_token_id", "pad_token_id")}


def _num_read_layers(original: dict, tower: dict) -> int:
    """How many of the tower's layers are read."""
    select_layer = _field(original, "mm_vision_select_layer", _INTEGER, -2)
    num_layers = tower.get("num_hidden_layers", SIGLIP_SO400M_384["num_hidden_layers"])
    kept = num_layers + 1 + select_layer if select_layer < 0 else select_layer
    if not 0 < kept <= num_layers:
        raise ValueError(
            f"`mm_vision_select_layer`={select_layer} is not a layer of a vision tower with {num_layers} layers."
        )
    return kept


def original_generation_config(original: dict, config: PreTrainedConfig) -> GenerationConfig:
    """Generation config of an original FlashSloth release, whose own is Phi-2's and does not end at `</s>`.

    Args:
        original: The release's `generation_config.json`; only its way of sampling is kept.
        config: The model's `FlashSlothConfig`; image and query tokens are never generated.

    Raises:
        ValueError: If one of them is of a wrong type.
    """
    kinds = _SAMPLING_FIELDS if _field(original, "do_sample", _FLAG, False) else _GREEDY_FIELDS
    fields = {name: _field(original, name, kind, None) for name, kind in kinds.items()}
    fields = {name: value for name, value in fields.items() if value is not None}
    fields |= {name: PHI_2[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**fields, suppress_tokens=[config.image_token_id, config.query_token_id])


def leave_original_layout(model: "PreTrainedModel") -> None:
    """Make a model that was read from an original release one of this package; others stay as they are."""
    used = {pattern for conversion in model._weight_conversions or () for pattern in conversion.source_patterns}
    if used.isdisjoint(ORIGINAL_KEY_MAPPING):
        return
    # transformers would save the tensors under the names that it read, and answers would not end at `</s>`.
    model._weight_conversions = None
    if model.can_generate():
        model.generation_config = original_generation_config(model.generation_config.to_dict(), model.config)


_TEXT, _FLAG, _OBJECT = "text", "true or false", "an object"
_INTEGER, _COUNT, _POSITIVE, _SHARE = (
    "a whole number",
    "a whole number from 1",
    "a number above 0",
    "a number from 0 to 1",
)
_PART = "a number above 0 and up to 1"
_ACTIVATION, _DTYPE = "an activation function of transformers", "a type of torch, such as 'float16'"
_KINDS: dict[str, Callable[[Any], bool]] = {
    _TEXT: lambda value: isinstance(value, str),
    _FLAG: lambda value: isinstance(value, bool),
    _OBJECT: lambda value: isinstance(value, dict),
    _INTEGER: lambda value: type(value) is int,
    _COUNT: lambda value: type(value) is int and value >= 1,
    _POSITIVE: lambda value: type(value) in (int, float) and 0 < value < math.inf,
    _PART: lambda value: type(value) in (int, float) and 0 < value <= 1,
    _SHARE: lambda value: type(value) in (int, float) and 0 <= value <= 1,
    _ACTIVATION: lambda value: isinstance(value, str) and value in ACT2FN,
    _DTYPE: lambda value: isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype),
}
_GREEDY_FIELDS = {"num_beams": _COUNT, "repetition_penalty": _POSITIVE, "no_repeat_ngram_size": _INTEGER}
_SAMPLING_FIELDS = {"do_sample": _FLAG, "temperature": _POSITIVE, "top_k": _INTEGER, "top_p": _SHARE, **_GREEDY_FIELDS}
_DECODER_FIELDS = (
    dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), _COUNT)
    | dict.fromkeys(("num_attention_heads", "num_key_value_heads", "max_position_embeddings"), _COUNT)
    | dict.fromkeys(("layer_norm_eps", "initializer_range", "rope_theta"), _POSITIVE)
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attention_dropout"), _SHARE)
    | dict.fromkeys(("qk_layernorm", "tie_word_embeddings"), _FLAG)
    | {"hidden_act": _ACTIVATION, "partial_rotary_factor": _PART, "rope_scaling": _OBJECT, "bos_token_id": _INTEGER}
)
"""What a release says about its decoder, and what it must be; the rest is how to run it or what it was saved with."""


def read_tower_config(path: Path, *, required: bool) -> dict:
    """Read a vision tower's config from a folder or file.

    Args:
        path: `config.json`, or a folder with one; a SigLIP config with both towers is accepted too.
        required: Whether to raise if there is none, instead of returning SigLIP-so400m/14 at 384 px.

    Returns:
        The tower's config, with `model_type`.

    Raises:
        FileNotFoundError: If `required` and there is no such file.
        ValueError: If the file does not hold such a config.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if required:
            raise FileNotFoundError(f"expected the vision tower's config.json at {path}, but there is none.")
        return dict(SIGLIP_SO400M_384)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        config = config.get("vision_config", config)
        config.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} should hold a vision tower's config as a JSON object, but does not.") from error
    drop = ("architectures", "torch_dtype", "dtype", "transformers_version")
    config = {"model_type": "siglip_vision_model"} | {name: v for name, v in config.items() if name not in drop}
    try:
        for name in SIGLIP_SO400M_384.keys() - {"model_type"}:
            _field(config, name, _COUNT, None)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config
