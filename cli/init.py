"""A FlashSloth of one's own: a pretrained vision tower and a pretrained decoder, and untrained modules between them.

    configs, tokenizer, chat template ─ anything that cannot be right is refused before a weight is read
      ├─ decoder: all weights; a longer vocabulary only if the added tokens have no rows to spare
      ├─ vision tower: the layers that are read
      └─ pooling, projector, query tokens, Embedded Query: initialised as the model does it, from a seed
    ─ temporary folder beside the output: weights, config, processor, code, card ─ renamed to it

The model takes the tensors over from its parts without a copy, so about one model is in memory.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_utils import PreTrainedModel

from ..configuration_flashsloth import FlashSlothConfig, is_flashsloth_config, patch_grid_size
from ..image_processing_flashsloth import FlashSlothImageProcessor
from ..modeling_flashsloth import FlashSlothForConditionalGeneration, build_vision_tower
from ..processing_flashsloth import FlashSlothProcessor, build_chat_template
from . import first_line, model_card
from .chat_format import (
    END_TOKEN,
    IMAGE_TOKEN,
    QUERY_TOKEN,
    check_template,
    derive_template,
    find_end_token,
    find_instruction_starts,
)
from .repository import RepositoryError, complete_or_absent, copy_code, unused_folder

NOTHING_POOLED = (
    "Nothing is pooled: no window but 1 divides the {grid}x{grid} patches, so that each becomes an image token; "
    "--image-size gives another grid."
)
PAD_TOKEN, ANCHOR_TEXT, PROBE_TEXT = "<pad>", " .", "The image shows a small house, and behind it"
RELEASED_WINDOWS_PER_SIDE = 9
MAX_WINDOWS_PER_SIDE = 2 * RELEASED_WINDOWS_PER_SIDE
VISION_FAMILIES, LANGUAGE_FAMILIES = "SigLIP, CLIP, DINOv2, AIMv2 or ViT", "Phi, Llama, Qwen3, Gemma 3 or SmolLM3"
RELEASED_QUERY_DEPTH = 7 / 32  # the layer that reads updated queries, of all layers
MAX_SHARD_SIZE = "5GB"
PIXEL_FIELDS = ("image_mean", "image_std", "do_normalize", "rescale_factor", "do_rescale", "resample")
BACKBONE_FIELDS = {"out_features", "out_indices", "stage_names", "_out_features", "_out_indices"}
TOWER, DECODER = "model.vision_tower.", "model.language_model."
TOLERANCE = 0.02  # relative to the largest logit; half precision may round in another order


class Initialisation(NamedTuple):
    """What `init` wrote.

    Attributes:
        output: The folder.
        config: The model's config.
        num_parameters: Number of parameters.
        num_new_parameters: Number of those that are not pretrained.
        num_new_rows: Number of rows that the vocabulary has got.
        dtype: Type of the weights, such as `bfloat16`.
        end_token: The token that ends an answer.
    """

    output: Path
    config: FlashSlothConfig
    num_parameters: int
    num_new_parameters: int
    num_new_rows: int
    dtype: str
    end_token: str


class Tower(NamedTuple):
    """The vision tower as FlashSloth runs it.

    Attributes:
        source: Folder or Hub id.
        native_config: Config with the layers that are read, at the size in pixels that the tower was trained for.
        config: The same at the size that is asked for.
        key_mapping: What its tensors are called in the source, as regular expressions, and in the tower.
    """

    source: str
    native_config: PreTrainedConfig
    config: PreTrainedConfig
    key_mapping: dict[str, str]


def init(
    vision: str | Path,
    language: str | Path,
    output: str | Path,
    *,
    vision_layer: int | None = None,
    image_size: int | None = None,
    pooling_window_size: int | None = None,
    query_layer_idx: int | None = None,
    num_query_tokens: int = 9,
    query_hidden_size: int = 576,
    do_image_splitting: bool = False,
    chat_template: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
) -> Initialisation:
    """Build a FlashSloth that is to be trained from two pretrained models.

    Args:
        vision: Folder or Hub id of a vision tower, or of a model with a `vision_config`, such as CLIP or a FlashSloth,
            also an original release.
        language: Folder or Hub id of a causal decoder with `layers`.
        output: Folder to write, which must not exist or be empty. It appears when it is complete.
        vision_layer: Which of the tower's hidden states is read: -1 is what leaves the last layer, -2 what enters it.
            Default: -2, or -1 of a FlashSloth, whose tower ends with what it reads.
        image_size: Side of a tile in pixels, if not the tower's own; its position embeddings are interpolated.
        pooling_window_size: Side of a pooling window in patches. Default: the one that makes about 9×9 windows or
            fewer; of a grid whose side is prime it is 1, which compresses nothing, and a warning says so.
        query_layer_idx: Decoder layer on whose input the queries are updated. Default: 7 of 32, or as deep as that.
        num_query_tokens: Number of queries behind a question.
        query_hidden_size: Width of the Embedded Query module.
        do_image_splitting: Whether an image becomes five tiles.
        chat_template: Jinja template with `<image>` and `<learnable>`. Default: the decoder's chat format, or the
            original's if it has none.
        dtype: Type of all weights; `auto`: the decoder's.
        seed: Seed of what is not pretrained.

    Returns:
        What was written.

    Raises:
        RepositoryError: If no FlashSloth can be built of the two, or the output is in use.
    """
    output = unused_folder(output)
    with _refusal(str(language)):
        tower = _find_tower(str(vision), vision_layer, image_size)
        grid = _find_grid(tower)
        window = pooling_window_size or default_pooling_window(grid)
        tokenizer = _load_tokenizer(str(language))
        template, end_token = _adapt_tokenizer(tokenizer, chat_template)
        starts = find_instruction_starts(tokenizer, template)
        decoder = _load_decoder(str(language), dtype)
        num_new_rows = _make_room(decoder, tokenizer)
        config = _build_config(
            decoder,
            tower,
            tokenizer,
            pooling_window_size=window,
            query_layer_idx=query_layer_idx,
            num_query_tokens=num_query_tokens,
            query_hidden_size=query_hidden_size,
            instruction_start_ids=starts,
        )
        expected = _compute_logits(decoder, tokenizer, str(language))
        model, num_new_parameters = _build_model(config, decoder, tower, tokenizer, expected, seed)
        processor = _build_processor(config, tokenizer, template, tower, do_image_splitting)
        _check_queries(model, processor, str(language))
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    result = Initialisation(
        output=output,
        config=config,
        num_parameters=model.num_parameters(),
        num_new_parameters=num_new_parameters,
        num_new_rows=num_new_rows,
        dtype=str(model.dtype).removeprefix("torch."),
        end_token=end_token,
    )
    if window == 1 and pooling_window_size is None:
        warnings.warn(NOTHING_POOLED.format(grid=grid), stacklevel=2)
    with complete_or_absent(output, num_bytes) as folder:
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        processor.save_pretrained(folder)
        copy_code(folder)
        _build_card(result, vision, language, do_image_splitting).save(folder / "README.md")
    return result


def default_pooling_window(grid: int) -> int:
    """Side of the pooling window that makes about as many windows as the released models have, or fewer.

    A window of 1 compresses nothing, so it is taken only where there is no other: where the grid's side is prime.

    Args:
        grid: Side of the patch grid, in patches.

    Raises:
        RepositoryError: If none makes a sensible number of them.
    """
    windows = [window for window in range(2, grid) if grid % window == 0] or [1]
    best = min(windows, key=lambda window: (abs(grid // window - RELEASED_WINDOWS_PER_SIDE), -window))
    if grid // best > MAX_WINDOWS_PER_SIDE:
        raise RepositoryError(
            f"the vision tower cuts an image into {grid}x{grid} patches, and no pooling window makes about 9x9 tokens "
            "of them; give another size in pixels with --image-size (224, if the tower was trained at several), or a "
            "divisor with --pooling-window-size."
        )
    return best


@contextlib.contextmanager
def _refusal(language: str) -> Iterator[None]:
    """Turn what cannot be built into one clear line."""
    try:
        yield
    except RepositoryError:
        raise
    except (ValueError, OSError) as error:
        raise RepositoryError(first_line(error)) from error
    except Exception as error:  # the tower was tried by itself, so this is a decoder of another shape
        detail = str(error).partition("\n")[0].removesuffix(".")
        raise _unfit("--language", language, f"is no decoder that fits: {detail}") from error


def _unfit(option: str, source: str, reason: str) -> RepositoryError:
    """A base model that FlashSloth cannot be built of."""
    families = VISION_FAMILIES if option == "--vision" else LANGUAGE_FAMILIES
    return RepositoryError(f"{source} {reason}; choose another {option}, such as a {families}.")


def _load(option: str, load: Any, source: str, **kwargs: Any) -> Any:
    """Load a part of a base model, and say which one if that fails."""
    try:
        return load(source, **kwargs)
    except Exception as error:  # transformers, huggingface_hub, safetensors and tokenizers share no class
        if not Path(source).is_dir():
            kind = "a file" if Path(source).exists() else "neither a folder nor a Hub model that can be reached"
            raise RepositoryError(f"{source} is {kind}.") from error
        raise _unfit(option, source, f"cannot be loaded: {first_line(error).removesuffix('.')}") from error


def _find_tower(source: str, layer: int | None, image_size: int | None) -> Tower:
    content, _ = _load("--vision", PreTrainedConfig.get_config_dict, source)
    is_flashsloth = is_flashsloth_config(content)
    load = FlashSlothConfig if is_flashsloth else AutoConfig
    config = _load("--vision", load.from_pretrained, source)
    config = getattr(config, "vision_config", config)
    num_layers = _count(config, "num_hidden_layers")
    if type(config) not in MODEL_MAPPING:
        raise _unfit("--vision", source, f"({config.model_type}) is no vision tower that `AutoModel` can build")
    if num_layers is None or _count(config, "hidden_size") is None:
        raise _unfit("--vision", source, f"({config.model_type}) is no vision tower of layers of one width")
    if layer is None:
        layer = -1 if is_flashsloth else -2
    kept = num_layers + 1 + layer if layer < 0 else layer
    if not 0 < kept <= num_layers:
        raise RepositoryError(
            f"--vision-layer {layer} is not there: the vision tower has {num_layers} layers, so give 1 to {num_layers} "
            f"or -{num_layers} to -1."
        )
    native = _changed(config, num_hidden_layers=kept)
    key_mapping = {r"^model\.vision_tower\.(vision_tower\.vision_model\.)?": ""} if is_flashsloth else {}
    return Tower(source, native, _changed(native, image_size=image_size) if image_size else native, key_mapping)


def _count(config: PreTrainedConfig, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None


def _find_grid(tower: Tower) -> int:
    """Side of the tower's patch grid."""
    try:
        return patch_grid_size(tower.config)
    except ValueError as error:
        sizes = {name: getattr(tower.config, name, None) for name in ("image_size", "patch_size")}
        shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
        reason = f"({tower.config.model_type}) is no vision tower with square images and patches: it has {shown}"
        raise _unfit("--vision", tower.source, reason) from error


