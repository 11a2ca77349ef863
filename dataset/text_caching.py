"""The loop that makes text caches: one for each image or video; equal captions are encoded once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import TYPE_CHECKING

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.processes import Processes
from dataset.cache_files import MISSING, NO_FINGERPRINT, cache_header, staleness, text_metadata, write_text_cache
from dataset.caching import MAKER, CachingOptions, Outcome, finish, not_written, plan_all
from dataset.config import DatasetConfig
from dataset.fingerprints import Fingerprint, text_hash
from dataset.jobs import TextJob
from dataset.planning import Failure, plan_texts

if TYPE_CHECKING:
    import torch

Encode = Callable[[str], Mapping[str, "torch.Tensor"]]
"""From a caption to content name -> CPU tensor in the type that is stored."""
OpenEncoder = Callable[[], AbstractContextManager[Encode]]


def cache_texts(
    config: DatasetConfig,
    arch: str,
    open_encoder: OpenEncoder,
    encoders: Fingerprint,
    options: CachingOptions,
    processes: Processes,
    *,
    varlen: Collection[str] = (),
) -> int:
    """Makes the text caches of all data sets.

    Args:
        open_encoder: brings the models in; called once, and only when there is something to encode.
        encoders: what caches say about the models.
        varlen: contents whose length differs from caption to caption.

    Returns:
        The exit code: 1 when something failed, 0 otherwise.

    Raises:
        UserErrors: as `plan_all`; with `strict`, whatever fails.
        UserError: a file cannot be written.
    """
    plans = plan_all(config, partial(plan_texts, arch=arch), strict=options.strict, processes=processes)
    outcomes = [Outcome(plan, options) for plan in plans]
    with ExitStack() as stack, logging_redirect_tqdm():
        encode: Encode | None = None
        for outcome in outcomes:
            # By caption, so that equal ones are neighbours and belong to one process.
            captions = sorted({job.item.caption for job in outcome.plan.jobs})
            mine = set(processes.share(captions))
            share = sorted((j for j in outcome.plan.jobs if j.item.caption in mine), key=lambda j: j.item.caption)
            left = [job for job in share if _is_stale(job, encoders, outcome, options)]
            if left and encode is None:
                encode = stack.enter_context(open_encoder())
            with outcome.timed():
                _cache_all(encode, left, partial(_write, arch, encoders, varlen, outcome), outcome, processes)
    return finish(outcomes, arch, options, processes, what="captions", text=True)


def _expected(caption: str, encoders: Fingerprint) -> dict[str, str]:
    return {"caption": text_hash(caption), **encoders}


def _is_stale(job: TextJob, encoders: Fingerprint, outcome: Outcome, options: CachingOptions) -> bool:
    if not options.skip_existing:
        return True
    state = staleness(job.path, _expected(job.item.caption, encoders))
    if state == NO_FINGERPRINT and cache_header(job.path).metadata.get("caption1") != job.item.caption:
        state = "the caption changed"
    if state not in (None, NO_FINGERPRINT):
        outcome.tally.reasons.update([state] if state != MISSING else [])
        return True
    outcome.tally.num_valid += 1
    outcome.tally.num_unknown += state == NO_FINGERPRINT
    return False


def _cache_all(
    encode: Encode | None,
    jobs: Sequence[TextJob],
    write: Callable[[TextJob, Mapping[str, torch.Tensor]], None],
    outcome: Outcome,
    processes: Processes,
) -> None:
    caption: str | None = None
    tensors: Mapping[str, torch.Tensor] = {}
    progress = tqdm(jobs, desc=outcome.plan.dataset.where, unit="caption", disable=not processes.is_main)
    for job in progress:
        try:
            if job.item.caption != caption:
                tensors, caption = encode(job.item.caption), job.item.caption
        except Exception as error:  # one caption must not take the others with it
            caption = None
            outcome.failed(Failure.of(job.item, error))
            continue
        write(job, tensors)


def _write(
    arch: str,
    encoders: Fingerprint,
    varlen: Collection[str],
    outcome: Outcome,
    job: TextJob,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    caption, maker = job.item.caption, {MAKER: outcome.plan.dataset.source_name}
    metadata = text_metadata(arch, caption, _expected(caption, encoders) | maker)
    try:
        write_text_cache(job.path, tensors, metadata=metadata, varlen=varlen)
    except OSError as error:
        outcome.failed(Failure.of(job.item, not_written(job.path, error)))
    except Exception as error:  # whatever is odd about one item does not concern the others
        outcome.failed(Failure.of(job.item, error))
    else:
        outcome.wrote([job.path])
