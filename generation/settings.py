"""How a result was made, as the JSON text that it carries, and back.

Inputs are known by the hash of their content, with their base names; no output path, time or machine is in there, so
the same command gives the same bytes wherever it runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from options.errors import UserError
from options.flags_generate import ComputeFlags
from options.lora import LoraChoice
from options.request import GenerationRequest
from options.request_rules import COMMON_LIMITS

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What is the same for all results of a run."""

    family: str
    """`framepack`"""
    models: Mapping[str, str]
    """Fingerprint by flag."""
    compute: Mapping[str, object]
    """What changes the bits of a result: device type, number types, tiles."""
    with_paths: bool

    def settings(self, request: GenerationRequest) -> str:
        """The JSON text for one result."""
        inputs: dict[str, dict[str, str]] = {}

        def refer(path: str) -> str:
            digest = content_hash(path)
            inputs[digest] = {"name": readable(Path(path).name)}
            if self.with_paths:
                inputs[digest]["path"] = readable(str(Path(path).resolve()))
            return digest

        data = {
            "format": FORMAT,
            "family": self.family,
            "request": request.to_json(refer),
            "inputs": inputs,
            "models": dict(self.models),
            "compute": dict(self.compute),
        }
        return json.dumps(data, ensure_ascii=False, sort_keys=True)


def readable(name: str) -> str:
    """A file name as text; names in other encodings, which Linux allows, cannot be written as they are."""
    return os.fsencode(name).decode("utf-8", "replace")


def content_hash(path: str | Path) -> str:
    """sha256 of a file, remembered until the file changes; of a folder that of its files' names and contents."""
    if Path(path).is_dir():
        files = sorted(file for file in Path(path).iterdir() if file.is_file())
        return hashlib.sha256(
            "".join(f"{readable(file.name)}\0{content_hash(file)}\n" for file in files).encode()
        ).hexdigest()
    stat = Path(path).stat()
    return _content_hash(str(path), stat.st_mtime_ns, stat.st_size)


def merged_loras(choices: Sequence[LoraChoice]) -> str:
    """Which LoRAs are in a model and how much of each, known by their content, as JSON text."""
    loras = [
        {
            "name": readable(Path(choice.path).name),
            "file": content_hash(choice.path),
            "multiplier": choice.multiplier,
            "patterns": [choice.include, choice.exclude],
        }
        for choice in choices
    ]
    return json.dumps(loras, ensure_ascii=False)


@lru_cache(maxsize=1024)
def _content_hash(path: str, time: int, size: int) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a result says about itself."""

    request: GenerationRequest
    """With paths of the inputs as they were found."""
    models: Mapping[str, str]
    compute: Mapping[str, object]


def recorded(
    text: str,
    file: Path,
    search_dir: Path | None,
    *,
    family: str,
    request_type: type[GenerationRequest],
    compute_type: type[ComputeFlags],
) -> Recorded:
    """Reads the JSON text that `file` carries and finds its inputs again.

    Raises:
        UserError: another program's or family's text, or an input that is missing or has changed.
    """
    try:
        data = json.loads(text)
        if (data["format"], data["family"]) != (FORMAT, family):
            raise ValueError("another format or family")
        find = partial(_find, inputs=data["inputs"], file=file, search_dir=search_dir)
        request = request_type.from_json(data["request"], find)
        request.check()
        compute = dict(compute_type.not_in_older) | data["compute"]
        record = Recorded(request=request, models=data["models"], compute=compute)
        _check_record(record, compute_type.recorded_types, compute_type.number_types)
        return record
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        expected = f"settings of a {family} result, format {FORMAT}"
        remedy = f"give a result of this suite ({type(error).__name__}: {error})"
        raise UserError("--from_metadata", f"{file} with other settings", expected, remedy) from error


def _check_record(record: Recorded, types: Mapping[str, tuple[type, ...]], number_types: Sequence[str]) -> None:
    """Raises TypeError or KeyError for models and compute settings that were edited into nonsense."""
    if not all(isinstance(text, str) for text in (*record.models, *record.models.values())):
        raise TypeError("models")
    for name, kinds in types.items():
        if type(record.compute[name]) not in kinds:
            raise TypeError(name)
    for name in number_types:
        if record.compute[name] not in ("bfloat16", "float16", "float32"):
            raise ValueError(name)


def _find(digest: str, inputs: Mapping[str, Mapping[str, str]], file: Path, search_dir: Path | None) -> str:
    """The input whose content has this hash: at its recorded path, below the search folder, beside the result, here."""
    name = inputs[digest]["name"]
    candidates = [Path(inputs[digest].get("path", name)), file.parent / name]
    if search_dir is not None:
        candidates = [*sorted(found for found in search_dir.rglob("*") if found.name == name), *candidates]
    existing = [candidate for candidate in candidates if os.path.exists(candidate)]
    for candidate in existing:
        with suppress(OSError):  # something of that name that cannot be read is not it
            if content_hash(candidate) == digest:
                return str(candidate)
    if existing:
        got = f"{existing[0]}, which has changed since {file.name} was made"
        raise UserError(
            "--from_metadata", got, f"its content of then (sha256 {digest[:12]}…)", "give that folder as --search_dir"
        )
    raise UserError("--from_metadata", f"no {name}", f"the input of {file.name}", "give its folder as --search_dir")


def settings_of_decoding(
    text: str | None, *, vae: str, decoding: Mapping[str, object], request: Mapping[str, object]
) -> str | None:
    """The settings of saved latents, with what decoded them now in place of what was meant to then.

    Args:
        text: as the latent file carries it; None, or another program's, gives None.
        vae: fingerprint of the VAE.
        decoding: compute settings of the run that decodes, as far as they matter to that.
        request: what that run is asked for, as far as it is no longer what was asked for then.
    """
    try:
        data = json.loads(text)
        data["models"]["--vae"] = vae
        data["request"] |= request
        data["compute"] |= decoding
    except (TypeError, ValueError, KeyError):
        return None
    return json.dumps(data, ensure_ascii=False, sort_keys=True)


def recorded_integer(text: str | None, name: str, *, limits: tuple[float, float]) -> int | None:
    """What a latent file's settings ask for under this name; None when they do not say."""
    try:
        value = json.loads(text)["request"][name]
    except (TypeError, ValueError, KeyError):
        return None
    low, high = limits
    return value if type(value) is int and low <= value <= high else None


def stored_integer(
    metadata: Mapping[str, str], name: str, default: int, *, limits: tuple[float, float] = COMMON_LIMITS["seed"]
) -> int:
    """A seed or a window from a file's metadata; `default` when it is missing or cannot be one."""
    text = metadata.get(name, "")
    low, high = limits
    value = int(text) if re.fullmatch(r"[0-9]{1,19}", text) else -1
    return value if low <= value <= high else default
