"""Loss, learning rate and samples in TensorBoard and Weights & Biases.

Neither is needed for training: the packages are imported when they are asked for, and a tracker that fails while
training goes on is dropped with a warning.
"""

from __future__ import annotations

import logging
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from common.files import check_writable_folder, existing_file
from common.flag_options import options_of, values_of
from networks.network import NormReport
from options.errors import UserError, did_you_mean, one_line
from options.flags_saving import TrackingFlags

logger = logging.getLogger(__name__)

DEFAULT_PROJECT = "network_train"
NAMES = ("tensorboard", "wandb")
PATHS = frozenset(
    "dit vae text_encoder1 text_encoder2 tokenizer1 tokenizer2 image_encoder t5 t5_tokenizer clip base_weights "
    "network_weights dataset_config validation_dataset_config sample_prompts config_file output_config "
    "log_tracker_config output_dir logging_dir resume".split()
)
"""Options that say where things lie: `--log_config` leaves them out."""


# ---- what is logged ----


class LossAverage:
    """The mean of the losses of the last epoch's worth of batches.

    A loss that is not a number is left out, so that one bad batch does not spoil the average for ever.
    """

    def __init__(self) -> None:
        self._losses: list[float | None] = []

    def add(self, place: int, loss: float) -> None:
        """Takes a loss in.

        Args:
            place: the batch's number in its epoch, from 0: the loss replaces the one of the epoch before.
        """
        if not math.isfinite(loss):
            return
        self._losses += [None] * (place + 1 - len(self._losses))
        self._losses[place] = loss

    @property
    def value(self) -> float:
        """NaN as long as there is no loss."""
        losses = [loss for loss in self._losses if loss is not None]
        return math.fsum(losses) / len(losses) if losses else math.nan

    def state(self) -> list[float | None]:
        """For JSON."""
        return list(self._losses)

    def load_state(self, saved: Sequence[float | None]) -> None:
        """Goes on from what `state` gave."""
        self._losses = list(saved)


def step_values(
    *,
    loss: float,
    average: float,
    groups: Sequence[Mapping[str, object]],
    norms: NormReport | None = None,
) -> dict[str, float]:
    """What is logged for a step, by the names that users' charts have.

    Args:
        groups: of the optimizer, with their names. D-Adaptation and Prodigy keep their estimate there as `d`.
        norms: what `--scale_weight_norms` did.
    """
    values = {"loss/current": loss, "loss/average": average}
    for group in groups:
        values |= {f"lr/{kind}{group['name']}": rate for kind, rate in _rates(group).items()}
    if norms is not None:
        values["max_norm/keys_scaled"] = norms.num_scaled
        values["max_norm/average_key_norm"] = norms.mean
        values["max_norm/max_key_norm"] = norms.max
    return values


def _rates(group: Mapping[str, object]) -> dict[str, float]:
    if (rate := group["lr"]) is None:  # Adafactor makes its own
        return {}
    rates = {"": float(rate)}
    if "d" in group:
        rates["d*lr/"] = float(group["d"]) * float(rate)
        if "effective_lr" in group:
            rates["d*eff_lr/"] = float(group["d"]) * float(group["effective_lr"])
    return rates


def loggable_config(flags: object) -> dict[str, bool | int | float | str]:
    """The options of a run for `--log_config`: nothing secret, and nothing about the disks of this machine."""
    hidden = {option.name for option in options_of(type(flags)) if option.metadata.get("secret") or option.is_refused}
    config = {}
    for name, value in values_of(flags):
        if name in hidden | PATHS or value is None or (isinstance(value, str) and os.path.isabs(value)):
            continue
        config[name] = value if isinstance(value, bool | int | float | str) else _listed(value)
    return config


