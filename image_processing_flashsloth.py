"""Image processor of FlashSloth: turns images into the tiles that the vision tower reads.

Paper: "FlashSloth: Lightning Multimodal Large Language Models via Embedded Visual Compression", arXiv 2412.04317.

    image, any mode or layout ─ uint8 RGB, alpha dropped ─ Pillow's bicubic ─ ÷255, mean 0.5, std 0.5 ─ pixel_values
    FlashSloth:     1 tile per image, the whole image resized            (num_images, 3, height, width)
    FlashSloth-HD:  5 tiles per image (`do_image_splitting=True`)        (num_images * 5, 3, height, width)
                    the whole image resized, then the image padded to a square, resized to
                    (2 * height, 2 * width) and cut into 2x2 tiles, row by row
"""

import base64
import difflib
import io
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    ImageInput,
    ImageType,
    PILImageResampling,
    SizeDict,
    get_image_type,
    httpx,  # the package under this name depends on the version of huggingface_hub
    is_valid_image,
    validate_preprocess_arguments,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import logging

logger = logging.get_logger(__name__)

# FlashSloth-HD: tiles along one side of the enlarged image, and all tiles of an image.
TILES_PER_SIDE = 2
NUM_HD_TILES = 1 + TILES_PER_SIDE**2

# Accepted channel counts, most likely first: the order decides when both ends of a shape could be the channels.
CHANNEL_COUNTS = (3, 4, 1)

# JPEG's limit. The padded square has the longer side of the image: a strip of a million pixels, which passes Pillow's
# check for decompression bombs, would take gigabytes.
MAX_SIDE = 65_535

# Fractional floats with a maximum between 1 and this value are rejected: they may be 0..1 values that overshot in a
# resize, or linear light, and reading them as 0..255 would silently give a nearly black image.
DARKEST_WHITE = 16

# Pixels of the padded square held in memory at a time.
STRIP_PIXELS = 2**20

# If the padded side is more than this many times the image's, the result for pure padding is computed, not resized.
LONG_PADDING = 8

# The weight 1 in the fixed-point arithmetic of Pillow's resize.
WEIGHT_ONE = 2**22

# Seconds to wait for a server that sends nothing, and the client's name: some servers reject a library's default one.
DOWNLOAD_TIMEOUT = 30
USER_AGENT = "FlashSloth"

# Exceptions that Pillow raises for files that are truncated, corrupt, not images, or decompression bombs.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)

# Keys that transformers adds to saved files; the constructor accepts them.
FILE_KEYS = frozenset({"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"})

# Arguments that every image processor of transformers accepts, but that have no meaning for FlashSloth.
UNUSED_ARGUMENTS = ("do_center_crop", "crop_size", "do_pad", "pad_size", "image_seq_length")


class FlashSlothImageProcessorKwargs(ImagesKwargs, total=False):
    """Keyword arguments of `FlashSlothImageProcessor`: those of transformers, and `do_image_splitting`.

    Attributes:
        do_image_splitting: Whether to split an image into five tiles (FlashSloth-HD) instead of one.
    """

    do_image_splitting: bool | None


