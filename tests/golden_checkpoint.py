"""The checkpoint that the golden cases were recorded on: synthetic weights, the same on every machine."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from original_checkpoint import write_tokenizer, write_weights

GOLDEN = Path(__file__).parent / "golden"
CASES = ["single", "batch", "mixed", "turns", "hd"]


def synthetic(name, shape):
    """Standard-normal float32 values, seeded by the CRC-32 of `name`."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def synthetic_weight(name, shape):
    """Matrices scaled by the root of their fan-in, norm gains around 1, small biases."""
    values = synthetic(name, shape)
    if len(shape) >= 2:
        return values / np.float32(np.sqrt(np.prod(shape[1:])))
    return 1 + 0.1 * values if name.endswith("weight") else 0.05 * values


def write_golden_checkpoint(folder):
    """Write the checkpoint in the original layout. Its tokenizer is a substitute with the same special ids."""
    shutil.copytree(GOLDEN / "checkpoint", folder, ignore=shutil.ignore_patterns("tensors.json"))
    shapes = json.loads((GOLDEN / "checkpoint" / "tensors.json").read_text())
    write_weights(folder, {name: torch.from_numpy(synthetic_weight(name, shape)) for name, shape in shapes.items()})
    write_tokenizer(folder)
    return folder


def read_case(name, config):
    """A recorded case, and its inputs: prompts with expanded placeholders, padded on the right, and images."""
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    shape = case["images"]["shape"]
    pixels = torch.from_numpy(np.clip(synthetic(case["images"]["synthetic"], shape), -1, 1)).view(-1, *shape[-3:])
    num_tiles = shape[1] if len(shape) == 5 else 1
    if name == "mixed":  # row 2 has no image
        pixels = pixels[:1]
    repeats = {config.image_token_id: num_tiles * config.image_seq_length, config.query_token_id: 9}
    rows = [[i for i in row for _ in range(repeats.get(i, 1))] for row in case["input_ids"]]
    length = max(map(len, rows))
    pad = config.text_config.pad_token_id
    return case, {
        "input_ids": torch.tensor([row + [pad] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "pixel_values": pixels,
    }
