"""Towers and decoders of transformers are built to run faster, and compute the same."""

import pytest
import torch
from torch.profiler import profile
from transformers import AutoModel
from transformers.activations import ACT2FN

from flashsloth.cli.devices import has_bfloat16, working_dtype
from flashsloth.modeling_flashsloth import build_decoder, build_vision_tower


def layer_inputs(tower, pixel_values):
    """Input of every layer of a vision tower."""
    inputs = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in tower.encoder.layers]
    with torch.no_grad():
        tower(pixel_values)
    for hook in hooks:
        hook.remove()
    return inputs


@pytest.mark.parametrize("family", ["siglip_vision_model", "clip_vision_model"])
def test_patches_are_contiguous_in_every_layer(make_config, family):
    config = make_config(vision_config={**make_config().vision_config.to_dict(), "model_type": family}).vision_config
    tower, plain = build_vision_tower(config).eval(), AutoModel.from_config(config).eval()
    plain.load_state_dict(tower.state_dict(), strict=False)
    pixel_values = torch.randn(2, 3, 32, 32)
    inputs = layer_inputs(tower, pixel_values)
    assert len(inputs) == config.num_hidden_layers
    assert all(states.is_contiguous() for states in inputs)
    assert all(map(torch.equal, inputs, layer_inputs(plain, pixel_values)))


def test_phis_activation_runs_in_one_kernel_and_computes_the_same(make_config):
    config = make_config().text_config
    config.hidden_act = "gelu_new"
    fused = build_decoder(config).layers[0].mlp.activation_fn
    states = torch.linspace(-8, 8, 1001)
    torch.testing.assert_close(fused(states), ACT2FN["gelu_new"](states), atol=1e-6, rtol=0)
    with profile() as kernels:
        fused(states)
    assert [event.name for event in kernels.events() if event.name.startswith("aten::")] == ["aten::gelu"]


@pytest.mark.parametrize("instruction", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_cpu_with_bfloat16_uses_the_checkpoints_dtype(monkeypatch, instruction):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, instruction: True}, raising=False)
    assert has_bfloat16("cpu")
    assert working_dtype(torch.device("cpu")) == "auto"


def test_a_cpu_without_bfloat16_uses_float32_and_a_gpu_does_not(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False}, raising=False)
    assert working_dtype("cpu") == torch.float32
    assert working_dtype("cuda") == "auto"
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older PyTorch
    assert working_dtype("cpu") == torch.float32