def _changed(config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    """A config with other fields, made anew because some fields follow from others."""
    drop = {"_name_or_path", "architectures", "dtype", "model_type", "torch_dtype", "transformers_version"}
    fields = {name: value for name, value in config.to_dict().items() if name not in drop | BACKBONE_FIELDS}
    if num_layers := changes.get("num_hidden_layers"):
        for name, types in fields.items():
            if name.endswith("layer_types") and types:
                fields[name] = [types[min(i, len(types) - 1)] for i in range(num_layers)]
    return AutoConfig.for_model(config.model_type, **{**fields, **changes})


def _load_tokenizer(source: str) -> Any:
    config = _load("--language", AutoConfig.from_pretrained, source)
    if is_flashsloth_config(config.to_dict()):
        raise _unfit("--language", source, "is a whole FlashSloth, not a decoder alone")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _unfit(
            "--language", source, f"cannot be loaded as a causal decoder, but is a model of type {config.model_type}"
        )
    tokenizer = _load("--language", AutoTokenizer.from_pretrained, source)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise RepositoryError(f"{source} has no fast tokenizer (tokenizer.json), but {type(tokenizer).__name__}.")
    return tokenizer


def _adapt_tokenizer(tokenizer: Any, template: str | None) -> tuple[str, str]:
    """Give the tokenizer the tokens that FlashSloth needs.

    Returns:
        FlashSloth's chat template, and the token that ends an answer.
    """
    if template is None and tokenizer.chat_template:
        template = derive_template(tokenizer)  # in terms of the special tokens that the decoder was trained with
    added = [QUERY_TOKEN, END_TOKEN, IMAGE_TOKEN]  # this order gives Phi-2 the ids of the released models
    if template is not None or tokenizer.eos_token not in (None, tokenizer.bos_token, tokenizer.pad_token):
        added.remove(END_TOKEN)
    unused_end = tokenizer.eos_token
    _add_special_tokens(tokenizer, added)
    if END_TOKEN in added:
        tokenizer.eos_token = END_TOKEN
    template = template or build_chat_template()
    check_template(tokenizer, template)
    end_token = tokenizer.eos_token = find_end_token(tokenizer, template)
    if tokenizer.pad_token in (None, end_token):
        if unused_end in (None, end_token):
            _add_special_tokens(tokenizer, [PAD_TOKEN])
            unused_end = PAD_TOKEN
        tokenizer.pad_token = unused_end
    tokenizer.chat_template = None  # the processor's is the one that knows images
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side = "left"
    return template, end_token


def _add_special_tokens(tokenizer: Any, tokens: list[str]) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)