class FlashSlothImageProcessor(PilBackend):
    """Turns images into `pixel_values` with Pillow, bit-identical to the original FlashSloth.

    Accepts PIL images of every mode, numpy or torch arrays, and strings (path, URL, base64): one image, a list, or
    one list per row of the batch. How images are read:

    - **Alpha** is dropped, as in the original: the colour stored under a transparent pixel shows.
    - **16-bit** images (modes `I;16*`, dtype uint16) are scaled so that 65535 is white. Mode `I` and wider integers
      are read as 8-bit if no value exceeds 255, else as 16-bit.
    - **Floats** (arrays, and mode `F`) within 0..1 have white at 1, whatever `do_rescale` says. Floats within 0..255
      are rounded. Anything else raises. An array that holds only 0.0 and 1.0 is black and white.
    - **Booleans** are black and white.
    - **Layouts**: `(height, width)`, or 1, 3 or 4 channels first or last. If both ends could be the channels, 3 is
      preferred over 4 over 1, then first over last, with a warning; pass `input_data_format` to decide.
    - **EXIF rotation** is applied to strings, which are loaded here, but not to PIL images, as everywhere in
      transformers. From an animation, the current frame is read, which in a file is the first.
    """

    valid_kwargs = FlashSlothImageProcessorKwargs
    model_input_names = ["pixel_values"]

    do_resize = True
    size = {"height": 384, "width": 384}
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    do_convert_rgb = True
    do_image_splitting = False

    def __init__(self, **kwargs: Unpack[FlashSlothImageProcessorKwargs]) -> None:
        """Set the defaults for later calls; an argument that is `None` keeps the class's default.

        Raises:
            TypeError: If an argument is unknown, or `do_image_splitting` is not a bool.
            ValueError: If FlashSloth does not support an argument's value.
        """
        _check_names(kwargs, self._argument_names(), FILE_KEYS)
        _check_flag(kwargs.get("do_image_splitting"))
        super().__init__(**{name: value for name, value in kwargs.items() if value is not None})
        _check_settings(**{name: getattr(self, name) for name in self._argument_names()})

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> "FlashSlothImageProcessor":
        """Build the processor from the content of a saved file; unknown keys are ignored with a warning."""
        known = {*cls._argument_names(), *FILE_KEYS}
        if unknown := sorted(set(image_processor_dict) - known):
            logger.warning(f"{cls.__name__}: ignoring unknown keys {unknown} in the saved configuration.")
        return super().from_dict({key: value for key, value in image_processor_dict.items() if key in known}, **kwargs)

    @classmethod
    def _argument_names(cls) -> tuple[str, ...]:
        return tuple(cls.valid_kwargs.__annotations__)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Count the tiles of an image.

        Args:
            height: Height of the image in pixels; unused, as is `width`: every size gives the same number.
            width: Width of the image in pixels.
            images_kwargs: Keyword arguments of the call, which override this processor's defaults.

        Returns:
            1, or 5 with `do_image_splitting`.
        """
        do_image_splitting = (images_kwargs or {}).get("do_image_splitting")
        if do_image_splitting is None:
            do_image_splitting = self.do_image_splitting
        return NUM_HD_TILES if do_image_splitting else 1

    def fetch_images(self, image_url_or_urls: ImageInput | str | os.PathLike | list) -> ImageInput | list:
        """Load paths, URLs and base64 strings, one or in a nested list; other images are returned unchanged.

        In a list of rows, `None` is a row without images, as TRL passes it: `[None, [image]]`, or `[None, None]`.
        Encoded images, `{"bytes": ..., "path": ...}`, as `datasets` returns them for nested columns, are opened.

        Raises:
            TypeError: If something is not an image.
            ValueError: If an image cannot be read, or an array does not have 2, 3 or 4 axes.
        """
        return self._fetch(_fill_rows(image_url_or_urls))

    def _fetch(self, images: ImageInput | str | os.PathLike | list) -> ImageInput | list:
        if isinstance(images, list | tuple):
            return [self._fetch(image) for image in images]
        if isinstance(images, dict) and isinstance(images.get("bytes"), bytes):
            return _open_encoded(images["bytes"])
        if isinstance(images, str | os.PathLike):
            return _load(os.fspath(images))
        if not is_valid_image(images):
            raise TypeError(
                "Expected an image as a PIL image, numpy array, torch tensor, path, URL or base64 string, "
                f"found {type(images).__name__}; open it with `PIL.Image.open` first. If a row has no images, pass "
                "`[]` for it."
            )
        if get_image_type(images) == ImageType.PIL:
            return images
        if images.ndim not in (2, 3, 4):
            raise ValueError(
                "Expected an array (height, width), one with channels first or last, or a batch of those, found shape "
                f"{tuple(images.shape)}; pass several images as a list."
            )
        # transformers counts arrays of three axes as images; a grey array has only two.
        return _grey_to_pil(_to_numpy(images)) if images.ndim == 2 else images

    def preprocess(
        self, images: ImageInput, *, crop_to_patches: bool = False, **kwargs: Unpack[FlashSlothImageProcessorKwargs]
    ) -> BatchFeature:
        """Turn images into tiles.

        Args:
            images: An image, a list of images, or a list of lists.
            crop_to_patches: Whether to also return the number of tiles of each image, which TRL asks for; the tiles
                are the same.
            **kwargs: Overrides of this processor's defaults for this call; `None` keeps a default.

        Returns:
            `pixel_values` (num_tiles, 3, height, width) in float32, the tiles of all images in order: a torch tensor
            with `return_tensors="pt"`, else a numpy array. With `crop_to_patches`, also `num_patches` (num_images,).

        Raises:
            TypeError: If an argument is unknown, or something is not an image.
            ValueError: If an image cannot be read, or an argument has an unsupported value.
        """
        _check_names(kwargs, self._argument_names())
        _check_flag(kwargs.get("do_image_splitting"))
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # type: ignore[assignment]
        validate_typed_dict(self.valid_kwargs, kwargs)  # type: ignore[type-var]
        settings = {name: getattr(self, name, None) for name in self._argument_names()}
        settings = self._standardize_kwargs(**(settings | kwargs))
        _check_settings(**settings)

        device, return_tensors = settings.pop("device"), settings.pop("return_tensors")
        tiles = self._tiles(list(_flatten(self.fetch_images(images))), **settings)
        features: Any = {"pixel_values": tiles.reshape(-1, *tiles.shape[2:])}
        if crop_to_patches:
            features["num_patches"] = np.full(*tiles.shape[:2])
        features = BatchFeature(features, tensor_type=return_tensors)
        return features if device is None else _to_device(features, device)

    def _tiles(
        self, images: list[ImageInput], *, size: SizeDict, do_image_splitting: bool, **kwargs: Any
    ) -> np.ndarray:
        """Tiles of images, `(num_images, tiles_per_image, 3, height, width)`, float32."""
        options = {"do_image_splitting": do_image_splitting}
        tiles_per_image = self.get_number_of_image_patches(size.height, size.width, options)
        tiles = np.empty((len(images), tiles_per_image, 3, size.height, size.width), dtype=np.float32)

        def write(index: int, image: ImageInput) -> None:
            converted = self.process_image(image, name=_name(index, image), **kwargs)
            levels = _levels(image, **kwargs)
            cut = self._cut(converted, size, do_image_splitting, **kwargs)
            for tile, target in zip(cut, tiles[index], strict=True):
                _write(tile, levels, target)

        _for_each(write, images)
        return tiles

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        *,
        name: str = "the image",
        **kwargs: Any,
    ) -> Image.Image:
        """Convert one image to RGB with 8 bits per channel.

        Args:
            image: The image.
            do_convert_rgb: `False` raises for images that are not RGB instead of converting them.
            input_data_format: Whether an array has its channels first or last.
            name: Name of the image in error messages.
            **kwargs: Ignored.

        Returns:
            A PIL image, which Pillow resizes without another copy.
        """
        if get_image_type(image) != ImageType.PIL:
            image = _array_to_pil(_to_numpy(image), input_data_format, name)
        _check_sides(image.height, image.width, name)
        if do_convert_rgb is False and image.mode != "RGB":
            raise ValueError(f"Expected mode RGB in {name}, found {image.mode}; leave `do_convert_rgb` at True.")
        return _convert_to_rgb(image, name)

    def _cut(
        self,
        image: Image.Image,
        size: SizeDict,
        do_image_splitting: bool,
        do_resize: bool,
        resample: int,
        image_mean: float | Iterable[float],
        **kwargs: Any,
    ) -> Iterator[Image.Image]:
        """Cut a converted image into its tiles: the whole image first, then 2x2 tiles of the padded one."""
        height, width = size.height, size.width
        if not do_resize:
            if do_image_splitting or image.size != (width, height):
                raise ValueError(
                    f"Expected images of {width}x{height} and no `do_image_splitting` with `do_resize=False`, found "
                    f"{image.width}x{image.height} and {do_image_splitting}; set `do_resize=True`."
                )
            yield image
            return
        yield _resize(image, (width, height), resample)
        if do_image_splitting:
            # The original truncates: 0.5 * 255 gives 127, not 128.
            background = tuple(int(mean * 255) for mean in np.broadcast_to(image_mean, 3))
            enlarged = _pad_and_resize(image, (TILES_PER_SIDE * width, TILES_PER_SIDE * height), resample, background)
            for top in range(0, enlarged.height, height):
                for left in range(0, enlarged.width, width):
                    yield enlarged.crop((left, top, left + width, top + height))


def _for_each(work: Callable[[int, ImageInput], None], images: list) -> None:
    """Call `work` with the index and the image of every image, on `torch.get_num_threads()` threads.

    Threads help, because Pillow and numpy release the GIL.
    """
    num_threads = min(len(images), torch.get_num_threads())
    if num_threads < 2:
        for index, image in enumerate(images):
            work(index, image)
        return
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(work, range(len(images)), images))


def _check_names(arguments: Iterable[str], valid: Iterable[str], also_valid: Iterable[str] = ()) -> None:
    valid = sorted(set(valid) - set(UNUSED_ARGUMENTS))
    unknown = sorted(set(arguments) - {*valid, *also_valid, *UNUSED_ARGUMENTS})
    if unknown:
        guesses = difflib.get_close_matches(unknown[0], valid, n=1)
        hint = f"did you mean `{guesses[0]}`? " if guesses else ""
        raise TypeError(f"FlashSlothImageProcessor does not know {unknown}; {hint}Expected some of {valid}.")


def _check_flag(do_image_splitting: bool | None) -> None:
    if not isinstance(do_image_splitting, bool | None):
        raise TypeError(
            f"Expected `do_image_splitting` to be True or False, found {do_image_splitting!r}; pass a bool."
        )


def _check_settings(**kwargs: Any) -> None:
    unused = [name for name in UNUSED_ARGUMENTS if kwargs.get(name)]
    if unused:
        raise ValueError(
            f"Expected no cropping, padding or token count, found {unused}: FlashSloth reads the whole image and "
            "counts its tokens itself; remove these arguments."
        )
    if kwargs["data_format"] not in (None, ChannelDimension.FIRST, ChannelDimension.FIRST.value):
        raise ValueError(
            f"Expected `data_format` 'channels_first', which the model reads, found {kwargs['data_format']!r}; "
            "permute `pixel_values` afterwards, or pass `input_data_format` to describe the input."
        )
    _check_values(**kwargs)
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_resize", "size", "resample")
    validate_preprocess_arguments(**{name: kwargs[name] for name in names})


def _check_values(
    size: SizeDict, image_mean: float | Iterable[float], image_std: float | Iterable[float], **kwargs: Any
) -> None:
    if not (size.height and size.width and size.height > 0 and size.width > 0):
        raise ValueError(
            f"Expected `size` with a positive height and width, found {dict(size)}; pass the size in pixels that the "
            "vision tower reads, such as {'height': 384, 'width': 384}."
        )
    for name, value in (("image_mean", image_mean), ("image_std", image_std)):
        if np.shape(value) not in ((), (3,)):
            raise ValueError(
                f"Expected `{name}` as one number, or one for each of R, G and B, found {value}; pass 1 or 3 numbers."
            )
    if not np.all(image_std):
        raise ValueError(f"Expected a non-zero `image_std`, found {image_std}; set `do_normalize=False` to skip it.")


def _name(index: int, image: ImageInput) -> str:
    filename = getattr(image, "filename", "")
    return f"image {index} ({filename!r})" if filename else f"image {index}"


def _fill_rows(images: Any) -> Any:
    """Replace rows that are `None` by empty lists."""
    is_rows = isinstance(images, list | tuple) and all(row is None or isinstance(row, list | tuple) for row in images)
    return [[] if row is None else row for row in images] if is_rows else images


def _flatten(images: ImageInput | list) -> Iterator[ImageInput]:
    is_batch = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
    if is_batch:
        for image in images:
            yield from _flatten(image)
    else:
        yield images


def open_image(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """Open an image file in its own mode, with its EXIF rotation applied.

    Args:
        file: Path, or an open binary file.

    Raises:
        Exception: One of `IMAGE_ERRORS`, if Pillow cannot read the file.
    """
    with Image.open(file) as image:
        return ImageOps.exif_transpose(image)


def _load(source: str) -> Image.Image:
    """Open a path, URL or base64 string in the image's own mode.

    transformers' `load_image` converts to RGB, which clips 16-bit images to white.
    """
    path = strip_file_scheme(source)
    # Not `Path.is_file`: it raises for base64 strings, which are longer than a file name may be.
    is_file = os.path.isfile(path)  # noqa: PTH113
    try:
        return open_image(path if is_file else io.BytesIO(_fetch(source)))
    except Exception as error:  # Pillow's, and those of the installed HTTP client
        if is_file:
            found = "a file that Pillow cannot read"
        elif is_web_address(source):
            found = "a URL that does not give an image"
        else:
            found = "neither a file nor the URL or the base64 string of an image"
        raise ValueError(
            f"Expected the path, URL or base64 string of a complete image, found {shorten(source)!r}: {found} "
            f"({_describe(error)}); correct the path, save the image again, or remove it."
        ) from error


def is_web_address(source: str) -> bool:
    """Whether the source of an image or a video is an http(s) URL."""
    return source[:8].lower().startswith(("http://", "https://"))


def strip_file_scheme(source: str) -> str:
    """Path of a `file://` URL; other sources are returned unchanged."""
    return url2pathname(urlsplit(source).path) if source.startswith("file://") else source


def shorten(source: str) -> str:
    """Start and end of a long source, such as a base64 string, for error messages."""
    return source if len(source) <= 80 else f"{source[:40]}…{source[-40:]}"


def _fetch(source: str) -> bytes:
    """Content of an http(s) or `data:` URL, or of a base64 string.

    Raises:
        OSError: If the server answers with an error.
        ValueError: If the text is not base64.
    """
    if is_web_address(source):
        headers = {"User-Agent": USER_AGENT}
        response = httpx.get(source, headers=headers, timeout=DOWNLOAD_TIMEOUT, follow_redirects=True)
        if response.is_error:
            raise OSError(f"the server answered {response.status_code} {response.reason_phrase}")
        return response.content
    if source[:5].lower() != "data:":
        return _decode_base64(source)
    header, _, content = source.partition(",")
    content = unquote_to_bytes(content)  # type: ignore[assignment]
    is_base64 = header.lower().endswith(";base64")
    return _decode_base64(content.decode()) if is_base64 else content  # type: ignore[attr-defined,return-value]


def _decode_base64(text: str) -> bytes:
    """Decode base64 in either alphabet, with or without line breaks and padding."""
    text = "".join(text.split()).rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _open_encoded(encoded: bytes) -> Image.Image:
    try:
        return open_image(io.BytesIO(encoded))
    except IMAGE_ERRORS as error:
        raise ValueError(
            f"Expected the bytes of a complete image file, found {len(encoded)} bytes that Pillow cannot read "
            f"({_describe(error)}); save the image again, or remove it."
        ) from error


def _describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {str(error)[:200]}"
    if isinstance(error, Image.DecompressionBombError):
        text += " If you trust the image's source, raise `PIL.Image.MAX_IMAGE_PIXELS`"
    return text


def _to_numpy(array: Any) -> np.ndarray:
    if get_image_type(array) == ImageType.NUMPY:
        return array
    array = array.detach().cpu()
    # numpy has no bfloat16
    return (array.float() if array.is_floating_point() else array).numpy()


def _grey_to_pil(values: np.ndarray) -> Image.Image:
    """A PIL image with the array's values, in a mode that `_convert_to_rgb` reads as it would read the array."""
    name = "an array of grey values"
    _check_sides(*values.shape, name)  # type: ignore[call-arg]
    if values.dtype == np.uint16:
        return Image.fromarray(values)
    if values.dtype.kind == "f":
        return Image.fromarray(values.astype(np.float32))
    return Image.fromarray(_to_uint8(values, name))


