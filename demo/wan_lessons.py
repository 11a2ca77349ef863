"""What the demo teaches small Wan models, in pictures of the toy world, and the commands that do it.

colours   i2v: the shape of the control image at 0 takes the colour that the caption names
middle    flf2v: what stands half way between the control images at 0 and 2

Untrained models cannot learn a rule in seconds; they learn these pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from demo.data_set import quoted
from demo.toy.rows import Row, write_rows
from demo.toy.trials import Question
from demo.toy.world import SIZE, Scene
from demo.wan_models import WanModelPaths

if TYPE_CHECKING:
    from wan.config import Kind

PICTURE_SIZE = 3 * SIZE
"""Pixels. The VAE makes 24 x 24 of them."""
TARGET_INDEX = 1
RADIUS = 14.0
CENTRE = SIZE / 2
RECOLOURED = {
    "blue": "the shape turns blue like the sea under a clear sky",
    "yellow": "it becomes as yellow as a ripe lemon in the sun",
}
"""Captions. Of the 512 rows that the model sees of each, most are zeros; short ones would be much alike."""
BETWEEN = "half way between the first picture and the last"
TRAVEL = 24.0
"""Pixels of the toy world between the first picture and the last."""
STEPS = 8
"""Of a generation."""
FLOW_SHIFT = 6
PREVIEW_ITEMS = 2
CONFIG = """\
[[datasets]]
image_jsonl_file = {lines}
cache_directory = {cache}
resolution = {size}
fp_1f_clean_indices = [{controls}]
fp_1f_target_index = {target}
"""


@dataclass(frozen=True, kw_only=True)
class WanLesson:
    """Some pictures, and how they are learned."""

    name: str
    kind: Kind
    control_indices: tuple[int, ...]
    steps: int
    learning_rate: float = 3e-3
    rank: int = 32

    @property
    def task(self) -> str:
        return f"{self.kind}-14B"

    @property
    def options(self) -> str:
        """What `--one_frame_inference` is told."""
        return f"target_index={TARGET_INDEX},control_index={';'.join(map(str, self.control_indices))}"

    @property
    def rows(self) -> list[Row]:
        return list({"colours": _recoloured, "middle": _moved}[self.name]())


COLOURS = WanLesson(name="colours", kind="i2v", control_indices=(0,), steps=160)
MIDDLE = WanLesson(name="middle", kind="flf2v", control_indices=(0, 2), steps=160)
LESSONS = (COLOURS, MIDDLE)


@dataclass(frozen=True, kw_only=True)
class WanDataSet:
    """A data set file for each lesson, and one with both, so that the caching scripts run once."""

    folder: Path
    both: Path
    configs: Mapping[str, Path]
    """By the lessons' names."""

    @property
    def previews(self) -> tuple[Path, ...]:
        """The sheets that the first of the commands draws."""
        numbers = range(1, len(self.configs) + 1)
        return tuple(self.folder / "preview" / f"{self.both.stem}_{number:02}_001.png" for number in numbers)


def _recoloured() -> Iterator[Row]:
    for shape, colour, background in (("circle", "red", "black"), ("square", "green", "white")):
        scene = _scene(shape, colour, background, CENTRE)
        for wanted, caption in RECOLOURED.items():
            target = large(replace(scene, colour=wanted))
            yield Row(name=f"{shape}_{wanted}", caption=caption, controls=(large(scene),), target=target)


def _moved() -> Iterator[Row]:
    for shape, colour, background, height in (
        ("circle", "red", "black", 22.0),
        ("square", "yellow", "blue", 42.0),
        ("triangle", "green", "white", 26.0),
    ):
        middle = _scene(shape, colour, background, height)
        first, last = (replace(middle, start=(CENTRE + way * TRAVEL / 2, height)) for way in (-1, 1))
        yield Row(name=shape, caption=BETWEEN, controls=(large(first), large(last)), target=large(middle))


