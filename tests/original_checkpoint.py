"""Makes tiny checkpoints in the layout of the original FlashSloth releases.

The sizes are tiny. Tensor names, files, config fields (including `model_type` "phi") and token ids are those of the
releases: the vocabulary has Phi-2's ids where FlashSloth needs them, and meaningless entries elsewhere.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, VISION_HIDDEN, NUM_LAYERS, NUM_TOWER_LAYERS, VOCAB_SIZE = 32, 16, 9, 3, 50304
PREFIX = "model.vision_tower.vision_tower.vision_model."
TOWER = {
    "architectures": ["SiglipVisionModel"],
    "model_type": "siglip_vision_model",
    "hidden_size": VISION_HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": NUM_TOWER_LAYERS,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
    "torch_dtype": "float32",
}
CONFIG = {
    "architectures": ["FlashSlothForCausalLM"],
    "model_type": "phi",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "qk_layernorm": False,
    "tie_word_embeddings": False,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": None,
    "image_aspect_ratio": "square",
    "initializer_range": 0.02,
    "resid_pdrop": 0.0,
    "tokenizer_model_max_length": 3072,
    "tokenizer_padding_side": "right",
    "use_mm_proj": True,
    "mm_hidden_size": VISION_HIDDEN,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "siglip-tower",
    "torch_dtype": None,
    "transformers_version": "4.38.0",
}


def original_shapes(
    *, query_hidden_size: int = 576, num_query_tokens: int = 9, hidden_size: int = HIDDEN, intermediate_size: int = 40
) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, by their original names."""
    shapes = _tower_shapes()
    shapes["model.embed_tokens.weight"] = (VOCAB_SIZE, hidden_size)
    _linear(shapes, "lm_head", hidden_size, VOCAB_SIZE)
    _norm(shapes, "model.final_layernorm", hidden_size)
    for index in range(NUM_LAYERS):
        layer = f"model.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "dense"):
            _linear(shapes, f"{layer}.self_attn.{name}", hidden_size, hidden_size)
        _linear(shapes, f"{layer}.mlp.fc1", hidden_size, intermediate_size)
        _linear(shapes, f"{layer}.mlp.fc2", intermediate_size, hidden_size)
        _norm(shapes, f"{layer}.input_layernorm", hidden_size)

    _linear(shapes, "model.pooling.mlp.0", VISION_HIDDEN, VISION_HIDDEN)
    _linear(shapes, "model.pooling.mlp.3", VISION_HIDDEN, 1)
    _linear(shapes, "model.mm_projector.0", VISION_HIDDEN, hidden_size)
    _linear(shapes, "model.mm_projector.2", hidden_size, hidden_size)
    shapes["model.learnable_tokens.token"] = (num_query_tokens, hidden_size)
    _linear(shapes, "model.lqformer.down_projector_learnable_text", hidden_size, query_hidden_size)
    _linear(shapes, "model.lqformer.down_projector_image", VISION_HIDDEN, query_hidden_size)
    _linear(shapes, "model.lqformer.up_projector", VISION_HIDDEN, hidden_size)
    for name in ("t2q_attn.q_proj", "t2q_attn.k_proj", "t2q_attn.v_proj", "i2q_attn.q_proj", "i2q_attn.k_proj"):
        _linear(shapes, f"model.lqformer.layers.0.{name}", query_hidden_size, query_hidden_size)
    _linear(shapes, "model.lqformer.layers.0.i2q_attn.v_proj", VISION_HIDDEN, VISION_HIDDEN)
    for name in ("ln_q", "ln_text", "ln_kv"):
        _norm(shapes, f"model.lqformer.layers.0.{name}", query_hidden_size)
    return shapes


def _tower_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    patch, grid = TOWER["patch_size"], TOWER["image_size"] // TOWER["patch_size"]
    shapes[f"{PREFIX}embeddings.patch_embedding.weight"] = (VISION_HIDDEN, 3, patch, patch)
    shapes[f"{PREFIX}embeddings.patch_embedding.bias"] = (VISION_HIDDEN,)
    shapes[f"{PREFIX}embeddings.position_embedding.weight"] = (grid**2, VISION_HIDDEN)
    for index in range(NUM_TOWER_LAYERS):
        layer = f"{PREFIX}encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            _linear(shapes, f"{layer}.self_attn.{name}", VISION_HIDDEN, VISION_HIDDEN)
        _linear(shapes, f"{layer}.mlp.fc1", VISION_HIDDEN, TOWER["intermediate_size"])
        _linear(shapes, f"{layer}.mlp.fc2", TOWER["intermediate_size"], VISION_HIDDEN)
        _norm(shapes, f"{layer}.layer_norm1", VISION_HIDDEN)
        _norm(shapes, f"{layer}.layer_norm2", VISION_HIDDEN)
    _norm(shapes, f"{PREFIX}post_layernorm", VISION_HIDDEN)
    shapes[f"{PREFIX}head.probe"] = (1, 1, VISION_HIDDEN)
    return shapes


