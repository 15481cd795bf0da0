"""Conversion of the original FlashSloth releases to model repositories in this package's layout.

    folder or Hub id ─ map the weights ─ compare names, shapes and dtypes with the model
      └─ if all fit: temporary folder next to the output: weights, config, processor, code, card ─ renamed to the output

The weights stay memory-mapped. Converting 1.3 GB took 22 MB of anonymous memory on top of the imports, and 1.3 GB of
mapped pages, which the system drops when it needs room. Only `.bin` files from before torch 1.6 are read into memory.
"""

import contextlib
import fnmatch
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..configuration_flashsloth import (
    ORIGINAL_ARCHITECTURE,
    ORIGINAL_KEY_MAPPING,
    FlashSlothConfig,
    is_flashsloth_config,
    is_original_config,
    original_generation_config,
    translate_original_config,
)
from ..modeling_flashsloth import FlashSlothForConditionalGeneration
from ..processing_flashsloth import FlashSlothProcessor
from . import first_line, model_card
from .repository import RepositoryError as ConversionError
from .repository import check_json_files, complete_or_absent, copy_code, find_weight_files, read_json, unused_folder

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HUB_PATTERNS = ["*.json", "*.txt", "*.model"]
SAFETENSORS_PATTERN, BIN_PATTERN = "model*.safetensors", "pytorch_model*.bin"
MAX_SHARD_SIZE = "2GB"  # progress is shown once per shard
MAX_UNCHECKED_LAYERS = 256
SIZES = {"model.embedded_query.query_norm.weight": "query_hidden_size", "model.query_tokens": "num_query_tokens"}
"""Config fields that the configs of releases lack: the length of the tensor's first axis is the field's value."""
UNUSED = (
    r"^model\.vision_tower\.(post_layernorm|head)\.",
    r"\.position_ids$",
    r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$",
)
"""Tensors of a release, by their names in this package, that the model does not use or computes itself."""


class Conversion(NamedTuple):
    """Summary of a conversion.

    Attributes:
        output: Folder that was written.
        num_tensors: Number of tensors.
        num_parameters: Number of parameters.
        num_bytes: Size of the weights, in bytes.
        num_shards: Number of weight files.
        dtype: Dtype of most weights, such as `float16`.
    """

    output: Path
    num_tensors: int
    num_parameters: int
    num_bytes: int
    num_shards: int
    dtype: str


class StoredTensor(NamedTuple):
    """A tensor of a release.

    Attributes:
        name: Name in this package.
        original_name: Name in the release.
        file: Name of its weight file.
        data: The tensor, memory-mapped where the file allows it.
    """

    name: str
    original_name: str
    file: str
    data: torch.Tensor

    def __str__(self) -> str:
        return self.name if self.name == self.original_name else f"{self.original_name} (here {self.name})"


def convert(source: str | Path, output: str | Path, *, vision_config: str | Path | None = None) -> Conversion:
    """Convert an original release.

    Every tensor keeps its dtype and its values; only its name changes.

    Args:
        source: Folder or Hub id of the release. Its weights are safetensors or `.bin` files, sharded or not.
        output: Folder to write. It must be empty or not exist, and appears only once it is complete.
        vision_config: Folder or file with the vision tower's config. Needed only if the tower is not SigLIP-so400m/14
            at 384 px and the path in the release's config does not exist.

    Returns:
        A summary of what was written.

    Raises:
        ConversionError: If the source is not a complete original FlashSloth, or the output is in use.
    """
    output = unused_folder(output)
    folder = _find_source(source)
    try:
        model, processor = _load_release(folder, None if vision_config is None else Path(vision_config))
    except (ValueError, OSError) as error:
        raise ConversionError(f"{source} cannot be converted: {error}") from error
    parameters = list(model.parameters())
    num_bytes = {dtype: sum(p.nbytes for p in parameters if p.dtype == dtype) for dtype in DTYPES}
    summary = Conversion(
        output=output,
        num_tensors=len(parameters),
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_bytes=sum(num_bytes.values()),
        num_shards=1,
        dtype=str(max(DTYPES, key=num_bytes.get)).removeprefix("torch."),
    )
    with complete_or_absent(output, summary.num_bytes) as partial:
        model.save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)
        model.config.dtype = summary.dtype  # `save_pretrained` writes the first parameter's
        model.config.save_pretrained(partial)
        processor.save_pretrained(partial)
        copy_code(partial)
        card = model_card.build_model_card(
            model.config,
            name=output.name,
            dtype=summary.dtype,
            num_parameters=summary.num_parameters,
            do_image_splitting=processor.image_processor.do_image_splitting,
        )
        card.save(partial / "README.md")
        return summary._replace(num_shards=len(list(partial.glob("*.safetensors"))))


