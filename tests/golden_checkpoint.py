"""The checkpoint that the golden cases were recorded on: synthetic weights, the same on every machine."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from original_checkpoint import write_tokenizer, write_weights

GOLDEN = Path(__file__).parent / "golden"


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
    """Write it in the original layout; its tokenizer is a stand-in with the same special ids."""
    shutil.copytree(GOLDEN / "checkpoint", folder, ignore=shutil.ignore_patterns("tensors.json"))
    shapes = json.loads((GOLDEN / "checkpoint" / "tensors.json").read_text())
    write_weights(folder, {name: torch.from_numpy(synthetic_weight(name, shape)) for name, shape in shapes.items()})
    write_tokenizer(folder)
    return folder
