"""The README is true: its code runs, and prints what its comments say."""

import contextlib
import io
import json
import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from score import Counts, as_summary

from flashsloth import FlashSlothConfig
from flashsloth.cli import build_parser, main
from flashsloth.cli.model_card import TAGS, _show_bytes, read_results

ROOT = Path(__file__).parents[1]
EVALUATION = ROOT / "examples" / "tiny" / "evaluation.json"
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "USER/tiny-sloth"  # test_hub_client.py runs the code by this id; here `.`, the id in a clone, replaces it
SHOWN = re.compile(r"^# (.*)$", flags=re.MULTILINE)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def in_a_clone(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("code", blocks("python"))
def test_each_block_of_python_prints_what_it_says(code):
    assert f'"{HUB_ID}"' in code
    code = code.replace(HUB_ID, ".")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert printed.getvalue().splitlines() == SHOWN.findall(code)
    assert SHOWN.findall(code)


def test_the_commands_print_what_they_say(capsys):
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    asked = [(line, shown) for line, shown in zip(lines, [*lines[1:], ""], strict=True) if "flashsloth ask" in line]
    assert asked
    for line, shown in asked:
        command = line.split("&&")[-1].strip()
        assert main(shlex.split(command)[1:]) == 0
        assert f"# {capsys.readouterr().out.strip()}" == shown, line


def test_it_is_a_valid_model_card():
    data = ModelCard(README).data
    assert (data.pipeline_tag, data.library_name, data.license) == ("image-text-to-text", "transformers", "apache-2.0")
    assert data.tags == TAGS
    assert HUB_ID.endswith(f"/{data.model_name}")


def test_the_examples_of_its_widget_have_the_answers_of_the_checkpoint(capsys):
    examples = ModelCard(README).data.widget
    assert len(examples) == 2
    for example in examples:
        assert main(["ask", example["src"], example["text"]]) == 0
        assert capsys.readouterr().out.strip() == example["output"]["text"]


def rows_after(heading):
    """Cells of the rows of the first table after a heading."""
    lines = README[README.index(heading) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    table = list(takewhile(lambda line: line.startswith("|"), lines[start:]))
    return [tuple(cell.strip() for cell in row.strip("| ").split(" | ")) for row in table[2:]]


def test_it_has_a_command_for_each_engine_that_exists():
    table = dict(rows_after("## Run it elsewhere"))
    commands = [shlex.split(code) for cell in table.values() for code in re.findall(r"`([^`(]+ [^`(]+)`", cell)]
    ours = [arguments for program, *arguments in commands if program == "flashsloth"]
    assert {"chat", "caption", "onnx"} <= {arguments[0] for arguments in ours}
    for arguments in ours:
        build_parser().parse_args(arguments)
    assert {program for program, *_ in commands} == {"flashsloth", "transformers", "vllm"}
    assert table["llama.cpp, Ollama, MLX, SGLang"].startswith("not supported")


def test_its_memory_is_that_of_the_configurations():
    found = {row[0]: row[1:] for row in rows_after("| in bfloat16")}
    expected = {}
    shipped = FlashSlothConfig.from_pretrained(ROOT)
    for name, config, num_bytes in (
        ("FlashSloth-3.2B", FlashSlothConfig(), 6.39e9),  # measured: benchmarks/results/memory_cpu.md
        ("this checkpoint", shipped, (ROOT / "model.safetensors").stat().st_size),
    ):
        text, tokens = config.text_config, config.image_seq_length
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        per_token = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim
        sizes = (num_bytes, per_token, tokens * per_token)
        weights, cache, image = (_show_bytes(size) for size in sizes)
        limit = f"{text.max_position_embeddings:,} tokens"
        expected[name] = (weights, cache, f"{tokens} tokens, {image}", limit)
    assert found == expected


def test_its_figures_are_the_measured_ones():
    counts = json.loads(EVALUATION.read_text())
    result = {suite: {kind: Counts(**found) for kind, found in kinds.items()} for suite, kinds in counts.items()}
    assert as_summary(result) in README


def test_its_metadata_has_the_measured_figures():
    expected = read_results(EVALUATION)
    for result in expected:
        result.metric_value = round(result.metric_value, 4)
    assert len(expected) == 14
    assert ModelCard(README).data.eval_results == expected


def test_its_metadata_is_in_the_form_that_the_hub_writes():
    assert README.startswith(f"---\n{ModelCard(README).data.to_yaml()}\n---\n")


def test_the_code_and_files_it_names_exist():
    """After a renaming, the tables must be updated."""
    table = README[README.index("## Develop") :]
    code = (ROOT / "modeling_flashsloth.py").read_text(encoding="utf-8")
    names = re.findall(r"`(\w+(?:\.forward)?)`", table.partition("| file or folder")[0].partition("| to read")[2])
    assert {"SpatialAttentionPooling", "EmbeddedQuery", "build_decoder", "scale_logits"} <= set(names)
    defined = re.findall(r"^(?:class|def) (\w+)", code, flags=re.MULTILINE)
    missing = [name for name in names if name.partition(".")[0] not in defined]
    files = re.findall(r"`(\w+\.py|\w+/)`", table)
    assert missing + [file for file in files if not (ROOT / file).exists()] == []


def test_its_links_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("http")]
    headings = {re.sub(r"\W+", "-", line.lower()) for line in re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)}
    assert targets
    missing = [t for t in targets if not (t[1:] in headings if t[0] == "#" else (ROOT / t.partition("#")[0]).exists())]
    assert missing == []


@pytest.mark.parametrize(
    ("page", "report"), [("README.md", "latency_cpu_2026.json"), ("docs/speed.md", "latency_cpu.json")]
)
def test_its_speeds_are_the_measured_ones(page, report):
    measured = {}
    for case in json.loads((ROOT / "benchmarks" / "results" / report).read_text())["cases"]:
        own, reference = case["measured"], case["reference"]
        ratios = [f"{own[name] / reference[name]:.2f}" for name in ("first_token_s", "token_s")]
        measured.setdefault(case["model"], []).extend([str(case["counts"]["visual_tokens"]), *ratios])
    assert len(measured) > 8
    text = (ROOT / page).read_text(encoding="utf-8")
    for model, cells in measured.items():
        assert f"| {model} | {' | '.join(cells)} |" in text, model
