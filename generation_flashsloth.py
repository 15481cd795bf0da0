"""Generation support: assigns image tiles to calls and rows, and caches image prefixes.

An image prefix is the part of a prompt before its first question; `ImagePrefixCache` keeps its patch features and its
KV cache, so that further questions about the same images start there.
"""

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel

CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before
CACHE_NAME = CACHE_NAMES[0] if hasattr(BaseModelOutputWithPast, "cache") else CACHE_NAMES[1]
"""The installed transformers' name of the KV cache, in arguments and in outputs."""


class KeepsPrefix:
    """A KV cache that `generate` passes to `on_prefill` after prefill, so that its prefix can be kept."""

    on_prefill: Callable[[Any], None] | None = None


class DynamicPrefixCache(KeepsPrefix, DynamicCache):
    """The dynamic cache of an `ImagePrefixCache`."""


class StaticPrefixCache(KeepsPrefix, StaticCache):
    """The static cache of an `ImagePrefixCache`."""


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
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
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
        if isinstance(cache, KeepsPrefix) and cache.on_prefill is not None:
            on_prefill, cache.on_prefill = cache.on_prefill, None
            on_prefill(cache)
        return model_kwargs

    def _get_stopping_criteria(self, *args: Any, tokenizer: Any = None, **kwargs: Any) -> Any:
        """Accept a processor, as `transformers serve` passes it, and use its tokenizer to find stop strings."""
        return super()._get_stopping_criteria(*args, tokenizer=getattr(tokenizer, "tokenizer", tokenizer), **kwargs)

    def image_prefix_cache(self, max_bytes: int = 2**30, max_cache_len: int | None = None) -> "ImagePrefixCache":
        """Create a cache with which further questions about an image skip the image; see `ImagePrefixCache`."""
        return ImagePrefixCache(self, max_bytes=max_bytes, max_cache_len=max_cache_len)


def _repeat_cached_rows(cache: Cache | None, num_rows: int, repeats: int) -> None:
    num_tokens = 0 if cache is None else int(cache.get_seq_length())
    if not num_tokens and not isinstance(cache, KeepsPrefix):
        return
    if num_tokens and num_rows != next(len(layer.keys) for layer in cache.layers if hasattr(layer, "keys")):
        return  # repeated already
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"Several beams or answers need a DynamicCache to continue from, found a {type(cache).__name__} with "
            f"{num_tokens} tokens; call `image_prefix_cache` without `max_cache_len`."
        )
    cache.batch_repeat_interleave(repeats)  # does nothing to an empty cache


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

    Example:
    ```python
    >>> cache = model.image_prefix_cache()
    >>> output = model.generate(**cache(inputs), max_new_tokens=50)
    ```
    """

    def __init__(
        self, model: FlashSlothGenerationMixin, *, max_bytes: int = 2**30, max_cache_len: int | None = None
    ) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.max_cache_len = max_cache_len
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
