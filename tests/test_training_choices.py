"""What can be chosen for a training: validation, samples, kinds of networks, the forms of the command line."""

import logging
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
from dataset.epochs import ItemKey
from frame_pack.pipeline import FramePackPipeline
from networks import lora_framepack
from networks.module_names import native_name
from tests.test_train_flags import REFERENCE
from tests.training_builders import (
    build_oracle,
    build_transformer,
    difference,
    oracle_loss,
    write_data_set,
)
from tests.training_driver import (
    HARD,
    NAME,
    Workshop,
    final_file,
    finite,
    item,
    metadata,
    recorded,
    train,
    trained,
    ups,
)
from training.timesteps import draw_noise, item_seed
from training.validation import SEED, SIGMAS

TOLERANCE = 1e-5
pytestmark = pytest.mark.usefixtures("repeatable_runs")


# ---- validation ----

UNSEEN = {"b": 1, "夜": 2, "e": 3}


@pytest.fixture(scope="module")
def unseen(tmp_path_factory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("検証"), {n: item(i) for n, i in UNSEEN.items()}, batch_size=2)


def validated(folder: Path) -> dict[int, float]:
    """Step → loss."""
    points = recorded(folder)["extra"]["reports"][0]["validation"]["points"]
    return {step: total / count for step, total, count in points}


def test_the_validation_loss_is_the_oracles_whatever_the_seed_and_changes_nothing(
    workshop, unseen, tmp_path, undisturbed
):
    changes = HARD | {"validation_dataset_config": unseen, "validate_every_n_steps": 4, "loss_report": True}
    command = workshop.command(tmp_path / "one", **changes, validate_every_n_epochs=2, save_state=True)
    assert train(command) == 0
    assert final_file(command).read_bytes() == undisturbed
    found = validated(tmp_path / "one")
    assert list(found) == [0, 4, 6, 8]
    other = workshop.command(tmp_path / "other", **changes | {"seed": 4}, save_state=True)
    assert train(other) == 0
    assert validated(tmp_path / "other")[0] == found[0] and validated(tmp_path / "other")[4] != found[4]

    losses = [loss for name, number in UNSEEN.items() for loss in oracle_losses(name, number)]
    assert found[0] == pytest.approx(sum(losses) / len(losses), rel=TOLERANCE)
    assert Image.open(tmp_path / "one" / f"{NAME}_loss.png").width > 400


def oracle_losses(name: str, number: int) -> Iterator[float]:
    """Of an item, by diffusers' transformer without a LoRA, at a guidance of 1."""
    transformer = build_transformer()
    oracle = build_oracle(transformer, lora_framepack.create_network(transformer, dim=3, alpha=2.0, args={}))
    contents = item(number)
    contents |= {key: contents[key].half() for key in ("latents", "latents_clean")}  # as they are cached
    key = ItemKey(dataset=0, name=f"{name}_0100x0100_fp.safetensors", repeat=0)
    for sigma in SIGMAS:
        noise = draw_noise([item_seed(SEED, round(1000 * sigma), key)], contents["latents"].shape)[0]
        with torch.no_grad(), patch("tests.training_builders.GUIDANCE_INPUT", 1000.0):
            yield float(oracle_loss(oracle, contents, noise, torch.tensor(sigma)))


def test_validation_sees_the_lora_as_it_is_saved_without_dropout(workshop, unseen, tmp_path):
    changes = {"validation_dataset_config": unseen, "network_dropout": 0.5, "save_state": True}
    first = workshop.command(tmp_path / "first", **changes, max_train_steps=5, validate_every_n_epochs=1)
    assert train(first) == 0
    second = workshop.command(tmp_path / "second", **changes, max_train_steps=1, network_weights=final_file(first))
    assert train(second) == 0
    after, before = validated(tmp_path / "first"), validated(tmp_path / "second")
    assert before[0] == pytest.approx(after[5], rel=TOLERANCE) and after[0] != pytest.approx(after[5], rel=1e-3)


# ---- samples ----


@pytest.fixture
def sampling(demo_models, material, tmp_path) -> dict[str, object]:
    """What makes two samples at first, after step 3 and after each of two epochs; one has an RGBA image."""
    shutil.copy(material.coffee_with_alpha, tmp_path / "珈琲.png")
    controls = "--i 珈琲.png --ci 珈琲.png --of target_index=1,control_index=0".replace("珈琲", str(tmp_path / "珈琲"))
    lines = [f"a cup {controls} --w 64 --h 64 --s 1 --d 5", "a cat --w 64 --h 64 --s 1 --d 6"]
    (tmp_path / "例.txt").write_text("\n".join(lines), encoding="utf-8")
    models = ("vae", "text_encoder1", "text_encoder2", "image_encoder")
    changes = {name: getattr(demo_models, name) for name in models} | {"one_frame": True, "sample_at_first": True}
    return changes | {"sample_prompts": tmp_path / "例.txt", "sample_every_n_steps": 3, "sample_every_n_epochs": 1}


