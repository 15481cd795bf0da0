"""The processor makes the same tiles as the original, from images in any form, and refuses anything else clearly."""

import base64
import io
import json
import time
import urllib.parse
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import serve_folder
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from flashsloth import FlashSlothImageProcessor
from flashsloth.image_processing_flashsloth import _pad_and_resize

GOLDEN = Path(__file__).parent / "golden" / "images"
FILES = {name: GOLDEN / case["file"] for name, case in json.loads((GOLDEN / "images.json").read_text()).items()}
MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]


@pytest.fixture(scope="module")
def processor():
    return FlashSlothImageProcessor()


@pytest.fixture(scope="module")
def small():
    """A processor that returns levels 0..255, in tiles of the size of `image`, which is therefore not resized."""
    return FlashSlothImageProcessor(size={"height": 6, "width": 8}, do_rescale=False, do_normalize=False)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))


def levels(features):
    """Undo rescaling and normalization: `(tiles, height, width, 3)`. Fails unless the results are 8-bit levels."""
    values = (np.asarray(features["pixel_values"]) * np.float32(0.5) + np.float32(0.5)) * np.float32(255)
    rounded = np.rint(values)
    assert np.abs(values - rounded).max() < 1e-4
    return rounded.astype(np.uint8).transpose(0, 2, 3, 1)


def pixels(features):
    """`pixel_values` with channels last, `(tiles, height, width, 3)`."""
    return features["pixel_values"].transpose(0, 2, 3, 1)


def array(path, channels_first=False):
    values = np.asarray(Image.open(path))
    values = values[..., None] if values.ndim == 2 else values
    return values.transpose(2, 0, 1).copy() if channels_first else values.copy()


FORMS = {
    "path string": str,
    "path": lambda path: path,
    "base64": lambda path: base64.b64encode(path.read_bytes()).decode(),
    "data url": lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
    "pil": Image.open,
    "numpy, channels last": array,
    "numpy, channels first": lambda path: array(path, channels_first=True),
    "numpy, as Pillow gives it": lambda path: np.asarray(Image.open(path)),
    "torch, channels last": lambda path: torch.from_numpy(array(path)),
    "torch, channels first": lambda path: torch.from_numpy(array(path, channels_first=True)),
    "torch floats": lambda path: torch.from_numpy(array(path, channels_first=True)) / 255,
    "numpy float levels": lambda path: array(path).astype(np.float64),
    "numpy int64": lambda path: array(path).astype(np.int64),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FILES)
