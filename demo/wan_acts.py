"""The demo's second act: Wan2.1's one frame, from pictures over caches and LoRAs to pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from demo.sheets import heading, opened, row_sheet, tiled
from demo.stage import Played, Stage
from demo.toy.rows import Row
from demo.toy.trials import answers
from demo.wan_lessons import (
    COLOURS,
    LESSONS,
    MIDDLE,
    TARGET_INDEX,
    WanDataSet,
    WanLesson,
    caching_commands,
    generation_command,
    question,
    training_command,
    write_lessons,
)
from demo.wan_models import WanModelPaths
from demo.wan_paths import build_teachable_models

HONESTY = (
    "Small untrained models: this shows that caches, training and generation fit together, not what Wan can do. "
    "The LoRA was trained on these very pictures, for {steps} steps."
)
SHEETS: Mapping[str, tuple[str, str]] = {
    COLOURS.name: ("wan_one_frame", "Wan2.1 (i2v), one frame"),
    MIDDLE.name: ("wan_middle_frame", "Wan2.1 (flf2v), a middle frame"),
}
"""The names of the documents' pictures, and their titles."""


def wan(stage: Stage) -> Played:
    """Two lessons: their caches in one go, and for each a LoRA and pictures without it and with it."""
    models = build_teachable_models(stage.folder / "models", [lesson.kind for lesson in LESSONS])
    data_set = write_lessons(stage.folder)
    for command in caching_commands(models[LESSONS[0].kind], data_set):
        stage.call(command)
    sheets, made = {"wan_data_set": opened(*data_set.previews)}, list(data_set.previews)
    for lesson in LESSONS:
        name, title = SHEETS[lesson.name]
        file, pictures = _taught(lesson, models[lesson.kind], data_set, stage)
        sheets[name] = _sheet(lesson, pictures, title)
        made += [file, stage.folder / lesson.name / "out"]
    return Played(sheets=sheets, made=tuple(made))


def _taught(
    lesson: WanLesson, models: WanModelPaths, data_set: WanDataSet, stage: Stage
) -> tuple[Path, list[tuple[Row, np.ndarray, np.ndarray]]]:
    """The LoRA's file; and each row with its picture without the LoRA, and with it."""
    folder = stage.folder / lesson.name
    stage.call(training_command(lesson, models, data_set.configs[lesson.name], folder))
    file, rows = folder / f"{lesson.name}.safetensors", lesson.rows
    questions = [question(lesson, row, lora) for lora in (None, file) for row in rows]
    pictures = answers(generation_command(lesson, models), questions, folder, stage.call)
    return file, list(zip(rows, pictures[: len(rows)], pictures[len(rows) :], strict=True))


def _sheet(lesson: WanLesson, pictures: Sequence[tuple[Row, np.ndarray, np.ndarray]], title: str) -> Image.Image:
    """A row for each picture: control images, what is made of them, and what was taught."""
    strips, caption = [], None
    for row, without, with_lora in pictures:
        cells = [(f"control at {i}", picture) for i, picture in zip(lesson.control_indices, row.controls, strict=True)]
        cells += [(f"target {TARGET_INDEX}, no LoRA", without), (f"target {TARGET_INDEX}, with the LoRA", with_lora)]
        prompt = None if row.caption == caption else f'"{row.caption}"'
        strips.append([row_sheet([*cells, ("as taught", row.target)], title=prompt, times=1)])
        caption = row.caption
    width = strips[0][0].width
    text = f"{title}. {HONESTY.format(steps=lesson.steps)}"
    return tiled([[heading(text, width)], *strips])
