"""Checkpoints and 8 bits: which weights of a file are codes, which become codes, and what is done to each on its way.

All is decided from the header. Tensors then come one at a time, so that a 16-bit model is never in memory as a whole.

Files that hold codes already are told by the types of their weights. Known are musubi-tuner's (`scale_weight` beside
`weight`), ComfyUI's (the same with one scale for all, or `weight_scale`; some extra tensors), and bare casts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from common.checkpoint_writer import Layout
from common.weights import TORCH_DTYPES, Checkpoint, TensorInfo
from modules.fp8 import E4M3, Fp8Linear, become_fp8, cast, dequantised, quantised, scale_shape, scale_type
from options.errors import UserError
from options.fp8 import Fp8Mode

logger = logging.getLogger(__name__)

WEIGHT, SCALE = ".weight", ".scale_weight"
OTHER_SCALE = ".weight_scale"
UNUSED = re.compile(r"(.*\.)?(scaled_fp8|scale_input|input_scale|comfy_quant)")
"""Marks, and scales for activations in 8 bits, which there are none of here."""
CODES = {torch.float8_e4m3fn, torch.float8_e5m2}
Change = Callable[[str, Tensor], Tensor]
Fate = Literal["whole", "kept", "plain", "scaled"]
"""Of a weight: made whole, kept as the codes that it is, or made into codes without or with scales."""


def common_names(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the names that musubi-tuner gives to scales, without what is of no use here."""

    def rule(name: str) -> str | None:
        if UNUSED.fullmatch(name):
            return None
        return name.removesuffix(OTHER_SCALE) + SCALE if name.endswith(OTHER_SCALE) else name

    return checkpoint.rename(rule)


def is_scaled(checkpoint: Checkpoint, weight: str) -> bool:
    return weight.removesuffix(WEIGHT) + SCALE in checkpoint.tensors


def holds_codes(checkpoint: Checkpoint, weight: str) -> bool:
    return _dtype(checkpoint.tensors[weight]) in CODES