def _scene(shape: str, colour: str, background: str, height: float) -> Scene:
    """In the middle between left and right, `height` pixels below the upper border."""
    return Scene(
        shape=shape,
        colour=colour,
        background=background,
        striped=False,
        direction="right",
        radius=RADIUS,
        start=(CENTRE, height),
    )


def large(scene: Scene) -> np.ndarray:
    """(PICTURE_SIZE, PICTURE_SIZE, 3) uint8: the scene at its first frame, enlarged."""
    size = (PICTURE_SIZE, PICTURE_SIZE)
    return np.asarray(Image.fromarray(scene.picture()).resize(size, Image.Resampling.BICUBIC))


def write_lessons(folder: Path) -> WanDataSet:
    """Writes the pictures of all lessons and the data set files."""
    texts = {}
    for lesson in LESSONS:
        lines = write_rows(lesson.rows, folder / lesson.name)
        texts[lesson.name] = CONFIG.format(
            lines=quoted(lines),
            cache=quoted(folder / lesson.name / "cache"),
            size=PICTURE_SIZE,
            controls=", ".join(map(str, lesson.control_indices)),
            target=TARGET_INDEX,
        )
    files = {name: folder / f"{name}.toml" for name in (*texts, "both")}
    for name, text in {**texts, "both": "\n".join(texts.values())}.items():
        files[name].write_text(text, encoding="utf-8")
    return WanDataSet(folder=folder, both=files.pop("both"), configs=files)


def question(lesson: WanLesson, row: Row, lora: Path | None) -> Question:
    """How a picture of a lesson is asked for."""
    return Question(caption=row.caption, controls=row.controls, options=lesson.options, lora=lora, seed=1)


def caching_commands(models: WanModelPaths, data_set: WanDataSet) -> list[list[str]]:
    """What a user writes behind `python`: latents with previews, then captions, for all lessons."""
    data = ["--dataset_config", str(data_set.both), "--device", "cpu", "--num_workers", "0"]
    encoders = ["--vae", str(models.vae), "--clip", str(models.clip), "--one_frame"]
    preview = ["--preview", str(data_set.folder / "preview"), "--preview_items", str(PREVIEW_ITEMS)]
    return [
        ["wan_cache_latents.py", *data, *encoders, *preview],
        ["wan_cache_text_encoder_outputs.py", *data, "--t5", str(models.t5)],
    ]


def training_command(lesson: WanLesson, models: WanModelPaths, config: Path, folder: Path) -> list[str]:
    """The LoRA goes into `folder`, under the lesson's name."""
    model = ["--task", lesson.task, "--dit", str(models.dit), "--dataset_config", str(config)]
    rank = str(lesson.rank)
    network = ["--network_module", "networks.lora_wan", "--network_dim", rank, "--network_alpha", rank]
    schedule = ["--learning_rate", str(lesson.learning_rate), "--lr_scheduler", "cosine"]
    schedule += ["--max_train_steps", str(lesson.steps), "--timestep_sampling", "shift", "--discrete_flow_shift", "3"]
    output = ["--output_dir", str(folder), "--output_name", lesson.name, "--seed", "1", "--device", "cpu"]
    rest = ["--one_frame_target_loss_only", "--max_data_loader_n_workers", "0"]
    return ["wan_train_network.py", *model, *network, *schedule, *output, *rest]


def generation_command(lesson: WanLesson, models: WanModelPaths) -> list[str]:
    """Without prompts, and without a folder for what comes out."""
    known = [text for name in ("dit", "vae", "t5", "clip") for text in (f"--{name}", str(getattr(models, name)))]
    size = ["--video_size", str(PICTURE_SIZE), str(PICTURE_SIZE), "--infer_steps", str(STEPS)]
    guidance = ["--guidance_scale", "1", "--flow_shift", str(FLOW_SHIFT)]
    return ["wan_generate_video.py", "--task", lesson.task, *known, *size, *guidance, "--device", "cpu"]
