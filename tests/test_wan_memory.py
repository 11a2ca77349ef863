"""What Wan's VAE and UMT5 are said to take, against what is alive while they work, and against published sizes."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from common.weights import Checkpoint
from modules.weight_sizes import whole_weights
from tests.live_bytes import LiveBytes, use_fused_kernels
from tests.published import described, published_shapes
from wan import text_encoder
from wan import vae as wan_vae
from wan.memory import VaeWork, decode_bytes, encode_bytes, t5_weights, t5_work


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """Of the published VAE."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in AutoencoderKLWan().state_dict().items()}
    return described("--vae", shapes, "F32")


class Elsewhere(list):
    """Stands in for RAM beside a GPU: what is put here is not alive until it is read."""

    def __init__(self, entries: list, device: torch.device) -> None:
        super().__init__(entries)
        self._lent: tuple[int | None, Tensor | None] = (None, None)

    def __setitem__(self, index: int, entry: Tensor | str) -> None:
        self._lent = (None, None)
        super().__setitem__(index, entry.shape if isinstance(entry, Tensor) else entry)

    def __getitem__(self, index: int) -> Tensor | str | None:
        entry = super().__getitem__(index)
        if not isinstance(entry, torch.Size):
            return entry
        if self._lent[0] != index:
            self._lent = (index, torch.empty(entry, dtype=torch.bfloat16, device="meta"))
        return self._lent[1]


def vae_on_meta(checkpoint: Checkpoint, monkeypatch, dtype: torch.dtype, cache_on_cpu: bool = False):
    """The published VAE, set up as it would be loaded, without its weights."""
    use_fused_kernels(monkeypatch)
    monkeypatch.setattr(wan_vae, "load_weights", lambda *_, **__: None)
    monkeypatch.setattr(wan_vae, "FeaturesInRam", Elsewhere)
    vae = wan_vae.load_vae(checkpoint, dtype=dtype, device="meta", cache_on_cpu=cache_on_cpu)
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(dtype)
    return vae.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("latents", "height", "width"), [(1, 640, 640), (1, 1024, 768), (2, 256, 256), (5, 480, 832), (21, 256, 256)]
)
def test_decoding_takes_what_is_alive(checkpoint, dtype, latents, height, width, monkeypatch) -> None:
    vae, z = vae_on_meta(checkpoint, monkeypatch, dtype), torch.empty(1, 16, latents, height // 8, width // 8)
    with LiveBytes() as live:
        wan_vae.decode(vae, z.to("meta"))
    work = VaeWork.of(checkpoint, itemsize=dtype.itemsize)
    # The second of two latent frames finds less that is kept of the first.
    assert decode_bytes(work, latents, height, width) == pytest.approx(live.peak, rel=0.07 if latents == 2 else 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("frames", [1, 9, 33])
def test_encoding_takes_what_is_alive(checkpoint, dtype, frames, monkeypatch) -> None:
    vae, pixels = vae_on_meta(checkpoint, monkeypatch, dtype), torch.empty(1, 3, frames, 320, 256, device="meta")
    with LiveBytes() as live:
        wan_vae.encode(vae, pixels)
    copied = 0 if dtype == torch.float32 else pixels.numel() * dtype.itemsize
    work = VaeWork.of(checkpoint, itemsize=dtype.itemsize)
    wanted = live.peak + pixels.numel() * dtype.itemsize - copied
    assert encode_bytes(work, frames, 320, 256) == pytest.approx(wanted, rel=0.02)


def test_five_frames_take_a_little_less_than_is_said(checkpoint, monkeypatch) -> None:
    vae, pixels = vae_on_meta(checkpoint, monkeypatch, torch.bfloat16), torch.empty(1, 3, 5, 256, 256, device="meta")
    with LiveBytes() as live:
        wan_vae.encode(vae, pixels)
    said = encode_bytes(VaeWork.of(checkpoint, itemsize=2), 5, 256, 256)
    assert 0.8 * said < live.peak < said


def test_a_clip_takes_little_more_than_half_with_its_cache_in_ram(checkpoint, monkeypatch) -> None:
    vae = vae_on_meta(checkpoint, monkeypatch, torch.bfloat16, cache_on_cpu=True)
    with LiveBytes() as live:
        wan_vae.decode(vae, torch.empty(1, 16, 5, 32, 48, device="meta"))
    work, plain = (VaeWork.of(checkpoint, itemsize=2, cache_on_cpu=in_ram) for in_ram in (True, False))
    said = decode_bytes(work, 5, 256, 384)
    assert said == pytest.approx(live.peak, rel=0.02)
    assert said < 0.6 * decode_bytes(plain, 5, 256, 384)
    assert decode_bytes(work, 1, 256, 384) == decode_bytes(plain, 1, 256, 384)


def test_other_dimensions(monkeypatch) -> None:
    settings = {"base_dim": 32, "dim_mult": [1, 2, 3], "num_res_blocks": 1, "temperal_downsample": [True, False]}
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in AutoencoderKLWan(**settings).state_dict().items()}
    checkpoint = described("--vae", shapes, "F32")
    vae = vae_on_meta(checkpoint, monkeypatch, torch.float32)
    with LiveBytes() as live:
        wan_vae.decode(vae, torch.empty(1, 16, 5, 64, 64, device="meta"))
    assert decode_bytes(VaeWork.of(checkpoint, itemsize=4), 5, 256, 256) > 0.85 * live.peak


@pytest.fixture(scope="module")
def umt5() -> Checkpoint:
    """The published one."""
    shapes = {text_encoder._transformers_name(name): shape for name, shape in published_shapes("wan_umt5").items()}
    return described("--t5", shapes, "BF16")


def test_weights_are_as_large_as_published(checkpoint, umt5) -> None:
    numbers, rows = 5_680_910_336, 256384 * 4096
    assert t5_weights(umt5, itemsize=2, fp8=False) == 2 * numbers
    assert t5_weights(umt5, itemsize=2, fp8=True) == pytest.approx(2 * rows + (numbers - rows) * (1 + 2 / 64), rel=1e-3)
    assert whole_weights(checkpoint, itemsize=4) == 4 * 126_892_531


@pytest.mark.parametrize("num_tokens", [60, 512])
def test_reading_a_prompt_takes_what_is_alive(umt5, num_tokens: int, monkeypatch) -> None:
    use_fused_kernels(monkeypatch)
    shapes = {n: s for n, s in umt5.shapes.items() if not n.startswith("block.") or int(n.split(".")[1]) < 2}
    model = text_encoder.build_t5(described("--t5", shapes, "BF16")).to(torch.bfloat16)
    with torch.no_grad(), LiveBytes() as live:
        model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long, device="meta"))
    plain, eight = (t5_work(umt5, num_tokens, itemsize=2, fp8=fp8) for fp8 in (False, True))
    assert plain == pytest.approx(live.peak, rel=0.06) and eight - plain == 4096 * 10240 * (2 + 4)
