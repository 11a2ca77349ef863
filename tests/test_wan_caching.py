"""Wan's latent caches against diffusers' VAE and transformers' CLIP, called directly."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.media import Picture, load_picture
from common.residency import Resident
from dataset.cache_files import cache_header, latent_metadata, read_cache, write_cache
from dataset.config import ImageDataset, VideoDataset
from dataset.crops import Crop
from dataset.jobs import Job, Sample, Unit
from dataset.sources import MediaItem
from options.wan_request import WanRequestFlags
from options.wan_tasks import find_task
from tests.wan_encoders import WIDTH as IMAGE_WIDTH
from tests.wan_encoders import direct_clip, direct_vae, grey, shown_clip
from wan import text_encoder
from wan.cached_context import features_from_batch, from_batch
from wan.caching import WanCacheRules, WanLatentEncoder
from wan.conditioning import Encoders, WanConditioning, encode_requests
from wan.image_encoder import load_clip, open_clip
from wan.vae import load_vae, open_vae

WIDTH, HEIGHT = 48, 32
W, H = WIDTH // 8, HEIGHT // 8

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def vae(wan_encoders):
    return load_vae(open_vae(wan_encoders.vae), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def clip(wan_encoders):
    return load_clip(open_clip(wan_encoders.clip), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def latents_of(wan_encoders):
    return direct_vae(wan_encoders)


@pytest.fixture(scope="module")
def features_of(wan_encoders):
    return direct_clip(wan_encoders)


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
    paths = sorted(folder.iterdir())
    return {path.stem: load_picture(path, width=WIDTH, height=HEIGHT, flag="picture") for path in paths}


def job(dataset: ImageDataset | VideoDataset, unit: Unit) -> Job:
    item = MediaItem(where="画像.jsonl line 1", path=Path("画像/猫.png"), caption="a cat")
    return Job(item=item, dataset=dataset, size=(WIDTH, HEIGHT), source_size=(512, 512), units=(unit,))


def images(*indices: int, **changes) -> ImageDataset:
    values = {"fp_1f_target_index": 1, "fp_1f_clean_indices": indices or None}
    return ImageDataset(where="d.toml [datasets][1]", cache_directory=Path("cache"), **(values | changes))


def image_sample(dataset: ImageDataset, target: Picture, *controls: Picture, **changes) -> Sample:
    unit = Unit(paths=(Path("cache/猫_0512x0512_wan.safetensors"),), crop=None, num_frames=1, settings={})
    frames = target.rgb[None]
    return Sample(job=job(dataset, unit), unit=unit, frames=frames, controls=controls, identity={}, **changes)


def clip_sample(num_frames: int, *, seed: int = 0, **changes) -> Sample:
    dataset = VideoDataset(where="d.toml [datasets][1]", cache_directory=Path("cache"))
    paths = (Path(f"cache/v_00000-{num_frames:03d}_0048x0032_wan.safetensors"),)
    unit = Unit(paths=paths, crop=Crop(start=0, length=num_frames), num_frames=num_frames, settings={})
    frames = noise(num_frames, seed)
    return Sample(job=job(dataset, unit), unit=unit, frames=frames, controls=(), identity={}, **changes)


def noise(num_frames: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, HEIGHT, WIDTH, 3), dtype=np.uint8)


def mask_of(picture: Picture) -> torch.Tensor:
    small = Image.fromarray(picture.alpha).resize((W, H), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small, np.float32) / 255)


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def dtypes(tensors: Tensors) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in tensors.items()}


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal but for what batching changes in the last bit, which may round to the next bfloat16 or float16."""
    assert found.shape == wanted.shape
    return torch.allclose(found.float(), wanted.float(), rtol=1e-2, atol=1e-3)


def encode(vae, clip, mode: str, *samples: Sample, **options) -> list[Tensors]:
    encoder = WanLatentEncoder(WanCacheRules(mode=mode), vae=vae, clip=clip, **options)
    return [dict(tensors) for (tensors,) in encoder.encode(samples)]


def marked(value: float, num_frames: int = 1) -> torch.Tensor:
    return torch.full((4, num_frames, H, W), value)


# ---- text to video ----


