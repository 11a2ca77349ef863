"""Sweeps, settings in results, repetition, previews and `--check`, with the small models."""

import json
import logging
import os
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from skimage import data_dir

import fpack_generate_video
from common.media import read_video
from frame_pack import conditioning
from generation import runner
from generation.outputs import SETTINGS_KEY, read_settings
from generation.preview import Preview
from generation.settings import Provenance, content_hash, recorded
from options.errors import UserError
from options.flags_fpack_generate import FramePackComputeFlags
from options.fpack_request import FramePackRequest, FramePackRequestFlags

SIZE = 64
PHOTOS = Path(data_dir)
NAMES = ("dit", "vae", "text_encoder1", "text_encoder2", "image_encoder")


@pytest.fixture
def inputs(tmp_path) -> Path:
    """A folder of input images of the user's own, which a test may change."""
    folder = tmp_path / "素材"
    folder.mkdir()
    for name in ("chelsea", "coffee"):
        shutil.copy(PHOTOS / f"{name}.png", folder)
    Image.fromarray(np.full((SIZE, SIZE), 255, dtype=np.uint8)).save(folder / "mask.png")
    return folder


@pytest.fixture
def run(demo_models):
    """Runs the script with the small models and two steps."""
    models = [part for name in NAMES for part in (f"--{name}", str(getattr(demo_models, name)))]

    def run(*argv: str | Path) -> int:
        return fpack_generate_video.main([*models, *map(str, argv)])

    return run


TYPES = {"request_type": FramePackRequest, "compute_type": FramePackComputeFlags}


def quick(inputs: Path, *, video: bool = False) -> list[str]:
    argv = ["--prompt", '猫 "quoted" %', "--infer_steps", "2", "--video_size", str(SIZE), str(SIZE)]
    cat, coffee = str(inputs / "chelsea.png"), str(inputs / "coffee.png")
    if video:
        length = ["--video_sections", "2", "--latent_window_size", "1"]
        return [*argv, "--image_path", f"0:{cat};;;-1:{coffee}", "--end_image_path", coffee, *length]
    controls = ["--control_image_path", cat, coffee, "--control_image_mask_path", str(inputs / "mask.png")]
    return [*argv, "--image_path", cat, *controls, "--one_frame_inference", "target_index=1,control_index=0;10"]


def results(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if "_sweep" not in path.name and "_preview" not in path.name)


# Settings and repetition


@pytest.mark.parametrize(
    ("kind", "pattern"), [("images", "*.png"), ("video", "*.mp4"), ("latent", "*.safetensors"), ("frames", "*/001.png")]
)
def test_a_result_repeats_bit_for_bit_from_what_it_carries(kind, pattern, run, inputs, tmp_path, encoded_videos):
    """Also with an open seed, from moved inputs, and whatever was computed with."""
    argv = quick(inputs, video=kind in ("video", "frames"))
    output_type = {"frames": "images"}.get(kind, kind)
    tiles = ["--vae_spatial_tile_sample_min_size", "32"]
    assert run(*argv, *tiles, "--output_type", output_type, "--save_path", tmp_path / "a") == 0
    (first,) = results(tmp_path / "a", pattern)
    moved = inputs.rename(tmp_path / "moved")
    assert run("--from_metadata", first, "--search_dir", moved.parent, "--save_path", tmp_path / "b") == 0
    (second,) = results(tmp_path / "b", pattern)
    if kind == "video":
        assert len(encoded_videos) == 2 and encoded_videos[0] == encoded_videos[1]
    else:
        assert second.read_bytes() == first.read_bytes()


def test_settings_hold_names_and_hashes_but_no_paths_unless_asked_for(run, inputs, tmp_path):
    common = [*quick(inputs), "--seed", "1", "--output_type", "images"]
    assert run(*common, "--save_path", tmp_path / "a") == 0
    (result,) = results(tmp_path / "a", "*.png")
    text = read_settings(result, flag="--from_metadata")
    assert str(tmp_path) not in text and str(data_dir) not in text
    data = json.loads(text)
    cat = content_hash(inputs / "chelsea.png")
    assert data["inputs"][cat] == {"name": "chelsea.png"}
    assert data["request"]["control_image_paths"][0] == cat
    assert data["request"]["prompts"] == {"0": '猫 "quoted" %'}
    assert set(data["models"]) == {f"--{name}" for name in (*NAMES, "tokenizer1", "tokenizer2")}
    assert run(*common, "--metadata_paths", "--save_path", tmp_path / "b") == 0
    (result,) = results(tmp_path / "b", "*.png")
    stored = json.loads(read_settings(result, flag="--from_metadata"))["inputs"][cat]["path"]
    assert Path(stored) == inputs / "chelsea.png"
    assert run(*common, "--no_metadata", "--save_path", tmp_path / "c") == 0
    (result,) = results(tmp_path / "c", "*.png")
    assert SETTINGS_KEY not in Image.open(result).info


