"""What Wan is shown beside its noisy latents, against tensors that are written out by hand."""

import pytest
import torch

from options.errors import UserError
from options.one_frame import OneFrameOptions
from wan.context import (
    arranged,
    fun_control_context,
    image_context,
    no_features,
    one_frame_context,
    seen_by_clip,
    text_context,
)

HEIGHT, WIDTH = 2, 4
GREY = -5.0


def frames(*values: float) -> torch.Tensor:
    """(1, 16, F, h, w) with frame i filled with values[i], so that frames can be told apart."""
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1, 1).expand(1, 16, -1, HEIGHT, WIDTH).clone()


def channels(*rows: list[float]) -> torch.Tensor:
    """(1, C, F, h, w) with channel i of frame j filled with rows[i][j]."""
    values = torch.tensor([row if isinstance(row, list) else [row] for row in rows], dtype=torch.float32)
    return values[None, :, :, None, None].expand(-1, -1, -1, HEIGHT, WIDTH)


def y_of(masks: list[list[float]], latents: list[float]) -> torch.Tensor:
    """(1, 20, F, h, w) of four rows of mask channels and the values of the latent frames."""
    return channels(*masks, *[latents] * 16)


def one_frame(text: str, *controls: float, masks=None):
    options = OneFrameOptions.parse(text).resolve_wan(len(controls))
    latents = [frames(value) for value in controls]
    return one_frame_context(latents, masks or [None] * len(latents), options, grey=frames(GREY))


# ---- videos ----


def test_a_text_shows_nothing_and_counts_frames_from_zero():
    context = text_context(3, batch=2)
    assert context.latents is None and context.target is None
    assert context.indices.tolist() == [[0, 1, 2], [0, 1, 2]] and context.num_frames == 3


def test_a_start_image_is_marked_in_all_four_channels():
    context = image_context(frames(1, 2, 3))
    assert torch.equal(context.latents, y_of([[1, 0, 0]] * 4, [1, 2, 3]))
    assert context.indices.tolist() == [[0, 1, 2]] and context.target is None


def test_the_last_frame_of_flf2v_is_marked_in_the_last_channel_alone():
    context = image_context(frames(1, 2, 3), shows_end=True)
    assert torch.equal(context.latents, y_of([[1, 0, 0]] * 3 + [[1, 0, 1]], [1, 2, 3]))
    assert context.indices.tolist() == [[0, 1, 2]]


def test_marks_are_those_of_the_pixel_frames_that_are_given():
    """The reference's way: ones for pixel frames, the first repeated four times, four of them to a latent frame."""
    given = torch.zeros(9)
    given[[0, -1]] = 1
    wanted = torch.cat([given[:1].repeat(4), given[1:]]).view(3, 4).T
    found = image_context(frames(1, 2, 3), shows_end=True).latents[0, :4, :, 0, 0]
    assert torch.equal(found, wanted)


def test_an_end_image_of_i2v_is_one_more_frame_behind_the_clip():
    context = image_context(frames(1, 2), appended=frames(9))
    assert torch.equal(context.latents, y_of([[1, 0, 1]] * 4, [1, 2, 9]))
    assert context.indices.tolist() == [[0, 1, 2]] and context.num_frames == 3


def test_a_picture_is_all_given():
    assert torch.equal(image_context(frames(7)).latents, y_of([[1]] * 4, [7]))


def test_one_latent_frame_cannot_show_two_ends():
    with pytest.raises(ValueError, match="first and its last frame"):
        image_context(frames(7), shows_end=True)


def test_every_sample_of_a_batch_has_its_own_clip():
    clip = torch.cat([frames(1, 2), frames(3, 4)])
    context = image_context(clip)
    assert torch.equal(context.latents, torch.cat([y_of([[1, 0]] * 4, [1, 2]), y_of([[1, 0]] * 4, [3, 4])]))
    assert context.indices.tolist() == [[0, 1], [0, 1]]


