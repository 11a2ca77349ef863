"""From pictures to a picture with Wan's own scripts: caches, a LoRA, its samples while it is trained, generation."""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from PIL import Image
from torch import Tensor

import convert_lora
import wan_cache_latents
import wan_cache_text_encoder_outputs
import wan_generate_video
from common.flags import parse
from common.processes import Processes
from dataset.frames import examine_video
from demo.wan_models import WanModelPaths
from generation.outputs import load_latents
from networks.lora_merge import plan_merge
from options.errors import UserError
from options.flags_wan_train import WanTrainFlags
from options.lora import LoraChoice
from tests.cache_builders import picture, write_clip, write_config
from tests.training_driver import final_file
from tests.wan_training_builders import WanShop, train, write_denoiser
from tests.wan_transformers import build_oracle, conditioning, diffusers_forward, random
from training.sampling import Samples, sample_jobs
from wan.architecture import WanArchitecture
from wan.config import Kind
from wan.loading import load_transformer, open_transformer
from wan.pipeline import WanPipeline

TOLERANCE = 1e-5
COLOUR = (230, 120, 30)
CONTROLS = {"i2v": [0], "flf2v": [0, 2]}
CAPTION = "制服の少女, a girl in uniform"
STEPS = 80
FAILING = "夢"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The latents that are decoded, in order."""
    return record_decoded(monkeypatch)


def record_decoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Prompts that say so fail."""

    def record(self, request, latents):
        if FAILING in request.prompt:
            raise RuntimeError("no memory")
        found.append(latents)
        return decode(self, request, latents)

    found, decode = [], WanPipeline.decode
    monkeypatch.setattr(WanPipeline, "decode", record)
    return found


def flags_of(models: WanModelPaths, *names: str) -> list[object]:
    return [part for name in names for part in (f"--{name}", getattr(models, name))]


def run(script, *argv: object) -> None:
    assert script.main([str(part) for part in argv]) == 0


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(float)


def error(path: Path) -> float:
    """The mean distance from the target's colour."""
    return float(np.abs(pixels(path) - COLOUR).mean())


# ---- one pair, from its pictures to a picture ----


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What all that was run has left."""

    kind: str
    models: WanModelPaths
    folder: Path
    lora: Path
    samples: list[Path]
    """Before the first step and after the last one."""
    latents: list[Tensor]
    """The same, before they were decoded."""
    log: str


@pytest.fixture(scope="module", params=["i2v", "flf2v"])
def chain(request, wan_models, tmp_path_factory) -> Iterator[Chain]:
    kind, folder = request.param, tmp_path_factory.mktemp("一枚の絵 [1]")
    models, task = wan_models.for_kind(kind), f"{kind}-14B"
    shop = WanShop(
        folder=folder,
        dit=write_denoiser(models, folder / "変換器.safetensors"),
        data=write_pair(folder, kind),
        task=task,
    )
    data = ("--dataset_config", shop.data, "--num_workers", 0)
    run(wan_cache_latents, *data, "--one_frame", *flags_of(models, "vae", "clip"))
    run(wan_cache_text_encoder_outputs, *data, *flags_of(models, "t5"))
    prompts = folder / "例.txt"
    prompts.write_text("\n".join(prompt(folder, kind, text) for text in (FAILING, CAPTION)), encoding="utf-8")
    flags = {"network_dim": 4, "network_alpha": 4, "learning_rate": 0.02, "max_train_steps": STEPS}
    flags |= {"sample_prompts": prompts, "one_frame": True, "sample_at_first": True, "sample_every_n_steps": STEPS}
    flags |= {"one_frame_target_loss_only": True, **{name: getattr(models, name) for name in ("vae", "t5", "clip")}}
    command = shop.command(folder / "出力", **flags)
    with pytest.MonkeyPatch.context() as patch:
        latents, log = record_decoded(patch), Log()
        logging.getLogger().addHandler(log)
        assert train(command) == 0
        logging.getLogger().removeHandler(log)
    samples = sorted((folder / "出力" / "sample").glob("*_000.png"))
    yield Chain(
        kind=kind,
        models=models,
        folder=folder,
        lora=final_file(command),
        samples=samples,
        latents=latents,
        log=log.text,
    )


class Log(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += f"{record.getMessage()}\n"


def write_pair(folder: Path, kind: str) -> Path:
    """One picture of a single colour, with a control image for each place."""
    for name in ("images", "controls"):
        (folder / name).mkdir()
    Image.new("RGB", (64, 64), COLOUR).save(folder / "images" / "猫.png")
    (folder / "images" / "猫.txt").write_text(CAPTION, encoding="utf-8")
    for number, index in enumerate(CONTROLS[kind]):
        Image.fromarray(picture(number, (80, 64))).save(folder / "controls" / f"猫_{index}.png")
    keys = {"image_directory": folder / "images", "control_directory": folder / "controls"}
    keys |= {"cache_directory": folder / "cache", "resolution": [64, 64], "fp_1f_target_index": 1}
    return write_config(folder / "データ.toml", keys | {"fp_1f_clean_indices": CONTROLS[kind]})


def prompt(folder: Path, kind: str, text: str) -> str:
    """As users' documents have it."""
    steps = 6 if text == CAPTION else 1
    controls = [folder / "controls" / f"猫_{index}.png" for index in CONTROLS[kind]]
    images = f"--i {controls[0]} " + (f"--ei {controls[-1]} " if kind == "flf2v" else "")
    images += " ".join(f"--ci {control}" for control in controls)
    places = f"--of target_index=1,control_index={';'.join(map(str, CONTROLS[kind]))}"
    return f"{text} {images} {places} --d 1111 --f 1 --s {steps} --fs 1 --d 1234 --w 64 --h 64 --l 1"


