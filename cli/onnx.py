"""Export of a FlashSloth to ONNX graphs for onnxruntime.

    pixel_values ─ vision.onnx ─ patch_features, image_tokens, pooling_attentions
    input_ids, attention_mask, patch_features, image_tokens, num_cached_tiles, cache
      ─ decoder.onnx ─ logits, query_attentions, cache
    input_ids (one per row), attention_mask, cache ─ decoder_step.onnx ─ logits, cache

The numbers of rows, tiles and tokens are dynamic, and the cache of `decoder.onnx` may be empty. Before the folder
appears, the outputs of onnxruntime are compared with the model's, on batches of other sizes than the graphs were traced
with. Both decoder graphs share one weight file. `onnx_dtypes` stores the weights in fewer bits.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache

from ..modeling_flashsloth import FlashSlothForConditionalGeneration, QueryContext, QueryRecord
from ..processing_flashsloth import FlashSlothProcessor
from ..saliency_flashsloth import pooling_to_patches
from . import first_line
from .repository import RepositoryError, complete_or_absent, unused_folder

VISION, DECODER, STEP = "vision.onnx", "decoder.onnx", "decoder_step.onnx"
TOLERANCE = 1e-4  # of float32, relative to the largest value
NUM_CHECKED_STEPS = 3
NUM_STEPS = 4  # three graphs and the comparison; other types than float32 take two more
NUM_TRACED_PAST_TOKENS = 7
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

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Patch features and image tokens of tiles, and the weight of every patch in its pooling window.

        The weights are `(num_tiles, num_patches)`, patches row by row; each window sums to 1.
        """
        features = self.model.get_image_features(pixel_values)
        weights = self.model.spatial_attention_pooling.window_weights(features.last_hidden_state)
        return features.last_hidden_state, features.pooler_output, pooling_to_patches(weights)


