"""Trains a FlashSloth by the recipe of the paper, on one device or, with torchrun or accelerate, on many.

    python examples/finetune.py examples/recipes/stage1.yaml --model_name_or_path MODEL \
        --train_data captions.json --output_dir stage1
    torchrun --nproc_per_node 8 examples/finetune.py examples/recipes/stage2.yaml --model_name_or_path stage1 \
        --train_data conversations.json --output_dir stage2 --learning_rate 1e-5

A recipe is a file of arguments; the command line overrides it, and `--help` lists them. MODEL is a folder or Hub id of
any FlashSloth: made by `flashsloth init`, converted, trained before, or an original release as it is. A run that was
stopped goes on where it was when it is started again; when it ends, the output folder is a complete model repository.
With `--check_data`, the rows are read as training would, bad and long ones are listed, and nothing is trained.
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
CHECKPOINTING_NAMES = ("gradient_checkpointing", "activation_checkpointing")  # before transformers 5.24, and since
LOADING_ERRORS = (OSError, ValueError, RuntimeError, TypeError, ImportError, SafetensorError)


class UsageError(ValueError):
    """What the arguments must say otherwise; shown as it is, without a traceback."""


class Parser(HfArgumentParser):
    """A parser that says what is wrong, without all arguments before it."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{message}; --help lists all arguments")


@dataclass
class ModelArguments:
    """Which model, and what of it trains."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of a FlashSloth"})
    stage: Literal[1, 2] = field(
        default=2,
        metadata={"help": "1: pooling and projector train, on captions; 2: all but the vision tower, on conversations"},
    )
    do_image_splitting: bool | None = field(
        default=None,
        metadata={"help": "cut images into tiles; stage 2 then trains the tower, too (default: as the model says)"},
    )
    train_vision_tower: bool | None = field(
        default=None,
        metadata={"help": "whether stage 2 trains the tower (default: in high definition; the authors' code does not)"},
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
    load_in_4bit: bool = field(default=False, metadata={"help": "keep it in 4 bits, as QLoRA does (needs lora_rank)"})

    @property
    def is_quantized(self) -> bool:
        """Whether the language model is kept in few bits."""
        return self.load_in_8bit or self.load_in_4bit

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError(
                "The language model is kept in 8 bits or in 4; leave out --load_in_8bit or --load_in_4bit."
            )
        if self.is_quantized and not self.lora_rank:
            bits = 8 if self.load_in_8bit else 4
            raise ValueError(f"A model in {bits} bits trains by adapters only; give --lora_rank, such as 16.")
        if self.lora_rank and self.stage == 1:
            raise ValueError("Stage 1 leaves the language model alone, so --lora_rank has no effect; use --stage 2.")
        if self.train_vision_tower and (self.lora_rank or self.stage == 1):
            raise ValueError("The tower trains in stage 2 without adapters only; leave out --train_vision_tower.")


@dataclass
class DataArguments:
    """What the model reads; see `flashsloth.training.load_rows`."""

    train_data: str = field(metadata={"help": "a .json, .jsonl or .parquet file, a folder or Hub id"})
    eval_data: str | None = field(default=None, metadata={"help": "the same, for evaluation during training"})
    image_folder: str | None = field(default=None, metadata={"help": "what image paths are relative to"})
    train_split: str = field(default="train", metadata={"help": "split of a folder or Hub id, such as train[:99%%]"})
    eval_split: str = field(default="train", metadata={"help": "the same, for evaluation"})
    streaming: bool = field(default=False, metadata={"help": "read rows when needed, in order; needs max_steps"})
    max_length: int | None = field(default=None, metadata={"help": "most tokens of a row"})
    padding_free: bool = field(
        default=False, metadata={"help": "lay the rows of a batch one after the other, without padding"}
    )
    on_bad_row: Literal["raise", "skip"] = field(default="raise", metadata={"help": "stop, or go on without the row"})
    num_eval_answers: int = field(
        default=0, metadata={"help": "evaluation rows to answer, for the share of exact answers; 0: loss only"}
    )


@dataclass
class RecipeArguments(TrainingArguments):
    """`TrainingArguments`, where the global batch can be given instead of the accumulation."""

    output_dir: str = field(default="", metadata={"help": "folder for checkpoints and the finished model"})
    check_data: bool = field(
        default=False, metadata={"help": "read all rows, list those that are bad or long, and train nothing"}
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "rows of one optimiser step; sets gradient_accumulation_steps"}
    )
    use_cache: bool = field(default=True, metadata={"help": "of the config that is saved; else answers are slow"})

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
                "There is no GPU that computes in bfloat16. To train on the CPU, add `--use_cpu true`; on a GPU "
                "without bfloat16 (T4, V100), add the recipe fp16.yaml, or `--bf16 false --fp16 true`."
            ) from error
        self._check_precision()
        found = self.train_batch_size * self.world_size * self.gradient_accumulation_steps
        if self.global_batch_size not in (None, found):
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be a multiple of per_device_train_batch_size="
                f"{self.per_device_train_batch_size} × {self.world_size} processes with {max(1, self.n_gpu)} device "
                "each; change one of them, and start one process for each GPU with torchrun."
            )

    def _check_precision(self) -> None:
        if self.fp16 and self.device.type == "cpu" and not self.check_data:
            raise ValueError(
                "fp16 needs a GPU. On a CPU, leave it out, or add `--fp16 false --bf16 true --use_cpu true`."
            )
        if self.bf16 and self.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            logger.warning(
                "This GPU has no bfloat16 and is slow at imitating it; add the recipe fp16.yaml, or "
                "`--bf16 false --fp16 true`."
            )


def _cpus_of_this_process() -> int:
    """CPUs that this process may use, shared with the other training processes of the machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def parse(arguments: Sequence[str]) -> tuple[ModelArguments, DataArguments, RecipeArguments]:
    """Read the recipes that the command line begins with, and what overrides them.

    Raises:
        UsageError: If a recipe cannot be read, or an argument is missing, unknown or out of place.
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
        raise UsageError("a stream has no end, so --streaming needs --max_steps")
    if args.fp16 and model_args.dtype != "float32":
        raise UsageError("fp16 scales gradients of float32 weights; leave out --dtype, or set it to float32")
    return model_args, data_args, args


def read_recipe(file: str) -> list[str]:
    """Arguments that a recipe stands for.

    Raises:
        UsageError: If there is no such file, or it holds no arguments.
    """
    try:
        recipe = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        raise UsageError(f"there is no recipe {file}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"the recipe {file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"the recipe {file} must hold lines `argument: value`, but holds a {type(recipe).__name__}")
    arguments = []
    for name, value in recipe.items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return arguments


def _installed_name(argument: str) -> str:
    """An argument by the name that the installed transformers gives it."""
    older, newer = CHECKPOINTING_NAMES
    if not argument.startswith(("--gradient", "--activation")):
        return argument
    return argument.replace(older, newer) if hasattr(TrainingArguments, newer) else argument.replace(newer, older)


def load_data(data_args: DataArguments, stage: int) -> dict[str, Any]:
    """Rows by the argument that names them, `train_data` and, if there is one, `eval_data`.

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
        raise UsageError(f"--{name} {source} holds no rows")
    return rows


