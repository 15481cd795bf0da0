"""ONNX graphs of a FlashSloth, for onnxruntime.

    pixel_values ─ vision.onnx ─ patch_features, image_tokens
    input_ids, attention_mask, patch_features, image_tokens ─ decoder.onnx ─ logits, cache
    input_ids (one a row), attention_mask, cache ─ decoder_step.onnx ─ logits, cache

Numbers of rows, tiles and tokens are free. Before the folder appears, onnxruntime must give what the model gives, on
other numbers than the graphs were traced with. Both graphs of the decoder read their weights from one file.
"""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache

from ..modeling_flashsloth import FlashSlothForConditionalGeneration
from ..processing_flashsloth import FlashSlothProcessor
from . import first_line
from .repository import RepositoryError, complete_or_absent, unused_folder

VISION, DECODER, STEP = "vision.onnx", "decoder.onnx", "decoder_step.onnx"
TOLERANCE = 1e-4  # of the largest value
NUM_CHECKED_STEPS = 3
NUM_STEPS = 4  # three graphs, and the comparison
BYTES_PER_WEIGHT = 4


class OnnxExport(NamedTuple):
    """What was written.

    Attributes:
        output: The folder.
        differences: For every graph, the largest difference from the model, as a share of the largest value.
    """

    output: Path
    differences: dict[str, float]


class VisionGraph(nn.Module):
    """Vision tower, pooling and projector."""

    def __init__(self, model: FlashSlothForConditionalGeneration) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch features and image tokens of tiles."""
        features = self.model.get_image_features(pixel_values)
        return features.last_hidden_state, features.pooler_output


class DecoderGraph(nn.Module):
    """Decoder with Embedded Query module, reading a prompt."""

    def __init__(self, model: FlashSlothForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        patch_features: torch.Tensor,
        image_tokens: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Logits behind the prompt, `(batch, vocab_size)`, then keys and values of every layer."""
        inner = self.model.model
        inner._pool = lambda _: image_tokens  # which the other graph has pooled and projected
        try:
            return _run(self.model, DynamicCache(), input_ids, attention_mask, patch_features=patch_features)
        finally:
            del inner._pool


