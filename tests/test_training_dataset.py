"""Training batches: what the caches hold, stacked by the facts; the same with workers and after a restart."""

import gc
import json
import logging
import random
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.processes import Processes
from dataset.cached_items import CachedItem
from dataset.caching import CachingOptions
from dataset.config import load_dataset_config
from dataset.epochs import ItemKey, Position
from dataset.sources import list_items
from dataset.text_caching import cache_texts
from dataset.training_dataset import BatchLoader, TrainingDataset
from frame_pack.caching import FramePackCacheRules
from options.errors import UserError
from tests import cache_builders
from tests.train_caches import (
    SCRIPTS,
    VIDEO_RULES,
    WAN_RULES,
    cache_image,
    cache_images,
    cache_text,
    cache_videos,
    collate_by_the_facts,
    equal,
    image_set,
    incumbent_image,
    training_set,
    video_set,
)


@pytest.fixture
def two_sets(tmp_path):
    """Seven images of two sizes in pairs, and three more, twice each."""
    first = image_set(tmp_path / "写真 [1]", "abcdefg", batch_size=2, enable_bucket=True)
    cache_images(first, sizes={"b": (200, 50), "d": (200, 50), "g": (200, 50)})
    second = image_set(tmp_path / "second", "pqr", number=2, batch_size=4, num_repeats=2)
    cache_images(second)
    return training_set(first, second), (first, second)


START = Position()


def epoch(dataset, start=START, *, seed=3, **how):
    return list(BatchLoader(dataset, seed=seed, **how).epoch(start))


def paths_of(batch, datasets, arch="fp"):
    """(latent file, text file) of each item, by the facts' names."""
    for key in batch.items:
        folder = datasets[key.dataset].cache_directory
        yield folder / key.name, folder / f"{key.name.rsplit('_', 2)[0]}_{arch}_te.safetensors"


def assert_same(batches, others):
    assert [batch.items for batch in batches] == [batch.items for batch in others]
    assert [batch.after for batch in batches] == [batch.after for batch in others]
    assert all(equal(one.contents, other.contents) for one, other in zip(batches, others, strict=True))


# ---- batches ----


def test_batches_are_what_the_facts_collate_from_our_files(two_sets):
    dataset, config = two_sets
    batches = epoch(dataset)
    assert all(equal(batch.contents, collate_by_the_facts(paths_of(batch, config))) for batch in batches)
    assert {len(batch.items) for batch in batches} == {1, 2, 4}
    assert {"latents", "latents_clean", "clean_latent_2x_indices", "llama_attention_mask"} < batches[0].contents.keys()


def test_batches_are_what_the_facts_collate_from_the_incumbents_files(tmp_path):
    dataset = image_set(tmp_path / "[日本]", ["a", "a_1", "v1.5"], batch_size=3)
    for item in list_items(dataset).items:
        incumbent_image(dataset.cache_directory, item.stem)
    (batch,) = epoch(training_set(dataset))
    assert equal(batch.contents, collate_by_the_facts(paths_of(batch, [dataset])))
    assert batch.contents["latents"].shape == (3, 16, 1, 8, 8) and batch.contents["latents"].dtype == torch.float16
    assert batch.contents["llama_attention_mask"].dtype == torch.bool


def test_contents_of_varying_length_stay_lists(tmp_path):
    dataset = image_set(tmp_path, ["a", "b"], batch_size=2)
    dataset.cache_directory.mkdir()
    for length, stem in enumerate("ab", start=3):
        latents = {
            "latents_2x8x8_bfloat16": torch.full((16, 2, 8, 8), length).bfloat16(),
            "clip_bfloat16": torch.full((1, 257, 6), length).half(),
            "f_indices_int32": torch.tensor([0, length]).int(),
        }
        text = {"varlen_t5_bfloat16": torch.full((length, 4), length).bfloat16()}
        for name, tensors in ((f"{stem}_0100x0100_wan", latents), (f"{stem}_wan_te", text)):
            metadata = {"architecture": "wan", "caption1": f"caption of {stem}"}
            save_file(tensors, dataset.cache_directory / f"{name}.safetensors", metadata=metadata)
    (batch,) = epoch(training_set(dataset, rules=WAN_RULES))
    assert equal(batch.contents, collate_by_the_facts(paths_of(batch, [dataset], "wan")))
    assert sorted(len(t5) for t5 in batch.contents["t5"]) == [3, 4]
    assert batch.contents["clip"].dtype == torch.float16 and batch.contents["f_indices"].shape == (2, 2)


