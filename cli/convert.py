"""Conversion of the original FlashSloth releases into complete model repositories in this package's layout.

    original folder or Hub id ─ names, shapes and dtypes of all tensors, checked against the model ─ nothing wrong?
      └─ temporary folder beside the output: weights shard by shard, config, processor, code, card ─ renamed to it

Only a few megabytes of a safetensors shard are in memory at a time, and at most one `.bin` shard.
"""

import fnmatch
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HFValidationError
from tqdm import tqdm
from transformers import GenerationConfig

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
from .repository import complete_or_absent, copy_code, unused_folder
from .weight_files import (
    SAFETENSORS_DTYPES,
    TensorInfo,
    check_json_files,
    find_weight_files,
    read_json,
    read_tensor_infos,
    read_tensors,
    storage_order,
    write_safetensors,
)

DTYPES = ("F32", "F16", "BF16")
HUB_PATTERNS = ["*.json", "*.txt", "*.model"]
SAFETENSORS_PATTERN, BIN_PATTERN = "model*.safetensors", "pytorch_model*.bin"
MAX_UNCHECKED_LAYERS = 256
LANGUAGE_MODEL, ORIGINAL_LANGUAGE_MODEL = "model.language_model.", "model."
DROPPED = (
    r"^model\.vision_tower\.(post_layernorm|head)\.",
    r"\.position_ids$",
    r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$",
)
"""Tensors of a release, by their names here, that FlashSloth does not use or computes itself."""


class Conversion(NamedTuple):
    """What a conversion wrote.

    Attributes:
        output: The folder.
        num_tensors: Number of tensors.
        num_parameters: Number of parameters.
        num_bytes: Size of the weights.
        num_shards: Number of weight files.
        dtype: Type of most weights, such as `float16`.
    """

    output: Path
    num_tensors: int
    num_parameters: int
    num_bytes: int
    num_shards: int
    dtype: str


class Shard(NamedTuple):
    """A weight file of the source, and what is taken from it.

    Attributes:
        source: The file.
        names: Original names of its tensors, by their names here.
        infos: Its tensors, by their names here, in the order in which they are stored.
    """

    source: Path
    names: dict[str, str]
    infos: dict[str, TensorInfo]


class Plan(NamedTuple):
    """What a conversion is going to write.

    Attributes:
        shards: Weight files.
        config: Config.
        generation_config: Generation config.
        processor: Processor.
    """

    shards: list[Shard]
    config: FlashSlothConfig
    generation_config: GenerationConfig
    processor: FlashSlothProcessor


def convert(
    source: str | Path, output: str | Path, *, vision_config: str | Path | None = None, progress: bool = False
) -> Conversion:
    """Convert an original release.

    Args:
        source: Folder or Hub id of the release; safetensors or `.bin`, in one file or in shards.
        output: Folder to write, which must not exist or be empty. It appears when it is complete.
        vision_config: Folder or file of the vision tower's own config, for a tower other than SigLIP-so400m/14 at
            384 px that does not lie where the release's config points.
        progress: Whether to show a progress bar on stderr.

    Returns:
        What was written.

    Raises:
        ConversionError: If the source is no original FlashSloth that is whole, or the output is in use.
    """
    output = unused_folder(output)
    plan = _plan(source, None if vision_config is None else Path(vision_config))
    conversion = _summarise(output, plan.shards)
    with complete_or_absent(output, conversion.num_bytes) as partial:
        _write_weights(partial, plan.shards, conversion.num_bytes, progress)
        _write_rest(partial, plan, conversion)
    return conversion


def _plan(source: str | Path, vision_config: Path | None) -> Plan:
    """Find all that is to be written, without reading the data of a tensor."""
    folder = _find_source(source)
    try:
        original_config = read_json(folder / "config.json")
        check_json_files(folder)
        shards = [_describe(file) for file in find_weight_files(folder)]
        config, model = _build_model(original_config, folder, vision_config, shards)
        shards = _check_tensors(shards, model)
        config.dtype = _main_dtype(shards)
        generation_config = _build_generation_config(folder / "generation_config.json", config)
        processor = _build_processor(folder, original_config, config)
    except (ValueError, OSError) as error:
        raise ConversionError(f"{source} cannot be converted: {error}") from error
    return Plan(shards, config, generation_config, processor)


def _write_rest(folder: Path, plan: Plan, conversion: Conversion) -> None:
    """Write everything but the weights."""
    for part in (plan.config, plan.generation_config, plan.processor):
        part.save_pretrained(folder)
    copy_code(folder)
    card = model_card.build_model_card(
        plan.config,
        name=conversion.output.name,
        dtype=conversion.dtype,
        num_parameters=conversion.num_parameters,
        do_image_splitting=plan.processor.image_processor.do_image_splitting,
    )
    card.save(folder / "README.md")