def test_a_clip_is_encoded_whole_and_nothing_is_shown(vae, latents_of) -> None:
    sample = clip_sample(9)
    (tensors,) = encode(vae, None, "t2v", sample)
    assert shapes(tensors) == {"latents": (16, 3, H, W)} and dtypes(tensors) == {"latents": torch.bfloat16}
    assert close(tensors["latents"], latents_of(sample.frames)[0])


def test_a_picture_is_a_clip_of_one_frame(vae, pictures, latents_of) -> None:
    target = pictures["masked_cup"]
    (tensors,) = encode(vae, None, "t2v", image_sample(images(fp_1f_target_index=None), target))
    assert shapes(tensors) == {"latents": (16, 1, H, W)}
    assert torch.equal(tensors["latents"], latents_of(target.rgb[None])[0].bfloat16()), "its alpha is dropped"


def test_latents_are_stored_in_the_type_that_is_asked_for(vae) -> None:
    (tensors,) = encode(vae, None, "t2v", clip_sample(1), dtype=torch.float16)
    assert dtypes(tensors) == {"latents": torch.float16}


# ---- with pictures ----


def test_i2v_shows_the_first_frame_and_grey(vae, clip, latents_of, features_of) -> None:
    sample = clip_sample(9)
    (tensors,) = encode(vae, clip, "i2v", sample)
    assert shapes(tensors) == {
        "latents": (16, 3, H, W),
        "latents_image": (20, 3, H, W),
        "clip": (257, IMAGE_WIDTH),
    }
    assert dtypes(tensors) == {
        "latents": torch.bfloat16,
        "latents_image": torch.bfloat16,
        "clip": torch.float16,
    }
    shown = latents_of(shown_clip([sample.frames[0], *[None] * 8]))[0]
    assert close(tensors["latents_image"], torch.cat([torch.cat([marked(1), marked(0, 2)], dim=1), shown]))
    assert close(tensors["clip"], features_of(sample.frames[0]))


def test_flf2v_shows_the_last_frame_too(vae, clip, latents_of, features_of) -> None:
    sample = clip_sample(9)
    (tensors,) = encode(vae, clip, "flf2v", sample)
    assert shapes(tensors) == {
        "latents": (16, 3, H, W),
        "latents_image": (20, 3, H, W),
        "clip": (2, 257, IMAGE_WIDTH),
    }
    shown = latents_of(shown_clip([sample.frames[0], *[None] * 7, sample.frames[8]]))[0]
    masks = torch.cat([marked(1), marked(0, 2)], dim=1)
    masks[3, 2] = 1
    assert close(tensors["latents_image"], torch.cat([masks, shown]))
    assert close(tensors["latents"], latents_of(sample.frames)[0])
    assert close(tensors["clip"], torch.stack([features_of(sample.frames[i]) for i in (0, 8)]))


def test_a_picture_of_an_i2v_model_is_all_given(vae, clip, pictures, latents_of) -> None:
    cat = pictures["cat"]
    (tensors,) = encode(vae, clip, "i2v", image_sample(images(fp_1f_target_index=None), cat))
    latent = latents_of(cat.rgb[None])[0]
    assert close(tensors["latents"], latent) and close(tensors["latents_image"], torch.cat([marked(1), latent]))


# ---- Fun-Control ----


@pytest.mark.parametrize("mode", ["t2v", "i2v"])
def test_a_control_video_is_encoded_beside_its_video(vae, clip, latents_of, mode: str) -> None:
    sample = clip_sample(5, control_frames=noise(5, 7))
    (tensors,) = encode(vae, clip, mode, sample)
    assert ("latents_image" in tensors) == (mode == "i2v") and tensors["latents_control"].dtype == torch.bfloat16
    assert close(tensors["latents_control"], latents_of(sample.control_frames)[0])
    assert close(tensors["latents"], latents_of(sample.frames)[0])


def test_of_several_control_images_the_first_is_the_control(vae, pictures, latents_of) -> None:
    dataset = images(0, 1, fp_1f_target_index=None)
    sample = image_sample(dataset, pictures["cat"], pictures["masked_face"], pictures["masked_cup"])
    (tensors,) = encode(vae, None, "t2v", sample)
    assert shapes(tensors) == {"latents": (16, 1, H, W), "latents_control": (16, 1, H, W)}
    assert close(tensors["latents_control"], latents_of(pictures["masked_face"].rgb[None])[0]), "not masked"


# ---- one frame ----


