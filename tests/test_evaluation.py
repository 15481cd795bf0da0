"""lmms-eval evaluates FlashSloth: through its command line on a local task, and through the adapter itself."""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, Image
from scenes import draw, scene_at
from score import answer, scene_items

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
NUM_IMAGES = 18
DEADLINE = 300  # seconds

needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed; install it with `pip install --no-deps lmms-eval` (see docs/evaluation.md)",
)


def shown_command(name):
    return re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", PAGE, flags=re.DOTALL)[1].replace("\\\n", "")


@pytest.fixture(scope="module")
def asked():
    """Questions of every kind about drawn scenes. The expected answer of every fourth is wrong."""
    questions = list(scene_items(NUM_IMAGES))
    return [
        dataclasses.replace(question, answer="wrong") if i % 4 == 0 else question
        for i, question in enumerate(questions)
    ]


@pytest.fixture(scope="module")
def adapter():
    model = importlib.import_module("flashsloth.evaluation.model")
    return model.FlashSlothForEvaluation(str(ROOT), batch_size=3, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def answers(asked, adapter):
    """Answers of the checkpoint to `asked`, without lmms-eval."""
    return answer(adapter.model, adapter.processor, asked)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, asked):
    """A folder with the page's task, whose questions are `asked`."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "my-task").mkdir()
    yaml = re.search(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)[1]
    (folder / "my-task" / "questions.yaml").write_text(yaml)
    rows = [{"image": row.images[0], "question": row.question, "answer": row.answer} for row in asked]
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(folder / "my-task" / "questions.parquet")
    return folder


def start(command, folder, **kwargs):
    """Start one of the page's commands in a folder, with other values for some of its options."""
    words = shlex.split(command.replace("pretrained=.", f"pretrained={ROOT}"))
    for option, value in kwargs.items():
        words[words.index(f"--{option}") + 1] = str(value)
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    log = (folder / "log.txt").open("w")
    return subprocess.Popen(
        words, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process, folder):
    """Score, answers and log of an evaluation. Its exit code is 0 even if it fails."""
    process.wait(DEADLINE)
    log = (folder / "log.txt").read_text()
    results = sorted(folder.rglob("*_results.json"))
    assert len(results) == 1, log[-4000:]
    rows = next(folder.rglob("*_samples_*.jsonl")).read_text().splitlines()
    rows = sorted(map(json.loads, rows), key=lambda row: row["doc_id"])
    score = json.loads(results[0].read_text())["results"]["my_questions"]["exact_match,none"]
    return score, [row["filtered_resps"] for row in rows], log


def share_right(answers, asked):
    return sum(given == question.answer for given, question in zip(answers, asked, strict=True)) / len(asked)


@pytest.mark.slow
@needs_lmms_eval
def test_a_killed_run_resumes_and_has_the_score_of_direct_answers(folder, asked, answers):
    command = shown_command("evaluate")
    process = start(command, folder, batch_size=1)
    saved = folder / "cache" / "runs" / "flashsloth" / "rank_0.audit.jsonl"
    give_up = time.monotonic() + DEADLINE
    while not (saved.exists() and saved.read_text().count("\n")) and process.poll() is None:
        assert time.monotonic() < give_up
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    num_saved = saved.read_text().count("\n")
    assert 0 < num_saved < len(asked)

    score, found, log = finish(start(command, folder, batch_size=1), folder)
    assert f"ResponseCache stats: {num_saved} hits" in log
    counts = Counter(json.loads(line)["doc_id"] for line in saved.read_text().splitlines())
    assert counts == Counter(range(len(asked)))
    assert found == answers
    assert score == pytest.approx(share_right(answers, asked))
    assert 0.6 < score < 0.8


