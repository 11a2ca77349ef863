"""`fpack_cache_latents.py` from its command line to its files, against diffusers' and transformers' own encoders."""

import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fpack_cache_latents
from common.media import load_picture
from dataset.cache_files import cache_header, read_cache
from dataset.frames import examine_video, read_frames
from frame_pack.caching import FramePackCacheRules
from options.errors import UserError
from tests.cache_builders import files, image_keys, image_set, video_set, write_config

SCALE = 0.476986


@pytest.fixture(autouse=True)
def report(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads weights fails."""
    for name in ("hunyuan_model.vae.load_vae", "frame_pack.image_encoder.load_siglip"):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("weights were loaded"))


def cache(config: Path, models, *flags: object) -> int:
    places = ("--vae", models.vae, "--image_encoder", models.image_encoder, "--num_workers", 0)
    return fpack_cache_latents.main([str(flag) for flag in ("--dataset_config", config, *places, *flags)])


@pytest.fixture(scope="module")
def photographs(material, tmp_path_factory) -> Path:
    """The data set file of two photographs; the controls have alpha."""
    folder = tmp_path_factory.mktemp("写真 [1]")
    config = image_set(folder, ["猫", "cup"], fp_1f_target_index=1, resolution=[64, 64])
    for name, path in (("猫", material.chelsea), ("cup", material.astronaut)):
        shutil.copy(path, folder / "images" / f"{name}.png")
        shutil.copy(material.coffee_with_alpha, folder / "controls" / f"{name}.png")
    return config


@pytest.fixture(scope="module")
def direct(demo_models):
    """(F, H, W, 3) uint8 → (16, F', h, w) float16, by diffusers alone; its framewise encoding is another sum."""
    from diffusers import AutoencoderKLHunyuanVideo

    model = AutoencoderKLHunyuanVideo.from_pretrained(demo_models.vae / "vae", torch_dtype=torch.float32).eval()
    model.use_framewise_encoding = False

    @torch.no_grad()
    def encode(frames: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        return (model.encode(pixels).latent_dist.mean * SCALE)[0].half()

    return encode


@pytest.fixture(scope="module")
def features(demo_models):
    """(H, W, 3) uint8 → (729, width) float16, by transformers alone."""
    from transformers import SiglipImageProcessorPil, SiglipVisionModel

    folder = demo_models.image_encoder
    model = SiglipVisionModel.from_pretrained(folder / "image_encoder", dtype=torch.float32).eval()
    processor = SiglipImageProcessorPil.from_pretrained(folder / "feature_extractor")

    @torch.no_grad()
    def encode(rgb: np.ndarray) -> torch.Tensor:
        return model(**processor(images=Image.fromarray(rgb), return_tensors="pt")).last_hidden_state[0].half()

    return encode


# ---- what is written ----


def test_one_frame_caches_hold_what_the_libraries_encode(photographs, demo_models, direct, features) -> None:
    assert cache(photographs, demo_models, "--one_frame", "--one_frame_no_2x") == 0
    folder = photographs.parent / "cache"
    assert list(files(folder)) == ["cup_0512x0512_fp.safetensors", "猫_0451x0300_fp.safetensors"]
    path = folder / "猫_0451x0300_fp.safetensors"
    target, control = (
        load_picture(photographs.parent / kind / "猫.png", width=64, height=64, flag="")
        for kind in ("images", "controls")
    )
    header, stored = cache_header(path), read_cache(path)
    assert set(header.keys.values()) == {
        *("latents_1x8x8_float16", "latent_indices_int64", "latents_clean_1x8x8_float16", "clean_latent_indices_int64"),
        *("clean_latent_4x_indices_int64", "image_embeddings_float16"),
    }
    assert torch.equal(stored["latents"], direct(target.rgb[None]))
    alpha = np.asarray(Image.fromarray(control.alpha).resize((8, 8), Image.Resampling.LANCZOS), np.float32) / 255
    expected = direct(control.rgb[None]).float() * torch.from_numpy(alpha)
    torch.testing.assert_close(stored["latents_clean"][:, :1].float(), expected, atol=2e-3, rtol=0)
    assert not stored["latents_clean"][:, 1:].any() and stored["latents_clean"].shape == (16, 2, 8, 8)
    assert torch.equal(stored["image_embeddings"], features(control.rgb))
    assert stored["latent_indices"].tolist() == [1] and stored["clean_latent_indices"].tolist() == [0, 2]
    assert stored["clean_latent_4x_indices"].tolist() == list(range(5, 21))
    assert header.metadata.items() >= {
        "architecture": "framepack", "width": "451", "height": "300", "format_version": "1.0.1"
    }.items()  # fmt: skip
    assert header.fingerprint["encoder_dtype"] == "float32" and header.fingerprint["target_index"] == "1"


def test_section_caches_hold_what_the_libraries_encode(tmp_path, demo_models, direct, features) -> None:
    config = video_set(tmp_path, {"猫": 12}, target_frames=[9])
    assert cache(config, demo_models) == 0
    frames = np.stack(list(read_frames(tmp_path / "videos" / "猫.mp4", size=(32, 32), limit=9)))
    clip, embedding = direct(frames), features(frames[0])
    for section, indices in ((0, [1]), (1, [2])):
        path = tmp_path / "cache" / f"猫_00000-009-{section:04d}_0032x0032_fp.safetensors"
        header, stored = cache_header(path), read_cache(path)
        assert header.metadata["frame_count"] == "9" and header.metadata["width"] == "32"
        assert torch.equal(stored["latents"], clip[:, 1 + section : 2 + section])
        assert torch.equal(stored["image_embeddings"], embedding)
        assert stored["latent_indices"].tolist() == indices
        assert torch.equal(stored["latents_clean"][:, :1], clip[:, :1])
    # Of two sections the first knows the second, and the second nothing.
    assert not stored["latents_clean"][:, 1:].any()
    assert len(files(tmp_path / "cache")) == 2


def test_f1_and_its_older_name_write_the_same(tmp_path, demo_models, direct) -> None:
    config = video_set(tmp_path, {"v": 9}, target_frames=[9])
    assert cache(config, demo_models, "--vanilla_sampling") == 0
    before = files(tmp_path / "cache")
    frames = np.stack(list(read_frames(tmp_path / "videos" / "v.mp4", size=(32, 32), limit=9)))
    for section in (0, 1):
        stored = read_cache(tmp_path / "cache" / f"v_00000-009-{section:04d}_0032x0032_fp.safetensors")
        assert stored["latent_indices"].tolist() == [20] and stored["clean_latent_indices"].tolist() == [0, 19]
        assert torch.equal(stored["latents_clean"], direct(frames)[:, [0, section]])
    assert cache(config, demo_models, "--f1", "--skip_existing") == 0
    assert cache(config, demo_models, "--f1") == 0
    assert files(tmp_path / "cache") == before


def test_the_window_of_the_command_line_counts(tmp_path, demo_models) -> None:
    config = video_set(tmp_path, {"v": 9}, target_frames=[9])
    assert cache(config, demo_models, "--latent_window_size", 2) == 0
    (path,) = (tmp_path / "cache").iterdir()
    assert path.name == "v_00000-009-0000_0032x0032_fp.safetensors"
    assert cache_header(path).shapes["latents"] == (16, 2, 4, 4)


def test_other_weights_are_noticed(tmp_path, demo_models, report) -> None:
    config = image_set(tmp_path, ["a"])
    assert cache(config, demo_models, "--one_frame") == 0
    other = tmp_path / "vae"
    shutil.copytree(demo_models.vae / "vae", other / "vae")
    (weights,) = (other / "vae").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    report.clear()
    assert cache(config, demo_models, "--one_frame", "--skip_existing") == 0
    assert "1 were cached already" in report.text
    assert cache(config, demo_models, "--one_frame", "--skip_existing", "--vae", other) == 0
    assert re.search(r"made anew \(1\): vae is ", report.text)


def test_the_report_counts_everything(tmp_path, demo_models, report) -> None:
    config = image_set(tmp_path, ["a", "b", "c"], enable_bucket=True, resolution=[64, 32])
    Image.new("RGB", (32, 64)).save(tmp_path / "images" / "b.png")
    (tmp_path / "images" / "c.png").write_bytes(b"")
    assert cache(config, demo_models, "--one_frame") == 1
    assert "3 items, 2 used, 0 dropped, 1 failed" in report.text
    num_bytes = sum(len(content) for content in files(tmp_path / "cache").values())
    assert f"2 images encoded, {num_bytes / 1024:.1f} KiB written" in report.text
    assert re.search(r"buckets \(width x height: images\): 32x64: 1, 48x48: 1|buckets .*: 1, .*: 1", report.text)
    assert "images per second" in report.text
    assert re.search(r"failed: .*c\.png: .*the file is empty", report.text)


# ---- at the door ----


@pytest.mark.parametrize(
    ("flags", "keys", "complaint"),
    [
        ([], {}, r"image_directory: got images; expected videos without --one_frame; add --one_frame"),
        (["--one_frame"], {"fp_1f_target_index": None}, "fp_1f_target_index: got nothing"),
        (["--one_frame"], {"control_directory": None, "fp_1f_clean_indices": None}, "control_directory: got nothing"),
        (["--one_frame"], {"resolution": [0, 0]}, "resolution: got"),
        (["--one_frame"], {"target_indx": 1}, "target_indx: got an unknown key"),
        (["--one_frame", "--vae_dtype", "fp16"], {}, "--vae_dtype: got fp16"),
        (["--one_frame", "--f1"], {}, "--f1: got --f1 and --one_frame"),
        (["--one_frame_no_2x"], {}, "--one_frame_no_2x: got no --one_frame"),
        (["--one_frame", "--batch_size", 0], {}, "--batch_size: got 0"),
        (["--one_frame", "--num_workers", -1], {}, "--num_workers: got -1"),
        (["--one_frame", "--num_workers", "many"], {}, "--num_workers: got many"),
        (["--one_frame", "--latent_window_size", 0], {}, "--latent_window_size: got 0"),
        (["--one_frame", "--preview_items", -1], {}, "--preview_items: got -1"),
        (["--one_frame", "--debug_mode", "console"], {}, "--preview FOLDER"),
        (["--one_frame", "--vae", "nowhere"], {}, "--vae: got nowhere"),
        (["--one_frame", "--device", "abacus"], {}, "--device: got abacus"),
        (["--one_frame", "--skip_exsting"], {}, "did you mean --skip_existing"),
    ],
    ids=str,
)
def test_the_door_says_what_is_wrong(tmp_path, demo_models, no_models, capsys, flags, keys, complaint) -> None:
    config = image_set(tmp_path, ["a"])
    values = {key: value for key, value in (image_keys(tmp_path) | keys).items() if value is not None}
    write_config(config, values)
    assert cache(config, demo_models, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(complaint, line)
    assert not (tmp_path / "cache").exists()


def test_videos_with_one_frame_are_refused(tmp_path, demo_models, no_models, capsys) -> None:
    assert cache(video_set(tmp_path, {"v": 5}), demo_models, "--one_frame") == 2
    assert "video_directory: got videos; expected images with --one_frame" in capsys.readouterr().err


def test_two_data_sets_cannot_share_a_cache(tmp_path, demo_models, no_models, capsys) -> None:
    image_set(tmp_path / "a"), image_set(tmp_path / "b")
    shared = {"cache_directory": tmp_path / "cache"}
    config = write_config(tmp_path / "d.toml", image_keys(tmp_path / "a") | shared, image_keys(tmp_path / "b") | shared)
    assert cache(config, demo_models, "--one_frame") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "[datasets][2] cache_directory: got" in line and "a folder of its own" in line


def test_missing_models_are_asked_for(tmp_path, capsys) -> None:
    config = image_set(tmp_path, ["a"])
    assert fpack_cache_latents.main(["--dataset_config", str(config), "--one_frame"]) == 2
    assert capsys.readouterr().err.startswith("--vae: got nothing")


def test_strict_stops_before_any_weights_are_loaded(tmp_path, demo_models, no_models, capsys) -> None:
    config = image_set(tmp_path, ["a", "b"])
    (tmp_path / "images" / "b.txt").unlink()
    assert cache(config, demo_models, "--one_frame", "--strict") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "b.png" in line]
    assert "no caption file b.txt" in line
    assert not (tmp_path / "cache").exists()


def test_nothing_usable_ends_with_2(tmp_path, demo_models, no_models, capsys) -> None:
    config = image_set(tmp_path, ["a"])
    (tmp_path / "images" / "a.png").write_bytes(b"")
    assert cache(config, demo_models, "--one_frame") == 2
    complaints = capsys.readouterr().err.splitlines()
    assert (
        len(complaints) == 2 and "the file is empty" in complaints[0] and "nothing that can be cached" in complaints[1]
    )


# ---- to look at ----


def test_preview_shows_all_items_of_valid_caches_too(photographs, tmp_path, demo_models, no_models) -> None:
    config = write_config(tmp_path / "data.toml", image_keys(photographs.parent) | {"cache_directory": tmp_path / "c"})
    sheets = tmp_path / "見本"
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
        cache(config, demo_models, "--one_frame", "--preview", sheets)
    assert [path.name for path in sheets.iterdir()] == ["data_01_001.png"], "drawn before anything is encoded"


def test_preview_spreads_its_items_over_several_sheets(tmp_path, demo_models, report) -> None:
    config = image_set(tmp_path, [f"i{number:02d}" for number in range(10)])
    assert cache(config, demo_models, "--one_frame", "--preview", tmp_path / "all") == 0
    first, second = ((tmp_path / "all" / f"{config.stem}_01_00{number}.png") for number in (1, 2))
    with Image.open(first) as eight, Image.open(second) as two:
        assert eight.width == two.width and 3.5 < eight.height / two.height < 4.5
    (tmp_path / "all" / "other_01_002.png").touch()
    again = ("--one_frame", "--skip_existing", "--preview", tmp_path / "all", "--preview_items", 3)
    assert cache(config, demo_models, *again) == 0
    left = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert left == sorted([f"{config.stem}_01_001.png", "other_01_002.png"]), "older sheets of this file are gone"
    assert "the preview shows 3 of 10 items" in report.text and "10 were cached already" in report.text


def test_an_item_that_cannot_be_drawn_does_not_stop_the_preview(tmp_path, demo_models, monkeypatch, report) -> None:
    original = FramePackCacheRules.cells

    def cells(self, sample):
        if sample.job.item.stem == "a":
            raise UserError("a.png", "a picture", "another one", "draw it")
        return original(self, sample)

    monkeypatch.setattr(FramePackCacheRules, "cells", cells)
    config = image_set(tmp_path, ["a", "b"])
    assert cache(config, demo_models, "--one_frame", "--preview", tmp_path / "sheets") == 0
    assert len(files(tmp_path / "sheets")) == 1 and len(files(tmp_path / "cache")) == 2
    assert re.search(r"a\.png: got a picture; expected another one", report.text)


def test_lines_without_controls_are_told_before_any_weights_are_loaded(
    tmp_path, demo_models, no_models, capsys
) -> None:
    config = image_set(tmp_path, ["a", "b"])
    lines = [f'{{"image_path": "{tmp_path.as_posix()}/images/{name}.png", "caption": "{name}"}}' for name in "ab"]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    keys = {"image_jsonl_file": tmp_path / "data.jsonl", "cache_directory": tmp_path / "c", "fp_1f_target_index": 1}
    write_config(config, keys)
    assert cache(config, demo_models, "--one_frame") == 2
    assert capsys.readouterr().err.count("got 0 control images; expected 1") == 2


def test_debug_pictures_need_no_models(tmp_path, no_models) -> None:
    config = image_set(tmp_path, ["a", "猫"])
    command = ["--dataset_config", str(config), "--one_frame", "--num_workers", "0", "--debug_mode", "image"]
    assert fpack_cache_latents.main(command) == 0
    assert list(files(tmp_path / "cache")) == ["a_0040x0032_fp.png", "猫_0040x0032_fp.png"]


def test_debug_videos_hold_the_frames_that_would_be_encoded(tmp_path, no_models) -> None:
    config = video_set(tmp_path, {"v": 16}, target_frames=[13], fp_latent_window_size=2)
    command = ["--dataset_config", str(config), "--num_workers", "0", "--debug_mode", "video"]
    assert fpack_cache_latents.main(command) == 0
    (path,) = (tmp_path / "cache").iterdir()
    assert path.name == "v_00000-013-0000_0032x0032_fp.mp4"
    assert examine_video(path).timing.num_frames == 9 and examine_video(path).timing.fps == 30


def test_debug_files_never_go_among_the_sources(tmp_path, no_models, capsys) -> None:
    config = image_set(tmp_path, ["a"], cache_directory=tmp_path / "images")
    command = ["--dataset_config", str(config), "--one_frame", "--num_workers", "0", "--debug_mode", "image"]
    assert fpack_cache_latents.main(command) == 2
    assert "cache_directory" in capsys.readouterr().err
    assert sorted(files(tmp_path / "images")) == ["a.png", "a.txt"]
