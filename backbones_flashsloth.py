"""The two networks of transformers that FlashSloth joins, without what it does not use and what slows them down."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel

CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before
CACHE_NAME = CACHE_NAMES[0] if hasattr(BaseModelOutputWithPast, "cache") else CACHE_NAMES[1]
"""What the installed transformers calls the keys and values of what came before, in arguments and in outputs."""

BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # of x86, and of Arm


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether a device multiplies bfloat16 matrices by instructions of its own.

    A CPU that has none emulates them, several times slower than float32. A PyTorch that cannot tell (before
    `torch.cpu.get_capabilities`) counts as one of those.
    """
    if torch.device(device).type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS)


def working_dtype(device: torch.device | str) -> torch.dtype | str:
    """The `dtype` in which to load a model that is to answer on a device: "auto", the checkpoint's, or float32."""
    return "auto" if has_bfloat16(device) else torch.float32


class NoPooling(nn.Module):
    """Stands where a vision tower pools its patches, however it asks whether it does."""

    def forward(self, *_args: Any, **_kwargs: Any) -> None:
        """Give no pooled feature."""


def build_vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a vision tower without final norm, pooler and head: FlashSloth reads its last layer's output as it is."""
    tower = AutoModel.from_config(config)
    for name in ("post_layernorm", "layernorm", "norm", "rms_norm", "pooler", "head"):
        if isinstance(getattr(tower, name, None), nn.Module):
            setattr(tower, name, NoPooling() if name in ("pooler", "head") else nn.Identity())
    if isinstance(embeddings := getattr(tower, "embeddings", None), nn.Module):
        embeddings.register_forward_hook(_lay_out_by_patches)
    return tower


def _lay_out_by_patches(_module: nn.Module, _args: tuple, patches: Any) -> Any:
    """The convolution leaves patches transposed in memory; through all layers, every norm would copy them."""
    return patches.contiguous() if isinstance(patches, torch.Tensor) else patches


def build_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a decoder between whose layers the queries can be updated.

    Raises:
        TypeError: If it has no list of layers.
    """
    decoder = AutoModel.from_config(config)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise TypeError(
            f"FlashSloth needs a decoder with a list `layers`, but {type(decoder).__name__} has none; choose another "
            "`text_config`, such as phi, llama or qwen3."
        )
    for module in list(decoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):  # Phi's: the same function in one kernel instead of eight
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])
    return decoder


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, by whichever of its two names it came.

    Raises:
        ValueError: If it came by both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError(
            "`cache` and `past_key_values` are two names of one thing, but both were given; pass one of them, and to "
            f"`generate` of the installed transformers `{CACHE_NAME}`."
        )
    return past_key_values if cache is None else cache


def scale_logits(logits: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """What some decoders' own heads do behind the matrix: Granite divides, Gemma 2 squashes."""
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits
