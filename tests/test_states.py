"""States: what goes in comes out, an interrupted run goes on exactly, a killed save loses nothing."""

import json
import logging
import os
import random
import shutil
import unicodedata
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dataset.epochs import Bucket, ItemKey, Position
from options.errors import UserError
from training import random_state as generators
from training import states
from training.metadata import Session
from training.random_state import random_state, restore_random_state
from training.resuming import changed_settings, newest_state, remove_leftovers, run_fingerprint, set_learning_rates
from training.states import RunState, check_state, load_state, remove_state, save_state, state_step

NAME = "桜 v1.0"
FINGERPRINT = {"seed": 42, "network_dim": 4, "network_args": {"conv_dim": "2"}, "data": "3 items (abc)"}


def state(step: int = 7, **changes: object) -> RunState:
    given = {
        "network": {"a.lora_up.weight": torch.full((3, 2), float(step)), "a.alpha": torch.tensor(0.3)},
        "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]},
        "scheduler": {"last_epoch": step, "_last_lr": [1e-4], "lr_lambdas": [None]},
        "rng": (random_state(),),
        "global_step": step,
        "position": Position(epoch=1, batch=3),
        "session": Session(id=123, started_at=1.7e9 + 0.123456),
        "fingerprint": FINGERPRINT,
    }
    return RunState(**given | changes)


# ---- exact continuation ----


class Trainee:
    """A small training run that uses everything that a state is about: dropout, momentum, a schedule, generators."""

    def __init__(self, lr: float = 1e-2) -> None:
        torch.manual_seed(1)
        self.network = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)).double()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=lr)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        torch.manual_seed(2), np.random.seed(3), random.seed(4)

    def train(self, steps: range) -> None:
        for step in steps:
            noise = random.gauss(0, 1) + float(np.random.standard_normal())
            inputs = torch.linspace(0, step, 8, dtype=torch.float64) + noise
            self.network(inputs).square().sum().backward()
            self.optimizer.step(), self.scheduler.step(), self.optimizer.zero_grad()

    def state(self, step: int) -> RunState:
        return state(
            step,
            network=self.network.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            rng=(random_state(),),
        )

    def load(self, saved: RunState) -> None:
        self.network.load_state_dict(saved.network)
        self.optimizer.load_state_dict(saved.optimizer)
        self.scheduler.load_state_dict(saved.scheduler)
        restore_random_state(saved.rng, rank=0)


def test_interrupted_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path) -> None:
    undisturbed = Trainee()
    undisturbed.train(range(9))
    first = Trainee()
    first.train(range(5))
    save_state(tmp_path / "状態-state", first.state(5))
    first.train(range(5, 7))  # what is lost
    second = Trainee()
    second.load(load_state(tmp_path / "状態-state", FINGERPRINT))
    second.train(range(5, 9))
    assert all(map(torch.equal, undisturbed.network.state_dict().values(), second.network.state_dict().values()))
    assert undisturbed.scheduler.get_last_lr() == second.scheduler.get_last_lr()


def test_saving_draws_no_random_numbers(tmp_path) -> None:
    trainee = Trainee()
    before = random_state()
    save_state(tmp_path / "x-state", trainee.state(0))
    after = random_state()
    assert before["python"] == after["python"] and torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["numpy"][1], after["numpy"][1]) and before["numpy"][2:] == after["numpy"][2:]


def test_everything_comes_back_as_it_was(tmp_path) -> None:
    settings, extra = {"learning_rate": 1e-4, "betas": [0.9]}, {"average": [0.1, None, 1 / 3], "名前": {"a": 1}}
    saved = state(grad_scaler={"scale": 65536.0, "_growth_tracker": 5}, settings=settings, extra=extra)
    save_state(tmp_path / "new" / f"{NAME}-state", saved)
    loaded = load_state(tmp_path / "new" / f"{NAME}-state", FINGERPRINT)
    for name in ("global_step", "position", "session", "fingerprint", "settings", "extra", "grad_scaler", "scheduler"):
        assert getattr(loaded, name) == getattr(saved, name), name
    assert loaded.optimizer["param_groups"] == saved.optimizer["param_groups"]
    assert loaded.network.keys() == saved.network.keys()
    assert all(torch.equal(loaded.network[key], value) for key, value in saved.network.items())


