"""The recipe of the shipped checkpoint: its scenes, questions and targets are right, and it trains from nothing."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import art
import curve
import matplotlib
import new_styles
import numpy as np
import pytest
import torch
from conversations import END, WEIGHTS, ConversationDataset, Mix, TileCollator, build_tokenizer
from foreign import KINDS as FOREIGN_KINDS
from foreign import ForeignImages
from looks import boxes_in_tile, looks_loss, looks_of, parts_of, patches_of
from other_drawings import draw_svg
from PIL import Image, ImageDraw
from questions import KINDS, REFUSAL, WORDINGS, Question, describe, place_of, questions, questions_on_two
from scenes import (
    CHARACTERS,
    COLOURS,
    MIN_BRIGHTNESS,
    PAINT_JITTER,
    SHAPES,
    Art,
    Box,
    Layout,
    Scene,
    Thing,
    character_boxes,
    draw,
    draw_with_masks,
    sample_string,
    scene_at,
)
from score import (
    NOT_REFUSED,
    Counts,
    Item,
    as_summary,
    count_right,
    evaluate,
    other_ways,
    scene_items,
    write_page,
)
from tower import IGNORED, NAMES, TowerForPatches, crop, find_patch_targets, scale_features
from transformers import SiglipVisionConfig, SiglipVisionModel

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration, FlashSlothProcessor

ROOT = Path(__file__).parents[1]
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
WHITE = ((255, 255, 255), (255, 255, 255))
DRAWN = ("apple", "dog", "house")


def thing(name, colour, box, text="", paint=(255, 0, 0)):
    return Thing(name, colour, paint, Box(*box), text, (255, 255, 255), 1)


def scene_of(*things, size=(144, 144)):
    return Scene(things, size, "plain", WHITE, 0)


@pytest.fixture(scope="module")
def art_folder(tmp_path_factory):
    """What `art.py` fetches, in little: three things in every style, one font under every name, and photographs."""
    folder = tmp_path_factory.mktemp("art")
    for style, name in itertools.product((*art.STYLES, *art.TEST_STYLES), DRAWN):
        drawing = Image.new("RGBA", (128, 128))
        ImageDraw.Draw(drawing).regular_polygon((64, 64, 50), 3 + DRAWN.index(name), fill="teal")
        for slug in art.SLUGS[name]:
            file = folder / "emoji" / style / f"{slug}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            drawing.save(file)
    (folder / "fonts").mkdir()
    for font in (*art.FONTS, *art.TEST_FONTS):
        shutil.copy(FONT, folder / "fonts" / f"{font}-400.woff")
        (folder / "fonts" / f"{font}.LICENSE").touch()
    for name in ("photographs", "test-photographs"):
        (folder / name).mkdir()
        Image.effect_noise((300, 200), 90).convert("RGB").save(folder / name / "0.jpg")
    return folder


@pytest.fixture(scope="module")
def foreign(art_folder):
    return ForeignImages([art_folder / "photographs" / "0.jpg"], [FONT])


# ---- scenes ----------------------------------------------------------------------------------------------------------


def test_images_are_the_same_every_time():
    assert draw(scene_at("train", 7)).tobytes() == draw(scene_at("train", 7)).tobytes()
    assert scene_at("train", 7) != scene_at("evaluation", 7)


def test_what_is_drawn_varies():
    scenes = [scene_at("train", index) for index in range(600)]
    things = [one for scene in scenes for one in scene.things]
    assert {len(scene.things) for scene in scenes} == {0, 1, 2, 3, 4, 5, 6}
    assert {one.name for one in things} == {*SHAPES, "sign", "word", "number"}
    assert {one.colour for one in things} == set(COLOURS)
    assert {len(one.text) for one in things if one.text} == set(range(1, 9))
    stretches = [scene.size[0] / scene.size[1] for scene in scenes]
    assert min(stretches) < 0.5
    assert max(stretches) > 2
    assert 0.25 < np.mean([scene.colours == WHITE for scene in scenes]) < 0.45


def test_text_can_be_read_and_is_never_covered():
    for index in range(300):
        scene = scene_at("train", index)
        for one in scene.things:
            if one.text:
                assert one.box.bottom - one.box.top >= Layout().text_height - 1e-6
                assert not any(one.box.overlap(other.box) for other in scene.things if other is not one)


def test_pictures_do_not_mean_two_things():
    paints = [(colour, paint) for colour, paints in COLOURS.items() for paint in paints]
    for (colour, paint), (other, paint_of_other) in itertools.combinations(paints, 2):
        furthest = max(abs(a - b) for a, b in zip(paint, paint_of_other, strict=True))
        assert colour == other or furthest > 2 * PAINT_JITTER
    whites, greys = ([min(paint) for paint in COLOURS[colour]] for colour in ("white", "grey"))
    assert min(whites) * MIN_BRIGHTNESS > max(greys) + PAINT_JITTER
    rng = random.Random(0)
    assert not [text for text in (sample_string(rng) for _ in range(5000)) if set(text) <= set("OoIl")]


def test_small_things_are_shapes(art_folder):
    art_ = Art(art_folder)
    things = [(one, scene.size) for i in range(400) for scene in [scene_at("train", i, art_)] for one in scene.things]
    sides = {
        kind: min((one.box.right - one.box.left) * (one.box.bottom - one.box.top) for one, _ in things if is_kind(one))
        ** 0.5
        for kind, is_kind in (("emoji", lambda one: one.name in DRAWN), ("shape", lambda one: one.name in SHAPES))
    }
    assert sides["emoji"] >= Layout().emoji_side > sides["shape"]


def test_lines_are_full_of_text():
    scenes = [scene_at("train", index, None, Layout(lines=(2, 5))) for index in range(50)]
    assert 12 < np.mean([sum(len(one.text) for one in scene.things) for scene in scenes]) < 40
    for scene in scenes:
        assert all(0 <= one.box.left < one.box.right <= 1 and one.text for one in scene.things)
        for first, second in itertools.combinations(scene.things, 2):
            assert first.box.overlap(second.box) == 0


def test_art_is_drawn_and_test_styles_and_fonts_are_never_trained_on(art_folder):
    drawn = {one.name for i in range(60) for one in scene_at("train", i, Art(art_folder)).things}
    assert set(DRAWN) < drawn
    assert not set(art.STYLES) & set(art.TEST_STYLES)
    assert not set(art.FONTS) & set(art.TEST_FONTS)
    files = [*itertools.chain(*Art(art_folder).drawings.values()), *Art(art_folder).font_files]
    assert not [file for file in files if any(name in str(file) for name in (*art.TEST_STYLES, *art.TEST_FONTS))]


def test_an_icon_becomes_an_svg_file():
    icons = {"width": 8, "icons": {"dog": {"body": "<g/>"}}, "aliases": {"hound": {"parent": "dog"}}}
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 16"><g/></svg>'
    assert art.find_svg(icons, "dog") == art.find_svg(icons, "hound") == svg
    assert art.find_svg(icons, "cat") is None


def test_a_missing_program_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="no-such-program, which was not found"):
        art.run(["no-such-program"], tmp_path)


def test_masks_show_what_is_seen_of_each_thing():
    below = thing("square", "red", (0.1, 0.1, 0.5, 0.5))
    above = thing("circle", "blue", (0.3, 0.3, 0.9, 0.9), paint=(0, 0, 255))
    image, masks = draw_with_masks(scene_of(below, above), layout=Layout(quality=0.0))
    seen = [np.asarray(mask) > 200 for mask in masks]
    pixels = np.asarray(image)
    assert (pixels[seen[1]] == (0, 0, 255)).all()
    assert not (seen[0] & seen[1]).any()
    assert (pixels[~(seen[0] | seen[1])][:, 1] == 255).mean() > 0.9  # the ground


def test_another_program_draws_the_same_kind_of_scene():
    scene, image = draw_svg(random.Random(3))
    assert image.size == scene.size
    assert {one.name for one in scene.things} <= set(SHAPES)
    assert len(image.getcolors(2**20)) > 2


def test_every_kind_of_foreign_image_is_sampled(foreign):
    for kind in FOREIGN_KINDS:
        image = foreign.sample(random.Random(1), kind)
        assert np.asarray(image).std() > 10
        assert image.tobytes() == foreign.sample(random.Random(1), kind).tobytes()


# ---- questions -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked():
    """Questions and answers, in all wordings of many runs, about a scene of four things."""
    scene = scene_of(
        thing("star", "green", (0.05, 0.05, 0.25, 0.25)),
        thing("circle", "green", (0.75, 0.05, 0.95, 0.25)),
        thing("circle", "red", (0.75, 0.75, 0.95, 0.95)),
        thing("sign", "white", (0.05, 0.78, 0.3, 0.92), "PULL"),
    )
    return {(q.text, q.answer) for seed in range(2500) for q in questions(scene, random.Random(seed))}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What colour is the star?", "green"),
        ("Which shape is red?", "circle"),
        ("How many circles are there?", "2"),
        ("How many objects do you see?", "4"),
        ("Where is the red circle?", "bottom right"),
        ("Is the star left or right of the red circle?", "left"),
        ("Is the star above the sign?", "yes"),
        ("Is there a red circle?", "yes"),
        ("Is there a blue shape?", None),
        ("Is there a heart?", "no"),
        ("What color is the heart?", "there is no heart"),
        ("Read the sign.", "PULL"),
        ("What does it say?", "PULL"),
        (
            "Describe the image.",
            "a green star top left, a green circle top right, a white sign PULL bottom left, a red circle bottom right",
        ),
        ("What colour is the circle?", None),  # there are two
        ("Which shape is green?", None),
        ("Where is the shape?", None),
        ("Is the star green?", "yes"),
        ("Is the star under the sign?", "no"),
        ("What is the colour of the shape in the upper left corner?", "green"),
        ("Is there any red circle?", "yes"),
        ("Are there any circles?", "yes"),
        ("Are there hearts in the picture?", "no"),
        ("Is the star to the left or right of the red circle?", "left"),
    ],
)
def test_questions_have_the_only_right_answer(asked, question, answer):
    assert {found for text, found in asked if text == question} == ({answer} if answer else set())


def test_a_thing_is_also_asked_for_by_its_category():
    asked = {
        (q.text, q.answer)
        for name in ("dog", "pear", "key")
        for seed in range(60)
        for q in questions(scene_of(thing(name, "", (0.05, 0.05, 0.3, 0.3))), random.Random(seed))
    }
    assert {("What animal is this?", "dog"), ("What fruit do you see?", "pear"), ("What is this?", "key")} <= asked
    assert ("What animal is in the top left corner?", "dog") in asked
    assert not any(answer == "key" and {"animal", "fruit", "vehicle"} & set(text.split()) for text, answer in asked)


def test_nothing_is_said_to_be_there_as_often_as_not():
    answers = Counter(
        question.answer
        for index in range(200)
        for question in questions(scene_at("train", index), random.Random(index))
        if question.kind == "is there"
    )
    assert 0.8 < answers["yes"] / answers["no"] < 1.1


def test_an_empty_scene_has_nothing():
    empty = scene_of()
    assert describe(empty) == "nothing"
    answers = {q.answer for q in questions(empty, random.Random(0)) if q.kind in ("count", "is there")}
    assert answers == {"0", "no"}


@pytest.mark.parametrize(
    ("centre", "place"),
    [((0.1, 0.1), "top left"), ((0.5, 0.5), "middle"), ((0.5, 0.9), "bottom"), ((0.9, 0.5), "right")],
)
def test_there_are_nine_places(centre, place):
    box = [centre[0] - 0.05, centre[1] - 0.05, centre[0] + 0.05, centre[1] + 0.05]
    assert place_of(thing("star", "red", box)) == place


def test_questions_about_two_images_name_one_or_ask_which():
    first, second = (scene_of(thing(name, "red", (0.1, 0.1, 0.4, 0.4))) for name in ("star", "heart"))
    asked = {(q.text, q.answer) for seed in range(600) for q in questions_on_two(first, second, random.Random(seed))}
    assert ("Which image has a heart?", "the second") in asked
    assert ("Which image has the star?", "the first") in asked
    assert ("Which image has a red shape?", "both") in asked
    assert any(text.startswith("Which image has") and answer.startswith("there is no") for text, answer in asked)
    assert ("In image 2, what shape do you see?", "heart") in asked
    assert ("What is this in the first image?", "red star") in asked
    assert ("What shape do you see in the second picture?", "heart") in asked


def test_every_further_question_follows_others_about_the_same_image():
    items = list(scene_items(30))
    assert {item.kind for item in items} == {*KINDS} - {"thing", "refuse"} | {"thing"} & {item.kind for item in items}
    for item in other_ways(items):
        pairs = [(other.question, other.answer) for other in items if other.images[0] is item.images[0]]
        assert set(item.before) < set(pairs)
        assert (item.question, item.answer) not in item.before
        assert len(item.before) <= {"as second question": 1, "as third question": 2, "five tiles": 0}[item.suite]


def test_right_answers_are_counted_by_suite_and_kind():
    items = [Item("a", "x", (), "?", "1"), Item("a", "y", (), "?", "2"), Item("b", "x", (), "?", "1", is_split=True)]
    result = evaluate(items, lambda batch: ["1"] * len(batch))
    shares = {suite: {kind: (c.right, c.asked) for kind, c in kinds.items()} for suite, kinds in result.items()}
    found = {"a": {"x": (1, 1), "y": (0, 1), "all": (1, 2)}, "b": {"x": (1, 1), "all": (1, 1)}}
    assert shares == found | {NOT_REFUSED: {"all": (3, 3)}}


def test_refusals_of_what_is_known_are_counted():
    items = [Item("foreign", "noise", (), "?", REFUSAL), Item("a", "x", (), "?", "1"), Item("a", "x", (), "?", "2")]
    result = count_right(items, [REFUSAL, REFUSAL, "3"])
    assert result["foreign"]["all"] == Counts(1, 1)
    assert result[NOT_REFUSED]["all"] == Counts(2, 1)
    assert as_summary(result).endswith("| all of what it knows (not refused) | 2 | 99.0% | 50.0% |")


def test_the_summary_compares_shares_with_aims():
    scenes = {"count": Counts(50, 40), "read": Counts(60, 57), "place": Counts(3, 0), "all": Counts(113, 97)}
    result = {"scenes": scenes, "five tiles": {"all": Counts(4, 3)}, "small": {"all": Counts(2, 1)}}
    assert as_summary(result).splitlines()[2:] == [
        "| scenes that it was not trained on | 113 | 97.0% | 85.8% |",
        "| the same, the weakest kind (count) | 50 | 92.0% | 80.0% |",  # of those asked often
        "| the same, in five tiles | 4 | 83.8% | 75.0% |",  # two points less than all scenes
        "| small things and texts | 2 |  | 50.0% |",
    ]


def test_the_page_shows_right_and_wrong_answers(tmp_path):
    items = [item for item in scene_items(3) if item.kind != "describe"]
    texts = [item.answer if place % 2 else "something else" for place, item in enumerate(items)]
    write_page(items, texts, tmp_path / "answers.md")
    page = (tmp_path / "answers.md").read_text()
    assert page.count("| the same |\n") == page.count("**something else**") == 4
    assert Image.open(tmp_path / "answers" / "scenes.webp").height == 144


def test_every_kind_of_question_is_also_asked_first(foreign):
    dataset = conversations(300, foreign, Mix(7, WEIGHTS, share_foreign=0.05))
    firsts = Counter()
    for index in range(300):
        dataset[index]
        firsts[dataset._sorted[1][index % 4][1][0].kind] += 1
    assert set(firsts) == {*KINDS} - {"thing"} | {"thing"} & set(firsts)
    assert firsts["describe"] > 15


# ---- what is learned -------------------------------------------------------------------------------------------------


def test_patches_have_the_targets_of_what_is_on_them():
    scene = scene_of(
        thing("star", "red", (0.0, 0.0, 0.5, 0.5)), thing("word", "black", (0.5, 0.5, 1, 1), "HI", (0, 0, 0))
    )
    _, masks = draw_with_masks(scene)
    targets = find_patch_targets(scene, masks, 12, Art())
    names = targets.labels[:, 0].reshape(12, 12)
    assert NAMES[names[2, 3]] == "star"
    assert NAMES[names[2, 9]] == NAMES[names[9, 2]] == "nothing"
    assert NAMES[names[9, 9]] == "word"
    numbers = targets.labels[:, 3].reshape(12, 12)
    assert set(numbers[:, 6:9].flatten()) == {IGNORED, 0}
    assert 1 in numbers[:, 9:]
    places = targets.places.reshape(12, 12, 6)
    assert places[2, 3] == pytest.approx((0.25 - 3.5 / 12, 0.25 - 2.5 / 12, 0.5, 0.5, -0.25, -0.25))
    assert np.isnan(places[2, 9]).all()


def test_two_characters_may_share_a_patch():
    text = "BASEBALL"
    word = thing("word", "black", (0.1, 0.4, 0.1 + 8 * 0.7 / 12, 0.6), text, (0, 0, 0))
    scene = scene_of(word)
    _, masks = draw_with_masks(scene)
    labels = find_patch_targets(scene, masks, 12, Art()).labels.reshape(12, 12, -1)
    pairs = {
        (int(number), CHARACTERS[character])
        for half in (2, 4)
        for character, number in labels[..., half : half + 2].reshape(-1, 2)
        if number != IGNORED
    }
    assert pairs == set(enumerate(text))


def test_scaled_features_are_the_same_but_for_their_size():
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=12
    )
    tower = SiglipVisionModel(config).eval()
    tower.post_layernorm = torch.nn.Identity()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        before = tower(pixels).last_hidden_state
        scale_features(tower, 0.1)
        torch.testing.assert_close(10 * tower(pixels).last_hidden_state, before, rtol=1e-3, atol=1e-3 * before.std())


def test_towers_for_new_styles_learn_and_choose_among_some_names_and_styles(art_folder):
    assert set(new_styles.ORDER) == set(art.STYLES)
    assert set(new_styles.first_names(52)) < set(new_styles.first_names(104))
    drawn = new_styles.load_art(art_folder, ("noto", "twemoji"), ("apple", "dog", "ghost"))
    assert {file.parent.name for file in itertools.chain(*drawn.drawings.values())} == {"noto", "twemoji"}
    tower = TowerForPatches(FlashSlothConfig.from_pretrained(ROOT).vision_config, new_styles.WINDOW_SIZE)
    torch.nn.init.zeros_(tower.head.weight)
    with torch.no_grad():
        tower.head.bias[NAMES.index("dog")] = 1
        tower.head.bias[NAMES.index("house")] = 2
    assert new_styles.count_right(tower, drawn, ("apple", "dog", "ghost")) == (4, 8)
    assert new_styles.count_right(tower, drawn, ("apple", "dog", "house")) == (0, 8)


def test_questions_are_about_the_patches_of_their_things():
    star, heart = thing("star", "red", (0, 0, 0.25, 0.25)), thing("heart", "red", (0.5, 0.5, 1, 1))
    patches = patches_of([star.box], 4).view(4, 4)
    assert patches.nonzero().tolist() == [[0, 0]]
    assert patches_of([Box(0.3, 0.3, 0.31, 0.31)], 4).sum() == 1  # none is smaller than a patch
    asked = [[[(0, star.box)]], [[(1, heart.box)]], []], [[[(0, star.box)], [(0, heart.box), (0, star.box)]]]
    rows = [(asked[0], [(40, 40), (40, 40)]), (asked[1], [(40, 40)])]
    looks = looks_of(rows, 4, 1)
    assert looks.shape == (4, 8, 2 * 16)
    assert [row.nonzero().tolist() for row in looks[[0, 2]]] == [[[0, 0]], []]
    assert looks.view(4, 8, 2, 16).sum(-1)[:, :2].tolist() == [
        [[1, 0], [0, 0]],
        [[0, 4], [0, 0]],
        [[0, 0], [0, 0]],
        [[1, 0], [5, 0]],
    ]
    assert [len(boxes_in_tile([heart.box], (40, 40), tile, 5)) for tile in range(5)] == [1, 0, 0, 0, 1]
    assert looks_of(rows, 4, 5).view(4, 8, 2, 5, 16)[3, 1, 0].sum(-1).tolist() == [5, 4, 0, 0, 16]


def test_things_and_the_characters_of_an_answer_are_looked_at_apart():
    sizes = [(40, 40)]
    star, word = thing("star", "red", (0, 0, 0.2, 0.2)), thing("word", "black", (0, 0.5, 1, 0.8), "HOW")
    both = ((0, star), (0, word))
    read = parts_of(Question("read", "?", "HOW", both[1:]), sizes, Art(), True)
    assert [len(part) for part in read] == [1, 1, 1]
    middles = [box.centre for ((_, box),) in read]
    assert middles == sorted(middles)
    assert all(word.box.left <= x <= word.box.right and word.box.top <= y <= word.box.bottom for x, y in middles)
    described = parts_of(
        Question("describe", "?", "a red star top left, a black word HOW bottom", both), sizes, Art(), True
    )
    assert described == [[(0, star.box)], [(0, word.box)], *read]
    assert parts_of(Question("left of", "?", "yes", both), sizes, Art(), True) == described[:2]
    assert parts_of(Question("colour", "?", "black", both[1:]), sizes, Art(), True) == [[(0, word.box)]]
    long = ((0, thing("word", "black", (0, 0.5, 1, 0.8), "ABCDEFGH")), (0, star))
    assert len(parts_of(Question("place", "?", "a word ABCDEFGH, a red star", long), sizes, Art(), True)) == 8
    together = [[(0, star.box), (0, word.box)]]
    assert parts_of(Question("left of", "?", "yes", both), sizes, Art(), False) == together
    assert parts_of(Question("describe", "?", "a red star", both), sizes, Art(), False) == []
    assert parts_of(Question("absent", "?", "no"), sizes, Art(), True) == []


def test_attention_to_what_is_asked_about_lowers_the_loss():
    looks = torch.zeros(2, 8, 4, dtype=torch.bool)
    looks[0, 0, 0] = True
    uniform = torch.full((2, 2, 3, 4), 0.25)
    right = torch.tensor([0.97, 0.01, 0.01, 0.01]).expand(2, 2, 3, 4)
    assert looks_loss(uniform, looks) == pytest.approx(np.log(4))  # the second question is about nothing
    assert looks_loss(right, looks) < 0.05
    assert looks_loss(uniform, looks[1:].expand(2, -1, -1)) == 0


def test_each_part_has_queries_of_its_own():
    looks = torch.zeros(1, 8, 4, dtype=torch.bool)
    looks[0, 0, 0] = looks[0, 1, 3] = True
    first = torch.tensor([1.0, 0, 0, 0]).expand(1, 2, 3, 4)
    assert looks_loss(first, looks) > 5  # nothing looks at the second part
    turns = torch.eye(4)[[0, 3, 0]].expand(1, 2, 3, 4)
    assert looks_loss(turns, looks) == 0


def test_printed_text_is_spelled_and_words_of_questions_are_tokens():
    tokenizer = build_tokenizer(Art())
    assert tokenizer.tokenize(" erbana STOP") == ["Ġ", *"erbana", "Ġ", *"STOP"]
    words = "What does the sign say? a red star top left, there is no airplane."
    assert len(tokenizer.tokenize(words)) == 17
    for text in (words, "naïve 中 42", "In image 2, where's the dog?"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_characters_are_where_they_are_drawn():
    word = thing("word", "black", (0.05, 0.3, 0.95, 0.7), "IiM", (0, 0, 0))
    image = draw(scene_of(word, size=(300, 300)), layout=Layout(quality=0.0))
    ink = np.asarray(image.convert("L")) < 128
    boxes = character_boxes(word, (300, 300), Art())
    columns = np.flatnonzero(ink.any(0)) / 300
    assert boxes[0].left - 0.01 < columns[0]
    assert boxes[-1].right + 0.01 > columns[-1]
    for box in boxes:
        assert ink[:, round(300 * box.left) : round(300 * box.right)].any()
    assert not any(ink[:, round(300 * box.left)].any() for box in boxes)  # the characters have gaps


def test_a_part_of_a_scene_keeps_what_is_still_seen():
    scene = scene_of(thing("star", "red", (0.0, 0.0, 0.3, 0.3)), thing("heart", "red", (0.7, 0.7, 1, 1)))
    image, masks = draw_with_masks(scene)
    kept = set()
    for seed in range(40):
        part, shown, seen = crop(scene, image, masks, random.Random(seed))
        assert shown.size == part.size == seen[0].size if seen else True
        kept.add(tuple(one.name for one in part.things))
    assert ("star",) in kept
    assert ("heart",) in kept


def conversations(number, foreign, mix=None, block=1):
    mix = mix or Mix(5, WEIGHTS)
    return ConversationDataset(5, number, mix, Art(), foreign, batch=4, block=block)


@pytest.mark.parametrize("is_split", [False, True])
def test_answers_and_their_end_are_the_only_labels(foreign, is_split):
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    rows = [row | {"do_image_splitting": is_split} for row in map(conversations(4, foreign).__getitem__, (0, 1))]
    batch = TileCollator(processor)(rows)
    assert len(batch["pixel_values"]) == 2 * (5 if is_split else 1)
    for row, labels in zip(rows, batch["labels"], strict=True):
        answers = [message["content"][0]["text"] for message in row["messages"] if message["role"] == "assistant"]
        learned = processor.tokenizer.decode(labels[labels >= 0])
        assert learned == "".join(f" {answer}{END}" for answer in answers)


def test_a_mix_has_two_images_tiles_and_refusals_in_its_shares(foreign):
    mix = Mix(4, WEIGHTS, share_described=0.5, share_two=0.3, share_split=0.5, share_foreign=0.2)
    dataset = conversations(240, foreign, mix)
    rows = [dataset[index] for index in range(240)]
    texts = [[part.get("text") for message in row["messages"] for part in message["content"]] for row in rows]
    refused = [REFUSAL in row for row in texts]
    assert all(set(row[1:][1::2]) == {REFUSAL} for row, is_refused in zip(texts, refused, strict=True) if is_refused)
    two = [sum(part["type"] == "image" for part in row["messages"][0]["content"]) == 2 for row in rows]
    described = [
        row[-2].lower().rstrip(".?") in {w.lower().rstrip(".?") for w in WORDINGS["describe"]} for row in texts
    ]
    for found, share in ((refused, 0.2), (two, 0.3), (described, 0.25)):
        assert np.mean(found) == pytest.approx(share, abs=0.13)
    for start in range(0, 240, 4):
        assert len({row["do_image_splitting"] for row in rows[start : start + 4]}) == 1
    assert 0.2 < np.mean([row["do_image_splitting"] for row in rows]) < 0.8


def test_blocks_of_conversations_are_sorted_and_complete(foreign):
    plain, sorted_ = (conversations(20, foreign, block=block) for block in (1, 4))
    texts = [sorted(_said(row[index]) for index in range(16)) for row in (plain, sorted_)]
    assert texts[0] == texts[1]
    lengths = [len(_said(sorted_[index])) for index in range(16)]
    assert lengths == sorted(lengths)
    assert _said(sorted_[7]) == _said(conversations(20, foreign, block=4)[7])  # independent of the order of access


def _said(row):
    return "".join(content.get("text", "") for message in row["messages"] for content in message["content"])


def test_a_learning_curve_continues_across_stages(tmp_path):
    right = {"scenes": [1, 2], "two images": [2, 2]}
    for stage, images in (("captions", [10, 20]), ("conversations", [5, 10, 10])):
        points = [{"stage": stage, "step": n, "images": n, "right": right} for n in images]
        (tmp_path / stage).mkdir()
        (tmp_path / stage / curve.FILE_NAME).write_text("".join(json.dumps(point) + "\n" for point in points))
    points = curve.read_curve(tmp_path, ("captions", "conversations"))
    assert [point["images"] for point in points] == [10, 20, 25, 30]
    curve.plot(points, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").width == 900


@pytest.mark.slow
def test_a_killed_script_goes_on_and_its_checkpoint_loads(art_folder, tmp_path):
    counts = {"--tower-steps": ["6"], "--steps": ["2"] * 5, "--curve-scenes": ["1"], "--evaluation-scenes": ["2"]}
    arguments = [part for name, values in counts.items() for part in (name, *values)]
    script = [sys.executable, ROOT / "examples" / "tiny" / "make_checkpoint.py", "--output", tmp_path / "tiny"]
    script += ["--art", art_folder, *arguments]
    first = subprocess.Popen(script, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    finished = tmp_path / "tiny-work" / "tower" / "windows.safetensors"
    while not finished.exists() and first.poll() is None:
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    written = finished.stat().st_mtime
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert finished.stat().st_mtime == written
    model = FlashSlothForConditionalGeneration.from_pretrained(tmp_path / "tiny")
    assert model.dtype == torch.bfloat16
    shipped = json.loads((ROOT / "config.json").read_text())
    trained = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert trained["text_config"]["hidden_size"] == shipped["text_config"]["hidden_size"]
    result = json.loads((tmp_path / "tiny" / "evaluation.json").read_text())
    assert {"scenes", "five tiles", "two images", "other program", "naming", "naming, fxemoji"} <= set(result)
    points = curve.read_curve(tmp_path / "tiny-work", curve.STAGES)
    found = [(point["stage"], point["step"], point["images"]) for point in points]
    assert found == [
        ("captions", 2, 128),
        ("conversations", 2, 192),
        ("refinement", 2, 256),
        ("whole", 2, 320),
        ("hardest", 2, 384),
    ]
