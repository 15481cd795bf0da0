r"""Turns images and conversations into what FlashSloth reads, and its answers back into text.

The original prompt format, with the placeholders that the processor expands:

    SYSTEM USER: <image>\nQUESTION<learnable> ASSISTANT: ANSWER</s>USER: QUESTION 2<learnable> ASSISTANT:

`<image>` stands for all image tokens of one image, `<learnable>` for the query tokens of one question.
"""

import dataclasses
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from jinja2 import TemplateError
from tokenizers import normalizers
from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils import logging

from .configuration_flashsloth import FlashSlothConfig, is_original_config, splits_images
from .image_processing_flashsloth import FlashSlothImageProcessor
from .video_processing_flashsloth import DEFAULT_NUM_FRAMES, video_frames

try:
    from starlette.exceptions import HTTPException  # `transformers serve` needs it
except ImportError:
    HTTPException = Exception

logger = logging.get_logger(__name__)

SERVER_MODULE = "transformers.cli.serving.server"
"""What is imported in a process of `transformers serve`, and in no other."""

DEFAULT_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

GUARD = "\ufdd0"
"""A Unicode noncharacter, reserved for a program's internal use. Inside `<image>` it keeps the text from being matched
as a token; the tokenizer's normaliser, which runs after that matching, takes it out again."""

TOKENIZER_LOCK = threading.RLock()
"""Held while a tokenizer works. A fast one keeps padding and truncation as a state: threads that want different ones
at once get each other's, or `RuntimeError: Already borrowed`."""
if hasattr(os, "register_at_fork"):  # a process must not be born with a lock that nobody will release
    os.register_at_fork(
        before=TOKENIZER_LOCK.acquire, after_in_parent=TOKENIZER_LOCK.release, after_in_child=TOKENIZER_LOCK.release
    )

PART_TYPES = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("video", "video_url"), "video"),
}
"""Types of the parts of a message, as transformers and OpenAI spell them, and as the chat template knows them."""
SOURCE_KEYS = {
    "image": ("image", "url", "path", "base64", "image_url"),
    "video": ("video", "url", "path", "video_url"),
}
"""Where a part may have its image or video."""


class ChatFormat(NamedTuple):
    """The literal pieces of a chat format; the defaults are the original's.

    Attributes:
        start: What every conversation begins with.
        lead: What stands before the first turn of a conversation without system message.
        system_prefix: What stands before the text of a system message; `None`: the format has no system messages.
        system_suffix: What stands behind it.
        is_system_in_turn: Whether `system_prefix` has already begun the first user's turn.
        user_prefix: What stands before a user's images and text.
        user_suffix: What stands behind the query tokens.
        generation_prompt: What stands before an answer and is not the model's to write.
        answer_prefix: What the model writes before the text of an answer, such as a blank.
        answer_end: What the model writes behind it; `None`: the tokenizer's `eos_token`.
        answer_suffix: What stands behind that.
        joint: What stands between that and another turn.
        closing: What ends a conversation that is not to be answered.
        trimmed_roles: Roles whose text loses surrounding white space.
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
        """Chat template of this format.

        Images of a message stand before its text, whatever their place in the message, for a question reads the
        images that stand before it. Answers, with their end token, are inside `{% generation %}`. In a conversation
        that goes on, answers may begin with `answer_prefix`, as the model wrote them; they do not get it twice.

        Returns:
            A Jinja template that writes the placeholders `<image>` and `<learnable>`.
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
                {{- raise_exception('FlashSloth reads parts of type text, with a string as text, and of type '
                    'image in messages of the user, but a message of ' ~ message['role'] ~ ' has a part of type ' ~
                    part['type'] ~ '.') -}}
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
        {{- raise_exception('FlashSloth knows the roles user and assistant, and system for the first message if the '
            'chat format has one, but found ' ~ message['role'] ~ '.') -}}
    {%- endif -%}
{%- endfor -%}
{{- @generation_prompt@ if add_generation_prompt else @closing@ -}}
""".strip()
"""A chat template with `@piece@` where a piece of the format goes, as Jinja literal or expression."""


def build_chat_template(system_prompt: str = DEFAULT_SYSTEM_PROMPT) -> str:
    """Chat template of the original prompt format.

    Args:
        system_prompt: What stands before the first turn if the conversation brings no system message; may be empty.

    Returns:
        A Jinja template that writes the placeholders `<image>` and `<learnable>`, and the tokenizer's `eos_token`.
    """
    return ChatFormat(lead=system_prompt + " " if system_prompt else "").build_template()


class ConversationError(ValueError, HTTPException):
    """A conversation cannot be rendered: an image is broken, a role or a part's type unknown, a text missing.

    `transformers serve` answers an HTTPException with its status and text, and any other error with a bare 500.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.status_code, self.detail, self.headers = 400, message, None

    def __str__(self) -> str:
        return self.detail


