"""Wan from pictures to pixels by diffusers and transformers alone, put together by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DPMSolverMultistepScheduler, UniPCMultistepScheduler, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from demo import wan_models
from tests.wan_encoders import WanEncoders, direct_clip, direct_t5, direct_vae
from tests.wan_transformers import diffusers_names
from wan.config import Kind

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2}
FRAMES = 257


class Oracle:
    """Everything in float32. The transformer is that of a small model's file, the encoders are the snapshots'."""

    def __init__(self, encoders: WanEncoders) -> None:
        self._encoders = encoders

    @cached_property
    def encode(self) -> Callable[[np.ndarray | Tensor], Tensor]:
        """(F, H, W, 3) uint8, or float32 in [-1, 1], → (1, 16, F', h, w)."""
        return direct_vae(self._encoders)

    @cached_property
    def features(self) -> Callable[[np.ndarray], Tensor]:
        """(H, W, 3) uint8 → (257, width)."""
        return direct_clip(self._encoders)

    @cached_property
    def read(self) -> Callable[[str], Tensor]:
        """A prompt → (1, 512, width), zeros behind its end."""
        rows_of = direct_t5(self._encoders)

        def padded(text: str) -> Tensor:
            rows = rows_of(text)
            return torch.nn.functional.pad(rows, (0, 0, 0, 512 - len(rows)))[None]

        return padded

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """(1, 16, F', h, w) → (F, H, W, 3) uint8."""
        vae = AutoencoderKLWan.from_pretrained(self._encoders.vae / "vae", torch_dtype=torch.float32).eval()
        statistics = (vae.config.latents_mean, vae.config.latents_std)
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in statistics)
        pixels = vae.decode(latents * deviation + mean).sample[0].clamp(-1, 1)
        return ((pixels + 1) / 2 * 255).permute(1, 2, 3, 0).numpy().astype(np.uint8)


def transformer_of(file: Path, kind: Kind) -> WanTransformer3DModel:
    """diffusers' transformer with the weights of a file in the official layout."""
    takes_pictures = kind != "t2v"
    model = WanTransformer3DModel(
        num_attention_heads=wan_models.WIDTH // 128,
        attention_head_dim=128,
        in_channels={"t2v": 16, "i2v": 36, "flf2v": 36, "fun_control": 48}[kind],
        out_channels=16,
        text_dim=wan_models.TEXT_WIDTH,
        ffn_dim=wan_models.MLP_WIDTH,
        num_layers=wan_models.NUM_BLOCKS,
        image_dim=wan_models.IMAGE_WIDTH if takes_pictures else None,
        added_kv_proj_dim=wan_models.WIDTH if takes_pictures else None,
        pos_embed_seq_len=2 * FRAMES if kind == "flf2v" else None,
    )
    model.load_state_dict({name: tensor.float() for name, tensor in diffusers_names(load_file(file)).items()})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def denoised(
    transformer: WanTransformer3DModel,
    texts: Sequence[Tensor],
    *,
    shape: Sequence[int],
    scale: float,
    solver: str,
    num_steps: int,
    shift: float,
    seed: int,
    y: Tensor | None = None,
    features: Tensor | None = None,
) -> Tensor:
    """Latents (1, 16, F, h, w).

    Args:
        texts: of the prompt and, unless `scale` is 1, of the negative prompt.
        shape: (F, h, w).
        features: (pictures, 257, width).
    """

    def velocity(x: Tensor, timestep: float) -> Tensor:
        given = x if y is None else torch.cat([x, y], dim=1)
        time = torch.tensor([timestep])
        passes = [transformer(given, time, text, features, return_dict=False)[0] for text in texts]
        return passes[0] if scale == 1 else passes[1] + scale * (passes[0] - passes[1])

    x = torch.randn(1, 16, *shape, generator=torch.Generator().manual_seed(seed))
    sigmas = shifted_table(solver, num_steps, shift)
    if solver == "vanilla":
        for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            x = x + (after - sigma) * velocity(x, 1000 * sigma)
        return x
    schedulers = {"unipc": UniPCMultistepScheduler, "dpm++": DPMSolverMultistepScheduler}
    scheduler = schedulers[solver](solver_type={"unipc": "bh2", "dpm++": "midpoint"}[solver], **FLOW)
    scheduler.set_timesteps(num_steps)
    scheduler.sigmas = torch.tensor(sigmas)
    scheduler.timesteps = torch.tensor([int(1000 * sigma) for sigma in sigmas[:-1]])
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(x, float(timestep)), timestep, x, return_dict=False)[0]
    return x


def shifted_table(solver: str, num_steps: int, shift: float) -> list[float]:
    """As the facts give it: UniPC begins a thousandth below 1, the others at 1."""
    even = np.linspace(0.999 if solver == "unipc" else 1.0, 0, num_steps + 1)
    return [float(shift * s / (1 + (shift - 1) * s)) for s in even]


def quarter(picture: np.ndarray) -> np.ndarray:
    """Half the width and the height: the mean of four pixels."""
    height, width = picture.shape[:2]
    return np.rint(picture.reshape(height // 2, 2, width // 2, 2, -1).mean(axis=(1, 3))).astype(np.uint8)


def saved(path: Path) -> np.ndarray:
    """A picture, or a folder of them: (F, H, W, 3)."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
