"""Configuration of FlashSloth: a vision tower, a decoder, and the two modules of the paper that join them.

The defaults describe FlashSloth-3.2B (arXiv 2412.04317): SigLIP-so400m/14 at 384 px and Phi-2. The configuration of an
original release, which is flat and names its tower instead of describing it, is translated when it is read.
"""

from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto import modeling_auto

from .original_flashsloth import (
    NUM_UNUSED_TOWER_LAYERS,
    PHI_2,
    PHI_INSTRUCTION_STARTS,
    SIGLIP_SO400M_384,
    is_original_config,
    translate_original_config,
)

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
"""Every saved config names its code, so that a folder loads by any of these auto classes without the package."""


@strict
class FlashSlothConfig(PreTrainedConfig):
    r"""Configuration of a FlashSloth model.

    Args:
        text_config: Decoder: a config, or a dict with `model_type`, of any type that `AutoConfig` knows and whose model
            has a list `layers`. Default: Phi-2.
        vision_config: Vision tower: any type whose config has `image_size` and `patch_size` (pixels). All its layers
            are used, and its features are read before any final norm. Default: the first 26 layers of
            SigLIP-so400m/14 at 384 px.
        image_token_id: Vocabulary id of the token that stands for one pooled window of an image.
        query_token_id: Vocabulary id of the token that stands for one query.
        pooling_window_size: Side of a pooling window, in patches; divides the side of the patch grid.
        pooling_dropout: Dropout inside Spatial Attention Pooling, in [0, 1).
        num_query_tokens: Number of queries that stand behind every question.
        query_layer_idx: Index of the decoder layer whose input has its queries updated by the Embedded Query module.
        query_hidden_size: Width of the Embedded Query module; a multiple of its heads.
        num_query_heads: Attention heads of the Embedded Query module; `None`: as many as the decoder has.
        query_anchor_token_id: Vocabulary id of the token whose embedding is added to every query; `None`: none.
        instruction_start_ids: Id patterns behind which an instruction starts. The instruction of a query block runs
            from behind the last pattern before the block up to the block. Default: Phi-2's ids of `<image>\n`, `USER:`
            and ` USER:`.
        lm_head_bias: Whether the output embedding has a bias; `None`: if the decoder is Phi, whose own head has one.
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
    # `Trainer` would gather these by rows for `compute_metrics`, but their first axis is tiles or questions.
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
            self.vision_config.vision_use_head = False
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
        sides = []
        for name in ("image_size", "patch_size"):
            side = getattr(self.vision_config, name, None)
            height, width = side if isinstance(side, (list, tuple)) else (side, side)
            if not isinstance(height, int) or height != width or height < 1:
                raise ValueError(
                    f"FlashSloth needs a vision tower with square images and patches, but `vision_config` "
                    f"({self.vision_config.model_type}) has {name}={side}; choose another tower."
                )
            sides.append(height)
        return sides[0] // sides[1]

    @property
    def num_patches(self) -> int:
        """Number of patches that the tower cuts a tile into."""
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
        """Refuse combinations that no model can be built from.

        transformers calls this when a config is made or saved; the model's constructor calls it again, because a
        config may be changed field by field in between.

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
                f"{self.instruction_start_ids}; give the ids behind which a question starts, such as those of `USER:`."
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
                    "(`text_config.vocab_size`); set the id that your tokenizer gives, or enlarge the vocabulary."
                )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Read a config file; see `PreTrainedConfig.get_config_dict`. That of an original release is translated."""
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _translated(config_dict, folder.parent if folder.is_file() else folder), kwargs

    @classmethod
    def from_json_file(cls, json_file: Any) -> "FlashSlothConfig":
        """Read a config file; see `PreTrainedConfig.from_json_file`. That of an original release is translated."""
        return cls.from_pretrained(json_file)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config from the content of a file; see `PreTrainedConfig.from_dict`."""
        folder = Path(str(kwargs.get("name_or_path", "")))  # which `AutoConfig` sets
        return super().from_dict(_translated(config_dict, folder), **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Fields of this config; see `PreTrainedConfig.to_dict`. Where it was read from is not one of them."""
        return {name: value for name, value in super().to_dict().items() if name != "_name_or_path"}


def _translated(config_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    return translate_original_config(config_dict, folder=folder) if is_original_config(config_dict) else config_dict


def _as_config(config: dict | PreTrainedConfig | None, default: dict) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(default if config is None else config)
    return AutoConfig.for_model(config.pop("model_type", default["model_type"]), **config)


__all__ = ["FlashSlothConfig"]
