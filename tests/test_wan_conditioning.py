"""From images and texts to what the transformer is shown: the same as caches show it, and everything that is given."""

import logging
import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import wan_cache_latents
import wan_cache_text_encoder_outputs
from common.flags import parse
from common.media import image_size
from dataset.cache_files import read_cache
from dataset.frames import read_frames
from generation.pipeline import Failure
from modules.block_swap import Swapping
from networks.lora_merge import plan_merge
from options.flags_wan_generate import WanGenerateFlags
from options.wan_request import WanRequest, WanRequestFlags
from options.wan_tasks import find_task
from tests.cache_builders import image_set, picture, video_set, write_clip
from tests.wan_driver import HEIGHT, WIDTH, Pictures, models_for, write_pictures
from tests.wan_oracle import quarter
from wan import conditioning as conditioning_module
from wan import pipeline as pipeline_module
from wan.architecture import predict_velocity
from wan.checkpoints import open_models
from wan.compute import Compute
from wan.conditioning import WanConditioning
from wan.model import Conditioning
from wan.pipeline import WanPipeline
from wan.sampling import generate_latents

CAPTION = "caption of 猫"
SIDE = 32


@pytest.fixture(scope="module")
def pictures(material, tmp_path_factory) -> Pictures:
    return write_pictures(tmp_path_factory.mktemp("素材 [x]"), material)


def pipeline_for(wan_models, task: str) -> WanPipeline:
    """As the script opens it."""
    flags = parse(WanGenerateFlags, description="", argv=models_for(wan_models, task))
    checkpoints = open_models(flags.models, flags.request.task)
    merge = plan_merge((), checkpoints.transformer)
    return WanPipeline(checkpoints, Compute.from_flags(flags.compute), merge=merge)


def request(task: str, **changes) -> WanRequest:
    base = WanRequestFlags(prompt=CAPTION, video_size=(HEIGHT, WIDTH), infer_steps=1, seed=1, video_length=5)
    return replace(base, task=find_task(task), **changes).resolve(image_size=image_size)


def encoded(pipeline: WanPipeline, *requests: WanRequest) -> list[WanConditioning | Failure]:
    with pipeline.encoder() as encode:
        return list(encode(requests))


# ---- the same as in training ----


class Recorder:
    """In place of a transformer: keeps what it is told."""

    def __init__(self, pipeline: WanPipeline) -> None:
        self.config, self.device, self.swapping = pipeline._config, torch.device("cpu"), Swapping()
        self.told: Conditioning | None = None

    def prepare(self, conditioning: Conditioning, timesteps: Tensor) -> None:
        self.told = conditioning

    def step(self, latents: Tensor, prepared: None, index: int, *, skip_blocks=frozenset()) -> Tensor:
        return latents

    def __call__(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        self.told = conditioning
        return latents


@pytest.fixture(scope="module")
def picture_set(tmp_path_factory) -> Path:
    """One picture with two transparent controls, at places that are not in the order of time."""
    folder = tmp_path_factory.mktemp("一枚 [1]")
    size = {"size": (SIDE, SIDE), "resolution": [SIDE, SIDE]}
    config = image_set(folder, ["猫"], fp_1f_target_index=1, fp_1f_clean_indices=[5, 0], **size)
    (folder / "controls" / "猫.png").unlink()
    for number in range(2):
        alpha = picture(10 + number, (SIDE, SIDE))[..., :1]
        pixels = np.concatenate([picture(number, (SIDE, SIDE)), alpha], axis=-1)
        Image.fromarray(pixels).save(folder / "controls" / f"猫_{number}.png")
    return config


@pytest.fixture(scope="module")
def clip_set(tmp_path_factory) -> Path:
    """One clip of five frames with a control video, and its ends as pictures."""
    folder = tmp_path_factory.mktemp("動画 [1]")
    config = video_set(folder, {"猫": 5}, fps=16, control_directory=folder / "controls")
    write_clip(folder / "controls" / "猫.mp4", 5, fps=16, seed=9)
    frames = list(read_frames(folder / "videos" / "猫.mp4", size=(SIDE, SIDE)))
    for name, frame in (("始", frames[0]), ("終", frames[-1])):
        Image.fromarray(frame).save(folder / f"{name}.png")
    return config


def cached(config: Path, models, *flags: str) -> dict[str, Tensor | list[Tensor]]:
    """A batch of the data set's only item."""
    shutil.rmtree(config.parent / "cache", ignore_errors=True)
    common, device = ["--dataset_config", str(config), "--num_workers", "0"], ["--device", "cpu"]
    clip = ["--clip", str(models.clip)] if flags else []
    assert wan_cache_latents.main([*common, *device, "--vae", str(models.vae), *clip, *flags]) == 0
    assert wan_cache_text_encoder_outputs.main([*common, *device, "--t5", str(models.t5)]) == 0
    contents = {}
    for path in (config.parent / "cache").iterdir():
        contents |= read_cache(path)
    return {name: [tensor] if name == "t5" else tensor[None] for name, tensor in contents.items()}


PLACES = "target_index=1,control_index=5;0"
CASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "one frame": ("i2v-14B", ("--one_frame",), ()),
    "one frame in the middle": ("flf2v-14B", ("--one_frame",), ()),
    "video from a text": ("t2v-1.3B", (), ()),
    "video from a frame": ("i2v-14B", ("--i2v",), ("image_path",)),
    "video between frames": ("flf2v-14B", ("--flf2v",), ("image_path", "end_image_path")),
    "control from a text": ("t2v-1.3B-FC", (), ("control_path",)),
    "control from a frame": ("i2v-14B-FC", ("--i2v",), ("image_path", "control_path")),
}


