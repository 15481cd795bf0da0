"""Attention on CUDA: fused everywhere, and the same in every implementation. Skipped without a GPU."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
IMPLEMENTATIONS = ["eager", "sdpa"] + ["flash_attention_2"] * is_flash_attn_2_available()


def released_widths(attn_implementation):
    """FlashSloth-3.2B with fewer layers: its head dimensions, 72, 80, 18 and 36, are what matters."""
    config = FlashSlothConfig()
    config.text_config.num_hidden_layers = 9
    config.vision_config.num_hidden_layers = 2
    torch.manual_seed(0)
    model = FlashSlothForConditionalGeneration._from_config(config, attn_implementation=attn_implementation)
    return model.to("cuda", torch.bfloat16).eval()


@pytest.fixture(scope="module")
def inputs():
    """A row with a high-definition picture, one with a plain one and one without, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for num_tiles in (5, 1, 0):
        text = torch.randint(1000, 20000, (30,), generator=generator).tolist()
        picture = [50297] * (81 * num_tiles) + [198] * (num_tiles > 0)
        rows.append([1294, 1137, 25, *picture, *text, *[50295] * 9, 24994, 8808, 8643, 25])
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[50256] * (length - len(row)) + row for row in rows], device="cuda"),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device="cuda"),
        "pixel_values": torch.randn((6, 3, 384, 384), generator=generator).to("cuda", torch.bfloat16),
    }


@torch.no_grad()
def test_no_part_falls_back_to_unfused_attention_in_bf16(inputs):
    model = released_widths("sdpa")
    with sdpa_kernel(FUSED):  # without the unfused kernel, a call that no fused one takes raises
        logits = model(**inputs).logits
    assert logits[inputs["attention_mask"].bool()].isfinite().all()


def test_training_is_fused_in_bf16(inputs):
    model = released_widths("sdpa").train()
    with sdpa_kernel(FUSED):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_attention_implementations_agree(inputs):
    mask = inputs["attention_mask"].bool()
    expected = released_widths("eager").float()(**inputs).logits[mask]
    for implementation in IMPLEMENTATIONS:
        logits = released_widths(implementation)(**inputs).logits[mask].float()
        error = (logits - expected).norm() / expected.norm()
        assert error < 0.05, f"{implementation}: {error}"


@torch.no_grad()
def test_generation_agrees_with_the_cpu(model, ask, pictures):
    prompt = ask([(pictures[:1], "What is it?")], [([], "Hello?")])
    expected = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    model.to("cuda")
    try:
        found = model.generate(**prompt.to("cuda"), max_new_tokens=8, do_sample=False)
    finally:
        model.to("cpu")
    assert torch.equal(found.cpu(), expected)
