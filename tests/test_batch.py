"""`--from_file`: one load for all lines, each line for itself, and a batch that was stopped goes on where it was."""

import importlib
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data_dir

import fpack_generate_video
from generation.batch import read_batch
from generation.outputs import load_latents
from generation.settings import Provenance
from options.errors import UserError
from options.fpack_request import FramePackRequestFlags
from options.request import GenerationRequest

NAMES = ("dit", "vae", "text_encoder1", "text_encoder2", "image_encoder")
TINY = ("--video_size", "32", "32", "--infer_steps", "1", "--one_frame_inference", "default", "--output_type", "images")
"""The smallest picture in one step."""
DEADLINE = 120
"""Seconds until a process that does nothing fails its test."""


def pictures(folder: Path) -> list[bytes]:
    """In the order in which they were made."""
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


# ---- one evening with the small models ----


@dataclass
class Evening:
    """What happened while a file of prompts was generated."""

    models: list[str]
    """The flags that name them."""
    cat: Path
    coffee: Path
    code: int = -1
    events: list[tuple[str, object]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    results: list[bytes] = field(default_factory=list)
    """Of lines 3, 4, 5, 6 and 9."""

    def of(self, kind: str) -> list[object]:
        return [what for event, what in self.events if event == kind]


@pytest.fixture(scope="module")
def evening(demo_models, tmp_path_factory) -> Evening:
    """Six prompts in a file with a byte order mark, comments and Japanese names; line 8's image breaks in the end."""
    folder = tmp_path_factory.mktemp("夜 [1]")
    cat, coffee, broken = folder / "猫 の絵.png", folder / "coffee.png", folder / "壊れる.png"
    for path, photo in {cat: "chelsea.png", coffee: "coffee.png", broken: "coffee.png"}.items():
        shutil.copy(Path(data_dir) / photo, path)
    lines = [
        "\ufeff# 夜の部",
        "",
        f"I am a cat --i {cat} --d 1",
        f"I am a cat --i {coffee} --d 1",
        f"I am a cat --i {cat} --d 1 --g 2 --n 茶色",
        f"I am a cat --i {cat} --d 1 --g 2 --n blue",
        "   # 休憩 --d 5",
        f"猫が歩く --i {broken} --d 1",
        f"猫が歩く --i {cat} --ci {cat} --d 1",
    ]
    (folder / "プロンプト.txt").write_bytes("\r\n".join(lines).encode())
    models = [part for name in NAMES for part in (f"--{name}", str(getattr(demo_models, name)))]
    evening, out = Evening(models=models, cat=cat, coffee=coffee), folder / "結果"
    with pytest.MonkeyPatch.context() as patch, complaints(evening.complaints):
        watch(patch, evening.events, out)
        spy(patch, "frame_pack.conditioning.encode_llama", lambda *a, **k: broken.write_bytes(b"no picture any more"))
        argv = [*TINY, "--from_file", str(folder / "プロンプト.txt"), "--control_image_path", str(coffee)]
        evening.code = fpack_generate_video.main([*models, *argv, "--save_path", str(out)])
    evening.results = pictures(out)
    return evening


def watch(patch: pytest.MonkeyPatch, events: list[tuple[str, object]], out: Path) -> None:
    """Notes what is loaded, what is encoded, and how many results are there when a denoising begins."""
    loaders = {
        "LLaMA": "frame_pack.pipeline.load_llama",
        "CLIP": "frame_pack.pipeline.load_clip",
        "SigLIP": "frame_pack.pipeline.load_siglip",
        "VAE": "hunyuan_model.vae.load_vae",
        "transformer": "frame_pack.pipeline.load_transformer",
    }
    for name, loader in loaders.items():
        spy(patch, loader, lambda *a, name=name, **k: events.append(("load", name)))
    encoding = "frame_pack.conditioning"
    spy(patch, f"{encoding}.encode_llama", lambda model, tokenizer, text, **k: events.append(("text", text)))
    spy(patch, f"{encoding}._features", lambda model, image: events.append(("features", Path(image.path).name)))
    spy(patch, f"{encoding}._image_latent", lambda model, image: events.append(("latent", Path(image.path).name)))
    spy(patch, "frame_pack.pipeline.generate_latents", lambda *a: events.append(("saved", len(pictures(out)))))


def spy(patch: pytest.MonkeyPatch, target: str, note: Callable[..., object]) -> None:
    """Calls `note` with the arguments of every call of the function that `target` names, before the call."""
    module, name = target.rsplit(".", 1)
    original = getattr(importlib.import_module(module), name)

    def noted(*args, **kwargs):
        note(*args, **kwargs)
        return original(*args, **kwargs)

    patch.setattr(target, noted)


@contextmanager
def complaints(messages: list[str]):
    """Collects what is logged as an error."""
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    yield
    logging.getLogger().removeHandler(handler)


def test_all_lines_share_one_load_of_each_model_in_the_order_of_the_stages(evening):
    assert evening.of("load") == ["LLaMA", "CLIP", "SigLIP", "VAE", "transformer"]


def test_equal_texts_and_images_of_different_lines_are_encoded_once(evening):
    assert evening.of("text") == ["I am a cat", "茶色", "blue", "猫が歩く"]
    assert evening.of("features") == ["猫 の絵.png", "coffee.png", "壊れる.png"]
    assert evening.of("latent") == ["coffee.png", "猫 の絵.png"]


def test_each_result_is_saved_before_the_next_prompt_is_denoised(evening):
    assert evening.of("saved") == [0, 1, 2, 3, 4]
    assert len(evening.results) == 5


def test_an_image_that_breaks_after_the_check_fails_its_own_line_only(evening):
    assert evening.code == 1
    (complaint,) = evening.complaints
    assert "プロンプト.txt line 8" in complaint and "壊れる.png" in complaint


def test_lines_with_one_prompt_keep_their_own_images_and_negative_prompts(evening, tmp_path):
    """Each is what the same settings give as a single run, to the byte."""
    lone = {
        1: ["--image_path", str(evening.coffee)],
        2: ["--image_path", str(evening.cat), "--guidance_scale", "2", "--negative_prompt", "茶色"],
    }
    for index, options in lone.items():
        argv = ["--prompt", "I am a cat", "--seed", "1", "--control_image_path", str(evening.coffee), *options]
        out = tmp_path / str(index)
        assert fpack_generate_video.main([*evening.models, *TINY, *argv, "--save_path", str(out)]) == 0
        assert pictures(out) == [evening.results[index]]
    assert len(set(evening.results)) == 5


def test_a_batch_whose_process_was_killed_goes_on_with_exactly_the_missing_results(evening, repository, tmp_path):
    lines = [f"I am a cat --i {image} --d 1" for image in (evening.cat, evening.coffee, evening.coffee)]
    (tmp_path / "three.txt").write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "out"
    argv = [*evening.models, *TINY, "--from_file", str(tmp_path / "three.txt"), "--save_path", str(out)]
    argv += ["--control_image_path", str(evening.coffee)]
    with (tmp_path / "log.txt").open("wb") as log:
        script = str(repository / "fpack_generate_video.py")
        process = subprocess.Popen([sys.executable, script, *argv], stdout=log, stderr=log)
        try:
            wait_until(lambda: has_entry(out), process, tmp_path / "log.txt")
        finally:
            process.kill()
            process.wait()
    before = pictures(out)
    assert 1 <= len(before) < 3
    events = []
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, events, out)
        assert fpack_generate_video.main([*argv, "--resume_batch"]) == 0
    assert len([event for event in events if event[0] == "saved"]) == 3 - len(before)
    assert pictures(out)[: len(before)] == before
    first, second = evening.results[:2]
    assert pictures(out) == [first, second, second]


