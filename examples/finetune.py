"""Trains a FlashSloth with the paper's recipe, on one device or, with torchrun or accelerate, on several.

    python examples/finetune.py examples/recipes/stage1.yaml --model_name_or_path MODEL \
        --train_data captions.json --output_dir stage1
    torchrun --nproc_per_node 8 examples/finetune.py examples/recipes/stage2.yaml --model_name_or_path stage1 \
        --train_data conversations.json --output_dir stage2 --learning_rate 1e-5

A recipe is a file of arguments; the command line overrides it, and `--help` lists all arguments. MODEL is a folder or
Hub id of any FlashSloth: made by `flashsloth init`, converted, trained before, or an original release. Start an
interrupted run again to resume it. At the end, the output folder is a complete model repository. `--check_data` reads
all rows as training would, lists bad and long ones, and trains nothing.
"""

import dataclasses
import difflib
import heapq
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from datasets.exceptions import DatasetsError
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import BitsAndBytesConfig, HfArgumentParser, TrainingArguments, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli import EXIT_ERROR, CommandError, check_model, first_line
from flashsloth.cli.model_card import build_model_card
from flashsloth.training import BadRowError, FlashSlothDataCollator, check_rows, load_rows
from flashsloth.training.lora import LORA_TARGET_MODULES, UNQUANTIZED_MODULES
from flashsloth.training.recipe import FlashSlothTrainer, freeze_for_stage

logger = logging.getLogger(__name__)

RECIPE_SUFFIXES = (".yaml", ".yml", ".json")
ADAPTER_FOLDER = "adapter"
USAGE = (
    "%(prog)s [RECIPE.yaml ...] --model_name_or_path MODEL --train_data DATA --output_dir FOLDER [--ARGUMENT VALUE ...]"
)
NUM_LONGEST = 5  # rows that --check_data lists
CHECKPOINTING_NAMES = ("gradient_checkpointing", "activation_checkpointing")  # before and since transformers 5.24
LOADING_ERRORS = (OSError, ValueError, RuntimeError, TypeError, ImportError, SafetensorError)


class UsageError(ValueError):
    """An error in the arguments, shown without a traceback."""


class Parser(HfArgumentParser):
    """A parser whose errors do not print the long usage of all arguments."""

    def error(self, message: str) -> NoReturn:
        """Reject the command line.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{message}; --help lists all arguments")


@dataclass
class ModelArguments:
    """The model, and which parts of it are trained."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of a FlashSloth"})
    stage: Literal[1, 2] = field(
        default=2,
        metadata={"help": "1: train pooling and projector on captions; 2: all but the vision tower on conversations"},
    )
    do_image_splitting: bool | None = field(
        default=None,
        metadata={
            "help": "split images into tiles; stage 2 then also trains the tower; None: as the model's processor"
        },
    )
    train_vision_tower: bool | None = field(
        default=None,
        metadata={
            "help": "whether stage 2 trains the tower, which the authors' code never does; None: if images are split"
        },
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "data type of the weights; with --bf16, computation is in bfloat16"}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, eager ..."})
    lora_rank: int = field(default=0, metadata={"help": "rank of LoRA adapters in the language model; 0: no adapters"})
    lora_alpha: int = field(default=16, metadata={"help": "adapters are scaled by alpha / rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the input of the adapters"})
    lora_modules_to_save: list[str] = field(
        default_factory=list, metadata={"help": "modules to train fully, in addition to the adapters"}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "load the language model in 8 bits (needs lora_rank)"})
    load_in_4bit: bool = field(default=False, metadata={"help": "load it in 4 bits, as QLoRA does (needs lora_rank)"})

    @property
    def is_quantized(self) -> bool:
        """Whether the language model is quantised."""
        return self.load_in_8bit or self.load_in_4bit

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("The language model is loaded in 8 or in 4 bits; remove --load_in_8bit or --load_in_4bit.")
        if self.is_quantized and not self.lora_rank:
            bits = 8 if self.load_in_8bit else 4
            raise ValueError(f"A model in {bits} bits can be trained with adapters only; set --lora_rank, such as 16.")
        if self.lora_rank and self.stage == 1:
            raise ValueError("Stage 1 does not train the language model, so it has no adapters; use --stage 2.")
        if self.train_vision_tower and (self.lora_rank or self.stage == 1):
            raise ValueError("The tower is trained only in stage 2 without adapters; remove --train_vision_tower.")