def _find_source(source: str | Path) -> Path:
    """The release's folder, downloaded if it is a Hub id."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConversionError(f"{source} is a file; give the folder that holds config.json and the weights.")
    try:
        try:
            has_safetensors = bool(fnmatch.filter(list_repo_files(str(source)), SAFETENSORS_PATTERN))
        except Exception:  # no network: what was downloaded earlier may do, else the next call says why not
            has_safetensors = None
        known = [SAFETENSORS_PATTERN, BIN_PATTERN]
        weights = {True: known[:1], False: known[1:], None: known}[has_safetensors]
        return Path(snapshot_download(str(source), allow_patterns=[*HUB_PATTERNS, *weights]))
    except HFValidationError as error:
        raise ConversionError(f"no such folder: {source}") from error
    except Exception as error:  # huggingface_hub has no common class for no such repository, no access, no network
        raise ConversionError(
            f"{source} is neither a folder nor a Hub model that can be reached ({type(error).__name__}: "
            f"{first_line(error)})."
        ) from error


def _describe(file: Path) -> Shard:
    found = read_tensor_infos(file)
    names = {original: rename(original) for original in found}
    counts = Counter(names.values())
    clashes = [original for original, name in names.items() if counts[name] > 1]
    if clashes:
        raise ValueError(f"{file.name} holds tensors that become the same one: {', '.join(clashes)}.")
    return Shard(
        file,
        {name: original for original, name in names.items()},
        {name: found[original] for original, name in names.items()},
    )


def rename(original_name: str) -> str:
    """What a tensor of a release is called here.

    Args:
        original_name: Its name in the release.
    """
    for pattern, replacement in ORIGINAL_KEY_MAPPING.items():
        name, is_match = re.subn(pattern, replacement, original_name)
        if is_match:
            return name
    return original_name


def original_name_of(name: str) -> str:
    """What a tensor is called in a release; the inverse of `rename`.

    Args:
        name: Its name here.
    """
    for pattern, replacement in ORIGINAL_KEY_MAPPING.items():
        if "(" not in pattern and name.startswith(replacement):
            return pattern.strip("^$").replace("\\", "") + name.removeprefix(replacement)
    if name.startswith(LANGUAGE_MODEL):
        return ORIGINAL_LANGUAGE_MODEL + name.removeprefix(LANGUAGE_MODEL)
    return name


def _build_model(
    original: dict, folder: Path, vision_config: Path | None, shards: list[Shard]
) -> tuple[FlashSlothConfig, FlashSlothForConditionalGeneration]:
    """The config, and the model that it describes, without data."""
    fields = _translate_config(original, folder, vision_config, shards)
    num_tensors = sum(len(shard.infos) for shard in shards)
    try:
        config = FlashSlothConfig(**fields)
        for part in (config.text_config, config.vision_config):
            if part.num_hidden_layers > max(num_tensors, MAX_UNCHECKED_LAYERS):  # all of which would be built
                raise ValueError(f"num_hidden_layers={part.num_hidden_layers}, but there are {num_tensors} tensors.")
        with torch.device("meta"):
            return config, FlashSlothForConditionalGeneration(config)
    except Exception as error:  # a field of a wrong type may fail anywhere
        raise ValueError(f"its config.json, or the vision tower's, cannot be right: {first_line(error)}") from error


def _build_generation_config(file: Path, config: FlashSlothConfig) -> GenerationConfig:
    original = read_json(file) if file.is_file() else {}
    try:
        return original_generation_config(original, config)
    except Exception as error:  # as above
        raise ValueError(f"its {file.name} cannot be right: {first_line(error)}") from error


def _translate_config(original: dict, folder: Path, vision_config: Path | None, shards: list[Shard]) -> dict:
    """Fields of the config, with the sizes that no original config holds read off the tensors."""
    if not is_original_config(original):
        is_ours = is_flashsloth_config(original)
        missing = f"its config.json names neither the architecture {ORIGINAL_ARCHITECTURE} nor an `mm_vision_tower`"
        reason = "it is in this package's layout already" if is_ours else missing
        raise ValueError(f"it is no original FlashSloth release: {reason}.")
    fields = translate_original_config(original, folder=folder, vision_config=vision_config)
    shapes = {name: info.shape for shard in shards for name, info in shard.infos.items()}
    for field, name in (
        ("query_hidden_size", "model.embedded_query.query_norm.weight"),
        ("num_query_tokens", "model.query_tokens"),
    ):
        if shapes.get(name):
            fields[field] = shapes[name][0]
    return fields


def _check_tensors(shards: list[Shard], model: FlashSlothForConditionalGeneration) -> list[Shard]:
    """Compare the tensors of all shards with the model's.

    Returns:
        The shards, without what the model does not use.

    Raises:
        ValueError: If a tensor is unexpected, missing, there twice, or has a wrong shape or dtype; names them all.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kept = [_without_dropped(shard, expected.keys(), model.config) for shard in shards]
    problems, seen = [], {}
    for shard in kept:
        for name, info in shard.infos.items():
            shown = _show(name, shard.names[name])
            if name in seen:
                problems.append(f"there twice: {shown}, in {seen[name]} and {shard.source.name}")
            elif found := _mismatch(info, expected.get(name)):
                kind, detail = found
                problems.append(f"{kind}: {shown}, {detail}")
            seen[name] = shard.source.name
    for name in expected.keys() - seen.keys() - set(model.all_tied_weights_keys):
        problems.append(f"missing: {_show(name, original_name_of(name))}, expected shape {expected[name]}")
    if problems:
        raise ValueError(_list_problems(problems))
    return [shard for shard in kept if shard.infos]


