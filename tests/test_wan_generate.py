"""`wan_generate_video.py` run in-process on small checkpoints and photographs, compared with diffusers' Wan."""

import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.media import read_video
from demo.wan_models import WanModelPaths
from tests.wan_driver import (
    HEIGHT,
    PROMPT,
    QUICK,
    SIZE,
    TASKS,
    WIDTH,
    Pictures,
    latents_in,
    models_for,
    one_frame,
    only,
    relative,
    run,
    write_pictures,
)
from tests.wan_encoders import grey, shown_clip
from tests.wan_oracle import Oracle, denoised, quarter, saved, transformer_of
from wan import pipeline as pipeline_module
from wan import vae as wan_vae

H, W = HEIGHT // 8, WIDTH // 8
NEGATIVE = "暗い, blurry"
EXACT = 1e-5
"""Of latents after a few steps, measured by the largest of them."""


@pytest.fixture(scope="module")
def pictures(material, tmp_path_factory) -> Pictures:
    return write_pictures(tmp_path_factory.mktemp("素材 [x]"), material)


@pytest.fixture(scope="module")
def oracle(wan_encoders) -> Oracle:
    return Oracle(wan_encoders)


def rgb(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def marked(value: float, num_frames: int = 1) -> Tensor:
    return torch.full((1, 4, num_frames, H, W), value)


def small(mask: np.ndarray) -> Tensor:
    """(H, W) uint8 → (h, w) in [0, 1]."""
    image = Image.fromarray(mask).resize((W, H), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image, np.float32) / 255)


# ---- from pictures to pixels ----


@pytest.fixture
def made(wan_models, wan_encoders, tmp_path) -> Callable[..., tuple[Tensor, np.ndarray]]:
    """Runs a task with the oracle's own encoders; returns latents (1, 16, F', h, w) and frames (F, H, W, 3)."""

    def run_task(task: str, *argv: object) -> tuple[Tensor, np.ndarray]:
        models = ["--task", task, "--dit", wan_models.for_kind(TASKS[task]).dit, "--vae", wan_encoders.vae]
        models += ["--t5", wan_encoders.t5, *([] if task.startswith("t2v") else ["--clip", wan_encoders.clip])]
        folder = tmp_path / "結果"
        common = ["--prompt", PROMPT, *SIZE, "--output_type", "latent_images", "--save_path", folder]
        assert run(*models, *common, *argv) == 0
        (latents,) = latents_in(folder)
        (result,) = (path for path in folder.iterdir() if path.suffix != ".safetensors")
        return latents[None], saved(result)

    return run_task


def assert_same(found: tuple[Tensor, np.ndarray], wanted: Tensor, oracle: Oracle) -> None:
    assert relative(found[0], wanted) < EXACT
    assert np.abs(found[1].astype(int) - oracle.decode(wanted)).max() <= 1


def test_one_frame_equals_diffusers(made, wan_models, oracle, pictures):
    """At 0 and 1 the frames stand where diffusers puts them, too."""
    found = made(
        "i2v-14B",
        *("--image_path", pictures.end, *one_frame(pictures.start, indices="0")),
        *("--negative_prompt", NEGATIVE, "--guidance_scale", 3, "--infer_steps", 4, "--seed", 7),
    )
    control, empty = oracle.encode(quarter(rgb(pictures.start))[None]), oracle.encode(grey(HEIGHT, WIDTH))
    shown = [torch.cat([marked(1), control], dim=1), torch.cat([marked(0), empty], dim=1)]
    whole = denoised(
        transformer_of(wan_models.for_kind("i2v").dit, "i2v"),
        [oracle.read(PROMPT), oracle.read(NEGATIVE)],
        shape=(2, H, W),
        y=torch.cat(shown, dim=2),
        features=oracle.features(rgb(pictures.end))[None],
        **{"scale": 3, "solver": "unipc", "num_steps": 4, "shift": 5, "seed": 7},
    )
    assert_same(found, whole[:, :, 1:], oracle)


