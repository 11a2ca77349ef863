"""Wan's caching scripts from their command lines to their files, against diffusers' and transformers' own encoders."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import wan_cache_latents
import wan_cache_text_encoder_outputs
from common.media import load_picture
from dataset.cache_files import cache_header, read_cache
from dataset.frames import examine_video, read_frames
from tests.cache_builders import files, image_keys, image_set, video_set, write_clip, write_config, write_picture
from tests.wan_encoders import direct_clip, direct_t5, direct_vae, grey, shown_clip

ONE = {"fp_1f_target_index": 1}


@pytest.fixture(autouse=True)
def report(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads weights fails."""
    for name in ("wan.vae.load_vae", "wan.image_encoder.load_clip", "wan.text_encoder.load_t5"):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("weights were loaded"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The captions that UMT5 gets."""
    import wan.text_encoder as module

    captions: list[str] = []
    original = module.encode_t5

    def encode_t5(model, tokenizer, caption):
        captions.append(caption)
        return original(model, tokenizer, caption)

    monkeypatch.setattr(module, "encode_t5", encode_t5)
    return captions


@pytest.fixture(scope="module")
def latents_of(wan_encoders) -> Callable:
    return direct_vae(wan_encoders)


@pytest.fixture(scope="module")
def features_of(wan_encoders) -> Callable:
    return direct_clip(wan_encoders)


def cache(config: Path, models, *flags: object) -> int:
    """With CLIP when a flag asks for pictures."""
    places = ["--vae", models.vae, "--num_workers", 0]
    if {"--i2v", "--flf2v", "--one_frame"} & set(flags):
        places += ["--clip", models.clip]
    return wan_cache_latents.main([str(flag) for flag in ("--dataset_config", config, *places, *flags)])


def cache_texts(config: Path, models, *flags: object) -> int:
    command = ("--dataset_config", config, "--t5", models.t5, *flags)
    return wan_cache_text_encoder_outputs.main([str(flag) for flag in command])


def frames_of(path: Path, count: int, fps: float | None = None) -> np.ndarray:
    """What the VAE is given of a clip of 32 x 32."""
    return np.stack(list(read_frames(path, size=(32, 32), limit=count, target_fps=fps)))


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(found.float(), wanted.float(), rtol=1e-2, atol=1e-3)


def one_control(folder: Path, *names: str, **keys) -> Path:
    return image_set(folder, names or ["a"], **ONE | keys)


# ---- one frame ----


@pytest.fixture(scope="module")
def photographs(material, tmp_path_factory) -> Path:
    """A data set of two photographs with two controls each, the first of them with alpha, at unsorted places."""
    folder = tmp_path_factory.mktemp("写真 [1]")
    config = image_set(folder, ["猫", "cup"], **ONE, fp_1f_clean_indices=[5, 0], resolution=[64, 64])
    for name, path in (("猫", material.chelsea), ("cup", material.astronaut)):
        shutil.copy(path, folder / "images" / f"{name}.png")
        shutil.copy(material.coffee_with_alpha, folder / "controls" / f"{name}.png")
        shutil.copy(material.astronaut, folder / "controls" / f"{name}_0.png")
    return config


def test_one_frame_caches_hold_what_the_libraries_encode(photographs, wan_encoders, latents_of, features_of) -> None:
    assert cache(photographs, wan_encoders, "--one_frame") == 0
    folder = photographs.parent
    assert list(files(folder / "cache")) == ["cup_0512x0512_wan.safetensors", "猫_0451x0300_wan.safetensors"]
    path = folder / "cache" / "猫_0451x0300_wan.safetensors"
    sources = (folder / "images" / "猫.png", folder / "controls" / "猫.png", folder / "controls" / "猫_0.png")
    target, cup, face = (load_picture(source, width=64, height=64, flag="") for source in sources)
    header, stored = cache_header(path), read_cache(path)
    assert set(header.keys.values()) == {
        *("latents_3x8x8_bfloat16", "latents_image_3x8x8_bfloat16", "clip_bfloat16"),
        *("f_indices_int32", "clip_indices_int32"),
    }
    assert stored["f_indices"].tolist() == [0, 1, 5] and stored["clip_indices"].tolist() == [5, 0]
    ordered = [latents_of(picture.rgb[None])[0] for picture in (face, target, cup)]
    assert torch.equal(stored["latents"], torch.cat(ordered, dim=1).bfloat16()), "masks are not for the target"
    alpha = np.asarray(Image.fromarray(cup.alpha).resize((8, 8), Image.Resampling.LANCZOS), np.float32) / 255
    shown = [ordered[0], latents_of(grey(64, 64))[0], ordered[2] * torch.from_numpy(alpha)]
    assert torch.equal(stored["latents_image"][4:], torch.cat(shown, dim=1).bfloat16())
    assert torch.equal(stored["latents_image"][:4, :, 0, 0], torch.tensor([[1, 0, 1]] * 4).bfloat16())
    assert torch.equal(stored["clip"], torch.stack([features_of(picture.rgb) for picture in (cup, face)]).half())
    assert header.metadata.items() >= {
        "architecture": "wan", "width": "451", "height": "300", "format_version": "1.0.1"
    }.items()  # fmt: skip
    assert "frame_count" not in header.metadata
    assert header.fingerprint.items() >= {
        "mode": "one_frame", "target_index": "1", "control_indices": "5;0", "encoder_dtype": "float32",
        "latent_dtype": "bfloat16", "clip_dtype": "float32",
    }.items()  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fp_1f_target_index": 2}, "target_index is 1 in the cache, 2 now"),
        ({"fp_1f_clean_indices": [3]}, "control_indices is 0 in the cache, 3 now"),
        ({"fp_1f_image_embedding_source": "target"}, "image_embedding_source is controls in the cache, target now"),
    ],
)
def test_a_changed_setting_is_encoded_again(tmp_path, wan_encoders, report, changes: dict, reason: str) -> None:
    config = one_control(tmp_path)
    assert cache(config, wan_encoders, "--one_frame") == 0
    before = files(tmp_path / "cache")
    assert cache(config, wan_encoders, "--one_frame", "--skip_existing") == 0
    assert "1 were cached already" in report.text and files(tmp_path / "cache") == before
    write_config(config, image_keys(tmp_path) | ONE | changes)
    report.clear()
    assert cache(config, wan_encoders, "--one_frame", "--skip_existing") == 0
    assert f"made anew (1): {reason}" in report.text and files(tmp_path / "cache") != before


def test_another_mode_or_type_is_encoded_again(tmp_path, wan_encoders, report) -> None:
    config = one_control(tmp_path)
    assert cache(config, wan_encoders, "--one_frame") == 0
    for flags, reason in (
        (["--i2v"], "clip_dtype|mode is one_frame in the cache, i2v now"),
        ([], "mode is i2v in the cache, t2v now"),
        (["--vae_dtype", "fp16"], "encoder_dtype is float32 in the cache, float16 now"),
    ):
        assert cache(config, wan_encoders, *flags, "--skip_existing") == 0
        assert re.search(rf"made anew \(1\): ({reason})", report.text), flags
        report.clear()
    (path,) = (tmp_path / "cache").iterdir()
    assert "latents_1x4x4_float16" in cache_header(path).keys.values()


@pytest.mark.parametrize(("name", "part"), [("vae", "vae"), ("clip", "image_encoder")])
def test_other_weights_are_noticed(tmp_path, wan_encoders, report, name: str, part: str) -> None:
    config = one_control(tmp_path)
    assert cache(config, wan_encoders, "--one_frame") == 0
    other = tmp_path / "重み"
    shutil.copytree(getattr(wan_encoders, name) / part, other / part)
    (weights,) = (other / part).glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    report.clear()
    assert cache(config, wan_encoders, "--one_frame", "--skip_existing", f"--{name}", other) == 0
    assert re.search(rf"made anew \(1\): {name} is ", report.text)


# ---- videos ----


def test_clip_asks_for_i2v_by_itself(tmp_path, wan_encoders, latents_of, features_of) -> None:
    config = video_set(tmp_path, {"猫": 12}, fps=16, target_frames=[9])
    assert cache(config, wan_encoders, "--clip", wan_encoders.clip) == 0
    (path,) = (tmp_path / "cache").iterdir()
    assert path.name == "猫_00000-009_0032x0032_wan.safetensors"
    header, stored = cache_header(path), read_cache(path)
    assert set(header.keys.values()) == {"latents_3x4x4_bfloat16", "latents_image_3x4x4_bfloat16", "clip_bfloat16"}
    assert header.metadata["frame_count"] == "9" and header.metadata["width"] == "32"
    frames = frames_of(tmp_path / "videos" / "猫.mp4", 9)
    assert torch.equal(stored["latents"], latents_of(frames)[0].bfloat16())
    assert torch.equal(stored["latents_image"][4:], latents_of(shown_clip([frames[0], *[None] * 8]))[0].bfloat16())
    assert torch.equal(stored["clip"], features_of(frames[0]).half())


def test_flf2v_shows_both_ends_of_every_clip(tmp_path, wan_encoders, latents_of, features_of, report) -> None:
    config = video_set(tmp_path, {"v": 12}, fps=16, target_frames=[1, 5], frame_extraction="chunk")
    assert cache(config, wan_encoders, "--flf2v") == 0
    assert list(files(tmp_path / "cache")) == [f"v_0000{i}-005_0032x0032_wan.safetensors" for i in (0, 5)]
    assert "clips of 1 are too short for --flf2v" in report.text
    stored = read_cache(tmp_path / "cache" / "v_00005-005_0032x0032_wan.safetensors")
    frames = frames_of(tmp_path / "videos" / "v.mp4", 10)[5:]
    shown = latents_of(shown_clip([frames[0], None, None, None, frames[4]]))[0]
    assert torch.equal(stored["latents_image"][4:], shown.bfloat16())
    assert torch.equal(stored["latents_image"][:4, :, 0, 0], torch.tensor([[1, 0]] * 3 + [[1, 1]]).bfloat16())
    assert torch.equal(stored["clip"], torch.stack([features_of(frames[i]) for i in (0, 4)]).half())


def test_videos_are_brought_to_sixteen_frames_per_second(tmp_path, wan_encoders, latents_of, report) -> None:
    config = video_set(tmp_path, {"v": 16}, fps=32)
    assert cache(config, wan_encoders) == 0
    stored = read_cache(tmp_path / "cache" / "v_00000-005_0032x0032_wan.safetensors")
    frames = frames_of(tmp_path / "videos" / "v.mp4", 5, fps=16)
    assert not np.array_equal(frames, frames_of(tmp_path / "videos" / "v.mp4", 5))
    assert stored.keys() == {"latents"} and torch.equal(stored["latents"], latents_of(frames)[0].bfloat16())
    assert "32 frames per second brought to 16, 16 frames become 8" in report.text


def test_control_videos_are_cut_like_their_videos(tmp_path, wan_encoders, latents_of, report) -> None:
    """One is as long and larger, one is a folder of frames that ends early."""
    write_clip(tmp_path / "controls" / "猫.mp4", 12, fps=16, seed=8, size=(64, 64))
    for number in range(7):
        write_picture(tmp_path / "controls" / "w" / f"{number}.png", number, (32, 32))
    config = video_set(
        tmp_path, {"猫": 12, "w": 12}, fps=16, frame_extraction="chunk", control_directory=tmp_path / "controls"
    )
    assert cache(config, wan_encoders) == 0
    assert len(files(tmp_path / "cache")) == 4
    frames = frames_of(tmp_path / "controls" / "猫.mp4", 10)
    for start in (0, 5):
        stored = read_cache(tmp_path / "cache" / f"猫_0000{start}-005_0032x0032_wan.safetensors")
        assert torch.equal(stored["latents_control"], latents_of(frames[start : start + 5])[0].bfloat16())
    frames = frames_of(tmp_path / "controls" / "w", 7)
    stored = read_cache(tmp_path / "cache" / "w_00005-005_0032x0032_wan.safetensors")
    repeated = np.concatenate([frames[5:], frames[6:], frames[6:], frames[6:]])
    assert torch.equal(stored["latents_control"], latents_of(repeated)[0].bfloat16())
    assert "7 frames of the control w for 12: its last one is repeated" in report.text
    assert report.text.count("is repeated") == 1


def test_a_folder_of_control_frames_has_the_rate_of_its_video(tmp_path, wan_encoders, latents_of, report) -> None:
    for number in range(10):
        write_picture(tmp_path / "controls" / "v" / f"{number:02d}.png", number, (32, 32))
    config = video_set(tmp_path, {"v": 16}, fps=32, control_directory=tmp_path / "controls")
    assert cache(config, wan_encoders) == 0
    stored = read_cache(tmp_path / "cache" / "v_00000-005_0032x0032_wan.safetensors")
    frames = np.stack(list(read_frames(tmp_path / "controls" / "v", size=(32, 32), target_fps=16, source_fps=32)))
    assert len(frames) == 5 and torch.equal(stored["latents_control"], latents_of(frames)[0].bfloat16())
    assert "5 frames of the control v for 8: its last one is repeated" in report.text


def test_a_control_that_came_or_went_is_noticed(tmp_path, wan_encoders, report) -> None:
    write_clip(tmp_path / "controls" / "v.mp4", 5, fps=16, seed=8)
    plain = video_set(tmp_path, {"v": 5}, fps=16)
    text = plain.read_text(encoding="utf-8")
    controlled = f"{text}\ncontrol_directory = {json.dumps(str(tmp_path / 'controls'))}"
    for content, has_control in ((text, False), (controlled, True), (text, False)):
        plain.write_text(content, encoding="utf-8")
        assert cache(plain, wan_encoders, "--skip_existing") == 0
        (path,) = (tmp_path / "cache").iterdir()
        assert ("latents_control" in read_cache(path)) == has_control
    assert re.search(r"made anew \(1\): control_0 is v\.mp4 in the cache, none now", report.text)


def test_images_are_clips_of_one_frame(tmp_path, wan_encoders, latents_of) -> None:
    config = image_set(tmp_path, ["猫"], size=(32, 32))
    keys = {key: value for key, value in image_keys(tmp_path).items() if not key.startswith("fp_1f")}
    write_config(config, keys)
    assert cache(config, wan_encoders) == 0
    stored = read_cache(tmp_path / "cache" / "猫_0032x0032_wan.safetensors")
    target, control = (
        load_picture(tmp_path / kind / "猫.png", width=32, height=32, flag="").rgb for kind in ("images", "controls")
    )
    assert stored.keys() == {"latents", "latents_control"}
    assert torch.equal(stored["latents"], latents_of(target[None])[0].bfloat16())
    assert torch.equal(stored["latents_control"], latents_of(control[None])[0].bfloat16())


def test_where_the_vae_keeps_its_memory_changes_nothing(tmp_path, wan_encoders, monkeypatch) -> None:
    import wan.vae

    in_ram: list[wan.vae.FeaturesInRam] = []

    class Noted(wan.vae.FeaturesInRam):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            in_ram.append(self)

    monkeypatch.setattr(wan.vae, "FeaturesInRam", Noted)
    config = video_set(tmp_path, {"v": 9}, fps=16, target_frames=[9])
    assert cache(config, wan_encoders) == 0
    before = files(tmp_path / "cache")
    assert torch.backends.cudnn.enabled and not in_ram
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)  # to be put back
    assert cache(config, wan_encoders, "--vae_cache_cpu", "--disable_cudnn_backend") == 0
    assert not torch.backends.cudnn.enabled and in_ram
    assert files(tmp_path / "cache") == before


# ---- at the door ----


@pytest.mark.parametrize(
    ("flags", "keys", "complaint"),
    [
        (["--i2v"], {}, r"--i2v: got --i2v and no --clip; .*give --clip .*not supported: Wan2\.1 only"),
        (["--one_frame"], {}, "--one_frame: got --one_frame and no --clip"),
        (["--flf2v"], {}, "--flf2v: got --flf2v and no --clip"),
        (["--one_frame", "--flf2v"], {}, "--flf2v: got --flf2v and --one_frame; .*are the same for i2v and flf2v"),
        (["--i2v", "--flf2v"], {}, "--flf2v: got --flf2v and --i2v; expected one of them"),
        (["--flf2v", "CLIP"], {}, "image_directory: got images; expected videos with --flf2v"),
        (["--one_frame", "CLIP"], {"fp_1f_target_index": None}, "fp_1f_target_index: got nothing"),
        (["--one_frame", "CLIP"], {"fp_1f_clean_indices": None}, "fp_1f_clean_indices: got nothing"),
        (["--one_frame", "CLIP"], {"fp_1f_clean_indices": [1]}, "target_index=1 and a control image at 1"),
        (["--one_frame", "CLIP"], {"fp_1f_target_index": 1024}, "target_index=1024; expected an index from 0 to 1023"),
        (["--vae_dtype", "fp8"], {}, "--vae_dtype: got fp8"),
        (["--vae_dtype", "bfloat61"], {}, "did you mean bfloat16"),
        (["--batch_size", 0], {}, "--batch_size: got 0"),
        (["--num_workers", "many"], {}, "--num_workers: got many"),
        (["--preview_items", -1], {}, "--preview_items: got -1"),
        (["--debug_mode", "console"], {}, "--preview FOLDER"),
        (["--vae", "nowhere"], {}, "--vae: got nowhere"),
        (["--i2v", "--clip", "nowhere"], {}, "--clip: got nowhere"),
        (["--device", "abacus"], {}, "--device: got abacus"),
        (["--skip_exsting"], {}, "did you mean --skip_existing"),
        (["--image_encoder", "x"], {}, "--image_encoder: got --image_encoder"),
    ],
    ids=str,
)
def test_the_door_says_what_is_wrong(tmp_path, wan_encoders, no_models, capsys, flags, keys, complaint) -> None:
    config = one_control(tmp_path)
    values = {key: value for key, value in (image_keys(tmp_path) | ONE | keys).items() if value is not None}
    write_config(config, values)
    flags = [part for flag in flags for part in (["--clip", wan_encoders.clip] if flag == "CLIP" else [flag])]
    command = ["--dataset_config", config, "--vae", wan_encoders.vae, *flags]
    assert wan_cache_latents.main([str(part) for part in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(complaint, line)
    assert not (tmp_path / "cache").exists()


def test_another_models_weights_are_refused(tmp_path, demo_models, wan_encoders, no_models, capsys) -> None:
    config = one_control(tmp_path)
    assert wan_cache_latents.main(["--dataset_config", str(config), "--vae", str(demo_models.vae)]) == 2
    assert capsys.readouterr().err.startswith("--vae")
    assert cache(config, wan_encoders, "--clip", demo_models.image_encoder) == 2
    assert capsys.readouterr().err.startswith("--clip")


def test_videos_with_one_frame_are_refused(tmp_path, wan_encoders, no_models, capsys) -> None:
    assert cache(video_set(tmp_path, {"v": 5}), wan_encoders, "--one_frame") == 2
    assert "video_directory: got videos; expected images with --one_frame" in capsys.readouterr().err


def test_a_missing_vae_is_asked_for(tmp_path, capsys) -> None:
    assert wan_cache_latents.main(["--dataset_config", str(one_control(tmp_path))]) == 2
    assert capsys.readouterr().err.startswith("--vae: got nothing")


def test_bad_lines_of_a_data_set_are_told_before_any_weights_are_loaded(
    tmp_path, wan_encoders, no_models, capsys
) -> None:
    config = one_control(tmp_path, "a", "b")
    lines = [{"image_path": str(tmp_path / "images" / f"{name}.png"), "caption": "猫"} for name in "ab"]
    lines[1]["control_path"] = str(tmp_path / "controls" / "nowhere.png")
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "データ.jsonl").write_text(text, encoding="utf-8")
    keys = {"image_jsonl_file": tmp_path / "データ.jsonl", "cache_directory": tmp_path / "c", **ONE}
    write_config(config, keys | {"fp_1f_clean_indices": [0]})
    assert cache(config, wan_encoders, "--one_frame") == 2
    complaints = capsys.readouterr().err
    assert "データ.jsonl line 1" in complaints and "got 0 control images; expected 1" in complaints
    assert "line 2 control_path" in complaints and "nowhere.png" in complaints


# ---- to look at ----


def test_debug_files_need_no_models(tmp_path, no_models) -> None:
    config = one_control(tmp_path / "images of", "a", "猫")
    command = ["--dataset_config", str(config), "--one_frame", "--num_workers", "0", "--debug_mode", "image"]
    assert wan_cache_latents.main(command) == 0
    assert list(files(config.parent / "cache")) == ["a_0040x0032_wan.png", "猫_0040x0032_wan.png"]
    config = video_set(tmp_path, {"v": 16}, fps=16, target_frames=[13])
    command = ["--dataset_config", str(config), "--flf2v", "--num_workers", "0", "--debug_mode", "video"]
    assert wan_cache_latents.main(command) == 0
    (path,) = (tmp_path / "cache").iterdir()
    assert path.name == "v_00000-013_0032x0032_wan.mp4"
    assert examine_video(path).timing.num_frames == 13 and examine_video(path).timing.fps == 16


def test_preview_is_drawn_before_anything_is_encoded(photographs, tmp_path, wan_encoders, no_models) -> None:
    keys = image_keys(photographs.parent) | ONE | {"cache_directory": tmp_path / "c", "fp_1f_clean_indices": [5, 0]}
    config = write_config(tmp_path / "data.toml", keys)
    sheets = tmp_path / "見本"
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
        cache(config, wan_encoders, "--one_frame", "--preview", sheets)
    assert [path.name for path in sheets.iterdir()] == ["data_01_001.png"]


# ---- texts ----


def test_captions_hold_what_the_libraries_encode(tmp_path, wan_encoders) -> None:
    text = "A girl in a school uniform walks, 猫"
    config = one_control(tmp_path, "猫 [1]")
    (tmp_path / "images" / "猫 [1].txt").write_text(f"{text}\n", encoding="utf-8")
    assert cache_texts(config, wan_encoders) == 0
    path = tmp_path / "cache" / "猫 [1]_wan_te.safetensors"
    header, stored = cache_header(path), read_cache(path)
    assert set(header.keys.values()) == {"varlen_t5_bfloat16"} and header.varlen == {"t5"}
    assert header.metadata.items() >= {"architecture": "wan", "caption1": text, "format_version": "1.0.1"}.items()
    wanted = direct_t5(wan_encoders)(text)
    assert close(stored["t5"], wanted) and stored["t5"].dtype == torch.bfloat16 and len(wanted) > 5


def test_lengths_of_captions_differ_and_equal_ones_are_encoded_once(tmp_path, wan_encoders, encoded) -> None:
    config = one_control(tmp_path, "a", "b", "c")
    for name, text in (("a", "short"), ("b", "a much longer caption"), ("c", "short")):
        (tmp_path / "images" / f"{name}.txt").write_text(text, encoding="utf-8")
    assert cache_texts(config, wan_encoders) == 0
    lengths = [len(read_cache(tmp_path / "cache" / f"{name}_wan_te.safetensors")["t5"]) for name in "abc"]
    assert lengths[0] == lengths[2] < lengths[1]
    assert sorted(encoded) == ["a much longer caption", "short"]


def test_only_what_changed_is_encoded_again(tmp_path, wan_encoders, encoded, report) -> None:
    config = one_control(tmp_path, "a", "猫")
    assert cache_texts(config, wan_encoders) == 0
    (tmp_path / "images" / "猫.txt").write_text("something else", encoding="utf-8")
    encoded.clear()
    assert cache_texts(config, wan_encoders, "--skip_existing") == 0
    assert encoded == ["something else"] and "1 were cached already" in report.text
    encoded.clear()
    before = read_cache(tmp_path / "cache" / "猫_wan_te.safetensors")["t5"].float()
    assert cache_texts(config, wan_encoders, "--skip_existing", "--fp8_t5") == 0
    assert len(encoded) == 2 and "encoder_dtype is float32 in the cache, float32, in fp8 now" in report.text
    after = read_cache(tmp_path / "cache" / "猫_wan_te.safetensors")["t5"].float()
    assert 0.001 < (after - before).abs().mean() / before.abs().mean() < 0.2


def test_the_tokenizer_may_lie_elsewhere(tmp_path, wan_encoders, encoded) -> None:
    config = one_control(tmp_path / "data")
    folder = tmp_path / "字句"
    shutil.copytree(wan_encoders.t5 / "google" / "umt5-xxl", folder)
    assert cache_texts(config, wan_encoders) == 0
    assert cache_texts(config, wan_encoders, "--skip_existing", "--t5_tokenizer", folder) == 0
    assert len(encoded) == 1, "the same tokenizer in another place"
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert cache_texts(config, wan_encoders, "--skip_existing", "--t5_tokenizer", folder) == 0
    assert len(encoded) == 2


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--batch_size", 0], "--batch_size: got 0"),
        (["--t5", "nowhere"], "--t5: got nowhere"),
        (["--t5_tokenizer", "nowhere/at/all/!"], "--t5_tokenizer: got nowhere/at/all/!"),
    ],
    ids=str,
)
def test_the_door_of_texts_says_what_is_wrong(tmp_path, wan_encoders, no_models, capsys, flags, complaint) -> None:
    assert cache_texts(one_control(tmp_path), wan_encoders, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_a_missing_text_encoder_is_asked_for(tmp_path, capsys) -> None:
    assert wan_cache_text_encoder_outputs.main(["--dataset_config", str(one_control(tmp_path))]) == 2
    assert capsys.readouterr().err.startswith("--t5: got nothing")
