"""What the tensors of a Wan cache tell about its settings: all that is known of the incumbent's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dataset.cache_files import CacheHeader
from options.one_frame import OneFrameOptions
from wan.cached_context import FEATURE_INDICES, FEATURES, INDICES, SHOWN

if TYPE_CHECKING:
    from torch import Tensor

    from wan.caching import Mode


def mode_shown(header: CacheHeader) -> Mode:
    """The mode that names and shapes give away; the incumbent has no flf2v."""
    if INDICES in header.keys:
        return "one_frame"
    if SHOWN not in header.keys:
        return "t2v"
    return "flf2v" if len(header.shapes.get(FEATURES, ())) == 3 else "i2v"


def one_frame_complaint(indices: Mapping[str, Tensor], options: OneFrameOptions) -> str | None:
    """What in a one-frame cache contradicts the data set's options.

    Args:
        indices: the contents that end with `_indices`.
    """
    stored, controls = indices[INDICES].tolist(), options.control_indices or ()
    now = sorted(controls) if options.target_index is None else sorted([*controls, options.target_index])
    if stored != now:
        return f"{INDICES} is {_listed(stored)} in the cache, {_listed(now)} now"
    # The incumbent deals control images out to sorted places, whatever index each was given.
    dealt = indices[FEATURE_INDICES].tolist() if FEATURE_INDICES in indices else sorted(controls)
    if dealt != list(controls):
        return f"control_indices is {_listed(dealt)} in the cache, {_listed(controls)} now"
    return None


def _listed(values: Sequence[int]) -> str:
    return ";".join(map(str, values)) or "nothing"
