"""The loop of the caching scripts: what is skipped, made anew, removed, reported; models play no part."""

import logging
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load, save

from common.media import load_picture
from dataset.cache_files import cache_header, read_cache
from dataset.config import load_dataset_config
from dataset.fingerprints import _content_hash
from dataset.loading import load_samples
from dataset.planning import plan_latents
from frame_pack.caching import FramePackCacheRules
from options.errors import UserError
from tests.cache_builders import (
    ENCODERS,
    NAMES,
    PlainEncoder,
    files,
    image_keys,
    image_set,
    run_loop,
    video_set,
    write_clip,
    write_config,
    write_picture,
)


@pytest.fixture(autouse=True)
def report(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def errors(report: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in report.records if record.levelno >= logging.ERROR]


def again(config: Path, mode: str = "one_frame", **options) -> list[str]:
    """What --skip_existing encodes, in a process that has hashed nothing yet."""
    _content_hash.cache_clear()
    code, encoder = run_loop(config, mode, skip_existing=True, **options)
    assert code == 0
    return sorted(encoder.encoded)


def replace_bytes(path: Path, content: bytes) -> None:
    """Other content, the same size and time."""
    before = path.stat()
    assert len(content) == before.st_size and content != path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# ---- what is written ----


def test_an_image_goes_with_its_controls_into_one_file(tmp_path) -> None:
    config = image_set(tmp_path, ["猫"])
    assert run_loop(config)[0] == 0
    assert list(files(tmp_path / "cache")) == ["猫_0040x0032_fp.safetensors"]
    path = tmp_path / "cache" / "猫_0040x0032_fp.safetensors"
    target, control = (
        load_picture(tmp_path / kind / "猫.png", width=32, height=32, flag="").rgb for kind in ("images", "controls")
    )
    stored, header = read_cache(path), cache_header(path)
    for latents, rgb in ((stored["latents"], target), (stored["latents_clean"], control)):
        expected = rgb.reshape(4, 8, 4, 8, 3).mean((1, 3, 4)) / 255
        np.testing.assert_allclose(latents[0, 0].float(), expected, atol=1e-3)
    assert header.metadata["width"] == "40" and header.metadata["height"] == "32"
    assert header.metadata["architecture"] == "framepack" and header.metadata["format_version"] == "1.0.1"
    assert "frame_count" not in header.metadata
    assert header.fingerprint.items() >= ENCODERS.items()
    assert header.fingerprint["source"] == "猫.png" and header.fingerprint["control_0"] == "猫.png"


def test_a_clip_goes_into_a_file_for_each_section(tmp_path) -> None:
    config = video_set(tmp_path, {"v": 15}, target_frames=[13])
    assert run_loop(config, "sections")[0] == 0
    names = [f"v_00000-013-{section:04d}_0032x0032_fp.safetensors" for section in range(3)]
    assert list(files(tmp_path / "cache")) == names
    for name in names:
        metadata = cache_header(tmp_path / "cache" / name).metadata
        assert (metadata["width"], metadata["height"], metadata["frame_count"]) == ("32", "32", "13")
    means = [float(read_cache(tmp_path / "cache" / name)["latents"].mean()) for name in names]
    assert means == sorted(means) and means[0] < means[2], "the frames get brighter"


def test_a_trimmed_clip_keeps_the_length_of_its_crop_in_its_name(tmp_path, report) -> None:
    config = video_set(tmp_path, {"v": 15}, target_frames=[13])
    assert run_loop(config, "f1", window=2)[0] == 0
    assert list(files(tmp_path / "cache")) == ["v_00000-013-0000_0032x0032_fp.safetensors"]
    assert re.search(r"trimmed: .*v\.mp4: 13 frames cut to 9", report.text)


def test_names_count_rates_after_the_change(tmp_path, report) -> None:
    config = video_set(tmp_path, {"slow": 8}, fps=15, target_frames=[13])
    assert run_loop(config, "sections")[0] == 0
    assert len(files(tmp_path / "cache")) == 3
    assert re.search(r"note: .*slow\.mp4: 15 frames per second brought to 30, 8 frames become 1[56]", report.text)


@pytest.mark.parametrize(
    ("keys", "starts"),
    [
        ({"frame_extraction": "head", "target_frames": [5, 9]}, ["00000-005", "00000-009"]),
        ({"frame_extraction": "chunk"}, ["00000-005", "00005-005", "00010-005"]),
        ({"frame_extraction": "slide", "frame_stride": 6}, ["00000-005", "00006-005"]),
        ({"frame_extraction": "uniform", "frame_sample": 3}, ["00000-005", "00006-005", "00012-005"]),
        ({"frame_extraction": "full", "max_frames": 13}, ["00000-013"]),
    ],
)
def test_clips_are_cut_as_the_data_set_says(tmp_path, keys, starts) -> None:
    num_frames = 15 if keys["frame_extraction"] == "slide" else 17
    config = video_set(tmp_path, {"v": num_frames}, **keys)
    code, encoder = run_loop(config, "sections")
    assert code == 0
    found = {name.split("_")[1].rpartition("-")[0] for name in files(tmp_path / "cache")}
    if keys["frame_extraction"] == "slide":
        starts = [f"{start:05d}-005" for start in range(0, 11, 6)]
    assert sorted(found) == starts
    for batch in encoder.batches:
        for sample in batch:
            first = sample.frames[0].astype(int).mean()
            expected = encoder.batches[0][0].frames[0].astype(int).mean() + 4 * sample.unit.crop.start
            assert first == pytest.approx(expected, abs=3), "each frame is 4 brighter than the one before"


def test_short_videos_are_dropped_and_said_to_be(tmp_path, report) -> None:
    config = video_set(tmp_path, {"long": 9, "short": 4})
    assert run_loop(config, "sections")[0] == 0
    assert re.search(r"2 items, 1 used, 1 dropped, 0 failed", report.text)
    assert re.search(r"dropped: .*short\.mp4: no crop of 5 frames: there are only 4", report.text)
    assert errors(report) == []


def test_a_video_that_is_cut_off_between_two_frames_is_said_to_be(tmp_path, report) -> None:
    config = video_set(tmp_path, {"v": 20})
    path = tmp_path / "videos" / "v.mp4"
    path.write_bytes(path.read_bytes()[:-90])
    assert run_loop(config, "sections")[0] == 0
    assert re.search(r"trimmed: .*v\.mp4: \d+ of the 20 frames that its header names are there", report.text)


def test_a_data_set_of_short_videos_only_is_an_error(tmp_path) -> None:
    config = video_set(tmp_path, {"short": 4, "shorter": 3})
    with pytest.raises(UserError, match="every video is too short"):
        run_loop(config, "sections")
    assert not (tmp_path / "cache").exists()


def test_pictures_of_every_kind_are_cached(tmp_path, report) -> None:
    config = image_set(tmp_path, ["plain", "alpha", "palette", "deep", "odd [x] 猫", "turned"])
    folder = tmp_path / "images"
    colour = Image.open(folder / "plain.png").convert("RGB")
    colour.putalpha(100)
    colour.save(folder / "alpha.png")
    colour.convert("RGB").quantize(16).save(folder / "palette.png")
    Image.fromarray(np.full((32, 40), 40000, dtype=np.uint16)).save(folder / "deep.png")
    write_picture(folder / "odd [x] 猫.png", 3, (53, 37))
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.convert("RGB").save(folder / "turned.png", exif=exif)
    code, encoder = run_loop(config)
    assert code == 0 and len(encoder.encoded) == 6
    by_name = {sample.job.item.stem: sample for batch in encoder.batches for sample in batch}
    assert np.array_equal(by_name["alpha"].frames, by_name["plain"].frames), "a target's alpha is dropped"
    assert (by_name["deep"].frames == 40000 >> 8).all()
    names = files(tmp_path / "cache")
    assert "odd [x] 猫_0053x0037_fp.safetensors" in names
    assert "turned_0032x0040_fp.safetensors" in names, "the size of the upright picture"
    assert re.search(r"note: .*turned upright by EXIF orientation: turned\.png", report.text)


# ---- batches ----


def test_batches_have_one_shape_and_at_most_the_size_that_was_asked_for(tmp_path) -> None:
    config = image_set(tmp_path, list("abcde"), batch_size=2, enable_bucket=True)
    for name in "ad":
        write_picture(tmp_path / "images" / f"{name}.png", ord(name), (32, 64))
    _, encoder = run_loop(config)
    batches = [[sample.job.item.stem for sample in batch] for batch in encoder.batches]
    assert sorted(batches) == [["a", "d"], ["b", "c"], ["e"]]
    for batch in encoder.batches:
        assert len({sample.frames.shape for sample in batch}) == 1
    _, encoder = run_loop(config, batch_size=3)
    assert sorted(len(batch) for batch in encoder.batches) == [2, 3], "the flag counts, not the data set"


def test_crops_of_several_videos_are_encoded_together(tmp_path) -> None:
    config = video_set(tmp_path, {"v": 5, "w": 5, "x": 10}, frame_extraction="chunk")
    _, encoder = run_loop(config, "sections", batch_size=4)
    assert [[sample.job.item.stem for sample in batch] for batch in encoder.batches] == [["v", "w", "x", "x"]]
    assert [sample.unit.crop.start for sample in encoder.batches[0]] == [0, 0, 0, 5]


def test_after_an_interruption_later_batches_are_the_same(tmp_path) -> None:
    config = image_set(tmp_path, list("abcdef"))
    run_loop(config, batch_size=2)
    for name in "adf":
        (tmp_path / "cache" / f"{name}_0040x0032_fp.safetensors").unlink()
    _, encoder = run_loop(config, batch_size=2, skip_existing=True)
    batches = [[sample.job.item.stem for sample in batch] for batch in encoder.batches]
    assert batches == [["a"], ["d"], ["f"]], "nobody moves to another batch"
    for name in "cdef":
        (tmp_path / "cache" / f"{name}_0040x0032_fp.safetensors").unlink()
    _, encoder = run_loop(config, batch_size=2, skip_existing=True)
    assert [[sample.job.item.stem for sample in batch] for batch in encoder.batches] == [["c", "d"], ["e", "f"]]


def test_a_batch_with_an_item_that_cannot_be_loaded_goes_on_without_it(tmp_path, report) -> None:
    config = image_set(tmp_path, list("abcd"))
    truncate(tmp_path / "images" / "b.png")
    code, encoder = run_loop(config, batch_size=4)
    assert code == 1
    assert [[sample.job.item.stem for sample in batch] for batch in encoder.batches] == [["a", "c", "d"]]
    assert len(errors(report)) == 1


class Choking(PlainEncoder):
    """Cannot encode more than one at once, nor what is called `poison`."""

    def encode(self, samples):
        super().encode(samples)
        if len(samples) > 1 or samples[0].job.item.stem == "poison":
            raise MemoryError("out of\nmemory")
        return [self.tensors(samples[0])]


def test_a_batch_that_fails_is_tried_one_by_one(tmp_path, report) -> None:
    config = image_set(tmp_path, ["a", "b", "poison"])
    code, encoder = run_loop(config, encoder=Choking(), batch_size=3)
    assert code == 1
    assert [len(batch) for batch in encoder.batches] == [3, 1, 1, 1]
    assert sorted(files(tmp_path / "cache")) == ["a_0040x0032_fp.safetensors", "b_0040x0032_fp.safetensors"]
    (message,) = errors(report)
    assert "poison.png: MemoryError: out of memory" in message
    assert "3 items, 2 used, 0 dropped, 1 failed" in report.text


class NotANumber(PlainEncoder):
    """Encodes `bad` to NaN."""

    def tensors(self, sample):
        sections = super().tensors(sample)
        if sample.job.item.stem == "bad":
            sections[-1]["latents"] = sections[-1]["latents"] * float("nan")
        return sections


def test_nan_is_reported_and_never_written(tmp_path, report) -> None:
    config = image_set(tmp_path, ["bad", "good"])
    code, _ = run_loop(config, encoder=NotANumber(), batch_size=2)
    assert code == 1
    assert list(files(tmp_path / "cache")) == ["good_0040x0032_fp.safetensors"]
    (message,) = errors(report)
    assert "bad.png" in message and "not finite" in message


def test_a_clip_with_nan_in_its_last_section_is_written_nowhere(tmp_path) -> None:
    config = video_set(tmp_path, {"bad": 13, "good": 13}, target_frames=[13])
    assert run_loop(config, "sections", encoder=NotANumber())[0] == 1
    assert {name.split("_")[0] for name in files(tmp_path / "cache")} == {"good"}


# ---- --skip_existing ----


@pytest.fixture
def nothing_is_decoded(monkeypatch: pytest.MonkeyPatch):
    """Call it, and pictures and videos cannot be opened any more."""

    def forbid() -> None:
        for name in (
            *("dataset.loading.load_picture", "dataset.loading.read_frames"),
            *("dataset.planning.examine_video", "dataset.frames._opened"),
        ):
            monkeypatch.setattr(name, lambda *args, name=name, **kwargs: pytest.fail(f"{name} was called"))

    return forbid


def test_valid_image_caches_are_left_alone(tmp_path, nothing_is_decoded, report) -> None:
    config = image_set(tmp_path)
    run_loop(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    nothing_is_decoded()
    assert again(config) == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before
    assert "3 were cached already" in report.text


@pytest.mark.parametrize("extraction", ["head", "chunk", "full"])
def test_a_video_with_valid_caches_is_not_even_opened(tmp_path, nothing_is_decoded, extraction) -> None:
    config = video_set(tmp_path, {"猫 [1]": 13, "w": 9}, frame_extraction=extraction)
    run_loop(config, "sections")
    nothing_is_decoded()
    assert again(config, "sections") == []


def test_no_models_are_brought_in_when_everything_is_valid(tmp_path) -> None:
    config = image_set(tmp_path)
    run_loop(config)

    class Absent(PlainEncoder):
        def opened(self):
            pytest.fail("the encoder was opened")

    assert again(config, encoder=Absent()) == []


def test_without_skip_existing_everything_is_made_anew(tmp_path) -> None:
    config = image_set(tmp_path)
    run_loop(config)
    assert sorted(run_loop(config)[1].encoded) == sorted(NAMES)


@pytest.mark.parametrize("kind", ["images", "controls"])
def test_other_pixels_in_a_file_of_the_same_size_and_time_are_noticed(tmp_path, kind, report) -> None:
    config = image_set(tmp_path)
    path = tmp_path / kind / f"{NAMES[1]}.bmp"
    (tmp_path / kind / f"{NAMES[1]}.png").unlink()
    write_picture(path, 50)
    run_loop(config)
    replace_bytes(path, path.read_bytes()[:-300] + bytes(300))
    assert again(config) == [NAMES[1]]
    assert "made anew (1): " in report.text and "sha256 is" in report.text


def test_a_changed_video_is_noticed(tmp_path) -> None:
    config = video_set(tmp_path, {"v": 9, "w": 9})
    run_loop(config, "sections")
    write_clip(tmp_path / "videos" / "w.mp4", 9, seed=7)
    assert again(config, "sections") == ["w"]


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ({"fp_1f_target_index": 1}, {}),
        ({"fp_1f_clean_indices": [3]}, {}),
        ({"fp_1f_no_post": True}, {}),
        ({"fp_latent_window_size": 2}, {}),
        ({"resolution": [48, 32]}, {}),
        ({"fp_1f_image_embedding_source": "target"}, {}),
        ({}, {"no_2x": True}),
        ({}, {"window": 2}),
        ({}, {"encoders": ENCODERS | {"vae": "another"}}),
    ],
    ids=str,
)
def test_every_setting_that_matters_makes_caches_anew(tmp_path, keys, options) -> None:
    run_loop(image_set(tmp_path))
    config = write_config(tmp_path / "data.toml", image_keys(tmp_path) | keys)
    assert again(config, **options) == sorted(NAMES)
    assert again(config, **options) == []


