"""Which steps are guided, by which passes, and what becomes of their predictions."""

from fractions import Fraction

import pytest
import torch

from modules.guidance import StepGuidance, cfg_steps, guided, plan_guidance
from options.guidance import GuidanceOptions, SkipLayers, count_of

GUIDED = {  # (mode, ratio, steps): those with CFG, worked out by hand
    ("early", 0.3, 10): [7, 8, 9],
    ("late", 0.3, 10): [0, 1, 2],
    ("middle", 0.3, 10): [0, 8, 9],
    ("early_late", 0.3, 10): [3, 4, 5],
    ("alternate", 0.3, 10): [3, 6, 9],
    ("early", 0.5, 10): [5, 6, 7, 8, 9],
    ("late", 0.5, 10): [0, 1, 2, 3, 4],
    ("middle", 0.5, 10): [0, 1, 7, 8, 9],
    ("early_late", 0.5, 10): [2, 3, 4, 5, 6],
    ("alternate", 0.5, 10): [1, 3, 5, 7, 9],
    ("early", 0.5, 7): [4, 5, 6],
    ("late", 0.5, 7): [0, 1, 2],
    ("middle", 0.5, 7): [0, 5, 6],
    ("early_late", 0.5, 7): [2, 3, 4],
    ("alternate", 0.5, 7): [1, 3, 5],
    ("early", 0.75, 10): [3, 4, 5, 6, 7, 8, 9],
    ("middle", 0.75, 10): [0, 1, 2, 6, 7, 8, 9],
    ("early_late", 0.75, 10): [1, 2, 3, 4, 5, 6, 7],
    ("alternate", 0.75, 10): [1, 2, 3, 5, 6, 7, 9],
}
MODES = ("early", "late", "middle", "early_late", "alternate")
CFG = ("positive", "negative")
THREE = ("positive", "negative", "skipping")
POSITIVE, NEGATIVE, SKIPPING = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
PREDICTIONS = {"positive": POSITIVE, "negative": NEGATIVE, "skipping": SKIPPING}


def slg(mode: str, **numbers) -> SkipLayers:
    return SkipLayers(blocks=(9, 10), mode=mode, **numbers)


def passes(num_steps: int, cfg_scale: float, **options) -> list[tuple[str, ...]]:
    return [step.passes for step in plan_guidance(num_steps, cfg_scale, GuidanceOptions(**options))]


@pytest.mark.parametrize(("mode", "ratio", "num_steps"), GUIDED)
def test_the_mode_places_the_steps_with_cfg(mode, ratio, num_steps):
    steps = cfg_steps(mode, ratio, num_steps)
    assert [step for step in range(num_steps) if steps[step]] == GUIDED[mode, ratio, num_steps]


@pytest.mark.parametrize("mode", MODES)
def test_the_whole_ratio_is_every_step_and_zero_none(mode):
    assert cfg_steps(mode, 1.0, 9) == (True,) * 9
    assert cfg_steps(mode, 0.0, 9) == (False,) * 9


def test_without_a_mode_or_a_ratio_every_step_has_cfg():
    assert cfg_steps("none", 0.2, 5) == (True,) * 5
    assert cfg_steps("early", None, 5) == (True,) * 5


@pytest.mark.parametrize("hundredths", [1, 7, 10, 30, 35, 60, 70, 90, 99])
def test_alternate_adds_the_ratio_up_without_losing_to_rounding(hundredths):
    """The rule as it is written, on fractions: 0.1 + 0.1 + … makes a whole step at the tenth."""
    weight, expected = Fraction(0), []
    for _ in range(100):
        weight += Fraction(hundredths, 100)
        expected.append(weight >= 1)
        weight -= int(weight >= 1)
    assert cfg_steps("alternate", hundredths / 100, 100) == tuple(expected)


@pytest.mark.parametrize("mode", MODES)
def test_as_many_steps_have_cfg_as_the_ratio_says(mode):
    assert sum(cfg_steps(mode, 0.29, 100)) == 29  # 0.29 * 100 is a little less
    assert sum(cfg_steps(mode, 0.5, 7)) == 3


def test_a_plain_run_has_two_passes_a_step_and_one_at_scale_one():
    assert passes(3, 5.0) == [CFG] * 3
    assert passes(3, 1.0) == [("positive",)] * 3


def test_skipped_steps_run_the_positive_pass_alone():
    assert passes(4, 5.0, cfg_skip_mode="late", cfg_apply_ratio=0.5) == [CFG, CFG, ("positive",), ("positive",)]


def test_skip_layer_guidance_is_used_from_its_start_up_to_its_end():
    window = {"start": 0.2, "end": 0.5}
    original = passes(10, 5.0, skip_layers=slg("original", **window))
    assert original == [CFG] * 2 + [THREE] * 3 + [CFG] * 5
    uncond = passes(10, 5.0, skip_layers=slg("uncond", **window))
    assert uncond == [CFG] * 2 + [("positive", "skipping")] * 3 + [CFG] * 5
    assert passes(10, 5.0, skip_layers=slg("original")) == [THREE] * 3 + [CFG] * 7


@pytest.mark.parametrize("mode", ["original", "uncond"])
def test_skip_layer_guidance_is_used_only_where_cfg_is(mode):
    plan = passes(10, 5.0, skip_layers=slg(mode), cfg_skip_mode="early", cfg_apply_ratio=0.8)
    assert [step for step in range(10) if "skipping" in plan[step]] == [2]


def test_passes_that_would_weigh_nothing_are_not_run():
    assert passes(10, 1.0, skip_layers=slg("original"))[0] == ("positive", "skipping")
    assert passes(10, 1.0, skip_layers=slg("uncond"))[0] == ("positive",)
    assert passes(10, 5.0, skip_layers=slg("original", scale=0.0))[0] == CFG


def test_steps_with_a_skipping_pass_name_the_blocks():
    plan = plan_guidance(10, 5.0, GuidanceOptions(skip_layers=slg("original")))
    assert [step.skipped_blocks for step in plan] == [(9, 10)] * 3 + [()] * 7


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (StepGuidance(), POSITIVE),
        (StepGuidance(away_from="negative", cfg_scale=5.0), NEGATIVE + 5 * (POSITIVE - NEGATIVE)),
        (StepGuidance(away_from="skipping", cfg_scale=5.0), SKIPPING + 5 * (POSITIVE - SKIPPING)),
        (
            StepGuidance(away_from="negative", cfg_scale=5.0, skip_scale=2.5),
            NEGATIVE + 5 * (POSITIVE - NEGATIVE) + 2.5 * (POSITIVE - SKIPPING),
        ),
        (StepGuidance(skip_scale=2.5), POSITIVE + 2.5 * (POSITIVE - SKIPPING)),
    ],
)
def test_predictions_are_combined_by_the_formula(step, expected):
    needed = {name: PREDICTIONS[name] for name in step.passes}
    torch.testing.assert_close(step.combine(needed), expected)


def test_planned_scales_reach_the_formula():
    step = plan_guidance(10, 7.0, GuidanceOptions(skip_layers=slg("original", scale=1.5)))[0]
    expected = guided(POSITIVE, NEGATIVE, 7.0) + 1.5 * (POSITIVE - SKIPPING)
    torch.testing.assert_close(step.combine(PREDICTIONS), expected)
    step = plan_guidance(10, 7.0, GuidanceOptions(skip_layers=slg("uncond", scale=1.5)))[0]
    torch.testing.assert_close(step.combine(PREDICTIONS), guided(POSITIVE, SKIPPING, 7.0))


def test_a_share_given_as_a_whole_number_is_still_a_share():
    assert count_of(1, 20) == 20