# ---- Fun-Control ----


def test_fun_control_without_image_shows_the_control_and_zeros():
    context = fun_control_context(frames(1, 2, 3), None)
    assert torch.equal(context.latents, channels(*[[1, 2, 3]] * 16, *[[0, 0, 0]] * 16))
    assert context.indices.tolist() == [[0, 1, 2]]
    assert no_features(1280).shape == (1, 257, 1280) and not no_features(8, batch=2).any()


@pytest.mark.parametrize(
    ("image", "given"),
    [
        (image_context(frames(4, 5, 6)), [4, 0, 0]),
        (image_context(frames(4, 5, 6), shows_end=True), [4, 0, 6]),
        (image_context(frames(4, 5), appended=frames(6)), [4, 0, 6]),
    ],
)
def test_fun_control_with_images_shows_the_given_frames_without_marks(image, given):
    context = fun_control_context(frames(1, 2, 3), image)
    assert torch.equal(context.latents, channels(*[[1, 2, 3]] * 16, *[given] * 16))


def test_fun_control_refuses_a_control_of_another_length():
    with pytest.raises(ValueError, match="2 control frames for a context of 3 frames"):
        fun_control_context(frames(1, 2), image_context(frames(4, 5, 6)))


# ---- one frame ----

TABLE = [
    ("target_index=1,control_index=0", [3], [0, 1], 1, [[1, 0]], [3, GREY]),
    ("target_index=1,control_index=0;2", [3, 4], [0, 1, 2], 1, [[1, 0, 1]], [3, GREY, 4]),
    ("control_index=2;0,target_index=1", [3, 4], [0, 1, 2], 1, [[1, 0, 1]], [4, GREY, 3]),
    ("control_index=5,target_index=0", [3], [0, 5], 0, [[0, 1]], [GREY, 3]),
    ("control_index=10;0;4,target_index=1023", [3, 4, 5], [0, 4, 10, 1023], 3, [[1, 1, 1, 0]], [4, 5, 3, GREY]),
    ("control_index=7;7,target_index=9", [3, 4], [7, 7, 9], 2, [[1, 1, 0]], [3, 4, GREY]),
]


@pytest.mark.parametrize(("text", "controls", "indices", "target", "masks", "latents"), TABLE)
def test_one_frame_stands_between_its_controls(text, controls, indices, target, masks, latents):
    context = one_frame(text, *controls)
    assert context.indices.tolist() == [indices] and context.indices.dtype == torch.int64
    assert context.target == target
    assert torch.equal(context.latents, y_of(masks * 4, latents))


@pytest.mark.parametrize(("text", "controls", "indices", "target", "masks", "latents"), TABLE)
def test_what_one_frame_training_predicts_has_the_picture_in_place_of_the_grey(
    text, controls, indices, target, masks, latents
):
    options = OneFrameOptions.parse(text)
    found = arranged([frames(value) for value in controls], frames(8), options)
    assert torch.equal(found, frames(*[8 if value == GREY else value for value in latents]))


def test_masks_hide_parts_of_their_own_control_and_leave_its_mark():
    left = torch.tensor([[1.0, 1, 0.5, 0]] * HEIGHT)
    context = one_frame("control_index=2;0,target_index=1", 3, 4, masks=[left, None])
    first, target, second = context.latents[0].unbind(dim=1)
    assert torch.equal(second[4:], 3 * left.expand(16, -1, -1))
    assert torch.equal(first[4:], torch.full((16, HEIGHT, WIDTH), 4.0))
    assert torch.equal(target[4:], torch.full((16, HEIGHT, WIDTH), GREY))
    assert (first[:4] == 1).all() and (second[:4] == 1).all() and (target[:4] == 0).all()


def test_only_the_picture_is_kept_and_of_a_video_everything():
    latents = frames(1, 2, 3)
    assert torch.equal(one_frame("control_index=2;0,target_index=1", 3, 4).kept(latents), frames(2))
    assert torch.equal(text_context(3).kept(latents), latents)


