"""Export of a checkpoint, such as the output folder of a training run, to a complete model repository.

    checkpoint ─ load it as a user would, check it ─ write weights, configs, processor, code, handler and card

The repository contains the loaded model and the licence. Other files of the checkpoint, such as optimizer states, logs
and access tokens, are not copied.
"""

import contextlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..configuration_flashsloth import is_flashsloth_config
from ..image_processing_flashsloth import is_web_address
from ..modeling_flashsloth import FlashSlothForConditionalGeneration
from ..processing_flashsloth import FlashSlothProcessor
from . import first_line, model_card
from .repository import (
    RepositoryError,
    check_json_files,
    complete_or_absent,
    copy_code,
    find_weight_files,
    read_json,
    unused_folder,
)

ADAPTER_CONFIG = "adapter_config.json"
CARD, LICENSE, APACHE = "README.md", "LICENSE", "apache-2.0"
EXAMPLES = "examples"
LICENSE_ID = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
MAX_NEW_TOKENS = 128  # of an example's answer
ORIGIN = "Exported by `flashsloth export`."


class Export(NamedTuple):
    """Summary of an export.

    Attributes:
        output: Folder that was written.
        num_parameters: Number of parameters.
        num_bytes: Size of the weights, in bytes.
        dtype: Dtype of the weights, such as `bfloat16`.
        license_id: Licence that the card names, if any.
        left_out: Names of the checkpoint's files and folders that were not exported.
        base_models: Hub ids of the base models that the card names.
        quantization: Name of the quantisation method, such as `torchao`, or `None`.
        unanswered: Why there is no answer to an example, for each such example.
    """

    output: Path
    num_parameters: int
    num_bytes: int
    dtype: str
    license_id: str | None
    left_out: list[str]
    base_models: list[str]
    quantization: str | None
    unanswered: list[str]


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    processor: str | Path | None = None,
    name: str | None = None,
    dtype: str = "auto",
    license_id: str | None = None,
    base_models: Sequence[str] = (),
    evaluations: Sequence[str | Path] = (),
    examples: Sequence[tuple[str, str]] = (),
) -> Export:
    """Write a complete model repository.

    Args:
        checkpoint: Folder of a FlashSloth, or of a LoRA adapter for one, which is merged into its base model.
        output: Folder to write. It must be empty or not exist, and appears only once it is complete.
        processor: Folder or Hub id of the processor. Default: the checkpoint.
        name: Title of the card, such as the model's Hub id. Default: the output's name.
        dtype: Dtype of the weights; "auto" keeps the checkpoint's.
        license_id: Licence of the weights, as the Hub spells it. Default: the one in the checkpoint's card.
        base_models: Hub ids of the models that this one was trained from. Default: those in the checkpoint's card.
        evaluations: JSON files with results. Default: the checkpoint's `evaluation.json`, if it has one.
        examples: Images (files or URLs) and questions for the Hub's widget, which also shows the model's answers.

    Returns:
        A summary of what was written.

    Raises:
        RepositoryError: If the checkpoint is broken, incomplete or not a FlashSloth, the output is in use, or the
            licence is not spelled as on the Hub.
    """
    checkpoint, output = Path(checkpoint), unused_folder(output)
    try:
        model, source = _load_model(checkpoint, dtype)
        used_processor = _load_processor(checkpoint if processor is None else processor, source)
        _check_together(model, used_processor)
        own_results = [file for file in [checkpoint / "evaluation.json"] if file.is_file()]
        results = [result for file in evaluations or own_results for result in model_card.read_results(Path(file))]
    except Exception as error:  # transformers, huggingface_hub, safetensors, tokenizers and peft share no class
        raise RepositoryError(f"{checkpoint} cannot be exported: {first_line(error)}") from error
    known = _read_card(checkpoint)
    if license_id and not LICENSE_ID.fullmatch(license_id):
        raise RepositoryError(
            f"expected a licence as the Hub spells it, such as apache-2.0, mit or other, not {license_id!r}."
        )
    license_id = license_id or known.license
    bases = list(base_models) or _hub_ids(known.base_model)
    summary = _summarise(model, checkpoint, output, license_id, bases)
    with complete_or_absent(output, summary.num_bytes) as partial:
        _save_model(model, checkpoint, partial)
        used_processor.save_pretrained(partial)
        copy_code(partial)
        _copy_license(checkpoint, partial, license_id)
        answered = [_answer_example(model, used_processor, *example) for example in examples]
        card = model_card.build_model_card(
            model.config,
            name=name or output.name,
            dtype=summary.dtype if summary.quantization is None else f"{summary.dtype}, {summary.quantization}",
            num_parameters=summary.num_parameters,
            num_bytes=summary.num_bytes,
            do_image_splitting=used_processor.image_processor.do_image_splitting,
            origin=ORIGIN,
            base_models=bases,
            base_model_relation="quantized" if summary.quantization else known.get("base_model_relation"),
            license_id=license_id,
            results=results,
            examples=[example._replace(image=_copy_example(example.image, partial)) for example, _ in answered],
        )
        card.save(partial / CARD)
        written = {file.name for file in partial.iterdir()}
    return summary._replace(
        left_out=[file for file in summary.left_out if file not in written],
        unanswered=[reason for _, reason in answered if reason],
    )


