"""Model card of a FlashSloth checkpoint."""

import math
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_flashsloth import FlashSlothConfig
from ..image_processing_flashsloth import NUM_HD_TILES
from .repository import read_json

PHI_2_ID = "microsoft/phi-2"
SIGLIP_ID = "google/siglip-so400m-patch14-384"
TASK = "image-text-to-text"
DRAWN_SCENES = "drawn-scenes"

CONVERTED = "The weights are those of the original release, converted by `flashsloth convert`; no number was changed."

INITIALISED = """Made by `flashsloth init` from the pretrained {tower} and {decoder}, whose weights are unchanged, but
for {num_new_rows} rows that were added to the vocabulary. Pooling, projector, query tokens and Embedded Query module
are freshly initialised: **train it before you use it.** The licences of both models apply."""

CARD = """---
{metadata}
---

# {name}

FlashSloth (arXiv [2412.04317](https://arxiv.org/abs/2412.04317)): a vision-language model whose decoder sees an image
as {num_image_tokens} tokens, and looks back at its {num_patches} patches when it is asked.

| | |
|---|---|
| Parameters | {num_parameters:,} |
| Decoder | {text_type}, {num_layers} layers of width {hidden_size} |
| Vision tower | {vision_type}, {num_vision_layers} layers, {image_size} px |
| Tiles of an image | {num_tiles}{variant} |
| Type of the weights | {dtype} |

{origin}
{results}
## Use

The code lies in this repository, so nothing beside transformers (5.17 or later) is needed. `trust_remote_code=True`
runs it; with `revision="COMMIT"` what runs is what was read at that commit:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model_id = "{name}"  # this repository's folder or Hub id
processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(model_id, trust_remote_code=True)

content = [{{"type": "image", "path": "image.jpg"}}, {{"type": "text", "text": "What is in the picture?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=256)[:, inputs["input_ids"].shape[1] :]
sentence = processor.post_process_image_text_to_text(answer)[0]
```

With the package `flashsloth` installed, leave `trust_remote_code` out, or ask from the shell:

```sh
flashsloth ask image.jpg "What is in the picture?" --model {name}
```
"""


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
    examples: list[tuple[str, str]] | None = None,
) -> ModelCard:
    """Write the model card of a checkpoint.

    Args:
        config: The checkpoint's config.
        name: What the card calls the model.
        dtype: Type of the weights, such as `float16`.
        num_parameters: Number of parameters.
        do_image_splitting: Whether images are cut into five tiles.
        origin: Where the weights come from, in a sentence.
        base_models: Hub ids of the models that this one grew from. Default: as far as the sizes tell.
        license_id: The weights' licence, by the name that the Hub has for it; `None`: not known.
        results: What `read_results` read.
        examples: Images, as paths in the repository or URLs, and questions for the Hub's widget.
    """
    text, vision = config.text_config, config.vision_config
    metadata = ModelCardData(
        license=license_id,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["custom_code", "flashsloth"],
        base_model=_base_models(config) if base_models is None else base_models or None,
        model_name=name if results else None,
        eval_results=results or None,
        widget=[{"text": question, "src": image} for image, question in examples or ()] or None,
    )
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
            origin=origin,
            results=_results_table(results or []),
        )
    )


def read_results(file: Path) -> list[EvalResult]:
    """Evaluation results, from what `examples/tiny/score.py` or lmms-eval wrote.

    Args:
        file: A JSON file: counts of `asked` and `right` for every kind of question, or lmms-eval's `results`.

    Raises:
        ValueError: If it is neither.
    """
    content = read_json(file)
    try:
        if "results" in content:
            results = [
                (task, None, task, name.partition(",")[0], value)
                for task, metrics in content["results"].items()
                for name, value in metrics.items()
                if isinstance(value, (int, float)) and "_stderr" not in name and math.isfinite(value)
            ]
        else:
            results = [
                (DRAWN_SCENES, kind, f"{DRAWN_SCENES}: {kind}", "exact_match", counts["right"] / counts["asked"])
                for kind, counts in content.items()
            ]
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{file} should hold lmms-eval's `results`, or `asked` and `right` for every kind of question."
        ) from error
    fields = ("dataset_type", "dataset_config", "dataset_name", "metric_type", "metric_value")
    return [EvalResult(task_type=TASK, **dict(zip(fields, result, strict=True))) for result in results]


def _results_table(results: list[EvalResult]) -> str:
    if not results:
        return ""
    rows = [f"| {result.dataset_name} | {result.metric_type} | {result.metric_value:.4g} |" for result in results]
    return "\n".join(["", "## Results", "", "| data set | metric | value |", "|---|---|---:|", *rows, ""])


def _base_models(config: FlashSlothConfig) -> list[str] | None:
    """Models that this one grew from, as far as their sizes tell."""
    released, text, vision = FlashSlothConfig(), config.text_config, config.vision_config
    bases = []
    fields = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    if all(getattr(text, field) == getattr(released.text_config, field) for field in fields):
        bases.append(PHI_2_ID)
    fields = ("model_type", "hidden_size", "num_hidden_layers", "image_size", "patch_size")
    if all(getattr(vision, field) == getattr(released.vision_config, field) for field in fields):
        bases.append(SIGLIP_ID)
    return bases or None
