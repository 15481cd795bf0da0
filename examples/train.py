"""Trains a FlashSloth by the recipe of the paper, on one device or, with torchrun or accelerate, on many.

    python examples/train.py examples/recipes/stage1.yaml --model_name_or_path MODEL \
        --train_data captions.json --output_dir stage1
    torchrun --nproc_per_node 8 examples/train.py examples/recipes/stage2.yaml --model_name_or_path stage1 \
        --train_data conversations.json --output_dir stage2 --learning_rate 1e-5

A recipe is a file of arguments; the command line overrides it, and `--help` lists them. MODEL is a folder or Hub id of
any FlashSloth: made by `flashsloth init`, converted, trained before, or an original release as it is. A run that was
stopped goes on where it was when it is started again; when it ends, the output folder is a complete model repository.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, HfArgumentParser, TrainingArguments, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli.model_card import build_model_card
from flashsloth.cli.weight_files import SAFETENSORS_DTYPES, find_weight_files, read_tensor_infos
from flashsloth.training import FlashSlothDataCollator, load_rows
from flashsloth.training.lora import LORA_TARGET_MODULES, UNQUANTIZED_MODULES
from flashsloth.training.trainer import FlashSlothTrainer, freeze_for_stage

logger = logging.getLogger(__name__)

RECIPE_SUFFIXES = (".yaml", ".yml", ".json")
ADAPTER_FOLDER = "adapter"


@dataclass
class ModelArguments:
    """Which model, and what of it trains."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of a FlashSloth"})
    stage: Literal[1, 2] = field(
        default=2,
        metadata={"help": "1: pooling and projector train, on captions; 2: all but the vision tower, on conversations"},
    )
    high_definition: bool | None = field(
        default=None,
        metadata={"help": "cut pictures into tiles; stage 2 then trains the tower, too (default: as the model says)"},
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "type of the weights; with bf16, float32 weights are computed in bfloat16"}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, eager ..."})
    lora_rank: int = field(default=0, metadata={"help": "train adapters of this rank in the language model; 0: none"})
    lora_alpha: int = field(default=16, metadata={"help": "adapters count alpha / rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapters"})
    lora_modules_to_save: list[str] = field(
        default_factory=list, metadata={"help": "modules that train whole beside the adapters"}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "keep the language model in 8 bits (needs lora_rank)"})

    def __post_init__(self) -> None:
        if self.load_in_8bit and not self.lora_rank:
            raise ValueError("A model in 8 bits trains by adapters only; give --lora_rank, such as 16.")
        if self.lora_rank and self.stage == 1:
            raise ValueError("Stage 1 leaves the language model alone, so --lora_rank has no effect; use --stage 2.")


@dataclass
class DataArguments:
    """What the model reads; see `flashsloth.training.load_rows`."""

    train_data: str = field(metadata={"help": "a .json, .jsonl or .parquet file, a folder or Hub id"})
    eval_data: str | None = field(default=None, metadata={"help": "the same, for evaluation during training"})
    image_folder: str | None = field(default=None, metadata={"help": "what picture paths are relative to"})
    train_split: str = field(default="train", metadata={"help": "split of a folder or Hub id, such as train[:99%%]"})
    eval_split: str = field(default="train", metadata={"help": "the same, for evaluation"})
    streaming: bool = field(default=False, metadata={"help": "read rows when needed, in order; needs max_steps"})
    max_length: int | None = field(default=None, metadata={"help": "most tokens of a row"})
    on_bad_row: Literal["raise", "skip"] = field(default="raise", metadata={"help": "stop, or go on without the row"})
    num_eval_answers: int = field(
        default=0, metadata={"help": "evaluation rows to answer, for the share of exact answers; 0: loss only"}
    )


@dataclass
class RecipeArguments(TrainingArguments):
    """`TrainingArguments`, where the global batch can be given instead of the accumulation."""

    global_batch_size: int | None = field(
        default=None, metadata={"help": "rows of one optimiser step; sets gradient_accumulation_steps"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "must be False: the collator reads columns"})
    use_cache: bool = field(default=True, metadata={"help": "of the config that is saved; else answers are slow"})

    def __post_init__(self) -> None:
        if self.global_batch_size is not None:
            at_once = self.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
            self.gradient_accumulation_steps = max(1, self.global_batch_size // at_once)
        super().__post_init__()
        found = self.train_batch_size * self.world_size * self.gradient_accumulation_steps
        if self.global_batch_size not in (None, found):
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be a multiple of per_device_train_batch_size="
                f"{self.per_device_train_batch_size} × {self.world_size} processes with {max(1, self.n_gpu)} device "
                "each; change one of them, and start one process for each GPU with torchrun."
            )


def parse(arguments: Sequence[str]) -> tuple[ModelArguments, DataArguments, RecipeArguments]:
    """Read the recipes that the command line begins with, and what overrides them."""
    arguments = list(arguments)
    from_files = []
    while arguments and arguments[0].endswith(RECIPE_SUFFIXES):
        for name, value in yaml.safe_load(Path(arguments.pop(0)).read_text(encoding="utf-8")).items():
            values = value if isinstance(value, list) else [value]
            from_files += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    parser = HfArgumentParser((ModelArguments, DataArguments, RecipeArguments), description=__doc__.partition("\n")[0])
    return parser.parse_args_into_dataclasses([*from_files, *arguments], look_for_args_file=False)