@pytest.mark.parametrize("name", CASES)
def test_generation_shows_what_a_cached_item_shows(name, wan_models, picture_set, clip_set):
    """Caches round to bfloat16, features to float16. The start image is not given: CLIP sees the controls."""
    task, flags, given = CASES[name]
    is_picture = name.startswith("one frame")
    config = picture_set if is_picture else clip_set
    folder = config.parent
    values: Mapping[str, object] = {
        "image_path": str(folder / "始.png"),
        "end_image_path": str(folder / "終.png"),
        "control_path": str(folder / "controls" / "猫.mp4"),
    }
    changes = {key: values[key] for key in given} | {"video_size": (SIDE, SIDE), "guidance_scale": 1.0}
    if is_picture:
        controls = tuple(str(folder / "controls" / f"猫_{number}.png") for number in range(2))
        changes |= {"one_frame_inference": PLACES, "control_image_path": controls}
    asked, pipeline = request(task, **changes), pipeline_for(wan_models, task)
    (conditioning,) = encoded(pipeline, asked)
    generating, training = Recorder(pipeline), Recorder(pipeline)
    generate_latents(generating, asked, conditioning, lambda progress: None)
    batch = SimpleNamespace(contents=cached(config, wan_models, *flags))
    latents = batch.contents["latents"]
    predict_velocity(training, latents, torch.ones(1), batch, task=find_task(task))
    mine, theirs = generating.told, training.told
    assert mine.indices.tolist() == theirs.indices.tolist() and mine.indices.shape[1] == latents.shape[2]
    assert torch.equal(mine.text.bfloat16(), theirs.text) and torch.equal(mine.text_lengths, theirs.text_lengths)
    for found, wanted, dtype in ((mine.latents, theirs.latents, "bfloat16"), (mine.image, theirs.image, "float16")):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert torch.equal(found.to(getattr(torch, dtype)).float(), wanted.float())


# ---- everything that is given ----


def one_frame(pictures: Pictures, **changes) -> dict[str, object]:
    own = {"one_frame_inference": "target_index=1,control_index=0;2", "image_path": str(pictures.start)}
    return own | {"control_image_path": (str(pictures.start), str(pictures.end))} | changes


def latents_of(pipeline: WanPipeline, requests: Mapping[str, WanRequest]) -> dict[str, Tensor]:
    conditionings = encoded(pipeline, *requests.values())
    with pipeline.denoiser() as denoise:
        made = [denoise(r, c, lambda progress: None) for r, c in zip(requests.values(), conditionings, strict=True)]
    return dict(zip(requests, made, strict=True))


def assert_every_variant_differs(pipeline: WanPipeline, task: str, base: dict, variants: dict[str, dict]) -> None:
    """Only "nothing" may give the same latents as the base, and the same twice."""
    base = {"infer_steps": 2, "guidance_scale": 2.0, "negative_prompt": "暗い"} | base
    plain = latents_of(pipeline, {"base": request(task, **base)})["base"]
    for name, latent in latents_of(pipeline, {n: request(task, **base | v) for n, v in variants.items()}).items():
        is_same = latent.shape == plain.shape and torch.equal(latent, plain)
        assert is_same == (name == "nothing"), f"{name} has no effect"