def _listed(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ---- where it goes ----


class Tracker(Protocol):
    """One place to log to."""

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Logs numbers of a step."""

    def log_epoch(self, values: Mapping[str, float], *, epoch: int, step: int) -> None:
        """Logs numbers of an epoch, counted from 1, which ended at `step`."""

    def log_sample(self, number: int, path: Path, *, step: int) -> None:
        """Shows the picture or video of a prompt."""

    def close(self) -> None:
        """Writes what is not written yet."""


class TensorBoard:
    """Event files."""

    def __init__(self, folder: Path, arguments: Mapping[str, object], config: Mapping[str, object], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A run that goes on from a state makes some steps again: what is logged of them already is taken back.
        again = {"purge_step": step + 1} if step else {}
        self._writer = SummaryWriter(**{"log_dir": os.fspath(folder), **again, **arguments})
        if config:
            self._writer.add_hparams(dict(config), {}, run_name=".")

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_epoch(self, values: Mapping[str, float], *, epoch: int, step: int) -> None:
        self.log(values, step=epoch)

    def log_sample(self, number: int, path: Path, *, step: int) -> None:
        """Nothing: samples lie beside the LoRA."""

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run on a server, or in a folder when `WANDB_MODE` is offline."""

    def __init__(self, arguments: Mapping[str, object], config: Mapping[str, object], key: str | None) -> None:
        import wandb

        if key is not None:
            wandb.login(key=key)
        self._wandb = wandb
        self._run = wandb.init(**({"config": dict(config)} if config else {}), **arguments)
        # Steps never go back there, so epochs are counted by an axis of their own.
        self._run.define_metric("epoch")
        self._run.define_metric("loss/epoch", step_metric="epoch")

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self._run.log(dict(values), step=step)

    def log_epoch(self, values: Mapping[str, float], *, epoch: int, step: int) -> None:
        self._run.log({**values, "epoch": epoch}, step=step)

    def log_sample(self, number: int, path: Path, *, step: int) -> None:
        kind = self._wandb.Image if path.suffix.lower() in (".png", ".jpg", ".webp") else self._wandb.Video
        self._run.log({f"sample_{number}": kind(os.fspath(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


@dataclass(frozen=True)
class Trackers:
    """All trackers of a run; none in the processes that do not log."""

    _by_name: dict[str, Tracker]

    def __bool__(self) -> bool:
        return bool(self._by_name)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Logs numbers of a step; steps go on counting in a resumed run."""
        self._each("log", values, step=step)

    def log_epoch(self, values: Mapping[str, float], *, epoch: int, step: int) -> None:
        """Logs numbers of an epoch, counted from 1, which ended at `step`."""
        self._each("log_epoch", values, epoch=epoch, step=step)

    def log_sample(self, number: int, path: Path, *, step: int) -> None:
        """Shows the picture or video of the prompt of this number, where a tracker can."""
        self._each("log_sample", number, path, step=step)

    def close(self) -> None:
        """Writes what is not written yet; nothing is logged afterwards."""
        self._each("close")
        self._by_name.clear()

    def _each(self, method: str, *arguments: object, **named: object) -> None:
        for name, tracker in list(self._by_name.items()):
            try:
                getattr(tracker, method)(*arguments, **named)
            except Exception as error:
                logger.warning("%s fails and is left out from here on: %s", name, one_line(str(error)))
                del self._by_name[name]


def check_trackers(flags: TrackingFlags) -> None:
    """What can be known before training; nothing is written.

    Raises:
        UserError: a package is missing, the file of `--log_tracker_config` is wrong, or logs cannot be written.
    """
    for name in flags.trackers:
        if find_spec(name) is None:
            raise UserError(
                "--log_with", f"{name}, which is not installed", f"the package {name}", f"pip install {name}"
            )
    _arguments_from_file(flags)
    if flags.trackers and flags.logging_dir:
        check_writable_folder(flags.logging_dir, flag="--logging_dir")


def open_trackers(
    flags: TrackingFlags, *, started_at: float, step: int = 0, config: Mapping[str, object] | None = None
) -> Trackers:
    """Starts what the flags ask for; for one process only.

    Args:
        started_at: seconds since 1970 at which the run first started: a resumed run goes on in the folder of the first.
        step: what the run goes on from.
        config: options to log, see `loggable_config`.

    Raises:
        UserError: a tracker cannot be started.
    """
    given = _arguments_from_file(flags)
    opened: dict[str, Tracker] = {}
    for name in flags.trackers:
        try:
            opened[name] = _open(name, flags, given, log_folder(flags, started_at), step, config or {})
        except Exception as error:
            Trackers(opened).close()
            expected, remedy = "a tracker that starts", "mend that, or leave it out with --log_with"
            raise UserError("--log_with", f"{name}, which says: {error}", expected, remedy) from error
    return Trackers(opened)


def log_folder(flags: TrackingFlags, started_at: float) -> Path | None:
    """This run's folder in `--logging_dir`: the prefix and the local time of its first start."""
    if flags.logging_dir is None:
        return None
    started = datetime.fromtimestamp(started_at)
    return Path(flags.logging_dir) / f"{flags.log_prefix or ''}{started:%Y%m%d%H%M%S}"


def _open(
    name: str,
    flags: TrackingFlags,
    given: Mapping[str, Mapping[str, object]] | None,
    folder: Path | None,
    step: int,
    config: Mapping[str, object],
) -> Tracker:
    project = flags.log_tracker_name or DEFAULT_PROJECT
    if name == "tensorboard":
        return TensorBoard(folder / project, (given or {}).get(name, {}), config, step)
    arguments: dict[str, object] = {"project": project}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        arguments["dir"] = os.fspath(folder)
    if given is None and flags.wandb_run_name is not None:
        arguments["name"] = flags.wandb_run_name
    return WeightsAndBiases(arguments | dict((given or {}).get(name, {})), config, flags.wandb_api_key)


def _arguments_from_file(flags: TrackingFlags) -> dict[str, Mapping[str, object]] | None:
    """`--log_tracker_config`: tracker -> arguments; None when it is not given."""
    if flags.log_tracker_config is None:
        return None
    where = "--log_tracker_config"
    path = existing_file(flags.log_tracker_config, flag=where, expected="a TOML file")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(where, path, "valid TOML in UTF-8", str(error)) from error
    for name, table in tables.items():
        if name not in NAMES or not isinstance(table, Mapping):
            expected = "tables [tensorboard] and [wandb]"
            raise UserError(f"{where} {path}", name, expected, did_you_mean(name, NAMES, "remove it"))
    return tables
