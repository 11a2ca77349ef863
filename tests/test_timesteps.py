"""Timesteps, noise and loss weights of training: the published formulas, and the same draws however items are dealt."""

import hashlib
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit, logit

from dataset.epochs import ItemKey
from modules.flow_matching import denoised, noisy, velocity
from options.errors import UserError
from options.flags_timesteps import TimestepFlags, check_timesteps, settings_read
from training.sigma_distribution import sigma_distribution
from training.timesteps import (
    check_reachable,
    draw_noise,
    draw_sigmas,
    item_seed,
    loss_weights,
    stratified_quantiles,
)

SIZE = 60, 104
NUM_TOKENS = 30 * 52


def keys(count, name="着物_{}"):
    return [ItemKey(dataset=0, name=name.format(number), repeat=0) for number in range(count)]


def seeds(count):
    return [item_seed(1, 0, key) for key in keys(count)]


def draw(flags, count=3000, size=SIZE, **kwargs):
    return draw_sigmas(flags, seeds(count), latent_size=size, **kwargs).double().numpy()


# ---- the distributions, as their cumulative probability at t: the formulas of the methods solved for R or U ----


def shift_cdf(k, scale=1.0):
    """t = s·k / (1 + (k - 1)·s), s = sigmoid(scale·R)."""
    return lambda t: stats.norm.cdf(logit(t / (k - (k - 1) * t)) / scale)


def mu_cdf(at_256, at_high, high, tokens, scale=1.0):
    slope = (at_high - at_256) / (high - 256)
    return shift_cdf(math.exp(slope * tokens + at_256 - slope * 256), scale)


def log_snr_cdf(mean, std):
    """t = sigmoid(-l / 2), l normal."""
    return lambda t: stats.norm.sf(-2 * logit(t), mean, std)


def mixture(*parts):
    return lambda t: sum(probability * cdf(t) for probability, cdf in parts)


FLUX = mu_cdf(0.5, 1.15, 4096, NUM_TOKENS)
QWEN = mu_cdf(0.5, 0.9, 8192, NUM_TOKENS)
TAIL = log_snr_cdf(5.36, 1.0)
SINGLE = [
    (TimestepFlags(timestep_sampling="uniform"), lambda t: t),
    (TimestepFlags(timestep_sampling="sigmoid"), shift_cdf(1.0)),
    (TimestepFlags(timestep_sampling="sigmoid", sigmoid_scale=0.6), shift_cdf(1.0, 0.6)),
    (TimestepFlags(timestep_sampling="shift", discrete_flow_shift=3.0), shift_cdf(3.0)),
    (TimestepFlags(timestep_sampling="shift", discrete_flow_shift=0.4, sigmoid_scale=2.0), shift_cdf(0.4, 2.0)),
    (TimestepFlags(timestep_sampling="flux_shift"), FLUX),
    (TimestepFlags(timestep_sampling="flux_shift", sigmoid_scale=1.5), mu_cdf(0.5, 1.15, 4096, NUM_TOKENS, 1.5)),
    (TimestepFlags(timestep_sampling="flux2_shift"), mu_cdf(0.5, 1.15, 4096, 60 * 104)),
    (TimestepFlags(timestep_sampling="qwen_shift"), QWEN),
    (TimestepFlags(timestep_sampling="krea2_shift"), mu_cdf(0.5, 1.15, 6400, NUM_TOKENS)),
    (TimestepFlags(timestep_sampling="logsnr", logit_mean=0.5, logit_std=1.4), log_snr_cdf(0.5, 1.4)),
]
MIXED = [
    (
        TimestepFlags(timestep_sampling="qinglong_flux", logit_mean=-3.0, logit_std=0.8),
        mixture((0.79, FLUX), (0.11, log_snr_cdf(-3.0, 0.8)), (0.10, TAIL)),
    ),
    (TimestepFlags(timestep_sampling="qinglong_qwen"), mixture((0.95, QWEN), (0.05, TAIL))),
]