def _load_decoder(source: str, dtype: str) -> PreTrainedModel:
    model, report = _load(
        "--language", AutoModelForCausalLM.from_pretrained, source, dtype=dtype, output_loading_info=True
    )
    reason = f"is a {type(model).__name__}"
    decoder = model.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), torch.nn.ModuleList):
        raise _unfit("--language", source, f"{reason}, whose decoder has no list `layers`")
    if model.get_output_embeddings() is None:
        raise _unfit("--language", source, f"{reason}, which has no output embedding")
    if any(
        _count(decoder.config, name) is None for name in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    ):
        raise _unfit("--language", source, f"{reason}, whose layers are not of attention heads")
    if MODEL_MAPPING.get(type(decoder.config), None) is not type(decoder):
        raise _unfit("--language", source, f"{reason}, whose decoder `AutoModel` does not build alone")
    if missing := set(report["missing_keys"]):
        raise RepositoryError(f"{source} is not complete: {len(missing)} tensors are missing, such as {min(missing)}.")
    return model.eval()


@torch.no_grad()
def _make_room(decoder: PreTrainedModel, tokenizer: Any) -> int:
    """Lengthen the vocabulary if the tokenizer has more tokens; the added rows are the mean of the others.

    Returns:
        The number of rows added.
    """
    num_rows = decoder.get_input_embeddings().weight.shape[0]
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    if num_tokens <= num_rows:
        return 0
    decoder.resize_token_embeddings(num_tokens, mean_resizing=False)
    for module in (decoder.get_input_embeddings(), decoder.get_output_embeddings()):
        for parameter in module.parameters():
            parameter[num_rows:] = parameter[:num_rows].float().mean(dim=0).to(parameter.dtype)
    return num_tokens - num_rows