class StepGraph(nn.Module):
    """Decoder, reading one token a row behind a cache."""

    def __init__(self, model: FlashSlothForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Logits behind the token, `(batch, vocab_size)`, then keys and values of every layer."""
        cache = DynamicCache()
        for layer_idx, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer_idx)
        return _run(self.model, cache, input_ids, attention_mask)


def export_onnx(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    output: str | Path,
    *,
    progress: bool = False,
) -> OnnxExport:
    """Write the graphs of a model, in float32, with its processor and configs.

    Args:
        model: The model, on the CPU; it is converted to float32.
        processor: Its processor.
        output: Folder to write, which must not exist or be empty. It appears when it is complete.
        progress: Whether to show on stderr which graph is being written.

    Returns:
        What was written, and how exact it is.

    Raises:
        RepositoryError: If a package is missing, the output is in use, the exporter cannot carry the model, or
            onnxruntime gives other results than the model.
    """
    output = unused_folder(output)
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RepositoryError('ONNX graphs need further packages: pip install "flashsloth[onnx]"') from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # else it says which operators torchvision would have
    model = model.float().eval()
    with (
        complete_or_absent(output, 2 * BYTES_PER_WEIGHT * model.num_parameters()) as partial,
        torch.no_grad(),
        tqdm(total=NUM_STEPS, unit="step", disable=not progress) as bar,
    ):
        try:
            _write_graphs(model, _build_inputs(processor, ["What is on the left?", None]), partial, bar)
        except RepositoryError:
            raise
        except Exception as error:  # the exporter raises what the layer raises that it cannot carry
            reason = first_line(error)
            raise RepositoryError(
                f"the exporter cannot carry this model ({type(error).__name__}: {reason}); nothing was written."
            ) from error
        bar.set_description("comparing with the model")
        differences = _compare(model, _build_inputs(processor, ["What?", "How many are there?"]), partial)
        bar.update()
        for part in (model.config, model.generation_config, processor):
            part.save_pretrained(partial)
    return OnnxExport(output, differences)


def _run(
    model: FlashSlothForConditionalGeneration,
    cache: DynamicCache,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    **images: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    positions = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    outputs = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        cache=cache,
        use_cache=True,
        logits_to_keep=1,
        **images,
    )
    return outputs.logits[:, 0], *(states for layer in cache.layers for states in (layer.keys, layer.values))


def _build_inputs(processor: FlashSlothProcessor, questions: Iterable[str | None]) -> dict[str, torch.Tensor]:
    """A batch of one conversation for each question, with two noisy images; None: text without images."""
    size = processor.image_processor.size
    rng = np.random.default_rng(0)
    conversations = []
    for question in questions:
        shape = (0 if question is None else 2, size["height"], size["width"], 3)
        images = [Image.fromarray(noise) for noise in rng.integers(256, size=shape, dtype=np.uint8)]
        content = [{"type": "image", "image": image} for image in images]
        conversations.append(
            [{"role": "user", "content": [*content, {"type": "text", "text": question or "Why?"}]}],
        )
    return dict(
        processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "images_kwargs": {"do_image_splitting": False}},
        )
    )


def _write_graphs(
    model: FlashSlothForConditionalGeneration, inputs: dict[str, torch.Tensor], folder: Path, bar: tqdm
) -> None:
    prompt = (inputs["input_ids"], inputs["attention_mask"])
    tiles, row, length = {0: "num_tiles"}, {0: "batch"}, {0: "batch", 1: "length"}
    bar.set_description(VISION)
    vision = _export(
        VisionGraph(model), (inputs["pixel_values"],), (tiles,), ["pixel_values"], ["patch_features", "image_tokens"]
    )
    vision.save(folder / VISION, external_data=True)
    bar.update()
    bar.set_description(DECODER)
    features = VisionGraph(model)(inputs["pixel_values"])
    _, *cache = DecoderGraph(model)(*prompt, *features)
    names = [f"{{}}.{number // 2}.{('key', 'value')[number % 2]}" for number in range(len(cache))]
    present, past = ([name.format(kind) for name in names] for kind in ("present", "past"))
    texts = ["input_ids", "attention_mask"]
    decoder = _export(
        DecoderGraph(model),
        (*prompt, *features),
        (length, length, tiles, tiles),
        [*texts, "patch_features", "image_tokens"],
        ["logits", *present],
    )
    decoder.save(folder / DECODER, external_data=True)
    bar.update()
    bar.set_description(STEP)
    step = _export(
        StepGraph(model),
        (prompt[0][:, -1:], nn.functional.pad(prompt[1], (0, 1), value=1), cache),
        (row, {0: "batch", 1: "total_length"}, [{0: "batch", 2: "past_length"}] * len(cache)),
        [*texts, *past],
        ["logits", *present],
    )
    _save_beside(step, folder / STEP, folder / DECODER)
    bar.update()


def _export(graph: nn.Module, inputs: tuple, shapes: tuple, names: list[str], outputs: list[str]) -> Any:
    return torch.onnx.export(
        graph.eval(),
        inputs,
        input_names=names,
        output_names=outputs,
        dynamic_shapes=shapes,
        dynamo=True,
        verbose=False,
        custom_translation_table={torch.ops.aten.cummax.default: _cummax},
    )


def _cummax(states: Any, dim: int) -> tuple[Any, Any]:
    """Largest value so far in every row, which ONNX has no operator for; its indices, which are not used, are wrong."""
    from onnxscript import opset18 as op

    length = op.Squeeze(op.Shape(states, start=1, end=2))
    positions = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
    is_seen = op.LessOrEqual(op.Unsqueeze(positions, [0]), op.Unsqueeze(positions, [1]))
    seen = op.Where(is_seen, op.Unsqueeze(states, [1]), op.ReduceMin(states))
    largest = op.ReduceMax(seen, [2], keepdims=0)
    return largest, largest


def _save_beside(program: Any, file: Path, other: Path) -> None:
    """Save a graph whose weights are those of a graph that lies beside it, without writing them again."""
    import onnx_ir

    stored = (value.const_value for value in onnx_ir.load(other).graph.initializers.values())
    known = {_identity(tensor): tensor for tensor in stored if isinstance(tensor, onnx_ir.ExternalTensor)}
    for value in program.model.graph.initializers.values():
        value.const_value = known.get(_identity(value.const_value), value.const_value)
    onnx_ir.save(program.model, file)


def _identity(tensor: Any) -> tuple:
    """What equal tensors have in common; their names differ from graph to graph."""
    return tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()


def _compare(
    model: FlashSlothForConditionalGeneration, inputs: dict[str, torch.Tensor], folder: Path
) -> dict[str, float]:
    """Run the graphs and the model on the same inputs.

    Raises:
        RepositoryError: If they do not agree.
    """
    mask = inputs["attention_mask"]
    expected = VisionGraph(model)(inputs["pixel_values"])
    found = _run_graph(folder / VISION, inputs["pixel_values"])
    differences = {VISION: _difference(found, expected, mask)}
    found = _run_graph(folder / DECODER, inputs["input_ids"], mask, *expected)
    expected = DecoderGraph(model)(inputs["input_ids"], mask, *expected)
    differences |= {DECODER: _difference(found, expected, mask), STEP: 0.0}
    for _ in range(NUM_CHECKED_STEPS):
        ids, mask = expected[0].argmax(dim=-1, keepdim=True), nn.functional.pad(mask, (0, 1), value=1)
        found = _run_graph(folder / STEP, ids, mask, *expected[1:])
        expected = StepGraph(model)(ids, mask, list(expected[1:]))
        differences[STEP] = float(np.maximum(differences[STEP], _difference(found, expected, mask)))
    if wrong := {name: difference for name, difference in differences.items() if not difference <= TOLERANCE}:
        name, difference = next(iter(wrong.items()))
        raise RepositoryError(
            f"{name} gives other results than the model, by {difference:.1e} of the largest value, where "
            f"{TOLERANCE:.0e} is allowed: the exporter did not carry this model; nothing was written."
        )
    return differences


def _run_graph(file: Path, *inputs: torch.Tensor) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})


def _difference(found: list[np.ndarray], expected: Iterable[torch.Tensor], mask: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value, where it matters: padding's keys and values do not.

    It is NaN if there is one.
    """
    largest = 0.0
    for ours, tensor in zip(found, expected, strict=True):
        theirs = tensor.numpy()
        if ours.shape != theirs.shape:
            return float("inf")
        is_cache = ours.ndim == 4
        kept = mask.bool().numpy()[:, None, :, None] if is_cache else np.True_
        difference = np.where(kept, abs(ours - theirs), 0).max() / max(abs(theirs).max(), np.finfo(np.float32).tiny)
        largest = np.maximum(largest, difference)  # `max` would pass over NaN
    return float(largest)
