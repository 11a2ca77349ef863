"""What many tests share. torch is imported by the tests that need it, never here while tests are collected."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# All of these must be set before the libraries that read them are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from demo.material import Material
    from demo.models import ModelPaths


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory: pytest.TempPathFactory) -> "ModelPaths":
    """Small checkpoints in the published layouts, as the demo uses them. Not to be changed by a test."""
    from demo.models import build_models

    return build_models(tmp_path_factory.mktemp("demo") / "models")


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> "Material":
    """Real photographs and masks. Not to be changed by a test."""
    from demo.material import write_material

    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def repository() -> Path:
    """The folder that the scripts stand in."""
    return Path(__file__).resolve().parent.parent


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
