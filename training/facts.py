"""The facts of a run that its LoRA files record, gathered from everywhere."""

from __future__ import annotations

from pathlib import Path

from torch.optim import Optimizer

from dataset.config import DatasetConfig, ImageDataset
from options.flags_train import TrainFlags
from training.architecture import Architecture
from training.metadata import TrainingFacts
from training.networks import network_arguments
from training.optimizers import describe
from training.plan import TrainPlan


def training_facts(
    flags: TrainFlags, plan: TrainPlan, architecture: Architecture, optimizer: Optimizer
) -> TrainingFacts:
    """What does not change in a run."""
    run, network, timesteps = flags.run, flags.network, flags.timesteps
    return TrainingFacts(
        output_name=flags.saving.output_name,
        learning_rate=flags.optimizer.learning_rate,
        num_train_items=plan.dataset.num_items,
        num_batches_per_epoch=plan.dataset.num_batches,
        num_epochs=plan.saves.num_epochs,
        gradient_checkpointing=flags.memory.gradient_checkpointing or bool(flags.memory.checkpoint_blocks),
        gradient_checkpointing_cpu_offload=flags.memory.gradient_checkpointing_cpu_offload,
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        max_train_steps=plan.num_steps,
        lr_warmup_steps=str(flags.optimizer.lr_warmup_steps),
        lr_scheduler=flags.optimizer.lr_scheduler,
        base_model_version=architecture.version,
        network_module=network.network_module,
        network_dim=plan.network_dim,
        network_alpha=plan.network_alpha,
        network_dropout=network.network_dropout,
        mixed_precision=plan.mixed_precision,
        seed=plan.seed,
        training_comment=flags.modelspec.training_comment,
        optimizer=describe(optimizer, flags.optimizer.optimizer_arguments),
        max_grad_norm=flags.optimizer.max_grad_norm,
        fp8_base=flags.memory.fp8_mode != "off",
        weighting_scheme=timesteps.weighting_scheme,
        logit_mean=timesteps.logit_mean,
        logit_std=timesteps.logit_std,
        mode_scale=timesteps.mode_scale,
        guidance_scale=run.guidance_scale,
        timestep_sampling=timesteps.timestep_sampling,
        sigmoid_scale=timesteps.sigmoid_scale,
        discrete_flow_shift=timesteps.discrete_flow_shift,
        datasets=_datasets(plan.config),
        network_args=network_arguments(network) or None,
        sd_model_name=_base_name(architecture.checkpoint.path),
        vae_name=_base_name(getattr(flags, "models", None) and flags.models.vae),
    )


def _datasets(config: DatasetConfig) -> list[dict[str, object]]:
    """For readers: sizes, repeats and batch sizes; no paths."""
    return [
        {
            "is_image_dataset": isinstance(dataset, ImageDataset),
            "resolution": list(dataset.resolution),
            "num_repeats": dataset.num_repeats,
            "batch_size": dataset.batch_size,
            "enable_bucket": dataset.enable_bucket,
            "bucket_no_upscale": dataset.bucket_no_upscale,
        }
        for dataset in config.datasets
    ]


def _base_name(path: str | Path | None) -> str | None:
    return None if path is None else Path(path).name