def rename(original_name: str) -> str:
    """Translate the name of a tensor.

    Args:
        original_name: Its name in a release.

    Returns:
        Its name in this package.
    """
    for pattern, replacement in ORIGINAL_KEY_MAPPING.items():
        name, is_match = re.subn(pattern, replacement, original_name)
        if is_match:
            return name
    return original_name


def _find_source(source: str | Path) -> Path:
    """The release's folder, downloaded if it is a Hub id."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConversionError(f"{source} is a file; pass the folder that contains config.json and the weights.")
    try:
        try:
            has_safetensors = bool(fnmatch.filter(list_repo_files(str(source)), SAFETENSORS_PATTERN))
        except Exception:  # offline: use the cache, or let `snapshot_download` explain the failure
            has_safetensors = None
        known = [SAFETENSORS_PATTERN, BIN_PATTERN]
        weights = {True: known[:1], False: known[1:], None: known}[has_safetensors]
        return Path(snapshot_download(str(source), allow_patterns=[*HUB_PATTERNS, *weights]))
    except HFValidationError as error:
        raise ConversionError(f"no such folder: {source}") from error
    except Exception as error:  # huggingface_hub's errors for missing, gated and unreachable share no class
        raise ConversionError(
            f"{source} is neither a folder nor a Hub model that can be reached ({type(error).__name__}: "
            f"{first_line(error)})."
        ) from error


def _load_release(
    folder: Path, vision_config: Path | None
) -> tuple[FlashSlothForConditionalGeneration, FlashSlothProcessor]:
    """Build the model, with mapped weights, and the processor.

    Raises:
        ValueError: If anything in the folder is missing, broken or does not fit.
        OSError: If a file cannot be read.
    """
    config = read_json(folder / "config.json")
    check_json_files(folder)
    stored = [
        StoredTensor(rename(original_name), original_name, file.name, tensor)
        for file in find_weight_files(folder)
        for original_name, tensor in _read_tensors(file).items()
    ]
    model = _build_model(config, folder, vision_config, stored)
    tensors = _check_tensors(stored, model)
    generation_config = folder / "generation_config.json"
    with _validating(generation_config.name):
        original = read_json(generation_config) if generation_config.is_file() else {}
        model.generation_config = original_generation_config(original, model.config)
    processor = _build_processor(folder, config, model.config)
    # Unlike `from_pretrained`, this keeps the dtype of each tensor.
    missing = set(model.load_state_dict(tensors, strict=False, assign=True).missing_keys)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    return model, processor


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Map a weight file into memory. Code in a `.bin` file is not run."""
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{file} is damaged or not a safetensors file: {error}. Download it again.") from error
    try:
        is_mappable = zipfile.is_zipfile(file)  # the format since torch 1.6
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mappable)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is damaged or contains more than tensors, such as code, which is not run; get the weights as "
            "safetensors, or from a source that you trust."
        ) from error
    except Exception as error:  # a broken pickle can raise anything
        reason = first_line(error)[:200]
        raise ValueError(f"{file} is damaged or was not written by torch.save: {reason}. Download it again.") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{file} must contain a dict of tensors by name, like a model's `state_dict()`, but does not.")
    return tensors


