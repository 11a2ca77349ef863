"""The moving average of a training's saved files, taken after it: with a decay, or as a power function EMA.

    average <- beta·average + (1 - beta)·file,    starting from the first file

With `--sigma_rel` beta is (1 - 1/t)^(gamma + 1) at the t-th step, so that file k of n weighs about (k/n)^gamma, and
sigma_rel is the width of that profile relative to the length of the training. Its first beta is 0: the first file has
no influence. Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024.
"""

from __future__ import annotations

import glob
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.files import existing_file
from common.weights import Checkpoint, open_checkpoint
from networks.deltas import ALPHA, is_finite
from networks.lora_metadata import check_output, read_metadata, save_lora
from networks.peft_config import METADATA_KEY as PEFT_METADATA_KEY
from networks.peft_config import PEFT_CONFIG_FILE, PEFT_FILE
from networks.scale_folding import METADATA_KEY as FOLDED_METADATA_KEY
from options.errors import UserError, did_you_mean
from options.flags_post_hoc_ema import PostHocEmaFlags

logger = logging.getLogger(__name__)

MIN_SIGMA_REL = 0.001
"""Where of a thousand files the last one alone has nearly two thirds: less means that file."""
MAX_SIGMA_REL = 12**-0.5
"""That of gamma = 0, where all files but the first weigh the same."""
FLAG = "path"


def gamma_of(sigma_rel: float) -> float:
    """The gamma of a power function EMA of this relative width: sigma_rel² = (gamma + 1) / ((gamma + 2)² (gamma + 3)).

    Raises:
        UserError: so narrow that it would be the last file, or wider than any average can be.
    """
    if not MIN_SIGMA_REL <= sigma_rel <= MAX_SIGMA_REL:
        expected = f"a number from {MIN_SIGMA_REL} to 0.2886 (1/sqrt(12))"
        raise UserError("--sigma_rel", sigma_rel, expected, "0.05 to 0.28 are usual; smaller means later files only")
    s = sigma_rel**-2
    roots = np.roots([1, 7, 16 - s, 12 - s])
    return max(0.0, float(roots.real.max()))


def decays(num_files: int, *, beta: float, beta2: float | None, sigma_rel: float | None) -> list[float]:
    """Beta for each file but the first.

    Raises:
        UserError: a beta that is not between 0 and 1, or as `gamma_of`.
    """
    steps = range(num_files - 1)
    if sigma_rel is not None:
        gamma = gamma_of(sigma_rel)
        return [(1 - 1 / (step + 1)) ** (gamma + 1) for step in steps]
    last = beta if beta2 is None else beta2
    for flag, value in (("--beta", beta), ("--beta2", last)):
        if not 0 <= value <= 1:
            raise UserError(flag, value, "a number from 0 to 1", "0.9 to 0.99 are usual")
    return [beta + (last - beta) * step / max(1, num_files - 2) for step in steps]


def file_weights(betas: Sequence[float]) -> list[float]:
    """How much of each file is in the result; they add up to 1."""
    starts = [1.0, *(1 - beta for beta in betas)]
    return [start * math.prod(betas[number:]) for number, start in enumerate(starts)]


def average_files(flags: PostHocEmaFlags) -> None:
    """What `lora_post_hoc_ema.py` does.

    Raises:
        UserError: fewer than two files, one that cannot be read, files that do not fit together (the file and the
            first offending key are named), a beta or sigma_rel out of range, or the output cannot be written.
    """
    files = [file for path in flags.path for file in _expanded(path)]
    check_output(flags.output_file, flag="--output_file", inputs=files, input_flag="the files to average")
    if len(files) < 2:
        raise UserError(FLAG, f"{len(files)} file", "two or more", "give all files that the training saved")
    if flags.sigma_rel is not None and (flags.beta2 is not None or flags.beta != PostHocEmaFlags.beta):
        logger.warning("--beta and --beta2 have no effect with --sigma_rel")
    betas = decays(len(files), beta=flags.beta, beta2=flags.beta2, sigma_rel=flags.sigma_rel)
    files = files if flags.no_sort else sorted(files, key=lambda file: file.stat().st_mtime_ns)
    # No memory maps: on Windows they would lock the files.
    checkpoints = [open_checkpoint(file, flag=FLAG, memmap=False) for file in files]
    metadata = [read_metadata(checkpoint) for checkpoint in checkpoints]
    for checkpoint, own_metadata in zip(checkpoints, metadata, strict=True):
        _check_alike(checkpoints[0], checkpoint)
        _check_scales_alike(checkpoint, own_metadata, metadata[0])
    for file, weight in zip(files, file_weights(betas), strict=True):
        logger.info("%7.3f %% of %s", 100 * weight, file)
    save_lora(flags.output_file, average(checkpoints, betas), metadata[-1], flag="--output_file")
    logger.info("%s: the average of %d files", flags.output_file, len(files))


