"""A run of a generating script, from checked flags to saved results, in each of its modes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from common.media import check_image, image_size
from generation.check import check_jobs, check_output
from generation.interactive import console_reader, interact
from generation.jobs import single_job
from generation.pipeline import Pipeline
from generation.runner import run
from generation.series import (
    GenerateFlags,
    Plan,
    check_modes,
    output_type_like,
    plan_jobs,
    recorded_compute,
    recorded_job,
    report_check,
    show_plan,
    warn_about_differences,
)
from generation.settings import Recorded
from options.line_options import options_help
from options.prompt_line import PromptLine

Flags = TypeVar("Flags", bound=GenerateFlags)


def run_session(
    flags: Flags,
    *,
    family: str,
    open_pipeline: Callable[[Flags], Pipeline],
    decode_saved: Callable[[Flags], int],
) -> int:
    """Checks everything that needs no weights, then generates.

    Args:
        family: of the results that `--from_metadata` may repeat.
        open_pipeline: checks the models' headers; no weight is read before the pipeline's first stage.
        decode_saved: the mode of `--latent_path`, which needs no pipeline.

    Returns:
        The exit code: 1 when a job failed.
    """
    flags.compute.check()
    check_modes(flags.series, flags.request, flags.output)
    check_output(flags.output)
    if flags.output.latent_path:
        return decode_saved(flags)
    if flags.series.from_metadata:
        return _repeat(flags, family, open_pipeline)
    if flags.series.interactive:
        return _converse(flags, open_pipeline)
    plan = plan_jobs(flags.series, flags.request, flags.output, image_size)
    return _run_plan(flags, plan, open_pipeline)


def _run_plan(
    flags: Flags, plan: Plan, open_pipeline: Callable[[Flags], Pipeline], record: Recorded | None = None
) -> int:
    pipeline = open_pipeline(flags)
    check_jobs(pipeline, plan.jobs)
    if flags.series.plan is not None:
        return show_plan(pipeline, plan, flags.series.plan)
    if flags.series.check:
        return report_check(plan)
    provenance = pipeline.provenance(with_paths=flags.output.metadata_paths)
    if record:
        warn_about_differences(provenance, record, flags.series.from_metadata)
    jobs = plan.begin(provenance, plan.jobs)
    try:
        failed = run(pipeline, jobs, flags.output, provenance=provenance, on_result=plan.on_result)
    finally:
        plan.finish()
    return 1 if failed else 0


def _repeat(flags: Flags, family: str, open_pipeline: Callable[[Flags], Pipeline]) -> int:
    """Makes a result once more from the settings that it carries."""
    job, record = recorded_job(flags, family=family)
    output = replace(flags.output, output_type=output_type_like(flags.series.from_metadata, flags.output))
    request, compute = flags.request.for_models_of(job.request), recorded_compute(flags.compute, record.compute)
    flags = replace(flags, request=request, output=output, compute=compute)
    return _run_plan(flags, Plan(jobs=(job,)), open_pipeline, record)


def _converse(flags: Flags, open_pipeline: Callable[[Flags], Pipeline]) -> int:
    """The interactive loop; models are loaded with the first prompt."""
    flags.request.check()
    for flag, path in flags.request.given_images():
        check_image(path, flag=flag)
    pipeline = open_pipeline(flags)
    if flags.series.check:
        return report_check(Plan(jobs=()))
    provenance = pipeline.provenance(with_paths=flags.output.metadata_paths)
    options = flags.request.line_options

    def generate(line: str) -> None:
        job = single_job(PromptLine.parse(line, "prompt", options).over(flags.request), image_size)
        check_jobs(pipeline, [job])
        run(pipeline, [job], flags.output, provenance=provenance)

    interact(generate, console_reader(), help=options_help(options))
    return 0
