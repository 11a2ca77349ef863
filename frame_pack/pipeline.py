"""FramePack as a generation pipeline: one frame, inverted anti-drifting sections, or F1."""

from __future__ import annotations

import math

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.device import free_memory, pick_device, pick_dtype
from common.residency import Resident
from common.weights import Checkpoint
from frame_pack.conditioning import Encoders, FramePackConditioning, TextStates, encode_requests
from frame_pack.context import (
    HISTORY_FRAMES,
    PackedContext,
    f1_context,
    one_frame_context,
    section_context,
    section_paddings,
)
from frame_pack.decoding import decode_frames, decode_sections
from frame_pack.image_encoder import load_siglip
from frame_pack.loading import FramePackCheckpoints, load_transformer
from frame_pack.model import Conditioning, FramePackTransformer
from frame_pack.rope import RopeScaling
from generation.outputs import to_uint8
from generation.pipeline import Denoise, Encode, Frames, OnProgress, Progress
from hunyuan_model import vae as hunyuan_vae
from hunyuan_model.text_encoders import load_clip, load_llama, load_tokenizer
from modules.flow_matching import NUM_TIMESTEPS, denoised, resolution_mu, shifted_sigmas
from modules.guidance import guided
from modules.samplers import unipc
from options.flags_fpack_generate import ComputeFlags
from options.geometry import VAE_STRIDE
from options.request import GenerationRequest
from options.sections import lookup

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo

DEFAULT_TILE = 256
"""Pixels per side with `--vae_tiling` alone."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where and in which types the models run, and how the VAE saves memory."""

    device: torch.device
    transformer_dtype: torch.dtype
    encoder_dtype: torch.dtype
    """For both text encoders, SigLIP and the VAE."""
    vae_tile_size: int | None = None
    vae_chunk_size: int | None = None
    bulk_decode: bool = False

    @classmethod
    def from_flags(cls, flags: ComputeFlags) -> Compute:
        """bfloat16 transformer and float16 encoders on a GPU, float32 on a CPU, unless `--dit_dtype` says otherwise.

        Raises:
            UserError: a device that torch cannot use.
        """
        device = pick_device(flags.device)
        return cls(
            device=device,
            transformer_dtype=pick_dtype(flags.dit_dtype, on_gpu="bfloat16", device=device),
            encoder_dtype=pick_dtype(None, on_gpu="float16", device=device),
            vae_tile_size=flags.vae_spatial_tile_sample_min_size or (DEFAULT_TILE if flags.vae_tiling else None),
            vae_chunk_size=flags.vae_chunk_size,
            bulk_decode=flags.bulk_decode,
        )

    def load_vae(self, checkpoint: Checkpoint) -> AutoencoderKLHunyuanVideo:
        place = {"dtype": self.encoder_dtype, "device": self.device}
        return hunyuan_vae.load_vae(checkpoint, chunk_size=self.vae_chunk_size, tile_size=self.vae_tile_size, **place)