def test_tiles_equal_those_of_the_original_bit_by_bit(processor, name, form):
    image = FORMS[form](FILES[name])
    expected = np.asarray(Image.open(GOLDEN / f"{name}.expect.png"))
    expected_hd = np.asarray(Image.open(GOLDEN / f"{name}.expect_hd.png")).reshape(5, *expected.shape)
    np.testing.assert_array_equal(levels(processor(image, return_tensors="pt")), expected[None])
    np.testing.assert_array_equal(levels(processor(image, do_image_splitting=True)), expected_hd)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2), (2, 1), (31, 30), (30, 31), (97, 12), (12, 97), (700, 300), (300, 700)]
)
def test_tiles_equal_those_of_a_padded_image(processor, size, monkeypatch):
    width, height = size
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))
    side = max(size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    enlarged = np.asarray(square.resize((768, 768), Image.Resampling.BICUBIC))
    expected = [enlarged[top : top + 384, left : left + 384] for top in (0, 384) for left in (0, 384)]
    monkeypatch.setattr(f"{type(processor).__module__}.STRIP_PIXELS", 5_000)  # several strips, the last one shorter
    np.testing.assert_array_equal(levels(processor(image, do_image_splitting=True))[1:], expected)


def padded_and_resized(image, side, size, background):
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize(size, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("tile", [384, 96, 378, 1])
@pytest.mark.parametrize("long_side", [1, 9, 100, 777, 2_500])
def test_tiles_of_long_images_equal_those_of_padded_images(tile, long_side):
    generator = np.random.default_rng([tile, long_side])
    for short_side in {1, 2, *generator.integers(1, long_side // 8 + 2, 3).tolist()}:
        image = Image.fromarray(generator.choice([0, 255, 90], (long_side, short_side, 3)).astype(np.uint8))
        for turned in (image, image.transpose(Image.Transpose.TRANSPOSE)):
            expected = padded_and_resized(turned, max(turned.size), (2 * tile, 2 * tile), (127, 0, 200))
            found = _pad_and_resize(turned, (2 * tile, 2 * tile), Image.Resampling.BICUBIC, (127, 0, 200))
            np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("size", [(1, 65_535), (65_535, 1), (3, 60_000)])
def test_padding_a_long_image_takes_little_time(size):
    """Padded to a square, it would have four billion pixels, which take half a minute; measured: 0.03 s of CPU time."""
    processor = FlashSlothImageProcessor(do_image_splitting=True)
    start = time.process_time()
    processor(Image.new("RGB", size, "red"), return_tensors="pt")
    assert time.process_time() - start < 0.5


def test_the_call_overrides_the_checkpoints_choice_of_splitting(image):
    plain, hd = FlashSlothImageProcessor(), FlashSlothImageProcessor(do_image_splitting=True)
    shapes = {"plain": (1, 3, 384, 384), "hd": (5, 3, 384, 384)}
    assert plain(image)["pixel_values"].shape == shapes["plain"]
    assert plain(image, do_image_splitting=None)["pixel_values"].shape == shapes["plain"]
    assert plain(image, do_image_splitting=True)["pixel_values"].shape == shapes["hd"]
    assert hd(image)["pixel_values"].shape == shapes["hd"]
    assert hd(image, do_image_splitting=False)["pixel_values"].shape == shapes["plain"]


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("called_with", [None, False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 10_000), (480, 640)])
def test_the_number_of_tiles_is_known_without_the_image(default, called_with, size):
    processor = FlashSlothImageProcessor(do_image_splitting=default, size={"height": 4, "width": 4})
    options = {"do_image_splitting": called_with}
    tiles = processor(Image.new("RGB", size[::-1]), **options)["pixel_values"]
    assert processor.get_number_of_image_patches(*size, options) == len(tiles)
    assert processor.get_number_of_image_patches(*size) == (5 if default else 1)


def test_tiles_keep_the_order_of_the_images(small):
    greys = [Image.new("RGB", (5, 5), (level, level, level)) for level in (10, 20, 30)]
    expected = [10, 20, 30]
    for images in (
        greys,
        tuple(greys),
        [greys[:1], greys[1:]],
        [[], greys],
        [np.stack([np.asarray(g) for g in greys])],
    ):
        np.testing.assert_array_equal(pixels(small(images))[:, 0, 0, 0], expected)
    split = pixels(small(greys, do_image_splitting=True))
    np.testing.assert_array_equal(split[:, 0, 0, 0], np.repeat(expected, 5))


def test_an_empty_list_has_no_tiles(small):
    for images in ([], [[]], [[], []]):
        assert small(images, return_tensors="pt")["pixel_values"].shape == (0, 3, 6, 8)


def test_the_type_of_the_output_follows_return_tensors(small, image):
    for return_tensors, kind in ((None, np.ndarray), ("np", np.ndarray), ("pt", torch.Tensor)):
        values = small(image, return_tensors=return_tensors)["pixel_values"]
        assert isinstance(values, kind)
        assert str(values.dtype).endswith("float32")
    on_device = small(image, return_tensors="pt", device=torch.device("meta"))["pixel_values"]
    assert on_device.device.type == "meta"
    assert isinstance(small(image, device="cpu")["pixel_values"], np.ndarray)
    with pytest.raises(ValueError, match=r"return_tensors='pt'.*device=cuda.*numpy"):
        small(image, device="cuda")


MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda raw: (raw / 255 - 0.5) / 0.5),
        ({"image_mean": MEAN, "image_std": STD}, lambda raw: (raw / 255 - MEAN) / STD),
        ({"image_mean": 0.2, "image_std": 0.3}, lambda raw: (raw / 255 - 0.2) / 0.3),
        ({"do_normalize": False}, lambda raw: raw / 255),
        ({"do_rescale": False, "do_normalize": False}, lambda raw: raw),
        ({"rescale_factor": 1 / 128, "do_normalize": False}, lambda raw: raw / 128),
    ],
    ids=["defaults", "per channel", "numbers", "no normalization", "levels", "another factor"],
)
def test_levels_are_rescaled_and_normalized_as_the_options_say(image, options, expected):
    processor = FlashSlothImageProcessor(size={"height": 6, "width": 8})
    raw = np.asarray(image, dtype=np.float64)[None]
    np.testing.assert_allclose(pixels(processor(image, **options)), expected(raw), rtol=1e-6, atol=1e-7)


