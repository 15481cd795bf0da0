"""Trains the tiny checkpoint of this repository from nothing, on two CPU cores.

    torchrun --nproc_per_node 2 examples/tiny/make_checkpoint.py --output tiny-flashsloth

1. Fetch emoji art and fonts, and build a tokenizer.
2. Train the vision tower to predict the content of every patch, then freeze it.
3. Train on captions, then on conversations, some of them about two images, tiles and foreign images, then on more of
   them with guided queries and a learning rate that falls to 0.

An interrupted run resumes from its last checkpoint, at any stage. Plain `python` works, too, with one process.
"""

import argparse
import functools
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from art import fetch_art
from conversations import (
    END,
    IMAGE,
    PAD,
    QUERY,
    SMALL_LAYOUT,
    TILES_LAYOUT,
    USER,
    WEIGHTS,
    ConversationDataset,
    Mix,
    TileCollator,
    build_processor,
    build_tokenizer,
)
from curve import LearningCurve
from foreign import ForeignImages
from looks import LooksTrainer
from muon_optimizer import Muon
from safetensors.torch import load_file, save_file
from scenes import Art, Layout
from score import Item, all_items, answer, as_counts, as_table, curve_items, evaluate
from torch.utils.data import ConcatDataset
from tower import PatchDataset, TowerForPatches, TowerTrainer, feature_deviation, scale_features
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

logger = logging.getLogger(__name__)

SEED = 0
DEVICE = default_device().type
BATCH_SIZE = 64  # images or captions; conversations: half as many
NUM_SCALED_BY = 64  # images that determine the scale of the tower's features
NUM_SORTED_BATCHES = 4
# Of a trained tower, with the rest of the model. `scale_features` made the first ones 25 times smaller.
TOWER_LEARNING_RATES = {r"vision_tower.*(embeddings|out_proj|fc2)": 2e-6, "vision_tower": 5e-5}
# On a CPU, the backward pass of sdpa is half as fast as that of eager in bfloat16, and slightly faster in float32.
ATTENTION = "eager" if DEVICE == "cpu" and has_bfloat16(DEVICE) else "sdpa"
NUM_COMPILED = (
    64  # graphs of the layers of tower and decoder, whose arguments differ; with 8, some layers run uncompiled
)
IMAGE_SIZE, PATCH_SIZE = 144, 12
WINDOW_SIZE, NUM_WINDOWS = 4, 2  # patches, windows along a side of the first stage's images

CLEAN = {"share_wide": 0.0, "quality": 0.0, "art_changes": 0.0, "drawn": (100.0, 190.0)}
DENSE = Layout(cells=NUM_WINDOWS, sides=(0.7, 0.98), share_shapes=0.2, share_texts=0.3, **CLEAN)
FULL = Layout(
    cells=3, sides=(0.6, 0.98), share_shapes=0.25, share_texts=0.25, share_wide=0.2, quality=0.03, art_changes=0.05
)
FREE = Layout(share_shapes=0.35, share_texts=0.3)
LINES = Layout(lines=(2, 5), share_wide=0.3, quality=0.05)
LARGE = Layout(num_things=(1, 1), sides=(0.25, 0.8), share_shapes=0.2, share_texts=0.45)


@dataclass(frozen=True)
class TowerStage:
    """A stage of the tower's training.

    Attributes:
        name: Its folder.
        share: Its share of all steps.
        size: Side of the images, in pixels.
        window: Side of the windows within which patches see each other, in patches; 0: all.
        layouts: What is drawn.
        learning_rate: Learning rate.
        schedule: Its schedule, by transformers' name.
        shares: Shares of foreign images and crops.
    """

    name: str
    share: float
    size: int
    window: int
    layouts: tuple[Layout, ...]
    learning_rate: float
    schedule: str
    shares: tuple[float, float] = (0.0, 0.0)


TOWER_STAGES = (
    TowerStage(
        "windows", 0.24, NUM_WINDOWS * WINDOW_SIZE * PATCH_SIZE, WINDOW_SIZE, (DENSE,), 3e-3, "constant_with_warmup"
    ),
    TowerStage("grids", 0.2, IMAGE_SIZE, 0, (FULL, FULL, LINES), 2e-3, "constant_with_warmup"),
    TowerStage(
        "scenes", 0.56, IMAGE_SIZE, 0, (FULL, FREE, LINES, FREE, LINES, SMALL_LAYOUT), 2e-3, "linear", (0.05, 0.12)
    ),
)
CONVERSATIONS = Mix(
    7,
    WEIGHTS,
    share_two=0.2,
    share_split=0.12,
    share_foreign=0.06,
    layouts=(Layout(), Layout(), SMALL_LAYOUT),
    split_layouts=(Layout(), SMALL_LAYOUT, TILES_LAYOUT),
)
HARD = {"thing": 3.0, "count": 3.0, "left of": 3.0, "above": 2.5, "read": 4.0, "is there": 2.2, "absent": 1.3}
REFINEMENT = replace(
    CONVERSATIONS,
    weights=WEIGHTS | HARD,
    share_described=0.3,
    layouts=(Layout(), Layout(), SMALL_LAYOUT, LARGE),
    apart=True,
)


