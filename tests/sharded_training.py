"""One process of a sharded (FSDP2) training run: train, save a checkpoint, go on, resume from it, save the model.

    torchrun --nproc_per_node 2 sharded_training.py FOLDER

FOLDER holds `model`, and `batch_{step}_{rank}.pt` for every process and step. Two steps are made before the checkpoint
and two behind it; `losses.json` says what process 0 saw, straight on and resumed.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from flashsloth import FlashSlothForConditionalGeneration

NUM_STEPS = 4
LEARNING_RATE = 0.1
MOMENTUM = 0.9


def sharded_model(folder):
    model = FlashSlothForConditionalGeneration.from_pretrained(folder / "model").train()
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    fully_shard(model)
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
    dist.init_process_group("gloo")
    model, optimizer = sharded_model(folder)
    losses = train(model, optimizer, folder, range(NUM_STEPS // 2))
    dcp.save(
        dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder / "dcp"
    )
    losses += train(model, optimizer, folder, range(NUM_STEPS // 2, NUM_STEPS))
    evaluate(model, folder)
    model.save_pretrained(folder / "trained", state_dict=whole_state(model), is_main_process=dist.get_rank() == 0)

    model, optimizer = sharded_model(folder)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    resumed = train(model, optimizer, folder, range(NUM_STEPS // 2, NUM_STEPS))
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps({"straight": losses, "resumed": resumed}))
    dist.destroy_process_group()


def evaluate(model, folder):
    """Only one of the two processes has a picture; they wait for each other if they gather other parameters."""
    batch = torch.load(folder / f"batch_0_{dist.get_rank()}.pt")
    with torch.no_grad():
        assert model.eval()(**batch).logits.isfinite().all()


def whole_state(model):
    return {name: tensor.full_tensor().detach() for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    main()