def has_entry(folder: Path) -> bool:
    """Whether the journal holds a whole line."""
    return any(journal.read_text().endswith("}") for journal in folder.glob("three.*.finished.jsonl"))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.02)


# ---- the bookkeeping, with a pipeline that needs no models ----


class Painter:
    """A pipeline whose picture is the noise of the seed. `fails` and `decoding_fails` may break a prompt."""

    def __init__(self) -> None:
        self.painted: list[str] = []
        self.fails: Callable[[str], BaseException | None] = lambda prompt: None
        self.decoding_fails: Callable[[str], BaseException | None] = lambda prompt: None

    def check(self, request: GenerationRequest) -> None:
        """Every request will do."""

    def provenance(self, *, with_paths: bool) -> Provenance:
        return Provenance(family="framepack", models={}, compute={"device": "none"}, with_paths=with_paths)

    @contextmanager
    def encoder(self):
        yield lambda requests: [SimpleNamespace(pictures=()) for _ in requests]

    @contextmanager
    def denoiser(self):
        yield self._denoise

    def _denoise(self, request, conditioning, on_progress):
        if error := self.fails(request.prompts[0]):
            raise error
        self.painted.append(request.prompts[0])
        return torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(request.seed))

    def decode(self, request, latents):
        if error := self.decoding_fails(request.prompts[0]):
            raise error
        return np.random.default_rng(request.seed).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)


@dataclass
class Batch:
    """A prompt file and its results."""

    painter: Painter
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "prompts.txt"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def journal(self) -> Path:
        (path,) = self.out.glob("*.jsonl")
        return path

    def write(self, *lines: str) -> None:
        self.file.write_text("\n".join(lines), encoding="utf-8")

    def run(self, *flags: str) -> tuple[int, list[str]]:
        """The exit code and the prompts that were painted."""
        self.painter.painted.clear()
        code = fpack_generate_video.main([*TINY, "--from_file", str(self.file), "--save_path", str(self.out), *flags])
        return code, list(self.painter.painted)


