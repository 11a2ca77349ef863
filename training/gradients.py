"""Gradients over processes: averaged explicitly, once per optimizer step, and their norm limited."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from common.processes import Processes


def average_gradients(parameters: Sequence[nn.Parameter], processes: Processes) -> None:
    """Replaces every process's gradients by their mean. A parameter without a gradient counts as one of zeros."""
    if processes.world == 1:
        return
    import torch.distributed

    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    torch.distributed.all_reduce(flat, group=_group(flat.device.type))
    flat /= processes.world
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


@cache
def _group(device: str) -> object:
    """NCCL moves gradients from GPU to GPU; gloo, which the processes have joined by, goes through the CPU."""
    if device == "cuda" and torch.distributed.is_nccl_available():
        return torch.distributed.new_group(backend="nccl")
    return None


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Limits the norm of all gradients together, unless `max_norm` is 0, and returns what it was."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
