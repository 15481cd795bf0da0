r"""Processor of FlashSloth: turns images and conversations into model inputs, and generated ids into text.

The original prompt format, with the placeholders that the processor expands:

    SYSTEM USER: <image>\nQUESTION<learnable> ASSISTANT: ANSWER</s>USER: QUESTION 2<learnable> ASSISTANT:

`<image>` becomes the image tokens of one image, `<learnable>` the query tokens of one question.
"""

import dataclasses
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import transformers
from jinja2 import TemplateError
from packaging.version import Version
from tokenizers import normalizers
from transformers import AutoTokenizer, BatchFeature
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_utils import is_valid_image
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils import logging

from .configuration_flashsloth import FlashSlothConfig, is_original_config, splits_images
from .image_processing_flashsloth import FlashSlothImageProcessor
from .video_processing_flashsloth import DEFAULT_NUM_FRAMES, video_frames

# `transformers serve` sends the status and the text of Starlette's HTTPException to the client, but turns any other
# error into a bare 500. It has no other way to report a bad request, so `ConversationError` derives from that class
# where Starlette is installed.
try:
    from starlette.exceptions import HTTPException
except ImportError:
    HTTPException = Exception  # type: ignore[assignment,misc]

logger = logging.get_logger(__name__)

SERVER_MODULE = "transformers.cli.serving.server"
"""A module that only `transformers serve` imports."""

DEFAULT_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

GUARD = "\ufdd0"
"""A Unicode noncharacter, reserved for internal use. Inserted into the text `<image>`, it prevents a match with the
special token; the tokenizer's normalizer, which runs after special tokens are matched, removes it again."""

TOKENIZER_LOCK = threading.RLock()
"""Held during every call of a tokenizer. Fast tokenizers store padding and truncation as state, so threads that use
different settings at once get each other's, or `RuntimeError: Already borrowed`."""
if hasattr(os, "register_at_fork"):  # a lock held by another thread would never be released in the child process
    os.register_at_fork(
        before=TOKENIZER_LOCK.acquire, after_in_parent=TOKENIZER_LOCK.release, after_in_child=TOKENIZER_LOCK.release
    )

PART_TYPES = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("video", "video_url"), "video"),
}
"""Part types as transformers and OpenAI spell them, mapped to those of the chat template."""
SOURCE_KEYS = {
    "image": ("image", "url", "path", "base64", "image_url"),
    "video": ("video", "url", "path", "video_url"),
}
"""Keys under which a part may have its image or video."""


class ChatFormat(NamedTuple):
    """The literal strings of a chat format; the defaults are the original's.

    Attributes:
        start: Start of every conversation.
        lead: Text before the first turn of a conversation without a system message.
        system_prefix: Text before a system message; `None` if the format has no system messages.
        system_suffix: Text after a system message.
        is_system_in_turn: Whether `system_prefix` already opens the first user turn.
        user_prefix: Text before a user's images and text.
        user_suffix: Text after the query tokens.
        generation_prompt: Text before an answer that the model does not generate.
        answer_prefix: What the model generates before the text of an answer, such as a space.
        answer_end: What the model generates after that text; `None`: the tokenizer's `eos_token`.
        answer_suffix: Text after `answer_end`.
        joint: Text between `answer_suffix` and the next turn.
        closing: End of a conversation without a generation prompt.
        trimmed_roles: Roles whose text is stripped of surrounding white space.
    """

    start: str = ""
    lead: str = DEFAULT_SYSTEM_PROMPT + " "
    system_prefix: str | None = ""
    system_suffix: str = " "
    is_system_in_turn: bool = False
    user_prefix: str = "USER: "
    user_suffix: str = ""
    generation_prompt: str = " ASSISTANT:"
    answer_prefix: str = " "
    answer_end: str | None = None
    answer_suffix: str = ""
    joint: str = ""
    closing: str = ""
    trimmed_roles: frozenset[str] = frozenset()

    def build_template(self) -> str:
        """Build the chat template of this format.

        The images of a message are placed before its text, wherever they are in the message, because a question reads
        the images before it. Answers and their end token are inside `{% generation %}`. With `add_generation_prompt`,
        earlier answers may already begin with `answer_prefix`, as the model generated them; it is not added twice.

        Returns:
            A Jinja template with the placeholders `<image>` and `<learnable>`.
        """
        pieces = {name: repr(value) for name, value in self._asdict().items()}
        if self.answer_end is None:
            pieces["answer_end"] = "eos_token"
        pieces["first_prefix"] = repr("") if self.is_system_in_turn else pieces["user_prefix"]
        pieces["has_system"] = "false" if self.system_prefix is None else "messages[0]['role'] == 'system'"
        pieces["system_prefix"] = repr(self.system_prefix or "")
        pieces |= {f"{role}_text": "text_of(message)" for role in ("system", "user", "assistant")}
        pieces |= {f"{role}_text": "text_of(message) | trim" for role in self.trimmed_roles}
        return re.sub(r"@(\w+)@", lambda match: pieces[match[1]], TEMPLATE)


