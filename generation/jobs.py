"""A request and where it came from."""

from __future__ import annotations

from dataclasses import dataclass

from generation.check import check_request
from options.flags_generate import RequestFlags
from options.request import GenerationRequest, ImageSize


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request of a run."""

    request: GenerationRequest
    where: str
    """Where it came from, for messages: `prompts.txt line 3`."""


def single_job(flags: RequestFlags, image_size: ImageSize, where: str = "prompt") -> Job:
    """One request, resolved and checked.

    Raises:
        UserError: what `RequestFlags.resolve` and `check_request` find.
    """
    request = flags.resolve(image_size=image_size)
    check_request(request)
    return Job(request=request, where=where)