def _build_model(
    original: dict, folder: Path, vision_config: Path | None, stored: list[StoredTensor]
) -> FlashSlothForConditionalGeneration:
    """The model that the release's config describes, on the meta device."""
    if not is_original_config(original):
        is_ours = is_flashsloth_config(original)
        missing = f"its config.json names neither the architecture {ORIGINAL_ARCHITECTURE} nor an `mm_vision_tower`"
        reason = "it is already in this package's layout" if is_ours else missing
        raise ValueError(f"it is not an original FlashSloth release: {reason}.")
    fields = translate_original_config(original, folder=folder, vision_config=vision_config)
    fields |= {SIZES[tensor.name]: len(tensor.data) for tensor in stored if tensor.name in SIZES and tensor.data.ndim}
    with _validating("config.json or the vision tower's"):
        config = FlashSlothConfig(**fields)
        for part in (config.text_config, config.vision_config):
            if part.num_hidden_layers > max(len(stored), MAX_UNCHECKED_LAYERS):  # too many to build even without data
                raise ValueError(f"num_hidden_layers={part.num_hidden_layers}, but there are {len(stored)} tensors.")
        with torch.device("meta"):
            return FlashSlothForConditionalGeneration(config)


def _check_tensors(stored: list[StoredTensor], model: FlashSlothForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Compare the tensors of all files with the model's.

    Returns:
        The tensors that the model uses, by name.

    Raises:
        ValueError: If a tensor is unexpected, missing, stored twice, or of a wrong shape or dtype. Lists all of them.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    problems, seen = [], {}
    for tensor in stored:
        if tensor.name not in expected and _is_unused(tensor.name, model.config.vision_config.num_hidden_layers):
            continue
        if first := seen.get(tensor.name):
            places = f"{first.original_name} in {first.file} and {tensor.original_name} in {tensor.file}"
            problems.append(f"stored twice: {tensor.name}, as {places}")
        elif problem := _find_mismatch(tensor, expected.get(tensor.name)):
            problems.append(problem)
        seen[tensor.name] = tensor
    for name in expected.keys() - seen.keys() - set(model.all_tied_weights_keys):
        problems.append(f"missing: {name}, expected shape {tuple(expected[name])}")
    if problems:
        raise ValueError(_list_problems(problems))
    return {name: tensor.data for name, tensor in seen.items()}


def _is_unused(name: str, num_tower_layers: int) -> bool:
    layer = re.match(r"^model\.vision_tower\.encoder\.layers\.(\d+)\.", name)
    if layer:
        return int(layer[1]) >= num_tower_layers
    return any(re.search(pattern, name) for pattern in UNUSED)


def _find_mismatch(tensor: StoredTensor, shape: torch.Size | None) -> str | None:
    """Describe how a tensor differs from the model's, whose shape is `shape`; `None`: the model has no such tensor."""
    found, dtype = tuple(tensor.data.shape), tensor.data.dtype
    if shape is None:
        return f"unexpected: {tensor}, shape {found}"
    if found != shape:
        return f"wrong shape: {tensor}, expected {tuple(shape)}, found {found}"
    if dtype not in DTYPES:
        names = [str(dtype).removeprefix("torch.") for dtype in (*DTYPES, dtype)]
        return f"wrong dtype: {tensor}, expected {', '.join(names[:-2])} or {names[-2]}, found {names[-1]}"
    if tensor.data.layout != torch.strided:
        return f"wrong layout: {tensor}, expected a dense tensor, found {tensor.data.layout}"
    return None


def _list_problems(problems: list[str]) -> str:
    count = f"{len(problems)} tensors are" if len(problems) > 1 else "1 tensor is"
    lines = [f"{count} not as expected; nothing was written.", *sorted(problems)]
    if any(problem.startswith("wrong shape: model.vision_tower.") for problem in problems):
        lines.append("The vision tower differs from its config; pass the tower's own config with --vision-config.")
    return "\n  ".join(lines)


def _build_processor(folder: Path, original_config: dict, config: FlashSlothConfig) -> FlashSlothProcessor:
    with _validating("tokenizer"):
        processor = FlashSlothProcessor.from_original(folder, original_config, config=config)
    for name, expected in (("image_token", config.image_token_id), ("query_token", config.query_token_id)):
        token, found = getattr(processor, name), getattr(processor, f"{name}_id")
        if found != expected:
            raise ValueError(f"its tokenizer gives {token} the id {found}, but {expected} is expected.")
    return processor


@contextlib.contextmanager
def _validating(part: str) -> Iterator[None]:
    """Convert errors to a ValueError that names the part of the release; a field of a wrong type can raise anything."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"its {part} is invalid: {first_line(error)}") from error
