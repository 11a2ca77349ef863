"""What is wrong with a command is said in one line, with exit code 2, before weights load, with nothing written."""

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data_dir

import fpack_generate_video

ROOT = Path(__file__).resolve().parent.parent
CAT = str(Path(data_dir) / "chelsea.png")
NAMES = ("dit", "vae", "text_encoder1", "text_encoder2", "image_encoder")


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Reading a weight would be too late to complain."""

    def too_late(*args, **kwargs):
        raise AssertionError("weights were loaded before the input was checked")

    for module in ("common.weights", "networks.transformer_loading", "hunyuan_model.text_encoders"):
        monkeypatch.setattr(f"{module}.fill", too_late)


@pytest.fixture
def refused(demo_models, tmp_path, capsys):
    """Runs a command with changed flags (None leaves one out) and returns the one line that it answers."""

    def run(**changes) -> str:
        flags = {name: getattr(demo_models, name) for name in NAMES}
        flags |= {"prompt": "猫", "image_path": CAT, "save_path": tmp_path / "out", "video_sections": 1}
        argv = []
        for name, value in (flags | changes).items():
            if value is True:
                argv.append(f"--{name}")
            elif value is not None:
                argv += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
        before = sorted(tmp_path.rglob("*"))
        code = fpack_generate_video.main(argv)
        answer = capsys.readouterr()
        assert code == 2
        assert answer.out == ""
        assert answer.err.endswith("\n") and answer.err.count("\n") == 1
        assert re.fullmatch(r"[^:]+: got .+; expected .+; .+", answer.err.strip()), answer.err
        assert sorted(tmp_path.rglob("*")) == before
        return answer.err

    return run


def test_missing_checkpoint(refused, tmp_path):
    for name in NAMES:
        assert refused(**{name: tmp_path / "なし.safetensors"}).startswith(f"--{name}: got ")


@pytest.mark.parametrize("name", NAMES)
def test_model_that_was_not_given(name, refused):
    assert refused(**{name: None}) == f"--{name}: got nothing; expected a checkpoint file or folder; give --{name}\n"


def test_truncated_checkpoint(refused, demo_models, tmp_path):
    whole = (demo_models.vae / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    for size in (0, 5, 1000, len(whole) - 1):
        (tmp_path / "vae.safetensors").write_bytes(whole[:size])
        assert "--vae: got " in refused(vae=tmp_path / "vae.safetensors")


def test_missing_shard(refused, demo_models, tmp_path):
    shard = sorted(demo_models.dit.glob("*.safetensors"))[0]
    (tmp_path / shard.name).write_bytes(shard.read_bytes())
    assert "add diffusion_pytorch_model-00002-of-00003.safetensors" in refused(dit=tmp_path / shard.name)


def test_checkpoint_of_the_wrong_kind(refused, demo_models):
    line = refused(dit=demo_models.vae / "vae")
    assert "a HunyuanVideo VAE; expected a FramePack transformer" in line and "--vae" in line
    assert "FramePack transformer; expected" in refused(vae=demo_models.dit)
    assert "--text_encoder1" in refused(text_encoder1=demo_models.image_encoder)


def test_checkpoint_with_absurd_header(refused, tmp_path):
    (tmp_path / "dit.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert "--dit: got " in refused(dit=tmp_path / "dit.safetensors")


def test_unsafe_pickle(refused, tmp_path):
    torch.save({"model": Path}, tmp_path / "vae.pt")
    assert "--vae: got " in refused(vae=tmp_path / "vae.pt")


@pytest.mark.parametrize(
    ("flag", "folder", "missing"),
    [
        ("dit", ".", "single_transformer_blocks.0.proj_out.bias"),
        ("vae", "vae", "decoder.conv_out.conv.bias"),
        ("text_encoder1", "text_encoder", "layers.0.mlp.up_proj.weight"),
        ("text_encoder2", "text_encoder_2", "final_layer_norm.bias"),
        ("image_encoder", "image_encoder", "post_layernorm.bias"),
    ],
)
def test_incomplete_model(flag, folder, missing, refused, demo_models, tmp_path):
    tensors = {}
    for shard in sorted((getattr(demo_models, flag) / folder).glob("*.safetensors")):
        tensors |= load_file(shard)
    save_file({k: v for k, v in tensors.items() if not k.endswith(missing)}, tmp_path / "model.safetensors")
    line = refused(**{flag: tmp_path / "model.safetensors"})
    assert line.startswith(f"--{flag} ") and missing in line


def test_encoder_of_another_width(refused, demo_models, tmp_path):
    tensors = {}
    for shard in sorted((demo_models.text_encoder2 / "text_encoder_2").glob("*.safetensors")):
        tensors |= load_file(shard)
    wider = {name: widened(tensor) for name, tensor in tensors.items()}
    save_file(wider, tmp_path / "clip.safetensors")
    assert "as --dit was trained with" in refused(text_encoder2=tmp_path / "clip.safetensors")


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The same with every axis of CLIP's width, 128, made 192."""
    for axis, size in enumerate(tensor.shape):
        if size == 128:
            tensor = torch.cat([tensor, tensor.narrow(axis, 0, 64)], dim=axis)
    return tensor.contiguous()