@pytest.mark.parametrize(
    "keys", [{"batch_size": 3}, {"num_repeats": 5}, {"fp_1f_image_embedding_source": 0}, {"enable_bucket": False}]
)
def test_settings_that_do_not_matter_leave_caches_valid(tmp_path, keys) -> None:
    run_loop(image_set(tmp_path))
    config = write_config(tmp_path / "data.toml", image_keys(tmp_path) | keys)
    (tmp_path / "images" / f"{NAMES[0]}.txt").write_text("another caption", encoding="utf-8")
    assert again(config) == []


def test_another_rate_makes_the_caches_of_videos_anew(tmp_path) -> None:
    keys = {"target_frames": [5], "frame_extraction": "head"}
    run_loop(video_set(tmp_path, {"v": 20}, **keys), "sections")
    config = video_set(tmp_path, {"v": 20}, **keys, source_fps=15)
    assert again(config, "sections") == ["v"]
    assert again(config, "f1") == ["v"], "sections and F1 have equal names"


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "header", "last byte"])
def test_a_damaged_section_is_made_anew(tmp_path, damage) -> None:
    config = video_set(tmp_path, {"v": 13, "w": 13}, target_frames=[13])
    run_loop(config, "sections")
    before = files(tmp_path / "cache")
    path = tmp_path / "cache" / "v_00000-013-0001_0032x0032_fp.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        length = {"empty": 0, "half": len(content) // 2, "header": 20, "last byte": len(content) - 1}[damage]
        path.write_bytes(content[:length])
    assert again(config, "sections") == ["v"]
    assert files(tmp_path / "cache") == before


