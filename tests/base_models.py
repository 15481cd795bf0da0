"""Tiny base models laid out as on the Hub, with weights, tokenizer, chat template and image statistics.

Each tokenizer is trained like those of its family, so line breaks and spaces merge with the text after them in the
same way.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

CHATML = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last_query = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
CHATML_WITH_DEFAULT = """
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
CHATML_WITH_DATE = """
{%- set custom = messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' %}
{{- '<|im_start|>system\\n## Metadata\\n\\nToday Date: ' + strftime_now('%d %B %Y') + '\\nReasoning Mode: ' }}
{{- ('/think' if enable_thinking is not defined or enable_thinking else '/no_think') + '\\n\\n' }}
{{- '## Custom Instructions\\n\\n' + custom + '\\n\\n<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}
        {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' + message.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' }}{% endif %}
"""
CHATML_WITH_START = """
{{- bos_token -}}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
HEADERS = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{% endif %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
TURNS = """
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set opening = messages[0]['content'] + '\\n\\n' %}{%- set turns = messages[1:] %}
{%- else %}{%- set opening = '' %}{%- set turns = messages %}{% endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + (opening if loop.first else '') + message['content'] | trim }}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}
"""
TURNS_WITHOUT_SYSTEM = """
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}
"""
INSTRUCTIONS = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}
    {%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}
"""
BARS = """
{%- for message in messages %}{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}
"""

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PIECES = None  # like SentencePiece: spaces are letters, and line breaks may merge with the text after them

# family: (word pattern, special tokens, index of each named special token, chat template)
TOKENIZERS = {
    "phi": (GPT_2, ["<|endoftext|>"], {"bos": 0, "eos": 0}, None),
    "qwen3": (QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos": 2, "pad": 0}, CHATML),
    "qwen2": (QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos": 2, "pad": 0}, CHATML_WITH_DEFAULT),
    "smollm2": (
        GPT_2,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"bos": 1, "eos": 2, "pad": 2},
        CHATML_WITH_DEFAULT,
    ),
    "lfm2": (
        QWEN,
        ["<|pad|>", "<|startoftext|>", "<|im_start|>", "<|im_end|>"],
        {"pad": 0, "bos": 1, "eos": 3},
        CHATML_WITH_START,
    ),
    "smollm3": (QWEN, ["<|im_start|>", "<|im_end|>"], {"eos": 1, "pad": 1}, CHATML_WITH_DATE),
    "llama": (
        QWEN,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        {"bos": 0, "eos": 3},
        HEADERS,
    ),
    "gemma3_text": (
        PIECES,
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        {"pad": 0, "eos": 1, "bos": 2},
        TURNS,
    ),
    "gemma": (
        PIECES,
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        {"pad": 0, "eos": 1, "bos": 2},
        TURNS_WITHOUT_SYSTEM,
    ),
    "mistral": (PIECES, ["<unk>", "<s>", "</s>"], {"bos": 1, "eos": 2}, INSTRUCTIONS),
    "phi3": (
        QWEN,
        ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        {"eos": 0, "pad": 0},
        BARS,
    ),
}
CORPUS = [
    "USER: What is it?\n\nA chat between a user and an assistant.\nUSER: Which one? ASSISTANT: the one on the left.",
    "user\nWhat\n\nsystem\n\n\nmodel\n\nassistant\n\n\n[INST] words [/INST] words (and) more: words. It shows ...",
] * 4
DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "initializer_range": 0.2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
DECODERS = {
    "phi": {"num_attention_heads": 4, "partial_rotary_factor": 0.5, "max_position_embeddings": 512},
    "qwen3": {**HEADS, "tie_word_embeddings": True},
    "llama": {**HEADS, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "lfm2": {"num_attention_heads": 4, "num_key_value_heads": 2, "full_attn_idxs": [1, 3]},
    "gemma3_text": {**HEADS, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64},
}
TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
TEXT_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
TOWERS = {
    "siglip_vision_model": {**TOWER, "intermediate_size": 48},
    "clip": {
        "vision_config": {**TOWER, "intermediate_size": 48},
        "text_config": {**TEXT_TOWER, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1},
        "projection_dim": 8,
    },
    "dinov2": {**TOWER, "mlp_ratio": 2, "image_size": 40, "patch_size": 8},
}
PIXELS = {
    "clip": {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3, "do_center_crop": True},
    "dinov2": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3},
}


def make_tokenizer(family):
    """Train a tokenizer like those of a family of decoders."""
    words, special, names, template = TOKENIZERS[family]
    trainer = {"vocab_size": 400, "special_tokens": special, "show_progress": False}
    if words is PIECES:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token=special[0]))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer |= {"special_tokens": special + [f"<0x{byte:02X}>" for byte in range(256)], "vocab_size": 560}
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer |= {"initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet())}
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(**trainer))
    if family == "phi":  # runs of spaces, which are not special tokens
        backend.add_tokens([AddedToken(" " * length, normalized=False) for length in (3, 2)])
    if "bos" in names and "bos_token" in (template or ""):
        bos = special[names["bos"]]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, names["bos"])], pair=f"{bos} $A {bos} $B"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template and template.strip(),
        **{f"{name}_token": special[index] for name, index in names.items()},
    )


def make_decoder(folder, family, *, spare_rows=0, dtype=torch.float32, **changes):
    """Write a decoder with its tokenizer, and return the model."""
    tokenizer = make_tokenizer(family)
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        family,
        **{**DECODER, **DECODERS[family], "vocab_size": len(tokenizer) + spare_rows, **changes},
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def make_tower(folder, family, **changes):
    """Write a vision tower, with image statistics if its family has them, and return the model."""
    torch.manual_seed(2)
    model = AutoModel.from_config(AutoConfig.for_model(family, **{**TOWERS[family], **changes})).eval()
    model.save_pretrained(folder)
    if family in PIXELS:
        (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS[family]))
    return model


def main(folder):
    """Write a tower and a decoder for trying `flashsloth init`."""
    make_tower(folder / "clip", "clip")
    make_decoder(folder / "qwen3", "qwen3", spare_rows=8)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