def load_data(data_args: DataArguments, stage: int) -> tuple[Any, Any]:
    """Rows for training, and for evaluation, which may be none."""
    source = {"image_folder": data_args.image_folder, "as_captions": stage == 1}
    eval_rows = load_rows(data_args.eval_data, split=data_args.eval_split, **source) if data_args.eval_data else None
    if not data_args.streaming:
        return load_rows(data_args.train_data, split=data_args.train_split, **source), eval_rows
    stream = load_rows(data_args.train_data, split=data_args.train_split, streaming=True, **source)
    return stream.repeat(None), eval_rows  # one endless epoch, in which a resumed run finds its place


def load_model(model_args: ModelArguments, args: RecipeArguments, *, high_definition: bool) -> Any:
    """Load the model, freeze what the stage freezes, and add adapters if they are asked for."""
    quantization = None
    if model_args.load_in_8bit:
        quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(UNQUANTIZED_MODULES))
    model = FlashSlothForConditionalGeneration.from_pretrained(
        model_args.model_name_or_path,
        dtype=getattr(torch, model_args.dtype),
        attn_implementation=model_args.attn_implementation,
        quantization_config=quantization,
    )
    if not model_args.lora_rank:
        return freeze_for_stage(model, model_args.stage, high_definition=high_definition)
    if model_args.load_in_8bit:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    return get_peft_model(
        model,
        LoraConfig(
            r=model_args.lora_rank,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            target_modules=LORA_TARGET_MODULES,
            modules_to_save=model_args.lora_modules_to_save or None,
        ),
    )


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint: of one that was being written when the run was killed, the state is missing."""
    written = {
        int(state.parent.name.rpartition("-")[2]): state.parent
        for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*/{TRAINER_STATE_NAME}")
        if _is_whole(state)
    }
    return str(written[max(written)]) if written else None


def _is_whole(state: Path) -> bool:
    try:
        return "global_step" in json.loads(state.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return False


def save(trainer: FlashSlothTrainer, model_args: ModelArguments) -> None:
    """Write the finished model into the output folder, as a complete model repository.

    Adapters go into a folder of their own, and are merged into the model unless it is in 8 bits or sharded.
    """
    folder = Path(trainer.args.output_dir)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if isinstance(trainer.model, PeftModel):
        trainer.save_model(str(folder / ADAPTER_FOLDER))
        if model_args.load_in_8bit or trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            logger.info("The adapters are in %s; docs/training.md shows how to merge them.", folder / ADAPTER_FOLDER)
            return
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        tensors = [info for file in find_weight_files(folder) for info in read_tensor_infos(file).values()]
        card = build_model_card(
            trainer.model.config,
            name=folder.name,
            dtype=str(SAFETENSORS_DTYPES[tensors[0].dtype]).removeprefix("torch."),
            num_parameters=sum(torch.Size(tensor.shape).numel() for tensor in tensors),
            high_definition=trainer.processing_class.image_processor.do_image_splitting,
            origin=f"Trained by `examples/train.py`, stage {model_args.stage}.",
            **_lineage(model_args.model_name_or_path),
        )
        card.save(folder / "README.md")


def _lineage(source: str) -> dict[str, Any]:
    """Licence and base models of what was trained, as its card has them."""
    card = Path(source) / "README.md"
    if not card.is_file():
        return {"license_id": None, "base_models": None if Path(source).is_dir() else [source]}
    metadata = ModelCard.load(card).data
    return {"license_id": metadata.license, "base_models": metadata.base_model}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and save a complete model repository."""
    model_args, data_args, args = parse(sys.argv[1:] if arguments is None else arguments)
    if Path(model_args.model_name_or_path).resolve() == Path(args.output_dir).resolve():
        raise ValueError(f"Model and output folder are both {args.output_dir}; choose another --output_dir.")
    logging.basicConfig(level=logging.INFO if args.should_log else logging.WARNING)
    set_seed(args.seed)
    processor = FlashSlothProcessor.from_pretrained(model_args.model_name_or_path)
    if model_args.high_definition is not None:
        processor.image_processor.do_image_splitting = model_args.high_definition
    high_definition = processor.image_processor.do_image_splitting
    model = load_model(model_args, args, high_definition=high_definition)
    train_rows, eval_rows = load_data(data_args, model_args.stage)
    if eval_rows is None:
        args.eval_strategy = IntervalStrategy.NO
    args.accelerator_config.dispatch_batches = False  # pictures of a batch cannot be divided by rows
    trainer = FlashSlothTrainer(
        model,
        args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=FlashSlothDataCollator(
            processor, max_length=data_args.max_length, on_bad_row=data_args.on_bad_row
        ),
        processing_class=processor,
        num_eval_answers=data_args.num_eval_answers,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or last_checkpoint(Path(args.output_dir)))
    save(trainer, model_args)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
