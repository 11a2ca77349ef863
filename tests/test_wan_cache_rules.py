"""What Wan's caches ask of a data set, and what they depend on; without models."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from dataset.config import ImageDataset, VideoDataset
from dataset.sources import MediaItem
from options.errors import UserError, UserErrors
from wan.caching import WanCacheRules

ONE_FRAME, T2V, I2V, FLF2V = (WanCacheRules(mode=mode) for mode in ("one_frame", "t2v", "i2v", "flf2v"))


def images(**changes) -> ImageDataset:
    values = {
        "where": "データ.toml [datasets][1]",
        "cache_directory": Path("cache"),
        "image_directory": Path("画像"),
        "control_directory": Path("control"),
        "fp_1f_target_index": 1,
        "fp_1f_clean_indices": (0, 10),
    }
    return ImageDataset(**(values | changes))


def plain_images(**changes) -> ImageDataset:
    return images(**{"control_directory": None, "fp_1f_target_index": None, "fp_1f_clean_indices": None} | changes)


def videos(**changes) -> VideoDataset:
    values = {
        "where": "データ.toml [datasets][2]",
        "cache_directory": Path("cache"),
        "video_directory": Path("動画"),
        "target_frames": (1, 25),
    }
    return VideoDataset(**(values | changes))


# ---- what data sets must say ----


def test_good_data_sets_pass_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ONE_FRAME.check(images())
        ONE_FRAME.check(images(fp_1f_clean_indices=(2, 0, 1023)))
        ONE_FRAME.check(images(image_directory=None, image_jsonl_file=Path("a.jsonl"), control_directory=None))
        T2V.check(plain_images())
        T2V.check(plain_images(control_directory=Path("control")))
        for rules in (T2V, I2V, FLF2V):
            rules.check(videos())
            rules.check(videos(control_directory=Path("control")))
            rules.check(videos(frame_extraction="full", target_frames=(1,), max_frames=5))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("rules", "dataset", "place", "remedy"),
    [
        (ONE_FRAME, videos(), "[2] video_directory: got videos; expected images", "leave out --one_frame"),
        (ONE_FRAME, videos(video_directory=None, video_jsonl_file=Path("a")), "[2] video_jsonl_file: got v", "--one_f"),
        (ONE_FRAME, images(fp_1f_target_index=None), "[1] fp_1f_target_index: got nothing", "fp_1f_target_index = 1"),
        (ONE_FRAME, images(fp_1f_clean_indices=None), "[1] fp_1f_clean_indices: got nothing", "clean_indices = [0]"),
        (ONE_FRAME, images(control_directory=None), "[1] control_directory: got nothing", "folder of the control"),
        (ONE_FRAME, images(multiple_target=True), "[1] multiple_target: got true", "remove it"),
        (ONE_FRAME, images(no_resize_control=True), "[1] no_resize_control: got true", "remove it"),
        (T2V, plain_images(control_resolution=(640, 480)), "[1] control_resolution: got 640 x 480", "remove it"),
        (ONE_FRAME, images(fp_1f_target_index=1024), "got target_index=1024; expected an index from 0 to 1023", "axis"),
        (ONE_FRAME, images(fp_1f_clean_indices=(0, 4000)), "got control_index=4000; expected an index", "ends there"),
        (ONE_FRAME, images(fp_1f_target_index=10), "got target_index=10 and a control image at 10", "another target"),
        (FLF2V, images(), "[1] image_directory: got images; expected videos with --flf2v", "use --one_frame"),
        (FLF2V, videos(target_frames=(1,)), "[2] target_frames: got 1; expected at least 5 frames", "= [5], say"),
        (FLF2V, videos(frame_extraction="full", max_frames=4), "[2] max_frames: got 4; expected at least 5", "= 5, s"),
    ],
)
def test_what_cannot_be_cached_is_named_with_its_remedy(rules, dataset, place: str, remedy: str) -> None:
    with pytest.raises(UserErrors) as caught:
        rules.check(dataset)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("データ.toml [datasets]") and place in line and remedy in line


def test_everything_that_is_wrong_is_said_at_once() -> None:
    dataset = images(
        fp_1f_target_index=None, fp_1f_clean_indices=None, control_directory=None, multiple_target=True,
        no_resize_control=True, control_resolution=(64, 64),
    )  # fmt: skip
    with pytest.raises(UserErrors) as caught:
        ONE_FRAME.check(dataset)
    assert len(str(caught.value).splitlines()) == 6


@pytest.mark.parametrize(
    ("rules", "dataset", "remark"),
    [
        (ONE_FRAME, images(fp_1f_no_post=True), "no_post: ignored, as Wan has no history"),
        (ONE_FRAME, images(fp_1f_target_index=0, fp_1f_clean_indices=(5,)), "target_index=0 is the place of the start"),
        (ONE_FRAME, images(fp_1f_image_embedding_source="target"), "= target: CLIP sees this picture alone"),
        (ONE_FRAME, images(fp_1f_image_embedding_source=1), "= 1: CLIP sees this picture alone"),
        (T2V, images(), "fp_1f_target_index: only used with --one_frame"),
        (I2V, plain_images(), "images with --i2v: each is shown to the model"),
    ],
)
def test_what_is_odd_is_remarked(rules, dataset, remark: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rules.check(dataset)
    (record,) = caplog.records
    assert record.getMessage().startswith("データ.toml [datasets][1] ") and remark in record.getMessage()


@pytest.mark.parametrize("number", [0, 1, 3])
def test_only_one_frame_items_need_a_control_for_each_index(number: int) -> None:
    controls = tuple(Path(f"{i}.png") for i in range(number))
    item = MediaItem(where="画像.jsonl line 1", path=Path("猫.png"), caption="", control_paths=controls)
    with pytest.raises(UserError, match=rf"^画像\.jsonl line 1: got {number} control images; expected 2, one for each"):
        ONE_FRAME.check_item(item, images())
    for rules in (T2V, I2V):
        rules.check_item(item, images())
        rules.check_item(item, videos())


@pytest.mark.parametrize(
    ("rules", "length", "sections", "used"),
    [(T2V, 81, 1, 81), (I2V, 1, 1, 1), (T2V, 84, 1, 81), (FLF2V, 5, 1, 5), (FLF2V, 1, 0, 0)],
)
def test_clips_have_whole_latents_and_flf2v_two_ends(rules, length: int, sections: int, used: int) -> None:
    cut = rules.trim(length, videos())
    assert (cut.num_sections, cut.length) == (sections, used) and (cut.note is None) == (used == length)


def test_names_and_rate_are_those_of_wan() -> None:
    assert (T2V.arch, T2V.fps, T2V.has_sections, T2V.uses_control_videos) == ("wan", 16, False, True)


def test_data_sets_are_checked_before_torch_is_loaded(repository: Path) -> None:
    code = "import sys, wan.caching, wan.training_rules; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


# ---- what caches depend on ----


def test_settings_of_images_and_videos() -> None:
    assert ONE_FRAME.settings(images(fp_latent_window_size=11, fp_1f_no_post=True)) == {
        "rules": "1",
        "mode": "one_frame",
        "target_index": "1",
        "control_indices": "0;10",
        "image_embedding_source": "controls",
    }
    assert I2V.settings(videos()) == I2V.settings(images()) == {"rules": "1", "mode": "i2v"}


@pytest.mark.parametrize(
    ("source", "value"), [("control", "controls"), (0, "controls"), (1, "control 1"), ("target", "target")]
)
def test_equal_sources_of_features_are_equal_settings(source: str | int, value: str) -> None:
    assert ONE_FRAME.settings(images(fp_1f_image_embedding_source=source))["image_embedding_source"] == value


@pytest.mark.parametrize(
    "changes",
    [
        {"fp_1f_target_index": 9},
        {"fp_1f_clean_indices": (10, 0)},
        {"fp_1f_clean_indices": (0,)},
        {"fp_1f_image_embedding_source": 1},
    ],
)
def test_what_changes_a_cache_changes_its_settings(changes: dict) -> None:
    assert ONE_FRAME.settings(images(**changes)) != ONE_FRAME.settings(images())
