"""Caching in processes of its own: killed, on a full disk, several at once, and `--help`."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cache_builders import files, image_set, run_loop, video_set

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes that are started here: with several threads sums may differ in the last bit."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def start(*command: str | Path, repository: Path, **settings) -> subprocess.Popen:
    environment = os.environ | {"PYTHONUTF8": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=repository,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        **settings,
    )


def outcome(*command: str | Path, repository: Path, **settings) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    process = start(*command, repository=repository, **settings)
    try:
        output, complaints = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output, complaints


def driver(*arguments: str | Path, **settings) -> tuple[int, str, str]:
    return outcome("-m", "tests.cache_driver", *arguments, **settings)


def side_by_side(*command: str | Path, repository: Path) -> tuple[int, str, str]:
    """Two processes of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))
    return outcome(*launcher, *command, repository=repository)


def scripted(config: Path, models, *flags: str) -> list[str]:
    """The real script and its flags."""
    places = ["--vae", models.vae, "--image_encoder", models.image_encoder, "--num_workers", "0"]
    return ["fpack_cache_latents.py", "--dataset_config", config, "--one_frame", *places, *flags]


@pytest.mark.parametrize(
    "script",
    [
        *("fpack_cache_latents", "fpack_cache_text_encoder_outputs"),
        *("wan_cache_latents", "wan_cache_text_encoder_outputs"),
    ],
)
def test_help_needs_no_heavy_library(script, repository) -> None:
    heavy = "'torch', 'numpy', 'PIL', 'av', 'safetensors', 'transformers', 'diffusers'"
    code = f"""
import sys, {script}
try:
    {script}.main(["--help"])
except SystemExit as end:
    print([name for name in ({heavy}) if name in sys.modules], end.code)
"""
    status, output, _ = outcome("-c", code, repository=repository)
    assert status == 0 and output.rstrip().endswith("[] 0") and "--skip_existing" in output


@posix_only
@pytest.mark.parametrize("kind", ["images", "videos"])
def test_killed_at_any_moment_it_leaves_whole_files_and_goes_on(tmp_path, kind, repository) -> None:
    if kind == "images":
        config, mode = image_set(tmp_path / "データ [1]", list("abcdefgh")), "one_frame"
    else:
        config, mode = video_set(tmp_path, {"v": 13, "猫": 9}, target_frames=[9]), "sections"
    run_loop(config, mode)
    undisturbed = files(config.parent / "cache")
    shutil.rmtree(config.parent / "cache")
    status, output, complaints = driver("kills", config, mode, "3", repository=repository)
    assert status == 0, complaints
    counts = [int(line.split()[0]) for line in output.splitlines()]
    assert any(0 < count < len(undisturbed) for count in counts), counts
    assert {name: c for name, c in files(config.parent / "cache").items() if name[0] != "."} == undisturbed


@posix_only
def test_the_killed_script_goes_on(tmp_path, demo_models, one_thread, repository) -> None:
    config = image_set(tmp_path, list("abcdefghijkl"))
    command = scripted(config, demo_models, "--skip_existing", "--num_workers", "1")
    process = start(*command, repository=repository, start_new_session=True)
    while process.poll() is None and not list(tmp_path.glob("cache/[a-z]*")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # its worker too
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    interrupted = {name: c for name, c in files(tmp_path / "cache").items() if name[0] != "."}
    assert 1 <= len(interrupted) < 12

    import fpack_cache_latents

    arguments = [str(argument) for argument in scripted(config, demo_models, "--skip_existing")[1:]]
    assert fpack_cache_latents.main(arguments) == 0
    resumed = {name: c for name, c in files(tmp_path / "cache").items() if name[0] != "."}
    shutil.rmtree(tmp_path / "cache")
    assert fpack_cache_latents.main(arguments) == 0
    assert resumed == files(tmp_path / "cache")
    assert resumed.items() >= interrupted.items()


@posix_only
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing_half_done(tmp_path, repository) -> None:
    import resource

    config = image_set(tmp_path, ["a", "猫"], size=(40, 32))

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    status, _, complaints = driver(
        "run", config, "one_frame", tmp_path / "log", repository=repository, preexec_fn=small_files
    )
    assert status == 2 and "Traceback" not in complaints
    line = complaints.strip().splitlines()[-1]
    assert "a_0040x0032_fp.safetensors: got File too large" in line and "go on with --skip_existing" in line
    assert files(tmp_path / "cache") == {}
    assert driver("run", config, "one_frame", tmp_path / "log", repository=repository)[0] == 0
    assert len(files(tmp_path / "cache")) == 2


def test_two_processes_share_the_work(tmp_path, repository) -> None:
    names = ["猫", "b", "c", "d", "e"]
    config = image_set(tmp_path, [*names, "bad"])
    (tmp_path / "images" / "bad.png").write_bytes((tmp_path / "images" / "bad.png").read_bytes()[:-60])
    run_loop(image_set(tmp_path / "earlier", ["gone"]))
    shutil.copytree(tmp_path / "earlier" / "cache", tmp_path / "cache")
    status, _, complaints = side_by_side(
        *("-m", "tests.cache_driver", "run", config, "one_frame", tmp_path / "log"), repository=repository
    )
    shares = [(tmp_path / f"log.{rank}").read_text(encoding="utf-8").split() for rank in (0, 1)]
    assert all(shares) and sorted(shares[0] + shares[1]) == sorted(names)
    assert status == 1
    assert complaints.count("removed, as nothing in the data set belongs to it: gone_0040x0032") == 1
    assert complaints.count("6 items, 5 used, 0 dropped, 1 failed") == 1
    together = files(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert run_loop(config)[0] == 1
    assert together == files(tmp_path / "cache")


def test_two_processes_of_the_script_write_what_one_does(tmp_path, demo_models, one_thread, repository) -> None:
    import fpack_cache_latents

    config = image_set(tmp_path, ["a", "b", "c"])
    command = scripted(config, demo_models, "--skip_existing")
    status, _, complaints = side_by_side(*command, repository=repository)
    assert status == 0, complaints
    assert complaints.count("3 images encoded") == 1
    assert complaints.count("--vae: 180 tensors") == 2, "both brought their models in"
    together = files(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert fpack_cache_latents.main([str(argument) for argument in command[1:]]) == 0
    assert together == files(tmp_path / "cache")
