"""Everything about a run that is known before weights are loaded, with every check that can be made by then."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import secrets
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from common import weights
from common.device import free_memory, pick_device
from common.files import check_writable_folder
from common.processes import Processes
from dataset.cache_checks import MAIN
from dataset.config import DatasetConfig, load_dataset_config
from dataset.training_dataset import TrainingDataset
from modules.block_swap import SwapOptions
from modules.execution import Execution
from modules.swapping import choose_swap
from networks.lora_merge import LoraMerge, plan_merge
from networks.network import Network
from options.errors import UserError
from options.flags_saving import AUTO, HubFolder
from options.flags_train import TrainFlags
from training.architecture import Architecture
from training.checkpoints import SavePlan, check_room
from training.masks import check_masks
from training.networks import base_choices, network_arguments, open_network, shape_of
from training.rehearsal import rehearse
from training.resuming import newest_state, run_fingerprint
from training.states import check_state, recorded_fingerprint, state_step
from training.timesteps import check_reachable
from training.tracking import check_trackers
from training.upload import Uploader, download_state

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BASE_FLAG = "--base_weights"


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """A run that could start."""

    device: torch.device
    dtype: torch.dtype
    """Of the transformer."""
    mixed_precision: str
    """`no`, `fp16` or `bf16`."""
    seed: int
    dataset: TrainingDataset
    validation: TrainingDataset | None
    config: DatasetConfig
    network: Network
    """On the CPU, not applied."""
    network_dim: int
    network_alpha: float
    merge: LoraMerge
    """`--base_weights`."""
    swap: SwapOptions
    """What of the transformer lies in RAM."""
    state_bytes: float
    """That the optimizer remembers for each trained number."""
    batches_per_step: int
    """Of one process."""
    saves: SavePlan
    """How long the run is, and when it saves."""
    resume: Path | None
    fingerprint: dict[str, object]
    """See `training.resuming.run_fingerprint`."""
    settings: dict[str, object]
    """What may change from a state to its continuation."""

    @property
    def num_steps(self) -> int:
        return self.saves.num_steps

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What the network computes in; None is float32."""
        return DTYPES.get(self.mixed_precision)


def plan_run(architecture: Architecture, flags: TrainFlags, processes: Processes) -> TrainPlan:
    """Decides and checks.

    Raises:
        UserError: anything that can be found out without weights.
    """
    device = pick_device(processes.device_name(flags.devices.device))
    mixed_precision = _mixed_precision(flags, device)
    check_trackers(flags.tracking)
    processes.in_main(lambda: check_writable_folder(flags.saving.output_dir, flag="--output_dir"))
    resume = _resume_folder(flags, processes)
    seed = _seed(flags, resume, processes)

    transformer = architecture.empty_transformer()
    flags.memory.num_checkpointed(transformer.num_blocks)
    merge = plan_merge(base_choices(flags.network), architecture.checkpoint, flag=BASE_FLAG)
    network = open_network(flags.network, transformer, seed=seed)
    network_dim, network_alpha = shape_of(network, flags.network)

    config = load_dataset_config(flags.data.dataset_config)
    dataset = _open_dataset(config, architecture)
    check_reachable(flags.timesteps, {layout.shape(MAIN)[-2:] for layout in dataset.layouts})
    check_masks(dataset, flags.data.masked_loss)
    validation = _open_validation(flags, architecture)
    dtype = _transformer_dtype(device)
    execution = Execution.of_training(flags.attention, flags.compilation)
    if flags.run.plan is None:  # a plan is perhaps for another machine's GPU
        execution.check(device=device, dtype=dtype, training=True)

    saves = _save_plan(flags, dataset, processes)
    ratio = network.loraplus_lr_ratio
    state_bytes = rehearse(flags.optimizer, num_steps=saves.num_steps, device=device, loraplus_lr_ratio=ratio)
    plan = architecture.training_plan(dataset, network, dtype=dtype, state_bytes=state_bytes, merge=merge)
    swap = choose_swap(plan.swap, plan.transformers.limits, free=free_memory(device), needed=plan.needed)
    if swap.num_blocks and not flags.memory.gradient_checkpointing:
        logger.info("the %d swapped blocks are checkpointed, as with --gradient_checkpointing", swap.num_blocks)
    fingerprint = run_fingerprint(
        network_module=flags.network.network_module,
        network_dim=network_dim,
        network_alpha=network_alpha,
        network_args=network_arguments(flags.network),
        base_model=_base_model(architecture, merge),
        fp8=flags.memory.fp8_mode,
        optimizer_type=flags.optimizer.optimizer_type,
        optimizer_args=flags.optimizer.optimizer_arguments,
        seed=seed,
        buckets=dataset.buckets,
        batches_per_step=flags.run.gradient_accumulation_steps * processes.world,
    )
    if resume:
        check_state(resume, fingerprint)
        if flags.network.network_weights is not None:
            logger.warning("--network_weights has no effect beside --resume: the state has its own weights")
    step = state_step(resume) if resume else 0
    if step > saves.num_steps:
        expected = f"at most the {saves.num_steps} steps of this run"
        remedy = "give more --max_train_steps or --max_train_epochs"
        raise UserError("--resume", f"{resume}, a state after step {step}", expected, remedy)
    processes.in_main(lambda: _check_room(saves, network, flags, step=step))
    if flags.upload.huggingface_repo_id is not None and flags.run.plan is None:
        processes.in_main(lambda: Uploader(flags.upload).prepare())
    return TrainPlan(
        device=device,
        dtype=dtype,
        mixed_precision=mixed_precision,
        seed=seed,
        dataset=dataset,
        validation=validation,
        config=config,
        network=network,
        network_dim=network_dim,
        network_alpha=network_alpha,
        merge=merge,
        swap=swap,
        state_bytes=state_bytes,
        batches_per_step=flags.run.gradient_accumulation_steps,
        saves=saves,
        resume=resume,
        fingerprint=fingerprint,
        settings=_settings(flags, mixed_precision, saves.num_steps) | dict(architecture.settings),
    )


