"""What a Wan training can say about caches: all but what only the caching script was told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dataset.cache_files import CacheHeader
from dataset.config import ImageDataset, VideoDataset
from dataset.fingerprints import Fingerprint
from dataset.sources import MediaItem
from options.wan_tasks import WanTask
from wan.caching import MODES, Mode, WanCacheRules

if TYPE_CHECKING:
    from torch import Tensor

LEFT_OPEN = ("mode",)
"""Settings of the caching script's own flags. Within a data set they still have to be the same in all caches."""


@dataclass(frozen=True, kw_only=True)
class WanTrainingRules(WanCacheRules):
    """See `dataset.architecture.CacheRules`."""

    mode: Mode = "t2v"
    """What a task's videos are cached as."""
    modes: tuple[Mode, ...] = MODES
    """Of caches that can be trained; the first is what messages ask for in place of another one."""

    @classmethod
    def of_task(cls, task: WanTask) -> WanTrainingRules:
        """Those of a task: what it is not shown may be cached, what it is shown must be."""
        modes = trainable_modes(task)
        return cls(mode=modes[0], modes=modes)

    def check(self, dataset: ImageDataset | VideoDataset) -> None:
        self._of_kind(dataset).check(dataset)

    def check_item(self, item: MediaItem, dataset: ImageDataset | VideoDataset) -> None:
        self._of_kind(dataset).check_item(item, dataset)

    def like(self, stored: Fingerprint) -> WanCacheRules:
        mode = stored.get("mode")
        return WanCacheRules(mode=mode if mode in self.modes else self.modes[0])

    def left_open(self, header: CacheHeader, indices: Mapping[str, Tensor]) -> Fingerprint:
        if (found := header.fingerprint) is None:
            from wan.cache_evidence import mode_shown

            found = {"mode": mode_shown(header)}
        return {name: found[name] for name in LEFT_OPEN if name in found}

    def _of_kind(self, dataset: ImageDataset | VideoDataset) -> WanCacheRules:
        """Whether images are for one-frame training is told by their keys: others have no time index."""
        if isinstance(dataset, VideoDataset):
            return WanCacheRules(mode=self.mode)
        is_one_frame = "one_frame" in self.modes and dataset.fp_1f_target_index is not None
        return WanCacheRules(mode="one_frame" if is_one_frame else "t2v")


def trainable_modes(task: WanTask) -> tuple[Mode, ...]:
    """What the caches of a task have to show; the usual one first."""
    if not task.takes_image:
        return ("t2v", "i2v", "flf2v")
    return {"i2v": ("i2v", "one_frame"), "flf2v": ("flf2v", "one_frame")}.get(task.kind, ("i2v", "flf2v"))


def needed_contents(task: WanTask) -> tuple[str, ...]:
    """What every item of a batch has to hold, with its caption's."""
    needed = ["latents", "t5"]
    if task.takes_image:
        needed += ["latents_image", "clip"]
    if task.kind == "fun_control":
        needed.append("latents_control")
    return tuple(needed)
