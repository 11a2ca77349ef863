"""Crops, rates and frames of videos: the facts' formulas, and clips made here whose frames tell their number."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from common.media import fit, read_video, write_video
from dataset.crops import Crop, cut, plan_crops, trim
from dataset.frames import examine_video, read_frames
from dataset.rates import resample_indices
from options.errors import UserError
from options.geometry import whole_latents

STEP = 12
"""Grey levels between two frames of `numbered`; coding moves them by less than half of it."""


def numbered(count, height=32, width=48):
    """Frames whose brightness is their number."""
    return [np.full((height, width, 3), 8 + STEP * i, np.uint8) for i in range(count)]


def numbers(frames):
    return [round((float(frame.mean()) - 8) / STEP) for frame in frames]


def pairs(plan):
    return [(crop.start, crop.length) for crop in plan.crops]


@pytest.fixture
def clip(tmp_path):
    """Twenty frames at 30 a second."""
    path = tmp_path / "動画 [x].mp4"
    write_video(path, numbered(20), fps=30)
    return path


def write_timed(path: Path, ticks: list[int], *, coding: dict[str, str] | None = None) -> None:
    """A video whose frame i begins at ticks[i] milliseconds."""
    tick = Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "10", **(coding or {"bf": "0"})})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.time_base = stream.codec_context.time_base = tick
        for pts, rgb in zip(ticks, numbered(len(ticks)), strict=True):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = pts, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# ---- crops ----


def test_lengths_are_cut_to_whole_latents():
    assert [whole_latents(n) for n in (0, 1, 2, 4, 5, 6, 81, 84, 85)] == [0, 1, 1, 1, 5, 5, 81, 81, 85]


def test_head_is_the_first_frames_of_each_length():
    assert pairs(plan_crops(30, mode="head", target_frames=[21, 1, 22])) == [(0, 1), (0, 21)]


@pytest.mark.parametrize("num_frames", [1, 4, 5, 9, 10, 44, 45, 46])
def test_chunks_lie_side_by_side_as_long_as_they_fit(num_frames):
    plan = plan_crops(num_frames, mode="chunk", target_frames=[5, 9])
    expected = [(k * t, t) for t in (5, 9) for k in range(num_frames) if k * t + t <= num_frames]
    assert pairs(plan) == expected


@pytest.mark.parametrize(("num_frames", "stride"), [(20, 1), (20, 3), (20, 100), (9, 2), (8, 2)])
def test_slide_starts_at_every_stride_that_fits(num_frames, stride):
    plan = plan_crops(num_frames, mode="slide", target_frames=[9], stride=stride)
    assert pairs(plan) == [(i, 9) for i in range(0, num_frames, stride) if i <= num_frames - 9]


@pytest.mark.parametrize(("num_frames", "sample"), [(100, 4), (100, 7), (50, 2), (23, 3)])
def test_uniform_starts_are_a_truncated_even_row(num_frames, sample):
    plan = plan_crops(num_frames, mode="uniform", target_frames=[21], sample=sample)
    expected = [int((num_frames - 21) * i / (sample - 1)) for i in range(sample)]
    assert pairs(plan) == [(start, 21) for start in expected] and plan.notes == ()


def test_uniform_with_one_sample_is_the_head():
    assert pairs(plan_crops(100, mode="uniform", target_frames=[21], sample=1)) == [(0, 21)]


def test_uniform_crops_that_would_be_equal_are_made_once_and_reported():
    plan = plan_crops(11, mode="uniform", target_frames=[9], sample=6)
    assert pairs(plan) == [(0, 9), (1, 9), (2, 9)]
    assert plan.notes == ("3 instead of 6 crops of 9 frames: 3 would be equal",)


@pytest.mark.parametrize(
    ("num_frames", "max_frames", "length"), [(100, 129, 97), (200, 129, 129), (200, 128, 125), (3, 129, 1)]
)
def test_full_is_one_crop_whatever_the_lengths(num_frames, max_frames, length):
    plan = plan_crops(num_frames, mode="full", target_frames=[9], max_frames=max_frames)
    assert pairs(plan) == [(0, length)]
    assert plan.notes == (f"{num_frames - length} of {num_frames} frames at the end are not used",)


@pytest.mark.parametrize("mode", ["head", "chunk", "slide", "uniform"])
def test_length_that_the_video_does_not_have_is_reported(mode):
    plan = plan_crops(20, mode=mode, target_frames=[9, 21], sample=2)
    assert all(crop.length == 9 for crop in plan.crops) and plan.crops
    assert "no crop of 21 frames: there are only 20" in plan.notes


def test_rest_of_chunks_is_reported():
    assert plan_crops(20, mode="chunk", target_frames=[9]).notes == (
        "2 of 20 frames at the end are not used by chunks of 9",
    )


def test_no_frames_give_no_crops_and_a_reason():
    for mode in ("head", "full"):
        plan = plan_crops(0, mode=mode)
        assert plan.crops == () and plan.notes


@pytest.mark.parametrize("wrong", [{"mode": "tail"}, {"stride": 0}, {"sample": 0}, {"target_frames": [0]}])
def test_impossible_extraction_is_an_error(wrong):
    with pytest.raises(ValueError, match="tail|below 1"):
        plan_crops(20, **{"mode": "slide", "target_frames": [9], **wrong})


@pytest.mark.parametrize("window", [1, 4, 9])
def test_trimming_leaves_the_first_latent_and_whole_sections(window):
    for count in range(1, 200):
        trimmed, sections = trim(count, window), ((count - 1) // 4 + 1 - 1) // window
        assert trimmed.num_sections == sections
        assert trimmed.length == (4 * sections * window + 1 if sections else 0)
        assert (trimmed.note is None) == (trimmed.length == count)


def test_crop_shorter_than_a_section_says_how_many_frames_it_needs():
    assert trim(36, 9).num_sections == 0 and "needs 37" in trim(36, 9).note
    assert trim(37, 9).num_sections == 1


def test_cut_gives_every_crop_its_frames():
    frames = numbered(15)
    crops = plan_crops(15, mode="slide", target_frames=[1, 5], stride=3).crops
    found = dict(cut(iter(frames), crops))
    assert set(found) == set(crops)
    for crop, pixels in found.items():
        assert np.array_equal(pixels, np.stack(frames[crop.start : crop.start + crop.length]))


def test_cut_holds_no_more_frames_than_a_crop_and_reads_no_further_than_the_last():
    import weakref

    class Frame(np.ndarray):
        pass

    alive: list[weakref.ref] = []
    most = 0

    def stream():
        nonlocal most
        for i in range(100):
            frame = np.full((2, 2, 3), i, np.uint8).view(Frame)
            alive.append(weakref.ref(frame))
            most = max(most, sum(ref() is not None for ref in alive))
            yield frame
            del frame

    crops = [Crop(start=start, length=5) for start in range(0, 50, 5)]
    assert [int(pixels[0, 0, 0, 0]) for _, pixels in cut(stream(), crops)] == list(range(0, 50, 5))
    assert len(alive) == 50 and most <= 6


def test_cut_leaves_out_crops_that_the_video_is_too_short_for():
    crops = [Crop(start=0, length=5), Crop(start=5, length=5)]
    assert [crop for crop, _ in cut(iter(numbered(9)), crops)] == crops[:1]


# ---- rates ----


def incumbent_indices(count, source, target):
    """The facts' accumulator, 5.1."""
    position, previous, kept = 0.0, -1, []
    for i in range(count):
        index = int(position)
        position += target / source
        if index != previous:
            kept.append(i)
        previous = index
    return tuple(kept)


