"""One process of a data-parallel training run with the Trainer; the batch of four rows is split among the processes.

    torchrun --nproc_per_node 2 parallel_training.py MODEL OUTPUT [stream | plain-stream]

Rows with and without images alternate, so that in some steps one process has no image. `FlashSlothTrainer` reads a
stream without further options, the plain `Trainer` with the option that docs/training.md names.
"""

import os
import sys

from datasets import IterableDataset
from PIL import Image
from transformers import Trainer, TrainingArguments

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.training import FlashSlothDataCollator
from flashsloth.training.recipe import FlashSlothTrainer

COLOURS = ("red", "green", "blue", "white")
BATCH_SIZE = 4


def rows():
    for colour in COLOURS:
        image = {"type": "image", "image": Image.new("RGB", (40, 32), colour)}
        question = {"type": "text", "text": "Which colour?"}
        answer = {"role": "assistant", "content": f"It is {colour}."}
        for content in ([image, question], [question], [question]):
            yield {"messages": [{"role": "user", "content": content}, answer]}


def main():
    source, output, *how = sys.argv[1:]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    model = FlashSlothForConditionalGeneration.from_pretrained(source, pooling_dropout=0.0)
    args = TrainingArguments(
        output_dir=output,
        max_steps=6,
        per_device_train_batch_size=BATCH_SIZE // world_size,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        ddp_backend="gloo" if world_size > 1 else None,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        accelerator_config={"dispatch_batches": False} if how == ["plain-stream"] else None,
    )
    collator = FlashSlothDataCollator(FlashSlothProcessor.from_pretrained(source))
    dataset = IterableDataset.from_generator(rows) if how else list(rows())
    trainer_class = FlashSlothTrainer if how == ["stream"] else Trainer
    trainer = trainer_class(model, args, train_dataset=dataset, data_collator=collator)
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main()
