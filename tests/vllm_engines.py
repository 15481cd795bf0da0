"""Checkpoints that vLLM can load, engines in this process, and their answers compared with those of `generate`."""

import gc
import os
import random
from contextlib import contextmanager

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # an engine in this process, and its exceptions too
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # gigabytes
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from PIL import Image
from vllm import LLM, SamplingParams

NUM_ANSWER_TOKENS = 8
BLOCK_SIZE = 32  # tokens; the smallest that vLLM's attention on a CPU takes
SIZES = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # vLLM's attention on a CPU needs a multiple of 32
    "max_position_embeddings": 1024,
    "initializer_range": 0.4,
}
WORDS = ["what", "is", "the", "red", "blue", "star", "one", "of", "these", "two", "left", "where", "count", "things"]


def text_config(family, tokenizer, **changes):
    """A tiny decoder of a family."""
    sizes = dict(SIZES)
    if family == "phi":
        sizes |= {"num_key_value_heads": 2, "partial_rotary_factor": 0.5}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>") for name in ("bos", "pad")}
    ids["eos_token_id"] = tokenizer.eos_token_id
    return {"model_type": family, **sizes, **ids, **changes}


def save_checkpoint(folder, model, processor, *, embedding_scale=1.0):
    """Make a model's answers depend on its queries, and write it with its processor."""
    torch.manual_seed(3)
    with torch.no_grad():
        model.model.query_tokens.normal_(std=0.5)
        model.model.embedded_query.out_proj.weight.mul_(30)
        model.get_input_embeddings().weight.mul_(embedding_scale)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@contextmanager
def engine(folder, **settings):
    """An engine in float32."""
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "block_size": BLOCK_SIZE} | settings
    llm = LLM(str(folder), **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def random_images(count, seed=1):
    """Images of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 48, 40, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


def user(images, text):
    """A user's message."""
    return {
        "role": "user",
        "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}],
    }


def words(generator, count):
    """Some random words."""
    return " ".join(generator.choice(WORDS) for _ in range(count))


def random_conversations(count, *, seed, images, max_words=12):
    """Conversations of one to three turns, with up to two images in each, of which some begin alike."""
    generator = random.Random(seed)
    conversations = []
    while len(conversations) < count:
        conversation = []
        for turn in range(generator.choice([1, 1, 2, 3])):
            if turn:
                conversation.append({"role": "assistant", "content": words(generator, 2)})
            shown = [generator.choice(images) for _ in range(generator.choice([0, 1, 1, 2]))]
            conversation.append(user(shown, words(generator, generator.randint(1, max_words))))
            conversations.append(list(conversation))
        if generator.random() < 0.5:  # another question with the same beginning
            text = conversation[-1]["content"][-1]["text"] + words(generator, 3)
            conversations.append(
                [
                    *conversation[:-1],
                    {
                        **conversation[-1],
                        "content": [*conversation[-1]["content"][:-1], {"type": "text", "text": text}],
                    },
                ]
            )
    generator.shuffle(conversations)
    return conversations[:count]


def generate(model, processor, conversations, *, num_tokens=NUM_ANSWER_TOKENS, **kwargs):
    """Prompt ids and answer ids of every conversation, by `generate`, one at a time."""
    results = []
    for conversation in conversations:
        inputs = processor.encode_conversations([conversation], **kwargs)
        output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
        prompt = inputs["input_ids"][0].tolist()
        results.append((prompt, output[0, len(prompt) :].tolist()))
    return results


def as_messages(conversation):
    """A conversation in the form that vLLM takes."""
    return [
        message
        if isinstance(message["content"], str)
        else message
        | {
            "content": [
                {"type": "image_pil", "image_pil": part["image"]} if part["type"] == "image" else part
                for part in message["content"]
            ]
        }
        for message in conversation
    ]


def answer(llm, conversations, *, num_tokens=NUM_ANSWER_TOKENS, **kwargs):
    """Prompt ids and answer ids of every conversation, by vLLM, all at once."""
    outputs = llm.chat(
        [as_messages(conversation) for conversation in conversations],
        SamplingParams(temperature=0, max_tokens=num_tokens),
        use_tqdm=False,
        **kwargs,
    )
    return [(output.prompt_token_ids, list(output.outputs[0].token_ids)) for output in outputs]


def metric(llm, name):
    """A counter of vLLM."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")
