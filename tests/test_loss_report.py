"""The loss report: right means in constant memory, the same after any interruption, and a picture that shows them."""

import json
import math
import random

import numpy as np
import pytest
from PIL import Image

from common.plots import BLUE, GREEN
from training.loss_report import MAX_POINTS, NUM_BUCKETS, LossReport


def samples(num_steps, seed=0, per_step=2):
    """(step, sigmas, losses) from step 1 on."""
    generator = random.Random(seed)
    for step in range(1, num_steps + 1):
        sigmas = [generator.random() for _ in range(per_step)]
        yield step, sigmas, [(1.2 - sigma) * (1 + 5 / step) + generator.random() for sigma in sigmas]


def collected(batches, validation=()):
    report = LossReport()
    for step, sigmas, losses in batches:
        report.add(step, sigmas, losses)
        if step in validation:
            report.add_validation(step, losses[0])
    return report


def bucket_means(report):
    return [total / count if count else math.nan for total, count in report.state()["buckets"]]


def curve(report, name="training"):
    """(stride, place, mean, count) of every point."""
    state = report.state()[name]
    return [(state["stride"], place, total / count, count) for place, total, count in state["points"]]


# ---- what is collected ----


def test_every_timestep_bucket_has_the_mean_of_its_losses():
    batches = list(samples(500))
    sigmas = np.array([sigma for _, row, _ in batches for sigma in row])
    losses = np.array([loss for _, _, row in batches for loss in row])
    expected = [losses[(sigmas >= b / 20) & (sigmas < (b + 1) / 20)].mean() for b in range(20)]
    report = collected(batches)
    assert bucket_means(report) == pytest.approx(expected)
    assert sum(count for _, count in report.state()["buckets"]) == 1000


def test_both_ends_of_the_timesteps_have_a_bucket():
    report = collected([(1, [0.0, 1.0], [2.0, 3.0])])
    assert (bucket_means(report)[0], bucket_means(report)[-1]) == (2.0, 3.0)


