"""The model that lmms-eval asks: chat messages with images in, answers out, batch by batch."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NoReturn

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from .. import FlashSlothForConditionalGeneration, FlashSlothProcessor
from ..video_processing_flashsloth import DEFAULT_NUM_FRAMES, video_frames

try:
    from accelerate import Accelerator
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ImportError('Evaluation needs lmms-eval; install it with `pip install "flashsloth[eval]"`.') from error

logger = logging.getLogger(__name__)

WINDOW = 16
"""Batches whose requests are sorted by length together, and whose answers are handed over together."""
DEFAULT_MAX_NEW_TOKENS = 1024  # of tasks that do not say; the models of lmms-eval choose 1024 or more
RUN_ID = "LMMS_CACHE_RUN_ID"


class FlashSlothForEvaluation(lmms):
    """A FlashSloth as lmms-eval's chat models are; its arguments are what `--model_args` takes.

    With several processes (`accelerate launch` or `torchrun`) every process holds the model and answers its share of
    the requests; lmms-eval gathers the scores.

    Args:
        pretrained: Folder or Hub id, also of an original release.
        batch_size: Requests answered at once; lmms-eval's `--batch_size`.
        device: Such as "cuda" or "cpu"; lmms-eval's `--device`. Default: what accelerate chooses. Several processes
            always use what accelerate gives each of them.
        dtype: Such as "bfloat16". Default: the checkpoint's.
        attn_implementation: As for `from_pretrained`.
        revision: Of a Hub id.
        do_image_splitting: Whether an image is read as five tiles. Default: what the checkpoint's processor says.
        max_num_frames: A video is read as at most that many images, evenly spaced.

    Raises:
        ValueError: If `batch_size` or `max_num_frames` is no positive number.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str = "main",
        do_image_splitting: bool | None = None,
        max_num_frames: int = DEFAULT_NUM_FRAMES,
    ) -> None:
        super().__init__()
        self.batch_size = _positive("batch_size", batch_size)
        self.max_num_frames = _positive("max_num_frames", max_num_frames)
        self.image_kwargs = {} if do_image_splitting is None else {"do_image_splitting": bool(do_image_splitting)}
        self.accelerator = Accelerator()
        is_parallel = self.accelerator.num_processes > 1
        self.device = torch.device(device) if device and not is_parallel else self.accelerator.device
        self.processor = FlashSlothProcessor.from_pretrained(pretrained, revision=revision)
        self.model = FlashSlothForConditionalGeneration.from_pretrained(
            pretrained, revision=revision, dtype=dtype, attn_implementation=attn_implementation
        )
        self.model.to(self.device).eval()
        # The response cache of lmms-eval gives every run a name of its own, under which a killed run's answers are
        # never looked up again; under one name for all, the next run finds them. Its keys tell models and tasks apart.
        os.environ.setdefault(RUN_ID, "flashsloth")

    def generate_until(self, requests: Sequence[Instance]) -> Iterator[str] | list[str]:
        """Answer requests.

        Args:
            requests: Their `args` are the text of the question, a function that makes chat messages of a document, the
                generation arguments, and the document's number, task and split.

        Returns:
            The answers in order. An iterator over them, because the response cache (`--use_cache`) saves every answer
            as it takes it, and would save nothing of a killed run if it got all answers at the end.
        """
        answers = self._answers(requests)
        return answers if len(requests) > 1 else list(answers)  # agentic tasks index the one answer they ask for

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Refuse: lmms-eval sends chat models tasks that generate, and no other.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "FlashSloth is a chat model to lmms-eval, and those generate; choose a task with `output_type: "
            "generate_until`."
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Refuse: no benchmark of the paper asks in rounds.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "FlashSloth does not answer tasks with `output_type: generate_until_multi_round`; choose one with "
            "`output_type: generate_until`."
        )

    def _answers(self, requests: Sequence[Instance]) -> Iterator[str]:
        """Answer window by window; within one, the longest questions come first, so that rows need little padding."""
        size = WINDOW * self.batch_size
        with tqdm(total=len(requests), desc="Answering", disable=self.rank != 0) as progress:
            for start in range(0, len(requests), size):
                window = [request.args for request in requests[start : start + size]]
                answers = [""] * len(window)
                for batch in _batches(window, self.batch_size):
                    for index, answer in zip(batch, self._answer_batch([window[i] for i in batch]), strict=True):
                        answers[index] = answer
                    progress.update(len(batch))
                yield from answers

    @torch.inference_mode()
    def _answer_batch(self, batch: list[tuple]) -> list[str]:
        conversations = [
            self._conversation(to_messages(self.task_dict[task][split][document]))
            for _, to_messages, _, document, task, split in batch
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, **self.image_kwargs},
        ).to(self.device)
        prompt_length = inputs["input_ids"].shape[1]
        options, stops = generation_options(batch[0][2])
        room = self.model.config.get_text_config().max_position_embeddings - prompt_length
        options["max_new_tokens"] = max(1, min(options["max_new_tokens"], room))  # MathVista allows 16384
        generated = self.model.generate(**inputs, **options)
        texts = self.processor.post_process_image_text_to_text(generated[:, prompt_length:])
        return [_cut(text, stops) for text in texts]

    def _conversation(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Put lmms-eval's messages in transformers' form; frames stand for a video."""
        return [
            {"role": message["role"], "content": [part for raw in message["content"] for part in self._parts(raw)]}
            for message in messages
        ]

    def _parts(self, part: Mapping[str, Any]) -> list[dict[str, Any]]:
        if part["type"] == "text":
            return [{"type": "text", "text": part["text"]}]
        if part["type"] == "image":
            return [{"type": "image", "image": part["url"]}]
        if part["type"] == "video":
            return [{"type": "image", "image": frame} for frame in video_frames(part["url"], self.max_num_frames)]
        raise ValueError(
            f"FlashSloth reads text, images and videos, but this task has content of type {part['type']!r}; choose "
            "another task."
        )


def generation_options(task_options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Turn what a task says about generation into arguments of `generate`.

    Args:
        task_options: `generation_kwargs` of the task; `until` is one text or several at which an answer ends. As in
            the other models of lmms-eval a temperature of 0 means greedy, a higher one sampling. What `generate` does
            not know, such as options for other models, is left out.

    Returns:
        Arguments of `generate`, and the texts at which an answer is cut.
    """
    known = GenerationConfig().to_dict()
    options = {name: value for name, value in task_options.items() if name in known and value is not None}
    ignored = sorted(set(task_options) - set(known) - {"until"})
    if ignored:
        logger.debug("Generation arguments without a meaning for FlashSloth: %s", ", ".join(ignored))
    temperature, do_sample = options.get("temperature"), options.get("do_sample")
    options["do_sample"] = bool(do_sample) if temperature is None else temperature > 0 and do_sample is not False
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
    options.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    until = task_options.get("until") or []
    return options, [until] if isinstance(until, str) else [text for text in until if text]


def _batches(window: list[tuple], batch_size: int) -> Iterator[list[int]]:
    """Indices of requests with the same generation arguments, longest question first."""

    def options(index: int) -> str:
        return repr(sorted(window[index][2].items()))

    order = sorted(range(len(window)), key=lambda index: (options(index), -len(window[index][0])))
    for _, group in groupby(order, key=options):
        indices = list(group)
        yield from (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))


def _cut(text: str, stops: list[str]) -> str:
    """The text before the first of the stops."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))].strip()


def _positive(name: str, value: int | str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"`{name}` must be a whole number above 0, but is {value!r}; give a number.")
    return int(value)