def test_size_and_resampling_are_options(image):
    processor = FlashSlothImageProcessor()
    smaller = processor(image, size={"height": 3, "width": 4}, resample=Image.Resampling.NEAREST, do_normalize=False)
    nearest = np.asarray(image.resize((4, 3), Image.Resampling.NEAREST))
    np.testing.assert_allclose(pixels(smaller)[0], nearest / 255, rtol=1e-6)
    assert processor(image, size=5)["pixel_values"].shape == (1, 3, 5, 5)


def test_the_padding_has_the_mean_colour(image):
    processor = FlashSlothImageProcessor(do_image_splitting=True, size={"height": 4, "width": 4}, do_normalize=False)
    tiles = pixels(processor(Image.new("RGB", (90, 10)), image_mean=[0.0, 0.5, 1.0]))
    np.testing.assert_allclose(tiles[1, 0, 0] * 255, [0, 127, 255], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_converted_to_rgb_as_pillow_does(small, image, mode):
    converted = image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
    expected = converted.convert("LA").convert("RGB") if mode == "La" else converted.convert("RGB")
    np.testing.assert_array_equal(pixels(small(converted))[0], np.asarray(expected))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_dropped_not_blended(small, image, mode):
    opaque = image.convert(mode)
    transparent = opaque.copy()
    transparent.putalpha(0)
    np.testing.assert_array_equal(pixels(small(transparent)), pixels(small(opaque)))
    np.testing.assert_array_equal(pixels(small(np.asarray(opaque.convert("RGBA")))), pixels(small(opaque)))


@pytest.mark.parametrize("transparency", [3, bytes(range(16))])
def test_a_transparent_palette_gives_its_colours_without_a_warning(small, image, tmp_path, transparency):
    palette = image.quantize(16)
    palette.save(tmp_path / "palette.png", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = pixels(small(str(tmp_path / "palette.png")))
    np.testing.assert_array_equal(result[0], np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I"])
def test_sixteen_bits_are_scaled_not_clipped(small, mode):
    deep = np.linspace(0, 65_535, 48).reshape(6, 8).astype(np.int32)
    stored = deep.astype({"I": "=i4", "I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2"))
    image = Image.frombytes(mode, (8, 6), stored.tobytes())
    np.testing.assert_array_equal(pixels(small(image))[0, ..., 0], np.rint(deep / 257))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_files_and_arrays_agree(small, tmp_path, suffix):
    deep = np.linspace(0, 65_535, 48).reshape(6, 8).astype(np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(deep).save(path)
    expected = pixels(small(Image.open(path)))
    assert len(np.unique(expected)) == 48
    for same in (str(path), deep, deep[..., None], torch.from_numpy(deep.astype(np.int32)), np.stack([deep] * 3)):
        np.testing.assert_array_equal(pixels(small(same)), expected)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_deep_modes_made_from_eight_bits_keep_their_levels(small, image, mode):
    grey = image.convert("L")
    np.testing.assert_array_equal(pixels(small(grey.convert(mode)))[0], np.asarray(grey.convert("RGB")))
    np.testing.assert_array_equal(pixels(small(image.convert(mode)))[0, ..., 0], np.asarray(grey))


def test_one_is_white_in_float_images_with_and_without_rescaling(image):
    processor = FlashSlothImageProcessor(size={"height": 6, "width": 8})
    values = np.asarray(image)
    expected = processor(image)["pixel_values"]
    for kind in (np.float16, np.float32, np.float64):
        for options in ({}, {"do_rescale": False}):
            floats = (values / 255).astype(kind)
            np.testing.assert_array_equal(processor(floats, **options)["pixel_values"], expected)
    tensor = torch.from_numpy(values / 255).requires_grad_()
    np.testing.assert_array_equal(processor(tensor)["pixel_values"], expected)
    np.testing.assert_array_equal(processor(tensor.bfloat16())["pixel_values"], expected)  # 8 bits are enough
    grey = np.asarray(image.convert("L"))
    for options in ({}, {"do_rescale": False}):
        result = processor((grey / 255).astype(np.float32), **options)["pixel_values"]
        np.testing.assert_array_equal(result, processor(grey)["pixel_values"])


def test_booleans_are_black_and_white(small):
    mask = np.eye(6, 8, dtype=bool)
    for values in (mask, torch.from_numpy(mask), Image.fromarray(mask), mask.astype(np.float32)):
        np.testing.assert_array_equal(small(values, do_rescale=True)["pixel_values"][0, 0], np.float32(mask))


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_both_layouts_are_recognised(small, make, channels):
    values = np.random.default_rng(2).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    expected = values[..., :3] if channels > 1 else np.repeat(values, 3, axis=-1)
    np.testing.assert_array_equal(pixels(small(make(values)))[0], expected)
    np.testing.assert_array_equal(pixels(small(make(values.transpose(2, 0, 1).copy())))[0], expected)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((3, 9, 3), "channels_first"),
        ((1, 9, 1), "channels_first"),
        ((1, 1, 3), "channels_last"),
        ((3, 1, 1), "channels_first"),
        ((4, 9, 3), "channels_last"),
        ((3, 9, 4), "channels_first"),
        ((1, 9, 4), "channels_last"),
    ],
)
def test_an_ambiguous_layout_follows_the_documented_rule_unless_it_is_given(small, shape, layout):
    values = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(pixels(small(values)), pixels(small(values, input_data_format=layout)))
    for given, last in (("channels_first", values.transpose(1, 2, 0)), ("channels_last", values)):
        expected = Image.fromarray(last[..., 0] if last.shape[-1] == 1 else np.ascontiguousarray(last)).convert("RGB")
        np.testing.assert_array_equal(pixels(small(values, input_data_format=given)), pixels(small(expected)))


@pytest.mark.parametrize("size", [(1, 1), (10_000, 3), (3, 10_000), (65_535, 1)])
@pytest.mark.parametrize("do_image_splitting", [False, True])
def test_extreme_shapes_work(processor, size, do_image_splitting):
    result = processor(Image.new("RGB", size, (200, 100, 50)), do_image_splitting=do_image_splitting)
    np.testing.assert_array_equal(levels(result)[0], np.broadcast_to([200, 100, 50], (384, 384, 3)))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_shows_its_first_frame(small, tmp_path, suffix):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    for animation in (str(path), Image.open(path)):
        np.testing.assert_array_equal(pixels(small(animation))[0], np.asarray(frames[0]))


def test_exif_rotation_is_applied_to_files_as_transformers_does(small, image, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # show it rotated by 90 degrees clockwise
    path = tmp_path / "phone.png"
    image.save(path, exif=exif)
    turned = image.transpose(Image.Transpose.ROTATE_270)
    text = base64.b64encode(path.read_bytes()).decode()
    for source in (str(path), path, text):
        np.testing.assert_array_equal(pixels(small(source)), pixels(small(turned)))
    np.testing.assert_array_equal(pixels(small(Image.open(path))), pixels(small(image)))


@pytest.fixture(scope="module")
def website(tmp_path_factory):
    """A folder, and the address of a web server that has its files."""
    folder = tmp_path_factory.mktemp("website")
    with serve_folder(folder) as address:
        yield folder, address


def in_mode(mode):
    """An image of the given mode, with levels from the whole range."""
    ramp = np.linspace(0, 65_535, 48).reshape(6, 8).round()
    if mode in ("I;16", "I;16B"):
        return Image.fromarray(ramp.astype(">u2" if mode == "I;16B" else "<u2"))
    if mode == "I":
        return Image.fromarray(ramp.astype(np.int32))
    if mode == "F":
        return Image.fromarray((ramp / 65_535).astype(np.float32))
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (6, 8, 4), dtype=np.uint8))
    return image.convert("RGB").quantize(16) if mode == "P" else image.convert("RGBA").convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *[(mode, "png") for mode in ("I;16", "I", "1", "L", "LA", "P", "RGB", "RGBA")],
        *[(mode, "tif") for mode in ("I;16", "I;16B", "I", "F", "L", "CMYK", "LAB", "RGBA")],
        *[("RGBA", "webp"), ("L", "bmp"), ("P", "gif")],
    ],
)
def test_every_source_of_an_image_gives_the_same_pixels(small, website, mode, suffix):
    folder, address = website
    file = folder / f"{mode.replace(';', '-')}.{suffix}"
    in_mode(mode).save(file)
    text = base64.b64encode(file.read_bytes()).decode()
    lines, quoted = base64.encodebytes(file.read_bytes()).decode(), urllib.parse.quote(file.read_bytes())
    sources = {
        "file URL": file.as_uri(),
        "http URL": f"{address}/{file.name}",
        "base64": text,
        "base64 in lines": lines,
        "base64 for URLs, without padding": text.translate({ord("+"): "-", ord("/"): "_"}).rstrip("="),
        "data URL": f"data:image/{suffix};base64,{text}",
        "data URL with a parameter": f"data:image/{suffix};name=a.{suffix};base64,{text}",
        "data URL without a type": f"DATA:;base64,{urllib.parse.quote(text)}",
        "data URL without base64": f"data:image/{suffix},{quoted}",
    }
    expected = pixels(small(str(file)))
    for name, source in sources.items():
        np.testing.assert_array_equal(pixels(small(source)), expected, err_msg=name)
    if mode.startswith(("I", "F")):
        assert len(np.unique(expected)) > 40  # scaled, not clipped


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("WEBSITE/none.png", "the server answered 404"),
        ("WEBSITE/", "cannot identify"),
        ("http://localhost:1/a.png", "refused"),
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png,", "cannot identify"),
        ("file:///no/such/image.png", "neither a file"),
        ("", "neither a file"),
    ],
)
def test_an_image_that_cannot_be_read_is_refused_with_the_reason(small, website, source, reason):
    with pytest.raises(ValueError, match=rf"(?s)Expected the path, URL or base64 string of a complete.*{reason}"):
        small(source.replace("WEBSITE", website[1]))


