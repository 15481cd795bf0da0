"""What a quarter of an hour on one GPU can tell, in stages: the most valuable first.

    python benchmarks/gpu.py --output runs/gpu

Meant for an H100 or H200. Nothing is fetched; all models have random weights. `--limit` bounds the whole run, by
default to eight minutes, and every stage has a limit of its own. Each runs in its own process: a stage that fails,
hangs or runs out of memory does not stop the others.

After every stage, OUTPUT.md has the tables of all stages so far, and OUTPUT.json says how each ended; the folder OUTPUT
has the logs. A run with the same OUTPUT continues: stages that succeeded are not repeated, and `latency.py` keeps the
cases that it has measured. `--stages` selects stages, and repeats them.

`--training COMMAND` adds a last stage, which takes what is left of the time: the training of a checkpoint, say. The
command is killed at the limit, so it should be able to resume. OUTPUT in it is a path in the folder OUTPUT.
"""

import argparse
import contextlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from report import add_device_option, build_parser

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
RUNNER = (sys.executable,)  # what runs a script of this folder
LIMIT_S = 480
LEAST_S = 10  # less is not worth starting a stage
LOG_LINES = 12  # shown of a stage that failed
COUNTS = Path(__file__).parent / "results" / "counts.json"
SHORT = ("--rounds", "3", "--new-tokens", "16")  # of `latency.py`
PEERS = ("FlashSloth-3.2B", "FlashSloth-HD-3.2B", "FlashSloth + Qwen3-0.6B", "all 729 tokens")
PEERS += ("Qwen2-VL-2B", "Qwen3-VL-2B", "SmolVLM2-2.2B", "FastVLM-1.5B")
IN_BATCHES = ("FlashSloth-3.2B", "all 729 tokens", "Qwen3-VL-2B", "SmolVLM2-2.2B")
BATCH_SIZES = ("8", "32")
STEPS = "5"  # of training
BITS = ("bfloat16", "int8", "int4", "nf4")


class Stage(NamedTuple):
    """A stage.

    Attributes:
        name: Its name, and that of its files.
        title: Its heading in the report.
        limit_s: Most seconds that it may take.
        commands: Commands to run one after another; OUTPUT stands for the stage's files, without a suffix.
    """

    name: str
    title: str
    limit_s: float
    commands: tuple[tuple[str, ...], ...]


def build_stages(device: str, training: str | None = None, backend: str = "inductor") -> list[Stage]:
    """All stages in order.

    Args:
        device: Device of all commands.
        training: Command of the last stage; `None`: there is none.
        backend: Backend of torch.compile.
    """

    def script(name: str, output: str, *options: str) -> tuple[str, ...]:
        return (*RUNNER, str(ROOT / "benchmarks" / name), "--output", output, "--device", device, *options)

    pytest = (sys.executable, "-m", "pytest", str(ROOT / "tests" / "test_gpu.py"), "-q", "-p", "no:cacheprovider")
    peers = script("latency.py", "OUTPUT", *SHORT, "--batch-sizes", "1", "--models", *PEERS)
    large = ("--images", "1344", "--batch-sizes", *BATCH_SIZES)
    batches = script("latency.py", "OUTPUT", *SHORT, *large, "--models", *IN_BATCHES)
    asked_twice = ("--rounds", "3", "--models", "FlashSloth-3.2B", "FlashSloth-HD-3.2B")
    second = (
        script("second_question.py", "OUTPUT-eager.md", *asked_twice),
        script("second_question.py", "OUTPUT-compiled.md", *asked_twice, "--compiled", backend),
    )
    steps = script("step_cost.py", "OUTPUT", "--stages", "2", "--steps", STEPS)
    bits = script("quantization.py", "OUTPUT.md", "--images", "0", "--precisions", *BITS)
    stages = [
        Stage("tests", "Tests", 120, (pytest,)),
        Stage("compiled", "Compiled", 200, (script("compiled.py", "OUTPUT.md", "--backend", backend),)),
        Stage("peers", "Other models", 110, (peers,)),
        Stage("batches", "Batches", 70, (batches,)),
        Stage("second-question", "A second question", 90, second),
        Stage("steps", "Training steps", 90, (steps,)),
        Stage("bits", "Eight and four bits", 60, (bits,)),
    ]
    if training:
        stages.append(Stage("training", "Training", LIMIT_S, (tuple(shlex.split(training)),)))
    return stages


