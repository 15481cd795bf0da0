"""Model cards of FlashSloth checkpoints."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_flashsloth import FlashSlothConfig
from ..image_processing_flashsloth import NUM_HD_TILES
from .repository import read_json

PHI_2_ID = "microsoft/phi-2"
SIGLIP_ID = "google/siglip-so400m-patch14-384"
TASK = "image-text-to-text"
TAGS = ["custom_code", "conversational", "flashsloth", "vision-language"]
DRAWN_SCENES = "drawn-scenes"

CONVERTED = "These are the weights of the original release, converted by `flashsloth convert` without changing a value."

INITIALISED = """Built by `flashsloth init` from the pretrained {tower} and {decoder}. Their weights are unchanged; the
vocabulary has {num_new_rows} added rows. The pooling, the projector, the query tokens and the Embedded Query module are
newly initialised: **train the model before you use it.** The licences of both base models apply."""

CARD = """---
{metadata}
---

# {name}

FlashSloth ([arXiv 2412.04317](https://arxiv.org/abs/2412.04317)) is a vision-language model. An image enters its
decoder as {num_image_tokens} tokens; query tokens after each question read the image's {num_patches} patches again.

| | |
|---|---|
| Parameters | {num_parameters:,} |
| Decoder | {text_type}, {num_layers} layers, hidden size {hidden_size} |
| Vision tower | {vision_type}, {num_vision_layers} layers, {image_size} px |
| Tiles per image | {num_tiles}{variant} |
| Data type | {dtype} |
| Memory | {weights} of weights, and a KV cache of at most {cache_per_token} per token, {cache_per_image} per image |

{origin}
{results}
## Use

You need only transformers, 5.17 or later: the model's code is in this repository, and `trust_remote_code=True` runs it.
Pass `revision="COMMIT"` to run exactly the code that you have reviewed.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model_id = "{name}"  # this repository's folder or Hub id
processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(model_id, trust_remote_code=True)

content = [{{"type": "image", "path": "image.jpg"}}, {{"type": "text", "text": "What is in the image?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
output = model.generate(**inputs, max_new_tokens=256)[:, inputs["input_ids"].shape[1] :]
answer = processor.post_process_image_text_to_text(output)[0]
```

The model is on the CPU. `model.to("cuda")`, or `model.to("mps")` on a Mac, moves it; `from_pretrained(...,
device_map="auto")` spreads it over all devices, which needs accelerate.

### With the package `flashsloth`

```sh
flashsloth ask image.jpg "What is in the image?" --model {name}
flashsloth chat image.jpg --model {name}
flashsloth caption FOLDER --question "What is in the image?" --output captions --model {name}
flashsloth demo --model {name}
```

With the package, you do not need `trust_remote_code`. `demo` needs Gradio.

### As a server with OpenAI's API

```sh
transformers serve {name} --trust-remote-code
```

needs `pip install "transformers[serving]"`. With the package and its extra `vllm`, `vllm serve {name}` does the same,
for many requests at once.

### With onnxruntime

```sh
flashsloth onnx {name} onnx
```

needs the package's extra `onnx`.

### On Inference Endpoints

`handler.py` in this repository answers the requests of an [endpoint](https://endpoints.huggingface.co).

### Not supported: llama.cpp, Ollama, MLX, SGLang

The Hub may show snippets for them, but each needs its own implementation of an architecture, and has none of this one:
in one decoder layer, the query tokens read the patches of the image. A conversion of the decoder alone would not see
the image.

## Limits

- It can be wrong. Check an answer before you rely on it.
- It sees an image as {num_tiles} tile{plural} of {image_size}×{image_size} px, so small text and details are lost.
- Images, questions and answers have room for {num_positions:,} tokens in total.

## Licence

{license}

The code is under Apache-2.0.
"""


class Example(NamedTuple):
    """An example for the Hub's widget.

    Attributes:
        image: A path in the repository, or a URL.
        question: A question about it.
        answer: The model's answer, or `None` if it is unknown.
    """

    image: str
    question: str
    answer: str | None = None


def build_model_card(
    config: FlashSlothConfig,
    *,
    name: str,
    dtype: str,
    num_parameters: int,
    do_image_splitting: bool,
    origin: str = CONVERTED,
    base_models: list[str] | None = None,
    license_id: str | None = "apache-2.0",
    results: list[EvalResult] | None = None,
    examples: list[Example] | None = None,
    num_bytes: int | None = None,
    base_model_relation: str | None = None,
) -> ModelCard:
    """Build the model card of a checkpoint.

    Args:
        config: The checkpoint's config.
        name: The model's name, which is also its id in the code example.
        dtype: Data type of the weights, such as `float16`.
        num_parameters: Number of parameters.
        do_image_splitting: Whether the processor cuts an image into five tiles.
        origin: A sentence on where the weights come from.
        base_models: Hub ids of the base models. Default: inferred from the config's sizes.
        license_id: Hub identifier of the weights' licence, or `None` if it is unknown.
        results: Evaluation results, as `read_results` returns them.
        examples: Examples for the Hub's widget.
        num_bytes: Size of the weights, in bytes. Default: that of `num_parameters` of the data type.
        base_model_relation: What the model is to its base model, as the Hub calls it: `adapter`, `finetune`, `merge` or
            `quantized`. Default: the Hub guesses.

    Returns:
        The card.
    """
    text, vision = config.text_config, config.vision_config
    bases = _base_models(config) if base_models is None else base_models or None
    metadata = ModelCardData(
        license=license_id,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=TAGS,
        base_model=bases,
        base_model_relation=base_model_relation if bases else None,
        model_name=name if results else None,
        eval_results=results or None,
        widget=[_widget(example) for example in examples or ()] or None,
    )
    item_size = getattr(torch, dtype.partition(",")[0]).itemsize
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * num_heads * head_dim * item_size
    num_tiles = NUM_HD_TILES if do_image_splitting else 1
    return ModelCard(
        CARD.format(
            metadata=metadata.to_yaml(),
            name=name,
            num_image_tokens=num_tiles * config.image_seq_length,
            num_patches=num_tiles * config.num_patches,
            num_parameters=num_parameters,
            text_type=text.model_type,
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            vision_type=vision.model_type,
            num_vision_layers=vision.num_hidden_layers,
            image_size=vision.image_size,
            num_tiles=num_tiles,
            variant=" (FlashSloth-HD)" if do_image_splitting else "",
            dtype=dtype,
            plural="s" if num_tiles > 1 else "",
            num_positions=text.max_position_embeddings,
            weights=_show_bytes(num_parameters * item_size if num_bytes is None else num_bytes),
            cache_per_token=_show_bytes(per_token),
            cache_per_image=_show_bytes(per_token * num_tiles * config.image_seq_length),
            license=_license(license_id, bases),
            origin=origin,
            results=_results_table(results or []),
        )
    )


def read_results(file: Path) -> list[EvalResult]:
    """Read evaluation results written by `examples/tiny/score.py` or lmms-eval.

    Args:
        file: A JSON file with the counts `asked` and `right` of every suite and kind of question, or with lmms-eval's
            `results`.

    Returns:
        One result per suite, or per task and metric.

    Raises:
        ValueError: If the file has neither form.
    """
    content = read_json(file)
    try:
        if "results" in content:
            results = [
                (task, task, name.partition(",")[0], None, value)
                for task, metrics in content["results"].items()
                for name, value in metrics.items()
                if isinstance(value, (int, float)) and "_stderr" not in name and math.isfinite(value)
            ]
        else:
            results = [
                (DRAWN_SCENES, DRAWN_SCENES, "exact_match", f"exact match: {suite}", right / asked)
                for suite, kinds in content.items()
                for right, asked in [(kinds["all"]["right"], kinds["all"]["asked"])]
            ]
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{file} should hold lmms-eval's `results`, or `asked` and `right` of every suite and kind of question."
        ) from error
    fields = ("dataset_type", "dataset_name", "metric_type", "metric_name", "metric_value")
    return [EvalResult(task_type=TASK, **dict(zip(fields, result, strict=True))) for result in results]


def _widget(example: Example) -> dict[str, Any]:
    output = {} if example.answer is None else {"output": {"text": example.answer}}
    return {"text": example.question, "src": example.image, **output}


def _show_bytes(number: float) -> str:
    """A size with three digits, such as 6.39 GB."""
    for unit in ("B", "kB", "MB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def _license(license_id: str | None, bases: list[str] | None) -> str:
    known = (
        "The licence of the weights is not stated" if license_id is None else f"Licence of the weights: {license_id}"
    )
    return f"{known}. Those of {' and '.join(bases)} apply as well." if bases else f"{known}."


def _results_table(results: list[EvalResult]) -> str:
    if not results:
        return ""
    rows = [
        f"| {result.dataset_name} | {result.metric_name or result.metric_type} | {result.metric_value:.4g} |"
        for result in results
    ]
    return "\n".join(["", "## Results", "", "| data set | metric | value |", "|---|---|---:|", *rows, ""])


def _base_models(config: FlashSlothConfig) -> list[str] | None:
    """The released base models whose sizes the config has."""
    released, text, vision = FlashSlothConfig(), config.text_config, config.vision_config
    bases = []
    fields = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    if all(getattr(text, field) == getattr(released.text_config, field) for field in fields):
        bases.append(PHI_2_ID)
    fields = ("model_type", "hidden_size", "num_hidden_layers", "image_size", "patch_size")
    if all(getattr(vision, field) == getattr(released.vision_config, field) for field in fields):
        bases.append(SIGLIP_ID)
    return bases or None
