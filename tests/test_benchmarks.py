"""The benchmarks measure what they say."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def training():
    return load("training")


def load(name):
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.fixture(scope="module")
def shipped():
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT, dtype=torch.float32).eval()
    return model, FlashSlothProcessor.from_pretrained(ROOT)


def test_both_models_have_the_same_size_and_other_lengths(training):
    cases = [training.Case(model, 2, False) for model in training.MODELS]
    sizes = [sum(p.numel() for p in training.build_model(case, "small", "meta").parameters()) for case in cases]
    # All patches have no pooling, which is 2 % of so small a model.
    assert 0.97 < sizes[1] / sizes[0] < 1
    lengths = [training.build_batch(case, "small", 1)["input_ids"].shape[1] for case in cases]
    assert lengths[1] - lengths[0] == 729 - 81 - 9


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_trains_what_the_stage_trains(training, stage):
    for model in training.MODELS:
        run = training.Training(training.Case(model, stage, checkpointing=True), "small", 1, "cpu")
        weights = {"projector": run.model.model.multi_modal_projector.linear_1.weight, "head": run.model.lm_head.weight}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        run.step()
        changed = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
        assert changed == {"projector"} | ({"head"} if stage == 2 else set())


def test_counted_memory_is_that_of_the_tensors_alive_at_once(training):
    with training.CountedMemory() as memory:
        a = torch.zeros(1000)
        del a
        b = torch.zeros(1000).view(10, 100)
        c = b + 1
    assert (memory.alive, memory.peak) == (8000, 8000)
    assert c.shape == b.shape


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_take_as_much_as_real_ones(training, checkpointing):
    case = training.Case("FlashSloth", 2, checkpointing)
    _, counted = training.peak_memory(case, "small", 2, "cpu")
    run = training.Training(case, "small", 2, "cpu")
    with training.CountedMemory() as memory:
        run.compute_gradients()
    assert memory.peak == pytest.approx(counted, rel=0.02)


@pytest.mark.slow
def test_the_table_compares_all_cases(training, monkeypatch):
    for part in ("text_config", "vision_config"):  # a CPU without bfloat16 takes minutes for all layers
        monkeypatch.setitem(training.SMALL[part], "num_hidden_layers", 3)
    rows = list(training.measure("small", "cpu", batch_size=1, num_steps=1))
    assert len(rows) == len(training.MODELS) * len(training.STAGES) * 2
    assert all(row["bytes"] > row["bytes_per_sample"] > 1e6 for row in rows)
    lines = training.as_table(rows).splitlines()[2:]
    ratios = [line.split("|")[7].strip() for line in lines if "| FlashSloth |" in line]
    assert ratios == ["1.00"] * len(rows[::2])


@pytest.mark.slow
def test_maps_are_held_against_the_things_of_a_scene(shipped):
    maps = load("maps")
    for wording, attribute, names in maps.QUESTIONS:
        scene, thing, text = next(maps.questions_about_one_thing(wording, attribute, names))
        assert thing.name in names
        assert "{" not in text
        assert len(scene.things) > 1
        left, top, right, bottom = (max(0, round(200 * edge)) for edge in thing.box)
        heat = torch.zeros(200, 200)
        heat[top:bottom, left:right] = 1
        assert maps.most_of(heat, scene) is thing
    hits, held = maps.maps_tables(*shipped, num_scenes=2)
    assert [line.count("|") for line in (hits + "\n" + held).splitlines()] == [5] * 18
    assert hits.splitlines()[-1].startswith("| What is the number? | 1 | ")  # two scenes of two things
    strip = maps.panels(*shipped, maps.draw(scene, 96), "What is the number?")
    assert strip.size == (4 * 192 + 3 * 8, 192)


@pytest.mark.slow
def test_the_module_is_switched_off_for_comparison(shipped):
    rows = load("maps").ablation_table(*shipped, num_images=12).splitlines()[2:]
    asked, right, without = (int(part) for part in rows[-1].strip("| ").split(" | ")[1:])
    assert asked >= right > without > 0


@pytest.mark.slow
def test_caches_are_compared_with_exact_keys_and_values(shipped):
    pytest.importorskip("optimum.quanto", reason="quantised caches need optimum-quanto")
    caches = load("quantized_cache")
    model, processor = shipped
    questions = list(caches.evaluation_set(2))
    table = caches.compare(model, processor, questions, ["bfloat16", "4 bits, quanto"])
    exact, rounded = (line.strip("| ").split(" | ") for line in table.splitlines()[2:])
    assert exact[2] == "100.0%"
    sizes = [int(row[3].replace(",", "")) for row in (exact, rounded)]
    # Six layers of keys and values, of 256 numbers in four bytes; in four bits, and in groups of 64 two numbers more.
    num_tokens = int(table.split(" tokens")[0].split(", ")[-1])
    assert sizes[0] == num_tokens * 6 * 2 * 256 * 4
    assert sizes[1] < 0.3 * sizes[0]
    assert float(rounded[1].rstrip("%")) > 50
