r"""Requests per second of vLLM, beside `transformers serve` and batched `generate`.

    python benchmarks/serving.py --output benchmarks/results/serving_cpu.md
    python benchmarks/serving.py --models Tongbo/FlashSloth-3.2B Qwen/Qwen2-VL-2B-Instruct \
        HuggingFaceTB/SmolVLM2-2.2B-Instruct --engines vllm --dtype bfloat16 --output benchmarks/results/serving_cuda.md

Runs in an environment with the extras `vllm` and `serve`. Without `--models`, it builds a FlashSloth of 0.2 billion
parameters with random weights. Every engine gets the same requests: a picture and a question, both with contents of
their own unless the picture is the same in all, and an answer of a fixed number of tokens. Servers get them through
OpenAI's client, so many at once; `generate` gets them as one batch. A round has as many requests as are sent at
once, but at least 8. One round warms up; seconds are medians of the others, and ratios are to the first engine.
"""

import asyncio
import base64
import io
import json
import logging
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from openai import AsyncOpenAI
from PIL import Image
from report import build_parser, describe_machine, markdown_table, write_report

from flashsloth import (
    FlashSlothConfig,
    FlashSlothForConditionalGeneration,
    FlashSlothImageProcessor,
    FlashSlothProcessor,
)

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
ENGINES = ("generate", "transformers serve", "vllm")
AT_ONCE = (1, 8, 32)
MIN_REQUESTS, NUM_ROUNDS, ANSWER_TOKENS = 8, 3, 32
IMAGE_SIDE, START_TIMEOUT = 336, 900
SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
TOWER = {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 16, **SIZES}
WORDS = ["what", "which", "colour", "number", "left", "right", "star", "circle", "sign", "read", "count", "thing"]


class Requests:
    """Makes questions and pictures, never the same twice."""

    def __init__(self) -> None:
        self.random = random.Random(0)
        self.same = self._picture()

    def _picture(self) -> Image.Image:
        small = Image.frombytes("RGB", (8, 8), self.random.randbytes(192))
        return small.resize((IMAGE_SIDE, IMAGE_SIDE))

    def conversations(self, count: int, is_same: bool) -> list[list[dict]]:
        """Conversations of a round.

        Args:
            count: How many.
            is_same: Whether all have the same picture.
        """
        made = []
        for _ in range(count):
            image = self.same if is_same else self._picture()
            text = " ".join(self.random.choices(WORDS, k=20))
            content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
            made.append([{"role": "user", "content": content}])
        return made


def build_checkpoint(folder: Path, dtype: str) -> None:
    """Write a FlashSloth with random weights and the tokenizer of the shipped checkpoint."""
    shipped, processor = FlashSlothConfig.from_pretrained(ROOT), FlashSlothProcessor.from_pretrained(ROOT)
    text = shipped.text_config.to_dict() | SIZES | {"num_key_value_heads": 12, "head_dim": 64}
    fields = {name: getattr(shipped, name) for name in ("image_token_id", "query_token_id", "instruction_start_ids")}
    config = FlashSlothConfig(
        text_config=text, vision_config=TOWER, pooling_window_size=2, query_anchor_token_id=None, **fields
    )
    model = FlashSlothForConditionalGeneration(config).to(getattr(torch, dtype))
    logger.info("%.2f billion parameters", sum(parameter.numel() for parameter in model.parameters()) / 1e9)
    model.save_pretrained(folder)
    side = config.tile_size[0]
    FlashSlothProcessor(
        FlashSlothImageProcessor(size={"height": side, "width": side}),
        processor.tokenizer,
        chat_template=processor.chat_template,
        image_seq_length=config.image_seq_length,
        num_query_tokens=config.num_query_tokens,
    ).save_pretrained(folder)


@contextmanager
def batched_generate(model_id: str, dtype: str, answer_tokens: int) -> Iterator[Callable[[list], None]]:
    """A function that answers a batch with `generate`."""
    model = FlashSlothForConditionalGeneration.from_pretrained(model_id, dtype=dtype).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = FlashSlothProcessor.from_pretrained(model_id)

    def answer(conversations: list) -> None:
        inputs = processor.encode_conversations(conversations, padding=True).to(model.device, model.dtype)
        output = model.generate(**inputs, min_new_tokens=answer_tokens, max_new_tokens=answer_tokens, do_sample=False)
        output.tolist()  # waits for the device

    yield answer


