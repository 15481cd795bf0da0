"""FlashSloth as a chat model of lmms-eval, which answers messages with images and videos in batches."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NoReturn

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from .. import FlashSlothForConditionalGeneration, FlashSlothProcessor
from ..video_processing_flashsloth import DEFAULT_NUM_FRAMES

try:
    from accelerate import Accelerator
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ImportError("Evaluation needs lmms-eval; install it with `pip install lmms-eval`.") from error

logger = logging.getLogger(__name__)

WINDOW = 16
"""Number of batches whose requests are sorted by length together and whose answers are returned together."""
DEFAULT_MAX_NEW_TOKENS = 1024  # for tasks that set no limit; other models of lmms-eval use 1024 or more
RUN_ID = "LMMS_CACHE_RUN_ID"
"""Environment variable with the name of a run in lmms-eval's response cache."""


class FlashSlothForEvaluation(lmms):
    """A chat model of lmms-eval, constructed with the values of `--model_args`.

    With several processes (`accelerate launch` or `torchrun`), every process has a copy of the model and answers its
    share of the requests; lmms-eval gathers the scores.

    Args:
        pretrained: Folder or Hub id (original releases included).
        batch_size: Number of requests answered at once; lmms-eval's `--batch_size`.
        device: Device, such as "cuda" or "cpu"; lmms-eval's `--device`. Default: accelerate's choice. With several
            processes, accelerate always chooses.
        dtype: Data type, such as "bfloat16". Default: the checkpoint's.
        attn_implementation: As for `from_pretrained`.
        revision: Revision of a Hub id.
        do_image_splitting: Whether to split an image into five tiles. Default: the setting of the processor.
        max_num_frames: Maximum number of evenly spaced frames to read from a video.

    Raises:
        ValueError: If `batch_size` or `max_num_frames` is not a positive integer.
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
        # lmms-eval's response cache names every run differently, so it would not find the answers of a killed run. With
        # one name for all runs it does, and its keys tell models and tasks apart.
        os.environ.setdefault(RUN_ID, "flashsloth")

    def generate_until(self, requests: Sequence[Instance]) -> Iterator[str] | list[str]:
        """Answer requests.

        Args:
            requests: Their `args` are the text of the question, a function that turns a document into chat messages,
                the generation arguments, and the index, task and split of the document.

        Returns:
            The answers in order, as an iterator: the response cache (`--use_cache`) saves each answer as it arrives,
            whereas a killed run would lose a list. A single answer is a list, which agentic tasks index.
        """
        answers = self._answers(requests)
        return answers if len(requests) > 1 else list(answers)

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Raise an error; lmms-eval does not send such tasks to chat models.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "FlashSloth is a chat model, and chat models of lmms-eval only generate; choose a task with `output_type: "
            "generate_until`."
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Raise an error; no benchmark of the paper has several rounds.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "FlashSloth does not support tasks with `output_type: generate_until_multi_round`; choose one with "
            "`output_type: generate_until`."
        )

    def _answers(self, requests: Sequence[Instance]) -> Iterator[str]:
        """Answer one window after another, the longest questions of each first, so that rows need little padding."""
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
            to_messages(self.task_dict[task][split][document])
            for _, to_messages, _, document, task, split in batch  # `args` of a request, see `generate_until`
        ]
        inputs = self.processor.encode_conversations(
            conversations, padding=True, num_frames=self.max_num_frames, **self.image_kwargs
        ).to(self.device)
        prompt_length = inputs["input_ids"].shape[1]
        options, stops = generation_options(batch[0][2])
        room = self.model.config.get_text_config().max_position_embeddings - prompt_length
        options["max_new_tokens"] = max(1, min(options["max_new_tokens"], room))  # MathVista allows 16384
        generated = self.model.generate(**inputs, **options)
        texts = self.processor.post_process_image_text_to_text(generated[:, prompt_length:])
        return [_cut(text, stops) for text in texts]


def generation_options(task_options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Convert the generation options of a task to arguments of `generate`.

    Args:
        task_options: `generation_kwargs` of the task; `until` is a text or a list of texts that end an answer. As in
            other models of lmms-eval, a temperature of 0 means greedy decoding, and a higher one sampling. Options that
            `generate` does not have, such as those for other models, are ignored.

    Returns:
        Arguments of `generate`, and the texts that end an answer.
    """
    known = GenerationConfig().to_dict()
    options = {name: value for name, value in task_options.items() if name in known and value is not None}
    ignored = sorted(set(task_options) - set(known) - {"until"})
    if ignored:
        logger.debug("Ignoring generation arguments: %s", ", ".join(ignored))
    temperature, do_sample = options.get("temperature"), options.get("do_sample")
    options["do_sample"] = bool(do_sample) if temperature is None else temperature > 0 and do_sample is not False
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
    options.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    until = task_options.get("until") or []
    return options, [until] if isinstance(until, str) else [text for text in until if text]


def _batches(window: list[tuple], batch_size: int) -> Iterator[list[int]]:
    """Batches of indices of requests with the same generation arguments, longest question first."""

    def options(index: int) -> str:
        return repr(sorted(window[index][2].items()))

    order = sorted(range(len(window)), key=lambda index: (options(index), -len(window[index][0])))
    for _, group in groupby(order, key=options):
        indices = list(group)
        yield from (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))


def _cut(text: str, stops: list[str]) -> str:
    """The text before the first of `stops`."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))].strip()


def _positive(name: str, value: int | str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"`{name}` must be a whole number above 0, but is {value!r}.")
    return int(value)