def test_every_input_of_one_frame_changes_the_picture(wan_models, pictures):
    start, end, cut_out = (str(path) for path in (pictures.start, pictures.end, pictures.cut_out))
    controls = "control_image_path"
    variants = {
        "nothing": {},
        "target": {"one_frame_inference": "target_index=3,control_index=0;2"},
        "index": {"one_frame_inference": "target_index=1,control_index=0;9"},
        "order": {"one_frame_inference": "target_index=1,control_index=2;0"},
        "control": {controls: (start, start)},
        "three controls": {controls: (start, end, end), "one_frame_inference": "target_index=1,control_index=0;2;4"},
        "mask": {"control_image_mask_path": (str(pictures.mask),)},
        "alpha": {controls: (start, cut_out)},
        "start": {"image_path": end},
        "end": {"end_image_path": start},
        "prompt": {"prompt": "犬"},
        "negative prompt": {"negative_prompt": "明るい"},
        "guidance": {"guidance_scale": 3.0},
        "skipped steps": {"cfg_skip_mode": "early", "cfg_apply_ratio": 0.5},
        "skipped blocks": {"slg_mode": "original", "slg_layers": "1", "slg_end": 1.0},
        "flow shift": {"flow_shift": 3.0},
        "steps": {"infer_steps": 3},
        "solver": {"sample_solver": "vanilla"},
        "seed": {"seed": 2},
        "size": {"video_size": (HEIGHT, HEIGHT)},
    }
    assert_every_variant_differs(pipeline_for(wan_models, "flf2v-14B"), "flf2v-14B", one_frame(pictures), variants)


def test_every_input_of_a_video_changes_the_video(wan_models, pictures):
    start, end = str(pictures.start), str(pictures.end)
    variants = {
        "nothing": {},
        "start": {"image_path": end},
        "end": {"end_image_path": end},
        "length": {"video_length": 9},
        "crop": {"video_size": (WIDTH, WIDTH), "exact_size": True},
    }
    assert_every_variant_differs(pipeline_for(wan_models, "i2v-14B"), "i2v-14B", {"image_path": start}, variants)


