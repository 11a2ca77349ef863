"""Wan's solvers against tables and trajectories of the incumbent's, and against an equation that is solved on paper."""

import math

import pytest
import torch

from modules.flow_matching import NUM_TIMESTEPS
from modules.solvers import flow_solver

SOLVERS = ("unipc", "dpm++", "vanilla")
SIGMAS = {  # flow shift 5, 5 steps
    "unipc": [0.9998, 0.952154, 0.882093, 0.768935, 0.555247, 0],
    "dpm++": [1, 0.952381, 0.882353, 0.769231, 0.555556, 0],
    "vanilla": [1, 0.952381, 0.882353, 0.769231, 0.555556, 0],
}
TIMESTEPS = {
    "unipc": [999, 952, 882, 768, 555],
    "dpm++": [1000, 952, 882, 769, 555],
    "vanilla": [1000, 952.381, 882.353, 769.231, 555.556],
}
TRAJECTORIES = {  # flow shift 5, 6 steps, v = 0.3·x + 0.1·timestep / 1000
    "unipc": [-0.786059, -0.577111, -0.368163, -0.159215, 0.049732, 0.25868, 0.467628, 0.676576],
    "dpm++": [-0.786248, -0.577415, -0.368581, -0.159748, 0.049086, 0.25792, 0.466753, 0.675587],
    "vanilla": [-0.787015, -0.578668, -0.370321, -0.161974, 0.046374, 0.254721, 0.463068, 0.671415],
}
START = torch.linspace(-1, 1, 8)


def close(result, expected, atol):
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float32), atol=atol, rtol=0)


def error_on_a_known_equation(name: str, num_steps: int, shift: float) -> float:
    """dx/dsigma = 0.3·x + 0.1·sigma has the solution x = c·e^(0.3·sigma) - sigma / 3 - 10 / 9."""
    solver = flow_solver(name, num_steps, shift)
    first = float(solver.sigmas[0])
    exact = (START + first / 3 + 10 / 9) * math.exp(-0.3 * first) - 10 / 9
    result = solver.solve(lambda x, step: 0.3 * x + 0.1 * float(solver.sigmas[step]), START)
    return float((result - exact).abs().max())


@pytest.mark.parametrize("name", SOLVERS)
def test_sigmas_and_timesteps_are_the_incumbents(name):
    solver = flow_solver(name, 5, 5.0)
    close(solver.sigmas, SIGMAS[name], atol=5e-7)
    close(solver.timesteps, TIMESTEPS[name], atol=0 if name != "vanilla" else 5e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_trajectories_are_the_incumbents(name):
    solver = flow_solver(name, 6, 5.0)
    result = solver.solve(lambda x, step: 0.3 * x + 0.1 * solver.timesteps[step] / NUM_TIMESTEPS, START)
    close(result, TRAJECTORIES[name], atol=1e-6)


@pytest.mark.parametrize("num_steps", [10, 25, 40, 125, 500])
def test_timesteps_that_are_whole_numbers_lose_nothing_to_rounding(num_steps):
    expected = [1000 - step * 1000 // num_steps for step in range(num_steps)]
    assert flow_solver("dpm++", num_steps, 1.0).timesteps.tolist() == expected


@pytest.mark.parametrize(("name", "gain"), [("unipc", 4), ("dpm++", 3), ("vanilla", 1.8)])
def test_twice_the_steps_lessen_the_error_by_the_order_of_the_solver(name, gain):
    error = error_on_a_known_equation(name, 8, 3.0)
    assert error < 0.02
    assert error_on_a_known_equation(name, 16, 3.0) < error / gain


@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_goes_straight_to_the_picture(name):
    solver = flow_solver(name, 1, 5.0)
    velocity = torch.linspace(0.5, -2, 8)
    close(solver.solve(lambda x, step: velocity, START), (START - solver.sigmas[0] * velocity).tolist(), atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("shift", [0.001, 1.0, 1000.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 50])
def test_noise_with_the_right_velocity_becomes_the_picture(name, shift, num_steps):
    """Along a straight path every solver is exact, from any shift and with any number of steps."""
    picture, noise = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    solver = flow_solver(name, num_steps, shift)
    start = float(solver.sigmas[0])
    result = solver.solve(lambda x, step: noise - picture, (1 - start) * picture + start * noise)
    torch.testing.assert_close(result, picture, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_with_equal_timesteps_are_all_taken(name):
    solver = flow_solver(name, 100, 50.0)
    assert name == "vanilla" or len(solver.timesteps.unique()) < 100
    steps = []
    solver.solve(lambda x, step: steps.append(step) or x, START)
    assert steps == list(range(100))
    assert error_on_a_known_equation(name, 100, 50.0) < 0.03


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_keeps_nothing_between_runs(name):
    solver = flow_solver(name, 6, 5.0)
    noise = START.clone()
    first = solver.solve(lambda x, step: 0.3 * x, noise)
    solver.solve(lambda x, step: -x, noise)
    torch.testing.assert_close(solver.solve(lambda x, step: 0.3 * x, noise), first, atol=0, rtol=0)
    torch.testing.assert_close(noise, START, atol=0, rtol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_half_precision_predictions_are_summed_in_float32(name):
    solver = flow_solver(name, 6, 5.0)
    velocity = torch.linspace(0.5, -2, 8, dtype=torch.bfloat16)
    seen = []
    result = solver.solve(lambda x, step: seen.append(x.dtype) or velocity, START.bfloat16())
    assert {*seen, result.dtype} == {torch.float32}
    exact = START.bfloat16().float() - solver.sigmas[0] * velocity.float()
    torch.testing.assert_close(result, exact, atol=1e-5, rtol=0)
