"""How a result was made, as the JSON text that it carries, and back.

Inputs are known by the hash of their content, with their base names; no output path, time or machine is in there, so
the same command gives the same bytes wherever it runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from options.errors import UserError
from options.geometry import FRAMEPACK_FPS, FRAMES_PER_LATENT
from options.lora import PromptLora
from options.one_frame import OneFrameOptions
from options.request import LIMITS, GenerationRequest, check_resolved

FORMAT = 1
COMPUTE_TYPES = {
    "device": (str,),
    "dit_dtype": (str,),
    "vae_spatial_tile_sample_min_size": (int, type(None)),
    "vae_chunk_size": (int, type(None)),
    "bulk_decode": (bool,),
    "attn_mode": (str,),
    "compile": (bool,),
    "fp8": (bool,),
    "fp8_scaled": (bool,),
    "fp8_llm": (bool,),
}
MISSING_IN_OLDER = {"attn_mode": "sdpa", "compile": False, "fp8": False, "fp8_scaled": False, "fp8_llm": False}
"""What results were computed with before there was a choice."""
PATH_FIELDS = ("image_mask_path", "end_image_path")
PATH_LIST_FIELDS = ("control_image_paths", "control_mask_paths")


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
            "request": request_to_json(request, refer),
            "inputs": inputs,
            "models": dict(self.models),
            "compute": dict(self.compute),
        }
        return json.dumps(data, ensure_ascii=False, sort_keys=True)


def readable(name: str) -> str:
    """A file name as text; names in other encodings, which Linux allows, cannot be written as they are."""
    return os.fsencode(name).decode("utf-8", "replace")


def content_hash(path: str | Path) -> str:
    """sha256 of a file; remembered until the file changes."""
    stat = Path(path).stat()
    return _content_hash(str(path), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1024)
def _content_hash(path: str, time: int, size: int) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def request_to_json(request: GenerationRequest, refer: Callable[[str], str]) -> dict[str, object]:
    """All fields as JSON values; `refer` turns a path into what stands for it."""
    data = {field.name: getattr(request, field.name) for field in fields(request)}
    data["prompts"] = {str(section): prompt for section, prompt in request.prompts.items()}
    data["image_paths"] = {str(section): refer(path) for section, path in request.image_paths.items()}
    for name in PATH_FIELDS:
        data[name] = data[name] and refer(data[name])
    for name in PATH_LIST_FIELDS:
        data[name] = [refer(path) for path in data[name]]
    data["loras"] = [{"file": refer(lora.path), "multiplier": lora.multiplier} for lora in request.loras]
    data["latent_paddings"] = list(request.latent_paddings)
    data["one_frame"] = None if request.one_frame is None else str(request.one_frame)
    return data


def request_from_json(data: Mapping[str, object], find: Callable[[str], str]) -> GenerationRequest:
    """The reverse; `find` turns what `refer` gave into a path.

    Raises:
        TypeError, ValueError, KeyError, AttributeError: the data are not of `request_to_json`.
        UserError: from `find`.
    """
    values = dict(data)
    values["prompts"] = {int(section): prompt for section, prompt in data["prompts"].items()}
    values["image_paths"] = {int(section): find(key) for section, key in data["image_paths"].items()}
    for name in PATH_FIELDS:
        values[name] = data[name] and find(data[name])
    for name in PATH_LIST_FIELDS:
        values[name] = tuple(find(key) for key in data[name])
    loras = data.get("loras", ())  # missing in older results
    values["loras"] = tuple(PromptLora(path=find(lora["file"]), multiplier=float(lora["multiplier"])) for lora in loras)
    values["latent_paddings"] = tuple(data["latent_paddings"])
    if data["one_frame"] is not None:
        values["one_frame"] = OneFrameOptions.parse(data["one_frame"]).resolve(len(values["control_image_paths"]))
    return GenerationRequest(**values)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a result says about itself."""

    request: GenerationRequest
    """With paths of the inputs as they were found."""
    models: Mapping[str, str]
    compute: Mapping[str, object]


