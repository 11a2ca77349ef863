"""Videos as a data set sees them: which frames make which crops, and the frames themselves at rate and size.

Frames come as an iterator, because a minute of 960x544 is already 3 GB: `cut` holds only what its crops still need.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from common.files import existing_file
from common.media import fit, image_size, open_image
from options.errors import UserError
from options.geometry import FRAMES_PER_LATENT

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

T = TypeVar("T")

logger = logging.getLogger(__name__)

FLAG = "video"
"""What messages call the file when the caller has no better name for it."""
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"})
"""The frames in a folder; anything else in it (`Thumbs.db`) is no frame."""
SAME_RATE = Fraction(2, 1000)
"""29.97 and 30 differ by half of this: one frame repeated in 1000 would be a stutter for a speed that nobody sees."""

Mode = Literal["head", "chunk", "slide", "uniform", "full"]
Size = tuple[int, int]
SizeRule = Size | Callable[[Size], Size]
"""A size (width, height), or what makes one from the size of the first frame."""


# ---- crops ----


@dataclass(frozen=True, kw_only=True, order=True)
class Crop:
    """A stretch of consecutive frames."""

    start: int
    """The first frame, counted after the change of rate."""
    length: int
    """How many frames; 4n + 1."""

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, kw_only=True)
class CropPlan:
    """What is taken from a video, and what is not."""

    crops: tuple[Crop, ...]
    notes: tuple[str, ...]
    """One line for everything that was left out, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Trim:
    """A crop cut to whole FramePack sections."""

    num_sections: int
    """0 when the crop is too short for one."""
    length: int
    """Pixel frames that are used: 4 · sections · window + 1, or 0."""
    note: str | None
    """What was cut off, or why nothing is left; None when the crop fits exactly."""


