"""A complete model repository from a checkpoint, such as the folder that a training wrote.

    checkpoint ─ loaded as a user would, and checked ─ written anew: weights, configs, processor, code, handler, card

Of the checkpoint's folder goes along what was loaded from it, and its licence: no optimizer state, no log, no key.
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
from ..modeling_flashsloth import FlashSlothForConditionalGeneration
from ..processing_flashsloth import FlashSlothProcessor
from . import URL_PREFIXES, first_line, model_card
from .repository import RepositoryError, complete_or_absent, copy_code, unused_folder
from .weight_files import check_json_files, find_weight_files, read_json

ADAPTER_CONFIG = "adapter_config.json"
CARD, LICENSE, APACHE = "README.md", "LICENSE", "apache-2.0"
EXAMPLES = "examples"
LICENSE_ID = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
ORIGIN = "Exported by `flashsloth export`."


class Export(NamedTuple):
    """What was written.

    Attributes:
        output: The folder.
        num_parameters: Number of parameters.
        num_bytes: Size of the weights.
        dtype: Type of the weights, such as `bfloat16`.
        license_id: The licence that the card names, if any.
        left_out: What of the checkpoint's folder is not in the output, by name.
    """

    output: Path
    num_parameters: int
    num_bytes: int
    dtype: str
    license_id: str | None
    left_out: list[str]


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
    """Write a complete repository.

    Args:
        checkpoint: Folder with a FlashSloth, or with a LoRA adapter for one, which is merged into it.
        output: Folder to write, which must not exist or be empty. It appears when it is complete.
        processor: Folder or Hub id of the processor, if the checkpoint has none.
        name: What the card calls the model, such as its Hub id. Default: the output's name.
        dtype: Type of the weights; "auto": the checkpoint's.
        license_id: The weights' licence, by the Hub's name for it. Default: what the checkpoint's own card says.
        base_models: Hub ids of the models that this one grew from. Default: the same.
        evaluations: JSON files with results. Default: the checkpoint's `evaluation.json`, if it has one.
        examples: Images, as files or URLs, and questions for the Hub's widget.

    Returns:
        What was written.

    Raises:
        RepositoryError: If the checkpoint is broken, not complete, or no FlashSloth, the output is in use, or the
            licence is none by that name.
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
        raise RepositoryError(f"the Hub knows licences by names such as apache-2.0, mit or other, not {license_id!r}.")
    license_id = license_id or known.license
    summary = _summarise(model, checkpoint, output, license_id)
    with complete_or_absent(output, summary.num_bytes) as partial:
        model.save_pretrained(partial)
        used_processor.save_pretrained(partial)
        copy_code(partial)
        _copy_license(checkpoint, partial, license_id)
        card = model_card.build_model_card(
            model.config,
            name=name or output.name,
            dtype=summary.dtype,
            num_parameters=summary.num_parameters,
            do_image_splitting=used_processor.image_processor.do_image_splitting,
            origin=ORIGIN,
            base_models=list(base_models) or _hub_ids(known.base_model),
            license_id=license_id,
            results=results,
            examples=[(_copy_example(image, partial), question) for image, question in examples],
        )
        card.save(partial / CARD)
        written = {file.name for file in partial.iterdir()}
    return summary._replace(left_out=[file for file in summary.left_out if file not in written])


def _load_model(folder: Path, dtype: str) -> tuple[FlashSlothForConditionalGeneration, str | Path]:
    """The model, with an adapter merged into it, and where it came from."""
    if not folder.is_dir():
        raise ValueError("there is no such folder.")
    if (folder / ADAPTER_CONFIG).is_file():
        return _merge_adapter(folder, dtype)
    if not (folder / "config.json").is_file():
        raise ValueError("it has no config.json; give the folder that `save_pretrained` or a training wrote.")
    return _load_whole(folder, dtype), folder


def _merge_adapter(folder: Path, dtype: str) -> tuple[FlashSlothForConditionalGeneration, str]:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError('merging a LoRA adapter needs peft: pip install "flashsloth[train]"') from error
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(f"its {ADAPTER_CONFIG} does not name a base model in `base_model_name_or_path`.")
    try:
        model = _load_whole(base, dtype)
    except Exception as error:  # as above
        raise ValueError(
            f"it is a LoRA adapter, whose base model {base} cannot be loaded ({first_line(error)}); put the base "
            f"model there, or change `base_model_name_or_path` in {ADAPTER_CONFIG}."
        ) from error
    return PeftModel.from_pretrained(model, folder).merge_and_unload(), base