@pytest.mark.parametrize(
    ("images", "parts"),
    [
        (Image.new("RGB", (0, 5)), ["image 0", "0x5", "1 to 65535", "remove it"]),
        (np.zeros((0, 5, 3), np.uint8), ["image 0", "5x0"]),
        (np.zeros((3, 5, 0), np.uint8), ["image 0", "0x5"]),
        (np.zeros((0, 5), np.uint8), ["grey", "5x0"]),
        (Image.new("1", (70_000, 1)), ["image 0", "70000x1", "resize it"]),
        ([Image.new("RGB", (4, 4)), np.full((5, 5, 3), np.nan)], ["image 1", "finite", "75", "nan_to_num"]),
        (torch.full((3, 5, 5), float("inf")), ["image 0", "finite", "75"]),
        (np.full((5, 5), np.nan, np.float32), ["image 0", "finite", "25"]),
        (Image.fromarray(np.full((5, 5), np.nan, np.float32)), ["image 0", "finite", "25"]),
        (np.zeros((5, 9, 2), np.uint8), ["image 0", "1, 3 or 4 channels", "(5, 9, 2)", "input_data_format"]),
        ([np.zeros((3, 9, 9)), torch.zeros(5, 9, 9)], ["image 1", "1, 3 or 4 channels", "(5, 9, 9)"]),
        (np.zeros((1, 1, 3, 9, 9), np.uint8), ["(1, 1, 3, 9, 9)", "list"]),
        (np.full((5, 5, 3), -1.0), ["image 0", "0..1", "-1.0", "normalisation"]),
        (np.full((5, 5, 3), 1.004), ["image 0", "0..1", "1.004", "clip"]),
        (np.full((5, 5, 3), 255.5), ["image 0", "0..255", "255.5", "uint8"]),
        (np.full((5, 5, 3), -1), ["image 0", "0..255", "-1", "uint8"]),
        (np.full((5, 5, 3), 70_000), ["image 0", "0..65535", "70000", "uint8"]),
        (Image.fromarray(np.full((5, 5), 70_000, np.int32)), ["image 0", "0..65535", "70000"]),
        (np.zeros((5, 5, 3), complex), ["image 0", "complex128", "uint8"]),
        ("no/such/image.png", ["no/such/image.png", "neither a file", "correct the path"]),
        ("A" * 5_000, ["AAAA…AAAA", "base64", "UnidentifiedImageError"]),
    ],
)
def test_errors_about_bad_images_name_the_image_and_the_fix(processor, images, parts):
    with pytest.raises(ValueError) as caught:
        processor(images, return_tensors="pt")
    message = str(caught.value)
    assert message.startswith("Expected")
    assert [part for part in parts if part not in message] == []
    assert len(message) < 600


