"""What the toy world's models can do, as numbers over held-out scenes: `python -m demo.toy.exams`.

Every exam asks for pictures through the scripts (`demo/toy/trials.py`) and gives one `Marks` for each thing measured.
Where an exam has a counter-example (a wrong index, another word, no mask), its marks stand beside the right ones.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from demo.toy.lessons import Lesson, examples, question
from demo.toy.sight import Seen, astray, error, find, find_in, travelled
from demo.toy.trials import INDICES, SECTIONS, Call, ask, dress, films, held_out, still
from demo.toy.world import DIRECTIONS, FRAMES_PER_INDEX, SPEED, Scene, to_uint8

ROOT = Path(__file__).resolve().parents[2]
NUM_SCENES = 20
EXAM_SEED = 9100
"""Of the lessons' held-out examples."""
RIGHT_SLOPE = SPEED * FRAMES_PER_INDEX
"""Pixels per index."""
MOMENTS = (0, 18, 36, 54)
"""Frames of a video that are looked at: 37 begins the second section."""
LOST = 64.0
"""Pixels that a shape counts as astray when there is none."""


@dataclass(frozen=True, kw_only=True)
class Marks:
    """One measured quantity, scene by scene."""

    name: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    def share(self, limit: float) -> float:
        """The part of the scenes whose value is below a limit."""
        return float(np.mean(np.array(self.values) < limit))

    def __str__(self) -> str:
        low, middle, high = np.quantile(self.values, [0.1, 0.5, 0.9])
        return f"{self.name:44} mean {self.mean:7.3f}   10 % {low:7.3f}   median {middle:7.3f}   90 % {high:7.3f}"


Results = Mapping[str, Marks]


def _marks(**values: Sequence[float]) -> Results:
    return {name: Marks(name=name, values=tuple(map(float, row))) for name, row in values.items()}


def one_frame(folder: Path, call: Call, *, count: int = NUM_SCENES, indices: Sequence[int] = INDICES) -> Results:
    """Target indices move a shape along its direction. Astray in pixels; slopes in pixels per index."""
    chosen = held_out(count, free_indices=max(indices))
    pictures = ask([still(scene, index) for scene in chosen for index in indices], folder, call)
    rows = [pictures[i : i + len(indices)] for i in range(0, len(pictures), len(indices))]
    seen = [[find_in(picture, scene) for picture in row] for scene, row in zip(chosen, rows, strict=True)]
    ways = [[_travelled(one, scene) for one in row] for scene, row in zip(chosen, seen, strict=True)]
    return _marks(
        astray=[
            _astray(o, s, i) for s, row in zip(chosen, seen, strict=True) for o, i in zip(row, indices, strict=True)
        ],
        backward_steps=[sum(b <= a for a, b in zip(way, way[1:], strict=False)) for way in ways],
        slope=[np.dot(indices, way) / np.dot(indices, indices) for way in ways],
        picture_error=[
            error(picture, scene.picture_at(index))
            for scene, row in zip(chosen, rows, strict=True)
            for picture, index in zip(row, indices, strict=True)
        ],
    )


def wrong_order(folder: Path, call: Call, *, count: int = NUM_SCENES, index: int = 5) -> Results:
    """The control image stands behind the picture that is asked for, as far as it should stand before it."""
    chosen = held_out(count, free_indices=index)
    options = f"target_index=1,control_index={1 + index},no_2x,no_4x"
    questions = [replace(still(scene, index), options=options) for scene in chosen]
    pictures = ask(questions, folder, call)
    return _marks(astray=[_astray(find_in(p, s), s, index) for p, s in zip(pictures, chosen, strict=True)])


def without_control(folder: Path, call: Call, *, count: int = NUM_SCENES, index: int = 5) -> Results:
    """One frame with a blank instead of its control image: the mask hides all of it."""
    chosen = held_out(count, free_indices=index)
    nothing = np.zeros(chosen[0].picture().shape[:2], np.uint8)
    pictures = ask([replace(still(scene, index), masks=(nothing,)) for scene in chosen], folder, call)
    return _marks(astray=[_astray(find_in(p, s), s, index) for p, s in zip(pictures, chosen, strict=True)])


def prompt(folder: Path, call: Call, *, count: int = NUM_SCENES, index: int = 5) -> Results:
    """Another direction word takes the shape the other way."""
    opposite = {"right": "left", "left": "right", "up": "down", "down": "up"}
    candidates = held_out(20 * count, free_indices=index)
    chosen = [s for s in candidates if s.towards(opposite[s.direction]).free_indices() >= index][:count]
    turned = [scene.towards(opposite[scene.direction]) for scene in chosen]
    pictures = ask([still(scene, index) for scene in [*chosen, *turned]], folder, call)
    told, other = pictures[: len(chosen)], pictures[len(chosen) :]
    return _marks(
        astray=[_astray(find_in(p, s), s, index) for p, s in zip(told, chosen, strict=True)],
        astray_turned=[_astray(find_in(p, s), s, index) for p, s in zip(other, turned, strict=True)],
        apart=[
            _travelled(find_in(a, s), s) - _travelled(find_in(b, s), s)
            for a, b, s in zip(told, other, chosen, strict=True)
        ],
    )


