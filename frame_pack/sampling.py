"""The latents of one request: one frame, inverted anti-drifting sections, or F1."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from frame_pack.conditioning import FramePackConditioning, TextStates
from frame_pack.context import (
    HISTORY_FRAMES,
    PackedContext,
    f1_context,
    one_frame_context,
    section_context,
    section_paddings,
)
from frame_pack.model import Conditioning, FramePackTransformer, guidance_input
from frame_pack.rope import RopeScaling
from generation.pipeline import OnProgress, Progress
from modules.flow_matching import NUM_TIMESTEPS, denoised, resolution_mu, shifted_sigmas
from modules.guidance import guided
from modules.samplers import unipc
from options.fpack_request import FramePackRequest
from options.geometry import VAE_STRIDE
from options.sections import lookup


def generate_latents(
    transformer: FramePackTransformer, request: FramePackRequest, cond: FramePackConditioning, on_progress: OnProgress
) -> Tensor:
    """The latents of a picture (C, 1, h, w) or of a video with its start frame (C, sections·n + 1, h, w), float32."""
    sample = _Sampler(transformer, request, cond, on_progress)
    if request.one_frame is not None:
        return _one_frame(sample, request, cond)
    return _f1(sample, request, cond) if request.f1 else _inverted(sample, request, cond)


def _one_frame(sample: _Sampler, request: FramePackRequest, cond: FramePackConditioning) -> Tensor:
    like = torch.empty(1, *sample.latent_shape(1))
    context = one_frame_context(
        cond.controls, cond.control_masks, request.one_frame, window=request.latent_window_size, like=like
    )
    latents = sample(context, section=0, position=0)[0]
    sample.section_done(0, latents)
    return latents


def _inverted(sample: _Sampler, request: FramePackRequest, cond: FramePackConditioning) -> Tensor:
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
        sample.section_done(position, later[0, :, : (position + 1) * window])
    return torch.cat([start, later[:, :, : num_sections * window]], dim=2)[0]


def _f1(sample: _Sampler, request: FramePackRequest, cond: FramePackConditioning) -> Tensor:
    """First section first: each section sees the start image and what was generated before it."""
    num_sections, window = request.num_sections, request.latent_window_size
    earlier = torch.zeros(1, *sample.latent_shape(HISTORY_FRAMES))
    earlier = torch.cat([earlier, lookup(cond.starts, 0, num_sections)], dim=2)
    for section in range(num_sections):
        start = lookup(cond.starts, section, num_sections)
        context = f1_context(start, earlier, window=window)
        earlier = torch.cat([earlier, sample(context, section=section, position=section)], dim=2)
        sample.section_done(section, earlier[0, :, HISTORY_FRAMES:])
    return earlier[0, :, HISTORY_FRAMES:]


class _Sampler:
    """Denoises the target of one context after the other. Noise is drawn on the CPU, section after section."""

    def __init__(
        self,
        transformer: FramePackTransformer,
        request: FramePackRequest,
        cond: FramePackConditioning,
        on_progress: OnProgress,
    ) -> None:
        self._transformer, self._request, self._cond, self._on_progress = transformer, request, cond, on_progress
        self._generator = torch.Generator().manual_seed(request.seed)
        threshold = request.rope_scaling_threshold
        self._rope_scaling = (
            None if threshold is None else RopeScaling(factor=request.rope_scaling_factor, timestep_threshold=threshold)
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
        self._report(position, 0)
        noise = torch.randn(1, *self.latent_shape(context.num_target_frames), generator=self._generator)
        mu = resolution_mu(context.num_target_tokens) if request.flow_shift is None else math.log(request.flow_shift)
        sigmas = shifted_sigmas(request.num_steps, mu)
        timesteps = (NUM_TIMESTEPS * sigmas[:-1]).float()[:, None]
        prepare = partial(transformer.prepare, timesteps=timesteps, rope_scaling=self._rope_scaling)

        text = lookup(self._cond.texts, section, request.num_sections)
        positive = prepare(self._conditioning(context, text, section))
        negative = prepare(self._conditioning(context, self._cond.negative, section)) if request.uses_cfg else None

        def denoise(x: Tensor, step: int) -> Tensor:
            x = x.to(transformer.dtype)
            velocity = transformer.step(x, positive, step)
            if negative is not None:
                velocity = guided(velocity, transformer.step(x, negative, step), request.cfg_scale, request.cfg_rescale)
            self._report(position, step + 1)
            return denoised(x.float(), velocity, float(sigmas[step]))

        return unipc(denoise, noise.to(transformer.device), sigmas).cpu()

    def _conditioning(self, context: PackedContext, text: TextStates, section: int) -> Conditioning:
        guidance = guidance_input(self._request.distilled_guidance, 1)
        return Conditioning(
            context=context,
            text=text.llama[None],
            text_mask=torch.ones(1, len(text.llama), dtype=torch.bool),
            pooled=text.pooled[None],
            image=lookup(self._cond.siglip, section, self._request.num_sections)[None],
            guidance=guidance,
        )

    def section_done(self, position: int, latents: Tensor) -> None:
        """Tells that a section is ready, with all frames so far (C, F, h, w) in time order."""
        self._report(position, self._request.num_steps, latents)

    def _report(self, position: int, step: int, latents: Tensor | None = None) -> None:
        request = self._request
        self._on_progress(
            Progress(
                section=position,
                num_sections=request.num_sections,
                step=step,
                num_steps=request.num_steps,
                latents=latents,
            )
        )