def test_folder_holds_the_documented_files_and_nothing_lies_beside_it(tmp_path) -> None:
    save_state(tmp_path / "x-state", state(rng=(random_state(), random_state()), grad_scaler={"scale": 1.0}))
    expected = "network.safetensors optimizer.pt scheduler.pt grad_scaler.pt rng_0.pt rng_1.pt trainer_state.json"
    assert {file.name for file in (tmp_path / "x-state").iterdir()} == set(expected.split())
    assert [entry.name for entry in tmp_path.iterdir()] == ["x-state"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_are_kept_in_the_type_that_they_are_trained_in(tmp_path, dtype: torch.dtype) -> None:
    weights = {"w": torch.rand(4, 3, dtype=dtype).t()}
    save_state(tmp_path / "x-state", state(network=weights))
    assert load_file(tmp_path / "x-state" / "network.safetensors")["w"].dtype == dtype
    assert torch.equal(load_state(tmp_path / "x-state", {}).network["w"], weights["w"])


# ---- generators ----


def draws() -> list[float]:
    return [random.gauss(0, 1), float(np.random.standard_normal()), *torch.rand(3).tolist()]


def test_generators_go_on_where_they_were(tmp_path) -> None:
    draws()  # an odd number of normal draws leaves one in store, which is part of a generator's state
    save_state(tmp_path / "x-state", state(rng=(random_state(),)))
    expected = draws()
    draws()
    restore_random_state(load_state(tmp_path / "x-state", {}).rng, rank=0)
    assert draws() == expected


def test_every_process_gets_its_own_generators(tmp_path) -> None:
    expected, captured = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        captured.append(random_state())
        expected.append(torch.rand(2).tolist())
    save_state(tmp_path / "x-state", state(rng=tuple(captured)))
    loaded = load_state(tmp_path / "x-state", {}).rng
    for rank in (2, 0, 1):
        restore_random_state(loaded, rank=rank)
        assert torch.rand(2).tolist() == expected[rank]


def test_a_process_that_was_not_there_keeps_its_generators_with_a_warning(caplog) -> None:
    saved = (random_state(),)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    restore_random_state(saved, rank=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert "no random numbers for process 1" in caplog.text


def test_the_generator_of_the_gpu_is_kept_only_for_a_gpu(tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(generators.torch.cuda, "get_rng_state", lambda device: torch.tensor([1, 2], dtype=torch.uint8))
    monkeypatch.setattr(generators.torch.cuda, "set_rng_state", lambda value, device: seen.append((value, str(device))))
    save_state(tmp_path / "x-state", state(rng=(random_state("cuda:1"), random_state("cpu"))))
    loaded = load_state(tmp_path / "x-state", {}).rng
    restore_random_state(loaded, rank=0, device="cpu")
    restore_random_state(loaded, rank=1, device="cuda:0")
    assert seen == []
    restore_random_state(loaded, rank=0, device="cuda:0")
    assert [(value.tolist(), device) for value, device in seen] == [([1, 2], "cuda:0")]


# ---- what can be saved ----


def test_what_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path) -> None:
    save_state(tmp_path / "x-state", state(1))
    for odd in (lambda: None, {1, 2}, Path("x")):
        with pytest.raises(UserError, match=r"--save_state: got \w+ in optimizer.pt state 0 odd; expected numbers"):
            save_state(tmp_path / "x-state", state(2, optimizer={"state": {0: {"odd": odd}}}))
    assert load_state(tmp_path / "x-state", {}).global_step == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["x-state"]


def test_kinds_that_libraries_use_for_numbers_are_made_plain(tmp_path) -> None:

    odd = {
        "a": np.float64(0.5),
        "b": np.int32(3),
        "c": OrderedDict(x=1),
        "d": defaultdict(list, y=[2]),
        "e": torch.Size([3]),
    }
    save_state(tmp_path / "x-state", state(scheduler=odd))
    assert load_state(tmp_path / "x-state", {}).scheduler == {
        **{"a": 0.5, "b": 3, "c": {"x": 1}, "d": {"y": [2]}, "e": (3,)}
    }


# ---- other runs, other folders ----


@pytest.mark.parametrize(
    ("now", "complaint"),
    [
        ({"seed": 43}, "of a run with seed 42; expected a run with seed 43, as this one"),
        ({"network_dim": 8, "seed": 1}, "seed 42, network_dim 4; expected a run with seed 1, network_dim 8"),
        ({"network_args": {}}, "network_args {'conv_dim': '2'}; expected a run with network_args {}"),
        ({"newer": 1}, "newer unknown; expected a run with newer 1"),
    ],
)
def test_state_of_another_run_names_what_differs(tmp_path, now, complaint: str) -> None:
    folder = tmp_path / f"{NAME}-state"
    save_state(folder, state())
    for read in (check_state, load_state):
        with pytest.raises(UserError) as caught:
            read(folder, FINGERPRINT | now)
        assert str(caught.value).startswith(f"--resume: got {folder}, ") and complaint in str(caught.value)
        assert "--network_weights" in str(caught.value)


def test_state_of_the_same_run_passes_whatever_python_calls_its_lists(tmp_path) -> None:
    save_state(tmp_path / "x-state", state(fingerprint={"args": (1, 2), "seed": 1}))
    check_state(tmp_path / "x-state", {"seed": 1, "args": (1, 2)})
    check_state(tmp_path / "x-state", {"args": [1, 2]})


def test_state_of_accelerate_is_told_from_ours(tmp_path) -> None:
    for name in ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"--resume: got .*another trainer .*optimizer.bin.*--network_weights and its LoRA"
    ):
        check_state(tmp_path, FINGERPRINT)


def test_what_is_no_state_is_refused(tmp_path) -> None:
    file = tmp_path / "lora.safetensors"
    file.write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    cases = {
        "lora.safetensors": "LoRA file with --network_weights",
        "nothing": "no such folder",
        "empty": "has no trainer",
    }
    for name, complaint in cases.items():
        with pytest.raises(UserError, match=rf"--resume: got .*{name}.*{complaint}"):
            check_state(tmp_path / name, {})


@pytest.mark.parametrize("name", ["network.safetensors", "optimizer.pt", "scheduler.pt", "rng_0.pt"])
@pytest.mark.parametrize("harm", ["missing", "shorter", "zeros"])
def test_damaged_files_are_noticed(tmp_path, name: str, harm: str) -> None:
    save_state(tmp_path / "x-state", state())
    file = tmp_path / "x-state" / name
    size = file.stat().st_size
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(bytes(size - (harm == "shorter")))
    expected = {"missing": f"{name} is missing", "shorter": f"{name} has {size - 1} bytes", "zeros": "damaged"}[harm]
    with pytest.raises(UserError, match=expected) as caught:
        load_state(tmp_path / "x-state", FINGERPRINT)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("content", ["", "\0\0\0", "[1]", "{", '{"format": 1}', '{"format": 99}'])
def test_damaged_counters_are_noticed(tmp_path, content: str) -> None:
    save_state(tmp_path / "x-state", state())
    (tmp_path / "x-state" / "trainer_state.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="format 99; expected format 1" if "99" in content else "damaged"):
        load_state(tmp_path / "x-state", FINGERPRINT)


def test_pickles_that_run_code_are_not_loaded(tmp_path) -> None:
    import pickle

    class Harm:
        def __reduce__(self):
            return os.mkdir, (os.fspath(tmp_path / "harm"),)

    save_state(tmp_path / "x-state", state())
    content = pickle.dumps(Harm(), protocol=2)
    (tmp_path / "x-state" / "optimizer.pt").write_bytes(content)
    seal = tmp_path / "x-state" / "trainer_state.json"
    counters = json.loads(seal.read_text(encoding="utf-8"))
    counters["files"]["optimizer.pt"] = len(content)
    seal.write_text(json.dumps(counters), encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        load_state(tmp_path / "x-state", FINGERPRINT)
    assert not (tmp_path / "harm").exists()


# ---- fingerprint and settings ----


def buckets(*, names: tuple[str, ...] = ("a", "b"), batch_size: int = 2, repeats: int = 1) -> tuple[Bucket, ...]:
    keys = tuple(ItemKey(dataset=0, name=name, repeat=repeat) for name in names for repeat in range(repeats))
    return (Bucket(keys=keys, batch_size=batch_size),)


def fingerprint(**changes: object) -> dict[str, object]:
    given = {
        "network_module": "networks.lora_framepack",
        "network_dim": 4,
        "network_alpha": 1,
        "network_args": {"b": "1", "a": "2"},
        "base_model": "0123456789abcdef0123",
        "optimizer_type": "AdamW",
        "optimizer_args": {"betas": (0.9, 0.99)},
        "seed": 42,
        "buckets": buckets(),
        "batches_per_step": 2,
    }
    return run_fingerprint(**given | changes)


def test_fingerprint_is_json_and_does_not_depend_on_order_or_spelling() -> None:
    same = fingerprint(
        network_args={"a": "2", "b": "1", "verbose": "True"},
        network_alpha=1.0,
        optimizer_type="adamw",
        buckets=buckets(names=("b", "a")),
    )
    assert fingerprint() == same == json.loads(json.dumps(same))


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"network_module": "networks.loha"}, "network_module"),
        ({"network_dim": 8}, "network_dim"),
        ({"network_alpha": 2}, "network_alpha"),
        ({"network_args": {}}, "network_args"),
        ({"base_model": "another"}, "base_model"),
        ({"optimizer_type": "Adafactor"}, "optimizer_type"),
        ({"optimizer_args": {"betas": (0.9, 0.999)}}, "optimizer_args"),
        ({"seed": 43}, "seed"),
        ({"buckets": buckets(names=("a", "ü"))}, "data"),
        ({"buckets": buckets(batch_size=1)}, "data"),
        ({"buckets": buckets(repeats=2)}, "data"),
        ({"batches_per_step": 4}, "batches_per_step"),
    ],
)
def test_each_part_of_the_fingerprint_tells_runs_apart(changes, differs: str) -> None:
    before, after = fingerprint(), fingerprint(**changes)
    assert [name for name in before if before[name] != after[name]] == [differs]