@pytest.mark.parametrize("thing", [None, 3, b"bytes", {"url": "x"}, [[1, 2], [3, 4]]])
def test_an_object_that_is_not_an_image_is_refused_by_its_type(processor, thing):
    with pytest.raises(TypeError, match=r"Expected an image.*found (NoneType|int|bytes|dict).*PIL.Image.open"):
        processor(thing)


def encoded(suffix):
    """A file of noise, which hardly compresses, so that every cut removes pixels."""
    file = io.BytesIO()
    noise = np.random.default_rng(4).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, suffix)
    return bytearray(file.getvalue())


@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "tiff", "bmp", "webp"])
def test_a_truncated_file_is_named(processor, tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    content = encoded(suffix)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        ValueError, match=rf"complete image, found '.*cut\.{suffix}'.*Pillow.*Error: .*save the"
    ) as caught:
        processor(str(path))
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(ValueError, match=r"complete image.*base64.*Error: .*save the"):
        processor(base64.b64encode(path.read_bytes()).decode())


@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "tiff", "bmp"])
def test_a_truncated_file_opened_by_pillow_is_named_with_its_index(processor, image, tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    content = encoded(suffix)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"complete image.*image 1 \('.*cut\.{suffix}'\).*OSError.*again") as caught:
        processor([image, Image.open(path)])
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "tiff", "bmp", "webp", "ppm", "tga", "pcx"])
def test_a_damaged_file_never_raises_any_other_error(small, tmp_path, suffix):
    content, rng, path = encoded(suffix), np.random.default_rng(5), tmp_path / "damaged"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(30):
            damaged = content.copy()
            for _ in range(4):
                damaged[rng.integers(0, 300)] = rng.integers(0, 256)
            path.write_bytes(damaged)
            try:
                assert small(str(path))["pixel_values"].shape == (1, 3, 6, 8)
            except ValueError as error:
                assert "damaged" in str(error) or "image 0" in str(error)