def names(cases):
    return [f"{flags.timestep_sampling}{number}" for number, (flags, _) in enumerate(cases)]


def squeezed(cdf, low, high):
    return lambda t: cdf(np.clip((t - low) / (high - low), 1e-12, 1 - 1e-12))


def cut(cdf, low, high):
    return lambda t: (cdf(t) - cdf(low)) / (cdf(high) - cdf(low))


@pytest.mark.parametrize(("flags", "cdf"), SINGLE, ids=names(SINGLE))
@pytest.mark.parametrize("shape", ["whole", "squeezed", "cut"])
def test_a_quantile_of_a_method_is_where_its_formula_has_it(flags, cdf, shape):
    quantiles = np.array([0.001, 0.03, 0.2, 0.5, 0.77, 0.95, 0.9995])
    if shape != "whole":
        flags = replace(flags, min_timestep=150, max_timestep=870, preserve_distribution_shape=shape == "cut")
        cdf = (cut if shape == "cut" else squeezed)(cdf, 0.15, 0.87)
    sigmas = draw(flags, len(quantiles), quantiles=quantiles.tolist())
    np.testing.assert_allclose(cdf(sigmas), quantiles, atol=2e-6)


@pytest.mark.parametrize(("flags", "cdf"), SINGLE + MIXED, ids=names(SINGLE + MIXED))
def test_draws_follow_the_formula(flags, cdf):
    assert stats.kstest(draw(flags), cdf).pvalue > 0.01


@pytest.mark.parametrize(("flags", "cdf"), MIXED, ids=names(MIXED))
def test_a_mixture_is_cut_as_a_whole(flags, cdf):
    """Its parts fall into the range with different probability; cutting each by itself would keep their shares."""
    flags = replace(flags, min_timestep=20, max_timestep=600, preserve_distribution_shape=True)
    assert stats.kstest(draw(flags), cut(cdf, 0.02, 0.6)).pvalue > 0.01


def test_the_parts_of_a_mixture_have_their_shares():
    flux, _ = MIXED[0]
    distribution = sigma_distribution(replace(flux, logit_mean=-9.0), SIZE)
    medians = [distribution.at(0.5, mix=mix) for mix in (0.001, 0.789, 0.791, 0.899, 0.901, 0.999)]
    expected = [math.exp(0.5 + 0.65 / 3840 * (NUM_TOKENS - 256)), math.exp(4.5), math.exp(-2.68)]  # odds
    assert medians == pytest.approx([odds / (1 + odds) for odds in expected for _ in range(2)])


def test_a_part_that_never_falls_into_the_range_is_never_drawn_from():
    flags = TimestepFlags(timestep_sampling="qinglong_qwen", min_timestep=900, preserve_distribution_shape=True)
    for mix in (1e-16, 0.5, 1 - 2**-53, 1.0):  # the last as rounding might have it
        assert 0.9 <= sigma_distribution(flags, SIZE).at(0.5, mix=mix) < 1


def test_cutting_is_what_drawing_again_and_again_gives():
    whole = TimestepFlags(timestep_sampling="qinglong_flux")
    fitting = [t for t in draw(whole, 6000) if 0.02 <= t <= 0.4]
    flags = replace(whole, min_timestep=20, max_timestep=400, preserve_distribution_shape=True)
    assert stats.ks_2samp(draw(flags), fitting).pvalue > 0.01


def test_the_size_of_the_picture_moves_only_the_methods_that_look_at_it():
    for flags, _ in SINGLE:
        small, large = (draw(flags, 5, size, quantiles=[0.1, 0.3, 0.5, 0.7, 0.9]) for size in ((32, 32), (90, 160)))
        if flags.timestep_sampling.split("_")[-1] == "shift" and "_" in flags.timestep_sampling:
            assert np.all(large > small)
        else:
            assert np.array_equal(large, small)


# ---- the default method ----


