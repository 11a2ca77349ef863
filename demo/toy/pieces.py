"""A training loop that can be stopped and goes on where it was: what the toy world's models are trained by."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.files import atomic_file

SAVE_EVERY = 100
"""Steps."""
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is trained."""

    name: str
    steps: int
    learning_rate: float
    """At its highest: it rises linearly and falls like a cosine."""
    max_norm: float = 1.0
    """Of the gradients together."""
    averaged: float = 0.0
    """Decay of an average of the weights, which is what is kept in the end; 0 keeps the weights themselves."""


def train(model: nn.Module, loss_at: Callable[[int], Tensor], plan: Plan, folder: Path, *, stop_at: int | None = None):
    """Trains `model` in place, up to `plan.steps` or `stop_at`, from the state in `folder` if there is one.

    Args:
        loss_at: the loss () of a step, a function of the step's number and the model alone, so that a training in
            pieces is the training in one piece.
        folder: for the state `NAME.state.pt` and the losses `NAME.losses.jsonl`.

    Returns:
        Whether the training is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_path, log_path = folder / f"{plan.name}.state.pt", folder / f"{plan.name}.losses.jsonl"
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    average = {name: tensor.detach().clone() for name, tensor in model.named_parameters()} if plan.averaged else {}
    first, losses = 0, []
    if state_path.is_file():
        state = torch.load(state_path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average = {name: tensor.to(average[name].device) for name, tensor in state["average"].items()}
        first, losses = state["step"], state["losses"]
    last = plan.steps if stop_at is None else min(stop_at, plan.steps)
    bar = tqdm(range(first, last), initial=first, total=plan.steps, desc=plan.name)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * rate_at(step / plan.steps)
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), plan.max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _update(average, model, min(plan.averaged, (1 + step) / (10 + step)))
        losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == last:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            with atomic_file(state_path) as temporary:
                torch.save({**state, "step": step + 1, "losses": losses}, temporary)
            with atomic_file(log_path) as temporary:
                temporary.write_text(_log(losses), encoding="utf-8", newline="\n")
    if average:
        model.load_state_dict(average, strict=False)
    return last == plan.steps


def _log(losses: list[float]) -> str:
    """JSON lines: the mean loss of every hundred steps."""
    lines = []
    for first in range(0, len(losses), SAVE_EVERY):
        part = losses[first : first + SAVE_EVERY]
        lines.append(json.dumps({"step": first + len(part), "loss": sum(part) / len(part)}))
    return "\n".join(lines) + "\n"


def rate_at(progress: float) -> float:
    """The share of the highest learning rate at a share of the training."""
    if progress < WARM_UP:
        return (progress + 1e-3) / (WARM_UP + 1e-3)
    return 0.5 * (1 + torch.cos(torch.tensor((progress - WARM_UP) / (1 - WARM_UP) * torch.pi)).item()) + 1e-3


@torch.no_grad()
def _update(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, parameter in model.named_parameters():
        if name in average:
            average[name].lerp_(parameter, 1 - decay)