def _expanded(path: str) -> list[Path]:
    """The file, or what a pattern finds: not every shell expands `*`."""
    found = [] if os.path.exists(path) else sorted(glob.glob(path))
    return [existing_file(file, flag=FLAG, expected="a LoRA file") for file in found or [path]]


@torch.no_grad()
def average(checkpoints: Sequence[Checkpoint], betas: Sequence[float]) -> dict[str, Tensor]:
    """The averaged tensors, summed in float32, in the types of the first file; alphas and integers are the first's.

    In memory are the average and one tensor of the file that comes in.

    Args:
        checkpoints: with the same names and shapes.
        betas: for all but the first.

    Raises:
        UserError: alphas that differ, infinite numbers or NaN.
    """
    first = dict(_read_finite(checkpoints[0]))
    state = {key: tensor.float() for key, tensor in first.items() if _is_averaged(key, tensor)}
    dtypes = {key: first[key].dtype for key in state}
    fixed = {key: tensor for key, tensor in first.items() if key not in state}
    del first
    for checkpoint, beta in zip(checkpoints[1:], betas, strict=True):
        for key, tensor in _read_finite(checkpoint):
            if key in state:
                state[key].mul_(beta).add_(tensor.float(), alpha=1 - beta)
            elif _is_alpha(key):
                _check_alpha(checkpoint, key, tensor, fixed[key])
    return fixed | {key: tensor.to(dtypes[key]) for key, tensor in state.items()}


def _read_finite(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """As `Checkpoint.read`; raises UserError for numbers that would spoil the average."""
    for key, tensor in checkpoint.read():
        if not is_finite(tensor):
            remedy = "the file is damaged, or its training failed: leave it out"
            raise _refusal(checkpoint, f"{key} with infinite numbers or NaN", "finite numbers", remedy)
        yield key, tensor


def _is_averaged(key: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not _is_alpha(key)


def _is_alpha(key: str) -> bool:
    return key.rpartition(".")[2] == ALPHA


def _check_alpha(checkpoint: Checkpoint, key: str, alpha: Tensor, expected: Tensor) -> None:
    if not torch.allclose(alpha.float(), expected.float()):
        rule = f"{expected.tolist()}, as in the first file"
        raise _refusal(checkpoint, f"{key} of {alpha.tolist()}", rule, "average files of one training only")


def _check_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Raises UserError for other names or shapes than the first file has."""
    if missing := next(_beyond(first.tensors, other.tensors), None):
        raise _refusal(other, f"no {missing}", f"the tensors of {first.path}", "average files of one training only")
    if unknown := next(_beyond(other.tensors, first.tensors), None):
        remedy = did_you_mean(unknown, list(first.tensors)[:1000], "average files of one training only")
        raise _refusal(other, unknown, f"only the tensors of {first.path}", remedy)
    for key, shape in first.shapes.items():
        if other.shapes[key] != shape:
            got = f"{key} of shape {other.shapes[key]}"
            raise _refusal(other, got, f"{shape}, as in {first.path}", "average files of one training only")


def _beyond(names: Iterable[str], others: Mapping[str, object]) -> Iterable[str]:
    return (name for name in names if name not in others)


def _check_scales_alike(checkpoint: Checkpoint, metadata: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raises UserError for alphas outside the tensors that differ, or that the result would lack."""
    remedy = "convert the files with convert_lora.py --target default first"
    for key in (PEFT_METADATA_KEY, FOLDED_METADATA_KEY):
        if metadata.get(key) != expected.get(key):
            raise _refusal(checkpoint, f"another {key} in its metadata", "the same scales in all files", remedy)
    file = checkpoint.files[0]
    if file.name == PEFT_FILE and file.with_name(PEFT_CONFIG_FILE).is_file():
        raise _refusal(checkpoint, f"its alphas in {PEFT_CONFIG_FILE}", "a file that has all it needs", remedy)


def _refusal(checkpoint: Checkpoint, got: str, expected: str, remedy: str) -> UserError:
    return UserError(str(checkpoint.path), got, expected, remedy)