def _convert_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert an image of any mode to RGB, without its alpha."""
    try:
        # Threads may share an image whose file is open but not yet read, and Pillow cannot load it twice at once. The
        # lock is kept on the image: images are not hashable, and one lock for all would load them one at a time.
        with vars(image).setdefault("_loading", threading.Lock()):
            image.load()
        if image.mode != "F" and not image.mode.startswith("I"):
            return _convert_shallow(image)
        # Pillow clips these modes to 0..255, which turns nearly all 16-bit pixels white.
        values = np.asarray(image)
    except IMAGE_ERRORS as error:
        raise ValueError(
            f"Expected a complete image that Pillow can convert to RGB, found mode {image.mode} in {name}, which it "
            f"cannot ({_describe(error)}); save it again as RGB, or remove it."
        ) from error
    return Image.fromarray(_to_uint8(values, name)).convert("RGB")


def _convert_shallow(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "La":
        image = image.convert("LA")
    if isinstance(image.info.get("transparency"), bytes):
        # Pillow warns if such a palette is converted to RGB directly; the colours are the same.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _array_to_pil(array: np.ndarray, input_data_format: str | ChannelDimension | None, name: str) -> Image.Image:
    """Turn an array with 1, 3 or 4 channels into a PIL image in mode L, RGB or RGBA."""
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3:
        layout = _infer_layout(shape) if input_data_format is None else ChannelDimension(input_data_format)
        array = np.moveaxis(array, 0, -1) if layout == ChannelDimension.FIRST else array
    if array.ndim != 3 or array.shape[-1] not in CHANNEL_COUNTS:
        raise ValueError(
            f"Expected 1, 3 or 4 channels, first or last, in {name}, found shape {shape} and "
            f"input_data_format={input_data_format}; select 1, 3 or 4 channels, or correct `input_data_format`."
        )
    _check_sides(*array.shape[:2], name)  # type: ignore[call-arg]
    array = _to_uint8(array, name)
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))


def _infer_layout(shape: tuple[int, ...]) -> ChannelDimension:
    counts = {ChannelDimension.FIRST: shape[0], ChannelDimension.LAST: shape[-1]}
    possible = [layout for layout, count in counts.items() if count in CHANNEL_COUNTS]
    if len(possible) == 2:
        layout = min(possible, key=lambda layout: CHANNEL_COUNTS.index(counts[layout]))
        logger.warning_once(
            f"Both ends of the shape {shape} could be an image's channels; reading it as {layout.value}. Pass "
            "`input_data_format` ('channels_first' or 'channels_last') to decide."
        )
        return layout
    return possible[0] if possible else ChannelDimension.LAST


def _check_sides(height: int, width: int, name: str) -> None:
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise ValueError(
            f"Expected sides of 1 to {MAX_SIDE} pixels in {name}, found {width}x{height} (width x height); check the "
            "crop or file, resize it, or remove it."
        )


def _to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return np.where(values, np.uint8(255), np.uint8(0))
    if kind == "f":
        return _floats_to_uint8(values, name)
    if kind in "iu":
        return _integers_to_uint8(values, name)
    raise ValueError(f"Expected bool, integer or float pixels in {name}, found dtype {values.dtype}; convert to uint8.")


def _floats_to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(
            f"Expected finite pixels in {name}, found {np.count_nonzero(~np.isfinite(values))} that are NaN or "
            "infinite; replace these values, e.g. with `numpy.nan_to_num`."
        )
    if low >= 0 and high <= 1:
        return np.rint(values * np.float32(255)).astype(np.uint8)
    levels = np.rint(values)
    if low >= 0 and high <= 255 and (high >= DARKEST_WHITE or np.array_equal(levels, values)):
        return levels.astype(np.uint8)
    raise ValueError(
        f"Expected float pixels within 0..1 or 0..255 in {name}, found {low} to {high}, which fits neither; undo an "
        "earlier normalisation, clip to 0..1, or convert to uint8."
    )


def _integers_to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65_535:
        raise ValueError(
            f"Expected integer pixels within 0..255, or 0..65535 for 16 bits, in {name}, found {low} to {high}; scale "
            "them to 0..255 and convert to uint8."
        )
    if high > 255 or values.dtype.kind + str(values.dtype.itemsize) == "u2":
        # 65535 = 257 * 255, so this rounds to the nearest 8-bit level.
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return values.astype(np.uint8)


def _is_unit_range(image: ImageInput) -> bool:
    """Whether an image has floats within 0..1."""
    values = np.asarray(image) if get_image_type(image) == ImageType.PIL else _to_numpy(image)
    return values.dtype.kind == "f" and values.max() <= 1


def _levels(
    image: ImageInput,
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: float | Iterable[float],
    image_std: float | Iterable[float],
    **kwargs: Any,
) -> np.ndarray:
    """Lookup table from the 256 levels of an 8-bit image to float32, per channel: (3, 256)."""
    # Without rescaling, an image keeps the scale it was passed in.
    own_scale = 1 / 255 if not do_rescale and _is_unit_range(image) else 1.0
    scale = rescale_factor if do_rescale else own_scale
    levels = np.broadcast_to(np.arange(256) * scale, (3, 256))
    if do_normalize:
        mean, std = (np.broadcast_to(value, 3)[:, None] for value in (image_mean, image_std))
        levels = (levels - mean) / std
    return levels.astype(np.float32)


def _write(tile: Image.Image, levels: np.ndarray, target: np.ndarray) -> None:
    pixels = np.asarray(tile)  # (height, width, 3)
    for channel in range(3):
        np.take(levels[channel], pixels[..., channel], out=target[channel], mode="clip")


def _resize(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """Resize to `size` (width, height) one axis at a time, in the order that Pillow 13 chooses.

    Pillow rounds to 8 bits between its two passes, so their order changes the last bits. Up to Pillow 12, rows always
    came first; choosing the order here gives the same result with every version.
    """
    width, height = size
    excess = image.height - height
    columns_first = excess > 0 and excess > 2 * (image.width - width)
    between = (image.width, height) if columns_first else (width, image.height)
    return image.resize(between, resample).resize(size, resample)


def _pad_and_resize(
    image: Image.Image, size: tuple[int, int], resample: int, background: tuple[int, ...]
) -> Image.Image:
    """Pad to a centred square and resize it to `size` (width, height), without building the whole square.

    From square to square, every version of Pillow resizes rows first, and rows are independent. So only the image's
    own rows are resized, and the padding above and below is added afterwards: the result is the same to the bit. If
    most of a row or column is padding, only the output that depends on the image is computed, so time and memory grow
    with the pixels of the image, not of the square.
    """
    width, height = size
    side = max(image.size)
    if resample == PILImageResampling.BICUBIC and side > LONG_PADDING * image.width:
        left, part = _resize_between_padding(image, side, width, background)
    else:
        left, part = 0, _pad_and_resize_rows(image, side, width, resample, background)
    if resample == PILImageResampling.BICUBIC and side > LONG_PADDING * part.height:
        top, part = _resize_between_padding(part.transpose(Image.Transpose.TRANSPOSE), side, height, background)
        part = part.transpose(Image.Transpose.TRANSPOSE)
    else:
        column = Image.new("RGB", (part.width, side), background)
        column.paste(part, (0, (side - part.height) // 2))
        top, part = 0, column.resize((part.width, height), resample)
    enlarged = Image.new("RGB", size, background)
    enlarged.paste(part, (left, top))
    return enlarged


def _pad_and_resize_rows(
    image: Image.Image, side: int, width: int, resample: int, background: tuple[int, ...]
) -> Image.Image:
    """Pad the rows of an image to `side` pixels and resize them to `width`, a strip of rows at a time."""
    if image.width == side:
        return image.resize((width, image.height), resample)
    rows = Image.new("RGB", (width, image.height))
    num_rows = max(1, STRIP_PIXELS // side)
    for start in range(0, image.height, num_rows):
        end = min(start + num_rows, image.height)
        strip = Image.new("RGB", (side, end - start), background)
        strip.paste(image.crop((0, start, image.width, end)), ((side - image.width) // 2, 0))
        rows.paste(strip.resize((width, end - start), resample), (0, start))
    return rows


def _resize_between_padding(
    image: Image.Image, side: int, width: int, background: tuple[int, ...]
) -> tuple[int, Image.Image]:
    """Resize rows that are centred in padding; compute only the columns that depend on the image.

    Pillow sums integers (pixels times weights), so the sums are the same in any order, and exact in float64.

    Args:
        image: The image.
        side: Length of a padded row, in pixels.
        width: Length of a resized row, in pixels.
        background: Colour of the padding.

    Returns:
        The index of the first computed column, and the computed columns.
    """
    first, weights, rest = _column_weights(image.width, side, width)
    # (columns, 3): the contribution of the padding, and the half that Pillow adds to round
    constant = rest[:, None] * np.array(background, np.float64) + WEIGHT_ONE / 2
    resized = np.empty((image.height, len(weights), 3), np.uint8)
    num_rows = max(1, STRIP_PIXELS // image.width)
    for start in range(0, image.height, num_rows):
        end = min(start + num_rows, image.height)
        pixels = np.asarray(image.crop((0, start, image.width, end)), np.float64)
        sums = weights @ pixels + constant  # (rows, columns, 3)
        resized[start:end] = np.clip(np.floor(sums / WEIGHT_ONE), 0, 255)
    return first, Image.fromarray(resized)


def _column_weights(num_pixels: int, side: int, width: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Resampling weights of the `num_pixels` pixels in the middle of `side`, for the output columns they contribute to.

    This repeats the arithmetic of Pillow's `precompute_coeffs` and `normalize_coeffs_8bpc` in the same order:
    https://github.com/python-pillow/Pillow/blob/12.0.0/src/libImaging/Resample.c

    Returns:
        The index of the first such column; the weights of the pixels, `(columns, num_pixels)`; and the sum of the
        padding's weights, `(columns,)`. Weights are integers, in units of 1 / `WEIGHT_ONE`.
    """
    left, scale = (side - num_pixels) // 2, side / width
    stretch = max(scale, 1.0)
    centers = (np.arange(width) + 0.5) * scale
    starts = np.maximum((centers - 2.0 * stretch + 0.5).astype(int), 0)
    ends = np.minimum((centers + 2.0 * stretch + 0.5).astype(int), side)
    columns = np.flatnonzero((ends > left) & (starts < left + num_pixels))
    weights, rest = np.zeros((len(columns), num_pixels)), np.zeros(len(columns))
    for row, column in enumerate(columns):
        pixels = np.arange(starts[column], ends[column])
        kernel = _bicubic((pixels - centers[column] + 0.5) * (1.0 / stretch))
        kernel /= np.cumsum(kernel)[-1]  # sums in order, as Pillow does; `sum` adds pairwise
        kernel = np.trunc(kernel * WEIGHT_ONE + np.copysign(0.5, kernel))
        is_inside = (pixels >= left) & (pixels < left + num_pixels)
        weights[row, pixels[is_inside] - left] = kernel[is_inside]
        rest[row] = kernel[~is_inside].sum()
    return int(columns[0]), weights, rest