def _load_whole(source: str | Path, dtype: str) -> FlashSlothForConditionalGeneration:
    if Path(source).is_dir():
        config = read_json(Path(source) / "config.json")
        if not is_flashsloth_config(config):
            raise ValueError(f"its model_type is {config.get('model_type')!r}, and it is no original release.")
        find_weight_files(Path(source))
        check_json_files(Path(source))
    model, report = FlashSlothForConditionalGeneration.from_pretrained(source, dtype=dtype, output_loading_info=True)
    if missing := report["missing_keys"]:
        raise ValueError(f"{len(missing)} tensors are missing in its weights, such as {min(missing)}.")
    if unexpected := report["unexpected_keys"]:
        raise ValueError(
            f"its weights have {len(unexpected)} tensors that the model would not use, such as {min(unexpected)}."
        )
    return model


def _load_processor(source: str | Path, base: str | Path) -> FlashSlothProcessor:
    """The processor of the checkpoint, or of the base model of an adapter without one."""
    for folder in (source, base):
        try:
            return FlashSlothProcessor.from_pretrained(folder)
        except Exception as error:  # as above
            reason = error
    raise ValueError(
        f"it has no processor that can be loaded ({first_line(reason)}); name one with --processor, such as the "
        "folder that the training started from."
    )


def _check_together(model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor) -> None:
    """Refuse a processor that makes prompts for another model."""
    config, size = model.config, processor.image_processor.size
    pairs = {
        "image token": (processor.image_token_id, config.image_token_id),
        "query token": (processor.query_token_id, config.query_token_id),
        "number of image tokens": (processor.image_seq_length, config.image_seq_length),
        "number of query tokens": (processor.num_query_tokens, config.num_query_tokens),
        "image size": ((size["height"], size["width"]), config.tile_size),
    }
    if wrong := [
        f"its {name} is {found}, but the model's {own}" for name, (found, own) in pairs.items() if found != own
    ]:
        raise ValueError(f"the processor is another model's: {'; '.join(wrong)}. Name the right one with --processor.")
    if len(processor.tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(processor.tokenizer)} tokens, but the vocabulary {config.text_config.vocab_size}."
        )


def _read_card(folder: Path) -> ModelCardData:
    """Metadata of the checkpoint's own card, which a training or its author wrote."""
    file = folder / CARD
    try:
        return ModelCard.load(file, ignore_metadata_errors=True).data if file.is_file() else ModelCardData()
    except ValueError:  # no metadata that can be read
        return ModelCardData()


def _hub_ids(names: str | list[str] | None) -> list[str] | None:
    """Those that are no folders; a training that started from a folder writes its path, which is nobody's business."""
    found = []
    for name in [names] if isinstance(names, str) else names or []:
        with contextlib.suppress(HFValidationError):
            validate_repo_id(name)
            found += [] if Path(name).exists() else [name]
    return found or None


def _summarise(
    model: FlashSlothForConditionalGeneration, checkpoint: Path, output: Path, license_id: str | None
) -> Export:
    return Export(
        output=output,
        num_parameters=model.num_parameters(),
        num_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        license_id=license_id,
        left_out=sorted(entry.name for entry in checkpoint.iterdir()),
    )


def _copy_license(checkpoint: Path, folder: Path, license_id: str | None) -> None:
    """The checkpoint's licence, or this package's own, if it is the one that the card names."""
    for file in (checkpoint / LICENSE, *[Path(__file__).parents[1] / LICENSE] * (license_id == APACHE)):
        if file.is_file():
            shutil.copyfile(file, folder / LICENSE)
            return


def _copy_example(image: str, folder: Path) -> str:
    """Where the widget finds an image."""
    if image.startswith(URL_PREFIXES):
        return image
    if not Path(image).is_file():
        raise RepositoryError(f"there is no example image {image}.")
    target = folder / EXAMPLES / Path(image).name
    target.parent.mkdir(exist_ok=True)
    if target.exists() and target.read_bytes() != Path(image).read_bytes():
        raise RepositoryError(f"two example images are called {target.name}; rename one of them.")
    shutil.copyfile(image, target)
    return target.relative_to(folder).as_posix()
