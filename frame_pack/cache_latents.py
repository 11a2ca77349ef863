"""A run of `fpack_cache_latents.py`, from flags to cache files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from common.files import check_writable_folder
from common.processes import Processes, joined_processes
from dataset.caching import CachingOptions, plan_all
from dataset.config import DatasetConfig, load_dataset_config
from frame_pack.caching import FramePackCacheRules, FramePackLatentEncoder
from options.errors import UserError, UserErrors
from options.flags_cache import CacheFlags, check_cache_flags
from options.flags_fpack_cache import ContextFlags, FramePackCacheLatentsFlags
from options.flags_generate import check_vae_memory

logger = logging.getLogger(__name__)


def run(flags: FramePackCacheLatentsFlags) -> int:
    """Checks everything that needs no weights, then draws what is asked for, encodes, and reports.

    Returns:
        The exit code: 1 when something failed.
    """
    rules = rules_of(flags.context)
    _check_flags(flags)
    config = load_dataset_config(flags.cache.dataset_config)
    check_datasets(config, rules)
    with joined_processes() as processes:
        if flags.preview.debug_mode:
            return _debug(flags, config, rules, processes)
        return _encode(flags, config, rules, processes)


def rules_of(flags: ContextFlags) -> FramePackCacheRules:
    """What is cached, from the flags that say so.

    Raises:
        UserError: flags that exclude each other, or no window.
    """
    if flags.f1 and flags.one_frame:
        raise UserError("--f1", "--f1 and --one_frame", "one of them", "F1 has no one-frame training")
    for name in ("one_frame_no_2x", "one_frame_no_4x"):
        if getattr(flags, name) and not flags.one_frame:
            raise UserError(f"--{name}", "no --one_frame", "--one_frame", "add --one_frame or leave it out")
    if flags.latent_window_size is not None and not 1 <= flags.latent_window_size <= 999:
        raise UserError("--latent_window_size", flags.latent_window_size, "1 to 999", "FramePack's own is 9")
    mode = "one_frame" if flags.one_frame else "f1" if flags.f1 else "sections"
    return FramePackCacheRules(
        mode=mode, no_2x=flags.one_frame_no_2x, no_4x=flags.one_frame_no_4x, window=flags.latent_window_size
    )


def _check_flags(flags: FramePackCacheLatentsFlags) -> None:
    check_cache_flags(flags.cache)
    check_vae_memory(flags.vae_memory)
    preview, models = flags.preview, flags.models
    if models.vae_dtype is not None:
        remedy = "leave it out: the VAE runs in float16 on a GPU, in float32 on a CPU"
        raise UserError("--vae_dtype", models.vae_dtype, "nothing", remedy)
    if preview.debug_mode == "console":
        raise UserError("--debug_mode", "console", "image or video", "--preview FOLDER writes sheets to look at")
    if preview.preview is not None:
        check_writable_folder(preview.preview, flag="--preview")
    if preview.preview_items < 0:
        raise UserError("--preview_items", preview.preview_items, "0 or more", "0 shows all")
    for name in ("vae", "image_encoder"):
        if getattr(models, name) is None and not preview.debug_mode:
            raise UserError(f"--{name}", "nothing", "a checkpoint file or folder", f"give --{name}")


def check_datasets(config: DatasetConfig, rules: FramePackCacheRules) -> None:
    """Raises UserErrors with everything in a data set file that does not go with what is cached."""
    problems = []
    for dataset in config.datasets:
        try:
            rules.check(dataset)
        except UserError as error:
            problems.append(error)
    if problems:
        raise UserErrors(problems)


def _debug(
    flags: FramePackCacheLatentsFlags, config: DatasetConfig, rules: FramePackCacheRules, processes: Processes
) -> int:
    from dataset.planning import plan_latents
    from dataset.preview import write_debug_files

    _check_debug_folders(config)
    plan = partial(plan_latents, rules=rules, reuse=False)
    plans = plan_all(config, plan, strict=flags.cache.strict, processes=processes)
    plans = [replace(plan, jobs=tuple(processes.share(plan.jobs))) for plan in plans]
    videos, workers = flags.preview.debug_mode == "video", flags.cache.workers
    written, failures = write_debug_files(plans, rules, videos=videos, num_workers=workers)
    if failures and flags.cache.strict:
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


def _encode(
    flags: FramePackCacheLatentsFlags, config: DatasetConfig, rules: FramePackCacheRules, processes: Processes
) -> int:
    import torch

    from common.device import pick_device, pick_dtype
    from common.weights import check_names_and_shapes, fingerprint
    from dataset.latent_caching import Preview, cache_latents
    from frame_pack.image_encoder import build_siglip, load_siglip, open_siglip
    from hunyuan_model.vae import build_vae, load_vae, open_vae

    device = pick_device(processes.device_name(flags.cache.device))
    dtype = pick_dtype(None, on_gpu="float16", device=device)
    vae, siglip = open_vae(flags.models.vae), open_siglip(flags.models.image_encoder)
    check_names_and_shapes(build_vae(vae), vae)
    check_names_and_shapes(build_siglip(siglip), siglip)
    torch.backends.cudnn.enabled = not flags.models.disable_cudnn_backend
    memory = flags.vae_memory

    @contextmanager
    def open_encoder() -> Iterator[FramePackLatentEncoder]:
        place = {"dtype": dtype, "device": device}
        yield FramePackLatentEncoder(
            rules,
            vae=load_vae(vae, chunk_size=memory.vae_chunk_size, tile_size=memory.tile_size, **place),
            siglip=load_siglip(siglip, **place),
        )

    encoders = {
        "vae": fingerprint(vae),
        "image_encoder": fingerprint(siglip),
        "encoder_dtype": str(dtype).removeprefix("torch."),
        "vae_tile_size": str(memory.tile_size or "none"),
    }
    options, preview = caching_options(flags.cache), None
    if flags.preview.preview is not None:
        name = Path(flags.cache.dataset_config).stem
        preview = Preview(folder=flags.preview.preview, name=name, max_items=flags.preview.preview_items)
    return cache_latents(config, rules, open_encoder, encoders, options, processes, preview=preview)


def caching_options(flags: CacheFlags) -> CachingOptions:
    """The loop's options."""
    return CachingOptions(
        batch_size=flags.batch_size,
        num_workers=flags.workers,
        skip_existing=flags.skip_existing,
        keep_cache=flags.keep_cache,
        strict=flags.strict,
    )
