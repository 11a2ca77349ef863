"""What users may ask of timesteps: every value that cannot work is named, and every flag that does nothing is told."""

import math

import pytest

from options.errors import UserError
from options.flags_timesteps import TimestepFlags, check_timesteps, unread_settings


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        (TimestepFlags(timestep_sampling="ideogram4_shift"), "--timestep_sampling"),
        (TimestepFlags(discrete_flow_shift=0.0), "--discrete_flow_shift"),
        (TimestepFlags(discrete_flow_shift=math.nan), "--discrete_flow_shift"),
        (TimestepFlags(sigmoid_scale=-1.0), "--sigmoid_scale"),
        (TimestepFlags(sigmoid_scale=math.inf), "--sigmoid_scale"),
        (TimestepFlags(logit_mean=math.nan), "--logit_mean"),
        (TimestepFlags(logit_std=0.0), "--logit_std"),
        (TimestepFlags(weighting_scheme="mode", mode_scale=1.8), "--mode_scale"),
        (TimestepFlags(weighting_scheme="mode", mode_scale=-1.1), "--mode_scale"),
        (TimestepFlags(weighting_scheme="mode", mode_scale=math.nan), "--mode_scale"),
        (TimestepFlags(min_timestep=-1), "--min_timestep"),
        (TimestepFlags(min_timestep=1000), "--min_timestep"),
        (TimestepFlags(max_timestep=0), "--max_timestep"),
        (TimestepFlags(max_timestep=1001), "--max_timestep"),
        (TimestepFlags(min_timestep=500, max_timestep=500), "--max_timestep"),
        (TimestepFlags(num_timestep_buckets=-1), "--num_timestep_buckets"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flags_that_cannot_work_are_named(flags, where):
    with pytest.raises(UserError) as caught:
        check_timesteps(flags)
    assert str(caught.value).startswith(f"{where}: got ") and "\n" not in str(caught.value)


def test_all_bad_flags_are_named_at_once():
    with pytest.raises(UserError) as caught:
        check_timesteps(TimestepFlags(sigmoid_scale=0.0, min_timestep=1000))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["--sigmoid_scale", "--min_timestep"]


@pytest.mark.parametrize(
    ("flags", "unread"),
    [
        (TimestepFlags(timestep_sampling="shift", discrete_flow_shift=3.0, sigmoid_scale=2.0), []),
        (TimestepFlags(timestep_sampling="uniform", discrete_flow_shift=3.0), ["--discrete_flow_shift 3.0"]),
        (TimestepFlags(sigmoid_scale=2.0), ["--sigmoid_scale 2.0"]),
        (TimestepFlags(weighting_scheme="logit_normal", logit_mean=1.0), []),
        (TimestepFlags(timestep_sampling="shift", weighting_scheme="mode"), ["--weighting_scheme mode"]),
        (TimestepFlags(logit_mean=1.0, mode_scale=1.0), ["--logit_mean 1.0", "--mode_scale 1.0"]),
        (TimestepFlags(preserve_distribution_shape=True), ["--preserve_distribution_shape True"]),
        (TimestepFlags(preserve_distribution_shape=True, max_timestep=900), []),
    ],
    ids=str,
)
def test_flags_without_effect_are_told(flags, unread):
    assert [line.split(" has no effect")[0] for line in unread_settings(flags)] == unread


@pytest.mark.parametrize(("number", "strata"), [(None, None), (0, None), (1, None), (2, 2), (50, 50)])
def test_strata_begin_with_two(number, strata):
    assert TimestepFlags(num_timestep_buckets=number).num_strata == strata
