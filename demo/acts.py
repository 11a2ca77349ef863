"""The demo's acts: each asks the scripts for something, as a user would, and shows in sheets what came of it.

one_frame     rows of target indices, and one picture with four words
sweep         a sweep of the target index, as the script itself draws it
kisekaeichi   two pictures, their masks, and what becomes of both
video         two sections as a strip of frames
data_set      two kisekaeichi items and a clip as the caching script shows them
lora          a LoRA trained on the spot, and what it does to scenes that it has not seen
1f-mc         the same with two control images
wan           Wan2.1: caches, two LoRAs, one frame and a middle frame (`demo/wan_acts.py`)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from demo.data_set import caching_commands, clear_pairs, write_data_set
from demo.encoders import ModelPaths
from demo.sheets import opened, row_sheet, table_sheet, tiled
from demo.stage import Played, Stage
from demo.toy.exams import EXAM_SEED
from demo.toy.lessons import BLUE_SQUARE, TOGETHER, Example, Lesson, examples, question, teach
from demo.toy.pool import dressed_picture
from demo.toy.trials import INDICES, STEPS, Question, ask, dress, films, held_out, saved, still
from demo.toy.world import DIRECTIONS, SIZE, Scene
from demo.wan_acts import wan

NUM_DRESSED, NUM_LEARNED = 2, 6
"""Scenes that the sheets show."""
SAMPLED = 3
"""Which of those for a LoRA is shown at all strengths, and while it is trained: a black shape on a light background."""
MOVING = (
    "a yellow circle moves right on a striped blue background",
    "a red triangle moves down on a black background",
    "a red square moves left on a striped white background",
)
TURNING = "a yellow circle moves left on a blue background"
WORD_INDEX = 5
SWEPT = "a yellow square moves right on a red background"
FILMED = ("a red circle moves right on a black background", "a yellow triangle moves down on a blue background")
SWEEP = "target_index=1..9:2"
STRENGTHS = "lora=0..1:0.25"
FILM_FRAMES = (0, 12, 24, 36, 48, 60, 72)
FREE_TO_THE_END = 16
"""Indices that a film's shape can move before it touches the border."""
ENCODERS = ("vae", "text_encoder1", "text_encoder2", "image_encoder")
"""All models but the transformer, by their flags."""
NUM_SAMPLES = 4
"""While a LoRA is trained, apart from the one before the first step."""


def one_frame(stage: Stage) -> Played:
    """Target indices and directions, out of one call."""
    moving = [scene_of(caption, free_indices=max(INDICES)) for caption in MOVING]
    turning = scene_in_the_middle(TURNING)
    questions = [replace(still(scene, index), seed=1) for scene in moving for index in INDICES]
    questions += [replace(still(turning.towards(word), WORD_INDEX), seed=1) for word in DIRECTIONS]
    pictures = ask(questions, stage.folder, stage.call, models=stage.models)
    rows, words = pictures[: -len(DIRECTIONS)], pictures[-len(DIRECTIONS) :]
    index_rows = []
    for number, scene in enumerate(moving):
        generated = rows[number * len(INDICES) : (number + 1) * len(INDICES)]
        cells = [("control at 0", scene.picture())]
        cells += [(f"target {index}", picture) for index, picture in zip(INDICES, generated, strict=True)]
        cells.append((f"truth at {INDICES[-1]}", scene.picture_at(INDICES[-1])))
        index_rows.append([row_sheet(cells, title=scene.caption)])
    word_cells = [("control at 0", turning.picture())]
    word_cells += [(f'"... moves {word} ..."', picture) for word, picture in zip(DIRECTIONS, words, strict=True)]
    sheets = {
        "one_frame": tiled(index_rows),
        "words": row_sheet(word_cells, title=f"One word changed, target {WORD_INDEX}"),
    }
    return Played(sheets=sheets, made=(stage.folder / "out",))


def scene_of(caption: str, *, free_indices: float) -> Scene:
    """The first held-out scene of a caption."""
    return next(scene for scene in held_out(100, free_indices=free_indices) if scene.caption == caption)


