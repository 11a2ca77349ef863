"""The set-up: what it installs and in which order, when it reuses and when it starts anew."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import quickstart

ROOT = Path(quickstart.__file__).parent
# torch's CUDA builds name these themselves, each by its exact version.
PINNED_BY_TORCH = re.compile(r"(nvidia|cuda|triton|pytorch-triton)\b")


def test_an_old_python_can_read_the_file_and_gets_one_line() -> None:
    ast.parse((ROOT / "quickstart.py").read_text(encoding="utf-8"), feature_version=(3, 7))
    problem = quickstart.version_problem((3, 10, 4))
    assert "3.10" in problem and "3.11" in problem and "\n" not in problem


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 14, 1), (4, 0)])
def test_newer_pythons_are_accepted(version: tuple[int, ...]) -> None:
    assert quickstart.version_problem(version) == ""


def test_torch_is_installed_first_and_by_its_exact_pin() -> None:
    first, *others = quickstart.pip_installs(ROOT, "")
    assert first[0] == quickstart.torch_requirement((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", first[0])
    assert first[1:] == others[0][-2:] == ["-c", str(ROOT / "constraints.txt")]


def test_a_torch_index_serves_torch_alone_and_constraints_do_not_fight_it() -> None:
    first, second, _ = quickstart.pip_installs(ROOT, "https://example.org/cu130")
    assert first[1:] == ["--index-url", "https://example.org/cu130"]
    assert "--index-url" not in second and "-c" in second
    pin = Requirement(first[0])
    assert pin.specifier.contains(f"{first[0].removeprefix('torch==')}+cu130")


def test_a_missing_pin_of_torch_is_an_error() -> None:
    with pytest.raises(quickstart.SetupError, match="torch=="):
        quickstart.torch_requirement("torchvision==1.0\nnumpy==2.0\n")


def test_neither_torchvision_nor_opencv_is_needed_at_run_time() -> None:
    names = quickstart.requirements((ROOT / "pyproject.toml").read_text(encoding="utf-8"), ())
    assert not [name for name in names if "torchvision" in name or "opencv" in name]


def test_every_package_that_gets_installed_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if not line.startswith("#")}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pending = [Requirement(text) for text in quickstart.requirements(project, ("demo", "dev"))]
    needed = set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in needed or PINNED_BY_TORCH.match(name):
            continue
        needed.add(name)
        below = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        pending += [need for need in below if _applies(need, requirement.extras)]
    assert needed - pinned == set()


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


class Installer:
    """Stands in for pip and venv, and writes down what was asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fails_at = ""
        self.sound = True
        self.make = quickstart.make_environment
        monkeypatch.setattr(quickstart, "run", self.run)
        monkeypatch.setattr(quickstart, "is_sound", lambda environment: self.sound)
        monkeypatch.setattr(quickstart.venv, "EnvBuilder", lambda **options: self)

    def create(self, environment: Path) -> None:
        self.calls.append("create")
        python = quickstart.python_of(environment)
        python.parent.mkdir()
        python.touch()

    def run(self, python: Path, arguments: list[str], root: Path) -> int:
        step = "no-deps" if "--no-deps" in arguments else "torch" if arguments[5].startswith("torch==") else "rest"
        self.calls.append(step)
        return 1 if step == self.fails_at else 0

    def calls_of(self, folder: Path, torch_index: str = "") -> list[str]:
        self.calls.clear()
        quickstart.ensure_environment(folder / ".venv", folder, torch_index)
        return list(self.calls)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in quickstart.INPUTS:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


@pytest.fixture
def installer(monkeypatch: pytest.MonkeyPatch) -> Installer:
    return Installer(monkeypatch)


def test_the_first_run_installs_and_the_second_reuses(installer: Installer, folder: Path) -> None:
    assert installer.calls_of(folder) == ["create", "torch", "rest", "no-deps"]
    assert installer.calls_of(folder) == []


