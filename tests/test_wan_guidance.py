"""The flags that spread guidance over the steps: what they become, what is refused, and what has no effect."""

import pytest

from common.flags import parse
from options.errors import UserError
from options.guidance import GuidanceOptions, SkipLayers, check_layers
from options.wan_guidance import WanGuidanceFlags


def given(*argv: str) -> WanGuidanceFlags:
    return parse(WanGuidanceFlags, description="", argv=list(argv))


def test_without_flags_every_step_has_plain_guidance():
    assert given().guidance_options() == GuidanceOptions()
    assert list(given().guidance_hints()) == []


def test_flags_become_options():
    skip = ("--cfg_skip_mode", "early_late", "--cfg_apply_ratio", "0.6")
    flags = given(*skip, "--slg_layers", " 10, 9 ,9", "--slg_mode", "original", "--slg_end", "0.5", "--slg_scale", "2")
    layers = SkipLayers(blocks=(9, 10), mode="original", scale=2.0, start=0.0, end=0.5)
    wanted = GuidanceOptions(cfg_skip_mode="early_late", cfg_apply_ratio=0.6, skip_layers=layers)
    assert flags.guidance_options() == wanted
    assert list(flags.guidance_hints()) == []


def test_skip_layer_defaults_are_the_incumbents():
    layers = given("--slg_layers", "9", "--slg_mode", "uncond").guidance_options().skip_layers
    assert (layers.scale, layers.start, layers.end) == (3.0, 0.0, 0.3)


@pytest.mark.parametrize("argv", [("--slg_mode", "original"), ("--slg_layers", "9")])
def test_layers_and_mode_need_each_other(argv):
    assert given(*argv).guidance_options().skip_layers is None
    [hint] = given(*argv).guidance_hints()
    assert hint.startswith(argv[0]) and "no effect" in hint


@pytest.mark.parametrize(
    ("argv", "hinted"),
    [
        (("--cfg_skip_mode", "late"), ["--cfg_skip_mode"]),
        (("--cfg_apply_ratio", "0.5"), ["--cfg_apply_ratio"]),
        (("--slg_scale", "2", "--slg_end", "0.5"), ["--slg_scale", "--slg_end"]),
        (("--slg_mode", "uncond", "--slg_layers", "9", "--slg_scale", "2"), ["--slg_scale"]),
    ],
)
def test_flags_without_effect_are_named(argv, hinted):
    assert [hint.split()[0] for hint in given(*argv).guidance_hints()] == hinted


@pytest.mark.parametrize(
    ("argv", "got"),
    [
        (("--cfg_apply_ratio", "1.5"), "1.5"),
        (("--cfg_apply_ratio", "-0.1"), "-0.1"),
        (("--cfg_apply_ratio", "nan"), "nan"),
        (("--slg_layers", "9;10"), "9;10"),
        (("--slg_layers", "-1"), "-1"),
        (("--slg_layers", "九"), "九"),
        (("--slg_layers", ""), "nothing"),
        (("--slg_layers", "9", "--slg_mode", "original", "--slg_start", "2"), "2.0"),
        (("--slg_layers", "9", "--slg_mode", "original", "--slg_end", "-1"), "-1.0"),
        (("--slg_layers", "9", "--slg_mode", "original", "--slg_scale", "nan"), "nan"),
    ],
)
def test_values_that_suit_no_run_are_refused_by_the_name_of_the_flag(argv, got):
    flag, value = argv[-2:]
    with pytest.raises(UserError, match=rf"^{flag}: got {got};"):
        given(f"{flag}={value}", *argv[:-2]).guidance_options()


def test_layers_are_checked_against_the_transformer():
    check_layers((0, 29), num_blocks=30)
    with pytest.raises(UserError, match="--slg_layers: got 30,39; expected numbers from 0 to 29"):
        check_layers((9, 30, 39), num_blocks=30)


@pytest.mark.parametrize(
    ("options", "num_steps", "cfg_scale", "hint"),
    [
        (GuidanceOptions(cfg_skip_mode="late", cfg_apply_ratio=0.5), 20, 1.0, "--cfg_skip_mode"),
        (GuidanceOptions(skip_layers=SkipLayers(blocks=(9,), mode="uncond")), 20, 1.0, "--slg_mode uncond"),
        (GuidanceOptions(skip_layers=SkipLayers(blocks=(9,), mode="original")), 3, 5.0, "--slg_mode"),
        (GuidanceOptions(skip_layers=SkipLayers(blocks=(9,), mode="uncond", start=0.6)), 20, 5.0, "--slg_mode"),
    ],
)
def test_options_without_effect_in_a_run_are_named(options, num_steps, cfg_scale, hint):
    [found] = options.hints(num_steps=num_steps, cfg_scale=cfg_scale)
    assert found.startswith(f"{hint} has no effect")


ORIGINAL = SkipLayers(blocks=(9,), mode="original")


@pytest.mark.parametrize(
    ("options", "cfg_scale"),
    [
        (GuidanceOptions(cfg_skip_mode="late", cfg_apply_ratio=0.5), 5.0),
        (GuidanceOptions(skip_layers=SkipLayers(blocks=(9,), mode="uncond")), 5.0),
        (GuidanceOptions(skip_layers=ORIGINAL), 1.0),
        (GuidanceOptions(skip_layers=ORIGINAL, cfg_skip_mode="late", cfg_apply_ratio=0.5), 1.0),
        (GuidanceOptions(cfg_skip_mode="late"), 1.0),  # without a ratio, which the flags' own hints are about
    ],
)
def test_options_with_effect_are_not_commented_on(options, cfg_scale):
    assert list(options.hints(num_steps=20, cfg_scale=cfg_scale)) == []
