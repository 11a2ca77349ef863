"""One picture or video, fully decided: what flags and prompt lines become before anything is loaded."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from options.errors import UserError
from options.flags_generate import RequestFlags
from options.geometry import bucket_near, check_size, sections_from_seconds
from options.lora import PromptLora, parse_prompt_lora
from options.one_frame import OneFrameOptions
from options.sections import check_sections, parse_sections

ImageSize = Callable[[str], tuple[int, int]]
"""(path) → (width, height)."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Nothing is left to decide here, and nothing refers to flags. Prompts and images are by section."""

    prompts: Mapping[int, str]
    """Section 0 is always there."""
    negative_prompt: str
    system_prompt: str | None
    image_paths: Mapping[int, str]
    """Empty when no image was given; else section 0 is there."""
    image_mask_path: str | None
    """Mask of section 0's start latent."""
    end_image_path: str | None
    control_image_paths: tuple[str, ...]
    control_mask_paths: tuple[str, ...]
    """By position; may be shorter than the images."""
    one_frame: OneFrameOptions | None
    height: int
    """Pixels, a multiple of 16."""
    width: int
    num_sections: int
    latent_window_size: int
    latent_paddings: tuple[int, ...]
    """Overrides the first paddings in order of generation."""
    f1: bool
    num_steps: int
    seed: int
    distilled_guidance: float
    cfg_scale: float
    cfg_rescale: float
    flow_shift: float | None
    rope_scaling_threshold: int | None
    rope_scaling_factor: float
    fps: int
    loras: tuple[PromptLora, ...] = ()
    """Beside those that are merged into the model."""

    @property
    def uses_cfg(self) -> bool:
        """Classifier-free guidance of scale 1 is the positive prediction, so the negative pass is not run."""
        return self.cfg_scale != 1.0

    @property
    def input_paths(self) -> list[tuple[str, str]]:
        """(flag, path) of every image that is read."""
        paths = [("--image_path", path) for path in self.image_paths.values()]
        paths += [("--control_image_path", path) for path in self.control_image_paths]
        paths += [("--control_image_mask_path", path) for path in self.control_mask_paths]
        single = (("--image_mask_path", self.image_mask_path), ("--end_image_path", self.end_image_path))
        return paths + [(flag, path) for flag, path in single if path]


def remarks(request: GenerationRequest) -> list[str]:
    """Advice about settings that work but may not be meant, and about options that have no effect together."""
    one_frame = request.one_frame
    found = []
    if one_frame is not None:
        found += [f"--one_frame_inference: {hint}" for hint in one_frame.hints(request.latent_window_size)]
        if request.f1:
            found.append("--one_frame_inference is not expected to work with --f1 models")
        if not request.control_image_paths:
            found.append("no --control_image_path: the picture follows the start image only by its SigLIP features")
    if not request.image_paths:
        missing = "SigLIP sees black" if one_frame is not None else "the video starts from grey"
        found.append(f"no --image_path: FramePack is an image-to-video model; {missing}")
    mode = "--one_frame_inference" if one_frame is not None else "--f1" if request.f1 else None
    if mode and request.end_image_path:
        found.append(f"--end_image_path is ignored with {mode}")
    if mode and request.latent_paddings:
        found.append(f"--latent_paddings is ignored with {mode}")
    return found


