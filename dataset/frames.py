"""Videos as a data set sees them: their size, rate and length, and their frames at the model's rate and size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.files import existing_file
from common.media import fit, image_size, open_image
from dataset.rates import frame_copies, nearest_frames, resample_indices
from dataset.sources import IMAGE_SUFFIXES
from options.errors import UserError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

logger = logging.getLogger(__name__)

FLAG = "video"
"""What messages call the file when the caller has no better name for it."""

Size = tuple[int, int]
SizeRule = Size | Callable[[Size], Size]
"""A size (width, height), or what makes one from the size of the first frame."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """When the frames of a video are shown, read from its packets."""

    num_frames: int
    fps: Fraction | None
    """None when frames are not evenly spaced, or nothing is known of their times."""
    begins: tuple[float, ...] | None
    """Seconds at which each frame begins, when they are not evenly spaced; else None."""
    tail: float
    """Seconds that the last of them is shown."""

    def length(self, *, target_fps: float | None = None, source_fps: float | Fraction | None = None) -> int:
        """How many frames `read_frames` gives for the same rates."""
        source = source_fps or self.fps
        if target_fps is None or (source is None and self.begins is None):
            return self.num_frames
        if source is not None:
            return len(resample_indices(self.num_frames, source, target_fps))
        return sum(1 for _ in nearest_frames(((begin, None) for begin in self.begins or ()), self.tail, target_fps))


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """A video or a folder of images, known without decoding more than one frame."""

    size: Size
    """(width, height) of the first frame, upright."""
    timing: Timing
    num_announced: int = 0
    """Frames that the header names, where it does: more than there are when the file is cut off."""


def examine_video(path: str | Path, *, flag: str = FLAG) -> VideoInfo:
    """Size, rate and number of frames; of a video the packets are counted, and one frame is decoded.

    Raises:
        UserError: nothing there, no video, an empty folder.
    """
    path = Path(path)
    if path.is_dir():
        images = _images(path, flag)
        timing = Timing(num_frames=len(images), fps=None, begins=None, tail=0)
        return VideoInfo(size=image_size(images[0], flag=flag), timing=timing)
    with _opened(path, flag) as container:
        timing, num_announced = _timing(container), container.streams.video[0].frames
    with _opened(path, flag) as container:
        height, width = _upright(next(_decoded(container, path, flag))).shape[:2]
    return VideoInfo(size=(width, height), timing=timing, num_announced=num_announced)


def control_rate(control: Path, video: Path, source_fps: float | None) -> float | Fraction | None:
    """The `source_fps` that a control video is read with: that of its video, when it is a folder of frames.

    Raises:
        UserError: as `examine_video`, of the video.
    """
    if source_fps is not None or not control.is_dir() or video.is_dir():
        return source_fps
    return examine_video(video, flag=str(video)).timing.fps


def read_frames(
    path: str | Path,
    *,
    size: SizeRule,
    limit: int | None = None,
    target_fps: float | None = None,
    source_fps: float | Fraction | None = None,
    flag: str = FLAG,
) -> Iterator[np.ndarray]:
    """Yields the frames of a video, or of a folder of images in order of their names, as (H, W, 3) uint8 RGB.

    Each frame is turned upright, resized and cropped (`common.media.fit`) as it is decoded; one that the change of rate
    drops is decoded and no more.

    Args:
        size: every frame's size, or a function from the first frame's own size to it.
        limit: at most so many frames, counted after the change of rate; what comes behind them is not decoded.
        target_fps: the model's rate; None takes all frames as they are.
        source_fps: the rate to assume; None reads the file's: its rate, or the frames' times where they are not evenly
            spaced. Images have none and are all taken.

    Raises:
        UserError: nothing there, not a video, a damaged place; with the frame that cannot be had.
    """
    path = Path(path)
    read = _folder_frames if path.is_dir() else _video_frames
    target: Size | None = None
    frame = fitted = None
    with closing(read(path, target_fps, source_fps, flag)) as frames:
        for original in islice(frames, limit):
            if target is None:
                target = size((original.shape[1], original.shape[0])) if callable(size) else size
            if original is not frame:
                frame, fitted = original, fit(original, *target)
            yield fitted


def _folder_frames(
    folder: Path, target_fps: float | None, source_fps: float | Fraction | None, flag: str
) -> Iterator[np.ndarray]:
    images = _images(folder, flag)
    copies = repeat(1) if target_fps is None or source_fps is None else frame_copies(source_fps, target_fps)
    for image, times in zip(images, copies, strict=False):
        if times:
            yield from repeat(np.asarray(open_image(image, flag=flag).convert("RGB")), times)


def _images(folder: Path, flag: str) -> list[Path]:
    images = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not images:
        raise UserError(flag, folder, "a folder of images", "there is no image in it")
    return images


def _video_frames(
    path: Path, target_fps: float | None, source_fps: float | Fraction | None, flag: str
) -> Iterator[np.ndarray]:
    timing = None
    if target_fps is not None and source_fps is None:
        with _opened(path, flag) as container:
            timing = _timing(container)
    with _opened(path, flag) as container:
        frame = rgb = None
        for chosen in _at_rate(_decoded(container, path, flag), timing, target_fps, source_fps):
            if chosen is not frame:
                frame, rgb = chosen, _upright(chosen)
            yield rgb


def _at_rate(
    frames: Iterator[VideoFrame], timing: Timing | None, target_fps: float | None, source_fps: float | Fraction | None
) -> Iterator[VideoFrame]:
    """Drops and repeats decoded frames."""
    source = source_fps or (timing.fps if timing else None)
    if target_fps is not None and source is not None:
        for frame, copies in zip(frames, frame_copies(source, target_fps), strict=False):
            yield from repeat(frame, copies)
    elif target_fps is not None and timing is not None and timing.begins is not None:
        yield from nearest_frames(((frame.time, frame) for frame in frames), timing.tail, target_fps)
    else:
        yield from frames


@contextmanager
def _opened(path: Path, flag: str) -> Iterator[InputContainer]:
    """A container with a picture in it; what goes wrong while it is open is the user's file."""
    import av

    path = existing_file(path, flag=flag, expected="a video")
    try:
        # Through a stream of ours: FFmpeg would read protocols and patterns into some names.
        with path.open("rb") as file, av.open(file) as container:
            if not container.streams.video:
                raise UserError(flag, path, "a video", "it has no picture, only sound or text")
            yield container
    except (av.error.FFmpegError, OSError, ValueError, TypeError) as error:
        reason = "the file is empty" if path.stat().st_size == 0 else f"it is damaged or of another kind ({error})"
        raise UserError(flag, path, "a video", reason) from error


