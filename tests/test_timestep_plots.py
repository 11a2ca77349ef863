"""--show_timesteps: the picture and the text show how timesteps are drawn, without weights or data."""

import logging
import re

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from scipy.special import logit

from common.plots import BLUE
from options.flags_timesteps import TimestepFlags
from training.timestep_plots import show_timesteps


def rows(text):
    """(first timestep, last timestep, percentage of the draws, weight, length of the bar) of every line."""
    found = re.findall(r"^ *(\d+) - +(\d+) +([\d.]+)% +([\d.e+]+) *(#*)$", text, re.MULTILINE)
    return [(int(a), int(b), float(share), float(weight), len(bar)) for a, b, share, weight, bar in found]


def shown(capsys, num_draws=4000, **flags):
    show_timesteps(TimestepFlags(show_timesteps="console", **flags), folder=None, num_draws=num_draws)
    return capsys.readouterr().out


def test_the_text_counts_draws_in_equal_intervals(capsys):
    table = rows(shown(capsys, num_timestep_buckets=4000))
    assert [row[:2] for row in table] == [(start, start + 50) for start in range(0, 1000, 50)]
    assert [row[2] for row in table] == [5.0] * 20 and {row[4] for row in table} == {50}


def test_the_text_follows_the_distribution(capsys):
    table = rows(shown(capsys, timestep_sampling="shift", discrete_flow_shift=3.0, num_timestep_buckets=4000))
    edges = np.arange(21) / 20
    with np.errstate(divide="ignore"):
        expected = 100 * np.diff(stats.norm.cdf(logit(edges / (3 - 2 * edges))))
    assert [row[2] for row in table] == pytest.approx(expected, abs=0.11)
    bars = np.array([row[4] for row in table])
    assert bars == pytest.approx(50 * expected / expected.max(), abs=1)


def test_the_text_tells_the_loss_weights(capsys):
    table = rows(shown(capsys, weighting_scheme="sigma_sqrt"))
    assert [row[3] for row in table] == pytest.approx([(1000 / (50 * n + 25)) ** 2 for n in range(20)], rel=1e-3)
    assert {row[3] for row in rows(shown(capsys))} == {1.0}


def test_the_text_names_the_method_and_what_it_reads_and_nothing_else(capsys):
    text = shown(capsys, timestep_sampling="logsnr", logit_mean=0.0, min_timestep=0, sigmoid_scale=3.0)
    heading = text.splitlines()[:2]
    assert heading[0] == "Timesteps of logsnr, drawn for 640x640"
    assert heading[1] == "weighting_scheme none, logit_mean 0.0, logit_std 1.0, min_timestep 0"
    assert text.isascii()


def test_methods_that_look_at_the_size_are_drawn_for_the_given_one(capsys):
    def mean_timestep(latent_size):
        flags = TimestepFlags(timestep_sampling="flux_shift", show_timesteps="console")
        show_timesteps(flags, folder=None, latent_size=latent_size, num_draws=500)
        text = capsys.readouterr().out
        assert f"{latent_size[1] * 8}x{latent_size[0] * 8}" in text.splitlines()[0]
        return sum(row[0] * row[2] for row in rows(text)) / 100

    assert mean_timestep((32, 48)) < mean_timestep((120, 160)) - 50


def picture(folder, **flags):
    show_timesteps(TimestepFlags(show_timesteps="image", **flags), folder=folder, num_draws=2000)
    with Image.open(folder / "timesteps.png") as image:
        return np.asarray(image.convert("RGB")).astype(int)


def blue_columns(pixels):
    """For every column of pixels, how many are as blue as the bars."""
    return (np.abs(pixels - BLUE).sum(axis=2) < 20).sum(axis=0)


def test_the_picture_has_bars_over_the_range_alone(tmp_path):
    whole = np.nonzero(blue_columns(picture(tmp_path / "全部", timestep_sampling="uniform")))[0]
    part = np.nonzero(blue_columns(picture(tmp_path / "一部", min_timestep=200, max_timestep=700)))[0]
    left, width = whole.min(), whole.max() - whole.min()
    assert (part.min() - left) / width == pytest.approx(0.2, abs=0.01)
    assert (part.max() - left) / width == pytest.approx(0.7, abs=0.01)


def test_the_picture_shows_where_draws_are_frequent(tmp_path):
    columns = blue_columns(picture(tmp_path, timestep_sampling="shift", discrete_flow_shift=5.0))
    bars = np.nonzero(columns)[0]
    peak = (np.argmax(columns) - bars.min()) / (bars.max() - bars.min())
    density = np.gradient(stats.norm.cdf(logit((t := np.linspace(0.01, 0.99, 981)) / (5 - 4 * t))))
    assert peak == pytest.approx(t[np.argmax(density)], abs=0.06)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap", "mode"])
def test_the_weighting_changes_the_lower_chart_alone_unless_it_is_a_density(tmp_path, scheme):
    plain, other = picture(tmp_path / "a"), picture(tmp_path / "b", weighting_scheme=scheme)
    upper = slice(60, 400)  # between title and axis labels
    assert np.array_equal(plain[upper], other[upper]) == (scheme != "mode")
    lower = plain[560:780], other[560:780]
    assert np.array_equal(*lower) == (scheme in ("none", "mode"))


def test_the_picture_goes_to_the_current_folder_and_the_log_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        show_timesteps(TimestepFlags(show_timesteps="image"), folder=None, num_draws=50)
    assert [path.name for path in tmp_path.iterdir()] == ["timesteps.png"]
    assert "timesteps.png" in caplog.text


def test_the_same_flags_give_the_same_picture(tmp_path):
    flags = TimestepFlags(show_timesteps="image", timestep_sampling="qinglong_flux")
    for folder in ("a", "b"):
        show_timesteps(flags, folder=tmp_path / folder, num_draws=200)
    first, second = ((tmp_path / folder / "timesteps.png").read_bytes() for folder in ("a", "b"))
    assert first == second
