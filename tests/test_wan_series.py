"""Files of prompts, the console, sweeps, repetition, checks and plans, LoRAs and saved models, with small models."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from common.flags import parse
from common.weights import Checkpoint
from generation import session
from generation.outputs import load_latents, read_settings, write_png
from networks import lora_wan
from options.errors import UserError
from options.flags_compile import CompileChoice
from options.flags_wan_generate import WanGenerateFlags
from tests.wan_driver import (
    HEIGHT,
    QUICK,
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
from wan.loading import build_transformer, open_transformer

SMALL = ("--video_size", HEIGHT, WIDTH, "--infer_steps", 2, "--output_type", "latent")


@pytest.fixture(scope="module")
def pictures(material, tmp_path_factory) -> Pictures:
    return write_pictures(tmp_path_factory.mktemp("素材 [x]"), material)


@pytest.fixture(scope="module")
def frame(pictures) -> list[object]:
    """The flags of a picture from one control image."""
    return one_frame(pictures.start, indices="0")


@pytest.fixture
def i2v(wan_models) -> list[str]:
    return models_for(wan_models, "i2v-14B")


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The flags of the models whose weights are read, in order."""
    seen, read = [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, *a, **k: seen.append(self.flag) or read(self, *a, **k))
    return seen


# ---- many prompts ----


def test_lines_of_one_prompt_are_what_each_says(i2v, pictures, frame, tmp_path, reads):
    """Other images, negative prompts and tasks of one prompt do not get mixed up, and models are loaded once."""
    lines = [
        f"# 一枚目\n猫 --i {pictures.start}",
        f"猫 --i {pictures.start} --n 暗い",
        f"猫 --i {pictures.end} --of target_index=2,control_index=5;0 --ci {pictures.start} --ci {pictures.cut_out}"
        f" --cim {pictures.mask} --s 1",
    ]
    (tmp_path / "行.txt").write_text("\n".join(lines), encoding="utf-8")
    common = [*i2v, *SMALL, "--guidance_scale", 4, "--seed", 3, "--video_length", 5]
    assert run(*common, "--from_file", tmp_path / "行.txt", "--save_path", tmp_path / "全部") == 0
    assert sorted(reads) == ["--clip", "--dit", "--t5", "--vae"]
    found = latents_in(tmp_path / "全部")
    alone = [
        ["--image_path", pictures.start],
        ["--image_path", pictures.start, "--negative_prompt", "暗い"],
        [
            *("--image_path", pictures.end, *one_frame(pictures.start, pictures.cut_out, indices="5;0", target=2)),
            *("--control_image_mask_path", pictures.mask, "--infer_steps", 1),
        ],
    ]
    for number, (latents, argv) in enumerate(zip(found, alone, strict=True)):
        folder = tmp_path / str(number)
        assert run(*common, "--prompt", "猫", *argv, "--save_path", folder) == 0
        assert torch.equal(latents, latents_in(folder)[0])
    assert not torch.equal(found[0], found[1])


def test_a_bad_line_stops_the_whole_file_with_all_that_is_wrong_with_it(i2v, pictures, tmp_path, capsys):
    lines = [
        f"猫 --i {pictures.start}",
        f"犬 --of target_index=0,control_index=0;2000 --ci {pictures.start}",
        "鳥 --i nowhere.png",
    ]
    (tmp_path / "行.txt").write_text("\n".join(lines), encoding="utf-8")
    assert run(*i2v, *SMALL, "--from_file", tmp_path / "行.txt", "--save_path", tmp_path / "out") == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in errors] == [
        *["行.txt line 2, --one_frame_inference"] * 3,
        "行.txt line 3, --image_path",
    ]
    assert not (tmp_path / "out").exists()


def test_the_console_keeps_models_and_goes_on_after_mistakes(i2v, pictures, tmp_path, monkeypatch, capsys, reads):
    typed = iter([
        f"猫 --i {pictures.start} --f 5 --d 1",
        f"猫 --i {pictures.start} --f 5 --d 1 --of target_index=1,control_index=0",
        "猫 --ii x",
        f"犬 --d 2 --of target_index=1,control_index=0 --ci {pictures.end}",
    ])  # fmt: skip

    def read() -> str:
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr(session, "console_reader", lambda: read)
    assert run(*i2v, *SMALL, "--interactive", "--save_path", tmp_path) == 0
    assert [latents.shape[1] for latents in latents_in(tmp_path)] == [2, 1]
    assert sorted(reads) == ["--clip", "--dit", "--t5", "--vae"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("--", "prompt:"))]
    assert [line.partition(";")[0] for line in errors] == [
        "--one_frame_inference: got no control image",
        "prompt: got --ii",
    ]