def test_a_context_changes_its_type_but_not_its_indices():
    context = one_frame("control_index=0,target_index=1", 3).to(torch.device("cpu"), torch.bfloat16)
    assert context.latents.dtype == torch.bfloat16 and context.indices.dtype == torch.int64 and context.target == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (OneFrameOptions(target_index=1, control_indices=(0, 2)), "1 control images, but 2 control indices"),
        (OneFrameOptions(target_index=1), "1 control images, but 0 control indices"),
        (OneFrameOptions(target_index=1, control_indices=(1,)), "target_index 1 with control indices"),
        (OneFrameOptions(control_indices=(0,)), "target_index None"),
    ],
)
def test_what_the_door_refuses_is_refused_here_too(options: OneFrameOptions, message: str):
    with pytest.raises(ValueError, match=message):
        one_frame_context([frames(3)], [None], options, grey=frames(GREY))


def test_one_frame_without_controls_is_refused():
    with pytest.raises(ValueError, match="0 control images"):
        one_frame_context([], [], OneFrameOptions(target_index=1, control_indices=()), grey=frames(GREY))


@pytest.mark.parametrize(
    ("indices", "first", "both"),
    [((0,), (0,), (0, 0)), ((0, 2), (0,), (0, 1)), ((2, 0), (0,), (1, 0)), ((5, 9, 1), (0,), (2, 1))],
)
def test_clip_looks_at_the_first_control_or_at_both_ends(indices, first, both):
    assert seen_by_clip(indices, both_ends=False) == first
    assert seen_by_clip(indices, both_ends=True) == both


# ---- at the door ----


@pytest.mark.parametrize(
    ("text", "num_controls", "complaints"),
    [
        ("control_index=0", 1, ["got no target_index; expected the index of the picture; give target_index=1"]),
        ("target_index=1", 1, ["got no control_index; expected one index per control image; give control_index=0"]),
        ("default", 1, ["no target_index and no control_index; expected the index of the picture and one index per"]),
        ("target_index=1,control_index=0", 0, ["no control image; expected at least one"]),
        ("control_index=0", 2, ["no target_index", "1 control indices (0) for 2 control images"]),
        ("target_index=1,control_index=0", 2, ["1 control indices (0) for 2 control images"]),
        ("target_index=1024,control_index=0", 1, ["target_index=1024; expected an index from 0 to 1023"]),
        ("target_index=1,control_index=0;4000", 2, ["control_index=4000; expected an index from 0 to 1023"]),
        ("target_index=1,control_index=0;1", 2, ["target_index=1 and a control image at 1; expected a place of its"]),
        ("target_index=1024,control_index=1024;2", 1, ["2 control", "target_index=1024", "control_index=1024", "own"]),
    ],
)  # fmt: skip
def test_bad_options_are_told_line_by_line(text: str, num_controls: int, complaints: list[str]):
    with pytest.raises(UserError) as caught:
        OneFrameOptions.parse(text).resolve_wan(num_controls, "プロンプト.txt line 3")
    lines = str(caught.value).splitlines()
    assert len(lines) == len(complaints)
    for line, complaint in zip(lines, complaints, strict=True):
        assert line.startswith("プロンプト.txt line 3: got ") and complaint in line


def test_good_options_come_through_as_they_are():
    options = OneFrameOptions.parse("control_index=2;0,target_index=1")
    assert options.resolve_wan(2) == options and options.wan_hints() == []


def test_what_wan_does_not_need_is_ignored_with_a_hint():
    options = OneFrameOptions.parse("no_2x,no_post,control_index=5,target_index=0").resolve_wan(1)
    ignored, place = options.wan_hints()
    assert ignored.startswith("no_2x, no_post: ignored") and place.startswith("target_index=0 is the place")