def _save_plan(flags: TrainFlags, dataset: TrainingDataset, processes: Processes) -> SavePlan:
    """How long the run is, and when it saves."""
    num_batches = math.ceil(dataset.num_batches / processes.world)
    steps_per_epoch = math.ceil(num_batches / flags.run.gradient_accumulation_steps)
    num_steps = flags.run.max_train_steps
    if flags.run.max_train_epochs is not None:
        num_steps = flags.run.max_train_epochs * steps_per_epoch
    num_epochs = math.ceil(num_steps / steps_per_epoch)
    return SavePlan(flags=flags.saving, num_steps=num_steps, num_epochs=num_epochs, steps_per_epoch=steps_per_epoch)


def _check_room(saves: SavePlan, network: Network, flags: TrainFlags, *, step: int) -> None:
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    item_bytes = getattr(torch, flags.saving.dtype_name).itemsize
    # A state holds the weights and usually two averages of each, in float32.
    check_room(saves, file_bytes=item_bytes * num_parameters, state_bytes=3 * 4 * num_parameters, step=step)


def _open_validation(flags: TrainFlags, architecture: Architecture) -> TrainingDataset | None:
    path = flags.validation.validation_dataset_config
    if not path:
        return None
    return _open_dataset(load_dataset_config(path, flag="--validation_dataset_config"), architecture)


def _open_dataset(config: DatasetConfig, architecture: Architecture) -> TrainingDataset:
    for dataset in config.datasets:
        architecture.rules.check(dataset)
    found = TrainingDataset(config, architecture.rules, architecture.scripts)
    for layout in found.layouts:
        architecture.check_batch(layout)
    return found


def _mixed_precision(flags: TrainFlags, device: torch.device) -> str:
    """What was asked for, else what `accelerate launch` says."""
    chosen = flags.run.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if chosen not in ("no", "fp16", "bf16"):
        raise UserError("--mixed_precision", f"{chosen} from accelerate", "no, fp16 or bf16", "give --mixed_precision")
    if chosen == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("--mixed_precision", chosen, "a GPU that computes in bfloat16", "use fp16")
    return chosen


def _transformer_dtype(device: torch.device) -> torch.dtype:
    """The published bfloat16 on a GPU, float32 on a CPU, as in generation: mixed precision is the network's."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _resume_folder(flags: TrainFlags, processes: Processes) -> Path | None:
    saving = flags.saving
    if saving.resume is None:
        return None
    if saving.resume == AUTO:
        return processes.in_main(lambda: newest_state(saving.output_dir, saving.output_name))
    if saving.resume_from_huggingface:
        return download_state(HubFolder.parse(saving.resume), token=flags.upload.huggingface_token)
    return Path(saving.resume)


def _seed(flags: TrainFlags, resume: Path | None, processes: Processes) -> int:
    """The one that was given, else that of the state, else a random one, the same in all processes."""
    if flags.run.seed is not None:
        return flags.run.seed
    if resume is not None:
        return recorded_fingerprint(resume)["seed"]
    return processes.in_main(lambda: secrets.randbits(32))


def _base_model(architecture: Architecture, merge: LoraMerge) -> str:
    """Which weights are trained on."""
    digest = hashlib.sha256(weights.fingerprint(architecture.checkpoint).encode())
    for choice in merge.choices:
        digest.update(f"{choice.multiplier}".encode())
        with open(choice.path, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _settings(flags: TrainFlags, mixed_precision: str, num_steps: int) -> dict[str, object]:
    network = flags.network
    return {
        **{field.name: str(getattr(flags.optimizer, field.name)) for field in fields(flags.optimizer)},
        **asdict(flags.timesteps),
        "network_dropout": network.network_dropout,
        "scale_weight_norms": network.scale_weight_norms,
        "mixed_precision": mixed_precision,
        "attention": flags.attention.backend,
        "guidance_scale": flags.run.guidance_scale,
        "masked_loss": flags.data.masked_loss,
        "max_train_steps": num_steps,
    }
