"""Generation support: assigns image tiles to calls and rows, compiles the prefill, and caches image prefixes.

An image prefix is the part of a prompt before its first question; `ImagePrefixCache` keeps its patch features and its
KV cache, so that further questions about the same images start there. `CompiledPrefill` compiles what comes before the
first token, as `generate` compiles the decoding steps after it.
"""

import copy
import hashlib
import threading
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer
from transformers.generation import CompileConfig, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before
CACHE_NAME = CACHE_NAMES[0] if hasattr(BaseModelOutputWithPast, "cache") else CACHE_NAMES[1]
"""The installed transformers' name of the KV cache, in arguments and in outputs."""

OPTIONAL_OUTPUTS = ("output_attentions", "output_hidden_states")  # requested by an argument or in the config
PROMPT_LENGTHS = (64, 192, 512)  # a second question; a question about an image; about an image in HD
TILE_COUNTS = (1, 5)  # an image; an image in HD
COMPILABLE_ATTENTION = ("sdpa", "eager")
MAX_GRAPHS = 256  # of one function; PyTorch's own limit is 8


class KeepsPrefix:
    """A KV cache that `generate` passes to `on_prefill` after prefill, so that its prefix can be kept."""

    on_prefill: Callable[[Any], None] | None = None


class DynamicPrefixCache(KeepsPrefix, DynamicCache):
    """The dynamic cache of an `ImagePrefixCache`."""


class StaticPrefixCache(KeepsPrefix, StaticCache):
    """The static cache of an `ImagePrefixCache`."""


