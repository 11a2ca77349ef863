"""Samples while training: generation's own pictures, whatever goes wrong, and a sheet of how they change."""

import json
import logging
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import fpack_generate_video
from common.flags import parse
from common.processes import Processes
from common.sheets import contact_sheet
from frame_pack.compute import Compute
from frame_pack.loading import load_transformer, open_models
from frame_pack.pipeline import FramePackPipeline
from generation.outputs import load_latents, read_settings, save_pictures
from generation.pipeline import Failure
from generation.settings import Provenance
from networks import lora_framepack
from options.errors import UserError
from options.flags_fpack_generate import FramePackGenerateFlags
from options.flags_train import SampleFlags
from options.fpack_request import FramePackRequestFlags
from training.sample_sheets import MAX_CELLS, earlier_samples, thinned
from training.sampling import Samples, sample_due, sample_jobs
from training.tracking import Trackers

CPU = torch.device("cpu")
NAME = "絵 [1]"
SMALL = "--w 64 --h 64 --s 2 --d 5"


def samples_of(architecture, folder: Path, prompts: str, *, processes=None, tracker=None, defaults=None) -> Samples:
    """Encoded and ready."""
    path = folder / "例 prompts.txt"
    path.write_text(prompts, encoding="utf-8")
    samples = Samples(
        architecture,
        sample_jobs(str(path), defaults or FramePackRequestFlags(), seed=1),
        folder=folder / "sample",
        name=NAME,
        dtype=torch.float32,
        device=CPU,
        processes=processes or Processes(),
        tracker=tracker,
    )
    samples.encode()
    return samples