@pytest.mark.parametrize("crops", [False, True])
def test_images_are_whole_unless_the_size_is_to_be_exact(crops, wan_models, pictures, tmp_path):
    """The end image, which has another shape than the start image, gives way; red is above and below its middle."""
    end = np.zeros((96, 96, 3), dtype=np.uint8)
    end[:12], end[-12:] = (255, 0, 0), (255, 0, 0)
    Image.fromarray(end).save(tmp_path / "終.png")
    images = {"image_path": str(pictures.start), "end_image_path": str(tmp_path / "終.png")}
    whole = request("i2v-14B", **images, exact_size=crops)
    found, without = encoded(pipeline_for(wan_models, "i2v-14B"), whole, replace(whole, end_image_path=None))
    shown, before = found.context.latents, without.context.latents
    assert shown.shape[2] == 3 and torch.equal(shown[:, :, :2], before), "the end is one more frame, by itself"
    assert (shown[:, :4, 2] == 1).all()
    _, seen = found.pictures[1]
    assert seen.shape == (HEIGHT // 8, WIDTH // 8, 3)
    assert [bool(seen[row, :, 0].min() > 0.5) for row in (0, 2, -1)] == [not crops, False, not crops]


def test_masks_change_what_is_shown_of_their_controls_and_nothing_else(wan_models, pictures):
    """A mask file goes before the picture's own alpha channel; one that is missing hides nothing."""
    controls = (str(pictures.cut_out), str(pictures.end))
    plain, masked, other = (
        request("flf2v-14B", **one_frame(pictures, control_image_path=controls, control_image_mask_path=masks))
        for masks in ((), (str(pictures.mask),), (str(pictures.mask), str(pictures.mask)))
    )
    with Image.open(pictures.cut_out) as image:
        opaque = pictures.folder / "不透明.png"
        image.convert("RGB").save(opaque)
    whole = request("flf2v-14B", **one_frame(pictures, control_image_path=(str(opaque), controls[1])))
    found = encoded(pipeline_for(wan_models, "flf2v-14B"), whole, plain, masked, other)
    with Image.open(pictures.cut_out) as cut_out, Image.open(pictures.mask) as mask:
        alpha, half = (latent_mask(np.asarray(channel)) for channel in (cut_out.getchannel("A"), mask))
    expected = [(1, 1), (alpha, 1), (half, 1), (half, half)]
    base = found[0].context.latents
    for conditioning, masks in zip(found, expected, strict=True):
        shown = conditioning.context.latents
        assert torch.equal(shown[:, :4], base[:, :4]), "marks say that the control is given"
        for frame, mask in ((0, masks[0]), (1, 1), (2, masks[1])):
            assert torch.equal(shown[:, 4:, frame], base[:, 4:, frame] * mask)
        assert torch.equal(conditioning.text, found[0].text)
        assert torch.equal(conditioning.features, found[0].features), "CLIP sees the whole picture"
        assert torch.equal(conditioning.context.indices, found[0].context.indices)


def latent_mask(channel: np.ndarray) -> Tensor:
    """(2H, 2W) uint8 → (h, w) in [0, 1]."""
    small = Image.fromarray(quarter(channel[..., None])[..., 0])
    small = small.resize((WIDTH // 8, HEIGHT // 8), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small, np.float32) / 255)


# ---- models come and go ----


def test_one_encoder_is_resident_at_a_time_and_none_that_is_not_needed(wan_models, pictures, monkeypatch):
    alive: dict[str, weakref.ref] = {}
    beside: dict[str, list[str]] = {}

    def noted(name: str, load: Callable) -> Callable:
        def noting(*args, **kwargs):
            beside[name] = [other for other, model in alive.items() if model() is not None]
            model = load(*args, **kwargs)
            alive[name] = weakref.ref(model)
            return model

        return noting

    for name in ("load_t5", "load_clip"):
        monkeypatch.setattr(pipeline_module, name, noted(name, getattr(pipeline_module, name)))
    broken = pictures.folder / "壊れた.png"
    broken.write_bytes(pictures.start.read_bytes()[:2000])
    asked = request("i2v-14B", image_path=str(pictures.start))
    found = encoded(pipeline_for(wan_models, "i2v-14B"), asked, replace(asked, image_path=str(broken)))
    assert beside == {"load_t5": [], "load_clip": []}
    assert isinstance(found[0], WanConditioning) and isinstance(found[1], Failure) and "壊れた" in str(found[1].error)
    assert all(model() is None for model in alive.values()), "what failed is kept, the model is not"
    beside.clear()
    encoded(pipeline_for(wan_models, "t2v-1.3B-FC"), request("t2v-1.3B-FC", control_path=str(pictures.frames)))
    assert list(beside) == ["load_t5"]


def test_equal_inputs_are_encoded_once(wan_models, pictures, monkeypatch):
    """Over a session, too, until their files change."""
    seen = []
    for name in ("encode_t5", "_features"):
        monkeypatch.setattr(conditioning_module, name, count(name, getattr(conditioning_module, name), seen))
    for name in ("StartClip", "SizedPicture", "Grey", "ControlClip"):
        kind = getattr(conditioning_module, name)
        monkeypatch.setattr(kind, "encode", count(name, kind.encode, seen))
    pipeline = pipeline_for(wan_models, "flf2v-14B")
    start = str(pictures.start)
    twice = one_frame(pictures, control_image_path=(start, start), image_path=None, guidance_scale=1.0)
    first, second = request("flf2v-14B", **twice), request("flf2v-14B", **twice, prompt="犬")
    encoded(pipeline, first, replace(first, seed=2))
    assert sorted(seen) == ["Grey", "SizedPicture", "_features", "encode_t5"]
    encoded(pipeline, second)
    assert seen[4:] == ["encode_t5"], "guidance of 1 reads no negative prompt"


def test_an_edited_control_folder_is_encoded_anew(wan_models, pictures, tmp_path):
    folder = shutil.copytree(pictures.frames, tmp_path / "齣")
    pipeline = pipeline_for(wan_models, "t2v-1.3B-FC")
    first = encoded(pipeline, request("t2v-1.3B-FC", control_path=str(folder)))[0].context.latents
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "3.png")
    second = encoded(pipeline, request("t2v-1.3B-FC", control_path=str(folder)))[0].context.latents
    assert torch.equal(first[:, :, 0], second[:, :, 0]) and not torch.equal(first, second)


def count(name: str, original: Callable, calls: list[str]) -> Callable:
    def counted(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    return counted


@pytest.mark.parametrize(("free", "steps_aside"), [(1.0, True), (float("inf"), False)])
def test_the_transformer_steps_aside_where_the_vae_would_not_fit(free, steps_aside, wan_models, monkeypatch):
    pipeline, calls = pipeline_for(wan_models, "t2v-1.3B"), []
    monkeypatch.setattr("networks.transformer_stage.free_memory", lambda device: free)
    monkeypatch.setattr(pipeline._transformer._resident, "step_aside", lambda: calls.append(1))
    frames = pipeline.decode(request("t2v-1.3B", trim_tail_frames=2), torch.zeros(16, 2, 4, 4))
    assert frames.shape == (3, 32, 32, 3) and bool(calls) == steps_aside


def test_a_missing_lora_is_advised_once(wan_models, pictures, caplog):
    pipeline = pipeline_for(wan_models, "flf2v-14B")
    with caplog.at_level(logging.WARNING):
        pipeline.check(request("flf2v-14B", image_path=str(pictures.start), end_image_path=str(pictures.end)))
        assert not caplog.records
        for _ in range(2):
            pipeline.check(request("flf2v-14B", **one_frame(pictures)))
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "Wan's own weights repeat the control image"
    ]