def test_a_frame_in_the_middle_equals_diffusers(made, wan_models, oracle, pictures):
    """As documented, without an end image: the last control supplies the second features. The first has a mask file,
    the second one is transparent in part."""
    found = made(
        "flf2v-14B",
        *("--image_path", pictures.start, *one_frame(pictures.start, pictures.cut_out, indices="0;2")),
        *("--control_image_mask_path", pictures.mask, "--sample_solver", "vanilla", "--flow_shift", 4),
        *("--guidance_scale", 1, "--infer_steps", 3, "--seed", 8),
    )
    alpha = np.asarray(Image.open(pictures.cut_out))[..., 3]
    masks = [quarter(part[..., None])[..., 0] for part in (np.asarray(Image.open(pictures.mask)), alpha)]
    controls = [
        oracle.encode(quarter(rgb(path))[None]) * small(mask)
        for path, mask in zip((pictures.start, pictures.cut_out), masks, strict=True)
    ]
    empty = oracle.encode(grey(HEIGHT, WIDTH))
    shown = [torch.cat([marked(m), frame], dim=1) for m, frame in ((1, controls[0]), (0, empty), (1, controls[1]))]
    whole = denoised(
        transformer_of(wan_models.for_kind("flf2v").dit, "flf2v"),
        [oracle.read(PROMPT)],
        shape=(3, H, W),
        y=torch.cat(shown, dim=2),
        features=torch.stack([oracle.features(rgb(path)) for path in (pictures.start, pictures.cut_out)]),
        **{"scale": 1, "solver": "vanilla", "num_steps": 3, "shift": 4, "seed": 8},
    )
    assert_same(found, whole[:, :, 1:2], oracle)


def test_a_video_from_its_first_frame_equals_diffusers(made, wan_models, oracle, pictures):
    found = made(
        "i2v-14B",
        *("--image_path", pictures.start, "--video_length", 9, "--negative_prompt", NEGATIVE),
        *("--sample_solver", "dpm++", "--infer_steps", 3, "--seed", 9),
    )
    shown = oracle.encode(shown_clip([quarter(rgb(pictures.start)), *[None] * 8]))
    whole = denoised(
        transformer_of(wan_models.for_kind("i2v").dit, "i2v"),
        [oracle.read(PROMPT), oracle.read(NEGATIVE)],
        shape=(3, H, W),
        y=torch.cat([torch.cat([marked(1), marked(0, 2)], dim=2), shown], dim=1),
        features=oracle.features(rgb(pictures.start))[None],
        **{"scale": 5, "solver": "dpm++", "num_steps": 3, "shift": 5, "seed": 9},
    )
    assert_same(found, whole, oracle)


def test_a_video_between_two_frames_equals_diffusers(made, wan_models, oracle, pictures):
    ends = pictures.start, pictures.end
    argv = ["--image_path", ends[0], "--end_image_path", ends[1], "--video_length", 9, "--guidance_scale", 1]
    found = made("flf2v-14B", *argv, "--sample_solver", "vanilla", "--infer_steps", 3, "--seed", 10)
    first, last = (quarter(rgb(path)) for path in ends)
    masks = torch.cat([marked(1), marked(0, 2)], dim=2)
    masks[:, 3, 2] = 1
    whole = denoised(
        transformer_of(wan_models.for_kind("flf2v").dit, "flf2v"),
        [oracle.read(PROMPT)],
        shape=(3, H, W),
        y=torch.cat([masks, oracle.encode(shown_clip([first, *[None] * 7, last]))], dim=1),
        features=torch.stack([oracle.features(rgb(path)) for path in ends]),
        **{"scale": 1, "solver": "vanilla", "num_steps": 3, "shift": 5, "seed": 10},
    )
    assert_same(found, whole, oracle)


def test_a_video_from_a_text_equals_diffusers(made, wan_models, oracle):
    given = ["--video_length", 5, "--negative_prompt", NEGATIVE, "--guidance_scale", 4, "--flow_shift", 3]
    found = made("t2v-14B", *given, "--infer_steps", 5, "--seed", 11)
    whole = denoised(
        transformer_of(wan_models.for_kind("t2v").dit, "t2v"),
        [oracle.read(PROMPT), oracle.read(NEGATIVE)],
        shape=(2, H, W),
        **{"scale": 4, "solver": "unipc", "num_steps": 5, "shift": 3, "seed": 11},
    )
    assert_same(found, whole, oracle)


