"""ONNX graphs match the model for any number of rows, tiles and tokens."""

import copy
import re
import runpy
import sys
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from processes import run_alone
from torch import nn

from flashsloth.cli import main
from flashsloth.cli import onnx as graphs
from flashsloth.cli.onnx_dtypes import NUM_FREE_BYTES
from flashsloth.cli.repository import RepositoryError
from flashsloth.saliency_flashsloth import pooling_to_patches

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "ask_onnx.py"
WITHOUT_PACKAGE = """
import runpy
import sys

sys.modules["flashsloth"] = None  # as if the package were not installed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def exported(model, processor, tmp_path_factory):
    return graphs.export_onnx(model, processor, tmp_path_factory.mktemp("onnx") / "graphs")


@pytest.fixture(scope="module")
def onnx_model(exported):
    return runpy.run_path(str(SCRIPT))["OnnxFlashSloth"](exported.output)


@pytest.fixture
def batches(images, ask):
    """Batches whose sizes differ from those of the traced inputs."""
    return [
        ask([(images[:1], "What is it?")]),
        ask([(images[:1], "Which?")], [(images[1:4], "And these three?")], [([], "Who are you?")]),
        ask([(images[:1], "First?", "yes"), ([], "And the second one?")]),
        ask([(images[:1], "What is it?")], images_kwargs={"do_image_splitting": True}),
        ask([([], "Hello there, who are you?")]),
    ]


def as_arrays(batch):
    return {name: tensor.numpy() for name, tensor in batch.items()}


@torch.no_grad()
def test_the_decoder_graph_reads_the_image_tokens_that_it_is_given(model, ask, images):
    batch = ask([(images[:1], "What is it?")])
    patches, tokens, _ = graphs.VisionGraph(model)(batch["pixel_values"])
    prompt = (batch["input_ids"], batch["attention_mask"])
    past = (torch.zeros(1, dtype=torch.long), graphs._blank_cache(model, 1, 0))
    own, other = (graphs.DecoderGraph(model)(*prompt, patches, given, *past)[0] for given in (tokens, -tokens))
    torch.testing.assert_close(own, model(**batch).logits[:, -1])
    assert not torch.equal(own, other)


@pytest.mark.slow
def test_logits_are_the_models(exported, onnx_model, model, batches):
    assert max(exported.differences.values()) < 1e-5
    for batch in batches:
        ids, mask, tiles = onnx_model._prepare(as_arrays(batch))
        *features, _ = onnx_model.vision.run(None, {"pixel_values": tiles})
        past = (np.zeros(len(ids), np.int64), *onnx_model._empty_cache(len(ids)))
        found = onnx_model._run(onnx_model.decoder, ids, mask, *features, *past)[0]
        with torch.no_grad():
            expected = model(**batch).logits[:, -1].numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.fixture
def two_turns(images, ask):
    """Conversations of two questions each, whose rows have different numbers of images, also in the second turn."""
    return ask(
        [(images[:1], "What is it?", "A thing."), ([], "Why?")],
        [(images[1:4], "And these three?", "They are things."), (images[:1], "And this?")],
        [([], "Who are you?", "Nobody."), (images[1:2], "Really?")],
    )


@pytest.mark.slow
@torch.no_grad()
def test_a_second_question_continues_from_the_cache(onnx_model, model, two_turns):
    for row in range(len(two_turns["input_ids"])):
        kept = two_turns["attention_mask"][row].bool()
        ids = two_turns["input_ids"][row : row + 1, kept]
        tiles_before = (two_turns["input_ids"][:row] == model.config.image_token_id).sum()
        num_tiles = (ids == model.config.image_token_id).sum() // model.config.image_seq_length
        first = int(tiles_before) // model.config.image_seq_length
        tiles = two_turns["pixel_values"][first : first + int(num_tiles)]
        expected = model(input_ids=ids, pixel_values=tiles, output_attentions=True)
        *features, _ = onnx_model.vision.run(None, {"pixel_values": tiles.numpy()})
        end = int((ids[0] == model.config.query_token_id).nonzero()[model.config.num_query_tokens - 1]) + 1
        num_cached = int((ids[0, :end] == model.config.image_token_id).sum()) // model.config.image_seq_length
        mask = np.ones_like(ids.numpy())
        none, empty = np.zeros(1, np.int64), onnx_model._empty_cache(1)
        _, _, *past = onnx_model._run(onnx_model.decoder, ids[:, :end].numpy(), mask[:, :end], *features, none, *empty)
        logits, attention, *_ = onnx_model._run(
            onnx_model.decoder, ids[:, end:].numpy(), mask, *features, np.array([num_cached]), *past
        )
        np.testing.assert_allclose(logits, expected.logits[:, -1].numpy(), atol=1e-4, rtol=0)
        is_query = (ids[0, end:] == model.config.query_token_id).numpy()
        theirs = expected.query_attentions[-1].mean(dim=0).numpy()
        np.testing.assert_allclose(attention[0, is_query], theirs, atol=1e-5, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_pooling_weights_are_the_models(onnx_model, model, ask, images):
    batch = ask([(images[:2], "What is it?")])
    expected = model(**batch, output_attentions=True).pooling_attentions
    found = onnx_model.vision.run(["pooling_attentions"], {"pixel_values": batch["pixel_values"].numpy()})[0]
    np.testing.assert_allclose(found, pooling_to_patches(expected).numpy(), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_greedy_answers_are_the_models(onnx_model, model, batches):
    for batch in batches:
        expected = model.generate(**batch, max_new_tokens=12)[:, batch["input_ids"].shape[1] :].numpy()
        found = onnx_model.generate(as_arrays(batch), max_new_tokens=12)
        for row, answer in zip(found, expected, strict=True):
            ends = np.flatnonzero(answer == model.generation_config.eos_token_id)
            length = ends[0] + 1 if len(ends) else len(answer)
            assert row[:length].tolist() == answer[:length].tolist()


@pytest.mark.slow
def test_the_decoders_weights_are_stored_once(exported, model):
    names = {file.name for file in exported.output.glob("*.onnx*")}
    assert names == {"vision.onnx", "vision.onnx.data", "decoder.onnx", "decoder.onnx.data", "decoder_step.onnx"}
    step = onnx.load(exported.output / "decoder_step.onnx", load_external_data=False)
    num_own_bytes = sum(len(tensor.raw_data) for tensor in step.graph.initializer)
    num_bytes = 4 * sum(parameter.numel() for parameter in model.model.language_model.parameters())
    assert num_own_bytes < 0.1 * num_bytes < (exported.output / "decoder.onnx.data").stat().st_size


@pytest.mark.slow
def test_graphs_name_no_file_of_the_machine_that_exported_them(exported):
    for file in exported.output.glob("*.onnx"):
        assert not re.search(rb"\.py\b|File \"|stack_trace", file.read_bytes()), file


@pytest.fixture(scope="module", params=["float16", "int8", "int4"])
def converted(request, exported, model, processor, tmp_path_factory):
    """Graphs in another type, their type, and their differences from the model."""
    folder = tmp_path_factory.mktemp(request.param)
    graphs.convert_graphs(exported.output, folder, request.param)
    for part in (model.config, model.generation_config, processor):
        part.save_pretrained(folder)
    with torch.no_grad():
        return folder, request.param, graphs._compare(model, processor, folder, tolerance=None)


@pytest.mark.slow
def test_other_types_are_close_to_the_model(converted):
    _, dtype, differences = converted
    limit = {"float16": 5e-3, "int8": 0.1, "int4": 1.0}[dtype]
    assert 0 < max(differences.values()) < limit
    assert differences.keys() == {"vision.onnx", "decoder.onnx", "decoder_step.onnx"}


@pytest.mark.slow
def test_other_types_are_smaller_and_share_weights(converted, exported):
    folder, _, _ = converted
    names = {file.name for file in folder.glob("*.onnx*")}
    assert names == {"vision.onnx", "vision.onnx.data", "decoder.onnx", "decoder.onnx.data", "decoder_step.onnx"}
    decoder, vision = (folder / f"{name}.onnx.data" for name in ("decoder", "vision"))
    for file in (decoder, vision):
        assert file.stat().st_size < 0.7 * (exported.output / file.name).stat().st_size
    step = onnx.load(folder / "decoder_step.onnx", load_external_data=False)
    assert max(len(tensor.raw_data) for tensor in step.graph.initializer) <= NUM_FREE_BYTES


@pytest.mark.slow
def test_other_types_keep_the_graphs_inputs_and_outputs(converted, onnx_model):
    folder, _, _ = converted
    other = runpy.run_path(str(SCRIPT))["OnnxFlashSloth"](folder)
    for name in ("vision", "decoder", "step"):
        for entries in ("get_inputs", "get_outputs"):
            ours, theirs = (
                [(entry.name, entry.type, len(entry.shape)) for entry in getattr(getattr(graph, name), entries)()]
                for graph in (other, onnx_model)
            )
            assert ours == theirs


@pytest.mark.slow
def test_products_are_stored_in_bits_and_tables_in_float16(exported, model, tmp_path):
    graphs.convert_graphs(exported.output, tmp_path, "int4")
    decoder = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in decoder.node]
    num_linear = sum(
        isinstance(module, nn.Linear)
        for part in (model.model.language_model, model.model.embedded_query)
        for module in part.modules()
    )
    assert kinds.count("MatMulNBits") == num_linear + 1  # the head
    shapes = {tuple(tensor.dims): tensor.data_type for tensor in decoder.initializer}
    table = model.get_input_embeddings().weight.shape
    assert shapes[tuple(table)] == onnx.TensorProto.FLOAT16


@pytest.mark.slow
def test_values_that_exceed_a_type_are_refused(exported, model, processor, tmp_path):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.multi_modal_projector.linear_1.weight.mul_(1e4)
        other.model.multi_modal_projector.linear_2.weight.mul_(1e4)
    with pytest.raises(RepositoryError, match=r"not finite.*choose another `dtype`"):
        graphs.export_onnx(other, processor, tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_graphs_that_differ_from_the_model_are_refused(exported, model, processor):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embedded_query.out_proj.weight.mul_(2)
        with pytest.raises(RepositoryError, match=r"decoder\.onnx differs from the model by .* but at most 1e-04"):
            graphs._compare(other, processor, exported.output, tolerance=graphs.TOLERANCE)


def test_not_a_number_is_a_difference():
    ones, mask = torch.ones(1, 2), torch.ones(1, 2)
    for place in range(3):
        found = [np.ones((1, 2), np.float32) for _ in range(3)]
        found[place][0, 1] = np.nan
        assert np.isnan(graphs._difference(found, [ones] * 3, mask))
    assert graphs._difference([np.ones((1, 2), np.float32)], [ones], mask) == 0


class ReadsValues(nn.Module):
    """Cannot be exported: its control flow depends on values."""

    def forward(self, states):
        return states if states.sum() > 0 else -states


@pytest.mark.slow
def test_a_model_that_cannot_be_exported_is_refused(model, processor, tmp_path):
    other = copy.deepcopy(model)
    other.model.multi_modal_projector.act = ReadsValues()
    with pytest.raises(RepositoryError, match=r"torch\.onnx cannot export this model"):
        graphs.export_onnx(other, processor, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(monkeypatch, model, processor, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RepositoryError, match=r"pip install onnx onnxruntime onnxscript"):
        graphs.export_onnx(model, processor, tmp_path / "out")


@pytest.mark.slow
def test_the_shipped_checkpoint_answers_without_the_package(tmp_path, capsys):
    assert main(["onnx", str(ROOT), str(tmp_path / "graphs"), "--dtype", "int8"]) == 0
    output, progress = capsys.readouterr()
    assert output.count("\n") == output.count("differs") == 3
    steps = ("vision.onnx:", "decoder.onnx:", "decoder_step.onnx:", "converting to int8:", "comparing", "100%")
    assert "INFO" not in progress
    assert all(step in progress for step in steps)
    (tmp_path / "script.py").write_text(WITHOUT_PACKAGE)
    for image, question in (("scene.png", "Read the sign."), ("shapes.png", "Describe the picture.")):
        arguments = [str(ROOT / "examples" / image), question]
        assert main(["ask", *arguments]) == 0
        answer = capsys.readouterr().out
        assert run_alone(tmp_path / "script.py", SCRIPT, tmp_path / "graphs", *arguments, folder=tmp_path) == answer


@pytest.mark.slow
def test_the_browsers_benchmark_times_an_answer_without_the_encoding(tmp_path, monkeypatch):
    from onnxruntime import InferenceSession

    assert main(["onnx", str(ROOT), str(tmp_path / "graphs")]) == 0
    run_graph, encoded = InferenceSession.run, []

    def counted(session, names, feed, *args):
        encoded.extend(["pixel_values"] * ("pixel_values" in feed))
        return run_graph(session, names, feed, *args)

    monkeypatch.setattr(InferenceSession, "run", counted)
    for run in (browser.time_torch(torch.float32), browser.time_onnxruntime(tmp_path / "graphs")):
        assert min(run()) > 0
    assert len(encoded) == 1  # the answers of one token and of all begin with the encoded image