class CompiledCache(KeepsPrefix, StaticCache):
    """The static cache of a `CompiledPrefill`, by which the model recognises calls to run compiled.

    Attributes:
        compiled: What runs them.
        num_prefix_tokens: Cached tokens before the prefill, which the host then knows without asking the device;
            `None` after the prefill.
    """

    compiled: "CompiledPrefill"
    num_prefix_tokens: int | None = None

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Number of cached tokens: a tensor on the device, except before the prefill."""
        if self.num_prefix_tokens is not None and not torch.compiler.is_compiling():
            return self.num_prefix_tokens
        return super().get_seq_length(layer_idx)

    def set_prefix(self, key_values: Cache | None) -> None:
        """Forget everything, and begin with a copy of other keys and values."""
        lengths: list[torch.Tensor] = [layer.cumulative_length for layer in self.layers]
        slots = [part for layer in self.layers for part in (layer.keys, layer.values)]
        torch._foreach_zero_(slots)  # a masked slot still counts if it holds NaN
        torch._foreach_zero_(lengths)
        self.num_prefix_tokens = 0
        if key_values is None:
            return
        self.num_prefix_tokens = key_values.get_seq_length()
        prefix = [part for layer in key_values.layers for part in (layer.keys, layer.values)]
        torch._foreach_copy_([slot[:, :, : self.num_prefix_tokens] for slot in slots], prefix)
        torch._foreach_add_(lengths, self.num_prefix_tokens)


class FlashSlothGenerationMixin(GenerationMixin):
    """`generate` for a model whose `pixel_values` are flat: all tiles of all rows, in order."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        pixel_values: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare the inputs of a step of `generate`; a step that may have image or query tokens gets the images.

        Raises:
            ValueError: If there is a cache although `use_cache=False`.
        """
        if kwargs.get("use_cache") is False and kwargs.get(CACHE_NAME) is not None:
            raise ValueError(
                f"`generate` was given a {type(kwargs[CACHE_NAME]).__name__} and `use_cache=False`: every step would "
                "append the whole prompt to it. Pass only one of them; without a cache, pass the processor's output."
            )
        mask = kwargs.get("attention_mask")
        is_mask_built_in_graph = is_first_iteration and isinstance(kwargs.get(CACHE_NAME), CompiledCache)
        if is_mask_built_in_graph:  # transformers leaves a mask with 4 axes as it is
            kwargs["attention_mask"] = (input_ids if mask is None else mask)[:, None, None]
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if is_mask_built_in_graph:
            model_inputs["attention_mask"] = mask
        if next_sequence_length == 1 and not is_first_iteration:
            return model_inputs
        prompt, fed = input_ids, model_inputs["input_ids"]
        if model_inputs.get("inputs_embeds") is not None:
            prompt, fed = self.model.find_special_ids(inputs_embeds), model_inputs["inputs_embeds"]
        cached = prompt[:, : prompt.shape[1] - fed.shape[1]]
        if cached.shape[1] and not is_first_iteration and not self._has_placeholders(prompt[:, cached.shape[1] :]):
            return model_inputs  # candidate tokens of assisted decoding
        model_inputs |= {"pixel_values": pixel_values, "patch_features": patch_features}
        if cached.shape[1]:
            spans = self.model.find_spans(cached)
            model_inputs["num_cached_tiles"] = spans.num_tiles_before[:, -1]
            model_inputs["begins_instruction"] = spans.instruction_start[:, -1] == cached.shape[1]
        return model_inputs

    def _has_placeholders(self, input_ids: torch.Tensor) -> bool:
        return bool(((input_ids == self.config.image_token_id) | (input_ids == self.config.query_token_id)).any())

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Suppress image and query tokens in addition to the caller's `suppress_tokens`."""
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        placeholders = {self.config.image_token_id, self.config.query_token_id}
        generation_config.suppress_tokens = sorted(placeholders.union(generation_config.suppress_tokens or ()))
        return generation_config, model_kwargs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        """Repeat every row `expand_size` times, together with its own tiles and its part of the cache."""
        names = [name for name in ("pixel_values", "patch_features") if model_kwargs.get(name) is not None]
        images = {name: model_kwargs.pop(name) for name in names}
        if images and expand_size > 1:
            embeds = model_kwargs.get("inputs_embeds")
            prompt = input_ids if embeds is None else self.model.find_special_ids(embeds)
            spans = self.model.find_spans(prompt)
            spans.copy_counts()
            num_tiles = (spans.num_image_tokens // spans.image_seq_length).tolist()
            for name, tiles in images.items():
                spans.check(len(tiles))
                images[name] = torch.cat([row for part in tiles.split(num_tiles) for row in [part] * expand_size])
        if expand_size > 1:
            rows = model_kwargs["inputs_embeds"] if input_ids is None else input_ids
            _repeat_cached_rows(model_kwargs.get(CACHE_NAME), len(rows), expand_size)
        # By keyword: a static method in transformers 5.17, an ordinary one since.
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Carry arguments over to the next step; after prefill, hand the cache to an `ImagePrefixCache`."""
        model_kwargs = super()._update_model_kwargs_for_generation(*args, **kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        if isinstance(cache, CompiledCache):
            cache.num_prefix_tokens = None
        if isinstance(cache, KeepsPrefix) and cache.on_prefill is not None:
            on_prefill, cache.on_prefill = cache.on_prefill, None
            on_prefill(cache)
        return model_kwargs

    def _get_stopping_criteria(self, *args: Any, tokenizer: Any = None, **kwargs: Any) -> Any:
        """Accept a processor, as `transformers serve` passes it, and use its tokenizer to find stop strings."""
        return super()._get_stopping_criteria(*args, tokenizer=getattr(tokenizer, "tokenizer", tokenizer), **kwargs)

    def compiled_prefill(
        self,
        max_cache_len: int,
        prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
        tile_counts: Sequence[int] = TILE_COUNTS,
        compile_config: CompileConfig | None = None,
    ) -> "CompiledPrefill":
        """Compile what comes before the first token; see `CompiledPrefill`."""
        return CompiledPrefill(
            self,
            max_cache_len=max_cache_len,
            prompt_lengths=prompt_lengths,
            tile_counts=tile_counts,
            compile_config=compile_config,
        )

    def image_prefix_cache(
        self,
        max_bytes: int = 2**30,
        max_cache_len: int | None = None,
        compiled: "CompiledPrefill | None" = None,
    ) -> "ImagePrefixCache":
        """Create a cache with which further questions about an image skip the image; see `ImagePrefixCache`."""
        return ImagePrefixCache(self, max_bytes=max_bytes, max_cache_len=max_cache_len, compiled=compiled)


def _repeat_cached_rows(cache: Cache | None, num_rows: int, repeats: int) -> None:
    num_tokens = 0 if cache is None else int(cache.get_seq_length())
    if not num_tokens and not isinstance(cache, KeepsPrefix):
        return
    if num_tokens and num_rows != next(len(layer.keys) for layer in cache.layers if hasattr(layer, "keys")):
        return  # repeated already
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"Several beams or answers need a DynamicCache to continue from, found a {type(cache).__name__} with "
            f"{num_tokens} tokens; call `image_prefix_cache` without `max_cache_len`, and no compiled prefill."
        )
    cache.batch_repeat_interleave(repeats)  # does nothing to an empty cache


def _encode_tiles(model: FlashSlothGenerationMixin, pixel_values: torch.Tensor) -> torch.Tensor:
    """Patch features of tiles, `(num_tiles, num_patches, vision_hidden_size)`; runs compiled."""
    return model.model._encode(pixel_values).last_hidden_state


def _prefill_prompt(
    model: FlashSlothGenerationMixin, cache: CompiledCache, num_tokens: torch.Tensor, **inputs: torch.Tensor | None
) -> torch.Tensor:
    """Logits of the last of `num_tokens` tokens, after which there is only padding; runs compiled."""
    logits = model(**inputs, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=num_tokens - 1).logits
    num_padding = inputs["input_ids"].shape[1] - num_tokens[0]
    for layer in cache.layers:
        layer.cumulative_length.sub_(num_padding)  # decoding overwrites the padding
    return logits


class CompiledPrefill:
    """Compiles the vision tower and the prefill of the decoder, on a GPU with CUDA graphs.

    `generate` compiles decoding steps by itself if its cache is static, as it is here. Tiles are padded to the next of
    `tile_counts`, and prompts on the right to the next of `prompt_lengths`, so that each graph serves all images and
    questions of its size. There is a graph of the vision tower for each number of tiles, and one of the prefill for
    each batch size, length and number of tiles; each is compiled when it is first needed. What is larger than the
    largest size runs without a graph.

    Rows may have any number of images, padding on the left, and tiles or none. Use it in one thread.

    Args:
        model: The model.
        max_cache_len: Longest prompt and answer, in tokens.
        prompt_lengths: Lengths to which prompts are padded, in tokens; at most `max_cache_len`.
        tile_counts: Numbers of tiles, of all rows of a call, to which tiles are padded.
        compile_config: How to compile. `generate` compiles decoding by its own argument of this name.

    Raises:
        ValueError: If the decoder has layers without full attention, the attention is not sdpa or eager, or the
            weights are quantised in a way that cannot be compiled or are on several devices.

    Example:
    ```python
    >>> compiled = model.compiled_prefill(max_cache_len=640)
    >>> output = model.generate(**compiled(inputs), max_new_tokens=50)
    ```
    """

    def __init__(
        self,
        model: FlashSlothGenerationMixin,
        *,
        max_cache_len: int,
        prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
        tile_counts: Sequence[int] = TILE_COUNTS,
        compile_config: CompileConfig | None = None,
    ) -> None:
        _check_compilable(model)
        self.model = model
        self.max_cache_len = max_cache_len
        self.prompt_lengths = sorted({min(length, max_cache_len) for length in prompt_lengths})
        self.tile_counts = sorted({0, *tile_counts})
        options = (compile_config or CompileConfig(fullgraph=True)).to_dict() | {"dynamic": False}
        self._encode_tiles = torch.compile(_encode_tiles, **options)
        self._prefill_prompt = torch.compile(_prefill_prompt, **options)
        self._free: defaultdict[int, list[CompiledCache]] = defaultdict(list)  # by batch size

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the images of prompts, and prepare their compiled prefill.

        Args:
            inputs: Output of the processor, on any device.

        Returns:
            Arguments for one call of `generate`: those given, on the model's device, with `patch_features` instead of
            `pixel_values`, and a KV cache, which returns to this object when it is no longer referenced.

        Raises:
            ValueError: If a prompt is longer than `max_cache_len`, or contradicts its images.
        """
        pixel_values = inputs.get("pixel_values")
        num_tiles = 0 if pixel_values is None else len(pixel_values)
        check = self.start_check(inputs["input_ids"])
        cache = self.empty_cache(len(inputs["input_ids"]))
        rest = {name: part for name, part in inputs.items() if name != "pixel_values"}
        if num_tiles:
            rest["patch_features"] = self.encode(pixel_values)
        check(num_tiles)
        return {name: part.to(self.model.device) for name, part in rest.items()} | {CACHE_NAME: cache}

    def start_check(self, input_ids: torch.Tensor) -> Callable[[int], None]:
        """Start the check of prompts that a graph cannot do; return what finishes it, given the number of tiles."""
        if input_ids.shape[1] > self.max_cache_len:
            raise ValueError(
                f"The prompt has {input_ids.shape[1]} tokens, more than `max_cache_len`={self.max_cache_len}; raise it."
            )
        spans = self.model.model.find_spans(input_ids)
        spans.copy_counts()
        return spans.check

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode tiles `(num_tiles, 3, height, width)` as `(num_tiles, num_patches, vision_hidden_size)`."""
        num_tiles = len(pixel_values)
        count = self._next(num_tiles, self.tile_counts, "tiles", "tile_counts")
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        if count is None:
            return _encode_tiles(self.model, pixel_values)
        features = self._run(self._encode_tiles, self.model, _pad_rows(pixel_values, count))
        return features[:num_tiles].clone()  # the next replay of the graph overwrites its output

    def prefill(
        self,
        cache: CompiledCache,
        *,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        patch_features: torch.Tensor | None = None,
        num_cached_tiles: torch.LongTensor | None = None,
        begins_instruction: torch.BoolTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Run the prefill of a call of `generate`.

        Args:
            cache: A cache of this object.
            input_ids: The tokens after the cached ones, `(batch, seq_length)`.
            attention_mask: 0 at padding, `(batch, any_length)`.
            position_ids: `(batch, seq_length)`.
            patch_features: Patch features of all tiles; `None` without images.
            num_cached_tiles: See `FlashSlothModel.forward`.
            begins_instruction: See `FlashSlothModel.forward`.
            logits_to_keep: See `FlashSlothForConditionalGeneration.forward`.
            **kwargs: Other arguments of the call.

        Returns:
            Logits of the last token, `(batch, 1, vocab_size)`; `None` if this is not a prefill, more than these logits
            is requested, or no graph is large enough.
        """
        requested = self.model.model._with_config_defaults(kwargs)
        asks_more = any(requested.get(name) for name in OPTIONAL_OUTPUTS)
        is_last_token = isinstance(logits_to_keep, int) and logits_to_keep == 1
        if cache.num_prefix_tokens is None or asks_more or not is_last_token:
            return None
        length = input_ids.shape[1]
        num_tiles = 0 if patch_features is None else len(patch_features)
        room = self.max_cache_len - cache.num_prefix_tokens
        lengths = [size for size in self.prompt_lengths if size <= room]
        bucket = self._next(length, lengths, "tokens", "prompt_lengths")
        count = self._next(num_tiles, self.tile_counts, "tiles", "tile_counts")
        if bucket is None or count is None:
            return None
        padding = (0, bucket - length)
        if cache.num_prefix_tokens:
            attention_mask = None  # a cached prefix is one row without padding
        elif attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        special = (self.model.config.image_token_id, self.model.config.query_token_id)
        inputs = {
            "input_ids": nn.functional.pad(input_ids, padding, value=next(i for i in range(3) if i not in special)),
            "attention_mask": None if attention_mask is None else nn.functional.pad(attention_mask.long(), padding),
            "position_ids": None if position_ids is None else nn.functional.pad(position_ids, padding),
            "patch_features": _pad_rows(patch_features, count) if num_tiles else None,
            "num_cached_tiles": num_cached_tiles,
            "begins_instruction": begins_instruction,
        }
        num_tokens = torch.full((1,), length, device=input_ids.device)  # unlike `torch.tensor`, it waits for nothing
        return self._run(self._prefill_prompt, self.model, cache, num_tokens, **inputs)

    @torch.inference_mode(False)
    @torch.no_grad()
    def empty_cache(self, batch_size: int = 1, prefix: Cache | None = None) -> CompiledCache:
        """Take a cache for one call of `generate`; graphs of the same batch size write to the same memory.

        Args:
            batch_size: Number of rows.
            prefix: Keys and values to begin with.
        """
        free = self._free[batch_size]
        kept = free.pop() if free else self._allocate(batch_size)
        cache = copy.copy(kept)
        weakref.finalize(cache, free.append, kept).atexit = False
        cache.set_prefix(prefix)
        return cache

    def _allocate(self, batch_size: int) -> CompiledCache:
        config = self.model.config.get_text_config()
        cache = CompiledCache(config=config, max_cache_len=self.max_cache_len)
        cache.compiled = self
        embeds = torch.zeros(batch_size, 1, config.hidden_size, device=self.model.device, dtype=self.model.dtype)
        # The first token that a cache takes allocates its memory, which must not happen in a graph.
        self.model.model.language_model(inputs_embeds=embeds, use_cache=True, **{CACHE_NAME: cache})
        return cache

    def _next(self, size: int, sizes: Sequence[int], what: str, argument: str) -> int | None:
        found = next((known for known in sizes if known >= size), None)
        if found is None:
            logger.warning_once(
                f"{size} {what} run without a compiled graph, the largest of which has {max(sizes, default=0)}; "
                f"raise `{argument}` of `compiled_prefill`, or `max_cache_len`."
            )
        return found

    def _run(self, compiled: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
            return compiled(*args, **kwargs)


def _check_compilable(model: FlashSlothGenerationMixin) -> None:
    config = model.config.get_text_config()
    layers = {type(layer) for layer in StaticCache(config=config, max_cache_len=1).layers}
    if layers != {StaticLayer}:
        raise ValueError(
            f"A compiled prefill needs full attention in all layers, but the decoder ({config.model_type}) has others; "
            'compile only the decoding, by `cache_implementation="static"`.'
        )
    attention = {part._attn_implementation for part in (config, model.config.vision_config)}
    if not attention.issubset(COMPILABLE_ATTENTION):
        raise ValueError(
            f"A compiled prefill needs one of {COMPILABLE_ATTENTION} as `attn_implementation`, found "
            f'{sorted(attention)}; call `model.set_attn_implementation("sdpa")`.'
        )
    quantizer, devices = (
        getattr(model, "hf_quantizer", None),
        set((getattr(model, "hf_device_map", None) or {}).values()),
    )
    if (quantizer is not None and not quantizer.is_compileable) or len(devices) > 1:
        raise ValueError(
            "A compiled prefill needs a model on one device, in a data type or quantisation that can be compiled, but "
            f"found {type(quantizer).__name__ if quantizer is not None else f'devices {sorted(map(str, devices))}'}; "
            "load the model without it."
        )


def _pad_rows(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Append zeros to the first axis."""
    return nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, num_rows - len(tensor)))


class CachedPrefix(NamedTuple):
    """An entry of `ImagePrefixCache`: a prompt up to its first question.

    Attributes:
        patch_features: Patch features of all its tiles, `(num_tiles, num_patches, vision_hidden_size)`.
        key_values: KV cache of the prompt up to the first question; `None` until `generate` has computed it.
    """

    patch_features: torch.Tensor
    key_values: Cache | None = None

    @property
    def num_bytes(self) -> int:
        """Memory in use, in bytes."""
        layers = [] if self.key_values is None else self.key_values.layers
        tensors = [part for layer in layers for part in vars(layer).values() if torch.is_tensor(part)]
        return sum(tensor.nbytes for tensor in [self.patch_features, *tensors])


class ImagePrefixCache:
    """Encodes images once for any number of questions: keeps their patch features and the KV cache of their prompt.

    A prefix is identified by its tiles and by the token ids up to the first question; only what follows it is
    computed. A first question takes no longer than without the cache, because its prefill fills the cache for later
    ones. (If the decoder has layers other than full attention, a separate prefill does.) Once `max_bytes` are in use,
    the least recently used prefix is dropped. Threads may share a cache.

    Prefixes computed with other weights are not used: training, loading, and adapters that are added, merged, switched
    or disabled are noticed. Writing to `parameter.data` or changing the model's code is not; call `clear` after that.

    Args:
        model: The model.
        max_bytes: Limit of the memory in use on the model's device, in bytes. A larger prefix is not kept.
        max_cache_len: Capacity of a static cache, in tokens of prompt and answer; `generate` then compiles decoding
            steps as it does with `cache_implementation="static"`. `None`: a dynamic cache.
        compiled: What encodes images, and runs the prefill of every question; its caches are static.

    Example:
    ```python
    >>> cache = model.image_prefix_cache()
    >>> output = model.generate(**cache(inputs), max_new_tokens=50)
    ```
    """

    def __init__(
        self,
        model: FlashSlothGenerationMixin,
        *,
        max_bytes: int = 2**30,
        max_cache_len: int | None = None,
        compiled: CompiledPrefill | None = None,
    ) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.compiled = compiled
        self.max_cache_len = max_cache_len if compiled is None else compiled.max_cache_len
        self.known: OrderedDict[bytes, CachedPrefix] = OrderedDict()
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Drop all prefixes, for example after a change of the weights that is not noticed."""
        with self._lock:
            self.known.clear()

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the images of a prompt by their cached prefix; new images are encoded first.

        Args:
            inputs: Output of the processor for one conversation, on any device.

        Returns:
            Arguments for one call of `generate`: `input_ids`, `attention_mask` and, if there is an image before the
            first question, `patch_features` and a KV cache, under the name that the installed transformers gives it,
            instead of `pixel_values`.

        Raises:
            ValueError: If there are several rows or padding, or if a static cache cannot hold the prefix.
        """
        input_ids, pixel_values = inputs["input_ids"], inputs.get("pixel_values")
        mask = inputs.get("attention_mask")
        if len(input_ids) != 1 or (mask is not None and not mask.all()):
            raise ValueError(
                f"An ImagePrefixCache takes one conversation without padding, but found {len(input_ids)} rows"
                f"{'' if mask is None or mask.all() else ' with padding'}; call it for each conversation."
            )
        prefix = self._prefix(input_ids)
        if self.compiled is not None:
            if pixel_values is None or prefix is None:
                return self.compiled(inputs)
            self.compiled.start_check(input_ids)(len(pixel_values))
        rest = {name: part.to(self.model.device) for name, part in inputs.items() if name != "pixel_values"}
        if pixel_values is None or prefix is None:
            return rest | ({} if pixel_values is None else {"pixel_values": pixel_values.to(self.model.device)})
        digest = hashlib.sha256(prefix.cpu().numpy().tobytes())
        digest.update(pixel_values.float().cpu().numpy().tobytes())
        digest.update(_weights_state(self.model).encode())  # type: ignore[arg-type]
        key = digest.digest()
        with self._lock:
            known = self.known.get(key)
        known = known or CachedPrefix(self._encode(pixel_values))
        if known.key_values is None and not self._can_be_truncated():
            known = known._replace(key_values=self._prefill(prefix, known.patch_features))
        self._keep(key, known)
        cache = self._recording_cache(key, prefix, known) if known.key_values is None else self._copy(known.key_values)
        return rest | {"patch_features": known.patch_features, CACHE_NAME: cache}

    def _empty_cache(self, max_cache_len: int | None = None) -> Cache:
        config = self.model.config.get_text_config()
        if max_cache_len is None:
            return DynamicPrefixCache(config=config)
        if self.compiled is not None:
            return self.compiled.empty_cache()
        return StaticPrefixCache(config=config, max_cache_len=max_cache_len)

    def _can_be_truncated(self) -> bool:
        """Whether a filled cache can be cut back to a prefix, as only full attention allows."""
        return all(type(layer) is DynamicLayer for layer in self._empty_cache().layers)

    def _recording_cache(self, key: bytes, prefix: torch.Tensor, known: CachedPrefix) -> Cache:
        """An empty cache whose prefix is kept after the prefill of `generate`."""
        num_tokens = prefix.shape[1]
        if self.max_cache_len is not None:
            self._check_room(num_tokens, self.max_cache_len)

        def keep(filled: Cache) -> None:
            kept = self._empty_cache()
            for index, layer in enumerate(filled.layers):
                kept.update(layer.keys[:1, :, :num_tokens], layer.values[:1, :, :num_tokens], index)  # copies
            self._keep(key, known._replace(key_values=kept))

        cache = self._empty_cache(self.max_cache_len)
        cache.on_prefill = keep
        return cache

    def _copy(self, key_values: Cache) -> Cache:
        if self.max_cache_len is None:
            return copy.deepcopy(key_values)
        for layer in key_values.layers:
            self._check_room(layer.get_seq_length(), min(layer.keys.shape[-2], self.max_cache_len))
        if self.compiled is not None:
            return self.compiled.empty_cache(prefix=key_values)
        cache = self._empty_cache(self.max_cache_len)
        for index, layer in enumerate(key_values.layers):
            cache.update(layer.keys, layer.values, index)
        return cache

    def _check_room(self, num_tokens: int, room: int) -> None:
        if num_tokens > room:
            raise ValueError(
                f"The prompt up to the first question has {num_tokens} tokens, more than "
                f"`max_cache_len`={self.max_cache_len} or a sliding window of the decoder; raise it, or omit it "
                "to use a dynamic cache."
            )

    def _prefix(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """The ids up to the first question; `None` if there is no image before it."""
        config = self.model.config
        queries = (input_ids[0] == config.query_token_id).nonzero()
        end = int(queries[0]) if len(queries) else input_ids.shape[1]
        start = int(self.model.model.find_spans(input_ids[:, :end]).instruction_start[0, -1]) if end else -1
        prefix = input_ids[:, : max(start, 0)]
        return prefix if (prefix == config.image_token_id).any() else None

    def _keep(self, key: bytes, known: CachedPrefix) -> None:
        with self._lock:
            self.known.pop(key, None)
            if known.num_bytes > self.max_bytes:
                return
            self.known[key] = known
            while sum(entry.num_bytes for entry in self.known.values()) > self.max_bytes:
                self.known.popitem(last=False)

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.compiled is not None:
            return self.compiled.encode(pixel_values)
        return self.model.get_image_features(pixel_values.to(self.model.device)).last_hidden_state

    def _prefill(self, prefix: torch.Tensor, patch_features: torch.Tensor) -> Cache:
        num_tiles = int((prefix == self.model.config.image_token_id).sum()) // self.model.config.image_seq_length
        cache = self._empty_cache()
        prefix = prefix.to(self.model.device)
        self.model.model(prefix, patch_features=patch_features[:num_tiles], cache=cache, use_cache=True)
        return cache


def _weights_state(model: PreTrainedModel) -> str:
    """A string that changes when weights or peft adapters change; it reads version counters, not weights."""
    parameters = [
        (id(parameter), None if parameter.is_inference() else parameter._version, parameter.dtype, parameter.device)
        for parameter in model.parameters()
    ]
    adapters = [
        [getattr(module, name, None) for name in ("disable_adapters", "active_adapters", "merged_adapters", "scaling")]
        for module in model.modules()
        if hasattr(module, "disable_adapters") and not isinstance(module, PreTrainedModel)
    ]
    return repr((parameters, adapters))