@dataclass
class DataArguments:
    """The training data; see `flashsloth.training.load_rows`."""

    train_data: str = field(metadata={"help": ".json, .jsonl or .parquet file, folder or Hub id"})
    eval_data: str | None = field(default=None, metadata={"help": "the same, for evaluation during training"})
    image_folder: str | None = field(default=None, metadata={"help": "base folder of relative image paths"})
    train_split: str = field(default="train", metadata={"help": "split of a folder or Hub id, such as train[:99%%]"})
    eval_split: str = field(default="train", metadata={"help": "the same, for evaluation"})
    streaming: bool = field(default=False, metadata={"help": "read rows on demand, in order; needs max_steps"})
    max_length: int | None = field(default=None, metadata={"help": "maximum tokens of a row"})
    padding_free: bool = field(
        default=False, metadata={"help": "concatenate the rows of a batch instead of padding them"}
    )
    on_bad_row: Literal["raise", "skip"] = field(default="raise", metadata={"help": "stop, or skip the row"})
    num_eval_answers: int = field(
        default=0, metadata={"help": "evaluation rows to answer, for exact match; 0: loss only"}
    )


@dataclass
class RecipeArguments(TrainingArguments):
    """`TrainingArguments` with the global batch size as an alternative to gradient accumulation steps."""

    output_dir: str = field(default="", metadata={"help": "folder for checkpoints and the finished model"})
    check_data: bool = field(
        default=False, metadata={"help": "read all rows, list bad and long ones, and train nothing"}
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "rows per optimizer step; sets gradient_accumulation_steps"}
    )
    use_cache: bool = field(default=True, metadata={"help": "whether the saved config enables the KV cache"})

    def __post_init__(self) -> None:
        self.use_cpu |= self.check_data
        if self.global_batch_size is not None:
            at_once = self.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
            self.gradient_accumulation_steps = max(1, self.global_batch_size // at_once)
        self.dataloader_num_workers = min(self.dataloader_num_workers, _cpus_of_this_process())
        try:
            super().__post_init__()
        except ValueError as error:
            if "use_cpu" not in str(error):
                raise
            raise ValueError(
                "Found no GPU with bfloat16. To train on the CPU, add `--use_cpu true`; on a GPU without bfloat16 (T4, "
                "V100), add the recipe fp16.yaml or `--bf16 false --fp16 true`."
            ) from error
        self._check_precision()
        found = self.train_batch_size * self.world_size * self.gradient_accumulation_steps
        if self.global_batch_size not in (None, found):
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be a multiple of per_device_train_batch_size="
                f"{self.per_device_train_batch_size} × {self.world_size} processes × {max(1, self.n_gpu)} devices per "
                "process; change one of them, and start one process per GPU with torchrun."
            )

    def _check_precision(self) -> None:
        if self.fp16 and self.device.type == "cpu" and not self.check_data:
            raise ValueError("fp16 needs a GPU. On a CPU, use `--fp16 false --bf16 true --use_cpu true`.")
        if self.bf16 and self.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            logger.warning(
                "This GPU only emulates bfloat16, which is slow; add the recipe fp16.yaml, or "
                "`--bf16 false --fp16 true`."
            )


