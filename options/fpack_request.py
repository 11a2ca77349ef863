"""What FramePack is asked for: its flags and inline options, and the request that they become."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from options.errors import UserError
from options.flag_fields import flag
from options.flags_generate import RequestFlags, split_image_list
from options.geometry import FRAMEPACK_FPS, FRAMES_PER_LATENT, bucket_near, sections_from_seconds
from options.line_options import GENERATION_OPTIONS, INTEGER, NUMBER, SAMPLE_OPTIONS, LineOption, sample_option
from options.lora import parse_prompt_lora
from options.request import GenerationRequest, ImageSize
from options.request_rules import (
    COMMON_LIMITS,
    check_masks,
    check_no_one_frame_flags,
    check_single_flags,
    check_whole,
    chosen_seed,
    needed_prompt,
    parse_one_frame,
)
from options.sections import check_sections, parse_sections

MAX_FRAMES = 1_000_000
NO_CONTROL_VIDEO = "FramePack has no control videos"


@dataclass(frozen=True, kw_only=True)
class FramePackRequest(GenerationRequest):
    """See `GenerationRequest`. Prompts and images are by section."""

    prompts: Mapping[int, str]
    """Section 0 is always there."""
    system_prompt: str | None
    image_paths: Mapping[int, str]
    """Empty when no image was given; else section 0 is there."""
    image_mask_path: str | None
    """Mask of section 0's start latent."""
    num_sections: int
    latent_window_size: int
    latent_paddings: tuple[int, ...]
    """Overrides the first paddings in order of generation."""
    f1: bool
    distilled_guidance: float
    cfg_rescale: float
    rope_scaling_threshold: int | None
    rope_scaling_factor: float

    path_fields: ClassVar[tuple[str, ...]] = ("image_mask_path", "end_image_path")

    @property
    def title(self) -> str:
        return self.prompts[0]

    @property
    def is_picture(self) -> bool:
        return self.one_frame is not None

    @property
    def start_images(self) -> list[str]:
        return list(self.image_paths.values())

    @property
    def other_images(self) -> list[tuple[str, str | None]]:
        return [("--image_mask_path", self.image_mask_path), *super().other_images]

    def remarks(self) -> list[str]:
        one_frame = self.one_frame
        found = []
        if one_frame is not None:
            found += [f"--one_frame_inference: {hint}" for hint in one_frame.hints(self.latent_window_size)]
            if self.f1:
                found.append("--one_frame_inference is not expected to work with --f1 models")
            if not self.control_image_paths:
                found.append("no --control_image_path: the picture follows the start image only by its SigLIP features")
        if not self.image_paths:
            missing = "SigLIP sees black" if one_frame is not None else "the video starts from grey"
            found.append(f"no --image_path: FramePack is an image-to-video model; {missing}")
        mode = "--one_frame_inference" if one_frame is not None else "--f1" if self.f1 else None
        if mode and self.end_image_path:
            found.append(f"--end_image_path is ignored with {mode}")
        if mode and self.latent_paddings:
            found.append(f"--latent_paddings is ignored with {mode}")
        return found

    def incumbent_metadata(self) -> dict[str, str]:
        sections = ";;;".join(f"{index}:{prompt}" for index, prompt in self.prompts.items())
        values = {
            "seeds": self.seed,
            "prompt": self.prompts[0] if len(self.prompts) == 1 else sections,
            "height": self.height,
            "width": self.width,
            "video_seconds": self.num_sections * self.latent_window_size * FRAMES_PER_LATENT / FRAMEPACK_FPS,
            "infer_steps": self.num_steps,
            "guidance_scale": self.cfg_scale,
            "latent_window_size": self.latent_window_size,
            "embedded_cfg_scale": self.distilled_guidance,
            "guidance_rescale": self.cfg_rescale,
            "sample_solver": "unipc",
            "fps": self.fps,
        }
        if self.negative_prompt:
            values["negative_prompt"] = self.negative_prompt
        return {name: str(value) for name, value in values.items()}

    def check(self) -> None:
        flags = FramePackRequestFlags(
            video_size=(self.height, self.width),
            video_sections=self.num_sections,
            latent_window_size=self.latent_window_size,
            infer_steps=self.num_steps,
            seed=self.seed,
            embedded_cfg_scale=self.distilled_guidance,
            guidance_scale=self.cfg_scale,
            guidance_rescale=self.cfg_rescale,
            flow_shift=self.flow_shift,
            rope_scaling_timestep_threshold=self.rope_scaling_threshold,
            rope_scaling_factor=self.rope_scaling_factor,
            fps=self.fps,
            latent_paddings=",".join(map(str, self.latent_paddings)) or None,
        )
        whole = ("height", "width", "num_sections", "latent_window_size", "num_steps", "seed", "fps")
        check_whole({name: getattr(self, name) for name in whole})
        flags.check()
        for sections in (self.prompts, self.image_paths):
            check_sections(sections, self.num_sections, "prompts and images")
        if not all(isinstance(prompt, str) for prompt in (*self.prompts.values(), self.negative_prompt)):
            raise TypeError("a prompt that is no text")
        if 0 not in self.prompts or (self.one_frame is not None and self.num_sections != 1):
            raise TypeError("no prompt, or sections of a single frame")

    def to_json(self, refer: Callable[[str], str]) -> dict[str, object]:
        return super().to_json(refer) | {
            "prompts": {str(section): prompt for section, prompt in self.prompts.items()},
            "image_paths": {str(section): refer(path) for section, path in self.image_paths.items()},
            "latent_paddings": list(self.latent_paddings),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object], find: Callable[[str], str]) -> Self:
        own = {
            "prompts": {int(section): prompt for section, prompt in data["prompts"].items()},
            "image_paths": {int(section): find(key) for section, key in data["image_paths"].items()},
            "latent_paddings": tuple(data["latent_paddings"]),
        }
        return super().from_json({**data, **own}, find)


