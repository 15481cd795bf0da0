"""Configuration of FlashSloth: a vision tower, a decoder, and the two modules of the paper that join them.

The defaults describe FlashSloth-3.2B (arXiv 2412.04317): SigLIP-so400m/14 at 384 px and Phi-2. The second half of the
file reads the flat configuration of the original releases, which names its vision tower instead of describing it. The
end lists the attributes that FlashSloth overrides in transformers; importing this file checks that they exist.
"""

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, GenerationConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto import modeling_auto

# transformers reads these tables of names directly, and `register` of the auto classes does not add to them.
# `transformers serve` looks a custom architecture up in the first before it loads any remote code; `Trainer` shifts the
# labels of `label_smoothing_factor` for the names in the second.
for names in (modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
    names.setdefault("flashsloth", "FlashSlothForConditionalGeneration")

AUTO_MAP = {
    "AutoConfig": "configuration_flashsloth.FlashSlothConfig",
    "AutoModel": "modeling_flashsloth.FlashSlothModel",
    "AutoModelForCausalLM": "modeling_flashsloth.FlashSlothForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_flashsloth.FlashSlothForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_flashsloth.FlashSlothForConditionalGeneration",
}
"""Written to every saved config, so that these auto classes load a folder without the package."""

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
SIGLIP_SO400M_384: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
ORIGINAL_ARCHITECTURE, ORIGINAL_TOWER_FIELD = "FlashSlothForCausalLM", "mm_vision_tower"
NUM_UNUSED_TOWER_LAYERS = 1  # FlashSloth reads the input of the tower's last layer
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
"""Tensor names of the original releases, as regular expressions, and the names that replace them here."""


@strict
class FlashSlothConfig(PreTrainedConfig):
    r"""Configuration of a FlashSloth model.

    Args:
        text_config: Decoder: a config, or a dict with `model_type`, of any type that `AutoConfig` knows and whose model
            has a list `layers`. Default: Phi-2.
        vision_config: Vision tower: any type whose config has `image_size` and `patch_size` (pixels). All its layers
            are used, and its features are read before any final norm. Default: the first 26 layers of
            SigLIP-so400m/14 at 384 px.
        image_token_id: Vocabulary id of an image token, the placeholder of one pooled window.
        query_token_id: Vocabulary id of a query token.
        pooling_window_size: Side of a pooling window, in patches; divides the side of the patch grid.
        pooling_dropout: Dropout inside Spatial Attention Pooling, in [0, 1).
        num_query_tokens: Number of query tokens after every question.
        query_layer_idx: Index of the decoder layer in whose input the Embedded Query module updates the query tokens.
        query_hidden_size: Width of the Embedded Query module; a multiple of its heads.
        num_query_heads: Attention heads of the Embedded Query module; `None`: as many as the decoder has.
        encode_tile_positions: Whether the Embedded Query module can tell from which image or tile of the prompt a patch
            comes; not in the paper. For models that are trained on several.
        query_anchor_token_id: Vocabulary id of the token whose embedding is added to every query token;
            `None`: none.
        instruction_start_ids: Id patterns after which an instruction begins. The instruction of a query block extends
            from the last pattern before the block to the block. Default: Phi-2's ids of `<image>\n`, `USER:` and
            ` USER:`.
        lm_head_bias: Whether the output embedding has a bias; `None`: only for Phi, whose own head has one.
        tie_word_embeddings: Whether output and input embedding share their weight; also true if `text_config` says so.

    Example:
    ```python
    >>> from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration

    >>> config = FlashSlothConfig()  # FlashSloth-3.2B
    >>> config.image_seq_length
    81
    ```
    """

    model_type = "flashsloth"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    # For `compute_metrics`, `Trainer` would gather these by rows, but their first axis is tiles or questions.
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "hidden_states",
        "attentions",
        "image_hidden_states",
        "image_outputs",
        "pooling_attentions",
        "query_attentions",
    ]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 50297
    query_token_id: int = 50295
    pooling_window_size: int = 3
    pooling_dropout: float | int = 0.1
    num_query_tokens: int = 9
    query_layer_idx: int = 7
    query_hidden_size: int = 576
    num_query_heads: int | None = None
    encode_tile_positions: bool = False
    query_anchor_token_id: int | None = 764
    instruction_start_ids: list[list[int]] | None = None
    lm_head_bias: bool | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _as_config(self.text_config, PHI_2)
        default_tower = {
            **SIGLIP_SO400M_384,
            "num_hidden_layers": SIGLIP_SO400M_384["num_hidden_layers"] - NUM_UNUSED_TOWER_LAYERS,
        }
        self.vision_config = _as_config(self.vision_config, default_tower)
        if self.vision_config.model_type == "siglip_vision_model":
            self.vision_config.vision_use_head = False  # FlashSloth does not read the pooled output of SigLIP's head
        if self.instruction_start_ids is None:
            self.instruction_start_ids = [list(pattern) for pattern in PHI_INSTRUCTION_STARTS]
        if self.num_query_heads is None:
            self.num_query_heads = self.text_config.num_attention_heads
        if self.lm_head_bias is None:
            self.lm_head_bias = self.text_config.model_type == "phi"
        self.tie_word_embeddings = self.tie_word_embeddings or bool(self.text_config.tie_word_embeddings)
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    @property
    def patch_grid_size(self) -> int:
        """Side of the tower's patch grid, in patches.

        Raises:
            ValueError: If the tower has no square patch grid.
        """
        return patch_grid_size(self.vision_config)  # type: ignore[arg-type]

    @property
    def num_patches(self) -> int:
        """Number of patches in a tile."""
        return self.patch_grid_size**2

    @property
    def tile_size(self) -> tuple[int, int]:
        """Height and width of a tile, in pixels."""
        size = self.vision_config.image_size
        return tuple(size) if isinstance(size, (list, tuple)) else (size, size)

    @property
    def image_seq_length(self) -> int:
        """Number of image tokens of one tile in the prompt."""
        return (self.patch_grid_size // self.pooling_window_size) ** 2

    def validate_architecture(self) -> None:
        """Reject fields from which no model can be built.

        transformers calls this when a config is created or saved; the model's constructor calls it again, because
        fields may change in between.

        Raises:
            ValueError: If the fields contradict each other.
        """
        super().validate_architecture()
        grid, window = self.patch_grid_size, self.pooling_window_size
        if window < 1 or grid < window or grid % window:
            raise ValueError(
                f"`pooling_window_size`={window} must divide the side of the patch grid, {grid} (`vision_config`: "
                f"image_size {self.vision_config.image_size}, patch_size {self.vision_config.patch_size})."
            )
        num_layers = self.text_config.num_hidden_layers
        if not 0 <= self.query_layer_idx < num_layers:
            raise ValueError(
                f"`query_layer_idx`={self.query_layer_idx} must be from 0 to {num_layers - 1}: the decoder "
                f"({self.text_config.model_type}) has {num_layers} layers."
            )
        for name, width in (
            ("query_hidden_size", self.query_hidden_size),
            ("vision_config.hidden_size", self.vision_config.hidden_size),
        ):
            if self.num_query_heads < 1 or width < 1 or width % self.num_query_heads:
                raise ValueError(
                    f"`{name}`={width} must be a multiple of `num_query_heads`={self.num_query_heads}; "
                    "change one of the two."
                )
        if self.num_query_tokens < 1:
            raise ValueError(f"`num_query_tokens` must be at least 1, but is {self.num_query_tokens}.")
        if not 0 <= self.pooling_dropout < 1:
            raise ValueError(f"`pooling_dropout` must be in [0, 1), but is {self.pooling_dropout}.")
        self._check_token_ids()

    def _check_token_ids(self) -> None:
        if not self.instruction_start_ids or not all(self.instruction_start_ids):
            raise ValueError(
                "`instruction_start_ids` must hold at least one non-empty id pattern, but is "
                f"{self.instruction_start_ids}; pass the ids after which a question begins, such as those of `USER:`."
            )
        if self.image_token_id == self.query_token_id:
            raise ValueError(f"`image_token_id` and `query_token_id` must differ, but both are {self.image_token_id}.")
        ids = {
            "image_token_id": self.image_token_id,
            "query_token_id": self.query_token_id,
            "query_anchor_token_id": 0 if self.query_anchor_token_id is None else self.query_anchor_token_id,
        }
        ids |= {f"instruction_start_ids: {p}": i for p in self.instruction_start_ids for i in p}
        for name, token_id in ids.items():
            if not 0 <= token_id < self.text_config.vocab_size:
                raise ValueError(
                    f"`{name}`={token_id} is outside the decoder's vocabulary of {self.text_config.vocab_size} tokens "
                    "(`text_config.vocab_size`); set the id from your tokenizer, or enlarge the vocabulary."
                )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Read a config file, translating that of an original release; see `PreTrainedConfig.get_config_dict`."""
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _translated(config_dict, folder.parent if folder.is_file() else folder), kwargs

    @classmethod
    def from_json_file(cls, json_file: Any) -> "FlashSlothConfig":
        """Read a config file, translating that of an original release; see `PreTrainedConfig.from_json_file`."""
        return cls.from_pretrained(json_file)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config from the content of a file; see `PreTrainedConfig.from_dict`."""
        folder = Path(str(kwargs.get("name_or_path", "")))  # set by `AutoConfig`
        return super().from_dict(_translated(config_dict, folder), **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Fields of this config, without the path it was read from; see `PreTrainedConfig.to_dict`."""
        return {name: value for name, value in super().to_dict().items() if name != "_name_or_path"}


def _translated(config_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    return translate_original_config(config_dict, folder=folder) if is_original_config(config_dict) else config_dict


def _as_config(config: dict | PreTrainedConfig | None, default: dict) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(default if config is None else config)
    return AutoConfig.for_model(config.pop("model_type", default["model_type"]), **config)


def patch_grid_size(vision_config: PreTrainedConfig) -> int:
    """Side of a vision tower's patch grid, in patches.

    Args:
        vision_config: Config of the tower, with `image_size` and `patch_size` in pixels.

    Raises:
        ValueError: If the tower has no square patch grid.
    """
    sides = []
    for name in ("image_size", "patch_size"):
        side = getattr(vision_config, name, None)
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        if not isinstance(height, int) or height != width or height < 1:
            raise ValueError(
                f"FlashSloth needs a vision tower with square images and patches, but `vision_config` "
                f"({vision_config.model_type}) has {name}={side}; choose another tower."
            )
        sides.append(height)
    return sides[0] // sides[1]


def is_original_config(config: dict) -> bool:
    """Whether a `config.json` is that of an original release.

    It is recognised by its architecture or its vision tower: in the authors' releases, `model_type` is Phi's.

    Args:
        config: The content of the file.
    """
    return ORIGINAL_TOWER_FIELD in config or ORIGINAL_ARCHITECTURE in _architectures(config)


def is_flashsloth_config(config: dict) -> bool:
    """Whether a `config.json` is a FlashSloth's, in this package's layout or in that of the original releases.

    Args:
        config: The content of the file.
    """
    return config.get("model_type") == "flashsloth" or is_original_config(config)


def translate_original_config(original: dict, *, folder: Path, vision_config: Path | None = None) -> dict:
    """Translate the config of an original FlashSloth release.

    Args:
        original: The release's `config.json`: Phi's fields and `mm_*` fields in one flat dict; any may be absent.
        folder: The release's folder; a relative `mm_vision_tower` is looked for in it.
        vision_config: Folder or file of the vision tower's own config. Default: the target of `mm_vision_tower` or,
            if that does not exist, SigLIP-so400m/14 at 384 px, the tower of all releases.

    Returns:
        The fields of a `FlashSlothConfig`.

    Raises:
        ValueError: If the release is of a kind that FlashSloth does not support, or a field has a wrong type.
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
        ValueError: If the field is neither true nor false.
    """
    return _field(original, "image_hd", _FLAG, False)


def _architectures(config: dict) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _check_architecture(original: dict) -> None:
    """Reject other models of the LLaVA family, whose configs have the same fields."""
    names = _architectures(original)
    if names and not any(name.startswith(("FlashSloth", "Phi")) for name in names):
        raise ValueError(
            f"`architectures` must be ['{ORIGINAL_ARCHITECTURE}'] in an original FlashSloth, but is {names}."
        )


def _field(config: dict, name: str, kind: str, default: Any) -> Any:
    """Read a field that may be absent or null."""
    value = config.get(name)
    if value is not None and not _KINDS[kind](value):
        raise ValueError(f"`{name}` must be {kind}, but is {value!r}.")
    return default if value is None else value


def _translate_decoder(original: dict) -> dict:
    fields = {name: _field(original, name, kind, None) for name, kind in _DECODER_FIELDS.items()}
    fields = {name: value for name, value in fields.items() if value is not None}
    return fields | {name: PHI_2[name] for name in ("model_type", "eos_token_id", "pad_token_id")}


def _num_read_layers(original: dict, tower: dict) -> int:
    """Number of the tower's layers that FlashSloth uses."""
    select_layer = _field(original, "mm_vision_select_layer", _INTEGER, -2)
    num_layers = tower.get("num_hidden_layers", SIGLIP_SO400M_384["num_hidden_layers"])
    kept = num_layers + 1 + select_layer if select_layer < 0 else select_layer
    if not 0 < kept <= num_layers:
        raise ValueError(
            f"`mm_vision_select_layer`={select_layer} is not a layer of a vision tower with {num_layers} layers."
        )
    return kept


def original_generation_config(original: dict, config: PreTrainedConfig) -> GenerationConfig:
    """Build the generation config of an original release, whose own is Phi-2's and does not end at `</s>`.

    Args:
        original: The release's `generation_config.json`; only its sampling settings are kept.
        config: The model's `FlashSlothConfig`; image and query tokens are never generated.

    Raises:
        ValueError: If a setting has a wrong type.
    """
    kinds = _SAMPLING_FIELDS if _field(original, "do_sample", _FLAG, False) else _GREEDY_FIELDS
    fields = {name: _field(original, name, kind, None) for name, kind in kinds.items()}
    fields = {name: value for name, value in fields.items() if value is not None}
    fields |= {name: PHI_2[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**fields, suppress_tokens=[config.image_token_id, config.query_token_id])


_TEXT, _FLAG, _OBJECT = "text", "true or false", "an object"
_INTEGER, _COUNT, _POSITIVE = "a whole number", "a whole number from 1", "a number above 0"
_PROBABILITY, _FRACTION = "a number from 0 to 1", "a number above 0 and up to 1"
_ACTIVATION, _DTYPE = "an activation function of transformers", "a type of torch, such as 'float16'"
_KINDS: dict[str, Callable[[Any], bool]] = {
    _TEXT: lambda value: isinstance(value, str),
    _FLAG: lambda value: isinstance(value, bool),
    _OBJECT: lambda value: isinstance(value, dict),
    _INTEGER: lambda value: type(value) is int,
    _COUNT: lambda value: type(value) is int and value >= 1,
    _POSITIVE: lambda value: type(value) in (int, float) and 0 < value < math.inf,
    _FRACTION: lambda value: type(value) in (int, float) and 0 < value <= 1,
    _PROBABILITY: lambda value: type(value) in (int, float) and 0 <= value <= 1,
    _ACTIVATION: lambda value: isinstance(value, str) and value in ACT2FN,
    _DTYPE: lambda value: isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype),
}
_GREEDY_FIELDS = {"num_beams": _COUNT, "repetition_penalty": _POSITIVE, "no_repeat_ngram_size": _INTEGER}
_SAMPLING_FIELDS = {
    "do_sample": _FLAG,
    "temperature": _POSITIVE,
    "top_k": _INTEGER,
    "top_p": _PROBABILITY,
    **_GREEDY_FIELDS,
}
_DECODER_FIELDS = (
    dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), _COUNT)
    | dict.fromkeys(("num_attention_heads", "num_key_value_heads", "max_position_embeddings"), _COUNT)
    | dict.fromkeys(("layer_norm_eps", "initializer_range", "rope_theta"), _POSITIVE)
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attention_dropout"), _PROBABILITY)
    | dict.fromkeys(("qk_layernorm", "tie_word_embeddings"), _FLAG)
    | {"hidden_act": _ACTIVATION, "partial_rotary_factor": _FRACTION, "rope_scaling": _OBJECT, "bos_token_id": _INTEGER}
)
"""Fields of a release's config that describe its decoder, and the kinds of their values."""


