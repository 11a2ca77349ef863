"""What a command line asks for: one prompt, a file of them, a sweep, or an earlier result once more."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

from common.device import pick_device
from generation.batch import Journal, read_batch
from generation.check import check_request
from generation.jobs import Job, single_job
from generation.outputs import read_settings
from generation.pipeline import Pipeline
from generation.runner import Result, log_remarks
from generation.settings import Provenance, Recorded, recorded
from generation.sweep import SweepSheet, plan_sweep
from options.errors import UserError
from options.flags_generate import ComputeFlags, OutputFlags, RequestFlags, SeriesFlags
from options.memory_size import MemorySize
from options.request import ImageSize

logger = logging.getLogger(__name__)


class GenerateFlags(Protocol):
    """What the flags of every generating script have."""

    request: RequestFlags
    output: OutputFlags
    compute: ComputeFlags
    series: SeriesFlags


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Jobs, resolved and checked, and what to do with their results."""

    jobs: tuple[Job, ...]
    begin: Callable[[Provenance, tuple[Job, ...]], tuple[Job, ...]] = lambda provenance, jobs: jobs
    """Called when everything is checked and the first job is about to start; says which jobs are to run."""
    on_result: Callable[[Result], None] = lambda result: None
    finish: Callable[[], object] = lambda: None
    """Called when all jobs have had their turn."""


def check_modes(series: SeriesFlags, request: RequestFlags, output: OutputFlags) -> None:
    """Raises UserError for modes that exclude each other, and for options of a mode that is not on."""
    modes = {"--from_file": series.from_file, "--interactive": series.interactive, "--sweep": series.sweep}
    modes |= {"--from_metadata": series.from_metadata, "--latent_path": output.latent_path}
    chosen = [name for name, value in modes.items() if value]
    if len(chosen) > 1:
        raise UserError(chosen[1], f"{chosen[1]} beside {chosen[0]}", "one of them", "leave one out")
    if series.plan is not None and chosen in (["--interactive"], ["--latent_path"]):
        expected = "one prompt, --from_file, --sweep or --from_metadata"
        raise UserError("--plan", f"--plan beside {chosen[0]}", expected, "leave one out")
    if series.resume_batch and not series.from_file:
        raise UserError("--resume_batch", "no --from_file", "a batch to resume", "add --from_file")
    if series.search_dir and not series.from_metadata:
        raise UserError("--search_dir", "no --from_metadata", "a result to run again", "add --from_metadata")
    if series.search_dir and not os.path.isdir(series.search_dir):
        raise UserError("--search_dir", series.search_dir, "an existing folder", "check the path")
    own = [field for field in fields(request) if field.name not in request.of_models]
    changed = [field.name for field in own if getattr(request, field.name) != field.default]
    if series.from_metadata and changed:
        expected = "no settings beside --from_metadata, which brings its own"
        raise UserError(f"--{changed[0]}", getattr(request, changed[0]), expected, f"leave --{changed[0]} out")


def plan_jobs(series: SeriesFlags, request: RequestFlags, output: OutputFlags, image_size: ImageSize) -> Plan:
    """The jobs of every mode but the interactive one and the repetition of a result.

    Raises:
        UserError: anything that can be found out before weights are loaded.
    """
    if series.from_file:
        return _plan_batch(series, request, output, image_size)
    if series.sweep:
        sweep = plan_sweep(series.sweep, request, image_size)
        sheet = SweepSheet(sweep)
        return Plan(jobs=sweep.jobs, on_result=sheet.add, finish=lambda: sheet.save(Path(output.save_path)))
    return Plan(jobs=(single_job(request, image_size),))


def _plan_batch(series: SeriesFlags, request: RequestFlags, output: OutputFlags, image_size: ImageSize) -> Plan:
    lines = read_batch(series.from_file, request, image_size)
    journal = Journal(series.from_file, output)
    keys = {id(line.job): line.key for line in lines}

    def begin(provenance: Provenance, jobs: tuple[Job, ...]) -> tuple[Job, ...]:
        remaining = journal.begin(lines, provenance, resume=series.resume_batch)
        return tuple(line.job for line in remaining)

    return Plan(
        jobs=tuple(line.job for line in lines),
        begin=begin,
        on_result=lambda result: journal.add(keys[id(result.job)], result.paths),
    )


def recorded_job(flags: GenerateFlags, *, family: str) -> tuple[Job, Recorded]:
    """The job that made `--from_metadata`, and what else its file says.

    Raises:
        UserError: not a result of this family, or an input is missing or has changed.
    """
    series = flags.series
    file = Path(series.from_metadata)
    search_dir = Path(series.search_dir) if series.search_dir else None
    types = {"request_type": flags.request.request_type, "compute_type": type(flags.compute)}
    record = recorded(read_settings(file, flag="--from_metadata"), file, search_dir, family=family, **types)
    check_request(record.request)
    return Job(request=record.request, where=file.name), record


def output_type_like(file: str, output: OutputFlags) -> str:
    """The output type that was asked for, else the one that makes a file of the same kind."""
    kinds = {".png": "images", ".mp4": "video", ".safetensors": "latent"}
    return output.output_type or kinds[Path(file).suffix.lower()]


def warn_about_differences(now: Provenance, then: Recorded, file: str) -> None:
    """The result can only be the same with the same weights, types and kind of device."""
    name = Path(file).name
    for flag in sorted({*now.models, *then.models}):
        if _identity(now.models.get(flag)) != _identity(then.models.get(flag)):
            logger.warning("%s is not what made %s%s: the result may differ", flag, name, _recorded_names(then, flag))
    for setting, value in then.compute.items():
        if now.compute[setting] != value:
            logger.warning("%s was made with %s %s: the result may differ", name, setting, value)


def _identity(model: str | None) -> object:
    """What has to be the same: of a list of files all but their names."""
    if model is None or not model.startswith("["):
        return model
    return [{key: value for key, value in file.items() if key != "name"} for file in json.loads(model)]


def _recorded_names(then: Recorded, flag: str) -> str:
    """` (style.safetensors:0.8)` where files are recorded by name."""
    model = then.models.get(flag, "")
    files = json.loads(model) if model.startswith("[") else []
    names = ", ".join(f"{file['name']}:{file['multiplier']:g}" for file in files)
    return f" ({names})" if names else ""


def recorded_compute(flags: ComputeFlags, then: Mapping[str, object]) -> ComputeFlags:
    """`flags` with what a result was computed with, where the command line leaves it open."""
    defaults = {field.name: field.default for field in fields(flags)}
    names = [*flags.replayed]
    if flags.fp8_mode == "off":
        names += ["fp8", "fp8_scaled"]
    if pick_device(flags.device).type == then["device"]:
        names += flags.number_types
    return replace(flags, **{name: then[name] for name in names if getattr(flags, name) == defaults[name]})


def show_plan(pipeline: Pipeline, plan: Plan, size: MemorySize) -> int:
    """Prints what the job that computes most will cost. Returns the exit code."""
    job = max(plan.jobs, key=lambda job: pipeline.num_operations(job.request))
    if len(plan.jobs) > 1:
        sys.stdout.write(f"{job.where}, which computes the most of {len(plan.jobs)} prompts\n")
    sys.stdout.write(f"{pipeline.plan(job.request, size)}\n")
    return 0


def report_check(plan: Plan) -> int:
    """Says that `--check` found nothing wrong, and what it would remark upon. Returns the exit code."""
    for job in plan.jobs:
        log_remarks(job)
    logger.info(
        "checked: %d prompts, their images, all models' headers and the output folder are in order", len(plan.jobs)
    )
    return 0