def test_a_file_that_is_not_an_image_is_named(processor, tmp_path):
    path = tmp_path / "page.jpg"
    path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"found '.*page\.jpg': a file that Pillow cannot read.*cannot identify"):
        processor(str(path))


def test_a_decompression_bomb_is_refused_and_a_large_image_causes_pillows_warning(processor, tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (300, 200)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    for source in (str(path), base64.b64encode(path.read_bytes()).decode()):
        with pytest.raises(ValueError, match=r"60000 pixels.*limit of 40000.*MAX_IMAGE_PIXELS") as caught:
            processor(source)
        assert isinstance(caught.value.__cause__, Image.DecompressionBombError)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.warns(Image.DecompressionBombWarning):
        processor(str(path))


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        (
            {"do_image_spliting": True},
            TypeError,
            ["do_image_spliting", "did you mean `do_image_splitting`", "resample"],
        ),
        ({"nonsense": 1}, TypeError, ["['nonsense']", "Expected some of", "size"]),
        ({"do_image_splitting": "yes"}, TypeError, ["do_image_splitting", "True or False", "'yes'"]),
        ({"do_center_crop": True, "crop_size": 4}, ValueError, ["do_center_crop", "crop_size", "remove"]),
        ({"do_pad": True}, ValueError, ["do_pad", "remove"]),
        ({"image_seq_length": 81}, ValueError, ["image_seq_length", "counts its tokens itself"]),
        ({"data_format": "channels_last"}, ValueError, ["channels_first", "channels_last", "permute"]),
        ({"size": {"shortest_edge": 9}}, ValueError, ["height and width", "shortest_edge"]),
        ({"size": {"height": 0, "width": 9}}, ValueError, ["positive height and width", "'height': 0"]),
        ({"image_mean": [0.5, 0.5]}, ValueError, ["image_mean", "(0.5, 0.5)", "R, G and B"]),
        ({"image_std": [0.5, 0.0, 0.5]}, ValueError, ["image_std", "non-zero", "do_normalize=False"]),
    ],
)
def test_a_bad_argument_is_refused_by_the_call_and_by_the_constructor(processor, image, options, error, parts):
    for use in (lambda: processor(image, **options), lambda: FlashSlothImageProcessor(**options)):
        with pytest.raises(error) as caught:
            use()
        assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_resize": False}, r"Expected images of 384x384.*`do_resize=False`, found 8x6.*do_resize=True"),
        ({"do_resize": False, "do_image_splitting": True}, r"no `do_image_splitting` with `do_resize=False`"),
        ({"do_convert_rgb": False}, r"Expected mode RGB in image 0, found RGBA; leave `do_convert_rgb` at True"),
        ({"input_data_format": "sideways"}, r"sideways is not a valid ChannelDimension.*channels_first"),
        ({"input_data_format": "channels_first"}, r"1, 3 or 4 channels.*\(6, 8, 4\).*channels_first.*correct"),
        ({"return_tensors": "tf"}, r"tf is not a valid TensorType"),
    ],
)
def test_an_argument_that_does_not_fit_the_image_is_refused(processor, image, options, message):
    with pytest.raises(ValueError, match=message):
        processor(np.asarray(image.convert("RGBA")), **options)