def _without_dropped(shard: Shard, expected: Collection[str], config: FlashSlothConfig) -> Shard:
    num_layers = config.vision_config.num_hidden_layers
    infos = {name: i for name, i in shard.infos.items() if name in expected or not _is_dropped(name, num_layers)}
    return shard._replace(infos={name: infos[name] for name in storage_order(infos)})


def _is_dropped(name: str, num_tower_layers: int) -> bool:
    layer = re.match(r"^model\.vision_tower\.encoder\.layers\.(\d+)\.", name)
    if layer:
        return int(layer[1]) >= num_tower_layers
    return any(re.search(pattern, name) for pattern in DROPPED)


def _show(name: str, original_name: str) -> str:
    return original_name if name == original_name else f"{original_name} (here {name})"


def _mismatch(info: TensorInfo, shape: tuple[int, ...] | None) -> tuple[str, str] | None:
    """What is wrong with a tensor: kind and detail; `shape` is what is expected, `None` if the tensor is not."""
    if shape is None:
        return "unexpected", f"shape {info.shape}"
    if info.shape != shape:
        return "wrong shape", f"expected {shape}, found {info.shape}"
    if info.dtype not in DTYPES:
        return "wrong dtype", f"expected {' or '.join(DTYPES)}, found {info.dtype}"
    return None


def _list_problems(problems: list[str]) -> str:
    count = f"{len(problems)} tensors are" if len(problems) > 1 else "1 tensor is"
    lines = [f"{count} not as expected; nothing was written.", *sorted(problems)]
    if any(problem.startswith("wrong shape: model.vision_tower.") for problem in problems):
        lines.append("The vision tower differs from its config; give the tower's own config with --vision-config.")
    return "\n  ".join(lines)


def _build_processor(folder: Path, original_config: dict, config: FlashSlothConfig) -> FlashSlothProcessor:
    try:
        processor = FlashSlothProcessor.from_original(folder, original_config, config=config)
    except Exception as error:  # tokenizers raises bare exceptions
        raise ValueError(f"its tokenizer cannot be read ({first_line(error)}).") from error
    for name, expected in (("image_token", config.image_token_id), ("query_token", config.query_token_id)):
        token, found = getattr(processor, name), getattr(processor, f"{name}_id")
        if found != expected:
            raise ValueError(f"its tokenizer gives {token} the id {found}, but {expected} is expected.")
    return processor


def _main_dtype(shards: list[Shard]) -> torch.dtype:
    sizes = Counter()
    for shard in shards:
        for info in shard.infos.values():
            sizes[info.dtype] += info.num_bytes
    return SAFETENSORS_DTYPES[sizes.most_common(1)[0][0]]


def _summarise(output: Path, shards: list[Shard]) -> Conversion:
    infos = [info for shard in shards for info in shard.infos.values()]
    return Conversion(
        output=output,
        num_tensors=len(infos),
        num_parameters=sum(torch.Size(info.shape).numel() for info in infos),
        num_bytes=sum(info.num_bytes for info in infos),
        num_shards=len(shards),
        dtype=str(_main_dtype(shards)).removeprefix("torch."),
    )


def _write_weights(folder: Path, shards: list[Shard], num_bytes: int, progress: bool) -> None:
    weight_map = {}
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="converting", disable=not progress) as bar:
        for number, shard in enumerate(shards, start=1):
            is_only = len(shards) == 1
            file = "model.safetensors" if is_only else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            for count in write_safetensors(folder / file, shard.infos, _read_shard(shard)):
                bar.update(count)
            weight_map |= dict.fromkeys(shard.infos, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _read_shard(shard: Shard) -> Iterator[Iterator[memoryview]]:
    for _, chunks in read_tensors(shard.source, [shard.names[name] for name in shard.infos]):
        yield chunks
