"""Build a new FlashSloth: a pretrained vision tower and a pretrained decoder, with untrained modules between them.

    configs, tokenizer, chat template ─ checked before any weights are read
      ├─ decoder: all weights; the vocabulary grows only if it has too few unused rows for the added tokens
      ├─ vision tower: the layers that are used
      └─ pooling, projector, query tokens, Embedded Query: initialised by the model, from a seed
    ─ temporary folder next to the output: weights, config, processor, code, card ─ renamed to the output

The model shares its tensors with the tower and the decoder, so memory holds about one model.
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
    "Nothing is pooled: only a window of 1 divides the {grid}x{grid} patches, so every patch becomes an image token. "
    "Choose another grid with --image-size."
)
PAD_TOKEN, ANCHOR_TEXT, PROBE_TEXT = "<pad>", " .", "The image shows a small house, and behind it"
RELEASED_WINDOWS_PER_SIDE = 9
MAX_WINDOWS_PER_SIDE = 2 * RELEASED_WINDOWS_PER_SIDE
VISION_FAMILIES, LANGUAGE_FAMILIES = "SigLIP, CLIP, DINOv2, AIMv2 or ViT", "Phi, Llama, Qwen3, Gemma 3 or SmolLM3"
RELEASED_QUERY_DEPTH = 7 / 32  # share of the decoder layers that precede the update of the query tokens
MAX_SHARD_SIZE = "5GB"
PIXEL_FIELDS = ("image_mean", "image_std", "do_normalize", "rescale_factor", "do_rescale", "resample")
BACKBONE_FIELDS = {"out_features", "out_indices", "stage_names", "_out_features", "_out_indices"}
NAFLEX = "siglip2_vision_model"
TOWER, DECODER = "model.vision_tower.", "model.language_model."
TOLERANCE = 0.02  # relative to the largest value; half precision may round differently


class Initialisation(NamedTuple):
    """The result of `init`.

    Attributes:
        output: The written folder.
        config: Config of the model.
        num_parameters: Number of parameters.
        num_new_parameters: Number of parameters that are not pretrained.
        num_new_rows: Number of rows added to the vocabulary.
        dtype: Data type of the weights, such as `bfloat16`.
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
    """A vision tower, reduced to the layers that FlashSloth uses.

    Attributes:
        source: Folder or Hub id.
        native_config: Config with only those layers, for the image size that the tower was trained with.
        config: The same config for the requested image size.
        key_mapping: Regular expressions for tensor names in the source, mapped to the names in the tower.
        naflex_config: Config of a NaFlex tower, which takes images of any size. It becomes a SigLIP tower for one size,
            which computes the same.
    """

    source: str
    native_config: PreTrainedConfig
    config: PreTrainedConfig
    key_mapping: dict[str, str]
    naflex_config: PreTrainedConfig | None = None


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
    """Build an untrained FlashSloth from two pretrained models.

    Args:
        vision: Folder or Hub id of a vision tower, or of a model with a `vision_config`, such as CLIP or a FlashSloth
            (original releases included).
        language: Folder or Hub id of a causal decoder with `layers`.
        output: Folder to write; must be empty or not exist. It appears once it is complete.
        vision_layer: Which hidden state of the tower to use: -1 is the output of the last layer, -2 its input. Default:
            -2, or -1 for the tower of a FlashSloth.
        image_size: Side of a tile in pixels. Default: the tower's; otherwise its position embeddings are
            interpolated.
        pooling_window_size: Side of a pooling window in patches. Default: the size that gives at most about 9×9
            windows; 1, which does not compress, only if the side of the patch grid is prime, with a warning.
        query_layer_idx: Decoder layer before which the query tokens are updated. Default: 7 of 32, or the same
            relative depth.
        num_query_tokens: Number of query tokens per question.
        query_hidden_size: Hidden size of the Embedded Query module.
        do_image_splitting: Whether to split an image into five tiles.
        chat_template: Jinja template with `<image>` and `<learnable>`. Default: derived from the decoder's chat
            template, or the original format if it has none.
        dtype: Data type of all weights; `auto`: the decoder's.
        seed: Seed of the new modules.

    Returns:
        A summary of the new model.

    Raises:
        RepositoryError: If the two models do not fit FlashSloth, or the output is not empty.
    """
    output = unused_folder(output)
    with _repository_errors(str(language)):
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
    """Side of the pooling window that gives about as many windows as the released models have, or fewer.

    A window of 1 does not compress, so it is chosen only if the side of the grid is prime.

    Args:
        grid: Side of the patch grid, in patches.

    Raises:
        RepositoryError: If every window size gives far more windows than the released models have.
    """
    windows = [window for window in range(2, grid) if grid % window == 0] or [1]
    best = min(windows, key=lambda window: (abs(grid // window - RELEASED_WINDOWS_PER_SIDE), -window))
    if grid // best > MAX_WINDOWS_PER_SIDE:
        raise RepositoryError(
            f"the vision tower splits an image into {grid}x{grid} patches, and no pooling window gives about 9x9 "
            "tokens; choose another image size with --image-size (224, if the tower was trained with several), or a "
            "divisor of the grid's side with --pooling-window-size."
        )
    return best


def default_query_layer(num_layers: int) -> int:
    """Index of the decoder layer before which the query tokens are updated: the released models' relative depth.

    Args:
        num_layers: Number of decoder layers.
    """
    return max(1, round(num_layers * RELEASED_QUERY_DEPTH))


def default_query_heads(num_decoder_heads: int, *widths: int) -> int:
    """Number of heads of the Embedded Query module: the decoder's, or fewer so that it divides the widths.

    Args:
        num_decoder_heads: Number of attention heads of the decoder.
        *widths: Width of the Embedded Query module, and of the vision tower.
    """
    common = math.gcd(*widths)
    return max(count for count in range(1, num_decoder_heads + 1) if common % count == 0)


@contextlib.contextmanager
def _repository_errors(language: str) -> Iterator[None]:
    """Convert errors to `RepositoryError`s with one line."""
    try:
        yield
    except RepositoryError:
        raise
    except (ValueError, OSError) as error:
        raise RepositoryError(first_line(error)) from error
    except Exception as error:  # the tower has been tested alone, so the decoder does not fit
        detail = first_line(error).removesuffix(".")
        raise _unfit("--language", language, f"is not a decoder that fits: {detail}") from error


def _unfit(option: str, source: str, reason: str) -> RepositoryError:
    """Error for a base model that does not fit FlashSloth."""
    families = VISION_FAMILIES if option == "--vision" else LANGUAGE_FAMILIES
    return RepositoryError(f"{source} {reason}; choose another {option}, such as a {families}.")


def _load(option: str, load: Any, source: str, **kwargs: Any) -> Any:
    """Load a config, tokenizer or model; if that fails, name the option in the error."""
    try:
        return load(source, **kwargs)
    except Exception as error:  # transformers, huggingface_hub, safetensors and tokenizers share no class
        if not Path(source).is_dir():
            kind = "a file, not a folder" if Path(source).exists() else "neither a folder nor a reachable Hub model"
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
        raise _unfit("--vision", source, f"({config.model_type}) is not a vision tower that `AutoModel` can build")
    if num_layers is None or _count(config, "hidden_size") is None:
        raise _unfit("--vision", source, f"({config.model_type}) is not a vision tower with layers of one width")
    if layer is None:
        layer = -1 if is_flashsloth else -2
    kept = num_layers + 1 + layer if layer < 0 else layer
    if not 0 < kept <= num_layers:
        raise RepositoryError(
            f"--vision-layer {layer} does not exist: the vision tower has {num_layers} layers; pass 1 to {num_layers} "
            f"or -{num_layers} to -1."
        )
    native = _changed(config, num_hidden_layers=kept)
    if config.model_type == NAFLEX:
        fixed = _fixed_size_config(native, image_size)
        return Tower(source, fixed, fixed, {}, naflex_config=native)
    key_mapping = {r"^model\.vision_tower\.(vision_tower\.vision_model\.)?": ""} if is_flashsloth else {}
    return Tower(source, native, _changed(native, image_size=image_size) if image_size else native, key_mapping)


def _fixed_size_config(naflex: PreTrainedConfig, image_size: int | None) -> PreTrainedConfig:
    """Config of the SigLIP tower that a NaFlex tower is for square images of one size.

    Args:
        naflex: Config of the NaFlex tower.
        image_size: Side of the images in pixels; `None`: as many patches as the tower has position embeddings.
    """
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "patch_size",
        "hidden_act",
        "layer_norm_eps",
        "attention_dropout",
    )
    fields = {name: getattr(naflex, name) for name in names}
    side = image_size or math.isqrt(naflex.num_patches) * naflex.patch_size
    return AutoConfig.for_model("siglip_vision_model", image_size=side, vision_use_head=False, **fields)


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
        reason = f"({tower.config.model_type}) is not a vision tower with square images and patches: it has {shown}"
        raise _unfit("--vision", tower.source, reason) from error


def _changed(config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    """Copy of a config with changed fields, built by its constructor because some fields depend on others."""
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
        raise _unfit("--language", source, "is a whole FlashSloth, not a decoder")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _unfit("--language", source, f"is not a causal decoder, but a model of type {config.model_type}")
    tokenizer = _load("--language", AutoTokenizer.from_pretrained, source)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise RepositoryError(f"{source} has no fast tokenizer (tokenizer.json), but a {type(tokenizer).__name__}.")
    return tokenizer


def _adapt_tokenizer(tokenizer: Any, template: str | None) -> tuple[str, str]:
    """Add the tokens that FlashSloth needs to the tokenizer.

    Returns:
        FlashSloth's chat template, and the token that ends an answer.
    """
    if template is None and tokenizer.chat_template:
        template = derive_template(tokenizer)  # before tokens are added, with those that the decoder was trained on
    added = [QUERY_TOKEN, END_TOKEN, IMAGE_TOKEN]  # in this order, Phi-2 gets the ids of the released models
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
    tokenizer.chat_template = None  # the processor has the template with images
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side = "left"  # `save_pretrained` writes the first
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
        raise _unfit("--language", source, f"{reason}, whose layers have no attention heads")
    if MODEL_MAPPING.get(type(decoder.config), None) is not type(decoder):
        raise _unfit("--language", source, f"{reason}, whose decoder `AutoModel` cannot build separately")
    if missing := set(report["missing_keys"]):
        raise RepositoryError(f"{source} is not complete: {len(missing)} tensors are missing, such as {min(missing)}.")
    return model.eval()


@torch.no_grad()
def _make_room(decoder: PreTrainedModel, tokenizer: Any) -> int:
    """Enlarge the vocabulary if the tokenizer has more tokens; new rows are the mean of the others.

    Returns:
        The number of new rows.
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
        query_layer_idx = default_query_layer(text_config.num_hidden_layers)
    widths = fields["query_hidden_size"], tower.config.hidden_size
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
            num_query_heads=default_query_heads(text_config.num_attention_heads, *widths),
            query_anchor_token_id=anchor[0] if len(anchor) == 1 else None,
            lm_head_bias=head.bias is not None,
            tie_word_embeddings=head.weight is decoder.get_input_embeddings().weight,
            **fields,
        )
    except StrictDataclassError as error:
        raise error.__cause__ or error from None


@torch.no_grad()
def _compute_logits(model: PreTrainedModel, tokenizer: Any, source: str) -> torch.Tensor:
    """Logits of a decoder for a test sentence."""
    try:
        return model(tokenizer(PROBE_TEXT, return_tensors="pt")["input_ids"]).logits.float()
    except Exception as error:  # a decoder that does not fit may raise anything
        raise _unfit("--language", source, f"cannot read a sentence: {first_line(error).removesuffix('.')}") from error


def _build_model(
    config: FlashSlothConfig,
    decoder: PreTrainedModel,
    tower: Tower,
    tokenizer: Any,
    expected: torch.Tensor,
    seed: int,
) -> tuple[FlashSlothForConditionalGeneration, int]:
    """Connect the pretrained parts with newly initialised modules.

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
            f"{len(wrong)} tensors of the base models are missing, or their shapes differ from the configs, such as "
            f"{min(wrong)}; check that the weights are complete."
        )
    found = _compute_logits(model, tokenizer, config.text_config.model_type)
    difference = (found - expected).abs().max() / expected.abs().max()
    if not difference < TOLERANCE:
        raise RepositoryError(
            f"the decoder ({config.text_config.model_type}) gives different logits inside FlashSloth than on its own "
            f"(by {difference:.1%}), so its head does something that FlashSloth does not support; choose another "
            f"--language, such as a {LANGUAGE_FAMILIES}."
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
    """Check that the model answers, and that the Embedded Query module runs exactly once.

    Raises:
        RepositoryError: If the decoder does not fit.
    """
    updates = []
    hook = model.model.embedded_query.register_forward_hook(lambda *_: updates.append(1))
    height, width = model.config.tile_size
    content = [{"type": "image", "image": Image.new("RGB", (width, height))}, {"type": "text", "text": PROBE_TEXT}]
    inputs = processor.encode_conversations([{"role": "user", "content": content}]).to(model.dtype)
    reason = None
    try:
        model.generate(**inputs, max_new_tokens=2)
    except Exception as error:  # a decoder that does not fit may raise anything
        reason = error
    finally:
        hook.remove()
    if reason is not None or len(updates) != 1:
        failure = f"cannot answer: {first_line(reason).removesuffix('.')}" if reason else ""
        detail = failure or f"updates its query tokens {len(updates)} times, not once"
        raise _unfit("--language", source, f"({model.config.text_config.model_type}) {detail}") from reason


def _load_tower(tower: Tower, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Load the tower and check it.

    Returns:
        Its tensors by their names in FlashSloth.

    Raises:
        RepositoryError: If tensors are missing, or the tower does not fit.
    """
    num_layers = tower.native_config.num_hidden_layers + 1  # FlashSloth reads the input of this tower's last layer
    model, report = _load(
        "--vision",
        AutoModel.from_pretrained,
        tower.source,
        config=_changed(tower.naflex_config or tower.native_config, num_hidden_layers=num_layers),
        dtype=dtype,
        output_loading_info=True,
        **({"key_mapping": tower.key_mapping} if tower.key_mapping else {}),
    )
    if tower.naflex_config is not None:
        model = _fix_size(model, _changed(tower.native_config, num_hidden_layers=num_layers))
    used = build_vision_tower(tower.native_config).to(dtype)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in report["missing_keys"]}
    tensors = {name: tensors[name] for name in used.state_dict() if name in tensors}
    if absent := used.state_dict().keys() - tensors.keys():
        reason = f"does not have the weights of a vision tower: {len(absent)} are missing, such as {min(absent)}"
        raise _unfit("--vision", tower.source, reason)
    used.load_state_dict(tensors, strict=False, assign=True)
    _check_tower(tower, model.eval(), used.eval())
    if tower.config is not tower.native_config:
        tensors |= _resize_positions(model, tower.config.image_size)
    return {f"{TOWER}{name}": tensor for name, tensor in tensors.items()}


@torch.no_grad()
def _fix_size(naflex: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Build the SigLIP tower that computes what a NaFlex tower computes for square images of one size.

    Args:
        naflex: The NaFlex tower: a linear layer of patches, whose pixels it takes row by row with channels last, and
            position embeddings that it interpolates to each image.
        config: Config of the SigLIP tower.
    """
    state, patch, grid = naflex.state_dict(), config.patch_size, patch_grid_size(config)
    weight = state["embeddings.patch_embedding.weight"]
    state["embeddings.patch_embedding.weight"] = weight.view(-1, patch, patch, config.num_channels).permute(0, 3, 1, 2)
    table = state["embeddings.position_embedding.weight"]
    table = table.view(*[math.isqrt(len(table))] * 2, -1)
    positions = naflex.embeddings.resize_positional_embeddings(table, torch.tensor([[grid, grid]]), grid**2)
    state["embeddings.position_embedding.weight"] = positions[0]
    model = AutoModel.from_config(config, dtype=naflex.dtype)
    # Without the head, which FlashSloth does not read.
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


@torch.no_grad()
def _check_tower(tower: Tower, model: PreTrainedModel, used: PreTrainedModel) -> None:
    """Check that the tower gives one feature per patch, row by row, and the same features inside FlashSloth.

    Args:
        tower: The tower.
        model: The tower as transformers builds it, with one more layer, whose input FlashSloth reads.
        used: The tower as FlashSloth builds it.

    Raises:
        RepositoryError: If the tower does not fit.
    """
    config = tower.native_config
    side, patch = _side(config.image_size), _side(config.patch_size)
    grid = side // patch
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    pixels[1] = pixels[0]
    pixels[1, :, :patch, (grid - 1) * patch : grid * patch] += 1  # changes the last patch of the first row
    try:
        states = model(pixels, output_hidden_states=True).hidden_states
        first, expected = (
            states[index].reshape(2, -1, config.hidden_size)[:, -(grid**2) :] for index in (0, config.num_hidden_layers)
        )
        changed = (first[0] != first[1]).any(dim=-1).nonzero().flatten().tolist()
        found = used(pixels).last_hidden_state[:, -(grid**2) :]
        is_right = changed == [grid - 1] and found.shape == expected.shape
        is_right = is_right and (found - expected).abs().max() < TOLERANCE * expected.abs().max()
    except Exception as error:  # a tower that does not fit may raise anything
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
    """Position embeddings for another image size, interpolated by the tower's own method."""
    embeddings = getattr(model, "embeddings", None)
    tables = {
        f"embeddings.{name}": parameter
        for name, parameter in (embeddings.named_parameters() if embeddings is not None else ())
        if "position_embedding" in name
    }
    resized = {}
    for name, table in tables.items():  # (positions, width), or with a leading axis of 1
        if not hasattr(embeddings, "interpolate_pos_encoding"):
            raise RepositoryError("the vision tower cannot interpolate its position embeddings; omit --image-size.")
        patch_size = _side(model.config.patch_size)
        num_extra = table.shape[-2] - (_side(model.config.image_size) // patch_size) ** 2
        num_positions = num_extra + (image_size // patch_size) ** 2
        like = table.new_zeros(1, num_positions, table.shape[-1])
        positions = embeddings.interpolate_pos_encoding(like, image_size, image_size)
        resized[name] = positions.reshape(*table.shape[:-2], num_positions, table.shape[-1]).contiguous()
    return resized


def _side(size: int | list[int] | tuple[int, int]) -> int:
    """Side of a square, which some configs give as height and width."""
    return size if isinstance(size, int) else size[0]


def _build_processor(
    config: FlashSlothConfig, tokenizer: Any, template: str, tower: Tower, do_image_splitting: bool
) -> FlashSlothProcessor:
    try:
        pixels, _ = ImageProcessingMixin.get_image_processor_dict(tower.source)
    except OSError:  # without an image processor, the tower is assumed to read pixels in [-1, 1]
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
