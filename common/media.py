"""Pictures, masks and videos between files and uint8 arrays. Legend: H W picture size, C channels, h w latent size."""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from common.files import existing_file
from options.errors import UserError

logger = logging.getLogger(__name__)

CRF = 17
"""x264's constant quality: 17 or 18 is "visually lossless or nearly so" (ffmpeg's H.264 guide), the default 23 shows
artefacts on flat colours, and one fixed bitrate starves large videos while it bloats small ones."""

ENCODER_THREADS = 1
"""x264's bytes depend on the number of threads, and with several of them, now and then, on their timing."""


# ---- pictures ----


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image at its final size, colour and transparency apart."""

    rgb: np.ndarray
    """(H, W, 3) uint8; the colour under transparent pixels is the file's."""
    alpha: np.ndarray | None
    """(H, W) uint8, 255 = opaque; None when the image has no transparency."""


def open_image(path: str | Path, *, flag: str) -> Image.Image:
    """The whole image (the first of an animation), upright by its EXIF orientation, with 8 bits per channel.

    Raises:
        UserError: nothing there, or not an image that decodes to its end.
    """
    with _opened(path, flag) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    try:
        return eight_bit(upright)
    except ValueError as error:
        raise UserError(flag, path, "an image of 8 or 16 bits per channel", f"convert it ({error})") from error


def check_image(path: str | Path, *, flag: str) -> None:
    """Raises the `UserError` that `open_image` would raise."""
    open_image(path, flag=flag)


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """What the header of an image says."""

    size: tuple[int, int]
    """(width, height) of the upright image."""
    is_turned: bool
    """Whether its EXIF orientation turns or mirrors the stored pixels."""


def image_info(path: str | Path, *, flag: str) -> ImageInfo:
    """Reads the header: the pixels are not decoded.

    Raises:
        UserError: nothing there, or not an image.
    """
    with _opened(path, flag) as image:
        width, height = _stored_size(image)
        orientation = _orientation(image, Path(path))
    size = (height, width) if orientation in (5, 6, 7, 8) else (width, height)
    return ImageInfo(size=size, is_turned=orientation in range(2, 9))


def image_size(path: str | Path, *, flag: str) -> tuple[int, int]:
    """`image_info`'s size."""
    return image_info(path, flag=flag).size


def load_picture(path: str | Path, *, width: int, height: int, flag: str, crops: bool = True) -> Picture:
    """An image file, resized and cropped as `fit` does; its transparency gets the same and is never composited.

    Args:
        crops: False resizes it as `squeeze` does.

    Raises:
        UserError: as `open_image`.
    """
    image, resize = open_image(path, flag=flag), fit if crops else squeeze
    if not image.has_transparency_data:
        return Picture(rgb=resize(np.asarray(image.convert("RGB")), width, height), alpha=None)
    rgba = resize(np.asarray(image.convert("RGBA")), width, height)
    return Picture(rgb=np.ascontiguousarray(rgba[..., :3]), alpha=np.ascontiguousarray(rgba[..., 3]))


def load_mask(path: str | Path, *, width: int, height: int, flag: str) -> np.ndarray:
    """An image file as brightness, (H, W) uint8, resized and cropped as `fit` does.

    Raises:
        UserError: as `open_image`.
    """
    image = open_image(path, flag=flag)
    if image.has_transparency_data:  # A palette's transparency cannot be dropped on the way to L without a warning.
        image = image.convert("RGBA")
    return fit(np.asarray(image.convert("L")), width, height)


@contextmanager
def _opened(path: str | Path, flag: str) -> Iterator[Image.Image]:
    """Pillow's lazily read image; what goes wrong while it is open is the user's file."""
    path = existing_file(path, flag=flag, expected="an image")
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow's readers raise whatever their parsers stumble over.
        empty = path.stat().st_size == 0
        remedy = "the file is empty" if empty else f"it is damaged or of another kind ({_reason(error, path)})"
        raise UserError(flag, path, "an image", remedy) from error


def _reason(error: Exception, path: Path) -> str:
    """What a library said, without repeating the file's name."""
    return str(error).replace(repr(str(path)), "the file").replace(str(path), "the file")


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) before the EXIF orientation; of TIFFs Pillow's `size` is after it, in recent versions."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return image.size


def _orientation(image: Image.Image, path: Path) -> int:
    """The EXIF orientation, 1…8. Source: EXIF 2.3, tag 0x0112."""
    if image.format == "PNG" and not _png_text_after_pixels(path):
        # Pillow's PNG class decodes the pixels first, as a PNG may keep its EXIF behind them.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _png_text_after_pixels(path: Path) -> bool:
    """Whether a PNG has chunks that may hold EXIF or XMP behind its pixels. Source: PNG specification, section 5."""
    pixels_seen = False
    with path.open("rb") as stream:
        stream.seek(8)
        while len(start := stream.read(8)) == 8:
            length, name = struct.unpack(">I4s", start)
            if pixels_seen and name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            pixels_seen |= name == b"IDAT"
            stream.seek(length + 4, 1)
    return False


def eight_bit(image: Image.Image) -> Image.Image:
    """`image`, or its high bytes when it is 16-bit grey (Pillow's own conversion would clip everything above 255).

    Raises:
        ValueError: values that are neither 8 nor 16 bits.
    """
    if image.mode == "F":
        raise ValueError("it has floating-point pixels")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"it has values from {values.min()} to {values.max()}")
    return Image.fromarray((values >> 8).astype(np.uint8))


# ---- sizes ----


