"""Small encoders for Wan's caches, made and saved by diffusers and transformers alone, and what these encode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

WIDTH = 160
"""Of CLIP: two heads."""
TEXT_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class WanEncoders:
    """Snapshot folders."""

    vae: Path
    clip: Path
    t5: Path


def write_encoders(folder: Path) -> WanEncoders:
    """Random weights in the layouts of diffusers and transformers."""
    from diffusers import AutoencoderKLWan
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    from demo.small_tokenizers import save_t5_tokenizer

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
    clip = CLIPVisionModel(
        CLIPVisionConfig(image_size=224, patch_size=14, layer_norm_eps=1e-5, hidden_act="gelu", **sizes)
    )
    sizes = {"d_model": TEXT_WIDTH, "d_ff": 96, "d_kv": 64, "num_heads": 2, "num_layers": 2}
    num_tokens = save_t5_tokenizer(folder / "google" / "umt5-xxl")
    t5 = UMT5EncoderModel(UMT5Config(vocab_size=num_tokens, **sizes))
    for model, name in ((vae, "vae"), (clip, "image_encoder"), (t5, "text_encoder")):
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    return WanEncoders(vae=folder, clip=folder, t5=folder)


def direct_vae(encoders: WanEncoders) -> Callable[[np.ndarray | torch.Tensor], torch.Tensor]:
    """(F, H, W, 3) uint8, or float32 in [-1, 1], → (1, 16, F', h, w) normalised, by diffusers alone."""
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan.from_pretrained(encoders.vae / "vae", torch_dtype=torch.float32).eval()
    mean, deviation = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (model.config.latents_mean, model.config.latents_std)
    )

    @torch.no_grad()
    def encode(frames: np.ndarray | torch.Tensor) -> torch.Tensor:
        pixels = frames if isinstance(frames, torch.Tensor) else torch.tensor(frames).float() / 127.5 - 1
        pixels = pixels.permute(3, 0, 1, 2)[None]
        return (model.encode(pixels).latent_dist.mean - mean) / deviation

    return encode


def direct_clip(encoders: WanEncoders) -> Callable[[np.ndarray], torch.Tensor]:
    """(H, W, 3) uint8 → (257, width), by transformers alone, with the published preprocessing."""
    from transformers import CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(encoders.clip / "image_encoder", dtype=torch.float32).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)

    @torch.no_grad()
    def encode(picture: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        pixels = torch.nn.functional.interpolate(pixels, size=(224, 224), mode="bicubic", align_corners=False)
        pixels = (pixels * 0.5 + 0.5 - mean) / deviation
        return model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][0]

    return encode


def direct_t5(encoders: WanEncoders) -> Callable[[str], torch.Tensor]:
    """A clean caption → (L, width), padded and masked as the official code does it, by transformers alone."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    model = UMT5EncoderModel.from_pretrained(encoders.t5 / "text_encoder", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoders.t5 / "google" / "umt5-xxl")

    @torch.no_grad()
    def encode(text: str) -> torch.Tensor:
        given = tokenizer(text, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
        states = model(input_ids=given.input_ids, attention_mask=given.attention_mask).last_hidden_state[0]
        return states[: int(given.attention_mask.sum())]

    return encode


def grey(height: int, width: int, num_frames: int = 1) -> torch.Tensor:
    """(F, H, W, 3) of zeros in [-1, 1]."""
    return torch.zeros(num_frames, height, width, 3)


def shown_clip(frames: Sequence[np.ndarray]) -> torch.Tensor:
    """Pixels in [-1, 1] with grey for None: (F, H, W, 3)."""
    size = next(frame.shape for frame in frames if frame is not None)
    pixels = [
        torch.zeros(size) if frame is None else torch.from_numpy(frame.copy()).float() / 127.5 - 1 for frame in frames
    ]
    return torch.stack(pixels)
