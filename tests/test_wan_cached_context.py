"""Wan's contexts as the tensors of cache files and back, ours and the incumbent's."""

import pytest
import torch

from options.one_frame import OneFrameOptions
from wan.cached_context import features_from_batch, from_batch, to_cache
from wan.context import WanContext, arranged, fun_control_context, image_context, one_frame_context, text_context

HEIGHT, WIDTH = 2, 4


def latents(num_frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 16, num_frames, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def features(*numbers: int) -> torch.Tensor:
    """(N, 257, 8), each filled with its number."""
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1).expand(-1, 257, 8)


def batched(*files: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([file[name] for file in files]) for name in files[0]}


def assert_same(found: WanContext, *wanted: WanContext) -> None:
    """`found` has the samples of `wanted`, as bfloat16 keeps them."""
    assert torch.equal(found.indices, torch.cat([context.indices for context in wanted]))
    assert found.indices.dtype == torch.int64
    assert {found.target} == {context.target for context in wanted}
    if wanted[0].latents is None:
        assert found.latents is None
    else:
        assert torch.equal(found.latents, torch.cat([context.latents for context in wanted]).bfloat16())


def one_frame_file(*indices: int, target: int = 1, seed: int = 0, **changes) -> tuple[dict, WanContext]:
    options = OneFrameOptions(target_index=target, control_indices=indices)
    controls = [latents(1, 10 * seed + i) for i in range(len(indices))]
    context = one_frame_context(controls, [None] * len(indices), options, grey=latents(1, 99))
    clean = arranged(controls, latents(1, 98), options)
    values = {"features": features(*range(len(indices))), "feature_indices": indices} | changes
    return to_cache(clean, context, **values), context


def test_a_clip_with_all_that_may_stand_beside_it_has_the_published_contents():
    context = image_context(latents(3, 1))
    file = to_cache(latents(3), context, control=latents(3, 2), features=features(1)[0])
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in file.items()} == {
        "latents": ((16, 3, HEIGHT, WIDTH), torch.bfloat16),
        "latents_image": ((20, 3, HEIGHT, WIDTH), torch.bfloat16),
        "latents_control": ((16, 3, HEIGHT, WIDTH), torch.bfloat16),
        "clip": ((257, 8), torch.float16),
    }
    assert torch.equal(file["latents"], latents(3)[0].bfloat16())
    assert to_cache(latents(3), None).keys() == {"latents"}
    assert to_cache(latents(3), None, dtype=torch.float16)["latents"].dtype == torch.float16


def test_each_model_is_shown_its_part_of_what_is_cached():
    contexts = [image_context(latents(3, seed)) for seed in (1, 2)]
    controls = [latents(3, seed) for seed in (3, 4)]
    files = [to_cache(latents(3), c, control=control) for c, control in zip(contexts, controls, strict=True)]
    batch = batched(*files)
    assert_same(from_batch(batch, shows_images=False), text_context(3), text_context(3))
    assert_same(from_batch(batch, shows_images=True), *contexts)
    stored = [control.bfloat16().float() for control in controls]
    for shows_images in (False, True):
        rounded = [WanContext(latents=c.latents.bfloat16().float(), indices=c.indices) for c in contexts]
        wanted = [fun_control_context(s, r if shows_images else None) for s, r in zip(stored, rounded, strict=True)]
        assert_same(from_batch(batch, shows_images=shows_images, shows_control=True), *wanted)


def test_both_ends_of_a_clip_come_back_marked():
    context = image_context(latents(3, 1), shows_end=True)
    assert_same(from_batch(batched(to_cache(latents(3), context)), shows_images=True), context)


@pytest.mark.parametrize(("indices", "target"), [((0,), 1), ((2, 0), 1), ((0, 2), 5), ((3, 4, 9), 0)])
def test_one_frame_caches_tell_where_the_picture_stands(indices, target):
    files, contexts = zip(*(one_frame_file(*indices, target=target, seed=seed) for seed in (1, 2)), strict=True)
    found = from_batch(batched(*files), shows_images=True)
    assert_same(found, *contexts)
    assert found.target == sorted([*indices, target]).index(target)


def test_a_wholly_hidden_control_is_not_taken_for_the_picture():
    options = OneFrameOptions(target_index=1, control_indices=(0, 2))
    masks = [torch.zeros(HEIGHT, WIDTH)] * 2
    context = one_frame_context([latents(1)] * 2, masks, options, grey=latents(1, 9))
    assert from_batch(batched(to_cache(latents(3), context)), shows_images=True).target == 1


def test_a_batch_of_the_incumbents_files_is_understood():
    shown = torch.zeros(2, 20, 3, HEIGHT, WIDTH, dtype=torch.bfloat16)
    shown[:, :4, [0, 2]] = 1
    batch = {
        "latents": torch.zeros(2, 16, 3, HEIGHT, WIDTH, dtype=torch.bfloat16),
        "latents_image": shown,
        "clip": torch.stack([features(1, 2), features(3, 4)]).half(),
        "f_indices": torch.tensor([[0, 1, 2], [0, 5, 10]], dtype=torch.int32),
        "t5": [torch.zeros(7, 8)] * 2,
    }
    context = from_batch(batch, shows_images=True)
    assert context.indices.tolist() == [[0, 1, 2], [0, 5, 10]] and context.target == 1
    assert torch.equal(context.latents, shown)
    both = features_from_batch(batch, both_ends=True)
    assert both.shape == (2, 514, 8)
    assert both[:, [0, 256, 257, 513], 0].tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]


# ---- CLIP features ----


@pytest.mark.parametrize(
    ("indices", "first", "both"), [((0,), 0, (0, 0)), ((0, 2), 0, (0, 1)), ((2, 0), 0, (1, 0)), ((5, 9, 1), 0, (2, 1))]
)
def test_features_of_controls_in_any_order(indices, first, both):
    batch = batched(one_frame_file(*indices, target=7)[0], one_frame_file(*indices, target=7)[0])
    alone = features_from_batch(batch, both_ends=False)
    assert alone.shape == (2, 257, 8) and (alone == first).all()
    together = features_from_batch(batch, both_ends=True).unflatten(1, (2, 257))
    assert [together[:, i].unique().tolist() for i in (0, 1)] == [[both[0]], [both[1]]]


def test_places_are_kept_only_where_they_are_not_in_the_order_of_time():
    assert "clip_indices" not in one_frame_file(0, 2)[0]
    assert one_frame_file(2, 0)[0]["clip_indices"].tolist() == [2, 0]


def test_features_of_one_picture_serve_both_ends():
    batch = batched(to_cache(latents(3), image_context(latents(3)), features=features(6)[0]))
    assert features_from_batch(batch, both_ends=False).shape == (1, 257, 8)
    assert features_from_batch(batch, both_ends=True).shape == (1, 514, 8)


def test_features_of_a_clips_two_ends_are_told_apart():
    batch = batched(to_cache(latents(3), image_context(latents(3), shows_end=True), features=features(6, 7)))
    assert (features_from_batch(batch, both_ends=False) == 6).all()
    assert features_from_batch(batch, both_ends=True)[0, [0, 257], 0].tolist() == [6, 7]