def test_a_changed_or_missing_input_is_noticed_and_named(run, inputs, tmp_path, capsys):
    assert run(*quick(inputs), "--output_type", "images", "--save_path", tmp_path / "a") == 0
    (result,) = results(tmp_path / "a", "*.png")
    repeat = ["--from_metadata", result, "--search_dir", inputs, "--save_path", tmp_path / "b"]
    capsys.readouterr()
    Image.new("RGB", (80, 80)).save(inputs / "coffee.png")
    assert run(*repeat) == 2
    assert "coffee.png, which has changed" in capsys.readouterr().err
    (inputs / "coffee.png").unlink()
    assert run(*repeat) == 2
    line = capsys.readouterr().err
    assert "got no coffee.png" in line and "--search_dir" in line and line.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_the_right_one_of_two_inputs_with_one_name_is_found_by_its_content(run, inputs, tmp_path):
    assert run(*quick(inputs), "--output_type", "latent", "--save_path", tmp_path / "a") == 0
    (first,) = results(tmp_path / "a", "*.safetensors")
    (inputs / "a").mkdir()
    Image.new("RGB", (80, 80)).save(inputs / "a" / "coffee.png")
    assert run("--from_metadata", first, "--search_dir", inputs, "--save_path", tmp_path / "b") == 0
    assert results(tmp_path / "b", "*.safetensors")[0].read_bytes() == first.read_bytes()


