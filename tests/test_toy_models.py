"""What the shipped models of the toy world can do, asked through the scripts: a wrong sign, index, order or mask shows.

Each limit lies between what `python -m demo.toy.exams` measured on these models and what the same exam gives when
something is wrong (the other marks that the tests look at).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import fpack_generate_video
import frame_pack.context
import frame_pack.model
import frame_pack.sampling
from demo.toy import exams

FEW = 6


@pytest.fixture
def call() -> Callable[[Sequence[str]], None]:
    """Runs a script in this process."""

    def run(command: Sequence[str]) -> None:
        assert command[0] == "fpack_generate_video.py"
        assert fpack_generate_video.main(list(command[1:])) == 0

    return run


def test_target_indices_move_a_shape_along_its_direction_to_the_right_places(call, tmp_path: Path) -> None:
    marks = exams.one_frame(tmp_path, call, indices=(1, 5, 9))
    assert marks["astray"].mean < ASTRAY and marks["astray"].share(2 * ASTRAY) >= 0.9
    assert marks["backward_steps"].worst == 0
    assert abs(marks["slope"].mean - exams.RIGHT_SLOPE) < 0.25


def test_a_wrong_order_in_time_is_seen(call, tmp_path: Path) -> None:
    assert exams.wrong_order(tmp_path, call)["astray"].mean > 3 * ASTRAY


def test_a_missing_control_is_seen(call, tmp_path: Path) -> None:
    assert exams.without_control(tmp_path, call)["astray"].mean > 3 * ASTRAY


def test_the_direction_word_is_the_direction(call, tmp_path: Path) -> None:
    marks = exams.prompt(tmp_path, call)
    assert marks["astray"].mean < ASTRAY and marks["astray_turned"].mean < ASTRAY
    assert min(marks["apart"].values) > 12


def test_masks_take_the_shape_from_one_picture_and_the_background_from_the_other(call, tmp_path: Path) -> None:
    marks = exams.kisekaeichi(tmp_path, call)
    assert marks["picture_error"].mean < DRESS_ERROR < marks["picture_error_unmasked"].mean / 2
    assert marks["astray"].mean < ASTRAY and marks["ground_error"].mean < 12


def test_a_shape_moves_through_both_sections_of_a_video(call, tmp_path: Path) -> None:
    marks = exams.video(tmp_path, call, count=FEW)
    assert set(marks["frames"].values) == {73}
    assert marks["astray"].mean < VIDEO_ASTRAY
    assert min(marks["first_section"].values) > 15 and min(marks["second_section"].values) > 10
    assert marks["picture_error"].mean < 0.03


def negated_places(monkeypatch: pytest.MonkeyPatch) -> None:
    original = frame_pack.model.group_rope
    monkeypatch.setattr(frame_pack.model, "group_rope", lambda frames, *a, **k: original(-frames, *a, **k))


def exchanged_rows_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    original = frame_pack.model.group_rope

    def exchanged(frames, height, width, **options):
        rope = original(frames, height, width, **options)
        return type(rope)(*(t.unflatten(1, (-1, height, width)).transpose(2, 3).flatten(1, 3) for t in rope))

    monkeypatch.setattr(frame_pack.model, "group_rope", exchanged)


def inverted_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def inverted(latent, mask):
        return latent if mask is None else latent * (1 - mask)

    monkeypatch.setattr(frame_pack.context, "apply_mask", inverted)


def controls_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    original = frame_pack.sampling.one_frame_context

    def reversed_controls(controls, masks, *args, **kwargs):
        return original(controls[::-1], masks[::-1], *args, **kwargs)

    monkeypatch.setattr(frame_pack.sampling, "one_frame_context", reversed_controls)


@pytest.mark.parametrize(
    ("mistake", "exam"),
    [
        (negated_places, exams.one_frame),
        (exchanged_rows_and_columns, exams.one_frame),
        (inverted_masks, exams.kisekaeichi),
        (controls_in_the_wrong_order, exams.kisekaeichi),
    ],
)
def test_a_mistake_in_the_context_fails_an_exam(mistake, exam, call, tmp_path: Path, monkeypatch) -> None:
    mistake(monkeypatch)
    assert exam(tmp_path, call, count=FEW)["astray"].mean > 3 * ASTRAY