def index_of(scheme, u):
    """Where the densities of `sigma` look into the schedule 1000, 999, ..., 1, for rising u."""
    if scheme == "logit_normal":
        return np.floor(1000 * expit(0.3 + 0.9 * stats.norm.ppf(u)))
    if scheme == "mode":
        falling = 1 - u
        return np.floor(1000 * (1 - falling - 1.29 * (np.cos(np.pi * falling / 2) ** 2 - 1 + falling)))
    return np.floor(1000 * u)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap", "logit_normal", "mode"])
def test_sigma_draws_whole_timesteps_from_the_density_of_the_weighting_scheme(scheme):
    flags = TimestepFlags(weighting_scheme=scheme, logit_mean=0.3, logit_std=0.9)
    quantiles = np.array([0.00013, 0.04317, 0.21213, 0.50331, 0.77777, 0.99123, 0.99987])
    timesteps = 1000 * draw(flags, len(quantiles), quantiles=quantiles.tolist())
    np.testing.assert_allclose(timesteps, 1000 - index_of(scheme, 1 - quantiles), atol=1e-4)


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode"])
def test_sigma_honours_the_flow_shift(scheme):
    quantiles = [0.1, 0.35, 0.6, 0.9]
    plain = TimestepFlags(weighting_scheme=scheme, mode_scale=0.5)
    sigma = draw(plain, 4, quantiles=quantiles)
    moved = draw(replace(plain, discrete_flow_shift=3.0), 4, quantiles=quantiles)
    np.testing.assert_allclose(moved, 3 * sigma / (1 + 2 * sigma), atol=0.0042)  # both are rounded to whole timesteps
    assert np.all(moved > sigma + 0.05)


@pytest.mark.parametrize("preserve", [False, True])
def test_sigma_trains_every_timestep_of_the_range_and_no_other(preserve):
    flags = TimestepFlags(min_timestep=200, max_timestep=500, preserve_distribution_shape=preserve)
    quantiles = [(number + 0.5) / 300 for number in range(300)]
    timesteps = 1000 * draw(flags, 300, quantiles=quantiles)
    assert sorted(timesteps.round(3)) == list(range(201, 501))


def test_sigma_is_never_clean_and_reaches_pure_noise():
    assert draw(TimestepFlags(), 2, quantiles=[0.0, 1.0]).round(6).tolist() == [0.001, 1.0]


# ---- ranges and extremes ----


@pytest.mark.parametrize("flags", [flags for flags, _ in [*SINGLE, *MIXED]] + [TimestepFlags()], ids=str)
@pytest.mark.parametrize("preserve", [False, True])
def test_no_draw_leaves_the_range(flags, preserve):
    flags = replace(flags, min_timestep=333, max_timestep=667, preserve_distribution_shape=preserve)
    sigmas = draw(flags, 402, quantiles=[0.0, 1.0, *np.linspace(0, 1, 400)])
    assert sigmas.min() >= 0.333 - 1e-7 and sigmas.max() <= 0.667 + 1e-7
    assert sigmas.min() < 0.36 and sigmas.max() > 0.64


EXTREME = [
    TimestepFlags(timestep_sampling="shift", discrete_flow_shift=1e-300, sigmoid_scale=1e300),
    TimestepFlags(timestep_sampling="sigmoid", sigmoid_scale=1e308),
    TimestepFlags(timestep_sampling="logsnr", logit_mean=-1e5, logit_std=1e-5),
    TimestepFlags(timestep_sampling="logsnr", logit_mean=1e5),
    TimestepFlags(timestep_sampling="qinglong_flux"),
    TimestepFlags(discrete_flow_shift=1e300),
    TimestepFlags(discrete_flow_shift=1e-300),
    TimestepFlags(weighting_scheme="logit_normal", logit_mean=1e6),
    TimestepFlags(weighting_scheme="mode", mode_scale=-1.0),
    TimestepFlags(weighting_scheme="mode", mode_scale=1.75),
    TimestepFlags(timestep_sampling="flux_shift", sigmoid_scale=0.001, min_timestep=1, max_timestep=2),
]


