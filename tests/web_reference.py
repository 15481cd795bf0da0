"""What Python computes, for the tests of web/: a folder with graphs, images, and the figures that the page must match.

python tests/web_reference.py web/reference
"""

import itertools
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from score import MAX_ANSWER_TOKENS, scene_items
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor, TemperatureLogitsWarper
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.cli.onnx import convert_graphs, export_onnx
from flashsloth.saliency_flashsloth import heat_map

ROOT = Path(__file__).parents[1]
NUM_QUESTIONS = 100
NUM_CHATS = 4
HAIR = "\N{ZERO WIDTH JOINER}"
TEXTS = (
    "Read the sign.",
    "  two  spaces, a\nnew line and a tab\t!",
    "<image> and <learnable> and </s> and USER: ASSISTANT: stay text",
    f"naïve Ünïcödé 漢字 🦥 👩{HAIR}🚀 0123456789",
    "a" * 300,
    "{{ 1 + 1 }} {% for %}",
)


def write_reference(folder: Path, num_questions: int = NUM_QUESTIONS) -> Path:
    """Write the graphs of the shipped checkpoint in float32 and int8, images, and reference.json."""
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT, dtype=torch.float32).eval()
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    folder.mkdir(parents=True, exist_ok=True)
    export_onnx(model, processor, folder / "float32")
    shutil.copytree(folder / "float32", folder / "int8", ignore=shutil.ignore_patterns("*.onnx*"))
    convert_graphs(folder / "float32", folder / "int8", "int8")
    reference = {
        "pixels": write_images(processor, folder),
        "prompts": encode_prompts(processor),
        "sampling": compute_probabilities(),
        "heat": spread_heat(),
        "questions": answer_questions(model, processor, folder, num_questions),
        "chats": chat(model, processor, folder),
        "split": answer_about_tiles(model, processor),
    }
    (folder / "reference.json").write_text(json.dumps(reference), encoding="utf-8")
    return folder


def make_images():
    rng = np.random.default_rng(0)

    def noise(*shape, high=256, dtype=np.uint8):
        return rng.integers(high, size=shape, dtype=dtype)

    colours = Image.fromarray(noise(90, 120, 3))
    palette = colours.quantize(200)
    few = colours.quantize(11)
    see_through = palette.copy()
    see_through.info["transparency"] = bytes(range(200))
    yield "noise", colours
    yield "large", Image.fromarray(noise(40, 30, 3)).resize((901, 640))
    yield "tall", Image.fromarray(noise(500, 20, 3))
    yield "wide", Image.fromarray(noise(9, 400, 3))
    yield "tiny", Image.fromarray(noise(3, 5, 3))
    yield "exact", Image.fromarray(noise(96, 96, 3))
    yield "alpha", Image.fromarray(noise(70, 50, 4))
    yield "grey", Image.fromarray(noise(70, 50))
    yield "grey_alpha", Image.fromarray(noise(70, 50, 2), "LA")
    yield "grey_16", Image.fromarray(noise(70, 50, high=65536, dtype=np.uint16))
    yield "black_and_white", Image.fromarray(noise(70, 53)).convert("1")
    yield "palette", palette
    yield "few_colours", few
    yield "see_through", see_through


def write_images(processor: FlashSlothProcessor, folder: Path) -> list[dict]:
    """Images of many kinds, and their tiles as float32, plain and split."""
    rows = []
    for name, image in make_images():
        image.save(folder / f"{name}.png")
        row = {"file": f"{name}.png"}
        for key, splits in (("plain", False), ("split", True)):
            tiles = processor.image_processor(str(folder / f"{name}.png"), do_image_splitting=splits)["pixel_values"]
            np.asarray(tiles, dtype="<f4").tofile(folder / f"{name}.{key}")
            row[key] = f"{name}.{key}"
        rows.append(row)
    return rows


def encode_prompts(processor: FlashSlothProcessor) -> list[dict]:
    picture = {"type": "image", "image": Image.new("RGB", (8, 8))}
    rows = []
    for length in (1, 3, 5):
        for shift in range(len(TEXTS)):
            texts = [TEXTS[(shift + turn) % len(TEXTS)] for turn in range(length)]
            messages = [
                {"role": ("user", "assistant")[turn % 2], "content": [{"type": "text", "text": text}]}
                for turn, text in enumerate(texts)
            ]
            shown = [{**messages[0], "content": [picture, *messages[0]["content"]]}, *messages[1:]]
            sent = [{**messages[0], "content": [{"type": "image"}, *messages[0]["content"]]}, *messages[1:]]
            rows.append({"messages": sent, "ids": processor.encode_conversations(shown)["input_ids"][0].tolist()})
    return rows