@pytest.mark.parametrize("num_steps", [1, 999, 1000, 1001, 5000, 8001])
def test_a_curve_never_has_more_points_than_allowed_and_loses_nothing(num_steps):
    batches = list(samples(num_steps))
    points = curve(collected(batches))
    stride = points[0][0]
    smallest = next(2**k for k in range(20) if len({step // 2**k for step, _, _ in batches}) <= MAX_POINTS)
    assert len(points) <= MAX_POINTS and stride == smallest
    for _, place, mean, count in random.Random(1).sample(points, min(20, len(points))):
        losses = [loss for step, _, row in batches if step // stride == place for loss in row]
        assert (mean, count) == (pytest.approx(np.mean(losses)), len(losses))
    assert sum(count for *_, count in points) == 2 * num_steps


def test_memory_does_not_grow_with_the_length_of_the_run():
    sizes = [len(json.dumps(collected(samples(n), range(0, n, 3)).state())) for n in (4000, 16000)]
    assert sizes[1] < 1.3 * sizes[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_spoils_no_mean(bad):
    batches = list(samples(30))
    spoilt = collected([*batches, (31, [0.5, 0.1], [bad, 1.0])])
    spoilt.add_validation(31, bad)
    clean = collected([*batches, (31, [0.1], [1.0])])
    assert spoilt.state() == clean.state() | {"num_skipped": 2}


def test_sigmas_and_losses_must_be_pairs():
    with pytest.raises(ValueError):
        LossReport().add(1, [0.5, 0.5], [1.0])


# ---- going on ----


@pytest.mark.parametrize("stops", [(1,), (999, 1000, 1001), (1500, 2047, 3000)])
def test_an_interrupted_run_collects_exactly_what_an_undisturbed_one_does(stops):
    batches = list(samples(3500))
    undisturbed = collected(batches, validation=range(0, 3500, 100))
    report, done = LossReport(), 0
    for stop in (*stops, 3500):
        saved = json.dumps(report.state())
        report = LossReport()
        report.load_state(json.loads(saved))
        for step, sigmas, losses in batches[done:stop]:
            report.add(step, sigmas, losses)
            if step % 100 == 0 and step < 3500:
                report.add_validation(step, losses[0])
        done = stop
    assert json.dumps(report.state()) == json.dumps(undisturbed.state())
    assert report.draw("絵").tobytes() == undisturbed.draw("絵").tobytes()


def test_loading_takes_the_place_of_what_was_collected():
    report = collected(samples(10))
    saved = collected(samples(3, seed=8)).state()
    report.load_state(saved)
    assert report.state() == saved


def test_a_state_does_not_change_when_the_report_goes_on():
    report = collected(samples(5))
    state = report.state()
    before = json.dumps(state)
    report.add(6, [0.5], [1.0])
    report.add_validation(6, 1.0)
    assert json.dumps(state) == before


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_collect_what_one_would(world):
    """Also when they have added so much that their curves are thinned differently."""
    batches = list(samples(4000))
    alone = collected(batches, validation=[5, 6])
    parts = []
    for rank in range(world):
        last = 4000 if rank == 0 else 900
        mine = [b for b in batches if b[0] % world == rank and b[0] <= last]
        rest = [b for b in batches if b[0] % world != 0 and b[0] > 900] if rank == 0 else []
        parts.append(collected(sorted(mine + rest), validation=[5, 6]))
    strides = {part.state()["training"]["stride"] for part in parts}
    merged = LossReport.merged(json.loads(json.dumps(part.state())) for part in parts)
    assert len(strides) > 1
    assert bucket_means(merged) == pytest.approx(bucket_means(alone))
    for name in ("training", "validation"):
        assert np.array(curve(merged, name)) == pytest.approx(np.array(curve(alone, name)))


def test_merging_counts_what_all_left_out():
    parts = [collected([(1, [0.5], [math.nan])]).state(), collected([(1, [0.5], [math.nan])]).state()]
    assert LossReport.merged(parts).state()["num_skipped"] == 2
    assert LossReport.merged([]).state() == LossReport().state()


@pytest.mark.parametrize(
    "change",
    [
        {"buckets": [[0.0, 0]] * (NUM_BUCKETS - 1)},
        {"buckets": 3},
        {"training": {"stride": 1}},
        {"training": {"stride": 1, "points": [[1, 2.0]]}},
        {"training": {"stride": 0, "points": []}},
        {"training": None},
        {"num_skipped": "many"},
    ],
    ids=str,
)
def test_anything_else_is_no_state_and_changes_nothing(change):
    report = collected(samples(4))
    before = report.state()
    with pytest.raises(ValueError, match="not the state of a loss report"):
        report.load_state(before | change)
    with pytest.raises(ValueError, match="not the state of a loss report"):
        report.load_state({key: value for key, value in before.items() if key not in change})
    assert report.state() == before


# ---- the picture ----


def pixels(report, title=""):
    """The upper and the lower chart."""
    whole = np.asarray(report.draw(title).convert("RGB")).astype(int)
    return np.split(whole, 2)


def near(chart, color):
    return np.abs(chart - color).sum(axis=2) < 24


def test_columns_show_the_mean_loss_of_their_timesteps():
    losses = [0.1 + 0.01 * number for number in range(20)]
    report = collected([(1, [(number + 0.5) / 20 for number in range(20)], losses)])
    upper, _ = pixels(report)
    filled = near(upper, BLUE).sum(axis=0)
    first, last = np.nonzero(filled)[0][[0, -1]]
    centers = [round(first + (last - first) * (number + 0.25) / 20) for number in range(20)]  # beside the counts
    heights = filled[centers] / filled[centers[-1]]
    assert heights == pytest.approx(np.array(losses) / losses[-1], abs=0.01)


def test_a_bucket_without_samples_has_no_column():
    upper, _ = pixels(collected([(1, [0.01, 0.99], [1.0, 1.0])]))
    columns = np.nonzero(near(upper, BLUE).any(axis=0))[0]
    assert np.diff(columns).max() > 0.8 * (columns.max() - columns.min())


def test_validation_is_drawn_only_where_there_is_one():
    batches = list(samples(50))
    assert not near(pixels(collected(batches))[1], GREEN).any()
    assert near(pixels(collected(batches, validation=[10, 20, 30]))[1], GREEN).sum() > 100


def test_one_spike_does_not_flatten_the_curve():
    """The average must use the height of the chart, with or without a loss that is a thousand times too high."""
    calm = [(step, [0.5], [1.0 + 0.1 * (step % 2)]) for step in range(1, 3001)]
    spiky = [(step, sigmas, [4000.0] if step == 1500 else losses) for step, sigmas, losses in calm]
    for batches in (calm, spiky):
        line = np.nonzero(near(pixels(collected(batches))[1][80:400], BLUE))[0]
        assert np.median(line) < 250


def test_the_average_follows_the_losses_over_the_steps():
    batches = [(step, [0.5], [3.0 if step <= 500 else 1.0]) for step in range(1, 1000)]
    lower = near(pixels(collected(batches))[1][75:], BLUE)
    columns = np.nonzero(lower.any(axis=0))[0]
    left, width = columns.min(), columns.max() - columns.min()

    def height(share):
        return np.nonzero(lower[:, left + round(share * width)])[0].mean()

    assert height(0.25) < height(0.45) + 2 < height(0.6) - 100
    assert height(0.9) == pytest.approx(height(0.6), abs=2)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 2500])
def test_a_report_of_any_length_can_be_saved(tmp_path, num_steps):
    path = tmp_path / "レポート" / "損失.png"
    collected(samples(num_steps), validation=[1]).save(path, title="着せ替え" * 30)
    with Image.open(path) as image:
        assert image.size == (900, 1000) and image.format == "PNG"
    assert [file.name for file in path.parent.iterdir()] == ["損失.png"]


def test_a_report_that_cannot_be_drawn_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    path.write_bytes(b"old")
    monkeypatch.setattr("training.loss_report.draw_chart", lambda chart: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collected(samples(2)).save(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
