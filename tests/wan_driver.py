"""`wan_generate_video.py` run in-process on small models, and what it leaves on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

import wan_generate_video
from common.media import write_video
from demo.material import Material
from demo.wan_models import WanModelPaths
from generation.outputs import load_latents
from wan.config import Kind

TASKS: dict[str, Kind] = {
    "t2v-1.3B": "t2v",
    "t2v-14B": "t2v",
    "t2i-14B": "t2v",
    "i2v-14B": "i2v",
    "flf2v-14B": "flf2v",
    "t2v-1.3B-FC": "fun_control",
    "i2v-14B-FC": "fun_control",
}
WIDTH, HEIGHT = 64, 48
SIZE = ("--video_size", HEIGHT, WIDTH)
PROMPT = "制服の少女, a girl in uniform"
QUICK = ("--prompt", PROMPT, *SIZE, "--infer_steps", 2, "--seed", 1)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Inputs under Japanese names with brackets, twice as wide and high as what is made of them."""

    folder: Path
    start: Path
    end: Path
    cut_out: Path
    """With an alpha channel."""
    mask: Path
    """White on the left, black on the right."""
    control: Path
    """A video of 9 frames."""
    frames: Path
    """A folder of 5 frames."""


def write_pictures(folder: Path, material: Material) -> Pictures:
    size = (2 * WIDTH, 2 * HEIGHT)
    files = {name: folder / f"{name} [1].png" for name in ("始", "終", "切抜", "覆い")}
    for name, photo in (("始", material.chelsea), ("終", material.coffee), ("切抜", material.astronaut)):
        with Image.open(photo) as image:
            image.convert("RGB").resize(size).save(files[name])
    half = np.zeros((size[1], size[0]), dtype=np.uint8)
    half[:, :WIDTH] = 255
    Image.fromarray(half).save(files["覆い"])
    with Image.open(files["切抜"]) as image, Image.open(material.astronaut_mask) as mask:
        image.putalpha(mask.convert("L").resize(size))
        image.save(files["切抜"])
    pixels = np.random.default_rng(0).integers(0, 256, (9, HEIGHT, WIDTH, 3), dtype=np.uint8)
    write_video(folder / "動き.mp4", pixels, fps=16)
    (folder / "齣").mkdir()
    for number, frame in enumerate(pixels[:5]):
        Image.fromarray(frame).save(folder / "齣" / f"{number}.png")
    return Pictures(
        folder=folder,
        start=files["始"],
        end=files["終"],
        cut_out=files["切抜"],
        mask=files["覆い"],
        control=folder / "動き.mp4",
        frames=folder / "齣",
    )


def models_for(models: WanModelPaths, task: str) -> list[str]:
    """The flags that name a task and its models."""
    paths = models.for_kind(TASKS[task])
    named = ("dit", "vae", "t5", *(["clip"] if "2v" in task and not task.startswith("t2v") else []))
    return ["--task", task, *(part for name in named for part in (f"--{name}", str(getattr(paths, name))))]


def run(*argv: object) -> int:
    return wan_generate_video.main([str(part) for part in argv])


def one_frame(*controls: Path, indices: str, target: int = 1) -> list[object]:
    """The flags of one-frame inference."""
    options = f"target_index={target},control_index={indices}"
    return ["--control_image_path", *controls, "--one_frame_inference", options]


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def latents_in(folder: Path) -> list[Tensor]:
    """In the order in which they were made."""
    return [load_latents(path)[0] for path in sorted(folder.glob("*.safetensors"))]


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, measured by the largest value."""
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())
