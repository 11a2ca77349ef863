"""What can be found out before weights are loaded; every run begins with these checks."""

from __future__ import annotations

from functools import cache

from common.files import check_writable_folder
from common.media import check_image
from options.flags_generate import OutputFlags
from options.request import GenerationRequest


def check_request(request: GenerationRequest) -> None:
    """Raises UserError for an input image that cannot be read."""
    for flag, path in dict.fromkeys(request.input_paths):
        _check_image_once(path, flag)


@cache
def _check_image_once(path: str, flag: str) -> None:
    """Lines of a file and cells of a sweep share their images; failures are not remembered."""
    check_image(path, flag=flag)


def check_output(output: OutputFlags) -> None:
    """Raises UserError for an output folder that cannot be written."""
    check_writable_folder(output.save_path, flag="--save_path")
