"""What can be known to be wrong with a training command before anything is opened: rules between options."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from options.errors import UserError, UserErrors
from options.flags_compile import check_compile
from options.flags_optimizer import check_optimizer
from options.flags_saving import check_modelspec, check_saving, check_tracking, check_upload
from options.flags_timesteps import check_timesteps, unread_settings
from options.flags_train import MemoryFlags, TrainFlags

logger = logging.getLogger(__name__)

MAX_SEED = 2**63 - 1
NO_EFFECT = ("img_in_txt_in_offloading", "ddp_gradient_as_bucket_view", "ddp_static_graph")


def check_train(
    flags: TrainFlags, *, dit: str | None, network_module: str, more: Iterable[UserError | None] = ()
) -> None:
    """Refuses what cannot work, and logs what has no effect.

    With `--show_timesteps` nothing need be given that only a training needs.

    Args:
        network_module: the usual one, for messages.
        more: what is wrong with the flags of one model.

    Raises:
        UserError: one line for each thing that is wrong.
    """
    problems = [*_missing(flags, dit, network_module), *_numbers(flags), *_network(flags), *_samples(flags)]
    problems += [*_validation(flags), *_attention(flags), *more, *_of_groups(flags)]
    if problems:
        raise problems[0] if len(problems) == 1 else UserErrors(problems)
    for warning in _warnings(flags):
        logger.warning(warning)


def missing_models(flags: TrainFlags, models: object, names: Iterable[str]) -> Iterator[UserError]:
    """Complaints about models that samples need, if there are to be samples."""
    trigger = flags.samples.trigger
    for name in names if trigger else ():
        if not getattr(models, name):
            yield UserError(f"--{name}", "nothing", f"a model, which --{trigger} needs", f"give --{name} FILE")


def complaint(check: Callable[[Any], None], flags: object) -> Iterator[UserError]:
    """What a check raises, if anything."""
    try:
        check(flags)
    except UserError as error:
        yield error


def _of_groups(flags: TrainFlags) -> Iterator[UserError]:
    yield from complaint(check_optimizer, flags.optimizer)
    yield from complaint(check_timesteps, flags.timesteps)
    if flags.timesteps.show_timesteps is None:
        yield from complaint(check_saving, flags.saving)
    yield from complaint(check_upload, flags.upload)
    yield from complaint(check_tracking, flags.tracking)
    yield from complaint(check_modelspec, flags.modelspec)


def _missing(flags: TrainFlags, dit: str | None, network_module: str) -> Iterator[UserError]:
    if flags.timesteps.show_timesteps is not None:
        return
    needed = {
        "dit": (dit, "the transformer", "give --dit FILE"),
        "dataset_config": (flags.data.dataset_config, "a data set file", "give --dataset_config data.toml, say"),
        "network_module": (flags.network.network_module, "the kind of LoRA", f"give --network_module {network_module}"),
    }
    for name, (value, expected, remedy) in needed.items():
        if not value:
            yield UserError(f"--{name}", "nothing", expected, remedy)


def _numbers(flags: TrainFlags) -> Iterator[UserError]:
    run, samples, validation = flags.run, flags.samples, flags.validation
    counts = {
        "max_train_steps": run.max_train_steps,
        "max_train_epochs": run.max_train_epochs,
        "gradient_accumulation_steps": run.gradient_accumulation_steps,
        "ddp_timeout": flags.devices.ddp_timeout,
        "checkpoint_blocks": flags.memory.checkpoint_blocks,
        "block_swap_ring_size": flags.memory.block_swap_ring_size,
        "sample_every_n_steps": samples.sample_every_n_steps,
        "sample_every_n_epochs": samples.sample_every_n_epochs,
        "validate_every_n_steps": validation.validate_every_n_steps,
        "validate_every_n_epochs": validation.validate_every_n_epochs,
    }
    for name, count in counts.items():
        if count is not None and count < 1:
            yield UserError(f"--{name}", count, "1 or more", "leave it out, or change it")
    if flags.data.max_data_loader_n_workers < 0:
        got = flags.data.max_data_loader_n_workers
        yield UserError("--max_data_loader_n_workers", got, "0 or more", "0 reads without other processes")
    if run.seed is not None and not 0 <= run.seed <= MAX_SEED:
        yield UserError("--seed", run.seed, f"0 to {MAX_SEED}", "leave it out for a random one")
    if not (math.isfinite(run.guidance_scale) and run.guidance_scale >= 0):
        yield UserError("--guidance_scale", run.guidance_scale, "a number from 0", "leave it out for 1.0")


def _network(flags: TrainFlags) -> Iterator[UserError]:
    network = flags.network
    num_files, num_multipliers = len(network.base_weights), len(network.base_weights_multiplier)
    limit = network.scale_weight_norms
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        yield UserError("--scale_weight_norms", limit, "a number above 0", "change it, or leave it out")
    if num_multipliers > num_files:
        expected = f"at most {num_files}, as many as --base_weights"
        yield UserError("--base_weights_multiplier", f"{num_multipliers} numbers", expected, "remove the others")
    if network.dim_from_weights and network.network_weights is None:
        remedy = "give --network_weights FILE, or leave --dim_from_weights out"
        yield UserError("--dim_from_weights", "no --network_weights", "a file to take the rank from", remedy)


def _attention(flags: TrainFlags) -> Iterator[UserError]:
    if flags.attention.sage_attn:
        remedy = "use --flash_attn or --xformers, or leave it out"
        yield UserError("--sage_attn", "SageAttention", "an attention that has gradients", remedy)
    yield from complaint(partial(check_compile, swaps=bool(flags.memory.blocks_to_swap)), flags.compilation)


def _samples(flags: TrainFlags) -> Iterator[UserError]:
    trigger = flags.samples.trigger
    if trigger and flags.samples.sample_prompts is None:
        remedy = f"give --sample_prompts FILE, or leave --{trigger} out"
        yield UserError("--sample_prompts", "nothing", f"a file with prompts, which --{trigger} needs", remedy)


def _validation(flags: TrainFlags) -> Iterator[UserError]:
    validation = flags.validation
    if validation.validation_dataset_config is not None:
        return
    for name in ("validate_every_n_steps", "validate_every_n_epochs"):
        if getattr(validation, name) is not None:
            expected = f"a data set file, which --{name} needs"
            remedy = f"give it, or leave --{name} out"
            yield UserError("--validation_dataset_config", "nothing", expected, remedy)


def _warnings(flags: TrainFlags) -> Iterator[str]:
    yield from _without_effect(flags)
    yield from flags.optimizer.hints()
    yield from flags.compilation.hints()
    for name in flags.attention.given[1:]:
        yield f"--{name} has no effect beside {flags.attention.backend_flag}"
    yield from unread_settings(flags.timesteps)
    for unit in ("epochs", "steps"):
        for name in (f"save_last_n_{unit}", f"save_last_n_{unit}_state"):
            if getattr(flags.saving, name) is not None and getattr(flags.saving, f"save_every_n_{unit}") is None:
                yield f"--{name} has no effect without --save_every_n_{unit}"


def _without_effect(flags: TrainFlags) -> Iterator[str]:
    yield from _of_memory_without_effect(flags.memory)
    for group in (flags.memory, flags.devices):
        for name in NO_EFFECT:
            if getattr(group, name, False):
                yield f"--{name} has no effect"
    if flags.data.persistent_data_loader_workers and not flags.data.max_data_loader_n_workers:
        yield "--persistent_data_loader_workers has no effect: --max_data_loader_n_workers is 0"
    if flags.samples.sample_prompts is not None and flags.samples.trigger is None:
        yield "--sample_prompts has no effect: --sample_at_first and --sample_every_n_steps and _epochs are left out"
    if flags.network.dim_from_weights and flags.network.network_dim is not None:
        yield "--network_dim has no effect: --dim_from_weights takes the rank from the file"


def _of_memory_without_effect(memory: MemoryFlags) -> Iterator[str]:
    is_swapped = bool(memory.blocks_to_swap)
    is_checkpointed = memory.gradient_checkpointing or memory.checkpoint_blocks or is_swapped
    if memory.gradient_checkpointing_cpu_offload and not is_checkpointed:
        yield "--gradient_checkpointing_cpu_offload has no effect without --gradient_checkpointing"
    for name in ("use_pinned_memory_for_block_swap", "block_swap_h2d_only"):
        if getattr(memory, name) and not is_swapped:
            yield f"--{name} has no effect without --blocks_to_swap"