def scene_in_the_middle(caption: str) -> Scene:
    """The first whose shape has room on all sides."""
    named = (scene for scene in held_out(1000) if scene.caption == caption)
    return next(
        scene for scene in named if all(scene.towards(word).free_indices() >= WORD_INDEX for word in DIRECTIONS)
    )


def sweep(stage: Stage) -> Played:
    """One command, one sheet."""
    scene = scene_of(SWEPT, free_indices=max(INDICES))
    start = saved(scene.picture(), stage.folder / "start.png")
    stage.call(sweep_command(stage.models, start, scene.caption))
    sheet = _sweep_sheet(stage.folder)
    return Played(sheets={"sweep": opened(sheet)}, made=(sheet,))


def sweep_command(models: ModelPaths, start: Path, caption: str) -> list[str]:
    """The picture moves along the time axis, away from its control image."""
    inputs = ["--image_path", str(start), "--control_image_path", str(start)]
    options = ["--one_frame_inference", "no_2x,no_4x", "--sweep", SWEEP]
    return _generation(models, caption, [*inputs, *options], start.parent)


def kisekaeichi(stage: Stage) -> Played:
    """The same control images with their masks, without, and with the masks exchanged."""
    pairs = list(itertools.islice(clear_pairs(iter(held_out(100))), NUM_DRESSED))
    kinds: dict[str, Callable[[Scene, Scene], Question]] = {
        "target 1": dress,
        "no masks": lambda ground, shape: dress(ground, shape, masked=False),
        "masks exchanged": _exchanged,
    }
    questions = [replace(ask_for(*pair), seed=1) for ask_for in kinds.values() for pair in pairs]
    pictures = ask(questions, stage.folder, stage.call, models=stage.models)
    rows = []
    for number, (ground, shape) in enumerate(pairs):
        masks = dress(ground, shape).masks
        cells = [("control at 0", ground.picture()), ("its mask", masks[0])]
        cells += [("control at 10", shape.picture()), ("its mask", masks[1])]
        cells += zip(kinds, pictures[number :: len(pairs)], strict=True)
        cells.append(("truth", dressed_picture(ground, shape)))
        rows.append([row_sheet(cells, title="Kisekaeichi" if number == 0 else None)])
    return Played(sheets={"kisekaeichi": tiled(rows)}, made=(stage.folder / "out",))


def _exchanged(ground: Scene, shape: Scene) -> Question:
    asked = dress(ground, shape)
    return replace(asked, masks=asked.masks[::-1])


def video(stage: Stage) -> Played:
    """Frames of two sections."""
    chosen = [scene_of(caption, free_indices=FREE_TO_THE_END) for caption in FILMED]
    clips = films(chosen, stage.folder, stage.call, models=stage.models)
    rows = []
    for scene, clip in zip(chosen, clips, strict=True):
        cells = [("start image", scene.picture()), *((f"frame {number}", clip[number]) for number in FILM_FRAMES)]
        cells.append((f"truth at {FILM_FRAMES[-1]}", scene.picture(FILM_FRAMES[-1])))
        rows.append([row_sheet(cells, title=f"Video of two sections: {scene.caption}")])
    return Played(sheets={"video": tiled(rows)}, made=(stage.folder / "out",))


def data_set(stage: Stage) -> Played:
    """The sheets that the caching script draws."""
    written = write_data_set(stage.folder)
    for command in caching_commands(stage.models, written):
        stage.call(command)
    return Played(sheets={"data_set_preview": opened(*written.previews)}, made=written.previews)


def lora(stage: Stage) -> Played:
    """Before and after, at several strengths, and what the training itself drew."""
    lesson, asked = BLUE_SQUARE, _held_out_examples(BLUE_SQUARE)
    file = teach(lesson, stage.folder, stage.call, models=stage.models, extra=_reports(lesson, asked[SAMPLED], stage))
    start = saved(asked[SAMPLED].controls[0], stage.folder / "start.png")
    stage.call(strengths_command(stage.models, lesson, start, file))
    sheets = {
        "lora": _before_and_after(stage, asked, file, lesson),
        "strengths": opened(_sweep_sheet(stage.folder)),
        "training": opened(
            stage.folder / "sample" / f"{lesson.name}_00_sheet.png", stage.folder / f"{lesson.name}_loss.png"
        ),
    }
    return Played(sheets=sheets, made=(file, stage.folder / "sample", stage.folder / "out"))


