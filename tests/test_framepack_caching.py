"""FramePack's latent caches against diffusers' VAE and transformers' SigLIP, called directly."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from PIL import Image
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from common.media import Picture, load_picture
from dataset.cache_files import cache_header, latent_metadata, read_cache, write_cache
from dataset.config import ImageDataset, VideoDataset
from dataset.crops import Crop
from dataset.jobs import Job, Sample, Unit
from dataset.sources import MediaItem
from frame_pack.cached_context import from_batch
from frame_pack.caching import FramePackCacheRules, FramePackLatentEncoder
from frame_pack.compute import Compute
from frame_pack.image_encoder import load_siglip, open_siglip
from frame_pack.loading import open_models
from frame_pack.pipeline import FramePackPipeline
from frame_pack.sampling import generate_latents
from hunyuan_model.vae import load_vae, open_vae
from options.flags_fpack_generate import FramePackModelFlags
from options.fpack_request import FramePackRequestFlags

SCALE = 0.476986
WIDTH, HEIGHT = 80, 64
W, H = WIDTH // 8, HEIGHT // 8
IMAGE_WIDTH = 144  # of the demo's SigLIP

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def vae(demo_models):
    return load_vae(open_vae(demo_models.vae), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def siglip(demo_models):
    return load_siglip(open_siglip(demo_models.image_encoder), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def direct_latents(demo_models) -> Callable[[np.ndarray], torch.Tensor]:
    """(F, H, W, 3) uint8 → (1, 16, F', h, w), by diffusers alone."""
    model = AutoencoderKLHunyuanVideo.from_pretrained(demo_models.vae / "vae", torch_dtype=torch.float32).eval()
    model.use_framewise_encoding = False

    @torch.no_grad()
    def encode(frames: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        return model.encode(pixels).latent_dist.mean * SCALE

    return encode


@pytest.fixture(scope="module")
def direct_features(demo_models) -> Callable[[np.ndarray], torch.Tensor]:
    """(H, W, 3) uint8 → (729, image_width) float16, by transformers alone."""
    folder = demo_models.image_encoder
    model = SiglipVisionModel.from_pretrained(folder / "image_encoder", dtype=torch.float32).eval()
    processor = SiglipImageProcessorPil.from_pretrained(folder / "feature_extractor")

    @torch.no_grad()
    def encode(image: np.ndarray) -> torch.Tensor:
        inputs = processor(images=Image.fromarray(image), return_tensors="pt")
        return model(**inputs).last_hidden_state[0].half()

    return encode


def job(dataset: ImageDataset | VideoDataset, unit: Unit) -> Job:
    item = MediaItem(where="画像.jsonl line 1", path=Path("画像/猫.png"), caption="a cat")
    return Job(item=item, dataset=dataset, size=(WIDTH, HEIGHT), source_size=(512, 512), units=(unit,))


def images(*indices: int, **changes) -> ImageDataset:
    values = {"fp_1f_target_index": 9, "fp_1f_clean_indices": indices or None}
    return ImageDataset(where="d.toml [datasets][1]", cache_directory=Path("cache"), **(values | changes))


def one_frame_sample(dataset: ImageDataset, target: Picture, *controls: Picture) -> Sample:
    unit = Unit(paths=(Path("cache/猫_0512x0512_fp.safetensors"),), crop=None, num_frames=1, settings={})
    return Sample(job=job(dataset, unit), unit=unit, frames=target.rgb[None], controls=controls, identity={})


def section_sample(num_sections: int, *, window: int, seed: int = 0) -> Sample:
    dataset = VideoDataset(where="d.toml [datasets][1]", cache_directory=Path("cache"), fp_latent_window_size=window)
    num_frames = 4 * num_sections * window + 1
    paths = tuple(Path(f"cache/v_00000-{num_frames:03d}-{i:04d}_0080x0064_fp.safetensors") for i in range(num_sections))
    unit = Unit(paths=paths, crop=Crop(start=0, length=num_frames), num_frames=num_frames, settings={})
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Sample(job=job(dataset, unit), unit=unit, frames=frames, controls=(), identity={})


@pytest.fixture(scope="module")
def pictures(material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Picture]:
    """Photographs as the loader gives them; those called masked have an alpha channel."""
    folder = tmp_path_factory.mktemp("写真")
    names = {"cat": material.chelsea, "face": material.astronaut, "masked_cup": material.coffee_with_alpha}
    for name, path in names.items():
        shutil.copyfile(path, folder / f"{name}.png")
    with Image.open(material.astronaut) as image, Image.open(material.astronaut_mask) as mask:
        image.putalpha(mask.convert("L"))
        image.save(folder / "masked_face.png")
    return {
        path.stem: load_picture(path, width=WIDTH, height=HEIGHT, flag="picture") for path in sorted(folder.iterdir())
    }


def encode_one(vae, siglip, sample: Sample, rules: FramePackCacheRules | None = None) -> Tensors:
    encoder = FramePackLatentEncoder(rules or FramePackCacheRules(mode="one_frame"), vae=vae, siglip=siglip)
    ((tensors,),) = encoder.encode([sample])
    return tensors


def mask_of(picture: Picture) -> torch.Tensor:
    small = Image.fromarray(picture.alpha).resize((W, H), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small, np.float32) / 255)


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def indices(tensors: Tensors) -> dict[str, list[int]]:
    return {name: tensor.tolist() for name, tensor in tensors.items() if name.endswith("indices")}


def has_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(found, wanted)


# ---- one frame ----


ONE_FRAME_TABLE = [
    (
        images(),
        {},
        1,
        {
            "latent_indices": [9],
            "clean_latent_indices": [0, 10],
            "clean_latent_2x_indices": [11, 12],
            "clean_latent_4x_indices": [13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28],
        },
    ),
    (
        images(0, 10, fp_1f_target_index=1, fp_1f_no_post=True),
        {"no_2x": True, "no_4x": True},
        2,
        {"latent_indices": [1], "clean_latent_indices": [0, 10]},
    ),
    (
        images(13, 0, fp_latent_window_size=3),
        {"no_4x": True},
        2,
        {"latent_indices": [9], "clean_latent_indices": [13, 0, 4], "clean_latent_2x_indices": [5, 6]},
    ),
    (
        images(0, 1, fp_latent_window_size=3, fp_1f_no_post=True),
        {"no_2x": True, "window": 5},
        2,
        {
            "latent_indices": [9],
            "clean_latent_indices": [0, 1],
            "clean_latent_4x_indices": [9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24],
        },
    ),
]


@pytest.mark.parametrize(("dataset", "options", "num_controls", "places"), ONE_FRAME_TABLE)
def test_one_frame_caches_have_the_published_contents(
    vae, siglip, pictures, dataset: ImageDataset, options: dict, num_controls: int, places: dict
) -> None:
    controls = [pictures["cat"], pictures["face"]][:num_controls]
    rules = FramePackCacheRules(mode="one_frame", **options)
    tensors = encode_one(vae, siglip, one_frame_sample(dataset, pictures["face"], *controls), rules)
    assert indices(tensors) == places
    num_clean = len(places["clean_latent_indices"])
    assert shapes(tensors) == {name: (len(values),) for name, values in places.items()} | {
        "latents": (16, 1, H, W),
        "latents_clean": (16, num_clean, H, W),
        "image_embeddings": (729, IMAGE_WIDTH),
    }
    assert all(t.dtype == (torch.int64 if "indices" in name else torch.float16) for name, t in tensors.items())
    assert all(t.device.type == "cpu" and not t.requires_grad for t in tensors.values())
    if num_clean > num_controls:
        assert not tensors["latents_clean"][:, -1].any()


def test_a_one_frame_item_equals_a_direct_encode_bit_by_bit(
    vae, siglip, pictures, direct_latents, direct_features
) -> None:
    controls = (pictures["masked_face"], pictures["masked_cup"])
    dataset = images(0, 10, fp_1f_target_index=1, fp_1f_no_post=True)
    tensors = encode_one(vae, siglip, one_frame_sample(dataset, pictures["cat"], *controls))
    assert has_bits(tensors["latents"], direct_latents(pictures["cat"].rgb[None])[0].half())
    masked = [(direct_latents(picture.rgb[None]) * mask_of(picture))[0].half() for picture in controls]
    assert 0 < mask_of(controls[0]).mean() < 1
    assert has_bits(tensors["latents_clean"], torch.cat(masked, dim=1))
    assert has_bits(tensors["image_embeddings"], direct_features(controls[0].rgb))


def test_a_target_has_no_mask(vae, siglip, pictures, direct_latents) -> None:
    masked = pictures["masked_cup"]
    assert masked.alpha is not None
    tensors = encode_one(vae, siglip, one_frame_sample(images(), masked, pictures["cat"]))
    assert has_bits(tensors["latents"], direct_latents(masked.rgb[None])[0].half())


@pytest.mark.parametrize(("source", "name"), [("control", "cat"), ("target", "masked_cup"), (0, "cat"), (1, "face")])
def test_siglip_sees_the_picture_that_is_asked_for(
    vae, siglip, pictures, direct_features, source: str | int, name: str
) -> None:
    dataset = images(0, 10, fp_1f_image_embedding_source=source)
    sample = one_frame_sample(dataset, pictures["masked_cup"], pictures["cat"], pictures["face"])
    tensors = encode_one(vae, siglip, sample)
    assert has_bits(tensors["image_embeddings"], direct_features(pictures[name].rgb))


def assert_close(found: Tensors, wanted: Tensors) -> None:
    """Equal but for what batching changes in the last bit, which may round to the next float16."""
    assert shapes(found) == shapes(wanted)
    for name, tensor in wanted.items():
        assert torch.allclose(found[name].float(), tensor.float(), rtol=2e-3, atol=1e-4), name


def count_calls(monkeypatch: pytest.MonkeyPatch, model) -> list[int]:
    """The batch sizes that a model is called with, filled while it is."""
    sizes: list[int] = []
    name = "encode" if hasattr(model, "encode") else "forward"
    original = getattr(model, name)

    def counted(*pixels, **named):
        sizes.append(len((*pixels, *named.values())[0]))
        return original(*pixels, **named)

    monkeypatch.setattr(model, name, counted)
    return sizes


def test_a_batch_of_images_is_encoded_role_by_role(vae, siglip, pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    cat, face, cup = pictures["cat"], pictures["masked_face"], pictures["masked_cup"]
    other = images(0, 10, fp_1f_image_embedding_source="target")
    samples = [one_frame_sample(images(0, 10), cat, face, cup), one_frame_sample(other, cup, cat, face)]
    alone = [encode_one(vae, siglip, sample) for sample in samples]
    encoder = FramePackLatentEncoder(FramePackCacheRules(mode="one_frame"), vae=vae, siglip=siglip)
    vae_calls, siglip_calls = count_calls(monkeypatch, vae), count_calls(monkeypatch, siglip)
    together = encoder.encode(samples)
    assert vae_calls == [2, 2, 2] and siglip_calls == [2]
    for (found,), wanted in zip(together, alone, strict=True):
        assert_close(found, wanted)
    assert not torch.allclose(alone[0]["latents"], alone[1]["latents"], atol=0.1)


def test_generation_shows_the_transformer_what_the_cache_holds(vae, siglip, demo_models, material, pictures) -> None:
    """The same pictures and options through the generating pipeline, up to the transformer."""
    text = "control_index=10;0,target_index=1,no_4x"
    files = (material.coffee_with_alpha, material.chelsea)
    flags = FramePackRequestFlags(
        prompt="a cat", image_path=str(files[0]), control_image_path=tuple(map(str, files)), one_frame_inference=text,
        video_size=(HEIGHT, WIDTH), latent_window_size=5, infer_steps=1, seed=1,
    )  # fmt: skip
    request = flags.resolve(image_size=lambda path: (WIDTH, HEIGHT))
    models = FramePackModelFlags(**{name: str(path) for name, path in vars(demo_models).items()})
    compute = Compute(device=torch.device("cpu"), transformer_dtype=torch.float32, encoder_dtype=torch.float32)
    with FramePackPipeline(open_models(models), compute).encoder() as encode:
        (cond,) = encode([request])
    shown = ShownContext()
    with pytest.raises(Stop):
        generate_latents(shown, request, cond, lambda progress: None)

    dataset = images(10, 0, fp_1f_target_index=1, fp_latent_window_size=5)
    sample = one_frame_sample(dataset, pictures["face"], pictures["masked_cup"], pictures["cat"])
    rules = FramePackCacheRules(mode="one_frame", no_4x=True)
    tensors = encode_one(vae, siglip, sample, rules)
    cached = from_batch({name: tensor[None] for name, tensor in tensors.items()})
    wanted = shown.conditioning.context
    assert torch.equal(cached.indices, wanted.indices) and cached.clean_4x is wanted.clean_4x is None
    for found, group in ((cached.clean, wanted.clean), (cached.clean_2x, wanted.clean_2x)):
        assert torch.equal(found.indices, group.indices) and has_bits(found.latents, group.latents.half())
    assert has_bits(tensors["image_embeddings"][None], shown.conditioning.image.half())


class Stop(Exception):
    """Enough was seen."""


class ShownContext:
    """A transformer that only remembers what it was shown first."""

    config = type("Config", (), {"latent_channels": 16})
    dtype, device = torch.float32, torch.device("cpu")

    def prepare(self, conditioning, **_):
        self.conditioning = conditioning
        raise Stop


# ---- sections ----


def test_sections_have_the_published_contents(vae, siglip) -> None:
    encoder = FramePackLatentEncoder(FramePackCacheRules(mode="sections"), vae=vae, siglip=siglip)
    ((first, second),) = encoder.encode([section_sample(2, window=9)])
    for tensors in (first, second):
        assert shapes(tensors) == {
            "latents": (16, 9, H, W),
            "latents_clean": (16, 2, H, W),
            "latents_clean_2x": (16, 2, H, W),
            "latents_clean_4x": (16, 16, H, W),
            "latent_indices": (9,),
            "clean_latent_indices": (2,),
            "clean_latent_2x_indices": (2,),
            "clean_latent_4x_indices": (16,),
            "image_embeddings": (729, IMAGE_WIDTH),
        }
        assert all(t.dtype == (torch.int64 if "indices" in name else torch.float16) for name, t in tensors.items())
    assert indices(first) == {
        "latent_indices": [1, 2, 3, 4, 5, 6, 7, 8, 9],
        "clean_latent_indices": [0, 10],
        "clean_latent_2x_indices": [11, 12],
        "clean_latent_4x_indices": [13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28],
    }
    assert second["latent_indices"].tolist() == [10, 11, 12, 13, 14, 15, 16, 17, 18]
    assert second["clean_latent_indices"].tolist() == [0, 19]


def test_section_latents_equal_a_direct_encode_of_the_whole_clip(vae, siglip, direct_latents, direct_features) -> None:
    encoder = FramePackLatentEncoder(FramePackCacheRules(mode="sections"), vae=vae, siglip=siglip)
    sample = section_sample(3, window=2)
    (files,) = encoder.encode([sample])
    clip = direct_latents(sample.frames)[0]
    zeros = torch.zeros(16, 19, H, W)
    for section, tensors in enumerate(files):
        end = 3 + 2 * section
        after = torch.cat([clip[:, end:], zeros], dim=1)
        wanted = {
            "latents": clip[:, end - 2 : end],
            "latents_clean": torch.cat([clip[:, :1], after[:, :1]], dim=1),
            "latents_clean_2x": after[:, 1:3],
            "latents_clean_4x": after[:, 3:19],
        }
        # diffusers builds a mask over all frames where ours goes frame by frame, so the last bit may differ.
        assert_close({name: tensors[name] for name in wanted}, wanted)
        assert has_bits(tensors["image_embeddings"], direct_features(sample.frames[0]))


def test_f1_sections_look_back(vae, siglip, direct_latents) -> None:
    encoder = FramePackLatentEncoder(FramePackCacheRules(mode="f1", window=2), vae=vae, siglip=siglip)
    sample = section_sample(2, window=2)
    ((first, second),) = encoder.encode([sample])
    clip = direct_latents(sample.frames)[0]
    assert indices(second) == {
        "latent_indices": [20, 21],
        "clean_latent_indices": [0, 19],
        "clean_latent_2x_indices": [17, 18],
        "clean_latent_4x_indices": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
    }
    assert indices(first) == indices(second)
    latents = {name: tensor for name, tensor in second.items() if name.startswith("latents")}
    assert_close(
        latents,
        {
            "latents": clip[:, 3:5],
            "latents_clean": clip[:, [0, 2]],
            "latents_clean_2x": clip[:, :2],
            "latents_clean_4x": torch.zeros(16, 16, H, W),
        },
    )
    assert_close({"": first["latents_clean"]}, {"": clip[:, [0, 0]]})


def test_a_batch_of_clips_is_one_call_of_each_model(vae, siglip, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = FramePackLatentEncoder(FramePackCacheRules(mode="sections"), vae=vae, siglip=siglip)
    samples = [section_sample(2, window=1, seed=seed) for seed in (1, 2)]
    alone = [encoder.encode([sample])[0] for sample in samples]
    vae_calls, siglip_calls = count_calls(monkeypatch, vae), count_calls(monkeypatch, siglip)
    together = encoder.encode(samples)
    assert vae_calls == [2] and siglip_calls == [2]
    for found, wanted in zip(together, alone, strict=True):
        for first, second in zip(found, wanted, strict=True):
            assert_close(first, second)


# ---- in files ----


def test_files_have_the_published_keys(vae, siglip, pictures, tmp_path: Path) -> None:
    encoder = FramePackLatentEncoder(FramePackCacheRules(mode="sections"), vae=vae, siglip=siglip)
    ((_, section),) = encoder.encode([section_sample(2, window=1)])
    sample = one_frame_sample(images(), pictures["cat"], pictures["face"])
    one_frame = encode_one(vae, siglip, sample)
    for name, tensors in (("区間", section), ("一枚", one_frame)):
        metadata = latent_metadata("fp", (WIDTH, HEIGHT), {})
        write_cache(tmp_path / f"{name}.safetensors", tensors, main="latents", metadata=metadata)
    common = {
        "latents_1x8x10_float16",
        "latents_clean_1x8x10_float16",
        "latent_indices_int64",
        "clean_latent_indices_int64",
        "clean_latent_2x_indices_int64",
        "clean_latent_4x_indices_int64",
        "image_embeddings_float16",
    }
    histories = {"latents_clean_2x_1x8x10_float16", "latents_clean_4x_1x8x10_float16"}
    assert set(cache_header(tmp_path / "一枚.safetensors").keys.values()) == common
    assert set(cache_header(tmp_path / "区間.safetensors").keys.values()) == common | histories
    stored = read_cache(tmp_path / "区間.safetensors")
    assert stored.keys() == section.keys() and all(has_bits(stored[name], section[name]) for name in section)
