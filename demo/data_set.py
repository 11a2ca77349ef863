"""A small data set out of the toy world, as a user would lay it out, and the commands that cache it.

The kisekaeichi items are made backwards: what both pictures together are to give is known exactly.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from common.media import write_video
from demo.encoders import ModelPaths
from demo.toy.dit import dress_masks
from demo.toy.pool import dressed_picture
from demo.toy.world import SIZE, TOGETHER, Scene, scenes

SEED = 400
NUM_IMAGES = 2
CLIP_FRAMES, FPS = 73, 30
FREE_INDICES = 16
"""How long the clip's shape has to move."""
IMAGES = """\
[[datasets]]
image_directory = {result}
control_directory = {controls}
cache_directory = {cache}
caption_extension = ".txt"
resolution = {size}
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
resolution = {size}
frame_extraction = "full"
max_frames = {frames}
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


def write_data_set(folder: Path) -> DataSet:
    """Writes two kisekaeichi items and one clip with their captions into `folder` (made if need be)."""
    result, controls, videos = (folder / name for name in ("result", "controls", "videos"))
    for new in (result, controls, videos):
        new.mkdir(parents=True, exist_ok=True)
    for pair in itertools.islice(clear_pairs(scenes(SEED)), NUM_IMAGES):
        stem = f"{pair[1].colour}_{pair[1].shape}"
        for number, (scene, mask) in enumerate(zip(pair, dress_masks(*pair), strict=True)):
            control = Image.fromarray(scene.picture())
            control.putalpha(Image.fromarray(mask))
            control.save(controls / f"{stem}_{number}.png")
        Image.fromarray(dressed_picture(*pair)).save(result / f"{stem}.png")
        (result / f"{stem}.txt").write_text(TOGETHER, encoding="utf-8")
    moving = next(scenes(SEED, free_indices=FREE_INDICES))
    write_video(videos / "moving.mp4", moving.clip(CLIP_FRAMES), fps=FPS)
    (videos / "moving.txt").write_text(moving.caption, encoding="utf-8")
    images_cache, videos_cache = quoted(folder / "cache"), quoted(folder / "cache_videos")
    texts = {
        "images": IMAGES.format(result=quoted(result), controls=quoted(controls), cache=images_cache, size=SIZE),
        "videos": VIDEOS.format(videos=quoted(videos), cache=videos_cache, size=SIZE, frames=CLIP_FRAMES),
    }
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return DataSet(folder=folder, **{name: folder / f"{name}.toml" for name in texts})


def clear_pairs(drawn: Iterator[Scene]) -> Iterator[tuple[Scene, Scene]]:
    """Pairs out of a row of scenes, of four colours each: one can see what comes from where."""
    for pair in zip(drawn, drawn, strict=False):
        if len({colour for scene in pair for colour in (scene.colour, scene.background)}) == 4:
            yield pair


def quoted(path: Path) -> str:
    """As a TOML string."""
    return json.dumps(path.as_posix(), ensure_ascii=False)


def caching_commands(models: ModelPaths, data_set: DataSet) -> list[list[str]]:
    """What a user writes behind `python`: latents with previews, for either data set file."""
    encoders = ["--vae", str(models.vae), "--image_encoder", str(models.image_encoder)]
    preview = ["--preview", str(data_set.folder / "preview"), "--device", "cpu", "--num_workers", "0"]
    one_frame = ["--one_frame", "--one_frame_no_2x", "--one_frame_no_4x"]
    return [
        ["fpack_cache_latents.py", "--dataset_config", str(config), *encoders, *mode, *preview]
        for config, mode in ((data_set.images, one_frame), (data_set.videos, []))
    ]