def resolve_request(flags: RequestFlags, *, image_size: ImageSize) -> GenerationRequest:
    """Decides everything that `flags` leave open.

    Args:
        image_size: asked for the first control image with `--one_frame_auto_resize`.

    Raises:
        UserError: a value that cannot work, alone or with the others.
    """
    if flags.prompt is None:
        raise UserError("--prompt", "nothing", "a prompt", 'give --prompt "…"')
    check_flags(flags)
    flags = split_image_list(flags)
    request = GenerationRequest(
        prompts=parse_sections(flags.prompt, "--prompt"),
        negative_prompt=flags.negative_prompt or "",
        system_prompt=flags.custom_system_prompt,
        image_paths=parse_sections(flags.image_path, "--image_path") if flags.image_path else {},
        image_mask_path=flags.image_mask_path,
        end_image_path=flags.end_image_path,
        control_image_paths=flags.control_image_path,
        control_mask_paths=flags.control_image_mask_path,
        one_frame=_parse_one_frame(flags.one_frame_inference),
        height=flags.video_size[0],
        width=flags.video_size[1],
        num_sections=flags.video_sections or sections_from_seconds(flags.video_seconds, flags.latent_window_size),
        latent_window_size=flags.latent_window_size,
        latent_paddings=_paddings(flags.latent_paddings),
        f1=flags.f1,
        num_steps=flags.infer_steps,
        seed=secrets.randbits(32) if flags.seed is None else flags.seed,
        distilled_guidance=flags.embedded_cfg_scale,
        cfg_scale=flags.guidance_scale,
        cfg_rescale=flags.guidance_rescale,
        flow_shift=flags.flow_shift,
        rope_scaling_threshold=flags.rope_scaling_timestep_threshold,
        rope_scaling_factor=flags.rope_scaling_factor,
        fps=flags.fps,
        loras=tuple(map(parse_prompt_lora, flags.lora)),
    )
    if request.one_frame is not None:
        request = _resolve_one_frame(request, flags.one_frame_auto_resize, image_size)
    else:
        _check_section_video(request, flags.one_frame_auto_resize)
    check_sections(request.prompts, request.num_sections, "--prompt")
    check_sections(request.image_paths, request.num_sections, "--image_path")
    return request


LIMITS: dict[str, tuple[float, float]] = {
    "video_seconds": (0.001, 36_000),
    "video_sections": (1, 10_000),
    "latent_window_size": (1, 1_000),
    "infer_steps": (1, 10_000),
    "seed": (0, 2**63 - 1),
    "embedded_cfg_scale": (-1_000, 1_000),
    "guidance_scale": (-1_000, 1_000),
    "guidance_rescale": (0, 1),
    "flow_shift": (0.001, 1_000),
    "rope_scaling_timestep_threshold": (0, 1_000),
    "rope_scaling_factor": (0.001, 100),
    "fps": (1, 1_000),
}
"""Far beyond what is useful; what lies outside is a typing error, and would fail late or never end."""


def check_numbers(flags: RequestFlags) -> None:
    """Raises UserError for a number that no combination makes valid."""
    for name, (low, high) in LIMITS.items():
        value = getattr(flags, name)
        if value is not None and not low <= value <= high:  # also false for nan
            kind = "an integer" if isinstance(value, int) else "a number"
            raise UserError(f"--{name}", value, f"{kind} from {low} to {high}", "change it")


def check_flags(flags: RequestFlags) -> None:
    """Raises UserError for whatever is wrong with a single flag; how they go together, `resolve_request` finds out."""
    check_numbers(flags)
    check_size(*flags.video_size)
    _paddings(flags.latent_paddings)
    _parse_one_frame(flags.one_frame_inference)
    for name in ("prompt", "negative_prompt", "custom_system_prompt"):
        text = getattr(flags, name) or ""
        if any("\ud800" <= character <= "\udfff" for character in text):
            got = text.encode("utf-8", "backslashreplace").decode()
            raise UserError(f"--{name}", got, "a text in UTF-8", "the console or file is in another encoding")


def given_images(flags: RequestFlags) -> list[tuple[str, str]]:
    """(flag, path) of every image that flags name, before it is known how they go together."""
    flags = split_image_list(flags)
    starts = parse_sections(flags.image_path, "--image_path").values() if flags.image_path else ()
    found = [("--image_path", path) for path in starts]
    for name in ("control_image_path", "control_image_mask_path"):
        found += [(f"--{name}", path) for path in getattr(flags, name)]
    single = ((f"--{name}", getattr(flags, name)) for name in ("image_mask_path", "end_image_path"))
    return found + [(flag, path) for flag, path in single if path]


