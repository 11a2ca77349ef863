"""How many bytes a model's weights take once they are loaded, from the header of its file."""

from __future__ import annotations

import math
import re

from common.weights import Checkpoint, TensorInfo
from modules.fp8 import BLOCK


def whole_weights(checkpoint: Checkpoint, *, itemsize: int) -> int:
    """Of a model whose numbers all become `itemsize` bytes wide."""
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values()) * itemsize


def weights_with_fp8(checkpoint: Checkpoint, *, itemsize: int, fp8_layers: re.Pattern[str] | None) -> int:
    """Of a model some of whose layers are in 8 bits with scales, or become so while they are loaded.

    Args:
        itemsize: bytes of all other numbers.
        fp8_layers: matches the paths of those that become so; None for none.
    """

    def size(name: str, info: TensorInfo) -> int:
        count = math.prod(info.shape)
        if info.num_bytes == count:  # it is in fp8 in the file
            return count
        if fp8_layers and fp8_layers.fullmatch(name.removesuffix(".weight")):
            scale = 2 if info.dtype in ("BF16", "bfloat16") else 4
            return count + scale * -(-count // BLOCK)
        return count * itemsize

    return sum(size(name, info) for name, info in checkpoint.tensors.items())