def read_tower_config(path: Path, *, required: bool) -> dict:
    """Read a vision tower's config from a folder or file.

    Args:
        path: `config.json`, or a folder with one; a SigLIP config with both towers is accepted too.
        required: Whether to raise an error if there is none; otherwise SigLIP-so400m/14 at 384 px is returned.

    Returns:
        The tower's config, with `model_type`.

    Raises:
        FileNotFoundError: If `required` and there is no such file.
        ValueError: If the file does not contain such a config.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if required:
            raise FileNotFoundError(f"Expected the vision tower's config.json at {path}, but there is none.")
        return dict(SIGLIP_SO400M_384)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        config = config.get("vision_config", config)
        config.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} must contain a vision tower's config as a JSON object, but does not.") from error
    drop = ("architectures", "torch_dtype", "dtype", "transformers_version")
    config = {"model_type": "siglip_vision_model"} | {name: v for name, v in config.items() if name not in drop}
    try:
        for name in SIGLIP_SO400M_384.keys() - {"model_type"}:
            _field(config, name, _COUNT, None)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config


TRANSFORMERS_HOOKS = {
    "configuration_utils.PreTrainedConfig": ("_auto_class", "from_dict", "get_config_dict", "validate_architecture"),
    "generation.GenerationMixin": (
        "_expand_inputs_for_generation",
        "_get_stopping_criteria",
        "_prepare_generation_config",
        "_update_model_kwargs_for_generation",
        "prepare_inputs_for_generation",
    ),
    "image_processing_backends.PilBackend": (
        "fetch_images",
        "preprocess",
        "process_image",
    ),
    "modeling_utils.PreTrainedModel": (
        "_auto_class",
        "_can_compile_fullgraph",
        "_can_set_attn_implementation",
        "_init_weights",
        "_keys_to_ignore_on_load_unexpected",
        "_no_split_modules",
        "_skip_keys_device_placement",
        "_supports_attention_backend",
        "_supports_flash_attn",
        "_supports_flex_attn",
        "_supports_sdpa",
        "_tied_weights_keys",
        "_tp_plan",
        "post_init",
    ),
    "processing_utils.ProcessorMixin": (
        "_check_special_mm_tokens",
        "get_text_with_replacements",
        "post_process_image_text_to_text",
        "prepare_inputs_layout",
        "replace_image_token",
        "unused_input_names",
    ),
    "trainer.Trainer": (
        "_get_eval_sampler",
        "_get_train_sampler",
        "_run_epoch",
        "create_accelerator_and_postprocess",
        "evaluate",
    ),
    "trainer_callback.TrainerCallback": ("on_epoch_begin", "on_train_begin"),
}
"""Methods and attributes of transformers' classes that FlashSloth overrides. If a new version renamed one, FlashSloth's
would no longer be used, and answers would change without an error."""


def check_transformers(*class_paths: str) -> None:
    """Check that the installed transformers still has everything that FlashSloth overrides.

    Args:
        class_paths: Keys of `TRANSFORMERS_HOOKS`.

    Raises:
        ImportError: If something is missing.
    """
    missing = []
    for path in class_paths:
        module, _, name = path.rpartition(".")
        overridden = getattr(importlib.import_module(f"transformers.{module}"), name)
        missing += [f"{name}.{hook}" for hook in TRANSFORMERS_HOOKS[path] if not hasattr(overridden, hook)]
    if missing:
        raise ImportError(
            f"FlashSloth overrides {', '.join(missing)}, but transformers {transformers.__version__} no longer has "
            "that, and answers would be wrong; install a version that FlashSloth was tested with: "
            "pip install 'transformers>=5.17,<=5.24'."
        )


check_transformers(*(path for path in TRANSFORMERS_HOOKS if not path.startswith("trainer")))  # see training/recipe.py

__all__ = ["FlashSlothConfig"]