@contextmanager
def server(engine: str, model_id: str, dtype: str, answer_tokens: int) -> Iterator[Callable[[list], None]]:
    """A function that sends requests to a server, all at once."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    if engine == "vllm":
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_id]
        command += ["--served-model-name", model_id, "--max-model-len", "1024"]
        fixed: dict[str, Any] = {"ignore_eos": True, "min_tokens": answer_tokens}
    else:
        command = [str(Path(sys.executable).with_name("transformers")), "serve", model_id, "--trust-remote-code"]
        lengths = {"min_new_tokens": answer_tokens, "max_new_tokens": answer_tokens}
        fixed = {"generation_config": json.dumps(lengths)}
    process = subprocess.Popen(
        [*command, "--dtype", dtype, "--port", str(port)], env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    try:
        _wait_for(f"http://localhost:{port}/health", process)

        async def ask_all(conversations: list) -> None:
            async with AsyncOpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", timeout=3600) as client:
                await asyncio.gather(
                    *(
                        client.chat.completions.create(
                            model=model_id,
                            messages=_as_openai(conversation),
                            max_tokens=answer_tokens,
                            temperature=0,
                            extra_body=fixed,
                        )
                        for conversation in conversations
                    )
                )

        yield lambda conversations: asyncio.run(ask_all(conversations))
    finally:
        process.terminate()
        process.wait()


def _wait_for(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The server at {url} did not start; its output is above.") from error
            time.sleep(1)


def _as_openai(conversation: list[dict]) -> list[dict]:
    (message,) = conversation
    image, text = message["content"]
    buffer = io.BytesIO()
    image["image"].save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return [message | {"content": [{"type": "image_url", "image_url": {"url": url}}, text]}]


def measure(answer: Callable[[list], None], requests: Requests, at_once: int, is_same: bool, rounds: int) -> float:
    """Median seconds of a request."""
    seconds = []
    for _ in range(rounds + 1):
        waves = max(1, MIN_REQUESTS // at_once)
        batches = [requests.conversations(at_once, is_same) for _ in range(waves)]
        start = time.perf_counter()
        for batch in batches:
            answer(batch)
        seconds.append((time.perf_counter() - start) / (waves * at_once))
    return statistics.median(seconds[1:])


def compare(model_id: str, name: str, args: Any) -> list[list[Any]]:
    """Rows of one model: all engines, numbers of requests at once, and same or different pictures."""
    found: dict[tuple[str, int, bool], float] = {}
    for engine in args.engines:
        start = batched_generate if engine == "generate" else lambda *rest, engine=engine: server(engine, *rest)
        with start(model_id, args.dtype, args.answer_tokens) as answer:
            requests = Requests()
            for at_once in args.at_once:
                for is_same in (False, True):
                    found[engine, at_once, is_same] = measure(answer, requests, at_once, is_same, args.rounds)
                    logger.info("%s %s %s: %s s", engine, at_once, is_same, found[engine, at_once, is_same])
    rows = []
    for at_once in args.at_once:
        for is_same in (False, True):
            baseline = found[args.engines[0], at_once, is_same]
            for engine in args.engines:
                seconds = found[engine, at_once, is_same]
                numbers = [f"{1 / seconds:.2f}", f"{args.answer_tokens / seconds:.1f}", f"{baseline / seconds:.2f}"]
                rows.append([name, at_once, "same" if is_same else "different", engine, *numbers])
    return rows


def main() -> None:
    """Measure all models and engines, and write a table."""
    parser = build_parser(__doc__)
    parser.add_argument("--models", nargs="+", help="folders or Hub ids; default: random weights")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--at-once", nargs="+", type=int, default=AT_ONCE)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--answer-tokens", type=int, default=ANSWER_TOKENS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        if args.models is None:
            build_checkpoint(Path(folder), args.dtype)
        models = {folder: "FlashSloth, 0.2 B, random"} if args.models is None else {name: name for name in args.models}
        rows = [row for model_id, name in models.items() for row in compare(model_id, name, args)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = f"medians of {args.rounds} rounds; answers of {args.answer_tokens} tokens"
    title = f"{describe_machine(device, args.dtype)}; {rounds}; made by benchmarks/serving.py."
    head = ("model", "at once", "pictures", "engine", "requests per second", "tokens per second", "ratio")
    write_report(args.output, title, markdown_table(head, rows, text_columns=(0, 2, 3)))


if __name__ == "__main__":
    main()
