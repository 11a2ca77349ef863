"""What can be found out before weights are loaded; every run begins with these checks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from common.files import check_writable_folder, existing_file
from common.media import check_image
from options.errors import UserError, UserErrors
from options.flags_generate import OutputFlags
from options.request import GenerationRequest

if TYPE_CHECKING:
    from generation.jobs import Job
    from generation.pipeline import Pipeline


def check_request(request: GenerationRequest) -> None:
    """Raises UserError for an input image that cannot be read, or a LoRA file that is not there."""
    for flag, path in dict.fromkeys(request.input_paths):
        _check_image_once(path, flag)
    for lora in request.loras:
        existing_file(lora.path, flag="--lora", expected="a LoRA file, or PATH:multiplier")


@cache
def _check_image_once(path: str, flag: str) -> None:
    """Lines of a file and cells of a sweep share their images; failures are not remembered."""
    check_image(path, flag=flag)


def check_jobs(pipeline: Pipeline, jobs: Sequence[Job]) -> None:
    """Raises UserErrors, one line for each job that the models cannot do."""
    errors = []
    for job in jobs:
        try:
            pipeline.check(job.request)
        except UserError as error:
            errors.append(UserError.within(job.where, error) if len(jobs) > 1 else error)
    if errors:
        raise UserErrors(errors)


def check_output(output: OutputFlags) -> None:
    """Raises UserError for an output folder that is not given or cannot be written."""
    if output.save_path is None:
        raise UserError("--save_path", "nothing", "a folder for results", "give --save_path")
    check_writable_folder(output.save_path, flag="--save_path")