def test_caches_of_the_incumbent_are_kept_and_counted(tmp_path, report) -> None:
    config = image_set(tmp_path)
    run_loop(config)
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(save(load(path.read_bytes()), {"architecture": "framepack", "format_version": "1.0.1"}))
    before = files(tmp_path / "cache")
    assert again(config) == []
    assert files(tmp_path / "cache") == before
    assert "3 of these have no fingerprint" in report.text


# ---- what is removed ----


def test_caches_of_removed_sources_go_and_nothing_else_does(tmp_path, report) -> None:
    config = image_set(tmp_path)
    run_loop(config)
    others = [
        *("lora_fp.safetensors", "猫_fp_te.safetensors", "gone_0040x0032_wan.safetensors", "note.txt"),
        *("gone_0040x0032_fp.safetensors.bak", "gone_0040x0032_fp.png"),
    ]
    for name in others:
        (tmp_path / "cache" / name).write_bytes(b"x")
    (tmp_path / "images" / "two words.png").unlink()
    (tmp_path / "controls" / "two words.png").unlink()
    left = [f"{name}_0040x0032_fp.safetensors" for name in NAMES if name != "two words"]
    run_loop(config, skip_existing=True, keep_cache=True)
    assert "two words_0040x0032_fp.safetensors" in files(tmp_path / "cache")
    run_loop(config, skip_existing=True)
    assert sorted(files(tmp_path / "cache")) == sorted(left + others)
    assert "removed, as nothing in the data set belongs to it: two words_0040x0032_fp.safetensors" in report.text