def test_samples_and_one_that_fails_leave_the_training_as_it_would_be(
    demo_models, sampling, tmp_path, caplog, monkeypatch
):
    """The transformer is lent, and dropout goes on with its own random numbers."""

    def decode_or_fail(self, request, latents):
        calls.append(request)
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory")
        return decode(self, request, latents)

    calls, decode = [], FramePackPipeline.decode
    monkeypatch.setattr(FramePackPipeline, "decode", decode_or_fail)
    widths = {"llama_vec": (9, 256), "clip_l_pooler": (128,), "image_embeddings": (7, 144)}
    contents = item(1) | {name: torch.ones(shape) for name, shape in widths.items()}
    data = write_data_set(tmp_path / "データ", {"a": contents, "猫": contents}, batch_size=1)
    command = partial(
        Workshop(folder=tmp_path, dit=demo_models.dit, data=data).command, network_dropout=0.3, max_train_steps=4
    )
    plain = trained(command(tmp_path / "plain"))
    found = trained(command(tmp_path / "sampled", **sampling))
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
    pictures = sorted((tmp_path / "sampled" / "sample").glob("*_000.png"))
    assert [re.match(rf"{NAME}_(\w+)_\d{{14}}_[56]_000", picture.name)[1] for picture in pictures] == [
        *("000000_00", "000000_01", "000003_00", "000003_01", "e000001_01", "e000002_00", "e000002_01")
    ]
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert "CUDA out of memory" in told
    assert pixels(pictures[0]) != pixels(pictures[2]), "another LoRA, another picture"


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


# ---- networks ----

SGD = {"optimizer_type": "SGD", "learning_rate": 0.5, "max_grad_norm": 0}


