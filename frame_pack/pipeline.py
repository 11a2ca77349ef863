"""FramePack as a generation pipeline: which models are where while it encodes, denoises and decodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.residency import Resident
from common.tokenizers import tokenizer_fingerprint
from common.weights import fingerprint
from frame_pack.compute import Compute
from frame_pack.conditioning import Encoders, FramePackConditioning, encode_requests
from frame_pack.config import FAMILY, FramePackConfig
from frame_pack.costs import num_tokens
from frame_pack.decoding import decode_latents
from frame_pack.image_encoder import load_siglip
from frame_pack.loading import FramePackCheckpoints, load_transformer
from frame_pack.model import FramePackTransformer
from frame_pack.plan import GenerationPlan, empty_transformers, plan_generation
from frame_pack.sampling import generate_latents
from frame_pack.swapping import swap_limits
from generation.pipeline import Denoise, Encode, Frames, OnProgress
from generation.settings import Provenance, merged_loras
from hunyuan_model.memory import VaeWork, decode_bytes
from hunyuan_model.text_encoders import find_tokenizer, load_clip, load_llama, load_tokenizer
from modules.transformer_plan import EmptyTransformers
from networks.lora_merge import LoraMerge
from networks.transformer_stage import TransformerStage
from options.fpack_request import FramePackRequest
from options.memory_size import MemorySize

if TYPE_CHECKING:
    pass


class FramePackPipeline:
    """See `generation.pipeline.Pipeline`.

    Args:
        keep_loaded: models stay in RAM between stages (a loop over prompts); else each is freed after its stage.
        transformer: one that is lent by its owner, a trainer for example, instead of being loaded here.
        tokenizers: folders or hub ids of LLaMA's and CLIP's, None finds them beside the models.
        merge: LoRAs that the transformer gets while it is loaded.
    """

    def __init__(
        self,
        checkpoints: FramePackCheckpoints,
        compute: Compute,
        *,
        keep_loaded: bool = False,
        transformer: FramePackTransformer | None = None,
        tokenizers: tuple[str | None, str | None] = (None, None),
        merge: LoraMerge | None = None,
    ) -> None:
        files, place = checkpoints, {"dtype": compute.encoder_dtype, "device": compute.device}
        resident = partial(Resident, device=compute.device, keep=keep_loaded)
        # The VAE is needed at both ends of a run and is small, so it stays in RAM in between.

        @cache
        def load_tokenizers() -> tuple[object, object]:
            return (
                load_tokenizer("llama", given=tokenizers[0], checkpoint=files.llama),
                load_tokenizer("clip", given=tokenizers[1], checkpoint=files.clip),
            )

        self.compute, self._checkpoints, self._tokenizers = compute, checkpoints, tokenizers
        self._merge = merge
        self._vae = Resident("VAE", partial(compute.load_vae, files.vae), device=compute.device, keep=True)
        self._encoders = Encoders(
            llama=resident("LLaMA", partial(load_llama, files.llama, fp8=compute.fp8_llm, **place)),
            clip=resident("CLIP", partial(load_clip, files.clip, **place)),
            siglip=resident("SigLIP", partial(load_siglip, files.siglip, **place)),
            vae=self._vae,
            tokenizers=load_tokenizers,
        )
        self._transformer = TransformerStage(
            files.transformer,
            load_transformer,
            compute=compute,
            merge=merge,
            limits=swap_limits(FramePackConfig.from_checkpoint(files.transformer)),
            plan=self._plan,
            # What is kept for later steps grows with the tokens and, less, with the steps.
            size=lambda request: (num_tokens(request), request.num_steps),
            keep=keep_loaded,
            lent=transformer,
        )

    def provenance(self, *, with_paths: bool) -> Provenance:
        """What results of this pipeline say about their models and types."""
        files = self._checkpoints
        models = {checkpoint.flag: fingerprint(checkpoint) for checkpoint in vars(files).values()}
        sources = (("--tokenizer1", "llama", files.llama), ("--tokenizer2", "clip", files.clip))
        for (flag, kind, encoder), given in zip(sources, self._tokenizers, strict=True):
            models[flag] = tokenizer_fingerprint(find_tokenizer(kind, given=given, checkpoint=encoder))
        if self._merge and self._merge.choices:
            models["--lora_weight"] = merged_loras(self._merge.choices)
        return Provenance(
            family=FAMILY,
            models=models,
            compute=self.compute.recorded(),
            with_paths=with_paths,
        )

    def check(self, request: FramePackRequest) -> None:
        self._transformer.check(request)

    def num_operations(self, request: FramePackRequest) -> int:
        return self._plan(request).num_operations

    def plan(self, request: FramePackRequest, size: MemorySize) -> str:
        return self._plan(request).text(size)

    def _plan(self, request: FramePackRequest) -> GenerationPlan:
        tokenizer = self._encoders.tokenizers()[0]
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

    def _denoise(self, request: FramePackRequest, cond: FramePackConditioning, on_progress: OnProgress) -> Tensor:
        with self._transformer.model_for(request) as transformer:
            return generate_latents(transformer, request, cond, on_progress)

    def decode(self, request: FramePackRequest, latents: Tensor) -> Frames:
        self._make_room_for_vae(request, latents)
        with self._vae.use():
            window, bulk = request.latent_window_size, self.compute.bulk_decode
            return decode_latents(self._vae.model, latents, window=window, bulk=bulk)

    def _make_room_for_vae(self, request: FramePackRequest, latents: Tensor) -> None:
        """The transformer steps aside when the device could not hold the VAE's work beside it."""
        compute, num_latents = self.compute, latents.shape[1]
        if not compute.bulk_decode:
            num_latents = min(num_latents, 2 * request.latent_window_size + 1)
        sizes = {"tile_size": compute.vae_tile_size, "chunk_size": compute.vae_chunk_size}
        work = VaeWork.of(self._checkpoints.vae, itemsize=compute.encoder_dtype.itemsize, **sizes)
        needed = decode_bytes(work, num_latents, request.height, request.width)
        self._transformer.make_room(needed)
