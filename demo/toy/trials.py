"""What the toy world's models can do, asked through the scripts as a user would, and measured.

A trial writes pictures of scenes that no model has seen and a file of prompts, calls `fpack_generate_video.py`, and
looks at what came out (`demo/toy/sight.py`).
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.media import read_video
from demo.encoders import ModelPaths
from demo.toy.dit import WINDOW, dress_masks
from demo.toy.world import SIZE, TOGETHER, Scene, scenes

MODELS = ModelPaths.under(Path(__file__).parent / "models")
HELD_OUT_SEED = 9001
"""Of scenes for trials: none of the training's seeds."""
STEPS = 12
INDICES = (1, 3, 5, 7, 9)
SECTIONS = 2
Call = Callable[[Sequence[str]], None]
"""Runs a script: its name and its arguments."""


def held_out(count: int, *, free_indices: float = 0, skip: int = 0) -> list[Scene]:
    """Scenes whose shape moves freely for some indices."""
    return list(itertools.islice(scenes(HELD_OUT_SEED, free_indices=free_indices), skip, skip + count))


@dataclass(frozen=True, kw_only=True)
class Question:
    """One line of a prompt file, which makes one picture."""

    caption: str
    controls: tuple[np.ndarray, ...]
    """(H, W, 3) uint8 each."""
    options: str
    """What `--one_frame_inference` would be told."""
    masks: tuple[np.ndarray, ...] = ()
    """(H, W) uint8, white keeps."""
    lora: Path | None = None
    seed: int | None = None
    """By default the number of the line."""


def still(scene: Scene, index: int) -> Question:
    """A scene's first picture, moved to another index."""
    options = f"target_index={index},no_2x,no_4x"
    return Question(caption=scene.caption, controls=(scene.picture(),), options=options)


def dress(ground: Scene, shape: Scene, *, masked: bool = True) -> Question:
    """A kisekaeichi: the shape of one picture on the background of another."""
    return Question(
        caption=TOGETHER,
        controls=(ground.picture(), shape.picture()),
        options="target_index=1,control_index=0;10,no_2x,no_4x,no_post",
        masks=dress_masks(ground, shape) if masked else (),
    )


def ask(questions: Sequence[Question], folder: Path, call: Call, *, models: ModelPaths = MODELS) -> list[np.ndarray]:
    """The pictures (SIZE, SIZE, 3) uint8 that one call of the script makes of the questions, in their order."""
    return answers(_command(models), questions, folder, call)


def answers(command: Sequence[str], questions: Sequence[Question], folder: Path, call: Call) -> list[np.ndarray]:
    """`ask` by any command that generates; it is told the prompts, and where pictures go."""
    inputs, out = folder / "inputs", folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    inputs.mkdir(parents=True, exist_ok=True)
    lines = [_line(question, number, inputs) for number, question in enumerate(questions)]
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    call([*command, "--from_file", str(prompts), "--output_type", "images", "--save_path", str(out)])
    return [np.asarray(Image.open(path).convert("RGB")) for path in _in_order(out, "*.png", len(questions))]


def films(chosen: Iterable[Scene], folder: Path, call: Call, *, models: ModelPaths = MODELS) -> list[np.ndarray]:
    """Videos (F, SIZE, SIZE, 3) uint8 of two sections, one for each scene."""
    inputs, out = folder / "inputs", folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    inputs.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scene in enumerate(chosen):
        start = saved(scene.picture(), inputs / f"{number}_start.png")
        lines.append(f"{scene.caption} --i {start} --d {number}")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    length = ["--video_sections", str(SECTIONS), "--latent_window_size", str(WINDOW)]
    output = ["--output_type", "video", "--save_path", str(out)]
    call([*_command(models), "--from_file", str(prompts), *length, *output])
    return [np.stack([*read_video(path, flag="video")]) for path in _in_order(out, "*.mp4", len(lines))]


def _line(question: Question, number: int, folder: Path) -> str:
    controls = [saved(picture, folder / f"{number}_{i}.png") for i, picture in enumerate(question.controls)]
    masks = [saved(mask, folder / f"{number}_{i}_mask.png") for i, mask in enumerate(question.masks)]
    inline = [("i", controls[0]), *(("ci", path) for path in controls), *(("cim", path) for path in masks)]
    seed = number if question.seed is None else question.seed
    inline += [("of", question.options), ("d", seed), *([("lora", question.lora)] if question.lora else [])]
    return " ".join([question.caption, *(f"--{name} {value}" for name, value in inline)])


def saved(picture: np.ndarray, path: Path) -> Path:
    """Writes a picture (H, W, 3) or a mask (H, W), and returns its path."""
    Image.fromarray(picture).save(path)
    return path


def _command(models: ModelPaths) -> list[str]:
    flags = [text for name, path in vars(models).items() for text in (f"--{name}", str(path))]
    size = ["--video_size", str(SIZE), str(SIZE), "--infer_steps", str(STEPS)]
    return ["fpack_generate_video.py", *flags, *size, "--device", "cpu"]


def _in_order(folder: Path, pattern: str, count: int) -> list[Path]:
    """Names begin with the time, so their order is the order of the lines."""
    found = sorted(folder.glob(pattern))
    if len(found) != count:
        raise RuntimeError(f"{folder}: got {len(found)} results; expected {count}")
    return found
