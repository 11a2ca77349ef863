"""Whole training runs through the script: exact resumption, what is saved, accidents, validation, and every option."""

import json
import logging
import math
import re
import shlex
import shutil
import signal
import time
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
    NAME,
    Workshop,
    after_step,
    final_file,
    item,
    metadata,
    output_of,
    spoil,
    train,
    trained,
    write_workshop,
)
from training.objective import Objective
from training.timesteps import draw_noise, item_seed
from training.tracking import Trackers
from training.validation import SEED, SIGMAS

TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def same_bytes_for_equal_runs() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", "1700000000")
        yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return write_workshop(tmp_path_factory.mktemp("学習"))


@pytest.fixture
def run(workshop, tmp_path):
    """Trains into a new folder; returns what the file holds."""
    return lambda name="出力 [1]", **changes: trained(workshop.command(tmp_path / name, **changes))


def steps(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What training has made of zeros."""
    return {name: tensor for name, tensor in tensors.items() if "lora_up" in name}


def names_in(folder: Path) -> set[str]:
    return {path.name.removeprefix(NAME).removesuffix(".safetensors") for path in folder.iterdir()}


def recorded(folder: Path, name: str = "-state") -> dict:
    """What a state says."""
    return json.loads((folder / f"{NAME}{name}" / "trainer_state.json").read_text(encoding="utf-8"))


# ---- exact resumption ----

HARD = {
    "max_train_epochs": 3,
    "gradient_accumulation_steps": 2,
    "network_dropout": 0.3,
    "network_args": ("rank_dropout=0.2", "module_dropout=0.1", "loraplus_lr_ratio=4"),
    "timestep_sampling": "shift",
    "discrete_flow_shift": 3.0,
    "num_timestep_buckets": 4,
}
"""Three epochs of three steps: two of two batches, and one of the batch that is left, which has one item."""
WAYS = {
    "AdamW": {"lr_scheduler": "cosine", "lr_warmup_steps": 4},
    "AdamW8bit": {"optimizer_type": "AdamW8bit", "lr_scheduler": "rex", "lr_warmup_steps": 0.3},
    "schedule-free": {"optimizer_type": "tests.test_optimizers.AdamWScheduleFree"},
    "by the loss": {
        "optimizer_type": "Adafactor",
        "optimizer_args": ("relative_step=False",),
        "lr_scheduler": "reduce_lr_on_plateau",
        "lr_scheduler_args": ("patience=0",),
        "gradient_checkpointing": True,
        "scale_weight_norms": 0.5,
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_goes_on_from_any_of_its_states_ends_with_the_same_bytes(way, workshop, tmp_path):
    command = partial(workshop.command, **HARD | {"max_train_epochs": 2, "network_dim": 16}, **WAYS[way])
    undisturbed = command(tmp_path / "undisturbed")
    assert train(undisturbed) == 0
    wanted = final_file(undisturbed).read_bytes()
    watched = command(tmp_path / "watched", save_every_n_steps=1, save_state=True)
    assert train(watched) == 0
    assert final_file(watched).read_bytes() == wanted, "saving changes nothing"
    for step in (3, 5):  # an epoch's end, and its middle
        state = output_of(watched) / f"{NAME}-step{step:08d}-state"
        resumed = command(tmp_path / f"from {step}", resume=state, save_state_on_train_end=True)
        assert train(resumed) == 0
        assert final_file(resumed).read_bytes() == wanted, f"from step {step}"
        assert names_in(output_of(resumed)) == {"", "-state"}
        assert recorded(output_of(resumed)) == recorded(output_of(watched)), "averages and reports, too"
    assert metadata(final_file(watched))["ss_steps"] == "6"


def test_files_of_a_schedule_free_optimizer_hold_its_averages_and_states_what_it_trains(workshop, tmp_path):
    """Saved is x, trained is y = (1 - beta) z + beta x. Source: Defazio et al., "The Road Less Scheduled", 2024."""
    command = workshop.command(tmp_path, **WAYS["schedule-free"], save_state=True)
    saved, state = trained(command), tmp_path / f"{NAME}-state"
    ys, zs = load_file(state / "network.safetensors"), torch.load(state / "optimizer.pt")["state"]
    network = lora_framepack.create_network(build_transformer(), dim=3, alpha=1.0, args={})
    for (name, _), z in zip(network.named_parameters(), zs.values(), strict=True):
        torch.testing.assert_close((ys[name] - 0.1 * z["z"]) / 0.9, saved[name], rtol=1e-4, atol=1e-6)
    assert difference(steps(saved), steps(ys)) > 1e-2


def test_an_epochs_last_batches_weigh_as_much_as_others_when_they_are_fewer_than_accumulated(workshop, run, tmp_path):
    """One batch in an epoch: there is nothing to accumulate."""
    data = write_data_set(tmp_path / "データ", {"猫": item(1)}, batch_size=1)
    wanted = run("one", dataset_config=data, optimizer_type="SGD", max_grad_norm=0)
    found = run("three", dataset_config=data, optimizer_type="SGD", max_grad_norm=0, gradient_accumulation_steps=3)
    assert difference(found, wanted) == 0


@pytest.fixture(scope="module")
def undisturbed(workshop) -> bytes:
    """What a run of `HARD` ends with."""
    command = workshop.command(workshop.folder / "undisturbed", **HARD)
    assert train(command) == 0
    return final_file(command).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_file_and_state_and_the_run_goes_on_exactly(number, workshop, tmp_path, undisturbed):
    command = workshop.command(tmp_path / "出力", **HARD, resume="auto")
    for stop, files in ((4, {"-step00000004"}), (7, {"-step00000004", "-step00000007"})):
        with after_step(stop, lambda: signal.raise_signal(number)):
            assert train(command) == 128 + number
        assert names_in(output_of(command)) == files | {f"{name}-state" for name in files}
        saved = final_file(command).with_stem(f"{NAME}-step{stop:08d}")
        assert metadata(saved)["ss_steps"] == str(stop)
        assert recorded(output_of(command), f"-step{stop:08d}-state")["global_step"] == stop
    assert train(command) == 0
    assert final_file(command).read_bytes() == undisturbed


def test_a_signal_after_the_last_step_changes_nothing(workshop, tmp_path, undisturbed):
    command = workshop.command(tmp_path, **HARD)
    with after_step(9, lambda: signal.raise_signal(signal.SIGINT)):
        assert train(command) == 0
    assert names_in(tmp_path) == {""} and final_file(command).read_bytes() == undisturbed


@pytest.mark.parametrize("is_later", [False, True])
def test_ctrl_c_twice_at_once_is_one_and_later_it_does_not_wait_for_a_save(
    is_later, workshop, tmp_path, capsys, monkeypatch
):
    """A launcher passes on what the terminal has told already."""

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr("time.monotonic", lambda: moment + 60 * is_later)
        signal.raise_signal(signal.SIGINT)

    moment = time.monotonic()
    with after_step(2, twice):
        assert train(workshop.command(tmp_path / "出力")) == 130
    assert capsys.readouterr().err.endswith("interrupted\n") == is_later
    assert (tmp_path / "出力").exists() != is_later


def test_a_finished_run_can_be_made_longer_and_auto_finds_its_state(workshop, tmp_path):
    command = partial(workshop.command, network_dropout=0.3, save_state_on_train_end=True, resume="auto")
    short, long = command(tmp_path / "longer", max_train_steps=4), command(tmp_path / "longer", max_train_steps=9)
    assert train(short) == 0 and train(long) == 0
    once = command(tmp_path / "at once", max_train_steps=9)
    assert train(once) == 0
    assert final_file(long).read_bytes() == final_file(once).read_bytes()
    assert train(short) == 0, "a run that is shorter than its state has nothing to do"
    assert load_file(final_file(short)).keys() == load_file(final_file(once)).keys()


def test_a_changed_learning_rate_counts_and_is_told(workshop, tmp_path, caplog):
    """The same gradients at half the rate make half the step."""
    warmup = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}
    command = partial(workshop.command, optimizer_type="SGD", max_grad_norm=0, **warmup)
    first = command(tmp_path / "first", max_train_steps=3, save_state=True)
    before, state = trained(first), tmp_path / "first" / f"{NAME}-state"
    same = trained(command(tmp_path / "same", max_train_steps=4, resume=state))
    changes = {"learning_rate": 0.005, "lr_warmup_steps": 3, "network_args": ("verbose=True",)}
    half = trained(command(tmp_path / "half", max_train_steps=4, resume=state, **changes))
    for name in steps(before):
        torch.testing.assert_close(half[name] - before[name], (same[name] - before[name]) / 2, rtol=1e-3, atol=1e-7)
    assert "learning_rate was 0.01, is 0.005 now" in caplog.messages
    assert "max_train_steps was 3, is 4 now" in caplog.messages
    assert "lr_warmup_steps was 2, is 3 now" in caplog.messages
    assert not [message for message in caplog.messages if "verbose" in message]


class Recorder:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}
        self.epochs: dict[int, tuple[int, float]] = {}

    def log(self, values, *, step: int) -> None:
        self.steps[step] = self.steps.get(step, {}) | values

    def log_epoch(self, values, *, epoch: int, step: int) -> None:
        self.epochs[epoch] = step, values["loss/epoch"]

    def close(self) -> None:
        pass


def test_every_step_and_epoch_is_logged_once_with_the_same_numbers_after_an_interruption(
    workshop, tmp_path, monkeypatch
):
    def logged(recorder: Recorder, *commands: list[str]) -> Recorder:
        monkeypatch.setattr("training.trainer.open_trackers", lambda *_, **rest: Trackers({"recorder": recorder}))
        return [train(command) for command in commands] and recorder

    changes = HARD | {"lr_scheduler": "linear", "scale_weight_norms": 0.1}
    whole = logged(Recorder(), workshop.command(tmp_path / "whole", **changes))
    command, parts = workshop.command(tmp_path / "parts", **changes, resume="auto"), Recorder()
    with after_step(5, lambda: signal.raise_signal(signal.SIGTERM)):
        logged(parts, command)
    assert list(parts.steps) == [1, 2, 3, 4, 5]
    logged(parts, command)
    assert parts.steps == whole.steps and parts.epochs == whole.epochs
    assert list(whole.steps) == list(range(1, 10)) and [step for step, _ in whole.epochs.values()] == [3, 6, 9]
    names = {"loss/current", "loss/average", "lr/unet", "lr/unet plus", *NORMS}
    assert all(values.keys() == names for values in whole.steps.values())
    assert [whole.steps[step]["lr/unet"] for step in (1, 9)] == pytest.approx([0.01 * 8 / 9, 0])
    assert whole.steps[6]["loss/average"] == whole.epochs[2][1]


NORMS = {"max_norm/keys_scaled", "max_norm/average_key_norm", "max_norm/max_key_norm"}


# ---- what is saved ----


def test_names_of_files_and_what_is_kept(workshop, tmp_path):
    """Nine steps, three epochs: at step 8, step 4 is over 3 steps ago; of the epochs before the last, one stays."""
    changes = {"save_every_n_steps": 2, "save_last_n_steps": 3, "save_last_n_steps_state": 0}
    changes |= {"save_every_n_epochs": 1, "save_last_n_epochs": 1, "save_state": True}
    assert train(workshop.command(tmp_path, **HARD, **changes)) == 0
    assert names_in(tmp_path) == {
        *("-step00000006", "-step00000008", "-step00000008-state", "-000002", "-000002-state", "", "-state")
    }
    epochs = {name: metadata(tmp_path / f"{NAME}{name}.safetensors") for name in ("-step00000008", "-000002", "")}
    assert {name: (data["ss_steps"], data["ss_epoch"]) for name, data in epochs.items()} == {
        "-step00000008": ("8", "3"),
        "-000002": ("6", "2"),
        "": ("9", "3"),
    }


FACTS = {
    "ss_output_name": NAME,
    "ss_learning_rate": "0.01",
    "ss_num_train_items": "9",
    "ss_num_batches_per_epoch": "5",
    "ss_num_epochs": "3",
    "ss_gradient_checkpointing": "False",
    "ss_gradient_checkpointing_cpu_offload": "False",
    "ss_gradient_accumulation_steps": "2",
    "ss_max_train_steps": "9",
    "ss_lr_warmup_steps": "0.2",
    "ss_lr_scheduler": "linear",
    "ss_base_model_version": "framepack",
    "ss_network_module": "networks.lora_framepack",
    "ss_network_dim": "3",
    "ss_network_alpha": "1.0",
    "ss_network_dropout": "0.3",
    "ss_mixed_precision": "no",
    "ss_seed": "3",
    "ss_training_comment": "着せ替え",
    "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
    "ss_max_grad_norm": "1.0",
    "ss_fp8_base": "False",
    "ss_full_fp16": "False",
    "ss_full_bf16": "False",
    "ss_weighting_scheme": "none",
    "ss_logit_mean": "0.0",
    "ss_logit_std": "1.0",
    "ss_mode_scale": "1.29",
    "ss_guidance_scale": "1.0",
    "ss_timestep_sampling": "shift",
    "ss_sigmoid_scale": "1.0",
    "ss_discrete_flow_shift": "3.0",
    "ss_network_args": '{"rank_dropout": "0.2", "module_dropout": "0.1", "loraplus_lr_ratio": "4"}',
    "ss_sd_model_name": "変換器.safetensors",
    "ss_training_started_at": "1700000000.0",
    "ss_training_finished_at": "1700000000.0",
    "ss_steps": "9",
    "ss_epoch": "3",
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "framepack/lora",
    "modelspec.implementation": "https://github.com/lllyasviel/FramePack",
    "modelspec.title": "題",
    "modelspec.resolution": "640x480",
    "modelspec.date": "2023-11-14T22:13:20",
    "modelspec.author": "作者",
    "modelspec.timestep_range": "0,900",
}
COMPUTED = {"ss_session_id", "ss_datasets", "sshs_model_hash", "sshs_legacy_hash"}


def test_files_say_how_they_were_trained_unless_they_shall_not(workshop, tmp_path):
    changes = HARD | {"lr_scheduler": "linear", "lr_warmup_steps": "20%", "optimizer_args": ("weight_decay=0.1",)}
    changes |= {"training_comment": "着せ替え", "metadata_title": "題", "metadata_author": "作者"}
    changes |= {"metadata_reso": "640,480", "max_timestep": 900}
    command = workshop.command(tmp_path / "all", **changes)
    assert train(command) == 0
    found = metadata(final_file(command))
    assert {key: value for key, value in found.items() if key not in COMPUTED} == FACTS
    assert json.loads(found["ss_datasets"])[0].items() >= {"num_repeats": 3, "batch_size": 2}.items()
    assert re.fullmatch("[0-9a-f]{64}", found["sshs_model_hash"]) and 0 <= int(found["ss_session_id"]) < 2**32

    sparse = workshop.command(tmp_path / "few", **changes, no_metadata=True)
    assert train(sparse) == 0
    kept = {"base_model_version", "network_module", "network_dim", "network_alpha", "network_args"}
    wanted = {key for key in found if not key.startswith("ss_")} | {f"ss_{name}" for name in kept}
    assert {key: value for key, value in metadata(final_file(sparse)).items() if not key.startswith("sshs")} == {
        key: found[key] for key in wanted if not key.startswith("sshs")
    }


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_files_are_saved_in_the_precision_that_was_asked_for(precision, dtype, run):
    exact, rounded = run("float32"), run(precision, save_precision=precision)
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    assert rounded.keys() == exact.keys()
    assert all(torch.equal(rounded[name], exact[name].to(dtype)) for name in exact)


class Disk:
    """One that can be full: nothing reaches it then."""

    def __init__(self, monkeypatch) -> None:
        from common import files

        self.is_full, flush = False, files.flush_to_disk

        def flush_if_there_is_room(file: Path) -> None:
            if self.is_full:
                raise OSError(28, "No space left on device")
            flush(file)

        monkeypatch.setattr("common.files.flush_to_disk", flush_if_there_is_room)
        monkeypatch.setattr("training.states.flush_to_disk", flush_if_there_is_room)

    def fill(self) -> None:
        self.is_full = True

    def clear(self) -> None:
        self.is_full = False


def test_a_full_disk_in_the_middle_costs_one_file(workshop, tmp_path, monkeypatch, caplog, undisturbed):
    disk = Disk(monkeypatch)
    changes = {"save_every_n_steps": 2, "save_last_n_steps": 0, "save_state": True}
    command = workshop.command(tmp_path, **HARD, **changes)
    with after_step(4, disk.fill), after_step(6, disk.clear):
        assert train(command) == 0
    assert names_in(tmp_path) == {
        *("-step00000002", "-step00000002-state", "-step00000008", "-step00000008-state", "", "-state")
    }, "what was saved before is there, as nothing took its place at step 4"
    load_file(tmp_path / f"{NAME}-step00000002.safetensors")
    assert final_file(command).read_bytes() == undisturbed
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert told.startswith("--output_dir: got No space left on device at ") and "training goes on" in told


def test_a_full_disk_at_the_end_fails_the_run_in_one_line(workshop, tmp_path, monkeypatch, capsys):
    disk = Disk(monkeypatch)
    with after_step(5, disk.fill):
        assert train(workshop.command(tmp_path, save_every_n_steps=2)) == 2
    assert names_in(tmp_path) == {"-step00000002", "-step00000004"}
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("--output_dir: got No space left on device at ") and "saved before is intact" in line


# ---- numbers that are none ----


@pytest.fixture(scope="module")
def four_items(tmp_path_factory) -> Path:
    items = {name: item(i % 3) for i, name in enumerate(("a", "猫", "c", "d"))}
    return write_data_set(tmp_path_factory.mktemp("壊れた"), items, batch_size=1)


@pytest.fixture(params=["the loss", "the gradient"])
def spoilt(request, four_items, monkeypatch) -> tuple[str, Path]:
    """(what is no number when 猫 is trained, the data set)."""
    if request.param == "the loss":
        request.addfinalizer(spoil(four_items, "猫"))
        return request.param, four_items

    def lose(self, batch, **rest):
        result = loss_of(self, batch, **rest)
        if batch.items[0].name.startswith("猫"):
            result.weighted.register_hook(lambda gradient: gradient * torch.nan)
        return result

    loss_of = Objective.__call__
    monkeypatch.setattr(Objective, "__call__", lose)
    return request.param, four_items


def finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_a_number_that_is_none_stops_the_run_names_the_item_and_saves_what_was_trained(
    spoilt, workshop, tmp_path, caplog
):
    what, data = spoilt
    command = workshop.command(tmp_path, dataset_config=data)
    assert train(command) == 1
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    step = int(re.match(rf"step (\d+): {what} is not a number, with 猫_0100x0100_fp.safetensors;", told)[1])
    name = f"-step{step - 1:08d}"
    assert names_in(tmp_path) == {name, f"{name}-state"} and step > 1
    saved = load_file(tmp_path / f"{NAME}{name}.safetensors")
    assert finite(saved) and any(tensor.any() for tensor in steps(saved).values())
    # The state is good: with the item left out, the run goes on.
    assert train([*command, "--resume", "auto", "--on_nan", "skip"]) == 0
    assert finite(load_file(final_file(command)))


def test_a_number_that_is_none_is_skipped_and_leaves_weights_and_average_as_they_were(
    spoilt, workshop, tmp_path, caplog
):
    what, data = spoilt
    changes = {"on_nan": "skip", "save_every_n_steps": 1, "save_state": True, "loss_report": True}
    saved = trained(workshop.command(tmp_path, dataset_config=data, max_train_steps=8, **changes))
    assert finite(saved)
    pattern = re.compile(rf"step (\d+): {what} is not a number, with 猫.*; the step is left out")
    skipped = {int(found[1]) for message in caplog.messages if (found := pattern.match(message))}
    assert len(skipped) == 2, "once in each epoch"
    files = {step: load_file(tmp_path / f"{NAME}-step{step:08d}.safetensors") for step in range(1, 9)}
    for step in range(2, 9):
        is_same = all(torch.equal(files[step][name], files[step - 1][name]) for name in files[step])
        assert is_same == (step in skipped)
    average = [loss for loss in recorded(tmp_path)["extra"]["average"] if loss is not None]
    assert average and all(map(math.isfinite, average))


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
    assert difference(steps(found), steps(wanted)) <= 1e-4
    assert difference(steps(run("plain", **SGD)), steps(wanted)) > 1e-2


def test_training_goes_on_from_a_file_of_any_format(workshop, run, tmp_path):
    first = run("first", network_dim=3, network_alpha=2)
    file, converted = tmp_path / "first" / f"{NAME}.safetensors", tmp_path / "変換.safetensors"
    still = run("still", learning_rate=1e-30, network_alpha=2, network_weights=file)
    assert all(torch.equal(still[name], first[name]) for name in first)

    assert convert_lora.main(["--input", str(file), "--output", str(converted), "--target", "other"]) == 0
    assert load_file(converted).keys() != first.keys()
    wanted = run("native", **SGD, network_weights=file)
    found = run("other", **SGD, network_weights=converted)
    assert difference(found, wanted) <= TOLERANCE and difference(steps(found), steps(first)) > 1e-2

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
    assert difference(steps(run("without", **plainly)), steps(wanted)) > 1e-2


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
    assert difference(steps(base), steps(run("plain", **SGD))) > 1e-3, "it changes what the model does"


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
    assert finite(found) and all(tensor.any() for tensor in steps(found).values())
    assert len(found["lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight"]) == 32
    assert metadata(output / "name-of-lora.safetensors")["ss_mixed_precision"] == "bf16"


@pytest.mark.parametrize("more", ["--fp8_base --fp8_scaled", "--fp8", "--blocks_to_swap 36", "--fp8_llm"])
def test_what_the_guide_adds_for_memory_answers_in_one_line(more, workshop, tmp_path, capsys):
    assert train([*as_users_write_it(workshop, tmp_path / "出力"), *more.split()]) == 2
    answer = capsys.readouterr()
    assert answer.out == "" and answer.err.count("\n") == 1 and "not available yet" in answer.err
    assert not (tmp_path / "出力").exists()