def test_other_weights_are_mentioned(run, demo_models, inputs, tmp_path, caplog):
    assert run(*quick(inputs), "--output_type", "latent", "--save_path", tmp_path / "a") == 0
    (first,) = results(tmp_path / "a", "*.safetensors")
    file = next((demo_models.image_encoder / "image_encoder").glob("*.safetensors"))
    other = bytearray(file.read_bytes())
    other[-100:] = bytes(100)
    (tmp_path / "other.safetensors").write_bytes(other)
    argv = ["--from_metadata", first, "--search_dir", inputs, "--image_encoder", tmp_path / "other.safetensors"]
    with caplog.at_level(logging.WARNING):
        assert run(*argv, "--save_path", tmp_path / "b") == 0
    assert "--image_encoder is not what made" in caplog.text
    assert "--vae is not" not in caplog.text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--from_metadata", "missing.png"], "--from_metadata: got missing.png"),
        (["--from_metadata", str(PHOTOS / "coffee.png")], "expected a .png, .mp4 or .safetensors with its settings"),
        (["--from_metadata", str(PHOTOS / "rocket.jpg")], "expected a .png, .mp4 or .safetensors with its settings"),
        (["--from_metadata", "a.png", "--seed", "1"], "--seed: got 1; expected no settings beside --from_metadata"),
        (["--from_metadata", "a.png", "--sweep", "seed=1"], "expected one of them"),
        (["--from_file", "a.txt", "--interactive"], "expected one of them"),
        (["--latent_path", "a.safetensors", "--from_file", "b.txt"], "expected one of them"),
        (["--prompt", "a", "--search_dir", "."], "--search_dir: got no --from_metadata"),
        (["--prompt", "a", "--resume_batch"], "--resume_batch: got no --from_file"),
        (["--prompt", "a", "--sweep", "steps=1..3"], "--sweep: got steps=1..3"),
        (["--prompt", "a", "--sweep", "guidance_scale=nan"], "--sweep guidance_scale=nan, --guidance_scale: got nan"),
        (["--prompt", "a", "--sweep", "seed=1..3", "--sweep", "seed=4"], "one or two different settings"),
        (["--from_file", "missing.txt"], "--from_file: got missing.txt"),
    ],
)
def test_modes_that_cannot_be_are_refused(argv, message, run, tmp_path, capsys):
    assert run(*argv, "--save_path", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


EDITS = {
    "no compute": lambda data: data.update(compute={}),
    "models as a list": lambda data: data.update(models=[]),
    "a type that is none": lambda data: data["compute"].update(dit_dtype="load"),
    "a type that is a number": lambda data: data["compute"].update(dit_dtype=5),
    "no steps": lambda data: data["request"].update(num_steps=0),
    "odd height": lambda data: data["request"].update(height=70),
    "height as text": lambda data: data["request"].update(height="64"),
    "no prompt": lambda data: data["request"].update(prompts={}),
    "a number as prompt": lambda data: data["request"].update(prompts={"0": 5}),
    "a negative seed": lambda data: data["request"].update(seed=-1),
    "sections of one frame": lambda data: data["request"].update(num_sections=10**9),
    "an unknown field": lambda data: data["request"].update(colour="red"),
    "unknown one-frame options": lambda data: data["request"].update(one_frame="target=1"),
}


def test_settings_that_were_edited_into_nonsense_are_refused_before_weights_load(run, inputs, tmp_path, capsys):
    assert run(*quick(inputs), "--output_type", "images", "--save_path", tmp_path / "a") == 0
    (result,) = results(tmp_path / "a", "*.png")
    text = read_settings(result, flag="x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("frame_pack.pipeline.load_llama", lambda *a, **k: pytest.fail("weights were loaded"))
        for name, edit in EDITS.items():
            data = json.loads(text)
            edit(data)
            info = PngInfo()
            info.add_itxt(SETTINGS_KEY, json.dumps(data))
            Image.new("RGB", (8, 8)).save(tmp_path / "edited.png", pnginfo=info)
            capsys.readouterr()
            argv = ["--from_metadata", tmp_path / "edited.png", "--search_dir", inputs, "--save_path", tmp_path / "b"]
            assert run(*argv) == 2, name
            assert capsys.readouterr().err.count("\n") == 1, name
    assert not (tmp_path / "b").exists()


def test_a_decoded_latent_says_what_decoded_it(run, inputs, tmp_path, encoded_videos):
    """Rate, tiles and VAE are those of the decoding, so that it repeats to the bit."""
    argv = [*quick(inputs, video=True), "--fps", "24", "--output_type", "latent", "--save_path", tmp_path / "a"]
    assert run(*argv) == 0
    (latent,) = results(tmp_path / "a", "*.safetensors")
    assert run("--latent_path", latent, "--bulk_decode", "--save_path", tmp_path / "b") == 0
    (video,) = results(tmp_path / "b", "*.mp4")
    with av.open(str(video)) as container:
        assert container.streams.video[0].average_rate == 24
    assert run("--from_metadata", video, "--search_dir", inputs, "--save_path", tmp_path / "c") == 0
    assert len(encoded_videos) == 2 and encoded_videos[0] == encoded_videos[1]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_inputs_with_names_that_are_no_text_are_no_reason_to_lose_a_result(run, inputs, tmp_path):
    odd = os.fsdecode(os.fsencode(inputs) + b"/n\xff.png")
    shutil.copy(inputs / "coffee.png", odd)
    argv = ["--prompt", "a", "--infer_steps", "1", "--video_size", "64", "64", "--one_frame_inference", "default"]
    assert run(*argv, "--control_image_path", odd, "--save_path", tmp_path / "a") == 0
    (result,) = results(tmp_path / "a", "*.png")
    assert content_hash(odd) in json.loads(read_settings(result, flag="x"))["inputs"]


def test_an_input_that_changes_while_it_is_encoded_fails_its_job(run, inputs, tmp_path, monkeypatch, caplog):
    """Otherwise the result would carry the hash of a picture that it was not made from."""
    original = conditioning._image_latent

    def edit_meanwhile(vae, image):
        latent = original(vae, image)
        Image.new("RGB", (70, 70)).save(inputs / "coffee.png")
        return latent

    monkeypatch.setattr(conditioning, "_image_latent", edit_meanwhile)
    assert run(*quick(inputs), "--output_type", "latent", "--save_path", tmp_path / "a") == 1
    assert "one that changed meanwhile" in caplog.text
    assert not list(tmp_path.glob("a/*.safetensors"))


def test_one_frame_is_saved_as_a_picture_unless_asked_otherwise(run, inputs, tmp_path):
    assert run(*quick(inputs), "--sweep", "seed=1,2", "--save_path", tmp_path) == 0
    assert len(results(tmp_path, "*.png")) == 2 and not list(tmp_path.glob("*.mp4"))


def test_an_interrupted_sweep_keeps_the_sheet_of_what_is_done(run, inputs, tmp_path, monkeypatch):
    calls = []
    original = runner._generate

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(runner, "_generate", interrupted)
    argv = ["--sweep", "seed=1..4", "--output_type", "images", "--save_path", tmp_path]
    assert run(*quick(inputs), *argv) == 130
    assert len(results(tmp_path, "*.png")) == 2
    assert len(list(tmp_path.glob("*_sweep.png"))) == 1


def test_a_comma_list_of_controls_can_be_swept(run, inputs, tmp_path):
    both = f"{inputs / 'chelsea.png'},{inputs / 'coffee.png'}"
    argv = ["--prompt", "a", "--image_path", both, "--one_frame_inference", "control_index=0;10", "--check"]
    assert run(*argv, "--sweep", "control_index.1=4,10", "--save_path", tmp_path / "a") == 0


def test_resuming_with_other_types_makes_the_lines_again(run, inputs, tmp_path):
    (tmp_path / "p.txt").write_text(f"a --i {inputs / 'coffee.png'} --d 1 --of default\n", encoding="utf-8")
    argv = ["--from_file", tmp_path / "p.txt", "--infer_steps", "1", "--video_size", "64", "64"]
    argv += ["--save_path", tmp_path / "a", "--output_type", "latent"]
    for extra, expected in (([], 1), (["--resume_batch"], 1), (["--resume_batch", "--dit_dtype", "bf16"], 2)):
        assert run(*argv, *extra) == 0
        assert len(list((tmp_path / "a").glob("*.safetensors"))) == expected


def test_prompt_files_of_one_name_keep_journals_of_their_own(run, inputs, tmp_path):
    common = [
        "--infer_steps",
        "1",
        "--video_size",
        "64",
        "64",
        "--save_path",
        tmp_path / "out",
        "--output_type",
        "latent",
    ]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.txt").write_text(f"{folder} --d 1 --of default\n", encoding="utf-8")
        assert run("--from_file", tmp_path / folder / "p.txt", *common) == 0
    assert run("--from_file", tmp_path / "a" / "p.txt", "--resume_batch", *common) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2


def test_the_interactive_loop_checks_its_own_command_line(run, tmp_path, capsys):
    for argv in (["--infer_steps", "0"], ["--one_frame_inference", "bogus"], ["--image_path", tmp_path / "nope.png"]):
        assert run("--interactive", "--check", *argv, "--save_path", tmp_path / "out") == 2
        assert capsys.readouterr().err.startswith(argv[0])


def test_settings_of_another_program_are_refused(tmp_path):
    for text in ("no json", "[]", "{}", json.dumps({"format": 1, "family": "wan"}), json.dumps({"format": 99})):
        with pytest.raises(UserError, match="settings of a framepack result"):
            recorded(text, tmp_path / "a.png", None, family="framepack", **TYPES)


def request(**changes) -> FramePackRequest:
    flags = replace(FramePackRequestFlags(prompt="a", seed=3), **changes)
    return flags.resolve(image_size=lambda path: (1, 1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prompt": "0:a;;;-1:b;;;1:c", "image_path": "0:x;;;-1:y", "end_image_path": "z", "video_sections": 3},
        {"one_frame_inference": "default"},
        {
            "one_frame_inference": "target_index=1,control_index=10;0,no_2x,no_4x,no_post",
            "control_image_path": ("a", "b"),
            "control_image_mask_path": ("m",),
            "image_path": "a",
        },
        {"image_path": "a", "image_mask_path": "m", "latent_paddings": "0,0", "flow_shift": 3.5, "guidance_scale": 2.0},
        {"custom_system_prompt": "s", "negative_prompt": "n", "rope_scaling_timestep_threshold": 800, "f1": True},
    ],
)
def test_every_field_of_a_request_survives_the_way_through_json(changes):
    original = request(**changes)
    data = json.loads(json.dumps(original.to_json(refer=lambda path: f"#{path}")))
    assert FramePackRequest.from_json(data, find=lambda key: key.removeprefix("#")) == original
    assert set(data) == {field.name for field in fields(FramePackRequest)}


def test_equal_requests_give_equal_texts():
    provenance = Provenance(family="framepack", models={"b": "2", "a": "1"}, compute={}, with_paths=False)
    other = replace(provenance, models={"a": "1", "b": "2"})
    assert provenance.settings(request()) == other.settings(request())


# Sweeps


def test_a_sweep_saves_every_cell_and_a_labelled_sheet_of_them(run, inputs, tmp_path, monkeypatch):
    loads = []
    monkeypatch.setattr("frame_pack.pipeline.load_transformer", count(loads, "frame_pack.loading.load_transformer"))
    argv = ["--sweep", "target_index=1,9", "--sweep", "control_index.1=4,10,13", "--output_type", "images"]
    assert run(*quick(inputs), *argv, "--seed", "1", "--save_path", tmp_path) == 0
    cells = results(tmp_path, "*_1.png")
    assert len(cells) == 6
    assert len({Image.open(cell).tobytes() for cell in cells}) == 6
    (sheet,) = tmp_path.glob("*_sweep.png")
    assert sheet.name == f"{cells[0].stem}_sweep.png"
    width, height = Image.open(sheet).size
    assert width > 3 * 256 and height > 2 * 256
    assert len(loads) == 1


def count(calls: list, target: str):
    """The function of that name, noting its calls."""
    module, _, name = target.rpartition(".")
    original = getattr(__import__(module, fromlist=[name]), name)

    def counted(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    return counted


def test_a_cell_of_a_sweep_is_what_the_same_settings_alone_give(run, inputs, tmp_path):
    common = [*quick(inputs), "--seed", "1", "--output_type", "latent"]
    assert run(*common, "--sweep", "latent_window_size=5,64", "--save_path", tmp_path / "a") == 0
    assert run(*common, "--latent_window_size", "64", "--save_path", tmp_path / "b") == 0
    cells = results(tmp_path / "a", "*.safetensors")
    assert len(cells) == 2 and not list((tmp_path / "a").glob("*.png"))
    assert cells[1].read_bytes() == results(tmp_path / "b", "*.safetensors")[0].read_bytes()


# Previews


def test_a_preview_is_the_linear_map_that_the_inputs_follow():
    generator = torch.Generator().manual_seed(0)
    weights, offset = torch.randn(16, 3, generator=generator) * 0.02, torch.tensor([0.4, 0.5, 0.6])
    latents = torch.randn(16, 2, 30, 40, generator=generator)
    colours = torch.einsum("cfhw,ck->fhwk", latents, weights) + offset
    preview = Preview.fit([(latents[:, i], colours[i].numpy()) for i in range(2)])
    expected = (colours.clamp(0, 1) * 255).numpy()
    assert np.abs(preview.frames(latents) - expected).max() < 4  # the ridge shrinks the map by a hundredth


def test_previews_of_one_flat_picture_stay_flat():
    preview = Preview.fit([(torch.ones(16, 8, 8), np.full((8, 8, 3), 0.5))])
    assert set(preview.frames(torch.randn(16, 3, 8, 8)).flatten().tolist()) == {127}


def test_every_section_renews_the_preview(run, inputs, tmp_path, monkeypatch):
    sizes = []
    original = Preview.save
    monkeypatch.setattr(
        Preview, "save", lambda *args, **named: sizes.append(args[1].shape[1]) or original(*args, **named)
    )
    argv = ["--preview", "--seed", "1", "--output_type", "latent", "--save_path", tmp_path]
    assert run(*quick(inputs, video=True), *argv) == 0
    assert sizes == [1, 2]
    (preview,) = tmp_path.glob("*_1_preview.png")
    assert Image.open(preview).size == (2 * 128, 128)
    assert json.loads(read_settings(preview, flag="x"))["request"]["seed"] == 1


# Checks


def test_check_reads_everything_but_weights_and_writes_nothing(run, inputs, tmp_path, monkeypatch, caplog):
    for module in ("common.weights", "networks.transformer_loading", "hunyuan_model.text_encoders"):
        monkeypatch.setattr(f"{module}.fill", lambda *a, **k: pytest.fail("weights were loaded"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a --d 1\nb\n", encoding="utf-8")
    argv = ["--check", "--save_path", tmp_path / "out", "--image_path", inputs / "chelsea.png"]
    with caplog.at_level(logging.INFO):
        assert run(*argv, "--from_file", prompts) == 0
    assert "checked: 2 prompts" in caplog.text
    assert not (tmp_path / "out").exists()
    assert run(*argv, "--interactive") == 0
    assert run(*argv, "--prompt", "a", "--sweep", "seed=1..3") == 0
    assert run(*argv, "--prompt", "a", "--sweep", "target_index=1..3") == 2
    assert run(*argv, "--prompt", "a", "--tokenizer1", tmp_path) == 2


def test_video_carries_its_settings_as_comment(run, inputs, tmp_path):
    assert run(*quick(inputs, video=True), "--seed", "1", "--save_path", tmp_path) == 0
    (video,) = tmp_path.glob("*.mp4")
    assert json.loads(read_settings(video, flag="x"))["request"]["seed"] == 1
    assert len(list(read_video(video, flag="x"))) == 4 * 2 + 1
