"""Trains a FlashSloth in a plain PyTorch loop with FSDP2, which shards the parameters over all processes.

    torchrun --nproc_per_node 8 examples/fsdp2.py MODEL conversations.json OUTPUT --num_steps 5000

Use it as a template for your own loop, or on CPUs, where accelerate does not shard. With the Trainer, use
`examples/finetune.py` under `accelerate launch`. Start an interrupted run again to resume it from its last checkpoint,
with any number of processes. At the end, OUTPUT is a complete model repository.
"""

import argparse
import logging
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import get_cosine_schedule_with_warmup

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli import CommandError, check_model
from flashsloth.training import FlashSlothDataCollator, load_rows
from flashsloth.training.recipe import freeze_for_stage

logger = logging.getLogger(__name__)

WARMUP_SHARE = 0.03
MAX_GRAD_NORM = 1.0


def start_processes() -> torch.device:
    """Join the process group.

    Returns:
        The device of this process.
    """
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def shard(model: FlashSlothForConditionalGeneration) -> FlashSlothForConditionalGeneration:
    """Shard a model: one group of parameters per module of `_no_split_modules`, and one for the rest.

    On a GPU, the model computes in bfloat16; parameters, gradient reductions and optimizer state are float32.
    """
    policy = MixedPrecisionPolicy()
    if model.device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def rows_of_steps(num_rows: int, batch_size: int, first_step: int, num_steps: int) -> Iterator[list[int]]:
    """Yield this process's rows of every step. The order of an epoch depends only on its number."""
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    steps_an_epoch = num_rows // (batch_size * num_processes)
    if not steps_an_epoch:
        raise ValueError(
            f"Expected at least a batch of {batch_size} rows for each of {num_processes} processes, found {num_rows} "
            "rows in total; lower --batch_size."
        )
    for step in range(first_step, num_steps):
        epoch, place = divmod(step, steps_an_epoch)
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(epoch)).tolist()
        start = (place * num_processes + rank) * batch_size
        yield order[start : start + batch_size]


def train_step(
    model: FlashSlothForConditionalGeneration, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]
) -> float:
    """Run one optimizer step, with equal weight for every answer token of all processes.

    Returns:
        The mean loss over the answer tokens of all processes.
    """
    num_tokens = (batch["labels"][:, 1:] != -100).sum()
    dist.all_reduce(num_tokens)
    loss = model(**batch, num_items_in_batch=num_tokens).loss
    (loss * dist.get_world_size()).backward()  # FSDP averages gradients, but the losses are to be summed
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    loss = loss.detach()
    dist.all_reduce(loss)
    return loss.item()


def save_checkpoint(
    folder: Path, step: int, model: FlashSlothForConditionalGeneration, optimizer: torch.optim.Optimizer, **state: Any
) -> None:
    """Write what a run needs to resume after a step; every process writes its shard."""
    state |= dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=folder / f"checkpoint-{step}")


def load_checkpoint(
    folder: Path, model: FlashSlothForConditionalGeneration, optimizer: torch.optim.Optimizer, **state: Any
) -> int:
    """Load the newest complete checkpoint, if any, into model, optimizer and other stateful objects.

    Returns:
        The number of steps done.
    """
    steps = [int(path.parent.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*/.metadata")]  # written last
    if not steps:
        return 0
    state |= dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder / f"checkpoint-{max(steps)}")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return max(steps)


def save_model(folder: Path, model: FlashSlothForConditionalGeneration) -> None:
    """Gather the model, and write it in the first process."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    for copy in model.all_tied_weights_keys:
        whole.pop(copy, None)  # `whole` is empty in all processes but the first
    model.save_pretrained(folder, state_dict=whole, is_main_process=dist.get_rank() == 0)


def main() -> None:
    """Train, and save a complete model repository."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a FlashSloth")
    parser.add_argument("train_data", help="conversations: .json, .jsonl or .parquet file, folder or Hub id")
    parser.add_argument("output_dir", type=Path, help="folder for checkpoints and the finished model")
    parser.add_argument("--num_steps", type=int, default=1000)
    parser.add_argument("--save_steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=16, help="rows per process")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2))
    args = parser.parse_args()
    try:
        check_model(args.model)
        rows = load_rows(args.train_data, as_captions=args.stage == 1)
    except (CommandError, OSError, ValueError) as error:
        parser.error(str(error))
    device = start_processes()
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO if dist.get_rank() == 0 else logging.WARNING)

    processor = FlashSlothProcessor.from_pretrained(args.model)
    collator = FlashSlothDataCollator(processor)
    model = FlashSlothForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).to(device).train()
    freeze_for_stage(model, args.stage, train_vision_tower=processor.image_processor.do_image_splitting)
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(shard(model).parameters(), lr=args.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP_SHARE * args.num_steps), args.num_steps)

    done = load_checkpoint(args.output_dir, model, optimizer, schedule=schedule)
    if done >= args.num_steps:
        logger.info("already trained for %d steps", done)
    for step, indices in enumerate(rows_of_steps(len(rows), args.batch_size, done, args.num_steps), start=done + 1):
        torch.manual_seed(step)  # so that a resumed run has the same dropout as an uninterrupted one
        loss = train_step(model, optimizer, collator([rows[index] for index in indices]).to(device))
        schedule.step()
        logger.info("step %d: loss %.6f", step, loss)
        if step % args.save_steps == 0:
            save_checkpoint(args.output_dir, step, model, optimizer, schedule=schedule)
    save_model(args.output_dir, model)
    if dist.get_rank() == 0:
        processor.save_pretrained(args.output_dir)
        shown = shlex.quote(str(args.output_dir))
        logger.info("The model is in %s. To use it: flashsloth ask IMAGE QUESTION --model %s", shown, shown)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