def errors(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def made(folder: Path, pattern: str = "*_000.png") -> list[Path]:
    return sorted((folder / "sample").glob(pattern))


def difference(latents: torch.Tensor, expected: torch.Tensor) -> float:
    return float((latents - expected).abs().max() / expected.abs().max())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


# ---- samples are what generation makes ----


class RecordingPipeline(FramePackPipeline):
    """Keeps the latents that it decodes."""

    def decode(self, request, latents):
        self.latents = latents
        return super().decode(request, latents)


class SmallFramePack:
    """An architecture around the small models."""

    def __init__(self, models: list[str]) -> None:
        flags = parse(FramePackGenerateFlags, description="", argv=[*models, "--save_path", "nowhere"])
        self.checkpoints, self.compute = open_models(flags.models), Compute.from_flags(flags.compute)
        self.opened: list[RecordingPipeline] = []

    def pipeline(self, *, dtype, device, transformer) -> RecordingPipeline:
        assert (dtype, device) == (torch.float32, CPU)
        self.opened.append(RecordingPipeline(self.checkpoints, self.compute, transformer=transformer))
        return self.opened[-1]


@pytest.fixture(scope="module")
def models(demo_models) -> list[str]:
    names = ("dit", "vae", "text_encoder1", "text_encoder2", "image_encoder")
    return [part for name in names for part in (f"--{name}", str(getattr(demo_models, name)))]


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """(architecture, transformer with a network applied, the network's file)."""
    architecture = SmallFramePack(models)
    transformer = load_transformer(architecture.checkpoints.transformer, dtype=torch.float32, device=CPU)
    network = lora_framepack.create_network(transformer, dim=2, alpha=1.0, args={})
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    path = tmp_path_factory.mktemp("学習 [x]") / "私の.safetensors"
    network.eval().save(path, metadata={})
    network.apply_to(transformer)
    return architecture, transformer, path


def generate(models: list[str], folder: Path, *argv: object) -> None:
    assert fpack_generate_video.main([*models, *map(str, argv), "--save_path", str(folder)]) == 0


def test_a_one_frame_sample_is_generations_picture(models, trained, material, tmp_path):
    """With a control image that has an alpha channel, a mask, and the LoRA applied here and merged there."""
    architecture, transformer, lora = trained
    (inputs := tmp_path / "入力").mkdir()
    pictures = {"猫.png": material.chelsea, "珈琲.png": material.coffee_with_alpha, "m.png": material.astronaut_mask}
    cat, coffee, mask = (shutil.copy(path, inputs / name) for name, path in pictures.items())
    one_frame = "target_index=1,control_index=0;10,no_post"
    prompt = f"窓辺の猫 --i {cat} --ci {cat} --ci {coffee} --cim {mask} --of {one_frame} --f 1 --g 8"
    samples = samples_of(architecture, tmp_path, f"{prompt} {SMALL}")
    samples.make(transformer, step=100, session=1)
    (sample,) = made(tmp_path)

    given = ("--prompt", "窓辺の猫", "--image_path", cat, "--control_image_path", cat, coffee)
    given += ("--control_image_mask_path", mask, "--one_frame_inference", one_frame)
    given += ("--embedded_cfg_scale", 8, "--video_size", 64, 64, "--infer_steps", 2, "--seed", 5)
    merged = ("--lora_weight", lora)
    generate(models, tmp_path / "out", *given, *merged, "--output_type", "latent_images")
    generate(models, tmp_path / "without", *given, "--output_type", "images")
    (picture,) = (tmp_path / "out").glob("*.png")
    (without,) = (tmp_path / "without").glob("*.png")
    (latents,) = (tmp_path / "out").glob("*.safetensors")
    # After two steps; the rounding of a single forward grows in them.
    assert difference(architecture.opened[-1].latents, load_latents(latents, flag="x")[0]) <= 5e-5
    assert abs(pixels(sample) - pixels(picture)).max() <= 1
    assert abs(pixels(sample) - pixels(without)).max() > 4, "the LoRA has an effect"

    generate(models, tmp_path / "again", "--from_metadata", sample, *merged, "--search_dir", inputs)
    (again,) = (tmp_path / "again").glob("*.png")
    assert np.array_equal(pixels(again), pixels(picture)), "a sample's settings are generation's"


def test_a_video_sample_has_generations_latents(models, trained, material, tmp_path, encoded_videos):
    architecture, transformer, lora = trained
    defaults = FramePackRequestFlags(latent_window_size=2)
    prompt = f"a cat --i {material.chelsea} --f 16 --l 1.5 --n blurry --fs 3 {SMALL}"
    samples = samples_of(architecture, tmp_path, prompt, defaults=defaults)
    samples.make(transformer, step=7, epoch=2, session=1)
    given = ("--prompt", "a cat", "--image_path", material.chelsea, "--video_sections", 2, "--latent_window_size", 2)
    given += ("--guidance_scale", 1.5, "--negative_prompt", "blurry", "--flow_shift", 3, "--video_size", 64, 64)
    given += ("--infer_steps", 2, "--seed", 5, "--output_type", "latent")
    expected = {}
    for flag in ("--lora", "--lora_weight"):
        generate(models, tmp_path / flag, *given, flag, lora)
        expected[flag] = load_latents(next((tmp_path / flag).glob("*.safetensors")), flag="x")[0]
    latents = architecture.opened[-1].latents
    assert latents.shape == (16, 5, 8, 8)
    assert torch.equal(latents, expected["--lora"])
    assert difference(latents, expected["--lora_weight"]) <= 1e-4, "two sections with guidance enlarge what is rounded"

    (video,) = made(tmp_path, "*.mp4")
    assert video.name.startswith(f"{NAME}_e000002_00_") and video.stem.endswith("_5")
    with av.open(str(video)) as container:
        assert container.streams.video[0].average_rate == 30 and container.streams.video[0].frames == 17
    settings = json.loads(read_settings(video, flag="x"))
    assert settings["request"]["num_sections"] == 2 and settings["models"]["--vae"]
    assert settings["models"]["--lora_weight"] == f"{NAME}, at step 7 of its training"
    assert settings["training"] == {"session": 1, "step": 7, "epoch": 2}


def test_encoders_are_used_once_and_the_vae_is_read_once_more(trained, material, tmp_path, monkeypatch):
    from frame_pack import pipeline as pipeline_module

    architecture, transformer, _ = trained
    loaded = []
    for name in ("load_llama", "load_clip", "load_siglip", "load_transformer"):
        original = getattr(pipeline_module, name)

        def load(*args, original=original, name=name, **named):
            loaded.append(name)
            return original(*args, **named)

        monkeypatch.setattr(pipeline_module, name, load)
    architecture.opened.clear()
    prompt = f"a cat --i {material.chelsea} --of default {SMALL} --s 1\n"
    samples = samples_of(architecture, tmp_path, prompt * 2)
    assert sorted(loaded) == ["load_clip", "load_llama", "load_siglip"]
    for step in (1, 2):
        samples.make(transformer, step=step, session=1)
    assert len(made(tmp_path)) == 4
    assert len(loaded) == 3 and len(architecture.opened) == 2


# ---- a stand-in that is quick, and fails on request ----


@dataclass
class QuickPipeline:
    """Pictures of a colour for each step; prompts say what goes wrong."""

    steps: list[int]
    encoded: list[str]
    frames: int = 1

    def provenance(self, *, with_paths):
        return Provenance(family="framepack", models={"--dit": "x"}, compute={}, with_paths=with_paths)

    def check(self, request) -> None:
        """Nothing that only models tell is wrong."""

    @contextmanager
    def encoder(self) -> Iterator:
        yield lambda requests: map(self.encode, requests)

    def encode(self, request):
        prompt = request.prompts[0]
        self.encoded.append(prompt)
        draw_numbers()
        return Failure(error=ValueError("no\nwords")) if "unencodable" in prompt else prompt

    @contextmanager
    def denoiser(self) -> Iterator:
        yield self.denoise

    def denoise(self, request, conditioning, on_progress):
        draw_numbers()
        if "interrupted" in conditioning:
            raise KeyboardInterrupt
        if "fails" in conditioning:
            raise RuntimeError("out of\nmemory")
        return torch.zeros(16, self.frames, 8, 8)

    def decode(self, request, latents):
        level = min(self.steps[0], 255)
        colours = [(255 - level, level, 40 + 10 * frame) for frame in range(latents.shape[1])]
        return np.array([np.full((96, 64, 3), colour) for colour in colours], np.uint8)


@dataclass
class Quick:
    """An architecture with a `QuickPipeline`."""

    frames: int = 1
    is_broken: bool = False
    steps: list[int] = field(default_factory=lambda: [0])
    """The step that pictures show."""
    encoded: list[str] = field(default_factory=list)

    def pipeline(self, *, dtype, device, transformer):
        if self.is_broken and transformer is not None:
            raise RuntimeError("no pipeline")
        return QuickPipeline(self.steps, self.encoded, self.frames)


def draw_numbers() -> None:
    torch.rand(3), np.random.rand(3), random.random()


def numbers() -> tuple:
    """What the generators would draw next."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    drawn = torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()
    torch.set_rng_state(states[0]), np.random.set_state(states[1]), random.setstate(states[2])
    return drawn


def make(samples: Samples, architecture: Quick, *steps: int, session: int = 1, epoch: int | None = None) -> None:
    for step in steps:
        architecture.steps[0] = step
        samples.make(torch.nn.Identity(), step=step, epoch=epoch, session=session)


PICTURE = "--of default --w 64 --h 96 --d 5"


def test_one_failing_sample_is_logged_in_one_line_and_the_others_are_made(tmp_path, caplog):
    quick = Quick()
    samples = samples_of(quick, tmp_path, f"a {PICTURE}\nfails {PICTURE}\nb {PICTURE}\n")
    with caplog.at_level(logging.ERROR):
        make(samples, quick, 100)
    (message,) = errors(caplog)
    expected = "例 prompts.txt line 2, sample at step 100 failed: RuntimeError: out of memory"
    assert message.startswith(expected) and "\n" not in message
    assert [path.name[:16] for path in made(tmp_path)] == [f"{NAME}_000100_{number:02d}_" for number in (0, 2)]


def test_a_prompt_that_cannot_be_encoded_is_logged_and_left_out(tmp_path, caplog):
    quick = Quick()
    with caplog.at_level(logging.ERROR):
        samples = samples_of(quick, tmp_path, f"unencodable {PICTURE}\nb {PICTURE}\n")
    (message,) = errors(caplog)
    assert message.startswith("例 prompts.txt line 1 failed: ValueError: no words")
    make(samples, quick, 1)
    assert [path.name.split("_")[2] for path in made(tmp_path)] == ["01"]


def test_an_image_that_vanished_is_logged(tmp_path, caplog, material):
    image = shutil.copy(material.coffee, tmp_path / "猫.png")
    (tmp_path / "prompts.txt").write_text(f"a --i {image} {PICTURE}", encoding="utf-8")
    jobs = sample_jobs(str(tmp_path / "prompts.txt"), FramePackRequestFlags(), seed=1)
    Path(image).unlink()
    settings = {"folder": tmp_path, "name": NAME, "dtype": torch.float32, "device": CPU, "processes": Processes()}
    with caplog.at_level(logging.ERROR):
        Samples(Quick(), jobs, **settings).encode()
    (message,) = errors(caplog)
    assert message.startswith("prompts.txt line 1 failed: FileNotFoundError")


def test_a_pipeline_that_does_not_open_is_logged(tmp_path, caplog):
    samples = samples_of(Quick(is_broken=True), tmp_path, f"a {PICTURE}")
    with caplog.at_level(logging.ERROR):
        make(samples, Quick(), 3)
    (message,) = errors(caplog)
    assert message.startswith("samples at step 3 failed: RuntimeError: no pipeline")


@pytest.mark.parametrize(("error", "is_raised"), [(UserError("--vae", "x", "y", "z"), True), (MemoryError(), False)])
def test_only_what_the_user_gave_wrongly_stops_a_run_before_it_begins(tmp_path, caplog, error, is_raised):
    class Broken(Quick):
        def pipeline(self, **named):
            raise error

    if is_raised:
        with pytest.raises(UserError):
            samples_of(Broken(), tmp_path, f"a {PICTURE}")
        return
    with caplog.at_level(logging.ERROR):
        make(samples_of(Broken(), tmp_path, f"a {PICTURE}"), Quick(), 1)
    (message,) = errors(caplog)
    assert message.startswith("samples failed: MemoryError")


def test_an_interruption_passes(tmp_path):
    quick = Quick()
    samples = samples_of(quick, tmp_path, f"interrupted {PICTURE}")
    before = numbers()
    with pytest.raises(KeyboardInterrupt):
        make(samples, quick, 1)
    assert numbers() == before


def test_random_numbers_are_as_they_were(tmp_path):
    quick = Quick()
    before = numbers()
    samples = samples_of(quick, tmp_path, f"a {PICTURE}\nfails {PICTURE}\n")
    make(samples, quick, 1)
    assert numbers() == before
    draw_numbers()
    assert numbers() != before


@dataclass(frozen=True, kw_only=True)
class Alone(Processes):
    """One of several processes, without the others."""

    def gather(self, value):
        return [value]


def test_every_process_encodes_and_makes_its_own_share(tmp_path):
    for rank, wanted in ((0, [0, 2]), (1, [1])):
        quick, folder = Quick(), tmp_path / str(rank)
        folder.mkdir()
        prompts = "".join(f"prompt {number} {PICTURE}\n" for number in range(3))
        samples = samples_of(quick, folder, prompts, processes=Alone(rank=rank, world=2))
        make(samples, quick, 1)
        assert quick.encoded == [f"prompt {number}" for number in wanted]
        assert [int(path.name.split("_")[2]) for path in made(folder)] == wanted


def test_a_process_without_a_share_loads_nothing(tmp_path):
    quick = Quick(is_broken=True)
    samples = samples_of(quick, tmp_path, f"a {PICTURE}", processes=Alone(rank=1, world=2))
    make(samples, quick, 1)
    assert not quick.encoded and not made(tmp_path, "*")


class Recorder:
    def __init__(self) -> None:
        self.samples = []

    def log_sample(self, number, path, *, step) -> None:
        self.samples.append((number, path.name, step))


def test_samples_are_tracked_by_the_number_of_their_prompt(tmp_path):
    quick, recorder = Quick(), Recorder()
    samples = samples_of(
        quick, tmp_path, f"fails {PICTURE}\nb {PICTURE}\n", tracker=Trackers({"tensorboard": recorder})
    )
    make(samples, quick, 20)
    (path,) = made(tmp_path)
    assert recorder.samples == [(1, path.name, 20)]


# ---- when ----


@pytest.mark.parametrize(
    ("flags", "due"),
    [
        ({}, []),
        ({"sample_at_first": True}, [0]),
        ({"sample_every_n_steps": 4}, [4, 8, 12]),
        ({"sample_every_n_epochs": 1}, [3, 6, 9, 12]),
        ({"sample_every_n_epochs": 2}, [6, 12]),
        ({"sample_every_n_steps": 4, "sample_every_n_epochs": 2, "sample_at_first": True}, [0, 4, 6, 8, 12]),
    ],
)
def test_samples_come_at_first_by_steps_and_by_epochs(flags, due):
    """Epochs of three steps."""
    flags = SampleFlags(**flags)
    ends = {step: step // 3 if step and step % 3 == 0 else None for step in range(13)}
    assert [step for step, end in ends.items() if sample_due(flags, step=step, epoch_end=end)] == due


# ---- sheets ----


def sheet_of(folder: Path, number: int = 0) -> np.ndarray:
    return pixels(folder / "sample" / f"{NAME}_{number:02d}_sheet.png")


def expected_sheet(steps: list[int], title: str = "a", colour_of_blue: int = 40) -> np.ndarray:
    def picture(step: int) -> Image.Image:
        return Image.new("RGB", (64, 96), (255 - min(step, 255), min(step, 255), colour_of_blue))

    cells = [(f"step {step}", picture(step)) for step in steps]
    return np.asarray(contact_sheet(cells, columns=8, cell_width=256, title=title)).astype(int)


def test_a_sheet_grows_with_every_sample(tmp_path):
    quick = Quick()
    samples = samples_of(quick, tmp_path, f"a {PICTURE}\nb {PICTURE}\n")
    make(samples, quick, 0)
    make(samples, quick, 90, epoch=1)
    make(samples, quick, 200)
    assert np.array_equal(sheet_of(tmp_path), expected_sheet([0, 90, 200]))
    assert np.array_equal(sheet_of(tmp_path, 1), expected_sheet([0, 90, 200], "b"))


def test_a_sheet_goes_on_growing_in_a_resumed_run_and_shows_no_other_run(tmp_path):
    quick = Quick()
    make(samples_of(quick, tmp_path, f"a {PICTURE}"), quick, 50, session=8)
    make(samples_of(quick, tmp_path, f"a {PICTURE}"), quick, 0, 100, 150, 200, session=9)
    (tmp_path / "sample" / f"{NAME}_000010_00_20250417120000_5_000.png").write_bytes(b"damaged")
    shutil.copy(made(tmp_path)[-1], tmp_path / "sample" / f"{NAME}x_000020_00_20250417120000_5_000.png")
    make(samples_of(quick, tmp_path, f"a {PICTURE}"), quick, 100, session=9)
    assert np.array_equal(sheet_of(tmp_path), expected_sheet([0, 100])), "set back: 150 is not reached again yet"
    make(samples_of(quick, tmp_path, f"a {PICTURE}"), quick, 10, session=10)
    assert np.array_equal(sheet_of(tmp_path), expected_sheet([10]))


def test_of_several_samples_at_one_step_the_latest_counts(tmp_path):
    def save(name: str, step: int, **made) -> Path:
        settings = json.dumps({"training": {"session": 1, "step": step, **made}})
        return save_pictures(np.zeros((1, 16, 16, 3), np.uint8), tmp_path, name, settings=settings)[0]

    save(f"{NAME}_000005_00_20260101000000_5_000", 5)
    late = save(f"{NAME}_e000001_00_20260301000000_5_000", 5)
    save(f"{NAME}_000005_00_20260201000000_5_000", 5)
    other = save(f"{NAME}_000007_00_20260101000000_5_000", 7)
    save(f"{NAME}_000008_01_20260101000000_5_000", 8)
    save(f"{NAME}_000009_00_20260101000000_5_000", 9, session=2)
    assert earlier_samples(tmp_path, NAME, 0, session=1) == {5: late, 7: other}


def test_a_video_is_on_its_sheet_with_its_middle_frame(tmp_path):
    quick = Quick(frames=5)
    samples = samples_of(quick, tmp_path, "a --w 64 --h 96 --d 5")
    make(samples, quick, 100)
    make(samples_of(quick, tmp_path, "a --w 64 --h 96 --d 5"), quick, 200)
    assert len(made(tmp_path, "*.mp4")) == 2
    difference = abs(sheet_of(tmp_path) - expected_sheet([100, 200], colour_of_blue=60))
    assert difference.max() <= 6, "colours survive the encoder nearly"


def test_a_sheet_stays_bounded_with_the_first_and_the_last_sample(tmp_path, monkeypatch):
    quick = Quick()
    samples = samples_of(quick, tmp_path, f"a {PICTURE}")
    with monkeypatch.context() as patch:  # drawing takes its time
        patch.setattr("training.sample_sheets.contact_sheet", lambda *_, **__: Image.new("L", (1, 1)))
        make(samples, quick, *range(0, 44))
    make(samples, quick, 44)
    assert np.array_equal(sheet_of(tmp_path), expected_sheet(list(range(0, 45, 2))))


@pytest.mark.parametrize("count", [1, 2, 39, 40, 41, 42, 79, 80, 81, 1000])
def test_thinning_keeps_both_ends_and_even_distances(count):
    steps = [10 * number for number in range(count)]
    kept = thinned(steps)
    assert min(count, MAX_CELLS // 2) <= len(kept) <= MAX_CELLS
    assert (kept[0], kept[-1]) == (steps[0], steps[-1])
    assert len({later - earlier for earlier, later in zip(kept[:-2], kept[1:-1], strict=True)}) <= 1


def test_what_was_thinned_out_is_not_needed_again():
    shown = set(thinned(range(1)))
    for count in range(2, 200):
        kept = set(thinned(range(count)))
        assert kept <= shown | {count - 1}
        shown = kept


def test_a_sheet_that_cannot_be_drawn_costs_no_sample(tmp_path, caplog, monkeypatch):
    quick, recorder = Quick(), Recorder()
    samples = samples_of(quick, tmp_path, f"a {PICTURE}", tracker=Trackers({"wandb": recorder}))
    monkeypatch.setattr("training.sample_sheets.contact_sheet", lambda *_, **__: 1 / 0)
    with caplog.at_level(logging.ERROR):
        make(samples, quick, 1)
    assert len(made(tmp_path)) == len(recorder.samples) == 1
    (message,) = errors(caplog)
    assert "ZeroDivisionError" in message and not made(tmp_path, "*sheet*")
