"""Data sets in every accepted form become rows of one form, and similar rows share a batch."""

import io
import itertools
import json
import sys

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import Image
from torch.utils.data import BatchSampler, ConcatDataset

from flashsloth.training import ModalityLengthSampler, load_rows, normalize_row, row_lengths

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep the cache of `datasets` in a temporary folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    """A folder with an image of each colour."""
    for name, color in COLORS.items():
        Image.new("RGB", (20, 16), color).save(tmp_path / f"{name}.png")
    return tmp_path


def llava(*turns, **columns):
    """Turns of human and gpt."""
    speakers = ("human", "gpt") * len(turns)
    return columns | {"conversations": [{"from": s, "value": v} for s, v in zip(speakers, turns, strict=False)]}


LLAVA_ROWS = [
    llava("<image>\nWhich colour?", "Red.", "Sure?", "Yes.", id="a", image="red.png"),
    llava("What is 1 + 1?", "2"),
    llava("Compare <image> and\n<image>", "Green and blue.", image=["green.png", "blue.png"]),
]


def text(text):
    return {"type": "text", "text": text}


def image(source):
    return {"type": "image", "image": source}


def messages(question, answer="Yes."):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def encoded(color):
    file = io.BytesIO()
    Image.new("RGB", (20, 16), COLORS[color]).save(file, "png")
    return file.getvalue()


def color_of(image):
    return next(name for name, color in COLORS.items() if image.convert("RGB").getpixel((0, 0)) == color)


def images_of(row):
    return [part["image"] for message in row["messages"] for part in message["content"] if part["type"] == "image"]


def write_lines(file, rows):
    file.write_text("\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return file


# ---- LLaVA's files ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["json", "jsonl", "streamed json", "streamed jsonl"])
def llava_rows(request, folder):
    """The rows of a LLaVA file, read every way."""
    how, name = request.param.rpartition(" ")[::2]
    file = write_lines(folder / "rows.jsonl", LLAVA_ROWS) if name == "jsonl" else folder / "rows.json"
    if name == "json":
        file.write_text(json.dumps(LLAVA_ROWS), encoding="utf-8")
    return list(load_rows(file, streaming=bool(how)))


def test_llava_files_become_conversations(llava_rows, folder):
    assert [row["index"] for row in llava_rows] == [0, 1, 2]
    assert all(set(row) == {"messages", "index"} for row in llava_rows)
    assert llava_rows[0]["messages"] == [
        {"role": "user", "content": [image(str(folder / "red.png")), text("Which colour?")]},
        {"role": "assistant", "content": [text("Red.")]},
        {"role": "user", "content": [text("Sure?")]},
        {"role": "assistant", "content": [text("Yes.")]},
    ]
    assert llava_rows[1]["messages"][0]["content"] == [text("What is 1 + 1?")]


def test_several_images_keep_their_order(llava_rows, folder):
    files = [image(str(folder / f"{name}.png")) for name in ("green", "blue")]
    assert llava_rows[2]["messages"][0]["content"] == [*files, text("Compare  and")]


def test_images_may_be_in_another_folder(folder, tmp_path_factory):
    file = write_lines(tmp_path_factory.mktemp("elsewhere") / "rows.jsonl", LLAVA_ROWS)
    row = load_rows(file, image_folder=folder)[0]
    assert row["messages"][0]["content"][0] == image(str(folder / "red.png"))


def test_negative_indices_count_from_the_end(folder):
    rows = load_rows(write_lines(folder / "rows.jsonl", LLAVA_ROWS))
    assert len(rows) == 3
    assert rows[-1] == rows[2]
    with pytest.raises(IndexError):
        rows[3]


def test_conversations_can_be_read_as_captions(folder):
    file = write_lines(folder / "rows.jsonl", LLAVA_ROWS)
    for rows in (load_rows(file, as_captions=True), list(load_rows(file, as_captions=True, streaming=True))):
        assert rows[0] == {"image": [str(folder / "red.png")], "caption": "Red.", "index": 0}
        assert "a caption needs an image and text, but has 0 images" in rows[1]["error"]
        files = [str(folder / f"{name}.png") for name in ("green", "blue")]
        assert rows[2] == {"image": files, "caption": "Green and blue.", "index": 2}


@pytest.mark.parametrize("image", [None, "", []])
def test_an_empty_column_is_no_image(image):
    row = normalize_row(llava("Why?", "So.", image=image))
    assert row["messages"][0]["content"] == [text("Why?")]


def test_an_answer_may_contain_the_placeholder():
    row = normalize_row(llava("What stands for an image?", "<image> does."))
    assert row["messages"][1]["content"] == [text("<image> does.")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (llava("<image>\nWhy?", "So."), "the row has 0 images, but 1 places for them"),
        (llava("Why?", "So.", image="red.png"), "the row has 1 images, but 0 places for them"),
        (llava("<image>", "So.", image=["red.png", "blue.png"]), "has 2 images, but 1 places"),
        (
            {"conversations": [{"from": "robot", "value": "Hi"}]},
            "a message has the role 'robot', but must have one of human, user, gpt",
        ),
        ({"conversations": [{"from": "human", "value": 5}]}, "must be text or a list of parts, but is of type int"),
        ({"conversations": ["Hi"]}, "a message must be a dict, but is of type str"),
        ({"image": "red.png"}, r"the row has the columns \['image'\], but must have `messages`"),
        ({"image": 5, "caption": "red"}, "an image must be a PIL image, an array, a path, .* but is of type int"),
        ({"image": {"name": "x"}, "caption": "red"}, r"must have `bytes` or `path`, but has \['name'\]"),
        (
            {"image": "red.png", "caption": " "},
            "a caption needs an image and text, but has 1 images and the text ''",
        ),
        ({"messages": messages([{"type": "audio"}])}, "a part of type 'audio', but must have text or image"),
        ({"messages": messages([text(None)])}, "a text must be a string, but is of type NoneType"),
        ({"messages": messages(["Hi"])}, "a part of a message must be a dict, but is of type str"),
        ('["Hi"]', "a row must be a dict, but is of type list"),
        ('{"image": ', "the line is not JSON: Expecting value"),
    ],
)
def test_a_bad_row_raises_an_error_when_it_is_used(folder, row, reason):
    rows = load_rows(write_lines(folder / "rows.jsonl", [LLAVA_ROWS[0], row]))
    assert "error" not in rows[0]
    assert set(rows[1]) == {"error", "index"}
    with pytest.raises(ValueError, match=reason):
        normalize_row(rows[1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", '{"a": 1}', "must contain a list of rows, but contains a dict"),
        ("rows.json", '{"a": 1}\n{"a": 1}', r"is not JSON: Extra data.*name it `\.jsonl`"),
    ],
)
def test_other_json_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path / name)


