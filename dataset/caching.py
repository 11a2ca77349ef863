"""What both caching scripts do around their encoders: plan, report failures, remove what is left over, sum up."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from common.files import check_writable_folder
from common.processes import Processes
from dataset.cache_files import cache_header
from dataset.cache_names import abandoned, cached_stems, comparable, prunable
from dataset.config import DatasetConfig, ImageDataset, VideoDataset
from dataset.planning import Failure, Plan
from dataset.report import Tally, report_lines, summed
from options.errors import UserError, UserErrors

logger = logging.getLogger(__name__)

MAKER = "data_set"
"""What a fingerprint calls the data set that made it. It is not compared: moving a folder makes nothing stale."""
ABANDONED_AFTER = 3600
"""Seconds after which a temporary file is nobody's: a process that is writing now has some too."""


@dataclass(frozen=True, kw_only=True)
class CachingOptions:
    """How the loop works, for latents and texts alike."""

    batch_size: int | None = None
    """Items that are encoded together; None is the data set's own."""
    num_workers: int = 0
    """Processes that decode ahead of the encoder."""
    skip_existing: bool = False
    """Leave alone what is valid already."""
    keep_cache: bool = False
    """Remove nothing."""
    strict: bool = False
    """Stop at the first item that fails."""


def plan_all(
    config: DatasetConfig, plan: Callable[[ImageDataset | VideoDataset], Plan], *, strict: bool, processes: Processes
) -> list[Plan]:
    """Plans every data set, after a look at whether its caches could be written.

    Raises:
        UserErrors: a data set has nothing to cache; with `strict`, everything that is wrong.
    """
    for dataset in config.datasets:
        check_writable_folder(dataset.cache_directory, flag=f"{dataset.where} cache_directory")
    plans = [plan(dataset) for dataset in config.datasets]
    messages = [failure.message for plan in plans for failure in plan.failures]
    empty = [plan for plan in plans if not plan.jobs]
    for nothing in empty:
        got = "nothing that can be cached" + (", as every video is too short" if nothing.dropped else "")
        error = UserError(nothing.dataset.where, got, "at least one item", "put right what is reported")
        messages += [*nothing.dropped[:1], str(error)]
    if messages and (strict or empty):
        raise UserErrors(messages)
    for message in messages if processes.is_main else ():
        logger.error("%s", message)
    return plans


class Outcome:
    """What becomes of one data set in this process.

    Raises (`failed`):
        UserErrors: with `strict`.
    """

    def __init__(self, plan: Plan, options: CachingOptions) -> None:
        self.plan, self.tally, self._strict = plan, Tally(), options.strict

    def failed(self, failure: Failure) -> None:
        """Notes what could not be cached; the rest goes on."""
        if self._strict:
            raise UserErrors([failure.message])
        logger.error("%s", failure.message)
        self.tally.failures.append(failure)

    def wrote(self, paths: Sequence[Path]) -> None:
        """Counts one encoded unit and its files."""
        self.tally.num_encoded += 1
        self.tally.num_bytes += sum(os.path.getsize(path) for path in paths)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the time that the block takes."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.tally.seconds += time.perf_counter() - begin


def not_written(path: Path, error: OSError) -> UserError:
    """For a cache that cannot be written.

    Raises:
        UserError: the disk is full or went away, so the next one would fail as well.
    """
    got, expected = error.strerror or str(error), "a cache file that can be written"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
        raise UserError(str(path), got, expected, "make room, then go on with --skip_existing") from error
    return UserError(str(path), got, expected, "shorten the name, or close what has the file open")


def finish(
    outcomes: Sequence[Outcome],
    arch: str,
    options: CachingOptions,
    processes: Processes,
    *,
    what: str,
    text: bool = False,
) -> int:
    """When all processes are done, one of them removes what is left over and reports.

    Args:
        what: was counted, for the report.
        text: text caches, else latent caches.

    Returns:
        The exit code, the same in every process: 1 when something failed, else 0.
    """
    gathered = [summed(tallies) for tallies in zip(*processes.gather([o.tally for o in outcomes]), strict=True)]
    for outcome, tally in zip(outcomes, gathered, strict=True) if processes.is_main else ():
        pruned, notes = ([], []) if options.keep_cache else _prune(outcome.plan, tally, arch, text=text)
        for line in report_lines(outcome.plan, tally, what=what, pruned=pruned, notes=notes):
            logger.info("%s", line)
    processes.gather(None)  # a launcher ends the others when the first one leaves with an error
    return int(any(o.plan.failures or tally.failures for o, tally in zip(outcomes, gathered, strict=True)))


def _prune(plan: Plan, tally: Tally, arch: str, *, text: bool) -> tuple[list[str], list[str]]:
    """Removes caches of what the data set does not hold any more: (their names, remarks).

    Kept is what an item that failed today was cached as yesterday; what another data set made, or nobody knows who,
    unless it is an older cache of an item; and everything, when it is not known which items there are, as captions are
    missing or a disk was away.
    """
    folder = plan.dataset.cache_directory
    for path in abandoned(folder):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                path.unlink()
    leftover = prunable(folder, arch, [path for job in plan.jobs for path in job.paths], text=text)
    if leftover and any(failure.stem is None for failure in plan.failures):
        return [], [f"{len(leftover)} older cache files are kept until all items of the data set can be listed"]
    failed = {comparable(failure.stem) for failure in (*plan.failures, *tally.failures) if failure.stem is not None}
    present = {comparable(job.item.stem) for job in plan.jobs}
    removed, kept = [], 0
    for path in leftover:
        stems = {comparable(stem) for stem in cached_stems(path, arch)}
        maker = _maker(path)
        if stems & failed or (maker != plan.dataset.source_name and not (maker is None and stems & present)):
            kept += not stems & failed
            continue
        with suppress(OSError):  # another run was faster, or has it open
            path.unlink()
            removed.append(path.name)
    return removed, [f"{kept} other cache files in {folder} are kept: this data set did not make them"] * bool(kept)


def _maker(path: Path) -> str | None:
    """The data set that made a cache; None when it does not say."""
    try:
        return (cache_header(path).fingerprint or {}).get(MAKER)
    except UserError:
        return None
