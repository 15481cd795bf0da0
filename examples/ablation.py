"""A small version of the paper's ablation of Spatial Attention Pooling (SAP) and the Embedded Query module (EmbQ).

    python examples/ablation.py --output ablation

trains a vision tower on drawn images once, and then every variant of `VARIANTS` with every seed on the tower's frozen
features: same images, same questions in the same order, same number of steps, and the same number of trained parameters
within 1 %. It writes `results.json`, `table.md` and `plot.png` into the output folder. An interrupted run resumes:
finished parts are not repeated.

`ablation_scenes.py` draws the images and asks the questions; `docs/ablation.md` has the results.
"""

import argparse
import json
import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
import torch
from ablation_scenes import (
    ASSISTANT,
    END,
    GRID,
    IGNORED,
    IMAGE,
    NUM_CLASSES,
    PAD,
    PATCH,
    QUERY,
    SIZE,
    TASKS,
    USER,
    VOCABULARY,
    patch_targets,
    pixels_of,
    questions,
    scene_at,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, SiglipVisionConfig, SiglipVisionModel, Trainer, TrainingArguments, set_seed
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration

logger = logging.getLogger(__name__)

WINDOW = 3  # patches along a side of a pooled window
BATCH_SIZE = 32


class TowerDataset(Dataset):
    """Images with `patch_targets`, drawn on access."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        scene = scene_at("tower", index)
        return {"pixel_values": pixels_of(scene), "labels": patch_targets(scene)}


class TowerForPatches(nn.Module):
    """A vision tower with a linear head that predicts the content of every patch, in place of SigLIP's pretraining.

    FlashSloth reads a tower's last layer without the final norm, so this tower is trained without it.
    """

    def __init__(self) -> None:
        super().__init__()
        config = SiglipVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=PATCH,
            vision_use_head=False,
        )
        self.vision_tower = SiglipVisionModel(config)
        self.vision_tower.set_attn_implementation("eager")  # on a CPU, the backward pass of sdpa is slower
        self.vision_tower.post_layernorm = nn.Identity()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, sum(NUM_CLASSES))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> ModelOutput:
        """Sum the mean cross entropies of all targets.

        Args:
            pixel_values: `(batch, 3, SIZE, SIZE)`, in [-1, 1].
            labels: `(batch, num_patches, 4)`, from `patch_targets`.

        Returns:
            `loss`, and `hits` `(4,)`: the accuracy of every target.
        """
        features = self.vision_tower(pixel_values=pixel_values).last_hidden_state
        logits = self.head(self.norm(features)).float().flatten(0, 1)
        loss, hits = logits.new_zeros(()), []
        for part, right in zip(logits.split(NUM_CLASSES, dim=-1), labels.flatten(0, 1).unbind(-1), strict=True):
            loss = loss + nn.functional.cross_entropy(part, right, ignore_index=IGNORED)
            hits.append((part.argmax(-1) == right)[right != IGNORED].float().mean())
        return ModelOutput(loss=loss, hits=torch.stack(hits))


class TowerTrainer(Trainer):
    """A Trainer that logs the accuracies in the last batch."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: object
    ) -> torch.Tensor | tuple[torch.Tensor, ModelOutput]:
        """See `Trainer`."""
        outputs = model(**inputs)
        if self.state.global_step % self.args.logging_steps == 0:
            logger.info(
                "step %d: accuracy of name, colour, letter, position: %s", self.state.global_step, outputs.hits.tolist()
            )
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def training_arguments(folder: Path, num_steps: int, seed: int) -> TrainingArguments:
    """Training arguments common to the tower and all variants."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.02,
        adam_beta2=0.98,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=True,
        logging_steps=100,
        save_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        seed=seed,
    )


def pretrain_tower(folder: Path, num_steps: int) -> nn.Module:
    """Train the vision tower, unless its weights exist."""
    set_seed(0)
    tower, weights = TowerForPatches(), folder / "tower.safetensors"
    if weights.exists():
        tower.load_state_dict(load_file(weights))
    else:
        dataset = TowerDataset(num_steps * BATCH_SIZE)
        TowerTrainer(tower, training_arguments(folder / "tower", num_steps, seed=0), train_dataset=dataset).train()
        save_file(tower.state_dict(), weights)
    return tower.vision_tower.eval()


@torch.inference_mode()
def features_of(tower: nn.Module, split: str, num_images: int, folder: Path) -> torch.Tensor:
    """Patch features of the first images of a split, `(num_images, width, GRID, GRID)`, cached in a file."""
    file = folder / f"{split}-{num_images}.safetensors"
    if not file.exists():
        features = []
        for start in range(0, num_images, BATCH_SIZE):
            scenes = [scene_at(split, index) for index in range(start, min(start + BATCH_SIZE, num_images))]
            with torch.autocast("cpu", torch.bfloat16):
                patches = tower(torch.stack([pixels_of(scene) for scene in scenes])).last_hidden_state
            features.append(patches.bfloat16().transpose(1, 2).unflatten(2, (GRID, GRID)))
        save_file({"features": torch.cat(features)}, file)
    return load_file(file)["features"]


@dataclass(frozen=True)
class Variant:
    """The variant of a table row.

    Attributes:
        label: Label of the row.
        window_size: Side of a pooling window, in patches; 1 means no compression.
        is_average: Whether all patches of a window have the same weight.
        has_queries: Whether query tokens follow every question.
        has_module: Whether the Embedded Query module updates them.
    """

    label: str
    window_size: int = WINDOW
    is_average: bool = False
    has_queries: bool = False
    has_module: bool = False


VARIANTS = {
    "all": Variant("all patches", window_size=1),
    "average": Variant("average pooling", is_average=True),
    "sap": Variant("SAP"),
    "average-embq": Variant("average pooling + EmbQ", is_average=True, has_queries=True, has_module=True),
    "sap-embq": Variant("SAP + EmbQ (FlashSloth)", has_queries=True, has_module=True),
    "sap-queries": Variant("SAP + queries without EmbQ", has_queries=True),
}


class StoredFeatures(nn.Module):
    """Replaces the vision tower, and passes on precomputed features.

    The features are passed as an image of `GRID` × `GRID` pixels with one channel per feature.
    """

    dtype = torch.float32

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        """Reshape `(batch, width, GRID, GRID)` to patches, `(batch, num_patches, width)`."""
        return BaseModelOutput(last_hidden_state=pixel_values.flatten(2).transpose(1, 2))


def build_config(variant: Variant, intermediate_size: int) -> FlashSlothConfig:
    """The architecture of all variants: a decoder of 4 layers; the queries are updated at the second."""
    text_config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.08,  # with the usual 0.02, for wide models, this narrow one would learn slowly at first
        tie_word_embeddings=True,
        bos_token_id=VOCABULARY[PAD],
        pad_token_id=VOCABULARY[PAD],
        eos_token_id=VOCABULARY[END],
    )
    stub = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_channels=128,
        image_size=GRID,
        patch_size=1,
    )
    return FlashSlothConfig(
        text_config=text_config,
        vision_config=stub,
        image_token_id=VOCABULARY[IMAGE],
        query_token_id=VOCABULARY[QUERY],
        pooling_window_size=variant.window_size,
        num_query_tokens=4,
        query_layer_idx=1,
        query_hidden_size=64,
        query_anchor_token_id=None,
        instruction_start_ids=[[VOCABULARY[IMAGE]], [VOCABULARY[USER]]],
    )


def build_model(variant: Variant, intermediate_size: int = 320) -> FlashSlothForConditionalGeneration:
    """Build a FlashSloth in which the parts that a variant does not use are frozen and have no effect."""
    model = FlashSlothForConditionalGeneration(build_config(variant, intermediate_size))
    parts = model.model
    parts.language_model.set_attn_implementation("eager")  # on a CPU, the backward pass of sdpa is slower
    parts.vision_tower = StoredFeatures(model.config.vision_config)
    if variant.is_average or variant.window_size == 1:
        parts.spatial_attention_pooling.requires_grad_(False)
        nn.init.zeros_(parts.spatial_attention_pooling.fc2.weight)  # equal scores: equal weights
    if not variant.has_queries:
        parts.query_tokens.requires_grad_(False)
    if not variant.has_module:
        parts.embedded_query.requires_grad_(False)
        nn.init.zeros_(parts.embedded_query.out_proj.weight)
        nn.init.zeros_(parts.embedded_query.out_proj.bias)
    return model


def build_model_to_budget(variant: Variant) -> FlashSlothForConditionalGeneration:
    """Build a variant with wider feed-forward layers, to match the full model's number of trained parameters."""
    budget = num_trained(build_model(VARIANTS["sap-embq"]))
    model = build_model(variant)
    text_config = model.config.text_config
    per_unit = 3 * text_config.hidden_size * text_config.num_hidden_layers
    spare = round((budget - num_trained(model)) / per_unit)
    return build_model(variant, text_config.intermediate_size + spare)