def _build_config(
    decoder: PreTrainedModel, tower: Tower, tokenizer: Any, *, query_layer_idx: int | None, **fields: Any
) -> FlashSlothConfig:
    text_config = _changed(
        decoder.get_decoder().config,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if query_layer_idx is None:
        query_layer_idx = max(1, round(text_config.num_hidden_layers * RELEASED_QUERY_DEPTH))
    widths = math.gcd(fields["query_hidden_size"], tower.config.hidden_size)
    heads = [count for count in range(1, text_config.num_attention_heads + 1) if widths % count == 0]
    anchor = tokenizer.encode(ANCHOR_TEXT, add_special_tokens=False)
    image_token_id, query_token_id = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, QUERY_TOKEN])
    head = decoder.get_output_embeddings()
    try:
        return FlashSlothConfig(
            text_config=text_config,
            vision_config=tower.config,
            image_token_id=image_token_id,
            query_token_id=query_token_id,
            query_layer_idx=query_layer_idx,
            num_query_heads=heads[-1],
            query_anchor_token_id=anchor[0] if len(anchor) == 1 else None,
            lm_head_bias=head.bias is not None,
            tie_word_embeddings=head.weight is decoder.get_input_embeddings().weight,
            **fields,
        )
    except StrictDataclassError as error:
        raise error.__cause__ or error from None


@torch.no_grad()
def _compute_logits(model: PreTrainedModel, tokenizer: Any, source: str) -> torch.Tensor:
    """What a decoder says to a sentence."""
    try:
        return model(tokenizer(PROBE_TEXT, return_tensors="pt")["input_ids"]).logits.float()
    except Exception as error:  # a decoder of another shape fails in a way of its own
        raise _unfit("--language", source, f"cannot read a sentence: {first_line(error).removesuffix('.')}") from error


