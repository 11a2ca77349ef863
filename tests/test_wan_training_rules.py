"""Which Wan caches a training accepts: it knows the data set and the task, but not the flags of the caching script."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dataset.cache_files import cache_header, read_cache, write_cache
from dataset.cached_items import CachingScripts, find_cached_items
from dataset.config import DatasetConfig, ImageDataset, VideoDataset
from dataset.crops import Crop
from dataset.sources import list_items
from options.errors import UserError
from options.wan_tasks import TASKS, find_task
from tests.train_caches import cache_clip, cache_image, cache_text, image_set, video_set
from wan.cached_context import to_cache
from wan.caching import WanCacheRules, one_frame_options
from wan.context import arranged, image_context, one_frame_context
from wan.training_rules import WanTrainingRules, needed_contents

SIDE = 8
SCRIPTS = CachingScripts(latents="wan_cache_latents.py", texts="wan_cache_text_encoder_outputs.py")
Rewrite = Callable[[Path], None]


def keep(path: Path) -> None:
    """Ours: with a fingerprint."""


def make_incumbents(path: Path) -> None:
    """The same tensors in a file that tells nothing of how it was made: plain safetensors, keys by the facts."""
    contents = read_cache(path)
    shape = "x".join(map(str, contents["latents"].shape[1:]))
    tensors = {}
    for name, tensor in contents.items():
        if name != "clip_indices":
            dtype = "int32" if name == "f_indices" else "bfloat16"
            tensors[f"{name}_{shape}_{dtype}" if name.startswith("latents") else f"{name}_{dtype}"] = tensor
    save_file(tensors, path, metadata={"architecture": "wan", "format_version": "1.0.1"})


MAKERS = pytest.mark.parametrize("rewrite", [keep, make_incumbents], ids=["ours", "the incumbent's"])


def latents(num_frames: int) -> torch.Tensor:
    return torch.ones(1, 16, num_frames, SIDE, SIDE)


def tensors_of(mode: str, num_frames: int) -> dict:
    features = {"t2v": None, "i2v": torch.zeros(257, 8), "flf2v": torch.zeros(2, 257, 8)}[mode]
    context = None if mode == "t2v" else image_context(latents(num_frames), shows_end=mode == "flf2v")
    return to_cache(latents(num_frames), context, features=features)


def one_frame_tensors(dataset: ImageDataset) -> dict:
    options = one_frame_options(dataset)
    count = len(options.control_indices)
    context = one_frame_context([latents(1)] * count, [None] * count, options, grey=latents(1))
    clean = arranged([latents(1)] * count, latents(1), options)
    features = torch.zeros(count, 257, 8)
    return to_cache(clean, context, features=features, feature_indices=options.control_indices)


def cached_images(folder: Path, mode: str, rewrite: Rewrite = keep, **changes) -> ImageDataset:
    """Two images, cached as the script would."""
    dataset = image_set(
        folder / "写真", ["a", "猫"], **{"fp_1f_clean_indices": (0,), "fp_1f_target_index": 1} | changes
    )
    rules = WanCacheRules(mode=mode)
    for number in range(1, dataset.num_controls):
        for stem in ("a", "猫"):
            (dataset.control_directory / f"{stem}_{number}.png").write_text("x", encoding="utf-8")
    for item in list_items(dataset).items:
        made = one_frame_tensors(dataset) if mode == "one_frame" else tensors_of(mode, 1)
        nothing = dict.fromkeys(("latent_indices", "latents_clean", "clean_latent_indices", "clean_latent_2x_indices"))
        rewrite(cache_image(dataset, item, rules, changes=nothing | {"image_embeddings": None} | made))
        cache_text(dataset, item, rules)
    return dataset


def cached_videos(folder: Path, mode: str, rewrite: Rewrite = keep, **changes) -> VideoDataset:
    dataset = video_set(folder / "動画", ["a", "猫"], **{"target_frames": (5,)} | changes)
    rules = WanCacheRules(mode=mode)
    for item in list_items(dataset).items:
        cache_clip(dataset, item, Crop(start=0, length=5), rules)
        cache_text(dataset, item, rules)
    for path in dataset.cache_directory.glob("*x*_wan.safetensors"):
        metadata = dict(cache_header(path).metadata)
        path.unlink()
        write_cache(path, tensors_of(mode, 2), main="latents", metadata=metadata)
        rewrite(path)
    return dataset


def names_of(dataset: ImageDataset | VideoDataset, task: str) -> list[str]:
    rules = WanTrainingRules.of_task(find_task(task))
    rules.check(dataset)
    return [item.latents.name for item in find_cached_items(DatasetConfig(datasets=(dataset,)), rules, SCRIPTS)]


def refused(dataset: ImageDataset | VideoDataset, task: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        names_of(dataset, task)
    return str(caught.value).split("\n")


PICTURES = ["a_0100x0100_wan.safetensors", "猫_0100x0100_wan.safetensors"]
CLIPS = ["a_00000-005_0064x0064_wan.safetensors", "猫_00000-005_0064x0064_wan.safetensors"]


@pytest.mark.parametrize(
    ("task", "fitting"),
    [
        ("t2v-1.3B", {"t2v", "i2v", "flf2v"}),
        ("t2i-14B", {"t2v", "i2v", "flf2v"}),
        ("i2v-14B", {"i2v"}),
        ("flf2v-14B", {"flf2v"}),
        ("t2v-14B-FC", {"t2v", "i2v", "flf2v"}),
        ("i2v-14B-FC", {"i2v", "flf2v"}),
    ],
)
@pytest.mark.parametrize("mode", ["t2v", "i2v", "flf2v"])
def test_a_task_is_trained_on_caches_that_show_what_it_is_shown(
    task: str, fitting: set[str], mode: str, tmp_path: Path
) -> None:
    dataset = cached_videos(tmp_path, mode)
    if mode in fitting:
        assert names_of(dataset, task) == CLIPS
        return
    for line in refused(dataset, task):
        wanted = "flf2v" if task.startswith("flf2v") else "i2v"
        assert f"mode is {mode} in the cache, {wanted} now" in line and "run wan_cache_latents.py" in line


@pytest.mark.parametrize("mode", ["t2v", "i2v"])
def test_the_incumbents_clips_are_judged_alike(mode: str, tmp_path: Path) -> None:
    dataset = cached_videos(tmp_path, mode, make_incumbents)
    assert names_of(dataset, "t2v-1.3B") == CLIPS
    assert "mode is" in refused(dataset, "flf2v-14B")[0]
    if mode == "i2v":
        assert names_of(dataset, "i2v-14B") == CLIPS
    else:
        assert "mode is t2v in the cache, i2v now" in refused(dataset, "i2v-14B")[0]


@MAKERS
@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B"])
@pytest.mark.parametrize("indices", [(0,), (0, 2)])
def test_one_frame_caches_serve_both_kinds_of_image_models(
    task: str, indices: tuple[int, ...], rewrite: Rewrite, tmp_path: Path
) -> None:
    dataset = cached_images(tmp_path, "one_frame", rewrite, fp_1f_clean_indices=indices)
    assert names_of(dataset, task) == PICTURES


@MAKERS
def test_one_frame_caches_are_nothing_for_text_to_video(rewrite: Rewrite, tmp_path: Path) -> None:
    lines = refused(cached_images(tmp_path, "one_frame", rewrite), "t2v-14B")
    assert len(lines) == 2 and all("mode is one_frame in the cache, t2v now" in line for line in lines)


@MAKERS
@pytest.mark.parametrize(
    ("changes", "ours", "theirs"),
    [
        ({"fp_1f_target_index": 2}, "target_index is 1 in the cache, 2 now", "f_indices is 0;1 in the cache, 0;2 now"),
        (
            {"fp_1f_clean_indices": (5,)},
            "control_indices is 0 in the cache, 5",
            "f_indices is 0;1 in the cache, 1;5 now",
        ),
        ({"fp_1f_target_index": None}, "target_index is 1 in the cache, noth", "f_indices is 0;1 in the cache, 0 now"),
    ],
)
def test_pictures_that_were_cached_otherwise_are_refused_and_the_setting_is_named(
    changes: dict, ours: str, theirs: str, rewrite: Rewrite, tmp_path: Path
) -> None:
    dataset = cached_images(tmp_path, "one_frame", rewrite)
    lines = refused(replace(dataset, **changes), "i2v-14B")
    assert len(lines) == 2 and all((ours if rewrite is keep else theirs) in line for line in lines)


def test_unsorted_controls_are_right_in_our_caches_and_wrong_in_the_incumbents(tmp_path: Path) -> None:
    dataset = cached_images(tmp_path, "one_frame", fp_1f_clean_indices=(2, 0))
    assert names_of(dataset, "flf2v-14B") == PICTURES
    for path in dataset.cache_directory.glob("*x*_wan.safetensors"):
        make_incumbents(path)
    lines = refused(dataset, "flf2v-14B")
    assert len(lines) == 2 and all("control_indices is 0;2 in the cache, 2;0 now" in line for line in lines)


def test_a_source_of_features_is_known_of_our_caches_only(tmp_path: Path) -> None:
    dataset = cached_images(tmp_path, "one_frame")
    changed = replace(dataset, fp_1f_image_embedding_source="target")
    expected = "image_embedding_source is controls in the cache, target now"
    assert all(expected in line for line in refused(changed, "i2v-14B"))
    for path in dataset.cache_directory.glob("*x*_wan.safetensors"):
        make_incumbents(path)
    assert names_of(changed, "i2v-14B") == PICTURES, "no tensor tells"


@MAKERS
def test_pictures_are_trained_without_controls(rewrite: Rewrite, tmp_path: Path) -> None:
    plain = {"fp_1f_target_index": None, "fp_1f_clean_indices": None, "control_directory": None}
    assert names_of(cached_images(tmp_path, "t2v", rewrite, **plain), "t2i-14B") == PICTURES


@MAKERS
def test_caches_of_several_modes_are_not_trained_together(rewrite: Rewrite, tmp_path: Path) -> None:
    dataset = cached_videos(tmp_path, "i2v", rewrite)
    other = cached_videos(tmp_path / "other", "t2v", rewrite)
    (other.cache_directory / CLIPS[0]).replace(dataset.cache_directory / CLIPS[0])
    (line,) = refused(dataset, "t2v-1.3B")
    assert "expected caches that were made alike" in line


def test_what_caching_would_refuse_is_refused_before_caches_are_looked_at(tmp_path: Path) -> None:
    dataset = cached_images(tmp_path, "one_frame")
    assert "target_index=1 and a control" in refused(replace(dataset, fp_1f_clean_indices=(1,)), "i2v-14B")[0]
    short = video_set(tmp_path, ["v"], target_frames=(1,))
    assert "target_frames: got 1; expected at least 5 frames" in refused(short, "flf2v-14B")[0]


def test_clips_that_flf2v_cannot_have_are_not_missed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = cached_videos(tmp_path, "flf2v", target_frames=(1, 5))
    with caplog.at_level(logging.WARNING):
        assert names_of(dataset, "flf2v-14B") == CLIPS
    assert caplog.text == ""
    names_of(dataset, "t2v-1.3B")
    assert "2 clips or sections of cached videos have no cache" in caplog.text


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_what_a_task_needs_is_what_its_caches_hold(task) -> None:
    needed = set(needed_contents(task))
    assert {"latents", "t5"} <= needed
    mode = WanTrainingRules.of_task(task).modes[0]
    held = set(tensors_of(mode, 2)) | {"t5"} | ({"latents_control"} if task.kind == "fun_control" else set())
    assert needed == held
