"""A video is read as a few images: the right frames, in order, in little memory."""

import itertools
import struct
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from questions import describe, is_clearly_placed
from scenes import Layout, draw, scene_at
from transformers import pipeline

import flashsloth.video_processing_flashsloth as video
from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor, video_frames

ROOT = Path(__file__).parents[1]
SIZE = (96, 64)
NUM_BITS = 8
UPRIGHT = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
QUARTER_TURN = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)


def numbered(number, size=SIZE):
    """An image whose columns are the bits of a number."""
    image = Image.new("RGB", size)
    canvas, width = ImageDraw.Draw(image), size[0] // NUM_BITS
    for bit in range(NUM_BITS):
        if number >> bit & 1:
            canvas.rectangle([bit * width, 0, (bit + 1) * width - 1, size[1]], fill="white")
    return image


def number_of(image):
    columns = np.asarray(image.convert("L").resize((NUM_BITS, 1), Image.Resampling.BOX))[0]
    return sum(1 << bit for bit in range(NUM_BITS) if columns[bit] > 127)


def numbers_in(source, num_frames):
    return [number_of(frame) for frame in video_frames(source, num_frames)]


def write_film(path, images, codec, **options):
    av = pytest.importorskip("av")
    group = options.pop("group", None)
    images = iter(images)
    first = next(images)
    with av.open(path, "w") as film:
        stream = film.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = *first.size, "yuv420p"
        if group:
            stream.gop_size = group
        for image in itertools.chain([first], images):
            film.mux(stream.encode(av.VideoFrame.from_image(image)))
        film.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A GIF of seven frames."""
    path = tmp_path_factory.mktemp("clip") / "clip.gif"
    first, *others = [numbered(i) for i in range(7)]
    first.save(path, save_all=True, append_images=others, duration=100)
    return path


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [(1, [0]), (2, [0, 6]), (3, [0, 3, 6]), (4, [0, 2, 4, 6]), (7, [*range(7)]), (100, [*range(7)])],
)
def test_frames_are_evenly_spaced_from_the_first_to_the_last(clip, num_frames, expected):
    assert numbers_in(clip, num_frames) == expected


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_animations_need_no_video_decoder(tmp_path, monkeypatch, suffix):
    monkeypatch.setitem(sys.modules, "av", None)
    first, *others = [numbered(i) for i in range(9)]
    first.save(tmp_path / f"clip{suffix}", save_all=True, append_images=others, lossless=True)
    assert numbers_in(tmp_path / f"clip{suffix}", 3) == [0, 4, 8]


def test_frames_in_a_folder_are_sorted_by_the_numbers_in_their_names(tmp_path):
    for i in range(12):
        numbered(i).save(tmp_path / f"frame-{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert numbers_in(tmp_path, 12) == [*range(12)]


@pytest.mark.parametrize("kind", [list, np.stack, lambda frames: torch.from_numpy(np.stack(frames))])
def test_frames_may_come_as_a_sequence_or_an_array(kind):
    assert numbers_in(kind([np.asarray(numbered(i)) for i in range(9)]), 5) == [0, 2, 4, 6, 8]


FILMS = {
    "clip.mp4": {"codec": "libx264", "bf": "3"},
    "clip.mkv": {"codec": "libx264", "group": 7},
    "clip.webm": {"codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16"},
    "clip.avi": {"codec": "libx264", "bf": "2"},
    "clip.mpg": {"codec": "mpeg1video"},
}


@pytest.mark.parametrize("name", FILMS)
@pytest.mark.parametrize("count", [1, 2, 60])
def test_every_video_format_gives_the_requested_frames(tmp_path, name, count):
    path = write_film(tmp_path / name, [numbered(i) for i in range(count)], **FILMS[name])
    assert numbers_in(path, 1) == [0]
    assert numbers_in(path, 5) == ([0, 15, 30, 44, 59] if count == 60 else [*range(count)])


@pytest.mark.parametrize("options", [{"bf": "3", "x264-params": "open-gop=1:keyint=20"}, {"group": 7, "bf": "0"}])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_seeking_in_a_long_video_finds_the_same_frames(tmp_path, monkeypatch, options, suffix):
    path = write_film(tmp_path / f"long{suffix}", [numbered(i) for i in range(150)], "libx264", **options)
    monkeypatch.setattr(video, "LONG_VIDEO", 150)
    assert numbers_in(path, 11) == [round(i * 14.9) for i in range(11)]
    assert numbers_in(path, 150) == [*range(150)]


def test_rotation_metadata_is_applied(tmp_path):
    path = write_film(tmp_path / "upright.mp4", [numbered(5)], "libx264")
    data = path.read_bytes()
    place = data.index(UPRIGHT, data.index(b"tkhd"))
    path.write_bytes(data[:place] + QUARTER_TURN + data[place + len(UPRIGHT) :])
    (frame,) = video_frames(path)
    assert frame.size == SIZE[::-1]
    assert number_of(frame.transpose(Image.Transpose.ROTATE_90)) == 5


class Drawn(Sequence):
    """A thousand large frames that are drawn on access. Counts how many are in memory at a time."""

    side = 1500

    def __init__(self):
        self.most, self.drawn, self.living = 0, [], []

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        frame = Image.new("RGB", (self.side, self.side // 2))
        self.drawn.append(index)
        self.living = [*(reference for reference in self.living if reference() is not None), weakref.ref(frame)]
        self.most = max(self.most, len(self.living))
        return frame


def test_only_the_requested_frames_are_kept_and_not_in_full_size():
    frames = Drawn()
    taken = video_frames(frames, 4, max_side=100)
    assert frames.drawn == [0, 333, 666, 999]
    assert [frame.size for frame in taken] == [(100, 50)] * 4
    assert frames.most <= 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory")
def test_a_video_takes_the_memory_of_a_few_frames(tmp_path):
    size, count = (640, 360), 256
    path = write_film(tmp_path / "film.mp4", (numbered(i, size) for i in range(count)), "libx264", preset="ultrafast")

    def memory(field):
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{field}:")[1].split()[0]) * 1024

    video_frames(path, 2)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = memory("VmRSS")
    assert len(video_frames(path, 4)) == 4
    whole = count * size[0] * size[1] * 3
    assert memory("VmHWM") - before < whole / 4


def cut(path, tmp_path):
    """A copy of a file's first half."""
    data = path.read_bytes()
    (tmp_path / f"cut{path.suffix}").write_bytes(data[: len(data) // 2])
    return tmp_path / f"cut{path.suffix}"


def test_broken_and_missing_clips_are_refused(tmp_path, clip):
    pytest.importorskip("av")
    film = write_film(tmp_path / "film.mp4", [numbered(i) for i in range(9)], "libx264")
    text = tmp_path / "text.mp4"
    text.write_text("no film")
    for broken in (cut(film, tmp_path), cut(clip, tmp_path), text):
        with pytest.raises(ValueError, match=f"Expected a complete video, found .*{broken.name}"):
            video_frames(broken)
    with pytest.raises(ValueError, match="Expected the path or http"):
        video_frames(tmp_path / "nowhere.mp4")
    with pytest.raises(ValueError, match=r"Expected the path or http.{0,200}$"):
        video_frames("data:image/gif;base64," + "R0lGOD" * 10_000)
    for empty in ([], np.zeros((0, 4, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="found none in a"):
            video_frames(empty)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"found none in .*folder"):
        video_frames(tmp_path / "folder")
    with pytest.raises(TypeError, match="found generator; convert iterators to lists"):
        video_frames(numbered(i) for i in range(3))
    for num_frames in (0, 2.5, True, "3", None):
        with pytest.raises(ValueError, match=f"`num_frames` to be a whole number of at least 1, found {num_frames!r}"):
            video_frames(clip, num_frames)


def test_without_pyav_the_error_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "film.mp4").write_bytes(b"\0" * 100)
    with pytest.raises(ImportError, match=r"pip install av"):
        video_frames(tmp_path / "film.mp4")


def question(*parts, text="What happens?"):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def prepare(processor, messages, **kwargs):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


@pytest.mark.parametrize("key", ["path", "url", "video"])
@pytest.mark.parametrize("kwargs", [{"num_frames": 3}, {"processor_kwargs": {"num_frames": 3}}])
def test_a_video_in_a_message_equals_its_frames_as_images(model, processor, clip, key, kwargs):
    images = [{"type": "image", "image": frame} for frame in video_frames(clip, 3)]
    expected = prepare(processor, question(*images))
    inputs = prepare(processor, question({"type": "video", key: str(clip)}), **kwargs)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 3 * processor.image_seq_length
    assert inputs.keys() == expected.keys()
    for name in expected:
        assert torch.equal(inputs[name], expected[name])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, model(**expected).logits, atol=0, rtol=0)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "path": "CLIP", "text": None, "image": None, "url": None},
        {"type": "video", "url": "file://CLIP"},
        {"type": "video_url", "video_url": {"url": "CLIP"}},
        {"type": "video", "video_url": "CLIP"},
    ],
)
def test_common_spellings_of_a_video_are_read(processor, clip, part):
    def filled(value):
        if isinstance(value, dict):
            return {name: filled(item) for name, item in value.items()}
        return value and value.replace("CLIP", str(clip))

    expected = prepare(processor, question({"type": "video", "path": str(clip)}))
    found = prepare(processor, question(filled(part)), num_frames=None)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_videos_and_images_mix_in_a_batch(model, processor, clip, images):
    rows = [
        question({"type": "video", "path": str(clip)}, {"type": "image", "image": images[0]}),
        question({"type": "image", "image": images[1]}),
        question(),
    ]
    inputs = prepare(processor, rows, num_frames=4, processor_kwargs={"padding": True})
    num_tokens = (inputs["input_ids"] == processor.image_token_id).sum(dim=1)
    assert num_tokens.tolist() == [processor.image_seq_length * count for count in (5, 1, 0)]
    with torch.no_grad():
        together = model(**inputs).logits[:, -1]
        alone = [model(**prepare(processor, row, num_frames=4)).logits[0, -1] for row in rows]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=0)