TEMPLATE = r"""
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}{{ message['content'] }}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' and part['text'] is string -%}{{ part['text'] }}
            {%- elif part['type'] not in ['image', 'image_url'] or message['role'] != 'user' -%}
                {{- raise_exception('FlashSloth reads parts of type text, whose text is a string, and in user '
                    'messages parts of type image, but found a part of type ' ~ part['type'] ~ ' in a message of '
                    'role ' ~ message['role'] ~ '.') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- @start@ -}}
{%- set has_system = @has_system@ -%}
{%- if has_system -%}
    {%- set message = messages[0] -%}
    {%- set system = @system_text@ -%}
    {{- @system_prefix@ ~ system ~ @system_suffix@ if system else '' -}}
{%- else -%}
    {{- @lead@ -}}
{%- endif -%}
{%- for message in (messages[1:] if has_system else messages) -%}
    {%- if message['role'] == 'user' -%}
        {{- @first_prefix@ if system and loop.first else @user_prefix@ -}}
        {%- if message['content'] is not string -%}
            {%- for part in message['content'] if part['type'] in ['image', 'image_url'] -%}
                {{- '<image>\n' -}}
            {%- endfor -%}
        {%- endif -%}
        {{- @user_text@ ~ '<learnable>' ~ @user_suffix@ -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- @generation_prompt@ -}}
        {%- set answer = @assistant_text@ -%}
        {%- set is_whole = add_generation_prompt and answer.startswith(@answer_prefix@) -%}
        {%- set answer = answer if is_whole else @answer_prefix@ ~ answer -%}
        {%- generation -%}{{- answer ~ @answer_end@ -}}{%- endgeneration -%}
        {{- @answer_suffix@ ~ ('' if loop.last else @joint@) -}}
    {%- else -%}
        {{- raise_exception('Expected the role user or assistant, or system in the first message if the chat format '
            'supports it, but found ' ~ message['role'] ~ '.') -}}
    {%- endif -%}
{%- endfor -%}
{{- @generation_prompt@ if add_generation_prompt else @closing@ -}}
""".strip()
"""A chat template in which `build_template` replaces every `@name@` by a Jinja literal or expression."""


def build_chat_template(system_prompt: str = DEFAULT_SYSTEM_PROMPT) -> str:
    """Build the chat template of the original prompt format.

    Args:
        system_prompt: System prompt of conversations without a system message; may be empty.

    Returns:
        A Jinja template with the placeholders `<image>` and `<learnable>`, and the tokenizer's `eos_token`.
    """
    return ChatFormat(lead=system_prompt + " " if system_prompt else "").build_template()