class FramePackPipeline:
    """See `generation.pipeline.Pipeline`.

    Args:
        keep_loaded: models stay in RAM between stages (a loop over prompts); else each is freed after its stage.
        transformer: one that is lent by its owner, a trainer for example, instead of being loaded here.
        tokenizers: folders or hub ids of LLaMA's and CLIP's, None finds them beside the models.
    """

    def __init__(
        self,
        checkpoints: FramePackCheckpoints,
        compute: Compute,
        *,
        keep_loaded: bool = False,
        transformer: FramePackTransformer | None = None,
        tokenizers: tuple[str | None, str | None] = (None, None),
    ) -> None:
        files, place = checkpoints, {"dtype": compute.encoder_dtype, "device": compute.device}
        dit = {"dtype": compute.transformer_dtype, "device": compute.device}
        resident = partial(Resident, device=compute.device, keep=keep_loaded)
        # The VAE is needed at both ends of a run and is small, so it stays in RAM in between.

        @cache
        def load_tokenizers() -> tuple[object, object]:
            return (
                load_tokenizer("llama", given=tokenizers[0], checkpoint=files.llama),
                load_tokenizer("clip", given=tokenizers[1], checkpoint=files.clip),
            )

        self.compute = compute
        self._vae = Resident("VAE", partial(compute.load_vae, files.vae), device=compute.device, keep=True)
        self._encoders = Encoders(
            llama=resident("LLaMA", partial(load_llama, files.llama, **place)),
            clip=resident("CLIP", partial(load_clip, files.clip, **place)),
            siglip=resident("SigLIP", partial(load_siglip, files.siglip, **place)),
            vae=self._vae,
            tokenizers=load_tokenizers,
        )
        self._transformer = resident(
            "transformer", partial(load_transformer, files.transformer, **dit), lent=transformer
        )

    @contextmanager
    def encoder(self) -> Iterator[Encode]:
        with torch.no_grad():
            yield partial(encode_requests, self._encoders)

    @contextmanager
    def denoiser(self) -> Iterator[Denoise]:
        with torch.no_grad(), self._transformer.use() as transformer:
            yield partial(generate_latents, transformer)

    def decode(self, request: GenerationRequest, latents: Tensor) -> Frames:
        with self._room_for_vae(request), self._vae.use() as vae:
            return decode_latents(
                vae, latents, window=request.latent_window_size, bulk=self.compute.bulk_decode
            )

    def _room_for_vae(self, request: GenerationRequest) -> AbstractContextManager[None]:
        """The transformer steps aside when the device could not hold the VAE's work beside it."""
        tile = self.compute.vae_tile_size
        height, width = min(request.height, tile or request.height), min(request.width, tile or request.width)
        num_frames = 1 if request.one_frame is not None else 4 * (2 * request.latent_window_size) + 1
        # About three activations of 256 channels at full size in half precision live at once in the last up block.
        needed = 3 * 256 * 2 * num_frames * height * width
        return self._transformer.aside() if free_memory(self.compute.device) < needed else nullcontext()


@torch.no_grad()
def decode_latents(vae: torch.nn.Module, latents: Tensor, *, window: int, bulk: bool = False) -> Frames:
    """Latents (C, F, h, w) → (frames, H, W, 3) uint8; one latent frame is one picture, more are a video."""

    def decode(part: Tensor) -> Tensor:
        return hunyuan_vae.decode(vae, part[None])[0]

    if latents.shape[1] == 1:
        return decode_frames(decode, latents)
    if bulk:
        return to_uint8(decode(latents).cpu())
    return decode_sections(decode, latents, window)


def generate_latents(
    transformer: FramePackTransformer, request: GenerationRequest, cond: FramePackConditioning, on_progress: OnProgress
) -> Tensor:
    """The latents of a picture (C, 1, h, w) or of a video with its start frame (C, sections·n + 1, h, w), float32."""
    sample = _Sampler(transformer, request, cond, on_progress)
    if request.one_frame is not None:
        return _one_frame(sample, request, cond)
    return _f1(sample, request, cond) if request.f1 else _inverted(sample, request, cond)


def _one_frame(sample: _Sampler, request: GenerationRequest, cond: FramePackConditioning) -> Tensor:
    like = torch.empty(1, *sample.latent_shape(1))
    context = one_frame_context(
        cond.controls, cond.control_masks, request.one_frame, window=request.latent_window_size, like=like
    )
    return sample(context, section=0, position=0)[0]


def _inverted(sample: _Sampler, request: GenerationRequest, cond: FramePackConditioning) -> Tensor:
    """Last section first: each section sees the start image and what was generated after it."""
    later = torch.zeros(1, *sample.latent_shape(HISTORY_FRAMES))
    if cond.end is not None:
        later[:, :, :1] = cond.end
    num_sections, window = request.num_sections, request.latent_window_size
    for position, padding in enumerate(section_paddings(num_sections, request.latent_paddings)):
        section = num_sections - 1 - position
        start = lookup(cond.starts, section, num_sections)
        context = section_context(start, later, padding=padding, window=window)
        later = torch.cat([sample(context, section=section, position=position), later], dim=2)
    return torch.cat([start, later[:, :, : num_sections * window]], dim=2)[0]


