"""The random generators of a process, to be saved and set again.

Order, timesteps and noise do not come from them (see `dataset/epochs.py`): what is resumed here is dropout, and what an
optimizer draws.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch

logger = logging.getLogger(__name__)


def random_state(device: torch.device | str = "cpu") -> dict[str, object]:
    """The generators of Python, numpy, torch on the CPU and torch on `device`.

    In types that `torch.load` takes with `weights_only`.
    """
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest)}
    state["torch"] = torch.get_rng_state()
    if torch.device(device).type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(states: Sequence[Mapping[str, object]], rank: int, device: torch.device | str = "cpu") -> None:
    """Sets the generators of this process.

    Args:
        states: by rank; a process that was not there then keeps its own generators, with a warning.
    """
    if rank >= len(states):
        logger.warning("the state has no random numbers for process %d: its dropout differs from then", rank)
        return
    state = states[rank]
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.device(device).type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