def kisekaeichi(folder: Path, call: Call, *, count: int = NUM_SCENES) -> Results:
    """With masks, the shape comes from one picture and the background from the other."""
    drawn = held_out(8 * count)
    pairs = [(a, b) for a, b in zip(drawn[::2], drawn[1::2], strict=True) if _can_be_told_apart(a, b)][:count]
    questions = [dress(a, b) for a, b in pairs] + [dress(a, b, masked=False) for a, b in pairs]
    pictures = ask(questions, folder, call)
    truths = [to_uint8(b.over(a.ground())) for a, b in pairs]
    masked, unmasked = pictures[: len(pairs)], pictures[len(pairs) :]

    def off(picture: np.ndarray, pair: tuple[Scene, Scene]) -> float:
        ground, shape = pair
        seen = find(picture, colour=shape.colour, ground=ground.ground())
        return (
            LOST
            if seen is None
            else float(np.hypot(*(a - b for a, b in zip(seen.centre, shape.middle(), strict=True))))
        )

    return _marks(
        picture_error=[error(p, t) for p, t in zip(masked, truths, strict=True)],
        picture_error_unmasked=[error(p, t) for p, t in zip(unmasked, truths, strict=True)],
        astray=[off(p, pair) for p, pair in zip(masked, pairs, strict=True)],
        ground_error=[_ground_error(p, a) for p, (a, _) in zip(masked, pairs, strict=True)],
    )


def video(folder: Path, call: Call, *, count: int = NUM_SCENES) -> Results:
    """Through both sections the shape moves as the caption says, and colours stay."""
    chosen = held_out(count, free_indices=16)
    clips = films(chosen, folder, call)
    seen = [[find_in(clip[frame], scene) for frame in MOMENTS] for scene, clip in zip(chosen, clips, strict=True)]
    ways = [[_travelled(one, scene) for one in row] for scene, row in zip(chosen, seen, strict=True)]
    return _marks(
        frames=[len(clip) for clip in clips],
        astray=[
            _astray(o, s, frame / FRAMES_PER_INDEX)
            for s, row in zip(chosen, seen, strict=True)
            for o, frame in zip(row, MOMENTS, strict=True)
        ],
        off_colour=[1.0 if one is None else one.off_colour for row in seen for one in row],
        ground_error=[
            _ground_error(clip[frame], s) for s, clip in zip(chosen, clips, strict=True) for frame in MOMENTS
        ],
        first_section=[way[2] - way[0] for way in ways],
        second_section=[way[3] - way[2] for way in ways],
        picture_error=[
            error(clip[frame], s.picture(frame)) for s, clip in zip(chosen, clips, strict=True) for frame in MOMENTS
        ],
    )


def lesson(chosen: Lesson, lora: Path | None, folder: Path, call: Call, *, count: int = NUM_SCENES) -> Results:
    """Pictures by a lesson's rule, with a LoRA or without: how far they are from it where the rule's shape is to be."""
    asked = examples(chosen, seed=EXAM_SEED, count=count)
    pictures = ask([question(chosen, example, lora) for example in asked], folder, call)
    return _marks(shape_error=[error(p[e.shape], e.target[e.shape]) for p, e in zip(pictures, asked, strict=True)])


def _ground_error(picture: np.ndarray, scene: Scene) -> float:
    """The largest difference, 0 ... 255, of the colours that half of a picture's pixels and of its background have."""
    middles = [np.median(one.reshape(-1, 3), axis=0) for one in (picture, to_uint8(scene.ground()))]
    return float(np.abs(middles[0] - middles[1]).max())


def _can_be_told_apart(ground: Scene, shape: Scene) -> bool:
    return ground.background not in (shape.colour, shape.background)


def _astray(seen: Seen | None, scene: Scene, index: float) -> float:
    return LOST if seen is None else astray(seen, scene, index)


def _travelled(seen: Seen | None, scene: Scene) -> float:
    return 0.0 if seen is None else travelled(seen, scene)


def call_script(command: Sequence[str]) -> None:
    """Runs a script in its own process."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr[-2000:]}")


def main() -> None:
    """Prints every exam but those of the lessons, which train LoRAs: see the tests marked `long`."""
    print(f"{NUM_SCENES} held-out scenes each; {RIGHT_SLOPE:.1f} pixels per index are right")
    print(f"directions {', '.join(DIRECTIONS)}; {SECTIONS} sections")
    for exam in (one_frame, wrong_order, without_control, prompt, kisekaeichi, video):
        with tempfile.TemporaryDirectory() as folder:
            print(f"\n{exam.__name__}")
            for marks in exam(Path(folder), call_script).values():
                print(f"  {marks}")


if __name__ == "__main__":
    main()