def num_trained(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def render(
    turns: list[tuple[list[str], list[str]]], num_image_tokens: int, num_query_tokens: int
) -> dict[str, torch.LongTensor]:
    """Tokenize a conversation about one image.

    Args:
        turns: Questions and answers, in words of `VOCABULARY`.
        num_image_tokens: Number of image tokens.
        num_query_tokens: Number of query tokens after every question.

    Returns:
        `input_ids` and `labels`, `(seq_length,)`; only answers and their end tokens are labels.
    """
    words, labels = [USER, *[IMAGE] * num_image_tokens], [IGNORED] * (1 + num_image_tokens)
    for question, answer in turns:
        prompt = [*question, *[QUERY] * num_query_tokens, ASSISTANT]
        learned = [*answer, END]
        words += [*prompt, *learned, USER]
        labels += [*[IGNORED] * len(prompt), *(VOCABULARY[word] for word in learned), IGNORED]
    ids = [VOCABULARY[word] for word in words]
    return {"input_ids": torch.tensor(ids[:-1]), "labels": torch.tensor(labels[:-1])}


class ConversationDataset(Dataset):
    """Conversations with one question per task in random order, cycling through the images."""

    def __init__(self, features: torch.Tensor, length: int, seed: int, variant: Variant) -> None:
        self.features, self.length, self.seed = features, length, seed
        self.counts = token_counts(variant)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = index % len(self.features)
        rng = random.Random(f"conversation:{self.seed}:{index}")
        turns = list(questions(scene_at("train", image)).values())
        rng.shuffle(turns)
        return {**render(turns, *self.counts), "pixel_values": self.features[image].float()}


def token_counts(variant: Variant) -> tuple[int, int]:
    """Number of image tokens per image, and of query tokens per question."""
    config = build_config(variant, intermediate_size=1)
    return config.image_seq_length, config.num_query_tokens * variant.has_queries


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Batch rows with right padding, which needs no mask since the decoder is causal."""
    fill = {"input_ids": VOCABULARY[PAD], "labels": IGNORED, "pixel_values": 0.0}
    return {
        name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill[name])
        for name in fill
    }


@torch.inference_mode()
def evaluate(model: nn.Module, features: torch.Tensor, variant: Variant) -> dict[str, float]:
    """Share of exact answers per task, each question asked alone.

    One forward pass is enough: greedy decoding gives an answer and its end token if and only if each of its tokens is
    the most likely one after the tokens before it.
    """
    model.eval()
    counts, right = token_counts(variant), dict.fromkeys(TASKS, 0)
    asked = [questions(scene_at("evaluation", index)) for index in range(len(features))]
    for task in TASKS:
        for start in range(0, len(asked), 2 * BATCH_SIZE):
            pixels = features[start : start + 2 * BATCH_SIZE].float()
            rows = [render([turns[task]], *counts) for turns in asked[start : start + len(pixels)]]
            batch = collate([{**row, "pixel_values": image} for row, image in zip(rows, pixels, strict=True)])
            labels = batch.pop("labels")[:, 1:]
            with torch.autocast("cpu", torch.bfloat16):
                said = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
            right[task] += ((said == labels) | (labels == IGNORED)).all(dim=1).sum().item()
    return {task: hits / len(asked) for task, hits in right.items()}


def best_guess(num_images: int, num_asked: int) -> dict[str, float]:
    """Share of exact answers when always giving the most frequent answer of the training images."""
    share = {}
    for task in TASKS:
        answers = {
            split: [" ".join(questions(scene_at(split, index))[task][1]) for index in range(n)]
            for split, n in (("train", num_images), ("evaluation", num_asked))
        }
        said = max(sorted(set(answers["train"])), key=answers["train"].count)
        share[task] = answers["evaluation"].count(said) / num_asked
    return share


def run(name: str, seed: int, num_steps: int, features: dict[str, torch.Tensor], folder: Path) -> dict:
    """Train and evaluate one variant with one seed, unless its result exists."""
    file = folder / f"{name}-{seed}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    variant = VARIANTS[name]
    set_seed(seed)
    model = build_model_to_budget(variant)
    num_image_tokens, num_query_tokens = token_counts(variant)
    dataset = ConversationDataset(features["train"], num_steps * BATCH_SIZE, seed, variant)
    args = training_arguments(folder / f"{name}-{seed}", num_steps, seed)
    trainer = Trainer(model, args, train_dataset=dataset, data_collator=collate)
    logger.info("%s, seed %d: %d parameters are trained", variant.label, seed, num_trained(model))
    start = time.process_time()
    loss = trainer.train().training_loss
    result = {
        "variant": name,
        "seed": seed,
        "image_tokens": num_image_tokens,
        "query_tokens": num_query_tokens,
        "trained_parameters": num_trained(model),
        "training_cpu_seconds": round(time.process_time() - start, 1),
        "mean_training_loss": round(loss, 4),
        "accuracy": evaluate(model, features["evaluation"], variant),
    }
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    logger.info("%s", result)
    return result


def summarise(runs: list[dict], guess: dict[str, float]) -> str:
    """Format mean and standard deviation over the seeds, in per cent, as a Markdown table."""
    head = ["variant", "image + query tokens", *TASKS.values(), "trained parameters", "training, CPU s"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, variant in VARIANTS.items():
        if of_variant := [run for run in runs if run["variant"] == name]:
            first = of_variant[0]
            scores = [[100 * run["accuracy"][task] for run in of_variant] for task in TASKS]
            spreads = [f"{mean(score):.1f} ± {stdev(score) if len(score) > 1 else 0:.1f}" for score in scores]
            seconds = mean(run["training_cpu_seconds"] for run in of_variant)
            tokens = f"{first['image_tokens']} + {first['query_tokens']}"
            rows.append([variant.label, tokens, *spreads, str(first["trained_parameters"]), f"{seconds:.0f}"])
    rows.append(["most frequent answer", "", *(f"{100 * guess[task]:.1f}" for task in TASKS), "", ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def plot(runs: list[dict], guess: dict[str, float], file: Path) -> None:
    """Plot a bar for every variant and task, a dot for every seed, and a line for the most frequent answer."""
    figure, axes = plt.subplots(figsize=(11, 4.5))
    names = [name for name in VARIANTS if any(run["variant"] == name for run in runs)]
    width = 0.8 / len(names)
    for rank, name in enumerate(names):
        for column, task in enumerate(TASKS):
            scores = [100 * run["accuracy"][task] for run in runs if run["variant"] == name]
            x = column + (rank - (len(names) - 1) / 2) * width
            label = VARIANTS[name].label if column == 0 else None
            axes.bar(x, mean(scores), 0.92 * width, color=f"C{rank}", label=label)
            axes.plot([x] * len(scores), scores, "k.", markersize=4)
    for column, task in enumerate(TASKS):
        axes.hlines(100 * guess[task], column - 0.42, column + 0.42, colors="k", linestyles="dotted")
    axes.set_xticks(range(len(TASKS)), TASKS.values())
    axes.set_ylabel("exact answers, %")
    axes.set_ylim(0, 103)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


def check_settings(folder: Path, settings: dict[str, int]) -> None:
    """Reject a folder with results of other settings.

    Raises:
        ValueError: If the settings differ.
    """
    file = folder / "settings.json"
    if file.exists() and (earlier := json.loads(file.read_text(encoding="utf-8"))) != settings:
        raise ValueError(f"{folder} has results with {earlier}, but got {settings}; choose another --output.")
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train and evaluate all variants, and write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for features, results, table and plot")
    parser.add_argument("--tower-steps", type=int, default=1500, help=f"steps of {BATCH_SIZE} images")
    parser.add_argument("--steps", type=int, default=500, help=f"steps of {BATCH_SIZE} conversations")
    parser.add_argument("--images", type=int, default=12000, help="training images")
    parser.add_argument("--evaluation-images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("tower_steps", "steps", "images", "evaluation_images")}
    check_settings(args.output, settings)

    tower = pretrain_tower(args.output, args.tower_steps)
    sizes = {"train": args.images, "evaluation": args.evaluation_images}
    features = {split: features_of(tower, split, number, args.output) for split, number in sizes.items()}
    runs = [run(name, seed, args.steps, features, args.output) for seed in args.seeds for name in args.variants]
    guess = best_guess(args.images, args.evaluation_images)
    table = summarise(runs, guess)
    result = {"settings": settings, "most_frequent_answer": guess, "runs": runs}
    (args.output / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (args.output / "table.md").write_text(table, encoding="utf-8")
    plot(runs, guess, args.output / "plot.png")
    logger.info("\n%s", table)


if __name__ == "__main__":
    main()
