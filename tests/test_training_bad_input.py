"""What is wrong with a training command or its caches: told in a line, before weights load, with nothing written."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.weights import Checkpoint
from tests.training_builders import write_data_set
from tests.training_driver import NAME, Workshop, final_file, item, metadata, train

LINE = re.compile(r"[^:]+: got .+; expected .+; .+")


@pytest.fixture(scope="module")
def finished(workshop, tmp_path_factory) -> Path:
    """The folder of a run, with its file and state."""
    command = workshop.command(tmp_path_factory.mktemp("済み"), max_train_steps=1, save_state=True)
    assert train(command) == 0
    return final_file(command).parent


@pytest.fixture
def no_weights(monkeypatch) -> None:
    """Reading a model's weight would be too late to complain; LoRA files are small."""

    def too_late(self) -> Iterator:
        if self.flag in ("--network_weights", "--base_weights"):
            return read(self)
        raise AssertionError("weights were read before everything was checked")

    read = Checkpoint.read

    monkeypatch.setattr(Checkpoint, "read", too_late)


@pytest.fixture
def refused(workshop, finished, tmp_path, capsys, no_weights):
    """Runs a command with changed flags and returns the one line that it answers."""

    def run(shop: Workshop = workshop, **changes: object) -> str:
        before = [sorted(folder.rglob("*")) for folder in (tmp_path, shop.folder)]
        code = train(shop.command(tmp_path / "出力", **changes))
        answer = capsys.readouterr()
        assert code == 2
        assert answer.out == "" and answer.err.count("\n") == 1 and LINE.fullmatch(answer.err.strip()), answer.err
        assert [sorted(folder.rglob("*")) for folder in (tmp_path, shop.folder)] == before
        return answer.err

    return run


@pytest.fixture
def other(workshop, tmp_path) -> Workshop:
    """The same transformer with data that a test may spoil."""
    folder = tmp_path / "別"
    data = write_data_set(folder, {"a": item(0), "猫": item(1)}, batch_size=1)
    return replace(workshop, folder=folder, data=data)


def caches(shop: Workshop, pattern: str) -> list[Path]:
    found = sorted((shop.data.parent / "cache").glob(pattern))
    assert found
    return found


# ---- caches ----


def test_missing_caches(other, refused):
    shutil.rmtree(other.data.parent / "cache")
    line = refused(other)
    assert "データ.toml [datasets][1] cache_directory" in line and line.endswith("run fpack_cache_latents.py\n")


def test_latents_without_text_caches_and_text_caches_without_latents(other, refused):
    latents, texts = caches(other, "*_fp.safetensors"), caches(other, "*_fp_te.safetensors")
    for file in texts:
        file.rename(file.with_suffix(".aside"))
    line = refused(other)
    assert "2 latent caches and no text cache" in line and line.endswith("run fpack_cache_text_encoder_outputs.py\n")
    for file in texts:
        file.with_suffix(".aside").rename(file)
    for file in latents:
        file.unlink()
    line = refused(other)
    assert "no *_fp.safetensors" in line and line.endswith("run fpack_cache_latents.py\n")


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("fp_1f_target_index = 9", "fp_1f_target_index = 5", "target_index is 9 in the cache, 5 now"),
        ("fp_1f_clean_indices = [0]", "fp_1f_clean_indices = [1]", "in the cache"),
        ("batch_size = 1", "batch_size = 1\nfp_1f_no_post = true", "no_post is no in the cache, yes now"),
        ("resolution = [32, 48]", "resolution = [64, 96]", "size is 32x48 in the cache, 64x96 now"),
    ],
)
def test_caches_are_stale_after_a_setting_was_changed(before, after, reason, other, capsys, tmp_path, no_weights):
    """Each file is named, with the setting that differs."""
    text = other.data.read_text(encoding="utf-8")
    assert before in text
    other.data.write_text(text.replace(before, after), encoding="utf-8")
    assert train(other.command(tmp_path / "出力")) == 2
    lines = capsys.readouterr().err.splitlines()
    names = [cache.name for cache in caches(other, "*_fp.safetensors")]
    assert [Path(line.split(": got ")[0]).name for line in lines] == names
    assert all(LINE.fullmatch(line) and reason in line and "run fpack_cache_latents.py" in line for line in lines)
    assert not (tmp_path / "出力").exists()


def test_a_changed_caption_or_picture(other, refused):
    caption = other.data.parent / "images" / "猫.txt"
    before = caption.read_text(encoding="utf-8")
    caption.write_text("other words", encoding="utf-8")
    line = refused(other)
    assert "猫_fp_te.safetensors: got caption is" in line and "fpack_cache_text_encoder_outputs.py" in line
    caption.write_text(before, encoding="utf-8")
    (other.data.parent / "images" / "a.png").write_text("another picture", encoding="utf-8")
    assert "a_0100x0100_fp.safetensors: got source" in refused(other)


def test_a_damaged_cache(other, refused):
    cache = caches(other, "猫*_fp.safetensors")[0]
    cache.write_bytes(cache.read_bytes()[:-7])
    assert cache.name in refused(other)


