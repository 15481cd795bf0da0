"""Data collator: turns rows of `load_rows` into batches with labels."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import BatchFeature
from transformers.utils.chat_template_utils import render_jinja_template

from ..processing_flashsloth import FlashSlothProcessor
from .data import is_url, normalize_row, text_of

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of tokens that are not trained on; PyTorch's cross-entropy ignores it."""
MODEL_COLUMNS = {"input_ids", "attention_mask", "position_ids", "pixel_values", "labels", "label", "label_ids"}
"""Columns that `Trainer` keeps with `remove_unused_columns=True`."""


class BadRowError(ValueError):
    """A row cannot be used for training; the message has the row's index and the reason."""


class Sample(NamedTuple):
    """One row, ready to be padded.

    Attributes:
        input_ids: `(seq_length,)`.
        labels: `(seq_length,)`, -100 except for answers and their end tokens.
        pixel_values: `(num_tiles, 3, height, width)`, or `None` without images.
        whole_length: Tokens of the row before truncation to `max_length`.
        num_images: Images of the row before truncation.
    """

    input_ids: list[int]
    labels: list[int]
    pixel_values: torch.Tensor | None
    whole_length: int
    num_images: int


class FlashSlothDataCollator:
    """Builds batches with labels for the answer and the end token of every turn.

    The chat template puts answers inside `{% generation %}`; a token that spans the start of an answer is also
    trained on. Control tokens in the text of a row stay text, as everywhere in `FlashSlothProcessor`.

    A row longer than `max_length` is truncated after the end token of the last answer that fits; later turns are
    dropped with their images. If not even the first answer fits, it is truncated and has no end token. So image and
    query tokens are never truncated, and every question keeps its answer. A row whose images and first question leave
    no room for an answer cannot be used.

    Args:
        processor: Processor of the model.
        max_length: Maximum number of tokens in a row, including image and query tokens. `None`: no limit.
        pad_to_multiple_of: Pad rows to a multiple of this many tokens. `None`: to the longest row.
        padding_free: Concatenate all rows of a batch into one, without padding, with `position_ids` that restart at
            each row; the model keeps the rows separate.
        on_bad_row: What to do with a row that cannot be used (missing file, broken image, no answer): `"raise"` a
            `BadRowError`, or `"skip"` it with a warning. A batch in which no row is left becomes two end tokens,
            `</s></s>`, of which the second is a label. No prompt ends like that, so this does no harm, while a batch
            without labels would give a loss of 0/0 and ruin the weights.

    Raises:
        ValueError: If the chat template does not mark answers, or an argument is out of range.

    Example:
    ```python
    >>> rows = load_rows("conversations.json", image_folder="images")
    >>> batch = FlashSlothDataCollator(processor, max_length=1024)([rows[0], rows[1]])
    ```
    """

    def __init__(
        self,
        processor: FlashSlothProcessor,
        *,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_free: bool = False,
        on_bad_row: Literal["raise", "skip"] = "raise",
    ) -> None:
        if on_bad_row not in ("raise", "skip"):
            raise ValueError(f'`on_bad_row` must be "raise" or "skip", but is {on_bad_row!r}.')
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` must be at least 1 token, but is {max_length}; omit it for no limit.")
        if not re.search(r"\{%-?\s*generation\s*-?%\}", processor.chat_template or ""):
            raise ValueError(
                "The processor's chat template does not mark answers, so there are no labels; put the assistant's text "
                "and its end token inside `{% generation %}` and `{% endgeneration %}`."
            )
        if padding_free and pad_to_multiple_of is not None:
            raise ValueError("`pad_to_multiple_of` and `padding_free` cannot be combined; omit one of them.")
        self.processor = processor
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.padding_free = padding_free
        self.on_bad_row = on_bad_row

    def __call__(self, rows: Sequence[dict[str, Any]]) -> BatchFeature:
        """Build a batch.

        Args:
            rows: Rows of `load_rows`, or in any form that `normalize_row` reads.

        Returns:
            `input_ids`, `attention_mask` and `labels`, `(batch, seq_length)`, padded on the right. With `padding_free`,
            `input_ids`, `position_ids` and `labels`, `(1, total_length)`. If there are images, also `pixel_values`,
            `(num_tiles, 3, height, width)`.

        Raises:
            BadRowError: If a row cannot be used and `on_bad_row="raise"`.
            ValueError: If the columns of the rows have been removed.
        """
        if rows and all(isinstance(row, dict) and row.keys() <= MODEL_COLUMNS for row in rows):
            raise ValueError(
                "The rows lack the columns that the collator reads: `Trainer` removes columns that the model does not "
                "take. Pass `remove_unused_columns=False` to `TrainingArguments`, or use `FlashSlothTrainer`."
            )
        samples = [sample for position, row in enumerate(rows) if (sample := self._try_to_prepare(row, position))]
        if not samples:
            end = self.processor.tokenizer.eos_token_id
            samples = [Sample([end, end], [IGNORED, end], None, 2, 0)]
        data = self._flatten(samples) if self.padding_free else self._pad(samples)
        pixel_values = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
        return BatchFeature(data | ({"pixel_values": torch.cat(pixel_values)} if pixel_values else {}))

    def _pad(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        batch = self.processor.tokenizer.pad(
            {"input_ids": [sample.input_ids for sample in samples]},
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors="pt",
        )
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, sample in enumerate(samples):
            labels[row, : len(sample.labels)] = torch.tensor(sample.labels)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    @staticmethod
    def _flatten(samples: list[Sample]) -> dict[str, torch.Tensor]:
        columns = {
            "input_ids": [token for sample in samples for token in sample.input_ids],
            "position_ids": [position for sample in samples for position in range(len(sample.input_ids))],
            "labels": [label for sample in samples for label in (IGNORED, *sample.labels[1:])],
        }
        return {name: torch.tensor([values]) for name, values in columns.items()}

    def prepare(self, row: dict[str, Any]) -> Sample:
        """Tokenize a row, load its images and label its answers.

        Raises:
            Exception: Of any type, if the row, its images or its text cannot be used.
        """
        row = normalize_row(row)
        text, answers = self._render_caption(row) if "caption" in row else self._render_messages(row["messages"])
        tokenizer = self.processor.tokenizer
        images = [_check_exists(image) for image in _images(row)]
        encoded = self.processor(
            text=text,
            images=images or None,
            add_special_tokens=not (tokenizer.bos_token and text.startswith(tokenizer.bos_token)),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        answers = _shift(answers, encoded["text_replacement_offsets"][0])
        runs = _token_runs(answers, encoded["offset_mapping"][0])
        if not runs:
            raise ValueError("the chat template drops the answers, so there are no labels")
        return self._make_sample(encoded["input_ids"][0], runs, encoded.get("pixel_values"), len(images))

    def _try_to_prepare(self, row: dict[str, Any], position: int) -> Sample | None:
        try:
            return self.prepare(row)
        except Exception as error:
            name = f"Row {row['index']}" if "index" in row else f"A row without an index ({position} in its batch)"
            report = f"{name} cannot be used: {str(error).rstrip('.')}."
            if self.on_bad_row == "raise":
                raise BadRowError(f'{report} Fix or remove it, or pass on_bad_row="skip".') from error
            logger.warning("%s It is skipped.", report)
            return None

    def _render_messages(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """Prompt with placeholders, and the spans of the answers and their end tokens in it (characters)."""
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError("the last message must be the assistant's answer")
        for message in messages:
            if message["role"] == "assistant" and not text_of(message["content"]).strip():
                raise ValueError("an answer is empty")
        prompts, spans = render_jinja_template(
            conversations=[self.processor.guard_control_tokens(messages)],
            chat_template=self.processor.chat_template,
            return_assistant_tokens_mask=True,
            **self.processor.tokenizer.special_tokens_map,
        )
        return prompts[0], spans[0]

    def _render_caption(self, row: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Prompt of stage 1, which has only images and a caption, and the span of the caption in it (characters)."""
        prompt = self.processor.image_token * len(_images(row))
        text = prompt + self.processor.guard_control_tokens(row["caption"]) + self.processor.tokenizer.eos_token
        return text, [(len(prompt), len(text))]

    def _make_sample(
        self, input_ids: list[int], runs: list[tuple[int, int]], pixel_values: Any, num_images: int
    ) -> Sample:
        whole_length = len(input_ids)
        length = self._kept_length(whole_length, runs)
        input_ids = input_ids[:length]
        labels = [IGNORED] * length
        for start, end in runs:
            labels[start:end] = input_ids[start:end]
        num_tiles = input_ids.count(self.processor.image_token_id) // self.processor.image_seq_length
        pixel_values = None if num_tiles == 0 else torch.as_tensor(pixel_values)[:num_tiles]
        return Sample(input_ids, labels, pixel_values, whole_length, num_images)

    def _kept_length(self, length: int, runs: list[tuple[int, int]]) -> int:
        if self.max_length is None or length <= self.max_length:
            return length
        fitting = [end for _, end in runs if end <= self.max_length]
        if fitting:
            return fitting[-1]
        if runs[0][0] < self.max_length:
            return self.max_length
        raise ValueError(
            f"images and first question take {runs[0][0]} tokens, which leaves no room for an answer within "
            f"`max_length`={self.max_length}; raise `max_length`"
        )


def _images(row: dict[str, Any]) -> list:
    if "caption" in row:
        return row["image"]
    return [part["image"] for message in row["messages"] for part in message["content"] if part["type"] == "image"]


def _check_exists(image: Any) -> Any:
    if isinstance(image, str) and not is_url(image) and not Path(image).is_file():
        raise FileNotFoundError(f"there is no image {image}; set `image_folder` to the folder of the images")
    return image


def _shift(spans: list[tuple[int, int]], replacements: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Shift spans of a prompt by the growth of the placeholders before them; answers contain no placeholders."""
    return [
        (start + growth, end + growth)
        for start, end in spans
        for growth in [sum(len(r["replacement"]) - len(r["text"]) for r in replacements if r["span"][1] <= start)]
    ]


def _token_runs(spans: list[tuple[int, int]], offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Convert character spans to token spans that include every overlapping token."""
    runs = []
    for span_start, span_end in spans:
        inside = [i for i, (start, end) in enumerate(offsets) if start < span_end and end > span_start]
        if inside and span_start < span_end:
            runs.append((inside[0], inside[-1] + 1))
    return runs
