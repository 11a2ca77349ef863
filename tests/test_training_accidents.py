"""What is saved when a run cannot go on, and how soon it stops when it is asked to."""

import logging
import signal
from pathlib import Path

import pytest
import torch

import fpack_train_network
from tests.training_driver import NAME
from training import step, trainer
from training.objective import Objective
from training.states import state_step


def fail_at_step_three(error: Exception, monkeypatch) -> None:
    call, count = Objective.__call__, 0

    def losses(self, *arguments, **named):
        nonlocal count
        count += 1
        if count == 3:
            raise error
        return call(self, *arguments, **named)

    monkeypatch.setattr(Objective, "__call__", losses)


def test_too_little_memory_is_one_line_and_what_was_trained_is_saved(workshop, tmp_path, monkeypatch, capsys) -> None:
    fail_at_step_three(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), monkeypatch)
    assert fpack_train_network.main(workshop.command(tmp_path)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "got CUDA out of memory" in line]
    assert len(said) == 1 and "step 3" in said[0] and "--gradient_checkpointing" in said[0]
    assert (tmp_path / f"{NAME}-step00000002.safetensors").is_file()
    assert state_step(tmp_path / f"{NAME}-step00000002-state") == 2


def test_an_unknown_accident_keeps_its_traceback_and_what_was_trained(workshop, tmp_path, monkeypatch) -> None:
    fail_at_step_three(RuntimeError("something else"), monkeypatch)
    with pytest.raises(RuntimeError, match="something else"):
        fpack_train_network.main(workshop.command(tmp_path))
    assert state_step(tmp_path / f"{NAME}-step00000002-state") == 2
    monkeypatch.undo()
    assert fpack_train_network.main(workshop.command(tmp_path, resume="auto")) == 0


@pytest.mark.parametrize("where", ["samples", "validation"])
def test_a_signal_is_heeded_before_samples_and_validation_go_on(where, workshop, tmp_path, monkeypatch) -> None:
    """Launchers wait for half a minute, samples of the full-size model take longer."""
    seen: list[bool] = []

    def occupied(*arguments, is_stopping, **named) -> None:
        seen.append(is_stopping())
        signal.raise_signal(signal.SIGTERM)
        seen.append(is_stopping())

    class Samples:
        def __init__(self, *arguments, **named) -> None:
            self.make, self.tracker = occupied, None

        def encode(self) -> None:
            """Nothing to encode."""

    more = {"validation_dataset_config": workshop.data, "validate_every_n_steps": 2} if where == "validation" else {}
    if where == "samples":
        monkeypatch.setattr("training.session._open_samples", lambda *arguments: Samples())
        monkeypatch.setattr(trainer, "sample_due", lambda flags, *, step, epoch_end: step == 2)
    else:
        monkeypatch.setattr(trainer, "validation_loss", lambda *a, **n: occupied(*a, **n) if seen_step(a) else 1.0)
    steps = []
    log = trainer.Trainer._log
    monkeypatch.setattr(trainer.Trainer, "_log", lambda self, *a: (steps.append(self.step), log(self, *a))[1])

    def seen_step(_: object) -> bool:
        return bool(steps) and steps[-1] == 2

    assert fpack_train_network.main(workshop.command(tmp_path, **more)) == 128 + signal.SIGTERM
    assert seen == [False, True] and steps == [1, 2]
    assert state_step(tmp_path / f"{NAME}-step00000002-state") == 2


def test_a_state_that_is_there_is_not_written_again_for_a_signal(workshop, tmp_path, monkeypatch) -> None:
    written = []
    save = trainer.save_state

    def noted(folder: Path, state: object) -> None:
        written.append(folder.name)
        save(folder, state)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(trainer, "save_state", noted)
    command = workshop.command(tmp_path, save_state=True, save_every_n_steps=2)
    assert fpack_train_network.main(command) == 128 + signal.SIGTERM
    assert written == [f"{NAME}-step00000002-state"]


def test_gradients_that_overflow_for_ever_stop_a_run_in_fp16(workshop, tmp_path, monkeypatch, caplog) -> None:
    """A scaler alone would leave out every step in silence, and the LoRA would hold nothing."""

    def spoil(parameters, processes) -> None:
        for parameter in parameters:
            parameter.grad.fill_(float("nan"))

    monkeypatch.setattr(step, "average_gradients", spoil)
    monkeypatch.setattr(step, "MAX_OVERFLOWS", 4)
    assert fpack_train_network.main(workshop.command(tmp_path, mixed_precision="fp16")) == 1
    (said,) = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert "step 4" in said and "4 steps in a row" in said


def test_a_state_beyond_the_end_of_the_run_is_refused(workshop, tmp_path, capsys) -> None:
    assert fpack_train_network.main(workshop.command(tmp_path, save_state=True, max_train_steps=3)) == 0
    assert fpack_train_network.main(workshop.command(tmp_path, resume="auto", max_train_steps=2)) == 2
    assert "a state after step 3; expected at most the 2 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("raise RuntimeError('CUDA setup failed')", "CUDA setup failed"),
        ("def create_network(multiplier, dim, alpha, vae): pass", "create_network"),
        ("x = (", "was never closed"),
    ],
)
def test_a_network_module_of_someone_else_fails_in_one_line(
    source: str, named: str, workshop, tmp_path, monkeypatch, capsys
) -> None:
    name = f"their_network_{len(source)}"
    (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert fpack_train_network.main(workshop.command(tmp_path / "out", network_module=name)) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--network_module")]
    assert named in said