def test_a_cache_that_lacks_what_the_model_needs(other, refused):
    for cache in caches(other, "*_fp_te.safetensors"):
        tensors, said = load_file(cache), metadata(cache)
        save_file({key: tensor for key, tensor in tensors.items() if "clip_l" not in key}, cache, said)
    assert "caches without clip_l_pooler" in refused(other)


def test_a_validation_set_is_checked_too(other, refused, workshop):
    shutil.rmtree(other.data.parent / "cache")
    assert "run fpack_cache_latents.py" in refused(validation_dataset_config=other.data)
    assert "--validation_dataset_config" in refused(validation_dataset_config=other.data.parent / "なし.toml")


# ---- LoRA files ----


def test_a_lora_of_another_architecture(refused, tmp_path):
    name, parts = "lora_unet_blocks_0_self_attn_q", ("lora_down.weight", "lora_up.weight")
    wan = {f"{name}.{part}": torch.ones(4, 4) for part in parts}
    save_file(wan, tmp_path / "wan.safetensors")
    for flag in ("network_weights", "base_weights"):
        line = refused(**{flag: tmp_path / "wan.safetensors"})
        assert line.startswith(f"--{flag} ") and "wan.safetensors" in line
    assert "--network_weights" in refused(network_weights=tmp_path / "wan.safetensors", dim_from_weights=True)


def test_network_weights_that_do_not_fit_or_are_none(refused, finished, tmp_path):
    file = finished / f"{NAME}.safetensors"
    assert "shape" in refused(network_weights=file, network_dim=5)
    assert "--network_weights" in refused(network_weights=tmp_path / "なし.safetensors")
    (tmp_path / "文.safetensors").write_text("no LoRA", encoding="utf-8")
    assert "--network_weights" in refused(network_weights=tmp_path / "文.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "何か.safetensors")
    assert "何か.safetensors" in refused(base_weights=tmp_path / "何か.safetensors")


# ---- the model ----


def test_another_model_or_a_part_of_one(refused, workshop, finished, tmp_path):
    assert refused(dit=tmp_path / "なし.safetensors").startswith("--dit: got ")
    assert refused(dit=finished / f"{NAME}.safetensors").startswith("--dit")
    tensors = load_file(workshop.dit)
    gone = "single_transformer_blocks.0.proj_out.bias"
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, tmp_path / "部分.safetensors")
    assert gone in refused(dit=tmp_path / "部分.safetensors")


# ---- values ----