def recorded(text: str, file: Path, search_dir: Path | None, *, family: str) -> Recorded:
    """Reads the JSON text that `file` carries and finds its inputs again.

    Raises:
        UserError: another program's or family's text, or an input that is missing or has changed.
    """
    try:
        data = json.loads(text)
        if (data["format"], data["family"]) != (FORMAT, family):
            raise ValueError("another format or family")
        request = request_from_json(data["request"], lambda key: _find(key, data["inputs"], file, search_dir))
        check_resolved(request)
        record = Recorded(request=request, models=data["models"], compute=MISSING_IN_OLDER | data["compute"])
        _check_record(record)
        return record
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        expected = f"settings of a {family} result, format {FORMAT}"
        remedy = f"give a result of this suite ({type(error).__name__}: {error})"
        raise UserError("--from_metadata", f"{file} with other settings", expected, remedy) from error


def _check_record(record: Recorded) -> None:
    """Raises TypeError or KeyError for models and compute settings that were edited into nonsense."""
    if not all(isinstance(text, str) for text in (*record.models, *record.models.values())):
        raise TypeError("models")
    for name, kinds in COMPUTE_TYPES.items():
        if type(record.compute[name]) not in kinds:
            raise TypeError(name)
    if record.compute["dit_dtype"] not in ("bfloat16", "float16", "float32"):
        raise ValueError("dit_dtype")


def _find(digest: str, inputs: Mapping[str, Mapping[str, str]], file: Path, search_dir: Path | None) -> str:
    """The input whose content has this hash: at its recorded path, below the search folder, beside the result, here."""
    name = inputs[digest]["name"]
    candidates = [Path(inputs[digest].get("path", name)), file.parent / name]
    if search_dir is not None:
        candidates = [*sorted(found for found in search_dir.rglob("*") if found.name == name), *candidates]
    existing = [candidate for candidate in candidates if os.path.isfile(candidate)]
    for candidate in existing:
        if content_hash(candidate) == digest:
            return str(candidate)
    if existing:
        got = f"{existing[0]}, which has changed since {file.name} was made"
        raise UserError(
            "--from_metadata", got, f"its content of then (sha256 {digest[:12]}…)", "give that folder as --search_dir"
        )
    raise UserError("--from_metadata", f"no {name}", f"the input of {file.name}", "give its folder as --search_dir")


def settings_of_decoding(text: str | None, *, vae: str, compute: Mapping[str, object], fps: int) -> str | None:
    """The settings of saved latents, with what decoded them now in place of what was meant to then.

    Args:
        text: as the latent file carries it; None, or another program's, gives None.
        vae: fingerprint of the VAE.
        compute: of the run that decodes.
    """
    try:
        data = json.loads(text)
        data["request"]["fps"], data["models"]["--vae"] = fps, vae
        data["compute"] |= {name: compute[name] for name in ("vae_spatial_tile_sample_min_size", "vae_chunk_size")}
        data["compute"]["bulk_decode"] = compute["bulk_decode"]
    except (TypeError, ValueError, KeyError):
        return None
    return json.dumps(data, ensure_ascii=False, sort_keys=True)


def recorded_fps(text: str | None) -> int | None:
    """The frame rate that a latent file's settings ask for; None when they do not say."""
    try:
        fps = json.loads(text)["request"]["fps"]
    except (TypeError, ValueError, KeyError):
        return None
    low, high = LIMITS["fps"]
    return fps if type(fps) is int and low <= fps <= high else None


def incumbent_metadata(request: GenerationRequest) -> dict[str, str]:
    """The entries that other tools expect in a latent file. Source: the incumbent's latent files."""
    sections = ";;;".join(f"{index}:{prompt}" for index, prompt in request.prompts.items())
    values = {
        "seeds": request.seed,
        "prompt": request.prompts[0] if len(request.prompts) == 1 else sections,
        "height": request.height,
        "width": request.width,
        "video_seconds": request.num_sections * request.latent_window_size * FRAMES_PER_LATENT / FRAMEPACK_FPS,
        "infer_steps": request.num_steps,
        "guidance_scale": request.cfg_scale,
        "latent_window_size": request.latent_window_size,
        "embedded_cfg_scale": request.distilled_guidance,
        "guidance_rescale": request.cfg_rescale,
        "sample_solver": "unipc",
        "fps": request.fps,
    }
    if request.negative_prompt:
        values["negative_prompt"] = request.negative_prompt
    return {name: str(value) for name, value in values.items()}


def stored_integer(metadata: Mapping[str, str], name: str, default: int) -> int:
    """A seed or a window from a file's metadata; `default` when it is missing or cannot be one."""
    text = metadata.get(name, "")
    low, high = LIMITS[{"seeds": "seed"}.get(name, name)]
    value = int(text) if re.fullmatch(r"[0-9]{1,19}", text) else -1
    return value if low <= value <= high else default
