"""How fast latents are cached, and in how much memory, with 0, 1 and 2 worker processes that decode ahead.

    python -m benchmarks.caching --images 300 --clips 6 --repeat 3

It makes a data set of photographs around 1024x768, each with a control image, and of real clips, builds the demo's
small models, and starts fpack_cache_latents.py as a user would. The numbers of workers take turns, so that a machine
that grows slower does so for all of them. Rates come from the script's own report: loading models is not in them.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from PIL import Image, ImageChops, ImageOps
from tqdm import tqdm

from benchmarks.memory import Peak, watched
from demo.material import CLIPS, PHOTOGRAPHS, clip_path, write_material
from demo.models import ModelPaths, build_models

WORKERS = (0, 1, 2)
SIZES = ((1024, 768), (768, 1024), (896, 896))
SUFFIXES = (".jpg", ".png")
SECONDS_BETWEEN_LOOKS = 0.1
IMAGES = """\
[[datasets]]
image_directory = {source}
control_directory = {controls}
cache_directory = {cache}
caption_extension = ".txt"
resolution = {size}
enable_bucket = true
batch_size = 4
fp_1f_clean_indices = [0]
fp_1f_target_index = 9
"""
CLIPS_FILE = """\
[[datasets]]
video_directory = {source}
cache_directory = {cache}
caption_extension = ".txt"
resolution = {size}
enable_bucket = true
frame_extraction = "full"
max_frames = 37
"""
HEADINGS = ("", "workers", "items/s", "ratio", "whole run", "main process", "all workers")

Call = Callable[[Sequence[str]], tuple[str, Peak]]
"""Runs a script with its arguments; gives what it said, and its memory."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of item, and how it is cached."""

    kind: str
    """As the script's report says: "images" or "clips"."""
    count: int
    config: Path
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run of the script."""

    seconds: float
    """Of loading, encoding and writing."""
    wall: float
    """Of the whole script."""
    peak: Peak


def write_tasks(folder: Path, *, images: int, clips: int, size: int) -> list[Task]:
    """Writes the data set and its two files; a kind of which there is none is left out."""
    tasks = []
    if images:
        _write_images(folder / "images", folder / "controls", images)
        flags = ("--one_frame", "--one_frame_no_2x", "--one_frame_no_4x")
        config = _write_config(folder, "images", IMAGES, size)
        tasks.append(Task(kind="images", count=images, config=config, flags=flags))
    if clips:
        source = folder / "clips"
        source.mkdir()
        for number in range(clips):
            shutil.copyfile(clip_path(CLIPS[number % len(CLIPS)]), source / f"{number:04d}.mp4")
            (source / f"{number:04d}.txt").write_text("A clip.", encoding="utf-8")
        tasks.append(Task(kind="clips", count=clips, config=_write_config(folder, "clips", CLIPS_FILE, size)))
    return tasks


def _write_config(folder: Path, kind: str, text: str, size: int) -> Path:
    paths = {"source": folder / kind, "controls": folder / "controls", "cache": folder / f"cache_{kind}"}
    quoted = {name: json.dumps(path.as_posix(), ensure_ascii=False) for name, path in paths.items()}
    config = folder / f"{kind}.toml"
    config.write_text(text.format(**quoted, size=size), encoding="utf-8")
    return config


def _write_images(folder: Path, controls: Path, count: int) -> None:
    """No two are alike: photographs, shifted by their number."""
    folder.mkdir()
    controls.mkdir()
    material = write_material(folder.parent / "material")
    photographs = [Image.open(getattr(material, name)).convert("RGB") for name in PHOTOGRAPHS]
    for number in tqdm(range(count), desc="writing pictures", unit="picture"):
        size, suffix = SIZES[number % len(SIZES)], SUFFIXES[number // len(SIZES) % len(SUFFIXES)]
        for place, turn in ((folder, 0), (controls, 1)):
            picture = ImageOps.fit(photographs[(number + turn) % len(photographs)], size)
            ImageChops.offset(picture, 7 * number, 3 * number).save(place / f"{number:04d}{suffix}")
        (folder / f"{number:04d}.txt").write_text(f"Picture {number}.", encoding="utf-8")


def measure(task: Task, models: ModelPaths, workers: int, call: Call) -> Measurement:
    """Caches everything of one kind, whether it was cached before or not.

    Raises:
        RuntimeError: not everything was.
    """
    start = time.perf_counter()
    said, peak = call(
        [
            *("--dataset_config", str(task.config), "--num_workers", str(workers), *task.flags),
            *("--vae", str(models.vae), "--image_encoder", str(models.image_encoder)),
        ]
    )
    wall = time.perf_counter() - start
    found = re.search(rf"(\d+) {task.kind} encoded, .* in ([\d.]+) s", said)
    if found is None or int(found[1]) != task.count:
        raise RuntimeError(f"got {found and found[1]} {task.kind}; expected {task.count}; the script said:\n{said}")
    return Measurement(seconds=float(found[2]), wall=wall, peak=peak)


def call_script(arguments: Sequence[str]) -> tuple[str, Peak]:
    """Starts `fpack_cache_latents.py` and watches it."""
    return watched([sys.executable, "fpack_cache_latents.py", *arguments], pause=SECONDS_BETWEEN_LOOKS)


def run_all(
    tasks: Sequence[Task], models: ModelPaths, *, workers: Sequence[int], repeat: int, call: Call
) -> dict[tuple[str, int], list[Measurement]]:
    """(kind, workers) -> what was measured, `repeat` times."""
    turns = [(task, number) for _ in range(repeat) for number in workers for task in tasks]
    found: dict[tuple[str, int], list[Measurement]] = {(task.kind, n): [] for task in tasks for n in workers}
    for task, number in tqdm(turns, desc="caching", unit="run"):
        found[task.kind, number].append(measure(task, models, number, call))
    return found


def table(tasks: Sequence[Task], found: Mapping[tuple[str, int], list[Measurement]]) -> str:
    """Medians of the times, and the most memory; ratios to the first number of workers."""
    rows = [HEADINGS]
    counts = {task.kind: task.count for task in tasks}
    first: dict[str, float] = {}
    for (kind, workers), runs in found.items():
        # The report rounds to tenths of a second.
        seconds = max(median(run.seconds for run in runs), 0.05)
        rate = counts[kind] / seconds
        ratio = rate / first.setdefault(kind, rate)
        wall = f"{median(run.wall for run in runs):.1f} s"
        peaks = [_mib([run.peak.main for run in runs]), _mib([run.peak.workers for run in runs])]
        rows.append((f"{counts[kind]} {kind}", str(workers), f"{rate:.2f}", f"{ratio:.2f}", wall, *peaks))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def _mib(values: Sequence[int | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known) / 2**20:.0f} MiB" if known else "not measured"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; there have to be items, and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300, help="how many (default: 300)")
    parser.add_argument("--clips", type=int, default=6, help="how many (default: 6)")
    parser.add_argument("--size", type=int, default=256, help="resolution that is encoded (default: 256)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each kind; the table has medians (default: 1)")
    options = parser.parse_args(argv)
    if min(options.images, options.clips) < 0 or not options.images + options.clips or options.repeat < 1:
        parser.error("expected some images or clips, and at least one run")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Makes everything in a temporary folder, measures and prints the table."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix="caching_benchmark_") as folder:
        models = build_models(Path(folder) / "models")
        tasks = write_tasks(Path(folder), images=options.images, clips=options.clips, size=options.size)
        found = run_all(tasks, models, workers=WORKERS, repeat=options.repeat, call=call_script)
    sys.stdout.write(f"\n{table(tasks, found)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
