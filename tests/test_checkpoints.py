"""When training saves, what it removes for it, and that a failed save costs nothing that was there before."""

import errno
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.files import atomic_file
from networks.lora_metadata import write_lora
from options.errors import UserError
from options.flags_saving import SavingFlags, check_saving
from training import checkpoints
from training.checkpoints import CheckpointWriter, Save, SavePlan, check_room

NAME = "桜 v1.0"


def plan(folder: Path | str = ".", *, num_steps: int = 60, num_epochs: int = 6, **flags: object) -> SavePlan:
    saving = SavingFlags(output_dir=str(folder), output_name=NAME, **flags)
    check_saving(saving)
    return SavePlan(flags=saving, num_steps=num_steps, num_epochs=num_epochs, steps_per_epoch=num_steps // num_epochs)


def write_file(path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"weights")


def write_state(path: Path) -> None:
    path.mkdir(exist_ok=True)
    (path / "trainer_state.json").write_bytes(b"{}")


def run(folder: Path, plan: SavePlan, writer: CheckpointWriter | None = None) -> list[set[str]]:
    """What lies in the folder after each save."""
    writer, seen = writer or CheckpointWriter(folder), []
    for save in plan.from_step(0):
        assert writer.write(save, write_file, write_state)
        seen.append({entry.name.replace(NAME, "x") for entry in folder.iterdir()})
    return seen


# ---- names and occasions ----


def test_names_are_those_that_users_know() -> None:
    each = plan(save_every_n_steps=1, save_every_n_epochs=1, save_state=True)
    names = [each.after_epoch(2), each.after_step(100), each.when_interrupted(7), each.at_end()]
    assert [save.written for save in names] == [
        ("桜 v1.0-000002.safetensors", "桜 v1.0-000002-state"),
        ("桜 v1.0-step00000100.safetensors", "桜 v1.0-step00000100-state"),
        ("桜 v1.0-step00000007.safetensors", "桜 v1.0-step00000007-state"),
        ("桜 v1.0.safetensors", "桜 v1.0-state"),
    ]
    assert [save.is_last for save in names] == [False, False, True, True]


def test_epochs_are_saved_every_n_but_for_the_last() -> None:
    every_two = plan(save_every_n_epochs=2)
    assert [epoch for epoch in range(1, 7) if every_two.after_epoch(epoch)] == [2, 4]


def test_steps_are_saved_every_n_with_the_last() -> None:
    every_20 = plan(save_every_n_steps=20)
    assert [step for step in range(1, 61) if every_20.after_step(step)] == [20, 40, 60]


def test_nothing_is_saved_on_the_way_unless_asked_for() -> None:
    assert [save.written for save in plan().from_step(0)] == [(f"{NAME}.safetensors",)]


@pytest.mark.parametrize(
    ("flags", "on_the_way", "at_end"),
    [({}, False, False), ({"save_state": True}, True, True), ({"save_state_on_train_end": True}, False, True)],
)
def test_states_are_saved_where_they_are_asked_for(flags, on_the_way: bool, at_end: bool) -> None:
    each = plan(save_every_n_steps=1, save_every_n_epochs=1, **flags)
    assert each.after_step(1).has_state == each.after_epoch(1).has_state == on_the_way
    assert each.at_end().has_state == at_end
    assert each.when_interrupted(1).has_state


def test_occasions_come_in_the_order_of_the_run_and_go_on_behind_a_step() -> None:
    both = plan(num_steps=60, num_epochs=6, save_every_n_steps=15, save_every_n_epochs=3)
    labels = [save.name.removeprefix(NAME) for save in both.from_step(0)]
    assert labels == ["-step00000015", "-step00000030", "-000003", "-step00000045", "-step00000060", ""]
    assert [save.name.removeprefix(NAME) for save in both.from_step(30)] == labels[3:]


# ---- retention ----


def test_the_last_n_epochs_are_kept(tmp_path) -> None:
    seen = run(tmp_path, plan(tmp_path, num_epochs=10, save_every_n_epochs=2, save_last_n_epochs=2))
    assert seen[:-1] == [
        {"x-000002.safetensors"},
        {"x-000002.safetensors", "x-000004.safetensors"},
        {"x-000004.safetensors", "x-000006.safetensors"},
        {"x-000006.safetensors", "x-000008.safetensors"},
    ]
    assert seen[-1] == seen[-2] | {"x.safetensors"}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(0, [60]), (9, [60]), (10, [50, 60]), (19, [50, 60]), (25, [40, 50, 60]), (100, range(10, 70, 10))],
)
def test_files_of_the_last_n_steps_are_kept(tmp_path, keep: int, kept) -> None:
    seen = run(tmp_path, plan(tmp_path, save_every_n_steps=10, save_last_n_steps=keep))
    assert seen[-1] - {"x.safetensors"} == {f"x-step{step:08d}.safetensors" for step in kept}


