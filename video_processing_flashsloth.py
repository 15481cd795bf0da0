"""Reads frames from videos: FlashSloth sees a video as a sequence of images, with the usual number of tokens each.

Animations (GIF, PNG and WebP) and folders of images are read with Pillow; video files need PyAV.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from .image_processing_flashsloth import (
    IMAGE_ERRORS,
    FlashSlothImageProcessor,
    is_web_address,
    shorten,
    strip_file_scheme,
)

DEFAULT_NUM_FRAMES = 8

# FlashSloth-HD enlarges an image to twice the side of a tile: 768 pixels with the released sizes.
MAX_FRAME_SIDE = 1024

# Pillow also identifies MPEG files, but cannot read them.
ANIMATIONS = ("GIF", "PNG", "WEBP")

# For longer videos, seeking is faster than decoding every frame, in formats that store the time of each frame.
LONG_VIDEO = 500
TIMED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")


def video_frames(
    source: Any, num_frames: int = DEFAULT_NUM_FRAMES, *, max_side: int = MAX_FRAME_SIDE
) -> list[Image.Image]:
    """Sample evenly spaced frames from a video, including the first and the last one.

    Frames are decoded one at a time and only the sampled ones are kept, so memory holds `num_frames` images, whatever
    the length of the video.

    Args:
        source: Path or URL of a video, an animated GIF, PNG or WebP, a folder of images in the order of their names
            (`frame-9.png` before `frame-10.png`), or a sequence of frames: images in any form that the image processor
            reads, or an array `(num_frames, height, width, channels)`.
        num_frames: Maximum number of frames; a shorter video gives all of its frames. 1 gives the first frame.
        max_side: Maximum side of a frame in pixels; larger frames are scaled down.

    Returns:
        RGB images, in order.

    Raises:
        ValueError: If the video does not exist, has no frames, or is incomplete.
        TypeError: If the source has an unsupported type.
        ImportError: If reading the video needs PyAV, which is not installed.
    """
    if isinstance(num_frames, bool) or not isinstance(num_frames, Integral) or num_frames < 1:
        raise ValueError(f"Expected `num_frames` to be a whole number of at least 1, found {num_frames!r}.")
    processor = FlashSlothImageProcessor()
    images = []
    for index, frame in enumerate(_sampled(source, num_frames)):
        image = processor.process_image(processor.fetch_images(frame), name=f"sampled frame {index}")
        is_large = max(image.size) > max_side
        images.append(ImageOps.contain(image, (max_side, max_side)) if is_large else image)
    if not images:
        raise ValueError(f"Expected at least one frame, found none in {_shown(source)}.")
    return images


def _sampled(source: Any, num_frames: int) -> Iterator[Any]:
    if isinstance(source, str | os.PathLike):
        yield from _sampled_from_path(os.fspath(source), num_frames)
    elif isinstance(source, Sequence) or getattr(source, "ndim", 0) == 4:
        yield from (source[index] for index in _spread(len(source), num_frames))
    else:
        raise TypeError(
            "Expected a video as a path, a URL, a sequence of frames or an array (num_frames, height, width, channels),"
            f" found {type(source).__name__}; convert iterators to lists."
        )


def _spread(count: int, num_frames: int) -> list[int]:
    """Evenly spaced indices from 0 to `count - 1`."""
    return np.linspace(0, count - 1, min(count, num_frames)).round().astype(int).tolist()


def _sampled_from_path(path: str, num_frames: int) -> Iterator[Any]:
    path = strip_file_scheme(path)
    is_url = is_web_address(path)
    if not (is_url or os.path.exists(path)):  # noqa: PTH110  (`Path.exists` raises for a data URL, a name too long)
        raise ValueError(f"Expected the path or http(s) URL of a video, or a folder of images, found {_shown(path)}.")
    if Path(path).is_dir():
        frames = _frame_files(Path(path))
        yield from (frames[index] for index in _spread(len(frames), num_frames))
        return
    try:
        animation = None if is_url else Image.open(path, formats=ANIMATIONS)
    except IMAGE_ERRORS:
        animation = None
    yield from _container(path, num_frames) if animation is None else _animation(animation, path, num_frames)


def _frame_files(folder: Path) -> list[Path]:
    """Images of a folder in the order of their names, with numbers compared by value."""
    known = Image.registered_extensions()
    frames = [file for file in folder.iterdir() if file.suffix.lower() in known]
    return sorted(frames, key=_natural_order)


def _natural_order(file: Path) -> list[str | int]:
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"([0-9]+)", file.name)]


def _animation(image: Image.Image, path: str, num_frames: int) -> Iterator[Image.Image]:
    try:
        with image:
            for index in _spread(getattr(image, "n_frames", 1), num_frames):
                image.seek(index)
                yield image.copy()
    except IMAGE_ERRORS as error:
        raise _broken(path, error) from error


def _container(path: str, num_frames: int) -> Iterator[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"Reading {path} needs PyAV; install it with `pip install av`. Lists "
            "and folders of images, and GIFs, can be read without it."
        ) from error
    try:
        for frame in _container_frames(av.open, path, num_frames):
            yield frame.to_image().rotate(frame.rotation, expand=True)  # phones store portrait videos rotated
    except (av.FFmpegError, OSError, IndexError) as error:
        raise _broken(path, error) from error


def _container_frames(open_container: Callable, path: str, num_frames: int) -> Iterator[Any]:
    with open_container(path) as container:
        if container.format.name in TIMED_FORMATS:
            packets = [
                _Packet(packet.pts, packet.dts, packet.is_keyframe)
                for packet in container.demux(video=0)
                if not packet.is_discard
            ]
            packets = sorted(packet for packet in packets if packet.shown is not None)
            if len(packets) >= LONG_VIDEO:
                yield from _frames_by_seeking(container, packets, num_frames)
                return
    # Only decoding counts frames reliably: in some formats, packets hold half a frame, or one that is never shown.
    with open_container(path) as container:
        wanted = set(_spread(sum(1 for _ in container.decode(video=0)), num_frames))
    with open_container(path) as container:
        yield from (frame for index, frame in enumerate(container.decode(video=0)) if index in wanted)


def _frames_by_seeking(container: Any, packets: list["_Packet"], num_frames: int) -> Iterator[Any]:
    """Frames of a long video, each decoded from the latest key frame up to it."""
    container.streams.video[0].thread_type = "AUTO"
    keys = [packet for packet in packets if packet.is_key]
    for time in [packets[index].shown for index in _spread(len(packets), num_frames)]:
        key = keys[max(0, bisect_right([key.shown for key in keys], time) - 1)]
        container.seek(
            key.shown if key.decoded is None else min(key.shown, key.decoded), stream=container.streams.video[0]
        )
        frame = next((frame for frame in container.decode(video=0) if frame.pts >= time), None)
        if frame is None:
            raise EOFError(f"the video ends before the frame at {time}")
        yield frame


class _Packet(NamedTuple):
    """Times at which a packet's frame is shown and decoded, in the stream's time base, or `None` if not stored."""

    shown: int | None
    decoded: int | None
    is_key: bool


def _broken(path: str, error: Exception) -> ValueError:
    return ValueError(
        f"Expected a complete video, found {_shown(path)}, which cannot be read ({type(error).__name__}: "
        f"{str(error)[:200]}); save it again, or pass its frames as images."
    )


def _shown(source: Any) -> str:
    if not isinstance(source, str | os.PathLike):
        return f"a {type(source).__name__}"
    return repr(shorten(os.fspath(source)))


__all__ = ["video_frames"]