@pytest.mark.slow
@needs_lmms_eval
def test_two_processes_with_batches_of_eight_give_the_same_score(folder, asked, answers, tmp_path):
    (tmp_path / "my-task").symlink_to(folder / "my-task")
    command = shown_command("evaluate in two processes").replace("torchrun", "torchrun --standalone")
    score, found, log = finish(start(command, tmp_path), tmp_path)
    assert "Running on rank 1" in log
    assert found == answers
    assert score == pytest.approx(share_right(answers, asked))


def request(adapter, number, content, **options):
    """A request of lmms-eval; its text is the text of the last content part."""
    instance = importlib.import_module("lmms_eval.api.instance").Instance
    messages = [{"role": "user", "content": content}]
    adapter.task_dict.setdefault("task", {"test": {}})["test"][number] = messages
    arguments = (content[-1].get("text", ""), lambda document: document, options, number, "task", "test")
    metadata = {"task": "task", "doc_id": number, "repeats": 1}
    return instance("generate_until", arguments, idx=0, metadata=metadata)


def text(words):
    return {"type": "text", "text": words}


def image(number):
    return {"type": "image", "url": draw(scene_at("evaluation", number))}


@pytest.fixture
def mixed(adapter, tmp_path):
    """Requests with an image, without, with several, with a video, and with other generation arguments."""
    frames = [draw(scene_at("evaluation", number)) for number in range(20, 32)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    contents = [
        [image(0), text("What do you see at the top left?")],
        [text("Describe the picture.")],
        [image(1), image(2), text("Describe the picture.")],
        [{"type": "video", "url": str(tmp_path / "clip.gif")}, text("What colour is the sign?")],
        [image(3), text("Describe the picture.")],
        [image(4), text("Count the shapes.")],
    ]
    options = [{"max_new_tokens": 12}, {"max_new_tokens": 12, "num_beams": 2, "temperature": 0.0}]
    return [request(adapter, i, content, **options[i % 2]) for i, content in enumerate(contents)]


@needs_lmms_eval
def test_batching_changes_neither_answers_nor_their_order(adapter, mixed):
    alone = [adapter.generate_until([one])[0] for one in mixed]
    assert list(adapter.generate_until(mixed)) == alone
    assert list(adapter.generate_until(mixed[::-1])) == alone[::-1]
    assert len(set(alone)) > 3


@contextlib.contextmanager
def tiles_seen(adapter):
    """A list of the number of tiles that the vision tower encodes in each call."""
    num_tiles = []
    tower = adapter.model.model.vision_tower
    with tower.register_forward_pre_hook(lambda _, args: num_tiles.append(len(args[0]))):
        yield num_tiles


@needs_lmms_eval
def test_a_video_is_read_as_a_bounded_number_of_images(adapter, mixed):
    with tiles_seen(adapter) as num_tiles:
        adapter.generate_until([mixed[3]])
    assert num_tiles == [8 * 2]  # for each of two beams


@needs_lmms_eval
def test_hd_reads_five_tiles(adapter, asked):
    model = importlib.import_module("flashsloth.evaluation.model")
    hd = model.FlashSlothForEvaluation(str(ROOT), 8, device="cpu", dtype="float32", do_image_splitting=True)
    split = [dataclasses.replace(question, is_split=True) for question in asked[:8]]
    expected = answer(adapter.model, adapter.processor, split)
    shown = [[{"type": "image", "url": row.images[0]}, text(row.question)] for row in split]
    requests = [request(hd, i, content, max_new_tokens=64) for i, content in enumerate(shown)]
    with tiles_seen(hd) as num_tiles:
        found = list(hd.generate_until(requests))
    assert found == expected
    assert num_tiles == [8 * 5]


@needs_lmms_eval
def test_answers_are_returned_before_the_last_question_is_asked(adapter):
    model = importlib.import_module("flashsloth.evaluation.model")
    size = model.WINDOW * adapter.batch_size
    requests = [request(adapter, i, [text("Hello?")], max_new_tokens=1) for i in range(size + 1)]
    adapter.task_dict["task"]["test"].pop(size)  # the last document can't be read
    given = adapter.generate_until(requests)
    assert len([next(given) for _ in range(size)]) == size
    with pytest.raises(KeyError):
        next(given)


@needs_lmms_eval
def test_an_answer_ends_at_until_and_within_the_positions_of_the_decoder(adapter, monkeypatch):
    content = [image(3), text("Describe the picture.")]
    (whole,) = adapter.generate_until([request(adapter, 0, content, max_new_tokens=64)])
    (cut,) = adapter.generate_until([request(adapter, 0, content, max_new_tokens=64, until=[",", "\n\n"])])
    assert cut == whole.split(",")[0] != whole
    monkeypatch.setattr(adapter.model.config.get_text_config(), "max_position_embeddings", 20)  # less than the prompt
    (short,) = adapter.generate_until([request(adapter, 0, content, max_new_tokens=64)])
    assert len(adapter.processor.tokenizer.encode(short)) <= 1


@needs_lmms_eval
@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ({}, {"do_sample": False, "max_new_tokens": 1024}),
        ({"temperature": 0, "top_p": 1.0, "do_sample": True}, {"do_sample": False, "max_new_tokens": 1024}),
        ({"temperature": 0.2, "do_sample": False}, {"do_sample": False, "max_new_tokens": 1024}),
        (
            {"temperature": 0.2, "top_p": 0.9, "max_new_tokens": 5},
            {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "max_new_tokens": 5},
        ),
        ({"do_sample": True, "max_new_tokens": 5}, {"do_sample": True, "max_new_tokens": 5}),
        ({"num_beams": 3, "max_new_tokens": 5}, {"do_sample": False, "num_beams": 3, "max_new_tokens": 5}),
        ({"image_aspect_ratio": "original"}, {"do_sample": False, "max_new_tokens": 1024}),
    ],
)
def test_generation_arguments_of_a_task_are_used(task, expected):
    generation_options = importlib.import_module("flashsloth.evaluation.model").generation_options
    assert generation_options(task) == (expected, [])
    assert generation_options({**task, "until": "\n"}) == (expected, ["\n"])


