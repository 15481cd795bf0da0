"""Tiny real models of several decoder families, and a processor for them."""

import copy
import logging as python_logging
import os
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported

import pytest
import torch
from PIL import Image, ImageFile
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from flashsloth import (
    FlashSlothConfig,
    FlashSlothForConditionalGeneration,
    FlashSlothImageProcessor,
    FlashSlothProcessor,
)

VERBOSITY = logging.get_verbosity()
torch.set_num_threads(1)  # the models are so tiny that more threads only slow them down

SPECIAL_TOKENS = ["<|endoftext|>", "</s>", "<image>", "<learnable>"]
TEXT = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "initializer_range": 0.2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
DECODERS = {
    "phi": {**TEXT, "num_attention_heads": 4, "max_position_embeddings": 512, "partial_rotary_factor": 0.5},
    "llama": {**TEXT, **HEADS},
    "qwen3": {**TEXT, **HEADS, "tie_word_embeddings": True},
    "gemma3_text": {**TEXT, **HEADS, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 128},
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


class RootIsADirectory:
    """Keeps pytest from importing the repository root, which is the package `flashsloth`, under a second name."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == Path(__file__).parents[1] else None


def pytest_configure(config):
    config.pluginmanager.register(RootIsADirectory())


# transformers logs most deprecations instead of warning. These are caused by calls in transformers itself or in other
# packages: (part of the message, part of a path in the call stack).
BOTH_KINDS_OF_OPTIONS = "Passing `generation_config` together with generation-related arguments"
CALLS_OF_OTHERS = [
    (BOTH_KINDS_OF_OPTIONS, "/transformers/generation/candidate_generator.py"),
    (BOTH_KINDS_OF_OPTIONS, "/transformers/pipelines/"),
    (BOTH_KINDS_OF_OPTIONS, "/trl/"),
]


class DeprecationRecorder(python_logging.Handler):
    """Keeps the deprecation messages that transformers logs."""

    def __init__(self):
        super().__init__(python_logging.WARNING)
        self.messages = []

    def emit(self, record):
        message = record.getMessage()
        if "deprecated" not in message.lower():
            return
        stack = "\n".join(frame.filename for frame in traceback.extract_stack())
        if not any(part in message and path in stack for part, path in CALLS_OF_OTHERS):
            self.messages.append(message)


@pytest.fixture(scope="session", autouse=True)
def deprecations():
    recorder = DeprecationRecorder()
    logging.add_handler(recorder)
    yield recorder
    logging.remove_handler(recorder)


@pytest.fixture(autouse=True)
def _nothing_deprecated_is_called(deprecations):
    yield
    python_logging.Logger.warning_once.cache_clear()  # so that a message is logged in every test that causes it
    messages, deprecations.messages = deprecations.messages, []
    assert messages == []


@pytest.fixture(autouse=True)
def _undo_what_a_test_sets():
    logging.set_verbosity(VERBOSITY)  # a module's fixture may have changed it, as every command does
    yield
    logging.set_verbosity(VERBOSITY)
    logging.enable_progress_bar()
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval turns it on


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer with one token per byte, and FlashSloth's special tokens."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<image>", "<learnable>"],
        padding_side="left",
    )


@pytest.fixture(scope="session")
def make_config(tokenizer):
    def make(family="phi", **changes):
        pad, end = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[:2])
        fields = {
            "text_config": {
                "model_type": family,
                **DECODERS[family],
                "pad_token_id": pad,
                "bos_token_id": pad,
                "eos_token_id": end,
            },
            "vision_config": dict(VISION),
            "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
            "query_token_id": tokenizer.convert_tokens_to_ids("<learnable>"),
            "pooling_window_size": 2,
            "num_query_tokens": 3,
            "query_layer_idx": 2,
            "query_hidden_size": 24,
            "encode_tile_positions": True,
            "query_anchor_token_id": tokenizer.convert_tokens_to_ids("."),
            "instruction_start_ids": [
                tokenizer.encode("<image>\n", add_special_tokens=False),
                tokenizer.encode("USER:", add_special_tokens=False),
            ],
        }
        return FlashSlothConfig(**copy.deepcopy(fields | changes))

    return make


@pytest.fixture(scope="session")
def make_model(make_config):
    """Builds a model in which every module matters: with the usual small weights, queries hardly change the logits."""

    def make(family="phi", attn_implementation="sdpa", **changes):
        torch.manual_seed(0)
        model = FlashSlothForConditionalGeneration._from_config(
            make_config(family, **changes), attn_implementation=attn_implementation
        )
        with torch.no_grad():
            modules = (model.model.embedded_query, model.model.spatial_attention_pooling, model.lm_head)
            named = [entry for module in modules for entry in module.named_parameters()]
            # Places of tiles come last and stay small beside the features, so that these still decide what is read.
            for name, parameter in sorted(named, key=lambda entry: entry[0].startswith("tile_positions")):
                scale = 0.03 if name.startswith("tile_positions") else 0.3
                parameter.add_(scale * torch.randn_like(parameter))
        special = [model.config.image_token_id, model.config.query_token_id]
        model.generation_config.update(suppress_tokens=special, pad_token_id=model.config.text_config.pad_token_id)
        return model.eval()

    return make


@pytest.fixture(scope="session", params=sorted(DECODERS))
def any_model(request, make_model):
    return make_model(request.param)


@pytest.fixture(scope="session")
def model(make_model):
    return make_model("phi")


@pytest.fixture(scope="session")
def processor(tokenizer, make_config):
    config = make_config()
    return FlashSlothProcessor(
        FlashSlothImageProcessor(size={"height": 32, "width": 32}),
        tokenizer,
        image_seq_length=config.image_seq_length,
        num_query_tokens=config.num_query_tokens,
    )


@pytest.fixture(scope="session")
def images():
    """Four images of random pixels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 48, 40, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


@pytest.fixture
def conversations(images):
    """Rows with one image, none, two in one prompt, and one in each of two turns."""
    return [
        [(images[:1], "What is it?")],
        [([], "Hello there, who are you?")],
        [(images[1:3], "Which?")],
        [(images[3:], "First?", "yes"), (images[:1], "And the second one?")],
    ]


@pytest.fixture(scope="session")
def ask(processor):
    """Encodes conversations. A turn is (images, question) or (images, question, answer)."""

    def render(*conversations, add_generation_prompt=True, padding_side="left", **kwargs):
        batch = []
        for turns in conversations:
            messages = []
            for images, question, *answer in turns:
                parts = [{"type": "image", "image": image} for image in images]
                messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
                messages += [{"role": "assistant", "content": text} for text in answer]
            batch.append(messages)
        return processor.apply_chat_template(
            batch,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": padding_side, **kwargs},
        )

    return render


@pytest.fixture
def num_graphs():
    """Number of graphs that a test has compiled so far."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
