"""Whole runs of Wan's training script on small models: what is the family's own; the rest is tested with FramePack."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.training_builders import difference
from tests.training_driver import HARD, NAME, after_step, final_file, finite, metadata, names_in, output_of, ups
from tests.wan_training_builders import WanShop, clip_item, one_frame_item, train, trained, write_data, write_dit

TOLERANCE = 1e-5
SGD = {"optimizer_type": "SGD", "learning_rate": 0.5, "max_grad_norm": 0, "max_train_steps": 3}
pytestmark = pytest.mark.usefixtures("repeatable_runs")


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> WanShop:
    """Three pairs of first and last frame with texts of unequal lengths, three times each, in batches of two."""
    folder = tmp_path_factory.mktemp("訓練")
    items = {name: one_frame_item(number, (0, 1, 9)) for number, name in enumerate(("a", "猫", "c"))}
    data = write_data(folder / "データ", items, num_repeats=3)
    return WanShop(folder=folder, dit=write_dit(folder, "flf2v"), data=data, task="flf2v-14B")


@pytest.fixture
def run(shop: WanShop, tmp_path: Path) -> Callable[..., dict[str, Tensor]]:
    """Trains into a new folder; returns what the file holds."""
    return lambda name="出力 [1]", **changes: trained(shop.command(tmp_path / name, **changes))


# ---- exact resumption ----


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(shop, tmp_path) -> None:
    undisturbed = shop.command(tmp_path / "undisturbed", **HARD)
    assert train(undisturbed) == 0
    command = shop.command(tmp_path / "出力", **HARD, resume="auto", gradient_checkpointing=True)
    with after_step(4, lambda: signal.raise_signal(signal.SIGTERM)):
        assert train(command) == 128 + signal.SIGTERM
    assert names_in(output_of(command)) == {"-step00000004", "-step00000004-state"}
    assert train(command) == 0
    same, wanted = load_file(final_file(command)), load_file(final_file(undisturbed))
    assert all(torch.equal(same[name], wanted[name]) for name in wanted)
    assert any(tensor.any() for tensor in ups(wanted).values())


def test_a_changed_part_of_the_loss_counts_and_is_told(shop, tmp_path, caplog) -> None:
    assert train(shop.command(tmp_path / "first", max_train_steps=1, save_state=True)) == 0
    changes = {"max_train_steps": 2, "resume": tmp_path / "first" / f"{NAME}-state"}
    same = trained(shop.command(tmp_path / "same", **changes))
    assert "target_loss_only was" not in caplog.text
    other = trained(shop.command(tmp_path / "other", **changes, one_frame_target_loss_only=True))
    assert "one_frame_target_loss_only was False, is True now" in caplog.messages
    assert difference(other, same) > 1e-3


# ---- memory ----


@pytest.fixture(scope="module")
def plain(shop, tmp_path_factory) -> dict[str, Tensor]:
    """What plain gradient descent makes without any of the options below."""
    return trained(shop.command(tmp_path_factory.mktemp("素"), **SGD, network_dropout=0.2))


@pytest.mark.parametrize(
    "given",
    [
        {"gradient_checkpointing": True},
        {"checkpoint_blocks": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_cpu_offload": True},
        {"blocks_to_swap": 2},
        {"blocks_to_swap": 1, "block_swap_ring_size": 1, "use_pinned_memory_for_block_swap": True},
        {"blocks_to_swap": "auto", "block_swap_h2d_only": True},
    ],
    ids=lambda given: " ".join(given),
)
def test_what_saves_memory_leaves_the_gradients(given: dict, run, plain) -> None:
    assert difference(run(**SGD, network_dropout=0.2, **given), plain) <= TOLERANCE


def rounded(weight: Tensor, *, scaled: bool) -> Tensor:
    """Through fp8, by the facts: in blocks of 64 along the input, whose largest number becomes 448."""
    if not scaled:
        return weight.to(torch.float8_e4m3fn).float()
    blocks = weight.unflatten(1, (-1, 64))
    scale = (blocks.abs().amax(dim=-1, keepdim=True) / 448).clamp(min=1e-8)
    return ((blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten(1)


@pytest.mark.parametrize("flag", ["fp8_base", "fp8_scaled"])
def test_fp8_trains_as_on_weights_that_were_rounded_so(flag: str, shop, run, tmp_path) -> None:
    matrices = re.compile(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.(?!norm).+\.weight|blocks\.\d+\.ffn\.\d\.weight")
    tensors = load_file(shop.dit)
    for name in filter(matrices.fullmatch, tensors):
        tensors[name] = rounded(tensors[name], scaled=flag == "fp8_scaled")
    save_file(tensors, tmp_path / "丸め.safetensors")
    wanted = run("rounded", **SGD, dit=tmp_path / "丸め.safetensors")
    more = {"gradient_checkpointing": True, "blocks_to_swap": 1}
    for name, changes in (("fp8", {}), ("with everything", more)):
        assert difference(run(name, **SGD, **{flag: True}, **changes), wanted) <= TOLERANCE
    assert difference(ups(run("exact", **SGD)), ups(wanted)) > 1e-3
    assert metadata(tmp_path / "fp8" / f"{NAME}.safetensors")["ss_fp8_base"] == "True"


# ---- networks and files ----


@pytest.mark.parametrize(
    ("module", "parts"),
    [("networks.loha", {"hada_w1_a", "hada_w2_b"}), ("networks.lokr", {"lokr_w1", "lokr_w2_a"})],
)
def test_loha_and_lokr_are_trained(module: str, parts: set[str], run, tmp_path) -> None:
    found = run("first", network_module=module, network_dim=4, max_train_steps=2)
    assert {name.partition(".")[2] for name in found} >= parts and finite(found)
    file = tmp_path / "first" / f"{NAME}.safetensors"
    changes = {"network_dim": None, "dim_from_weights": True, "network_weights": file, "max_train_steps": 1}
    still = run("still", network_module=module, **changes)
    assert still.keys() == found.keys() and difference(still, found) > 0


def test_what_is_merged_before_counts(run, tmp_path) -> None:
    run("base", max_train_steps=2)
    merged = run("merged", **SGD, base_weights=tmp_path / "base" / f"{NAME}.safetensors")
    assert difference(ups(run("plain", **SGD)), ups(merged)) > 1e-3


def test_files_name_the_family(shop, tmp_path) -> None:
    """The transformer is found in the folder of a release."""
    (tmp_path / "公開").mkdir()
    shutil.copy(shop.dit, tmp_path / "公開" / "diffusion_pytorch_model.safetensors")
    changes = {"dit": None, "ckpt_dir": tmp_path / "公開", "max_train_steps": 1, "metadata_title": "題"}
    command = shop.command(tmp_path / "出力", **changes)
    assert train(command) == 0
    assert (
        metadata(final_file(command)).items()
        >= {
            "ss_base_model_version": "wan",
            "ss_network_module": "networks.lora_wan",
            "ss_sd_model_name": "diffusion_pytorch_model.safetensors",
            "modelspec.architecture": "wan2.1/lora",
            "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1",
            "modelspec.title": "題",
        }.items()
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_nearly_alike(precision: str, run) -> None:
    wanted, found = run("exact", **SGD), run("mixed", **SGD, mixed_precision=precision, gradient_checkpointing=True)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert 0 < difference(ups(found), ups(wanted)) < 0.1


def test_a_training_is_planned_without_weights(shop, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("common.weights.Checkpoint.read", lambda self: pytest.fail("weights were read"))
    assert train(shop.command(tmp_path / "出力", plan="any", device=None)) == 0
    printed = capsys.readouterr().out
    assert "2 items of 48x32, 3 latent frames" in printed and "transformer in bfloat16" in printed
    tokens = re.search(r"target (\d+)\D+controls (\d+)", printed)
    assert tokens and tokens.groups() == ("6", "12")
    with_options = {"fp8_scaled": True, "gradient_checkpointing": True, "blocks_to_swap": 1}
    assert train(shop.command(tmp_path / "出力", plan="any", device=None, **with_options)) == 0
    printed += capsys.readouterr().out
    for part, whole, saved in (("weights", "6.4", "3.2"), ("kept", "10.8", "0.1")):
        assert re.findall(rf"{part} ([0-9.]+)", printed) == [whole, saved]
    assert not (tmp_path / "出力").exists()


# ---- data ----


def test_clips_and_pictures_are_trained_together(shop, tmp_path) -> None:
    """An image model, on clips and on one-frame pictures, of data sets of their own."""
    clips = write_data(tmp_path / "動画", {"v": clip_item(1, both_ends=True), "w": clip_item(2, both_ends=True)})
    tables = [path.read_text(encoding="utf-8").partition("[[datasets]]")[2] for path in (shop.data, clips)]
    general = clips.read_text(encoding="utf-8").partition("[[datasets]]")[0]
    both = tmp_path / "両方.toml"
    both.write_text(general + "".join(f"[[datasets]]{table}\n" for table in tables), encoding="utf-8")
    command = shop.command(tmp_path / "出力", dataset_config=both, max_train_epochs=1)
    assert finite(trained(command))
    assert metadata(final_file(command))["ss_num_train_items"] == "11"