def test_states_are_kept_as_files_unless_told_otherwise(tmp_path) -> None:
    as_files = plan(save_every_n_epochs=1, save_last_n_epochs=3, save_state=True).after_epoch(5)
    assert as_files.removed == (f"{NAME}-000002.safetensors", f"{NAME}-000002-state")
    fewer = plan(save_every_n_epochs=1, save_last_n_epochs=3, save_last_n_epochs_state=1, save_state=True)
    assert fewer.after_epoch(5).removed == (f"{NAME}-000002.safetensors", f"{NAME}-000004-state")
    only_states = plan(save_every_n_steps=10, save_last_n_steps_state=10, save_state=True)
    assert only_states.after_step(50).removed == (f"{NAME}-step00000030-state",)
    seen = run(tmp_path, replace(only_states, flags=replace(only_states.flags, output_dir=str(tmp_path))))
    assert {name for name in seen[-1] if name.endswith("-state")} == {
        *("x-state", "x-step00000050-state", "x-step00000060-state")
    }


def test_states_are_left_alone_where_none_are_saved() -> None:
    assert plan(save_every_n_epochs=1, save_last_n_epochs=1).after_epoch(3).removed == (f"{NAME}-000002.safetensors",)
    assert plan(save_every_n_steps=1, save_last_n_steps=1).after_step(3).removed == (
        f"{NAME}-step00000001.safetensors",
    )


def test_nothing_is_removed_before_the_new_file_and_state_are_there(tmp_path) -> None:
    each = plan(tmp_path, save_every_n_epochs=1, save_last_n_epochs=1, save_state=True)
    writer = CheckpointWriter(tmp_path)
    assert writer.write(each.after_epoch(1), write_file, write_state)

    def look(path: Path) -> None:
        assert (tmp_path / f"{NAME}-000001.safetensors").exists() and (tmp_path / f"{NAME}-000001-state").exists()
        write_state(path)

    assert writer.write(each.after_epoch(2), write_file, look)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"{NAME}-000002-state", f"{NAME}-000002.safetensors"]


def test_a_file_that_cannot_be_removed_is_reported_and_training_goes_on(tmp_path, caplog, monkeypatch) -> None:
    each = plan(tmp_path, save_every_n_epochs=1, save_last_n_epochs=1)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "open elsewhere")

    writer = CheckpointWriter(tmp_path)
    writer.write(each.after_epoch(1), write_file, write_state)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert writer.write(each.after_epoch(2), write_file, write_state)
    assert "-000001.safetensors cannot be removed (open elsewhere)" in caplog.text


def test_files_are_removed_when_their_upload_is_over(tmp_path) -> None:
    events: list[str] = []

    class Uploads:
        def upload(self, path: Path) -> None:
            events.append(f"upload {path.name}")

        def settle(self, path: Path) -> None:
            assert path.exists()
            events.append(f"settle {path.name}")

    each = plan(tmp_path, save_every_n_epochs=1, save_last_n_epochs=1, save_state=True)
    for upload_states in (False, True):
        writer = CheckpointWriter(tmp_path, uploads=Uploads(), upload_states=upload_states)
        for epoch in (1, 2):
            writer.write(each.after_epoch(epoch), write_file, write_state)
    file, state = f"{NAME}-00000{{}}.safetensors", f"{NAME}-00000{{}}-state"
    settled = [f"settle {file.format(1)}", f"settle {state.format(1)}"]
    assert events[:4] == [f"upload {file.format(1)}", f"upload {file.format(2)}", *settled]
    assert events[4:6] == [f"upload {file.format(1)}", f"upload {state.format(1)}"]


