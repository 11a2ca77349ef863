"""What the VAE and LLaMA are said to take, against what is alive while they work, and against published sizes."""

import pytest
import torch

from common.weights import Checkpoint
from hunyuan_model import vae as hunyuan_vae
from hunyuan_model.memory import VaeWork, decode_bytes, encode_bytes, llama_weights, llama_work
from modules.weight_sizes import whole_weights
from tests.live_bytes import LiveBytes, use_fused_kernels
from tests.published import published_llama, published_vae


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return published_vae()


def vae_on_meta(checkpoint: Checkpoint, monkeypatch, **sizes: int | None) -> torch.nn.Module:
    """The published VAE, set up as it would be loaded, without its weights."""
    use_fused_kernels(monkeypatch)
    monkeypatch.setattr(hunyuan_vae, "load_weights", lambda *_, **__: None)
    vae = hunyuan_vae.load_vae(checkpoint, dtype=torch.float16, device="meta", **sizes)
    return vae.half().requires_grad_(False)


@pytest.mark.parametrize(
    ("latents", "height", "width", "tile", "chunk"),
    [
        (1, 640, 640, None, None),
        (9, 512, 768, None, None),
        (1, 640, 640, None, 32),
        (5, 640, 640, None, 32),
        (1, 1024, 768, 256, None),
        (9, 640, 640, 256, None),
        (3, 256, 256, 256, None),
    ],
)
def test_decoding_takes_what_is_alive(checkpoint, latents, height, width, tile, chunk, monkeypatch) -> None:
    vae = vae_on_meta(checkpoint, monkeypatch, tile_size=tile, chunk_size=chunk)
    with LiveBytes() as live:
        hunyuan_vae.decode(vae, torch.empty(1, 16, latents, height // 8, width // 8, device="meta"))
    work = VaeWork.of(checkpoint, itemsize=2, tile_size=tile, chunk_size=chunk)
    assert decode_bytes(work, latents, height, width) == pytest.approx(live.peak, rel=0.06)


@pytest.mark.parametrize(("frames", "tile", "chunk"), [(1, None, None), (9, None, None), (1, 256, None), (1, None, 32)])
def test_encoding_takes_what_is_alive(checkpoint, frames, tile, chunk, monkeypatch) -> None:
    vae = vae_on_meta(checkpoint, monkeypatch, tile_size=tile, chunk_size=chunk)
    with LiveBytes() as live:
        hunyuan_vae.encode(vae, torch.empty(1, 3, frames, 640, 512, device="meta"))
    work = VaeWork.of(checkpoint, itemsize=2, tile_size=tile, chunk_size=chunk)
    assert encode_bytes(work, frames, 640, 512) == pytest.approx(live.peak, rel=0.06)


def test_weights_are_as_large_as_published() -> None:
    llama = published_llama()
    # 8.03 billion with a head of 128256 x 4096 and the last two of 32 layers, which are not loaded.
    whole = 8.03e9 - 128256 * 4096 - 2 * 218_112_000
    assert llama_weights(llama, itemsize=2, fp8=False) == pytest.approx(2 * whole, rel=1e-3)
    embedding = 128320 * 4096
    assert llama_weights(llama, itemsize=2, fp8=True) == pytest.approx(
        2 * embedding + (whole - embedding) * (1 + 4 / 64), rel=1e-3
    )
    assert whole_weights(published_vae(), itemsize=2) == pytest.approx(0.493e9, rel=1e-3)


def test_reading_a_prompt_takes_little_beside_the_weights() -> None:
    llama = published_llama()
    plain, eight = (llama_work(llama, 200, itemsize=2, fp8=fp8) for fp8 in (False, True))
    assert plain < 0.05e9 and eight - plain == 4096 * 14336 * (2 + 4)