def _cpus_of_this_process() -> int:
    """Number of CPUs per training process of this machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def parse(arguments: Sequence[str]) -> tuple[ModelArguments, DataArguments, RecipeArguments]:
    """Parse the recipes at the start of the command line, and the arguments that override them.

    Raises:
        UsageError: If a recipe cannot be read, or an argument is missing, unknown or invalid.
    """
    arguments = list(arguments)
    from_files = []
    while arguments and arguments[0].endswith(RECIPE_SUFFIXES):
        from_files += read_recipe(arguments.pop(0))
    arguments = [_installed_name(argument) for argument in (*from_files, *arguments)]
    types = (ModelArguments, DataArguments, RecipeArguments)
    parser = Parser(types, usage=USAGE, description=__doc__.partition("\n")[0])
    _, unknown = parser.parse_known_args(arguments)
    if unknown:
        names = [f"--{argument.name}" for group in types for argument in dataclasses.fields(group)]
        similar = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1)
        hint = f"did you mean {similar[0]}?" if similar else "recipes (.yaml) come first; --help lists all arguments"
        raise UsageError(f"unknown argument {unknown[0]}; {hint}")
    try:
        model_args, data_args, args = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if data_args.streaming and args.max_steps < 1 and not args.check_data:
        raise UsageError("a stream has no length, so --streaming needs --max_steps")
    if args.fp16 and model_args.dtype != "float32":
        raise UsageError("fp16 scales gradients of float32 weights; remove --dtype, or set it to float32")
    return model_args, data_args, args


def read_recipe(file: str) -> list[str]:
    """Convert a recipe to command-line arguments.

    Raises:
        UsageError: If the file does not exist, or does not contain arguments.
    """
    try:
        recipe = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        raise UsageError(f"there is no recipe {file}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"the recipe {file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"expected lines `argument: value` in the recipe {file}, found a {type(recipe).__name__}")
    arguments = []
    for name, value in recipe.items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return arguments


def _installed_name(argument: str) -> str:
    """Rename an argument as the installed transformers does."""
    older, newer = CHECKPOINTING_NAMES
    if not argument.startswith(("--gradient", "--activation")):
        return argument
    return argument.replace(older, newer) if hasattr(TrainingArguments, newer) else argument.replace(newer, older)


def load_data(data_args: DataArguments, stage: int) -> dict[str, Any]:
    """Load the rows of `train_data` and, if given, `eval_data`.

    Raises:
        UsageError: If there is nothing to read.
    """
    if data_args.image_folder is not None and not Path(data_args.image_folder).is_dir():
        raise UsageError(f"there is no folder {data_args.image_folder} (--image_folder)")
    options = {"image_folder": data_args.image_folder, "as_captions": stage == 1}
    rows = {"train_data": _load_rows("train_data", data_args, streaming=data_args.streaming, **options)}
    if data_args.eval_data:
        rows["eval_data"] = _load_rows("eval_data", data_args, **options)
    return rows


def _load_rows(name: str, data_args: DataArguments, **options: Any) -> Any:
    source, split = getattr(data_args, name), getattr(data_args, name.replace("data", "split"))
    try:
        rows = load_rows(source, split=split, **options)
    except (OSError, ValueError, ImportError, DatasetsError) as error:
        raise UsageError(f"--{name} {source} cannot be read: {first_line(error)}") from error
    if not options.get("streaming") and not len(rows):
        raise UsageError(f"--{name} {source} has no rows")
    return rows


def check_data(
    model_args: ModelArguments, data_args: DataArguments, args: RecipeArguments, processor: FlashSlothProcessor
) -> int:
    """Read all rows as training would, and list the bad and the longest ones.

    Returns:
        The number of bad rows.
    """
    collator = FlashSlothDataCollator(processor, max_length=data_args.max_length)
    config = FlashSlothConfig.from_pretrained(model_args.model_name_or_path).get_text_config()
    num_positions = getattr(config, "max_position_embeddings", None)
    num_bad = 0
    for name, rows in load_data(data_args, model_args.stage).items():
        num_rows, num_cut, bad, longest = 0, 0, [], []
        reports = check_rows(rows, collator, num_workers=args.dataloader_num_workers)
        total = len(rows) if hasattr(rows, "__len__") else None
        for report in tqdm(reports, desc=name, total=total, disable=args.disable_tqdm):
            num_rows += 1
            num_cut += report.is_cut
            if report.error is None:
                longest = heapq.nlargest(NUM_LONGEST, [*longest, report], key=lambda one: one.num_tokens)
            else:
                bad.append(report)
        cut = f", {num_cut} cut to {data_args.max_length} tokens" if data_args.max_length else ""
        lines = [f"{getattr(data_args, name)} ({name}): {num_rows} rows, {len(bad)} bad{cut}"]
        lines += [f"bad row {report.index}: {report.error}" for report in bad]
        lines += [
            f"long row {one.index}: {one.num_tokens} tokens, {one.num_images} image{'s' * (one.num_images != 1)}"
            for one in longest
        ]
        if (
            longest
            and num_positions
            and min(longest[0].num_tokens, data_args.max_length or sys.maxsize) > num_positions
        ):
            lines.append(f"the model has {num_positions} positions; cut longer rows with --max_length {num_positions}")
        sys.stdout.write("\n  ".join(lines) + "\n")
        num_bad += len(bad)
    return num_bad


def quantization(model_args: ModelArguments, args: RecipeArguments) -> BitsAndBytesConfig | None:
    """Quantisation of the language model, if any."""
    if model_args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(UNQUANTIZED_MODULES))
    if model_args.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
            llm_int8_skip_modules=list(UNQUANTIZED_MODULES),
        )
    return None


def load_model(model_args: ModelArguments, args: RecipeArguments, *, do_image_splitting: bool) -> Any:
    """Load the model; freeze the parts that the stage does not train, or add adapters.

    Raises:
        UsageError: If it cannot be loaded.
    """
    source = model_args.model_name_or_path
    try:
        model = FlashSlothForConditionalGeneration.from_pretrained(
            source,
            dtype=getattr(torch, model_args.dtype),
            attn_implementation=model_args.attn_implementation,
            quantization_config=quantization(model_args, args),
        )
    except LOADING_ERRORS as error:
        raise UsageError(f"{source} cannot be loaded: {first_line(error)}") from error
    if not model_args.lora_rank:
        trains_tower = do_image_splitting if model_args.train_vision_tower is None else model_args.train_vision_tower
        return freeze_for_stage(model, model_args.stage, train_vision_tower=trains_tower)
    if model_args.is_quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer enables it
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
    """Find the newest complete checkpoint; one that was interrupted while being written has no trainer state."""
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

    Adapters are written to a subfolder, and merged into the model unless it is quantised or sharded.
    """
    folder = Path(trainer.args.output_dir)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if isinstance(trainer.model, PeftModel):
        trainer.save_model(str(folder / ADAPTER_FOLDER))
        if model_args.is_quantized or trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            adapter = shlex.quote(str(folder / ADAPTER_FOLDER))
            logger.info("The adapters are in %s. To merge them: flashsloth export %s OUTPUT", adapter, adapter)
            return
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        tensors = [tensor for file in folder.glob("model*.safetensors") for tensor in load_file(file).values()]
        card = build_model_card(
            trainer.model.config,
            name=folder.name,
            dtype=str(tensors[0].dtype).removeprefix("torch."),
            num_parameters=sum(tensor.numel() for tensor in tensors),
            do_image_splitting=trainer.processing_class.image_processor.do_image_splitting,
            origin=f"Trained with `examples/finetune.py`, stage {model_args.stage}.",
            **_lineage(model_args.model_name_or_path),
        )
        card.save(folder / "README.md")
        shown = shlex.quote(str(folder))
        logger.info("The model is in %s. To use it: flashsloth ask IMAGE QUESTION --model %s", shown, shown)


