"""Pixels to latents, against diffusers' VAE, and masks, against Pillow."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from PIL import Image

from frame_pack.pictures import encode_clips, encode_pictures, encode_pixels, latent_mask
from hunyuan_model.vae import load_vae, open_vae


@pytest.fixture(scope="module")
def vae(demo_models) -> AutoencoderKLHunyuanVideo:
    return load_vae(open_vae(demo_models.vae), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def reference(demo_models) -> AutoencoderKLHunyuanVideo:
    model = AutoencoderKLHunyuanVideo.from_pretrained(demo_models.vae / "vae", torch_dtype=torch.float32).eval()
    model.use_framewise_encoding = False
    return model


@torch.no_grad()
def wanted(reference: AutoencoderKLHunyuanVideo, frames: np.ndarray) -> torch.Tensor:
    """(F, H, W, 3) uint8 → (1, 16, F', h, w)."""
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return reference.encode(pixels).latent_dist.mean * 0.476986


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_one_picture_equals_diffusers_bit_by_bit(vae, reference) -> None:
    picture = noise(48, 80)
    latents = encode_pictures(vae, [picture])
    assert latents.dtype == torch.float32 and latents.shape == (1, 16, 1, 6, 10)
    assert torch.equal(latents, wanted(reference, picture[None]))


def test_pictures_of_a_batch_do_not_mix(vae, reference) -> None:
    pictures = noise(3, 32, 48)
    latents = encode_pictures(vae, list(pictures))
    assert latents.shape == (3, 16, 1, 4, 6)
    for found, picture in zip(latents, pictures, strict=True):
        assert torch.allclose(found, wanted(reference, picture[None])[0], atol=1e-5)


def test_clips_of_a_batch_do_not_mix(vae, reference) -> None:
    clips = noise(2, 9, 32, 48)
    latents = encode_clips(vae, clips)
    assert latents.shape == (2, 16, 3, 4, 6)
    for found, clip in zip(latents, clips, strict=True):
        assert torch.allclose(found, wanted(reference, clip)[0], atol=1e-5)


def test_exact_grey_is_the_latent_of_zeros(vae, reference) -> None:
    found = encode_pixels(vae, np.zeros((1, 1, 32, 48, 3), dtype=np.float32))
    with torch.no_grad():
        grey = reference.encode(torch.zeros(1, 3, 1, 32, 48)).latent_dist.mean * 0.476986
    assert torch.equal(found, grey)


def test_masks_are_resized_by_lanczos_to_the_latent() -> None:
    mask = np.random.default_rng(1).integers(0, 256, (48, 80), dtype=np.uint8)
    found = latent_mask(mask)
    small = np.asarray(Image.fromarray(mask).resize((10, 6), Image.Resampling.LANCZOS))
    assert found.dtype == torch.float32 and torch.equal(found, torch.from_numpy(small / np.float32(255)))
    assert latent_mask(None) is None