def test_norms_are_limited_after_every_step(run):
    def norms(tensors: dict[str, Tensor]) -> list[float]:
        names = [name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")]
        ups, downs = ([tensors[f"{name}.lora_{way}.weight"] for name in names] for way in ("up", "down"))
        return [float((up @ down).norm()) / 3 for up, down in zip(ups, downs, strict=True)]

    free, limited = norms(run("free")), norms(run("limited", scale_weight_norms=0.1))
    assert max(free) > 0.2 and sorted(free)[0] > 0.1
    assert max(limited) == pytest.approx(0.1, rel=TOLERANCE)


def test_base_weights_are_merged_before_training(workshop, run, tmp_path):
    """Training on them is training on a checkpoint that holds the sum: W + 0.7 · alpha / rank · up · down."""
    base = run("base")
    paths = {native_name(name.removesuffix(".weight")): name for name in load_file(workshop.dit)}
    merged = load_file(workshop.dit)
    for name in {key.partition(".")[0] for key in base}:
        change = base[f"{name}.lora_up.weight"] @ base[f"{name}.lora_down.weight"] * base[f"{name}.alpha"] / 3
        merged[paths[name]] = merged[paths[name]] + 0.7 * change
    save_file(merged, tmp_path / "併合.safetensors")
    wanted = run("merged", **SGD, dit=tmp_path / "併合.safetensors")
    base_file = tmp_path / "base" / f"{NAME}.safetensors"
    found = run("base weights", **SGD, base_weights=(base_file,), base_weights_multiplier=(0.7,))
    assert difference(ups(found), ups(wanted)) <= 1e-4
    assert difference(ups(run("plain", **SGD)), ups(wanted)) > 1e-2


def test_training_goes_on_from_a_file_of_any_format(workshop, run, tmp_path):
    first = run("first", network_dim=3, network_alpha=2)
    file, converted = tmp_path / "first" / f"{NAME}.safetensors", tmp_path / "変換.safetensors"
    still = run("still", learning_rate=1e-30, network_alpha=2, network_weights=file)
    assert all(torch.equal(still[name], first[name]) for name in first)

    assert convert_lora.main(["--input", str(file), "--output", str(converted), "--target", "other"]) == 0
    assert load_file(converted).keys() != first.keys()
    wanted = run("native", **SGD, network_weights=file)
    found = run("other", **SGD, network_weights=converted)
    assert difference(found, wanted) <= TOLERANCE and difference(ups(found), ups(first)) > 1e-2

    same = run("dim from weights", **SGD, network_dim=None, network_weights=file, dim_from_weights=True)
    assert difference(same, wanted) <= TOLERANCE
    data = metadata(tmp_path / "dim from weights" / f"{NAME}.safetensors")
    assert (data["ss_network_dim"], data["ss_network_alpha"]) == ("3", "2.0")


def test_dropout_and_lora_plus_count_when_the_rank_comes_from_a_file(run, tmp_path):
    run("first")
    changes = {"network_weights": tmp_path / "first" / f"{NAME}.safetensors", "network_dropout": 0.3}
    changes |= {"network_args": ("rank_dropout=0.2", "loraplus_lr_ratio=4")} | SGD
    wanted = run("rank given", **changes)
    assert difference(run("rank of the file", **changes, network_dim=None, dim_from_weights=True), wanted) == 0
    plainly = changes | {"network_args": (), "network_dropout": None}
    assert difference(ups(run("without", **plainly)), ups(wanted)) > 1e-2


@pytest.mark.parametrize(
    ("module", "parts"),
    [("networks.loha", {"hada_w1_a", "hada_w2_b"}), ("networks.lokr", {"lokr_w1", "lokr_w2_a"})],
)
def test_loha_and_lokr_are_trained_and_trained_on(module, parts, run, tmp_path):
    found = run("first", network_module=module, network_dim=4)
    assert {name.partition(".")[2] for name in found} >= parts and finite(found)
    file = tmp_path / "first" / f"{NAME}.safetensors"
    still = run("still", network_module=module, network_dim=None, dim_from_weights=True, network_weights=file)
    assert still.keys() == found.keys() and difference(still, found) > 0
    base = run("beneath", **SGD, base_weights=(file,))
    assert difference(ups(base), ups(run("plain", **SGD))) > 1e-3, "it changes what the model does"


def test_checkpointing_any_number_of_blocks_changes_nothing(run):
    changes = {"network_dropout": 0.3, "max_train_steps": 4}
    wanted = run("none", **changes)
    for name, given in {"some": {"checkpoint_blocks": 3}, "all": {"gradient_checkpointing": True}}.items():
        assert difference(run(name, **changes, **given), wanted) <= TOLERANCE


# ---- the command line ----


def test_a_file_of_options_runs_like_the_options(workshop, tmp_path, undisturbed):
    command, file = workshop.command(tmp_path / "出力", **HARD), tmp_path / "設定.toml"
    assert train([*command, "--output_config", str(file)]) == 0
    assert not (tmp_path / "出力").exists(), "it only writes the file"
    assert train(["--config_file", str(file)]) == 0
    assert final_file(command).read_bytes() == undisturbed


def test_timesteps_are_shown_without_a_model_or_data(tmp_path, capsys):
    sampling = ["--timestep_sampling", "shift", "--discrete_flow_shift", "3"]
    assert train([*sampling, "--show_timesteps", "image", "--output_dir", str(tmp_path / "図")]) == 0
    assert Image.open(tmp_path / "図" / "timesteps.png").size > (400, 400)
    capsys.readouterr()
    assert train([*sampling, "--show_timesteps", "console"]) == 0
    rows = re.findall(r"^ *(\d+) - *(\d+) +([0-9.]+)%", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 20 and sum(float(share) for *_, share in rows) == pytest.approx(100, abs=1)
    assert float(rows[-5][2]) > 2 * float(rows[4][2]), "a shift of 3 draws more noise"


def as_users_write_it(workshop: Workshop, output: Path) -> list[str]:
    """The guide's command, with our paths in the place of its own."""
    command = shlex.split(REFERENCE)
    for flag, path in (("--dit", workshop.dit), ("--dataset_config", workshop.data), ("--output_dir", output)):
        command[command.index(flag) + 1] = str(path)
    return command


@pytest.mark.parametrize("more", ["", "--f1 --vae_chunk_size 32", "--one_frame --latent_window_size 9"])
def test_the_reference_command_trains(more, workshop, tmp_path):
    data = write_data_set(tmp_path / "データ", {"猫": item(1), "b": item(2)}, batch_size=2)
    command = [*as_users_write_it(replace(workshop, data=data), tmp_path / "出力"), *more.split(), "--device", "cpu"]
    if more:  # once at full length is enough
        command += ["--max_train_epochs", "1", "--max_data_loader_n_workers", "0"]
    assert train(command) == 0
    epochs = [] if more else [f"-{epoch:06d}" for epoch in range(1, 16)]
    output = tmp_path / "出力"
    assert {path.name for path in output.iterdir()} == {f"name-of-lora{name}.safetensors" for name in (*epochs, "")}
    found = load_file(output / "name-of-lora.safetensors")
    assert finite(found) and all(tensor.any() for tensor in ups(found).values())
    assert len(found["lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight"]) == 32
    assert metadata(output / "name-of-lora.safetensors")["ss_mixed_precision"] == "bf16"


@pytest.mark.parametrize("more", ["--fp8_base --fp8_scaled", "--fp8", "--blocks_to_swap 36", "--fp8_llm"])
def test_what_the_guide_adds_for_memory_answers_in_one_line(more, workshop, tmp_path, capsys):
    assert train([*as_users_write_it(workshop, tmp_path / "出力"), *more.split()]) == 2
    answer = capsys.readouterr()
    assert answer.out == "" and answer.err.count("\n") == 1 and "not available yet" in answer.err
    assert not (tmp_path / "出力").exists()