def test_each_item_is_shown_as_often_as_it_is_repeated_and_each_time_by_another_key(two_sets):
    dataset, _ = two_sets
    keys = Counter(key for batch in epoch(dataset) for key in batch.items)
    assert set(keys.values()) == {1} and dataset.num_items == len(keys) == 7 + 3 * 2
    assert ItemKey(dataset=1, name="q_0100x0100_fp.safetensors", repeat=1) in keys


def test_batches_hold_one_shape_of_one_data_set_and_none_is_dropped(two_sets):
    dataset, _ = two_sets
    batches = epoch(dataset)
    # 4 and 3 images in twos; three images twice in fours
    assert sorted(len(batch.items) for batch in batches) == [1, 2, 2, 2, 2, 4]
    assert len(batches) == dataset.num_batches == 6
    assert all(len({key.dataset for key in batch.items}) == 1 for batch in batches)
    assert {batch.contents["latents"].shape[2:] for batch in batches} == {(1, 8, 8), (1, 4, 16)}


def test_rows_are_those_of_the_keys(two_sets):
    dataset, config = two_sets
    for batch in epoch(dataset):
        for row, (latents, text) in enumerate(paths_of(batch, config)):
            stored = next(t for key, t in load_file(latents).items() if key.startswith("latents_1x"))
            assert torch.equal(batch.contents["latents"][row], stored)
            assert torch.equal(batch.contents["llama_vec"][row], load_file(text)["llama_vec_float16"])


def test_any_difference_in_shape_or_type_makes_another_bucket(tmp_path):
    dataset = image_set(tmp_path, "abcd", batch_size=4)
    changes = {
        "b": {"image_embeddings": torch.zeros(8, 5).half()},
        "c": {"clean_latent_indices": torch.tensor([0, 1, 10])},
        "d": {"image_embeddings": torch.zeros(7, 5)},
    }
    for item in list_items(dataset).items:
        cache_image(dataset, item, changes=changes.get(item.stem, {}))
        cache_text(dataset, item)
    # The key of the first says float16 as the main latent is: the type that counts is the tensor's own.
    assert [len(batch.items) for batch in epoch(training_set(dataset))] == [1, 1, 1, 1]


def test_sections_of_a_video_are_items_that_share_a_text(tmp_path):
    dataset = video_set(tmp_path, ["動画 [1]"])
    cache_videos(dataset)
    batches = epoch(training_set(dataset, rules=VIDEO_RULES))
    names = sorted(batch.items[0].name for batch in batches)
    clips = ("00000-005-0000", "00000-009-0000", "00000-009-0001")
    assert names == [f"動画 [1]_{clip}_0064x0064_fp.safetensors" for clip in clips]
    assert all("llama_vec" in batch.contents for batch in batches)


def test_summary_counts_items_repeats_and_buckets(two_sets):
    dataset, _ = two_sets
    assert dataset.summary() == [
        "data.toml [datasets][1]: 7 items, 4 batches of up to 2",
        "  buckets (width x height x latent frames: items): 128x32x1: 3, 64x64x1: 4",
        "data.toml [datasets][2]: 3 items x 2 repeats, 2 batches of up to 4",
        "  buckets (width x height x latent frames: items): 64x64x1: 3",
    ]


def test_keys_spell_a_name_alike_on_every_system(tmp_path):
    item = CachedItem(dataset=0, latents=tmp_path / "cafe\u0301_0064x0064_fp.safetensors", text=tmp_path, layout=None)
    assert item.name == "café_0064x0064_fp.safetensors"


# ---- positions, epochs ----


def test_training_that_was_killed_goes_on_with_exactly_the_remaining_batches(two_sets):
    dataset, (first, second) = two_sets
    whole = [batch for number in range(2) for batch in epoch(dataset, Position(epoch=number))]
    for done in range(1, len(whole)):
        saved = json.dumps(whole[done - 1].after.as_dict())
        fresh = training_set(first, second)
        position = Position.from_dict(json.loads(saved))
        rest = epoch(fresh, position)
        if position.epoch == 0:
            rest += epoch(fresh, Position(epoch=1))
        assert_same(rest, whole[done:])


def test_a_position_in_other_data_is_an_error(two_sets):
    with pytest.raises(ValueError, match="batch=6.* in an epoch of 6 batches"):
        epoch(two_sets[0], Position(batch=6))


# ---- processes ----


