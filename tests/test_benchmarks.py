"""The benchmarks measure what they claim to measure."""

import json
import re
import weakref
from pathlib import Path

import capacity
import latency
import maps
import pytest
import quantized_cache
import step_cost
import torch
from report import markdown_table

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def shipped():
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT, dtype=torch.float32).eval()
    return model, FlashSlothProcessor.from_pretrained(ROOT)


def test_a_table_aligns_text_left_and_numbers_right():
    table = markdown_table(("a", "b", "c"), [("x", 1, "y"), ("z", 2.5, "")], text_columns=(0, 2))
    assert table == "| a | b | c |\n| --- | ---: | --- |\n| x | 1 | y |\n| z | 2.5 |  |"


@pytest.mark.parametrize(
    "name", ["counts", "latency_cpu", "latency_cpu_2026", "latency_cpu_batch8", "latency_cpu_batch32"]
)
def test_committed_latency_tables_follow_from_their_json(name):
    report = json.loads((RESULTS / f"{name}.json").read_text())
    text = f"{report['machine']}\n\n{latency.as_markdown(report['cases'])}\n"
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == text


def test_the_costs_of_towers_and_decoders_in_the_docs_are_the_counted_and_measured_ones():
    cases = json.loads((RESULTS / "counts.json").read_text())["cases"]
    measured = {
        case["model"]: [case["measured"][name] / case["reference"][name] for name in ("first_token_s", "token_s")]
        for case in json.loads((RESULTS / "latency_cpu_2026.json").read_text())["cases"]
        if case["side"] == 1344
    }
    counted = {case["model"]: case["counts"] for case in cases if case["model"].startswith("FlashSloth")}
    del counted["FlashSloth-HD-3.2B"]
    assert len(counted) == 9
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for name, counts in counted.items():
        vision, prefill, token = (counts[f"{part}_flops"] for part in ("vision", "prefill", "token"))
        own = counted["FlashSloth-3.2B"]
        ratio = (vision + prefill) / (own["vision_flops"] + own["prefill_flops"])
        cells = [name, counts["visual_tokens"], f"{vision / 1e9:.0f}", f"{prefill / 1e9:.0f}", f"{ratio:.2f}"]
        cells += [f"{token / 1e9:.2f}", *(f"{ratio:.2f}" if ratio else "–" for ratio in measured.get(name, [0, 0]))]
        assert f"| {' | '.join(map(str, cells))} |" in text


def test_the_times_in_the_browser_in_the_docs_are_the_measured_ones():
    measured = (RESULTS / "browser.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "browser.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:PyTorch|onnxruntime|Chromium).*$", page, flags=re.MULTILINE)
    assert len(rows) == 4
    assert [row for row in rows if row.replace("Chromium,", "Chromium, WebAssembly,") not in measured] == []


def test_the_committed_table_of_training_costs_follows_from_its_json():
    report = json.loads((RESULTS / "step_cost_cpu.json").read_text())
    text = f"{report['machine']}\n\n{step_cost.as_table(report['rows'])}\n"
    assert (RESULTS / "step_cost_cpu.md").read_text(encoding="utf-8") == text