class FlashSlothProcessor(ProcessorMixin):
    """Image processor, tokenizer and prompt format of FlashSloth in one.

    Text in the messages of a conversation can never become an image token, a query token or an end of turn: the
    tokenizer that the processor is given is set to ignore `GUARD`, which keeps such text apart.

    Args:
        image_processor: Makes tiles of images.
        tokenizer: A fast tokenizer that knows `image_token` and `query_token`.
        chat_template: Jinja template; default: the original prompt format.
        image_token: Placeholder of an image.
        query_token: Placeholder of the query tokens of a question.
        image_seq_length: Image tokens of one tile; the model's `config.image_seq_length`.
        num_query_tokens: Query tokens of one question; the model's `config.num_query_tokens`.

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
        """Load a processor, also for a folder or Hub id in the layout of the original releases.

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
        """Build the processor of an original release, which has tokenizer files only.

        Args:
            source: Folder or Hub id of the release.
            original_config: Its `config.json`.
            config: Its config in this package's form, if it is at hand. Default: read from `source`.
            **kwargs: Passed on to `AutoTokenizer.from_pretrained`.
        """
        config = config or FlashSlothConfig.from_pretrained(source, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, **kwargs)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<learnable>", "<image>"]})
        tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side = "left"
        tokenizer.eos_token, tokenizer.pad_token = "</s>", "<|endoftext|>"
        # The releases' own value; transformers does not do it for a tokenizer of bytes, but warns at every answer.
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

        Control tokens in the messages' text are kept apart with `GUARD`, so that they stay text. An image stands in a
        part `{"type": "image", "image": ...}`, or with `url`, `path`, `base64` or `image_url`, and in messages of the
        user only. Without any of these it is a placeholder, for images that are given apart. A video, in a part
        `{"type": "video", "path": ...}`, or with `url` or `video`, becomes as many images as `video_frames` makes.
        Keys that are `None` count as absent, as `datasets` fills them; other spellings are in `PART_TYPES`.

        Args:
            conversation: Messages with `role` and `content`, or a list of such conversations.
            *args: As for `ProcessorMixin.apply_chat_template`.
            **kwargs: As for `ProcessorMixin.apply_chat_template`; `num_frames` (default: 8) of every video among them.

        Raises:
            ConversationError: If an image, a video or the conversation cannot be read, or a part of it would be left
                out: its type is unknown, it has no text or image, its role has no images. It is a ValueError.
            TypeError: If `fps` is given.
            ImportError: If it takes PyAV to read a video, and that is not installed.
            NotImplementedError: If a mask of the answers is asked for and transformers is too old to place it.
        """
        if kwargs.get("return_assistant_tokens_mask") and not hasattr(
            ProcessorMixin, "_adjust_assistant_masks_indices"
        ):
            raise NotImplementedError(
                "`return_assistant_tokens_mask` needs transformers 5.18 or newer: older ones misplace the mask when "
                "placeholders are expanded. Update transformers, or build labels from the ids."
            )
        num_frames = _take_num_frames(kwargs)
        try:
            conversation = _read_conversations(conversation)
            if kwargs.get("tokenize") and "images" not in kwargs["processor_kwargs"] | kwargs:
                _check_sources(conversation)
            conversation = _with_frames(self.guard_control_tokens(conversation), num_frames)
            return super().apply_chat_template(conversation, *args, **kwargs)
        except (ValueError, TemplateError) as error:
            raise ConversationError(str(error)) from error

    def guard_control_tokens(self, content: Any) -> Any:
        """Copy text, messages or conversations, with the control tokens in their text kept apart with `GUARD`."""
        control_tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        control_tokens |= {self.image_token, self.query_token}
        pattern = re.compile("|".join(re.escape(token) for token in sorted(control_tokens, key=len, reverse=True)))
        return _guarded_text(content, pattern)

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple:
        """Load the images, and make one flat list of them.

        Rows that are `None` (TRL has them) tell that images are wanted even if there are none: `pixel_values` of no
        tiles, which the model takes.

        Raises:
            TypeError: If videos or audio are given, or a text is no string.
            ValueError: If the images are more or fewer than the placeholders, in all or in a row.
        """
        for modality in ("videos", "audio"):
            if kwargs.get(modality) is not None:
                raise TypeError(
                    f"FlashSloth reads images and text, but `{modality}` were passed. Leave them out, or give a "
                    "video as a part of a message, or as the images that `video_frames` makes of it."
                )
        texts = text if isinstance(text, (list, tuple)) else [] if text is None else [text]
        if wrong := [sample for sample in texts if not isinstance(sample, str)]:
            raise TypeError(
                f"`text` must be a string or a list of strings, one for each row, but has {_show(wrong[0])}."
            )
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

    def _check_image_counts(self, text: Sequence[str], num_images: Sequence[int]) -> None:
        """Compare placeholders and images: row by row if the images came in rows, else in total."""
        expected = [sample.count(self.image_token) for sample in text]
        if len(num_images) == len(expected) and list(num_images) == expected:
            return
        if len(num_images) == 1 and sum(num_images) == sum(expected):
            return
        raise ValueError(
            f"The prompts have {expected} `{self.image_token}` placeholders a row, {sum(expected)} in all, but "
            f"{sum(num_images)} images were passed ({list(num_images)}); pass one image for each placeholder, in "
            "order, as one flat list or as one list for each row."
        )

    def _warn_of_missing_queries(self, text: Sequence[str]) -> None:
        """Say what to add to prompts that are to be answered and have images, but no query tokens.

        Captions of the first stage of training have none on purpose; they end with the token that ends an answer.
        """
        for sample in text:
            is_prompt = sample.replace(self.image_token, "").strip() and not sample.rstrip().endswith(
                self.tokenizer.eos_token or "\0"
            )
            if is_prompt and self.image_token in sample and self.query_token not in sample:
                logger.warning_once(
                    f"A prompt has `{self.image_token}`, but no `{self.query_token}`: it is answered without query "
                    f"tokens, and worse. Add `{self.query_token}` after every question, as in "
                    f"'USER: {self.image_token}\\nWhat is it?{self.query_token} ASSISTANT:', or let "
                    "`apply_chat_template` write the prompt."
                )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Image tokens of one image, as text."""
        num_tiles = self.image_processor.get_number_of_image_patches(0, 0, kwargs)
        return self.image_token * (num_tiles * self.image_seq_length)

    def get_text_with_replacements(
        self, text: list[str], images_replacements: Iterable[str] = (), *args: Any, **kwargs: Any
    ) -> tuple[list[str], list[list[dict[str, Any]]]]:
        """Expand the placeholders of images and queries.

        Args:
            text: Prompts.
            images_replacements: What `replace_image_token` gave, image by image.
            *args: Unused: FlashSloth has no other modality.
            **kwargs: Unused.

        Returns:
            The expanded prompts, and for each the list of replacements, with `span` in the old and `new_span` in the
            new text (characters).
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
        """What some tokenizers return, and no decoder of FlashSloth takes."""
        return ["token_type_ids"]

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        """Refuse prompts that were truncated through image or query tokens, and warn of those that are too long."""
        rows = text_inputs["input_ids"]
        rows = rows.tolist() if hasattr(rows, "tolist") else rows
        for token, token_id in ((self.image_token, self.image_token_id), (self.query_token, self.query_token_id)):
            for row, (sample, ids) in enumerate(zip(text, rows, strict=False)):
                expected, found = sample.count(token), list(ids).count(token_id)
                if expected != found:
                    raise ValueError(
                        f"Row {row} has {expected} `{token}` tokens, but {found} are left after tokenization: the "
                        "prompt was truncated through them. Raise `max_length`, shorten the text, or do not truncate."
                    )
        self._check_length(rows)

    def _check_length(self, rows: Sequence[Sequence[int]]) -> None:
        """Warn of prompts that are longer than the model was made for, or refuse them.

        Whoever has the model at hand may know that it reads more. A stranger at a server does not, and would get
        nonsense.
        """
        longest = max(rows, key=len, default=[])
        num_image_tokens = max((list(ids).count(self.image_token_id) for ids in rows), default=0)
        what = (
            f"prompt has {len(longest)} tokens, {num_image_tokens} of them for "
            f"{num_image_tokens // self.image_seq_length} tiles of images, but the model was made for "
            f"{self.tokenizer.model_max_length}"
        )
        if SERVER_MODULE in sys.modules and len(longest) >= self.tokenizer.model_max_length:
            raise ConversationError(
                f"The {what}, with the answer. Shorten the conversation, begin a new one, or give fewer images or "
                "frames."
            )
        if len(longest) > self.tokenizer.model_max_length:
            logger.warning(f"A {what}; expect worse answers, or give fewer images or frames.")

    def _merge_kwargs(self, *args: Any, **kwargs: Any) -> dict[str, dict]:
        """Sort the arguments of a call by modality; unknown ones are refused instead of ignored."""
        annotations = self.valid_processor_kwargs.__annotations__
        known = {"common_kwargs", "tokenizer_init_kwargs", "ModelProcessorKwargs", "return_metadata", *annotations}
        for valid in (*annotations.values(), self.image_processor.valid_kwargs):
            known.update(getattr(valid, "__annotations__", {}))
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise TypeError(
                f"FlashSlothProcessor does not know the argument{'s' * (len(unknown) > 1)} {', '.join(unknown)}; it "
                f"takes {', '.join(sorted(self.image_processor.valid_kwargs.__annotations__))} for images, and "
                "the tokenizer's arguments, such as padding, truncation, max_length and return_tensors."
            )
        return super()._merge_kwargs(*args, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes: Sequence | None = None, **kwargs: Any) -> MultiModalData:
        """Number of image tokens and tiles of images of given sizes, `(height, width)` in pixels."""
        if image_sizes is None:
            return MultiModalData()
        tiles = [self.image_processor.get_number_of_image_patches(*size, kwargs) for size in image_sizes]
        tokens = [num_tiles * self.image_seq_length for num_tiles in tiles]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=tiles)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Decode what `generate` returned.

        Args:
            generated_outputs: Ids, `(batch, seq_length)`.
            skip_special_tokens: Whether to leave image, query and end tokens out.
            **kwargs: Passed on to the tokenizer's `batch_decode`.

        Returns:
            One text for each row, without surrounding blanks.
        """
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [text.strip() for text in texts]


