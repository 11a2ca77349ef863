"""The latents of one request: all frames of a clip together, in one-frame mode one of them is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
    predict = _Prediction(transformer, cond, guidance, solver.timesteps, joins_passes=joins_passes(request))
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


def joins_passes(request: WanRequest) -> bool:
    """Whether classifier-free guidance takes one pass of a batch of two instead of two passes.

    For a picture: its tokens are few, so that reading, copying or unpacking weights takes much of a pass. A clip would
    need more memory, and gain nothing. Whatever else is chosen, so that the same request gives the same bits.
    """
    return request.is_picture


def initial_noise(shape: tuple[int, ...], request: WanRequest, device: torch.device) -> Tensor:
    """Drawn on the device, as the official pipeline does, or on the CPU, where it is the same for all devices."""
    place = torch.device("cpu") if request.cpu_noise else device
    generator = torch.Generator(place).manual_seed(request.seed)
    return torch.randn(shape, generator=generator, device=place, dtype=torch.float32).to(device)


class _Prediction:
    """The guided velocity of every step. What the noisy latents do not change is prepared once.

    Args:
        joins_passes: the positive and the negative pass are one pass of a batch of two.
    """

    def __init__(
        self,
        transformer: WanTransformer,
        cond: WanConditioning,
        guidance: tuple[StepGuidance, ...],
        timesteps: Tensor,
        *,
        joins_passes: bool,
    ) -> None:
        self._transformer, self._guidance = transformer, guidance
        texts = {"positive": cond.text} | ({} if cond.negative is None else {"negative": cond.negative})
        self._joined: Prepared | None = None
        self._prepared: dict[str, Prepared] = {}
        if joins_passes and len(texts) == 2:
            self._joined = transformer.prepare(_conditioning(cond, [*texts.values()]), timesteps[:, None].expand(-1, 2))
            self._prepared = {name: self._joined.sample(number) for number, name in enumerate(texts)}
        else:
            for name, text in texts.items():
                self._prepared[name] = transformer.prepare(_conditioning(cond, [text]), timesteps[:, None])

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """x (C, F, h, w) → velocity of the same shape, float32."""
        guidance, velocities = self._guidance[step], {}
        if self._joined is not None and {"positive", "negative"} <= set(guidance.passes):
            both = self._transformer.step(x.expand(2, *x.shape), self._joined, step)
            velocities = {"positive": both[:1], "negative": both[1:]}
        for name in guidance.passes:
            if name not in velocities:
                prepared = self._prepared["positive" if name == "positive" else "negative"]
                skipped = frozenset(guidance.skipped_blocks) if name == "skipping" else frozenset()
                velocities[name] = self._transformer.step(x[None], prepared, step, skip_blocks=skipped)
        return guidance.combine(velocities)[0]


def _conditioning(cond: WanConditioning, texts: Sequence[Tensor]) -> Conditioning:
    """A batch of these texts (L, text_width), alike in everything else."""

    def for_each(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.expand(len(texts), *tensor.shape[1:])

    return Conditioning(
        text=pad_sequence(list(texts), batch_first=True),
        text_lengths=torch.tensor([len(text) for text in texts]),
        image=for_each(None if cond.features is None else cond.features[None]),
        latents=for_each(cond.context.latents),
        indices=for_each(cond.context.indices),
    )


class _Report:
    """Progress of the one section that there is."""

    def __init__(self, on_progress: OnProgress, num_steps: int) -> None:
        self._on_progress, self._num_steps = on_progress, num_steps

    def __call__(self, step: int, latents: Tensor | None = None) -> None:
        progress = Progress(section=0, num_sections=1, step=step, num_steps=self._num_steps, latents=latents)
        self._on_progress(progress)
