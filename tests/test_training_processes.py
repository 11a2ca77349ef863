"""Training in processes of its own: killed, interrupted, several at once, and started by accelerate."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training_builders import difference, write_data_set
from tests.training_driver import (
    CLOCK,
    HARD,
    NAME,
    NUM_KILLS,
    final_file,
    item,
    output_of,
    spoil,
    train,
    trained,
)

pytestmark = pytest.mark.usefixtures("repeatable_runs")
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="signals and forks of POSIX")
RATES = {"lr_scheduler": "cosine", "lr_warmup_steps": 4}


def environment() -> dict[str, str]:
    return os.environ | CLOCK | {"PYTHONUTF8": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def outcome(*command: str | Path, repository: Path, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=repository,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=180,
        **settings,
    )


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# ---- killed and interrupted ----


@posix_only
def test_a_run_that_is_killed_at_any_moments_ends_with_the_same_bytes(workshop, tmp_path, repository):
    saves = {"save_every_n_steps": 2, "save_last_n_steps": 2, "save_state": True, "resume": "auto"}
    command = workshop.command(tmp_path / "出力 [1]", **HARD, **RATES, **saves)
    run = written(tmp_path / "run.json", command)
    answer = outcome("-m", "tests.training_driver", "kills", run, "3", repository=repository)
    assert answer.returncode == 0, answer.stderr
    found = [int(line) for line in answer.stdout.split()]
    assert len(found) == NUM_KILLS and len(set(found)) >= 4, found
    assert not list((tmp_path / "出力 [1]").glob("*.new")) and not list((tmp_path / "出力 [1]").glob("*.old"))


@posix_only
def test_ctrl_c_while_workers_start_saves_and_the_run_goes_on_exactly(workshop, tmp_path, repository):
    """A terminal sends it to the workers too."""
    command = workshop.command(tmp_path / "出力", **HARD, **RATES, resume="auto")
    run = written(tmp_path / "run.json", [*command, "--max_data_loader_n_workers", "1"])
    answer = outcome("-m", "tests.training_driver", "ctrl_c", run, repository=repository, start_new_session=True)
    assert answer.returncode == 130 and "Traceback" not in answer.stderr, answer.stderr
    assert "stopped after step 1 of 9" in answer.stderr
    assert {path.name for path in (tmp_path / "出力").iterdir()} == {
        f"{NAME}-step00000001.safetensors",
        f"{NAME}-step00000001-state",
    }
    assert train(command) == 0
    undisturbed = workshop.command(tmp_path / "undisturbed", **HARD, **RATES)
    assert train(undisturbed) == 0
    assert final_file(command).read_bytes() == final_file(undisturbed).read_bytes()


# ---- several processes ----


def side_by_side(*command: str | Path, repository: Path) -> subprocess.CompletedProcess:
    """Two processes of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))
    return outcome(*launcher, *command, repository=repository)


@pytest.fixture(scope="module")
def commands(workshop, tmp_path_factory) -> dict[str, list[str]]:
    """Runs for two processes, one after the other; with dropout, every process draws its own."""
    folder = tmp_path_factory.mktemp("二人")
    even = folder / "四.toml"
    text = workshop.data.read_text(encoding="utf-8").replace("num_repeats = 3", "num_repeats = 4")
    even.write_text(text, encoding="utf-8")
    dropout = {"network_dropout": 0.3, "max_train_steps": 9}
    alike = {"dataset_config": even, "optimizer_type": "SGD", "learning_rate": 0.5, "max_grad_norm": 0.1}
    saves = {"save_every_n_steps": 4, "save_state": True}
    bad = write_data_set(folder / "壊れた", {name: item(1) for name in ("a", "b", "c", "猫")}, batch_size=1)
    spoil(bad, "猫")
    return {
        "alike": workshop.command(folder / "alike", **alike, **saves, max_train_steps=7),
        "undisturbed": workshop.command(folder / "undisturbed", **dropout),
        "interrupted": ["signalled 5", *workshop.command(folder / "interrupted", **dropout)],
        "resumed": workshop.command(folder / "interrupted", **dropout, resume="auto"),
        "spoilt": workshop.command(folder / "spoilt", dataset_config=bad, seed=2),
        "refused": workshop.command(workshop.dit),
    }