_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def _token_id(tokenizer: Any, token: str) -> int:
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise TypeError(
            f"FlashSlothProcessor needs a fast tokenizer, but got {type(tokenizer).__name__}; load it with "
            "`AutoTokenizer.from_pretrained`."
        )
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        raise ValueError(
            f"The tokenizer does not know `{token}`; add it with "
            f"`tokenizer.add_special_tokens({{'additional_special_tokens': ['{token}']}})`."
        )
    return token_id


def _limit_length(tokenizer: Any, num_positions: int | None) -> None:
    """Tell a tokenizer that knows no longest text how many positions its model has."""
    if num_positions is not None and tokenizer.model_max_length > LARGE_INTEGER:
        tokenizer.model_max_length = num_positions


def _ignore_guard(tokenizer: Any) -> None:
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is None:
        backend.normalizer = normalizers.Replace(GUARD, "")
    elif GUARD in backend.normalizer.normalize_str(GUARD):
        backend.normalizer = normalizers.Sequence([normalizers.Replace(GUARD, ""), backend.normalizer])


def _serialize_calls(tokenizer: Any) -> None:
    """Let one thread at a time encode or decode, whoever calls; copies and pickles of the tokenizer do so, too."""
    for name in ("_encode_plus", "_decode"):
        if name not in vars(tokenizer):
            setattr(tokenizer, name, partial(_call_alone, getattr(tokenizer, name)))


