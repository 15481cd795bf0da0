"""A conversation about images, as `flashsloth chat` and the demo hold it."""

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, StoppingCriteria

from ..modeling_flashsloth import FlashSlothForConditionalGeneration
from ..processing_flashsloth import FlashSlothProcessor


class StopWhen(StoppingCriteria):
    """Ends generation as soon as an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Whether the rows of `input_ids` are done, `(batch,)`."""
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def encode_turns(
    processor: FlashSlothProcessor,
    images: Sequence[Image.Image],
    turns: Iterable[tuple[str, str]],
    question: str,
    do_image_splitting: bool | None = None,
) -> BatchFeature:
    """Encode a conversation that begins with images and ends with a question.

    Args:
        processor: The processor.
        images: Images before the first question.
        turns: Earlier questions and their answers.
        question: The question to answer.
        do_image_splitting: Whether to split images into five tiles. Default: the processor's setting.

    Returns:
        Inputs of `generate`, on the CPU.
    """
    messages: list[dict[str, Any]] = []
    for asked, *answer in [*turns, (question,)]:
        messages.append({"role": "user", "content": [{"type": "text", "text": asked}]})
        messages += [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in answer]
    messages[0]["content"][:0] = [{"type": "image", "image": image} for image in images]
    return processor.encode_conversations(messages, images_kwargs={"do_image_splitting": do_image_splitting})


def count_free_positions(model: FlashSlothForConditionalGeneration, input_ids: torch.Tensor) -> int:
    """Number of tokens that the answer to a prompt may have.

    Args:
        model: The model.
        input_ids: The prompt, `(1, seq_length)`.

    Raises:
        ValueError: If there is no room for an answer.
    """
    num_tokens, num_positions = input_ids.shape[1], model.config.text_config.max_position_embeddings
    if num_tokens >= num_positions:
        raise ValueError(
            f"This conversation is too long: it has {num_tokens} tokens, and the model can process {num_positions} "
            "including the answer. Please shorten the question, or start a new chat."
        )
    return num_positions - num_tokens
