"""Atomic files and folders, and the look at an output folder before the work."""

import json
import os
import struct

import pytest

from common import files
from common.files import atomic_file, atomic_folder, check_writable_folder, sort_safetensors_metadata
from options.errors import UserError


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("name", ["plain.txt", "写真 [x].png", "長い名前" * 15 + ".safetensors", "no_suffix"])
def test_atomic_file_appears_under_its_name_only_when_the_block_ends(tmp_path, name):
    path = tmp_path / "new" / "フォルダ" / name
    with atomic_file(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == (path.suffix or ".tmp")
        temporary.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole" and names(path.parent) == [name]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_file(path) as temporary:
        temporary.write_bytes(b"ha")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.txt"]


def test_failing_rename_removes_the_temporary_file(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError("the file is open elsewhere")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(PermissionError), atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_bytes(b"x")
    assert names(tmp_path) == []


def test_contents_are_flushed_before_the_name_changes(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: events.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    with atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_bytes(b"x")
    with atomic_folder(tmp_path / "state") as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "b.txt").write_bytes(b"x")
    assert events == ["fsync", "rename"] * 2


def test_atomic_folder_replaces_a_folder_that_is_there(tmp_path):
    path = tmp_path / "状態 [1]"
    for content in ("first", "second"):
        with atomic_folder(path) as temporary:
            (temporary / f"{content}.txt").write_text(content, encoding="utf-8")
    assert names(tmp_path) == ["状態 [1]"] and names(path) == ["second.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failing_writer_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    path = tmp_path / "state"
    path.mkdir()
    (path / "old.txt").write_bytes(b"old")
    with pytest.raises(error), atomic_folder(path) as temporary:
        (temporary / "half.txt").write_bytes(b"ha")
        raise error
    assert names(tmp_path) == ["state"] and names(path) == ["old.txt"]


def test_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    path = tmp_path / "state"
    path.mkdir()
    (path / "old.txt").write_bytes(b"old")
    replace, calls = os.replace, []

    def refuse_second(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise PermissionError("refused")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refuse_second)
    with pytest.raises(PermissionError), atomic_folder(path) as temporary:
        (temporary / "new.txt").write_bytes(b"new")
    assert names(tmp_path) == ["state"] and names(path) == ["old.txt"]


def test_output_folder_that_exists_or_can_be_made_passes_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path, tmp_path / "出力 [x]" / "deep", "relative/folder", "."):
        check_writable_folder(path, flag="--save_path")
    assert names(tmp_path) == []


@pytest.mark.parametrize("below", ["", "deep", "deep/er"])
def test_file_in_the_place_of_an_output_folder_is_refused(tmp_path, below):
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(UserError, match=r"--save_path: got .*out.*; expected a folder .*; .*out is not a folder"):
        check_writable_folder(tmp_path / "out" / below, flag="--save_path")


def test_read_only_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match="read-only"):
        check_writable_folder(tmp_path / "new", flag="--save_path")
    assert names(tmp_path) == []


def test_impossible_folder_name_is_refused(tmp_path):
    with pytest.raises(UserError, match="--save_path: got "):
        check_writable_folder(tmp_path / ("x" * 5000), flag="--save_path")


def test_metadata_of_a_safetensors_file_is_sorted_and_its_tensors_stay(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    metadata = {"zeta": '引用 "q" \\ / \n\t\x01\x7f é', "prompt": "猫", "a": "", "日本": "x", "m": "y", "b": "z"}
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "v": torch.ones(1)}
    contents = set()
    for number in range(4):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, metadata=dict(reversed(metadata.items())) if number % 2 else metadata)
        sort_safetensors_metadata(path)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert all(torch.equal(load_file(path)[key], tensors[key]) for key in tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata
    content = contents.pop()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert list(header["__metadata__"]) == sorted(metadata)


def test_safetensors_file_without_metadata_stays_as_it_is(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    path = tmp_path / "plain.safetensors"
    save_file({"w": torch.ones(2)}, path)
    before = path.read_bytes()
    sort_safetensors_metadata(path)
    assert path.read_bytes() == before


def test_a_result_is_as_readable_as_any_new_file(tmp_path):
    """Some writers, safetensors for one, make files that only their owner may read."""
    (tmp_path / "plain").touch()
    with atomic_file(tmp_path / "result") as temporary:
        temporary.touch(mode=0o600)
    assert (tmp_path / "result").stat().st_mode == (tmp_path / "plain").stat().st_mode