def test_images_of_the_right_size_and_mode_need_no_conversion(small, image):
    result = small(image, do_resize=False, do_convert_rgb=False)
    np.testing.assert_array_equal(pixels(result)[0], np.asarray(image))


def test_none_keeps_a_default(processor, image):
    names = ["do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"]
    nothing = dict.fromkeys([*names, "do_convert_rgb", "do_image_splitting", "input_data_format", "return_tensors"])
    np.testing.assert_array_equal(processor(image, **nothing)["pixel_values"], processor(image)["pixel_values"])
    assert FlashSlothImageProcessor(**nothing).to_dict() == processor.to_dict()


def test_inputs_are_not_modified(processor, image):
    for given in (np.asarray(image).copy(), torch.from_numpy(np.asarray(image) / 255), image.convert("RGBA")):
        before = np.array(given)
        processor(given, do_image_splitting=True)
        np.testing.assert_array_equal(np.array(given), before)


def test_saving_and_loading_keeps_everything(tmp_path):
    saved = FlashSlothImageProcessor(
        do_image_splitting=True, size={"height": 28, "width": 42}, image_mean=[0.1, 0.2, 0.3]
    )
    saved.save_pretrained(tmp_path)
    assert (tmp_path / "image_processing_flashsloth.py").is_file()
    loaded = FlashSlothImageProcessor.from_pretrained(tmp_path)
    remote = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(remote).__name__ == "FlashSlothImageProcessor"
    tiles = saved(Image.new("RGB", (9, 5), "teal"))["pixel_values"]
    assert tiles.shape == (5, 3, 28, 42)
    for again in (loaded, remote):
        assert {**again.to_dict(), "auto_map": None} == {**saved.to_dict(), "auto_map": None}
        np.testing.assert_array_equal(again(Image.new("RGB", (9, 5), "teal"))["pixel_values"], tiles)
        again.save_pretrained(tmp_path / "again")
        assert FlashSlothImageProcessor.from_pretrained(tmp_path / "again").do_image_splitting is True
    assert FlashSlothImageProcessor.from_pretrained(tmp_path, do_image_splitting=False).do_image_splitting is False


