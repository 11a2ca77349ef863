"""FramePack for the trainer. See `training.architecture.Architecture`, which this satisfies without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from common.weights import Checkpoint
from dataset.cached_items import CachingScripts, Layout
from dataset.training_dataset import TrainBatch, TrainingDataset
from frame_pack.cached_context import FEATURES, from_batch
from frame_pack.compute import Compute
from frame_pack.config import FAMILY, FramePackConfig
from frame_pack.loading import FramePackCheckpoints, build_transformer, load_transformer, open_models, open_transformer
from frame_pack.model import Conditioning, FramePackTransformer, guidance_input
from frame_pack.pipeline import FramePackPipeline
from frame_pack.plan import empty_transformers
from frame_pack.swapping import swap_limits
from frame_pack.training_plan import largest_batch
from frame_pack.training_rules import FramePackTrainingRules
from modules.block_swap import SwapOptions
from modules.execution import Execution
from modules.flow_matching import NUM_TIMESTEPS
from modules.swapping import SwapWish, check_swap
from modules.training_plan import TrainedNumbers, TrainingPlan, TrainOptions
from networks.lora_merge import LoraMerge
from networks.network import Network
from options.flags_fpack_train import FramePackTrainFlags
from options.fpack_request import FramePackRequestFlags
from options.geometry import FRAMEPACK_FPS

TEXT, TEXT_MASK, POOLED = "llama_vec", "llama_attention_mask", "clip_l_pooler"
NEEDED = ("latents", "latent_indices", "latents_clean", "clean_latent_indices", FEATURES, TEXT, TEXT_MASK, POOLED)


@dataclass(frozen=True, kw_only=True)
class FramePackArchitecture:
    """The transformer's header and how it is trained; the other models only serve samples."""

    checkpoint: Checkpoint
    distilled_guidance: float
    """That the transformer is told in training."""
    flags: FramePackTrainFlags

    version: ClassVar[str] = FAMILY
    model_name: ClassVar[str] = "framepack"
    implementation: ClassVar[str] = "https://github.com/lllyasviel/FramePack"
    rules: ClassVar[FramePackTrainingRules] = FramePackTrainingRules()
    scripts: ClassVar[CachingScripts] = CachingScripts(
        latents="fpack_cache_latents.py", texts="fpack_cache_text_encoder_outputs.py"
    )

    @classmethod
    def open(cls, flags: FramePackTrainFlags) -> FramePackArchitecture:
        """Raises UserError for a `--dit` that is not FramePack's transformer, whole and undamaged, or too much swap."""
        checkpoint = open_transformer(flags.models.dit, memmap=not flags.models.disable_numpy_memmap)
        config = build_transformer(checkpoint, fp8=flags.memory.fp8_mode).config
        architecture = cls(checkpoint=checkpoint, distilled_guidance=flags.run.guidance_scale, flags=flags)
        check_swap(SwapWish.of_training(flags.memory), swap_limits(config))
        return architecture

    @property
    def sample_defaults(self) -> FramePackRequestFlags:
        options = self.flags.framepack
        return FramePackRequestFlags(
            f1=options.f1,
            latent_window_size=options.latent_window_size,
            one_frame_inference="default" if options.one_frame else None,
            video_seconds=1 / FRAMEPACK_FPS,
        )

    @property
    def settings(self) -> Mapping[str, object]:
        return {}

    def load_transformer(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        merge: LoraMerge | None = None,
        swap: SwapOptions | None = None,
    ) -> FramePackTransformer:
        place = {"dtype": dtype, "device": device}
        fp8 = self.flags.memory.fp8_mode
        transformer = load_transformer(self.checkpoint, merge=merge, fp8=fp8, swap=swap, **place)
        self._execution.apply_to(transformer)
        return transformer

    def training_plan(
        self, dataset: TrainingDataset, network: Network, *, dtype: torch.dtype, state_bytes: float, merge: LoraMerge
    ) -> TrainingPlan:
        memory, config = self.flags.memory, FramePackConfig.from_checkpoint(self.checkpoint)
        return TrainingPlan(
            transformers=empty_transformers(self.checkpoint, merge, dtype),
            batch=largest_batch(config, dataset.batch_layouts),
            numbers=TrainedNumbers.of(network.adapters, state_bytes),
            swap=SwapWish.of_training(memory),
            options=TrainOptions.of(memory, num_blocks=config.num_blocks),
        )

    def empty_transformer(self) -> FramePackTransformer:
        """On the meta device: what a network can be tried on before weights are loaded."""
        return build_transformer(self.checkpoint, fp8=self.flags.memory.fp8_mode)

    def check_batch(self, layout: Layout) -> None:
        """Raises UserError for caches that lack what the transformer is to be shown."""
        layout.check_contents(NEEDED)

    def loss_weights(self, batch: TrainBatch) -> None:
        """All frames that are trained are to be made."""

    def predict_velocity(self, transformer: nn.Module, noisy: Tensor, sigmas: Tensor, batch: TrainBatch) -> Tensor:
        return predict_velocity(transformer, noisy, sigmas, batch, distilled_guidance=self.distilled_guidance)

    def pipeline(self, *, dtype: torch.dtype, device: torch.device, transformer: nn.Module | None) -> FramePackPipeline:
        options, models = self.flags.framepack, self.flags.models
        compute = Compute(
            device=device,
            transformer_dtype=dtype,
            encoder_dtype=torch.float32 if device.type == "cpu" else torch.float16,
            execution=self._execution,
            fp8=self.flags.memory.fp8_mode,
            fp8_llm=options.fp8_llm,
            vae_tile_size=options.tile_size,
            vae_chunk_size=options.vae_chunk_size,
            bulk_decode=options.bulk_decode,
        )
        tokenizers = (models.tokenizer1, models.tokenizer2)
        return FramePackPipeline(self._checkpoints(), compute, tokenizers=tokenizers, transformer=transformer)

    @property
    def _execution(self) -> Execution:
        return Execution.of_training(self.flags.attention, self.flags.compilation)

    def _checkpoints(self) -> FramePackCheckpoints:
        return open_models(self.flags.models)


def predict_velocity(
    transformer: FramePackTransformer, noisy: Tensor, sigmas: Tensor, batch: TrainBatch, *, distilled_guidance: float
) -> Tensor:
    """See `training.architecture.Architecture.predict_velocity`.

    Args:
        distilled_guidance: that the transformer is told.
    """
    contents = batch.contents
    conditioning = Conditioning(
        context=from_batch(contents),
        text=contents[TEXT],
        text_mask=contents[TEXT_MASK].bool(),
        pooled=contents[POOLED],
        image=contents[FEATURES],
        guidance=guidance_input(distilled_guidance, len(noisy)),
    )
    return transformer(noisy, sigmas * NUM_TIMESTEPS, conditioning)
