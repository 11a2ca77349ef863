"""Wan2.1 for the trainer. See `training.architecture.Architecture`, which this satisfies without importing it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common.weights import Checkpoint
from dataset.cached_items import CachingScripts, Layout
from dataset.training_dataset import TrainBatch, TrainingDataset
from modules.block_swap import SwapOptions
from modules.execution import Execution
from modules.flow_matching import NUM_TIMESTEPS
from modules.swapping import SwapWish, check_swap
from modules.training_plan import TrainedNumbers, TrainingPlan, TrainOptions
from networks.lora_merge import LoraMerge
from networks.network import Network
from options.errors import UserError
from options.flags_wan_train import WanTrainFlags
from options.wan_request import WanRequestFlags
from options.wan_tasks import WanTask, width_hint
from wan.cached_context import FEATURES, INDICES, SHOWN, features_from_batch, from_batch
from wan.checkpoints import from_release, open_models, open_task_transformer
from wan.compute import Compute, encoder_types
from wan.config import WanConfig
from wan.context import NUM_MASKS, no_features
from wan.family import FAMILY
from wan.loading import build_transformer, load_transformer
from wan.model import Conditioning, WanTransformer
from wan.pipeline import WanPipeline
from wan.plan import empty_transformers
from wan.swapping import swap_limits
from wan.training_plan import largest_batch
from wan.training_rules import WanTrainingRules, needed_contents

logger = logging.getLogger(__name__)

TEXT = "t5"


@dataclass(frozen=True, kw_only=True)
class WanArchitecture:
    """The transformer's header and how it is trained; the other models only serve samples."""

    checkpoint: Checkpoint
    rules: WanTrainingRules
    flags: WanTrainFlags

    version: ClassVar[str] = FAMILY
    model_name: ClassVar[str] = "wan2.1"
    implementation: ClassVar[str] = "https://github.com/Wan-Video/Wan2.1"
    scripts: ClassVar[CachingScripts] = CachingScripts(
        latents="wan_cache_latents.py", texts="wan_cache_text_encoder_outputs.py"
    )

    @classmethod
    def open(cls, flags: WanTrainFlags) -> WanArchitecture:
        """Raises UserError for a `--dit` that is not a whole, undamaged transformer of the task, or too much swap."""
        models, task = from_release(flags.models), flags.wan.task
        checkpoint = open_task_transformer(models, task, fp8=flags.memory.fp8_mode)
        config = WanConfig.from_checkpoint(checkpoint)
        check_swap(SwapWish.of_training(flags.memory), swap_limits(config))
        if hint := width_hint(task, config.width):
            logger.warning(hint)
        return cls(checkpoint=checkpoint, rules=WanTrainingRules.of_task(task), flags=flags)

    @property
    def task(self) -> WanTask:
        return self.flags.wan.task

    @property
    def sample_defaults(self) -> WanRequestFlags:
        return WanRequestFlags(
            task=self.task,
            video_length=1,
            exact_size=True,
            one_frame_inference="default" if self.flags.wan.one_frame else None,
        )

    @property
    def settings(self) -> Mapping[str, object]:
        return {"task": self.task.name, "one_frame_target_loss_only": self.flags.wan.one_frame_target_loss_only}

    def load_transformer(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        merge: LoraMerge | None = None,
        swap: SwapOptions | None = None,
    ) -> WanTransformer:
        place = {"dtype": dtype, "device": device}
        fp8 = self.flags.memory.fp8_mode
        transformer = load_transformer(self.checkpoint, merge=merge, fp8=fp8, swap=swap, **place)
        self._execution.apply_to(transformer)
        return transformer

    def training_plan(
        self, dataset: TrainingDataset, network: Network, *, dtype: torch.dtype, state_bytes: float, merge: LoraMerge
    ) -> TrainingPlan:
        memory, config = self.flags.memory, WanConfig.from_checkpoint(self.checkpoint)
        return TrainingPlan(
            transformers=empty_transformers(self.checkpoint, merge, dtype),
            batch=largest_batch(config, dataset.batch_layouts),
            numbers=TrainedNumbers.of(network.adapters, state_bytes),
            swap=SwapWish.of_training(memory),
            options=TrainOptions.of(memory, num_blocks=config.num_blocks),
        )

    def empty_transformer(self) -> WanTransformer:
        """On the meta device: what a network can be tried on before weights are loaded."""
        return build_transformer(self.checkpoint, fp8=self.flags.memory.fp8_mode)

    def check_batch(self, layout: Layout) -> None:
        """Raises UserError for caches that lack what the transformer is to be shown, or one-frame caches without it."""
        layout.check_contents(needed_contents(self.task))
        if self.flags.wan.one_frame_target_loss_only and INDICES not in layout.contents:
            got, expected = f"caches without {INDICES}", "one-frame caches only"
            raise UserError("--one_frame_target_loss_only", got, expected, "leave it out, or train clips on their own")

    def predict_velocity(self, transformer: nn.Module, noisy: Tensor, sigmas: Tensor, batch: TrainBatch) -> Tensor:
        return predict_velocity(transformer, noisy, sigmas, batch, task=self.task)

    def loss_weights(self, batch: TrainBatch) -> Tensor | None:
        """With `--one_frame_target_loss_only` the frames that are given do not count."""
        if not self.flags.wan.one_frame_target_loss_only:
            return None
        marks = batch.contents[SHOWN][:, :NUM_MASKS].amax(dim=(1, 3, 4), keepdim=True)
        return 1 - marks.float()

    def pipeline(self, *, dtype: torch.dtype, device: torch.device, transformer: nn.Module | None) -> WanPipeline:
        wan, models = self.flags.wan, from_release(self.flags.models)
        compute = Compute(
            device=device,
            transformer_dtype=dtype,
            execution=self._execution,
            fp8=self.flags.memory.fp8_mode,
            fp8_t5=wan.fp8_t5,
            vae_cache_cpu=wan.vae_cache_cpu,
            **encoder_types(device, vae_dtype=wan.vae_dtype),
        )
        checkpoints = open_models(models, self.task, fp8=self.flags.memory.fp8_mode)
        return WanPipeline(checkpoints, compute, tokenizer=models.t5_tokenizer, transformer=transformer)

    @property
    def _execution(self) -> Execution:
        return Execution.of_training(self.flags.attention, self.flags.compilation)


def predict_velocity(
    transformer: WanTransformer, noisy: Tensor, sigmas: Tensor, batch: TrainBatch, *, task: WanTask
) -> Tensor:
    """See `training.architecture.Architecture.predict_velocity`.

    Args:
        task: says what of a cache the transformer is shown.
    """
    contents = batch.contents
    context = from_batch(contents, shows_images=task.takes_image, shows_control=task.kind == "fun_control")
    conditioning = Conditioning(
        text=pad_sequence(contents[TEXT], batch_first=True),
        text_lengths=torch.tensor([len(rows) for rows in contents[TEXT]]),
        image=_features(contents, transformer.config, task),
        latents=context.latents,
        indices=context.indices,
    )
    return transformer(noisy, sigmas * NUM_TIMESTEPS, conditioning)


def _features(contents: Mapping[str, Tensor | list[Tensor]], config: WanConfig, task: WanTask) -> Tensor | None:
    """(B, 257 or 514, image_width) CLIP states, for a transformer that takes them."""
    if config.image_width is None:
        return None
    if FEATURES in contents and task.takes_image:
        return features_from_batch(contents, both_ends=task.kind == "flf2v")
    return no_features(config.image_width, batch=len(contents[TEXT]))
