"""Wan2.1 as a generation pipeline: which models are where while it encodes, denoises and decodes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial

import torch
from torch import Tensor

from common.residency import Resident
from common.tokenizers import tokenizer_fingerprint
from common.weights import fingerprint
from generation.outputs import to_uint8
from generation.pipeline import Denoise, Encode, Frames, OnProgress
from generation.settings import Provenance, merged_loras
from modules.transformer_plan import EmptyTransformers
from networks.lora_merge import LoraMerge
from networks.transformer_stage import TransformerStage
from options.guidance import check_layers
from options.memory_size import MemorySize
from options.wan_request import WanRequest
from wan import vae as wan_vae
from wan.checkpoints import WanCheckpoints
from wan.compute import Compute
from wan.conditioning import Encoders, WanConditioning, check_control, encode_requests
from wan.config import WanConfig
from wan.costs import num_tokens
from wan.family import FAMILY
from wan.image_encoder import load_clip
from wan.loading import load_transformer
from wan.memory import VaeWork, decode_bytes
from wan.model import WanTransformer
from wan.plan import GenerationPlan, empty_transformers, plan_generation
from wan.sampling import generate_latents
from wan.swapping import swap_limits
from wan.text_encoder import find_tokenizer, load_t5, load_tokenizer

logger = logging.getLogger(__name__)


class WanPipeline:
    """See `generation.pipeline.Pipeline`.

    Args:
        keep_loaded: models stay in RAM between stages (a loop over prompts); else each is freed after its stage.
        transformer: one that is lent by its owner, a trainer for example, instead of being loaded here.
        tokenizer: folder or hub id of UMT5's, None finds it beside the model.
        merge: LoRAs that the transformer gets while it is loaded.
    """

    def __init__(
        self,
        checkpoints: WanCheckpoints,
        compute: Compute,
        *,
        keep_loaded: bool = False,
        transformer: WanTransformer | None = None,
        tokenizer: str | None = None,
        merge: LoraMerge | None = None,
    ) -> None:
        files, device = checkpoints, compute.device
        resident = partial(Resident, device=device, keep=keep_loaded)
        self.compute, self._checkpoints, self._tokenizer, self._merge = compute, files, tokenizer, merge
        self._config = WanConfig.from_checkpoint(files.transformer)
        vae_settings = {"dtype": compute.vae_dtype, "cache_on_cpu": compute.vae_cache_cpu}
        # The VAE is needed at both ends of a run and is small, so it stays in RAM in between.
        load_vae = partial(wan_vae.load_vae, files.vae, device=device, **vae_settings)
        self._vae = Resident("VAE", load_vae, device, keep=True)
        t5_settings = {"dtype": compute.t5_dtype, "fp8": compute.fp8_t5}
        clip = files.clip and partial(load_clip, files.clip, dtype=compute.clip_dtype, device=device)
        self._encoders = Encoders(
            t5=resident("UMT5", partial(load_t5, files.t5, device=device, **t5_settings)),
            clip=clip and resident("CLIP", clip),
            vae=self._vae,
            tokenizer=cache(partial(load_tokenizer, given=tokenizer, checkpoint=files.t5)),
            image_width=self._config.image_width,
        )
        self._transformer = TransformerStage(
            files.transformer,
            load_transformer,
            compute=compute,
            merge=merge,
            limits=swap_limits(self._config),
            plan=self._plan,
            # What is kept for later steps grows with the tokens and, less, with the steps.
            size=lambda request: (num_tokens(request), request.num_steps),
            keep=keep_loaded,
            lent=transformer,
        )
        # A trainer gives no LoRAs: it trains one.
        self._needs_advice = merge is not None and not merge.choices

    def provenance(self, *, with_paths: bool) -> Provenance:
        """What results of this pipeline say about their models and types."""
        models = {checkpoint.flag: fingerprint(checkpoint) for checkpoint in self._checkpoints.all}
        place = find_tokenizer(given=self._tokenizer, checkpoint=self._checkpoints.t5)
        models["--t5_tokenizer"] = tokenizer_fingerprint(place)
        if self._merge and self._merge.choices:
            models["--lora_weight"] = merged_loras(self._merge.choices)
        return Provenance(family=FAMILY, models=models, compute=self.compute.recorded(), with_paths=with_paths)

    def check(self, request: WanRequest) -> None:
        if (slg := request.guidance.skip_layers) is not None:
            check_layers(slg.blocks, self._config.num_blocks)
        check_control(request)
        self._transformer.check(request)
        if self._needs_advice and request.one_frame is not None and not request.loras:
            self._needs_advice = False
            logger.warning("Wan's own weights repeat the control image: one-frame inference wants a LoRA made for it")

    def num_operations(self, request: WanRequest) -> int:
        return self._plan(request).num_operations

    def plan(self, request: WanRequest, size: MemorySize) -> str:
        return self._plan(request).text(size)

    def _plan(self, request: WanRequest) -> GenerationPlan:
        tokenizer = self._encoders.tokenizer()
        return plan_generation(self._checkpoints, self.compute, request, self._empty, tokenizer=tokenizer)

    @cached_property
    def _empty(self) -> EmptyTransformers:
        return empty_transformers(self._checkpoints.transformer, self._merge, self.compute.transformer_dtype)

    @contextmanager
    def encoder(self) -> Iterator[Encode]:
        with torch.no_grad():
            yield partial(encode_requests, self._encoders)

    @contextmanager
    def denoiser(self) -> Iterator[Denoise]:
        with torch.no_grad(), self._transformer.use():
            yield self._denoise

    def _denoise(self, request: WanRequest, cond: WanConditioning, on_progress: OnProgress) -> Tensor:
        with self._transformer.model_for(request) as transformer:
            return generate_latents(transformer, request, cond, on_progress)

    def decode(self, request: WanRequest, latents: Tensor) -> Frames:
        self._make_room_for_vae(request, latents)
        with self._vae.use():
            frames = decode_latents(self._vae.model, latents)
        return frames[: len(frames) - request.trim_tail_frames]

    def _make_room_for_vae(self, request: WanRequest, latents: Tensor) -> None:
        """The transformer steps aside when the device could not hold the VAE's work beside it."""
        settings = {"itemsize": self.compute.vae_dtype.itemsize, "cache_on_cpu": self.compute.vae_cache_cpu}
        work = VaeWork.of(self._checkpoints.vae, **settings)
        needed = decode_bytes(work, latents.shape[1], request.height, request.width)
        self._transformer.make_room(needed)


def decode_latents(vae: torch.nn.Module, latents: Tensor) -> Frames:
    """Latents (C, F, h, w) → (frames, H, W, 3) uint8."""
    return to_uint8(wan_vae.decode(vae, latents[None])[0].cpu())
