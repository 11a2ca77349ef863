"""Sigma schedule and UniPC against independent trajectories and formulas."""

import math

import pytest
import torch

from modules.flow_matching import MAX_MU, denoised, resolution_mu, shifted_sigmas
from modules.guidance import guided
from modules.samplers import corrector, predictor, unipc

SCHEDULES = {
    (9, 80, 80): [1, 0.965517, 0.913043, 0.823529, 0.636364, 0],
    (1, 80, 80): [1, 0.892237, 0.756386, 0.579820, 0.341010, 0],
    (1, 64, 64): [1, 0.882497, 0.737974, 0.555899, 0.319451, 0],
}
TRAJECTORIES = {
    1: [-0.8, -0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6],
    2: [-0.795625, -0.592812, -0.39, -0.187187, 0.015625, 0.218437, 0.42125, 0.624062],
    4: [-0.790211, -0.583918, -0.377625, -0.171332, 0.034961, 0.241253, 0.447546, 0.653839],
    6: [-0.787616, -0.579655, -0.371694, -0.163732, 0.044229, 0.25219, 0.460151, 0.668112],
}


@pytest.mark.parametrize("latent_size", SCHEDULES)
def test_sigmas_follow_the_resolution(latent_size):
    frames, height, width = latent_size
    sigmas = shifted_sigmas(5, resolution_mu(frames * height * width // 4))
    torch.testing.assert_close(sigmas, torch.tensor(SCHEDULES[latent_size], dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_steps", TRAJECTORIES)
def test_unipc_reproduces_the_reference_trajectories(num_steps):
    sigmas = shifted_sigmas(num_steps, MAX_MU)

    def model(x, step):
        sigma = float(sigmas[step])
        return denoised(x, 0.3 * x + 0.1 * sigma, sigma)

    result = unipc(model, torch.linspace(-1, 1, 8), sigmas)
    torch.testing.assert_close(result, torch.tensor(TRAJECTORIES[num_steps]), atol=2e-6, rtol=0)


def test_unipc_calls_the_model_once_per_step():
    calls = []

    def model(x, step):
        calls.append(step)
        return x * 0.5

    unipc(model, torch.ones(3), shifted_sigmas(7, 1.0))
    assert calls == list(range(7))


def exact_update(lambda_0: float, lambda_t: float, x: float, degree: int) -> float:
    """The exact solution for a model output of (lambda - lambda_0)^degree:
    x_t = e^(-h)·x + integral over s in [0, h] of e^(s - h)·s^degree, by Simpson's rule."""
    h = lambda_t - lambda_0
    s = torch.linspace(0, h, 2001, dtype=torch.float64)
    values = torch.exp(s - h) * s**degree
    weights = torch.ones(2001, dtype=torch.float64)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return math.exp(-h) * x + float((values * weights).sum() * h / 2000 / 3)


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_third_order_updates_are_exact_for_polynomials_that_they_can_represent(degree):
    """A predictor of order p integrates degree p - 1 exactly, a corrector degree p."""
    nodes, target, x = [1.0, 0.7, 0.2], 1.6, 0.4
    outputs = [torch.tensor((node - nodes[0]) ** degree, dtype=torch.float64) for node in nodes]
    at_target = torch.tensor((target - nodes[0]) ** degree, dtype=torch.float64)
    start, exact = torch.tensor(x, dtype=torch.float64), exact_update(nodes[0], target, x, degree)
    assert float(predictor(nodes, target)(start, outputs)) == pytest.approx(exact, abs=1e-9)
    assert float(corrector(nodes, target)(start, [at_target, *outputs])) == pytest.approx(exact, abs=1e-9)


def test_guidance_of_scale_one_is_the_positive_prediction():
    positive, negative = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guided(positive, negative, 1.0), positive)


def test_full_rescale_restores_the_contrast_of_the_positive_per_sample():
    positive, negative = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    result = guided(positive, negative, 7.0, rescale=1.0)
    torch.testing.assert_close(result.std(dim=1), positive.std(dim=1))
    half = guided(positive, negative, 7.0, rescale=0.5)
    torch.testing.assert_close(half, (result + guided(positive, negative, 7.0)) / 2)
