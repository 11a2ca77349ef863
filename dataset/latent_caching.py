"""The loop that makes latent caches: skip what is valid, load ahead, encode in batches, write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.processes import Processes
from dataset.architecture import CacheRules, LatentEncoder
from dataset.batching import Batches
from dataset.cache_files import check_finite, latent_metadata, write_cache
from dataset.caching import MAKER, CachingOptions, Outcome, finish, not_written, plan_all
from dataset.config import DatasetConfig, ImageDataset
from dataset.fingerprints import Fingerprint
from dataset.jobs import Job, Sample
from dataset.loading import NotLoaded, load_samples
from dataset.planning import Failure, plan_latents
from dataset.preview import write_previews
from dataset.validity import pending
from options.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Sheets to look at while the encoder works."""

    folder: str
    name: str
    """What their names begin with."""
    max_items: int
    """Of each data set; 0 is all."""


OpenEncoder = Callable[[], AbstractContextManager[LatentEncoder]]


def cache_latents(
    config: DatasetConfig,
    rules: CacheRules,
    open_encoder: OpenEncoder,
    encoders: Fingerprint,
    options: CachingOptions,
    processes: Processes,
    *,
    preview: Preview | None = None,
) -> int:
    """Makes the latent caches of all data sets, which `rules` have checked.

    Args:
        open_encoder: brings the models in; called once, and only when there is something to encode.
        encoders: what caches say about the models.

    Returns:
        The exit code: 1 when something failed, 0 otherwise.

    Raises:
        UserErrors: as `plan_all`; with `strict`, whatever fails.
        UserError: a file cannot be written.
    """
    plan = partial(plan_latents, rules=rules, reuse=options.skip_existing)
    plans = plan_all(config, plan, strict=options.strict, processes=processes)
    outcomes = [Outcome(plan, options) for plan in plans]
    if preview and processes.is_main:
        write_previews(plans, rules, **vars(preview), num_workers=options.num_workers)
    with ExitStack() as stack, logging_redirect_tqdm():
        encoder: LatentEncoder | None = None
        for outcome in outcomes:
            share = processes.share(outcome.plan.jobs)
            left = _left(share, encoders, outcome, options)
            if left and encoder is None:
                encoder = stack.enter_context(open_encoder())
            with outcome.timed():
                for batch in _batches(share, left, rules, outcome, options, processes):
                    _cache(encoder, batch, rules.arch, encoders, outcome)
    return finish(outcomes, rules.arch, options, processes, what=_what(outcomes))


def _what(outcomes: Sequence[Outcome]) -> str:
    is_image = {isinstance(outcome.plan.dataset, ImageDataset) for outcome in outcomes}
    return "images" if is_image == {True} else "clips"


def _left(jobs: Sequence[Job], encoders: Fingerprint, outcome: Outcome, options: CachingOptions) -> Sequence[Job]:
    """The jobs that have to be done."""
    if not options.skip_existing:
        return jobs
    checked = pending(tqdm(jobs, desc="checking caches", unit="file", leave=False), encoders)
    outcome.tally.num_valid += checked.num_valid
    outcome.tally.num_unknown += checked.num_unknown
    outcome.tally.reasons.update(checked.reasons)
    return checked.jobs


def _batches(
    share: Sequence[Job],
    left: Sequence[Job],
    rules: CacheRules,
    outcome: Outcome,
    options: CachingOptions,
    processes: Processes,
) -> Iterator[Sequence[Sample]]:
    """Loads what is left, in batches; failures are noted."""
    batches = Batches(share, left, options.batch_size or outcome.plan.dataset.batch_size)
    total = sum(len(job.units) for job in left)
    with tqdm(total=total, desc=outcome.plan.dataset.where, unit="item", disable=not processes.is_main) as bar:
        for loaded in load_samples(left, fps=rules.fps, num_workers=options.num_workers):
            if isinstance(loaded, NotLoaded):
                outcome.failed(loaded.failure)
                complete = batches.give_up(loaded.units)
                bar.update(len(loaded.units))
            else:
                complete = filter(None, [batches.add(loaded)])
            for batch in complete:
                yield batch
                bar.update(len(batch))


def _cache(encoder: LatentEncoder, batch: Sequence[Sample], arch: str, encoders: Fingerprint, outcome: Outcome) -> None:
    """Encodes and writes a batch; when that fails, one by one, so that one bad item does not take others with it."""
    encoded, error = _encoded(encoder, batch)
    if error is None:
        for sample, files in zip(batch, encoded, strict=True):
            _write(sample, files, arch, encoders, outcome)
    elif len(batch) == 1:
        outcome.failed(Failure.of(batch[0].job.item, error))
    else:
        for sample in batch:
            _cache(encoder, [sample], arch, encoders, outcome)


def _encoded(encoder: LatentEncoder, batch: Sequence[Sample]) -> tuple[Sequence, Exception | None]:
    try:
        return encoder.encode(batch), None
    except Exception as error:  # an exhausted device, a broken kernel: whatever it is, other items may fit
        return (), error.with_traceback(None)  # its frames hold the device's memory


def _write(sample: Sample, files: Sequence, arch: str, encoders: Fingerprint, outcome: Outcome) -> None:
    job, unit = sample.job, sample.unit
    fingerprint = {**unit.settings, **encoders, **sample.identity, MAKER: job.dataset.source_name}
    size = job.source_size if unit.crop is None else job.size
    count = unit.crop and unit.crop.length
    metadata = latent_metadata(arch, size, fingerprint, frame_count=count)
    try:
        for path, tensors in zip(unit.paths, files, strict=True):
            for content, tensor in tensors.items():  # of all sections before the first is written
                check_finite(path, content, tensor)
        for path, tensors in zip(unit.paths, files, strict=True):
            write_cache(path, tensors, main="latents", metadata=metadata)
    except UserError as error:
        outcome.failed(Failure.of(job.item, error))
    except OSError as error:
        outcome.failed(Failure.of(job.item, not_written(path, error)))
    except Exception as error:  # whatever is odd about one item does not concern the others
        outcome.failed(Failure.of(job.item, error))
    else:
        outcome.wrote(unit.paths)
