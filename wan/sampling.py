"""The latents of one request: all frames of a clip together, in one-frame mode one of them is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from generation.pipeline import OnProgress, Progress
from modules.guidance import StepGuidance, plan_guidance
from modules.solvers import flow_solver
from options.geometry import VAE_STRIDE
from options.wan_request import WanRequest
from wan.conditioning import WanConditioning
from wan.model import Conditioning, Prepared, WanTransformer


def generate_latents(
    transformer: WanTransformer, request: WanRequest, cond: WanConditioning, on_progress: OnProgress
) -> Tensor:
    """The latents of a picture (C, 1, h, w) or of a video (C, F, h, w), float32 on the CPU."""
    solver = flow_solver(request.solver, request.num_steps, request.flow_shift)
    guidance = plan_guidance(request.num_steps, request.cfg_scale, request.guidance)
    predict = _Prediction(transformer, cond, guidance, solver.timesteps)
    report = _Report(on_progress, request.num_steps)

    def predicted(x: Tensor, step: int) -> Tensor:
        velocity = predict(x, step)
        report(step + 1)
        return velocity

    report(0)
    size = (request.height // VAE_STRIDE, request.width // VAE_STRIDE)
    shape = (transformer.config.latent_channels, cond.context.num_frames, *size)
    noise = initial_noise(shape, request, transformer.device)
    latents = cond.context.kept(solver.solve(predicted, noise)[None])[0].float().cpu()
    report(request.num_steps, latents)
    return latents


def initial_noise(shape: tuple[int, ...], request: WanRequest, device: torch.device) -> Tensor:
    """Drawn on the device, as the official pipeline does, or on the CPU, where it is the same for all devices."""
    place = torch.device("cpu") if request.cpu_noise else device
    generator = torch.Generator(place).manual_seed(request.seed)
    return torch.randn(shape, generator=generator, device=place, dtype=torch.float32).to(device)


class _Prediction:
    """The guided velocity of every step. What the noisy latents do not change is prepared once."""

    def __init__(
        self,
        transformer: WanTransformer,
        cond: WanConditioning,
        guidance: tuple[StepGuidance, ...],
        timesteps: Tensor,
    ) -> None:
        self._transformer, self._guidance = transformer, guidance
        prepare = {"positive": cond.text} | ({} if cond.negative is None else {"negative": cond.negative})
        self._prepared: dict[str, Prepared] = {
            name: transformer.prepare(_conditioning(cond, text), timesteps[:, None]) for name, text in prepare.items()
        }

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """x (C, F, h, w) → velocity of the same shape, float32."""
        guidance, velocities = self._guidance[step], {}
        for name in guidance.passes:
            prepared = self._prepared["positive" if name == "positive" else "negative"]
            skipped = frozenset(guidance.skipped_blocks) if name == "skipping" else frozenset()
            velocities[name] = self._transformer.step(x[None], prepared, step, skip_blocks=skipped)
        return guidance.combine(velocities)[0]


def _conditioning(cond: WanConditioning, text: Tensor) -> Conditioning:
    return Conditioning(
        text=text[None],
        text_lengths=torch.tensor([len(text)]),
        image=None if cond.features is None else cond.features[None],
        latents=cond.context.latents,
        indices=cond.context.indices,
    )


class _Report:
    """Progress of the one section that there is."""

    def __init__(self, on_progress: OnProgress, num_steps: int) -> None:
        self._on_progress, self._num_steps = on_progress, num_steps

    def __call__(self, step: int, latents: Tensor | None = None) -> None:
        progress = Progress(section=0, num_sections=1, step=step, num_steps=self._num_steps, latents=latents)
        self._on_progress(progress)
