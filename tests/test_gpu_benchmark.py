"""The run for a GPU measures in all its stages, within its limits, whatever a stage does."""

import json
import shlex
import sys
import time
from pathlib import Path

import gpu
import pytest

TINY = (sys.executable, str(Path(__file__).with_name("tiny_benchmark.py")))


def run(output, *options):
    gpu.main(["--output", str(output), "--device", "cpu", *options])
    known = json.loads(output.with_suffix(".json").read_text())
    return {name: stage["outcome"] for name, stage in known.items()}, output.with_suffix(".md").read_text("utf-8")


@pytest.fixture
def two_stages(monkeypatch):
    """Makes the run consist of two stages, the first with the given code and limit."""

    def set_code(code, limit_s=60):
        first = gpu.Stage("first", "First", limit_s, ((sys.executable, "-c", code, "OUTPUT.md"),))
        second = gpu.Stage("second", "Second", 60, ((sys.executable, "-c", "print('well')"),))
        monkeypatch.setattr(gpu, "build_stages", lambda *_, **__: [first, second])

    return set_code


WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('| a table |'); "


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("raise SystemExit(3)", "failed with exit code 3"),
        ("import os; os.abort()", "failed with exit code -6"),
        pytest.param("import time; time.sleep(600)", "stopped at its limit", marks=pytest.mark.slow),
    ],
)
def test_a_stage_that_fails_or_hangs_does_not_stop_the_others(tmp_path, two_stages, monkeypatch, code, outcome):
    monkeypatch.setattr(gpu, "LEAST_S", 0)
    two_stages(WRITE + "print('the end of its log', flush=True); " + code, limit_s=8 if "sleep" in code else 60)
    outcomes, report = run(tmp_path / "run")
    assert outcomes == {"first": outcome, "second": "succeeded"}
    assert "## First\n\nfirst: " + outcome in report
    assert "| a table |" in report and "the end of its log" in report  # what it wrote before
    assert "well" in report


@pytest.mark.slow
def test_what_a_killed_stage_started_is_ended_too(tmp_path, two_stages, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_S", 0)
    alive = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    two_stages(code, limit_s=10)
    run(tmp_path / "run")
    assert alive.exists()
    alive.unlink()
    time.sleep(0.3)
    assert not alive.exists()


def test_a_run_continues_where_it_stopped(tmp_path, two_stages):
    two_stages(WRITE + "raise SystemExit(1)")
    count = "import pathlib, sys; f = pathlib.Path(sys.argv[1]).with_suffix('.count'); "
    count += "f.write_text(f.read_text() + 'x' if f.exists() else 'x')"
    assert run(tmp_path / "run")[0]["first"] == "failed with exit code 1"
    two_stages(count)
    for _ in range(2):
        assert run(tmp_path / "run")[0] == {"first": "succeeded", "second": "succeeded"}
    assert (tmp_path / "run" / "first.count").read_text() == "x"


@pytest.mark.slow
def test_no_stage_begins_after_the_limit(tmp_path, two_stages):
    two_stages("import time; time.sleep(600)")
    start = time.monotonic()
    outcomes, report = run(tmp_path / "run", "--limit", "12")
    assert outcomes == {"first": "stopped at its limit", "second": "no time left"}
    assert time.monotonic() - start < 60
    assert "second: no time left" in report


@pytest.mark.slow
def test_every_stage_runs_on_tiny_models(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RUNNER", TINY)
    monkeypatch.setattr(gpu, "SHORT", ("--rounds", "1", "--new-tokens", "2", "--images", "336"))
    monkeypatch.setattr(gpu, "PEERS", ("FlashSloth-3.2B", "Qwen3-VL-2B"))
    monkeypatch.setattr(gpu, "IN_BATCHES", ("FlashSloth-3.2B",))
    monkeypatch.setattr(gpu, "BATCH_SIZES", ("2",))
    monkeypatch.setattr(gpu, "STEPS", "1")
    build_stages = gpu.build_stages  # with limits that a slow machine keeps
    monkeypatch.setattr(gpu, "build_stages", lambda *args: [s._replace(limit_s=900) for s in build_stages(*args)])
    training = shlex.join([sys.executable, "-c", "open('OUTPUT.md', 'w').write('trained')"])
    outcomes, report = run(tmp_path / "run", "--limit", "3600", "--backend", "eager", "--training", training)
    names = [stage.name for stage in build_stages("cpu", training)]
    assert outcomes == dict.fromkeys(names, "succeeded"), report
    for name, expected in {
        "tests": "skipped",
        "compiled": "| FlashSloth-HD-3.2B | all compiled, unguarded |",
        "peers": "| Qwen3-VL-2B |",
        "batches": "batch 2",
        "second-question": ", compiled; made by benchmarks/second_question.py",
        "steps": "| 2 | on | all patches |",
        "bits": "| nf4 |",
        "training": "trained",
    }.items():
        _, of_stage = report.split(f"\n\n{name}: succeeded, ")
        assert expected in of_stage.split(": succeeded, ")[0], name
