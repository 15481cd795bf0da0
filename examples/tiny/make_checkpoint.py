"""Trains the tiny checkpoint of this repository from scratch, on two CPU cores.

    torchrun --nproc_per_node 2 examples/tiny/make_checkpoint.py --output tiny-flashsloth

1. Train a tokenizer.
2. Train the vision tower to predict the content of every patch, then freeze it.
3. Train on captions, to align images and words, and 4. on conversations. These are the two stages of the paper, except
   that the language model, which has no pretraining, is trained in both.
5. Evaluate exact match on images that are not used in training.

An interrupted run resumes from its last checkpoint. Plain `python` works, too, with one process; one single-threaded
process per core suffers less from other work on the machine than one process with many threads.
"""

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from conversations import (
    CAPTIONS,
    END,
    IMAGE,
    PAD,
    QUERY,
    QUESTIONS,
    USER,
    ConversationDataset,
    Mix,
    build_processor,
    build_tokenizer,
)
from curve import LearningCurve
from muon_optimizer import Muon
from safetensors.torch import load_file, save_file
from score import as_table, evaluate
from tower import PatchDataset, TowerForPatches, TowerTrainer
from transformers import (
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli.devices import default_device, has_bfloat16
from flashsloth.training import FlashSlothDataCollator

logger = logging.getLogger(__name__)

SEED = 0
DEVICE = default_device().type
BATCH_SIZE = 64  # images or captions; conversations: half as many
LEARNING_RATE = 2e-3
NUM_SORTED_BATCHES = 4
# On a CPU, the backward pass of sdpa is half as fast as that of eager in bfloat16, and slightly faster in float32.
ATTENTION = "eager" if DEVICE == "cpu" and has_bfloat16(DEVICE) else "sdpa"


def build_config(tokenizer: PreTrainedTokenizerFast) -> FlashSlothConfig:
    """The architecture: images of 96 px, patches of 8 px, 16 image tokens per image, 4 query tokens per question."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (PAD, END, IMAGE, QUERY, USER)}
    text_config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=ids[PAD],
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
    )
    vision_config = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=96,
        patch_size=8,
        vision_use_head=False,
    )
    return FlashSlothConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=ids[IMAGE],
        query_token_id=ids[QUERY],
        pooling_window_size=3,
        pooling_dropout=0.0,
        num_query_tokens=4,
        query_layer_idx=2,
        query_hidden_size=128,
        query_anchor_token_id=None,
        instruction_start_ids=[[ids[IMAGE], *tokenizer.encode("\n")], [ids[USER]]],
    )


def training_arguments(
    folder: Path, num_steps: int, *, batch_size: int = BATCH_SIZE, learning_rate: float = LEARNING_RATE, **kwargs: Any
) -> TrainingArguments:
    """Training arguments common to all stages."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=batch_size // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=learning_rate,
        warmup_steps=min(40, num_steps // 2),
        bf16=has_bfloat16(DEVICE),
        use_cpu=DEVICE == "cpu",
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ and DEVICE == "cpu" else None,
        ddp_find_unused_parameters=False,
        logging_steps=50,
        save_steps=100,
        save_total_limit=2,
        dataloader_num_workers=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        label_names=["labels"],
        use_cache=True,  # otherwise the Trainer disables the KV cache in the saved config
        report_to=[],
        disable_tqdm=True,
        seed=SEED,
        **kwargs,
    )


def build_optimizer(model: torch.nn.Module, args: TrainingArguments) -> Muon:
    """The optimizer of all stages."""
    return Muon(model, args.learning_rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True)


def pretrain_tower(
    config: FlashSlothConfig, processor: FlashSlothProcessor, folder: Path, num_steps: int
) -> dict[str, torch.Tensor]:
    """Train the vision tower, unless its weights exist.

    Returns:
        Its weights.
    """
    weights = folder / "vision_tower.safetensors"
    if weights.exists():
        return load_file(weights)
    set_seed(SEED)
    tower = TowerForPatches(config.vision_config)
    tower.vision_tower.set_attn_implementation(ATTENTION)
    images = PatchDataset("train", num_steps * BATCH_SIZE, config.vision_config, processor.image_processor)
    args = training_arguments(folder, num_steps, learning_rate=2 * LEARNING_RATE, lr_scheduler_type="cosine")
    optimizers = (build_optimizer(tower, args), None)
    trainer = TowerTrainer(tower, args, train_dataset=images, optimizers=optimizers)
    trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    if trainer.is_world_process_zero():
        save_file(tower.vision_tower.state_dict(), weights)
    return tower.vision_tower.state_dict()


def build_model(config: FlashSlothConfig, tower_weights: dict[str, torch.Tensor]) -> FlashSlothForConditionalGeneration:
    """Build a model around a trained vision tower, which is frozen."""
    set_seed(SEED)
    model = FlashSlothForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower_weights)
    model.model.vision_tower.requires_grad_(False)
    for part in (model.model.vision_tower, model.model.language_model):
        part.set_attn_implementation(ATTENTION)
    model.generation_config = GenerationConfig(
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        suppress_tokens=[config.image_token_id, config.query_token_id],
    )
    logger.info("%.2f M parameters", model.num_parameters() / 1e6)
    return model


