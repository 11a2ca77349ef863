"""Where clean frames stand on the time axis, against the published index tables."""

import pytest
import torch

from frame_pack.context import f1_context, one_frame_context, section_context, section_paddings
from options.one_frame import OneFrameOptions

N, HEIGHT, WIDTH = 9, 2, 4


def frames(*values: float) -> torch.Tensor:
    """(1, 16, F, h, w) with frame i filled with values[i], so that frames can be told apart."""
    return torch.tensor(values).view(1, 1, -1, 1, 1).expand(1, 16, -1, HEIGHT, WIDTH).clone()


def values(latents: torch.Tensor) -> list[float]:
    assert torch.equal(latents, frames(*latents[0, 0, :, 0, 0].tolist()))
    return latents[0, 0, :, 0, 0].tolist()


def one_frame(text: str, *controls: float, masks=None, window: int = N):
    latents = [frames(value) for value in controls]
    options = OneFrameOptions.parse(text).resolve(len(latents))
    return one_frame_context(latents, masks or [None] * len(latents), options, window=window, like=frames(7.0))


def test_sections_of_a_two_section_video_have_the_reference_indices():
    later = frames(*range(1, 25))
    last = section_context(frames(0.5), later, padding=1, window=N)
    assert last.indices.tolist() == [list(range(10, 19))]
    assert last.clean.indices.tolist() == [[0, 19]]
    assert last.clean_2x.indices.tolist() == [[20, 21]]
    assert last.clean_4x.indices.tolist() == [list(range(22, 38))]
    first = section_context(frames(0.5), later, padding=0, window=N)
    assert first.indices.tolist() == [list(range(1, 10))]
    assert first.clean.indices.tolist() == [[0, 10]]
    assert first.clean_2x.indices.tolist() == [[11, 12]]
    assert first.clean_4x.indices.tolist() == [list(range(13, 29))]


def test_a_section_sees_the_frames_after_it_nearest_first():
    context = section_context(frames(0.5), frames(*range(1, 25)), padding=1, window=N)
    assert values(context.clean.latents) == [0.5, 1]
    assert values(context.clean_2x.latents) == [2, 3]
    assert values(context.clean_4x.latents) == list(range(4, 20))


def test_f1_has_the_reference_indices_and_sees_the_frames_before_it():
    context = f1_context(frames(0.5), frames(*range(1, 25)), window=N)
    assert context.indices.tolist() == [list(range(20, 29))]
    assert context.clean.indices.tolist() == [[0, 19]]
    assert context.clean_2x.indices.tolist() == [[17, 18]]
    assert context.clean_4x.indices.tolist() == [list(range(1, 17))]
    assert values(context.clean.latents) == [0.5, 24]
    assert values(context.clean_2x.latents) == [22, 23]
    assert values(context.clean_4x.latents) == list(range(6, 22))


def test_default_one_frame_has_a_post_frame_and_two_histories_of_zeros():
    context = one_frame("default", 3.0)
    assert context.indices.tolist() == [[9]]
    assert context.clean.indices.tolist() == [[0, 10]]
    assert values(context.clean.latents) == [3, 0]
    assert context.clean_2x.indices.tolist() == [[11, 12]]
    assert context.clean_4x.indices.tolist() == [list(range(13, 29))]
    assert not context.clean_2x.latents.any() and not context.clean_4x.latents.any()


def test_histories_keep_their_places_without_post():
    context = one_frame("no_post", 3.0)
    assert context.clean.indices.tolist() == [[0]]
    assert context.clean_2x.indices.tolist() == [[11, 12]]


def test_kisekaeichi_is_two_masked_controls_and_nothing_else():
    left = torch.tensor([[1.0, 1, 0, 0]] * HEIGHT)
    context = one_frame("target_index=1,control_index=0;10,no_post,no_2x,no_4x", 3.0, 5.0, masks=[left, 1 - left])
    assert context.indices.tolist() == [[1]]
    assert context.clean.indices.tolist() == [[0, 10]]
    assert context.clean_2x is None and context.clean_4x is None
    start, clothes = context.clean.latents[0].unbind(dim=1)
    assert torch.equal(start, 3 * left.expand(16, -1, -1))
    assert torch.equal(clothes, 5 * (1 - left).expand(16, -1, -1))


def test_each_control_keeps_the_index_it_was_given_in_any_order():
    context = one_frame("control_index=13;0;10,no_post,target_index=1", 1.0, 2.0, 3.0)
    assert context.clean.indices.tolist() == [[13, 0, 10]]
    assert values(context.clean.latents) == [1, 2, 3]


def test_without_control_image_a_zero_frame_stands_at_index_zero():
    context = one_frame("no_2x,no_4x")
    assert context.clean.indices.tolist() == [[0, 10]]
    assert values(context.clean.latents) == [0, 0]


def test_the_window_moves_target_post_and_histories():
    context = one_frame("default", 3.0, window=13)
    assert context.indices.tolist() == [[13]]
    assert context.clean.indices.tolist() == [[0, 14]]
    assert context.clean_2x.indices.tolist() == [[15, 16]]
    assert context.clean_4x.indices.tolist() == [list(range(17, 33))]


def test_a_wrong_number_of_indices_is_refused_here_too():
    with pytest.raises(ValueError, match="1 control latents, but 2 control indices"):
        options = OneFrameOptions(control_indices=(0, 1))
        one_frame_context([frames(1.0)], [None], options, window=N, like=frames(0.0))


@pytest.mark.parametrize(
    ("num_sections", "expected"),
    [(1, [0]), (3, [2, 1, 0]), (4, [3, 2, 1, 0]), (5, [3, 2, 2, 1, 0]), (8, [3, 2, 2, 2, 2, 2, 1, 0])],
)
def test_paddings_are_capped_from_the_fifth_section_on(num_sections, expected):
    assert section_paddings(num_sections) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [((), [2, 1, 0]), ((0, 0, 0), [0, 0, 0]), ((5,), [5, 1, 0]), ((4, 3, 2, 1), [4, 3, 2])],
)
def test_given_paddings_replace_the_first_ones(override, expected):
    assert section_paddings(3, override) == expected