def _build_model(
    config: FlashSlothConfig,
    decoder: PreTrainedModel,
    tower: Tower,
    tokenizer: Any,
    expected: torch.Tensor,
    seed: int,
) -> tuple[FlashSlothForConditionalGeneration, int]:
    """Join the pretrained parts and initialise what lies between.

    Returns:
        The model, and the number of parameters that are not pretrained.
    """
    state = {f"{DECODER}{name}": tensor for name, tensor in decoder.get_decoder().state_dict().items()}
    state |= {f"lm_head.{name}": tensor for name, tensor in decoder.get_output_embeddings().state_dict().items()}
    state |= _load_tower(tower, decoder.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, report = FlashSlothForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=state, dtype=decoder.dtype, output_loading_info=True
        )
    absent = [name for name in report["missing_keys"] if name.startswith((TOWER, DECODER, "lm_head."))]
    wrong = absent + [str(mismatch[0]) for mismatch in report["mismatched_keys"]]
    if wrong:
        raise RepositoryError(
            f"{len(wrong)} tensors of the base models are missing or have other shapes than their configs say, such as "
            f"{min(wrong)}; are their weights complete?"
        )
    found = _compute_logits(model, tokenizer, config.text_config.model_type)
    difference = (found - expected).abs().max() / expected.abs().max()
    if not difference < TOLERANCE:
        raise RepositoryError(
            f"as a part of FlashSloth the decoder ({config.text_config.model_type}) gives other logits than alone, by "
            f"{difference:.1%}: its own head does something that FlashSloth does not know; choose another --language, "
            f"such as a {LANGUAGE_FAMILIES}."
        )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[config.image_token_id, config.query_token_id],
    )
    parameters = dict(model.named_parameters())
    return model, sum(parameters[name].numel() for name in report["missing_keys"] if name in parameters)


@torch.no_grad()
def _check_queries(model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, source: str) -> None:
    """Refuse a decoder that cannot answer, or whose layers do not get what the Embedded Query module needs, or twice.

    Raises:
        RepositoryError: If it is such a decoder.
    """
    updates = []
    hook = model.model.embedded_query.register_forward_hook(lambda *_: updates.append(1))
    height, width = model.config.tile_size
    content = [{"type": "image", "image": Image.new("RGB", (width, height))}, {"type": "text", "text": PROBE_TEXT}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.dtype)
    reason = None
    try:
        model.generate(**inputs, max_new_tokens=2)
    except Exception as error:  # as above
        reason = error
    finally:
        hook.remove()
    if reason is not None or len(updates) != 1:
        failure = f"cannot answer: {first_line(reason).removesuffix('.')}" if reason else ""
        detail = failure or f"has its queries updated {len(updates)} times, not once"
        raise _unfit("--language", source, f"({model.config.text_config.model_type}) {detail}") from reason


def _load_tower(tower: Tower, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tower's tensors, by their names in FlashSloth, without those that the checkpoint does not have."""
    num_layers = tower.native_config.num_hidden_layers
    model, report = _load(
        "--vision",
        AutoModel.from_pretrained,
        tower.source,
        config=_changed(tower.native_config, num_hidden_layers=num_layers + 1),  # whose input is what FlashSloth reads
        dtype=dtype,
        output_loading_info=True,
        **({"key_mapping": tower.key_mapping} if tower.key_mapping else {}),
    )
    used = build_vision_tower(tower.native_config).to(dtype)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in report["missing_keys"]}
    tensors = {name: tensors[name] for name in used.state_dict() if name in tensors}
    if absent := used.state_dict().keys() - tensors.keys():
        reason = f"does not hold the weights of a vision tower: {len(absent)} are missing, such as {min(absent)}"
        raise _unfit("--vision", tower.source, reason)
    used.load_state_dict(tensors, strict=False, assign=True)
    _check_tower(tower, model.eval(), used.eval())
    if tower.config is not tower.native_config:
        tensors |= _resize_positions(model, tower.config.image_size)
    return {f"{TOWER}{name}": tensor for name, tensor in tensors.items()}


