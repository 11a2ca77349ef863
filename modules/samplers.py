"""UniPC for flow matching: a multistep predictor-corrector with one model call per step.

Source: Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models", 2023,
data-prediction form with B(h) = h (`bh1`), on lambda(sigma) = -ln sigma.

An update from sigma_0 to sigma_t is linear in the current x, the newest model output m_0, older outputs m_k and, in the
corrector, the output m_t at the predicted point:

    x_t = (sigma_t / sigma_0)·x - phi_1·m_0 - B·sum_k rho_k·(m_k - m_0) / r_k        h = lambda_t - lambda_0
    r_k = (lambda_k - lambda_0) / h,   phi_1 = e^(-h) - 1,   B = -h

so every update is a handful of numbers, which are computed before the first step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import expm1, log

import torch
from torch import Tensor

Denoise = Callable[[Tensor, int], Tensor]
"""(x, step) → the clean latent that the model sees in x at that step's sigma."""


@dataclass(frozen=True)
class Update:
    """Weights of one linear update: x, then the model outputs from newest to oldest."""

    x: float
    outputs: tuple[float, ...]

    def __call__(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        result = self.x * x
        for weight, output in zip(self.outputs, outputs, strict=True):
            result = result + weight * output
        return result


def unipc(denoise: Denoise, noise: Tensor, sigmas: Tensor, *, max_order: int = 3) -> Tensor:
    """Integrates from `noise` at sigmas[0] down to sigmas[-1] = 0.

    Args:
        sigmas: (steps + 1,) falling, the last one 0; `denoise` is called once for each but the last.

    Returns:
        The last model output, which is the clean latent.
    """
    lambdas = [-log(sigma) for sigma in sigmas[:-1].tolist()]
    max_order = min(max_order, len(lambdas) - 1)
    x = noise
    outputs = [denoise(x, 0)]
    for step in range(1, len(lambdas)):
        order = min(step, max_order)
        recent = outputs[-1 : -order - 1 : -1]
        nodes = lambdas[step - order : step][::-1]
        predicted = predictor(nodes, lambdas[step])(x, recent)
        outputs.append(denoise(predicted, step))
        x = corrector(nodes, lambdas[step])(x, [outputs[-1], *recent])
        outputs = outputs[-max_order:]
    return outputs[-1]


def predictor(nodes: list[float], target: float) -> Update:
    """The update to lambda `target` from model outputs at `nodes`, newest first; its order is their number."""
    ratios = _ratios(nodes, target)
    matrix, moments = _system(ratios, target - nodes[0])
    order = len(nodes)
    if order == 2:
        rhos = [0.5]  # the paper's closed form, which the 1×1 system only approximates
    else:
        rhos = torch.linalg.solve(matrix[:-1, :-1], moments[:-1]).tolist() if order > 2 else []
    return _update(nodes, target, rhos, ratios[:-1])


def corrector(nodes: list[float], target: float) -> Update:
    """The same with the model output at `target` known too; its weight comes first."""
    ratios = _ratios(nodes, target)
    rhos = [0.5] if len(nodes) == 1 else torch.linalg.solve(*_system(ratios, target - nodes[0])).tolist()
    older = _update(nodes, target, rhos[:-1], ratios[:-1])
    at_target = (target - nodes[0]) * rhos[-1]
    newest, *oldest = older.outputs
    return Update(older.x, (at_target, newest - at_target, *oldest))


def _update(nodes: list[float], target: float, rhos: list[float], ratios: list[float]) -> Update:
    """Collects -phi_1·m_0 - B·sum rho_k·(m_k - m_0)/r_k into one weight per output."""
    h = target - nodes[0]
    weights = [h * rho / ratio for rho, ratio in zip(rhos, ratios, strict=True)]
    return Update(1 + expm1(-h), (-expm1(-h) - sum(weights), *weights))


def _ratios(nodes: list[float], target: float) -> list[float]:
    """r of the older nodes in units of the step, then 1 for the target."""
    h = target - nodes[0]
    return [(node - nodes[0]) / h for node in nodes[1:]] + [1.0]


def _system(ratios: list[float], h: float) -> tuple[Tensor, Tensor]:
    """Rows r^(j-1) and moments b_j = j!·phi_(j+1)(-h) / B, from phi_(k+1) = (phi_k - 1/k!) / (-h), in float64."""
    r = torch.tensor(ratios, dtype=torch.float64)
    phi, factorial, moments = expm1(-h) / -h - 1, 1, []
    for j in range(1, len(ratios) + 1):
        moments.append(phi * factorial / -h)
        factorial *= j + 1
        phi = phi / -h - 1 / factorial
    return torch.stack([r**j for j in range(len(ratios))]), torch.tensor(moments, dtype=torch.float64)
