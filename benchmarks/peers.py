"""The models that `latency.py` measures: their dimensions, and the inputs that they make from a square image.

All are built from their configs, with random weights and without access to the Hub. Dimensions are class defaults of
transformers where `Peer.source` says so, and otherwise those of the named release's `config.json`, from memory or from
public copies. `latency.py` prints the resulting number of parameters, to be compared with that of the release.

Inputs are built without tokenizers and processors. A row consists of marks, the image, marks, a question of 40 tokens,
and for FlashSloth its 9 queries. Marks are the tokens that a model's own processor puts around images and tiles. There
are no system prompts and no role names.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

import flashsloth
from flashsloth.cli.init import default_query_heads, default_query_layer
from flashsloth.configuration_flashsloth import PHI_2, SIGLIP_SO400M_384

QUESTION_TOKENS = 40
QUERY_HIDDEN_SIZE = 576  # `flashsloth init`'s default
QUESTION_IDS = (1000, 9000)  # ordinary text in every vocabulary
TILE_SIDE = 384  # pixels; FlashSloth resizes every image to tiles of this size

QWEN3_1_7B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
QWEN3_0_6B = QWEN3_1_7B | {"hidden_size": 1024, "intermediate_size": 3072}
LFM2_350M = {
    "model_type": "lfm2",
    "hidden_size": 1024,
    "intermediate_size": 6656,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
}
LFM2_1_2B = LFM2_350M | {"hidden_size": 2048, "intermediate_size": 12288, "num_attention_heads": 32}
SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152 + 3,  # its tokenizer uses all 49152 rows, so `flashsloth init` adds three
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
QWEN3_5_0_8B = {
    "model_type": "qwen3_5_text",
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "linear_num_value_heads": 16,
    "tie_word_embeddings": True,
}
QWEN2_1_5B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
SIGLIP_SO400M = SIGLIP_SO400M_384 | {"vision_use_head": False}
SIGLIP2_SO400M_NAFLEX = {
    "model_type": "siglip2_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "vision_use_head": False,
}


class Layout(NamedTuple):
    """The tokens and inputs of one image.

    Attributes:
        num_image_tokens: Tokens of the image in the prompt.
        num_marks: Other tokens that the model's processor puts around them.
        images: Model inputs of one row: shape of a floating-point input, or values of an integer input.
        joined_last: Names of the inputs whose rows are concatenated along the last axis, not the first.
    """

    num_image_tokens: int
    num_marks: int
    images: dict[str, tuple[int, ...] | list]
    joined_last: tuple[str, ...] = ()


class Peer(NamedTuple):
    """A model to measure.

    Attributes:
        name: Name in the tables.
        architecture: Class in transformers or, for FlashSloth, in this package.
        config: Fields of its config.
        layout: Layout of a square image, from config and side in pixels.
        source: Where the dimensions come from.
        image_processor: Class in transformers, and arguments that differ from its defaults.
    """

    name: str
    architecture: str
    config: dict[str, Any]
    layout: Callable[[PreTrainedConfig, int], Layout]
    source: str
    image_processor: tuple[str, dict[str, Any]]

    @property
    def is_flashsloth(self) -> bool:
        """Whether it is a FlashSloth, with any decoder."""
        return self.architecture.startswith("FlashSloth")

    def build_config(self) -> PreTrainedConfig:
        """Build its config."""
        if self.is_flashsloth:
            return flashsloth.FlashSlothConfig(**self.config)
        fields = dict(self.config)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)

    def build_model(self, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
        """Build the model on the default device, with weights as `torch.nn` initialises them."""
        return self._find(self.architecture)._from_config(self.build_config(), dtype=dtype).eval()

    def build_image_processor(self) -> Callable | None:
        """Build the model's own image processor; `None` if it needs torchvision, which is not installed."""
        name, arguments = self.image_processor
        try:
            return self._find(name)(**arguments)
        except ImportError:
            return None

    def _find(self, name: str) -> Any:
        return getattr(flashsloth if self.is_flashsloth else transformers, name)

    def build_inputs(self, config: PreTrainedConfig, side: int, batch_size: int) -> dict[str, torch.Tensor]:
        """Build inputs of one square image and a question per row, on the CPU.

        Args:
            config: The model's config.
            side: Side of the image, in pixels.
            batch_size: Number of rows; all are the same.
        """
        layout = self.layout(config, side)
        generator = torch.Generator().manual_seed(0)
        ids = torch.tensor(_prompt_ids(self, config, layout, generator)).repeat(batch_size, 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name, content in layout.images.items():
            is_shape = isinstance(content, tuple)
            row = torch.randn(content, generator=generator) if is_shape else torch.tensor(content)
            inputs[name] = torch.cat([row] * batch_size, dim=-1 if name in layout.joined_last else 0)
        if config.model_type in ("qwen2_vl", "qwen3_vl", "qwen3_5"):
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
        if config.model_type == "paligemma":
            inputs["token_type_ids"] = torch.zeros_like(ids)  # the whole prompt is prefix
        return inputs


def _prompt_ids(peer: Peer, config: PreTrainedConfig, layout: Layout, generator: torch.Generator) -> list[int]:
    question = torch.randint(*QUESTION_IDS, (QUESTION_TOKENS,), generator=generator).tolist()
    image = [config.image_token_id] * layout.num_image_tokens
    if peer.is_flashsloth:
        newline = config.instruction_start_ids[0][1:]
        return image + newline + question + [config.query_token_id] * config.num_query_tokens
    marks = [QUESTION_IDS[0]] * layout.num_marks
    if (start := getattr(config, "vision_start_token_id", None)) is not None:
        marks = [start, config.vision_end_token_id]
    return marks[:-1] + image + marks[-1:] + question


def _flashsloth(num_tiles: int) -> Callable[[PreTrainedConfig, int], Layout]:
    def layout(config: PreTrainedConfig, side: int) -> Layout:
        tile = config.vision_config.image_size
        newline = len(config.instruction_start_ids[0]) - 1
        return Layout(num_tiles * config.image_seq_length, newline, {"pixel_values": (num_tiles, 3, tile, tile)})

    return layout


def _one_tile(num_tokens: int, tile: int, num_marks: int = 0) -> Callable[[PreTrainedConfig, int], Layout]:
    """Every image is resized to one tile."""

    def layout(config: PreTrainedConfig, side: int) -> Layout:
        return Layout(num_tokens, num_marks, {"pixel_values": (1, 3, tile, tile)})

    return layout


def _qwen_vl(config: PreTrainedConfig, side: int) -> Layout:
    """Native resolution, rounded to whole tokens; both images are within the size limits."""
    vision = config.vision_config
    tokens = round(side / (vision.patch_size * vision.spatial_merge_size))
    patches = tokens * vision.spatial_merge_size
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    images = {"pixel_values": (patches**2, width), "image_grid_thw": [[1, patches, patches]]}
    return Layout(tokens**2, 2, images)


def _internvl(config: PreTrainedConfig, side: int) -> Layout:
    """At most 12 tiles of 448 px, and a thumbnail if there is more than one."""
    tile = config.vision_config.image_size[0]
    tiles = min(max(1, round(side / tile)), 3) ** 2
    tiles += tiles > 1
    return Layout(tiles * config.image_seq_length, 2, {"pixel_values": (tiles, 3, tile, tile)})


def _smolvlm(config: PreTrainedConfig, side: int) -> Layout:
    """The longer side is always resized to 1536 px: 16 tiles and a global one, two marks each, and 5 newlines."""
    vision = config.vision_config
    grid = 4
    tiles = grid**2 + 1
    tokens = (vision.image_size // vision.patch_size // config.scale_factor) ** 2
    size = (1, tiles, 3, vision.image_size, vision.image_size)
    return Layout(tiles * tokens, 2 * tiles + 1 + grid + 1, {"pixel_values": size})


def _lfm2_vl(config: PreTrainedConfig, side: int) -> Layout:
    """Native resolution up to 256 tokens, rounded to whole ones; above twice that, at most 10 tiles and a thumbnail."""
    vision, tile_tokens = config.vision_config, 16
    token_size = vision.patch_size * config.downsample_factor
    tokens = round(side / token_size)
    grid = 1 if tokens <= tile_tokens else min(round(side / (tile_tokens * token_size)), 3)
    tiles = 1 if grid == 1 else grid**2 + 1
    tokens = min(tokens, tile_tokens)
    patches, most = tokens * config.downsample_factor, (tile_tokens * config.downsample_factor) ** 2
    images = {
        "pixel_values": (tiles, most, 3 * vision.patch_size**2),
        "spatial_shapes": [[patches, patches]] * tiles,
        "pixel_attention_mask": [[1] * patches**2 + [0] * (most - patches**2)] * tiles,
    }
    return Layout(tiles * tokens**2, 2 + (tiles if tiles > 1 else 0), images)


def _minicpm(config: PreTrainedConfig, side: int) -> Layout:
    """An overview of 448 px and, above that size, at most 9 slices; the patches of all of them are concatenated."""
    patch, scale = config.vision_config.patch_size, 448
    grid = 0 if side <= scale else min(round(side / scale), 3)
    slices = grid**2
    patches = scale // patch
    tokens = (patches // 4) ** 2
    images = {
        "pixel_values": (1, 3, patch, (slices + 1) * patches**2 * patch),
        "target_sizes": [[patches, patches]] * (slices + 1),
    }
    # <image_id>0</image_id>, a pair around the overview and each slice, newlines between rows of slices
    num_marks = 3 + 2 * (slices + 1) + max(0, grid - 1)
    return Layout((slices + 1) * tokens, num_marks, images, joined_last=("pixel_values",))


def _gemma4(config: PreTrainedConfig, side: int) -> Layout:
    """At most 280 tokens of 3×3 patches: every square image is resized to 768 px, and its patches are padded."""
    vision, most = config.vision_config, 280
    pooled = math.isqrt(most)
    patches, room = pooled * vision.pooling_kernel_size, most * vision.pooling_kernel_size**2
    places = [[column, row] for row in range(patches) for column in range(patches)]
    images = {
        "pixel_values": (1, room, 3 * vision.patch_size**2),
        "image_position_ids": [places + [[-1, -1]] * (room - len(places))],
    }
    return Layout(pooled**2, 2, images)


def _flashsloth_with(decoder: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Config as `flashsloth init` builds it, except the ids of the special tokens, which do not matter here."""
    width = fields.get("vision_config", SIGLIP_SO400M)["hidden_size"]
    return {
        "text_config": decoder,
        "query_layer_idx": default_query_layer(decoder["num_hidden_layers"]),
        "num_query_heads": default_query_heads(decoder["num_attention_heads"], QUERY_HIDDEN_SIZE, width),
        **fields,
    }


def _small_flashsloth(image_size: int, window: int, decoder_name: str, decoder: dict[str, Any]) -> Peer:
    """What `flashsloth init` builds from SigLIP 2 base, whose last layer it leaves out, and a decoder."""
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": 768,
        "num_hidden_layers": 11,
        "image_size": image_size,
        "patch_size": 16,
    }
    return Peer(
        f"FlashSloth-B/{image_size} + {decoder_name.partition('/')[2]}",
        "FlashSlothForConditionalGeneration",
        _flashsloth_with(decoder, vision_config=tower, pooling_window_size=window, **SMALL_VOCABULARY_IDS),
        _flashsloth(1),
        f"what `flashsloth init` builds; tower: google/siglip2-base-patch16-256 at {image_size} px, windows of "
        f"{window}×{window}; decoder: config of {decoder_name}",
        ("FlashSlothImageProcessor", {"size": {"height": image_size, "width": image_size}}),
    )


SMALL_VOCABULARY_IDS = {"query_token_id": 49152, "image_token_id": 49153, "instruction_start_ids": [[49153, 198]]}
FLASHSLOTH_PROCESSOR = ("FlashSlothImageProcessor", {})
LFM2_5_VL_PROJECTOR = {"projector_hidden_size": 2048, "projector_use_layernorm": False}
QWEN3_VL_PROCESSOR = (
    "Qwen2VLImageProcessorPil",
    {
        "patch_size": 16,
        "min_pixels": 256**2,
        "max_pixels": 4096**2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
)
PEERS = (
    Peer(
        "FlashSloth-3.2B",
        "FlashSlothForConditionalGeneration",
        {},
        _flashsloth(1),
        "FlashSlothConfig's defaults (arXiv 2412.04317)",
        FLASHSLOTH_PROCESSOR,
    ),
    Peer(
        "FlashSloth-HD-3.2B",
        "FlashSlothForConditionalGeneration",
        {},
        _flashsloth(5),
        "FlashSlothConfig's defaults; five tiles",
        ("FlashSlothImageProcessor", {"do_image_splitting": True}),
    ),
    Peer(
        "FlashSloth + Qwen3-1.7B",
        "FlashSlothForConditionalGeneration",
        _flashsloth_with(QWEN3_1_7B),
        _flashsloth(1),
        "what `flashsloth init` builds; decoder: config of Qwen/Qwen3-1.7B",
        FLASHSLOTH_PROCESSOR,
    ),
    Peer(
        "FlashSloth + Qwen3-0.6B",
        "FlashSlothForConditionalGeneration",
        _flashsloth_with(QWEN3_0_6B),
        _flashsloth(1),
        "what `flashsloth init` builds; decoder: config of Qwen/Qwen3-0.6B",
        FLASHSLOTH_PROCESSOR,
    ),
    *(
        _small_flashsloth(image_size, window, name, decoder)
        for image_size, window in ((256, 2), (288, 3))
        for name, decoder in (
            ("Qwen/Qwen3-0.6B", QWEN3_0_6B),
            ("LiquidAI/LFM2-350M", LFM2_350M),
            ("HuggingFaceTB/SmolLM2-135M", SMOLLM2_135M),
        )
    ),
    Peer(
        "all 729 tokens",
        "LlavaForConditionalGeneration",
        {
            "model_type": "llava",
            "text_config": PHI_2,
            "vision_config": SIGLIP_SO400M | {"num_hidden_layers": 26},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "image_seq_length": 729,
            "image_token_index": 50297,
        },
        _one_tile(729, 384),
        "FlashSloth's tower, projector and decoder in transformers' LLaVA, which pools nothing",
        ("SiglipImageProcessorPil", {"size": {"height": 384, "width": 384}}),
    ),
    Peer(
        "Qwen2-VL-2B",
        "Qwen2VLForConditionalGeneration",
        {
            "model_type": "qwen2_vl",
            "text_config": QWEN2_1_5B
            | {
                "model_type": "qwen2_vl_text",
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            },
            "vision_config": {"hidden_size": 1536},
            "tie_word_embeddings": True,
        },
        _qwen_vl,
        "vision tower: class defaults; decoder: config of Qwen/Qwen2-VL-2B-Instruct",
        ("Qwen2VLImageProcessorPil", {"min_pixels": 56**2, "max_pixels": 28**2 * 16384}),
    ),
    Peer(
        "Qwen3-VL-2B",
        "Qwen3VLForConditionalGeneration",
        {
            "model_type": "qwen3_vl",
            "text_config": QWEN3_1_7B
            | {
                "model_type": "qwen3_vl_text",
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
            },
            "vision_config": {
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "out_hidden_size": 2048,
                "deepstack_visual_indexes": [5, 11, 17],
            },
            "tie_word_embeddings": True,
        },
        _qwen_vl,
        "config of Qwen/Qwen3-VL-2B-Instruct; the rest: class defaults",
        QWEN3_VL_PROCESSOR,
    ),
    Peer(
        "Qwen3.5-0.8B",
        "Qwen3_5ForConditionalGeneration",
        {
            "model_type": "qwen3_5",
            "text_config": QWEN3_5_0_8B,
            "vision_config": {
                "depth": 12,
                "hidden_size": 768,
                "num_heads": 12,
                "intermediate_size": 3072,
                "out_hidden_size": 1024,
            },
            "tie_word_embeddings": True,
        },
        _qwen_vl,
        "config of Qwen/Qwen3.5-0.8B; the rest: class defaults; without its multi-token prediction",
        QWEN3_VL_PROCESSOR,
    ),
    Peer(
        "Qwen3.5-2B",
        "Qwen3_5ForConditionalGeneration",
        {
            "model_type": "qwen3_5",
            "text_config": QWEN3_5_0_8B | {"hidden_size": 2048, "intermediate_size": 6144},
            "vision_config": {
                "depth": 24,
                "hidden_size": 1024,
                "num_heads": 16,
                "intermediate_size": 4096,
                "out_hidden_size": 2048,
            },
            "tie_word_embeddings": True,
        },
        _qwen_vl,
        "config of Qwen/Qwen3.5-2B; vision heads and MLP: of Qwen3-VL-2B, whose tower has the same width and depth; "
        "the rest: class defaults; without its multi-token prediction",
        QWEN3_VL_PROCESSOR,
    ),
    Peer(
        "InternVL3-2B",
        "InternVLForConditionalGeneration",
        {
            "model_type": "internvl",
            "text_config": QWEN2_1_5B | {"vocab_size": 151674},
            "tie_word_embeddings": False,
        },
        _internvl,
        "vision tower: class defaults; decoder: config of OpenGVLab/InternVL3-2B-hf",
        (
            "GotOcr2ImageProcessorPil",
            {"crop_to_patches": True, "max_patches": 12, "size": {"height": 448, "width": 448}},
        ),
    ),
    Peer(
        "SmolVLM2-2.2B",
        "SmolVLMForConditionalGeneration",
        {
            "model_type": "smolvlm",
            "text_config": {
                "model_type": "llama",
                "vocab_size": 49280,
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 24,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "pad_token_id": 2,
            },
            "vision_config": {
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "image_size": 384,
                "patch_size": 14,
            },
            "scale_factor": 3,
            "image_token_id": 49190,
            "tie_word_embeddings": False,
        },
        _smolvlm,
        "config of HuggingFaceTB/SmolVLM2-2.2B-Instruct; the rest: class defaults",
        ("SmolVLMImageProcessorPil", {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}}),
    ),
    Peer(
        "FastVLM-1.5B",
        "FastVlmForConditionalGeneration",
        {
            "model_type": "fast_vlm",
            "text_config": QWEN2_1_5B | {"tie_word_embeddings": True},
            "image_seq_length": 256,
        },
        _one_tile(256, 1024),
        "vision tower: class defaults; decoder: config of Qwen/Qwen2-1.5B (github.com/ai-bot-pro/achatbot/pull/148)",
        (
            "LlavaImageProcessorPil",
            {
                "size": {"shortest_edge": 1024},
                "crop_size": {"height": 1024, "width": 1024},
                "do_pad": True,
                "image_mean": [0.0] * 3,
                "image_std": [1.0] * 3,
            },
        ),
    ),
    Peer(
        "LFM2-VL-1.6B",
        "Lfm2VlForConditionalGeneration",
        {
            "model_type": "lfm2_vl",
            "text_config": LFM2_1_2B,
            "vision_config": SIGLIP2_SO400M_NAFLEX | {"num_hidden_layers": 26},
        },
        _lfm2_vl,
        "config of LiquidAI/LFM2-VL-1.6B; the rest: class defaults",
        ("Lfm2VlImageProcessor", {}),
    ),
    Peer(
        "LFM2.5-VL-450M",
        "Lfm2VlForConditionalGeneration",
        {
            "model_type": "lfm2_vl",
            "text_config": LFM2_350M,
            "vision_config": {"model_type": "siglip2_vision_model", "vision_use_head": False},
            **LFM2_5_VL_PROJECTOR,
        },
        _lfm2_vl,
        "config of LiquidAI/LFM2.5-VL-450M; vision tower: class defaults",
        ("Lfm2VlImageProcessor", {}),
    ),
    Peer(
        "LFM2.5-VL-1.6B",
        "Lfm2VlForConditionalGeneration",
        {
            "model_type": "lfm2_vl",
            "text_config": LFM2_1_2B,
            "vision_config": SIGLIP2_SO400M_NAFLEX | {"num_hidden_layers": 27},
            **LFM2_5_VL_PROJECTOR,
        },
        _lfm2_vl,
        "config of LiquidAI/LFM2.5-VL-1.6B; the rest: class defaults",
        ("Lfm2VlImageProcessor", {}),
    ),
    Peer(
        "MiniCPM-V-4.6",
        "MiniCPMV4_6ForConditionalGeneration",
        {
            "model_type": "minicpmv4_6",
            "text_config": QWEN3_5_0_8B,
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 980,
                "patch_size": 14,
            },
            "image_token_id": 248056,
            "tie_word_embeddings": True,
        },
        _minicpm,
        "config of openbmb/MiniCPM-V-4.6; linear attention: config of Qwen/Qwen3.5-0.8B; the rest: class defaults",
        ("MiniCPMV4_6ImageProcessorPil", {}),
    ),
    Peer(
        "Gemma-4-E2B",
        "Gemma4ForConditionalGeneration",
        {
            "model_type": "gemma4",
            "text_config": {
                "model_type": "gemma4_text",
                "hidden_size": 1536,
                "intermediate_size": 6144,
                "num_hidden_layers": 35,
                "num_attention_heads": 8,
                "num_key_value_heads": 1,
                "num_kv_shared_layers": 20,
                "use_double_wide_mlp": True,
                "final_logit_softcapping": 30.0,
                "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
            },
            "vision_config": {"use_clipped_linears": True},
        },
        _gemma4,
        "config of google/gemma-4-E2B-it; vision tower: class defaults; without its audio tower",
        ("Gemma4ImageProcessorPil", {}),
    ),
    Peer(
        "PaliGemma-3B-224",
        "PaliGemmaForConditionalGeneration",
        {
            "model_type": "paligemma",
            "text_config": {
                "model_type": "gemma",
                "vocab_size": 257216,
                "hidden_size": 2048,
                "intermediate_size": 16384,
                "num_hidden_layers": 18,
                "num_attention_heads": 8,
                "num_key_value_heads": 1,
                "head_dim": 256,
            },
            "vision_config": SIGLIP_SO400M | {"image_size": 224},
            "image_token_index": 257152,
        },
        _one_tile(256, 224, num_marks=2),  # <bos> and a newline
        "config of google/paligemma-3b-pt-224",
        ("SiglipImageProcessorPil", {"size": {"height": 224, "width": 224}}),
    ),
    Peer(
        "LLaVA-1.5-7B",
        "LlavaForConditionalGeneration",
        {
            "model_type": "llava",
            "text_config": {"model_type": "llama", "vocab_size": 32064, "num_key_value_heads": 32},
        },
        _one_tile(576, 336),
        "vision tower and decoder: class defaults; vocabulary: config of llava-hf/llava-1.5-7b-hf",
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}),
    ),
)
