"""On CUDA, attention is fused everywhere and the same in every implementation, the first token waits for nothing, and
decoding and, on request, the prefill are graphs. Skipped without a GPU."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache
from transformers.utils import is_flash_attn_2_available

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
IMPLEMENTATIONS = ["eager", "sdpa"] + ["flash_attention_2"] * is_flash_attn_2_available()


def released_widths(attn_implementation):
    """FlashSloth-3.2B with fewer layers: only its head dimensions, 72, 80, 18 and 36, matter here."""
    config = FlashSlothConfig()
    config.text_config.num_hidden_layers = 9
    config.vision_config.num_hidden_layers = 2
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = FlashSlothForConditionalGeneration._from_config(config, attn_implementation=attn_implementation)
    return model.to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def inputs():
    """A row with a high-definition image, one with a plain one and one without, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for num_tiles in (5, 1, 0):
        text = torch.randint(1000, 20000, (30,), generator=generator).tolist()
        image = [50297] * (81 * num_tiles) + [198] * (num_tiles > 0)
        rows.append([1294, 1137, 25, *image, *text, *[50295] * 9, 24994, 8808, 8643, 25])
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_attention_implementations_agree(inputs, implementation):
    mask = inputs["attention_mask"].bool()
    expected = released_widths("eager").float()(**inputs).logits[mask]
    logits = released_widths(implementation)(**inputs).logits[mask].float()
    assert (logits - expected).norm() / expected.norm() < 0.05


@torch.no_grad()
def test_generation_agrees_with_the_cpu(model, ask, images):
    prompt = ask([(images[:1], "What is it?")], [([], "Hello?")])
    expected = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    model.to("cuda")
    try:
        found = model.generate(**prompt.to("cuda"), max_new_tokens=8, do_sample=False)
    finally:
        model.to("cpu")
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("num_tiles", [1, 5])
@torch.no_grad()
def test_nothing_waits_for_the_device_before_the_first_token(inputs, num_tiles):
    model = released_widths("sdpa")
    row = 1 if num_tiles == 1 else 0
    is_text = inputs["attention_mask"][row].bool()
    prompt = {name: inputs[name][row : row + 1, is_text] for name in ("input_ids", "attention_mask")}
    prompt["pixel_values"] = inputs["pixel_values"][:num_tiles]

    def first_token(**changes):
        positions = torch.arange(prompt["input_ids"].shape[1], device="cuda").unsqueeze(0)
        cache = DynamicCache(config=model.config.get_text_config())
        logits = model(**prompt | changes, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1).logits
        return logits.argmax(dim=-1)

    expected = first_token()  # the first call sets up libraries and memory, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = first_token()
        with pytest.raises(ValueError, match="build both with"):  # the error is still raised
            first_token(pixel_values=torch.cat([prompt["pixel_values"]] * 2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


def test_decoding_is_compiled_once_for_all_images_and_questions(make_model, ask, images):
    model = make_model().to("cuda")
    prompts = [
        ask([(images[:1], "What is it?")]),
        ask([(images[1:2], "What is it? Or is it something else?")]),
        ask([(images[2:3], "Is it so?")], do_image_splitting=True),
    ]
    greedy = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    static = {"cache_implementation": "static", "max_cache_len": 360}
    torch._dynamo.reset()
    try:
        cache = model.image_prefix_cache(max_cache_len=360)
        for number, prompt in enumerate(prompts):
            prompt.to("cuda")
            expected = model.generate(**prompt, **greedy)
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                assert torch.equal(model.generate(**prompt, **greedy, **static), expected)
                assert torch.equal(model.generate(**cache(prompt), **greedy), expected)
    finally:
        torch._dynamo.reset()


@torch.no_grad()
def test_a_compiled_prefill_is_two_graphs_and_waits_for_nothing(make_model, ask, images):
    model = make_model().to("cuda")
    compiled = model.compiled_prefill(max_cache_len=400, prompt_lengths=(256,))
    questions = ("What is it?", "What is it? Or is it else?", "Why?")

    def first_logits(prompt):
        positions = prompt["attention_mask"].cumsum(dim=1) - 1
        return model(**compiled(prompt), position_ids=positions, use_cache=True, logits_to_keep=1).logits.clone()

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    try:
        for is_split in (False, True):
            prompts = [
                ask([([image], question)], do_image_splitting=is_split).to("cuda")
                for image, question in zip(images, questions, strict=False)
            ]
            for number, prompt in enumerate(prompts):  # compiled, then recorded, then replayed
                with torch._dynamo.config.patch(error_on_recompile=number > 0):
                    found = first_logits(prompt)
                torch.testing.assert_close(found, model(**prompt, logits_to_keep=1).logits, atol=1e-3, rtol=1e-3)
            torch.cuda.set_sync_debug_mode("error")
            first_logits(prompts[0])
            torch.cuda.set_sync_debug_mode("default")
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                first_logits(prompts[1])
                torch.cuda.synchronize()
            launched = sum(event.count for event in profiled.key_averages() if event.key == "cudaGraphLaunch")
            assert launched == 2  # the vision tower, and the rest
        assert counters["inductor"]["cudagraph_skips"] == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch._dynamo.reset()


def test_answers_after_a_compiled_prefill_and_from_cached_images(make_model, ask, images):
    model = make_model().to("cuda")
    compiled = model.compiled_prefill(max_cache_len=400, prompt_lengths=(96, 256))
    cache = model.image_prefix_cache(compiled=compiled)
    greedy = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    torch._dynamo.reset()
    try:
        for image in images[:2]:
            for question in ("What is it?", "Is it so?", "Why? And what else?", "Who?"):
                prompt = ask([([image], question)]).to("cuda")
                expected = model.generate(**prompt, **greedy)
                assert torch.equal(model.generate(**compiled(prompt), **greedy), expected)
                assert torch.equal(model.generate(**cache(prompt), **greedy), expected)
    finally:
        torch._dynamo.reset()