def test_tokenizer_that_is_not_one(refused, tmp_path):
    assert "--tokenizer1: got " in refused(tokenizer1=tmp_path)
    assert "--tokenizer2: got " in refused(tokenizer2=tmp_path)


@pytest.mark.parametrize("flag", ["image_path", "end_image_path", "image_mask_path"])
def test_image_that_is_not_an_image(flag, refused, tmp_path):
    (tmp_path / "絵.png").write_text("no picture", encoding="utf-8")
    line = refused(**{flag: tmp_path / "絵.png"})
    assert line.startswith(f"--{flag}: got ") and "絵.png" in line
    assert refused(**{flag: tmp_path / "missing.png"}).startswith(f"--{flag}: got ")


@pytest.mark.parametrize("flag", ["control_image_path", "control_image_mask_path"])
def test_control_that_is_not_an_image(flag, refused, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    changes = {"one_frame_inference": "default", "control_image_path": CAT, flag: tmp_path / "half.png"}
    assert refused(**changes).startswith(f"--{flag}: got ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_size": (200, 256)}, "--video_size: got 200 256; expected height and width that are multiples of 16"),
        ({"one_frame_inference": "targt_index=1"}, "did you mean target_index?"),
        ({"one_frame_inference": "target_index=x"}, "got target_index=x"),
        ({"one_frame_inference": "control_index=0;10"}, "2 control indices (0;10) for 0 control images"),
        ({"image_path": f"0:{CAT};;;3:{CAT}"}, "--image_path: got section 3"),
        ({"infer_steps": 0}, "--infer_steps: got 0"),
        ({"video_sections": None, "video_seconds": -2}, "--video_seconds: got -2.0"),
        ({"vae_spatial_tile_sample_min_size": 100}, "--vae_spatial_tile_sample_min_size: got 100"),
        ({"vae_chunk_size": -1}, "--vae_chunk_size: got -1"),
        ({"device": "gpu"}, "--device: got gpu"),
        ({"prompt": None}, "--prompt: got nothing"),
        ({"attn_mode": "flash", "device": "cpu"}, "--attn_mode: got FlashAttention 2 on a CPU; expected a GPU"),
        ({"attn_mode": "sage"}, "--attn_mode: got sage; expected one of flash, flash2, flash3, torch, sageattn"),
        ({"compile": True, "compile_backend": "eagre"}, "--compile_backend: got eagre; expected one of aot_eager"),
        ({"latent_path": "no.safetensors"}, "--latent_path: got no.safetensors"),
        ({"latent_path": "no.safetensors", "output_type": "latent"}, "--output_type: got latent"),
    ],
)
def test_values_that_cannot_work(changes, message, refused):
    assert message in refused(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"latent_window_size": 0},
        {"fps": -5},
        {"fps": 0},
    ],
)
def test_numbers_are_checked_before_saved_latents_are_decoded(changes, refused, latent):
    (name,) = changes
    assert refused(latent_path=latent, **changes).startswith(f"--{name}: got ")


@pytest.fixture
def latent(tmp_path):
    save_file({"latent": torch.zeros(16, 1, 8, 8)}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_one_bad_latent_of_several_stops_before_the_first_is_decoded(refused, latent, tmp_path):
    save_file({"latent": torch.full((16, 1, 8, 8), torch.nan)}, tmp_path / "b.safetensors")
    assert "b.safetensors, with NaN" in refused(latent_path=(latent, tmp_path / "b.safetensors"))


@pytest.mark.parametrize("flag", ["image_path", "dit", "vae", "tokenizer1", "latent_path", "save_path", "from_file"])
def test_a_prompt_pasted_behind_the_flag_of_a_path(flag, refused):
    """Three hundred characters are no file name, and no reason for a traceback."""
    line = refused(**{flag: "a cat on the grass, " * 15 + "\0" * (flag == "image_path")})
    assert line.startswith(f"--{flag}: got ")


def test_a_gguf_file(refused, tmp_path):
    (tmp_path / "dit.safetensors").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(1000))
    assert "a GGUF file" in refused(dit=tmp_path / "dit.safetensors")


def test_a_device_without_memory_of_its_own(refused):
    assert refused(device="meta").startswith("--device: got meta")


def test_a_real_process_prints_one_line_whatever_else_would_be_remarked(demo_models, tmp_path):
    """Hints and library warnings must not stand around the line: run as a user does, with much to remark upon."""
    models = [part for name in NAMES if name != "vae" for part in (f"--{name}", str(getattr(demo_models, name)))]
    argv = [*models, "--vae", str(tmp_path / "missing"), "--prompt", "a", "--one_frame_inference", "target_index=0"]
    command = [sys.executable, "fpack_generate_video.py", *argv, "--f1", "--save_path", str(tmp_path / "out")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("--vae: got ") and answer.stderr.count("\n") == 1


def test_latent_file_without_latents(refused, demo_models, tmp_path):
    assert "--latent_path: got " in refused(latent_path=demo_models.vae / "vae" / "diffusion_pytorch_model.safetensors")
    assert "--vae: got nothing" in refused(latent_path=tmp_path / "a.safetensors", vae=None)


def test_output_folder_that_cannot_be_one(refused, tmp_path):
    (tmp_path / "file").touch()
    assert refused(save_path=tmp_path / "file").startswith("--save_path: got ")
    assert refused(save_path=tmp_path / "file" / "below").startswith("--save_path: got ")
