"""One process of an evaluation with the Trainer; the processes have different numbers of images.

torchrun --nproc_per_node 2 parallel_evaluation.py MODEL OUTPUT
"""

import os
import sys

import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.training import FlashSlothDataCollator


def rows():
    for number, count in enumerate([1, 0, 0, 0, 3, 1, 2]):
        images = [
            {"type": "image", "image": Image.new("RGB", (40, 32), (9 * number, 50 * i, 99))} for i in range(count)
        ]
        question = {"type": "text", "text": "Why? " * (number + 1)}
        answer = {"role": "assistant", "content": f"It is {number}."}
        yield {"messages": [{"role": "user", "content": [*images, question]}, answer]}


def main():
    source, output = sys.argv[1:]
    args = TrainingArguments(
        output_dir=f"{output}-folder",
        per_device_eval_batch_size=2,
        use_cpu=True,
        ddp_backend="gloo" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        FlashSlothForConditionalGeneration.from_pretrained(source),
        args,
        eval_dataset=list(rows()),
        data_collator=FlashSlothDataCollator(FlashSlothProcessor.from_pretrained(source)),
        compute_metrics=lambda prediction: {"rows": len(prediction.predictions)},
    )
    prediction = trainer.predict(trainer.eval_dataset)
    if trainer.is_world_process_zero():
        found = {"logits": prediction.predictions, "labels": prediction.label_ids}
        torch.save({name: torch.from_numpy(values) for name, values in found.items()}, output)


if __name__ == "__main__":
    main()