def test_a_control_video_is_followed_as_in_diffusers(made, wan_models, oracle, pictures):
    """Features of no picture are zeros; a folder of frames is a video, too."""
    given = ["--control_path", pictures.frames, "--video_length", 5, "--guidance_scale", 1]
    found = made("t2v-1.3B-FC", *given, "--infer_steps", 2, "--seed", 12)
    control = oracle.encode(np.stack([rgb(path) for path in sorted(pictures.frames.iterdir())]))
    whole = denoised(
        transformer_of(wan_models.for_kind("fun_control").dit, "fun_control"),
        [oracle.read(PROMPT)],
        shape=(2, H, W),
        y=torch.cat([control, torch.zeros_like(control)], dim=1),
        features=torch.zeros(1, 257, 160),
        **{"scale": 1, "solver": "unipc", "num_steps": 2, "shift": 5, "seed": 12},
    )
    assert_same(found, whole, oracle)


def test_a_control_video_with_first_and_last_frame_is_as_long_as_what_is_made(made, wan_models, oracle, pictures):
    """The end image is one more latent frame, for which there is control, too."""
    given = ["--control_path", pictures.control, "--image_path", pictures.start, "--end_image_path", pictures.end]
    found = made("i2v-14B-FC", *given, "--video_length", 5, "--guidance_scale", 1, "--infer_steps", 2, "--seed", 13)
    frames = np.stack(list(read_video(pictures.control, flag="control")))
    control = oracle.encode(frames)
    image = torch.zeros_like(control)
    image[:, :, :1] = oracle.encode(shown_clip([quarter(rgb(pictures.start)), *[None] * 4]))[:, :, :1]
    image[:, :, 2:] = oracle.encode(quarter(rgb(pictures.end))[None])
    whole = denoised(
        transformer_of(wan_models.for_kind("fun_control").dit, "fun_control"),
        [oracle.read(PROMPT)],
        shape=(3, H, W),
        y=torch.cat([control, image], dim=1),
        features=oracle.features(rgb(pictures.start))[None],
        **{"scale": 1, "solver": "unipc", "num_steps": 2, "shift": 5, "seed": 13},
    )
    assert_same(found, whole, oracle)
    assert len(found[1]) == 9


DOCUMENTED = [
    "--output_type latent_images --image_path start_image.png --control_image_path start_image.png "
    "--one_frame_inference control_index=0,target_index=1",
    "--output_type latent_images --image_path start_image.png --control_image_path start_image.png end_image.png "
    "--one_frame_inference control_index=0;2,target_index=1",
    "--output_type latent_images --image_path start_image.png --end_image_path end_image.png "
    "--control_image_path start_image.png end_image.png --one_frame_inference control_index=0;2,target_index=1",
]
"""The commands of the incumbent's guide, behind the flags of the models."""


def test_the_commands_that_users_know_run(wan_models, pictures, tmp_path, monkeypatch):
    """The last two mean the same: the last control is what the end image would be."""
    shutil.copy(pictures.start, tmp_path / "start_image.png")
    shutil.copy(pictures.end, tmp_path / "end_image.png")
    monkeypatch.chdir(tmp_path)
    for number, (command, task) in enumerate(zip(DOCUMENTED, ("i2v-14B", "flf2v-14B", "flf2v-14B"), strict=True)):
        assert run(*models_for(wan_models, task), *QUICK, *command.split(), "--save_path", str(number)) == 0
        assert names(tmp_path / str(number)) == [".png", ".safetensors"]
    assert torch.equal(latents_in(tmp_path / "1")[0], latents_in(tmp_path / "2")[0])


# ---- what is saved ----


