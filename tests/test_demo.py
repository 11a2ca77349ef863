"""The demo's jobs, and the documents that show its pictures: every command in them is one that the scripts accept."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fpack_cache_latents
import fpack_cache_text_encoder_outputs
import fpack_generate_video
from common.flags import parse
from dataset.config import load_dataset_config
from dataset.sources import list_items
from demo.data_set import DataSet, caching_commands, write_data_set
from demo.loras import write_colour_lora
from demo.material import Material
from demo.models import ModelPaths
from demo.run import MARGIN, heading, lines, lora_arguments, save_sheets, sweep_arguments, tiled
from demo.training import NUM_CROPS, training_commands, write_disc
from options.flags_fpack_cache import FramePackCacheLatentsFlags, FramePackCacheTextsFlags
from options.flags_fpack_train import FramePackTrainFlags, check_framepack_train

DOCUMENT = Path(__file__).parent.parent / "docs" / "one_frame.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [text.replace("\\\n", " ") for kind, text in BLOCKS if kind == "bash" and text.startswith("python")]
GUIDE = DOCUMENT.parent / "dataset.md"
GUIDE_TEXT = GUIDE.read_text(encoding="utf-8")
CACHING_COMMANDS = re.findall(r"^python (fpack_cache_\w+\.py.*)$", GUIDE_TEXT.replace("\\\n", " "), re.MULTILINE)
LORA_TEXT = (DOCUMENT.parent / "lora.md").read_text(encoding="utf-8")
TRAINING_TEXT = (DOCUMENT.parent / "training.md").read_text(encoding="utf-8")
ALL_TEXTS = TEXT + GUIDE_TEXT + LORA_TEXT + TRAINING_TEXT
PICTURES = [DOCUMENT.parent / name for name in re.findall(r"pictures/[\w-]+\.png", ALL_TEXTS)]
SCRIPTS = {
    "fpack_cache_latents.py": (fpack_cache_latents, FramePackCacheLatentsFlags),
    "fpack_cache_text_encoder_outputs.py": (fpack_cache_text_encoder_outputs, FramePackCacheTextsFlags),
}


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
    assert check(*lora_arguments(material, write_colour_lora(tmp_path / "色.safetensors"))) == 0


def test_the_demos_training_is_understood_and_its_data_set_holds_the_rule(
    demo_models: ModelPaths, material: Material, tmp_path: Path
) -> None:
    disc = write_disc(tmp_path / "訓練", material)
    classes = (FramePackCacheLatentsFlags, FramePackCacheTextsFlags, FramePackTrainFlags)
    commands = training_commands(demo_models, disc)
    flags = [parse(known, description="", argv=argv[1:]) for known, argv in zip(classes, commands, strict=True)]
    check_framepack_train(flags[2])
    (dataset,) = load_dataset_config(disc.config).datasets
    items = list_items(dataset).items
    assert len(items) == 2 * NUM_CROPS and all(len(item.control_paths) == 1 for item in items)
    targets = {Path(item.path).read_bytes() for item in items}
    controls = {Path(item.control_paths[0]).read_bytes() for item in items}
    assert len(targets) == 1 and len(controls) == len(items), "every control image becomes the same disc"
    assert disc.lora == Path(flags[2].saving.output_dir) / f"{flags[2].saving.output_name}.safetensors"


@pytest.mark.parametrize("command", CACHING_COMMANDS)
def test_every_caching_command_of_the_guide_is_understood(command: str) -> None:
    script, *arguments = shlex.split(command)
    parse(SCRIPTS[script][1], description="", argv=arguments)


def test_the_guide_has_a_caching_command_for_each_kind() -> None:
    latents = [command for command in CACHING_COMMANDS if command.startswith("fpack_cache_latents.py")]
    assert {("--one_frame" in text, "--f1" in text) for text in latents} == {
        (True, False),
        (False, False),
        (False, True),
    }
    assert len(latents) < len(CACHING_COMMANDS)


@pytest.fixture
def data_set(material: Material, tmp_path: Path) -> DataSet:
    return write_data_set(tmp_path / "データ", material)


def test_the_demos_data_set_is_cached_and_previewed(demo_models: ModelPaths, data_set: DataSet) -> None:
    for script, *arguments in caching_commands(demo_models, data_set):
        assert SCRIPTS[script][0].main(arguments) == 0
    names = {path.name for folder in ("cache", "cache_videos") for path in (data_set.folder / folder).iterdir()}
    assert names == {
        *("astronaut_0384x0384_fp.safetensors", "cat_0480x0320_fp.safetensors"),
        *("astronaut_fp_te.safetensors", "cat_fp_te.safetensors"),
        *("bikes_00000-037-0000_0192x0080_fp.safetensors", "bikes_fp_te.safetensors"),
    }
    for path in data_set.previews:
        assert Image.open(path).width > 500


def test_the_demos_results_are_what_their_masks_leave_of_the_controls(data_set: DataSet) -> None:
    for stem in ("astronaut", "cat"):
        controls = [np.asarray(Image.open(data_set.folder / "controls" / f"{stem}_{i}.png"), float) for i in (0, 1)]
        alphas = [picture[..., 3:] / 255 for picture in controls]
        assert np.array_equal(alphas[0] + alphas[1], np.ones_like(alphas[0])) and 0.3 < alphas[0].mean() < 0.7
        shown = sum(picture[..., :3] * alpha for picture, alpha in zip(controls, alphas, strict=True))
        result = np.asarray(Image.open(data_set.folder / "result" / f"{stem}.png"), float)
        assert np.abs(result - shown).max() <= 1


def test_the_documents_pictures_are_there_and_small_and_no_others() -> None:
    assert set(PICTURES) == set((DOCUMENT.parent / "pictures").iterdir())
    sizes = [path.stat().st_size for path in PICTURES]
    assert max(sizes) < 250_000 and sum(sizes) < 1_500_000


@pytest.mark.parametrize("text", [TEXT, GUIDE_TEXT], ids=["one_frame", "dataset"])
def test_links_of_the_document_lead_to_its_headings(text: str) -> None:
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


def test_tiled_sheets_share_margins_and_keep_their_pixels() -> None:
    wide, narrow = Image.new("RGB", (100, 20), "red"), Image.new("RGB", (40, 30), "blue")
    whole = tiled([[narrow, narrow], [wide]])
    assert whole.size == (100, 50)
    assert whole.getpixel((40 - MARGIN, 0)) == (0, 0, 255) and whole.getpixel((50, 30)) == (255, 0, 0)
    assert heading(1340).width == 1340


def test_saved_sheets_have_few_colours(tmp_path: Path) -> None:
    (path,) = save_sheets({"a": Image.radial_gradient("L").convert("RGB")}, tmp_path)
    assert path.name == "a.png" and Image.open(path).mode == "P"