@torch.no_grad()
def _check_tower(tower: Tower, model: PreTrainedModel, used: PreTrainedModel) -> None:
    """Refuse a tower that does not give one feature for each patch, row by row, or whose features are changed.

    Args:
        tower: The tower.
        model: The tower as transformers has it, with a further layer, which reads what FlashSloth reads.
        used: The tower as FlashSloth has it.

    Raises:
        RepositoryError: If it is such a tower.
    """
    config = tower.native_config
    grid, side, patch = (
        _side(config.image_size) // _side(config.patch_size),
        *map(_side, (config.image_size, config.patch_size)),
    )
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    pixels[1] = pixels[0]
    pixels[1, :, :patch, (grid - 1) * patch : grid * patch] += 1  # the last patch of the first row is another
    try:
        states = model(pixels, output_hidden_states=True).hidden_states
        first, expected = (
            states[index].reshape(2, -1, config.hidden_size)[:, -(grid**2) :] for index in (0, config.num_hidden_layers)
        )
        changed = (first[0] != first[1]).any(dim=-1).nonzero().flatten().tolist()
        found = used(pixels).last_hidden_state[:, -(grid**2) :]
        is_right = changed == [grid - 1] and found.shape == expected.shape
        is_right = is_right and (found - expected).abs().max() < TOLERANCE * expected.abs().max()
    except Exception as error:  # a tower of another shape fails in a way of its own
        is_right, reason = False, error
    else:
        reason = None
    if not is_right:
        raise _unfit(
            "--vision",
            tower.source,
            f"({config.model_type}) does not give one feature for each of the {grid**2} patches of a {side}x{side} "
            "image, row by row",
        ) from reason


@torch.no_grad()
def _resize_positions(model: PreTrainedModel, image_size: int) -> dict[str, torch.Tensor]:
    """Position embeddings for another size in pixels, as the tower itself interpolates them."""
    embeddings = getattr(model, "embeddings", None)
    tables = {
        f"embeddings.{name}": parameter
        for name, parameter in (embeddings.named_parameters() if embeddings is not None else ())
        if "position_embedding" in name
    }
    resized = {}
    for name, table in tables.items():  # (positions, width), or with a leading axis of 1
        if not hasattr(embeddings, "interpolate_pos_encoding"):
            raise RepositoryError("the vision tower cannot interpolate its positions; leave --image-size out.")
        patch_size = _side(model.config.patch_size)
        num_extra = table.shape[-2] - (_side(model.config.image_size) // patch_size) ** 2
        num_positions = num_extra + (image_size // patch_size) ** 2
        like = table.new_zeros(1, num_positions, table.shape[-1])
        positions = embeddings.interpolate_pos_encoding(like, image_size, image_size)
        resized[name] = positions.reshape(*table.shape[:-2], num_positions, table.shape[-1]).contiguous()
    return resized


def _side(size: int | list[int] | tuple[int, int]) -> int:
    """Side of a square, which some configs give twice."""
    return size if isinstance(size, int) else size[0]


def _build_processor(
    config: FlashSlothConfig, tokenizer: Any, template: str, tower: Tower, do_image_splitting: bool
) -> FlashSlothProcessor:
    try:
        pixels, _ = ImageProcessingMixin.get_image_processor_dict(tower.source)
    except OSError:  # a tower without one is taken to see pixels in [-1, 1]
        pixels = {}
    height, width = config.tile_size
    image_processor = FlashSlothImageProcessor(
        size={"height": height, "width": width},
        do_image_splitting=do_image_splitting,
        **{name: pixels[name] for name in PIXEL_FIELDS if pixels.get(name) is not None},
    )
    return FlashSlothProcessor(
        image_processor,
        tokenizer,
        chat_template=template,
        image_seq_length=config.image_seq_length,
        num_query_tokens=config.num_query_tokens,
    )


def _build_card(result: Initialisation, vision: Any, language: Any, do_image_splitting: bool) -> ModelCard:
    sources = {"decoder": str(language), "tower": str(vision)}
    names = {part: Path(source).name if Path(source).is_dir() else source for part, source in sources.items()}
    return model_card.build_model_card(
        result.config,
        name=result.output.name,
        dtype=result.dtype,
        num_parameters=result.num_parameters,
        do_image_splitting=do_image_splitting,
        origin=model_card.INITIALISED.format(**names, num_new_rows=result.num_new_rows),
        base_models=[source for source in sources.values() if not Path(source).is_dir()],
        license_id=None,
    )
