"""What a run's LoRA files say of it: facts and times come in from outside, so that equal runs give equal bytes.

Four entries hold the time: `ss_session_id`, `ss_training_started_at`, `ss_training_finished_at`, `modelspec.date`. The
first two belong to the run and survive a resume with its state; the others are of the moment of saving. With
`SOURCE_DATE_EPOCH` set all four are fixed, and an interrupted run ends with the same bytes as an undisturbed one.
Without it the weights and `sshs_model_hash` are the same, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime

from dataset.epochs import stable_number
from networks.lora_metadata import modelspec, training_metadata
from options.errors import UserError
from options.flags_saving import ModelspecFlags

Clock = Callable[[], datetime]
"""Gives the time, with its zone."""
SOURCE_DATE_EPOCH = "SOURCE_DATE_EPOCH"


def run_clock(environment: Mapping[str, str] = os.environ) -> Clock:
    """The system's clock in local time; a stopped one in UTC where `SOURCE_DATE_EPOCH` is set.

    Source: reproducible-builds.org, "SOURCE_DATE_EPOCH specification".

    Raises:
        UserError: the variable is no time.
    """
    if (text := environment.get(SOURCE_DATE_EPOCH)) is None:
        return lambda: datetime.now().astimezone()
    try:
        fixed = datetime.fromtimestamp(int(text), UTC)
    except (ValueError, OverflowError, OSError):
        raise UserError(SOURCE_DATE_EPOCH, text, "seconds since 1970", "unset the variable, or correct it") from None
    return lambda: fixed


@dataclass(frozen=True, kw_only=True)
class Session:
    """A run's identity, from its first start to its end, however often it is resumed."""

    id: int
    """32 bits."""
    started_at: float
    """Seconds since 1970."""

    @classmethod
    def start(cls, now: datetime, *, seed: int) -> Session:
        """A new one. Its id depends on `seed` and `now` only: it takes nothing from any random generator."""
        started_at = now.timestamp()
        return cls(id=stable_number("session", seed, repr(started_at)) % 2**32, started_at=started_at)

    def as_dict(self) -> dict[str, int | float]:
        """For JSON."""
        return {"id": self.id, "started_at": self.started_at}

    @classmethod
    def from_dict(cls, saved: Mapping[str, object]) -> Session:
        """What `as_dict` gave.

        Raises:
            ValueError: it is something else.
        """
        if saved.keys() != {"id", "started_at"} or not all(type(value) in (int, float) for value in saved.values()):
            raise ValueError(f"not a session: {dict(saved)}")
        return cls(id=saved["id"], started_at=saved["started_at"])


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What does not change in a run; the fields are the `ss_` entries of the same names."""

    output_name: str
    learning_rate: float
    num_train_items: int
    """Of an epoch, repeats included."""
    num_batches_per_epoch: int
    num_epochs: int
    gradient_checkpointing: bool
    gradient_checkpointing_cpu_offload: bool = False
    gradient_accumulation_steps: int
    max_train_steps: int
    lr_warmup_steps: int | float
    lr_scheduler: str
    base_model_version: str
    """`framepack` or `wan`."""
    network_module: str
    network_dim: int
    network_alpha: float
    network_dropout: float | None
    mixed_precision: str
    seed: int
    training_comment: str | None
    optimizer: str
    """Module, class and arguments."""
    max_grad_norm: float
    fp8_base: bool = False
    full_fp16: bool = False
    full_bf16: bool = False
    weighting_scheme: str
    logit_mean: float
    logit_std: float
    mode_scale: float
    guidance_scale: float
    timestep_sampling: str
    sigmoid_scale: float
    discrete_flow_shift: float
    datasets: Sequence[Mapping[str, object]]
    """For JSON."""
    network_args: Mapping[str, str] | None = None
    """Left out when None."""
    sd_model_name: str | None = None
    """The transformer file's base name; left out when None."""
    vae_name: str | None = None
    """Likewise."""

    def as_entries(self) -> dict[str, object]:
        """Without `ss_`."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        entries["datasets"] = json.dumps(self.datasets)
        entries["network_args"] = None if not self.network_args else json.dumps(self.network_args)
        absent = [name for name in ("network_args", "sd_model_name", "vae_name") if entries[name] is None]
        return {name: value for name, value in entries.items() if name not in absent}


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """How modelspec names a model."""

    architecture: str
    """`framepack` or `wan2.1`."""
    implementation: str
    """The address of its code."""


def run_metadata(
    facts: TrainingFacts,
    session: Session,
    model: ModelIdentity,
    flags: ModelspecFlags,
    *,
    finished_at: datetime,
    step: int,
    epoch: int,
    timestep_range: tuple[int | None, int | None] = (None, None),
) -> dict[str, str]:
    """All entries of a LoRA file but for its hashes, which are computed where it is written.

    Args:
        finished_at: the time of saving.
        step: optimizer steps that were made.
        epoch: the epoch that is trained or was trained last, from 1, whatever the occasion of saving.
        timestep_range: `--min_timestep` and `--max_timestep`.
    """
    of_session = {"session_id": session.id, "training_started_at": session.started_at}
    of_saving = {"training_finished_at": finished_at.timestamp(), "steps": step, "epoch": epoch}
    entries = facts.as_entries() | of_session | of_saving
    spec = modelspec(
        architecture=flags.metadata_arch or model.architecture,
        implementation=model.implementation,
        title=flags.metadata_title or facts.output_name,
        date=finished_at,
        resolution=flags.resolution,
        author=flags.metadata_author,
        description=flags.metadata_description,
        license=flags.metadata_license,
        tags=flags.metadata_tags,
        timestep_range=timestep_range,
    )
    return training_metadata(entries, minimal=flags.no_metadata) | spec
