"""A file of prompts: read and checked as a whole, and resumed where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from generation.jobs import Job, single_job
from generation.settings import Provenance, content_hash
from options.errors import UserError, UserErrors
from options.flags_generate import OutputFlags, RequestFlags
from options.prompt_line import PromptLine, numbered_lines
from options.request import ImageSize

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BatchLine:
    """A line of a prompt file, ready to run."""

    job: Job
    key: str
    """Names what the line asks for; a seed that was left open is not part of it."""


def read_batch(path: str, flags: RequestFlags, image_size: ImageSize) -> list[BatchLine]:
    """Resolves and checks every line before anything is loaded.

    Raises:
        UserError: no such file, or no prompt in it.
        UserErrors: one line for each bad line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--from_file", path, "a UTF-8 text file", f"check the path ({error})") from error
    lines, errors = [], []
    for number, line in numbered_lines(text):
        where = f"{Path(path).name} line {number}"
        try:
            lines.append(_batch_line(line, where, flags, image_size))
        except UserError as error:
            errors.append(UserError.within(where, error))
    if errors:
        raise UserErrors(errors)
    if not lines:
        raise UserError("--from_file", path, "at least one prompt", "write one prompt per line")
    return lines


def _batch_line(line: str, where: str, flags: RequestFlags, image_size: ImageSize) -> BatchLine:
    own = PromptLine.parse(line, where, flags.line_options).over(flags)
    job = single_job(own, image_size, where)
    data = job.request.to_json(content_hash) | ({"seed": None} if own.seed is None else {})
    return BatchLine(job=job, key=hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest())


class Journal:
    """The finished lines of a batch, beside its results, so that a batch that was killed goes on where it was.

    Lines are known by what they ask for, not by their number: the file may be edited in between.
    """

    def __init__(self, prompt_file: str, output: OutputFlags) -> None:
        file = Path(prompt_file).resolve()
        which = hashlib.sha256(os.fsencode(file)).hexdigest()[:8]  # two files of one name may write to one folder
        self._path = Path(output.save_path) / f"{file.stem}.{which}.finished.jsonl"
        self._form = ""
        self._output_type = output.output_type or "default"

    def begin(self, lines: Sequence[BatchLine], provenance: Provenance, *, resume: bool) -> list[BatchLine]:
        """The lines that are to run: all, or on resuming those that are not finished in this form and by these models.

        Without `resume` an earlier run is forgotten.
        """
        made_by = json.dumps([self._output_type, dict(provenance.models), dict(provenance.compute)], sort_keys=True)
        self._form = hashlib.sha256(made_by.encode()).hexdigest()
        if not resume:
            self._path.unlink(missing_ok=True)
            return list(lines)
        finished = Counter(key for key, form, names in self._entries() if self._is_there(form, names))
        remaining = []
        for line in lines:
            if finished[line.key] > 0:
                finished[line.key] -= 1
            else:
                remaining.append(line)
        logger.info("--resume_batch: %d of %d lines are finished", len(lines) - len(remaining), len(lines))
        return remaining

    def add(self, key: str, paths: Sequence[Path]) -> None:
        """Notes a finished line, at once on disk."""
        entry = {"key": key, "form": self._form, "files": [path.name for path in paths]}
        with self._path.open("a", encoding="utf-8", newline="\n") as stream:
            # The line break goes in front: the entry before may have lost its end in a crash.
            stream.write(f"\n{json.dumps(entry)}")

    def _is_there(self, form: str, names: Sequence[str]) -> bool:
        return form == self._form and all((self._path.parent / name).exists() for name in names)

    def _entries(self) -> list[tuple[str, str, list[str]]]:
        """(key, form, names of the results) of all whole entries; a crash may have damaged one."""
        text = self._path.read_text(encoding="utf-8", errors="replace") if self._path.is_file() else ""
        entries = []
        for line in filter(None, text.splitlines()):
            try:
                entry = json.loads(line)
                entries.append((entry["key"], entry["form"], entry["files"]))
            except (ValueError, TypeError, KeyError):
                logger.warning("%s: a damaged line is ignored", self._path)
        return entries
