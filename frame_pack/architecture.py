"""FramePack for the trainer. See `training.architecture.Architecture`, which this satisfies without importing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from common.weights import Checkpoint, check_names_and_shapes
from dataset.cached_items import CachingScripts
from dataset.training_dataset import TrainBatch
from frame_pack.cached_context import FEATURES, from_batch
from frame_pack.config import FAMILY
from frame_pack.loading import FramePackCheckpoints, build_transformer, load_transformer, open_models, open_transformer
from frame_pack.model import Conditioning, FramePackTransformer, guidance_input
from frame_pack.pipeline import Compute, FramePackPipeline
from frame_pack.training_rules import FramePackTrainingRules
from modules.flow_matching import NUM_TIMESTEPS
from networks.lora_merge import LoraMerge
from options.errors import UserError
from options.flags_fpack_train import FramePackTrainFlags
from options.flags_generate import RequestFlags
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
        """Raises UserError for a `--dit` that is not FramePack's transformer, whole and undamaged."""
        checkpoint = open_transformer(flags.models.dit, memmap=not flags.models.disable_numpy_memmap)
        check_names_and_shapes(build_transformer(checkpoint), checkpoint)
        return cls(checkpoint=checkpoint, distilled_guidance=flags.run.guidance_scale, flags=flags)

    @property
    def sample_defaults(self) -> RequestFlags:
        options = self.flags.framepack
        return RequestFlags(
            f1=options.f1,
            latent_window_size=options.latent_window_size,
            one_frame_inference="default" if options.one_frame else None,
            video_seconds=1 / FRAMEPACK_FPS,
        )

    def load_transformer(
        self, *, dtype: torch.dtype, device: torch.device, merge: LoraMerge | None = None
    ) -> FramePackTransformer:
        return load_transformer(self.checkpoint, dtype=dtype, device=device, merge=merge)

    def empty_transformer(self) -> FramePackTransformer:
        """On the meta device: what a network can be tried on before weights are loaded."""
        return build_transformer(self.checkpoint)

    def check_batch(self, contents: frozenset[str]) -> None:
        """Raises UserError for caches that lack what the transformer is to be shown."""
        if missing := [name for name in NEEDED if name not in contents]:
            expected = f"caches with {missing[0]}"
            raise UserError("--dataset_config", f"caches without {missing[0]}", expected, "run both caching scripts")

    def predict_velocity(self, transformer: nn.Module, noisy: Tensor, sigmas: Tensor, batch: TrainBatch) -> Tensor:
        return predict_velocity(transformer, noisy, sigmas, batch, distilled_guidance=self.distilled_guidance)

    def pipeline(self, *, dtype: torch.dtype, device: torch.device, transformer: nn.Module | None) -> FramePackPipeline:
        options, models = self.flags.framepack, self.flags.models
        compute = Compute(
            device=device,
            transformer_dtype=dtype,
            encoder_dtype=torch.float32 if device.type == "cpu" else torch.float16,
            vae_tile_size=options.tile_size,
            vae_chunk_size=options.vae_chunk_size,
            bulk_decode=options.bulk_decode,
        )
        tokenizers = (models.tokenizer1, models.tokenizer2)
        return FramePackPipeline(self._checkpoints(), compute, tokenizers=tokenizers, transformer=transformer)

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