# ---- a full disk ----


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, how: str) -> Iterator[str]:
    """No more than a kilobyte can be written to a file; gives what the system calls that."""
    if how == "patched":

        def refuse(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", refuse)
            yield "No space left on device"
        return
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"x.lora_up.weight": torch.full((64, 64), value)}


@pytest.mark.parametrize("how", ["patched", "limited"])
def test_full_disk_is_one_line_and_leaves_the_earlier_files(tmp_path, caplog, monkeypatch, how: str) -> None:
    each = plan(tmp_path, save_every_n_epochs=1, save_last_n_epochs=1)
    writer = CheckpointWriter(tmp_path)
    assert writer.write(each.after_epoch(1), lambda path: write_lora(path, tensors(1), {}), write_state)
    before = (tmp_path / f"{NAME}-000001.safetensors").read_bytes()
    with full_disk(monkeypatch, how) as reason:
        assert not writer.write(each.after_epoch(2), lambda path: write_lora(path, tensors(2), {}), write_state)
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert f"--output_dir: got {reason} at " in record.getMessage() and "\n" not in record.getMessage()
    assert "-000002.safetensors" in record.getMessage() and "training goes on" in record.getMessage()
    assert [entry.name for entry in tmp_path.iterdir()] == [f"{NAME}-000001.safetensors"]
    assert (tmp_path / f"{NAME}-000001.safetensors").read_bytes() == before
    assert writer.write(each.after_epoch(3), lambda path: write_lora(path, tensors(3), {}), write_state)
    assert load_file(tmp_path / f"{NAME}-000003.safetensors")["x.lora_up.weight"][0, 0] == 3


@pytest.mark.parametrize("how", ["patched", "limited"])
def test_full_disk_at_the_last_save_fails_the_run_and_leaves_the_earlier_file(tmp_path, monkeypatch, how: str) -> None:
    save_file(tensors(1), tmp_path / f"{NAME}.safetensors")
    before = (tmp_path / f"{NAME}.safetensors").read_bytes()
    with full_disk(monkeypatch, how) as reason, pytest.raises(UserError) as caught:
        writer = CheckpointWriter(tmp_path)
        writer.write(plan(tmp_path).at_end(), lambda path: write_lora(path, tensors(2), {}), write_state)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [f"{NAME}.safetensors"]
    assert (tmp_path / f"{NAME}.safetensors").read_bytes() == before


def test_a_state_that_fails_removes_neither_file_nor_state(tmp_path) -> None:
    each = plan(tmp_path, save_every_n_epochs=1, save_last_n_epochs=1, save_state=True)
    writer = CheckpointWriter(tmp_path)
    assert writer.write(each.after_epoch(1), write_file, write_state)

    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert not writer.write(each.after_epoch(2), write_file, fail)
    assert (tmp_path / f"{NAME}-000001.safetensors").exists() and (tmp_path / f"{NAME}-000001-state").exists()


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path) -> None:
    def fail(path: Path) -> None:
        raise RuntimeError("a mistake in the code")

    with pytest.raises(RuntimeError, match="a mistake in the code"):
        CheckpointWriter(tmp_path).write(plan(save_every_n_steps=1).after_step(1), fail, write_state)


# ---- room ----


def peak(folder: Path, plan: SavePlan, step: int = 0, *, file_bytes: int, state_bytes: int) -> int:
    """What a run really takes at its fullest, with files that are counted where they are written."""
    sizes = {entry.name: 0 for entry in folder.iterdir()}
    most = 0

    def write(path: Path, size: int) -> None:
        nonlocal most
        most = max(most, sum(sizes.values()) + size)  # old and new lie side by side for a moment
        sizes[path.name] = size if path.name not in sizes else sizes[path.name]
        path.touch() if size == file_bytes else path.mkdir(exist_ok=True)

    writer = CheckpointWriter(folder)
    for save in plan.from_step(step):
        writer.write(save, lambda path: write(path, file_bytes), lambda path: write(path, state_bytes))
        there = {entry.name for entry in folder.iterdir()}
        for gone in sizes.keys() - there:
            del sizes[gone]
    return most


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"save_every_n_steps": 10},
        {"save_every_n_steps": 10, "save_last_n_steps": 15, "save_state": True},
        {"save_every_n_epochs": 1, "save_last_n_epochs": 2, "save_last_n_epochs_state": 1, "save_state": True},
        {"save_every_n_epochs": 2, "save_every_n_steps": 15, "save_last_n_steps": 20, "save_state_on_train_end": True},
    ],
)
def test_needed_room_is_what_the_run_takes_at_its_fullest(tmp_path, flags) -> None:
    each = plan(tmp_path, **flags)
    needed = each.bytes_needed(tmp_path, file_bytes=10, state_bytes=37)
    assert needed == peak(tmp_path, each, file_bytes=10, state_bytes=37)


