"""The small Wan models: official layouts, the same bytes every time, and outputs that depend on every input."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoTokenizer

import demo.wan_models
from common.weights import open_checkpoint
from demo.material import Material
from demo.wan_layouts import clip_shapes, t5_shapes, vae_shapes
from demo.wan_models import TRANSFORMERS, WanModelPaths, build_wan_models
from tests.published import published_shapes, published_wan
from wan import image_encoder, text_encoder
from wan import vae as wan_vae
from wan.config import Kind, WanConfig
from wan.loading import load_transformer, open_transformer
from wan.model import Conditioning

JAPANESE = "猫が窓の外を見ています 🐈"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> WanModelPaths:
    return build_wan_models(tmp_path_factory.mktemp("wan") / "\u30e2\u30c7\u30eb")


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# The files


def test_the_layouts_at_their_published_sizes() -> None:
    t5 = t5_shapes(vocabulary=256384, width=4096, inner=4096, mlp=10240, heads=64, blocks=24)
    clip = clip_shapes(width=1280, mlp=5120, blocks=32, head=1024)
    for found, name in ((vae_shapes(96), "wan_vae"), (t5, "wan_umt5"), (clip, "wan_clip")):
        published = {key: tuple(shape) for key, shape in published_shapes(name).items()}
        # The text half of CLIP is not used.
        assert found == {k: shape for k, shape in published.items() if not k.startswith(("textual.", "log_scale"))}


def test_files_are_of_the_published_types(models: WanModelPaths) -> None:
    types = {"dit": "BF16", "vae": "float32", "t5": "bfloat16", "clip": "F16"}
    for name, dtype in types.items():
        checkpoint = open_checkpoint(getattr(models, name), flag=f"--{name}")
        assert {info.dtype for info in checkpoint.tensors.values()} == {dtype}


def test_building_twice_gives_the_same_bytes_and_another_seed_others(models: WanModelPaths, tmp_path: Path) -> None:
    first = hashes(models.vae.parent)
    assert hashes(build_wan_models(tmp_path / "again").dit.parent) == first
    other = hashes(build_wan_models(tmp_path / "other", seed=9).dit.parent)
    assert all(other[name] != first[name] for name in first if not name.startswith("google"))


def test_building_leaves_the_random_state_of_the_caller(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    build_wan_models(tmp_path / "models")
    assert torch.equal(torch.get_rng_state(), before)


def test_models_of_the_same_recipe_are_kept_and_of_another_are_rebuilt(tmp_path: Path, monkeypatch) -> None:
    built = []
    build = demo.wan_models._build
    monkeypatch.setattr(demo.wan_models, "_build", lambda *given: (built.append(given), build(*given)))
    build_wan_models(tmp_path / "models")
    build_wan_models(tmp_path / "models", kind="t2v")
    assert len(built) == 1
    build_wan_models(tmp_path / "models", seed=1)
    monkeypatch.setattr(demo.wan_models, "_recipe", lambda: "another")
    build_wan_models(tmp_path / "models", seed=1)
    assert len(built) == 3


def test_all_of_it_is_small(models: WanModelPaths) -> None:
    files = [path for path in models.vae.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16e6
    assert {file.name for file in files} >= {path.name for path in (models.dit, models.vae, models.t5, models.clip)}


# Encoders


def test_the_tokenizer_ends_with_its_end_token_and_pads_with_0(models: WanModelPaths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.t5_tokenizer)
    ids = tokenizer("a cat", padding="max_length", max_length=9).input_ids
    assert ids[-1] == tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 1 and ids.count(1) == 1
    assert len(tokenizer("cat, " * 900, truncation=True, max_length=512).input_ids) == 512
    assert tokenizer.decode(tokenizer(JAPANESE, add_special_tokens=False).input_ids) == JAPANESE


def test_prompts_become_rows_of_their_own(models: WanModelPaths) -> None:
    checkpoint = text_encoder.open_t5(models.t5)
    assert Path(text_encoder.find_tokenizer(given=None, checkpoint=checkpoint)) == models.t5_tokenizer
    tokenizer = text_encoder.load_tokenizer(given=str(models.t5_tokenizer), checkpoint=checkpoint)
    model = text_encoder.load_t5(checkpoint, dtype=torch.float32, device="cpu")
    cat, girl = (text_encoder.encode_t5(model, tokenizer, text) for text in ("a cat walks", f"a girl walks {JAPANESE}"))
    assert cat.shape[1] == girl.shape[1] == demo.wan_models.TEXT_WIDTH and len(cat) < len(girl)
    assert 0.1 < cat.std() < 10 and (cat[0] - girl[0]).std() > 0.05 * cat.std()


def test_pictures_become_features_of_their_own(models: WanModelPaths, material: Material) -> None:
    checkpoint = image_encoder.open_clip(models.clip)
    model = image_encoder.load_clip(checkpoint, dtype=torch.float32, device="cpu")
    pictures = [np.array(Image.open(path).convert("RGB")) for path in (material.chelsea, material.astronaut)]
    features = image_encoder.encode_pictures(model, pictures)
    assert features.shape == (2, 257, demo.wan_models.IMAGE_WIDTH)
    assert 0.1 < features.std() < 10 and (features[0] - features[1]).std() > 0.05 * features.std()


# The VAE


@pytest.fixture(scope="module")
def vae(models: WanModelPaths):
    return wan_vae.load_vae(wan_vae.open_vae(models.vae), dtype=torch.float32, device="cpu")


def clip_of(path: Path, frames: int) -> torch.Tensor:
    """A picture that moves to the right by 8 pixels a frame, (1, 3, F, 128, 128)."""
    picture = np.array(ImageOps.fit(Image.open(path).convert("RGB"), (128, 128)))
    moved = np.stack([np.roll(picture, 8 * i, axis=1) for i in range(frames)])
    return torch.from_numpy(moved).permute(3, 0, 1, 2)[None] / 127.5 - 1


@pytest.mark.parametrize("frames", [1, 9])
def test_pictures_and_clips_survive_the_vae_neither_flat_nor_saturated(vae, material: Material, frames: int) -> None:
    pixels = clip_of(material.chelsea, frames)
    latents = wan_vae.encode(vae, pixels)
    decoded = wan_vae.decode(vae, latents)
    assert (latents.std(dim=(0, 2, 3, 4)) > 0.1).all() and latents.std() < 2
    assert (decoded.abs() == 1).float().mean() < 0.1
    for frame in (0, frames - 1):
        both = torch.stack([clip[:, :, frame].mean(dim=1).flatten() for clip in (pixels, decoded)])
        assert torch.corrcoef(both)[0, 1] > 0.75


def test_every_latent_channel_matters(vae) -> None:
    latents = torch.randn(1, 16, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    before = wan_vae.decode(vae, latents)
    assert before.std() > 0.1 and (before.abs() == 1).float().mean() < 0.1
    for channel in range(16):
        changed = latents.clone()
        changed[:, channel] *= -1
        assert (wan_vae.decode(vae, changed) - before).abs().max() > 1e-3, channel


# Transformers


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_of_every_kind(models: WanModelPaths, kind: Kind) -> None:
    paths = models.for_kind(kind)
    assert paths == build_wan_models(models.vae.parent, kind=kind) and paths.dit.is_file()
    checkpoint = open_transformer(str(paths.dit))
    sizes = {"t2v": "t2v_1.3B", "i2v": "i2v_14B", "flf2v": "flf2v_14B", "fun_control": "fun_control_1.3B"}
    published = published_wan(sizes[kind])
    first = {name for name in published if not name.startswith("blocks.") or name.startswith("blocks.0.")}
    assert {name for name in checkpoint.tensors if not name.startswith(("blocks.1.", "blocks.2."))} == first
    config = WanConfig.from_checkpoint(checkpoint)
    assert config.kind == kind and config.in_channels == published["patch_embedding.weight"][1]


@torch.no_grad()
def test_every_input_of_a_transformer_matters(models: WanModelPaths) -> None:
    checkpoint = open_transformer(str(models.for_kind("flf2v").dit))
    model = load_transformer(checkpoint, dtype=torch.float32, device="cpu")

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))

    inputs = {
        "latents": random(1, 20, 3, 8, 8),
        "text": random(1, 12, demo.wan_models.TEXT_WIDTH),
        "text_lengths": torch.tensor([10]),
        "image": random(1, 514, demo.wan_models.IMAGE_WIDTH),
        "indices": torch.tensor([[0, 1, 9]]),
    }
    others = {"text_lengths": torch.tensor([7]), "indices": torch.tensor([[0, 1, 14]])}
    noisy, timesteps = random(1, 16, 3, 8, 8), torch.tensor([700.0])
    before = model(noisy, timesteps, Conditioning(**inputs))
    assert 0.1 < before.std() < 10
    for name, tensor in inputs.items():
        changed = {**inputs, name: others.get(name, tensor * 0.5)}
        assert (model(noisy, timesteps, Conditioning(**changed)) - before).std() > 1e-4 * before.std(), name
    for given in ((noisy * 0.5, timesteps), (noisy, timesteps - 400)):
        assert (model(*given, Conditioning(**inputs)) - before).std() > 1e-2 * before.std()
