"""FramePack as a generation pipeline: which models are where while it encodes, denoises and decodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.device import free_memory, pick_device, pick_dtype
from common.residency import Resident
from common.weights import Checkpoint, fingerprint
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
from generation.settings import Provenance, content_hash, readable
from hunyuan_model import vae as hunyuan_vae
from hunyuan_model.memory import VaeWork, decode_bytes
from hunyuan_model.text_encoders import (
    find_tokenizer,
    load_clip,
    load_llama,
    load_tokenizer,
    tokenizer_fingerprint,
)
from modules.attention import AttentionOptions
from modules.block_swap import SwapOptions
from modules.execution import Execution
from modules.swapping import SwapWish, check_swap, choose_swap
from modules.transformer_plan import EmptyTransformers
from networks.lora_merge import LoraMerge
from networks.prompt_loras import PromptLoras
from options.flags_compile import CompileFlags
from options.flags_generate import ComputeFlags
from options.fp8 import Fp8Mode
from options.memory_size import MemorySize
from options.request import GenerationRequest

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where and in which types the models run, and how the VAE saves memory."""

    device: torch.device
    transformer_dtype: torch.dtype
    encoder_dtype: torch.dtype
    """For both text encoders, SigLIP and the VAE."""
    fp8: Fp8Mode = "off"
    """What becomes of the transformer's weights."""
    fp8_llm: bool = False
    swap: SwapWish = SwapWish()
    """What of the transformer lies in RAM."""
    execution: Execution = Execution()
    """How the transformer's blocks are run."""
    vae_tile_size: int | None = None
    vae_chunk_size: int | None = None
    bulk_decode: bool = False

    @classmethod
    def from_flags(cls, flags: ComputeFlags, speed: CompileFlags | None = None) -> Compute:
        """bfloat16 transformer and float16 encoders on a GPU, float32 on a CPU, unless `--dit_dtype` says otherwise.

        Raises:
            UserError: a device that torch cannot use.
        """
        device = pick_device(flags.device)
        return cls(
            device=device,
            transformer_dtype=pick_dtype(flags.dit_dtype, on_gpu="bfloat16", device=device),
            encoder_dtype=pick_dtype(None, on_gpu="float16", device=device),
            fp8=flags.fp8_mode,
            fp8_llm=flags.fp8_llm,
            swap=SwapWish(
                blocks=flags.blocks_to_swap,
                offload_invariant=flags.offload_invariant,
                pinned=flags.use_pinned_memory_for_block_swap,
            ),
            execution=Execution(
                attention=AttentionOptions(backend=flags.attention), compiling=speed.choice if speed else None
            ),
            vae_tile_size=flags.tile_size,
            vae_chunk_size=flags.vae_chunk_size,
            bulk_decode=flags.bulk_decode,
        )

    def planned(self, flags: ComputeFlags) -> Compute:
        """With the types that a GPU would get, on a machine without one, unless `--device` asks for this machine."""
        if flags.device is not None or self.device.type != "cpu":
            return self
        gpu = torch.device("cuda")
        return replace(
            self,
            transformer_dtype=pick_dtype(flags.dit_dtype, on_gpu="bfloat16", device=gpu),
            encoder_dtype=pick_dtype(None, on_gpu="float16", device=gpu),
        )

    def check_execution(self) -> None:
        """Raises UserError where the transformer's blocks cannot be run as they are asked to be."""
        self.execution.check(device=self.device, dtype=self.transformer_dtype)

    def recorded(self) -> dict[str, object]:
        """What changes the bits of a result, as JSON values under the names of flags."""
        return {
            "device": self.device.type,
            "dit_dtype": str(self.transformer_dtype).removeprefix("torch."),
            "attn_mode": self.execution.attention.backend,
            "compile": self.execution.compiling is not None,
            "fp8": self.fp8 == "plain",
            "fp8_scaled": self.fp8 == "scaled",
            "fp8_llm": self.fp8_llm,
            "vae_spatial_tile_sample_min_size": self.vae_tile_size,
            "vae_chunk_size": self.vae_chunk_size,
            "bulk_decode": self.bulk_decode,
        }

    def load_vae(self, checkpoint: Checkpoint) -> AutoencoderKLHunyuanVideo:
        place = {"dtype": self.encoder_dtype, "device": self.device}
        return hunyuan_vae.load_vae(checkpoint, chunk_size=self.vae_chunk_size, tile_size=self.vae_tile_size, **place)


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
        self._merge, self._prompt_loras = merge, PromptLoras(files.transformer)
        self._vae = Resident("VAE", partial(compute.load_vae, files.vae), device=compute.device, keep=True)
        self._encoders = Encoders(
            llama=resident("LLaMA", partial(load_llama, files.llama, fp8=compute.fp8_llm, **place)),
            clip=resident("CLIP", partial(load_clip, files.clip, **place)),
            siglip=resident("SigLIP", partial(load_siglip, files.siglip, **place)),
            vae=self._vae,
            tokenizers=load_tokenizers,
        )
        self._transformer = resident("transformer", self._load_transformer, lent=transformer)
        self._largest: GenerationRequest | None = None
        if transformer is None:
            check_swap(compute.swap, swap_limits(FramePackConfig.from_checkpoint(files.transformer)))

    def provenance(self, *, with_paths: bool) -> Provenance:
        """What results of this pipeline say about their models and types."""
        files = self._checkpoints
        models = {checkpoint.flag: fingerprint(checkpoint) for checkpoint in vars(files).values()}
        sources = (("--tokenizer1", "llama", files.llama), ("--tokenizer2", "clip", files.clip))
        for (flag, kind, encoder), given in zip(sources, self._tokenizers, strict=True):
            models[flag] = tokenizer_fingerprint(find_tokenizer(kind, given=given, checkpoint=encoder))
        if self._merge and self._merge.choices:
            models["--lora_weight"] = _merged_loras(self._merge)
        return Provenance(
            family=FAMILY,
            models=models,
            compute=self.compute.recorded(),
            with_paths=with_paths,
        )

    def check(self, request: GenerationRequest) -> None:
        self._prompt_loras.check(request.loras)
        # What is kept for later steps grows with the tokens and, less, with the steps.
        self._largest = max(filter(None, (self._largest, request)), key=lambda r: (num_tokens(r), r.num_steps))

    def num_operations(self, request: GenerationRequest) -> int:
        return self._plan(request).num_operations

    def plan(self, request: GenerationRequest, size: MemorySize) -> str:
        return self._plan(request).text(size)

    def _plan(self, request: GenerationRequest) -> GenerationPlan:
        tokenizer = self._encoders.tokenizers()[0]
        return plan_generation(self._checkpoints, self.compute, request, self._empty, tokenizer=tokenizer)

    @cached_property
    def _empty(self) -> EmptyTransformers:
        return empty_transformers(self._checkpoints.transformer, self._merge, self.compute.transformer_dtype)

    def _load_transformer(self) -> FramePackTransformer:
        compute, checkpoint = self.compute, self._checkpoints.transformer
        place = {"dtype": compute.transformer_dtype, "device": compute.device}
        swap = self._choose_swap()
        transformer = load_transformer(checkpoint, merge=self._merge, fp8=compute.fp8, swap=swap, **place)
        compute.execution.apply_to(transformer)
        return transformer

    def _choose_swap(self) -> SwapOptions:
        """For the largest request so far."""
        wish, free = self.compute.swap, free_memory(self.compute.device)
        plan = cache(lambda: self._plan(self._largest))
        return choose_swap(wish, self._empty.limits, free=free, needed=lambda *choice: plan().needed(*choice))

    @contextmanager
    def encoder(self) -> Iterator[Encode]:
        with torch.no_grad():
            yield partial(encode_requests, self._encoders)

    @contextmanager
    def denoiser(self) -> Iterator[Denoise]:
        try:
            with torch.no_grad(), self._transformer.use():
                yield self._denoise
        finally:
            self._prompt_loras.leave_device()

    def _denoise(self, request: GenerationRequest, cond: FramePackConditioning, on_progress: OnProgress) -> Tensor:
        transformer = self._transformer.model
        with self._prompt_loras.on(transformer, request.loras):
            return generate_latents(transformer, request, cond, on_progress)

    def decode(self, request: GenerationRequest, latents: Tensor) -> Frames:
        self._make_room_for_vae(request, latents)
        with self._vae.use():
            window, bulk = request.latent_window_size, self.compute.bulk_decode
            return decode_latents(self._vae.model, latents, window=window, bulk=bulk)

    def _make_room_for_vae(self, request: GenerationRequest, latents: Tensor) -> None:
        """The transformer steps aside when the device could not hold the VAE's work beside it."""
        compute, num_latents = self.compute, latents.shape[1]
        if not compute.bulk_decode:
            num_latents = min(num_latents, 2 * request.latent_window_size + 1)
        sizes = {"tile_size": compute.vae_tile_size, "chunk_size": compute.vae_chunk_size}
        work = VaeWork.of(self._checkpoints.vae, itemsize=compute.encoder_dtype.itemsize, **sizes)
        needed = decode_bytes(work, num_latents, request.height, request.width)
        if free_memory(compute.device) < needed:
            self._transformer.step_aside()


def _merged_loras(merge: LoraMerge) -> str:
    """Which LoRAs are in the model and how much of each, known by their content."""
    choices = [
        {
            "name": readable(Path(choice.path).name),
            "file": content_hash(choice.path),
            "multiplier": choice.multiplier,
            "patterns": [choice.include, choice.exclude],
        }
        for choice in merge.choices
    ]
    return json.dumps(choices, ensure_ascii=False)
