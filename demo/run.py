"""The main job on the CPU, from small checkpoints and real photographs: `python quickstart.py demo`.

Everything goes through `fpack_generate_video.py` as a user would call it; its command lines are printed.
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
from common.sheets import contact_sheet
from demo.material import Material, write_material
from demo.models import ModelPaths, build_models

ROOT = Path(__file__).resolve().parent.parent
PICTURE_SIZE = (256, 256)
VIDEO_SIZE = (128, 160)
NUM_VIDEO_CELLS = 4
TITLE = "Small models, not trained: they show where each control image goes, not what FramePack can do"
NOTE = """
The models are small and not trained: their weights are random, except for a hand-made path through them that copies
control images to the place they belong. So the pictures show which input goes where, how masks and the time axis
weigh it, and that everything runs; blur, odd colours and texture are what random weights look like."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of the script."""

    name: str
    title: str
    arguments: tuple[str, ...]
    inputs: tuple[tuple[str, Path], ...]
    """Labels and files of what goes in, for the contact sheet."""
    is_video: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return VIDEO_SIZE if self.is_video else PICTURE_SIZE


def jobs(material: Material) -> tuple[Job, ...]:
    """One-frame inference, 1f-mc, kisekaeichi and a video of two sections."""
    return (
        Job(
            name="one_frame",
            title="one frame: target 9",
            arguments=_one_frame("default", "A cat looks up.", material.chelsea),
            inputs=(("one frame: control at 0", material.chelsea),),
        ),
        Job(
            name="1f-mc",
            title="1f-mc: target 9",
            arguments=_one_frame(
                "target_index=9,control_index=0;1,no_2x,no_4x", "A cat and a cup.", material.chelsea, material.coffee
            ),
            inputs=(("1f-mc: control at 0", material.chelsea), ("1f-mc: control at 1", material.coffee)),
        ),
        Job(
            name="kisekaeichi",
            title="kisekaeichi: target 1",
            arguments=(
                *_one_frame(
                    "target_index=1,control_index=0;10,no_2x,no_4x,no_post",
                    "An astronaut made of coffee.",
                    material.astronaut,
                    material.coffee,
                ),
                *("--control_image_mask_path", str(material.astronaut_mask), str(material.coffee_mask)),
            ),
            inputs=(
                ("kisekaeichi: control at 0", material.astronaut),
                ("its mask", material.astronaut_mask),
                ("kisekaeichi: control at 10", material.coffee),
                ("its mask", material.coffee_mask),
            ),
        ),
        Job(
            name="video",
            title="video",
            arguments=(
                *("--prompt", "The cat blinks.", "--image_path", str(material.chelsea)),
                *("--video_sections", "2", "--output_type", "video"),
            ),
            inputs=(("video: start image", material.chelsea),),
            is_video=True,
        ),
    )


def _one_frame(options: str, prompt: str, *controls: Path) -> tuple[str, ...]:
    paths = [str(path) for path in controls]
    return (
        *("--one_frame_inference", options, "--prompt", prompt, "--image_path", paths[0]),
        *("--control_image_path", *paths, "--output_type", "images"),
    )


def run_job(job: Job, models: ModelPaths, results: Path) -> Path:
    """Runs the script and returns the one file that it made.

    Raises:
        subprocess.CalledProcessError: the script failed.
    """
    folder = results / job.name
    model_flags = [text for name, path in vars(models).items() for text in (f"--{name}", str(path))]
    size = [str(length) for length in job.size]
    common = ["--video_size", *size, "--seed", "1", "--device", "cpu", "--save_path", str(folder)]
    command = ["fpack_generate_video.py", *model_flags, *job.arguments, *common]
    print(f"\n{subprocess.list2cmdline(['python', *command])}", flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    (made,) = folder.iterdir()
    return made


def cells(job: Job, made: Path) -> list[tuple[str, Image.Image]]:
    """A row of the contact sheet: what went in, cut as the script cuts it, and what came out."""
    height, width = job.size
    row = [(label, ImageOps.fit(Image.open(path), (width, height))) for label, path in job.inputs]
    if not job.is_video:
        return [*row, (job.title, Image.open(made))]
    frames = list(read_video(made, flag="the demo's video"))
    chosen = np.linspace(0, len(frames) - 1, NUM_VIDEO_CELLS).round().astype(int)
    return [*row, *((f"{job.title}: frame {i} of {len(frames)}", Image.fromarray(frames[i])) for i in chosen)]


def main(argv: Sequence[str] | None = None) -> int:
    """Builds models and material, runs the jobs, draws the contact sheet and says where everything is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "demo_output", help="folder for everything that is made")
    output = parser.parse_args(argv).output.resolve()
    start = time.monotonic()
    transformers_logging.disable_progress_bar()
    models = build_models(output / "models")
    material = write_material(output / "material")
    shutil.rmtree(output / "results", ignore_errors=True)
    try:
        made = [(job, run_job(job, models, output / "results")) for job in jobs(material)]
    except subprocess.CalledProcessError as error:
        print(f"demo: got exit code {error.returncode} from the command above; expected 0", file=sys.stderr)
        return 1
    sheet_path = output / "contact_sheet.png"
    contact_sheet([cell for job, path in made for cell in cells(job, path)], columns=5, title=TITLE).save(sheet_path)
    print(NOTE)
    print(f"\nDone in {time.monotonic() - start:.0f} seconds. Made:")
    for path in (*(path for _, path in made), sheet_path):
        print(f"  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