def test_sections_that_a_wider_window_does_without_are_removed(tmp_path) -> None:
    config = video_set(tmp_path, {"v": 13}, target_frames=[13])
    run_loop(config, "sections")
    assert len(files(tmp_path / "cache")) == 3
    run_loop(config, "sections", window=3)
    assert list(files(tmp_path / "cache")) == ["v_00000-013-0000_0032x0032_fp.safetensors"]


def test_nothing_is_removed_while_items_cannot_be_listed(tmp_path, report) -> None:
    config = image_set(tmp_path)
    run_loop(config)
    (tmp_path / "images" / "two words.txt").unlink()
    before = files(tmp_path / "cache")
    code, _ = run_loop(config, skip_existing=True)
    assert code == 1 and files(tmp_path / "cache") == before
    assert "1 older cache files are kept until all items of the data set can be listed" in report.text


@pytest.mark.parametrize("broken", ["header", "pixels"])
def test_the_cache_of_an_item_that_fails_today_is_kept(tmp_path, broken) -> None:
    config = image_set(tmp_path)
    run_loop(config)
    before = files(tmp_path / "cache")
    path = tmp_path / "images" / "two words.png"
    path.write_bytes(b"" if broken == "header" else path.read_bytes()[:-60])
    write_picture(tmp_path / "images" / "a [1].png", 1, (48, 48))
    _content_hash.cache_clear()
    assert run_loop(config, skip_existing=True)[0] == 1
    after = files(tmp_path / "cache")
    assert after["two words_0040x0032_fp.safetensors"] == before["two words_0040x0032_fp.safetensors"]
    assert "a [1]_0040x0032_fp.safetensors" not in after and "a [1]_0048x0048_fp.safetensors" in after


