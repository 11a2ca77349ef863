"""Which caches are trained, which are refused and why, and what is said about all that is missing."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dataset.cached_items
from dataset import cache_files, fingerprints
from dataset.cached_items import find_cached_items
from dataset.config import DatasetConfig
from dataset.crops import Crop
from dataset.sources import list_items
from options.errors import UserError
from tests.train_caches import (
    SCRIPTS,
    VIDEO_RULES,
    WAN_RULES,
    Rules,
    cache_clip,
    cache_image,
    cache_images,
    cache_text,
    cache_videos,
    image_set,
    incumbent_image,
    incumbent_text,
    video_set,
    write,
)

AGAIN = "run cache_latents.py --skip_existing"
FROM_SCRATCH = "run cache_latents.py without --skip_existing"


def names_of(*datasets, rules=None):
    """The names of the latent caches that are trained."""
    rules = rules or Rules()
    return [item.latents.name for item in find_cached_items(DatasetConfig(datasets=datasets), rules, SCRIPTS)]


def refused(*datasets, rules=None):
    """The lines of the error."""
    with pytest.raises(UserError) as caught:
        names_of(*datasets, rules=rules)
    return str(caught.value).split("\n")


def item_of(dataset, stem):
    return next(item for item in list_items(dataset).items if item.stem == stem)


def changed(dataset, **values):
    return replace(dataset, **values)


@pytest.fixture
def images(tmp_path):
    dataset = image_set(tmp_path / "写真 [1]", ["a", "b", "日本"])
    cache_images(dataset)
    return dataset


@pytest.fixture
def videos(tmp_path):
    dataset = video_set(tmp_path / "動画 [1]", ["v", "w"])
    cache_videos(dataset)
    return dataset


ALL_IMAGES = [f"{stem}_0100x0100_fp.safetensors" for stem in ("a", "b", "日本")]
ALL_CLIPS = [
    f"{stem}_{clip}_0064x0064_fp.safetensors"
    for stem in "vw"
    for clip in ("00000-005-0000", "00000-009-0000", "00000-009-0001")
]


# ---- what is used ----


def test_every_cache_is_found_in_order_and_in_silence(images, videos, caplog):
    assert names_of(images) == ALL_IMAGES
    assert names_of(videos, rules=VIDEO_RULES) == ALL_CLIPS
    assert caplog.text == ""


def test_order_does_not_depend_on_the_file_system(images, monkeypatch):
    items = find_cached_items(DatasetConfig(datasets=(images,)), Rules(), SCRIPTS)
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            self.entries = list(scandir(path))[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert find_cached_items(DatasetConfig(datasets=(images,)), Rules(), SCRIPTS) == items


def test_caches_of_another_architecture_are_left_alone(images, tmp_path):
    cache_images(changed(images, control_directory=None), WAN_RULES)
    assert names_of(images) == ALL_IMAGES


def test_time_of_change_and_unlisted_keys_make_nothing_stale(images):
    for path in images.image_directory.iterdir():
        os.utime(path, (1, 1))
    assert names_of(changed(images, num_repeats=5, batch_size=3)) == ALL_IMAGES


def test_headers_are_read_once_and_no_tensor(images, videos, monkeypatch):
    read = []
    header = dataset.cached_items.cache_header
    monkeypatch.setattr(dataset.cached_items, "cache_header", lambda path: read.append(path) or header(path))
    monkeypatch.setattr(cache_files, "_read_keys", None)
    monkeypatch.setattr(cache_files, "read_indices", None)
    names_of(images)
    assert len(read) == len(set(read)) == 6
    names_of(videos, rules=VIDEO_RULES)
    assert len(read) == len(set(read)) == 6 + 6 + 2


# ---- stale ----


def replace_image(dataset):
    write(dataset.image_directory / "b.png", "image B")  # of the same size


def replace_control(dataset):
    write(dataset.control_directory / "b.png", "another control")


def change_caption(dataset):
    write(dataset.image_directory / "b.txt", "caption of c")


def damage(dataset):
    path = dataset.cache_directory / "b_0100x0100_fp.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_text(dataset):
    (dataset.cache_directory / "b_fp_te.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "file", "got", "remedy"),
    [
        (replace_image, "b_0100x0100_fp", "got source_sha256 is ", AGAIN),
        (replace_control, "b_0100x0100_fp", "got control_0_bytes is 9 in the cache, 15 now", AGAIN),
        (
            change_caption,
            "b_fp_te",
            "got caption is 'caption of b' in the cache, 'caption of c' now",
            "cache_texts.py",
        ),
        (damage, "b_0100x0100_fp", "got a damaged file", AGAIN),
        (damage_text, "b_fp_te", "got a damaged file", "run cache_texts.py --skip_existing"),
    ],
)
def test_cache_of_another_source_is_refused(images, change, file, got, remedy):
    change(images)
    (line,) = refused(images)
    assert line.startswith(f"{images.cache_directory / file}.safetensors: {got}") and remedy in line


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ({"fp_1f_target_index": 1}, "got target_index is 9 in the cache, 1 now; expected"),
        ({"resolution": (80, 48)}, "got size is 64x64 in the cache, 80x48 now; expected"),
        ({"enable_bucket": True, "resolution": (96, 64)}, "got size is 64x64 in the cache, 64x80 now"),
        ({"fp_latent_window_size": 4}, "got window is 9 in the cache, 4 now; expected"),
    ],
)
def test_caches_of_other_settings_are_refused_one_by_one(images, values, got):
    lines = refused(changed(images, **values))
    assert [line.split(":")[0] for line in lines] == [str(images.cache_directory / name) for name in ALL_IMAGES]
    assert all(got in line and line.endswith(AGAIN) for line in lines)


def test_control_that_is_not_used_any_more_is_noticed(images):
    lines = refused(changed(images, control_directory=None))
    # --skip_existing would not see it: what is left out is not compared there.
    assert "got control_0 is a.png in the cache, none now" in lines[0] and lines[0].endswith(FROM_SCRATCH)


def test_captions_are_shown_where_they_differ(images):
    long = "the same beginning of a caption that goes on and on and on,"
    write(images.image_directory / "a.txt", f"{long} then a cat")
    cache_text(images, item_of(images, "a"), caption=f"{long} then a dog")
    assert "got caption is '…and on, then a dog' in the cache, '…and on, then a cat' now" in refused(images)[0]


def test_cache_of_another_architecture_under_this_name_is_refused(images):
    for name in ("a_0100x0100", "a"):
        made = images.cache_directory / f"{name}_wan{'_te' if name == 'a' else ''}.safetensors"
        cache_images(changed(images, control_directory=None), WAN_RULES)
        shutil.copy(made, str(made).replace("_wan", "_fp"))
    first, second = refused(images)
    assert all("got architecture is wan in the cache, framepack now" in line for line in (first, second))


def test_twenty_are_named_and_the_rest_counted(tmp_path):
    dataset = image_set(tmp_path, [f"im{number:02}" for number in range(25)])
    cache_images(dataset)
    lines = refused(changed(dataset, fp_1f_target_index=1))
    assert len(lines) == 21 and lines[-1] == "and 5 more cache files"
    assert "im19_" in lines[19]


def test_all_data_sets_are_refused_together(images, videos):
    lines = refused(changed(images, fp_1f_target_index=1), changed(videos, fp_latent_window_size=2), rules=VIDEO_RULES)
    assert sum("mode is one_frame in the cache, sections now" in line for line in lines) == 3
    assert sum("window is 1 in the cache, 2 now" in line for line in lines) == 6


# ---- videos ----


def test_videos_are_compared_by_name_and_size_as_hashing_them_takes_hours(videos, monkeypatch):
    monkeypatch.setattr(fingerprints, "_content_hash", None)
    assert names_of(videos, rules=VIDEO_RULES) == ALL_CLIPS
    write(videos.video_directory / "w.mp4", "video W")
    assert names_of(videos, rules=VIDEO_RULES) == ALL_CLIPS
    write(videos.video_directory / "w.mp4", "a longer video")
    lines = refused(videos, rules=VIDEO_RULES)
    assert len(lines) == 3 and all("got source_bytes is 7 in the cache, 14 now" in line for line in lines)


@pytest.mark.parametrize(
    ("values", "refusals", "got"),
    [
        ({"source_fps": 24.0}, 6, "frame_rate is 30 from the file in the cache, 30 from 24.0 now"),
        ({"resolution": (80, 48)}, 6, "size is 64x64 in the cache, 80x48 now"),
        ({"target_frames": (9,)}, 2, 'a clip of 5 frames from frame 0 on, which frame_extraction = "head" with'),
        (
            {"frame_extraction": "full"},
            2,
            'a clip of 5 frames from frame 0 on, which frame_extraction = "full" with',
        ),
        (
            {"frame_extraction": "full", "max_frames": 5},
            4,
            "a clip of 9 frames from frame 0 on, which",
        ),
    ],
)
def test_clips_that_the_settings_do_not_make_are_refused(videos, values, refusals, got):
    lines = refused(changed(videos, **values), rules=VIDEO_RULES)
    assert len(lines) == refusals and all(f"got {got}" in line and line.endswith(AGAIN) for line in lines)


def test_clip_from_another_place_is_refused(videos):
    cache_clip(videos, item_of(videos, "v"), Crop(start=4, length=5))
    (line,) = refused(videos, rules=VIDEO_RULES)
    assert "v_00004-005-0000" in line and "a clip of 5 frames from frame 4 on" in line
    slide = changed(videos, frame_extraction="slide", frame_stride=4)
    assert len(names_of(slide, rules=VIDEO_RULES)) == 7


def test_sections_that_a_clip_does_not_have_are_refused(videos):
    cache_clip(videos, item_of(videos, "v"), Crop(start=0, length=5), sections=[0, 1])
    (line,) = refused(videos, rules=VIDEO_RULES)
    assert "v_00000-005-0001" in line and "got section 1, and a clip of 5 frames has 1 of them now" in line


def test_missing_clips_and_sections_are_named(videos, caplog):
    (videos.cache_directory / ALL_CLIPS[1]).unlink()
    (videos.cache_directory / ALL_CLIPS[3]).unlink()
    assert len(names_of(videos, rules=VIDEO_RULES)) == 4
    assert (
        "2 clips or sections of cached videos have no cache and are not trained: v 0-9-0, w 0-5-0; run" in caplog.text
    )


def test_clips_too_short_for_the_model_are_not_missed(videos, caplog):
    wider = video_set(videos.cache_directory.parent / "wider", ["v"], fp_latent_window_size=2)
    cache_videos(wider)
    assert names_of(wider, rules=VIDEO_RULES) == ["v_00000-009-0000_0064x0064_fp.safetensors"]
    assert caplog.text == ""


def test_wan_clips_have_no_sections(tmp_path):
    dataset = video_set(tmp_path, ["v"])
    cache_videos(dataset, WAN_RULES)
    assert names_of(dataset, rules=WAN_RULES) == [f"v_00000-00{n}_0064x0064_wan.safetensors" for n in (5, 9)]
    path = dataset.cache_directory / "v_00000-009_0064x0064_wan.safetensors"
    path.rename(path.with_name("v_00000-009-0000_0064x0064_wan.safetensors"))
    assert "got a section in its name" in refused(dataset, rules=WAN_RULES)[0]


# ---- mixed ----


def test_contents_that_only_some_files_have_are_refused(images):
    cache_image(images, item_of(images, "b"), changes={"clean_latent_2x_indices": None})
    (line,) = refused(images)
    assert line.startswith(str(images.cache_directory / ALL_IMAGES[1]))
    assert f"got clean_latent_2x_indices is missing here, present in {ALL_IMAGES[0]}; " in line
    assert line.endswith(FROM_SCRATCH)


def test_texts_of_several_encoders_are_refused(images):
    cache_text(images, item_of(images, "日本"), other_states=torch.zeros(3))
    (line,) = refused(images)
    assert "got other_states is present here, missing in a_fp_te.safetensors" in line and "cache_texts.py" in line


def test_texts_of_varying_length_and_of_fixed_length_are_not_mixed(images):
    path = cache_text(images, item_of(images, "b"))
    header = cache_files.cache_header(path)
    tensors = {key.replace("llama_vec", "varlen_llama_vec"): tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path, dict(header.metadata))
    assert "got llama_vec is of varying length here, present in a_fp_te.safetensors" in refused(images)[0]


def test_mixed_contents_of_a_videos_files_are_refused(videos):
    path = videos.cache_directory / ALL_CLIPS[4]
    header = cache_files.cache_header(path)
    save_file(load_file(path) | {"image_embeddings_float16": torch.zeros(2).half()}, path, dict(header.metadata))
    assert "image_embeddings is present here, missing in" in refused(videos, rules=VIDEO_RULES)[0]


def test_encoders_that_differ_within_a_data_set_are_refused(images):
    cache_image(images, item_of(images, "b"), vae="of another day")
    (line,) = refused(images)
    assert f"got vae is of another day here, abc in {ALL_IMAGES[0]}; " in line and line.endswith(AGAIN)


def test_data_sets_may_differ_from_each_other(images, tmp_path):
    other = image_set(tmp_path / "other", ["a"], number=2)
    cache_image(other, item_of(other, "a"), changes={"clean_latent_2x_indices": None}, vae="of another day")
    cache_text(other, item_of(other, "a"))
    assert names_of(images, other) == [*ALL_IMAGES, ALL_IMAGES[0]]


def test_two_caches_of_one_image_are_refused(tmp_path):
    dataset = image_set(tmp_path, ["a"])
    incumbent_image(dataset.cache_directory, "a", size=(100, 100))
    incumbent_image(dataset.cache_directory, "a", size=(90, 90))
    (line,) = refused(dataset)
    assert "got a second cache of the same image beside a_0090x0090_fp.safetensors" in line


def test_content_in_both_files_is_refused(images):
    for item in list_items(images).items:
        cache_text(images, item, image_embeddings=torch.zeros(2))
    assert "got image_embeddings, as in a_0100x0100_fp.safetensors" in refused(images)[0]


# ---- missing ----


def test_images_without_caches_are_named(images, caplog):
    image_set(images.cache_directory.parent, [f"x{number}" for number in range(7)])
    assert names_of(images) == ALL_IMAGES
    assert (
        "[1]: 7 of 10 images have no latent cache and are not trained: x0.png, x1.png, x2.png, x3.png, x4.png, and 2 "
        "more; run cache_latents.py --skip_existing" in caplog.text
    )


def test_latents_without_text_are_named(images, caplog):
    (images.cache_directory / "b_fp_te.safetensors").unlink()
    assert names_of(images) == [ALL_IMAGES[0], ALL_IMAGES[2]]
    assert f"1 latent caches have no text cache and are not trained: {ALL_IMAGES[1]}; run cache_texts.py" in caplog.text


def test_caches_of_vanished_sources_are_named_and_used(images, caplog):
    for name in ("b.png", "b.txt"):
        (images.image_directory / name).unlink()
    assert names_of(images) == ALL_IMAGES
    (record,) = caplog.records
    assert f"1 latent caches belong to no item of the data set and are trained all the same: {ALL_IMAGES[1]}" in (
        record.getMessage()
    )


def test_caches_of_vanished_sources_are_refused_when_settings_change(images):
    (images.image_directory / "b.png").unlink()
    assert len(refused(changed(images, fp_1f_target_index=1))) == 3


@pytest.mark.parametrize("gone", ["folder", "content"])
def test_caches_are_enough_with_one_note(images, gone, caplog):
    shutil.rmtree(images.image_directory)
    if gone == "content":
        images.image_directory.mkdir()
    assert names_of(images) == ALL_IMAGES
    (record,) = caplog.records
    assert "none of its images can be listed, so that caches are used as they are" in record.getMessage()


def test_problems_of_the_data_set_are_told(images, caplog):
    (images.control_directory / "b.png").unlink()
    names_of(images)
    text = caplog.records[0].getMessage()
    assert "1 of its files or lines cannot be used: " in text and "b.png: got 0 control images" in text


@pytest.mark.parametrize(("with_latents", "script"), [(False, "cache_latents.py"), (True, "cache_texts.py")])
def test_nothing_at_all_names_the_script(tmp_path, with_latents, script):
    dataset = image_set(tmp_path)
    if with_latents:
        cache_image(dataset, item_of(dataset, "a"))
    (line,) = refused(dataset)
    assert line.startswith(f"data.toml [datasets][1] cache_directory {dataset.cache_directory}: got ")
    assert line.endswith(f"run {script}")


# ---- without a fingerprint ----


@pytest.fixture
def incumbents(tmp_path):
    dataset = image_set(tmp_path / "他 [2]", ["a", "b"])
    for stem in "ab":
        incumbent_image(dataset.cache_directory, stem)
    return dataset


def test_incumbents_caches_are_used_with_one_warning(incumbents, tmp_path, caplog):
    second = image_set(tmp_path / "second", ["c"], number=2)
    incumbent_image(second.cache_directory, "c")
    assert len(names_of(incumbents, second)) == 3
    (record,) = caplog.records
    assert record.getMessage().startswith("6 cache files have no fingerprint")


def test_incumbents_captions_are_compared(incumbents):
    incumbent_text(incumbents.cache_directory, "b", caption="something else")
    (line,) = refused(incumbents)
    assert "b_fp_te.safetensors: got caption is 'something else' in the cache, 'caption of b' now" in line


def test_incumbents_image_sizes_are_compared(incumbents):
    lines = refused(changed(incumbents, resolution=(80, 48)))
    assert len(lines) == 2
    assert all("got size is 64x64 in the cache, 80x48 now" in line and line.endswith(FROM_SCRATCH) for line in lines)


def incumbent_clip(folder: Path, name: str, latent) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    height, width = latent
    tensors = {f"latents_1x{height}x{width}_float16": torch.zeros(16, 1, height, width).half()}
    save_file(tensors, folder / f"{name}_fp.safetensors", metadata={"architecture": "framepack"})


@pytest.mark.parametrize(
    ("name", "latent", "values", "got"),
    [
        ("v_00000-009-0000_0064x0064", (8, 8), {}, None),
        # The incumbent puts videos into buckets whatever the data set says.
        ("v_00000-009-0000_0128x0032", (4, 16), {}, None),
        ("v_00000-009-0000_0256x0016", (2, 32), {"resolution": (256, 16)}, None),  # the size itself, and no bucket
        ("v_00000-009-0000_0096x0096", (12, 12), {}, "size is 96x96 in the cache, which is no bucket of 64x64"),
        ("v_00003-009-0000_0064x0064", (8, 8), {}, "a clip of 9 frames from frame 3 on"),
        ("v_00003-009-0000_0064x0064", (8, 8), {"frame_extraction": "uniform", "frame_sample": 3}, None),
        ("v_00003-009-0000_0064x0064", (8, 8), {"frame_extraction": "slide", "frame_stride": 3}, None),
        ("v_00003-009-0000_0064x0064", (8, 8), {"frame_extraction": "slide", "frame_stride": 2}, "a clip of 9 frames"),
        ("v_00009-009-0000_0064x0064", (8, 8), {"frame_extraction": "chunk"}, None),
        ("v_00008-009-0000_0064x0064", (8, 8), {"frame_extraction": "chunk"}, "a clip of 9 frames from frame 8 on"),
        ("v_00000-013-0000_0064x0064", (8, 8), {}, "a clip of 13 frames from frame 0 on"),
        ("v_00000-013-0002_0064x0064", (8, 8), {"frame_extraction": "full"}, None),
        ("v_00000-009-0002_0064x0064", (8, 8), {}, "section 2, and a clip of 9 frames has 2 of them now, from 0 on"),
        ("v_00000-009_0064x0064", (8, 8), {}, "no section in its name"),
    ],
)
def test_incumbents_clips_are_checked_by_their_names(tmp_path, name, latent, values, got):
    dataset = video_set(tmp_path, ["v"], **values)
    incumbent_clip(dataset.cache_directory, name, latent)
    incumbent_text(dataset.cache_directory, "v")
    if got is None:
        assert len(names_of(dataset, rules=VIDEO_RULES)) == 1
    else:
        (line,) = refused(dataset, rules=VIDEO_RULES)
        assert f"got {got}" in line


def test_missing_sections_of_incumbents_clips_are_named(tmp_path, caplog):
    dataset = video_set(tmp_path, ["v"])
    incumbent_clip(dataset.cache_directory, "v_00000-009-0001_0064x0064", (8, 8))
    incumbent_text(dataset.cache_directory, "v")
    names_of(dataset, rules=VIDEO_RULES)
    assert "1 clips or sections of cached videos have no cache and are not trained: v 0-9-0; run" in caplog.text


class RulesWithComplaint(Rules):
    """Refuses what does not stand where the data set says; only the incumbent's files may be asked about."""

    def complaint(self, header, indices, dataset):
        assert header.fingerprint is None
        assert set(indices) == {name for name in header.keys if name.endswith("_indices")}
        found = indices["latent_indices"].item()
        now = dataset.fp_1f_target_index
        return None if found == now else f"target_index is {found} in the cache, {now} now"


def test_rules_tell_what_the_incumbents_tensors_contradict(images):
    rules = RulesWithComplaint()
    incumbent_image(images.cache_directory, "b")
    assert names_of(images, rules=rules) == ALL_IMAGES
    lines = refused(changed(images, fp_1f_target_index=1), rules=rules)
    assert all("got target_index is 9 in the cache, 1 now" in line for line in lines)
    assert [line.endswith(FROM_SCRATCH) for line in lines] == [False, True, False]


def test_a_file_without_latents_is_refused(incumbents):
    incumbent_text(incumbents.cache_directory, "a")
    path = incumbents.cache_directory / "a_0100x0100_fp.safetensors"
    shutil.copy(incumbents.cache_directory / "a_fp_te.safetensors", path)
    assert "got no latents of shape (C, F, h, w) in it" in refused(incumbents)[0]
