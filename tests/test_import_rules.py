"""Who may import whom, read from the source of every file, so that the rooms stay apart."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {"demo_output", "outputs", "build", "dist", "logs", "models", "venv", "node_modules"}

# Every room may also import itself and options.
MAY_IMPORT = {
    "options": set(),
    "common": set(),
    "modules": {"common"},
    "networks": {"modules", "common"},
    "hunyuan_model": {"modules", "common"},
    "dataset": {"common"},
    "generation": {"modules", "common"},
    "frame_pack": {"generation", "networks", "dataset", "modules", "common", "hunyuan_model"},
    "wan": {"generation", "networks", "dataset", "modules", "common"},
    "training": {"generation", "networks", "dataset", "modules", "common"},
}
PRODUCT = set(MAY_IMPORT)
# The tests call the scripts' `main`, so as to see their exit codes without starting a process for each.
MAY_IMPORT |= {
    "demo": set(PRODUCT),
    "benchmarks": PRODUCT | {"demo"},
    "tests": PRODUCT | {"demo", "benchmarks", "scripts", "quickstart"},
    "scripts": set(PRODUCT),
    "quickstart": set(),
}
STANDARD_LIBRARY_ONLY = {"options", "quickstart"}
BEFORE_PARSING = ("options", "common.flags")


def sources(root: Path = ROOT) -> list[Path]:
    """Every Python file of the repository."""
    found = [path.relative_to(root) for path in root.rglob("*.py")]
    return sorted(p for p in found if not any(part.startswith(".") or part in NOT_OURS for part in p.parts))


def room_of(path: Path) -> str:
    """The room a file stands in; top-level files are scripts, but for quickstart."""
    if len(path.parts) > 1:
        return path.parts[0]
    return "quickstart" if path.stem == "quickstart" else "scripts"


def room_of_module(module: str) -> str | None:
    """The room that an imported module belongs to; None for libraries."""
    top = module.split(".")[0]
    if top in MAY_IMPORT:
        return top
    return "scripts" if (ROOT / f"{top}.py").is_file() else None


def imports(node: ast.AST) -> Iterator[str]:
    """The full name of everything that is imported anywhere under `node`."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from (alias.name for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            yield from (f"{'.' * found.level}{found.module or ''}.{alias.name}" for alias in found.names)


def imports_on_loading(node: ast.AST) -> Iterator[str]:
    """What is imported when a file is loaded: everything outside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield from imports(child)
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports_on_loading(child)


def is_standard(module: str) -> bool:
    return module.split(".")[0] in sys.stdlib_module_names


def violations(room: str, source: str) -> list[str]:
    """One line for each import that `room` may not have."""
    tree = ast.parse(source)
    found = [f"{room} imports {name}" for name in imports(tree) if not _is_allowed(room, name)]
    if room == "scripts":
        early = [name for name in imports_on_loading(tree) if not is_standard(name)]
        found += [f"a script imports {name} before parsing" for name in early if not name.startswith(BEFORE_PARSING)]
    return found


def _is_allowed(room: str, module: str) -> bool:
    if module.startswith("."):
        return False
    target = room_of_module(module)
    if target is None:
        return room not in STANDARD_LIBRARY_ONLY or is_standard(module)
    if room == target:
        return room != "scripts"
    return target in MAY_IMPORT[room] or (target == "options" and room != "quickstart")


@pytest.mark.parametrize("path", sources(), ids=str)
def test_every_file_imports_only_what_its_room_may(path: Path) -> None:
    assert violations(room_of(path), (ROOT / path).read_text(encoding="utf-8")) == []


def test_every_folder_with_code_is_a_known_room() -> None:
    assert {room_of(path) for path in sources()} <= set(MAY_IMPORT)


def test_rooms_and_scripts_are_really_found() -> None:
    found = {room_of(path) for path in sources()}
    assert {"options", "common", "modules", "frame_pack", "scripts", "quickstart", "demo", "tests"} <= found


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("options", "import numpy"),
        ("options", "from common.files import atomic_file"),
        ("common", "import modules.attention"),
        ("modules", "def f():\n    from frame_pack import model"),
        ("hunyuan_model", "from frame_pack.rope import Rope"),
        ("frame_pack", "from wan import model"),
        ("wan", "from hunyuan_model.vae import load_vae"),
        ("generation", "import frame_pack.pipeline"),
        ("training", "from frame_pack.model import FramePackTransformer"),
        ("frame_pack", "from . import rope"),
        ("frame_pack", "from demo.models import build_models"),
        ("frame_pack", "import fpack_generate_video"),
        ("scripts", "def f():\n    import fpack_generate_video"),
        ("scripts", "def f():\n    from demo.models import build_models"),
        ("scripts", "import torch"),
        ("scripts", "if True:\n    from common.media import open_image"),
        ("demo", "import fpack_generate_video"),
        ("quickstart", "import torch"),
        ("quickstart", "from options.errors import UserError"),
    ],
)
def test_forbidden_imports_are_noticed(room: str, source: str) -> None:
    assert violations(room, source)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("options", "import json"),
        ("common", "import numpy\nfrom options.errors import UserError"),
        ("frame_pack", "from generation.pipeline import Pipeline\nfrom frame_pack.rope import Rope"),
        ("scripts", "import sys\nfrom common.flags import run_script\ndef f():\n    import torch, common.media"),
        ("tests", "import fpack_generate_video\nfrom demo.models import build_models"),
    ],
)
def test_allowed_imports_are_let_through(room: str, source: str) -> None:
    assert violations(room, source) == []