def fit(array: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scales (H, W) or (H, W, C) uint8 until it covers width x height, and cuts out the centre.

    Enlarging is LANCZOS, all else the mean over the exact area of each target pixel (OpenCV's INTER_AREA). Each channel
    is resized on its own, so colour under transparency is not mixed with alpha.
    """
    old_height, old_width = array.shape[:2]
    if (old_width, old_height) == (width, height):
        return array
    scale = max(width / old_width, height / old_height)
    new_width, new_height = int(old_width * scale + 0.5), int(old_height * scale + 0.5)
    resized = _lanczos(array, new_width, new_height) if scale > 1 else _area(array, new_width, new_height)
    left, top = (new_width - width) // 2, (new_height - height) // 2
    return np.ascontiguousarray(resized[top : top + height, left : left + width])


def squeeze(array: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scales (H, W) or (H, W, C) uint8 to exactly this size, whatever its aspect ratio, by the methods of `fit`."""
    if array.shape[:2] == (height, width):
        return array
    enlarges = height > array.shape[0] or width > array.shape[1]
    return np.ascontiguousarray((_lanczos if enlarges else _area)(array, width, height))


def _lanczos(array: np.ndarray, width: int, height: int) -> np.ndarray:
    if array.ndim == 3:
        channels = [_lanczos(array[..., c], width, height) for c in range(array.shape[2])]
        return np.stack(channels, axis=-1)
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.LANCZOS))


def _area(array: np.ndarray, width: int, height: int) -> np.ndarray:
    rows = _area_first_axis(array, height)
    columns = _area_first_axis(rows.swapaxes(0, 1), width).swapaxes(0, 1)
    return np.rint(columns).astype(np.uint8)


def _area_first_axis(array: np.ndarray, size: int) -> np.ndarray:
    """(N, …) -> (size, …) float32: the mean over each target's stretch of the source, cut pixels by their share."""
    old_size = array.shape[0]
    if size == old_size:
        return array.astype(np.float32)
    edges = np.arange(size + 1) * old_size / size
    first = np.floor(edges[:-1]).astype(int)
    mean = np.zeros((size, *array.shape[1:]), np.float32)
    for tap in range(math.ceil(old_size / size) + 1):
        source = first + tap
        overlap = np.minimum(edges[1:], source + 1) - np.maximum(edges[:-1], source)
        weight = (np.maximum(overlap, 0) * size / old_size).astype(np.float32)
        mean += weight.reshape(-1, *[1] * (array.ndim - 1)) * array[np.minimum(source, old_size - 1)]
    return mean


def mask_to_latent(mask: np.ndarray, latent_width: int, latent_height: int) -> np.ndarray:
    """(H, W) uint8 -> (h, w) float32 in [0, 1], by LANCZOS."""
    image = Image.fromarray(mask).resize((latent_width, latent_height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / 255


def to_model_range(rgb: np.ndarray) -> np.ndarray:
    """uint8 0…255 -> float32 in [-1, 1], the range of the VAEs."""
    return rgb.astype(np.float32) / 127.5 - 1


# ---- videos ----


def write_video(path: str | Path, frames: Iterable[np.ndarray], *, fps: float, comment: str | None = None) -> None:
    """Writes (H, W, 3) uint8 frames as H.264 in MP4, whatever the suffix of `path`; equal frames give equal bytes.

    `comment` goes into the file's metadata under that name.

    Colours are BT.709 and tagged so: players guess the matrix of an untagged file from its size.

    Raises:
        ValueError: no frames, frames of unequal or odd sizes.
    """
    import av

    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("a video needs at least one frame")
    height, width = first.shape[:2]
    if width % 2 or height % 2:
        raise ValueError(f"H.264 in yuv420p needs even sizes, the frames are {width}x{height}")
    # "file:" keeps a colon in the name from being taken for a protocol; faststart lets a browser play while it loads.
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(f"file:{path}", "w", format="mp4", options=options) as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream = _h264_stream(container, width, height, fps)
        for index, frame in enumerate(chain([first], frames)):
            if frame.shape != (height, width, 3):
                raise ValueError(f"a frame of shape {frame.shape} in a video of {(height, width, 3)}")
            picture = _to_yuv(frame)
            picture.pts, picture.time_base = index, 1 / stream.average_rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _h264_stream(container, width: int, height: int, fps: float):
    from av.codec.context import Flags
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    rate = Fraction(fps).limit_denominator(1001)
    stream = container.add_stream("libx264", rate=rate, options={"crf": str(CRF), "x264-params": "force-cfr=1"})
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.thread_count = ENCODER_THREADS
    context.flags |= Flags.bitexact
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    return stream


def _to_yuv(frame: np.ndarray):
    """(H, W, 3) uint8 -> PyAV frame, yuv420p, BT.709 in video range."""
    from av import VideoFrame
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    rounding = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    return VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, interpolation=rounding
    )


def read_video(path: str | Path, *, flag: str) -> Iterator[np.ndarray]:
    """Yields the frames of the first video stream, (H, W, 3) uint8 RGB. A rotation kept beside the frames is ignored.

    Raises:
        UserError: with the first frame: nothing there, not a video; later: a damaged place.
    """
    import av

    path = existing_file(path, flag=flag, expected="a video")
    count = expected = 0
    try:
        # Through a stream of ours: FFmpeg would read protocols and patterns into some names.
        with path.open("rb") as file, av.open(file) as container:
            if not container.streams.video:
                raise UserError(flag, path, "a video", "it has no picture, only sound or text")
            expected = container.streams.video[0].frames
            for frame in container.decode(video=0):
                count += 1
                yield frame.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        remedy = f"it is damaged or of another kind ({_reason(error, path)})"
        raise UserError(flag, path, "a video", remedy) from error
    if count == 0:
        raise UserError(flag, path, "a video", "no frame of it can be decoded")
    if count < expected:
        logger.warning("%s %s: %d of the %d frames that its header names could be decoded", flag, path, count, expected)
