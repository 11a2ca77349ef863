"""What is logged while training, where, and that a broken logger does not stop it."""

import importlib
import math
import sys
from dataclasses import dataclass, field
from datetime import datetime
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from networks.network import NormReport
from options.errors import UserError
from options.flag_fields import flag, later
from options.flags_saving import TrackingFlags, UploadFlags, check_tracking
from training import tracking
from training.tracking import LossAverage, check_trackers, log_folder, loggable_config, open_trackers, step_values

STARTED = datetime(2026, 1, 2, 3, 4, 5).timestamp()
FOLDER = "試し-20260102030405"


# ---- the average ----


@pytest.mark.parametrize("num_batches", [1, 3, 7])
def test_average_is_the_mean_of_the_last_epochs_worth_of_batches(num_batches: int) -> None:
    losses = [math.sin(number * number) + 1 for number in range(25)]
    average = LossAverage()
    for number, loss in enumerate(losses):
        average.add(number % num_batches, loss)
        window = losses[max(0, number + 1 - num_batches) : number + 1]
        assert average.value == pytest.approx(sum(window) / len(window), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_does_not_enter_the_average(bad: float) -> None:
    average = LossAverage()
    assert math.isnan(average.value)
    average.add(0, bad)
    assert math.isnan(average.value)
    for place, loss in enumerate([1.0, bad, 3.0]):
        average.add(place, loss)
    assert average.value == 2.0
    average.add(1, 5.0)
    assert average.value == 3.0
    average.add(2, bad)
    assert average.value == 3.0


def test_average_goes_on_from_its_state() -> None:
    first, second = LossAverage(), LossAverage()
    first.add(0, 0.1), first.add(2, 0.3)
    second.load_state(first.state())
    for average in (first, second):
        average.add(0, 0.7), average.add(3, 1 / 3)
    assert first.value == second.value and first.state() == second.state() == [0.7, None, 0.3, 1 / 3]


# ---- names ----


def test_step_is_logged_by_the_names_that_charts_have() -> None:
    groups = [{"name": "unet", "lr": 1e-4}, {"name": "unet plus", "lr": 16e-4}]
    assert step_values(loss=0.5, average=0.25, groups=groups) == {
        **{"loss/current": 0.5, "loss/average": 0.25, "lr/unet": 1e-4, "lr/unet plus": 16e-4}
    }
    norms = step_values(loss=1, average=1, groups=[], norms=NormReport(num_scaled=3, mean=0.5, max=0.9))
    assert {name: value for name, value in norms.items() if name.startswith("max_norm")} == {
        **{"max_norm/keys_scaled": 3, "max_norm/average_key_norm": 0.5, "max_norm/max_key_norm": 0.9}
    }


def test_estimates_of_adaptive_optimizers_are_logged_beside_the_rate() -> None:
    prodigy = {"name": "unet", "lr": 2.0, "d": 3e-4}
    assert step_values(loss=1, average=1, groups=[prodigy])["lr/d*lr/unet"] == pytest.approx(6e-4)
    plus = step_values(loss=1, average=1, groups=[prodigy | {"effective_lr": 5.0}])
    assert plus["lr/d*eff_lr/unet"] == pytest.approx(15e-4) and plus["lr/d*lr/unet"] == pytest.approx(6e-4)
    assert [n for n in step_values(loss=1, average=1, groups=[{"name": "unet", "lr": None}]) if "lr" in n] == []


# ---- stand-ins ----


class Writer:
    """Stands in for TensorBoard's."""

    opened: list["Writer"] = []

    def __init__(self, **arguments: object) -> None:
        if "nonsense" in arguments:
            raise TypeError("unexpected keyword argument 'nonsense'")
        self.arguments, self.events, self.hparams = arguments, [], None
        self.is_closed = False
        Writer.opened.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.events.append((name, value, step))

    def add_hparams(self, config: dict, metrics: dict, run_name: str) -> None:
        self.hparams = config

    def flush(self) -> None:
        self.events.append("flush")

    def close(self) -> None:
        self.is_closed = True


class Run:
    """Stands in for a run of Weights & Biases, which takes no step twice."""

    def __init__(self, **arguments: object) -> None:
        self.arguments, self.events, self.axes, self.last, self.is_finished = arguments, [], {}, 0, False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict, step: int) -> None:
        assert step >= self.last, "dropped by the server"
        self.last = step
        self.events.append((values, step))

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Both packages, in place of the real ones or of none; gives that of Weights & Biases."""
    Writer.opened = []
    board, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    board.SummaryWriter = Writer
    wandb.__spec__, wandb.keys, wandb.runs = ModuleSpec("wandb", None), [], []
    wandb.login = lambda key: wandb.keys.append(key)
    wandb.Image, wandb.Video = (lambda path: ("image", path)), (lambda path: ("video", path))
    wandb.init = lambda **arguments: wandb.runs.append(Run(**arguments)) or wandb.runs[-1]
    package = ModuleType("tensorboard")
    package.__spec__ = ModuleSpec("tensorboard", None)
    for module in (board, wandb, package):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return wandb


def flags(tmp_path: Path, **given: object) -> TrackingFlags:
    made = TrackingFlags(**{"logging_dir": str(tmp_path / "ログ"), "log_prefix": "試し-"} | given)
    check_tracking(made)
    return made


# ---- TensorBoard ----


def test_tensorboard_gets_values_in_the_folder_of_the_run(tmp_path, stand_ins) -> None:
    trackers = open_trackers(flags(tmp_path), started_at=STARTED)
    trackers.log({"loss/current": 0.5, "lr/unet": 1e-4}, step=3)
    trackers.log_epoch({"loss/epoch": 0.4}, epoch=1, step=3)
    trackers.log_sample(0, tmp_path / "a.png", step=3)
    (writer,) = Writer.opened
    assert writer.arguments == {"log_dir": str(tmp_path / "ログ" / FOLDER / "network_train")}
    assert writer.events == [
        *(("loss/current", 0.5, 3), ("lr/unet", 1e-4, 3), "flush"),
        *(("loss/epoch", 0.4, 1), "flush"),
    ]
    trackers.close()
    assert writer.is_closed and not trackers


def test_resumed_run_goes_on_in_its_folder_and_takes_back_what_it_does_again(tmp_path, stand_ins) -> None:
    for step in (0, 100):
        open_trackers(flags(tmp_path, log_tracker_name="名前"), started_at=STARTED, step=step)
    first, second = Writer.opened
    assert first.arguments["log_dir"] == second.arguments["log_dir"] == str(tmp_path / "ログ" / FOLDER / "名前")
    assert "purge_step" not in first.arguments and second.arguments["purge_step"] == 101


def test_real_tensorboard_reads_what_was_logged(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chosen = flags(tmp_path)
    check_trackers(chosen)
    first = open_trackers(chosen, started_at=STARTED, config={"rank": 4, "name": "桜", "flag": True})
    for step in range(1, 6):
        first.log({"loss/current": float(step)}, step=step)
    first.log_epoch({"loss/epoch": 0.25}, epoch=1, step=5)
    first.close()
    second = open_trackers(chosen, started_at=STARTED, step=3)
    second.log({"loss/current": 40.0, "loss/average": math.nan}, step=4)
    second.close()
    events = EventAccumulator(str(tmp_path / "ログ" / FOLDER / "network_train"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/current")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [(e.step, e.value) for e in events.Scalars("loss/epoch")] == [(1, 0.25)]
    assert any("hparams" in tag for tag in events.summary_metadata)


# ---- Weights & Biases ----


def test_wandb_gets_name_project_folder_and_key(tmp_path, stand_ins) -> None:
    chosen = flags(tmp_path, log_with="wandb", wandb_run_name="試し", log_tracker_name="計画", wandb_api_key="secret")
    open_trackers(chosen, started_at=STARTED, config={"seed": 1})
    (run,) = stand_ins.runs
    folder = str(tmp_path / "ログ" / FOLDER)
    assert run.arguments == {"project": "計画", "dir": folder, "name": "試し", "config": {"seed": 1}}
    assert Path(folder).is_dir() and stand_ins.keys == ["secret"]


def test_wandb_works_without_a_folder_or_key(stand_ins) -> None:
    chosen = TrackingFlags(log_with="wandb")
    check_tracking(chosen)
    open_trackers(chosen, started_at=STARTED)
    assert stand_ins.runs[0].arguments == {"project": "network_train"} and stand_ins.keys == []


def test_wandb_counts_epochs_on_their_own_axis_and_shows_samples(tmp_path, stand_ins) -> None:
    trackers = open_trackers(flags(tmp_path, log_with="wandb"), started_at=STARTED, step=90)
    trackers.log({"loss/current": 0.5}, step=100)
    trackers.log_epoch({"loss/epoch": 0.4}, epoch=1, step=100)
    trackers.log_sample(0, Path("絵.png"), step=100)
    trackers.log_sample(1, Path("動画.mp4"), step=100)
    trackers.log({"loss/current": 0.6}, step=101)
    (run,) = stand_ins.runs
    assert run.axes == {"epoch": None, "loss/epoch": "epoch"}
    assert run.events == [
        ({"loss/current": 0.5}, 100),
        ({"loss/epoch": 0.4, "epoch": 1}, 100),
        ({"sample_0": ("image", "絵.png")}, 100),
        ({"sample_1": ("video", "動画.mp4")}, 100),
        ({"loss/current": 0.6}, 101),
    ]
    trackers.close()
    assert run.is_finished


# ---- which, and with what ----


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"logging_dir": None}, ()),
        ({}, ("tensorboard",)),
        ({"log_with": "tensorboard"}, ("tensorboard",)),
        ({"log_with": "wandb", "logging_dir": None}, ("wandb",)),
        ({"log_with": "all"}, ("tensorboard", "wandb")),
    ],
)
def test_trackers_are_those_that_were_asked_for(tmp_path, stand_ins, given, expected: tuple[str, ...]) -> None:
    chosen = flags(tmp_path, **given)
    check_trackers(chosen)
    trackers = open_trackers(chosen, started_at=STARTED)
    assert chosen.trackers == expected and bool(trackers) == bool(expected)
    assert len(Writer.opened) == ("tensorboard" in expected) and len(stand_ins.runs) == ("wandb" in expected)
    trackers.log({"loss/current": 1.0}, step=1)


def test_arguments_from_a_file_take_the_place_of_ours(tmp_path, stand_ins) -> None:
    file = tmp_path / "設定.toml"
    file.write_text('[wandb]\ntags = ["桜"]\nproject = "other"\n[tensorboard]\nflush_secs = 5\n', encoding="utf-8-sig")
    chosen = flags(tmp_path, log_with="all", log_tracker_config=str(file), wandb_run_name="not used")
    check_trackers(chosen)
    open_trackers(chosen, started_at=STARTED)
    assert stand_ins.runs[0].arguments.items() >= {"tags": ["桜"], "project": "other"}.items()
    assert "name" not in stand_ins.runs[0].arguments
    assert Writer.opened[0].arguments["flush_secs"] == 5


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[wadb]\nx = 1", "got wadb; expected tables .*; did you mean wandb"),
        ("wandb = 1", "got wandb; expected tables"),
        ("x = ", "expected valid TOML"),
        (None, "--log_tracker_config: got .*; expected a TOML file; there is no such file"),
    ],
)
def test_wrong_files_of_arguments_are_refused_before_training(tmp_path, stand_ins, content, complaint: str) -> None:
    file = tmp_path / "x.toml"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        check_trackers(flags(tmp_path, log_tracker_config=str(file)))


def test_arguments_that_a_tracker_does_not_know_are_one_line(tmp_path, stand_ins) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[tensorboard]\nnonsense = 1", encoding="utf-8")
    with pytest.raises(UserError, match="--log_with: got tensorboard, which says: .*'nonsense'"):
        open_trackers(flags(tmp_path, log_tracker_config=str(file)), started_at=STARTED)


def test_a_tracker_that_was_started_is_closed_when_the_next_one_fails(tmp_path, stand_ins) -> None:
    stand_ins.init = None
    with pytest.raises(UserError, match="--log_with: got wandb"):
        open_trackers(flags(tmp_path, log_with="all"), started_at=STARTED)
    assert Writer.opened[0].is_closed


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_the_command_that_brings_it(tmp_path, monkeypatch, name: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(tracking, "find_spec", lambda wanted: None if wanted == name else real(wanted))
    with pytest.raises(UserError, match=f"--log_with: got {name}, which is not installed; .*; pip install {name}"):
        check_trackers(flags(tmp_path, log_with=name))


def test_a_folder_that_cannot_be_made_is_noticed_before_training(tmp_path, stand_ins) -> None:
    (tmp_path / "ログ").write_bytes(b"a file")
    with pytest.raises(UserError, match="--logging_dir"):
        check_trackers(flags(tmp_path))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"log_with": "tensorboard"}, "--log_with: got tensorboard; expected --logging_dir"),
        ({"log_with": "all"}, "--log_with: got all; expected --logging_dir"),
        ({"logging_dir": "x", "log_prefix": "a/b"}, "--log_prefix: got a/b"),
        ({"log_config": True}, "--log_config: got nothing to log with"),
        ({"log_tracker_config": "x.toml"}, "--log_tracker_config: got nothing to log with"),
    ],
)
def test_flags_about_logs_that_cannot_work_are_refused(given, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        check_tracking(TrackingFlags(**given))
    assert str(caught.value).startswith(complaint)


def test_folder_of_a_run_is_named_by_prefix_and_start(tmp_path) -> None:
    assert log_folder(TrackingFlags(logging_dir="logs", log_prefix="a_"), STARTED) == Path("logs/a_20260102030405")
    assert log_folder(TrackingFlags(logging_dir="logs"), STARTED) == Path("logs/20260102030405")
    assert log_folder(TrackingFlags(), STARTED) is None


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path, stand_ins, caplog) -> None:
    trackers = open_trackers(flags(tmp_path, log_with="all"), started_at=STARTED)

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    Writer.opened[0].add_scalar = fail
    for step in (1, 2):
        trackers.log({"loss/current": 0.5}, step=step)
    assert caplog.text.count("tensorboard fails and is left out from here on: No space left on device") == 1
    assert [step for _, step in stand_ins.runs[0].events] == [1, 2]


# ---- the options ----


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    dit: str | None = flag("x")
    network_weights: str | None = flag("x")
    rank: int = flag("x", default=4)
    network_args: tuple[str, ...] = flag("x", default=())
    task: str | None = flag("x")
    fp8: bool = later("x", default=False)


@dataclass(frozen=True, kw_only=True)
class AllFlags:
    models: ModelFlags = field(default_factory=ModelFlags)
    tracking: TrackingFlags = field(default_factory=TrackingFlags)
    upload: UploadFlags = field(default_factory=UploadFlags)


def test_logged_options_hold_no_secret_and_no_path() -> None:
    everything = AllFlags(
        models=ModelFlags(dit="x.safetensors", network_weights="y", network_args=("a=1", "b=2"), task=str(Path.cwd())),
        tracking=TrackingFlags(wandb_api_key="k", logging_dir="logs", log_config=True, log_prefix="p"),
        upload=UploadFlags(huggingface_token="t", huggingface_repo_id="user/repo"),
    )
    assert loggable_config(everything) == {
        **{"rank": 4, "network_args": "a=1 b=2", "log_config": True, "log_prefix": "p"},
        **{"huggingface_repo_id": "user/repo", "save_state_to_huggingface": False, "async_upload": False},
    }
