"""The two networks of transformers that FlashSloth joins, without what it does not use and what slows them down."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.modeling_utils import PreTrainedModel


def build_vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a vision tower without final norm, pooler and head: FlashSloth reads its last layer's output as it is."""
    tower = AutoModel.from_config(config)
    for name in ("post_layernorm", "layernorm", "norm", "rms_norm", "pooler", "head"):
        if isinstance(getattr(tower, name, None), nn.Module):
            setattr(tower, name, None if name in ("pooler", "head") else nn.Identity())
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
