"""The toy world itself: its laws, its pictures, how they are looked at, and the training loop of its models."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from demo.toy.dit import dress_masks
from demo.toy.lessons import BLUE_SQUARE, TOGETHER, examples
from demo.toy.pieces import Plan, train
from demo.toy.sight import astray, error, find_in, travelled
from demo.toy.world import COLOURS, DIRECTIONS, SHAPES, SIZE, SPEED, Scene, captions, scenes

NUM_SCENES = 60


def scene(**changes: object) -> Scene:
    given = {"shape": "circle", "colour": "red", "background": "blue", "striped": False, "direction": "right"}
    return Scene(**{**given, "radius": 8.0, "start": (20.0, 30.0), **changes})


def test_a_shape_moves_at_a_constant_speed_and_stops_at_the_border() -> None:
    moving = scene()
    assert moving.centre(0) == (20.0, 30.0)
    assert moving.centre(10) == pytest.approx((20 + 10 * SPEED, 30))
    assert moving.centre(1000) == (SIZE - 9, 30)
    assert moving.free_indices() == pytest.approx((SIZE - 9 - 20) / (4 * SPEED))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_direction_word_is_the_direction_on_the_picture(direction: str) -> None:
    moving = scene(direction=direction, start=(32.0, 32.0))
    rows, columns = np.nonzero(np.abs(moving.picture(20).astype(int) - moving.picture(0)).sum(axis=2))
    forward = {"right": columns.mean() > 32, "left": columns.mean() < 32, "down": rows.mean() > 32}
    assert forward.get(direction, rows.mean() < 32)


def test_a_circle_covers_its_area() -> None:
    assert scene(radius=9.0).coverage().sum() == pytest.approx(math.pi * 81, rel=0.01)


def test_every_scene_has_a_caption_of_the_vocabulary_and_a_shape_unlike_its_background() -> None:
    known = set(captions())
    drawn = list(itertools.islice(scenes(5), 300))
    assert all(one.caption in known and one.colour != one.background for one in drawn)
    assert {one.shape for one in drawn} == set(SHAPES) and {one.colour for one in drawn} == set(COLOURS)
    assert len(known) == len(captions())


def test_scenes_are_functions_of_their_seed() -> None:
    first, again, other = (list(itertools.islice(scenes(seed), 5)) for seed in (5, 5, 6))
    assert first == again and first != other


def test_the_eye_finds_every_shape_where_it_is() -> None:
    for one in itertools.islice(scenes(7, free_indices=9), NUM_SCENES):
        for index in (0, 5):
            seen = find_in(one.picture_at(index), one)
            assert seen is not None and astray(seen, one, index) < 0.5
            assert travelled(seen, one) == pytest.approx(4 * index * SPEED, abs=0.5)


def test_the_eye_finds_nothing_where_there_is_no_shape_or_another_colour() -> None:
    one = scene()
    bare = np.round(one.ground() * 255).astype(np.uint8)
    assert find_in(bare, one) is None
    assert find_in(scene(colour="black").picture(), scene(colour="yellow")) is None
    assert error(bare, one.picture()) > 0.01


def test_masks_of_a_kisekaeichi_keep_the_shape_of_one_and_hide_both_in_the_other() -> None:
    ground, shape = itertools.islice(scenes(8), 2)
    keep_ground, keep_shape = dress_masks(ground, shape)
    assert (keep_shape[shape.coverage() > 0] == 255).all()
    assert (keep_ground[(shape.coverage() > 0) | (ground.coverage() > 0)] == 0).all()
    assert 0.3 < (keep_ground == 255).mean() and (keep_shape == 255).mean() < 0.4


def test_lessons_show_their_rule() -> None:
    for example in examples(BLUE_SQUARE, count=5):
        changed = np.abs(example.target.astype(int) - example.controls[0]).sum(axis=2) > 0
        assert changed.any() and changed.mean() < 0.2
        assert (example.target == np.round(np.array(COLOURS["blue"]) * 255)).all(axis=2).sum() > 80
    for example in examples(TOGETHER, count=5):
        ground, shape = example.controls
        assert np.array_equal(example.target[0, 0], ground[0, 0])
        assert not np.array_equal(example.target, ground) and not np.array_equal(example.target, shape)


class Line(nn.Module):
    """Something to be trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)


def loss_of(model: Line):
    def loss_at(step: int) -> torch.Tensor:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (model.layer(x) - x.sum(dim=1, keepdim=True)).square().mean()

    return loss_at


@pytest.mark.parametrize("averaged", [0.0, 0.9])
def test_a_training_in_pieces_is_the_training_in_one_piece(averaged: float, tmp_path) -> None:
    plan = Plan(name="線", steps=30, learning_rate=1e-2, averaged=averaged)
    whole, part = Line(), Line()
    assert train(whole, loss_of(whole), plan, tmp_path / "whole")
    assert not train(part, loss_of(part), plan, tmp_path / "parts", stop_at=11)
    resumed = Line()
    with torch.no_grad():
        resumed.layer.weight += 1  # nothing but the state can bring the training back on its way
    assert train(resumed, loss_of(resumed), plan, tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not torch.equal(whole.layer.weight, part.layer.weight)
    logs = [(tmp_path / name / "線.losses.jsonl").read_text(encoding="utf-8") for name in ("whole", "parts")]
    assert logs[0] == logs[1] and '"step": 30' in logs[0]


def test_training_learns(tmp_path) -> None:
    model = Line()
    before = loss_of(model)(10**6).item()
    train(model, loss_of(model), Plan(name="line", steps=200, learning_rate=0.1), tmp_path)
    assert loss_of(model)(10**6).item() < before / 20