def test_only_old_temporary_files_are_removed(tmp_path) -> None:
    config = image_set(tmp_path)
    (tmp_path / "cache").mkdir()
    old, new = (tmp_path / "cache" / f".猫_0040x0032_fp.{digits}.tmp.safetensors" for digits in ("0" * 8, "f" * 8))
    for path in (old, new):
        path.write_bytes(b"half a file")
    os.utime(old, (time.time() - 4000,) * 2)
    run_loop(config)
    assert new.exists() and not old.exists()


# ---- what goes wrong ----


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def break_one(folder: Path, how: str) -> str:
    """Breaks `two words` of an image set; returns what the message has to say."""
    image, control = folder / "images" / "two words.png", folder / "controls" / "two words.png"
    match how:
        case "no image":
            image.write_bytes(b"no image at all")
            return "damaged or of another kind"
        case "zero bytes":
            image.write_bytes(b"")
            return "the file is empty"
        case "truncated":
            truncate(image)
            return "damaged or of another kind"
        case "truncated control":
            truncate(control)
            return "damaged or of another kind"
        case "no caption":
            (folder / "images" / "two words.txt").unlink()
            return "no caption file two words.txt"
        case "no control":
            control.unlink()
            return "got 0 control images; expected 1"
        case "two controls":
            shutil.copy(control, control.with_name("two words_0.png"))
            return "got 2 control images|one control image for each number"
        case "same stem":
            shutil.copy(image, image.with_suffix(".jpg"))
            return "names that differ in more than folder and suffix"
    raise ValueError(how)