def _call_alone(method: Callable, *args: Any, **kwargs: Any) -> Any:
    with TOKENIZER_LOCK:
        return method(*args, **kwargs)


def _read_conversations(node: Any) -> list:
    """Check a conversation, or a batch, and bring it into the form that every version of transformers reads.

    Args:
        node: Messages, a list of such, or an object that has `messages`.

    Returns:
        Messages, or a list of such, with `role` and, as `content`, text or parts `{"type": "text", "text": str}`,
        `{"type": "image", "image": ...}`, `{"type": "video", "video": ...}` or `{"type": "image"}`.

    Raises:
        ConversationError: If something is missing, unknown, or no message or part at all.
    """
    node = getattr(node, "messages", node)
    if not isinstance(node, (list, tuple)) or not node:
        raise ConversationError(
            f"A conversation should be a list with at least one message, but is {_show(node)}; pass messages such as "
            "[{'role': 'user', 'content': 'What is it?'}], or a list of such lists."
        )
    if isinstance(node[0], (list, tuple)) or hasattr(node[0], "messages"):
        return [
            _read_messages(getattr(messages, "messages", messages), f" of conversation {index}")
            for index, messages in enumerate(node)
        ]
    return _read_messages(node, "")


def _read_messages(messages: Any, place: str) -> list[dict]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConversationError(f"The messages{place} should be a list with at least one, but are {_show(messages)}.")
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
            f"The `content` of {name.lower()} should be text or a list of parts, but is {_show(content)}; give a "
            "string, or leave the message out."
        )
    if message["role"] == "user" and content == []:
        raise ConversationError(f"{name}, of the user, has neither text nor an image; give one of them.")
    return message | {"content": content}