def _decoded(container: InputContainer, path: Path, flag: str) -> Iterator[VideoFrame]:
    """The frames of the first video stream, at least one.

    Raises:
        UserError: there is none, or one that the decoder could not repair.
    """
    num_frames = 0
    for frame in container.decode(video=0):
        if frame.is_corrupt:
            raise UserError(
                flag, path, "a video", f"frame {num_frames} is damaged: repair the file or cut it before there"
            )
        num_frames += 1
        yield frame
    if num_frames == 0:
        raise UserError(flag, path, "a video", "no frame of it can be decoded")
    if num_frames < (expected := container.streams.video[0].frames):
        logger.warning(
            "%s %s: %d of the %d frames that its header names could be decoded", flag, path, num_frames, expected
        )


def _upright(frame: VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned as the display matrix says: phones store the sensor's rows and a rotation."""
    rgb = frame.to_ndarray(format="rgb24")
    quarters = round(frame.rotation / 90) % 4  # anticlockwise
    return np.ascontiguousarray(np.rot90(rgb, quarters)) if quarters else rgb


def _timing(container: InputContainer) -> Timing:
    """Reads all packets of the first video stream, without decoding."""
    stream = container.streams.video[0]
    packets = [(p.pts, p.duration or 0) for p in container.demux(stream) if p.size and not p.is_discard]
    nominal = stream.average_rate or stream.guessed_rate
    fps = Fraction(nominal) if nominal else None
    if len(packets) < 2 or any(pts is None for pts, _ in packets):
        return Timing(num_frames=len(packets), fps=fps, begins=None, tail=0)
    packets.sort()
    ticks = [pts for pts, _ in packets]
    gap = Fraction(ticks[-1] - ticks[0], len(ticks) - 1)
    if _is_even(ticks, gap):
        measured = 1 / (gap * stream.time_base)
        # The header's rate is exact where times are rounded to milliseconds, and wrong in some files.
        agrees = fps is not None and abs(fps / measured - 1) < Fraction(5, 1000)
        return Timing(num_frames=len(ticks), fps=fps if agrees else measured, begins=None, tail=0)
    begins = tuple(float(pts * stream.time_base) for pts in ticks)
    tail = float((packets[-1][1] or gap) * stream.time_base)
    return Timing(num_frames=len(ticks), fps=None, begins=begins, tail=tail)


def _is_even(ticks: Sequence[int], gap: Fraction) -> bool:
    """True when no frame is further from its place in an even row than a tick (rounding) and a tenth of a frame."""
    allowed = 1 + gap / 10
    return gap > 0 and all(abs(tick - ticks[0] - i * gap) <= allowed for i, tick in enumerate(ticks))