def train_on_conversations(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    args: TrainingArguments,
    mix: Mix,
    *,
    first_conversation: int,
    num_curve_images: int,
) -> Trainer:
    """Train the parameters of a model that are not frozen.

    Returns:
        The Trainer.
    """
    batch_size = args.per_device_train_batch_size * args.world_size
    conversations = ConversationDataset(
        first_conversation,
        args.max_steps * batch_size,
        model.config.vision_config.image_size,
        mix,
        block=NUM_SORTED_BATCHES * batch_size,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=conversations,
        data_collator=FlashSlothDataCollator(processor),
        processing_class=processor,
        callbacks=[LearningCurve(processor, num_curve_images)],
        optimizers=(build_optimizer(model, args), None),
    )
    trainer.train(resume_from_checkpoint=_last_checkpoint(Path(args.output_dir)))
    return trainer


def train_in_stages(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, work: Path, args: argparse.Namespace
) -> Trainer:
    """Train on captions, then on conversations.

    Returns:
        The last stage's Trainer.
    """
    decay = {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": round(0.4 * args.steps), "decay_type": "linear"},
    }
    captions = training_arguments(work / "captions", args.caption_steps, lr_scheduler_type="constant_with_warmup")
    conversations = training_arguments(work / "conversations", args.steps, batch_size=BATCH_SIZE // 2, **decay)
    first_conversation = 0
    for mix, arguments in ((CAPTIONS, captions), (QUESTIONS, conversations)):
        trainer = train_on_conversations(
            model,
            processor,
            arguments,
            mix,
            first_conversation=first_conversation,
            num_curve_images=args.curve_images,
        )
        first_conversation += len(trainer.train_dataset)
    return trainer


def _last_checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def main() -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the finished checkpoint")
    parser.add_argument("--work", type=Path, help="folder for checkpoints of the stages (default: OUTPUT-work)")
    parser.add_argument("--tower-steps", type=int, default=1500, help=f"steps of {BATCH_SIZE} images")
    parser.add_argument("--caption-steps", type=int, default=200, help=f"steps of {BATCH_SIZE} captions")
    parser.add_argument("--steps", type=int, default=2200, help=f"steps of {BATCH_SIZE // 2} conversations")
    parser.add_argument("--curve-images", type=int, default=60, help="images for every point of the learning curve")
    parser.add_argument("--evaluation-images", type=int, default=500)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.multiprocessing.set_start_method("spawn")  # forked data loaders would keep the memory of earlier stages
    work = args.work or args.output.with_name(f"{args.output.name}-work")

    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    processor = build_processor(config, tokenizer)
    tower_weights = pretrain_tower(config, processor, work / "tower", args.tower_steps)
    model = build_model(config, tower_weights)
    trainer = train_in_stages(model, processor, work, args)
    if trainer.is_world_process_zero():
        model = model.to(torch.bfloat16).eval()
        model.save_pretrained(args.output)
        processor.tokenizer.backend_tokenizer.no_padding()  # undoes the padding set by the learning curve's evaluations
        processor.save_pretrained(args.output)
        result = evaluate(model, processor, args.evaluation_images)
        (args.output / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        logger.info("exact match:\n%s", as_table(result))


if __name__ == "__main__":
    main()