HOW = ["no image", "zero bytes", "truncated", "truncated control", "no caption", "no control", "same stem"]


@pytest.mark.parametrize("how", [*HOW, "two controls"])
def test_one_bad_item_is_reported_once_and_the_others_are_cached(tmp_path, how, report) -> None:
    config = image_set(tmp_path)
    complaint = break_one(tmp_path, how)
    code, encoder = run_loop(config)
    assert code == 1
    assert sorted(encoder.encoded) == sorted(NAMES[:2])
    (message,) = errors(report)
    assert re.search(complaint, message) and "two words" in message and "\n" not in message


@pytest.mark.parametrize("how", HOW)
def test_strict_stops_at_a_bad_item(tmp_path, how) -> None:
    config = image_set(tmp_path)
    complaint = break_one(tmp_path, how)
    with pytest.raises(UserError, match=complaint):
        run_loop(config, strict=True)


@pytest.mark.parametrize("content", [b"", b"no video", None])
def test_a_bad_video_is_reported_and_the_others_are_cached(tmp_path, content, report) -> None:
    config = video_set(tmp_path, {"v": 9, "w": 40}, target_frames=[5, 37])
    path = tmp_path / "videos" / "w.mp4"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    code, encoder = run_loop(config, "sections")
    assert code == 1 and "v" in encoder.encoded
    assert len(errors(report)) == 1 and "w.mp4" in errors(report)[0]


