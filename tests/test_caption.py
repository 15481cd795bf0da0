"""`flashsloth caption` answers every image once, in order, despite broken images and killed processes."""

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from processes import run_processes
from questions import describe, is_clearly_placed
from scenes import Layout, draw, scene_at
from terminal import Terminal

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor, cli
from flashsloth.cli import caption

ROOT = Path(__file__).parents[1]
PROGRAM = Path(sys.executable).parent / "flashsloth"

NUM_SCENES = 26
EASY = Layout(num_things=(1, 2), sides=(0.3, 0.5), share_shapes=1.0, share_texts=0.0, quality=0.0)
BATCH = ["--batch-size", "2", "--loaders", "1"]


def run(source, output, *options):
    assert cli.main(["caption", str(source), "--output", str(output), "--loaders", "0", *options]) == 0
    return read(output / "answers.jsonl")


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail with one line on standard error; returns the line."""

    def run_refused(source, output, *options):
        capsys.readouterr()
        assert cli.main(["caption", str(source), "--output", str(output), "--loaders", "0", *map(str, options)]) == 2
        printed, errors = capsys.readouterr()
        assert printed == ""
        line = errors.splitlines()[-1]  # `datasets` shows progress before it
        assert line.startswith("flashsloth: error: ")
        assert "Traceback" not in errors
        return line

    return run_refused


def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def name_of(i):
    """The file of a scene in the folder."""
    return f"{'more/' if i % 2 else ''}{i:02}.png"


def finished_lines(output):
    return sum(part.read_bytes().count(b"\n") for part in (output / "parts").glob("*.jsonl"))


def kill_with_descendants(process):
    """Kill a process and all its descendants at once, as a power failure would."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    family = [process.pid]
    for parent in family:
        family += [pid for pid, ppid in pairs if ppid == parent]
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def scenes():
    drawn = (scene_at("untouched", i, layout=EASY) for i in itertools.count())
    return list(itertools.islice((scene for scene in drawn if all(map(is_clearly_placed, scene.things))), NUM_SCENES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, scenes):
    """Scenes, two broken images, and a file that is not an image."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    for i, scene in enumerate(scenes):
        draw(scene).save(folder / name_of(i))
    whole = (folder / "00.png").read_bytes()
    (folder / "05-cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "more" / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def answers(folder, tmp_path_factory):
    """The answers of a single process that is not interrupted."""
    output = tmp_path_factory.mktemp("undisturbed")
    run(folder, output, "--batch-size", "2")
    return output


@pytest.fixture(scope="module")
def described(answers):
    """What the checkpoint says about each scene."""
    found = {row["image"]: row.get("answer") for row in read(answers / "answers.jsonl")}
    return [found[name_of(i)] for i in range(NUM_SCENES)]


def test_images_are_answered_in_order_and_broken_ones_have_an_error(folder, scenes, answers):
    rows = read(answers / "answers.jsonl")
    files = [file for file in folder.rglob("*") if file.suffix in (".png", ".jpg")]
    assert [row["row"] for row in rows] == list(range(NUM_SCENES + 2))
    assert [row["image"] for row in rows] == sorted(file.relative_to(folder).as_posix() for file in files)
    right = {name_of(i): describe(scene) for i, scene in enumerate(scenes)}
    good = [row for row in rows if "answer" in row]
    assert sum(row["answer"] == right[row["image"]] for row in good) >= NUM_SCENES - 2
    broken = read(answers / "errors.jsonl")
    assert broken == [row for row in rows if "error" in row]
    assert [row["image"] for row in broken] == ["05-cut.png", "more/text.jpg"]
    assert "truncated" in broken[0]["error"]
    assert "cannot identify" in broken[1]["error"]


def test_answers_are_those_of_generate(folder, answers):
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT)
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    answered = [row for row in read(answers / "answers.jsonl") if "answer" in row][:4]
    assert len(answered) == 4
    for row in answered:
        image = {"type": "image", "path": str(folder / row["image"])}
        content = [image, {"type": "text", "text": "Describe the picture."}]
        inputs = processor.encode_conversations([{"role": "user", "content": content}])
        output = model.generate(**inputs, max_new_tokens=128)[:, inputs["input_ids"].shape[1] :]
        assert processor.post_process_image_text_to_text(output) == [row["answer"]]


@pytest.mark.slow
def test_two_killed_processes_and_one_that_resumes_answer_like_one(folder, answers, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    process = subprocess.Popen(
        [sys.executable, *command, PROGRAM, "caption", str(folder), "--output", str(tmp_path), *BATCH],
        stderr=(log := (tmp_path / "log").open("w+")),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while finished_lines(tmp_path) < 4 and process.poll() is None:
        time.sleep(0.005)
    log.seek(0)
    assert process.poll() is None, log.read()
    kill_with_descendants(process)
    parts = {part: part.read_bytes() for part in (tmp_path / "parts").iterdir()}
    assert len(parts) == 2
    assert not (tmp_path / "answers.jsonl").exists()
    torn, content = next(iter(parts.items()))
    torn.write_bytes(content + content.splitlines()[0][:50])  # killed while it wrote a line
    before = finished_lines(tmp_path)
    assert run(folder, tmp_path, "--batch-size", "2") == read(answers / "answers.jsonl")
    assert finished_lines(tmp_path) == NUM_SCENES // 2 + 1 > before
    assert all(part.read_bytes().startswith(content) for part, content in parts.items())


def test_repeating_a_finished_run_does_nothing(folder, answers):
    before = finished_lines(answers), (answers / "answers.jsonl").read_bytes()
    run(folder, answers, "--batch-size", "2")
    assert (finished_lines(answers), (answers / "answers.jsonl").read_bytes()) == before


@pytest.mark.parametrize("change", [["--question", "Other?"], ["--batch-size", "4"], ["--max-new-tokens", "1"]])
def test_a_run_with_other_settings_is_refused(refused, folder, answers, change):
    name = change[0].removeprefix("--").replace("-", "_")
    assert f"answers of a run with a different {name}" in refused(folder, answers, "--batch-size", "2", *change)


def test_a_folder_that_has_changed_is_refused(refused, folder, answers):
    extra = folder / "zz.png"
    extra.write_bytes((folder / "00.png").read_bytes())
    try:
        assert "a different num_rows, source" in refused(folder, answers, "--batch-size", "2")
    finally:
        extra.unlink()


def test_parquet_with_embedded_images_is_answered_with_its_own_questions(scenes, described, tmp_path):
    datasets = pytest.importorskip("datasets")
    encoded = []
    for scene in scenes[:3]:
        draw(scene).save(buffer := io.BytesIO(), format="PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    encoded.insert(1, {"bytes": b"no image", "path": None})
    ids, questions = ["a", "b", "c", "d"], ["Describe the picture.", "What?", "Describe the image.", None]
    columns = datasets.Features(
        {"image": datasets.Image(), "id": datasets.Value("string"), "question": datasets.Value("string")}
    )
    table = {"image": encoded, "id": ids, "question": questions}
    datasets.Dataset.from_dict(table, features=columns).to_parquet(tmp_path / "images.parquet")
    rows = run(tmp_path / "images.parquet", tmp_path / "answers", "--batch-size", "3")
    assert [row["id"] for row in rows] == ids
    assert [row.get("answer") for row in rows] == [described[0], None, *described[1:3]]
    assert "cannot identify" in rows[1]["error"]
    assert rows[2]["question"] == "Describe the image."


def test_broken_lines_of_a_listing_are_errors_of_their_rows_and_rotation_is_applied(scenes, described, tmp_path):
    image = draw(scenes[0])
    (exif := Image.Exif())[0x0112] = 6  # rotate by 90° clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    lines = ['{"image": "turned.png"}', "{", '{"image": "nowhere.png"}', "{}", "[1]", '{"image": "turned.png"}']
    (tmp_path / "listing.jsonl").write_text("\n".join(lines))
    rows = run(tmp_path / "listing.jsonl", tmp_path / "answers")
    assert [row.get("answer") for row in rows] == [described[0], *[None] * 4, described[0]]
    assert [row["row"] for row in read(tmp_path / "answers" / "errors.jsonl")] == [1, 2, 3, 4]


def test_a_source_with_the_same_file_names_but_other_content_is_refused(refused, scenes, tmp_path):
    datasets = pytest.importorskip("datasets")
    for day, scene in zip(("monday", "tuesday"), scenes[:2], strict=True):
        (tmp_path / day / "tables").mkdir(parents=True)
        (tmp_path / day / "images").mkdir()
        draw(scene).save(file := tmp_path / day / "images" / "1.png")
        table = datasets.Dataset.from_dict({"image": [{"bytes": file.read_bytes(), "path": None}]})
        table.to_parquet(tmp_path / day / "tables" / "1.parquet")
    for kind in ("images", "tables"):
        run(tmp_path / "monday" / kind, tmp_path / kind)
        assert "a different source" in refused(tmp_path / "tuesday" / kind, tmp_path / kind)
    listing = tmp_path / "listing.jsonl"
    listing.write_text('{"image": "monday/images/1.png", "question": "What?"}')
    run(listing, tmp_path / "listed")
    listing.write_text('{"image": "monday/images/1.png", "question": "Why??"}')
    assert "a different source" in refused(listing, tmp_path / "listed")


def test_text_that_is_not_unicode_does_not_stop_a_run(scenes, described, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    draw(scenes[0]).save(buffer := io.BytesIO(), format="PNG")
    (folder / name).write_bytes(buffer.getvalue())
    (row,) = run(folder, tmp_path / "answers")
    assert (row["image"], row["answer"]) == (name, described[0])
    half = r'"\ud83d"'
    lines = ['{"image": "%s"}', '{"image": "%s", "question": ' + half + "}", '{"image": "%s", "id": ' + half + "}"]
    draw(scenes[0]).save(tmp_path / "1.png")
    (tmp_path / "listing.jsonl").write_text("\n".join(lines).replace("%s", "1.png"))
    rows = run(tmp_path / "listing.jsonl", tmp_path / "listed")
    assert [row.get("answer") for row in rows] == [described[0], None, described[0]]
    assert "surrogates not allowed" in rows[1]["error"]
    assert rows[2]["id"] == "\ud83d"


def test_a_placeholder_in_a_question_is_not_part_of_its_text(scenes, described, tmp_path):
    draw(scenes[0]).save(tmp_path / "1.png")
    (tmp_path / "listing.jsonl").write_text(
        json.dumps({"image": "1.png", "question": "<image>\nDescribe the picture."})
    )
    (row,) = run(tmp_path / "listing.jsonl", tmp_path / "answers")
    assert row["answer"] == described[0]


def test_an_empty_folder_is_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no images in" in refused(tmp_path / "empty", tmp_path / "answers")


def test_a_source_that_is_missing_or_of_another_type_is_refused(refused, folder, tmp_path):
    assert f"there is no folder or file {tmp_path / 'nothing'}" in refused(tmp_path / "nothing", tmp_path / "answers")
    assert "expected a folder, a .json, .jsonl, .parquet file" in refused(folder / "00.png", tmp_path / "answers")
    assert not (tmp_path / "answers").exists()


def test_a_model_or_a_device_that_does_not_exist_is_refused(refused, folder, tmp_path):
    assert "no such model: a/b" in refused(folder, tmp_path / "answers", "--model", "a/b")
    assert "there is no device 'cuda:7'" in refused(folder, tmp_path / "more", "--device", "cuda:7")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_an_interrupted_run_ends_without_a_traceback_and_can_be_resumed(folder, tmp_path):
    images, output, undisturbed = (tmp_path / name for name in ("images", "output", "undisturbed"))
    for number in range(4):  # so many that the run cannot end before it is interrupted
        shutil.copytree(folder, images / str(number))
    command = [PROGRAM, "caption", images, "--output", output, *BATCH, "--max-new-tokens", 128]
    with Terminal(command, OMP_NUM_THREADS="1") as terminal:
        while not finished_lines(output):
            time.sleep(0.005)
        terminal.type(Terminal.CTRL_C)
        assert terminal.wait_for_exit() == 128 + signal.SIGINT
    assert "Traceback" not in terminal.seen
    assert "batch" in terminal.seen  # its progress
    assert 0 < finished_lines(output) < 4 * (NUM_SCENES + 2) // 2
    assert run(images, output, "--batch-size", "2") == run(images, undisturbed, "--batch-size", "2")


def test_images_are_read_batch_by_batch(folder):
    source, where = caption.open_source(folder)
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    settings = caption.Settings(str(ROOT), "What?", batch_size=2, max_new_tokens=1, do_image_splitting=None)
    batches = caption.Batches(source, where, processor, settings, [3, 0])
    assert len(batches) == 2
    assert [row["row"] for row in batches[0].rows] == [6, 7]
    assert len(batches[1].inputs["pixel_values"]) == 2


@pytest.mark.slow
def test_one_of_several_processes_logs_the_result(folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("00.png", "02.png"):
        (images / name).write_bytes((folder / name).read_bytes())
    output = tmp_path / "answers"
    for _ in range(2):
        options = ("--output", output, "--batch-size", 1, "--loaders", 0)
        said = run_processes("--no-python", PROGRAM, "caption", images, *options)
        assert said.count("answers.jsonl: 2 rows, 0 with errors") == 1
        assert said.count("?batch/s]") <= 1  # only the first process shows its progress
    assert len(read(output / "answers.jsonl")) == 2


def test_one_of_the_processes_that_finish_at_once_claims_the_result(tmp_path):
    places = {0: (tmp_path / "a.jsonl", 0), 1: (tmp_path / "b.jsonl", 0)}
    assert [caption.claim(tmp_path, places) for _ in range(3)] == [True, False, False]
    assert caption.claim(tmp_path, places | {2: (tmp_path / "c.jsonl", 0)}), "a resumed run may claim its result again"


def test_a_question_that_is_not_a_string_is_an_error_of_its_row(scenes, described, tmp_path):
    draw(scenes[0]).save(tmp_path / "1.png")
    lines = [json.dumps({"image": "1.png", "question": question}) for question in (5, ["Why?"], None)]
    (tmp_path / "listing.jsonl").write_text("\n".join(lines))
    rows = run(tmp_path / "listing.jsonl", tmp_path / "answers")
    assert [row.get("error") for row in rows] == [
        "question must be a string, but is 5",
        "question must be a string, but is ['Why?']",
        None,
    ]
    assert rows[2]["answer"] == described[0]
