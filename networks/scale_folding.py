"""A module's scale put into one of its factors, for loaders that know no alpha, and taken out again without a trace.

Multiplying by a power of two loses nothing, by another number only a 16-bit tensor that becomes float32 does not: the
scale is folded as far as every bit can be had back. What is left over is the caller's to pass on. How a module was
folded is recorded in the file's metadata; reading undoes it.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from networks.deltas import UP, Factors

logger = logging.getLogger(__name__)

METADATA_KEY = "oneframe_folded_scales"
COMMON = ""
"""Under which the record stands that most modules share."""
Record = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A module without alpha."""

    factors: Factors
    rest: float
    """By what the delta still has to be multiplied; 1 unless the scale could not be folded."""
    record: Record | None
    """How to undo it; None when there was no alpha."""


def fold(factors: Factors) -> Folded:
    """Folds the scale of a LoRA as far as it can be undone exactly, that of a LoKr wholly, if need be with rounding.

    diffusers can be told a LoRA's remaining scale, but not a LoKr's without telling it how PEFT would have split it.
    """
    if factors.alpha is None:
        return Folded(factors=factors, rest=1.0, record=None)
    part = _carrier(factors)
    original = factors.tensors[part]
    folded, portion = next(_exact_products(original, factors.scale))
    if factors.kind == "lokr" and portion != factors.scale:
        folded, portion = original.float() * factors.scale, factors.scale
    record = {
        "alpha": float(factors.alpha),
        "alpha_dtype": _name(factors.alpha.dtype),
        "dtype": _name(original.dtype),
        "folded": portion,
        "rank": factors.rank,
    }
    plain = replace(factors, tensors={**factors.tensors, part: folded}, alpha=None)
    return Folded(factors=plain, rest=factors.scale / portion, record=record)


def _carrier(factors: Factors) -> str:
    """The factor that takes the scale."""
    return next(part for part in (UP, "lokr_w1", "lokr_w1_a") if part in factors.tensors)


def _exact_products(tensor: Tensor, scale: float) -> Iterator[tuple[Tensor, float]]:
    """(tensor · portion, portion): the whole scale or the nearest power of two, in the tensor's type or in float32.

    The last one, a portion of 1, always is there.
    """
    portions = [scale] if scale > 0 and math.isfinite(scale) else []
    for portion in portions:
        for dtype in (tensor.dtype, torch.float32):
            if dtype.itemsize == 1:  # torch does not multiply in float8
                continue
            product = tensor.to(dtype) * portion
            if torch.equal(_undone(product, portion, tensor.dtype).double(), tensor.double()):
                yield product, portion
    yield tensor, 1.0


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

    A record that does not fit, because another program changed the file and kept the metadata, is passed over.
    """
    try:
        records = json.loads(metadata.get(METADATA_KEY, "{}"))
        return {name: _unfolded(f, records.get(name, records.get(COMMON))) for name, f in modules.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        logger.warning("the metadata entry %s is damaged; the tensors are taken as they are", METADATA_KEY)
        return dict(modules)


def _unfolded(factors: Factors, record: Record | None) -> Factors:
    if record is None or record["rank"] != factors.rank:
        return factors
    part = _carrier(factors)
    original = _undone(factors.tensors[part], record["folded"], getattr(torch, record["dtype"]))
    alpha = torch.tensor(record["alpha"], dtype=getattr(torch, record["alpha_dtype"]))
    return replace(factors, tensors={**factors.tensors, part: original}, alpha=alpha)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