def _lineage(source: str) -> dict[str, Any]:
    """Licence and base models in the card of the trained model."""
    card = Path(source) / "README.md"
    if not card.is_file():
        return {"license_id": None, "base_models": None if Path(source).is_dir() else [source]}
    metadata = ModelCard.load(card).data
    return {"license_id": metadata.license, "base_models": metadata.base_model}


def set_up_logging(model_args: ModelArguments, args: RecipeArguments) -> None:
    """Show the messages of this script and of the package, in one process."""
    logging.basicConfig(format="%(message)s")
    for name in (__name__, "flashsloth"):
        logging.getLogger(name).setLevel(logging.INFO if args.should_log else logging.WARNING)
    if model_args.load_in_8bit:
        # bitsandbytes warns about this for every layer in every step.
        logger.info("bitsandbytes computes 8-bit layers in float16, whatever the data type of the other layers.")
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(lambda record: "MatMul8bitLt" not in record.msg)


def load_processor(model_args: ModelArguments) -> FlashSlothProcessor:
    """Load the model's processor, after checking that the model exists.

    Raises:
        CommandError: If it is not a FlashSloth.
        UsageError: If the processor cannot be loaded.
    """
    check_model(model_args.model_name_or_path)
    try:
        processor = FlashSlothProcessor.from_pretrained(model_args.model_name_or_path)
    except LOADING_ERRORS as error:
        raise UsageError(f"{model_args.model_name_or_path} cannot be loaded: {first_line(error)}") from error
    if model_args.do_image_splitting is not None:
        processor.image_processor.do_image_splitting = model_args.do_image_splitting
    return processor


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and save a complete model repository; or check the data.

    Returns:
        Exit code: 1 if `--check_data` found bad rows, else 0.
    """
    model_args, data_args, args = parse(sys.argv[1:] if arguments is None else arguments)
    if not (args.output_dir or args.check_data):
        raise UsageError("set --output_dir, the folder for checkpoints and the finished model")
    if args.output_dir and Path(model_args.model_name_or_path).resolve() == Path(args.output_dir).resolve():
        raise UsageError(f"Model and output folder are both {args.output_dir}; choose another --output_dir.")
    set_up_logging(model_args, args)
    set_seed(args.seed)
    processor = load_processor(model_args)
    if args.check_data:
        return int(args.should_log and check_data(model_args, data_args, args, processor) > 0)
    rows = load_data(data_args, model_args.stage)
    train_rows, eval_rows = rows["train_data"], rows.get("eval_data")
    if data_args.streaming:
        args.dataloader_num_workers = min(args.dataloader_num_workers, train_rows.num_shards)
        train_rows = train_rows.repeat(None)  # one endless epoch, of which a resumed run skips the rows it has seen
    if eval_rows is None:
        args.eval_strategy = IntervalStrategy.NO
    trainer = FlashSlothTrainer(
        load_model(model_args, args, do_image_splitting=processor.image_processor.do_image_splitting),
        args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=FlashSlothDataCollator(
            processor,
            max_length=data_args.max_length,
            padding_free=data_args.padding_free,
            on_bad_row=data_args.on_bad_row,
        ),
        processing_class=processor,
        num_eval_answers=data_args.num_eval_answers,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or last_checkpoint(Path(args.output_dir)))
    save(trainer, model_args)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return 0


def command() -> int:
    """Run `main`, and show errors that a user can fix without a traceback.

    Returns:
        Exit code: that of `main`, or 2 for such an error.
    """
    try:
        return main()
    except (CommandError, UsageError) as error:
        message = str(error)
    except BadRowError as error:  # a data loader's worker prepends its traceback
        reason = str(error).rpartition(f"{BadRowError.__name__}: ")[2].strip()
        message = f"{reason} --check_data lists all bad rows."
    sys.stderr.write(f"{Path(__file__).name}: error: {message}\n")
    return EXIT_ERROR


if __name__ == "__main__":
    if exit_code := command():
        sys.exit(exit_code)