def test_the_committed_table_of_what_a_gpu_serves_follows_from_the_counts():
    table = capacity.as_table(json.loads((RESULTS / "counts.json").read_text())["cases"])
    assert table in (RESULTS / "capacity.md").read_text(encoding="utf-8")
    assert table in (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def test_both_models_have_nearly_the_same_size_and_different_prompt_lengths():
    cases = [step_cost.Case(model, 2, False) for model in step_cost.MODELS]
    sizes = [sum(p.numel() for p in step_cost.build_model(case, "small", "meta").parameters()) for case in cases]
    # Pooling and the queries, which "all patches" lacks, are 0.2 % of this small model.
    assert 0.995 < sizes[1] / sizes[0] < 1
    lengths = [step_cost.build_batch(case, "small", 1)["input_ids"].shape[1] for case in cases]
    assert lengths[1] - lengths[0] == 729 - 81 - 9


@pytest.mark.parametrize("model", step_cost.MODELS)
@pytest.mark.parametrize(("stage", "trained"), [(1, {"projector"}), (2, {"projector", "head"})])
def test_a_step_trains_what_the_stage_trains(model, stage, trained):
    run = step_cost.Training(step_cost.Case(model, stage, checkpointing=True), "small", 1, "cpu")
    weights = {"projector": run.model.model.multi_modal_projector.linear_1.weight, "head": run.model.lm_head.weight}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    run.step()
    assert {name for name, weight in weights.items() if not torch.equal(weight, before[name])} == trained


def test_models_that_do_not_fit_together_are_timed_one_after_another(monkeypatch):
    alive = weakref.WeakSet()

    class Alone(step_cost.Training):
        def __init__(self, *args):
            if alive:
                raise torch.OutOfMemoryError("there is room for one")
            alive.add(self)
            super().__init__(*args)

    monkeypatch.setattr(step_cost, "Training", Alone)
    cases = [step_cost.Case(model, 1, False) for model in step_cost.MODELS]
    times = step_cost.step_times(cases, "small", 1, "cpu", 1)
    assert list(times) == cases
    assert all(seconds > 0 for seconds in times.values())


def test_counted_memory_is_that_of_the_tensors_alive_at_once():
    with step_cost.CountedMemory() as memory:
        a = torch.zeros(1000)
        del a
        b = torch.zeros(1000).view(10, 100)
        c = b + 1
    assert (memory.alive, memory.peak) == (8000, 8000)
    assert c.shape == b.shape


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_take_as_much_as_real_ones(checkpointing):
    case = step_cost.Case("FlashSloth", 2, checkpointing)
    _, counted = step_cost.peak_memory(case, "small", 2, "cpu")
    run = step_cost.Training(case, "small", 2, "cpu")
    with step_cost.CountedMemory() as memory:
        run.compute_gradients()
    assert memory.peak == pytest.approx(counted, rel=0.01)


@pytest.mark.slow
def test_the_table_compares_all_cases(monkeypatch):
    for part in ("text_config", "vision_config"):  # a CPU without bfloat16 takes minutes for all layers
        monkeypatch.setitem(step_cost.SMALL[part], "num_hidden_layers", 3)
    rows = list(step_cost.measure("small", "cpu", batch_size=1, num_steps=1))
    assert len(rows) == len(step_cost.MODELS) * len(step_cost.STAGES) * 2
    assert all(row["bytes"] > row["bytes_per_sample"] > 1e6 for row in rows)
    lines = step_cost.as_table(rows).splitlines()[2:]
    ratios = [line.split("|")[7].strip() for line in lines if "| FlashSloth |" in line]
    assert ratios == ["1.00"] * len(rows[::2])


@pytest.mark.slow
def test_maps_are_compared_with_the_objects_of_a_scene(shipped):
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
    assert all(0 <= int(row.split("|")[3]) <= 2 for row in hits.splitlines()[2:])
    strip = maps.panels(*shipped, maps.draw(scene), "What is the number?")
    assert strip.size == (4 * 192 + 3 * 8, 192)


@pytest.mark.slow
def test_switching_off_the_module_loses_some_answers(shipped):
    rows = [
        row.strip("| ").split(" | ") for row in maps.ablation_table(*shipped, list(maps.scene_items(12))).splitlines()
    ]
    ((asked, right, without),) = (
        map(int, counts) for suite, kind, *counts in rows if (suite, kind) == ("scenes", "all")
    )
    assert asked >= right > without > 0


@pytest.mark.slow
def test_quantized_caches_are_compared_with_exact_keys_and_values(shipped):
    pytest.importorskip("optimum.quanto", reason="quantized caches need optimum-quanto")
    model, processor = shipped
    questions = list(quantized_cache.scene_items(2))
    table = quantized_cache.compare(model, processor, questions, ["bfloat16", "4 bits, quanto"])
    exact, rounded = (line.strip("| ").split(" | ") for line in table.splitlines()[2:])
    assert exact[2] == "100.0%"
    sizes = [int(row[3].replace(",", "")) for row in (exact, rounded)]
    # Keys and values of six layers, 256 numbers each, in four bytes; or in four bits, plus two numbers per group of 64.
    num_tokens = int(table.split(" tokens")[0].split(", ")[-1])
    assert sizes[0] == num_tokens * 6 * 2 * 256 * 4
    assert sizes[1] == num_tokens * 6 * 2 * 256 * (4 + 2 * 32 / 64) / 8
    assert float(rounded[1].rstrip("%")) > 90