@pytest.mark.parametrize("name", quickstart.INPUTS)
def test_a_changed_input_installs_again_into_the_same_environment(
    installer: Installer, folder: Path, name: str
) -> None:
    installer.calls_of(folder)
    with (folder / name).open("a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    assert installer.calls_of(folder) == ["torch", "rest", "no-deps"]


@pytest.mark.parametrize("step", ["torch", "rest", "no-deps"])
def test_an_interrupted_install_is_resumed(installer: Installer, folder: Path, step: str) -> None:
    installer.fails_at = step
    with pytest.raises(quickstart.SetupError):
        installer.calls_of(folder)
    installer.fails_at = ""
    assert installer.calls_of(folder) == ["torch", "rest", "no-deps"]
    assert installer.calls_of(folder) == []


def test_a_failed_update_does_not_leave_the_stamp_of_before(installer: Installer, folder: Path) -> None:
    installer.calls_of(folder)
    before = (folder / "constraints.txt").read_bytes()
    (folder / "constraints.txt").write_bytes(before + b"# changed\n")
    installer.fails_at = "rest"
    with pytest.raises(quickstart.SetupError):
        installer.calls_of(folder)
    (folder / "constraints.txt").write_bytes(before)
    installer.fails_at = ""
    assert installer.calls_of(folder) == ["torch", "rest", "no-deps"]


def test_a_damaged_environment_is_made_anew(installer: Installer, folder: Path) -> None:
    installer.fails_at = "rest"
    with pytest.raises(quickstart.SetupError):
        installer.calls_of(folder)
    installer.fails_at, installer.sound = "", False
    assert installer.calls_of(folder) == ["create", "torch", "rest", "no-deps"]


def test_another_torch_index_makes_the_environment_anew(installer: Installer, folder: Path) -> None:
    installer.calls_of(folder)
    index = "https://example.org/cu130"
    assert installer.calls_of(folder, index) == ["create", "torch", "rest", "no-deps"]
    assert installer.calls_of(folder, index) == []


def test_an_environment_that_someone_else_made_is_left_alone(installer: Installer, folder: Path) -> None:
    (folder / ".venv").mkdir()
    (folder / ".venv" / "precious.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(quickstart.SetupError, match="did not make"):
        installer.calls_of(folder)
    assert (folder / ".venv" / "precious.txt").read_text(encoding="utf-8") == "mine"


def test_a_half_written_package_is_noticed(tmp_path: Path) -> None:
    venv.EnvBuilder(with_pip=False, symlinks=sys.platform != "win32").create(tmp_path)
    library = next(tmp_path.rglob("site-packages"))
    (library / "pip").mkdir()
    (library / "pip" / "__init__.py").write_text("A = 1\n", encoding="utf-8", newline="\n")
    information = library / "pip-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: pip\nVersion: 1.0\n", encoding="utf-8")
    assert not quickstart.is_sound(tmp_path)
    (information / "RECORD").write_text("pip/__init__.py,,6\npip-1.0.dist-info/RECORD,,\n", encoding="utf-8")
    assert quickstart.is_sound(tmp_path)
    (library / "pip" / "__init__.py").write_text("", encoding="utf-8")
    assert not quickstart.is_sound(tmp_path)


@pytest.mark.parametrize(("lint", "tests", "expected"), [(0, 0, 0), (1, 0, 1), (0, 5, 5), (2, 1, 2)])
def test_the_exit_code_is_that_of_the_first_failure_and_both_run(
    monkeypatch: pytest.MonkeyPatch, lint: int, tests: int, expected: int
) -> None:
    ran = []

    def run(python: Path, arguments: list[str], root: Path) -> int:
        ran.append(arguments[1])
        return lint if arguments[1] == "ruff" else tests

    monkeypatch.setattr(quickstart, "run", run)
    assert quickstart.run_tests(Path("python"), ["-k", "x"]) == expected
    assert ran == ["ruff", "pytest"]


def test_arguments_for_pytest_are_passed_on_and_a_mark_asked_for_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = []
    monkeypatch.setattr(quickstart, "ensure_environment", lambda *given: Path(sys.executable))
    monkeypatch.setattr(quickstart, "run", lambda python, arguments, root: ran.append(arguments) or 0)
    assert quickstart.main(["test", "-m", "long"]) == 0 == quickstart.main(["test"])
    (tmp_path / "test_two.py").write_text(
        "import pytest\n@pytest.mark.long\ndef test_slow(): pass\ndef test_fast(): pass\n", encoding="utf-8"
    )
    given = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "--collect-only", str(tmp_path)]
    for arguments, collected in ((ran[1], "test_slow"), (ran[3], "test_fast")):
        command = [sys.executable, *arguments, *given, "-p", "no:cacheprovider"]
        out = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=True).stdout
        assert re.findall(r"::(test_\w+)", out) == [collected]
