"""Solvers of Wan: diffusers' UniPC and DPM-Solver++ multistep on sigma tables of our own, and Euler.

A table is evenly spaced and then shifted towards noise; diffusers' own ones are spaced a little differently, which
makes other pictures.

Sources: Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models", 2023;
Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modules.flow_matching import NUM_TIMESTEPS, shifted
from options.flags_generate import SolverName

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

Predict = Callable[[Tensor, int], Tensor]
"""(x, step) → the velocity in x, as predicted by a model that is told `timesteps[step]`."""
Advance = Callable[[Tensor, Tensor, int], Tensor]
"""(x, velocity, step) → x at the next sigma. Called once for each step, in order."""
UNIPC_START = 1 - 1 / NUM_TIMESTEPS
"""At 1, where nothing is left of the picture, its logarithms are infinite."""
NEARLY_WHOLE = 1e-6
"""What a product such as 0.7 · 1000 may lack of the whole number that it is."""


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A solver with its table; it keeps nothing between runs."""

    name: SolverName
    sigmas: Tensor
    """(S + 1,) falling, the last one 0; float32."""
    timesteps: Tensor
    """(S,) what the model is told, 0 to 1000; float32, of UniPC and DPM-Solver++ whole numbers."""

    def solve(self, predict: Predict, noise: Tensor) -> Tensor:
        """The clean latents, float32, on the device of `noise`; `predict` is called once for each step."""
        advance = _euler(self.sigmas) if self.name == "vanilla" else _multistep(self.name, self.sigmas)
        x = noise.float()
        for step in range(len(self.timesteps)):
            x = advance(x, predict(x, step).float(), step)
        return x


def flow_solver(name: SolverName, num_steps: int, shift: float) -> Solver:
    """The solver with a table of `num_steps` ≥ 1 steps, shifted by `shift` > 0."""
    start = UNIPC_START if name == "unipc" else 1
    sigmas = shifted(torch.linspace(start, 0, num_steps + 1, dtype=torch.float64), shift)
    timesteps = NUM_TIMESTEPS * sigmas[:-1]
    if name != "vanilla":
        timesteps = torch.floor(timesteps + NEARLY_WHOLE)
    return Solver(name=name, sigmas=sigmas.float(), timesteps=timesteps.float())


def _euler(sigmas: Tensor) -> Advance:
    changes = sigmas.diff().tolist()
    return lambda x, velocity, step: x + changes[step] * velocity


def _multistep(name: SolverName, sigmas: Tensor) -> Advance:
    scheduler = _scheduler(name)
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)  # else it searches the first timestep, and takes the second of two equal ones

    def advance(x: Tensor, velocity: Tensor, step: int) -> Tensor:
        # It counts the steps itself; its sums are written for a batch.
        return scheduler.step(velocity[None], step, x[None], return_dict=False)[0][0]

    return advance


def _scheduler(name: SolverName) -> SchedulerMixin:
    """Of order 2, for velocities on the straight line from picture to noise."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2}
    if name == "unipc":
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

        return UniPCMultistepScheduler(solver_type="bh2", **flow)
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_type="midpoint", **flow)