def test_processes_share_an_epoch(two_sets, caplog):
    dataset, _ = two_sets
    whole = epoch(dataset)
    with caplog.at_level(logging.WARNING):
        shares = [epoch(dataset, rank=rank, world=4) for rank in range(4)]
    assert [batch.items for step in zip(*shares, strict=True) for batch in step] == [
        batch.items for batch in [*whole, *whole[:2]]
    ]
    assert BatchLoader(dataset, seed=0, world=4).num_batches == 2
    assert "6 batches for 4 processes: 2 at the beginning of an epoch are trained again at its end" in caplog.text


def test_nothing_is_said_when_batches_come_out_even(two_sets, caplog):
    loader = BatchLoader(two_sets[0], seed=0, world=3, rank=1)
    assert loader.num_batches == 2 and caplog.text == ""


# ---- workers ----


def test_workers_read_the_same_batches_epoch_by_epoch_and_no_generator_notices(two_sets):
    dataset, _ = two_sets
    states = random.getstate(), torch.get_rng_state()
    loader = BatchLoader(dataset, seed=3, num_workers=2)
    alone = [epoch(dataset, Position(epoch=number)) for number in range(2)]
    assert_same(list(loader.epoch(Position())), alone[0])
    # Left in the middle, as by a training that stops and is resumed in the same process.
    left = loader.epoch(Position(epoch=1))
    next(left)
    del left
    gc.collect()
    assert_same(list(loader.epoch(Position(epoch=1, batch=2))), alone[1][2:])
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_a_file_that_vanishes_or_changes_is_one_line_of_error_from_workers_too(two_sets):
    dataset, (first, _) = two_sets
    next(iter(first.cache_directory.glob("b_*_fp.safetensors"))).unlink()
    for num_workers in (0, 1):
        with pytest.raises(UserError, match="b_0200x0050_fp.safetensors: got no such file; expected a cache"):
            epoch(dataset, num_workers=num_workers)


def test_a_cache_that_was_made_anew_in_another_shape_is_an_error(two_sets):
    dataset, (first, _) = two_sets
    item = next(item for item in list_items(first).items if item.stem == "b")
    cache_text(first, item, llama_vec=torch.zeros(9, 4).half())
    with pytest.raises(UserError, match=r"b_0200x0050_fp\.safetensors or b_fp_te.* got other tensors"):
        epoch(dataset)


# ---- what the caching loop writes ----


def fake_text_encoder(caption):
    return {"llama_vec": torch.full((4, 2), len(caption)).half(), "llama_attention_mask": torch.ones(4).bool()}


def cache_with_the_loops(config, mode):
    @contextmanager
    def opened():
        yield fake_text_encoder

    assert cache_builders.run_loop(config, mode)[0] == 0
    options, encoders = CachingOptions(), {"text_encoder1": "abc"}
    assert cache_texts(load_dataset_config(config), "fp", opened, encoders, options, Processes()) == 0


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("one_frame", {"resolution": [48, 48], "fp_1f_target_index": 1, "fp_1f_clean_indices": [3]}),
        ("sections", {"resolution": [48, 48], "source_fps": 15.0, "target_frames": [9], "fp_latent_window_size": 2}),
    ],
)
def test_what_the_caching_loop_wrote_is_trained_until_a_setting_changes(tmp_path, mode, changes, caplog):
    folder = tmp_path / "データ [x]"
    keys = {"enable_bucket": True, "resolution": [64, 64]}
    if mode == "one_frame":
        cache_builders.image_set(folder)
        keys |= cache_builders.image_keys(folder)
    else:
        cache_builders.video_set(folder, {"長い": 14, "b": 9})
        keys |= {"video_directory": folder / "videos", "cache_directory": folder / "cache", "target_frames": [5]}
        keys |= {"frame_extraction": "chunk", "source_fps": 24.0}

    def training(**changed):
        config = cache_builders.write_config(folder / "data.toml", keys | changed)
        return TrainingDataset(load_dataset_config(config), FramePackCacheRules(mode=mode), SCRIPTS)

    cache_with_the_loops(cache_builders.write_config(folder / "data.toml", keys), mode)
    caplog.clear()
    # 14 and 9 frames of 24 per second are 17 and 11 of 30: three and two chunks of 5
    assert training().num_items == {"one_frame": 3, "sections": 5}[mode]
    assert caplog.text == ""
    names = {"resolution": "size", "fp_1f_target_index": "target_index", "fp_1f_clean_indices": "control_indices"}
    names |= {"source_fps": "frame_rate", "fp_latent_window_size": "window"}
    for key, value in changes.items():
        with pytest.raises(UserError, match=f"(got {names.get(key)} is .* in the cache, .* now|{key} = )"):
            training(**{key: value})
