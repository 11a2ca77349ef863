"""A small data set out of the material, and the commands that cache it as a user would.

Kisekaeichi items are made backwards, from the result to what it was made of, because then the result is known exactly:
the middle of one photograph inside the surroundings of another.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from demo.material import Material, clip_path, soft_ellipse
from demo.models import ModelPaths

IMAGES = """\
[[datasets]]
image_directory = {result}
control_directory = {controls}
cache_directory = {cache}
caption_extension = ".txt"
resolution = 192
enable_bucket = true
batch_size = 2
fp_1f_clean_indices = [0, 10]
fp_1f_target_index = 1
fp_1f_no_post = true
"""
VIDEOS = """\
[[datasets]]
video_directory = {videos}
cache_directory = {cache}
caption_extension = ".txt"
resolution = 128
enable_bucket = true
frame_extraction = "full"
max_frames = 37
"""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Two data set files, because one-frame training takes images and the other kinds videos."""

    folder: Path
    """Of everything: sources, caches, previews."""
    images: Path
    videos: Path

    @property
    def previews(self) -> tuple[Path, ...]:
        """The sheets that the commands draw."""
        return tuple(self.folder / "preview" / f"{config.stem}_01_001.png" for config in (self.images, self.videos))


def write_data_set(folder: Path, material: Material) -> DataSet:
    """Writes two kisekaeichi items and one clip with their captions into `folder` (made if need be)."""
    result, controls, videos = (folder / name for name in ("result", "controls", "videos"))
    for new in (result, controls, videos):
        new.mkdir(parents=True, exist_ok=True)
    items = {
        "astronaut": (material.astronaut, material.coffee, (384, 384), "The astronaut is dressed in coffee."),
        "cat": (material.chelsea, material.astronaut, (480, 320), "The cat is dressed as an astronaut."),
    }
    for stem, (middle, around, size, caption) in items.items():
        _write_kisekaeichi(result / f"{stem}.png", controls, middle, around, size)
        (result / f"{stem}.txt").write_text(caption, encoding="utf-8")
    shutil.copyfile(clip_path("bikes"), videos / "bikes.mp4")
    (videos / "bikes.txt").write_text("A street seen from above, then a man in it.", encoding="utf-8")
    texts = {
        "images": IMAGES.format(result=quoted(result), controls=quoted(controls), cache=quoted(folder / "cache")),
        "videos": VIDEOS.format(videos=quoted(videos), cache=quoted(folder / "cache_videos")),
    }
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return DataSet(folder=folder, **{name: folder / f"{name}.toml" for name in texts})


def _write_kisekaeichi(result: Path, controls: Path, middle: Path, around: Path, size: tuple[int, int]) -> None:
    """Writes the result and its two control images, each transparent where it does not show in the result."""
    inside = soft_ellipse(*size)
    outside = Image.fromarray(255 - np.asarray(inside))
    pair = [ImageOps.fit(Image.open(path).convert("RGB"), size) for path in (middle, around)]
    Image.composite(pair[0], pair[1], inside).save(result)
    for number, (picture, alpha) in enumerate(zip(pair, (inside, outside), strict=True)):
        picture.putalpha(alpha)
        picture.save(controls / f"{result.stem}_{number}.png")


def quoted(path: Path) -> str:
    """As a TOML string."""
    return json.dumps(path.as_posix(), ensure_ascii=False)


def caching_commands(models: ModelPaths, data_set: DataSet) -> list[list[str]]:
    """What a user writes behind `python`: latents with previews, then texts, for either data set file."""
    image_models = ["--vae", str(models.vae), "--image_encoder", str(models.image_encoder)]
    text_models = ["--text_encoder1", str(models.text_encoder1), "--text_encoder2", str(models.text_encoder2)]
    one_frame = ["--one_frame", "--one_frame_no_2x", "--one_frame_no_4x"]
    commands = []
    for config, mode in ((data_set.images, one_frame), (data_set.videos, [])):
        data = ["--dataset_config", str(config), "--device", "cpu", "--num_workers", "0"]
        preview = ["--preview", str(data_set.folder / "preview")]
        commands.append(["fpack_cache_latents.py", *data, *image_models, *mode, *preview])
        commands.append(["fpack_cache_text_encoder_outputs.py", *data, *text_models])
    return commands
