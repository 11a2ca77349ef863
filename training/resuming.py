"""Which state a run goes on from, and whether it is the same run.

A *fingerprint* holds the settings that an exact continuation cannot do without: network, optimizer, seed, data, base
model, batches per step. A state is not loaded into a run with another one. What may change on purpose is recorded
beside it as *settings*, and a change is logged: the learning rate and its scheduler, the number of steps, timestep
sampling, loss weighting, dropout, clipping, mixed precision. When and where to save is not recorded at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dataset.epochs import Bucket
from options.errors import UserError
from options.fp8 import Fp8Mode
from training.states import NEW, OLD, as_json, is_complete, state_step

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def run_fingerprint(
    *,
    network_module: str,
    network_dim: int,
    network_alpha: float,
    network_args: Mapping[str, str],
    base_model: str,
    fp8: Fp8Mode = "off",
    optimizer_type: str,
    optimizer_args: Mapping[str, object],
    seed: int,
    buckets: Sequence[Bucket],
    batches_per_step: int,
) -> dict[str, object]:
    """What must not change from a state to its continuation.

    Args:
        base_model: a hash of the transformer and of what is merged into it.
        fp8: what becomes of its weights.
        buckets: of the training data. Items, repeats and batch sizes count; captions and pixels may be mended.
        batches_per_step: processes times accumulated batches, so that a run may move to another number of GPUs.
    """
    items = [[b.batch_size, sorted([k.dataset, k.name, k.repeat] for k in b.keys)] for b in buckets]
    digest = hashlib.sha256(json.dumps(sorted(items)).encode()).hexdigest()
    num_items = sum(len(bucket.keys) for bucket in buckets)
    return {
        "network_module": network_module,
        "network_dim": network_dim,
        "network_alpha": float(network_alpha),
        "network_args": {name: network_args[name] for name in sorted(network_args) if name != "verbose"},
        "base_model": base_model[:16] + ("" if fp8 == "off" else f" in fp8 ({fp8})"),
        "optimizer_type": optimizer_type.lower(),
        "optimizer_args": {name: str(optimizer_args[name]) for name in sorted(optimizer_args)},
        "seed": seed,
        "data": f"{num_items} items ({digest[:16]})",
        "batches_per_step": batches_per_step,
    }


def changed_settings(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """For the log: `learning_rate was 0.0001, is 5e-05 now`, for every setting that is known of both."""
    now = as_json(now)
    return [f"{name} was {then[name]}, is {now[name]} now" for name in now if name in then and then[name] != now[name]]


def set_learning_rates(optimizer: torch.optim.Optimizer, scheduler: object, rates: Sequence[float | None]) -> None:
    """Lets a loaded optimizer and scheduler go on with other base learning rates than they were saved with.

    Loading brings the old ones back, so that a changed `--learning_rate` would do nothing. Where the schedule stands is
    kept; equal rates change nothing at all.

    Args:
        rates: by parameter group, as a new optimizer would have them.
    """
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        old = group.get("initial_lr", group["lr"])
        if not (old and rate):
            continue
        group["lr"] = group["lr"] * (rate / old)
        if "initial_lr" in group:
            group["initial_lr"] = rate
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if hasattr(scheduler, "_last_lr"):  # what is logged until the next step
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def newest_state(output_dir: str | Path, output_name: str) -> Path | None:
    """The complete state of `output_name` that got furthest, for `--resume auto`; the log says what is chosen.

    Looks at folders that were about to get their name, too: a crash in that moment loses nothing.
    """
    found = []
    for folder, order in _state_folders(Path(output_dir), output_name):
        try:
            found.append((state_step(folder), order, folder))
        except UserError as error:
            if folder.suffix not in (NEW, OLD):
                logger.warning("%s; --resume auto passes over it", error)
    if not found:
        logger.info("--resume auto: no state of %s in %s: starting anew", output_name, output_dir)
        return None
    step, _, newest = max(found)
    logger.info("--resume auto: going on from %s, step %d", newest, step)
    return newest


def remove_leftovers(output_dir: str | Path, output_name: str, *, keep: Path | None) -> None:
    """Removes what a killed process left of states of `output_name`, but for `keep`. For one process only.

    What is complete goes only when the folder that it was to become, or was replaced by, is complete as well.
    """
    for folder, _ in _state_folders(Path(output_dir), output_name):
        if folder.suffix not in (NEW, OLD) or folder == keep:
            continue
        if not is_complete(folder) or is_complete(folder.with_suffix("")):
            logger.info("removing %s, which an interrupted save left", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _state_folders(output_dir: Path, output_name: str) -> list[tuple[Path, tuple[int, int]]]:
    """Folders named like states of `output_name`, with what decides between states of one step: the later one wins."""
    name = re.escape(unicodedata.normalize("NFC", output_name))
    pattern = re.compile(rf"{name}(-step\d{{8,}}|-\d{{6,}})?-state(\{NEW}|\{OLD})?")
    found = []
    for folder in sorted(output_dir.iterdir()) if output_dir.is_dir() else ():
        match = pattern.fullmatch(unicodedata.normalize("NFC", folder.name))
        if match and folder.is_dir():
            occasion = 2 if match[1] is None else 0 if match[1].startswith("-step") else 1
            found.append((folder, (occasion, (OLD, "", NEW).index(match[2] or ""))))
    return found