@pytest.fixture
def i2v(wan_models, tmp_path) -> Callable[..., Path]:
    """Makes something with an image-to-video model; returns the folder of the results."""
    count = iter(range(100))

    def make(*argv: object, task: str = "i2v-14B") -> Path:
        folder = tmp_path / f"結果 {next(count)}"
        assert run(*models_for(wan_models, task), *QUICK, "--save_path", folder, *argv) == 0
        return folder

    return make


def names(folder: Path) -> list[str]:
    """Suffixes, of folders how many files are in them."""
    return sorted(path.suffix or str(len(list(path.iterdir()))) for path in folder.iterdir())


def test_pictures_and_videos_are_saved_as_such_and_latents_beside_either(i2v, pictures):
    frame, video = one_frame(pictures.start, indices="0"), ["--video_length", 5, "--guidance_scale", 1]
    assert names(i2v(*frame)) == [".png"]
    assert names(i2v(task="t2i-14B")) == [".png"]
    assert names(i2v(*video, task="t2v-1.3B")) == [".mp4"]
    assert names(i2v(*video, "--output_type", "latent_images", task="t2v-1.3B")) == [".safetensors", "5"]


def test_the_same_command_gives_the_same_bytes(i2v, pictures):
    argv = [*one_frame(pictures.start, indices="0"), "--output_type", "latent_images"]
    folders = [i2v(*argv), i2v(*argv), i2v(*argv, "--cpu_noise")]
    for pattern in ("*.safetensors", "*.png"):
        first, second, _ = (only(folder, pattern).read_bytes() for folder in folders)
        assert first == second
    assert torch.equal(latents_in(folders[0])[0], latents_in(folders[2])[0]), "this device is a CPU"


def test_frames_are_trimmed_and_shown_at_the_given_rate_also_when_decoded_later(i2v, pictures, wan_models, tmp_path):
    """The latents are whole; what they were made for says what becomes of them, unless flags do."""
    folder = i2v("--image_path", pictures.start, "--video_length", 9, "--trim_tail_frames", 2, "--fps", 24,
                 "--output_type", "both")  # fmt: skip
    (latents,) = latents_in(folder)
    assert latents.shape == (16, 3, H, W)
    decode = ["--latent_path", only(folder, "*.safetensors"), "--vae", wan_models.vae, "--save_path"]
    assert run(*decode, tmp_path / "again") == 0
    assert run(*decode, tmp_path / "less", "--trim_tail_frames", 3) == 0
    videos = [only(place, "*.mp4") for place in (folder, tmp_path / "again", tmp_path / "less")]
    frames = [np.stack(list(read_video(video, flag="result"))) for video in videos]
    assert frames[0].shape == (7, HEIGHT, WIDTH, 3) and np.array_equal(frames[0], frames[1])
    assert len(frames[2]) == 6
    for video in videos:
        with av.open(str(video)) as container:
            assert container.streams.video[0].average_rate == 24
    argv = ["--from_metadata", videos[2], "--search_dir", pictures.folder, "--save_path", tmp_path / "made again"]
    assert run(*models_for(wan_models, "i2v-14B"), *argv) == 0
    assert len(list(read_video(only(tmp_path / "made again", "*.mp4"), flag="result"))) == 6


def test_a_saved_picture_decodes_to_the_same_picture_with_the_vae_alone(i2v, pictures, wan_models, tmp_path):
    folder = i2v(*one_frame(pictures.start, indices="0"), "--output_type", "latent_images")
    argv = ["--latent_path", only(folder, "*.safetensors"), "--output_type", "images", "--save_path", tmp_path]
    assert run(*argv, "--ckpt_dir", wan_models.vae.parent) == 0
    assert only(tmp_path, "*.png").read_bytes() == only(folder, "*.png").read_bytes()


def test_the_size_is_the_start_images_unless_it_is_to_be_exact(i2v, pictures, tmp_path):
    """As wide as high: 48 x 64 pixels of it are 48 x 48."""
    with Image.open(pictures.start) as image:
        image.crop((0, 0, 96, 96)).save(tmp_path / "正方形.png")
    argv = ["--image_path", tmp_path / "正方形.png", *one_frame(pictures.start, indices="0")]
    assert Image.open(only(i2v(*argv), "*.png")).size == (48, 48)
    assert Image.open(only(i2v(*argv, "--exact_size"), "*.png")).size == (WIDTH, HEIGHT)