def compute_probabilities() -> list[dict]:
    rng = np.random.default_rng(1)
    rows = []
    for settings in (
        {"temperature": 1.0, "topK": 0, "topP": 1.0},
        {"temperature": 0.7, "topK": 0, "topP": 0.9},
        {"temperature": 1.3, "topK": 5, "topP": 1.0},
        {"temperature": 0.5, "topK": 20, "topP": 0.6},
        {"temperature": 2.0, "topK": 50, "topP": 0.05},
    ):
        logits = rng.normal(scale=3, size=64).astype(np.float32)
        suppressed = [int(logits.argmax()), 3]
        processors = LogitsProcessorList(
            [SuppressTokensLogitsProcessor(suppressed), TemperatureLogitsWarper(settings["temperature"])]
        )
        if settings["topK"]:
            processors.append(TopKLogitsWarper(settings["topK"]))
        if settings["topP"] < 1:
            processors.append(TopPLogitsWarper(settings["topP"]))
        scores = processors(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits)[None].double())
        rows.append(
            settings
            | {
                "logits": logits.tolist(),
                "suppressed": suppressed,
                "probabilities": scores.softmax(dim=-1)[0].tolist(),
            }
        )
    return rows


def spread_heat() -> list[dict]:
    rng = np.random.default_rng(2)
    rows = []
    for num_tiles, width, height, patch_size in ((1, 50, 30, 1 / 12), (1, 5, 9, 14 / 384), (5, 40, 70, 1 / 6)):
        weights = torch.from_numpy(rng.random((num_tiles, 36), dtype=np.float32))
        heat = heat_map(weights, (height, width), patch_size)
        rows.append(
            {
                "numTiles": num_tiles,
                "width": width,
                "height": height,
                "patchSize": patch_size,
                "weights": weights.flatten().tolist(),
                "heat": heat.flatten().tolist(),
            }
        )
    return rows


@torch.inference_mode()
def answer(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    image: Image.Image,
    texts: list[str],
    **processor_kwargs: bool,
) -> tuple[str, torch.Tensor]:
    """The answer to the last of several texts, of the user and the model in turn, and the attention of its question."""
    content = [[{"type": "text", "text": text}] for text in texts]
    content[0].insert(0, {"type": "image", "image": image})
    roles = ("user", "assistant") * len(content)
    messages = [{"role": role, "content": parts} for role, parts in zip(roles, content, strict=False)]
    inputs = processor.encode_conversations(messages, **processor_kwargs)
    output = model.generate(
        **inputs,
        max_new_tokens=MAX_ANSWER_TOKENS,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    attention = output.query_attentions[-1].mean(dim=(0, 1))
    return processor.post_process_image_text_to_text(new)[0], attention


def answer_questions(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, folder: Path, num_questions: int
) -> list[dict]:
    """The first questions of the evaluation, each asked alone."""
    rows: list[dict] = []
    known: list[Image.Image] = []
    for item in itertools.islice(scene_items(num_questions), num_questions):
        if not known or item.images[0] is not known[-1]:
            known.append(item.images[0])
            known[-1].save(folder / f"scene_{len(known)}.png")
        text, _ = answer(model, processor, known[-1], [item.question])
        rows.append({"file": f"scene_{len(known)}.png", "question": item.question, "answer": text})
    return rows


def chat(model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, folder: Path) -> list[dict]:
    """Conversations of three questions about one image."""
    rows = []
    by_file: dict[str, list[str]] = {}
    images: list[Image.Image] = []
    for item in scene_items(NUM_CHATS):
        if not images or item.images[0] is not images[-1]:
            images.append(item.images[0])
        by_file.setdefault(f"scene_{len(images)}.png", []).append(item.question)
    for (file, texts), image in zip(by_file.items(), images, strict=True):
        turns, said = [], []
        for text in random.Random(file).sample(texts, 3):
            said.append(text)
            reply, attention = answer(model, processor, image, said)
            said.append(reply)
            turns.append({"question": text, "answer": reply, "attention": attention.tolist()})
        rows.append({"file": file, "turns": turns})
    return rows


def answer_about_tiles(model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor) -> dict:
    """An answer about an image in five tiles."""
    item = next(scene_items(1))
    text, attention = answer(model, processor, item.images[0], [item.question], do_image_splitting=True)
    return {"file": "scene_1.png", "question": item.question, "answer": text, "attention": attention.tolist()}


if __name__ == "__main__":
    write_reference(Path(sys.argv[1]))
