"""What many tests share. torch is imported by the tests that need it, never here while tests are collected."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# All of these must be set before the libraries that read them are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from torch import Tensor

    from demo.material import Material
    from demo.models import ModelPaths
    from demo.wan_models import WanModelPaths
    from tests.training_driver import Workshop
    from tests.wan_encoders import WanEncoders


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory: pytest.TempPathFactory) -> "ModelPaths":
    """Small checkpoints in the published layouts, as the demo uses them. Not to be changed by a test."""
    from demo.models import build_models

    return build_models(tmp_path_factory.mktemp("demo") / "models")


@pytest.fixture(scope="session")
def wan_encoders(tmp_path_factory: pytest.TempPathFactory) -> "WanEncoders":
    """Small encoders for Wan's caches. Not to be changed by a test."""
    from tests.wan_encoders import write_encoders

    return write_encoders(tmp_path_factory.mktemp("符号器"))


@pytest.fixture(scope="session")
def wan_models(tmp_path_factory: pytest.TempPathFactory) -> "WanModelPaths":
    """Small checkpoints of Wan; `for_kind` adds transformers. Files that are there are not to be changed by a test."""
    from demo.wan_models import build_wan_models

    return build_wan_models(tmp_path_factory.mktemp("wan") / "モデル")


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> "Material":
    """Real photographs and masks. Not to be changed by a test."""
    from demo.material import write_material

    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> "Workshop":
    """What training runs need: a small transformer and a data set with caches. Not to be changed by a test."""
    from tests.training_driver import write_workshop

    return write_workshop(tmp_path_factory.mktemp("学習"))


@pytest.fixture(scope="session")
def undisturbed(workshop: "Workshop", tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run of `HARD` ends with where runs are repeatable."""
    from tests.training_driver import HARD, final_file, repeatable, train

    command = workshop.command(tmp_path_factory.mktemp("undisturbed"), **HARD)
    with repeatable():
        assert train(command) == 0
    return final_file(command).read_bytes()


@pytest.fixture
def run(workshop: "Workshop", tmp_path: Path) -> Callable[..., "dict[str, Tensor]"]:
    """Trains into a new folder; returns what the file holds."""
    from tests.training_driver import trained

    return lambda name="出力 [1]", **changes: trained(workshop.command(tmp_path / name, **changes))


@pytest.fixture(scope="module")
def repeatable_runs() -> Iterator[None]:
    """Equal training runs give equal bytes in a module that uses this."""
    from tests.training_driver import repeatable

    with repeatable():
        yield


@pytest.fixture
def repository() -> Path:
    """The folder that the scripts stand in."""
    return Path(__file__).resolve().parent.parent


NEW_MODULES = 100
_num_modules = 0


@pytest.fixture(autouse=True)
def libraries_out_of_sight() -> None:
    """Spares the garbage collector the objects of imported libraries, a million of them.

    Whenever a model is freed it is asked to look at everything, which would take most of the time of many tests.
    """
    global _num_modules
    if len(sys.modules) >= _num_modules + NEW_MODULES:
        _num_modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test starts with the same state of torch's generator, whatever ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def encoded_videos(monkeypatch: pytest.MonkeyPatch) -> "list[tuple[bytes, float, str | None]]":
    """What every saved video was made of: frames, rate and comment, in order.

    For equal input x264 gives equal bytes, but not always: of a thousand noisy 64x64 clips a few differ by some bytes.
    So tests of repetition compare what the encoder is given.
    """
    import hashlib

    import generation.outputs

    seen: list[tuple[bytes, float, str | None]] = []
    original = generation.outputs.write_video

    def write_video(path, frames, *, fps, comment=None) -> None:
        seen.append((hashlib.sha256(frames.tobytes()).digest(), fps, comment))
        original(path, frames, fps=fps, comment=comment)

    monkeypatch.setattr(generation.outputs, "write_video", write_video)
    return seen
