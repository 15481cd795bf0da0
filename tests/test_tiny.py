"""The script that trains the shipped checkpoint runs from nothing to a folder that loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversations import END, IGNORED, ConversationCollator, conversation
from scenes import HELD_OUT_PAIRS, draw, scene_at

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor

ROOT = Path(__file__).parents[1]


def test_pictures_are_the_same_every_time():
    assert draw(scene_at("train", 7), 96).tobytes() == draw(scene_at("train", 7), 96).tobytes()
    assert scene_at("train", 7) != scene_at("evaluation", 7)


def test_training_never_sees_the_held_out_pairs():
    def pairs(split):
        return {(thing.colour, thing.name) for i in range(2000) for thing in scene_at(split, i).things}

    assert pairs("train").isdisjoint(HELD_OUT_PAIRS)
    assert pairs("evaluation") >= HELD_OUT_PAIRS


def test_answers_and_their_end_are_the_only_labels():
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    batch = ConversationCollator(processor)([conversation(3, 96), conversation(4, 96)])
    for row, labels in enumerate(batch["labels"]):
        answers = [m["content"][0]["text"] for m in conversation(3 + row, 96) if m["role"] == "assistant"]
        learned = processor.tokenizer.decode(labels[labels != IGNORED])
        assert learned == "".join(f" {answer}{END}" for answer in answers)


@pytest.mark.slow
def test_the_script_trains_a_checkpoint_that_loads(tmp_path):
    steps = ["--tower-steps", "2", "--steps", "2", "--joint-steps", "2", "--evaluation-pictures", "2"]
    script = [sys.executable, str(ROOT / "examples" / "tiny" / "train.py"), "--output", str(tmp_path / "tiny"), *steps]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    model = FlashSlothForConditionalGeneration.from_pretrained(tmp_path / "tiny")
    assert model.dtype == torch.bfloat16
    shipped = json.loads((ROOT / "config.json").read_text())
    trained = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert trained["text_config"]["hidden_size"] == shipped["text_config"]["hidden_size"]
    assert json.loads((tmp_path / "tiny" / "evaluation.json").read_text())["all"]["asked"] > 0