def expect_codes(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Gives a model without weights the tensors that `checkpoint` has for it: codes, and scales wherever there are any.

    Afterwards its state dict can be compared with the header.

    Raises:
        UserError: a weight is of a type that cannot be read, or its scales do not fit it.
    """
    for path, layer in module.named_modules():
        weight, scale = checkpoint.tensors.get(path + WEIGHT), checkpoint.tensors.get(path + SCALE)
        if weight is None:
            continue
        if not (dtype := _dtype(weight)).is_floating_point:
            got, expected = f"{path}{WEIGHT} of type {weight.dtype}", "floating-point weights"
            raise _error(checkpoint, got, expected, "give the model that it was quantised from")
        if scale is not None:
            _check_scale(checkpoint, path, weight, scale)
        if dtype in CODES and type(layer) is nn.Linear:
            become_fp8(layer, codes=dtype, scale=scale and (scale.shape, _dtype(scale)))
        elif scale is not None:
            layer.register_buffer("scale_weight", torch.empty(scale.shape, dtype=_dtype(scale), device="meta"))


def check_mode(checkpoint: Checkpoint, mode: Fp8Mode, layers: re.Pattern[str]) -> None:
    """Compares what is asked for with what the file is.

    Args:
        layers: matches the paths of the layers that fp8 is for.

    Raises:
        UserError: they contradict each other.
    """
    weights = [name for name in checkpoint.tensors if name.endswith(WEIGHT) and layers.fullmatch(name[: -len(WEIGHT)])]
    codes = [name for name in weights if holds_codes(checkpoint, name)]
    bare = [name for name in codes if not is_scaled(checkpoint, name)]
    if mode == "scaled" and bare:
        got, expected = f"{checkpoint.path}, fp8 weights without scales", "16-bit weights, or fp8 weights with scales"
        raise UserError("--fp8_scaled", got, expected, "leave it out, or give the 16-bit model")
    if mode == "plain" and len(bare) < len(codes):
        got, expected = f"{checkpoint.path}, fp8 weights with scales", "16-bit weights, or fp8 weights without scales"
        raise UserError("--fp8", got, expected, "leave it out: the file is used as it is")


@dataclass(frozen=True, kw_only=True)
class Fp8Plan:
    """What becomes of each weight of a checkpoint."""

    checkpoint: Checkpoint
    fates: Mapping[str, Fate]
    """By the weight's name; what is not listed is no weight of a layer."""

    @property
    def changes_anything(self) -> bool:
        """Whether any weight is quantised."""
        return any(fate in ("plain", "scaled") for fate in self.fates.values())

    def apply_to(self, module: nn.Module) -> None:
        """Makes the layers of a model without weights what they are to be."""
        for name, fate in self.fates.items():
            layer, info = module.get_submodule(name.removesuffix(WEIGHT)), self.checkpoint.tensors[name]
            if fate == "scaled":
                become_fp8(layer, scale=(scale_shape(info.shape), self._scale_type(name)))
            elif fate == "plain":
                become_fp8(layer)
            elif fate == "whole" and is_scaled(self.checkpoint, name):
                del layer.scale_weight

    def layout(self) -> Layout:
        """Types and shapes of all tensors that `read` gives, as a file should hold them."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, info in self.checkpoint.tensors.items():
            fate, is_code = self.fates.get(name), _dtype(info) in CODES
            if self._is_used_up(name):
                continue
            if fate in ("plain", "scaled"):
                found[name] = (E4M3, info.shape)
            else:
                is_opened = fate == "whole" and is_code and is_scaled(self.checkpoint, name)
                found[name] = (self._scale_type(name) if is_opened else _dtype(info), info.shape)
            if fate == "scaled":
                found[name.removesuffix(WEIGHT) + SCALE] = (self._scale_type(name), scale_shape(info.shape))
        return found

    def read(
        self,
        *,
        dtype: torch.dtype | None,
        float32: re.Pattern[str] | None = None,
        device: torch.device | str,
        change: Change | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) with each tensor in its final type, wherever it happened to be computed.

        Args:
            dtype: for what is not codes or scales; None keeps the file's.
            float32: names of what becomes float32 instead.
            device: where weights are quantised.
            change: what is done to a whole weight before: LoRAs are merged here.
        """
        self._warn()
        used_up = {name: info for name, info in self.checkpoint.tensors.items() if self._is_used_up(name)}
        others = {name: info for name, info in self.checkpoint.tensors.items() if name not in used_up}
        # A scale and its weight may be in different shards, so the scales come first.
        scales = dict(replace(self.checkpoint, tensors=used_up).read()) if used_up else {}
        for name, tensor in replace(self.checkpoint, tensors=others).read():
            fate = self.fates.get(name)
            if fate == "kept" or name.endswith(SCALE):
                yield name, tensor
                continue
            scale = scales.pop(name.removesuffix(WEIGHT) + SCALE, None) if fate else None
            if scale is not None or fate == "scaled" and tensor.dtype in CODES:
                scale = None if scale is None else scale.to(device)
                tensor = dequantised(tensor.to(device), scale, torch.float32)
            tensor = change(name, tensor) if change else tensor
            if fate in ("plain", "scaled"):
                yield from self._codes(name, tensor.to(device), fate)
            else:
                target = torch.float32 if float32 and float32.fullmatch(name) else dtype or tensor.dtype
                yield name, tensor.to(target) if tensor.is_floating_point() else tensor

    def _warn(self) -> None:
        names = [name for name, fate in self.fates.items() if fate == "scaled"]
        odd = [name for name in names if len(scale_shape(self.checkpoint.shapes[name])) == 2]
        again = sum(holds_codes(self.checkpoint, name) for name in names)
        if odd:
            text = "fp8: 64 does not divide the inputs of %d layers (%s): one scale for each row"
            logger.warning(text, len(odd), odd[0])
        if again:
            text = "%s is in fp8: %d weights are quantised once more with LoRAs in them; the 16-bit model is better"
            logger.warning(text, self.checkpoint.path, again)

    def _codes(self, name: str, weight: Tensor, fate: Fate) -> Iterator[tuple[str, Tensor]]:
        try:
            codes, scale = quantised(weight) if fate == "scaled" else (cast(weight), None)
        except ValueError as error:
            got = f"{name} with numbers that are not finite"
            raise _error(self.checkpoint, got, "finite weights", "the file is damaged") from error
        yield name, codes
        if scale is not None:
            yield name.removesuffix(WEIGHT) + SCALE, scale.to(self._scale_type(name))

    def _is_used_up(self, name: str) -> bool:
        """Whether it is the old scale of a weight that does not stay as it is."""
        return name.endswith(SCALE) and self.fates.get(name.removesuffix(SCALE) + WEIGHT, "kept") != "kept"

    def _scale_type(self, name: str) -> torch.dtype:
        scale = self.checkpoint.tensors.get(name.removesuffix(WEIGHT) + SCALE)
        return scale_type(_dtype(scale or self.checkpoint.tensors[name]))


def plan_fp8(
    module: nn.Module, checkpoint: Checkpoint, *, mode: Fp8Mode, layers: re.Pattern[str], merged: Collection[str] = ()
) -> Fp8Plan:
    """Decides, for a model without weights that `expect_codes` was called with.

    Codes that a LoRA is merged into become codes with new scales, whatever they were: rounding a sum to the codes that
    there are would lose most of the LoRA.

    Args:
        layers: matches the paths of the linear layers that `mode` is for.
        merged: names of the weights that LoRAs are merged into.

    """

    def fate_of(path: str, layer: nn.Module) -> Fate:
        if isinstance(layer, Fp8Linear):
            return "scaled" if path + WEIGHT in merged else "kept"
        return mode if mode != "off" and type(layer) is nn.Linear and layers.fullmatch(path) else "whole"

    fates = {
        path + WEIGHT: fate_of(path, layer)
        for path, layer in module.named_modules()
        if path + WEIGHT in checkpoint.tensors
    }
    return Fp8Plan(checkpoint=checkpoint, fates=fates)


def _dtype(info: TensorInfo) -> torch.dtype:
    """Unsigned bytes for a type that torch does not know: nothing that a layer can compute with."""
    return getattr(torch, TORCH_DTYPES.get(info.dtype, info.dtype), torch.uint8)


def _check_scale(checkpoint: Checkpoint, path: str, weight: TensorInfo, scale: TensorInfo) -> None:
    rows, *columns = weight.shape or (1,)
    is_one = all(size == 1 for size in scale.shape)
    is_by_row = scale.shape in ((rows,), (rows, 1))
    is_by_block = len(scale.shape) == 3 and scale.shape[::2] == (rows, 1) and len(columns) == 1
    if is_by_block:
        is_by_block = scale.shape[1] > 0 and columns[0] % scale.shape[1] == 0
    if _dtype(scale).is_floating_point and (is_one or is_by_row or is_by_block):
        return
    got = f"{path}{SCALE} of type {scale.dtype} and shape {scale.shape} for a weight of shape {weight.shape}"
    raise _error(checkpoint, got, "one scale, one for each row, or blocks of a row", "use a file of another format")


def _error(checkpoint: Checkpoint, got: str, expected: str, remedy: str) -> UserError:
    return UserError(f"{checkpoint.flag} {checkpoint.path}", got, expected, remedy)