class Run:
    """A run, and what is known of its stages.

    Args:
        output: Path of the report, without a suffix, and folder of the stages' files.
        limit_s: Most seconds for all stages.
        repeated: Names of stages to run although they succeeded before.
        modules: Empty folder for `PYTHONPATH`.
    """

    def __init__(self, output: Path, limit_s: float, repeated: list[str], modules: Path) -> None:
        self.output = output.resolve()
        self.deadline = time.monotonic() + limit_s
        self.status = self.output.with_suffix(".json")
        self.known: dict[str, dict[str, Any]] = json.loads(self.status.read_text()) if self.status.exists() else {}
        for name in repeated:
            self.known.pop(name, None)
        self.output.mkdir(parents=True, exist_ok=True)
        (modules / "flashsloth").symlink_to(ROOT)  # the repository is the package, whatever its folder is called
        path = os.pathsep.join([str(modules), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}

    def take(self, stage: Stage) -> None:
        """Run a stage, unless it succeeded before or no time is left, and write the report."""
        if self.known.get(stage.name, {}).get("outcome") == "succeeded":
            return
        limit = min(stage.limit_s, self.deadline - time.monotonic())
        if limit < LEAST_S:
            self.known[stage.name] = {"outcome": "no time left", "seconds": 0.0}
        else:
            start = time.monotonic()
            outcome = self._run(stage, start + limit)
            self.known[stage.name] = {"outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
        logger.info("%s: %s", stage.name, self.known[stage.name])

    def _run(self, stage: Stage, deadline: float) -> str:
        base = str(self.output / stage.name)
        outcome = "succeeded"
        with self._log(stage).open("w", encoding="utf-8") as log:
            for command in stage.commands:
                if any(word.endswith("latency.py") for word in command):
                    give_counts(Path(base))
                words = [word.replace("OUTPUT", base) for word in command]
                process = subprocess.Popen(
                    words, cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
                )
                try:
                    code = process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    return "stopped at its limit"
                finally:
                    _end(process)
                if code:
                    outcome = f"failed with exit code {code}"
        return outcome

    def _log(self, stage: Stage) -> Path:
        return self.output / f"{stage.name}.log"

    def write(self, stages: list[Stage]) -> None:
        """Write OUTPUT.json, and OUTPUT.md with the reports of all stages so far."""
        self.status.write_text(json.dumps(self.known, indent=2) + "\n")
        parts = []
        for stage in (stage for stage in stages if stage.name in self.known):
            known = self.known[stage.name]
            parts.append(f"## {stage.title}\n\n{stage.name}: {known['outcome']}, {known['seconds']} s")
            parts += self._reports(stage)
            if known["outcome"].startswith(("failed", "stopped")) or not self._reports(stage):
                parts += [f"```\n{tail}\n```" for tail in [self._tail(stage)] if tail]
        self.output.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")

    def _reports(self, stage: Stage) -> list[str]:
        files = sorted(self.output.glob(f"{stage.name}*.md"))
        return [file.read_text(encoding="utf-8").strip() for file in files] or list(self._partial(stage))

    def _partial(self, stage: Stage) -> Iterator[str]:
        """The table of cases that `latency.py` had measured when it was stopped."""
        cases = [json.loads(file.read_text()) for file in sorted((self.output / stage.name).glob("*.json"))]
        if any("measured" in case for case in cases):
            from latency import as_markdown

            yield as_markdown([case for case in cases if "model" in case])

    def _tail(self, stage: Stage) -> str:
        log = self._log(stage)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        return "\n".join(lines[-LOG_LINES:])


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def give_counts(folder: Path) -> None:
    """Hand committed counts to `latency.py`, which would spend a minute on them."""
    from latency import slug

    folder.mkdir(parents=True, exist_ok=True)
    for case in json.loads(COUNTS.read_text())["cases"]:
        file = folder / f"{slug(case['model'])}_{case['side']}_counts.json"
        file.write_text(json.dumps({"counts": case["counts"]}))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = build_parser(__doc__, "path without a suffix")
    names = [stage.name for stage in build_stages("cuda", "true")]
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for all stages (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--training", metavar="COMMAND", help="last stage")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    add_device_option(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the stages."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    stages = build_stages(args.device, args.training, args.backend)
    with tempfile.TemporaryDirectory() as modules:
        run = Run(args.output, args.limit, args.stages or [], Path(modules))
        for stage in stages:
            if args.stages is None or stage.name in args.stages:
                run.take(stage)
                run.write(stages)


if __name__ == "__main__":
    main()