def test_changed_settings_are_told() -> None:
    then = {"learning_rate": 1e-4, "betas": [1, 2], "gone": 1, "same": None}
    now = {"learning_rate": 5e-5, "betas": (1, 2), "new": 2, "same": None}
    assert changed_settings(then, now) == ["learning_rate was 0.0001, is 5e-05 now"]


@pytest.mark.parametrize(
    ("schedule", "arguments"),
    [
        ("LambdaLR", {"lr_lambda": lambda step: 0.9**step}),
        ("CosineAnnealingLR", {"T_max": 20}),
        ("StepLR", {"step_size": 3}),
    ],
)
def test_a_new_learning_rate_takes_effect_where_the_schedule_stands(schedule: str, arguments) -> None:
    def run(lr: float, num_steps: int):
        optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))]}], lr=lr)
        scheduler = getattr(torch.optim.lr_scheduler, schedule)(optimizer, **arguments)
        rates = []
        for _ in range(num_steps):
            optimizer.step(), scheduler.step()
            rates.append(scheduler.get_last_lr()[0])
        return optimizer, scheduler, rates

    saved_optimizer, saved_scheduler, _ = run(1e-3, 5)
    _, _, expected = run(4e-3, 10)
    optimizer, scheduler, _ = run(4e-3, 0)
    optimizer.load_state_dict(saved_optimizer.state_dict())
    scheduler.load_state_dict(saved_scheduler.state_dict())
    set_learning_rates(optimizer, scheduler, [4e-3])
    assert scheduler.get_last_lr()[0] == optimizer.param_groups[0]["lr"] == pytest.approx(expected[4], rel=1e-12)
    for rate in expected[5:]:
        optimizer.step(), scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12)


