"""What is wrong with a command for Wan is said in one line, before weights load, with nothing written."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo.wan_layouts import clip_shapes, t5_shapes, vae_shapes
from demo.wan_models import random_tensors
from tests.wan_driver import TASKS, Pictures, write_pictures
from tests.wan_driver import run as run_script

ONE_FRAME = "target_index=1,control_index=0"


@pytest.fixture(scope="module")
def pictures(material, tmp_path_factory) -> Pictures:
    return write_pictures(tmp_path_factory.mktemp("素材 [x]"), material)


@pytest.fixture
def refused(wan_models, pictures, tmp_path, monkeypatch, capsys, caplog) -> Callable[..., str]:
    """Runs i2v-14B with changed flags (None leaves one out), and returns the one line that it answers."""

    def too_late(*args, **kwargs):
        raise AssertionError("weights were loaded before the input was checked")

    for name in ("common.weights", "networks.transformer_loading", "wan.text_encoder"):
        monkeypatch.setattr(f"{name}.fill", too_late)

    def run(**changes) -> str:
        task = changes.get("task", "i2v-14B")
        paths = wan_models.for_kind(TASKS.get(task, "i2v"))
        flags = {"task": task, **{name: getattr(paths, name) for name in ("dit", "vae", "t5", "clip")}}
        flags |= {"prompt": "猫", "image_path": pictures.start, "video_size": (48, 64), "video_length": 5}
        flags |= {"save_path": tmp_path / "out"}
        argv = []
        for name, value in (flags | changes).items():
            if value is True:
                argv.append(f"--{name}")
            elif value is not None:
                argv += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with caplog.at_level(logging.WARNING):
            assert run_script(*argv) == 2
        answer = capsys.readouterr()
        assert answer.out == "" and not caplog.records
        assert answer.err.count("\n") == 1
        assert re.fullmatch(r"[^:]+: got .+; expected .+; .+", answer.err.strip()), answer.err
        assert sorted(tmp_path.rglob("*")) == before
        return answer.err

    return run


# ---- models ----


def test_models_that_were_not_given_or_are_not_there(refused, tmp_path):
    for name in ("dit", "vae", "t5", "clip"):
        assert refused(**{name: tmp_path / "なし.safetensors"}).startswith(f"--{name}: got {tmp_path}")
        assert refused(**{name: None}).startswith(f"--{name}: got nothing; expected ")
    assert "the CLIP image encoder, which --task i2v-14B needs; give --clip" in refused(clip=None)
    assert refused(ckpt_dir=tmp_path / "なし").startswith(f"--ckpt_dir: got {tmp_path}")
    line = refused(ckpt_dir=tmp_path, t5=None)
    assert line.startswith("--ckpt_dir: got ") and "without models_t5_umt5-xxl-enc-bf16.pth" in line
    assert refused(t5_tokenizer=tmp_path).startswith("--t5_tokenizer: got ")


def test_a_transformer_for_another_task(refused, wan_models):
    for kind, words in {
        "t2v": "a text-to-video transformer (16 input channels) with --task i2v-14B; expected an image-to-video",
        "flf2v": "use --task flf2v-14B, or another checkpoint",
        "fun_control": "use --task t2v-1.3B-FC or t2v-14B-FC or i2v-14B-FC, or another checkpoint",
    }.items():
        dit = wan_models.for_kind(kind).dit
        line = refused(dit=dit)
        assert line.startswith(f"--dit {dit}: got ") and words in line
    assert "use --task i2v-14B" in refused(task="t2v-14B", dit=wan_models.dit, image_path=None)


def test_other_models_behind_the_flags(refused, wan_models, tmp_path):
    framepack = ("clean_x_embedder.proj.weight", "transformer_blocks.0.attn.to_q.weight")
    save_file({name: torch.zeros(1) for name in framepack}, tmp_path / "FramePack.safetensors")
    line = refused(dit=tmp_path / "FramePack.safetensors")
    assert "a FramePack transformer; expected a Wan transformer" in line
    assert "a Wan VAE; expected a Wan transformer" in refused(dit=wan_models.vae)
    assert refused(vae=wan_models.dit).startswith("--vae: got ")
    assert refused(t5=wan_models.clip).startswith("--t5: got ")
    assert refused(clip=wan_models.t5).startswith("--clip: got ")
    tensors = load_file(wan_models.for_kind("t2v").dit)
    tensors["patch_embedding.weight"] = torch.zeros(256, 36, 1, 2, 2)
    save_file(tensors, tmp_path / "wan22.safetensors")
    assert "not supported: Wan2.1 only" in refused(dit=tmp_path / "wan22.safetensors")


def test_incomplete_models(refused, wan_models, tmp_path):
    for flag, name in (("dit", "blocks.2.ffn.2.bias"), ("clip", "visual.post_norm.bias")):
        file = getattr(wan_models, flag)
        save_file({n: t for n, t in load_file(file).items() if n != name}, tmp_path / "x.safetensors")
        line = refused(**{flag: tmp_path / "x.safetensors"})
        assert line.startswith(f"--{flag} ") and "post_layernorm.bias" in line or name in line
    whole = torch.load(wan_models.vae, weights_only=True)
    torch.save({n: t for n, t in whole.items() if n != "decoder.conv1.bias"}, tmp_path / "x.pth")
    assert "decoder.conv_in.bias" in refused(vae=tmp_path / "x.pth")


def save(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    tensors: dict[str, Tensor] = random_tensors(shapes, seed=0)
    save_file(tensors, folder / "x.safetensors")
    return folder / "x.safetensors"


def test_encoders_of_other_widths(refused, tmp_path):
    expected = "as --dit was trained with; give its own encoders"
    t5 = t5_shapes(vocabulary=2000, width=128, inner=128, mlp=128, heads=2, blocks=1)
    assert "width 128; expected width 64, " + expected in refused(t5=save(tmp_path, t5))
    clip = clip_shapes(width=240, mlp=320, blocks=2, head=64)
    assert "width 240; expected width 160, " + expected in refused(clip=save(tmp_path, clip))
    assert "width 8; expected width 16, " + expected in refused(vae=save(tmp_path, vae_shapes(8, channels=8)))


# ---- images and videos ----


def test_images_that_are_none(refused, tmp_path):
    (tmp_path / "絵.png").write_text("no picture", encoding="utf-8")
    one_frame = {"one_frame_inference": ONE_FRAME, "control_image_path": tmp_path / "絵.png"}
    for path in (tmp_path / "絵.png", tmp_path / "なし.png"):
        assert refused(image_path=path).startswith(f"--image_path: got {path}")
        assert refused(end_image_path=path).startswith(f"--end_image_path: got {path}")
    assert refused(**one_frame, image_path=None).startswith(f"--control_image_path: got {tmp_path}")
    Image.new("RGB", (64, 64)).save(tmp_path / "全.png")
    masked = one_frame | {"control_image_path": tmp_path / "全.png", "control_image_mask_path": tmp_path / "絵.png"}
    assert refused(**masked).startswith(f"--control_image_mask_path: got {tmp_path}")


def test_control_videos_that_are_none_or_too_short(refused, pictures, tmp_path):
    task = {"task": "t2v-1.3B-FC", "image_path": None}
    assert refused(**task, control_path=tmp_path / "なし.mp4").startswith(f"--control_path: got {tmp_path}")
    assert refused(**task, control_path=pictures.mask).startswith("--control_path: got ")
    assert refused(**task, control_path=tmp_path).startswith("--control_path: got ")
    line = refused(**task, control_path=pictures.control, video_length=13)
    assert "9 frames; expected at least 13 frames; give a longer one" in line
    assert "5 frames; expected at least 9" in refused(**task, control_path=pictures.frames, video_length=9)
    ends = {"task": "i2v-14B-FC", "end_image_path": pictures.end, "control_path": pictures.frames}
    assert "5 frames; expected at least 9" in refused(**ends)


# ---- values ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "t2v-14B", "one_frame_inference": ONE_FRAME, "image_path": None, "control_image_path": "a.png"},
         "--one_frame_inference: got --task t2v-14B; expected an image-to-video task"),
        ({"one_frame_inference": "target_index=1024,control_index=0"}, "target_index=1024; expected an index from 0"),
        ({"one_frame_inference": "target_index=1,control_index=1024"}, "control_index=1024; expected an index from 0"),
        ({"one_frame_inference": "target_index=0,control_index=0"}, "got target_index=0 and a control image at 0"),
        ({"one_frame_inference": "target_index=1,control_index=0;2"}, "2 control indices (0;2) for 1 control images"),
        ({"one_frame_inference": "target_index=1"}, "no control_index"),
        ({"one_frame_inference": "control_index=0"}, "no target_index"),
        ({"one_frame_inference": "latent_index=1,control_index=0"}, "here it is called target_index"),
        ({"task": "i2v-A14B"}, "--task: got i2v-A14B; expected a task of Wan2.1"),
        ({"task": "t2v-A14B"}, "not supported: Wan2.1 only"),
        ({"timestep_boundary": 0.9}, "--timestep_boundary: got 0.9; expected this option to be left out; not"),
        ({"lazy_loading": True}, "--lazy_loading: got --lazy_loading; expected this option to be left out"),
        ({"fp8_fast": True}, "scales are by blocks"),
        ({"video_path": "動画.mp4"}, "there is no video to video"),
        ({"video_size": (50, 64)}, "--video_size: got 50 64; expected height and width that are multiples of 16"),
        ({"video_length": 0}, "--video_length: got 0"),
        ({"task": "t2i-14B", "image_path": None}, "--video_length: got 5; expected 1, for --task t2i-14B"),
        ({"task": "flf2v-14B"}, "--end_image_path: got nothing; expected the last frame of --task flf2v-14B"),
        ({"trim_tail_frames": 5}, "--trim_tail_frames: got 5; expected less than 5 frames"),
        ({"blocks_to_swap": 3}, "--blocks_to_swap: got 3; expected at most 2 in generation"),
        ({"slg_mode": "uncond", "slg_layers": "2,3"}, "--slg_layers: got 3; expected numbers from 0 to 2"),
        ({"compile": True, "compile_args": ("inductor", "fast", "auto", "false")}, "--compile_args: got inductor fast"),
        ({"compile": True, "compile_mode": "max-autotune", "blocks_to_swap": 1}, "use max-autotune-no-cudagraphs"),
        ({"device": "gpu"}, "--device: got gpu"),
        ({"lora_weight": "なし.safetensors"}, "--lora_weight: got なし.safetensors"),
        ({"lora": "なし.safetensors"}, "--lora: got なし.safetensors"),
        ({"sweep": "latent_window_size=1,2"}, "leave --latent_window_size to FramePack"),
        ({"sweep": "target_index=1,2"}, "--one_frame_inference beside it"),
        ({"prompt": None}, "--prompt: got nothing"),
        ({"save_path": None}, "--save_path: got nothing"),
    ],
)  # fmt: skip
def test_values_that_cannot_work(changes, message, refused, pictures):
    if "one_frame_inference" in changes:
        changes = {"control_image_path": pictures.start} | changes
    assert message in refused(**changes)


def test_several_things_at_once_are_all_told_one_line_each(wan_models, pictures, tmp_path, capsys):
    argv = ["--task", "t2v-1.3B", "--prompt", "猫", "--end_image_path", pictures.end, "--control_path", "a.mp4"]
    assert run_script(*argv, "--control_image_path", pictures.end, "--save_path", tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["--control_image_path", "--end_image_path", "--control_path"]


def test_nothing_is_decoded_when_trimming_would_leave_nothing(refused, tmp_path):
    save_file({"latent": torch.zeros(16, 2, 4, 4)}, tmp_path / "動.safetensors")
    line = refused(latent_path=tmp_path / "動.safetensors", trim_tail_frames=5)
    assert line.startswith("--trim_tail_frames: got 5; expected less than the 5 frames of ")
    assert refused(latent_path=tmp_path / "動.safetensors", vae=None).startswith("--vae: got nothing")


def test_a_sweep_with_a_bad_cell_names_it(wan_models, pictures, tmp_path, capsys):
    argv = [
        "--task",
        "i2v-14B",
        "--prompt",
        "猫",
        "--control_image_path",
        pictures.start,
        "--save_path",
        tmp_path / "o",
    ]
    assert run_script(*argv, "--one_frame_inference", ONE_FRAME, "--sweep", "target_index=0,2000") == 2
    error = capsys.readouterr().err
    assert error.startswith("--sweep target_index=0, --one_frame_inference: got target_index=0 and a control image")