def _bicubic(distance: np.ndarray) -> np.ndarray:
    """Pillow's cubic kernel, with a = -0.5, at distances from -2 to 2."""
    x, a = np.abs(distance), -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def tile_boxes(height: int, width: int, num_tiles: int) -> list[tuple[float, float, float, float]]:
    """Bounding boxes of the tiles in their image, in the order of `pixel_values`.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        num_tiles: 1, or 5 with `do_image_splitting`.

    Returns:
        Left, top, right and bottom of every tile, in pixels of the image. Parts outside the image are padding.

    Raises:
        ValueError: If `num_tiles` is neither 1 nor 5.
    """
    if num_tiles not in (1, NUM_HD_TILES):
        raise ValueError(f"Expected 1 or {NUM_HD_TILES} tiles of an image, found {num_tiles}; pass all of its tiles.")
    side = max(height, width)
    left, top, step = (side - width) // 2, (side - height) // 2, side / TILES_PER_SIDE
    corners = [
        (column * step - left, row * step - top) for row in range(TILES_PER_SIDE) for column in range(TILES_PER_SIDE)
    ]
    return [(0, 0, width, height), *((x, y, x + step, y + step) for x, y in corners)][:num_tiles]


def _to_device(features: BatchFeature, device: Any) -> BatchFeature:
    if isinstance(features["pixel_values"], np.ndarray):
        if str(device) == "cpu":
            return features
        raise ValueError(f"Expected `return_tensors='pt'` with device={device}, found numpy output; pass both.")
    return features.to(device)  # type: ignore[return-value]


__all__ = ["FlashSlothImageProcessor", "FlashSlothImageProcessorKwargs"]
