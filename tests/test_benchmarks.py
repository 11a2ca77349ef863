"""The benchmarks run and count everything; their figures are never tested."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import benchmarks.training
import fpack_cache_latents
from benchmarks.caching import Measurement, Task, measure, parse, run_all, table, write_tasks
from benchmarks.memory import MemoryWatch, Peak, descendants, process_table, watched
from demo.models import ModelPaths

HALF_GIB = Peak(main=2**29, workers=None)


@pytest.fixture
def call(caplog: pytest.LogCaptureFixture):
    """Runs the script in this process."""
    caplog.set_level("INFO")

    def run(arguments: Sequence[str]) -> tuple[str, Peak]:
        caplog.clear()
        assert fpack_cache_latents.main([*arguments, "--device", "cpu"]) == 0
        return caplog.text, HALF_GIB

    return run


def test_every_item_is_cached_anew_in_every_run(demo_models: ModelPaths, call, tmp_path: Path) -> None:
    folder = tmp_path / "測定"
    folder.mkdir()
    tasks = write_tasks(folder, images=4, clips=1, size=64)
    found = run_all(tasks, demo_models, workers=(0,), repeat=1, call=call)
    assert [(key, len(runs)) for key, runs in found.items()] == [(("images", 0), 1), (("clips", 0), 1)]
    assert len(list((folder / "cache_images").glob("*.safetensors"))) == 4
    assert len(list((folder / "cache_clips").glob("*.safetensors"))) == 1
    with pytest.raises(RuntimeError, match="got 4 images; expected 5"):
        measure(replace(tasks[0], count=5), demo_models, 0, call)


def test_the_table_has_medians_and_ratios_to_no_workers() -> None:
    def runs(*seconds: float, peak: Peak = HALF_GIB) -> list[Measurement]:
        return [Measurement(seconds=s, wall=s + 5, peak=peak) for s in seconds]

    tasks = [Task(kind="images", count=30, config=Path("a.toml"))]
    more = Peak(main=2**30, workers=2**31)
    found = {("images", 0): runs(10, 90, 20), ("images", 2): [*runs(10, 8), *runs(12, peak=more)]}
    _, without, two = table(tasks, found).splitlines()
    assert without.split() == "30 images 0 1.50 1.00 25.0 s 512 MiB not measured".split()
    assert two.split() == "30 images 2 3.00 2.00 15.0 s 1024 MiB 2048 MiB".split()


def test_nothing_to_measure_is_refused() -> None:
    for wrong in (["--images", "0", "--clips", "0"], ["--images", "-1"], ["--repeat", "0"]):
        with pytest.raises(SystemExit):
            parse(wrong)


def test_every_number_of_checkpointed_blocks_takes_steps() -> None:
    argv = ["--width", "128", "--double_blocks", "1", "--single_blocks", "1", "--size", "32", "--steps", "1"]
    argv += ["--mixed_precision", "bf16", "--device", "cpu"]
    options = benchmarks.training.parse(argv)
    none, half, every = benchmarks.training.run_all(options, argv, benchmarks.training.measure)
    assert [(found.num_checkpointed, found.num_blocks) for found in (none, half, every)] == [(0, 2), (1, 2), (2, 2)]
    assert none.activations > half.activations > every.activations > 0
    assert all(found.seconds > 0 and found.peak is None for found in (none, half, every))


def test_the_table_of_steps_has_ratios_to_the_first_row() -> None:
    def found(number: int, seconds: float, peak: int | None) -> benchmarks.training.Measurement:
        return benchmarks.training.Measurement(
            num_checkpointed=number, num_blocks=60, seconds=seconds, activations=(61 - number) << 20, peak=peak
        )

    _, none, every = benchmarks.training.table([found(0, 1.5, None), found(60, 2.25, 2**30)]).splitlines()
    assert none.split() == "0 of 60 1.500 1.00 61.0 MiB not measured".split()
    assert every.split() == "60 of 60 2.250 1.50 1.0 MiB 1024.0 MiB".split()


@pytest.mark.parametrize("wrong", [["--width", "200"], ["--size", "24"], ["--steps", "0"], ["--batch_size", "0"]])
def test_steps_that_cannot_be_taken_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        benchmarks.training.parse(wrong)


def test_descendants_are_found_over_generations() -> None:
    rows = {1: (0, 10), 2: (1, 20), 3: (2, 30), 4: (0, 40)}
    assert descendants(rows, 1) == {2, 3}


@pytest.mark.skipif(os.name != "posix", reason="not measured on Windows")
def test_memory_of_a_process_and_of_what_it_starts_is_seen_from_outside() -> None:
    held = "import sys; held = bytearray(b'x' * (150 << 20)); print('ready', flush=True); sys.stdin.read()"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", starts], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        watch = MemoryWatch(process.pid)
        watch.look()
        assert watch.peak.workers == 0
        watch.look()
        process.stdin.close()
    assert process_table()[os.getpid()][1] > 2**20
    assert watch.peak.workers > 150 << 20 > watch.peak.main > 2**20


def test_a_watched_command_tells_what_it_says_and_complains_when_it_fails() -> None:
    said, peak = watched(
        [sys.executable, "-S", "-X", "utf8", "-c", "print('測定'); import time; time.sleep(0.1)"], pause=0.01
    )
    assert said.strip() == "測定"
    assert peak.main is None or peak.main > 2**20
    with pytest.raises(RuntimeError, match="got exit code 3 from .*(?s:.*)no cache"):
        watched([sys.executable, "-S", "-c", "import sys; print('no cache'); sys.exit(3)"], pause=0.01)


def test_nothing_is_claimed_of_a_process_that_was_never_seen() -> None:
    watch = MemoryWatch(-1)
    watch.look()
    assert watch.peak == Peak(main=None, workers=None)