def test_one_frame_caches_have_the_published_contents(vae, clip, pictures) -> None:
    sample = image_sample(images(0), pictures["face"], pictures["cat"])
    (tensors,) = encode(vae, clip, "one_frame", sample)
    assert shapes(tensors) == {
        "latents": (16, 2, H, W),
        "latents_image": (20, 2, H, W),
        "clip": (1, 257, IMAGE_WIDTH),
        "f_indices": (2,),
    }
    assert dtypes(tensors) == {
        "latents": torch.bfloat16,
        "latents_image": torch.bfloat16,
        "clip": torch.float16,
        "f_indices": torch.int32,
    }
    assert all(t.device.type == "cpu" and not t.requires_grad for t in tensors.values())
    assert tensors["f_indices"].tolist() == [0, 1]


def test_one_frame_items_equal_a_direct_encode_bit_by_bit(vae, clip, pictures, latents_of, features_of) -> None:
    cat, face, cup = (pictures[name] for name in ("cat", "masked_face", "masked_cup"))
    sample = image_sample(images(0, 2), cat, face, cup)
    (tensors,) = encode(vae, clip, "one_frame", sample)
    first, target, second = (latents_of(picture.rgb[None])[0] for picture in (face, cat, cup))
    empty = latents_of(grey(HEIGHT, WIDTH))[0]
    assert 0 < mask_of(face).mean() < 1 and 0 < mask_of(cup).mean() < 1
    assert torch.equal(tensors["latents"], torch.cat([first, target, second], dim=1).bfloat16())
    shown = [
        torch.cat([marked(1), first * mask_of(face)]),
        torch.cat([marked(0), empty]),
        torch.cat([marked(1), second * mask_of(cup)]),
    ]
    assert torch.equal(tensors["latents_image"], torch.cat(shown, dim=1).bfloat16())
    assert torch.equal(tensors["clip"], torch.stack([features_of(p.rgb) for p in (face, cup)]).half())
    assert tensors["f_indices"].tolist() == [0, 1, 2]


def test_controls_keep_the_indices_that_they_were_given(vae, clip, pictures, latents_of, features_of) -> None:
    cat, face, cup = pictures["cat"], pictures["face"], pictures["masked_cup"]
    dataset = images(30, 0, 4, fp_1f_target_index=9)
    (tensors,) = encode(vae, clip, "one_frame", image_sample(dataset, cat, face, cup, cat))
    assert tensors["f_indices"].tolist() == [0, 4, 9, 30]
    ordered = [latents_of(picture.rgb[None])[0] for picture in (cup, cat, cat, face)]
    assert close(tensors["latents"], torch.cat(ordered, dim=1))
    assert torch.equal(tensors["latents_image"][0, :, 0, 0], torch.tensor([1, 1, 0, 1]))
    assert close(tensors["latents_image"][4:, 3:], ordered[3])
    assert close(tensors["clip"], torch.stack([features_of(p.rgb) for p in (face, cup, cat)])), "in the user's order"
    assert tensors["clip_indices"].tolist() == [30, 0, 4] and tensors["clip_indices"].dtype == torch.int32


@pytest.mark.parametrize(("source", "name"), [("target", "masked_cup"), (1, "face")])
def test_clip_sees_the_picture_that_is_asked_for(vae, clip, pictures, features_of, source, name: str) -> None:
    dataset = images(2, 0, fp_1f_image_embedding_source=source)
    sample = image_sample(dataset, pictures["masked_cup"], pictures["cat"], pictures["face"])
    (tensors,) = encode(vae, clip, "one_frame", sample)
    assert torch.equal(tensors["clip"], features_of(pictures[name].rgb).half()[None])
    assert "clip_indices" not in tensors


def test_control_zero_is_the_same_as_the_controls(vae, clip, pictures) -> None:
    def clip_of(source) -> torch.Tensor:
        dataset = images(0, 2, fp_1f_image_embedding_source=source)
        return encode(vae, clip, "one_frame", image_sample(dataset, *[pictures["cat"]] * 3))[0]["clip"]

    assert torch.equal(clip_of(0), clip_of("control")) and len(clip_of(0)) == 2


