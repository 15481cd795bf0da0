"""The script that trains the shipped checkpoint runs from scratch to a folder that loads."""

import json
import subprocess
import sys
from pathlib import Path

import curve
import pytest
import torch
from conversations import CAPTIONS, END, QUESTIONS, ConversationDataset
from PIL import Image
from scenes import HELD_OUT_PAIRS, QUESTION_KINDS, WORDINGS, describe, draw, scene_at
from score import evaluation_set

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.training import FlashSlothDataCollator

ROOT = Path(__file__).parents[1]


def test_images_are_the_same_every_time():
    assert draw(scene_at("train", 7), 96).tobytes() == draw(scene_at("train", 7), 96).tobytes()
    assert scene_at("train", 7) != scene_at("evaluation", 7)


def test_training_never_sees_the_held_out_pairs():
    def pairs(split):
        return {(thing.colour, thing.name) for i in range(2000) for thing in scene_at(split, i).things}

    assert pairs("train").isdisjoint(HELD_OUT_PAIRS)
    assert pairs("evaluation") >= HELD_OUT_PAIRS


@pytest.mark.parametrize("mix", [CAPTIONS, QUESTIONS])
def test_answers_and_their_end_are_the_only_labels(mix):
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    rows = [ConversationDataset(index, 1, 96, mix)[0]["messages"] for index in (3, 4)]
    batch = FlashSlothDataCollator(processor)([{"messages": row} for row in rows])
    for row, labels in zip(rows, batch["labels"], strict=True):
        answers = [message["content"][0]["text"] for message in row if message["role"] == "assistant"]
        learned = processor.tokenizer.decode(labels[labels >= 0])
        assert learned == "".join(f" {answer}{END}" for answer in answers)


def test_captions_are_descriptions_and_nothing_else():
    for index in range(20):
        (messages,) = ConversationDataset(index, 1, 96, CAPTIONS)[0].values()
        question, answer = (message["content"][-1]["text"] for message in messages)
        assert question in WORDINGS["describe"]
        assert answer == describe(scene_at("train", index))


def test_training_also_asks_where_objects_are():
    conversations = map(ConversationDataset(0, 50, 96, QUESTIONS).__getitem__, range(50))
    asked = [m["content"][-1]["text"] for row in conversations for m in row["messages"] if m["role"] == "user"]
    assert any(question.startswith("Where is the") for question in asked)
    assert any(question.endswith(" left or right?") for question in asked)


def test_blocks_of_conversations_are_sorted_and_complete():
    plain, sorted_ = (ConversationDataset(5, 10, 96, QUESTIONS, block=block) for block in (1, 4))
    texts = [
        [str(row["messages"][1:]) for row in rows]
        for rows in (map(plain.__getitem__, range(10)), map(sorted_.__getitem__, range(10)))
    ]
    for start in range(0, 10, 4):
        assert set(texts[0][start : start + 4]) == set(texts[1][start : start + 4])
        lengths = [len(processed(sorted_[row])) for row in range(start, min(start + 4, 10))]
        assert lengths == sorted(lengths)
    assert str(sorted_[7]["messages"][1:]) == texts[1][7]  # independent of the order of access


def processed(row):
    return "".join(content.get("text", "") for message in row["messages"] for content in message["content"])


def test_every_second_turn_follows_a_different_question():
    questions = list(evaluation_set(50))
    assert {question.kind for question in questions} == set(QUESTION_KINDS)
    for question in questions:
        assert question.before[0] != question.text
        others = [other for other in questions if other.image is question.image and other.kind != "describe"]
        assert question.before in [(other.text, other.answer) for other in others]


def test_a_learning_curve_continues_across_stages(tmp_path):
    right = {kind: [1, 2] for kind in (*QUESTION_KINDS, "all")}
    for stage, images in (("captions", [10, 20]), ("conversations", [5, 10, 10])):
        points = [{"stage": stage, "step": n, "images": n, "right": right} for n in images]
        (tmp_path / stage).mkdir()
        (tmp_path / stage / curve.FILE_NAME).write_text("".join(json.dumps(point) + "\n" for point in points))
    points = curve.read_curve(tmp_path, ("captions", "conversations"))
    assert [point["images"] for point in points] == [10, 20, 25, 30]
    curve.plot(points, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").width == 900


@pytest.mark.slow
def test_the_script_trains_a_checkpoint_that_loads(tmp_path):
    counts = (
        "--tower-steps",
        "--caption-steps",
        "--steps",
        "--curve-images",
        "--evaluation-images",
    )
    arguments = [argument for count in counts for argument in (count, "2")]
    script = [
        sys.executable,
        ROOT / "examples" / "tiny" / "make_checkpoint.py",
        "--output",
        tmp_path / "tiny",
        *arguments,
    ]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    model = FlashSlothForConditionalGeneration.from_pretrained(tmp_path / "tiny")
    assert model.dtype == torch.bfloat16
    shipped = json.loads((ROOT / "config.json").read_text())
    trained = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert trained["text_config"]["hidden_size"] == shipped["text_config"]["hidden_size"]
    assert json.loads((tmp_path / "tiny" / "evaluation.json").read_text())["all"]["asked"] > 0
    points = curve.read_curve(tmp_path / "tiny-work", ("captions", "conversations"))
    assert [(point["stage"], point["step"], point["images"]) for point in points] == [
        ("captions", 2, 128),
        ("conversations", 2, 128 + 64),
    ]