def test_a_prompt_that_is_not_tokenized_has_a_placeholder_for_every_frame(processor, clip):
    prompt = processor.apply_chat_template(question({"type": "video", "path": str(clip)}), num_frames=5)
    assert prompt.count("<image>") == 5


def test_the_pipeline_takes_videos(model, processor, clip):
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    ((answer,),) = [ask(text=question({"type": "video", "path": str(clip)}), max_new_tokens=3, return_full_text=False)]
    inputs = prepare(processor, question({"type": "video", "path": str(clip)}))
    output = model.generate(**inputs, max_new_tokens=3)[:, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"].strip() == processor.post_process_image_text_to_text(output)[0]


def test_unsupported_options_and_sources_of_a_video_are_refused(processor, clip):
    with pytest.raises(TypeError, match="`num_frames`"):
        prepare(processor, question({"type": "video", "path": str(clip)}), fps=2)
    with pytest.raises(ValueError, match="should have one of video, url, path, video_url, but has none"):
        prepare(processor, question({"type": "video"}))
    with pytest.raises(TypeError, match=r"`videos` were passed.*`video_frames`"):
        processor(text="<image>", videos=[str(clip)])


def test_too_many_images_for_the_models_positions_cause_a_warning(caplog):
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    frames = [numbered(i) for i in range(114)]
    prepare(processor, question({"type": "video", "video": frames}), num_frames=90)
    assert "the model was made for" not in caplog.text
    prepare(processor, question({"type": "video", "video": frames}), num_frames=114)
    assert "1026 are image tokens of 114 tiles, but the model was made for 1024" in caplog.text


def test_a_row_with_thirty_images_equals_the_row_alone(model, processor, images):
    many = [{"type": "image", "image": images[i % 4]} for i in range(30)]
    rows = [question(*many), question(many[0]), question(), question(*many[:7])]
    inputs = prepare(processor, rows, processor_kwargs={"padding": True})
    assert len(inputs["pixel_values"]) == 38
    with torch.no_grad():
        together = model(**inputs).logits[:, -1]
        alone = [model(**prepare(processor, row)).logits[0, -1] for row in rows]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["scenes.gif", "scenes.mp4"])
def test_the_shipped_checkpoint_reads_every_frame_of_a_clip(tmp_path, name):
    easy = Layout(num_things=(1, 2), sides=(0.3, 0.5), share_shapes=1.0, share_texts=0.0, quality=0.0)
    drawn = (scene_at("untouched", i, layout=easy) for i in itertools.count())
    scenes = list(itertools.islice((scene for scene in drawn if all(map(is_clearly_placed, scene.things))), 8))
    first, *others = images = [draw(scene).resize((192, 192)) for scene in scenes]
    if name.endswith("gif"):
        first.save(tmp_path / name, save_all=True, append_images=others)
    else:
        write_film(tmp_path / name, images, "libx264", crf="10")
    processor = FlashSlothProcessor.from_pretrained(ROOT)
    model = FlashSlothForConditionalGeneration.from_pretrained(ROOT)
    frames = [{"type": "image", "image": frame} for frame in video_frames(tmp_path / name)]
    rows = [question(frame, text="Describe the picture.") for frame in frames]
    inputs = prepare(processor, rows, processor_kwargs={"padding": True})
    output = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
    answers = processor.post_process_image_text_to_text(output)
    assert sum(answer == describe(scene) for answer, scene in zip(answers, scenes, strict=True)) >= 7