def test_a_loss_mask_weighs_the_target_among_controls_that_count_everywhere(vae, clip, pictures) -> None:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[:, : WIDTH // 2] = 255
    sample = image_sample(images(2, 0), *[pictures["cat"]] * 3, loss_mask=mask)
    (tensors,) = encode(vae, clip, "one_frame", sample)
    found = tensors["latents_loss_mask"]
    assert found.shape == (1, 3, H, W) and found.dtype == torch.float16
    assert (found[0, [0, 2]] == 1).all()
    assert (found[0, 1, :, : W // 2] == 1).all() and (found[0, 1, :, W // 2 :] == 0).all()
    (plain,) = encode(vae, clip, "t2v", image_sample(images(), pictures["cat"], loss_mask=mask))
    assert torch.equal(plain["latents_loss_mask"], found[:, 1:2])
    last = image_sample(images(2, 0, fp_1f_target_index=5), *[pictures["cat"]] * 3, loss_mask=mask)
    (tensors,) = encode(vae, clip, "one_frame", last)
    assert torch.equal(tensors["latents_loss_mask"][0], found[0, [0, 2, 1]]), "the target comes last"


# ---- batches ----


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """How many pictures or clips a function gets at once, filled while it is called."""
    import importlib

    module, _, function = name.rpartition(".")
    original, sizes = getattr(importlib.import_module(module), function), []

    def counted(model, inputs):
        sizes.append(len(inputs))
        return original(model, inputs)

    monkeypatch.setattr(name, counted)
    return sizes


def test_a_batch_goes_through_each_model_role_by_role(vae, clip, pictures, monkeypatch) -> None:
    cat, face, cup = pictures["cat"], pictures["masked_face"], pictures["masked_cup"]
    samples = [image_sample(images(0, 2), cat, face, cup), image_sample(images(2, 0), cup, cat, face)]
    alone = [encode(vae, clip, "one_frame", sample)[0] for sample in samples]
    vae_calls = count_calls(monkeypatch, "wan.vae.encode")
    clip_calls = count_calls(monkeypatch, "wan.image_encoder.encode_pictures")
    together = encode(vae, clip, "one_frame", *samples)
    assert vae_calls == [2, 2, 2, 1] and clip_calls == [4], "grey once"
    for found, wanted in zip(together, alone, strict=True):
        assert found.keys() == wanted.keys() and all(close(found[name], wanted[name]) for name in wanted)
    assert not close(alone[0]["latents"], alone[1]["latents"])


@pytest.mark.parametrize(("mode", "calls"), [("t2v", [2, 2]), ("i2v", [2, 2, 2]), ("flf2v", [2, 2, 2])])
def test_clips_of_a_batch_do_not_mix(vae, clip, monkeypatch, mode: str, calls: list[int]) -> None:
    samples = [clip_sample(5, seed=seed, control_frames=noise(5, 10 + seed)) for seed in (1, 2)]
    alone = [encode(vae, clip, mode, sample)[0] for sample in samples]
    vae_calls = count_calls(monkeypatch, "wan.vae.encode")
    together = encode(vae, clip, mode, *samples)
    assert vae_calls == calls
    for found, wanted in zip(together, alone, strict=True):
        assert found.keys() == wanted.keys() and all(close(found[name], wanted[name]) for name in wanted)


def test_grey_is_encoded_once_for_each_size(vae, clip, pictures, monkeypatch) -> None:
    encoder = WanLatentEncoder(WanCacheRules(mode="one_frame"), vae=vae, clip=clip)
    calls = count_calls(monkeypatch, "wan.vae.encode")
    for _ in range(2):
        encoder.encode([image_sample(images(0), pictures["cat"], pictures["face"])])
    assert len(calls) == 2 + 1 + 2


# ---- in files ----


def test_files_have_the_published_keys(vae, clip, pictures, tmp_path: Path) -> None:
    control = clip_sample(5, control_frames=noise(5, 3))
    made = {
        "一枚": encode(vae, clip, "one_frame", image_sample(images(0), pictures["cat"], pictures["face"]))[0],
        "動画": encode(vae, clip, "i2v", control)[0],
    }
    for name, tensors in made.items():
        path = tmp_path / f"{name}.safetensors"
        write_cache(path, tensors, main="latents", metadata=latent_metadata("wan", (WIDTH, HEIGHT), {}))
        stored = read_cache(path)
        assert stored.keys() == tensors.keys() and all(torch.equal(stored[key], tensors[key]) for key in tensors)
    assert set(cache_header(tmp_path / "一枚.safetensors").keys.values()) == {
        "latents_2x4x6_bfloat16",
        "latents_image_2x4x6_bfloat16",
        "clip_bfloat16",
        "f_indices_int32",
    }
    header = cache_header(tmp_path / "動画.safetensors")
    assert set(header.keys.values()) == {
        "latents_2x4x6_bfloat16",
        "latents_image_2x4x6_bfloat16",
        "latents_control_2x4x6_bfloat16",
        "clip_bfloat16",
    }
    assert header.dtypes["clip"] == "float16" and header.metadata["architecture"] == "wan"


# ---- the same as in generation ----


@pytest.fixture(scope="module")
def encoders(wan_encoders, vae, clip) -> Encoders:
    """Generation's, around the models that make the caches."""
    checkpoint = text_encoder.open_t5(wan_encoders.t5)
    t5 = text_encoder.load_t5(checkpoint, dtype=torch.float32, device="cpu")
    lent = {"load": None, "device": torch.device("cpu"), "keep": True}
    return Encoders(
        t5=Resident("UMT5", lent=t5, **lent),
        clip=Resident("CLIP", lent=clip, **lent),
        vae=Resident("VAE", lent=vae, **lent),
        tokenizer=lambda: text_encoder.load_tokenizer(given=None, checkpoint=checkpoint),
        image_width=IMAGE_WIDTH,
    )


@pytest.fixture(scope="module")
def files(pictures, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pictures at their final size, as CLIP looks at whole files in generation and at what is trained in caches."""
    folder = tmp_path_factory.mktemp("画像")
    for name, picture in pictures.items():
        layers = [picture.rgb] if picture.alpha is None else [picture.rgb, picture.alpha[..., None]]
        Image.fromarray(np.concatenate(layers, axis=-1)).save(folder / f"{name}.png")
    return {name: str(folder / f"{name}.png") for name in pictures}


def generated(encoders: Encoders, task: str, **flags) -> WanConditioning:
    flags = WanRequestFlags(
        prompt="a cat", task=find_task(task), video_size=(HEIGHT, WIDTH), exact_size=True, seed=1, **flags
    )
    (cond,) = encode_requests(encoders, [flags.resolve(image_size=lambda path, flag: (WIDTH, HEIGHT))])
    assert isinstance(cond, WanConditioning), cond
    return cond


def batch_of(tensors: Tensors) -> Tensors:
    return {name: tensor[None] for name, tensor in tensors.items()}


@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B"])
def test_one_frame_generation_is_shown_what_the_cache_holds(vae, clip, pictures, encoders, files, task: str) -> None:
    sample = image_sample(images(2, 0), pictures["cat"], pictures["masked_face"], pictures["masked_cup"])
    batch = batch_of(encode(vae, clip, "one_frame", sample)[0])
    controls = (files["masked_face"], files["masked_cup"])
    options = {"one_frame_inference": "control_index=2;0,target_index=1", "control_image_path": controls}
    cond = generated(encoders, task, **options)
    found = from_batch(batch, shows_images=True)
    assert torch.equal(found.indices, cond.context.indices) and found.target == cond.context.target == 1
    assert torch.equal(found.latents, cond.context.latents.bfloat16())
    features = features_from_batch(batch, both_ends=task.startswith("flf2v"))
    assert torch.allclose(features[0].float(), cond.features, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B"])
def test_video_generation_is_shown_what_the_cache_holds(vae, clip, pictures, encoders, files, task: str) -> None:
    mode, num_frames = task.partition("-")[0], 9
    sample = clip_sample(num_frames)
    sample.frames[0], sample.frames[-1] = pictures["cat"].rgb, pictures["masked_cup"].rgb
    batch = batch_of(encode(vae, clip, mode, sample)[0])
    end = {"end_image_path": files["masked_cup"]} if mode == "flf2v" else {}
    cond = generated(encoders, task, image_path=files["cat"], video_length=num_frames, **end)
    found = from_batch(batch, shows_images=True)
    assert torch.equal(found.indices, cond.context.indices) and found.target is cond.context.target is None
    assert close(found.latents, cond.context.latents)
    features = features_from_batch(batch, both_ends=mode == "flf2v")
    assert torch.allclose(features[0].float(), cond.features, rtol=1e-2, atol=1e-3)
