"""The demo's acts, and the documents that show its pictures: every command in them is one that the scripts accept."""

import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import demo.run
import fpack_cache_latents
import fpack_cache_text_encoder_outputs
import fpack_generate_video
import wan_cache_latents
import wan_cache_text_encoder_outputs
import wan_generate_video
from common.flags import parse
from common.media import read_video, write_video
from dataset.config import load_dataset_config
from dataset.sources import list_items
from demo import acts
from demo.acts import ACTS, LONG, Played, Stage
from demo.data_set import CLIP_FRAMES, DataSet, caching_commands, quoted, write_data_set
from demo.encoders import ModelPaths
from demo.material import Material, clip_path
from demo.sheets import MARGIN, enlarged, heading, in_two_columns, row_sheet, save_sheets, table_sheet, tiled
from demo.toy.lessons import BLUE_SQUARE, TOGETHER
from demo.toy.trials import MODELS
from demo.toy.world import DIRECTIONS, SIZE
from demo.wan_lessons import LESSONS
from networks.lora_metadata import write_lora
from options.flags_fpack_cache import FramePackCacheLatentsFlags, FramePackCacheTextsFlags
from options.flags_fpack_train import FramePackTrainFlags, check_framepack_train
from options.flags_wan_cache import WanCacheLatentsFlags, WanCacheTextsFlags
from options.flags_wan_train import WanTrainFlags, check_wan_train