def generate(chain: Chain, name: str, *more: object) -> tuple[Path, Tensor]:
    """(picture, latents) with the settings of the sample."""
    controls = [chain.folder / "controls" / f"猫_{index}.png" for index in CONTROLS[chain.kind]]
    ends = ["--image_path", controls[0]] + (["--end_image_path", controls[1]] if chain.kind == "flf2v" else [])
    places = f"target_index=1,control_index={';'.join(map(str, CONTROLS[chain.kind]))}"
    given = ["--task", f"{chain.kind}-14B", "--dit", chain.folder / "変換器.safetensors", "--prompt", CAPTION, *ends]
    given += ["--control_image_path", *controls, "--one_frame_inference", places, "--infer_steps", 6, "--flow_shift", 1]
    given += ["--seed", 1234, "--guidance_scale", 1, "--video_size", 64, 64, "--exact_size", "--device", "cpu"]
    given += [
        "--save_path",
        chain.folder / name,
        "--output_type",
        "latent_images",
        *flags_of(chain.models, "vae", "t5"),
    ]
    run(wan_generate_video, *given, "--clip", chain.models.clip, *more)
    (path,), (latents,) = ((chain.folder / name).glob(f"*.{suffix}") for suffix in ("png", "safetensors"))
    return path, load_latents(latents, flag="x")[0]


def test_a_lora_makes_the_picture_that_it_was_trained_on(chain) -> None:
    before, after = chain.samples
    assert error(before) > 50 and error(after) < 0.45 * error(before)


def test_one_failing_sample_stops_nothing(chain) -> None:
    assert [line.partition(" (")[0] for line in chain.log.splitlines()] == [
        f"例.txt line 1, sample at step {step} failed: RuntimeError: no memory" for step in (0, STEPS)
    ]


def test_samples_are_generations_pictures(chain) -> None:
    for way in ("--lora_weight", "--lora"):
        path, latents = generate(chain, f"out {way}", way, chain.lora)
        assert difference(chain.latents[-1], latents) <= TOLERANCE, way
        assert np.abs(pixels(path) - pixels(chain.samples[-1])).max() <= 1


@torch.no_grad()
def test_the_lora_does_the_same_in_diffusers(chain, tmp_path) -> None:
    run(convert_lora, "--input", chain.lora, "--output", tmp_path / "他.safetensors", "--target", "other")
    checkpoint = open_transformer(str(chain.folder / "変換器.safetensors"))
    choice = LoraChoice(path=str(chain.lora))
    place = {"dtype": torch.float32, "device": torch.device("cpu")}
    model = load_transformer(checkpoint, merge=plan_merge([choice], checkpoint, flag="--lora_weight"), **place)
    plain = load_transformer(checkpoint, **place)
    oracle = build_oracle(plain)
    state, said = WanLoraLoaderMixin.lora_state_dict(str(tmp_path / "他.safetensors"), return_lora_metadata=True)
    oracle.load_lora_adapter(state, metadata=said)
    noisy, timesteps, given = random(1, 16, 3, 4, 6, seed=5), torch.tensor([700.0]), conditioning(model.config)
    ours, theirs = model(noisy, timesteps, given), diffusers_forward(oracle, noisy, timesteps, given)
    assert difference(ours, theirs) <= TOLERANCE
    assert difference(plain(noisy, timesteps, given), theirs) > 0.1


# ---- samples of every kind ----

VIDEOS: dict[str, tuple[Kind, str, list[str], int]] = {
    "t2v-1.3B": ("t2v", "", [], 1),
    "i2v-14B": (
        "i2v",
        "--i {cat} --f 8 --l 1.5 --n 暗い --fs 3 --g 7",
        [
            *("--image_path", "{cat}", "--video_length", "5", "--guidance_scale", "1.5"),
            *("--negative_prompt", "暗い", "--flow_shift", "3"),
        ],
        5,
    ),
    "flf2v-14B": (
        "flf2v",
        "--i {cat} --ei {cup} --f 5",
        ["--image_path", "{cat}", "--end_image_path", "{cup}", "--video_length", "5"],
        5,
    ),
    "t2v-1.3B-FC": (
        "fun_control",
        "--cn {clip} --f 9",
        ["--control_path", "{clip}", "--video_length", "9"],
        9,
    ),
}
"""By task: the kind of transformer, what a prompt says beside size, steps and seed, what generation is told, frames."""


