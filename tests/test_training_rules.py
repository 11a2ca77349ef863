"""Which FramePack caches a training accepts: it knows the data set, but not the flags of the script that cached it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dataset.cache_files import cache_header, read_cache, write_cache
from dataset.cached_items import find_cached_items
from dataset.config import DatasetConfig, ImageDataset, VideoDataset
from dataset.crops import Crop
from dataset.sources import list_items
from frame_pack.architecture import FramePackArchitecture
from frame_pack.cached_context import clip_contexts, to_cache
from frame_pack.caching import FramePackCacheRules
from frame_pack.context import one_frame_context
from frame_pack.training_rules import FramePackTrainingRules
from options.errors import UserError
from tests.train_caches import cache_clip, cache_image, cache_text, image_set, video_set

RULES = FramePackTrainingRules()
WINDOW, SIDE = 9, 8
SCRIPT = "fpack_cache_latents.py"
Rewrite = Callable[[Path], None]


def names_of(*datasets: ImageDataset | VideoDataset) -> list[str]:
    """The caches that are trained."""
    config = DatasetConfig(datasets=datasets)
    for dataset in datasets:
        RULES.check(dataset)
    return [item.latents.name for item in find_cached_items(config, RULES, FramePackArchitecture.scripts)]


def refused(dataset: ImageDataset | VideoDataset) -> list[str]:
    """The lines of the error."""
    with pytest.raises(UserError) as caught:
        names_of(dataset)
    return str(caught.value).split("\n")


def keep(path: Path) -> None:
    """Ours: with a fingerprint."""


def make_incumbents(path: Path) -> None:
    """The same tensors in a file that tells nothing of how it was made: plain safetensors, keys by the facts."""
    contents, tensors = read_cache(path), {}
    shape = "x".join(map(str, contents["latents"].shape[1:]))
    for name, tensor in contents.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        tensors[f"{name}_{shape}_{dtype}" if name.startswith("latents") else f"{name}_{dtype}"] = tensor
    save_file(tensors, path, metadata={"architecture": "framepack", "format_version": "1.0.1"})


MAKERS = pytest.mark.parametrize("rewrite", [keep, make_incumbents], ids=["ours", "the incumbent's"])


# ---- one frame ----


def images(folder: Path, rules: FramePackCacheRules, rewrite: Rewrite = keep, **changes) -> ImageDataset:
    """Two images, cached as the caching script would with these rules."""
    keys = {"fp_1f_target_index": 9, "fp_1f_clean_indices": (0,), "fp_latent_window_size": WINDOW} | changes
    dataset = image_set(folder / "写真", ["a", "猫"], **keys)
    for item in list_items(dataset).items:
        cache_one(dataset, item, rules, rewrite)
        cache_text(dataset, item, rules)
    return dataset


def cache_one(dataset: ImageDataset, item, rules: FramePackCacheRules, rewrite: Rewrite = keep) -> None:
    options = rules.one_frame_options(dataset)
    latent = torch.ones(1, 16, 1, SIDE, SIDE)
    context = one_frame_context([latent], [None], options, window=rules.window_of(dataset), like=latent)
    tensors = to_cache(latent, context, torch.zeros(7, 5), with_history=False)
    left_out = dict.fromkeys(("clean_latent_2x_indices", "clean_latent_4x_indices"))
    rewrite(cache_image(dataset, item, rules, changes=left_out | tensors))


def one_frame(**options) -> FramePackCacheRules:
    return FramePackCacheRules(mode="one_frame", **options)


BOTH = ["a_0100x0100_fp.safetensors", "猫_0100x0100_fp.safetensors"]


@MAKERS
@pytest.mark.parametrize(("no_2x", "no_4x", "no_post"), list(product([False, True], repeat=3)))
def test_images_are_trained_with_whatever_histories_they_were_cached_with(
    no_2x: bool, no_4x: bool, no_post: bool, rewrite: Rewrite, tmp_path: Path
) -> None:
    rules = one_frame(no_2x=no_2x, no_4x=no_4x)
    assert names_of(images(tmp_path, rules, rewrite, fp_1f_no_post=no_post)) == BOTH


@MAKERS
@pytest.mark.parametrize("histories", [{}, {"no_2x": True, "no_4x": True}], ids=["histories", "none"])
@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"fp_1f_target_index": 1}, "target_index is 9 in the cache, 1 now"),
        ({"fp_1f_clean_indices": (10,)}, "control_indices is 0 in the cache, 10 now"),
        ({"fp_1f_no_post": True}, "no_post is no in the cache, yes now"),
        ({"fp_latent_window_size": 4}, "window is 9 in the cache, 4 now"),
    ],
)
def test_images_that_were_cached_otherwise_are_refused_and_the_setting_is_named(
    changes: dict, got: str, histories: dict, rewrite: Rewrite, tmp_path: Path
) -> None:
    dataset = images(tmp_path, one_frame(**histories), rewrite)
    lines = refused(replace(dataset, **changes))
    assert len(lines) == 2 and all(got in line and f"run {SCRIPT}" in line for line in lines)


@pytest.mark.parametrize("no_post", [False, True])
def test_the_window_does_not_matter_to_images_that_have_nothing_behind_it(no_post: bool, tmp_path: Path) -> None:
    dataset = images(tmp_path, one_frame(no_2x=True, no_4x=True), fp_1f_no_post=no_post)
    other = replace(dataset, fp_latent_window_size=4)
    assert names_of(other) == BOTH if no_post else "window is 9" in refused(other)[0]


def test_the_image_that_siglip_looks_at_is_known_of_our_caches_only(tmp_path: Path) -> None:
    dataset = images(tmp_path, one_frame())
    changed = replace(dataset, fp_1f_image_embedding_source="target")
    assert all("image_embedding_source is control 0 in the cache, target now" in line for line in refused(changed))
    for path in dataset.cache_directory.glob("*x*_fp.safetensors"):
        make_incumbents(path)
    assert names_of(changed) == BOTH, "no tensor tells"


@MAKERS
@pytest.mark.parametrize("other", [{"no_2x": True}, {"no_4x": True}, {"no_2x": True, "no_4x": True}], ids=str)
def test_images_with_unequal_histories_are_not_trained_together(other: dict, rewrite: Rewrite, tmp_path: Path) -> None:
    dataset = images(tmp_path, one_frame(), rewrite)
    cache_one(dataset, list_items(dataset).items[-1], one_frame(**other), rewrite)
    (line,) = refused(dataset)
    assert line.startswith(str(dataset.cache_directory)) and "expected caches that were made alike" in line
    assert any(name in line for name in ("no_2x is", "no_4x is", "clean_latent_2x_indices is", "clean_latent_4x_"))


def test_data_sets_of_one_file_may_have_unequal_histories(tmp_path: Path) -> None:
    first = images(tmp_path / "1", one_frame())
    second = images(tmp_path / "2", one_frame(no_2x=True, no_4x=True), number=2)
    assert names_of(first, second) == BOTH * 2


# ---- sections ----


def videos(folder: Path, *modes: str, rewrites: tuple[Rewrite, Rewrite] = (keep, keep), **changes) -> VideoDataset:
    """Two videos of two sections each; each is cached in its own mode."""
    keys = {"fp_latent_window_size": 1, "target_frames": (9,)} | changes
    dataset = video_set(folder / "動画", ["a", "猫"], **keys)
    modes = modes * 2 if len(modes) == 1 else modes
    for item, mode, rewrite in zip(list_items(dataset).items, modes, rewrites, strict=True):
        rules = FramePackCacheRules(mode=mode)
        cache_clip(dataset, item, Crop(start=0, length=9), rules)
        cache_text(dataset, item, rules)
        paths = sorted(dataset.cache_directory.glob(f"{item.stem}_*-*_fp.safetensors"))
        clip = torch.ones(1, 16, 3, SIDE, SIDE)
        contexts = clip_contexts(clip, window=1, f1=mode == "f1")
        assert len(paths) == len(contexts) == 2
        for path, context in zip(paths, contexts, strict=True):
            fill(path, to_cache(clip[:, :, :1], context, torch.zeros(7, 5), with_history=True))
            rewrite(path)
    return dataset


def fill(path: Path, tensors: dict) -> None:
    """Gives a cache the tensors of a section, and leaves it its metadata."""
    metadata = dict(cache_header(path).metadata)
    path.unlink()
    write_cache(path, tensors, main="latents", metadata=metadata)


ALL_SECTIONS = [f"{stem}_00000-009-{number:04d}_0064x0064_fp.safetensors" for stem in "a猫" for number in (0, 1)]


@MAKERS
@pytest.mark.parametrize("mode", ["sections", "f1"])
def test_sections_are_trained_in_whichever_direction_they_were_cached(
    mode: str, rewrite: Rewrite, tmp_path: Path
) -> None:
    assert names_of(videos(tmp_path, mode, rewrites=(rewrite, rewrite))) == ALL_SECTIONS


@pytest.mark.parametrize(
    "rewrites",
    [(keep, keep), (make_incumbents, make_incumbents), (keep, make_incumbents)],
    ids=["ours", "the incumbent's", "both"],
)
def test_sections_of_both_directions_are_not_trained_together(rewrites: tuple, tmp_path: Path) -> None:
    lines = refused(videos(tmp_path, "sections", "f1", rewrites=rewrites))
    assert any("mode is" in line and "expected caches that were made alike" in line for line in lines)


@MAKERS
def test_sections_of_another_window_are_refused(rewrite: Rewrite, tmp_path: Path) -> None:
    dataset = videos(tmp_path, "sections", rewrites=(rewrite, rewrite))
    lines = refused(replace(dataset, fp_latent_window_size=2))
    assert any("window is 1 in the cache, 2 now" in line for line in lines)


# ---- data sets ----


def test_what_caching_would_refuse_is_refused_before_caches_are_looked_at(tmp_path: Path) -> None:
    dataset = images(tmp_path, one_frame())
    assert "fp_1f_target_index: got nothing" in refused(replace(dataset, fp_1f_target_index=None))[0]
    short = video_set(tmp_path, ["v"], target_frames=(5,), fp_latent_window_size=9)
    assert "target_frames: got 5; expected at least 37 frames" in refused(short)[0]


def test_an_image_without_its_control_is_not_taken_for_a_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = replace(images(tmp_path, one_frame()), fp_1f_clean_indices=(0, 10))
    (line, _) = refused(dataset)
    assert "control_indices is 0 in the cache, 0;10 now" in line
    assert "got 1 control images" in caplog.text
