"""The demo's jobs, and the documents that show its pictures: every command in them is one that the script accepts."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

import fpack_generate_video
from demo.material import Material
from demo.models import ModelPaths
from demo.run import MARGIN, heading, lines, save_sheets, sweep_arguments, tiled

DOCUMENT = Path(__file__).parent.parent / "docs" / "one_frame.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [text.replace("\\\n", " ") for kind, text in BLOCKS if kind == "bash" and text.startswith("python")]
PICTURES = [DOCUMENT.parent / name for name in re.findall(r"pictures/[\w-]+\.png", TEXT)]


@pytest.fixture
def check(demo_models: ModelPaths, tmp_path: Path):
    """Runs the script up to the point where models would be loaded."""
    models = [text for name, path in vars(demo_models).items() for text in (f"--{name}", str(path))]

    def run(*arguments: str) -> int:
        return fpack_generate_video.main([*models, *arguments, "--check", "--save_path", str(tmp_path / "out")])

    return run


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_every_command_of_the_document_passes_all_checks(
    number: int, check, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, script, models, *arguments = shlex.split(COMMANDS[number])
    assert (program, script, models) == ("python", "fpack_generate_video.py", "${models[@]}")
    (prompts,) = (text for kind, text in BLOCKS if kind == "text")
    (tmp_path / "prompts.txt").write_text(prompts, encoding="utf-8")
    for name in re.findall(r"\b\w+\.png\b", COMMANDS[number] + prompts):
        shutil.copyfile(material.astronaut_mask if "mask" in name else material.astronaut, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert check(*arguments) == 0


def test_the_demos_own_jobs_pass_all_checks(check, material: Material, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{line}\n" for line in lines(material)), encoding="utf-8")
    assert check("--from_file", str(prompts)) == 0
    assert check(*sweep_arguments(material)) == 0


def test_the_documents_pictures_are_there_and_small_and_no_others() -> None:
    assert set(PICTURES) == set((DOCUMENT.parent / "pictures").iterdir())
    sizes = [path.stat().st_size for path in PICTURES]
    assert max(sizes) < 250_000 and sum(sizes) < 1_000_000


def test_links_of_the_document_lead_to_its_headings() -> None:
    titles = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def test_tiled_sheets_share_margins_and_keep_their_pixels() -> None:
    wide, narrow = Image.new("RGB", (100, 20), "red"), Image.new("RGB", (40, 30), "blue")
    whole = tiled([[narrow, narrow], [wide]])
    assert whole.size == (100, 50)
    assert whole.getpixel((40 - MARGIN, 0)) == (0, 0, 255) and whole.getpixel((50, 30)) == (255, 0, 0)
    assert heading(1340).width == 1340


def test_saved_sheets_have_few_colours(tmp_path: Path) -> None:
    (path,) = save_sheets({"a": Image.radial_gradient("L").convert("RGB")}, tmp_path)
    assert path.name == "a.png" and Image.open(path).mode == "P"
