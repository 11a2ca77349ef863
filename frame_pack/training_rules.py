"""What a FramePack training can say about caches: all but what only the caching script was told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dataset.cache_files import CacheHeader
from dataset.config import ImageDataset, VideoDataset
from dataset.fingerprints import Fingerprint
from dataset.sources import MediaItem
from frame_pack.caching import FramePackCacheRules, Mode

if TYPE_CHECKING:
    from torch import Tensor

LEFT_OPEN = ("mode", "no_2x", "no_4x")
"""Settings of the caching script's own flags. Within a data set they still have to be the same in all caches."""


@dataclass(frozen=True, kw_only=True)
class FramePackTrainingRules(FramePackCacheRules):
    """See `dataset.architecture.CacheRules`."""

    mode: Mode = "sections"
    """Only asked for where FramePack and FramePack-F1 are alike."""

    def check(self, dataset: ImageDataset | VideoDataset) -> None:
        _of_kind(dataset).check(dataset)

    def check_item(self, item: MediaItem, dataset: ImageDataset | VideoDataset) -> None:
        _of_kind(dataset).check_item(item, dataset)

    def settings(self, dataset: ImageDataset | VideoDataset) -> Fingerprint:
        known = _of_kind(dataset).settings(dataset)
        return {name: value for name, value in known.items() if name not in LEFT_OPEN}

    def like(self, stored: Fingerprint) -> FramePackCacheRules:
        return FramePackCacheRules(
            mode=stored.get("mode", "sections"),
            no_2x=stored.get("no_2x") == "yes",
            no_4x=stored.get("no_4x") == "yes",
        )

    def left_open(self, header: CacheHeader, indices: Mapping[str, Tensor]) -> Fingerprint:
        if (found := header.fingerprint) is None:
            from frame_pack.cache_evidence import settings_shown

            found = settings_shown(frozenset(header.keys), indices, num_controls=0)
        return {name: found[name] for name in LEFT_OPEN if name in found}


def _of_kind(dataset: ImageDataset | VideoDataset) -> FramePackCacheRules:
    return FramePackCacheRules(mode="one_frame" if isinstance(dataset, ImageDataset) else "sections")