def _load_model(folder: Path, dtype: str) -> tuple[FlashSlothForConditionalGeneration, str | Path]:
    """The model, with the adapter merged if there is one, and the folder or Hub id of the base model."""
    if not folder.is_dir():
        raise ValueError("there is no such folder.")
    if (folder / ADAPTER_CONFIG).is_file():
        return _merge_adapter(folder, dtype)
    if not (folder / "config.json").is_file():
        raise ValueError("it has no config.json; pass a folder that `save_pretrained` or a training run wrote.")
    return _load_whole(folder, dtype), folder


def _merge_adapter(folder: Path, dtype: str) -> tuple[FlashSlothForConditionalGeneration, str]:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError("merging a LoRA adapter requires peft: pip install peft") from error
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(f"its {ADAPTER_CONFIG} does not name a base model in `base_model_name_or_path`.")
    try:
        model = _load_whole(base, dtype)
    except Exception as error:  # no common class, see `export`
        raise ValueError(
            f"it is a LoRA adapter whose base model {base} cannot be loaded ({first_line(error)}); put the base "
            f"model there, or change `base_model_name_or_path` in {ADAPTER_CONFIG}."
        ) from error
    if method := _quantization(model):
        raise ValueError(
            f"it is a LoRA adapter whose base model {base} is quantised ({method}), so it cannot be merged exactly; "
            f"name the model from before the quantisation as `base_model_name_or_path` in {ADAPTER_CONFIG}."
        )
    return PeftModel.from_pretrained(model, folder).merge_and_unload(), base


def _load_whole(source: str | Path, dtype: str) -> FlashSlothForConditionalGeneration:
    if Path(source).is_dir():
        config = read_json(Path(source) / "config.json")
        if not is_flashsloth_config(config):
            raise ValueError(f"its model_type is {config.get('model_type')!r}, and it is not an original release.")
        find_weight_files(Path(source))
        check_json_files(Path(source))
        if "quantization_config" in config and dtype != "auto":
            raise ValueError("it is quantised, so the type of its weights cannot be changed; leave out --dtype.")
    model, report = FlashSlothForConditionalGeneration.from_pretrained(source, dtype=dtype, output_loading_info=True)
    if missing := report["missing_keys"]:
        raise ValueError(f"tensors are missing from its weights: {len(missing)}, such as {min(missing)}.")
    if unexpected := report["unexpected_keys"]:
        raise ValueError(f"its weights contain unexpected tensors: {len(unexpected)}, such as {min(unexpected)}.")
    return model


def _quantization(model: FlashSlothForConditionalGeneration) -> str | None:
    """Name of the method that a model is quantised with."""
    settings = getattr(model.config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _save_model(model: FlashSlothForConditionalGeneration, checkpoint: Path, folder: Path) -> None:
    """Save a model. Weights that are quantised are copied: transformers cannot save all kinds a second time."""
    if _quantization(model) is None:
        model.save_pretrained(folder)
        return
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    for file in [*find_weight_files(checkpoint), *checkpoint.glob("*.index.json")]:
        shutil.copyfile(file, folder / file.name)


def _answer_example(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, image: str, question: str
) -> tuple[model_card.Example, str | None]:
    """An example with the model's answer, or without it and the reason."""
    if not is_web_address(image) and not Path(image).is_file():
        raise RepositoryError(f"there is no example image {image}.")
    try:
        content = [{"type": "image", "path": image}, {"type": "text", "text": question}]
        inputs = processor.encode_conversations([{"role": "user", "content": content}]).to(model.device, model.dtype)
        output = model.eval().generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    except (OSError, ValueError) as error:
        return model_card.Example(image, question), f"no answer to {question!r} about {image}: {first_line(error)}"
    answer = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])[0]
    return model_card.Example(image, question, answer), None