@pytest.fixture
def batch(tmp_path, monkeypatch) -> Batch:
    painter = Painter()
    monkeypatch.setattr(fpack_generate_video, "open_pipeline", lambda flags: painter)
    return Batch(painter, tmp_path)


def test_a_failing_line_is_named_and_the_others_are_saved(batch, caplog):
    batch.write("a", "", "b", "c")
    batch.painter.fails = lambda prompt: RuntimeError("out of\nmemory") if prompt == "b" else None
    assert batch.run() == (1, ["a", "c"])
    assert len(pictures(batch.out)) == 2
    (complaint,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert complaint.startswith("prompts.txt line 3") and "out of memory" in complaint


@pytest.mark.parametrize("output_type", ["images", "video", "latent_images"])
def test_latents_survive_a_failing_decoder(output_type, batch, caplog):
    batch.write("a --d 3", "b --d 4")
    batch.painter.decoding_fails = lambda prompt: RuntimeError("out of memory") if prompt == "a" else None
    assert batch.run("--output_type", output_type) == (1, ["a", "b"])
    (kept,) = batch.out.glob("*_3_latent.safetensors")
    assert torch.equal(load_latents(kept)[0], torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(3)))
    assert "--latent_path" in caplog.text and kept.name in caplog.text
    assert [path.stem[-2:] for path in batch.out.iterdir() if path.suffix in (".png", ".mp4")] == ["_4"]
    batch.painter.decoding_fails = lambda prompt: None
    assert batch.run("--output_type", output_type, "--resume_batch") == (0, ["a"])


def test_resuming_makes_only_the_lines_that_failed_also_with_open_seeds(batch):
    batch.write("a", "b --d 1", "c", "d --d 1")
    batch.painter.fails = lambda prompt: RuntimeError() if prompt in "cd" else None
    assert batch.run() == (1, ["a", "b"])
    batch.painter.fails = lambda prompt: None
    assert batch.run("--resume_batch") == (0, ["c", "d"])
    assert batch.run("--resume_batch") == (0, [])
    assert len(pictures(batch.out)) == 4


@pytest.mark.parametrize("line", ["a", "a --d 1"])
def test_of_two_equal_lines_one_finished_result_leaves_the_other_to_make(line, batch):
    batch.write(line)
    assert batch.run() == (0, ["a"])
    batch.write(line, line)
    assert batch.run("--resume_batch") == (0, ["a"])
    assert batch.run("--resume_batch") == (0, [])
    assert len(pictures(batch.out)) == 2


def test_without_resuming_all_lines_are_made_anew_and_only_they_count_later(batch):
    batch.write("a --d 1", "b --d 1")
    assert batch.run() == (0, ["a", "b"])
    first = pictures(batch.out)
    batch.painter.fails = lambda prompt: RuntimeError() if prompt == "b" else None
    assert batch.run() == (1, ["a"])
    assert len(pictures(batch.out)) == 3 and pictures(batch.out)[:2] == first
    batch.painter.fails = lambda prompt: None
    assert batch.run("--resume_batch") == (0, ["b"])


def test_a_file_may_be_edited_before_it_is_resumed(batch):
    batch.write("a", "b")
    batch.run()
    batch.write("# new", "c", "b", "a --s 2", "a")
    assert batch.run("--resume_batch") == (0, ["c", "a"])


def test_a_deleted_result_is_made_again(batch):
    batch.write("a --d 1", "b --d 2")
    batch.run()
    next(batch.out.glob("*_2.png")).unlink()
    assert batch.run("--resume_batch") == (0, ["b"])
    assert batch.run("--resume_batch") == (0, [])


def test_an_edited_image_or_another_kind_of_output_is_made_again(batch):
    image = batch.folder / "絵.png"
    Image.new("RGB", (32, 32), "red").save(image)
    batch.write(f"a --i {image}", "b")
    batch.run()
    Image.new("RGB", (32, 32), "blue").save(image)
    assert batch.run("--resume_batch") == (0, ["a"])
    assert batch.run("--resume_batch", "--output_type", "latent_images") == (0, ["a", "b"])


@pytest.mark.parametrize("rest", [b"", b'{"key": "12', b"\x00" * 9, b"\xe3\x81", b"[]", b'{"files": []}'])
def test_a_journal_that_lost_its_last_line_loses_no_other(rest, batch):
    batch.write("a", "b", "c")
    batch.painter.fails = lambda prompt: RuntimeError() if prompt == "c" else None
    batch.run()
    whole = batch.journal.read_bytes().rstrip()
    batch.journal.write_bytes(whole[: whole.rindex(b"{")] + rest)
    batch.painter.fails = lambda prompt: None
    assert batch.run("--resume_batch") == (0, ["b", "c"])
    assert batch.run("--resume_batch") == (0, [])


