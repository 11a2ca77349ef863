"""What FramePack's caches ask of a data set, and what they depend on; without models."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from dataset.config import ImageDataset, VideoDataset
from dataset.fingerprints import Fingerprint
from dataset.sources import MediaItem
from frame_pack.caching import FramePackCacheRules
from options.errors import UserError, UserErrors

ONE_FRAME = FramePackCacheRules(mode="one_frame")
SECTIONS = FramePackCacheRules(mode="sections")
F1 = FramePackCacheRules(mode="f1")


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


def videos(**changes) -> VideoDataset:
    values = {
        "where": "データ.toml [datasets][2]",
        "cache_directory": Path("cache"),
        "video_directory": Path("動画"),
        "target_frames": (37,),
    }
    return VideoDataset(**(values | changes))


def test_good_data_sets_pass_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ONE_FRAME.check(images())
        ONE_FRAME.check(images(image_directory=None, image_jsonl_file=Path("a.jsonl"), control_directory=None))
        for rules in (SECTIONS, F1):
            rules.check(videos())
            rules.check(videos(target_frames=(1, 25, 37)))  # the short ones are reported clip by clip
            rules.check(videos(frame_extraction="full", target_frames=(1,), max_frames=37))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("rules", "dataset", "place", "remedy"),
    [
        (SECTIONS, images(), "[1] image_directory: got images", "add --one_frame"),
        (F1, images(image_directory=None, image_jsonl_file=Path("a")), "[1] image_jsonl_file: got im", "--one_frame"),
        (ONE_FRAME, videos(), "[2] video_directory: got videos", "leave out --one_frame"),
        (ONE_FRAME, videos(video_directory=None, video_jsonl_file=Path("a")), "[2] video_jsonl_file: got v", "--one_f"),
        (ONE_FRAME, images(fp_1f_target_index=None), "[1] fp_1f_target_index: got nothing", "fp_1f_target_index = 9"),
        (ONE_FRAME, images(control_directory=None), "[1] control_directory: got nothing", "folder of the control"),
        (ONE_FRAME, images(multiple_target=True), "[1] multiple_target: got true", "remove it"),
        (ONE_FRAME, images(no_resize_control=True), "[1] no_resize_control: got true", "remove it"),
        (ONE_FRAME, images(control_resolution=(640, 480)), "[1] control_resolution: got 640 x 480", "remove it"),
        (SECTIONS, videos(target_frames=(1, 33)), "[2] target_frames: got 1, 33; expected at least 37", "= [37]"),
        (F1, videos(frame_extraction="full", max_frames=39, fp_latent_window_size=10), "max_frames: got 39;", "= 41,"),
        (FramePackCacheRules(mode="sections", window=10), videos(), "target_frames: got 37; expected at l", "= [41],"),
    ],
)
def test_what_cannot_be_cached_is_named_with_its_remedy(rules, dataset, place: str, remedy: str) -> None:
    with pytest.raises(UserErrors) as caught:
        rules.check(dataset)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("データ.toml [datasets]") and place in line and remedy in line


def test_index_zero_as_a_target_counts_as_given(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ONE_FRAME.check(images(fp_1f_target_index=0))
    assert "usual values are 1 to 13" in caplog.text


def test_a_window_given_on_the_command_line_counts_before_the_data_sets() -> None:
    FramePackCacheRules(mode="sections", window=2).check(videos(target_frames=(9,)))


def test_everything_that_is_wrong_is_said_at_once() -> None:
    dataset = images(
        fp_1f_target_index=None, control_directory=None, multiple_target=True, no_resize_control=True,
        control_resolution=(64, 64),
    )  # fmt: skip
    with pytest.raises(UserErrors) as caught:
        ONE_FRAME.check(dataset)
    assert len(str(caught.value).splitlines()) == 5


def test_a_missing_control_index_is_zero_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    dataset = images(fp_1f_clean_indices=None)
    with caplog.at_level(logging.WARNING):
        ONE_FRAME.check(dataset)
    (record,) = caplog.records
    assert record.getMessage().startswith("データ.toml [datasets][1] fp_1f_clean_indices: ")
    assert ONE_FRAME.settings(dataset)["control_indices"] == "0"


def test_control_videos_are_not_used_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        SECTIONS.check(videos(control_directory=Path("control")))
    assert "[2] control_directory: FramePack does not use control videos" in caplog.text


def test_settings_of_images() -> None:
    rules = FramePackCacheRules(mode="one_frame", no_4x=True)
    assert rules.settings(images(fp_latent_window_size=11, fp_1f_no_post=True)) == {
        "rules": "1",
        "mode": "one_frame",
        "window": "11",
        "target_index": "1",
        "control_indices": "0;10",
        "no_post": "yes",
        "no_2x": "no",
        "no_4x": "yes",
        "image_embedding_source": "control 0",
    }


def test_settings_of_videos() -> None:
    assert SECTIONS.settings(videos()) == {"rules": "1", "mode": "sections", "window": "9"}
    assert FramePackCacheRules(mode="f1", window=4).settings(videos()) == {"rules": "1", "mode": "f1", "window": "4"}


def setting(name: str, **changes) -> str:
    return ONE_FRAME.settings(images(**changes))[name]


def test_equal_settings_are_equal_however_they_are_written() -> None:
    name = "image_embedding_source"
    assert setting(name, fp_1f_image_embedding_source=0) == setting(name, fp_1f_image_embedding_source="control")
    assert setting(name, fp_1f_image_embedding_source=1) == "control 1"
    assert setting(name, fp_1f_image_embedding_source="target") == "target"
    name = "control_indices"
    assert setting(name, fp_1f_clean_indices=None) == setting(name, fp_1f_clean_indices=(0,))


@pytest.mark.parametrize(
    "changes",
    [
        {"fp_1f_target_index": 9},
        {"fp_1f_clean_indices": (10, 0)},
        {"fp_1f_clean_indices": (0, 1, 0)},
        {"fp_1f_no_post": True},
        {"fp_1f_image_embedding_source": 1},
        {"fp_1f_image_embedding_source": "target"},
        {"fp_latent_window_size": 8},
    ],
)
def test_what_changes_a_cache_changes_its_settings(changes: dict) -> None:
    assert ONE_FRAME.settings(images(**changes)) != ONE_FRAME.settings(images())


def test_every_mode_and_option_has_settings_of_its_own() -> None:
    def settings(**options) -> Fingerprint:
        return FramePackCacheRules(mode="one_frame", **options).settings(images())

    found = [settings(), settings(no_2x=True), settings(no_4x=True), settings(window=5)]
    found += [SECTIONS.settings(videos()), F1.settings(videos())]
    assert all(first != second for i, first in enumerate(found) for second in found[:i])
    assert all(isinstance(value, str) for values in found for value in values.values())


@pytest.mark.parametrize(
    ("window", "length", "sections", "used"), [(None, 81, 2, 73), (None, 36, 0, 0), (2, 81, 10, 81), (10, 81, 2, 81)]
)
def test_clips_are_cut_to_whole_sections(window: int | None, length: int, sections: int, used: int) -> None:
    cut = FramePackCacheRules(mode="sections", window=window).trim(length, videos())
    assert (cut.num_sections, cut.length) == (sections, used)


def test_names_and_rate_are_those_of_framepack() -> None:
    assert (SECTIONS.arch, SECTIONS.fps, SECTIONS.has_sections) == ("fp", 30, True)


def test_data_sets_are_checked_before_torch_is_loaded(repository: Path) -> None:
    code = "import sys, frame_pack.caching; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


@pytest.mark.parametrize("number", [0, 1, 3])
def test_item_without_a_control_image_for_each_index_is_refused(number: int) -> None:
    controls = tuple(Path(f"{i}.png") for i in range(number))
    item = MediaItem(where="画像.jsonl line 1", path=Path("猫.png"), caption="", control_paths=controls)
    with pytest.raises(UserError, match=rf"^画像\.jsonl line 1: got {number} control images; expected 2, one for each"):
        ONE_FRAME.check_item(item, images())
    SECTIONS.check_item(item, videos())


def test_window_does_not_matter_where_nothing_stands_behind_it() -> None:
    alone = FramePackCacheRules(mode="one_frame", no_2x=True, no_4x=True)
    assert "window" not in alone.settings(images(fp_1f_no_post=True))
    assert "window" in alone.settings(images()) and "window" in ONE_FRAME.settings(images(fp_1f_no_post=True))