def _load_processor(source: str | Path, base: str | Path) -> FlashSlothProcessor:
    """Load the processor from `source`, or from the base model if an adapter's folder has none."""
    for folder in (source, base):
        try:
            return FlashSlothProcessor.from_pretrained(folder)
        except Exception as error:  # no common class, see `export`
            reason = error
    raise ValueError(
        f"its processor cannot be loaded ({first_line(reason)}); name one with --processor, such as the folder that "
        "the training started from."
    )


def _check_together(model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor) -> None:
    """Check that the processor builds prompts for this model."""
    config, size = model.config, processor.image_processor.size
    pairs = {
        "image token": (processor.image_token_id, config.image_token_id),
        "query token": (processor.query_token_id, config.query_token_id),
        "number of image tokens": (processor.image_seq_length, config.image_seq_length),
        "number of query tokens": (processor.num_query_tokens, config.num_query_tokens),
        "image size": ((size["height"], size["width"]), config.tile_size),
    }
    if wrong := [
        f"its {name} is {found}, but the model's is {own}" for name, (found, own) in pairs.items() if found != own
    ]:
        raise ValueError(
            f"the processor is for another model: {'; '.join(wrong)}. Name the right one with --processor."
        )
    if len(processor.tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(processor.tokenizer)} tokens, but the model's vocabulary only "
            f"{config.text_config.vocab_size}; name the right processor with --processor."
        )


def _read_card(folder: Path) -> ModelCardData:
    """Metadata of the checkpoint's card."""
    file = folder / CARD
    try:
        return ModelCard.load(file, ignore_metadata_errors=True).data if file.is_file() else ModelCardData()
    except ValueError:  # unreadable metadata
        return ModelCardData()


def _hub_ids(names: str | list[str] | None) -> list[str] | None:
    """The names that are Hub ids. Paths, which a training run that started from a folder writes, are dropped."""
    found = []
    for name in [names] if isinstance(names, str) else names or []:
        with contextlib.suppress(HFValidationError):
            validate_repo_id(name)
            found += [] if Path(name).exists() else [name]
    return found or None


def _summarise(
    model: FlashSlothForConditionalGeneration,
    checkpoint: Path,
    output: Path,
    license_id: str | None,
    bases: list[str] | None,
) -> Export:
    method = _quantization(model)
    sizes = (file.stat().st_size for file in find_weight_files(checkpoint)) if method else None
    return Export(
        output=output,
        num_parameters=model.num_parameters(),
        num_bytes=sum(sizes or (parameter.nbytes for parameter in model.parameters())),
        dtype=str(model.dtype).removeprefix("torch."),
        license_id=license_id,
        left_out=sorted(entry.name for entry in checkpoint.iterdir()),
        base_models=bases or [],
        quantization=method,
        unanswered=[],
    )


def _copy_license(checkpoint: Path, folder: Path, license_id: str | None) -> None:
    """Copy the checkpoint's licence, or this package's if the card names the same one."""
    for file in (checkpoint / LICENSE, *[Path(__file__).parents[1] / LICENSE] * (license_id == APACHE)):
        if file.is_file():
            shutil.copyfile(file, folder / LICENSE)
            return


def _copy_example(image: str, folder: Path) -> str:
    """Copy an image unless it is a URL; return its URL or its path in the repository."""
    if is_web_address(image):
        return image
    target = folder / EXAMPLES / Path(image).name
    target.parent.mkdir(exist_ok=True)
    if target.exists() and target.read_bytes() != Path(image).read_bytes():
        raise RepositoryError(f"two example images are called {target.name}; rename one of them.")
    shutil.copyfile(image, target)
    return target.relative_to(folder).as_posix()