def whole_latents(num_frames: int) -> int:
    """The largest 4n + 1 that is at most `num_frames`; 0 for no frames."""
    return (num_frames - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1 if num_frames > 0 else 0


def plan_crops(
    num_frames: int,
    *,
    mode: Mode,
    target_frames: Sequence[int] = (1,),
    stride: int = 1,
    sample: int = 1,
    max_frames: int = 129,
) -> CropPlan:
    """The crops of a video of `num_frames` frames, for each length in ascending order; no frame is looked at.

    Args:
        target_frames: lengths, each cut to 4n + 1; `full` ignores them.
        stride: `slide` only, frames from one start to the next.
        sample: `uniform` only, starts per length; 1 is the head.
        max_frames: `full` only, the greatest length.

    Raises:
        ValueError: an unknown mode, or a count below 1.
    """
    if min(stride, sample, max_frames, *target_frames) < 1:
        raise ValueError(f"counts below 1: {target_frames=} {stride=} {sample=} {max_frames=}")
    if num_frames < 1:
        return CropPlan(crops=(), notes=("it has no frames",))
    if mode == "full":
        length = whole_latents(min(num_frames, max_frames))
        return CropPlan(crops=(Crop(start=0, length=length),), notes=tuple(_unused(num_frames, length)))
    found: list[Crop] = []
    notes: list[str] = []
    for length in sorted({whole_latents(frames) for frames in target_frames}):
        if length > num_frames:
            notes.append(f"no crop of {length} frames: there are only {num_frames}")
            continue
        starts = _starts(num_frames - length, length, mode, stride, sample)
        found += [Crop(start=start, length=length) for start in dict.fromkeys(starts)]
        notes += _left_out(starts, num_frames, length, mode)
    return CropPlan(crops=tuple(found), notes=tuple(notes))


def _starts(last: int, length: int, mode: str, stride: int, sample: int) -> list[int]:
    """The first frames of all crops of one length, 0…`last`, with duplicates."""
    match mode:
        case "head":
            return [0]
        case "chunk":
            return list(range(0, last + 1, length))
        case "slide":
            return list(range(0, last + 1, stride))
        case "uniform":
            return np.linspace(0, last, sample, dtype=int).tolist()
    raise ValueError(f"no frame extraction is called {mode!r}")


def _left_out(starts: list[int], num_frames: int, length: int, mode: str) -> Iterator[str]:
    if duplicates := len(starts) - len(set(starts)):
        yield f"{len(set(starts))} instead of {len(starts)} crops of {length} frames: {duplicates} would be equal"
    if mode == "chunk":
        yield from _unused(num_frames, starts[-1] + length, f" by chunks of {length}")


def _unused(num_frames: int, used: int, why: str = "") -> Iterator[str]:
    if used < num_frames:
        yield f"{num_frames - used} of {num_frames} frames at the end are not used{why}"


def trim(count: int, window: int) -> Trim:
    """Cuts a crop of `count` frames to whole sections of `window` latent frames behind the first latent frame."""
    num_sections = ((count - 1) // FRAMES_PER_LATENT) // window
    section = FRAMES_PER_LATENT * window
    if num_sections < 1:
        note = f"{count} frames are too few for a section: a window of {window} needs {section + 1}"
        return Trim(num_sections=0, length=0, note=note)
    length = num_sections * section + 1
    note = f"{count} frames cut to {length}, {num_sections} sections of {section}" if length < count else None
    return Trim(num_sections=num_sections, length=length, note=note)


def cut(frames: Iterable[np.ndarray], crops: Sequence[Crop]) -> Iterator[tuple[Crop, np.ndarray]]:
    """Yields each crop with its frames, (F, H, W, 3) uint8, as soon as its last frame has come.

    Frames that no later crop needs are let go. Crops whose end never comes are left out: the caller counts. Nothing is
    read beyond the end of the last crop.
    """
    waiting = sorted(crops, key=lambda crop: (crop.end, crop.start))
    held: dict[int, np.ndarray] = {}
    stream = enumerate(frames)
    while waiting:
        try:
            index, frame = next(stream)
        except StopIteration:
            return
        held[index] = frame
        while waiting and waiting[0].end == index + 1:
            crop = waiting.pop(0)
            yield crop, np.stack([held[i] for i in range(crop.start, crop.end)])
        needed = min((crop.start for crop in waiting), default=index + 1)
        for old in [i for i in held if i < needed]:
            del held[old]


# ---- rates ----


def resample_indices(
    num_source_frames: int, source_fps: float | Fraction, target_fps: float | Fraction
) -> tuple[int, ...]:
    """Which source frame is each frame of the target rate; faster sources lose frames, slower ones repeat them."""
    copies = islice(_copies(source_fps, target_fps), num_source_frames)
    return tuple(index for index, times in enumerate(copies) for _ in range(times))


def _copies(source_fps: float | Fraction, target_fps: float | Fraction) -> Iterator[int]:
    """How often each source frame is shown, without end.

    A faster source follows the incumbent's accumulator, its rounding errors too, so that both choose the same frames.
    A slower one shows at k / target what a player would show then: frame floor(k · source / target).

    Raises:
        ValueError: a rate that is not positive.
    """
    if source_fps <= 0 or target_fps <= 0:
        raise ValueError(f"rates must be positive, got {source_fps} and {target_fps}")
    ratio = Fraction(target_fps) / Fraction(source_fps)
    if ratio < 1:
        return _copies_dropping(float(target_fps) / float(source_fps))
    return repeat(1) if ratio - 1 <= SAME_RATE else _copies_repeating(ratio)


def _copies_dropping(step: float) -> Iterator[int]:
    position, accepted = 0.0, -1
    while True:
        slot = int(position)
        position += step
        yield int(slot != accepted)
        accepted = slot


def _copies_repeating(ratio: Fraction) -> Iterator[int]:
    shown = 0
    for index in count(1):
        next_shown = math.ceil(index * ratio)
        yield next_shown - shown
        shown = next_shown


def _nearest(timed: Iterable[tuple[float, T]], tail: float, target_fps: float) -> Iterator[T]:
    """Frames of any timing at an even rate: at each k / target the frame that begins nearest to it.

    Args:
        timed: (begin in seconds, frame).
        tail: seconds that the last frame is shown.
    """
    origin: float | None = None
    previous: tuple[float, T] | None = None
    slot = 0
    for begin, frame in timed:
        origin = begin if origin is None else origin
        if previous is not None:
            middle = (previous[0] + begin) / 2 - origin
            while slot / target_fps < middle:
                yield previous[1]
                slot += 1
        previous = (begin, frame)
    if previous is None:
        return
    end = previous[0] + tail - origin - 1e-6  # a slot that begins where the video ends is none
    while slot == 0 or slot / target_fps < end:
        yield previous[1]
        slot += 1


# ---- files ----


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

    def length(self, *, target_fps: float | None = None, source_fps: float | None = None) -> int:
        """How many frames `read_frames` gives for the same rates."""
        source = source_fps or self.fps
        if target_fps is None or (source is None and self.begins is None):
            return self.num_frames
        if source is not None:
            return len(resample_indices(self.num_frames, source, target_fps))
        return sum(1 for _ in _nearest(((begin, None) for begin in self.begins or ()), self.tail, target_fps))


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """A video or a folder of images, known without decoding more than one frame."""

    size: Size
    """(width, height) of the first frame, upright."""
    timing: Timing


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
        timing = _timing(container)
    with _opened(path, flag) as container:
        height, width = _upright(next(_decoded(container, path, flag))).shape[:2]
    return VideoInfo(size=(width, height), timing=timing)


def read_frames(
    path: str | Path,
    *,
    size: SizeRule,
    limit: int | None = None,
    target_fps: float | None = None,
    source_fps: float | None = None,
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


def _folder_frames(folder: Path, target_fps: float | None, source_fps: float | None, flag: str) -> Iterator[np.ndarray]:
    images = _images(folder, flag)
    copies = repeat(1) if target_fps is None or source_fps is None else _copies(source_fps, target_fps)
    for image, times in zip(images, copies, strict=False):
        if times:
            yield from repeat(np.asarray(open_image(image, flag=flag).convert("RGB")), times)


def _images(folder: Path, flag: str) -> list[Path]:
    images = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not images:
        raise UserError(flag, folder, "a folder of images", "there is no image in it")
    return images


def _video_frames(path: Path, target_fps: float | None, source_fps: float | None, flag: str) -> Iterator[np.ndarray]:
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
    frames: Iterator[VideoFrame], timing: Timing | None, target_fps: float | None, source_fps: float | None
) -> Iterator[VideoFrame]:
    """Drops and repeats decoded frames."""
    source = source_fps or (timing.fps if timing else None)
    if target_fps is not None and source is not None:
        for frame, copies in zip(frames, _copies(source, target_fps), strict=False):
            yield from repeat(frame, copies)
    elif target_fps is not None and timing is not None and timing.begins is not None:
        yield from _nearest(((frame.time, frame) for frame in frames), timing.tail, target_fps)
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
