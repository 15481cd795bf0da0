"""A chat about images in the terminal.

The images are encoded once: `image_prefix_cache` keeps them for all questions. Ctrl-C ends an answer, and what was
generated of it stays part of the conversation. At the prompt, it drops the line that is being typed.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image
from transformers import StoppingCriteriaList

from ..modeling_flashsloth import FlashSlothForConditionalGeneration
from ..processing_flashsloth import FlashSlothProcessor
from .conversation import StopWhen, count_free_positions, encode_turns

PROMPT = "> "
HELP = "Ask about the image. Ctrl-C stops an answer, Ctrl-D ends the chat."


class Chat:
    """A conversation about images.

    Args:
        model: A FlashSloth.
        processor: Its processor.
        images: The images, before the first question.
        max_new_tokens: Maximum length of an answer.
        do_image_splitting: Whether to split images into five tiles. Default: the processor's setting.
    """

    def __init__(
        self,
        model: FlashSlothForConditionalGeneration,
        processor: FlashSlothProcessor,
        images: Sequence[Image.Image],
        max_new_tokens: int,
        do_image_splitting: bool | None = None,
    ) -> None:
        self.model, self.processor, self.images = model, processor, images
        self.max_new_tokens, self.do_image_splitting = max_new_tokens, do_image_splitting
        self.prefixes = model.image_prefix_cache()
        self.turns: list[tuple[str, str]] = []

    def ask(self, question: str, streamer: Any, stop: threading.Event) -> str:
        """Answer a question, and add both to the conversation unless the answer is empty.

        Args:
            question: The question.
            streamer: Receives the answer's tokens.
            stop: Ends the answer when it is set.

        Returns:
            The answer, or its beginning.

        Raises:
            ValueError: If the conversation is too long, or the question cannot be encoded. It is then not added.
        """
        inputs = encode_turns(self.processor, self.images, self.turns, question, self.do_image_splitting)
        free = count_free_positions(self.model, inputs["input_ids"])
        output = self.model.generate(
            **self.prefixes(inputs.to(self.model.device, self.model.dtype)),
            max_new_tokens=min(self.max_new_tokens, free),
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([StopWhen(stop)]),
        )
        answer = self.processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])[0].strip()
        if answer:
            self.turns.append((question, answer))
        return answer


def run(chat: Chat, make_streamer: Callable[[], Any], show_error: Callable[[ValueError], None]) -> None:
    """Read questions from standard input and answer them, until it ends.

    Args:
        chat: The conversation.
        make_streamer: Returns a streamer that writes one answer.
        show_error: Shows why a question has no answer.
    """
    sys.stdin.reconfigure(errors="replace")  # bytes that are not text would end the chat
    is_typed = sys.stdin.isatty()
    if is_typed:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  (gives `input` a history and editing keys)
        sys.stderr.write(f"{HELP}\n")
    for question in _typed_questions() if is_typed else sys.stdin:
        if not question.strip():
            continue
        stop = threading.Event()
        try:
            with _interrupts_set(stop) if is_typed else contextlib.nullcontext():
                chat.ask(question.strip(), make_streamer(), stop)
        except ValueError as error:
            show_error(error)


def _typed_questions() -> Iterator[str]:
    """Lines that are typed at the prompt."""
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")


@contextlib.contextmanager
def _interrupts_set(event: threading.Event) -> Iterator[None]:
    """Make Ctrl-C set an event instead of raising."""
    previous = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