@pytest.mark.parametrize("target", [16, 24, 30])
@pytest.mark.parametrize("source", [30.0, 60.0, 59.94, 29.97, 50.0, 25.0, 24.0, 31.0, 120.0, 47.3])
def test_faster_source_keeps_the_frames_that_the_incumbent_keeps(source, target):
    if source >= target:
        assert resample_indices(500, source, target) == incumbent_indices(500, source, target)


def test_dropping_follows_known_numbers():
    assert resample_indices(10, 60, 30) == (0, 2, 4, 6, 8)
    assert resample_indices(9, 40, 30) == (0, 2, 3, 4, 6, 7, 8)
    # The incumbent's sum of 2/3 falls just short of 4 at frame 6.
    assert resample_indices(9, 30, 20) == (0, 2, 3, 5, 7, 8)


@pytest.mark.parametrize(("source", "target"), [(15, 30), (10, 16), (24, 30), (25, 30), (12.5, 16), (1, 30)])
def test_slower_source_repeats_what_is_on_screen_at_each_moment(source, target):
    indices = resample_indices(50, source, target)
    assert len(indices) == pytest.approx(50 * target / source, abs=1)
    assert indices == tuple(int(Fraction(k) * Fraction(source) / target) for k in range(len(indices)))
    assert set(indices) == set(range(50))