@pytest.mark.parametrize("flags", EXTREME, ids=str)
def test_extreme_settings_give_sigmas(flags):
    check_timesteps(flags)
    sigmas = draw(flags, 502, (4000, 4000), quantiles=[0.0, 1.0, *np.linspace(0, 1, 500)])
    assert np.all((sigmas >= 0) & (sigmas <= 1))
    assert np.all(np.isfinite(loss_weights("sigma_sqrt", torch.from_numpy(sigmas)).numpy()))


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 1.29, 1.75])
def test_mode_rises_for_every_scale_that_is_let_through(scale):
    flags = TimestepFlags(weighting_scheme="mode", mode_scale=scale)
    check_timesteps(flags)
    assert np.all(np.diff(draw(flags, 999, quantiles=np.linspace(0, 1, 999))) >= 0)


@pytest.mark.parametrize(
    "flags",
    [
        TimestepFlags(),
        TimestepFlags(min_timestep=0, max_timestep=1000),
        TimestepFlags(min_timestep=999, max_timestep=1000),
        TimestepFlags(num_timestep_buckets=1),
    ],
    ids=str,
)
def test_flags_at_their_limits_are_let_through(flags):
    check_timesteps(flags)
    check_reachable(flags, [SIZE])


def test_a_range_that_no_draw_falls_into_is_an_error_at_the_start():
    narrow = TimestepFlags(timestep_sampling="sigmoid", sigmoid_scale=0.1, min_timestep=900)
    cut_off = replace(narrow, preserve_distribution_shape=True)
    check_reachable(narrow, [SIZE])
    with pytest.raises(UserError, match="--min_timestep, --max_timestep: got 900 to 1000.*(at 832x480)"):
        check_reachable(cut_off, [SIZE])
    with pytest.raises(ValueError):
        draw(cut_off, 1)


def test_every_size_is_asked_whether_it_reaches_the_range():
    flags = TimestepFlags(
        timestep_sampling="flux_shift", sigmoid_scale=0.1, max_timestep=600, preserve_distribution_shape=True
    )
    check_reachable(flags, [(32, 32)])
    with pytest.raises(UserError, match="at 1280x1280"):
        check_reachable(flags, [(32, 32), (160, 160)])


@pytest.mark.parametrize("name", ["discrete_flow_shift", "sigmoid_scale", "logit_mean", "logit_std", "mode_scale"])
def test_a_flag_is_called_without_effect_exactly_when_it_has_none(name):
    densities = [TimestepFlags(weighting_scheme=scheme) for scheme in ("none", "logit_normal", "mode")]
    shifted_densities = [replace(flags, timestep_sampling="shift") for flags in densities]
    for flags in [*densities, *shifted_densities, *(flags for flags, _ in SINGLE + MIXED)]:
        changed = replace(flags, **{name: getattr(flags, name) + 0.37})
        assert np.array_equal(draw(flags, 50), draw(changed, 50)) == (name not in settings_read(flags))


# ---- functions of seed, epoch and item ----


@pytest.mark.parametrize("flags", [TimestepFlags(), *(flags for flags, _ in MIXED)], ids=str)
def test_a_batch_gets_what_its_items_get_alone(flags):
    mine = seeds(7)
    batch = draw_sigmas(flags, mine, latent_size=SIZE)
    alone = [draw_sigmas(flags, [seed], latent_size=SIZE) for seed in mine]
    assert batch.dtype == torch.float32 and torch.equal(batch, torch.cat(alone))
    assert torch.equal(draw_sigmas(flags, mine[::-1], latent_size=SIZE), batch.flip(0))


@pytest.mark.parametrize("shape", [(16, 1, 8, 8), (3,), (16, 9, 4, 6)])
def test_noise_of_a_batch_is_that_of_its_items(shape):
    mine = seeds(4)
    batch = draw_noise(mine, shape)
    assert batch.shape == (4, *shape) and batch.dtype == torch.float32
    assert torch.equal(batch, torch.cat([draw_noise([seed], shape) for seed in mine]))
    assert len({tuple(row.flatten().tolist()) for row in batch}) == 4