@pytest.mark.parametrize("task", VIDEOS)
def test_samples_of_every_task_are_what_generation_makes(task, wan_models, material, tmp_path, decoded) -> None:
    """What a prompt leaves open is as in generation."""
    kind, line, flags, num_frames = VIDEOS[task]
    models = wan_models.for_kind(kind)
    inputs = {"cat": material.chelsea, "cup": material.coffee, "clip": tmp_path / "制御.mp4"}
    write_clip(inputs["clip"], 12, fps=16, size=(64, 48))
    given = ["--task", task, *flags_of(models, "dit", "vae", "t5", "clip"), "--device", "cpu"]
    if kind == "t2v":  # a tokenizer that does not lie beside its model
        t5 = shutil.copy(models.t5, tmp_path / "文.pth")
        given += ["--t5", t5, "--t5_tokenizer", models.t5_tokenizer]
    if kind == "flf2v":  # everything else then lies in the folder of a release
        given = ["--task", task, *flags_of(models, "dit", "clip"), "--ckpt_dir", models.vae.parent, "--device", "cpu"]
    prompts = tmp_path / "例.txt"
    prompts.write_text(f"猫 {line.format(**inputs)} --w 64 --h 48 --s 2 --d 5", encoding="utf-8")
    make_samples(given, prompts, tmp_path)
    (sample,) = (tmp_path / "sample").glob("*_5_000.png" if num_frames == 1 else "*_5.mp4")
    if num_frames > 1:
        assert examine_video(sample).timing.num_frames == num_frames and examine_video(sample).timing.fps == 16
    told = ["--prompt", "猫", *(flag.format(**inputs) for flag in flags or ["--video_length", "1"])]
    told += ["--video_size", 48, 64, "--infer_steps", 2, "--seed", 5, "--exact_size", "--save_path", tmp_path / "out"]
    run(wan_generate_video, *given, *told, "--output_type", "latent")
    (latents,) = (tmp_path / "out").glob("*.safetensors")
    assert difference(decoded[0], load_latents(latents, flag="x")[0]) <= TOLERANCE


def make_samples(given: list[object], prompts: Path, folder: Path) -> None:
    """Of a training that has not begun."""
    architecture = WanArchitecture.open(parse(WanTrainFlags, description="", argv=[str(part) for part in given]))
    place = {"dtype": torch.float32, "device": torch.device("cpu")}
    jobs = sample_jobs(str(prompts), architecture.sample_defaults, seed=1)
    samples = Samples(architecture, jobs, folder=folder / "sample", name="x", processes=Processes(), **place)
    samples.encode()
    samples.make(architecture.load_transformer(**place), step=1, session=1)


@pytest.mark.parametrize(
    ("line", "words"), [("--cn なし.mp4 --f 5", "no such file"), ("--cn {clip} --f 9", "4 frames")]
)
def test_a_control_video_that_cannot_be_used_is_refused_before_training(line, words, wan_models, tmp_path) -> None:
    write_clip(tmp_path / "制御.mp4", 4, fps=16, size=(64, 48))
    models, prompts = wan_models.for_kind("fun_control"), tmp_path / "例.txt"
    prompts.write_text(f"猫 {line.format(clip=tmp_path / '制御.mp4')} --w 64 --h 48", encoding="utf-8")
    given = ["--task", "t2v-1.3B-FC", *flags_of(models, "dit", "vae", "t5"), "--device", "cpu"]
    with pytest.raises(UserError, match=f"--control_path.*{words}"):
        make_samples(given, prompts, tmp_path)


def test_models_of_samples_are_loaded_as_flags_say(wan_models) -> None:
    flags = ["--vae_dtype", "bf16", "--vae_cache_cpu", "--fp8_t5", "--fp8_scaled", "--split_attn"]
    given = ["--task", "i2v-14B", *flags_of(wan_models, "dit", "vae", "t5", "clip"), *flags]
    architecture = WanArchitecture.open(parse(WanTrainFlags, description="", argv=[str(part) for part in given]))
    place = {"dtype": torch.float32, "device": torch.device("cpu")}
    transformer = architecture.load_transformer(**place)
    compute = architecture.pipeline(**place, transformer=transformer).compute
    assert (compute.vae_dtype, compute.vae_cache_cpu, compute.fp8_t5, compute.fp8) == (
        *(torch.bfloat16, True, True, "scaled"),
    )
    assert compute.t5_dtype == compute.clip_dtype == compute.transformer_dtype == torch.float32
    assert transformer.attention.split and compute.execution.attention.split
