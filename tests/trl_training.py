"""One process of training runs with TRL's trainers; the batch of four rows is split among the processes.

    torchrun --nproc_per_node 2 trl_training.py MODEL OUTPUT

Rows with one, two and no images alternate, so that processes have different numbers of images, or none.
"""

import json
import os
import sys
from pathlib import Path

from datasets import Dataset
from PIL import Image
from test_trl import compared, reward
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor

COLOURS = ("red", "green", "blue", "white")
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
SHARED = {
    "max_steps": 4,
    "per_device_train_batch_size": 4 // WORLD_SIZE,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "ddp_backend": "gloo" if WORLD_SIZE > 1 else None,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "disable_dropout": True,
}


def rows():
    for colour in COLOURS:
        image = Image.new("RGB", (40, 32), colour)
        for number, images in enumerate(([image], None, [image, image], [])):
            question = [{"role": "user", "content": f"Which colour, of {colour} {number}?"}]
            yield {"prompt": question, "images": images}


def answered(name, answer):
    answers = [[{"role": "assistant", "content": answer(colour)}] for colour in COLOURS for _ in range(4)]
    return {name: answers}


def main():
    source, output = sys.argv[1], Path(sys.argv[2])
    processor = FlashSlothProcessor.from_pretrained(source, do_image_splitting=True)
    prompts = Dataset.from_list(list(rows()))
    right = answered("completion", "It is {}.".format)["completion"]
    wrong = answered("rejected", "Not {}, no!".format)["rejected"]
    logs = {}

    def train(name, trainer_class, config, dataset, **options):
        reward_funcs = options.pop("reward_funcs", None)
        model = FlashSlothForConditionalGeneration.from_pretrained(source)
        given = {} if reward_funcs is None else {"reward_funcs": reward_funcs}
        options = SHARED | options
        if trainer_class is SFTTrainer:  # it has no such option
            options.pop("disable_dropout")
        trainer = trainer_class(
            model,
            args=config(str(output), **options),
            train_dataset=dataset,
            eval_dataset=dataset.select(range(6)),
            processing_class=processor,
            **given,
        )
        trainer.image_rows = {row["prompt"][0]["content"]: row["images"] or [] for row in prompts}
        trainer.train()
        logs[name] = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        logs[name].append({"differences": getattr(trainer, "differences", ())})
        trainer.save_model(output / name)

    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4 // WORLD_SIZE}
    pairs = prompts.add_column("completion", right)
    train("sft", SFTTrainer, SFTConfig, pairs, learning_rate=0.05, max_length=None, **evaluated)
    preferences = prompts.add_column("chosen", right).add_column("rejected", wrong)
    train("dpo", DPOTrainer, DPOConfig, preferences, learning_rate=0.05, max_length=None, **evaluated)
    # With its default, TRL logs images only in processes that have some, and then waits forever for the others.
    policy = {
        "log_multimodal": False,
        "num_generations": 2,
        "max_completion_length": 4,
        "beta": 0.1,
        "learning_rate": 1e-3,
    }
    train("grpo", compared(GRPOTrainer), GRPOConfig, prompts, reward_funcs=reward, **policy)
    if int(os.environ.get("RANK", "0")) == 0:
        (output / "logs.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    main()
