"""What Wan2.1 is asked for: its flags and inline options, and the request that they become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, Self, get_args

from options.errors import UserError, UserErrors
from options.flag_fields import flag, refused
from options.flags_generate import RequestFlags, SolverName, split_image_list
from options.geometry import FRAMES_PER_LATENT, check_size, size_like, whole_latents
from options.guidance import GuidanceOptions, SkipLayers
from options.line_options import GENERATION_OPTIONS, INTEGER, NUMBER, SAMPLE_OPTIONS, LineOption, sample_option
from options.lora import parse_prompt_lora
from options.one_frame import OneFrameOptions
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
from options.wan_guidance import WanGuidanceFlags
from options.wan_tasks import DEFAULT_TASK, FLAG, WanTask, check_frames, find_task


@dataclass(frozen=True, kw_only=True)
class WanRequest(GenerationRequest):
    """See `GenerationRequest`."""

    task: WanTask
    prompt: str
    image_path: str | None
    """What the clip begins with; in one-frame mode what CLIP sees."""
    control_path: str | None
    """Fun-Control: a video file, or a folder of pictures."""
    num_frames: int
    """Pixel frames that are denoised, 4n + 1; 1 in one-frame mode."""
    crops_images: bool
    """Whether images are cropped to the size; else the size was taken from the start image, and they are resized."""
    solver: SolverName
    guidance: GuidanceOptions
    trim_tail_frames: int
    """Decoded frames that are dropped at the end."""
    cpu_noise: bool
    """The noise is drawn on the CPU, whatever the device."""

    path_fields: ClassVar[tuple[str, ...]] = ("image_path", "end_image_path", "control_path")

    @property
    def num_latent_frames(self) -> int:
        """Without an end image that is put behind the clip."""
        return (self.num_frames - 1) // FRAMES_PER_LATENT + 1

    @property
    def title(self) -> str:
        return self.prompt

    @property
    def is_picture(self) -> bool:
        return self.one_frame is not None or (self.num_frames == 1 and not self.appends_end)

    @property
    def appends_end(self) -> bool:
        """Whether the end image becomes one more latent frame, for a transformer that was not trained with any."""
        return self.end_image_path is not None and self.task.kind != "flf2v" and self.one_frame is None

    @property
    def start_images(self) -> list[str]:
        return [self.image_path] if self.image_path else []

    def remarks(self) -> list[str]:
        found = [f"--one_frame_inference: {hint}" for hint in self.one_frame.wan_hints()] if self.one_frame else []
        if self.appends_end:
            text = f"{FLAG} {self.task.name} was not trained with an end image, which makes {FRAMES_PER_LATENT} more"
            found.append(f"{text} frames; --trim_tail_frames cuts them")
        if self.one_frame is not None and self.end_image_path and self.task.kind != "flf2v":
            found.append(f"--end_image_path has no effect on one frame with {FLAG} {self.task.name}")
        found += self.guidance.hints(num_steps=self.num_steps, cfg_scale=self.cfg_scale)
        if self.crops_images or not self.task.takes_image:
            found += filter(None, [self.task.size_hint(self.height, self.width)])
        return found

    def incumbent_metadata(self) -> dict[str, str]:
        values = {
            "seeds": self.seed,
            "prompt": self.prompt,
            "height": self.height,
            "width": self.width,
            "video_length": self.num_frames,
            "infer_steps": self.num_steps,
            "guidance_scale": self.cfg_scale,
            "fps": self.fps,
        }
        if self.negative_prompt:
            values["negative_prompt"] = self.negative_prompt
        return {name: str(value) for name, value in values.items()}

    def check(self) -> None:
        whole = ("height", "width", "num_frames", "num_steps", "seed", "fps", "trim_tail_frames")
        check_whole({name: getattr(self, name) for name in whole})
        if not all(isinstance(prompt, str) for prompt in (self.prompt, self.negative_prompt)):
            raise TypeError("a prompt that is no text")
        if not all(isinstance(value, bool) for value in (self.crops_images, self.cpu_noise)):
            raise TypeError("crops_images or cpu_noise")
        if self.solver not in get_args(SolverName):
            raise TypeError("solver")
        if self.num_frames % FRAMES_PER_LATENT != 1 or (self.one_frame is not None and self.num_frames > 1):
            raise ValueError("num_frames")
        self.guidance.check()
        flags = self._as_flags()
        flags.check()
        check_together(flags, self.one_frame)

    def _as_flags(self) -> WanRequestFlags:
        """What would have been written to get this."""
        return WanRequestFlags(
            task=self.task,
            video_size=(self.height, self.width),
            video_length=self.num_frames,
            infer_steps=self.num_steps,
            seed=self.seed,
            guidance_scale=self.cfg_scale,
            flow_shift=self.flow_shift,
            fps=self.fps,
            trim_tail_frames=self.trim_tail_frames,
            image_path=self.image_path,
            end_image_path=self.end_image_path,
            control_path=self.control_path,
            one_frame_inference=None if self.one_frame is None else str(self.one_frame),
            control_image_path=self.control_image_paths,
            control_image_mask_path=self.control_mask_paths,
        )

    def to_json(self, refer: Callable[[str], str]) -> dict[str, object]:
        return super().to_json(refer) | {"task": self.task.name, "guidance": asdict(self.guidance)}

    @classmethod
    def from_json(cls, data: Mapping[str, object], find: Callable[[str], str]) -> Self:
        guidance = dict(data["guidance"])
        if (skipped := guidance["skip_layers"]) is not None:
            guidance["skip_layers"] = SkipLayers(**{**skipped, "blocks": tuple(skipped["blocks"])})
        own = {"task": find_task(data["task"]), "guidance": GuidanceOptions(**guidance)}
        return super().from_json({**data, **own}, find)


@dataclass(frozen=True, kw_only=True)
class WanRequestFlags(RequestFlags, WanGuidanceFlags):
    """What is generated; everything here but the task may differ from one prompt to the next."""

    task: WanTask = flag("which transformer --dit is, and what is made with it", default=DEFAULT_TASK)
    negative_prompt: str | None = flag("used when --guidance_scale is not 1 (default: the task's)")
    video_length: int | None = flag("frames, 4n + 1 (default: 81, of t2i 1)")
    image_path: str | None = flag("start image; of one frame what CLIP sees (default there: a control image)")
    end_image_path: str | None = flag("image that the video ends with; of one frame what CLIP sees, too")
    exact_size: bool = flag(
        "crop images to --video_size (default: --video_size gives the area, the start image the aspect ratio)",
        default=False,
    )
    control_path: str | None = flag("control video, or folder of pictures, of Fun-Control")
    video_path: str | None = refused("video to video", why="not supported: there is no video to video")
    one_frame_inference: str | None = flag("one picture: target_index=1,control_index=0, say, or control_index=0;2")
    infer_steps: int | None = flag("denoising steps (default: 50; of tasks with a start image 40)")
    guidance_scale: float | None = flag("classifier-free guidance; 1 is off (default: 5)")
    flow_shift: float | None = flag("flow shift (default: 5; of i2v at 832x480 3)")
    fps: int = flag("frame rate of the video file", default=16)
    sample_solver: SolverName = flag("sampler: UniPC, DPM-Solver++, or vanilla Euler", default="unipc")
    trim_tail_frames: int = flag("leave out so many frames at the end", default=0)
    cpu_noise: bool = flag("draw the noise on the CPU: the same one on all devices", default=False)

    request_type: ClassVar[type[GenerationRequest]] = WanRequest
    of_models: ClassVar[tuple[str, ...]] = ("task",)
    limits: ClassVar[Mapping[str, tuple[float, float]]] = COMMON_LIMITS | {
        "video_length": (1, 100_000),
        "trim_tail_frames": (0, 100_000),
    }
    line_options: ClassVar[Mapping[str, LineOption]] = GENERATION_OPTIONS | {
        "f": LineOption(field="video_length", convert=INTEGER, help="frames"),
        "cn": LineOption(field="control_path", convert=str, help="control video or folder (Fun-Control)"),
    }
    sample_options: ClassVar[Mapping[str, LineOption]] = SAMPLE_OPTIONS | {
        "f": sample_option("frame_count", "video_length", INTEGER, "a number of frames"),
        "g": sample_option("guidance_scale", None, NUMBER, "distilled guidance, which Wan has not", has_effect=False),
        "cn": sample_option("control_video_path", "control_path", str, "a control video or folder (Fun-Control)"),
    }

    @property
    def num_frames(self) -> int:
        return self.task.num_frames if self.video_length is None else self.video_length

    def check(self) -> None:
        check_single_flags(self)
        self.guidance_options()

    def resolve(self, *, image_size: ImageSize) -> WanRequest:
        prompt = needed_prompt(self)
        self.check()
        flags = split_image_list(self)
        one_frame = parse_one_frame(flags.one_frame_inference)
        check_together(flags, one_frame)
        task, (height, width) = flags.task, flags.video_size
        crops = flags.exact_size or not task.takes_image
        if not crops:
            path, where = flags.first_image()
            width, height = size_like(image_size(path, flag=where), area=height * width)
            check_size(height, width)
        return WanRequest(
            task=task,
            prompt=prompt,
            negative_prompt=task.negative_prompt if flags.negative_prompt is None else flags.negative_prompt,
            image_path=flags.image_path,
            end_image_path=flags.end_image_path,
            control_path=flags.control_path,
            control_image_paths=flags.control_image_path,
            control_mask_paths=flags.control_image_mask_path,
            one_frame=one_frame,
            height=height,
            width=width,
            crops_images=crops,
            num_frames=1 if one_frame is not None else whole_latents(flags.num_frames),
            num_steps=task.num_steps if flags.infer_steps is None else flags.infer_steps,
            seed=chosen_seed(flags),
            cfg_scale=task.cfg_scale if flags.guidance_scale is None else flags.guidance_scale,
            flow_shift=task.flow_shift_at(*flags.video_size) if flags.flow_shift is None else flags.flow_shift,
            solver=flags.sample_solver,
            guidance=flags.guidance_options(),
            fps=flags.fps,
            trim_tail_frames=flags.trim_tail_frames,
            cpu_noise=flags.cpu_noise,
            loras=tuple(map(parse_prompt_lora, flags.lora)),
        )

    def first_image(self) -> tuple[str, str]:
        """The image that gives the aspect ratio, and its flag."""
        if self.image_path is not None:
            return self.image_path, "--image_path"
        return self.control_image_path[0], "--control_image_path"


def check_together(flags: WanRequestFlags, one_frame: OneFrameOptions | None) -> None:
    """Raises UserErrors with everything in which flags and the task contradict each other."""
    if problems := list(_problems(flags)):
        raise UserErrors(problems)
    if one_frame is not None:
        one_frame.resolve_wan(len(flags.control_image_path))
        check_masks(flags.control_image_mask_path, flags.control_image_path)


def _problems(flags: WanRequestFlags) -> Iterator[UserError]:
    """How flags and the task contradict each other."""
    task, where = flags.task, f"{FLAG} {flags.task.name}"
    one_frame, is_control = flags.one_frame_inference is not None, task.kind == "fun_control"
    if one_frame:
        if flags.trim_tail_frames:
            yield UserError("--trim_tail_frames", flags.trim_tail_frames, "0 for one frame", "leave it out")
        if task.kind not in ("i2v", "flf2v"):
            remedy = f"use {FLAG} i2v-14B or flf2v-14B, and a transformer for it"
            yield UserError("--one_frame_inference", where, "an image-to-video task", remedy)
    else:
        only_one_frame = {
            "--control_image_path": flags.control_image_path,
            "--control_image_mask_path": flags.control_image_mask_path,
        }
        remedy = "add --one_frame_inference target_index=1,control_index=0, say"
        yield from _raised(check_no_one_frame_flags, only_one_frame, remedy)
        yield from _raised(check_frames, task, flags.num_frames)
        yield from _trim_problems(flags)
        if task.takes_image and flags.image_path is None:
            yield UserError("--image_path", "nothing", f"the start image of {where}", "give --image_path")
        if task.kind == "flf2v" and flags.end_image_path is None:
            remedy = f"give --end_image_path, or use {FLAG} i2v-14B"
            yield UserError("--end_image_path", "nothing", f"the last frame of {where}", remedy)
        if task.kind == "flf2v" and flags.num_frames < FRAMES_PER_LATENT + 1:
            expected = "5 frames or more, as the first is not the last"
            yield UserError("--video_length", flags.num_frames, expected, "use 81, say")
    for name in ("image_path", "end_image_path"):
        if (path := getattr(flags, name)) is not None and not task.takes_image:
            remedy = f"leave it out, or use {FLAG} i2v-14B{'-FC' if is_control else ''}"
            yield UserError(f"--{name}", f"{path} with {where}", "no image: this task starts from a text", remedy)
    if is_control != (flags.control_path is not None):
        got, expected = ("nothing", f"the control video of {where}") if is_control else (flags.control_path, "nothing")
        remedy = "give --control_path" if is_control else f"leave it out, or use a Fun-Control task ({FLAG} …-FC)"
        yield UserError("--control_path", got, expected, remedy)


def _trim_problems(flags: WanRequestFlags) -> Iterator[UserError]:
    """What is trimmed has to leave something."""
    appends_end = flags.end_image_path is not None and flags.task.kind != "flf2v"
    num_frames = whole_latents(flags.num_frames) + (FRAMES_PER_LATENT if appends_end else 0)
    if flags.trim_tail_frames >= num_frames:
        yield UserError("--trim_tail_frames", flags.trim_tail_frames, f"less than {num_frames} frames", "use 0, say")


def _raised(check: Callable[..., None], *args: object) -> Iterator[UserError]:
    """What a check complains about, if anything."""
    try:
        check(*args)
    except UserError as error:
        yield error