@pytest.mark.parametrize(
    ("changes", "start", "hint"),
    [
        ({"output_name": None}, "--output_name: got nothing", ""),
        ({"output_name": "a/b"}, "--output_name: got 'a/b'", "--output_dir"),
        ({"network_module": "networks.lora_framepak"}, "--network_module", "did you mean networks.lora_framepack?"),
        ({"network_module": "networks.lora_wan"}, "--network_module", "networks.lora_framepack"),
        ({"network_module": "common.files"}, "--network_module", ""),
        ({"network_args": ("loraplus_ratio=4",)}, "--network_args", "did you mean loraplus_lr_ratio?"),
        ({"network_args": ("exclude_patterns=['.*']",)}, "--network_args", ""),
        ({"optimizer_type": "AdamV"}, "--optimizer_type: got AdamV", "did you mean Adam?"),
        ({"optimizer_type": "prodigy"}, "--optimizer_type: got prodigy", "prodigyopt.Prodigy"),
        ({"optimizer_args": ("weight_decy=0.1",)}, "--optimizer_args", "did you mean weight_decay?"),
        ({"optimizer_args": ("betas=1",)}, "--optimizer_type", ""),
        ({"lr_scheduler": "cosin"}, "--lr_scheduler: got cosin", "did you mean cosine?"),
        ({"lr_scheduler_type": "StepLRR"}, "--lr_scheduler_type", "StepLR"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "--lr_scheduler_min_lr_ratio: got nothing", ""),
        ({"timestep_sampling": "shft"}, "--timestep_sampling", "shift"),
        ({"timestep_sampling": "ideogram4_shift"}, "--timestep_sampling", "use shift"),
        ({"min_timestep": 800, "max_timestep": 200}, "--max_timestep: got 200", ""),
        ({"weighting_scheme": "cosmaps"}, "--weighting_scheme", "cosmap"),
        ({"mixed_precision": "fp8"}, "--mixed_precision", "bf16"),
        ({"checkpoint_blocks": 5}, "--checkpoint_blocks: got 5; expected at most 4", ""),
        ({"save_precision": "int8"}, "--save_precision", ""),
        ({"device": "cpuu"}, "--device: got cpuu", ""),
        ({"seed": -1}, "--seed: got -1", ""),
        ({"learning_rate": 0}, "--learning_rate: got 0.0", ""),
        ({"sample_every_n_steps": 1, "vae": 1, "text_encoder1": 1, "text_encoder2": 1, "image_encoder": 1},
         "--sample_prompts: got nothing", "--sample_every_n_steps"),
        ({"validate_every_n_steps": 1}, "--validation_dataset_config: got nothing", ""),
        ({"log_with": "tensorboard"}, "--log_with", "a folder for the logs"),
        ({"config_file": "設定.toml"}, "--config_file", "no such file"),
        ({"max_train_stepps": 5}, "--max_train_stepps", "did you mean --max_train_steps?"),
        ({"dim_from_weights": True}, "--dim_from_weights", "--network_weights"),
        ({"base_weights_multiplier": (0.5,)}, "--base_weights_multiplier", ""),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_values_that_cannot_work(changes, start, hint, refused):
    line = refused(**changes)
    assert line.startswith(start) and hint in line


def test_samples_without_models_name_each_that_is_missing(workshop, tmp_path, capsys, no_weights):
    (tmp_path / "例.txt").write_text("a cat\n", encoding="utf-8")
    command = workshop.command(tmp_path / "出力", sample_prompts=tmp_path / "例.txt", sample_at_first=True)
    assert train(command) == 2
    lines = capsys.readouterr().err.splitlines()
    models = ("vae", "text_encoder1", "text_encoder2", "image_encoder")
    assert [line.split(":")[0] for line in lines] == [f"--{name}" for name in models]
    assert all(LINE.fullmatch(line) and "--sample_at_first" in line for line in lines)


def test_a_prompt_that_cannot_be_generated(refused, demo_models, tmp_path):
    (tmp_path / "例.txt").write_text("a cat --w 100\n", encoding="utf-8")
    models = {name: getattr(demo_models, name) for name in ("dit", "vae", "text_encoder1", "text_encoder2")}
    changes = models | {"image_encoder": demo_models.image_encoder, "sample_prompts": tmp_path / "例.txt"}
    line = refused(**changes, sample_at_first=True)
    assert "例.txt line 1" in line and "100" in line


# ---- places ----


def test_an_output_folder_that_cannot_be_written_to(workshop, capsys, tmp_path, no_weights):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert train(workshop.command(place)) == 2
        line = capsys.readouterr().err
        assert line.startswith("--output_dir: got ") and line.count("\n") == 1


def test_a_disk_that_is_too_small(refused, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage._replace(free=1000))
    assert "--output_dir: got 0.0 MB free" in refused()


# ---- states ----


def test_a_state_of_another_run_names_what_differs(refused, finished, other):
    state = finished / f"{NAME}-state"
    assert "of a run with seed 3; expected a run with seed 4" in refused(resume=state, seed=4)
    assert "network_dim 3; expected a run with network_dim 5" in refused(resume=state, network_dim=5)
    assert "optimizer_type adamw; " in refused(resume=state, optimizer_type="SGD")
    assert "batches_per_step 1; " in refused(resume=state, gradient_accumulation_steps=2)
    assert "of a run with data " in refused(other, resume=state)


def test_a_state_of_another_base_model(refused, finished, workshop, tmp_path):
    tensors = {name: 1.01 * tensor for name, tensor in load_file(workshop.dit).items()}
    save_file(tensors, tmp_path / "別の.safetensors")
    state = finished / f"{NAME}-state"
    assert "of a run with base_model " in refused(resume=state, dit=tmp_path / "別の.safetensors")
    lora = finished / f"{NAME}.safetensors"
    assert "of a run with base_model " in refused(resume=state, base_weights=lora)


def test_what_is_no_state(refused, finished, tmp_path):
    assert refused(resume=tmp_path / "なし-state").startswith("--resume: got ")
    assert "--network_weights" in refused(resume=finished / f"{NAME}.safetensors")
    foreign = tmp_path / "accelerate-state"
    foreign.mkdir()
    (foreign / "optimizer.bin").touch()
    assert "a state of another trainer" in refused(resume=foreign)
    broken = shutil.copytree(finished / f"{NAME}-state", tmp_path / "broken-state")
    (broken / "optimizer.pt").write_bytes(b"")
    assert "optimizer.pt has 0 bytes" in refused(resume=broken)


# ---- a real process ----


def test_a_real_process_prints_one_line_whatever_else_would_be_remarked(workshop, other, tmp_path, repository):
    shutil.rmtree(other.data.parent / "cache")
    command = other.command(tmp_path / "出力", img_in_txt_in_offloading=True, save_last_n_steps=3)
    answer = subprocess.run(
        [sys.executable, "fpack_train_network.py", *command],
        cwd=repository,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1"},
    )
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.splitlines()[-1].endswith("run fpack_cache_latents.py") and "Traceback" not in answer.stderr


def test_help_needs_no_heavy_library_and_no_gpu(repository):
    code = """
import sys, fpack_train_network
try:
    fpack_train_network.main(["--help"])
except SystemExit as end:
    heavy = ("torch", "numpy", "PIL", "av", "safetensors", "transformers", "diffusers", "accelerate", "bitsandbytes")
    print([name for name in heavy if name in sys.modules], end.code)
"""
    settings = {"cwd": repository, "env": os.environ | {"PYTHONUTF8": "1", "CUDA_VISIBLE_DEVICES": ""}}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", **settings)
    assert answer.stdout.rstrip().endswith("[] 0") and "--gradient_accumulation_steps" in answer.stdout