def _seconds(text: str) -> float:
    """Frames at the model's rate."""
    if not 1 <= (frames := INTEGER(text)) <= MAX_FRAMES:
        raise ValueError(f"1 to {MAX_FRAMES} frames")
    return frames / FRAMEPACK_FPS


@dataclass(frozen=True, kw_only=True)
class FramePackRequestFlags(RequestFlags):
    """What is generated; everything here may differ from one prompt to the next."""

    prompt: str | None = flag('prompt; by section: "0:text;;;-1:text"')
    custom_system_prompt: str | None = flag("replaces the system prompt of the LLaMA text encoder")
    video_seconds: float = flag("length of the video at 30 frames per second", default=5.0)
    video_sections: int | None = flag("length in sections; overrides --video_seconds")
    image_path: str | None = flag('start image; by section: "0:a.png;;;-1:b.png"')
    image_mask_path: str | None = flag("mask of the start image (one frame: of the first control image)")
    end_image_path: str | None = flag("image that the video ends with (not F1, not one frame)")
    one_frame_inference: str | None = flag(
        "one picture: default, or no_2x,no_4x,no_post,target_index=9,control_index=0;10"
    )
    one_frame_auto_resize: bool = flag("take the aspect ratio from the first control image", default=False)
    latent_paddings: str | None = flag("blank sections before each section, last section first: 3,2,1,0")
    f1: bool = flag("FramePack-F1: generate forwards", default=False)
    latent_window_size: int = flag("latent frames per section", default=9)
    infer_steps: int = flag("denoising steps", default=25)
    embedded_cfg_scale: float = flag("distilled guidance", default=10.0)
    guidance_scale: float = flag("classifier-free guidance; 1 is off", default=1.0)
    guidance_rescale: float = flag("guidance rescale, 0 to 1", default=0.0)
    flow_shift: float | None = flag("fixed flow shift (default: by resolution)")
    rope_scaling_timestep_threshold: int | None = flag("scale RoPE rows and columns at timesteps from here on")
    rope_scaling_factor: float = flag("the factor for that", default=0.5)

    request_type: ClassVar[type[GenerationRequest]] = FramePackRequest
    limits: ClassVar[Mapping[str, tuple[float, float]]] = COMMON_LIMITS | {
        "video_seconds": (0.001, 36_000),
        "video_sections": (1, 10_000),
        "latent_window_size": (1, 1_000),
        "embedded_cfg_scale": (-1_000, 1_000),
        "guidance_rescale": (0, 1),
        "rope_scaling_timestep_threshold": (0, 1_000),
        "rope_scaling_factor": (0.001, 100),
    }
    line_options: ClassVar[Mapping[str, LineOption]] = GENERATION_OPTIONS | {
        "f": LineOption(field="video_seconds", convert=NUMBER, help="video seconds"),
        "vs": LineOption(field="video_sections", convert=INTEGER, help="video sections, instead of seconds"),
        "im": LineOption(field="image_mask_path", convert=str, help="the start image's mask"),
        "mcrr": LineOption(field=None, convert=str, help="MagCache retention ratio (not available yet)"),
        "mct": LineOption(field=None, convert=str, help="MagCache threshold (not available yet)"),
        "mck": LineOption(field=None, convert=str, help="MagCache skips in a row (not available yet)"),
    }
    sample_options: ClassVar[Mapping[str, LineOption]] = SAMPLE_OPTIONS | {
        "f": sample_option("frame_count", "video_seconds", _seconds, "a number of frames"),
        "g": sample_option("guidance_scale", "embedded_cfg_scale", NUMBER, "distilled guidance"),
        "im": sample_option("image_mask_path", "image_mask_path", str, "the start image's mask"),
        "cn": sample_option("control_video_path", None, str, "a control video (Wan only)", refusal=NO_CONTROL_VIDEO),
    }

    @property
    def num_frames(self) -> int:
        return round(self.video_seconds * FRAMEPACK_FPS)

    def check(self) -> None:
        check_single_flags(self, texts=("prompt", "negative_prompt", "custom_system_prompt"))
        _paddings(self.latent_paddings)

    def start_images(self) -> Sequence[str]:
        return list(parse_sections(self.image_path, "--image_path").values()) if self.image_path else []

    def given_images(self) -> list[tuple[str, str]]:
        return super().given_images() + ([("--image_mask_path", self.image_mask_path)] if self.image_mask_path else [])

    def with_values(self, values: Mapping[str, object]) -> Self:
        if "video_seconds" in values:  # the prompt's length counts, not the command line's sections
            values = {"video_sections": None, **values}
        return super().with_values(values)

    def remarks_on_samples(self, request: GenerationRequest, one_frame: str) -> list[str]:
        if request.is_picture or self.num_frames > 1:
            return []
        return [f"1 frame makes a whole section; for a picture add {one_frame} or --one_frame"]

    def resolve(self, *, image_size: ImageSize) -> FramePackRequest:
        prompts = parse_sections(needed_prompt(self), "--prompt")
        self.check()
        flags = split_image_list(self)
        request = FramePackRequest(
            prompts=prompts,
            negative_prompt=flags.negative_prompt or "",
            system_prompt=flags.custom_system_prompt,
            image_paths=parse_sections(flags.image_path, "--image_path") if flags.image_path else {},
            image_mask_path=flags.image_mask_path,
            end_image_path=flags.end_image_path,
            control_image_paths=flags.control_image_path,
            control_mask_paths=flags.control_image_mask_path,
            one_frame=parse_one_frame(flags.one_frame_inference),
            height=flags.video_size[0],
            width=flags.video_size[1],
            num_sections=flags.video_sections or sections_from_seconds(flags.video_seconds, flags.latent_window_size),
            latent_window_size=flags.latent_window_size,
            latent_paddings=_paddings(flags.latent_paddings),
            f1=flags.f1,
            num_steps=flags.infer_steps,
            seed=chosen_seed(flags),
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


def _paddings(text: str | None) -> tuple[int, ...]:
    """`3,2,1,0` as integers."""
    if text is None:
        return ()
    values = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,3}", value) for value in values):
        expected = "a comma list of integers from 0 to 999"
        raise UserError("--latent_paddings", text or "nothing", expected, "write 3,2,1,0, say")
    return tuple(map(int, values))