# ---- memory and speed ----

FAST = ("--video_length", 5, "--guidance_scale", 1, "--output_type", "latent_images")


@pytest.fixture(scope="module")
def plain(wan_models, pictures, tmp_path_factory) -> tuple[Tensor, np.ndarray]:
    """Latents and frames without any of it."""
    folder = tmp_path_factory.mktemp("無")
    argv = [*models_for(wan_models, "i2v-14B"), *QUICK, *FAST, "--image_path", pictures.start, "--save_path", folder]
    assert run(*argv) == 0
    return latents_in(folder)[0], saved(next(path for path in folder.iterdir() if path.is_dir()))


def test_what_saves_memory_reaches_the_models_and_changes_nothing(plain, i2v, pictures, monkeypatch):
    vaes, swaps, memmaps = [], [], []
    load_vae, load_transformer = wan_vae.load_vae, pipeline_module.load_transformer
    monkeypatch.setattr(wan_vae, "load_vae", lambda *a, **k: vaes.append(load_vae(*a, **k)) or vaes[-1])

    def load(checkpoint, **given):
        memmaps.append(checkpoint.memmap)
        swaps.append(given["swap"])
        return load_transformer(checkpoint, **given)

    monkeypatch.setattr(pipeline_module, "load_transformer", load)
    argv = ["--vae_cache_cpu", "--disable_numpy_memmap", "--blocks_to_swap", 2, "--offload_invariant", "never"]
    found = i2v(*FAST, "--image_path", pictures.start, *argv)
    assert torch.equal(latents_in(found)[0], plain[0])
    assert np.array_equal(saved(next(path for path in found.iterdir() if path.is_dir())), plain[1])
    assert ([vae.cache_on_cpu for vae in vaes], memmaps) == ([True], [False])
    assert [(swap.counts, swap.invariant) for swap in swaps] == [((2,), "none")]


@pytest.mark.parametrize(
    ("argv", "limit"),
    [(("--fp8",), 0.05), (("--fp8_scaled",), 0.05), (("--fp8_t5",), 0.01), (("--dit_dtype", "bf16"), 0.01)],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_fewer_bits_give_nearly_the_same(plain, i2v, pictures, argv, limit):
    (found,) = latents_in(i2v(*FAST, "--image_path", pictures.start, *argv))
    assert 0 < relative(found, plain[0]) < limit


def test_the_vae_computes_in_the_type_that_is_asked_for(plain, i2v, pictures):
    folder = i2v(*FAST, "--image_path", pictures.start, "--vae_dtype", "bf16")
    assert 0 < relative(latents_in(folder)[0], plain[0]) < 0.05
    frames = saved(next(path for path in folder.iterdir() if path.is_dir()))
    assert 0 < np.abs(frames.astype(int) - plain[1]).mean() < 3


def test_a_release_folder_is_enough(plain, wan_models: WanModelPaths, pictures, tmp_path):
    """Under the names that the official release has; what is given by itself goes first."""
    release = tmp_path / "Wan2.1-I2V-14B [480P]"
    release.mkdir()
    paths = wan_models.for_kind("i2v")
    shutil.copy(paths.dit, release / "diffusion_pytorch_model-00001-of-00001.safetensors")
    shutil.copy(paths.vae, release / "Wan2.1_VAE.pth")
    shutil.copytree(paths.t5_tokenizer, release / "google" / "umt5-xxl")
    (release / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth").write_bytes(b"not this one")
    elsewhere = shutil.copy(paths.t5, tmp_path / "別の場所.pth")
    argv = ["--task", "i2v-14B", "--ckpt_dir", release, "--clip", paths.clip, "--t5", elsewhere]
    assert run(*argv, *QUICK, *FAST, "--image_path", pictures.start, "--save_path", tmp_path / "out") == 0
    assert torch.equal(latents_in(tmp_path / "out")[0], plain[0])