ROOT = Path(__file__).parent.parent
DOCUMENTS = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
TEXT, GUIDE_TEXT = DOCUMENTS["one_frame.md"], DOCUMENTS["dataset.md"]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [text.replace("\\\n", " ") for kind, text in BLOCKS if kind == "bash" and text.startswith("python")]
CACHING_COMMANDS = re.findall(r"^python (fpack_cache_\w+\.py.*)$", GUIDE_TEXT.replace("\\\n", " "), re.MULTILINE)
PICTURES = ROOT / "docs" / "pictures"
SCRIPTS = {
    "fpack_cache_latents.py": (fpack_cache_latents, FramePackCacheLatentsFlags),
    "fpack_cache_text_encoder_outputs.py": (fpack_cache_text_encoder_outputs, FramePackCacheTextsFlags),
    "wan_cache_latents.py": (wan_cache_latents, WanCacheLatentsFlags),
    "wan_cache_text_encoder_outputs.py": (wan_cache_text_encoder_outputs, WanCacheTextsFlags),
}
GENERATORS = {"fpack_generate_video.py": fpack_generate_video, "wan_generate_video.py": wan_generate_video}
TRAINERS = {
    "fpack_train_network.py": (FramePackTrainFlags, check_framepack_train, "single_transformer_blocks_0_attn_to_v"),
    "wan_train_network.py": (WanTrainFlags, check_wan_train, "blocks_0_self_attn_v"),
}
"""With a layer of each family's small transformers, 256 wide."""
TOY_MODELS = ModelPaths.under(MODELS.dit.parent.relative_to(ROOT))


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
    assert (program, script) == ("python", "fpack_generate_video.py") and models in ("${models[@]}", "${toy[@]}")
    (prompts,) = (text for kind, text in BLOCKS if kind == "text")
    (tmp_path / "prompts.txt").write_text(prompts, encoding="utf-8")
    for name in re.findall(r"[\w/]+\.png\b", COMMANDS[number] + prompts):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(material.astronaut_mask if "mask" in name else material.astronaut, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert check(*arguments) == 0


def toy_commands(name: str) -> list[list[str]]:
    """The commands of a document that begin with the toy world's models."""
    text = DOCUMENTS[name].replace("\\\n", " ")
    for array in re.findall(r"^toy=\((.*?)\)$", text, re.MULTILINE | re.DOTALL):
        text = text.replace('"${toy[@]}"', " ".join(array.split()))
    lines = re.findall(r"^python (fpack_generate_video\.py --dit demo/toy/models/.*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_the_commands_beside_the_toy_worlds_sweeps_are_the_demos_own() -> None:
    folder = Path("demo_output", "results")
    start = folder / "sweep" / "start.png"
    lora = folder / "lora" / f"{BLUE_SQUARE.name}.safetensors"
    strengths = acts.strengths_command(TOY_MODELS, BLUE_SQUARE, folder / "lora" / "start.png", lora)
    expected = {"one_frame.md": acts.sweep_command(TOY_MODELS, start, acts.SWEPT), "lora.md": strengths}
    for name, command in expected.items():
        assert toy_commands(name) == [[text.replace("\\", "/") for text in command]]


def test_every_call_of_the_demo_that_the_documents_name_is_understood() -> None:
    found = {text for name in DOCUMENTS for text in re.findall(r"python -m demo\.run([^`\n]*)", DOCUMENTS[name])}
    called = [demo.run.parser().parse_args(shlex.split(text)) for text in found]
    assert {name for options in called for name in options.only or ()} >= {"one_frame", "lora", "data_set", *LONG}


class Scripts:
    """Stands in for the scripts: checks what they are told, and makes pictures that say which line asked for them.

    Only what draws a preview is really run.
    """

    def __call__(self, command: Sequence[str]) -> None:
        script, *arguments = command
        if script in GENERATORS:
            assert GENERATORS[script].main([*arguments, "--check"]) == 0
            self.generate(arguments)
        elif script in TRAINERS:
            self.train(arguments, *TRAINERS[script])
        elif "--preview" in arguments:
            assert SCRIPTS[script][0].main(arguments) == 0
        else:
            parse(SCRIPTS[script][1], description="", argv=arguments)

    def generate(self, arguments: list[str]) -> None:
        out = Path(arguments[arguments.index("--save_path") + 1])
        out.mkdir(parents=True)
        if "--sweep" in arguments:
            Image.new("RGB", (90, 40)).save(out / "時_1_sweep.png")
            return
        lines = Path(arguments[arguments.index("--from_file") + 1]).read_text(encoding="utf-8").splitlines()
        for number in range(len(lines)):
            grey = np.full((SIZE, SIZE, 3), grey_of(number), np.uint8)
            if "video" in arguments:
                brighter = [np.full_like(grey, grey_of(number) + 3 * frame) for frame in range(73)]
                write_video(out / f"{number:03}.mp4", brighter, fps=30)
            else:
                Image.fromarray(grey).save(out / f"{number:03}.png")

    def train(self, arguments: list[str], kind: type, check_flags: Callable, layer: str) -> None:
        flags = parse(kind, description="", argv=arguments)
        check_flags(flags)
        folder, name = Path(flags.saving.output_dir), flags.saving.output_name
        tensors = {"lora_down.weight": torch.ones(4, 256), "lora_up.weight": torch.zeros(256, 4)}
        write_lora(
            folder / f"{name}.safetensors", {f"lora_unet_{layer}.{key}": tensor for key, tensor in tensors.items()}, {}
        )
        (folder / "sample").mkdir(parents=True)
        for path in (folder / "sample" / f"{name}_00_sheet.png", folder / f"{name}_loss.png"):
            Image.new("RGB", (90, 40)).save(path)


def grey_of(line: int) -> int:
    return 10 * line + 5


@pytest.fixture(scope="module")
def play(demo_models: ModelPaths, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Played]]:
    """An act's folder and what came of it. Each act is played once."""

    @cache
    def played(name: str) -> tuple[Path, Played]:
        folder = tmp_path_factory.mktemp("舞台")
        return folder, ACTS[name](Stage(models=demo_models, folder=folder, call=Scripts()))

    return played


def cell(sheet: Image.Image, column: int, bottom: int) -> int:
    """The grey of a sheet's cell, found by its column and by its lower edge, in pixels above the sheet's."""
    width = 2 * SIZE + MARGIN
    red, green, blue = sheet.getpixel((MARGIN + column * width + SIZE, sheet.height - bottom - SIZE))
    assert red == green == blue
    return red


def test_rows_of_indices_and_words_show_what_their_lines_made(play) -> None:
    folder, played = play("one_frame")
    made = played.sheets
    lines = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert [re.search(r"target_index=(\d)", line)[1] for line in lines] == [*"13579" * 3, *"5555"]
    assert [line.split()[4] for line in lines[15:]] == list(DIRECTIONS)
    assert len({line.split(" moves ")[0] for line in lines[15:]}) == 1, "only the direction differs"
    assert [cell(made["one_frame"], 1 + i, MARGIN) for i in range(5)] == [grey_of(10 + i) for i in range(5)]
    assert [cell(made["words"], 1 + i, MARGIN) for i in range(4)] == [grey_of(15 + i) for i in range(4)]


def test_kisekaeichi_shows_each_pair_with_its_masks_without_and_exchanged(play) -> None:
    folder, played = play("kisekaeichi")
    sheet = played.sheets["kisekaeichi"]
    lines = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    masks = [[Image.open(path).tobytes() for path in re.findall(r"--cim (.*?\.png)", line)] for line in lines]
    assert [len(found) for found in masks] == [2, 2, 0, 0, 2, 2]
    assert masks[4] == masks[0][::-1] and masks[5] == masks[1][::-1] and masks[0] != masks[1]
    assert [cell(sheet, 4 + kind, MARGIN) for kind in range(3)] == [grey_of(1 + 2 * kind) for kind in range(3)]


def test_a_film_is_a_strip_of_its_frames(play) -> None:
    sheet = play("video")[1].sheets["video"]
    greys = [cell(sheet, 1 + number, MARGIN) for number in range(len(acts.FILM_FRAMES))]
    assert greys == pytest.approx([grey_of(1) + 3 * frame for frame in acts.FILM_FRAMES], abs=4)


@pytest.mark.parametrize(("name", "lesson"), [("lora", BLUE_SQUARE), ("1f-mc", TOGETHER)])
def test_a_lora_is_trained_on_its_rule_and_tried_on_other_scenes(name: str, lesson, play) -> None:
    folder, made = play(name)
    (dataset,) = load_dataset_config(folder / "data.toml").datasets
    items = list_items(dataset).items
    assert len(items) == lesson.pairs and all(len(i.control_paths) == len(lesson.control_indices) for i in items)
    lines = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert ["--lora" in line for line in lines] == [False] * acts.NUM_LEARNED + [True] * acts.NUM_LEARNED
    shown = {Image.open(path).tobytes() for line in lines for path in re.findall(r"--ci (.*?\.png)", line)}
    assert not shown & {Image.open(path).tobytes() for item in items for path in item.control_paths}
    row = 2 * SIZE + MARGIN
    sheet = made.sheets[name]
    with_lora = cell(sheet, 2, MARGIN + row + label_height(sheet, lesson))
    assert with_lora == grey_of(acts.NUM_LEARNED + 2)


def label_height(sheet: Image.Image, lesson) -> int:
    """Of a row of the table: what is left of the sheet's height when pictures, margins and title are taken away."""
    rows = 3 + len(lesson.control_indices)
    return (sheet.height - MARGIN * (rows + 2)) // rows - 2 * SIZE


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_wans_act_asks_for_what_it_taught_without_the_lora_and_with_it(lesson, play) -> None:
    folder, _ = play("wan")
    (data,) = load_dataset_config(folder / f"{lesson.name}.toml").datasets
    assert data.fp_1f_clean_indices == lesson.control_indices and data.fp_1f_target_index == 1
    lines = (folder / lesson.name / "prompts.txt").read_text(encoding="utf-8").splitlines()
    without, with_lora = lines[: len(lesson.rows)], lines[len(lesson.rows) :]
    assert len(with_lora) == len(without) and not any("--lora" in line for line in without)
    assert all(f"--lora {folder / lesson.name / lesson.name}.safetensors" in line for line in with_lora)
    assert [line.split(" --")[0] for line in without + with_lora] == [row.caption for row in lesson.rows] * 2


def test_the_documents_show_what_the_demo_makes_and_nothing_else(play) -> None:
    made = {name for act in ACTS for name in play(act)[1].sheets}
    shown = {name for text in DOCUMENTS.values() for name in re.findall(r"pictures/([\w-]+)\.png", text)}
    assert shown == made
    sizes = [(PICTURES / f"{name}.png").stat().st_size for name in made]
    assert len(sizes) == len(list(PICTURES.iterdir()))
    assert max(sizes) < 250_000 and sum(sizes) < 1_500_000


def test_the_demo_ends_with_one_sheet_and_the_list_of_files(
    demo_models: ModelPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(demo.run, "call", Scripts())
    output, models = tmp_path / "出力", demo_models.dit.parent
    leftover = output / "results" / "sweep" / "sheet" / "old_sweep.png"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    arguments = ["--output", str(output), "--models", str(models), "--only", "sweep", "kisekaeichi"]
    assert demo.run.main(arguments) == 0
    whole = Image.open(output / "contact_sheet.png")
    parts = [Image.open(output / "pictures" / f"{name}.png") for name in ("sweep", "kisekaeichi")]
    assert whole.width == sum(part.width for part in parts) - MARGIN and whole.height > max(p.height for p in parts)
    listed = [Path(line.strip()) for line in capsys.readouterr().out.split("Made:\n")[1].splitlines()]
    assert output / "contact_sheet.png" in listed and all(path.exists() for path in listed) and not leftover.exists()


def test_a_demo_without_models_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert demo.run.main(["--models", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line


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
def data_set(tmp_path: Path) -> DataSet:
    return write_data_set(tmp_path / "データ")


def test_the_demos_data_set_is_cached_and_previewed(demo_models: ModelPaths, data_set: DataSet) -> None:
    for script, *arguments in caching_commands(demo_models, data_set):
        assert SCRIPTS[script][0].main(arguments) == 0
    images, videos = (
        sorted(path.name for path in (data_set.folder / name).iterdir()) for name in ("cache", "cache_videos")
    )
    stems = sorted(path.stem for path in (data_set.folder / "result").glob("*.png"))
    assert images == [f"{stem}_0064x0064_fp.safetensors" for stem in stems] and len(stems) == 2
    assert videos == [f"moving_00000-073-000{section}_0064x0064_fp.safetensors" for section in (0, 1)]
    for path in data_set.previews:
        assert Image.open(path).width > 500


def test_the_demos_results_are_what_their_masks_leave_of_the_controls(data_set: DataSet) -> None:
    for result in (data_set.folder / "result").glob("*.png"):
        controls = [np.asarray(Image.open(data_set.folder / "controls" / f"{result.stem}_{i}.png")) for i in (0, 1)]
        wanted = np.asarray(Image.open(result))
        ground, shape = (picture[..., :3] for picture in controls)
        kept, kept_shape = (picture[..., 3] == 255 for picture in controls)
        assert not (kept & kept_shape).any() and 0.3 < kept.mean() < 0.9
        assert np.array_equal(wanted[kept], ground[kept])
        same = (wanted == shape).all(axis=2)
        assert (same & kept_shape).sum() > 50 and not (same & kept).mean() > 0.5


def test_the_demos_clip_moves_all_the_time(data_set: DataSet) -> None:
    frames = np.stack([*read_video(data_set.folder / "videos" / "moving.mp4", flag="clip")]).astype(int)
    assert len(frames) == CLIP_FRAMES
    assert min(np.abs(a - b).max() for a, b in zip(frames[:60:4], frames[4::4], strict=False)) > 40


REAL = """\
[general]
caption_extension = ".txt"
enable_bucket = true
[[datasets]]
cache_directory = {cache}
"""


def test_real_photographs_and_a_real_clip_are_cached(
    demo_models: ModelPaths, material: Material, tmp_path: Path
) -> None:
    for kind in ("pictures", "controls", "clips"):
        (tmp_path / kind).mkdir()
    shutil.copyfile(material.chelsea, tmp_path / "pictures" / "猫.png")
    shutil.copyfile(material.coffee_with_alpha, tmp_path / "controls" / "猫.png")
    shutil.copyfile(clip_path("bikes"), tmp_path / "clips" / "bikes.mp4")
    for path in (tmp_path / "pictures" / "猫.txt", tmp_path / "clips" / "bikes.txt"):
        path.write_text("A street, or a cat.", encoding="utf-8")
    general = REAL.format(cache=quoted(tmp_path / "cache"))
    folders = {name: quoted(tmp_path / name) for name in ("pictures", "controls", "clips")}
    images = f"image_directory = {folders['pictures']}\ncontrol_directory = {folders['controls']}\n"
    images += "resolution = 192\nfp_1f_target_index = 9\n"
    videos = f'video_directory = {folders["clips"]}\nresolution = 128\nframe_extraction = "full"\nmax_frames = 37\n'
    encoders = ["--vae", str(demo_models.vae), "--image_encoder", str(demo_models.image_encoder)]
    for text, mode in ((images, ["--one_frame"]), (videos, [])):
        config = tmp_path / "data.toml"
        config.write_text(general + text, encoding="utf-8")
        arguments = ["--dataset_config", str(config), *encoders, *mode, "--device", "cpu", "--num_workers", "0"]
        assert fpack_cache_latents.main([*arguments, "--keep_cache"]) == 0
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        *("猫_0451x0300_fp.safetensors", "bikes_00000-037-0000_0192x0080_fp.safetensors"),
    }


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
    assert heading("A title", 1340).width == 1340


def test_two_columns_are_as_equal_as_their_order_allows() -> None:
    heights = {(30, 30, 60): 60, (90, 20, 20): 90, (10, 50, 30): 60, (40,): 40}
    for sizes, expected in heights.items():
        sheets = [Image.new("RGB", (50, size), (size, 0, 0)) for size in sizes]
        whole = in_two_columns(sheets)
        assert whole.height == expected and whole.width == (100 - MARGIN if len(sizes) > 1 else 50)
        assert whole.getpixel((0, 0)) == (sizes[0], 0, 0) and (len(sizes) == 1 or whole.getpixel((60, 0))[0] in sizes)


def test_small_pictures_are_enlarged_without_smoothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    twice = noise.repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(np.asarray(enlarged(noise)), twice)
    sheet = row_sheet([("左", noise), ("a mask", noise[..., 0])], title="A title")
    right = MARGIN + 2 * SIZE
    assert np.array_equal(np.asarray(sheet)[-MARGIN - 2 * SIZE : -MARGIN, MARGIN:right], twice)
    table = table_sheet({"above": [noise, noise[::-1]], "below": [noise, noise]})
    assert np.array_equal(np.asarray(table)[-MARGIN - 2 * SIZE : -MARGIN, right + MARGIN : -MARGIN], twice)


def test_saved_sheets_have_few_colours(tmp_path: Path) -> None:
    (path,) = save_sheets({"a": Image.radial_gradient("L").convert("RGB")}, tmp_path)
    assert path.name == "a.png" and Image.open(path).mode == "P"
