"""One process of a sharded (FSDP2) training run: train, save a checkpoint, continue, resume from it, save the model.

    torchrun --nproc_per_node 2 sharded_training.py FOLDER

FOLDER contains `model`, and `batch_{step}_{rank}.pt` for every step and process. The run has two steps before the
checkpoint and two after it; `losses.json` has the losses of process 0, uninterrupted and resumed.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from fsdp2 import load_checkpoint, save_checkpoint, save_model, shard, start_processes

from flashsloth import FlashSlothForConditionalGeneration

NUM_STEPS = 4
LEARNING_RATE = 0.1
MOMENTUM = 0.9


def sharded_model(folder):
    model = shard(FlashSlothForConditionalGeneration.from_pretrained(folder / "model").train())
    return model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)


def train(model, optimizer, folder, steps):
    losses = []
    for step in steps:
        batch = torch.load(folder / f"batch_{step}_{dist.get_rank()}.pt")
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main():
    folder = Path(sys.argv[1])
    start_processes()
    model, optimizer = sharded_model(folder)
    losses = train(model, optimizer, folder, range(NUM_STEPS // 2))
    save_checkpoint(folder, NUM_STEPS // 2, model, optimizer)
    losses += train(model, optimizer, folder, range(NUM_STEPS // 2, NUM_STEPS))
    evaluate(model, folder)
    save_model(folder / "trained", model)

    model, optimizer = sharded_model(folder)
    resumed = train(model, optimizer, folder, range(load_checkpoint(folder, model, optimizer), NUM_STEPS))
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps({"straight": losses, "resumed": resumed}))
    dist.destroy_process_group()


def evaluate(model, folder):
    """Evaluate where only one process has an image: if they gathered different parameters, they would deadlock."""
    batch = torch.load(folder / f"batch_0_{dist.get_rank()}.pt")
    with torch.no_grad():
        assert model.eval()(**batch).logits.isfinite().all()


if __name__ == "__main__":
    main()
