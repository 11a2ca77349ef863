"""Whole training runs through the script: exact resumption, what is saved, full disks and numbers that are none."""

import json
import logging
import math
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from networks import lora_framepack
from tests.training_builders import build_transformer, difference, write_data_set
from tests.training_driver import (
    HARD,
    NAME,
    after_step,
    final_file,
    finite,
    item,
    metadata,
    names_in,
    output_of,
    recorded,
    spoil,
    train,
    trained,
    ups,
)
from training.objective import Objective
from training.tracking import Trackers

pytestmark = pytest.mark.usefixtures("repeatable_runs")

# ---- exact resumption ----

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
    assert difference(ups(saved), ups(ys)) > 1e-2


def test_an_epochs_last_batches_weigh_as_much_as_others_when_they_are_fewer_than_accumulated(workshop, run, tmp_path):
    """One batch in an epoch: there is nothing to accumulate."""
    data = write_data_set(tmp_path / "データ", {"猫": item(1)}, batch_size=1)
    wanted = run("one", dataset_config=data, optimizer_type="SGD", max_grad_norm=0)
    found = run("three", dataset_config=data, optimizer_type="SGD", max_grad_norm=0, gradient_accumulation_steps=3)
    assert difference(found, wanted) == 0


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


def test_a_finished_run_can_be_made_longer_but_not_shorter_and_auto_finds_its_state(workshop, tmp_path, capsys):
    command = partial(workshop.command, network_dropout=0.3, save_state_on_train_end=True, resume="auto")
    short, long = command(tmp_path / "longer", max_train_steps=4), command(tmp_path / "longer", max_train_steps=9)
    assert train(short) == 0 and train(long) == 0
    once = command(tmp_path / "at once", max_train_steps=9)
    assert train(once) == 0
    assert final_file(long).read_bytes() == final_file(once).read_bytes()
    capsys.readouterr()
    assert train(short) == 2
    answer = capsys.readouterr().err
    assert "a state after step 9; expected at most the 4 steps of this run" in answer and answer.count("\n") == 1


def test_a_changed_learning_rate_counts_and_is_told(workshop, tmp_path, caplog):
    """The same gradients at half the rate make half the step."""
    warmup = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}
    command = partial(workshop.command, optimizer_type="SGD", max_grad_norm=0, **warmup)
    first = command(tmp_path / "first", max_train_steps=3, save_state=True)
    before, state = trained(first), tmp_path / "first" / f"{NAME}-state"
    same = trained(command(tmp_path / "same", max_train_steps=4, resume=state))
    changes = {"learning_rate": 0.005, "lr_warmup_steps": 3, "network_args": ("verbose=True",)}
    half = trained(command(tmp_path / "half", max_train_steps=4, resume=state, **changes))
    for name in ups(before):
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
    assert finite(saved) and any(tensor.any() for tensor in ups(saved).values())
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
