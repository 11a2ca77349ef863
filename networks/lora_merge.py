"""LoRAs merged into a model's weights while these stream from their file: in float32, one weight at a time."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint_writer import check_output_file, write_checkpoint
from common.weights import Checkpoint
from networks.deltas import Factors
from networks.lora_formats import read_lora
from networks.lora_matching import Matched, match, select
from networks.lora_metadata import check_is_other_file
from options.errors import UserError
from options.lora import LoraChoice

logger = logging.getLogger(__name__)

FLAG = "--lora_weight"
METADATA_KEY = "merged_loras"
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
FLOATS |= {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}
SCALES = (".scale_weight", ".weight_scale", ".scale_input")
"""What stands beside a weight that means something else than its numbers."""
Change = Callable[[str, Tensor], Tensor]
"""(name, weight as it is stored) → the weight with its LoRAs; float32 where there are any, else what came in."""


@dataclass(frozen=True, kw_only=True)
class LoraMerge:
    """LoRAs that fit a checkpoint; none of their tensors is in memory."""

    choices: tuple[LoraChoice, ...] = ()
    """In the order in which they are added."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the checkpoint's weights, by name."""
    flag: str = FLAG
    """That named the files, for messages."""

    @contextmanager
    def reading(self, device: torch.device | str) -> Iterator[Change]:
        """Holds the LoRAs in RAM for as long as weights are loaded. The sums are made on `device`."""
        loras = [(choice.multiplier, _matched(choice, self.shapes, self.flag).factors) for choice in self.choices]

        def change(name: str, weight: Tensor) -> Tensor:
            own = [(multiplier, factors[name]) for multiplier, factors in loras if name in factors]
            merged = _merged(weight, own, device) if own else weight
            if merged is None:
                got, expected = f"{name} with infinite numbers once merged", "finite weights"
                raise UserError(self.flag, got, expected, "use smaller multipliers, or another LoRA")
            return merged

        yield change


def _merged(weight: Tensor, loras: Sequence[tuple[float, Factors]], device: torch.device | str) -> Tensor | None:
    """None when the sum is beyond the numbers of float32."""
    total = weight.to(device, torch.float32, copy=True)
    for multiplier, factors in loras:
        total += multiplier * factors.to(device).delta(weight.shape)
    if not bool(total.isfinite().all()):
        return None
    # Beyond its largest number, casting to float8 gives NaN.
    return total if weight.dtype.itemsize > 1 else total.clamp_(*_range(weight.dtype))


def _range(dtype: torch.dtype) -> tuple[float, float]:
    return torch.finfo(dtype).min, torch.finfo(dtype).max


def plan_merge(choices: Sequence[LoraChoice], checkpoint: Checkpoint, *, flag: str = FLAG) -> LoraMerge:
    """Checks LoRAs against a checkpoint's header and says in the log what of each is used and what is not.

    Args:
        flag: the one that named the files, for messages.

    Raises:
        UserError: a file that is no LoRA or another architecture's, patterns that leave nothing, shapes that do not
            fit, or weights that cannot be added to.
    """
    for choice in choices:
        matched = _matched(choice, checkpoint.shapes, flag, shapes_only=True)
        for weight in matched.factors:
            _check_weight(weight, checkpoint)
        report(matched, choice.multiplier)
    return LoraMerge(choices=tuple(choices), shapes=checkpoint.shapes if choices else {}, flag=flag)


def report(matched: Matched, multiplier: float | None = None) -> None:
    """One line in the log; a warning when something in the file is left over."""
    is_partial = matched.unmatched or matched.lora.leftover
    strength = "" if multiplier is None else f"; multiplier {multiplier:g}"
    logger.log(logging.WARNING if is_partial else logging.INFO, "%s%s", matched.summary(), strength)


def _matched(
    choice: LoraChoice, shapes: Mapping[str, tuple[int, ...]], flag: str, *, shapes_only: bool = False
) -> Matched:
    lora = read_lora(choice.path, flag=flag, shapes_only=shapes_only)
    if choice.include or choice.exclude:
        lora = select(lora, include=choice.include, exclude=choice.exclude)
    return match(lora, shapes)


def _check_weight(weight: str, checkpoint: Checkpoint) -> None:
    """Raises UserError for a weight whose numbers are not what they seem: a sum would be something else."""
    dtype, module = checkpoint.tensors[weight].dtype, weight.removesuffix(".weight")
    scale = next((module + suffix for suffix in SCALES if module + suffix in checkpoint.tensors), None)
    if dtype in FLOATS and scale is None:
        return
    got = f"{weight} of type {dtype}" + (f" with {scale}" if scale else "")
    remedy = "merge into the model that it was quantised from"
    raise UserError(f"{checkpoint.flag} {checkpoint.path}", got, "floating-point weights without scales", remedy)


def merge_into_file(
    checkpoint: Checkpoint, choices: Sequence[LoraChoice], output: str | Path, *, device: torch.device | str, flag: str
) -> None:
    """Writes the checkpoint with its LoRAs, every tensor under its name and in its type, never holding it in memory.

    Args:
        flag: the one that named `output`, for messages.

    Raises:
        UserError: as `plan_merge`; no LoRA at all; or the file cannot be written there.
    """
    if not choices:
        raise UserError(flag, output, "LoRAs to merge", f"give {FLAG}")
    check_output_file(output, checkpoint.num_bytes, flag=flag)
    check_is_other_file(output, flag=flag, inputs=checkpoint.files, input_flag="the model's own")
    check_is_other_file(output, flag=flag, inputs=[choice.path for choice in choices], input_flag=FLAG)
    merge = plan_merge(choices, checkpoint)
    if any(info.num_bytes == math.prod(info.shape) for info in checkpoint.tensors.values() if len(info.shape) > 1):
        logger.warning(
            "%s holds 8-bit weights: sums rounded to 8 bits keep little of a LoRA; merge into the 16-bit model instead",
            checkpoint.path,
        )
    made_of = [{"name": Path(choice.path).name, "multiplier": choice.multiplier} for choice in choices]
    metadata = {"format": "pt", METADATA_KEY: json.dumps(made_of, ensure_ascii=False)}
    try:
        with merge.reading(device) as change:
            write_checkpoint(output, checkpoint, change=change, metadata=metadata)
    except OSError as error:
        remedy = "make room, or give another folder; nothing is left behind"
        raise UserError(flag, f"{error.strerror or error} at {output}", "a place to write to", remedy) from error
    logger.info("saved %s", output)