def strengths_command(models: ModelPaths, lesson: Lesson, start: Path, file: Path) -> list[str]:
    """The same picture without the LoRA, with some of it, and with all of it."""
    inputs = ["--image_path", str(start), "--control_image_path", str(start)]
    options = ["--one_frame_inference", lesson.options, "--lora", str(file), "--sweep", STRENGTHS]
    return _generation(models, lesson.caption, [*inputs, *options], start.parent)


def one_frame_multi_control(stage: Stage) -> Played:
    """1f-mc: two control images and no masks; the rule is the LoRA's."""
    file = teach(TOGETHER, stage.folder, stage.call, models=stage.models)
    sheet = _before_and_after(stage, _held_out_examples(TOGETHER), file, TOGETHER)
    return Played(sheets={"1f-mc": sheet}, made=(file, stage.folder / "out"))


def _held_out_examples(lesson: Lesson) -> list[Example]:
    return examples(lesson, seed=EXAM_SEED, count=NUM_LEARNED)


def _before_and_after(stage: Stage, asked: Sequence[Example], file: Path, lesson: Lesson) -> Image.Image:
    questions = [replace(question(lesson, example, chosen), seed=1) for chosen in (None, file) for example in asked]
    pictures = ask(questions, stage.folder, stage.call, models=stage.models)
    rows = {
        f"control at {index}": [example.controls[number] for example in asked]
        for number, index in enumerate(lesson.control_indices)
    }
    rows |= {"no LoRA": pictures[: len(asked)], "with the LoRA": pictures[len(asked) :]}
    rows["the rule"] = [example.target for example in asked]
    return table_sheet(rows, title=f'A LoRA after {lesson.steps} steps: "{lesson.caption}"')


def _reports(lesson: Lesson, example: Example, stage: Stage) -> list[str]:
    """Arguments of a training that makes samples of a scene which it does not train on."""
    controls = [
        saved(picture, stage.folder / f"sample_{number}.png") for number, picture in enumerate(example.controls)
    ]
    line = [lesson.caption, f"--i {controls[0]}", *(f"--ci {path}" for path in controls), f"--of {lesson.options}"]
    line += [f"--w {SIZE} --h {SIZE} --s {STEPS} --d 1"]
    prompts = stage.folder / "samples.txt"
    prompts.write_text(" ".join(line) + "\n", encoding="utf-8")
    encoders = [text for name in ENCODERS for text in (f"--{name}", str(getattr(stage.models, name)))]
    every = ["--sample_at_first", "--sample_every_n_steps", str(lesson.steps // NUM_SAMPLES)]
    return [*encoders, "--sample_prompts", str(prompts), *every, "--one_frame", "--loss_report"]


def _generation(models: ModelPaths, caption: str, arguments: Sequence[str], folder: Path) -> list[str]:
    """A command for one prompt; what it makes goes into a folder of its own."""
    known = [text for name in ("dit", *ENCODERS) for text in (f"--{name}", str(getattr(models, name)))]
    size = ["--video_size", str(SIZE), str(SIZE), "--infer_steps", str(STEPS), "--seed", "1", "--device", "cpu"]
    output = ["--output_type", "images", "--save_path", str(folder / "sheet")]
    return ["fpack_generate_video.py", *known, "--prompt", caption, *arguments, *size, *output]


def _sweep_sheet(folder: Path) -> Path:
    """What the only sweep of an act drew."""
    (path,) = (folder / "sheet").glob("*_sweep.png")
    return path


ACTS: Mapping[str, Callable[[Stage], Played]] = {
    "one_frame": one_frame,
    "sweep": sweep,
    "kisekaeichi": kisekaeichi,
    "video": video,
    "data_set": data_set,
    "lora": lora,
    "wan": wan,
    "1f-mc": one_frame_multi_control,
}
LONG = ("1f-mc",)
"""What takes minutes by itself: left out unless it is asked for."""
