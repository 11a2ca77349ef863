"""The VAE against diffusers' class, fed by diffusers' own converter of the official file."""

import math
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file

from common.weights import check_names_and_shapes
from options.errors import UserError
from tests.published import described, published_shapes
from wan import vae as ours

PUBLISHED_BASE, BASE = 96, 8
# As published, in the order of the latent channels.
MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
MEAN += [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
STD += [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]


def official_vae(latent_channels: int = 16) -> dict[str, torch.Tensor]:
    """Random weights under the official names, at a twelfth of the published width."""
    torch.manual_seed(0)

    def small(size: int) -> int:
        if size % PUBLISHED_BASE == 0:
            return size * BASE // PUBLISHED_BASE
        return size * latent_channels // 16 if size in (16, 32) else size

    shapes = {name: [small(size) for size in shape] for name, shape in published_shapes("wan_vae").items()}
    return {name: random_tensor(name, shape) for name, shape in shapes.items()}


def random_tensor(name: str, shape: list[int]) -> torch.Tensor:
    if name.endswith("gamma"):
        return 1 + 0.2 * torch.randn(shape)
    if name.endswith("bias"):
        return 0.1 * torch.randn(shape)
    return torch.randn(shape) / math.prod(shape[1:]) ** 0.5


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return official_vae()


@pytest.fixture(scope="module")
def reference(official: dict[str, torch.Tensor]) -> AutoencoderKLWan:
    vae = AutoencoderKLWan(base_dim=BASE).eval().requires_grad_(False)
    vae.load_state_dict(convert_wan_vae_to_diffusers(dict(official)))
    return vae


@pytest.fixture(scope="module")
def file(official: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_official_file(tmp_path_factory.mktemp("vae"), official)


def load(path: Path, **options) -> AutoencoderKLWan:
    return ours.load_vae(ours.open_vae(path), dtype=torch.float32, device="cpu", **options)


def pixels(frames: int, height: int = 16, width: int = 24, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(frames: int, height: int = 2, width: int = 3, channels: int = 16, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, frames, height, width, generator=torch.Generator().manual_seed(2))


def column(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers).view(1, -1, 1, 1, 1)


def wanted_latents(reference: AutoencoderKLWan, frames: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return (reference.encode(frames).latent_dist.mean - column(MEAN)) / column(STD)


def wanted_pixels(reference: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return reference.decode(z * column(STD) + column(MEAN)).sample.clamp(-1, 1)


# Equal to diffusers, with and without what saves memory


@pytest.mark.parametrize("cache_on_cpu", [False, True])
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_equals_diffusers_exactly(reference, file: Path, frames: int, cache_on_cpu: bool) -> None:
    vae = load(file, cache_on_cpu=cache_on_cpu)
    encoded = ours.encode(vae, pixels(frames, batch=2))
    assert torch.equal(encoded, wanted_latents(reference, pixels(frames, batch=2)))
    num_latents = (frames - 1) // 4 + 1
    assert encoded.shape == (2, 16, num_latents, 2, 3) and not encoded.requires_grad
    decoded = ours.decode(vae, latents(num_latents, batch=2))
    assert torch.equal(decoded, wanted_pixels(reference, latents(num_latents, batch=2)))
    assert decoded.shape == (2, 3, frames, 16, 24) and not decoded.requires_grad


def test_a_clip_is_not_a_row_of_pictures(file: Path) -> None:
    """Else the comparisons above would say nothing about what is remembered of earlier frames."""
    vae = load(file)
    together, alone = ours.decode(vae, latents(2))[:, :, 1:], ours.decode(vae, latents(2)[:, :, 1:])
    assert (together[:, :, -1] - alone[:, :, 0]).abs().max() > 0.01


def test_pixels_are_clamped(file: Path) -> None:
    decoded = ours.decode(load(file), latents(1) * 100)
    assert decoded.abs().max() == 1 and (decoded.abs() < 1).any()


def test_features_wait_in_ram_and_are_lent_once_between_two_writings() -> None:
    moves = []

    class OnDevice(torch.Tensor):
        def to(self, place: object) -> torch.Tensor:
            moves.append(place)
            return torch.ones(2)

    features = ours.FeaturesInRam([None, None], torch.device("meta"))  # stands in for a GPU
    assert features[0] is None
    features[0], features[1] = "Rep", torch.zeros(2).as_subclass(OnDevice)
    assert features[0] == "Rep" and moves == ["cpu"] and type(list.__getitem__(features, 1)) is torch.Tensor
    lent = features[1]
    assert lent.device.type == "meta" and features[1] is lent
    gone = weakref.ref(lent)
    features[0] = torch.zeros(2)
    del lent
    assert gone() is None  # else it would stay on the device until the end of the clip
    assert features[0].shape == features[1].shape == (2,)


@pytest.mark.parametrize("cache_on_cpu", [False, True])
def test_features_are_put_into_ram_where_that_is_asked_for(file: Path, monkeypatch, cache_on_cpu: bool) -> None:
    made = []

    class Watched(ours.FeaturesInRam):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(ours, "FeaturesInRam", Watched)
    vae = load(file, cache_on_cpu=cache_on_cpu)
    ours.encode(vae, pixels(5))
    ours.decode(vae, latents(2))
    assert [sum(isinstance(entry, torch.Tensor) for entry in list(memory)) for memory in made] == (
        [24, 32] if cache_on_cpu else []
    )


def test_a_single_picture_leaves_no_features_behind(file: Path, monkeypatch) -> None:
    def no_features(*_) -> None:
        raise AssertionError("features of a single picture were kept")

    monkeypatch.setattr(ours, "FeaturesInRam", no_features)
    vae = load(file, cache_on_cpu=True)
    ours.decode(vae, ours.encode(vae, pixels(1)))


def test_types(file: Path) -> None:
    vae = ours.load_vae(ours.open_vae(file), dtype=torch.bfloat16, device="cpu")
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.bfloat16}
    encoded, decoded = ours.encode(vae, pixels(5)), ours.decode(vae, latents(2))
    assert encoded.dtype == decoded.dtype == torch.float32
    # The normalisation is not rounded: only the posterior's mean is.
    raw = encoded * column(STD) + column(MEAN)
    assert (raw - raw.bfloat16().float()).abs().max() < 1e-5


# Names


def test_every_published_name_becomes_what_diffusers_makes_of_it() -> None:
    published = {name: torch.empty(shape, device="meta") for name, shape in published_shapes("wan_vae").items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in convert_wan_vae_to_diffusers(published).items()}
    found = {ours._diffusers_name(name, block_length=4): tuple(tensor.shape) for name, tensor in published.items()}
    assert found == wanted and len(found) == 194


def as_official_file(folder: Path, tensors: dict) -> Path:
    save_file(tensors, folder / "wan_2.1_vae.safetensors")
    return folder / "wan_2.1_vae.safetensors"


def as_official_pickle(folder: Path, tensors: dict) -> Path:
    torch.save(tensors, folder / "\u91cd\u307f Wan2.1_VAE.pth")
    return folder / "\u91cd\u307f Wan2.1_VAE.pth"


def as_prefixed_file(folder: Path, tensors: dict) -> Path:
    return as_official_file(folder, {f"model.{name}": tensor for name, tensor in tensors.items()})


def as_diffusers_snapshot(folder: Path, tensors: dict) -> Path:
    (folder / "vae").mkdir()
    save_file(convert_wan_vae_to_diffusers(tensors), folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


def as_diffusers_file(folder: Path, tensors: dict) -> Path:
    return as_diffusers_snapshot(folder, tensors) / "vae" / "diffusion_pytorch_model.safetensors"


FORMS = [as_official_file, as_official_pickle, as_prefixed_file, as_diffusers_snapshot, as_diffusers_file]


@pytest.mark.parametrize("memmap", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_forms(official, reference, tmp_path: Path, form: Callable[[Path, dict], Path], memmap: bool) -> None:
    checkpoint = ours.open_vae(form(tmp_path, dict(official)), memmap=memmap)
    assert set(checkpoint.tensors) == set(reference.state_dict())
    vae = ours.load_vae(checkpoint, dtype=torch.float32, device="cpu")
    assert torch.equal(ours.decode(vae, latents(1)), wanted_pixels(reference, latents(1)))


# Dimensions


def test_the_published_size() -> None:
    shapes = {ours._diffusers_name(n, block_length=4): s for n, s in published_shapes("wan_vae").items()}
    checkpoint = described("--vae", shapes, "BF16")
    vae = ours.build_vae(checkpoint)
    check_names_and_shapes(vae, checkpoint)
    with torch.device("meta"):
        plain = AutoencoderKLWan()
    ours_config, wanted = ({k: v for k, v in m.config.items() if k[0] != "_"} for m in (vae, plain))
    assert ours_config == {**wanted, "decoder_base_dim": 96}


@pytest.mark.parametrize(
    "settings",
    [
        {"dim_mult": [1, 2, 2], "temperal_downsample": [True, False]},
        {"dim_mult": [2, 3, 4, 4, 4], "temperal_downsample": [False, True, False, True]},
        {"num_res_blocks": 1},
        {"num_res_blocks": 3, "decoder_base_dim": 12},
        {"z_dim": 4, "latents_mean": [0.5] * 4, "latents_std": [2.0, 3.0, 4.0, 5.0]},
    ],
)
def test_dimensions_come_from_shapes_and_statistics_from_the_config(tmp_path: Path, settings: dict) -> None:
    torch.manual_seed(0)
    whole = AutoencoderKLWan(base_dim=BASE, **settings).eval().requires_grad_(False)
    whole.save_pretrained(tmp_path / "vae")
    vae = load(tmp_path)
    z = latents(3, channels=settings.get("z_dim", 16))
    mean, deviation = column(whole.config.latents_mean), column(whole.config.latents_std)
    assert torch.equal(ours.decode(vae, z), whole.decode(z * deviation + mean).sample)
    frames = pixels(9, 32, 32)
    assert torch.equal(ours.encode(vae, frames), (whole.encode(frames).latent_dist.mean - mean) / deviation)


def test_latents_of_another_width_without_a_config_are_not_normalised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = AutoencoderKLWan(base_dim=BASE, z_dim=4).eval().requires_grad_(False)
    save_file(whole.state_dict(), tmp_path / "vae.safetensors")
    encoded = ours.encode(load(tmp_path / "vae.safetensors"), pixels(1))
    assert torch.equal(encoded, whole.encode(pixels(1)).latent_dist.mean)


# Wrong files


def rewrite(official, folder: Path, **changes: torch.Tensor | None) -> Path:
    tensors = official | changes
    return as_official_file(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("conv1.bias", None, r"no quant_conv\.bias \(1 missing of 194\)"),
        ("conv2.weight", None, r"193 tensors without post_quant_conv\.weight"),
        ("decoder.upsamples.6.residual.3.gamma", None, r"no decoder\.up_blocks\.1\.resnets\.2\.norm2\.gamma"),
        ("decoder.scale", torch.zeros(1), r"1 unexpected tensors, decoder\.scale first"),
        ("conv2.weight", torch.zeros(16), r"post_quant_conv\.weight of shape \(16,\); expected 5 dimensions"),
        ("encoder.head.0.gamma", torch.ones(9, 1, 1, 1), r"encoder\.norm_out\.gamma of shape \(9, 1, 1, 1\)"),
        ("encoder.conv1.weight", torch.zeros(0, 3, 3, 3, 3), "shapes that do not fit together"),
    ],
)
def test_broken_files(official, tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=rf"--vae .*wan_2\.1_vae\.safetensors: got {message}"):
        load(rewrite(official, tmp_path, **{name: tensor}))


def test_wan22_is_refused_in_both_layouts(tmp_path: Path) -> None:
    with torch.device("meta"):
        published = {"base_dim": 16, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12}
        names = list(AutoencoderKLWan(**published, patch_size=2).state_dict())
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "diffusers.safetensors")
    names = ("encoder.conv1.weight", "encoder.downsamples.0.downsamples.0.residual.2.weight", "conv2.weight")
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "official.safetensors")
    for name in ("diffusers", "official"):
        with pytest.raises(UserError, match="a Wan2.2 VAE; expected a Wan VAE; not supported: Wan2.1 only"):
            ours.open_vae(tmp_path / f"{name}.safetensors")


def test_another_models_file(tmp_path: Path) -> None:
    names = ("blocks.0.cross_attn.k.weight", "time_projection.1.weight")
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "dit.safetensors")
    with pytest.raises(UserError, match="^--other: .* a Wan transformer; expected a Wan VAE; .* belongs to --dit"):
        ours.open_vae(tmp_path / "dit.safetensors", flag="--other")
