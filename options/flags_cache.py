"""Flags that every caching script has."""

import os
from dataclasses import dataclass
from typing import Literal

from options.errors import UserError
from options.flag_fields import flag


@dataclass(frozen=True, kw_only=True)
class CacheFlags:
    """Which data sets, and how they are gone through."""

    dataset_config: str = flag("data set file, .toml or .json", required=True)
    device: str | None = flag("torch device (default: cuda if there is one, else cpu)")
    batch_size: int | None = flag("items encoded together (default: the data set's batch_size)")
    num_workers: int | None = flag("processes that decode ahead; 0 decodes in turn (default: by the number of cores)")
    skip_existing: bool = flag("leave caches alone that still belong to their source and settings", default=False)
    keep_cache: bool = flag("remove no cache of what the data set does not hold any more", default=False)
    strict: bool = flag("stop at the first file that fails (default: report it, go on, exit with 1)", default=False)

    @property
    def workers(self) -> int:
        """`--num_workers`, or a few: each takes memory, and the encoder is rarely faster than four of them."""
        return min(4, max(1, (os.cpu_count() or 2) - 1)) if self.num_workers is None else self.num_workers


@dataclass(frozen=True, kw_only=True)
class CachePreviewFlags:
    """Looking at what is cached."""

    preview: str | None = flag("folder for contact sheets that show what the model will see")
    preview_items: int = flag("items that --preview shows of each data set, evenly spread; 0 is all", default=96)
    debug_mode: Literal["image", "video", "console"] | None = flag(
        "encode nothing: put a picture (video: an mp4) of each item where its cache would go"
    )
    console_width: int = flag("not used: see --preview", default=80)
    console_back: str | None = flag("not used: see --preview")
    console_num_images: int | None = flag("not used: see --preview")


def check_cache_flags(flags: CacheFlags) -> None:
    """Raises UserError for numbers that cannot work."""
    if flags.batch_size is not None and flags.batch_size < 1:
        raise UserError("--batch_size", flags.batch_size, "1 or more", "leave it out for the data set's own")
    if flags.num_workers is not None and not 0 <= flags.num_workers <= 64:
        raise UserError("--num_workers", flags.num_workers, "0 to 64", "0 decodes without worker processes")