class DecoderGraph(nn.Module):
    """Decoder with the Embedded Query module, for a prompt or for what follows a cached one."""

    def __init__(self, model: FlashSlothForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        patch_features: torch.Tensor,
        image_tokens: torch.Tensor,
        num_cached_tiles: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Run the decoder on at least two tokens per row.

        Args:
            input_ids: Tokens that are not cached, `(batch, length)`. They must begin at an instruction or before it.
            attention_mask: `(batch, past_length + length)`.
            patch_features: Of all tiles, cached ones included, `(num_tiles, num_patches, vision_hidden_size)`.
            image_tokens: Of the same tiles, `(num_tiles, image_seq_length, hidden_size)`.
            num_cached_tiles: Tiles of every row whose image tokens are cached, `(batch,)`.
            past: Keys and values of every layer, `(batch, num_heads, past_length, head_dim)`.

        Returns:
            Logits after the last token, `(batch, vocab_size)`; attention of every query token to the patches of its
            row, mean of all heads, `(batch, length, tiles_per_row * num_patches)`, without meaning at other positions
            and 0 beyond the row's tiles; then keys and values.
        """
        with _reading_image_tokens(self.model, image_tokens) as record:
            logits, *present = _run(
                self.model,
                _to_cache(past),
                input_ids,
                attention_mask,
                patch_features=patch_features,
                num_cached_tiles=num_cached_tiles,
            )
        return logits, record.weights.mean(dim=1), *present


class StepGraph(nn.Module):
    """Decoder, for a decoding step, which reads one token per row and the KV cache."""

    def __init__(self, model: FlashSlothForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Logits after the token, `(batch, vocab_size)`, then the keys and values of every layer."""
        return _run(self.model, _to_cache(past), input_ids, attention_mask)


@contextmanager
def _reading_image_tokens(
    model: FlashSlothForConditionalGeneration, image_tokens: torch.Tensor
) -> Iterator[QueryRecord]:
    """Make the model use the given image tokens, and record the attention of the Embedded Query module.

    The vision graph has pooled and projected the patches, and `forward` takes no image tokens: it would repeat both in
    the decoder's graph.
    """
    inner, record = model.model, QueryRecord()

    def pass_record(_module: nn.Module, args: tuple[torch.Tensor, QueryContext]) -> tuple[torch.Tensor, QueryContext]:
        return args[0], args[1]._replace(record=record)

    hook = inner.embedded_query.register_forward_pre_hook(pass_record)
    inner._to_image_tokens = lambda _: image_tokens
    try:
        yield record
    finally:
        del inner._to_image_tokens
        hook.remove()


def _to_cache(past: Sequence[torch.Tensor]) -> DynamicCache:
    cache = DynamicCache()
    for layer_idx, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
        cache.update(keys, values, layer_idx)
    return cache


def export_onnx(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    output: str | Path,
    *,
    dtype: str = "float32",
    progress: bool = False,
) -> OnnxExport:
    """Write the graphs of a model, with its configs and processor.

    Args:
        model: The model, on the CPU. It is converted to float32 in place.
        processor: Its processor.
        output: Folder to write. It must be empty or not exist, and appears only once it is complete.
        dtype: "float32", "float16", "int8" or "int4"; see `onnx_dtypes` for what they mean.
        progress: Whether to show on stderr which graph is being written.

    Returns:
        A summary, with the graphs' differences from the model in float32.

    Raises:
        RepositoryError: If a package is missing, the output is in use, the model cannot be exported, or the results of
            onnxruntime differ from the model's: in float32 by more than `TOLERANCE`, otherwise if they are not finite.
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
    is_plain = dtype == "float32"
    with (
        complete_or_absent(output, (2 if is_plain else 3) * BYTES_PER_WEIGHT * model.num_parameters()) as partial,
        torch.no_grad(),
        tqdm(total=NUM_STEPS + 2 * (not is_plain), unit="step", disable=not progress) as bar,
        tempfile.TemporaryDirectory(dir=partial.parent) as plain,
    ):
        folder = partial if is_plain else Path(plain)
        differences = _write_and_compare(model, processor, folder, bar)
        if not is_plain:
            bar.set_description(f"converting to {dtype}")
            convert_graphs(folder, partial, dtype)
            bar.update()
            bar.set_description("comparing with the model")
            differences = _compare(model, processor, partial, tolerance=None)
            bar.update()
        for part in (model.config, model.generation_config, processor):
            part.save_pretrained(partial)
    return OnnxExport(output, differences)


def _write_and_compare(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, folder: Path, bar: tqdm
) -> dict[str, float]:
    """Write the graphs in float32, and return their differences from the model."""
    try:
        _write_graphs(model, _build_inputs(processor, [["What is on the left?"], None]), folder, bar)
    except Exception as error:  # a layer that cannot be exported can raise anything
        reason = first_line(error)
        raise RepositoryError(
            f"torch.onnx cannot export this model ({type(error).__name__}: {reason}); nothing was written."
        ) from error
    bar.set_description("comparing with the model")
    differences = _compare(model, processor, folder, tolerance=TOLERANCE)
    bar.update()
    return differences


def convert_graphs(source: Path, target: Path, dtype: str) -> None:
    """Convert the graphs of a folder from float32.

    Args:
        source: Folder with the three graphs.
        target: Folder to write them to.
        dtype: "float16", "int8" or "int4"; see `onnx_dtypes`.
    """
    from .onnx_dtypes import convert_graph, save

    for name, other in ((VISION, None), (DECODER, None), (STEP, target / DECODER)):
        save(convert_graph(source / name, dtype), target / name, other)


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


def _build_inputs(
    processor: FlashSlothProcessor, conversations: Iterable[Sequence[str] | None]
) -> dict[str, torch.Tensor]:
    """A batch of conversations, each with two images of noise; `None`: one without images.

    Args:
        processor: The model's processor.
        conversations: Texts of the user and the model in turn.
    """
    size = processor.image_processor.size
    rng = np.random.default_rng(0)
    batch = []
    for texts in conversations:
        shape = (0 if texts is None else 2, size["height"], size["width"], 3)
        images = [Image.fromarray(noise) for noise in rng.integers(256, size=shape, dtype=np.uint8)]
        content: list[list[dict]] = [[{"type": "text", "text": text}] for text in texts or ["Why?"]]
        content[0][:0] = [{"type": "image", "image": image} for image in images]
        roles = ("user", "assistant") * len(content)
        batch.append([{"role": role, "content": parts} for role, parts in zip(roles, content, strict=False)])
    return dict(processor.encode_conversations(batch, padding=True, images_kwargs={"do_image_splitting": False}))


def _write_graphs(
    model: FlashSlothForConditionalGeneration, inputs: dict[str, torch.Tensor], folder: Path, bar: tqdm
) -> None:
    from .onnx_dtypes import save

    bar.set_description(VISION)
    tiles, row = {0: "num_tiles"}, {0: "batch"}
    features = ["patch_features", "image_tokens"]
    names = ["pixel_values"], [*features, "pooling_attentions"]
    save(_export(VisionGraph(model), (inputs["pixel_values"],), (tiles,), *names), folder / VISION)
    bar.update()
    bar.set_description(DECODER)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    past = _blank_cache(model, len(ids), NUM_TRACED_PAST_TOKENS)
    cache = [f"{{}}.{number // 2}.{('key', 'value')[number % 2]}" for number in range(len(past))]
    present_names, past_names = ([name.format(kind) for name in cache] for kind in ("present", "past"))
    past_shapes = [{0: "batch", 2: "past_length"}] * len(past)
    total, texts = {0: "batch", 1: "total_length"}, ["input_ids", "attention_mask"]
    decoder = _export(
        DecoderGraph(model),
        (
            ids,
            nn.functional.pad(mask, (NUM_TRACED_PAST_TOKENS, 0), value=1),
            *VisionGraph(model)(inputs["pixel_values"])[:2],
            torch.zeros(len(ids), dtype=torch.long),
            past,
        ),
        ({0: "batch", 1: "length"}, total, tiles, tiles, row, past_shapes),
        [*texts, *features, "num_cached_tiles", *past_names],
        ["logits", "query_attentions", *present_names],
    )
    save(decoder, folder / DECODER)
    bar.update()
    bar.set_description(STEP)
    step = _export(
        StepGraph(model),
        (ids[:, -1:], torch.ones(len(ids), NUM_TRACED_PAST_TOKENS + 1, dtype=torch.long), past),
        (row, total, past_shapes),
        [*texts, *past_names],
        ["logits", *present_names],
    )
    save(step, folder / STEP, folder / DECODER)
    bar.update()


def _blank_cache(model: FlashSlothForConditionalGeneration, batch_size: int, num_tokens: int) -> list[torch.Tensor]:
    """Keys and values of every layer, all zero, `(batch_size, num_heads, num_tokens, head_dim)`."""
    one = torch.ones(batch_size, 1, dtype=torch.long)
    _, *cache = _run(model, DynamicCache(), one, one)
    return [torch.zeros_like(states).repeat(1, 1, num_tokens, 1) for states in cache]


def _export(graph: nn.Module, inputs: tuple, shapes: tuple, names: list[str], outputs: list[str]) -> Any:
    program = torch.onnx.export(
        graph.eval(),
        inputs,
        input_names=names,
        output_names=outputs,
        dynamic_shapes=shapes,
        dynamo=True,
        verbose=False,
        custom_translation_table={torch.ops.aten.cummax.default: _cummax},
    )
    return program.model  # type: ignore[union-attr]


def _cummax(states: Any, dim: int) -> tuple[Any, Any]:
    """Running maximum of every row, for which ONNX has no operator. The second output, the indices, is not used."""
    from onnxscript import opset18 as op

    length = op.Squeeze(op.Shape(states, start=1, end=2))
    positions = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
    is_seen = op.LessOrEqual(op.Unsqueeze(positions, [0]), op.Unsqueeze(positions, [1]))
    seen = op.Where(is_seen, op.Unsqueeze(states, [1]), op.ReduceMin(states))
    largest = op.ReduceMax(seen, [2], keepdims=0)
    return largest, largest


def _compare(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    folder: Path,
    *,
    tolerance: float | None,
) -> dict[str, float]:
    """Run the graphs and the model on the same inputs: a batch of prompts, a few steps, and a second question.

    Returns:
        Largest difference of each graph from the model, relative to the largest value.

    Raises:
        RepositoryError: If a difference exceeds the tolerance, or is not finite.
    """
    differences = _compare_answer(model, _build_inputs(processor, [["What?"], ["How many are there?"]]), folder)
    inputs = _build_inputs(processor, [["What?", "It", "Why?"], ["What?", "It", "Where?"]])
    differences[DECODER] = _larger(differences[DECODER], _compare_second_question(model, inputs, folder))
    for name, difference in differences.items():
        if tolerance is not None and not difference <= tolerance:
            raise RepositoryError(
                f"{name} differs from the model by {difference:.1e} of the largest value, but at most "
                f"{tolerance:.0e} is allowed: this model cannot be exported correctly; nothing was written."
            )
        if not np.isfinite(difference):
            raise RepositoryError(
                f"{name} computes values that are not finite: this model exceeds the range of the type; choose "
                "another `dtype`, such as int8. Nothing was written."
            )
    return differences


def _compare_answer(
    model: FlashSlothForConditionalGeneration, inputs: dict[str, torch.Tensor], folder: Path
) -> dict[str, float]:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected = VisionGraph(model)(inputs["pixel_values"])
    found = _run_graph(folder / VISION, inputs["pixel_values"])
    differences = {VISION: _difference(found, expected, mask)}
    none, empty = torch.zeros(len(ids), dtype=torch.long), _blank_cache(model, len(ids), 0)
    features = expected[:2]
    found = _run_graph(folder / DECODER, ids, mask, *features, none, *empty)
    logits, attention, *cache = DecoderGraph(model)(ids, mask, *features, none, empty)
    found[1] = _attention_of_queries(found[1], ids == model.config.query_token_id, attention.shape[-1])
    differences |= {DECODER: _difference(found, [logits, attention, *cache], mask), STEP: 0.0}
    for _ in range(NUM_CHECKED_STEPS):
        ids, mask = logits.argmax(dim=-1, keepdim=True), nn.functional.pad(mask, (0, 1), value=1)
        found = _run_graph(folder / STEP, ids, mask, *cache)
        logits, *cache = StepGraph(model)(ids, mask, cache)
        differences[STEP] = _larger(differences[STEP], _difference(found, [logits, *cache], mask))
    return differences


def _compare_second_question(
    model: FlashSlothForConditionalGeneration, inputs: dict[str, torch.Tensor], folder: Path
) -> float:
    """Difference of the decoder's graph on what follows the first question, which is cached."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    config = model.config
    is_last = (ids == config.query_token_id).cumsum(dim=1) == config.num_query_tokens
    end = int(is_last.int().argmax(dim=1).max()) + 1
    features = VisionGraph(model)(inputs["pixel_values"])[:2]
    none = torch.zeros(len(ids), dtype=torch.long)
    _, _, *past = DecoderGraph(model)(ids[:, :end], mask[:, :end], *features, none, _blank_cache(model, len(ids), 0))
    num_tiles = (ids == config.image_token_id).sum(dim=1) // config.image_seq_length
    expected = DecoderGraph(model)(ids[:, end:], mask, *features, num_tiles, past)
    found = _run_graph(folder / DECODER, ids[:, end:], mask, *features, num_tiles, *past)
    found[1] = _attention_of_queries(found[1], ids[:, end:] == config.query_token_id, expected[1].shape[-1])
    return _difference(found, expected, mask)


def _attention_of_queries(attention: np.ndarray, query_mask: torch.Tensor, num_keys: int) -> np.ndarray:
    """Rows of the query tokens and columns of a row's own tiles, as PyTorch computes them; the rest is blank."""
    rows = attention[query_mask.numpy()].reshape(len(attention), -1, attention.shape[-1])
    return rows[..., :num_keys]


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
        largest = _larger(largest, difference)
    return float(largest)


def _larger(first: float, second: float) -> float:
    return float(np.maximum(first, second))  # unlike `max`, it propagates NaN
