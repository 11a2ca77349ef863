"""The main jobs on the CPU, from small checkpoints and real photographs: `python quickstart.py demo`.

Everything goes through the scripts as a user would call them; the command lines are printed. Three calls of
`fpack_generate_video.py` do, because each loads the models once: a file of one-frame prompts, a sweep, and a video.
Then a small data set is cached, and a LoRA is trained for a minute and tried.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers.utils import logging as transformers_logging

from common.media import read_video
from common.sheets import BACKGROUND, MARGIN, contact_sheet, tiled
from demo.data_set import DataSet, caching_commands, write_data_set
from demo.loras import write_colour_lora
from demo.material import Material, write_material
from demo.models import ModelPaths, build_models
from demo.training import (
    CAPTION,
    NUM_CROPS,
    NUM_STEPS,
    OPTIONS,
    SIZE,
    Disc,
    training_commands,
    write_disc,
)

ROOT = Path(__file__).resolve().parent.parent
PICTURE_SIZE, SWEEP_SIZE, VIDEO_SIZE = (256, 256), (192, 192), (128, 160)
"""Heights and widths."""
SWEEP = "target_index=1,9,13,20,30"
SWEEP_STEPS = 12
LORA_SWEEP = "lora=0,0.5,1"
NUM_VIDEO_CELLS = 4
KISEKAEICHI = "target_index=1,control_index=0;10,no_2x,no_4x,no_post"
NUM_COLOURS = 256
"""In the pictures of the documents, so that they stay small."""
TITLE = "Small models, not trained: they show where each control image goes, not what FramePack can do"
NOTE = """
The models are small and not trained: their weights are random, except for a hand-made path through them that copies
control images to the place they belong. So the pictures show which input goes where, how masks and the time axis
weigh it, and that everything runs; blur, odd colours and texture are what random weights look like."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the prompt file, which makes one picture."""

    prompt: str
    options: str
    controls: tuple[Path, ...]
    masks: tuple[Path, ...] = ()

    def __str__(self) -> str:
        inline = [("i", self.controls[0]), *(("ci", path) for path in self.controls)]
        inline += [*(("cim", path) for path in self.masks), ("of", self.options)]
        return " ".join([self.prompt, *(f"--{name} {value}" for name, value in inline)])


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the calls of the scripts made."""

    pictures: tuple[Path, ...]
    """One for each line."""
    sweep: Path
    lora: Path
    """A sweep too."""
    video: Path
    data_set: DataSet
    disc: Disc
    disc_sweep: Path
    """The picture without and with the LoRA that was trained."""


def lines(material: Material) -> tuple[Line, ...]:
    """Plain one-frame inference, 1f-mc, and kisekaeichi with its masks, without masks, and with exchanged masks."""
    pair = (material.astronaut, material.coffee)
    masks = (material.astronaut_mask, material.coffee_mask)
    one_frame = Line(prompt="A cat looks up.", options="default", controls=(material.chelsea,))
    blend = Line(
        prompt="A cat and a cup.",
        options="target_index=9,control_index=0;1,no_2x,no_4x",
        controls=(material.chelsea, material.coffee),
    )
    dressed = [
        Line(prompt="An astronaut made of coffee.", options=KISEKAEICHI, controls=pair, masks=chosen)
        for chosen in (masks, (), masks[::-1])
    ]
    return one_frame, blend, *dressed


def run_all(models: ModelPaths, material: Material, results: Path) -> Run:
    """Calls the scripts for the prompt file, the sweeps, the video and the data set.

    Raises:
        subprocess.CalledProcessError: a script failed.
    """
    prompts = results / "prompts.txt"
    prompts.parent.mkdir(parents=True)
    text = "".join(f"{line}\n" for line in lines(material))
    prompts.write_text(text, encoding="utf-8")
    print(f"\n{prompts}:\n{text}", end="", flush=True)
    pictures = ("--output_type", "images")
    _generate(models, PICTURE_SIZE, results / "one_frame", "--from_file", str(prompts), *pictures)
    _generate(models, SWEEP_SIZE, results / "sweep", *sweep_arguments(material), *pictures)
    lora = write_colour_lora(results / "colours.safetensors")
    _generate(models, SWEEP_SIZE, results / "lora", *lora_arguments(material, lora), *pictures)
    video = ("--prompt", "The cat blinks.", "--image_path", str(material.chelsea), "--video_sections", "2")
    _generate(models, VIDEO_SIZE, results / "video", *video, "--output_type", "video")
    data_set = write_data_set(results / "data_set", material)
    for command in caching_commands(models, data_set):
        _call(command)
    disc = write_disc(results / "training", material)
    for command in training_commands(models, disc):
        _call(command)
    _generate(models, (SIZE, SIZE), results / "trained", *disc_arguments(material, disc.lora), *pictures)
    # Names begin with the time, so their order is the order of the lines.
    made = tuple(sorted((results / "one_frame").glob("*.png")))
    sweep, swept_lora, trained = (next((results / name).glob("*_sweep.png")) for name in ("sweep", "lora", "trained"))
    (video_path,) = (results / "video").glob("*.mp4")
    return Run(
        pictures=made,
        sweep=sweep,
        lora=swept_lora,
        video=video_path,
        data_set=data_set,
        disc=disc,
        disc_sweep=trained,
    )


def sweep_arguments(material: Material) -> tuple[str, ...]:
    """The generated picture moves past two control images that stay where they are."""
    controls = str(material.chelsea), str(material.coffee)
    return (
        *("--prompt", "A cat and a cup.", "--image_path", controls[0], "--control_image_path", *controls),
        *("--one_frame_inference", "control_index=0;10,no_2x,no_4x,no_post"),
        *("--sweep", SWEEP, "--infer_steps", str(SWEEP_STEPS)),
    )


def lora_arguments(material: Material, lora: Path) -> tuple[str, ...]:
    """The same picture without a LoRA, with some of it, and with all of it."""
    return (
        *("--prompt", "A cat.", "--image_path", str(material.chelsea), "--control_image_path", str(material.chelsea)),
        *("--one_frame_inference", "default", "--lora", str(lora), "--sweep", LORA_SWEEP),
        *("--infer_steps", str(SWEEP_STEPS)),
    )


def disc_arguments(material: Material, lora: Path) -> tuple[str, ...]:
    """The cat, which the training has not seen, without the LoRA and with it."""
    return (
        *("--prompt", CAPTION, "--image_path", str(material.chelsea), "--control_image_path", str(material.chelsea)),
        *("--one_frame_inference", OPTIONS, "--lora", str(lora), "--sweep", "lora=0,1"),
        *("--infer_steps", str(SWEEP_STEPS)),
    )


def _generate(models: ModelPaths, size: tuple[int, int], folder: Path, *arguments: str) -> None:
    model_flags = [text for name, path in vars(models).items() for text in (f"--{name}", str(path))]
    common = ["--video_size", *map(str, size), "--seed", "1", "--device", "cpu", "--save_path", str(folder)]
    _call(["fpack_generate_video.py", *model_flags, *arguments, *common])


def _call(command: Sequence[str]) -> None:
    print(f"\n{subprocess.list2cmdline(['python', *command])}", flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def one_frame_sheets(material: Material, run: Run) -> dict[str, Image.Image]:
    """The inputs of every kind of picture, cut as the script cuts them, beside what came out."""
    one_frame, blend, *dressed = map(Image.open, run.pictures)
    inputs = (material.chelsea, material.coffee, material.astronaut, material.astronaut_mask, material.coffee_mask)
    cat, cup, person, person_mask, cup_mask = (ImageOps.fit(Image.open(path), PICTURE_SIZE[::-1]) for path in inputs)
    kisekaeichi = [
        *(("control at 0", person), ("its mask", person_mask), ("control at 10", cup), ("its mask", cup_mask)),
        *zip(("target 1, these masks", "no masks", "masks exchanged"), dressed, strict=True),
    ]
    blended = [("control at 0", cat), ("control at 1", cup), ("target 9", blend)]
    swept = contact_sheet(
        [("control at 0", cat), ("control at 10", cup)], columns=2, cell_width=123, title="A sweep of target_index"
    )
    return {
        "one_frame": contact_sheet([("control at 0", cat), ("target 9", one_frame)], columns=2, title="One frame"),
        "1f-mc": contact_sheet(blended, columns=3, title="1f-mc"),
        "kisekaeichi": contact_sheet(kisekaeichi, columns=7, cell_width=180, title="Kisekaeichi"),
        "sweep": tiled([[swept], [Image.open(run.sweep)]]),
        "lora": contact_sheet(
            [(f"A LoRA that exchanges colours: {LORA_SWEEP}", Image.open(run.lora))],
            columns=1,
            cell_width=Image.open(run.lora).width,
        ),
    }


def video_sheet(material: Material, run: Run) -> Image.Image:
    """The start image and some frames."""
    frames = list(read_video(run.video, flag="the demo's video"))
    chosen = np.linspace(0, len(frames) - 1, NUM_VIDEO_CELLS).round().astype(int)
    cells = [("start image", ImageOps.fit(Image.open(material.chelsea), VIDEO_SIZE[::-1]))]
    cells += [(f"frame {i} of {len(frames)}", Image.fromarray(frames[i])) for i in chosen]
    return contact_sheet(cells, columns=len(cells), title="Video")


def data_set_sheet(run: Run) -> Image.Image:
    """The sheets that the caching script drew."""
    return tiled([[Image.open(path)] for path in run.data_set.previews])


def training_sheet(material: Material, run: Run) -> Image.Image:
    """An item of the data set, the picture before and after, and the charts of the loss."""
    folder, stem = run.disc.folder, f"{material.coffee.stem}_0"
    labels = {"controls": f"one of {2 * NUM_CROPS} controls", "targets": "its target"}
    item = [(label, Image.open(folder / name / f"{stem}.png")) for name, label in labels.items()]
    title = f"A LoRA trained for {NUM_STEPS} steps: {CAPTION}"
    before_after = Image.open(run.disc_sweep)
    shown = contact_sheet(item, columns=2, cell_width=256, title=title)
    return tiled([[shown, before_after], [Image.open(run.disc.loss)]])


def heading(width: int) -> Image.Image:
    """The title alone, as wide as the sheets below it."""
    nothing = Image.new("RGB", (width, 1), BACKGROUND)
    return contact_sheet([("", nothing)], columns=1, cell_width=width - 2 * MARGIN, title=TITLE)


def save_sheets(made: dict[str, Image.Image], folder: Path) -> list[Path]:
    """Writes the pictures of the documents, with few colours."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in made]
    for path, sheet in zip(paths, made.values(), strict=True):
        # With a palette of its own, given from outside, quantize() dithers.
        sheet.quantize(palette=sheet.quantize(NUM_COLOURS)).save(path, optimize=True)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Builds models and material, runs the script, draws the sheets and says where everything is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "demo_output", help="folder for everything that is made")
    parser.add_argument("--pictures", type=Path, help="folder for the documents' pictures (default: within --output)")
    options = parser.parse_args(argv)
    output = options.output.resolve()
    start = time.monotonic()
    transformers_logging.disable_progress_bar()
    models = build_models(output / "models")
    material = write_material(output / "material")
    shutil.rmtree(output / "results", ignore_errors=True)
    try:
        run = run_all(models, material, output / "results")
    except subprocess.CalledProcessError as error:
        print(f"demo: got exit code {error.returncode} from the command above; expected 0", file=sys.stderr)
        return 1
    made, video, data_set = one_frame_sheets(material, run), video_sheet(material, run), data_set_sheet(run)
    training = training_sheet(material, run)
    one_frame, blend, kisekaeichi, sweep, lora = made.values()
    sheet_path = output / "contact_sheet.png"
    tiled(
        [[heading(video.width)], [one_frame, blend], [kisekaeichi], [sweep], [lora], [video], [data_set], [training]]
    ).save(sheet_path)
    pictures = save_sheets(
        {**made, "data_set_preview": data_set, "training": training}, options.pictures or output / "pictures"
    )
    print(NOTE)
    print(f"\nDone in {time.monotonic() - start:.0f} seconds. Made:")
    for path in (
        *run.pictures,
        run.sweep,
        run.lora,
        run.video,
        *run.data_set.previews,
        run.disc.lora,
        *pictures,
        sheet_path,
    ):
        print(f"  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