def _resolve_one_frame(request: FramePackRequest, auto_resize: bool, image_size: ImageSize) -> FramePackRequest:
    """One section, one index per control image, masks by position, and perhaps the first control's aspect ratio."""
    controls, masks, where = request.control_image_paths, request.control_mask_paths, "--control_image_mask_path"
    if request.image_mask_path and not masks:
        masks, where = (request.image_mask_path,), "--image_mask_path"
    request = replace(
        request,
        num_sections=1,
        control_mask_paths=check_masks(masks, controls, where),
        one_frame=request.one_frame.resolve(len(controls)),
        image_mask_path=None,
    )
    if auto_resize and controls:
        shape = image_size(controls[0], flag="--control_image_path")
        width, height = bucket_near(shape, (request.width, request.height))
        request = replace(request, width=width, height=height)
    return request


def _check_section_video(request: FramePackRequest, auto_resize: bool) -> None:
    """Raises UserError for one-frame flags without one-frame mode, and for a mask without its image."""
    only_one_frame = {
        "--control_image_path": request.control_image_paths,
        "--control_image_mask_path": request.control_mask_paths,
        "--one_frame_auto_resize": auto_resize,
    }
    check_no_one_frame_flags(only_one_frame, "add --one_frame_inference default")
    if request.image_mask_path and not request.image_paths:
        raise UserError("--image_mask_path", request.image_mask_path, "an image to mask", "add --image_path")
