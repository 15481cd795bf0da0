"""Export of a FlashSloth to ONNX graphs for onnxruntime.

    pixel_values ─ vision.onnx ─ patch_features, image_tokens
    input_ids, attention_mask, patch_features, image_tokens ─ decoder.onnx ─ logits, cache
    input_ids (one per row), attention_mask, cache ─ decoder_step.onnx ─ logits, cache

The numbers of rows, tiles and tokens are dynamic. Before the folder appears, the outputs of onnxruntime are compared
with the model's, on a batch of other sizes than the graphs were traced with. Both decoder graphs share one weight file.
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
TOLERANCE = 1e-4  # relative to the largest value
NUM_CHECKED_STEPS = 3
NUM_STEPS = 4  # three graphs and the comparison
BYTES_PER_WEIGHT = 4


class OnnxExport(NamedTuple):
    """Summary of an export.

    Attributes:
        output: Folder that was written.
        differences: Largest difference of each graph from the model, relative to the largest value.
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
    """Decoder with the Embedded Query module, for the prefill."""

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
        """Logits after the prompt, `(batch, vocab_size)`, then the keys and values of every layer."""
        inner = self.model.model
        # The vision graph has pooled and projected the patches, and `forward` takes no image tokens: it would repeat
        # both in the decoder's graph. So this instance returns the given ones while the graph is traced.
        inner._to_image_tokens = lambda _: image_tokens
        try:
            return _run(self.model, DynamicCache(), input_ids, attention_mask, patch_features=patch_features)
        finally:
            del inner._to_image_tokens


class StepGraph(nn.Module):
    """Decoder, for a decoding step, which reads one token per row and the KV cache."""

    def __init__(self, model: FlashSlothForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Logits after the token, `(batch, vocab_size)`, then the keys and values of every layer."""
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
    """Write the graphs of a model in float32, with its configs and processor.

    Args:
        model: The model, on the CPU. It is converted to float32 in place.
        processor: Its processor.
        output: Folder to write. It must be empty or not exist, and appears only once it is complete.
        progress: Whether to show on stderr which graph is being written.

    Returns:
        A summary, with the graphs' differences from the model.

    Raises:
        RepositoryError: If a package is missing, the output is in use, the model cannot be exported, or the results of
            onnxruntime differ from the model's.
    """
    output = unused_folder(output)
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RepositoryError(
            "ONNX export requires further packages: pip install onnx onnxruntime onnxscript"
        ) from error
    # It warns about missing torchvision operators, which are not needed.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
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
        except Exception as error:  # a layer that cannot be exported can raise anything
            reason = first_line(error)
            raise RepositoryError(
                f"torch.onnx cannot export this model ({type(error).__name__}: {reason}); nothing was written."
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
    """A batch with one conversation per question, each about two images of noise; `None`: one without images."""
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
        processor.encode_conversations(conversations, padding=True, images_kwargs={"do_image_splitting": False})
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
    _save_sharing_weights(step, folder / STEP, folder / DECODER)
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
    """Running maximum of every row, for which ONNX has no operator. The second output, the indices, is not used."""
    from onnxscript import opset18 as op

    length = op.Squeeze(op.Shape(states, start=1, end=2))
    positions = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
    is_seen = op.LessOrEqual(op.Unsqueeze(positions, [0]), op.Unsqueeze(positions, [1]))
    seen = op.Where(is_seen, op.Unsqueeze(states, [1]), op.ReduceMin(states))
    largest = op.ReduceMax(seen, [2], keepdims=0)
    return largest, largest


def _save_sharing_weights(program: Any, file: Path, other: Path) -> None:
    """Save a graph that refers to the weights of another graph in the same folder instead of storing its own."""
    import onnx_ir

    stored = (value.const_value for value in onnx_ir.load(other).graph.initializers.values())
    known = {_content_key(tensor): tensor for tensor in stored if isinstance(tensor, onnx_ir.ExternalTensor)}
    for value in program.model.graph.initializers.values():
        value.const_value = known.get(_content_key(value.const_value), value.const_value)
    onnx_ir.save(program.model, file)


def _content_key(tensor: Any) -> tuple:
    """A key that equal tensors share, because their names differ between the graphs."""
    return tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()


def _compare(
    model: FlashSlothForConditionalGeneration, inputs: dict[str, torch.Tensor], folder: Path
) -> dict[str, float]:
    """Run the graphs and the model on the same inputs.

    Returns:
        Largest difference of each graph from the model, relative to the largest value.

    Raises:
        RepositoryError: If a difference exceeds `TOLERANCE`.
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
            f"{name} differs from the model by {difference:.1e} of the largest value, but at most {TOLERANCE:.0e} is "
            "allowed: this model cannot be exported correctly; nothing was written."
        )
    return differences


def _run_graph(file: Path, *inputs: torch.Tensor) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})


def _difference(found: list[np.ndarray], expected: Iterable[torch.Tensor], mask: torch.Tensor) -> float:
    """Largest difference, relative to the largest value. Keys and values of padding are ignored; NaN gives NaN."""
    largest = 0.0
    for ours, tensor in zip(found, expected, strict=True):
        theirs = tensor.numpy()
        if ours.shape != theirs.shape:
            return float("inf")
        is_cache = ours.ndim == 4
        kept = mask.bool().numpy()[:, None, :, None] if is_cache else np.True_
        difference = np.where(kept, abs(ours - theirs), 0).max() / max(abs(theirs).max(), np.finfo(np.float32).tiny)
        largest = np.maximum(largest, difference)  # unlike `max`, it propagates NaN
    return float(largest)