def test_noise_is_standard_normal():
    values = draw_noise(seeds(20), (16, 1, 8, 8)).flatten().numpy()
    assert stats.kstest(values, stats.norm.cdf).pvalue > 0.01


def test_an_items_timestep_and_noise_have_nothing_to_do_with_each_other():
    mine = seeds(2000)
    sigmas = draw_sigmas(TimestepFlags(timestep_sampling="uniform"), mine, latent_size=SIZE)
    noise = draw_noise(mine, (1,))[:, 0]
    strata = stratified_quantiles(keys(2000), seed=0, epoch=0, num_buckets=2000)
    quantiles = torch.tensor([strata[key] for key in keys(2000)])
    correlations = torch.corrcoef(torch.stack([sigmas, noise.double(), quantiles.double()])).fill_diagonal_(0)
    assert correlations.abs().max() < 0.06


def test_drawing_uses_no_global_generator():
    before = torch.get_rng_state()
    first = draw(TimestepFlags(), 3), draw_noise(seeds(2), (4,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert np.array_equal(first[0], draw(TimestepFlags(), 3)) and torch.equal(first[1], draw_noise(seeds(2), (4,)))


def test_seed_epoch_and_every_part_of_the_key_make_another_seed():
    key = ItemKey(dataset=1, name="花.safetensors", repeat=2)
    others = [replace(key, dataset=2), replace(key, name="鼻.safetensors"), replace(key, repeat=1)]
    found = {item_seed(1, 2, key), item_seed(2, 2, key), item_seed(1, 1, key), item_seed(2, 1, key)}
    assert len(found | {item_seed(1, 2, other) for other in others}) == 7


def test_draws_are_the_same_on_every_machine_and_in_every_version():
    """A resumed run must go on with these numbers: SHA-256, 64 bits of it for a seed, 52 for a uniform number."""

    def number(*parts):
        return int(hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16], 16)

    key = ItemKey(dataset=3, name="a", repeat=1)
    seed = number("draws", 42, 7, 3, "a", 1)
    assert item_seed(42, 7, key) == seed
    uniform = ((number("timestep", seed) >> 12) + 0.5) / 2**52
    sigma = draw_sigmas(TimestepFlags(timestep_sampling="uniform"), [seed], latent_size=SIZE)
    assert float(sigma) == pytest.approx(uniform, abs=1e-7)
    noise = torch.randn(5, generator=torch.Generator().manual_seed(number("noise", seed)))
    assert torch.equal(draw_noise([seed], (5,))[0], noise)


# ---- strata ----


@pytest.mark.parametrize(("count", "num_buckets"), [(100, 10), (103, 10), (7, 7), (5, 1000), (1, 3), (1000, 3)])
@pytest.mark.parametrize("epoch", range(4))
def test_every_stratum_is_used_equally_often(count, num_buckets, epoch):
    quantiles = stratified_quantiles(keys(count), seed=5, epoch=epoch, num_buckets=num_buckets)
    assert quantiles.keys() == set(keys(count))
    used = Counter(int(quantile * num_buckets) for quantile in quantiles.values())
    counts = [used[bucket] for bucket in range(num_buckets)]
    assert sum(counts) == count and max(counts) - min(counts) <= 1


def test_strata_depend_on_seed_epoch_and_items_alone():
    first = stratified_quantiles(keys(30), seed=1, epoch=2, num_buckets=6)
    assert stratified_quantiles(keys(30)[::-1], seed=1, epoch=2, num_buckets=6) == first
    others = [stratified_quantiles(keys(30), seed=s, epoch=e, num_buckets=6) for s, e in ((1, 3), (2, 2))]
    ranks = [tuple(int(6 * q[key]) for key in keys(30)) for q in (first, *others)]
    assert len(set(ranks)) == 3


@pytest.mark.parametrize(("count", "num_buckets"), [(3, 10), (10, 4)])
def test_an_item_meets_all_timesteps_over_the_epochs(count, num_buckets):
    mine = [
        stratified_quantiles(keys(count), seed=0, epoch=epoch, num_buckets=num_buckets)[keys(count)[0]]
        for epoch in range(600)
    ]
    assert stats.kstest(mine, stats.uniform.cdf).pvalue > 0.01


def test_few_items_are_spread_over_the_strata():
    for epoch in range(20):
        quantiles = sorted(stratified_quantiles(keys(4), seed=0, epoch=epoch, num_buckets=100).values())
        assert np.all(np.diff(quantiles) > 0.2)


@pytest.mark.parametrize("method", ["shift", "flux_shift", "logsnr"])
def test_strata_hold_for_every_method_also_when_it_is_cut(method):
    flags = TimestepFlags(timestep_sampling=method, min_timestep=300, preserve_distribution_shape=True)
    strata = stratified_quantiles(keys(100), seed=0, epoch=0, num_buckets=10)
    sigmas = draw(flags, 100, quantiles=[strata[key] for key in keys(100)])
    edges = draw(flags, 11, quantiles=[number / 10 for number in range(11)])
    assert np.histogram(sigmas, edges + 1e-6 * (np.arange(11) - 5))[0].tolist() == [10] * 10


def test_strata_hold_for_whole_timesteps():
    flags = TimestepFlags(min_timestep=300)
    strata = stratified_quantiles(keys(100), seed=0, epoch=0, num_buckets=10)
    timesteps = (1000 * draw(flags, 100, quantiles=[strata[key] for key in keys(100)])).round()
    assert Counter((timesteps - 301) // 70) == dict.fromkeys(range(10), 10)


def test_a_batch_of_strata_needs_a_quantile_for_every_item():
    with pytest.raises(ValueError):
        draw_sigmas(TimestepFlags(), seeds(2), latent_size=SIZE, quantiles=[0.5])


# ---- weights and the noisy latents ----


def test_loss_weights_are_those_of_the_formulas():
    sigmas = torch.tensor([0.001, 0.25, 0.5, 1.0])
    torch.testing.assert_close(loss_weights("sigma_sqrt", sigmas), torch.tensor([1e6, 16.0, 4.0, 1.0]))
    expected = [2 / math.pi / (1 - 2 * s + 2 * s * s) for s in (0.001, 0.25, 0.5, 1.0)]
    torch.testing.assert_close(loss_weights("cosmap", sigmas), torch.tensor(expected))


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode"])
def test_densities_do_not_weigh_the_loss(scheme):
    assert loss_weights(scheme, torch.rand(3)) is None


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_loss_weights_are_finite_where_latents_are_clean(scheme):
    weights = loss_weights(scheme, torch.tensor([0.0, 1e-30, 1e-3]))
    assert torch.isfinite(weights).all() and weights.max() <= 1e6 * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_sample_has_its_own_noise_level(dtype):
    latents, sigmas = torch.randn(3, 4, 2, 5, 5).to(dtype), torch.tensor([0.0, 0.3, 1.0])
    noise = torch.randn(3, 4, 2, 5, 5)
    mixed = noisy(latents, noise, sigmas)
    assert mixed.dtype == torch.float32
    for row, sigma in enumerate(sigmas.tolist()):
        expected = latents[row].double() * (1 - sigma) + noise[row].double() * sigma
        torch.testing.assert_close(mixed[row].double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(mixed[0], latents[0].float()) and torch.equal(mixed[2], noise[2])


def test_the_velocity_that_training_teaches_is_the_one_that_samplers_follow():
    latents, noise = torch.randn(2, 4, 1, 3, 3).bfloat16(), torch.randn(2, 4, 1, 3, 3)
    target = velocity(latents, noise)
    assert target.dtype == torch.float32
    for sigma in (0.2, 0.9):
        clean = denoised(noisy(latents, noise, torch.full((2,), sigma)), target, sigma)
        torch.testing.assert_close(clean, latents.float(), atol=1e-6, rtol=0)