def _read_part(part: Any, name: str, role: str) -> dict[str, Any]:
    part = _as_dict(part)
    found = part.get("type") if isinstance(part, dict) else None
    kind = PART_TYPES.get(found) if isinstance(found, str) else None
    if kind is None:
        what = _show(part) if found is None else f"of type {found!r}"
        raise ConversationError(
            f"{name} should be a dict with the `type` 'text', 'image' or 'video' (also {', '.join(PART_TYPES)}), such "
            f"as {{'type': 'text', 'text': '...'}}, but is {what}."
        )
    part = {key: value for key, value in part.items() if not is_absent(value)}
    sources = {key: part.pop(key) for keys in SOURCE_KEYS.values() for key in keys if key in part}
    if kind == "text":
        return _read_text_part(part, sources, name)
    if role != "user":
        raise ConversationError(
            f"{name}, of the role {role!r}, is of type {found!r}, but FlashSloth reads images and videos in messages "
            "of the user only; move it there."
        )
    return _read_source_part(kind, part, sources, name)


def _read_text_part(part: dict[str, Any], sources: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(part.get("text"), str):
        raise ConversationError(f"{name} should have a string as `text`, but has {_show(part.get('text'))}.")
    if extra := [key for key, value in sources.items() if not (isinstance(value, str) and value == "")]:
        raise ConversationError(
            f"{name} is of type 'text', but also has {', '.join(extra)}, which would be left out; give it in a part of "
            "its own, of type 'image' or 'video'."
        )
    return part | {"type": "text"}


def _read_source_part(kind: str, part: dict[str, Any], sources: dict[str, Any], name: str) -> dict[str, Any]:
    if part.pop("text", ""):
        raise ConversationError(
            f"{name} is of type {kind!r}, but also has `text`, which would be left out; give it in a part of its own, "
            "of type 'text'."
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
    if isinstance(source, dict) and source.get("url") is not None:  # OpenAI's
        source = source["url"]
    return part | {"type": kind, kind: source}


def _check_sources(node: Any) -> None:
    """Refuse placeholders of images where no images are given apart."""
    if isinstance(node, list):
        for item in node:
            _check_sources(item)
    elif isinstance(node.get("content"), list):
        for part in node["content"]:
            if part["type"] == "image" and "image" not in part:
                raise ConversationError(
                    f"A part of type 'image' should have one of {', '.join(SOURCE_KEYS['image'])}, but has "
                    f"{', '.join(sorted(set(part) - {'type'})) or 'none'}."
                )


def _as_dict(item: Any) -> Any:
    """A message or part as a dict, if it is one of pydantic's or a dataclass; else what it was."""
    if callable(getattr(item, "model_dump", None)):
        return item.model_dump()
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    return item


def is_absent(value: Any) -> bool:
    """Whether a value is `None`, or a dict of nothing else: what Arrow writes where a row has no such key."""
    return value is None or (isinstance(value, dict) and all(entry is None for entry in value.values()))


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _guarded(node: Any, pattern: re.Pattern) -> Any:
    """Copy conversations, messages or parts, with the control tokens in their text kept apart."""
    if isinstance(node, (list, tuple)):
        return [_guarded(item, pattern) for item in node]
    if hasattr(node, "messages"):
        return _guarded(node.messages, pattern)
    if isinstance(node, dict):
        return {
            name: _guarded_text(value, pattern) if name in ("content", "text") else value
            for name, value in node.items()
        }
    return node


def _guarded_text(value: Any, pattern: re.Pattern) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda match: match.group()[0] + GUARD + match.group()[1:], value)
    return _guarded(value, pattern)


def _take_num_frames(kwargs: dict[str, Any]) -> int:
    """Take `num_frames` out of the arguments of `apply_chat_template`, where transformers has two places for it."""
    kwargs["processor_kwargs"] = dict(kwargs.get("processor_kwargs") or {})
    num_frames = DEFAULT_NUM_FRAMES
    for place in (kwargs["processor_kwargs"], kwargs):
        if place.pop("fps", None) is not None:
            raise TypeError("FlashSloth takes a number of frames from a video, whatever its length; pass `num_frames`.")
        given = place.pop("num_frames", None)
        num_frames = num_frames if given is None else given
    return num_frames


def _with_frames(node: Any, num_frames: int) -> Any:
    """Copy conversations or messages, with the frames of their videos as images."""
    if isinstance(node, list):
        return [_with_frames(item, num_frames) for item in node]
    if isinstance(node, dict) and isinstance(node.get("content"), list):
        return node | {"content": [part for parts in node["content"] for part in _frame_parts(parts, num_frames)]}
    return node


def _frame_parts(part: dict[str, Any], num_frames: int) -> list[dict[str, Any]]:
    if part["type"] != "video":
        return [part]
    return [{"type": "image", "image": frame} for frame in video_frames(part["video"], num_frames)]


def _as_list(images: Any) -> list:
    """Images of a list or of a batched array; one image as a list of one."""
    is_batch = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
    return list(images) if is_batch else [images]


__all__ = ["FlashSlothProcessor"]
