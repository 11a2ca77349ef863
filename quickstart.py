"""Sets up everything that oneframe-tuner needs and runs it, on Linux, macOS and Windows.

    python quickstart.py demo                 makes pictures and videos with small models and trains a LoRA, on the CPU
    python quickstart.py test [pytest args]   checks the code's style and runs the whole test suite

Both work in a `.venv` beside this file, which the first run makes and later runs reuse.
With an NVIDIA GPU, add `--torch-index URL` to install torch's CUDA build from that package index.
Only the standard library is used here, and only syntax that old versions of Python can read.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
MINIMUM_PYTHON = (3, 11)
EXTRAS = ("demo", "dev")
INPUTS = ("pyproject.toml", "constraints.txt", "requirements-no-deps.txt")
ORIGIN_NAME = "quickstart-origin.txt"
STAMP_NAME = "quickstart-stamp.txt"

# Exits with 1 when a package is not exactly as its installer recorded it, which is what an interrupted pip leaves.
SOUNDNESS_CHECK = """
import importlib.metadata, pip
for package in importlib.metadata.distributions():
    if package.files is None:
        raise SystemExit(1)
    for file in package.files:
        path = file.locate()
        if not path.exists() or file.size not in (None, path.stat().st_size):
            raise SystemExit(1)
"""


class SetupError(Exception):
    """The environment cannot be made; the message is one line for the user."""


def version_problem(version: tuple) -> str:
    """One line that says why this Python cannot be used; empty when it can."""
    if tuple(version[:2]) >= MINIMUM_PYTHON:
        return ""
    wanted, found = (".".join(str(part) for part in parts[:2]) for parts in (MINIMUM_PYTHON, version))
    return f"quickstart.py: got Python {found}; expected {wanted} or newer; run it with a newer Python (python.org)"


def torch_requirement(constraints: str) -> str:
    """The exact pin of torch in the text of constraints.txt, e.g. `torch==2.13.0`."""
    match = re.search(r"^torch==\S+", constraints, flags=re.MULTILINE)
    if match is None:
        raise SetupError("constraints.txt: got no line torch==VERSION; expected the exact pin; restore the file")
    return match.group()


def requirements(project: str, extras: tuple) -> list:
    """The dependencies in the text of pyproject.toml together with those of the extras, each once."""
    import tomllib

    table = tomllib.loads(project)["project"]
    groups = [table["dependencies"], *(table["optional-dependencies"][extra] for extra in extras)]
    return list(dict.fromkeys(name for group in groups for name in group))


def origin(root: Path, torch_index: str) -> str:
    """What an existing environment must have been made for to be built upon: this Python, torch from this index."""
    torch = torch_requirement((root / "constraints.txt").read_text(encoding="utf-8"))
    return f"python {sys.version_info[0]}.{sys.version_info[1]} {torch} {torch_index or 'default index'}"


def fingerprint(root: Path, torch_index: str) -> str:
    """A hash over everything that decides what gets installed."""
    digest = hashlib.sha256(" ".join([origin(root, torch_index), *EXTRAS]).encode())
    for name in INPUTS:
        digest.update((root / name).read_text(encoding="utf-8").encode())
    return digest.hexdigest()


def pip_installs(root: Path, torch_index: str) -> list:
    """The arguments of each `pip install`, in order.

    torch goes first and by its exact pin: whatever depends on it then finds it and never chooses another build.
    From an index of its own it comes without our constraints, because that index holds only torch's dependencies in
    versions of its own; the second step puts those right.
    """
    constraints = ["-c", str(root / "constraints.txt")]
    torch = [torch_requirement((root / "constraints.txt").read_text(encoding="utf-8"))]
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    return [
        torch + (["--index-url", torch_index] if torch_index else constraints),
        requirements(project, EXTRAS) + constraints,
        ["--no-deps", "-r", str(root / "requirements-no-deps.txt")],
    ]


def python_of(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def read_if_there(path: Path) -> str:
    """The text of a file, empty when it does not exist."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def is_ready(environment: Path, wanted: str) -> bool:
    """Whether an earlier run finished exactly this environment."""
    return python_of(environment).is_file() and read_if_there(environment / STAMP_NAME) == wanted


def is_sound(environment: Path) -> bool:
    """Whether the environment runs and every package in it is complete."""
    python = python_of(environment)
    return python.is_file() and subprocess.run([str(python), "-I", "-c", SOUNDNESS_CHECK], check=False).returncode == 0


def make_environment(environment: Path, made_for: str) -> None:
    """Makes an empty environment, in place of an older one that quickstart made.

    Raises:
        SetupError: there is something else in that place, or this Python cannot make environments.
    """
    if environment.exists() and not (environment / ORIGIN_NAME).is_file():
        raise SetupError(f"{environment}: got a folder that quickstart did not make; expected none; move it away")
    shutil.rmtree(environment, ignore_errors=True)
    environment.mkdir(exist_ok=True)
    # Written before anything else, so that what an interrupted run leaves behind is known as ours.
    (environment / ORIGIN_NAME).write_text(made_for, encoding="utf-8")
    try:
        venv.EnvBuilder(with_pip=True, symlinks=os.name != "nt").create(environment)
    except subprocess.CalledProcessError as error:
        remedy = "on Debian and Ubuntu: apt install python3-venv"
        raise SetupError(f"{sys.executable}: got no working venv and pip; expected both; {remedy}") from error


def ensure_environment(environment: Path, root: Path, torch_index: str) -> Path:
    """Makes or completes the environment when needed and returns its interpreter."""
    wanted, made_for = fingerprint(root, torch_index), origin(root, torch_index)
    if is_ready(environment, wanted):
        return python_of(environment)
    if read_if_there(environment / ORIGIN_NAME) != made_for or not is_sound(environment):
        print(f"Making {environment} ...", flush=True)
        make_environment(environment, made_for)
    (environment / STAMP_NAME).unlink(missing_ok=True)
    for arguments in pip_installs(root, torch_index):
        command = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
        if run(python_of(environment), command, root) != 0:
            raise SetupError("pip: got an error (above); expected an install; put it right and run this command again")
    (environment / STAMP_NAME).write_text(wanted, encoding="utf-8")
    return python_of(environment)


def run(python: Path, arguments: list, root: Path) -> int:
    """Runs the environment's Python in the repository root, in UTF-8 and without looking for models on a hub."""
    # Threads that wait actively make torch many times slower as soon as anything else wants a core.
    settings = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([str(python), *arguments], cwd=root, env=settings, check=False).returncode


def run_demo(python: Path) -> int:
    """Builds the small models and generates with them."""
    return run(python, ["-m", "demo.run"], ROOT)


def run_tests(python: Path, pytest_arguments: list) -> int:
    """Lints, then tests; both run in any case, and the first failure decides the exit code."""
    lint = run(python, ["-m", "ruff", "check", "."], ROOT)
    tests = run(python, ["-m", "pytest", "-q", *pytest_arguments], ROOT)
    return lint or tests


def main(arguments: list) -> int:
    """Parses the command line and runs one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("demo", "test"))
    parser.add_argument("--torch-index", default="", metavar="URL", help="package index with the wanted build of torch")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "test":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        python = ensure_environment(ROOT / ".venv", ROOT, options.torch_index)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    return run_demo(python) if options.command == "demo" else run_tests(python, rest)


if __name__ == "__main__":
    problem = version_problem(sys.version_info)
    if problem:
        sys.exit(problem)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