def test_ctrl_c_ends_a_batch_which_can_then_be_resumed(batch):
    batch.write("a", "b", "c")
    batch.painter.fails = lambda prompt: KeyboardInterrupt() if prompt == "b" else None
    assert batch.run() == (130, ["a"])
    batch.painter.fails = lambda prompt: None
    assert batch.run("--resume_batch") == (0, ["b", "c"])


def test_a_command_that_cannot_start_forgets_no_finished_line(batch, monkeypatch):
    batch.write("a", "b")
    batch.run()
    assert batch.run("--check") == (0, [])

    def refuse(flags):
        raise UserError("--dit", "nothing", "a checkpoint", "give it")

    with monkeypatch.context() as patch:
        patch.setattr(fpack_generate_video, "open_pipeline", refuse)
        assert batch.run() == (2, [])
    assert batch.run("--resume_batch") == (0, [])


# ---- what a file says ----


def requests(tmp_path: Path, *lines: str, **flags: object) -> list:
    """The jobs of a file, checked against real images."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    base = FramePackRequestFlags(prompt="base", video_size=(64, 128), one_frame_inference="default", seed=9, **flags)
    return [line.job for line in read_batch(str(file), base, lambda path: (1, 1))]


def test_width_or_height_alone_keeps_the_other_of_the_command_line(tmp_path):
    sizes = [(j.request.width, j.request.height) for j in requests(tmp_path, "a --w 32", "a --h 32", "a")]
    assert sizes == [(32, 64), (128, 32), (128, 64)]


def test_lists_in_a_line_replace_those_of_the_command_line_and_of_other_options_the_last_wins(tmp_path):
    paths = [str(tmp_path / f"{name}.png") for name in ("base", "赤", "blue")]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    lines = (
        f"a --ci {paths[1]} --d 1 --ci {paths[2]} --of control_index=0;10 --d 2 --n x --n y",
        f"b --i {paths[0]} --i {paths[1]}",
        "--d 3",
    )
    first, second, third = (job.request for job in requests(tmp_path, *lines, control_image_path=(paths[0],)))
    assert first.control_image_paths == (paths[1], paths[2])
    assert (first.seed, first.negative_prompt) == (2, "y")
    assert (second.control_image_paths, second.image_paths) == ((paths[0],), {0: paths[1]})
    assert (third.prompts, third.seed) == ({0: "base"}, 3)


def test_only_line_ends_end_a_line(tmp_path):
    """Text copied from a web page holds other separators, which editors do not count."""
    jobs = requests(tmp_path, "a\u2028b\x0bc\x85d", "e")
    assert [(job.where, job.request.prompts[0].split()) for job in jobs] == [
        ("prompts.txt line 1", ["a", "b", "c", "d"]),
        ("prompts.txt line 2", ["e"]),
    ]


BAD_LINES = {
    "a --cii x.png": ("--cii", "did you mean --ci?"),
    "a --d 1.5": ("--d 1.5", "an integer"),
    "a --i 無い.png": ("無い.png",),
    "a --w 100": ("64 100", "multiples of 16"),
    "a --of target_indx=1": ("target_indx", "did you mean target_index?"),
    "a --ci {image} --of control_index=0;10": ("2 control indices", "1 control image"),
    "a --mct 0.3": ("--mct", "not available yet"),
    "a --i": ("--i without a value",),
}


def test_every_bad_line_is_reported_and_nothing_is_loaded_or_written(tmp_path, monkeypatch, capsys):
    def too_late(*args):
        raise AssertionError("models were opened before all lines were checked")

    monkeypatch.setattr(fpack_generate_video, "open_pipeline", too_late)
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    good = f"good --i {image}"
    lines = [line for bad in BAD_LINES for line in (good, "", bad.format(image=image))]
    (tmp_path / "悪い.txt").write_text("\n".join(lines), encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    argv = [*TINY, "--video_size", "64", "64", "--from_file", str(tmp_path / "悪い.txt")]
    code = fpack_generate_video.main([*argv, "--save_path", str(tmp_path / "out")])
    answer = capsys.readouterr()
    assert (code, answer.out) == (2, "")
    reports = answer.err.splitlines()
    assert len(reports) == len(BAD_LINES)
    for number, report, parts in zip(range(3, 99, 3), reports, BAD_LINES.values(), strict=False):
        assert report.startswith(f"悪い.txt line {number}")
        assert all(part in report for part in parts), report
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", ["", "# nothing\n\n", None, b"\xff\xfea\x00"])
def test_a_file_without_prompts_or_text_is_refused(content, batch, capsys):
    if content is not None:
        batch.file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert batch.run() == (2, [])
    assert capsys.readouterr().err.startswith("--from_file: got ")
    assert not batch.out.exists()