@needs_lmms_eval
def test_unsupported_requests_are_refused(adapter):
    model = importlib.import_module("flashsloth.evaluation.model")
    with pytest.raises(ValueError, match="of type 'audio'"):
        adapter.generate_until([request(adapter, 0, [{"type": "audio", "url": "a.wav"}])])
    with pytest.raises(NotImplementedError, match="output_type: generate_until"):
        adapter.loglikelihood([])
    with pytest.raises(NotImplementedError, match="generate_until_multi_round"):
        adapter.generate_until_multi_round([])
    with pytest.raises(ValueError, match="`batch_size` must be a whole number above 0, but is 'auto'"):
        model.FlashSlothForEvaluation(str(ROOT), batch_size="auto")


def test_without_lmms_eval_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.api.instance", None)
    monkeypatch.delitem(sys.modules, "flashsloth.evaluation.model", raising=False)
    with pytest.raises(ImportError, match="pip install lmms-eval"):
        importlib.import_module("flashsloth.evaluation.model")


def test_the_page_has_a_command_for_every_benchmark_of_its_table():
    tasks = re.findall(r"^\| [\w -]+ \| [\d.]+ \| [\d.]+ \| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert len(tasks) == 14
    assert re.findall(r"^evaluate (\w+)$", PAGE, flags=re.MULTILINE) == tasks


@needs_lmms_eval
def test_lmms_eval_has_the_tasks_of_the_page():
    folder = Path(importlib.util.find_spec("lmms_eval").origin).parent / "tasks"
    for task in [*re.findall(r"^evaluate (\w+)$", PAGE, flags=re.MULTILINE), "mmbench_en_dev_static"]:
        (definition,) = folder.rglob(f"{task}.yaml")
        assert re.search(rf"^(task|group): \"?{task}\"?\s*$", definition.read_text(), flags=re.MULTILINE), task