def test_an_unchanged_learning_rate_changes_no_bit() -> None:
    first, second = Trainee(), Trainee()
    for trainee in (first, second):
        trainee.train(range(5))
    set_learning_rates(second.optimizer, second.scheduler, [1e-2])
    assert first.optimizer.state_dict()["param_groups"] == second.optimizer.state_dict()["param_groups"]
    assert first.scheduler.state_dict() == second.scheduler.state_dict()


def test_a_rate_that_the_optimizer_makes_itself_is_left_alone() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    optimizer.param_groups[0]["lr"] = None
    set_learning_rates(optimizer, object(), [None])
    assert optimizer.param_groups[0]["lr"] is None


# ---- --resume auto ----


def save_at(folder: Path, steps: dict[str, int], name: str = NAME) -> None:
    for suffix, step in steps.items():
        save_state(folder / f"{name}{suffix}-state", state(step))


def test_auto_takes_the_state_that_got_furthest(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    save_at(tmp_path, {"-step00000030": 30, "-000002": 20, "-step00000009": 9})
    assert newest_state(tmp_path, NAME) == tmp_path / f"{NAME}-step00000030-state"
    assert "going on from" in caplog.text and "step 30" in caplog.text
    save_at(tmp_path, {"-step100000000": 100_000_000})
    assert newest_state(tmp_path, NAME) == tmp_path / f"{NAME}-step100000000-state"


def test_auto_takes_the_later_occasion_of_one_step(tmp_path) -> None:
    save_at(tmp_path, {"-step00000030": 30})
    save_at(tmp_path, {"-000003": 30})
    assert newest_state(tmp_path, NAME) == tmp_path / f"{NAME}-000003-state"
    save_at(tmp_path, {"": 30})
    assert newest_state(tmp_path, NAME) == tmp_path / f"{NAME}-state"


def test_auto_starts_anew_where_there_is_no_state_of_that_name(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    assert newest_state(tmp_path / "not there", NAME) is None
    save_at(tmp_path, {"-step00000030": 30}, name=f"{NAME}2")
    save_at(tmp_path, {"": 30}, name=f"my {NAME}")
    save_at(tmp_path, {"": 30}, name="桜 v1x0")
    (tmp_path / f"{NAME}-state").write_bytes(b"a file")
    assert newest_state(tmp_path, NAME) is None
    assert "starting anew" in caplog.text


def test_auto_finds_names_that_a_disk_has_decomposed(tmp_path) -> None:
    name = unicodedata.normalize("NFC", "がぎぐ")
    save_at(tmp_path, {"": 30}, name=unicodedata.normalize("NFD", name))
    assert newest_state(tmp_path, name) is not None


def test_auto_passes_over_incomplete_states_with_a_warning(tmp_path, caplog) -> None:
    save_at(tmp_path, {"-step00000010": 10, "-step00000020": 20})
    (tmp_path / f"{NAME}-step00000020-state" / "optimizer.pt").unlink()
    assert newest_state(tmp_path, NAME) == tmp_path / f"{NAME}-step00000010-state"
    assert "optimizer.pt is missing" in caplog.text and "passes over it" in caplog.text


def test_of_a_killed_save_the_later_folder_is_taken_and_none_is_removed_that_is_the_only_one(tmp_path) -> None:
    save_state(tmp_path / "source", state(5))
    folder, new, old = (tmp_path / f"{NAME}-state{mark}" for mark in ("", ".new", ".old"))

    def left(*there: Path, keep: Path | None) -> set[Path]:
        for place in (folder, new, old):
            shutil.rmtree(place, ignore_errors=True)
        for place in there:
            shutil.copytree(tmp_path / "source", place)
        assert newest_state(tmp_path, NAME) == there[0]
        remove_leftovers(tmp_path, NAME, keep=keep)
        return {place for place in (folder, new, old) if place.exists()}

    assert left(new, folder, keep=new) == {new, folder}
    assert left(new, folder, old, keep=new) == {new, folder}
    assert left(new, old, keep=None) == {new, old}
    assert left(folder, old, keep=folder) == {folder}


def test_leftovers_of_other_runs_in_the_folder_stay(tmp_path) -> None:
    for name in ("other-state.new", f"{NAME}2-state.new", f"{NAME}-notes.new", f"{NAME}.safetensors"):
        (tmp_path / name).mkdir()
    (tmp_path / f"{NAME}-state.new").mkdir()
    remove_leftovers(tmp_path, NAME, keep=None)
    assert {entry.name for entry in tmp_path.iterdir()} == {
        *("other-state.new", f"{NAME}2-state.new", f"{NAME}-notes.new", f"{NAME}.safetensors")
    }


def test_removing_a_state_removes_what_an_interrupted_save_left_of_it(tmp_path) -> None:
    save_at(tmp_path, {"-000001": 1, "-000002": 2})
    for mark in (".new", ".old"):
        (tmp_path / f"{NAME}-000001-state{mark}").mkdir()
    remove_state(tmp_path / f"{NAME}-000001-state")
    assert [entry.name for entry in tmp_path.iterdir()] == [f"{NAME}-000002-state"]
    remove_state(tmp_path / f"{NAME}-000001-state")


# ---- a killed save ----


class Killed(BaseException):
    """The process is gone: from here on, nothing that it wanted to do to the disk happens."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, last: int) -> Iterator[list[str]]:
    """Lets `last` changes of the disk through, half of the next one where it can be halved, and no more."""
    done: list[str] = []

    def guard(name: str, change: Callable, half: Callable | None = None) -> Callable:
        def guarded(*arguments: object, **named: object) -> object:
            if len(done) == last and half is not None:
                half(*arguments)
            done.append(name)
            if len(done) > last:
                raise Killed
            return change(*arguments, **named)

        return guarded

    def half_removed(folder: Path, **_: object) -> None:
        for file in sorted(Path(folder).glob("*"))[:2]:
            os.unlink(file)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", guard("rename", Path.rename))
        patch.setattr(Path, "mkdir", guard("mkdir", Path.mkdir))
        patch.setattr(Path, "unlink", guard("unlink", Path.unlink))
        patch.setattr(os, "replace", guard("replace", os.replace))
        patch.setattr(os, "fsync", guard("fsync", lambda descriptor: None))
        patch.setattr(states.shutil, "rmtree", guard("rmtree", shutil.rmtree, half_removed))
        patch.setattr(torch, "save", guard("torch.save", torch.save))
        yield done


@pytest.mark.parametrize("replaces", [False, True], ids=["new name", "same name"])
@pytest.mark.parametrize("again", [False, True], ids=["first crash", "second crash"])
def test_a_save_that_is_killed_anywhere_loses_no_state(tmp_path, monkeypatch, replaces: bool, again: bool) -> None:
    suffix = "-000001" if replaces else "-000002"
    with killed_at(monkeypatch, 10**6) as changes:
        save_at(tmp_path / "all", {"-000001": 1})
        first = len(changes)
        save_at(tmp_path / "all", {suffix: 2})
    num_changes = len(changes) - first
    assert num_changes > 10
    for last in range(num_changes):
        folder = tmp_path / f"{last}"
        save_at(folder, {"-000001": 1})
        with killed_at(monkeypatch, last), pytest.raises(Killed):
            save_at(folder, {suffix: 2})
        newest = newest_state(folder, NAME)
        if again:
            step = state_step(newest)
            with killed_at(monkeypatch, last // 2), pytest.raises(Killed):
                save_at(folder, {suffix: 2})
            newest = newest_state(folder, NAME)
            assert state_step(newest) >= step, last
        reached = load_state(newest, FINGERPRINT)
        assert reached.global_step in (1, 2) and reached.network["a.lora_up.weight"][0, 0] == reached.global_step
        remove_leftovers(folder, NAME, keep=newest)
        assert newest_state(folder, NAME) == newest
        for file in folder.rglob(".*.tmp*"):
            pytest.fail(f"{file} is left after {last} changes")
        save_at(folder, {suffix: 3})
        kept = {f"{NAME}-000001-state", f"{NAME}{suffix}-state"}
        assert {entry.name for entry in folder.iterdir()} == kept, last
        assert load_state(folder / f"{NAME}{suffix}-state", FINGERPRINT).global_step == 3


def test_old_state_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch) -> None:
    save_at(tmp_path, {"": 1})
    rename = Path.rename

    def refuse_new(old: Path, new: Path) -> Path:
        if old.suffix == ".new":
            raise PermissionError("open elsewhere")
        return rename(old, new)

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(Path, "rename", refuse_new)
        save_at(tmp_path, {"": 2})
    assert [entry.name for entry in tmp_path.iterdir()] == [f"{NAME}-state"]
    assert load_state(tmp_path / f"{NAME}-state", {}).global_step == 1


@pytest.mark.parametrize("mark", [".new", ".old"])
def test_what_an_interrupted_save_left_does_not_hinder_the_next_one(tmp_path, mark: str) -> None:
    save_at(tmp_path, {"": 1})
    (tmp_path / f"{NAME}-state{mark}" / "deep").mkdir(parents=True)
    save_at(tmp_path, {"": 2})
    assert [entry.name for entry in tmp_path.iterdir()] == [f"{NAME}-state"]
    assert load_state(tmp_path / f"{NAME}-state", {}).global_step == 2


def test_ctrl_c_while_saving_leaves_the_old_state_and_nothing_beside_it(tmp_path, monkeypatch) -> None:
    save_at(tmp_path, {"": 1})

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("_write_pickle", "_write_seal", "flush_to_disk"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(states, name, interrupt)
            save_at(tmp_path, {"": 2})
        assert [entry.name for entry in tmp_path.iterdir()] == [f"{NAME}-state"]
    assert load_state(tmp_path / f"{NAME}-state", {}).global_step == 1


def test_full_disk_is_told_as_such_and_leaves_the_old_state(tmp_path) -> None:
    resource = pytest.importorskip("resource")
    save_at(tmp_path, {"": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for content in ({"optimizer": {"m": torch.rand(5000)}}, {"network": {"w": torch.rand(5000)}}):
        resource.setrlimit(resource.RLIMIT_FSIZE, (12000, before[1]))
        try:
            with pytest.raises(Exception, match="File too large"):
                save_state(tmp_path / f"{NAME}-state", replace(state(2), **content))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [entry.name for entry in tmp_path.iterdir()] == [f"{NAME}-state"]
        assert load_state(tmp_path / f"{NAME}-state", {}).global_step == 1


def test_contents_reach_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch) -> None:
    events: list[str] = []
    flush, rename = states.flush_to_disk, Path.rename
    monkeypatch.setattr(states, "flush_to_disk", lambda file: (events.append(file.name), flush(file)))
    seal = states._write_seal
    monkeypatch.setattr(states, "_write_seal", lambda *given: (events.append("seal"), seal(*given)))
    monkeypatch.setattr(
        Path, "rename", lambda old, new: (events.append(f"{old.name} -> {new.name}"), rename(old, new))[1]
    )
    save_state(tmp_path / "x-state", state())
    assert set(events[:-2]) == {"network.safetensors", "optimizer.pt", "scheduler.pt", "rng_0.pt"}
    assert events[-2:] == ["seal", "x-state.new -> x-state"]