def test_nothing_that_can_be_used_is_an_error(tmp_path) -> None:
    config = image_set(tmp_path)
    for path in (tmp_path / "images").glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError) as raised:
        run_loop(config)
    lines = str(raised.value).splitlines()
    assert len(lines) == 4 and sum("the file is empty" in line for line in lines) == 3


def test_a_file_that_cannot_be_hashed_is_reported_by_who_loads_it(tmp_path, monkeypatch, report) -> None:
    config = image_set(tmp_path)
    run_loop(config)
    original = _content_hash.__wrapped__

    def content_hash(path: str, *state: int) -> str:
        if "two words" in path:
            raise PermissionError(13, "Permission denied", path)
        return original(path, *state)

    monkeypatch.setattr("dataset.fingerprints._content_hash", content_hash)
    code, encoder = run_loop(config, skip_existing=True)
    assert code == 1 and encoder.encoded == []
    assert len(errors(report)) == 1 and "Permission denied" in errors(report)[0]


def test_one_broken_data_set_of_two_is_named(tmp_path) -> None:
    image_set(tmp_path / "一")
    image_set(tmp_path / "二", ["x"])
    (tmp_path / "二" / "images" / "x.png").write_bytes(b"")
    config = write_config(tmp_path / "data.toml", image_keys(tmp_path / "一"), image_keys(tmp_path / "二"))
    with pytest.raises(UserError, match=re.escape("[datasets][2]: got nothing that can be cached")):
        run_loop(config)


