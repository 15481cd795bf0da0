"""What `generate` must know of FlashSloth: which images go with which call and row; and images encoded once."""

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_utils import PreTrainedModel

from .backbones_flashsloth import CACHE_NAME
from .prompt_flashsloth import PromptSpans, instruction_starts

KEEP = "keep_for_image_prefix_cache"  # attribute of an empty cache: what to call with it once `generate` has filled it


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
        """Inputs of one step of `generate`: images go with every call that may hold image or query tokens.

        Raises:
            ValueError: If there is a cache in spite of `use_cache=False`.
        """
        if kwargs.get("use_cache") is False and kwargs.get(CACHE_NAME) is not None:
            raise ValueError(
                f"`generate` was given a {type(kwargs[CACHE_NAME]).__name__} and `use_cache=False`: every step would "
                "put the whole prompt into it once more. Leave out one of them; without a cache, pass what the "
                "processor gave."
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
            return model_inputs  # candidates of an assistant
        model_inputs |= {"pixel_values": pixel_values, "patch_features": patch_features}
        if cached.shape[1]:
            num_cached_tokens = (cached == self.config.image_token_id).sum(dim=1)
            model_inputs["num_cached_tiles"] = num_cached_tokens // self.config.image_seq_length
            model_inputs["begins_instruction"] = instruction_starts(cached, self.config)[:, -1]
        return model_inputs

    def _has_placeholders(self, input_ids: torch.LongTensor) -> bool:
        return bool(((input_ids == self.config.image_token_id) | (input_ids == self.config.query_token_id)).any())

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Image and query tokens are never generated, whatever else is to be suppressed."""
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
        """Repeat every row `expand_size` times, with its own tiles, as many as it has, and what is cached of it."""
        names = [name for name in ("pixel_values", "patch_features") if model_kwargs.get(name) is not None]
        images = {name: model_kwargs.pop(name) for name in names}
        if images and expand_size > 1:
            embeds = model_kwargs.get("inputs_embeds")
            prompt = input_ids if embeds is None else self.model.find_special_ids(embeds)
            spans = PromptSpans.find(prompt, self.config)
            num_tiles = (spans.num_image_tokens // self.config.image_seq_length).tolist()
            for name, tiles in images.items():
                spans.count(self.config).check(self.config, len(tiles))
                images[name] = torch.cat([row for part in tiles.split(num_tiles) for row in [part] * expand_size])
        if expand_size > 1:
            rows = model_kwargs["inputs_embeds"] if input_ids is None else input_ids
            _repeat_cached_rows(model_kwargs.get(CACHE_NAME), len(rows), expand_size)
        # By name: a static method in transformers 5.17, an ordinary one since.
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """After the first step, an `ImagePrefixCache` may want to keep what was computed."""
        model_kwargs = super()._update_model_kwargs_for_generation(*args, **kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        if hasattr(cache, KEEP):
            vars(cache).pop(KEEP)(cache)
        return model_kwargs

    def _get_stopping_criteria(self, *args: Any, tokenizer: Any = None, **kwargs: Any) -> Any:
        """Stop strings are looked for with a tokenizer; `transformers serve` gives the processor that holds it."""
        return super()._get_stopping_criteria(*args, tokenizer=getattr(tokenizer, "tokenizer", tokenizer), **kwargs)

    def image_prefix_cache(self, max_bytes: int = 2**30, max_cache_len: int | None = None) -> "ImagePrefixCache":
        """A cache with which questions about known images skip the images; see `ImagePrefixCache`."""
        return ImagePrefixCache(self, max_bytes=max_bytes, max_cache_len=max_cache_len)


def _repeat_cached_rows(cache: Cache | None, num_rows: int, repeats: int) -> None:
    num_tokens = 0 if cache is None else int(cache.get_seq_length())
    if not num_tokens and not hasattr(cache, KEEP):
        return
    if num_tokens and num_rows != next(len(layer.keys) for layer in cache.layers if hasattr(layer, "keys")):
        return  # repeated already
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"Beams and several answers go on from a DynamicCache only, found a {type(cache).__name__} with "
            f"{num_tokens} tokens; leave `max_cache_len` out of `image_prefix_cache`."
        )
    cache.batch_repeat_interleave(repeats)  # an empty one stays as it is


class CachedPrefix(NamedTuple):
    """What an `ImagePrefixCache` keeps of a prompt up to its first question.

    Attributes:
        patch_features: Patches of all its tiles, `(num_tiles, num_patches, vision_hidden_size)`.
        key_values: Keys and values of the prompt up to the first question, in every layer of the decoder; `None` until
            `generate` has computed them.
    """

    patch_features: torch.Tensor
    key_values: Cache | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        layers = [] if self.key_values is None else self.key_values.layers
        tensors = [part for layer in layers for part in vars(layer).values() if torch.is_tensor(part)]
        return sum(tensor.nbytes for tensor in [self.patch_features, *tensors])


class ImagePrefixCache:
    """Encodes images once, for any number of questions: their patches, and the prompt in which they stand.

    A prompt is known by its tiles and by its ids up to the first question; then only what follows is computed. A first
    question takes no longer than without: its `generate` leaves behind what later ones go on from. (Where the decoder
    has other layers than full attention, that is computed before, in a pass of its own.) When `max_bytes` are full,
    what was asked for longest ago goes. Several threads may use one cache.

    What was computed with other weights is not used: training, loading, and adapters that are added, merged, switched
    or turned off are noticed. What writes into `parameter.data` or changes the model's code is not; call `clear` then.

    Args:
        model: A FlashSloth that can generate.
        max_bytes: Most memory to use, on the model's device. A prompt that takes more is not kept.
        max_cache_len: Room of a static cache, in tokens of prompt and answer, with which `generate` compiles its steps
            where it would for `cache_implementation="static"`; `None`: a dynamic cache.

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
        """Forget all images, as after a change of the weights that cannot be noticed."""
        with self._lock:
            self.known.clear()

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the images of a prompt by what is known of them, after encoding them if they are new.

        Args:
            inputs: What the processor gave for one conversation. They may lie on another device than the model.

        Returns:
            Arguments for `generate`: `input_ids`, `attention_mask`, and, if there is an image before the first
            question, `patch_features` and a cache of its own, under the name that the installed transformers gives it,
            instead of `pixel_values`. They are good for one call.

        Raises:
            ValueError: If there are several rows, or padding; or a static cache cannot hold what is known.
        """
        input_ids, pixel_values = inputs["input_ids"], inputs.get("pixel_values")
        mask = inputs.get("attention_mask")
        if len(input_ids) != 1 or (mask is not None and not mask.all()):
            raise ValueError(
                f"An ImagePrefixCache takes one conversation without padding, but found {len(input_ids)} rows"
                f"{'' if mask is None or mask.all() else ' with padding'}; call it for each of them."
            )
        prefix = self._prefix(input_ids)
        rest = {name: part.to(self.model.device) for name, part in inputs.items() if name != "pixel_values"}
        if pixel_values is None or prefix is None:
            return rest | ({} if pixel_values is None else {"pixel_values": pixel_values.to(self.model.device)})
        digest = hashlib.sha256(prefix.cpu().numpy().tobytes())
        digest.update(pixel_values.float().cpu().numpy().tobytes())
        digest.update(_weights_state(self.model).encode())
        key = digest.digest()
        with self._lock:
            known = self.known.get(key)
        known = known or CachedPrefix(self._encode(pixel_values))
        if known.key_values is None and not self._can_be_cut():
            known = known._replace(key_values=self._prefill(prefix, known.patch_features))
        self._keep(key, known)
        cache = self._begin(key, prefix, known) if known.key_values is None else self._copy(known.key_values)
        return rest | {"patch_features": known.patch_features, CACHE_NAME: cache}

    def _empty_cache(self, max_cache_len: int | None = None) -> Cache:
        config = self.model.config.get_text_config()
        if max_cache_len is None:
            return DynamicCache(config=config)
        return StaticCache(config=config, max_cache_len=max_cache_len)

    def _can_be_cut(self) -> bool:
        """Whether the first positions of a filled cache are what they were before the others came."""
        return all(type(layer) is DynamicLayer for layer in self._empty_cache().layers)

    def _begin(self, key: bytes, prefix: torch.LongTensor, known: CachedPrefix) -> Cache:
        """An empty cache, of which the prefix will be kept when `generate` has filled it."""
        num_tokens = prefix.shape[1]
        if self.max_cache_len is not None:
            self._check_room(num_tokens, self.max_cache_len)

        def keep(filled: Cache) -> None:
            kept = self._empty_cache()
            for index, layer in enumerate(filled.layers):
                kept.update(layer.keys[:1, :, :num_tokens], layer.values[:1, :, :num_tokens], index)  # which copies
            self._keep(key, known._replace(key_values=kept))

        cache = self._empty_cache(self.max_cache_len)
        setattr(cache, KEEP, keep)
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
                f"`max_cache_len`={self.max_cache_len} or than a sliding window of the decoder; raise it, or leave it "
                "out for a dynamic cache."
            )

    def _prefix(self, input_ids: torch.LongTensor) -> torch.LongTensor | None:
        """The ids up to the first question; None if no image stands before it."""
        config = self.model.config
        queries = (input_ids[0] == config.query_token_id).nonzero()
        end = int(queries[0]) if len(queries) else input_ids.shape[1]
        starts = instruction_starts(input_ids[:, :end], config)[0].nonzero()
        prefix = input_ids[:, : int(starts[-1]) + 1] if len(starts) else input_ids[:, :0]
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

    def _prefill(self, prefix: torch.LongTensor, patch_features: torch.Tensor) -> Cache:
        num_tiles = int((prefix == self.model.config.image_token_id).sum()) // self.model.config.image_seq_length
        cache = self._empty_cache()
        prefix = prefix.to(self.model.device)
        self.model.model(prefix, patch_features=patch_features[:num_tiles], cache=cache, use_cache=True)
        return cache


def _weights_state(model: PreTrainedModel) -> str:
    """Text that differs when the weights do, or the adapters (peft's) that are in use; no value is read."""
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
