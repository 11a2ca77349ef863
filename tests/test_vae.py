"""The VAE against diffusers' plain one: nothing that saves memory may change the result."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as plain
from safetensors.torch import save_file

from common.weights import Checkpoint, TensorInfo, check_names_and_shapes, empty_module
from hunyuan_model import vae as ours
from options.errors import UserError

SCALE = 0.476986
WIDTHS = (32, 32, 32, 64)


def plain_vae() -> AutoencoderKLHunyuanVideo:
    """Random weights, norms too, the same on every call; the flags under which it equals the official code."""
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(block_out_channels=WIDTHS, layers_per_block=1, latent_channels=16).eval()
    for parameter in vae.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def reference() -> AutoencoderKLHunyuanVideo:
    return plain_vae()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, reference: AutoencoderKLHunyuanVideo) -> Path:
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(reference.state_dict(), path)
    return path


def load(path: Path, **options) -> AutoencoderKLHunyuanVideo:
    return ours.load_vae(ours.open_vae(path), dtype=torch.float32, device="cpu", **options)


def pixels(frames: int, height: int = 16, width: int = 32) -> torch.Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(frames: int, height: int = 2, width: int = 4) -> torch.Tensor:
    return torch.randn(1, 16, frames, height, width, generator=torch.Generator().manual_seed(2))


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("chunk_size", [None, 8])
@pytest.mark.parametrize("frames", [1, 5, 21])
def test_equals_diffusers_without_ever_building_a_mask(
    reference, file: Path, monkeypatch: pytest.MonkeyPatch, frames: int, chunk_size: int | None
) -> None:
    wanted_latents = reference.encode(pixels(frames)).latent_dist.mean * SCALE
    wanted_pixels = reference.decode(latents((frames - 1) // 4 + 1) / SCALE).sample

    def no_mask(*_, **__):
        raise AssertionError("a mask over all pixels was built")

    monkeypatch.setattr(plain, "prepare_causal_attention_mask", no_mask)
    vae = load(file, chunk_size=chunk_size)
    assert_close(ours.encode(vae, pixels(frames)), wanted_latents)
    assert_close(ours.decode(vae, latents((frames - 1) // 4 + 1)), wanted_pixels)
    with pytest.raises(AssertionError, match="mask"):
        reference.encode(pixels(1))


def test_the_middle_block_alone(reference) -> None:
    block = reference.encoder.mid_block
    hidden = torch.randn(2, WIDTHS[-1], 6, 5, 7, generator=torch.Generator().manual_seed(3)) * 3
    assert_close(ours.CausalMidBlock(block)(hidden), block(hidden))


def test_a_frame_does_not_see_later_frames_in_attention(reference) -> None:
    attention = reference.decoder.mid_block.attentions[0]
    hidden = torch.randn(1, WIDTHS[-1], 4, 3, 3, generator=torch.Generator().manual_seed(4))
    changed = hidden.clone()
    changed[:, :, 3] += 1
    norm, attention.group_norm = attention.group_norm, torch.nn.Identity()  # its statistics are over all frames
    try:
        before, after = (ours._attend_causally(attention, h) for h in (hidden, changed))
    finally:
        attention.group_norm = norm
    assert torch.equal(before[:, :, :3], after[:, :, :3]) and not torch.equal(before[:, :, 3], after[:, :, 3])


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, (1, 2, 2)), (3, (2, 2, 2)), (3, (2, 1, 1)), (1, 1)])
@pytest.mark.parametrize("width", [24, 37, 64])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 24])
def test_chunked_convolution(monkeypatch, kernel: int, stride, width: int, chunk_size: int) -> None:
    torch.manual_seed(width)
    conv = plain.HunyuanVideoCausalConv3d(4, 6, kernel, stride)
    hidden = torch.randn(2, 4, 5, 6, width)
    with torch.no_grad():
        wanted = conv(hidden)
        widths, pad = [], F.pad
        monkeypatch.setattr(ours.F, "pad", lambda x, *a, **k: (widths.append(x.shape[-1]), pad(x, *a, **k))[1])
        found = ours._convolve_in_chunks(conv, hidden, chunk_size=chunk_size)
    assert found.shape == wanted.shape and (found - wanted).abs().max() <= 1e-6
    if width >= 1.5 * chunk_size:
        assert max(widths) <= chunk_size + 2 and len(widths) > 1  # never the whole input
    else:
        assert widths == [width]


@pytest.mark.parametrize(("height", "width", "chunk_size"), [(40, 56, None), (48, 24, 16), (32, 32, None)])
def test_tiles_equal_diffusers_tiles(file: Path, height: int, width: int, chunk_size: int | None) -> None:
    tiled = plain_vae()
    tiled.enable_tiling(32, 32, tile_sample_stride_height=24, tile_sample_stride_width=24)
    vae = load(file, tile_size=32, chunk_size=chunk_size)
    wanted = tiled.encode(pixels(1, height, width)).latent_dist.mean * SCALE
    assert_close(ours.encode(vae, pixels(1, height, width)), wanted)
    z = latents(1, height // 8, width // 8)
    assert_close(ours.decode(vae, z), tiled.decode(z / SCALE).sample)


def test_tiles_are_used_only_when_asked_for(reference, file: Path) -> None:
    z = latents(1, 36, 1)  # 288 pixels, more than diffusers' default tile
    assert_close(ours.decode(load(file), z), reference.decode(z / SCALE).sample)


def test_encoding_is_deterministic(file: Path) -> None:
    vae = load(file)
    assert torch.equal(ours.encode(vae, pixels(1)), ours.encode(vae, pixels(1)))


def test_types(file: Path) -> None:
    vae = ours.load_vae(ours.open_vae(file), dtype=torch.bfloat16, device="cpu", chunk_size=16)
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.bfloat16}
    encoded = ours.encode(vae, pixels(5))
    decoded = ours.decode(vae, latents(2))
    assert encoded.dtype == decoded.dtype == torch.float32
    assert encoded.shape == (1, 16, 2, 2, 4) and decoded.shape == (1, 3, 5, 16, 32)
    assert not encoded.requires_grad and not decoded.requires_grad


def as_folder(folder: Path, tensors: dict) -> Path:
    (folder / "vae").mkdir()
    save_file(tensors, folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


def as_official(folder: Path, tensors: dict) -> Path:
    content = {f"vae.{name}": tensor for name, tensor in tensors.items()} | {"loss.logvar": torch.zeros(1)}
    torch.save({"state_dict": content}, folder / "\u91cd\u307f.pt")
    return folder / "\u91cd\u307f.pt"


def as_plain_pickle(folder: Path, tensors: dict) -> Path:
    torch.save(tensors, folder / "pytorch_model.pt")
    return folder / "pytorch_model.pt"


def as_prefixed_file(folder: Path, tensors: dict) -> Path:
    save_file({f"vae.{name}": tensor for name, tensor in tensors.items()}, folder / "hunyuan.safetensors")
    return folder / "hunyuan.safetensors"


@pytest.mark.parametrize("memmap", [True, False])
@pytest.mark.parametrize("form", [as_folder, as_official, as_plain_pickle, as_prefixed_file])
def test_forms(reference, tmp_path: Path, form: Callable[[Path, dict], Path], memmap: bool) -> None:
    path = form(tmp_path, reference.state_dict())
    vae = ours.load_vae(ours.open_vae(path, memmap=memmap), dtype=torch.float32, device="cpu")
    assert vae.state_dict().keys() == reference.state_dict().keys()
    assert_close(ours.decode(vae, latents(1)), reference.decode(latents(1) / SCALE).sample)


def test_the_published_size(tmp_path: Path) -> None:
    with torch.device("meta"):
        published = AutoencoderKLHunyuanVideo().state_dict()
    assert len(published) == 248
    infos = {k: TensorInfo(file=tmp_path, key=k, dtype="F16", shape=tuple(t.shape)) for k, t in published.items()}
    checkpoint = Checkpoint(flag="--vae", path=tmp_path, files=(), tensors=infos, config={})
    vae = empty_module(lambda: ours._build(checkpoint))
    check_names_and_shapes(vae, checkpoint)
    assert vae.config.block_out_channels == (128, 256, 512, 512) and vae.config.layers_per_block == 2


def rewrite(reference, folder: Path, **changes: torch.Tensor | None) -> Path:
    tensors = reference.state_dict() | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "vae.safetensors")
    return folder / "vae.safetensors"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("quant_conv.bias", None, r"no quant_conv\.bias \(1 missing of"),
        ("post_quant_conv.weight", None, r"179 tensors without post_quant_conv\.weight"),
        ("encoder.down_blocks.1.resnets.0.norm1.bias", None, r"no encoder\.down_blocks\.1\.resnets\.0\.norm1\.bias"),
        ("quant_conv.scale", torch.zeros(1), r"1 unexpected tensors, quant_conv\.scale first"),
        ("quant_conv.weight", torch.zeros(32, 16, 1, 1, 1), r"quant_conv\.weight of shape \(32, 16, 1, 1, 1\)"),
        ("post_quant_conv.weight", torch.zeros(16), r"post_quant_conv\.weight of shape \(16,\); expected 5 dimensions"),
        ("encoder.down_blocks.0.resnets.0.conv1.conv.weight", torch.zeros(33, 32, 3, 3, 3), "shapes that do not fit"),
    ],
)
def test_broken_files(reference, tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=rf"--vae .*vae\.safetensors: got {message}"):
        load(rewrite(reference, tmp_path, **{name: tensor}))


def test_another_models_file(tmp_path: Path) -> None:
    names = ("clean_x_embedder.proj.weight", "transformer_blocks.0.attn.to_q.weight")
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "dit.safetensors")
    with pytest.raises(UserError, match="a FramePack transformer; expected a HunyuanVideo VAE; .* to --dit"):
        ours.open_vae(tmp_path / "dit.safetensors")
    with pytest.raises(UserError, match="^--other: "):
        ours.open_vae(tmp_path / "dit.safetensors", flag="--other")


def test_a_truncated_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "vae.safetensors").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="--vae: .*truncated"):
        ours.open_vae(tmp_path / "vae.safetensors")