def test_ntsc_rates_are_not_made_to_stutter():
    assert resample_indices(3000, 30000 / 1001, 30) == tuple(range(3000))


@pytest.mark.parametrize("rates", [(0, 30), (30, 0), (-1, 30)])
def test_rate_that_is_not_positive_is_an_error(rates):
    with pytest.raises(ValueError, match="positive"):
        resample_indices(5, *rates)


# ---- reading ----


def test_frames_are_those_of_the_file_resized_while_decoding(clip):
    frames = list(read_frames(clip, size=(32, 32)))
    expected = [fit(frame, 32, 32) for frame in read_video(clip, flag="x")]
    assert len(frames) == 20 and all(np.array_equal(a, b) for a, b in zip(frames, expected, strict=True))
    assert frames[0].dtype == np.uint8 and frames[0].shape == (32, 32, 3)


def test_size_may_be_made_from_the_first_frame(clip):
    seen = []
    frames = list(read_frames(clip, size=lambda size: seen.append(size) or (64, 16), limit=2))
    assert seen == [(48, 32)] and frames[0].shape == (16, 64, 3)


def test_rate_is_read_from_the_file(clip):
    assert examine_video(clip).timing.fps == 30
    assert numbers(read_frames(clip, size=(48, 32), target_fps=15)) == list(range(0, 20, 2))
    assert numbers(read_frames(clip, size=(48, 32), target_fps=60)) == [i for i in range(20) for _ in range(2)]
    assert numbers(read_frames(clip, size=(48, 32))) == list(range(20))


def test_given_rate_wins_over_the_files(clip):
    assert numbers(read_frames(clip, size=(48, 32), source_fps=60, target_fps=30)) == list(range(0, 20, 2))


def test_limit_counts_frames_after_the_change_of_rate(clip):
    assert numbers(read_frames(clip, size=(48, 32), source_fps=60, target_fps=30, limit=4)) == [0, 2, 4, 6]


def test_limit_stops_decoding(clip, monkeypatch):
    decoded = []
    real = fit
    monkeypatch.setattr("dataset.frames.fit", lambda *args: decoded.append(1) or real(*args))
    stream = read_frames(clip, size=(16, 16), limit=3)
    assert decoded == [] and len(list(stream)) == 3 and len(decoded) == 3


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_rate_takes_the_frame_nearest_to_each_moment(tmp_path, suffix):
    begins = [0, 100, 110, 120, 400, 433, 700]  # milliseconds
    path = tmp_path / f"vfr{suffix}"
    write_timed(path, begins)
    info = examine_video(path)
    assert info.timing.fps is None and len(info.timing.begins) == 7
    found = numbers(read_frames(path, size=(48, 32), target_fps=10))
    moments = [100 * k for k in range(8)]
    expected = [min(range(7), key=lambda i: (abs(begins[i] - moment), -i)) for moment in moments]
    assert found[:8] == expected == [0, 1, 3, 4, 4, 5, 6, 6]
    assert info.timing.length(target_fps=10) == len(found)


def test_times_rounded_to_milliseconds_are_an_even_rate(tmp_path):
    write_timed(tmp_path / "a.mkv", [round(i * 1000 / 24) for i in range(20)])
    timing = examine_video(tmp_path / "a.mkv").timing
    assert timing.begins is None and float(timing.fps) == pytest.approx(24, rel=1e-3)


def test_packets_in_another_order_than_their_frames_are_an_even_rate(tmp_path):
    path = tmp_path / "b.mkv"
    write_timed(path, [i * 40 for i in range(20)], coding={"bf": "2", "b_strategy": "0", "sc_threshold": "0"})
    with av.open(str(path)) as container:
        order = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert order != sorted(order)
    assert examine_video(path).timing.fps == 25
    assert numbers(read_frames(path, size=(48, 32), target_fps=12.5)) == list(range(0, 20, 2))


