"""LoRAs that teach the toy world's transformer a new rule, by the product's scripts, in a minute or two on a CPU.

blue_square   whatever moves in the control image becomes a blue square, where it is
together      1f-mc: the second control's shape on the first control's background, without any mask
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from demo.data_set import quoted
from demo.encoders import ModelPaths
from demo.toy.pool import dressed_picture
from demo.toy.rows import Row, write_rows
from demo.toy.trials import MODELS, Call, Question
from demo.toy.world import SIZE, Scene, scenes

SEED = 300
CONFIG = """\
[[datasets]]
image_jsonl_file = {lines}
cache_directory = {cache}
resolution = {size}
batch_size = 8
fp_1f_clean_indices = [{controls}]
fp_1f_target_index = {target}
fp_1f_no_post = true
"""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A rule, and how it is learned."""

    name: str
    caption: str
    target_index: int
    control_indices: tuple[int, ...]
    pairs: int
    """Examples."""
    steps: int
    learning_rate: float = 2e-3
    rank: int = 16

    @property
    def options(self) -> str:
        """What `--one_frame_inference` is told."""
        controls = ";".join(map(str, self.control_indices))
        return f"target_index={self.target_index},control_index={controls},no_2x,no_4x,no_post"

    def with_indices(self, target: int, *controls: int) -> Lesson:
        """The same lesson at other places of the time axis."""
        return replace(self, target_index=target, control_indices=controls)


@dataclass(frozen=True, kw_only=True)
class Example:
    """What goes in, and what is to come out."""

    controls: tuple[np.ndarray, ...]
    target: np.ndarray
    shape: np.ndarray
    """(SIZE, SIZE) bool: where the rule wants a shape."""


BLUE_SQUARE = Lesson(
    name="blue_square", caption="becomes a blue square", target_index=1, control_indices=(0,), pairs=64, steps=600
)
TOGETHER = Lesson(
    name="together",
    caption="the shape of the second picture on the background of the first",
    target_index=9,
    control_indices=(0, 1),
    pairs=128,
    steps=1200,
)


def blue_square(scene: Scene) -> Example:
    """The first lesson's rule."""
    square = replace(scene, shape="square", colour="blue")
    return Example(controls=(scene.picture(),), target=square.picture(), shape=square.coverage() > 0.5)


def together(ground: Scene, shape: Scene) -> Example:
    """The second lesson's rule."""
    controls = ground.picture(), shape.picture()
    return Example(controls=controls, target=dressed_picture(ground, shape), shape=shape.coverage() > 0.5)


def examples(lesson: Lesson, *, seed: int = SEED, count: int | None = None) -> list[Example]:
    """Seeded examples of a lesson's rule."""
    count = lesson.pairs if count is None else count
    drawn = scenes(seed)
    if lesson.name == BLUE_SQUARE.name:
        chosen = (scene for scene in drawn if "blue" not in (scene.colour, scene.background))
        return [blue_square(scene) for scene in itertools.islice(chosen, count)]
    pairs = (
        pair
        for pair in zip(drawn, drawn, strict=False)
        if pair[0].background not in (pair[1].colour, pair[1].background)
    )
    return [together(*pair) for pair in itertools.islice(pairs, count)]


def question(lesson: Lesson, example: Example, lora: Path | None) -> Question:
    """How a picture by the lesson's rule is asked for."""
    return Question(caption=lesson.caption, controls=example.controls, options=lesson.options, lora=lora)


def teach(lesson: Lesson, folder: Path, call: Call, *, models: ModelPaths = MODELS, extra: Sequence[str] = ()) -> Path:
    """Writes the data set, caches it, trains the LoRA, and returns its file.

    Args:
        extra: more arguments of the training.
    """
    config = write_lesson(lesson, folder)
    for command in commands(lesson, folder, config, models, extra):
        call(command)
    return folder / f"{lesson.name}.safetensors"


def write_lesson(lesson: Lesson, folder: Path) -> Path:
    """Writes pictures, captions (JSONL) and the data set file, and returns the latter."""
    rows = [
        Row(name=f"{number:03}", caption=lesson.caption, controls=example.controls, target=example.target)
        for number, example in enumerate(examples(lesson))
    ]
    jsonl, config = write_rows(rows, folder), folder / "data.toml"
    text = CONFIG.format(
        lines=quoted(jsonl),
        cache=quoted(folder / "cache"),
        size=SIZE,
        controls=", ".join(map(str, lesson.control_indices)),
        target=lesson.target_index,
    )
    config.write_text(text, encoding="utf-8")
    return config


def commands(
    lesson: Lesson, folder: Path, config: Path, models: ModelPaths, extra: Sequence[str] = ()
) -> list[list[str]]:
    """What a user writes behind `python`: latents, texts, training."""
    data = ["--dataset_config", str(config), "--device", "cpu"]
    image_models = ["--vae", str(models.vae), "--image_encoder", str(models.image_encoder)]
    text_models = ["--text_encoder1", str(models.text_encoder1), "--text_encoder2", str(models.text_encoder2)]
    one_frame = ["--one_frame", "--one_frame_no_2x", "--one_frame_no_4x"]
    rank = str(lesson.rank)
    network = ["--network_module", "networks.lora_framepack", "--network_dim", rank, "--network_alpha", rank]
    schedule = ["--learning_rate", str(lesson.learning_rate), "--lr_scheduler", "cosine"]
    schedule += ["--max_train_steps", str(lesson.steps), "--timestep_sampling", "shift", "--discrete_flow_shift", "3"]
    output = ["--output_dir", str(folder), "--output_name", lesson.name, "--seed", "1"]
    training = [*network, *schedule, *output, "--guidance_scale", "10", "--max_data_loader_n_workers", "0", *extra]
    return [
        ["fpack_cache_latents.py", *data, *image_models, *one_frame, "--num_workers", "0"],
        ["fpack_cache_text_encoder_outputs.py", *data, *text_models, "--num_workers", "0"],
        ["fpack_train_network.py", "--dit", str(models.dit), *data, *training],
    ]
