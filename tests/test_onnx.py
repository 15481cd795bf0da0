"""ONNX graphs match the model for any number of rows, tiles and tokens."""

import copy
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_alone
from torch import nn

from flashsloth.cli import main
from flashsloth.cli import onnx as graphs
from flashsloth.cli.repository import RepositoryError

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
    patches, tokens = graphs.VisionGraph(model)(batch["pixel_values"])
    prompt = (batch["input_ids"], batch["attention_mask"])
    own, other = (graphs.DecoderGraph(model)(*prompt, patches, given)[0] for given in (tokens, -tokens))
    torch.testing.assert_close(own, model(**batch).logits[:, -1])
    assert not torch.equal(own, other)


@pytest.mark.slow
def test_logits_are_the_models(exported, onnx_model, model, batches):
    assert max(exported.differences.values()) < 1e-5
    for batch in batches:
        ids, mask, tiles = onnx_model._prepare(as_arrays(batch))
        features = onnx_model.vision.run(None, {"pixel_values": tiles})
        found = onnx_model._run(onnx_model.decoder, ids, mask, *features)[0]
        with torch.no_grad():
            expected = model(**batch).logits[:, -1].numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


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
def test_graphs_that_differ_from_the_model_are_refused(exported, model, processor):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embedded_query.out_proj.weight.mul_(2)
        inputs = graphs._build_inputs(processor, ["What?"])
        with pytest.raises(RepositoryError, match=r"decoder\.onnx differs from the model by .* but at most 1e-04"):
            graphs._compare(other, inputs, exported.output)


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
    assert main(["onnx", str(ROOT), str(tmp_path / "graphs")]) == 0
    output, progress = capsys.readouterr()
    assert output.count("\n") == output.count("differs") == 3
    steps = ("vision.onnx:", "decoder.onnx:", "decoder_step.onnx:", "comparing with the model:", "100%")
    assert all(step in progress for step in steps)
    (tmp_path / "script.py").write_text(WITHOUT_PACKAGE)
    for image, question, answer in (
        ("scene.png", "Read the sign.", "PULL"),
        ("shapes.png", "Describe the picture.", "a yellow star top left, an orange square top right"),
    ):
        arguments = [SCRIPT, tmp_path / "graphs", ROOT / "examples" / image, question]
        assert run_alone(tmp_path / "script.py", *arguments, folder=tmp_path).startswith(answer)
