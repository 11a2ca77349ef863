"""Flags that every training script has; those of the optimizer, of timesteps and of saving have files of their own."""

import os
from dataclasses import dataclass
from typing import Literal

from options.errors import UserError
from options.flag_fields import flag
from options.flags_compile import TrainCompileFlags
from options.flags_optimizer import OptimizerFlags
from options.flags_saving import ModelspecFlags, SavingFlags, TrackingFlags, UploadFlags
from options.flags_timesteps import TimestepFlags
from options.fp8 import Fp8Mode, fp8_mode
from options.memory_size import ANY, PLAN, MemorySize
from options.swap_count import PINNED, SwapCount

BACKENDS = {"sdpa": "sdpa", "flash_attn": "flash", "sage_attn": "sageattn", "xformers": "xformers", "flash3": "flash3"}
"""Flags of attention and the names of their kinds; where several are given, the first one here counts."""


@dataclass(frozen=True, kw_only=True)
class ConfigFlags:
    """Options in a file."""

    config_file: str | None = flag("TOML file with options; those of the command line win")
    output_config: str | None = flag("write all options to this TOML file, for --config_file, and exit")


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """What is trained on."""

    dataset_config: str | None = flag("data set file, .toml or .json, with caches of both kinds")
    max_data_loader_n_workers: int = flag("processes that read caches ahead; 0 reads in turn", default=8)
    persistent_data_loader_workers: bool = flag("no effect: they are kept anyway", default=False)
    masked_loss: bool = flag("weight the loss by the mask images that were cached with the targets", default=False)

    @property
    def workers(self) -> int:
        """`--max_data_loader_n_workers`, but not more than there are cores."""
        return min(self.max_data_loader_n_workers, os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class ValidationFlags:
    """A loss on items that are not trained on, at fixed timesteps and with fixed noise."""

    validation_dataset_config: str | None = flag("data set file of the items to validate on")
    validate_every_n_steps: int | None = flag("validate every so many steps")
    validate_every_n_epochs: int | None = flag("validate every so many epochs (default: 1 without the option above)")

    @property
    def every_n_epochs(self) -> int | None:
        """`--validate_every_n_epochs`, or each one when nothing is said about when."""
        if self.validation_dataset_config is None or self.validate_every_n_steps is not None:
            return self.validate_every_n_epochs
        return self.validate_every_n_epochs or 1

    def is_due(self, *, step: int, epoch_end: int | None) -> bool:
        """Whether to validate now: before the first step, and as often as was asked for.

        Args:
            epoch_end: the epoch that has just ended, from 1; None inside of one.
        """
        by_step = self.validate_every_n_steps and step % self.validate_every_n_steps == 0
        by_epoch = self.every_n_epochs and epoch_end is not None and epoch_end % self.every_n_epochs == 0
        return step == 0 or bool(by_step or by_epoch)


@dataclass(frozen=True, kw_only=True)
class NetworkFlags:
    """The LoRA."""

    network_module: str | None = flag(
        "the kind: networks.lora_framepack or networks.lora_wan, networks.loha, networks.lokr"
    )
    network_dim: int | None = flag("rank (default: 4)")
    network_alpha: float = flag("alpha; the scale is alpha/rank; 0 means the rank", default=1.0)
    network_dropout: float | None = flag("chance to drop each number of the low-rank activations")
    network_args: tuple[str, ...] = flag("key=value: conv_dim, loraplus_lr_ratio, exclude_patterns, ...", default=())
    network_weights: str | None = flag("LoRA file to go on from")
    dim_from_weights: bool = flag("take rank and alpha from --network_weights", default=False)
    scale_weight_norms: float | None = flag("limit the norm of each layer's change to this")
    base_weights: tuple[str, ...] = flag("LoRA files to merge into the transformer before training", default=())
    base_weights_multiplier: tuple[float, ...] = flag("their multipliers (default: 1.0 each)", default=())


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """How long, how exactly, and what happens to accidents."""

    max_train_steps: int = flag("optimizer steps, unless --max_train_epochs is given", default=1600)
    max_train_epochs: int | None = flag("epochs")
    gradient_accumulation_steps: int = flag("batches per optimizer step", default=1)
    seed: int | None = flag("seed of order, timesteps, noise and new weights (default: random)")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag("compute type (default: as accelerate is set up)")
    guidance_scale: float = flag("distilled guidance that the model is told (FramePack)", default=1.0)
    on_nan: Literal["skip", "stop"] = flag(
        "what to do when a loss is not finite; either way it is reported", default="stop"
    )
    loss_report: bool = flag("draw the loss by timestep at the end", default=False)
    plan: MemorySize | None = flag(PLAN, alone=ANY)


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """Device and processes."""

    device: str | None = flag("torch device (default: as accelerate chooses)")
    cuda_allow_tf32: bool = flag("allow TF32 in float32 products", default=False)
    cuda_cudnn_benchmark: bool = flag("let cuDNN try out its algorithms", default=False)
    ddp_timeout: int | None = flag("minutes that processes wait for each other")
    ddp_gradient_as_bucket_view: bool = flag("no effect: gradients are averaged without DDP", default=False)
    ddp_static_graph: bool = flag("no effect, likewise", default=False)


@dataclass(frozen=True, kw_only=True)
class MemoryFlags:
    """What is given up for memory."""

    gradient_checkpointing: bool = flag("compute activations again instead of keeping them", default=False)
    checkpoint_blocks: int | None = flag("the same for so many blocks only; faster than for all")
    gradient_checkpointing_cpu_offload: bool = flag("keep what checkpointing leaves of them in RAM", default=False)
    fp8_base: bool = flag(
        "transformer in fp8: two thirds of the memory in bfloat16, and less precise", default=False, alias="fp8"
    )
    fp8_scaled: bool = flag("the same with scales, which keep much more of it; needs no --fp8_base", default=False)
    blocks_to_swap: SwapCount | None = flag(
        "transformer blocks kept in RAM, up to 36 (FramePack), 39 (Wan 14B) or 29 (1.3B), or auto: as many as it "
        "takes; their activations are computed again"
    )
    use_pinned_memory_for_block_swap: bool = flag(PINNED, default=False)
    block_swap_h2d_only: bool = flag("no effect: frozen weights are never copied back", default=False)
    block_swap_ring_size: int = flag("blocks that have room on the device at a time", default=2)
    img_in_txt_in_offloading: bool = flag("no effect on FramePack and Wan", default=False)

    @property
    def fp8_mode(self) -> Fp8Mode:
        return fp8_mode(fp8=self.fp8_base, scaled=self.fp8_scaled)

    def num_checkpointed(self, num_blocks: int) -> int:
        """How many of the model's blocks are checkpointed.

        Raises:
            UserError: more than there are.
        """
        if self.checkpoint_blocks is None:
            return num_blocks if self.gradient_checkpointing else 0
        if self.checkpoint_blocks > num_blocks:
            expected = f"at most {num_blocks}, as the model has"
            raise UserError("--checkpoint_blocks", self.checkpoint_blocks, expected, "use --gradient_checkpointing")
        return self.checkpoint_blocks


@dataclass(frozen=True, kw_only=True)
class AttentionFlags:
    """How attention is computed; with none of these it is PyTorch's own."""

    sdpa: bool = flag("PyTorch's scaled dot product attention, which is the default", default=False)
    flash_attn: bool = flag("FlashAttention 2", default=False)
    flash3: bool = flag("FlashAttention 3", default=False)
    sage_attn: bool = flag("refused: SageAttention has no gradients", default=False)
    xformers: bool = flag("xformers", default=False)
    split_attn: bool = flag("one item of a batch at a time", default=False)

    @property
    def given(self) -> tuple[str, ...]:
        """The kinds that were asked for, without dashes; the first one counts."""
        return tuple(name for name in BACKENDS if getattr(self, name))

    @property
    def backend(self) -> str:
        return BACKENDS[self.given[0]] if self.given else "sdpa"

    @property
    def backend_flag(self) -> str:
        """The flag that `backend` comes from."""
        return f"--{self.given[0]}" if self.given else "--sdpa"


@dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """Pictures and videos that are generated while training goes on."""

    sample_prompts: str | None = flag("prompts for them: .txt, .toml or .json")
    sample_at_first: bool = flag("before the first step", default=False)
    sample_every_n_steps: int | None = flag("every so many steps")
    sample_every_n_epochs: int | None = flag("every so many epochs; both count if both are given")

    @property
    def trigger(self) -> str | None:
        """The first of the flags that ask for samples, without dashes; None when there are to be none."""
        names = ("sample_at_first", "sample_every_n_steps", "sample_every_n_epochs")
        return next((name for name in names if getattr(self, name)), None)


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """What FramePack and Wan have in common."""

    config: ConfigFlags
    data: DataFlags
    validation: ValidationFlags
    network: NetworkFlags
    run: RunFlags
    optimizer: OptimizerFlags
    timesteps: TimestepFlags
    saving: SavingFlags
    upload: UploadFlags
    modelspec: ModelspecFlags
    tracking: TrackingFlags
    samples: SampleFlags
    devices: DeviceFlags
    memory: MemoryFlags
    attention: AttentionFlags
    compilation: TrainCompileFlags
