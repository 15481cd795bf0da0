"""Trains a small model with the tiny checkpoint's optimizer, also in a process group: spawned processes import it."""

import torch
from muon_optimizer import Muon
from torch import distributed, nn

NUM_STEPS = 4


def build_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16, bias=False), nn.LayerNorm(16))
    model.add_module("embed_tokens", nn.Embedding(30, 16))
    return model


def train(model, optimizer, num_steps=NUM_STEPS, *, start=0):
    for step in range(start, start + num_steps):
        generator = torch.Generator().manual_seed(step)
        inputs, ids = torch.randn(8, 24, generator=generator), torch.randint(30, (8,), generator=generator)
        hidden = model[:4](inputs)
        (hidden * model.embed_tokens(ids)).sum(1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def train_in_a_group(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = build_model()
    train(model, Muon(model, 0.01))
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    distributed.destroy_process_group()