def check_resolved(request: GenerationRequest) -> None:
    """The same for a request that comes from a file instead of flags.

    Raises:
        UserError: values that flags could not have given.
        TypeError: values of another type.
    """
    flags = RequestFlags(
        video_size=(request.height, request.width),
        video_sections=request.num_sections,
        latent_window_size=request.latent_window_size,
        infer_steps=request.num_steps,
        seed=request.seed,
        embedded_cfg_scale=request.distilled_guidance,
        guidance_scale=request.cfg_scale,
        guidance_rescale=request.cfg_rescale,
        flow_shift=request.flow_shift,
        rope_scaling_timestep_threshold=request.rope_scaling_threshold,
        rope_scaling_factor=request.rope_scaling_factor,
        fps=request.fps,
        latent_paddings=",".join(map(str, request.latent_paddings)) or None,
    )
    whole = (
        *flags.video_size,
        flags.video_sections,
        flags.latent_window_size,
        flags.infer_steps,
        flags.seed,
        flags.fps,
    )
    if not all(type(value) is int for value in whole):
        raise TypeError("a number that is not whole")
    check_flags(flags)
    for sections in (request.prompts, request.image_paths):
        check_sections(sections, request.num_sections, "prompts and images")
    if not all(isinstance(prompt, str) for prompt in (*request.prompts.values(), request.negative_prompt)):
        raise TypeError("a prompt that is no text")
    if 0 not in request.prompts or (request.one_frame is not None and request.num_sections != 1):
        raise TypeError("no prompt, or sections of a single frame")


def _paddings(text: str | None) -> tuple[int, ...]:
    """`3,2,1,0` as integers."""
    if text is None:
        return ()
    values = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,3}", value) for value in values):
        expected = "a comma list of integers from 0 to 999"
        raise UserError("--latent_paddings", text or "nothing", expected, "write 3,2,1,0, say")
    return tuple(map(int, values))


def _parse_one_frame(text: str | None) -> OneFrameOptions | None:
    return None if text is None else OneFrameOptions.parse(text)


def _resolve_one_frame(request: GenerationRequest, auto_resize: bool, image_size: ImageSize) -> GenerationRequest:
    """One section, one index per control image, masks by position, and perhaps the first control's aspect ratio."""
    request = replace(request, num_sections=1)
    controls, masks = request.control_image_paths, request.control_mask_paths
    if request.image_mask_path and not masks:
        masks = (request.image_mask_path,)
    if len(masks) > len(controls):
        where = "--control_image_mask_path" if request.control_mask_paths else "--image_mask_path"
        got = f"{len(masks)} masks for {len(controls)} control images"
        raise UserError(where, got, "no more masks than control images", "drop a mask or add --control_image_path")
    options = request.one_frame.resolve(len(controls))
    request = replace(request, one_frame=options, control_mask_paths=masks, image_mask_path=None)
    if auto_resize and controls:
        width, height = bucket_near(image_size(controls[0]), (request.width, request.height))
        request = replace(request, width=width, height=height)
    return request


def split_image_list(flags: RequestFlags) -> RequestFlags:
    """The comma list of one-frame mode, `--image_path "background.png,character.png"`.

    The first image is looked at, and all are control images unless `--control_image_path` names others. A file of
    exactly that name is one image.
    """
    path = flags.image_path or ""
    if flags.one_frame_inference is None or "," not in path or os.path.exists(path):
        return flags
    images = tuple(part.strip() for part in path.split(","))
    return replace(flags, image_path=images[0], control_image_path=flags.control_image_path or images)


def _check_section_video(request: GenerationRequest, auto_resize: bool) -> None:
    """Raises UserError for one-frame flags without one-frame mode, and for a mask without its image."""
    only_one_frame = {
        "--control_image_path": request.control_image_paths,
        "--control_image_mask_path": request.control_mask_paths,
        "--one_frame_auto_resize": auto_resize,
    }
    for name, value in only_one_frame.items():
        if value:
            got = " ".join(value) if isinstance(value, tuple) else name
            raise UserError(name, got, "--one_frame_inference beside it", "add --one_frame_inference default")
    if request.image_mask_path and not request.image_paths:
        raise UserError("--image_mask_path", request.image_mask_path, "an image to mask", "add --image_path")