def test_missing_files_and_splits_are_refused(folder):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*none\.jsonl"):
        load_rows(folder / "none.jsonl")
    with pytest.raises(ValueError, match=r"has only the split `train`, not `test`"):
        load_rows(write_lines(folder / "rows.jsonl", LLAVA_ROWS), split="test")


def test_other_formats_than_json_need_datasets(folder, monkeypatch):
    file = write_lines(folder / "rows.jsonl", LLAVA_ROWS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(load_rows(file)) == 3
    for source, streaming in ((file, True), (folder, False)):
        with pytest.raises(ImportError, match=r"needs the package `datasets`.*pip install datasets"):
            load_rows(source, streaming=streaming)


# ---- what `datasets` reads -------------------------------------------------------------------------------------------


def write_parquet(file, rows, **images):
    """Write rows as parquet; columns of `datasets.Image` embed their images."""
    table = datasets.Dataset.from_list(rows)
    for name, feature in images.items():
        table = table.cast_column(name, feature)
    table.to_parquet(file)
    return file


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_with_embedded_images_is_read(tmp_path, streaming):
    rows = [
        {"images": [{"bytes": encoded("red")}], "messages": messages("Which colour?")},
        {"images": [], "messages": messages("Who are you?")},
        {"images": [{"bytes": encoded("green")}, {"bytes": encoded("blue")}], "messages": messages("Which?")},
    ]
    file = write_parquet(tmp_path / "rows.parquet", rows, images=datasets.List(datasets.Image()))
    found = list(load_rows(file, streaming=streaming))
    assert [set(row) for row in found] == [{"messages", "index"}] * 3
    assert [[color_of(p) for p in images_of(row)] for row in found] == [["red"], [], ["green", "blue"]]
    assert found[2]["messages"][0]["content"][-1] == text("Which?")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_embedded_image_affects_only_its_own_row(tmp_path, streaming):
    rows = [{"image": {"bytes": data}, "caption": "a thing"} for data in (b"no image", encoded("blue"))]
    file = write_parquet(tmp_path / "rows.parquet", rows, image=datasets.Image())
    broken, good = load_rows(file, streaming=streaming)
    assert "cannot identify image file" in broken["error"]
    assert color_of(good["image"][0]) == "blue"
    assert good["caption"] == "a thing"


def test_conversations_may_be_in_parquet(tmp_path):
    row = llava("<image>\nWhich colour?", "Green.", image={"bytes": encoded("green")})
    file = write_parquet(tmp_path / "rows.parquet", [row], image=datasets.Image())
    assert color_of(images_of(load_rows(file)[0])[0]) == "green"


def test_images_may_be_inside_parts(tmp_path):
    content = [{"type": "image", "image": {"bytes": encoded("blue")}}, {"type": "text", "text": "Which colour?"}]
    table = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": content}]}])
    table.to_parquet(tmp_path / "rows.parquet")
    (part, question) = load_rows(tmp_path / "rows.parquet")[0]["messages"][0]["content"]
    assert color_of(part["image"]) == "blue"
    assert question == text("Which colour?")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_images_with_captions_is_read(folder, streaming):
    write_lines(folder / "metadata.jsonl", [{"file_name": f"{name}.png", "text": f"all {name}"} for name in COLORS])
    rows = list(load_rows(folder, streaming=streaming))
    assert sorted(row["caption"] for row in rows) == ["all blue", "all green", "all red"]
    assert all(row["caption"].endswith(color_of(_open(row["image"][0]))) for row in rows)


def _open(image):
    return Image.open(image) if isinstance(image, str) else image


def test_splits_are_read(folder):
    write_lines(folder / "metadata.jsonl", [{"file_name": f"{name}.png", "text": f"all {name}"} for name in COLORS])
    assert len(load_rows(folder, split="train[:2]")) == 2


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Which?", [image("a.png"), image("b.png"), text("Which?")]),
        ("<image>One and two: <image>", [image("a.png"), image("b.png"), text("One and two:")]),
        ([{"type": "image"}, text("or"), {"type": "image"}], [image("a.png"), text("or"), image("b.png")]),
    ],
)
def test_images_of_a_column_replace_the_placeholders(content, expected):
    row = normalize_row({"messages": messages(content), "images": ["a.png", "b.png"]})
    assert row["messages"][0]["content"] == expected
    assert row["messages"][1] == {"role": "assistant", "content": [text("Yes.")]}


