"""A run of a caching script, from flags to cache files: what is the same for every model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import check_writable_folder
from common.processes import Processes, joined_processes
from dataset.architecture import CacheRules
from dataset.caching import CachingOptions, plan_all
from dataset.config import DatasetConfig, load_dataset_config
from dataset.fingerprints import Fingerprint
from options.errors import UserError, UserErrors
from options.flags_cache import CacheFlags, CachePreviewFlags, check_cache_flags

if TYPE_CHECKING:
    import torch

    from dataset import latent_caching, text_caching

    OpenLatentModels = Callable[[torch.device], tuple[latent_caching.OpenEncoder, Fingerprint]]
    OpenTextModels = Callable[[torch.device], tuple[text_caching.OpenEncoder, Fingerprint]]

logger = logging.getLogger(__name__)


def run_latents(cache: CacheFlags, preview: CachePreviewFlags, rules: CacheRules, open_models: OpenLatentModels) -> int:
    """Checks everything that needs no weights, then draws what is asked for, encodes, and reports.

    Args:
        open_models: reads the models' headers and checks them; its result is `cache_latents`' `open_encoder` and
            `encoders`. Not called with `--debug_mode`.

    Returns:
        The exit code: 1 when something failed.
    """
    check_cache_flags(cache)
    _check_preview_flags(preview)
    config = load_dataset_config(cache.dataset_config)
    check_datasets(config, rules)
    with joined_processes() as processes:
        if preview.debug_mode:
            return _debug(cache, preview, config, rules, processes)
        from common.device import pick_device
        from dataset.latent_caching import Preview, cache_latents

        open_encoder, encoders = open_models(pick_device(processes.device_name(cache.device)))
        sheets = None
        if preview.preview is not None:
            name = Path(cache.dataset_config).stem
            sheets = Preview(folder=preview.preview, name=name, max_items=preview.preview_items)
        options = _caching_options(cache)
        return cache_latents(config, rules, open_encoder, encoders, options, processes, preview=sheets)


def run_texts(cache: CacheFlags, arch: str, open_models: OpenTextModels, *, varlen: Collection[str] = ()) -> int:
    """Checks everything that needs no weights, then encodes and reports.

    Args:
        open_models: as of `run_latents`, for `cache_texts`.
        varlen: contents whose length differs from caption to caption.

    Returns:
        The exit code: 1 when something failed.
    """
    check_cache_flags(cache)
    config = load_dataset_config(cache.dataset_config)
    with joined_processes() as processes:
        from common.device import pick_device
        from dataset.text_caching import cache_texts

        open_encoder, encoders = open_models(pick_device(processes.device_name(cache.device)))
        return cache_texts(config, arch, open_encoder, encoders, _caching_options(cache), processes, varlen=varlen)


def check_models(models: object, names: Collection[str], preview: CachePreviewFlags) -> None:
    """Raises UserError for a model that is not given, unless nothing is encoded.

    Args:
        models: a dataclass of flags.
        names: of the flags that have to be given.
    """
    for name in names:
        if getattr(models, name) is None and not preview.debug_mode:
            raise UserError(f"--{name}", "nothing", "a checkpoint file or folder", f"give --{name}")


def check_datasets(config: DatasetConfig, rules: CacheRules) -> None:
    """Raises UserErrors with everything in a data set file that does not go with what is cached."""
    problems = []
    for dataset in config.datasets:
        try:
            rules.check(dataset)
        except UserError as error:
            problems.append(error)
    if problems:
        raise UserErrors(problems)


def _check_preview_flags(preview: CachePreviewFlags) -> None:
    if preview.debug_mode == "console":
        raise UserError("--debug_mode", "console", "image or video", "--preview FOLDER writes sheets to look at")
    if preview.preview is not None:
        check_writable_folder(preview.preview, flag="--preview")
    if preview.preview_items < 0:
        raise UserError("--preview_items", preview.preview_items, "0 or more", "0 shows all")


def _debug(
    cache: CacheFlags, preview: CachePreviewFlags, config: DatasetConfig, rules: CacheRules, processes: Processes
) -> int:
    from dataset.planning import plan_latents
    from dataset.preview import write_debug_files

    _check_debug_folders(config)
    plan = partial(plan_latents, rules=rules, reuse=False)
    plans = plan_all(config, plan, strict=cache.strict, processes=processes)
    plans = [replace(plan, jobs=tuple(processes.share(plan.jobs))) for plan in plans]
    videos = preview.debug_mode == "video"
    written, failures = write_debug_files(plans, rules, videos=videos, num_workers=cache.workers)
    if failures and cache.strict:
        raise UserErrors([failure.message for failure in failures])
    logger.info("%d files written where their caches would go", len(written))
    failed = [*failures, *(failure for plan in plans for failure in plan.failures)]
    # Waits for all, as a launcher ends the others when the first one leaves with an error.
    return int(any(processes.gather(bool(failed))))


def _check_debug_folders(config: DatasetConfig) -> None:
    """Raises UserError where the pictures would become images of the data set itself."""
    for dataset in config.datasets:
        keys = ("image_directory", "video_directory", "control_directory", "mask_directory")
        sources = [folder for key in keys if (folder := getattr(dataset, key, None))]
        if any(os.path.realpath(dataset.cache_directory) == os.path.realpath(folder) for folder in sources):
            where = f"{dataset.where} cache_directory"
            raise UserError(
                where, dataset.cache_directory, "another folder than the sources'", "--debug_mode writes there"
            )


def _caching_options(flags: CacheFlags) -> CachingOptions:
    """The loop's options."""
    return CachingOptions(
        batch_size=flags.batch_size,
        num_workers=flags.workers,
        skip_existing=flags.skip_existing,
        keep_cache=flags.keep_cache,
        strict=flags.strict,
    )