def check_data(
    model_args: ModelArguments, data_args: DataArguments, args: RecipeArguments, processor: FlashSlothProcessor
) -> int:
    """Read all rows as training would, and write which are bad and which are the longest.

    Returns:
        How many are bad.
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
        lines = [f"{getattr(data_args, name)} ({name}): {num_rows} rows, {len(bad)} of them bad{cut}"]
        lines += [f"row {report.index} is bad: {report.error}" for report in bad]
        lines += [
            f"long: row {one.index} has {one.num_tokens} tokens, {one.num_images} image{'s' * (one.num_images != 1)}"
            for one in longest
        ]
        if (
            longest
            and num_positions
            and min(longest[0].num_tokens, data_args.max_length or sys.maxsize) > num_positions
        ):
            lines.append(f"the model has {num_positions} positions; longer rows need --max_length {num_positions}")
        sys.stdout.write("\n  ".join(lines) + "\n")
        num_bad += len(bad)
    return num_bad


def quantization(model_args: ModelArguments, args: RecipeArguments) -> BitsAndBytesConfig | None:
    """How the language model is kept in few bits, if it is."""
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
    """Load the model, freeze what the stage freezes, and add adapters if they are asked for.

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
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer turns it on
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

    Adapters go into a folder of their own, and are merged into the model unless it is quantised or sharded.
    """
    folder = Path(trainer.args.output_dir)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if isinstance(trainer.model, PeftModel):
        trainer.save_model(str(folder / ADAPTER_FOLDER))
        if model_args.is_quantized or trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            adapter = shlex.quote(str(folder / ADAPTER_FOLDER))
            logger.info("The adapters are in %s. To merge them: flashsloth export %s MERGED", adapter, adapter)
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
            origin=f"Trained by `examples/finetune.py`, stage {model_args.stage}.",
            **_lineage(model_args.model_name_or_path),
        )
        card.save(folder / "README.md")
        shown = shlex.quote(str(folder))
        logger.info("The model is in %s. To ask it: flashsloth ask IMAGE QUESTION --model %s", shown, shown)


def _lineage(source: str) -> dict[str, Any]:
    """Licence and base models of what was trained, as its card has them."""
    card = Path(source) / "README.md"
    if not card.is_file():
        return {"license_id": None, "base_models": None if Path(source).is_dir() else [source]}
    metadata = ModelCard.load(card).data
    return {"license_id": metadata.license, "base_models": metadata.base_model}


def set_up_logging(model_args: ModelArguments, args: RecipeArguments) -> None:
    """Let this script and the package say what they do, on one process."""
    logging.basicConfig(format="%(message)s")
    for name in (__name__, "flashsloth"):
        logging.getLogger(name).setLevel(logging.INFO if args.should_log else logging.WARNING)
    if model_args.load_in_8bit:
        # Said of every layer in every step, though that is how bitsandbytes computes.
        logger.info("bitsandbytes computes layers in 8 bits by way of float16, whatever type the rest has.")
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(lambda record: "MatMul8bitLt" not in record.msg)


def load_processor(model_args: ModelArguments) -> FlashSlothProcessor:
    """Load the model's processor, and find out at once if there is no such model.

    Raises:
        CommandError: If it is no FlashSloth.
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
        Exit code: 1 if the data were checked and rows are bad; else 0.
    """
    model_args, data_args, args = parse(sys.argv[1:] if arguments is None else arguments)
    if not (args.output_dir or args.check_data):
        raise UsageError("give --output_dir, a folder for checkpoints and the finished model")
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
        train_rows = train_rows.repeat(None)  # one endless epoch, in which a resumed run finds its place
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
    """Run `main`, and show what a user can put right without a traceback.

    Returns:
        Exit code: as `main`, or 2 for what a user can put right.
    """
    try:
        return main()
    except (CommandError, UsageError) as error:
        message = str(error)
    except BadRowError as error:  # a loader's worker puts its traceback in front
        reason = str(error).rpartition(f"{BadRowError.__name__}: ")[2].strip()
        message = f"{reason} --check_data lists all bad rows."
    sys.stderr.write(f"{Path(__file__).name}: error: {message}\n")
    return EXIT_ERROR


if __name__ == "__main__":
    if exit_code := command():
        sys.exit(exit_code)