def test_a_sweep_makes_every_cell_as_alone_and_a_sheet(i2v, frame, tmp_path):
    common = [*i2v, *QUICK, *frame]
    argv = ["--sweep", "target_index=1,9", "--sweep", "seed=1,2", "--save_path", tmp_path / "a"]
    assert run(*common, *argv, "--output_type", "latent_images") == 0
    cells = latents_in(tmp_path / "a")
    assert len(cells) == 4 and all(not torch.equal(cells[0], cell) for cell in cells[1:])
    assert Image.open(only(tmp_path / "a", "*_sweep.png")).width > 2 * 256
    options = ["--one_frame_inference", "target_index=9,control_index=0", "--seed", 2, "--output_type", "latent"]
    assert run(*common, *options, "--save_path", tmp_path / "b") == 0
    assert torch.equal(cells[3], latents_in(tmp_path / "b")[0])


# ---- results and their settings ----

KINDS = {
    "one frame": ("flf2v-14B", "*.png"),
    "video": ("i2v-14B", "*.mp4"),
    "control folder": ("t2v-1.3B-FC", "*.safetensors"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_repeats_bit_for_bit_from_what_it_carries(kind, wan_models, pictures, lora, tmp_path, encoded_videos):
    """Its task comes from it, too; the inputs are found by their content, also a folder of frames and a LoRA."""
    task, pattern = KINDS[kind]
    own, merged = shutil.copy(lora, pictures.folder), ["--lora_weight", lora] if kind == "video" else []
    argv = {
        "one frame": [
            *one_frame(pictures.start, pictures.cut_out, indices="3;0", target=2),
            *("--control_image_mask_path", pictures.mask, "--slg_mode", "uncond", "--slg_layers", "1,2"),
            *("--lora", f"{own}:0.5"),
        ],
        "video": [
            *("--image_path", pictures.start, "--end_image_path", pictures.end, "--video_length", 5),
            *("--trim_tail_frames", 1, "--sample_solver", "dpm++", "--vae_dtype", "bf16", "--fp8_t5"),
        ],
        "control folder": ["--control_path", pictures.frames, "--video_length", 5, "--output_type", "latent"],
    }[kind]
    models = [*models_for(wan_models, task), *merged]
    assert run(*models, *QUICK, *argv, "--save_path", tmp_path / "a") == 0
    first = only(tmp_path / "a", pattern)
    assert ("--lora_weight" in json.loads(read_settings(first, flag="x"))["models"]) == bool(merged)
    named = models[2:] if kind == "one frame" else models  # with and without --task
    assert run(*named, "--from_metadata", first, "--search_dir", pictures.folder, "--save_path", tmp_path / "b") == 0
    if kind == "video":
        assert len(encoded_videos) == 2 and encoded_videos[0] == encoded_videos[1]
    else:
        assert only(tmp_path / "b", pattern).read_bytes() == first.read_bytes()


def test_settings_are_those_of_the_request_and_other_tools_find_theirs(wan_models, pictures, tmp_path):
    argv = ["--control_path", pictures.control, "--video_length", 5, "--output_type", "both", "--preview"]
    assert run(*models_for(wan_models, "t2v-1.3B-FC"), *QUICK, *argv, "--save_path", tmp_path) == 0
    data = json.loads(read_settings(only(tmp_path, "*.safetensors"), flag="x"))
    assert (data["family"], data["request"]["task"], data["request"]["seed"]) == ("wan", "t2v-1.3B-FC", 1)
    assert set(data["models"]) == {"--dit", "--vae", "--t5", "--t5_tokenizer"}
    assert [value["name"] for value in data["inputs"].values()] == ["動き.mp4"]
    assert str(pictures.folder) not in json.dumps(data, ensure_ascii=False)
    _, metadata = load_latents(only(tmp_path, "*.safetensors"))
    assert (metadata["seeds"], metadata["video_length"], metadata["height"]) == ("1", "5", str(HEIGHT))
    assert only(tmp_path, "*_preview.png")


EDITS = {
    "no such task": lambda request: request.update(task="i2v-2B"),
    "another kind of task": lambda request: request.update(task="t2v-14B"),
    "a picture of many frames": lambda request: request.update(num_frames=5),
    "a place off the axis": lambda request: request.update(one_frame="target_index=5000,control_index=0"),
    "two places for one control": lambda request: request.update(one_frame="target_index=1,control_index=0;2"),
    "no controls": lambda request: request.update(control_image_paths=[]),
    "a solver that is none": lambda request: request.update(solver="euler"),
    "an odd size": lambda request: request.update(width=50),
    "noise from somewhere": lambda request: request.update(cpu_noise="yes"),
    "guidance that is none": lambda request: request["guidance"].update(cfg_apply_ratio=7),
    "blocks that are none": lambda request: request["guidance"].update(skip_layers={"blocks": [-1], "mode": "uncond"}),
}


def test_settings_that_were_edited_into_nonsense_are_refused_before_weights_load(
    i2v, pictures, frame, tmp_path, capsys, reads
):
    assert run(*i2v, *QUICK, *frame, "--save_path", tmp_path / "a") == 0
    first = only(tmp_path / "a", "*.png")
    text = read_settings(first, flag="x")
    reads.clear()
    for name, edit in EDITS.items():
        data = json.loads(text)
        edit(data["request"])
        write_png(tmp_path / "改.png", Image.new("RGB", (8, 8)), json.dumps(data))
        capsys.readouterr()
        argv = ["--from_metadata", tmp_path / "改.png", "--search_dir", pictures.folder, "--save_path", tmp_path / "b"]
        assert run(*i2v, *argv) == 2, name
        assert "; expected " in capsys.readouterr().err, name
    argv = ["--from_metadata", first, "--search_dir", pictures.folder, "--save_path", tmp_path / "b"]
    assert run("--task", "flf2v-14B", *i2v[2:], *argv) == 2
    assert capsys.readouterr().err.startswith("--task: got flf2v-14B; expected i2v-14B, as the result has it")
    assert not reads and not (tmp_path / "b").exists()


# ---- before anything is made ----


def test_check_and_plan_read_everything_but_weights_and_write_nothing(
    i2v, pictures, frame, tmp_path, caplog, capsys, reads
):
    out = ["--save_path", tmp_path / "out"]
    with caplog.at_level(logging.INFO):
        assert run(*i2v, *QUICK, *frame, "--check", *out) == 0
        assert run(*i2v, *SMALL, "--interactive", "--check", *out) == 0
    said = [record.message for record in caplog.records]
    assert any(line.startswith("checked: 1 prompts") for line in said)
    assert sum("wants a LoRA" in line for line in said) == 1
    capsys.readouterr()
    argv = ["--image_path", pictures.start, "--end_image_path", pictures.end, "--sweep", "guidance_scale=1,5"]
    assert run(*i2v, *QUICK, *argv, "--plan", "1GB", *out) == 0
    report = capsys.readouterr().out
    assert report.startswith("guidance_scale=5.0, which computes the most of 2 prompts\nplan")
    assert "  85 frames of 64x48, 2 steps, 4 passes;" in report and "\n  fits: at most " in report
    assert not reads and not (tmp_path / "out").exists()


def test_hints_come_when_everything_is_known_to_work(i2v, frame, tmp_path, caplog, monkeypatch):
    """So that an error is the only line."""
    monkeypatch.setattr("options.wan_tasks.WIDTHS", {"1.3B": 256, "14B": 5120})
    odd = ["--slg_scale", 2, "--compile_mode", "max-autotune", "--cfg_skip_mode", "early"]
    common = [*i2v, *QUICK, *frame, *odd, "--save_path", tmp_path / "out", "--check"]
    with caplog.at_level(logging.WARNING):
        assert run(*common, "--vae", tmp_path / "missing") == 2
        assert not caplog.records
        assert run(*common) == 0
    hinted = [record.message.split()[0] for record in caplog.records]
    assert hinted == ["--compile_mode", "--cfg_skip_mode", "--slg_scale", "--dit", "Wan's"]


COMPILED = {
    "inductor default auto false": CompileChoice(flag="--compile"),
    "eager max-autotune None TRUE": CompileChoice(
        flag="--compile", backend="eager", mode="max-autotune", fullgraph=True
    ),
    "eager default False False": CompileChoice(flag="--compile", backend="eager", dynamic=False),
}


@pytest.mark.parametrize(("text", "expected"), COMPILED.items(), ids=COMPILED)
def test_the_old_way_to_ask_for_compilation(text, expected):
    argv = ["--compile_args", *text.split(), "--compile_cache_size_limit", "32"]
    flags = parse(WanGenerateFlags, description="", argv=[*argv, "--compile"]).compilation
    assert flags.choice == expected and list(flags.hints()) == []
    unread = parse(WanGenerateFlags, description="", argv=argv).compilation
    assert unread.choice is None and [hint.split()[0] for hint in unread.hints()] == [
        "--compile_cache_size_limit",
        "--compile_args",
    ]
    both = parse(WanGenerateFlags, description="", argv=[*argv, "--compile", "--compile_mode", "max-autotune"])
    assert [*both.compilation.hints()] == ["--compile_mode has no effect beside --compile_args"]


@pytest.mark.parametrize(
    "text", ["inductor fast auto false", "inductor default maybe false", "inductor default auto 1"]
)
def test_the_old_way_wants_the_same_values(text):
    flags = parse(WanGenerateFlags, description="", argv=["--compile", "--compile_args", *text.split()]).compilation
    with pytest.raises(UserError, match=f"^--compile_args: got {text};"):
        _ = flags.choice


# ---- LoRAs and saved models ----


@pytest.fixture(scope="module")
def lora(wan_models, tmp_path_factory) -> Path:
    """For the small transformer, strong enough to be seen."""
    transformer = build_transformer(open_transformer(str(wan_models.dit)))
    network = lora_wan.create_network(transformer, dim=2, alpha=1.0, args={}, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    path = tmp_path_factory.mktemp("学習") / "絵 [1].safetensors"
    network.save(path, metadata={})
    return path


@pytest.fixture
def latents(i2v, frame, tmp_path) -> Callable[..., Tensor]:
    count = iter(range(100))

    def make(*argv: object) -> Tensor:
        folder = tmp_path / f"結果 {next(count)}"
        assert run(*i2v, *QUICK, *frame, "--output_type", "latent", "--save_path", folder, *argv) == 0
        return latents_in(folder)[0]

    return make


def test_a_lora_of_the_prompt_does_what_a_merged_one_does(latents, lora, caplog):
    plain = latents()
    caplog.clear()
    merged, applied = latents("--lora_weight", lora, "--lora_multiplier", 0.5), latents("--lora", f"{lora}:0.5")
    assert relative(merged, plain) > 1e-2 and relative(applied, merged) < 1e-5
    assert not any("wants a LoRA" in record.message for record in caplog.records)
    assert relative(latents("--lora_weight", lora, "--exclude_patterns", "cross_attn"), merged) > 1e-3


def test_saved_models_give_what_they_were_made_of(i2v, latents, lora, tmp_path, reads):
    """No other model is needed; what is between them is the rounding to the types of the files."""
    whole, small = tmp_path / "結合.safetensors", tmp_path / "八.safetensors"
    assert run(*i2v[:4], "--lora_weight", lora, "--save_merged_model", whole) == 0
    assert run(*i2v[:4], "--lora_weight", lora, "--save_fp8_model", small) == 0
    assert set(reads) == {"--dit", "--lora_weight"}
    plain, merged = latents(), latents("--lora_weight", lora)
    assert relative(latents("--dit", whole), merged) < 0.01 < relative(merged, plain)
    scaled = latents("--lora_weight", lora, "--fp8_scaled")
    assert relative(latents("--dit", small), scaled) < 1e-5 < relative(scaled, merged)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--save_fp8_model", "a"], "--save_merged_model: got --save_merged_model beside --save_fp8_model"),
        (["--fp8"], "--fp8: got --fp8 beside --save_merged_model"),
        (["--lora", "a"], "--lora: got a; expected --lora_weight"),
        (["--plan"], "--plan: got --plan beside --save_merged_model"),
        (["--task", "flf2v-14B"], "an image-to-video transformer (36 input channels) with --task flf2v-14B"),
    ],
)
def test_what_does_not_go_with_saving_a_model(argv, message, i2v, lora, tmp_path, capsys, reads):
    assert run(*i2v, "--lora_weight", lora, "--save_merged_model", tmp_path / "x.safetensors", *argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not reads
    assert not (tmp_path / "x.safetensors").exists()