def _linear(shapes: dict[str, tuple[int, ...]], name: str, inputs: int, outputs: int) -> None:
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)


def _norm(shapes: dict[str, tuple[int, ...]], name: str, width: int) -> None:
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)


def original_tensors(dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, torch.Tensor]:
    """Random tensors by their original names; every call returns the same."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in original_shapes(**sizes).items():
        values = torch.randn(shape, generator=generator) * 0.2
        is_scale = name.endswith("weight") and len(shape) == 1
        tensors[name] = (values + is_scale).to(dtype)
    return tensors


def make_original(
    folder: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    *,
    num_shards: int = 1,
    as_bin: bool = False,
    tower_folder: Path | None = None,
    **config: Any,
) -> Path:
    """Write a checkpoint.

    Args:
        folder: Output folder.
        tensors: Default: `original_tensors()`.
        num_shards: Number of weight files. If there are several, an index is written.
        as_bin: Whether to write `pytorch_model.bin` instead of `model.safetensors`.
        tower_folder: Folder of the tower's config. Default: the one that the checkpoint's config names.
        **config: Fields that differ from `CONFIG`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG | config)
    tower_folder = tower_folder or folder / CONFIG["mm_vision_tower"]
    tower_folder.mkdir(parents=True, exist_ok=True)
    write_json(tower_folder / "config.json", TOWER)
    write_tokenizer(folder)
    write_weights(folder, tensors or original_tensors(), num_shards=num_shards, as_bin=as_bin)
    return folder


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], *, num_shards: int = 1, as_bin: bool = False) -> None:
    """Write weight files, and an index if there are several."""
    stem, suffix = ("pytorch_model", ".bin") if as_bin else ("model", ".safetensors")
    names, weight_map = sorted(tensors), {}
    for number in range(num_shards):
        file = f"{stem}{suffix}" if num_shards == 1 else f"{stem}-{number + 1:05d}-of-{num_shards:05d}{suffix}"
        part = {name: tensors[name] for name in names[number::num_shards]}
        if as_bin:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if num_shards > 1:
        write_json(folder / f"{stem}{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_tokenizer(folder: Path) -> None:
    """Write a slow CodeGen tokenizer whose ids are Phi-2's where FlashSloth needs them."""
    known = {".": 13, ":": 25, "Ċ": 198, "Ġ": 220, "Ġ.": 764, "ER": 1137, "ĠUS": 1294, "US": 2937, "USER": 29904}
    bytes_ = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    rest = iter([*(symbol for symbol in bytes_ if symbol not in known), *(f"unused{i}" for i in range(VOCAB_SIZE))])
    symbol_of = {token_id: symbol for symbol, token_id in known.items()}
    vocab = {symbol_of.get(token_id) or next(rest): token_id for token_id in range(50256)}
    write_json(folder / "vocab.json", vocab | {"<|endoftext|>": 50256})
    (folder / "merges.txt").write_text("#version: 0.2\nU S\nE R\nĠ US\nUS ER\nĠ .\n", encoding="utf-8")
    added = {"<learnable>": 50295, "</s>": 50296} | {" " * (n + 2): 50286 - n for n in range(30)}
    added |= {"\t" * (n + 2): 50294 - n for n in range(8)}
    write_json(folder / "added_tokens.json", added)
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = {name: {"content": name, **plain} for name in ("<|endoftext|>", "</s>", "<learnable>")}
    names = {"bos_token": "<|endoftext|>", "eos_token": "</s>", "unk_token": "<|endoftext|>"}
    write_json(
        folder / "special_tokens_map.json",
        {name: special[token] for name, token in names.items()}
        | {"additional_special_tokens": [special["<learnable>"]], "pad_token": "<|endoftext|>"},
    )
    decoder = {
        str(token_id): {"content": token, **plain, "special": token in special}
        for token, token_id in {"<|endoftext|>": 50256, **added}.items()
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": decoder,
            "additional_special_tokens": ["<learnable>"],
            "bos_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": True,
            "eos_token": "</s>",
            "model_max_length": 3072,
            "pad_token": "<|endoftext|>",
            "padding_side": "right",
            "tokenizer_class": "CodeGenTokenizer",
            "unk_token": "<|endoftext|>",
        },
    )


def write_json(file: Path, content: dict) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")