def test_a_configuration_inside_a_processors_configuration_is_loaded(tmp_path):
    nested = {**FlashSlothImageProcessor(do_image_splitting=True).to_dict(), "processor_class": "FlashSlothProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    assert FlashSlothImageProcessor.from_pretrained(tmp_path).do_image_splitting is True


def test_unknown_keys_of_a_saved_file_are_ignored(tmp_path):
    FlashSlothImageProcessor(do_image_splitting=True).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_in_transformers_9": 1}))
    loaded = FlashSlothImageProcessor.from_pretrained(tmp_path)
    assert loaded.do_image_splitting is True
    assert "added_in_transformers_9" not in loaded.to_dict()


def test_the_defaults_are_those_of_the_released_checkpoints():
    settings = FlashSlothImageProcessor().to_dict()
    assert settings["size"] == {"height": 384, "width": 384}
    assert settings["resample"] == Image.Resampling.BICUBIC
    assert settings["image_mean"] == settings["image_std"] == (0.5, 0.5, 0.5)
    assert settings["rescale_factor"] == 1 / 255
    assert settings["do_image_splitting"] is False
    assert FlashSlothImageProcessor.model_input_names == ["pixel_values"]


@pytest.fixture
def four_threads():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("do_image_splitting", [False, True])
def test_images_processed_in_threads_equal_those_processed_one_by_one(processor, four_threads, do_image_splitting):
    options = {"do_image_splitting": do_image_splitting, "return_tensors": "np"}
    alone = [processor(Image.open(path), **options)["pixel_values"] for path in FILES.values()]
    together = processor([Image.open(path) for path in FILES.values()], **options)["pixel_values"]
    assert np.array_equal(together, np.concatenate(alone))
    same = Image.open(next(iter(FILES.values())))  # opened but not read yet: two threads must not read it at once
    assert np.array_equal(processor([same] * 4, **options)["pixel_values"], np.concatenate(alone[:1] * 4))


def test_threads_may_share_an_image_that_was_only_opened(processor, tmp_path):
    noise = np.random.default_rng(6).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    expected = processor(str(tmp_path / "noise.png"))["pixel_values"]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            shared = Image.open(tmp_path / "noise.png")
            for found in threads.map(lambda image: processor(image)["pixel_values"], [shared] * 8):
                np.testing.assert_array_equal(found, expected)


def test_an_error_in_a_thread_names_the_image(processor, image, four_threads):
    broken = np.full((6, 8, 3), np.nan, dtype=np.float32)
    with pytest.raises(ValueError, match="finite pixels in image 2"):
        processor([image, image.copy(), broken, image.copy()])