@pytest.fixture(scope="module")
def told(commands, tmp_path_factory) -> list[dict]:
    """What both processes say of all runs."""
    runs = written(tmp_path_factory.mktemp("二人") / "runs.json", commands)
    repository = Path(__file__).resolve().parent.parent
    answer = side_by_side("-m", "tests.training_driver", "together", runs, repository=repository)
    assert answer.returncode == 0, answer.stderr
    return [json.loads(runs.with_suffix(f".{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


def test_two_processes_train_like_one_with_batches_as_large_as_theirs(told, workshop, commands, tmp_path):
    assert [one["world"] for one in told] == [2, 2] and told[0]["codes"]["alike"] == told[1]["codes"]["alike"] == 0
    together = load_file(final_file(commands["alike"]))
    alone = [*commands["alike"], "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "alone")]
    assert train(alone) == 0
    found = load_file(tmp_path / "alone" / f"{NAME}.safetensors")
    assert difference(found, together) <= 1e-5
    state = output_of(commands["alike"]) / f"{NAME}-step00000004-state"
    alone += ["--resume", str(state), "--output_dir", str(tmp_path / "moved")]
    assert train(alone) == 0, "a state of two processes goes on in one"
    assert difference(load_file(tmp_path / "moved" / f"{NAME}.safetensors"), together) <= 1e-5


def test_of_several_processes_one_writes(told):
    assert told[1]["written"] == []
    files = [f"{NAME}-step00000004.safetensors", f"{NAME}-step00000004-state"]
    last = [f"{NAME}.safetensors", f"{NAME}-state"]
    assert told[0]["written"][:4] == files + last


def test_a_signal_to_one_process_stops_both_and_they_go_on_exactly(told, commands):
    for one in told:
        codes = [one["codes"][name] for name in ("undisturbed", "interrupted", "resumed")]
        assert codes == [0, 128 + signal.SIGTERM, 0]
    undisturbed, resumed = (final_file(commands[name]).read_bytes() for name in ("undisturbed", "resumed"))
    assert undisturbed == resumed


def test_a_loss_that_is_no_number_in_one_process_stops_both_and_saves_what_was_trained(told, commands):
    assert [one["codes"]["spoilt"] for one in told] == [1, 1]
    (file,) = output_of(commands["spoilt"]).glob("*-step00000001.safetensors")  # 猫 is in the second of two steps
    assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_what_the_first_process_refuses_all_refuse(told):
    """A folder that cannot be written to: the others would wait for it."""
    assert [one["codes"]["refused"] for one in told] == [2, 2]


def test_every_process_has_random_numbers_of_its_own(told, commands):
    """Those of a run that has not used any are as they were at first."""
    state = output_of(commands["alike"]) / f"{NAME}-step00000004-state"
    assert not torch.equal(*(torch.load(state / f"rng_{rank}.pt")["torch"] for rank in (0, 1)))


# ---- accelerate ----


def test_accelerate_starts_it_with_its_mixed_precision(workshop, tmp_path, repository):
    """As the guide writes it, but for the path and the CPU."""
    command = workshop.command(tmp_path / "launched", device=None, max_train_steps=2)
    launch = ("-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_cpu_threads_per_process", "1")
    script = ("--mixed_precision", "bf16", "fpack_train_network.py")
    answer = outcome(*launch, *script, *command, repository=repository)
    assert answer.returncode == 0, answer.stderr
    direct = trained(workshop.command(tmp_path / "direct", max_train_steps=2, mixed_precision="bf16"))
    assert difference(load_file(final_file(command)), direct) == 0