# ---- workers ----


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_workers_change_nothing(tmp_path, kind, report) -> None:
    """Paths with brackets, spaces and Japanese travel to spawned processes; failures travel back."""
    folder = tmp_path / "データ [1] x"
    if kind == "images":
        config, mode = image_set(folder, [*NAMES, "bad", "z"]), "one_frame"
        truncate(folder / "images" / "bad.png")
    else:
        lengths = {"a": 22, "猫 [2]": 6, "bad": 22, "c": 5}
        config, mode = video_set(folder, lengths, frame_extraction="chunk", target_frames=[5]), "sections"
        whole = (folder / "videos" / "bad.mp4").read_bytes()
        (folder / "videos" / "bad.mp4").write_bytes(whole[: len(whole) * 85 // 100])
    outcomes = []
    for num_workers in (0, 1) if kind == "images" else (0, 2):
        report.clear()
        code, encoder = run_loop(config, mode, num_workers=num_workers, batch_size=2)
        names = [[str(sample.unit.paths) for sample in batch] for batch in encoder.batches]
        lines = [re.sub(r" in \d+\.\d s.*second", "", record.getMessage()) for record in report.records]
        outcomes.append((code, names, lines, files(folder / "cache")))
        shutil.rmtree(folder / "cache")
    assert outcomes[0][0] == 1 and len(outcomes[0][3]) > 3
    assert all(outcome == outcomes[0] for outcome in outcomes[1:])


def test_workers_stop_when_enough_is_ready(tmp_path, monkeypatch) -> None:
    """Every sample that is decoded leaves a trace in a file; the first ones are taken, then nobody asks any more."""
    config = image_set(tmp_path, [f"i{number:02d}" for number in range(30)])
    rules = FramePackCacheRules(mode="one_frame")
    (dataset,) = load_dataset_config(config).datasets
    jobs = plan_latents(dataset, rules, reuse=False).jobs
    monkeypatch.setattr("dataset.loading.NUM_AHEAD", {True: 2, False: 1})
    samples = load_samples(jobs, fps=30, num_workers=1)
    first = next(samples)
    for path in (tmp_path / "images").glob("*.png"):
        path.unlink()  # what was not read by now never will be
    rest = [sample for sample in samples if hasattr(sample, "frames")]
    assert first.job.item.stem == "i00"
    # One in the hands of the consumer, two ahead, and the next one asked for when the first was handed over.
    assert [sample.job.item.stem for sample in rest] == [f"i{number:02d}" for number in range(1, 1 + len(rest))]
    assert len(rest) <= 3


# ---- what one odd thing must not do to the rest ----


def test_data_set_files_that_share_a_cache_folder_leave_each_other_alone(tmp_path, report) -> None:
    images, videos = image_set(tmp_path / "一", ["a"]), video_set(tmp_path / "二", {"v": 5})
    shared = tmp_path / "cache"
    for config in (images, videos):
        text = config.read_text(encoding="utf-8")
        own = str(config.parent / "cache").replace("\\", "\\\\")
        assert own in text
        config.write_text(text.replace(own, str(shared).replace("\\", "\\\\")), encoding="utf-8")
    run_loop(images)
    run_loop(videos, "sections", window=1)
    assert {name[0] for name in files(shared)} == {"a", "v"}
    assert "1 other cache files in" in report.text and "this data set did not make them" in report.text
    run_loop(images)
    assert {name[0] for name in files(shared)} == {"a", "v"}


def test_a_name_that_is_too_long_for_a_cache_is_reported_and_the_rest_goes_on(tmp_path, report) -> None:
    long = "x" * 240
    code, encoder = run_loop(image_set(tmp_path, ["a", long, "z"]))
    assert code == 1 and {"a", "z"} <= set(encoder.encoded)
    assert sorted(name[0] for name in files(tmp_path / "cache")) == ["a", "z"]
    assert "shorten the name" in report.text


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_name_that_is_no_text_is_reported_and_the_rest_goes_on(tmp_path, report) -> None:
    config = image_set(tmp_path, ["a", "b"])
    for folder, suffix in (("images", ".png"), ("images", ".txt"), ("controls", ".png")):
        (tmp_path / folder / f"b{suffix}").rename(
            os.fsdecode(os.fsencode(tmp_path / folder) + b"/\xff" + suffix.encode())
        )
    code, encoder = run_loop(config)
    assert code == 1 and encoder.encoded == ["a"]
    assert "a name that is not UTF-8" in report.text and "2 items, 1 used, 0 dropped, 1 failed" in report.text


def test_an_item_without_caption_is_counted_as_failed(tmp_path, report) -> None:
    config = image_set(tmp_path, ["a", "b", "c"])
    (tmp_path / "images" / "b.txt").unlink()
    assert run_loop(config)[0] == 1
    assert "3 items, 2 used, 0 dropped, 1 failed" in report.text


def test_a_worker_that_was_killed_is_said_in_one_line(tmp_path, monkeypatch) -> None:
    from dataset import workers

    def killed(*arguments):
        yield from ()
        raise RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")

    monkeypatch.setattr(workers, "_loader", killed)
    with pytest.raises(
        UserError, match="a worker process that ended; expected the item from it; .* fewer --num_workers"
    ):
        run_loop(image_set(tmp_path, ["a"]), num_workers=1)


def test_few_clips_wait_for_their_batch_when_lengths_differ(tmp_path) -> None:
    from dataset.batching import Batches
    from dataset.config import load_dataset_config
    from dataset.loading import load_samples
    from dataset.planning import plan_latents

    lengths = {f"v{number:02d}": 5 + 4 * (number % 4) for number in range(16)}
    config = video_set(tmp_path, lengths, frame_extraction="full", fp_latent_window_size=1)
    plan = plan_latents(load_dataset_config(config).datasets[0], FramePackCacheRules(mode="sections"), reuse=False)
    batches, held, most = Batches(plan.jobs, plan.jobs, 4), 0, 0
    for sample in load_samples(plan.jobs, fps=30, num_workers=0):
        held += 1
        most = max(most, held)
        held -= len(batches.add(sample))
    assert held == 0 and most == 4