def test_images_without_placeholders_precede_the_first_question():
    row = normalize_row({"messages": messages("One?") + messages("Two?"), "images": ["a.png"]})
    questions = [message["content"] for message in row["messages"] if message["role"] == "user"]
    assert questions == [[image("a.png"), text("One?")], [text("Two?")]]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png", "text": None},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "input_image", "image_url": "a.png", "image": {"bytes": None, "path": None}},
    ],
)
def test_parts_may_contain_their_images(part):
    row = normalize_row({"messages": messages([part, {**text("Why?"), "image": None, "image_url": {"url": None}}])})
    assert row["messages"][0]["content"] == [image("a.png"), text("Why?")]


def test_a_part_may_contain_base64_but_not_both_text_and_an_image():
    row = normalize_row({"messages": messages([{"type": "image", "base64": "AAAA"}, text("Why?")])})
    assert row["messages"][0]["content"][0] == image("data:;base64,AAAA")
    with pytest.raises(ValueError, match="a part of type text also has path; move it to a part of type image"):
        normalize_row({"messages": messages([{**text("Why?"), "path": "a.png"}])})


def test_a_question_about_the_placeholder_is_text():
    row = normalize_row({"messages": messages("What is <image>?")})
    assert row["messages"][0]["content"] == [text("What is <image>?")]


@pytest.mark.parametrize("images", [["a.png"], ["a.png", "b.png", "c.png"]])
@pytest.mark.parametrize("content", ["<image> <image>", [{"type": "image"}, {"type": "image"}]])
def test_placeholders_and_images_must_agree(content, images):
    with pytest.raises(ValueError, match=rf"has {len(images)} images, but 2 places for them"):
        normalize_row({"messages": messages(content), "images": images})