@dataclass(frozen=True)
class Stage:
    """A stage of the whole model's training.

    Attributes:
        name: Its folder.
        mixes: What is asked about, for equal parts of its steps.
        batch_size: Number of conversations in a batch.
        learning_rate: Learning rate.
        schedule: Its schedule, by transformers' name.
        trains_tower: Whether the vision tower is trained, too.
    """

    name: str
    mixes: tuple[Mix, ...]
    batch_size: int
    learning_rate: float = 2e-3
    schedule: str = "constant_with_warmup"
    trains_tower: bool = False


PAIRS = replace(REFINEMENT, weights=REFINEMENT.weights | {"is there": 2.4, "absent": 2.2}, share_two=0.35)
WHOLE = replace(PAIRS, share_described=0.45, share_two=0.3)
HARDEST = replace(WHOLE, weights=WHOLE.weights | {"count": 4.0, "read": 5.0, "place": 2.0, "colour": 2.0})
STAGES = (
    Stage("captions", (Mix(0, WEIGHTS, layouts=(replace(Layout(), num_things=(1, 3)), Layout())),), BATCH_SIZE),
    Stage("conversations", (CONVERSATIONS,), BATCH_SIZE // 2),
    Stage("refinement", (REFINEMENT, PAIRS), BATCH_SIZE // 2, schedule="linear"),
    Stage("whole", (WHOLE,), BATCH_SIZE // 2, learning_rate=5e-4, schedule="linear", trains_tower=True),
    Stage("hardest", (HARDEST,), BATCH_SIZE // 2, learning_rate=3e-4, schedule="linear", trains_tower=True),
)


def build_config(tokenizer: PreTrainedTokenizerFast) -> FlashSlothConfig:
    """The architecture: images of 144 px, patches of 12 px, 9 image tokens per image, 8 query tokens per question.

    One image token stands for 16 patches, so details have to be fetched by the query tokens.
    """
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
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    return FlashSlothConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=ids[IMAGE],
        query_token_id=ids[QUERY],
        pooling_window_size=WINDOW_SIZE,
        pooling_dropout=0.0,
        num_query_tokens=8,
        query_layer_idx=2,
        query_hidden_size=256,
        query_anchor_token_id=None,
        encode_tile_positions=True,
        instruction_start_ids=[[ids[IMAGE], *tokenizer.encode("\n")], [ids[USER]]],
    )


def training_arguments(folder: Path, num_steps: int, *, batch_size: int, **kwargs: Any) -> TrainingArguments:
    """Training arguments common to all stages."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=batch_size // int(os.environ.get("WORLD_SIZE", "1")),
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


def build_optimizer(model: torch.nn.Module, args: TrainingArguments, **kwargs: Any) -> Muon:
    """The optimizer of all stages."""
    dtype = torch.bfloat16 if has_bfloat16(DEVICE) else torch.float32
    return Muon(model, args.learning_rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True, dtype=dtype, **kwargs)


def compile_layers(part: torch.nn.Module) -> None:
    """Compile the layers of a vision tower or decoder, for training only: evaluation has caches of many lengths."""
    torch._dynamo.config.recompile_limit = NUM_COMPILED
    for layer in part.encoder.layers if hasattr(part, "encoder") else part.layers:
        layer.forward = _when_training(layer, torch.compile(layer.forward, dynamic=True), layer.forward)


def _when_training(layer: torch.nn.Module, compiled: Callable, eager: Callable) -> Callable:
    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if layer.training else eager)(*args, **kwargs)

    return forward


def pretrain_tower(
    config: FlashSlothConfig,
    processor: FlashSlothProcessor,
    folder: Path,
    num_steps: int,
    art: Art,
    foreign: ForeignImages,
    compiled: bool = False,
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
    if compiled:
        compile_layers(tower.vision_tower)
    start = 0
    for stage in TOWER_STAGES:
        steps = round(num_steps * stage.share)
        finished = folder / f"{stage.name}.safetensors"
        if finished.exists():
            tower.load_state_dict(load_file(finished))
        else:
            args = training_arguments(
                folder / stage.name,
                steps,
                batch_size=BATCH_SIZE,
                learning_rate=stage.learning_rate,
                lr_scheduler_type=stage.schedule,
            )
            images = PatchDataset(
                start,
                steps * BATCH_SIZE,
                stage.layouts,
                size=stage.size,
                patch_size=PATCH_SIZE,
                preprocess=processor.image_processor,
                art=art,
                foreign=foreign,
                share_foreign=stage.shares[0],
                share_crops=stage.shares[1],
            )
            tower.window = stage.window
            trainer = TowerTrainer(tower, args, train_dataset=images, optimizers=(build_optimizer(tower, args), None))
            trainer.train(resume_from_checkpoint=_last_checkpoint(folder / stage.name))
            if trainer.is_world_process_zero():
                save_file(tower.state_dict(), finished)
        start += steps * BATCH_SIZE
    images = PatchDataset(
        start,
        NUM_SCALED_BY,
        (FREE,),
        size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        preprocess=processor.image_processor,
        art=art,
    )
    pixels = torch.stack([images[place]["pixel_values"] for place in range(NUM_SCALED_BY)])
    # Pooling, projector and decoder start as if features were of about 1.
    scale_features(tower.vision_tower.eval(), 1 / feature_deviation(tower.vision_tower, pixels))
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(tower.vision_tower.state_dict(), weights)
    return tower.vision_tower.state_dict()


def build_model(config: FlashSlothConfig, tower_weights: dict[str, torch.Tensor]) -> FlashSlothForConditionalGeneration:
    """Build a model around a trained vision tower, which is frozen."""
    set_seed(SEED)
    model = FlashSlothForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower_weights)
    model.model.vision_tower.requires_grad_(False)
    torch.nn.init.orthogonal_(model.model.embedded_query.tile_positions.weight)  # zero would take long to grow
    model.model.vision_tower.set_attn_implementation("sdpa")  # it has no backward pass
    model.model.language_model.set_attn_implementation(ATTENTION)
    model.generation_config = GenerationConfig(
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        suppress_tokens=[config.image_token_id, config.query_token_id],
    )
    logger.info("%.2f M parameters", model.num_parameters() / 1e6)
    return model


def train_in_stages(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    work: Path,
    steps: Sequence[int],
    art: Art,
    foreign: ForeignImages,
    items: list[Item],
    compiled: bool = False,
) -> Trainer:
    """Train in `STAGES`, and evaluate on `items` now and then.

    Returns:
        The last stage's Trainer.
    """
    start = 0
    if compiled:
        for part in (model.model.vision_tower, model.model.language_model):
            compile_layers(part)
    for stage, num_steps in zip(STAGES, steps, strict=True):
        if stage.trains_tower:
            model.model.vision_tower.requires_grad_(True).set_attn_implementation(ATTENTION)
        args = training_arguments(
            work / stage.name,
            num_steps,
            batch_size=stage.batch_size,
            learning_rate=stage.learning_rate,
            lr_scheduler_type=stage.schedule,
        )
        rows = []
        for mix in stage.mixes:
            length = num_steps // len(stage.mixes) * stage.batch_size
            rows.append(
                ConversationDataset(start, length, mix, art, foreign, batch=stage.batch_size, block=NUM_SORTED_BATCHES)
            )
            start += length
        trainer = LooksTrainer(
            model,
            args,
            train_dataset=ConcatDataset(rows),
            data_collator=TileCollator(processor, IMAGE_SIZE // PATCH_SIZE),
            processing_class=processor,
            callbacks=[LearningCurve(processor, items)],
            optimizers=(build_optimizer(model, args, adamw=TOWER_LEARNING_RATES), None),
        )
        trainer.train(resume_from_checkpoint=_last_checkpoint(work / stage.name))
    return trainer


def _last_checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def main() -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the finished checkpoint")
    parser.add_argument("--work", type=Path, help="folder for checkpoints of the stages (default: OUTPUT-work)")
    parser.add_argument("--art", type=Path, help="folder for emoji art and fonts (default: WORK/art)")
    parser.add_argument("--tower-steps", type=int, default=8000, help=f"steps of {BATCH_SIZE} images")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=len(STAGES),
        default=(900, 1500, 3500, 3000, 1200),
        help=f"steps of {BATCH_SIZE} captions, and of {BATCH_SIZE // 2} conversations, in four stages",
    )
    parser.add_argument("--compile", action="store_true", help="compile the layers: faster, needs a C++ compiler")
    parser.add_argument("--curve-scenes", type=int, default=20, help="scenes for every point of the learning curve")
    parser.add_argument("--evaluation-scenes", type=int, default=200)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.multiprocessing.set_start_method("spawn")  # forked data loaders would keep the memory of earlier stages
    work = args.work or args.output.with_name(f"{args.output.name}-work")
    folder = args.art or work / "art"
    fetch_art(folder)
    art = Art(folder)
    foreign = ForeignImages(sorted((folder / "photographs").glob("*.*")), art.font_files)

    tokenizer = build_tokenizer(art)
    config = build_config(tokenizer)
    processor = build_processor(config, tokenizer)
    tower_weights = pretrain_tower(config, processor, work / "tower", args.tower_steps, art, foreign, args.compile)
    model = build_model(config, tower_weights)
    items = curve_items(args.curve_scenes, folder)
    trainer = train_in_stages(model, processor, work, args.steps, art, foreign, items, args.compile)
    if trainer.is_world_process_zero():
        model = model.to(torch.bfloat16).eval()
        model.save_pretrained(args.output)
        processor.tokenizer.backend_tokenizer.no_padding()  # undoes the padding set by the learning curve's evaluations
        processor.save_pretrained(args.output)
        result = evaluate(all_items(args.evaluation_scenes, folder), lambda batch: answer(model, processor, batch))
        (args.output / "evaluation.json").write_text(json.dumps(as_counts(result), indent=2) + "\n", encoding="utf-8")
        logger.info("exact match:\n%s", as_table(result))


if __name__ == "__main__":
    main()
