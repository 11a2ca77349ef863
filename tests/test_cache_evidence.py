"""Caches without a fingerprint: what their tensors tell about the settings that made them."""

from itertools import product
from pathlib import Path

import pytest
import torch

from dataset.cache_files import CacheHeader
from dataset.config import ImageDataset, VideoDataset
from frame_pack.cached_context import clip_contexts, to_cache
from frame_pack.caching import FramePackCacheRules
from frame_pack.context import one_frame_context

LATENT = torch.ones(1, 16, 1, 4, 6)
FEATURES = torch.zeros(729, 8)


def header_of(tensors):
    nothing = {name: name for name in tensors}
    return CacheHeader(keys=nothing, dtypes=nothing, shapes=nothing, metadata={})


def indices_of(tensors):
    return {name: tensor for name, tensor in tensors.items() if name.endswith("_indices")}


def images(**keys):
    values = {"fp_1f_clean_indices": (0, 10), "fp_1f_target_index": 1} | keys
    return ImageDataset(where="data.toml [datasets][1]", cache_directory=Path("cache"), **values)


def one_frame(rules, dataset):
    options = rules.one_frame_options(dataset)
    count = len(options.control_indices)
    context = one_frame_context([LATENT] * count, [None] * count, options, window=rules.window_of(dataset), like=LATENT)
    return to_cache(LATENT, context, FEATURES, with_history=False)


def section(dataset, *, f1, number):
    window = dataset.fp_latent_window_size
    clip = torch.ones(1, 16, 1 + 3 * window, 4, 6)
    context = clip_contexts(clip, window=window, f1=f1)[number]
    return to_cache(clip[:, :, 1 : 1 + window], context, FEATURES, with_history=True)


def videos(window=9):
    return VideoDataset(where="data.toml [datasets][1]", cache_directory=Path("cache"), fp_latent_window_size=window)


@pytest.mark.parametrize(("no_2x", "no_4x", "no_post"), list(product([False, True], repeat=3)))
def test_one_frame_file_of_the_same_settings_is_accepted(no_2x, no_4x, no_post):
    rules = FramePackCacheRules(mode="one_frame", no_2x=no_2x, no_4x=no_4x)
    dataset = images(fp_1f_no_post=no_post)
    tensors = one_frame(rules, dataset)
    assert rules.complaint(header_of(tensors), indices_of(tensors), dataset) is None


@pytest.mark.parametrize(
    ("rule_changes", "key_changes", "complaint"),
    [
        ({}, {"fp_1f_target_index": 9}, "target_index is 1 in the cache, 9 now"),
        ({}, {"fp_1f_clean_indices": (0, 13)}, "control_indices is 0;10 in the cache, 0;13 now"),
        ({}, {"fp_1f_no_post": True}, "no_post is no in the cache, yes now"),
        ({"no_2x": True}, {}, "no_2x is no in the cache, yes now"),
        ({"no_4x": True}, {}, "no_4x is no in the cache, yes now"),
        ({"window": 4}, {}, "window is 9 in the cache, 4 now"),
        ({}, {"fp_1f_clean_indices": (0,)}, "control_indices is 0;10 in the cache, 0 now"),
    ],
)
def test_one_frame_file_of_other_settings_is_refused(rule_changes, key_changes, complaint):
    tensors = one_frame(FramePackCacheRules(mode="one_frame"), images())
    rules = FramePackCacheRules(mode="one_frame", **rule_changes)
    assert rules.complaint(header_of(tensors), indices_of(tensors), images(**key_changes)) == complaint


@pytest.mark.parametrize("no_post", [False, True])
@pytest.mark.parametrize(("no_2x", "no_4x"), [(True, False), (False, True)])
def test_window_is_told_by_whichever_group_is_there(no_post, no_2x, no_4x):
    rules, dataset = FramePackCacheRules(mode="one_frame", no_2x=no_2x, no_4x=no_4x), images(fp_1f_no_post=no_post)
    tensors = one_frame(rules, dataset)
    other = FramePackCacheRules(mode="one_frame", no_2x=no_2x, no_4x=no_4x, window=5)
    assert rules.complaint(header_of(tensors), indices_of(tensors), dataset) is None
    assert "window is 9" in other.complaint(header_of(tensors), indices_of(tensors), dataset)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("window", [1, 9, 19, 20])
@pytest.mark.parametrize("f1", [False, True])
def test_sections_of_both_kinds_are_told_apart(f1, window, number):
    dataset = videos(window)
    tensors = section(dataset, f1=f1, number=number)
    mine, other = ("f1", "sections") if f1 else ("sections", "f1")
    assert FramePackCacheRules(mode=mine).complaint(header_of(tensors), indices_of(tensors), dataset) is None
    said = FramePackCacheRules(mode=other).complaint(header_of(tensors), indices_of(tensors), dataset)
    assert said == f"mode is {mine} in the cache, {other} now"


def test_other_window_of_sections_is_refused():
    tensors = section(videos(9), f1=False, number=1)
    said = FramePackCacheRules(mode="sections").complaint(header_of(tensors), indices_of(tensors), videos(5))
    assert said == "window is 9 in the cache, 5 now"


def test_one_frame_file_is_no_section_and_the_other_way_round():
    rules = FramePackCacheRules(mode="one_frame")
    frame, clip = one_frame(rules, images()), section(videos(), f1=False, number=0)
    assert "mode is sections" in rules.complaint(header_of(clip), indices_of(clip), images())
    sections = FramePackCacheRules(mode="sections")
    assert "mode is one_frame" in sections.complaint(header_of(frame), indices_of(frame), videos())