def test_a_normal_row_is_not_changed():
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    for row in (
        {"messages": [{"role": "user", "content": [image("https://host/a.png"), text("Why?")]}]},
        {"image": [pixels], "caption": "black"},
    ):
        normal = normalize_row(row, image_folder="elsewhere")
        assert normal == row
        assert normalize_row(normal, image_folder="elsewhere") == row


def test_rows_are_ready_for_the_chat_template(processor, folder):
    row = load_rows(write_lines(folder / "rows.jsonl", LLAVA_ROWS))[2]
    inputs = processor.encode_conversations(row["messages"][:-1])
    assert len(inputs["pixel_values"]) == 2


# ---- order -----------------------------------------------------------------------------------------------------------


def test_lengths_are_known_without_opening_images(folder, tmp_path_factory):
    file = write_lines(folder / "rows.jsonl", [*LLAVA_ROWS, "broken"])
    for image in folder.glob("*.png"):
        image.unlink()
    rows = load_rows(file)
    characters = [
        "<image>\nWhich colour?Red.Sure?Yes.",
        "What is 1 + 1?2",
        "Compare <image> and\n<image>Green and blue.",
        "",
    ]
    lengths = [len(text) // 4 + 81 * num for text, num in zip(characters, (1, 0, 2, 0), strict=True)]
    assert row_lengths(rows, tokens_per_image=81) == (lengths, [True, False, True, False])
    assert row_lengths(ConcatDataset([rows, rows]), tokens_per_image=81)[1] == [True, False, True, False] * 2


@pytest.mark.parametrize("name", ["image", "images"])
def test_lengths_of_embedded_images_are_known(tmp_path, name):
    is_list = name == "images"
    values = [{"bytes": b"never opened"}, None]
    rows = [
        {name: ([value] if value else []) if is_list else value, "messages": messages("12345678")} for value in values
    ]
    feature = datasets.List(datasets.Image()) if is_list else datasets.Image()
    rows = load_rows(write_parquet(tmp_path / "rows.parquet", rows, **{name: feature}))
    assert row_lengths(rows, tokens_per_image=10) == ([13, 3], [True, False])


@pytest.fixture
def lengths():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 1000, (1003,), generator=generator).tolist()
    return lengths, (torch.rand(1003, generator=generator) < 0.7).tolist()


def test_rows_of_a_batch_are_similar(lengths):
    sampler = ModalityLengthSampler(*lengths, batch_size=8)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    assert len(sampler) == 1003
    batches = list(BatchSampler(sampler, batch_size=8, drop_last=False))
    kinds = [{lengths[1][row] for row in batch} for batch in batches]
    assert sum(len(kind) > 1 for kind in kinds[:-2]) == 0
    spread = np.mean([np.ptp([lengths[0][row] for row in batch]) for batch in batches[:-2]])
    assert spread < 60  # measured: 21; of rows taken at random: 770
    # Batches are in random order: neither kinds nor lengths are sorted.
    has_image = [kind == {True} for kind in kinds[:-2]]
    assert sum(one != other for one, other in itertools.pairwise(has_image)) > 20
    longest = [max(lengths[0][row] for row in batch) for batch in batches]
    assert 0.3 < np.mean(np.diff(longest) > 0) < 0.7


def test_rows_of_all_processes_in_a_step_are_similar(lengths):
    sampler = ModalityLengthSampler(*lengths, batch_size=2 * 4)
    shards = [BatchSamplerShard(BatchSampler(sampler, 4, False), 2, process_index) for process_index in (0, 1)]
    steps = list(zip(*shards, strict=True))
    assert all(len({lengths[1][row] for batch in step for row in batch}) == 1 for step in steps[:-2])
    assert {row for step in steps for batch in step for row in batch} == set(range(1003))


def test_the_order_depends_on_seed_and_epoch_only(lengths):
    def order(seed, epoch):
        sampler = ModalityLengthSampler(*lengths, batch_size=8, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_lengths_and_kinds_must_be_of_the_same_rows():
    with pytest.raises(ValueError, match=r"the same number of rows, but have 2 and 1; take both from `row_lengths`"):
        ModalityLengthSampler([1, 2], [True], batch_size=1)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, but is 0"):
        ModalityLengthSampler([1], [True], batch_size=0)