class ConversationError(ValueError, HTTPException):
    """A conversation cannot be encoded: an image is broken, a role or part type is unknown, or text is missing.

    Args:
        message: The reason, which `transformers serve` sends to the client with status 400.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)  # type: ignore[arg-type]
        self.status_code, self.detail, self.headers = 400, message, None

    def __str__(self) -> str:
        return self.detail


class FlashSlothProcessor(ProcessorMixin):
    """Combines the image processor, the tokenizer and the prompt format of FlashSloth.

    Text in the messages of a conversation never becomes an image token, a query token or an end of turn: the processor
    inserts `GUARD` into such text, and changes the normalizer of the tokenizer to remove it.

    Args:
        image_processor: Splits images into tiles.
        tokenizer: A fast tokenizer with the tokens `image_token` and `query_token`.
        chat_template: Jinja template; default: the original prompt format.
        image_token: Placeholder of an image.
        query_token: Placeholder of the query tokens of a question.
        image_seq_length: Image tokens per tile; the model's `config.image_seq_length`.
        num_query_tokens: Query tokens per question; the model's `config.num_query_tokens`.

    Example:
    ```python
    >>> processor = FlashSlothProcessor.from_pretrained(".")
    >>> question = [{"type": "image", "path": "examples/scene.png"}, {"type": "text", "text": "How many things?"}]
    >>> inputs = processor.apply_chat_template(
    ...     [{"role": "user", "content": question}],
    ...     add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ... )
    ```
    """

    def __init__(
        self,
        image_processor: FlashSlothImageProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        query_token: str = "<learnable>",
        image_seq_length: int = 81,
        num_query_tokens: int = 9,
    ) -> None:
        self.image_token, self.query_token = image_token, query_token
        self.image_seq_length, self.num_query_tokens = image_seq_length, num_query_tokens
        self.image_token_id = _token_id(tokenizer, image_token)
        self.query_token_id = _token_id(tokenizer, query_token)
        _ignore_guard(tokenizer)
        _serialize_calls(tokenizer)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or build_chat_template())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "FlashSlothProcessor":
        """Load a processor; folders and Hub ids in the layout of the original releases are supported.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            **kwargs: As for `ProcessorMixin.from_pretrained`.
        """
        hub_kwargs = {name: kwargs[name] for name in _HUB_KWARGS if name in kwargs}
        try:
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_kwargs)
        except OSError:  # a processor without a model
            config = {}
        if not is_original_config(config):
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            num_positions = (config.get("text_config") or {}).get("max_position_embeddings")
            _limit_length(processor.tokenizer, num_positions)
            return processor
        return cls.from_original(pretrained_model_name_or_path, config, **hub_kwargs)

    @classmethod
    def from_original(
        cls, source: Any, original_config: dict, *, config: FlashSlothConfig | None = None, **kwargs: Any
    ) -> "FlashSlothProcessor":
        """Build the processor of an original release, which has only tokenizer files.

        Args:
            source: Folder or Hub id of the release.
            original_config: Content of its `config.json`.
            config: The same config, translated. Default: read from `source`.
            **kwargs: Passed on to `AutoTokenizer.from_pretrained`.
        """
        config = config or FlashSlothConfig.from_pretrained(source, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, **kwargs)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<learnable>", "<image>"]})
        tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side = "left"  # `save_pretrained` writes the first
        tokenizer.eos_token, tokenizer.pad_token = "</s>", "<|endoftext|>"
        # As in the releases. Byte-level tokenizers ignore the setting, but True would give a warning for every answer.
        tokenizer.init_kwargs["clean_up_tokenization_spaces"] = tokenizer.clean_up_tokenization_spaces = False
        _limit_length(tokenizer, getattr(config.text_config, "max_position_embeddings", None))
        side = config.vision_config.image_size
        image_processor = FlashSlothImageProcessor(
            size={"height": side, "width": side}, do_image_splitting=splits_images(original_config)
        )
        return cls(
            image_processor,
            tokenizer,
            image_seq_length=config.image_seq_length,
            num_query_tokens=config.num_query_tokens,
        )

    def apply_chat_template(self, conversation: list, *args: Any, **kwargs: Any) -> Any:
        """Render a conversation, or a batch; see `ProcessorMixin.apply_chat_template`.

        Control tokens in the text of messages stay text. An image is a part `{"type": "image", "image": ...}` of a
        user message; `url`, `path`, `base64` and `image_url` work instead of `image`. A part without any of these is a
        placeholder for an image that is passed separately. A video, `{"type": "video", "path": ...}`, or with `url` or
        `video`, is read as `num_frames` images; see `video_frames`. Keys that are `None`, as `datasets` fills them,
        count as absent. `PART_TYPES` has further spellings.

        Args:
            conversation: Messages with `role` and `content`, or a list of such conversations.
            *args: As for `ProcessorMixin.apply_chat_template`.
            **kwargs: As for `ProcessorMixin.apply_chat_template`, and `num_frames` (default: 8), the number of frames
                to read from each video.

        Raises:
            ConversationError: If an image, a video or the conversation cannot be read, or part of it would be dropped:
                an unknown part type, a part without text or image, an image outside a user message. A ValueError.
            TypeError: If `fps` is passed.
            ImportError: If reading a video needs PyAV, which is not installed.
            NotImplementedError: If `return_assistant_tokens_mask` is passed and transformers is older than 5.18.
        """
        if kwargs.get("return_assistant_tokens_mask") and Version(transformers.__version__) < Version("5.18"):
            raise NotImplementedError(
                "`return_assistant_tokens_mask` needs transformers 5.18 or newer: older ones misplace the mask when "
                "placeholders are expanded. Update transformers, or build labels from the ids."
            )
        num_frames = _take_num_frames(kwargs)
        needs_images = bool(kwargs.get("tokenize")) and "images" not in kwargs["processor_kwargs"] | kwargs
        try:
            conversation = self.guard_control_tokens(_read_conversations(conversation))
            conversation = _expand_parts(conversation, num_frames, needs_images)
            return super().apply_chat_template(conversation, *args, **kwargs)
        except (ValueError, TemplateError) as error:
            raise ConversationError(str(error)) from error

    def encode_conversations(
        self, conversations: list, *, padding: bool = False, **processor_kwargs: Any
    ) -> BatchFeature:
        """Encode a conversation, or a batch, for `generate`.

        Short for `apply_chat_template` with a generation prompt, tokenized, as a dict of torch tensors.

        Args:
            conversations: Messages with `role` and `content`, or a list of such conversations.
            padding: Whether to pad the rows of a batch to the longest one, on the left, as generation needs.
            **processor_kwargs: Passed on to the processor, such as `images_kwargs` or `num_frames`.

        Returns:
            `input_ids` and `attention_mask`, `(batch, seq_length)`. With images, also `pixel_values`, `(num_tiles, 3,
            height, width)`.

        Raises:
            ConversationError: As for `apply_chat_template`.

        Example:
        ```python
        >>> inputs = processor.encode_conversations([{"role": "user", "content": "Why?"}])
        >>> output = model.generate(**inputs.to(model.device))
        ```
        """
        padding_kwargs = {"padding": True, "padding_side": "left"} if padding else {}
        return self.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=padding_kwargs | processor_kwargs,
        )

    def guard_control_tokens(self, content: Any) -> Any:
        """Copy text, messages or conversations, with `GUARD` in the control tokens of their text."""
        control_tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        control_tokens |= {self.image_token, self.query_token}
        pattern = re.compile("|".join(re.escape(token) for token in sorted(control_tokens, key=len, reverse=True)))
        return _guarded(content, pattern)

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple:
        """Check the arguments of a call, load the images and flatten them into one list.

        If rows are `None`, as TRL passes them, and there are no images at all, the call returns `pixel_values` of zero
        tiles, which the model accepts.

        Raises:
            TypeError: If an argument is unknown, videos or audio are passed, or a text is not a string.
            ValueError: If the images do not match the placeholders, in total or in a row.
        """
        self._check_names(kwargs)
        for modality in ("videos", "audio"):
            if kwargs.get(modality) is not None:
                raise TypeError(
                    f"FlashSloth reads images and text, but `{modality}` were passed. Remove them; pass a video as a "
                    "part of a message, or pass its frames, from `video_frames`, as images."
                )
        texts = text if isinstance(text, (list, tuple)) else [] if text is None else [text]
        if wrong := [sample for sample in texts if not isinstance(sample, str)]:
            raise TypeError(f"`text` must be a string or a list of strings, one per row, but has {_show(wrong[0])}.")
        has_none_row = isinstance(images, (list, tuple)) and any(row is None for row in images)
        images, text, videos, audio = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        rows = _as_list([] if images is None else images)
        is_nested = any(isinstance(row, (list, tuple)) for row in rows)
        counts = [len(_as_list(row)) for row in rows]
        if text is not None:
            self._check_image_counts(text, counts if is_nested else [sum(counts)])
            self._warn_of_missing_queries(text)
        images = [image for row in rows for image in _as_list(row)]
        return images if images or has_none_row else None, text, videos, audio

    def _check_names(self, arguments: Iterable[str]) -> None:
        """Raise for unknown arguments, which `ProcessorMixin` would ignore."""
        annotations = self.valid_processor_kwargs.__annotations__
        known = {"videos", "audio", "common_kwargs", "tokenizer_init_kwargs", "return_metadata", *annotations}
        for valid in (*annotations.values(), self.image_processor.valid_kwargs):
            known.update(getattr(valid, "__annotations__", {}))
        if unknown := sorted(set(arguments) - known):
            raise TypeError(
                f"FlashSlothProcessor does not know the argument{'s' * (len(unknown) > 1)} {', '.join(unknown)}; it "
                f"takes {', '.join(sorted(self.image_processor.valid_kwargs.__annotations__))} for images, and "
                "the tokenizer's arguments, such as padding, truncation, max_length and return_tensors."
            )

    def _check_image_counts(self, text: Sequence[str], num_images: Sequence[int]) -> None:
        """Compare placeholders and images: row by row if the images were passed in rows, else in total."""
        expected = [sample.count(self.image_token) for sample in text]
        if len(num_images) == len(expected) and list(num_images) == expected:
            return
        if len(num_images) == 1 and sum(num_images) == sum(expected):
            return
        raise ValueError(
            f"The prompts have {expected} `{self.image_token}` placeholders per row, {sum(expected)} in total, but "
            f"{sum(num_images)} images were passed ({list(num_images)}); pass one image for each placeholder, in "
            "order, as one flat list or as one list per row."
        )

    def _warn_of_missing_queries(self, text: Sequence[str]) -> None:
        """Warn about prompts that have images, but no query tokens.

        The captions of training stage 1 have none on purpose; they end with the end token.
        """
        for sample in text:
            is_prompt = sample.replace(self.image_token, "").strip() and not sample.rstrip().endswith(
                self.tokenizer.eos_token or "\0"
            )
            if is_prompt and self.image_token in sample and self.query_token not in sample:
                logger.warning_once(
                    f"A prompt has `{self.image_token}`, but no `{self.query_token}`; without query tokens, answers "
                    f"are worse. Add `{self.query_token}` after every question, as in "
                    f"'USER: {self.image_token}\\nWhat is it?{self.query_token} ASSISTANT:', or use "
                    "`apply_chat_template`."
                )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Image tokens that replace the placeholder of one image."""
        num_tiles = self.image_processor.get_number_of_image_patches(0, 0, kwargs)
        return self.image_token * (num_tiles * self.image_seq_length)

    def get_text_with_replacements(
        self, text: list[str], images_replacements: Iterable[str] = (), *args: Any, **kwargs: Any
    ) -> tuple[list[str], list[list[dict[str, Any]]]]:
        """Expand the placeholders of images and queries.

        Args:
            text: Prompts.
            images_replacements: The output of `replace_image_token` for each image.
            *args: Unused; FlashSloth has no other modality.
            **kwargs: Unused.

        Returns:
            The expanded prompts, and for each a list of its replacements, with `span` in the old text and `new_span` in
            the new one (characters).
        """
        image_texts = iter(images_replacements)
        query_text = self.query_token * self.num_query_tokens
        pattern = re.compile(f"(?P<image>{re.escape(self.image_token)})|(?P<query>{re.escape(self.query_token)})")
        expanded, offsets = [], []
        for sample in text:
            row, pieces, last, growth = [], [], 0, 0
            for match in pattern.finditer(sample):
                replacement = query_text if match.lastgroup == "query" else next(image_texts)
                start, end = match.span()
                row.append(
                    {
                        "type": match.lastgroup,
                        "span": (start, end),
                        "new_span": (start + growth, start + growth + len(replacement)),
                        "text": match.group(),
                        "replacement": replacement,
                    }
                )
                growth += len(replacement) - (end - start)
                pieces += [sample[last:start], replacement]
                last = end
            expanded.append("".join([*pieces, sample[last:]]))
            offsets.append(row)
        return expanded, offsets

    @property
    def unused_input_names(self) -> list[str]:
        """Outputs of some tokenizers that no decoder of FlashSloth takes."""
        return ["token_type_ids"]

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        """Raise if image or query tokens were truncated, and warn if a prompt is too long."""
        rows = text_inputs["input_ids"]
        rows = rows.tolist() if hasattr(rows, "tolist") else rows
        for token, token_id in ((self.image_token, self.image_token_id), (self.query_token, self.query_token_id)):
            for row, (sample, ids) in enumerate(zip(text, rows, strict=False)):
                expected, found = sample.count(token), list(ids).count(token_id)
                if expected != found:
                    raise ValueError(
                        f"Row {row} has {expected} `{token}` tokens, but only {found} after truncation. Raise "
                        "`max_length`, shorten the text, or do not truncate."
                    )
        self._check_length(rows)

    def _check_length(self, rows: Sequence[Sequence[int]]) -> None:
        """Warn about prompts that exceed the model's context length; inside `transformers serve`, raise.

        A local user may know that the model handles more, for example with scaled RoPE. The client of a server would
        get nonsense without a warning, and `transformers serve` has no setting or hook that rejects long prompts.
        """
        longest = max(rows, key=len, default=[])
        num_image_tokens = max((list(ids).count(self.image_token_id) for ids in rows), default=0)
        found = (
            f"prompt has {len(longest)} tokens, of which {num_image_tokens} are image tokens of "
            f"{num_image_tokens // self.image_seq_length} tiles, but the model was made for "
            f"{self.tokenizer.model_max_length}"
        )
        if SERVER_MODULE in sys.modules and len(longest) >= self.tokenizer.model_max_length:
            raise ConversationError(
                f"The {found}, including the answer. Shorten the conversation, start a new one, or send fewer images "
                "or frames."
            )
        if len(longest) > self.tokenizer.model_max_length:
            logger.warning(f"A {found}; answers may be worse. Pass fewer images or frames.")

    def _get_num_multimodal_tokens(self, image_sizes: Sequence | None = None, **kwargs: Any) -> MultiModalData:
        """Number of image tokens and of tiles for images of the given sizes, `(height, width)` in pixels."""
        if image_sizes is None:
            return MultiModalData()
        tiles = [self.image_processor.get_number_of_image_patches(*size, kwargs) for size in image_sizes]
        tokens = [num_tiles * self.image_seq_length for num_tiles in tiles]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=tiles)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Decode the output of `generate`.

        Args:
            generated_outputs: Token ids, `(batch, seq_length)`.
            skip_special_tokens: Whether to drop image, query and end tokens.
            **kwargs: Passed on to the tokenizer's `batch_decode`.

        Returns:
            One text per row, without surrounding white space.
        """
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [text.strip() for text in texts]


_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def _token_id(tokenizer: Any, token: str) -> int:
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise TypeError(
            f"FlashSlothProcessor needs a fast tokenizer, but got {type(tokenizer).__name__}; load one with "
            "`AutoTokenizer.from_pretrained`."
        )
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        raise ValueError(
            f"The tokenizer has no token `{token}`; add it with "
            f"`tokenizer.add_special_tokens({{'additional_special_tokens': ['{token}']}})`."
        )
    return token_id


def _limit_length(tokenizer: Any, num_positions: int | None) -> None:
    """Set `model_max_length` of a tokenizer that has none."""
    if num_positions is not None and tokenizer.model_max_length > LARGE_INTEGER:
        tokenizer.model_max_length = num_positions


def _ignore_guard(tokenizer: Any) -> None:
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is None:
        backend.normalizer = normalizers.Replace(GUARD, "")
    elif GUARD in backend.normalizer.normalize_str(GUARD):
        backend.normalizer = normalizers.Sequence([normalizers.Replace(GUARD, ""), backend.normalizer])


def _serialize_calls(tokenizer: Any) -> None:
    """Make the tokenizer, its copies and its pickles hold `TOKENIZER_LOCK` while they encode or decode.

    The tokenizer's own methods are replaced, because streamers and trainers call `processor.tokenizer` directly.
    """
    for name in ("_encode_plus", "_decode"):
        if name not in vars(tokenizer):
            setattr(tokenizer, name, partial(_call_locked, getattr(tokenizer, name)))


def _call_locked(method: Callable, *args: Any, **kwargs: Any) -> Any:
    with TOKENIZER_LOCK:
        return method(*args, **kwargs)


def _read_conversations(node: Any) -> list:
    """Check a conversation, or a batch, and convert it to the form that every version of transformers reads.

    Args:
        node: A list of messages, a list of such lists, or an object that has `messages`.

    Returns:
        A list of messages, or a list of such lists. Each message has a `role` and `content`: text, or parts
        `{"type": "text", "text": str}`, `{"type": "image", "image": ...}`, `{"type": "video", "video": ...}` or
        `{"type": "image"}`.

    Raises:
        ConversationError: If something is missing, unknown, or of the wrong type.
    """
    node = getattr(node, "messages", node)
    if not isinstance(node, (list, tuple)) or not node:
        raise ConversationError(
            f"A conversation should be a list with at least one message, but is {_show(node)}; pass messages such as "
            "[{'role': 'user', 'content': 'What is it?'}], or a list of conversations."
        )
    if isinstance(node[0], (list, tuple)) or hasattr(node[0], "messages"):
        return [
            _read_messages(getattr(messages, "messages", messages), f" of conversation {index}")
            for index, messages in enumerate(node)
        ]
    return _read_messages(node, "")


def _read_messages(messages: Any, place: str) -> list[dict]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConversationError(
            f"The messages{place} should be a list with at least one message, but are {_show(messages)}."
        )
    return [_read_message(message, f"Message {index}{place}") for index, message in enumerate(messages)]


def _read_message(message: Any, name: str) -> dict[str, Any]:
    message = _as_dict(message)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ConversationError(
            f"{name} should be a dict with a `role` ('user', 'assistant' or 'system') and `content`, but is "
            f"{_show(message)}."
        )
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = [_read_part(part, f"Part {i} of {name.lower()}", message["role"]) for i, part in enumerate(content)]
    elif not isinstance(content, str):
        raise ConversationError(
            f"The `content` of {name.lower()} should be text or a list of parts, but is {_show(content)}; pass a "
            "string, or remove the message."
        )
    if message["role"] == "user" and content == []:
        raise ConversationError(f"{name}, of the user, has neither text nor an image; add one of them.")
    return message | {"content": content}


def _read_part(part: Any, name: str, role: str) -> dict[str, Any]:
    part = _as_dict(part)
    found = part.get("type") if isinstance(part, dict) else None
    kind = PART_TYPES.get(found) if isinstance(found, str) else None
    if kind is None:
        shown = _show(part) if found is None else f"of type {found!r}"
        raise ConversationError(
            f"{name} should be a dict with the `type` 'text', 'image' or 'video' (also {', '.join(PART_TYPES)}), such "
            f"as {{'type': 'text', 'text': '...'}}, but is {shown}."
        )
    part = {key: value for key, value in part.items() if not is_absent(value)}
    sources = {key: part.pop(key) for keys in SOURCE_KEYS.values() for key in keys if key in part}
    if kind == "text":
        return _read_text_part(part, sources, name)
    if role != "user":
        raise ConversationError(
            f"{name} is of type {found!r} in a message of role {role!r}, but FlashSloth reads images and videos only "
            "in user messages; move it there."
        )
    return _read_source_part(kind, part, sources, name)


def _read_text_part(part: dict[str, Any], sources: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(part.get("text"), str):
        raise ConversationError(f"{name} should have a string as `text`, but has {_show(part.get('text'))}.")
    if extra := [key for key, value in sources.items() if not (isinstance(value, str) and value == "")]:
        raise ConversationError(
            f"{name} is of type 'text', but also has {', '.join(extra)}, which would be dropped; pass it in a separate "
            "part of type 'image' or 'video'."
        )
    return part | {"type": "text"}


def _read_source_part(kind: str, part: dict[str, Any], sources: dict[str, Any], name: str) -> dict[str, Any]:
    if part.pop("text", ""):
        raise ConversationError(
            f"{name} is of type {kind!r}, but also has `text`, which would be dropped; pass it in a separate part of "
            "type 'text'."
        )
    values = [value for key, value in sources.items() if key in SOURCE_KEYS[kind]]
    if len(sources) > 1 or len(values) < len(sources) or (kind == "video" and not values):
        raise ConversationError(
            f"{name}, of type {kind!r}, should have one of {', '.join(SOURCE_KEYS[kind])}, but has "
            f"{', '.join(sources) or 'none'}."
        )
    if not values:
        return part | {"type": kind}
    source = values[0]
    if isinstance(source, dict) and source.get("url") is not None:  # OpenAI's form
        source = source["url"]
    if kind == "image" and not _is_image_source(source):
        raise ConversationError(
            f"{name}, of type 'image', should have a PIL image, an array, a path, a URL or a base64 string, but has "
            f"{_show(source)}."
        )
    return part | {"type": kind, kind: source}


def _is_image_source(source: Any) -> bool:
    is_encoded = isinstance(source, dict) and isinstance(source.get("bytes"), bytes)
    return is_encoded or isinstance(source, (str, os.PathLike)) or is_valid_image(source)


def _as_dict(item: Any) -> Any:
    """Convert pydantic models and dataclasses to dicts; return anything else unchanged."""
    if callable(getattr(item, "model_dump", None)):
        return item.model_dump()
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    return item


def is_absent(value: Any) -> bool:
    """Whether a value is `None` or a dict with only `None` values, which Arrow fills in for missing keys."""
    return value is None or (isinstance(value, dict) and all(entry is None for entry in value.values()))


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _guarded(node: Any, pattern: re.Pattern) -> Any:
    """Copy text, conversations, messages or parts, with `GUARD` after the first character of each control token."""
    if isinstance(node, str):
        return pattern.sub(lambda match: match.group()[0] + GUARD + match.group()[1:], node)
    if isinstance(node, (list, tuple)):
        return [_guarded(item, pattern) for item in node]
    if isinstance(node, dict):
        return {key: _guarded(value, pattern) if key in ("content", "text") else value for key, value in node.items()}
    return node


def _take_num_frames(kwargs: dict[str, Any]) -> int:
    """Remove `num_frames` from the arguments of `apply_chat_template` and its `processor_kwargs`, and return it.

    Raises:
        TypeError: If there is `fps`.
    """
    kwargs["processor_kwargs"] = dict(kwargs.get("processor_kwargs") or {})
    num_frames = DEFAULT_NUM_FRAMES
    for place in (kwargs["processor_kwargs"], kwargs):
        if place.pop("fps", None) is not None:
            raise TypeError("FlashSloth reads a fixed number of frames from every video; pass `num_frames`, not `fps`.")
        given = place.pop("num_frames", None)
        num_frames = num_frames if given is None else given
    return num_frames


def _expand_parts(node: Any, num_frames: int, needs_images: bool) -> Any:
    """Copy conversations or messages, with videos replaced by their frames.

    Raises:
        ConversationError: If a part has no image, but `needs_images`, or a video is not of a supported type.
    """
    if isinstance(node, list):
        return [_expand_parts(item, num_frames, needs_images) for item in node]
    if isinstance(node["content"], str):
        return node
    parts = [expanded for part in node["content"] for expanded in _expand_part(part, num_frames)]
    for part in parts:
        if needs_images and part["type"] == "image" and "image" not in part:
            raise ConversationError(
                f"A part of type 'image' should have one of {', '.join(SOURCE_KEYS['image'])}, but has "
                f"{', '.join(sorted(set(part) - {'type'})) or 'none'}."
            )
    return node | {"content": parts}


def _expand_part(part: dict[str, Any], num_frames: int) -> list[dict[str, Any]]:
    if part["type"] != "video":
        return [part]
    try:
        return [{"type": "image", "image": frame} for frame in video_frames(part["video"], num_frames)]
    except TypeError as error:
        raise ConversationError(str(error)) from error


def _as_list(images: Any) -> list:
    """List of the images in a list or a batched array; a single image becomes a list of one."""
    is_batch = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
    return list(images) if is_batch else [images]


__all__ = ["FlashSlothProcessor"]