@pytest.mark.parametrize("rates", [{}, {"target_fps": 16}, {"target_fps": 45}, {"target_fps": 16, "source_fps": 20}])
def test_length_is_known_before_decoding(clip, tmp_path, rates):
    write_timed(tmp_path / "vfr.mkv", [0, 30, 90, 100, 300, 320])
    for path in (clip, tmp_path / "vfr.mkv"):
        info = examine_video(path)
        assert info.size == (48, 32)
        assert info.timing.length(**rates) == len(list(read_frames(path, size=(16, 16), **rates)))


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        # ISO 14496-12: x' = a·x + c·y + tx, y' = b·x + d·y + ty; (a, b, c, d, tx, ty) for a stored 48x32.
        ((0, 1, -1, 0, 32, 0), lambda p: p[::-1].swapaxes(0, 1)),  # top left goes to the top right
        ((-1, 0, 0, -1, 48, 32), lambda p: p[::-1, ::-1]),
        ((0, -1, 1, 0, 0, 48), lambda p: p.swapaxes(0, 1)[::-1]),  # top left goes to the bottom left
    ],
    ids=["clockwise", "half", "anticlockwise"],
)
def test_rotation_that_phones_store_is_applied(tmp_path, matrix, turned):
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16, :24] = 250
    picture[16:, :24] = 120
    path = tmp_path / "phone.mp4"
    write_video(path, [picture] * 3, fps=30)
    content = bytearray(path.read_bytes())
    a, b, c, d, x, y = (value * 65536 for value in matrix)
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, x, y, 1 << 30)
    path.write_bytes(content)
    expected = turned(picture)
    height, width = expected.shape[:2]
    assert examine_video(path).size == (width, height)
    frame = next(read_frames(path, size=lambda size: size))
    assert frame.shape == expected.shape and np.abs(frame.astype(int) - expected).mean() < 6


def test_folder_of_images_is_read_in_order_of_names(tmp_path):
    folder = tmp_path / "frames [x]"
    folder.mkdir()
    for i, frame in enumerate(numbered(6)):
        Image.fromarray(frame).save(folder / f"{i:02d}.{'PNG' if i % 2 else 'png'}")
    (folder / "Thumbs.db").write_bytes(b"no image")
    assert numbers(read_frames(folder, size=(48, 32))) == list(range(6))
    assert numbers(read_frames(folder, size=(48, 32), target_fps=30)) == list(range(6))
    assert numbers(read_frames(folder, size=(48, 32), target_fps=30, source_fps=60)) == [0, 2, 4]
    assert numbers(read_frames(folder, size=(48, 32), target_fps=30, source_fps=15, limit=3)) == [0, 0, 1]
    info = examine_video(folder)
    assert info.size == (48, 32) and info.timing.length(target_fps=30) == 6
    assert info.timing.length(target_fps=30, source_fps=60) == 3


def test_bad_video_is_one_line_of_error(tmp_path, clip):
    (tmp_path / "half.mp4").write_bytes(clip.read_bytes()[:300])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for name in ("half.mp4", "empty.mp4", "text.mp4", "none.mp4", "folder"):
        for read in (lambda p: next(read_frames(p, size=(16, 16), target_fps=16, flag="set 1")), examine_one):
            with pytest.raises(UserError, match="^set 1: got .*; expected a ") as error:
                read(tmp_path / name)
            assert "\n" not in str(error.value)


def examine_one(path):
    return examine_video(path, flag="set 1")


def test_damaged_image_in_a_folder_is_named(tmp_path):
    (tmp_path / "0.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"0\.png"):
        next(read_frames(tmp_path, size=(16, 16)))


def test_damage_inside_a_video_is_never_passed_on_in_silence(tmp_path, material, caplog):
    photo = np.asarray(Image.open(material.coffee).convert("RGB"))
    frames = [fit(photo[:, i * 4 : i * 4 + 400], 128, 96) for i in range(12)]
    path = tmp_path / "a.mp4"
    write_video(path, frames, fps=30)
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 2
    content[middle : middle + 600] = bytes(600)
    path.write_bytes(content)
    try:
        count = len(list(read_frames(path, size=(128, 96))))
    except UserError as error:
        assert "a.mp4" in str(error)
    else:
        assert count < 12 and f"{count} of the 12 frames" in caplog.text
