"""Devices and number types."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from options.errors import UserError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def pick_device(name: str | None, flag: str = "--device") -> torch.device:
    """The device that was asked for, else the GPU if there is one, else the CPU.

    Raises:
        UserError: torch does not know it, or it is not there.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(flag, name, "a device that torch can use", f"try cuda or cpu ({reason})") from error
    return device


def pick_dtype(name: str | None, *, on_gpu: str, device: torch.device) -> torch.dtype:
    """The type that was asked for, else `on_gpu` on an accelerator and float32 on a CPU."""
    import torch

    if name is None:
        name = "float32" if device.type == "cpu" else on_gpu
    return getattr(torch, DTYPE_NAMES.get(name, name))


def release_memory(device: torch.device) -> None:
    """Returns freed blocks of the device's caching allocator."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> float:
    """Bytes that could still be allocated on an accelerator; infinity where nobody can tell."""
    import torch

    if device.type != "cuda":
        return float("inf")
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reusable


# ---- the most that was taken ----


@dataclass
class Peak:
    """The most memory of a device that was taken since a stage began, in bytes."""

    allocated: int = 0
    """By tensors."""
    reserved: int = 0
    """With what the allocator keeps for the next ones."""


_open_stages: list[Peak] = []
"""CUDA counts one peak for a device. Stages that are open at a time share it: whoever resets it tells all others."""


@contextmanager
def peak_logged(stage: str, device: torch.device) -> Iterator[Peak]:
    """Logs what a stage took of a GPU's memory at most, all that was there before included; nothing on other devices.

    Stages may lie in each other. A stage that fails says nothing.
    """
    peak = Peak()
    if device.type != "cuda":
        yield peak
        return
    _note_peaks(device)
    _open_stages.append(peak)
    try:
        yield peak
        _note_peaks(device)
        text = "%s: at most %.2f GB in use on %s, %.2f GB reserved"
        logger.info(text, stage, peak.allocated / 1e9, device, peak.reserved / 1e9)
    finally:
        _note_peaks(device)
        _open_stages.remove(peak)


def _note_peaks(device: torch.device) -> None:
    """Adds what was taken since the last time to all open stages, and begins anew."""
    import torch

    for peak in _open_stages:
        peak.allocated = max(peak.allocated, torch.cuda.max_memory_allocated(device))
        peak.reserved = max(peak.reserved, torch.cuda.max_memory_reserved(device))
    torch.cuda.reset_peak_memory_stats(device)
