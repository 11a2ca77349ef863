"""A module's scale put into one of its factors, for loaders that know no alpha, and taken out again without a trace.

A power of two loses nothing, another number loses nothing of a 16-bit tensor that becomes float32. Where a bit would be
lost, the scale is left to the caller to pass on. How a module was folded is recorded in the file's metadata; reading
undoes it.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.weights import TORCH_DTYPES
from networks.deltas import DIFF, UP, Factors

logger = logging.getLogger(__name__)

METADATA_KEY = "oneframe_folded_scales"
COMMON = ""
"""Under which the record stands that most modules share."""
DTYPES = {name: getattr(torch, name) for name in TORCH_DTYPES.values()}
"""What a record may name: it comes from a file that anybody may have written."""
Record = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A module without alpha."""

    factors: Factors
    rest: float
    """By what the delta still has to be multiplied: 1, or the whole scale when it could not be folded."""
    record: Record | None
    """How to undo it; None when there is nothing to undo, or no way to."""


def fold(factors: Factors) -> Folded:
    """Folds the scale of a LoRA if that can be undone exactly, that of a LoKr always, if need be with rounding.

    diffusers can be told a LoRA's scale, but not a LoKr's without telling it how PEFT would have split it.
    """
    if factors.alpha is None:
        return Folded(factors=factors, rest=1.0, record=None)
    part, scale = _carrier(factors), factors.scale
    original = factors.tensors[part]
    folded, portion = _exact_product(original, scale), scale
    if folded is None and factors.kind == "lokr":
        folded = original.float() * scale
    elif folded is None:
        folded, portion = original, 1.0
    record = {
        "alpha": float(factors.alpha),
        "alpha_dtype": _name(factors.alpha.dtype),
        "dtype": _name(original.dtype),
        "folded": portion,
        "rank": factors.rank,
    }
    plain = replace(factors, tensors={**factors.tensors, part: folded}, alpha=None)
    return Folded(factors=plain, rest=1.0 if portion == scale else scale, record=record if portion else None)


def _carrier(factors: Factors) -> str:
    """The factor that takes the scale."""
    return next(part for part in (UP, "lokr_w1", "lokr_w1_a") if part in factors.tensors)


def _exact_product(tensor: Tensor, scale: float) -> Tensor | None:
    """tensor · scale in the tensor's type, else in float32; None if neither gives every bit back."""
    # torch does not multiply in float8.
    for dtype in (torch.float32,) if tensor.dtype.itemsize == 1 else (tensor.dtype, torch.float32):
        product = tensor.to(dtype) * scale
        if torch.equal(_undone(product, scale, tensor.dtype).double(), tensor.double()):
            return product
    return None


def _undone(product: Tensor, portion: float, dtype: torch.dtype) -> Tensor:
    return (product / portion).to(dtype)


def metadata_of(records: Mapping[str, Record | None]) -> dict[str, str]:
    """The metadata entry for records by dotted module name; none when nothing was folded."""
    texts = {name: json.dumps(record, sort_keys=True) for name, record in records.items() if record}
    if not texts:
        return {}
    common = Counter(texts.values()).most_common(1)[0][0]
    different = {name: record for name, record in records.items() if json.dumps(record, sort_keys=True) != common}
    return {METADATA_KEY: json.dumps({COMMON: json.loads(common)} | different, sort_keys=True)}


def unfold(modules: Mapping[str, Factors], metadata: Mapping[str, str]) -> dict[str, Factors]:
    """The modules, by dotted name, as they were before `fold`. The deltas stay what they are.

    A record that would change one, because another program changed the file and kept the metadata, is passed over.
    """
    try:
        records = json.loads(metadata.get(METADATA_KEY, "{}"))
        return {name: _unfolded(f, records.get(name, records.get(COMMON))) for name, f in modules.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        logger.warning("the metadata entry %s is damaged; the tensors are taken as they are", METADATA_KEY)
        return dict(modules)


def _unfolded(factors: Factors, record: Record | None) -> Factors:
    if record is None or factors.kind == DIFF or record["rank"] != factors.rank:
        return factors
    part = _carrier(factors)
    original = _undone(factors.tensors[part], record["folded"], DTYPES[record["dtype"]])
    alpha = torch.tensor(record["alpha"], dtype=DTYPES[record["alpha_dtype"]])
    restored = replace(factors, tensors={**factors.tensors, part: original}, alpha=alpha)
    return restored if math.isclose(restored.scale, factors.scale * record["folded"], rel_tol=1e-6) else factors


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
