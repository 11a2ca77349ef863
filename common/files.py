"""Files that are there whole or not at all, and the look at an output folder before any work is done."""

import json
import os
import secrets
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from options.errors import UserError


def _new_file_mode() -> int:
    """What the system gives to new files; it can only be asked by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


NEW_FILE_MODE = _new_file_mode()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path` (made if need be) that becomes `path` when the block ends well.

    The writer must have closed the file by then. Whatever leaves the block early, Ctrl-C too, removes the temporary
    file; a file that was at `path` before stays until the moment of the renaming.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    try:
        yield temporary
        flush_to_disk(temporary)
        # Some writers make files that nobody else may read; a result shall be as readable as any new file.
        temporary.chmod(NEW_FILE_MODE)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """The same for a folder: an empty temporary one, which takes the place of `path` when the block ends well."""
    path = Path(path)
    temporary = _temporary_beside(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                flush_to_disk(file)
        _replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary_beside(path: Path) -> Path:
    """A free name beside `path` with its suffix, by which writers choose a format, and not too long for any disk."""
    return path.with_name(f".{path.stem[:32]}.{secrets.token_hex(4)}.tmp{path.suffix}")


def flush_to_disk(file: Path) -> None:
    # Renaming may reach the disk before the contents do: a power cut would leave an empty file under the final name.
    with file.open("r+b") as stream:
        os.fsync(stream.fileno())


def _replace_folder(new: Path, path: Path) -> None:
    """Renames `new` to `path`; a folder that is there steps aside first, as no system replaces one with contents."""
    if not path.is_dir():
        os.replace(new, path)
        return
    old = _temporary_beside(path)
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def existing_file(path: str | Path, *, flag: str, expected: str) -> Path:
    """`path` if it is a file.

    Asked through `os.path`, which answers for impossible names too: a prompt pasted behind a path's flag is no crash.

    Raises:
        UserError: it is a folder, or nothing.
    """
    if not os.path.isfile(path):
        remedy = "it is a folder: give the file" if os.path.isdir(path) else "there is no such file"
        raise UserError(flag, path, expected, remedy)
    return Path(path)


def check_writable_folder(path: str | Path, *, flag: str) -> None:
    """Makes sure that `path` is a folder to write in, or that it can be made; makes nothing itself.

    Raises:
        UserError: a file is in the place of the folder or of a parent, the name is impossible, or writing is forbidden.
    """
    folder = Path(path).absolute()
    expected = "a folder that can be written to"
    try:
        nearest = next(place for place in (folder, *folder.parents) if place.exists() or place.is_symlink())
    except (OSError, StopIteration) as error:
        reason = getattr(error, "strerror", None) or "no such drive"
        raise UserError(flag, path, expected, f"give another folder ({reason})") from error
    if not nearest.is_dir():
        raise UserError(flag, path, expected, f"{nearest} is not a folder: give another one")
    if not _can_write_in(nearest):
        raise UserError(flag, path, expected, f"{nearest} is read-only: give another folder or change its permissions")


def _can_write_in(folder: Path) -> bool:
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    try:  # Windows' access lists, network shares and special file systems: only trying tells.
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def sort_safetensors_metadata(path: str | Path) -> None:
    """Puts the metadata of a safetensors file in alphabetical order, in place.

    The library writes it in an order that differs from run to run; the same command shall give the same bytes.
    """
    with Path(path).open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise ValueError(f"{path}: the sorted header needs {len(text)} bytes, there are {length}")
        stream.seek(8)
        stream.write(text.ljust(length))