def test_files_that_are_there_take_no_room_again(tmp_path) -> None:
    each = plan(tmp_path, save_every_n_steps=10)
    run(tmp_path, each)
    assert each.bytes_needed(tmp_path, file_bytes=10, state_bytes=37) == 10  # one file, while it is replaced
    assert each.bytes_needed(tmp_path / "other", file_bytes=10, state_bytes=37) == 7 * 10


def test_too_small_a_disk_is_refused_before_training(tmp_path, monkeypatch) -> None:
    each = plan(tmp_path / "出力" / "new", save_every_n_steps=10)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage._replace(free=7_000_000_000))
    check_room(each, file_bytes=10**9, state_bytes=10**9)
    with pytest.raises(UserError, match=r"--output_dir: got 7.0 GB free in .*出力.*; expected 7.7 GB \(1.1 GB a file"):
        check_room(each, file_bytes=11 * 10**8, state_bytes=10**9)
    assert not (tmp_path / "出力").exists()


# ---- flags ----


@pytest.mark.parametrize("name", ["my_lora", "桜　花見", "v1.0", "name with spaces", "ß-é", "x" * 200, "CONcept"])
def test_plain_names_are_accepted(name: str) -> None:
    check_saving(SavingFlags(output_dir="out", output_name=name))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (None, "--output_name: got nothing"),
        ("", "--output_name: got ''"),
        (" x", "white space"),
        ("a/b", "folders belong into --output_dir"),
        ("a\\b", "folders belong into --output_dir"),
        *((f"a{char}b", f"without {char!r}") for char in '<>:"|?*'),
        ("a\nb", r"without '\\n'"),
        ("nul", "Windows keeps this name"),
        ("COM1.v2", "Windows keeps this name"),
        ("桜" * 67, "got 201 bytes; expected at most 200"),
        ("\udc80", "valid Unicode"),
    ],
)
def test_names_that_fail_on_some_system_are_refused(name: str | None, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint if "\\" in complaint else re.escape(complaint)) as caught:
        check_saving(SavingFlags(output_dir="out", output_name=name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"output_dir": None}, "--output_dir: got nothing"),
        ({"save_every_n_epochs": 0}, "--save_every_n_epochs: got 0; expected 1 or more"),
        ({"save_every_n_steps": -5}, "--save_every_n_steps: got -5; expected 1 or more"),
        ({"save_last_n_epochs": 0}, "--save_last_n_epochs: got 0; expected 1 or more"),
        ({"save_last_n_epochs_state": 0}, "--save_last_n_epochs_state: got 0"),
        ({"save_last_n_steps": -1}, "--save_last_n_steps: got -1; expected 0 or more"),
        ({"save_last_n_steps_state": -1}, "--save_last_n_steps_state: got -1"),
        ({"resume_from_huggingface": True}, "--resume_from_huggingface: got --resume left out"),
        ({"resume_from_huggingface": True, "resume": "auto"}, "--resume_from_huggingface: got --resume auto"),
        ({"resume_from_huggingface": True, "resume": "user/repo"}, "--resume: got user/repo; expected user/repo/path"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        check_saving(SavingFlags(**{"output_dir": "out", "output_name": "x"} | flags))
    assert str(caught.value).startswith(complaint)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [(None, "float32"), ("float", "float32"), ("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")],
)
def test_precision_names_a_type_of_torch(precision, dtype: str) -> None:
    assert SavingFlags(save_precision=precision).dtype_name == dtype
    assert isinstance(getattr(torch, dtype), torch.dtype)


def test_a_save_without_state_writes_and_removes_files_only() -> None:
    assert Save(name="a", has_state=False, outdated="b").written == ("a.safetensors",)
    assert Save(name="a", has_state=False, outdated="b").removed == ("b.safetensors",)