def _f1(sample: _Sampler, request: GenerationRequest, cond: FramePackConditioning) -> Tensor:
    """First section first: each section sees the start image and what was generated before it."""
    num_sections, window = request.num_sections, request.latent_window_size
    earlier = torch.zeros(1, *sample.latent_shape(HISTORY_FRAMES))
    earlier = torch.cat([earlier, lookup(cond.starts, 0, num_sections)], dim=2)
    for section in range(num_sections):
        start = lookup(cond.starts, section, num_sections)
        context = f1_context(start, earlier, window=window)
        earlier = torch.cat([earlier, sample(context, section=section, position=section)], dim=2)
    return earlier[0, :, HISTORY_FRAMES:]


class _Sampler:
    """Denoises the target of one context after the other. Noise is drawn on the CPU, section after section."""

    def __init__(
        self,
        transformer: FramePackTransformer,
        request: GenerationRequest,
        cond: FramePackConditioning,
        on_progress: OnProgress,
    ) -> None:
        self._transformer, self._request, self._cond, self._on_progress = transformer, request, cond, on_progress
        self._generator = torch.Generator().manual_seed(request.seed)
        threshold = request.rope_scaling_threshold
        self._rope_scaling = (
            None
            if threshold is None
            else RopeScaling(factor=request.rope_scaling_factor, timestep_threshold=threshold)
        )

    def latent_shape(self, num_frames: int) -> tuple[int, int, int, int]:
        """(C, F, h, w)"""
        size = (self._request.height // VAE_STRIDE, self._request.width // VAE_STRIDE)
        return (self._transformer.config.latent_channels, num_frames, *size)

    def __call__(self, context: PackedContext, *, section: int, position: int) -> Tensor:
        """Latents (1, C, T, h, w) of the target, float32 on the CPU.

        Args:
            section: in time, for its prompt and image.
            position: in order of generation, for progress.
        """
        request, transformer = self._request, self._transformer
        noise = torch.randn(1, *self.latent_shape(context.num_target_frames), generator=self._generator)
        mu = resolution_mu(context.num_target_tokens) if request.flow_shift is None else math.log(request.flow_shift)
        sigmas = shifted_sigmas(request.num_steps, mu)
        timesteps = (NUM_TIMESTEPS * sigmas[:-1]).float()[:, None]
        prepare = partial(transformer.prepare, timesteps=timesteps, rope_scaling=self._rope_scaling)

        text = lookup(self._cond.texts, section, request.num_sections)
        positive = prepare(self._conditioning(context, text, section))
        negative = request.uses_cfg and prepare(self._conditioning(context, self._cond.negative, section))

        def denoise(x: Tensor, step: int) -> Tensor:
            x = x.to(transformer.dtype)
            velocity = transformer.step(x, positive, step)
            if negative:
                velocity = guided(
                    velocity, transformer.step(x, negative, step), request.cfg_scale, request.cfg_rescale
                )
            self._report(position, step + 1)
            return denoised(x.float(), velocity, float(sigmas[step]))

        return unipc(denoise, noise.to(transformer.device), sigmas).cpu()

    def _conditioning(self, context: PackedContext, text: TextStates, section: int) -> Conditioning:
        # The published pipeline rounds guidance to bfloat16 before it is embedded: a scale of 10 becomes 9984.
        guidance = torch.tensor([self._request.distilled_guidance * NUM_TIMESTEPS]).bfloat16().float()
        return Conditioning(
            context=context,
            text=text.llama[None],
            text_mask=torch.ones(1, len(text.llama), dtype=torch.bool),
            pooled=text.pooled[None],
            image=lookup(self._cond.siglip, section, self._request.num_sections)[None],
            guidance=guidance,
        )

    def _report(self, position: int, step: int) -> None:
        request = self._request
        progress = Progress(
            section=position, num_sections=request.num_sections, step=step, num_steps=request.num_steps
        )
        self._on_progress(progress)
