"""Wan2.1's tasks: which transformer each is for, and what is generated unless users say otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from options.errors import UserError, did_you_mean

FLAG = "--task"
WAN21_ONLY = "not supported: Wan2.1 only"
TransformerKind = Literal["t2v", "i2v", "flf2v", "fun_control"]
"""Told from a checkpoint's shapes: 16, 36, 36 and 48 input channels; flf2v alone has `img_emb.emb_pos`."""
TITLES: dict[TransformerKind, str] = {
    "t2v": "text-to-video",
    "i2v": "image-to-video",
    "flf2v": "first-last-frame-to-video",
    "fun_control": "Fun-Control",
}
WIDTHS = {"1.3B": 1536, "14B": 5120}
"""Of the published transformers."""
SIZES_480P = ((480, 832), (832, 480))
SIZES_720P = ((720, 1280), (1280, 720))
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"
    "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Source: Wan2.1's published configuration; so are the other defaults."""
NO_CUTS = "镜头切换，"
"""First in the negative prompt where the last frame is given."""
WAN22_TASKS = ("t2v-A14B", "i2v-A14B", "ti2v-5B")


@dataclass(frozen=True, kw_only=True)
class WanTask:
    """A task with its defaults; also the type of `--task`."""

    name: str
    kind: TransformerKind
    """Of the transformer."""
    in_channels: int
    """Of the transformer: noise and conditioning."""
    size: Literal["1.3B", "14B"]
    """Of the published transformer; a smaller one does as well."""
    takes_image: bool = False
    """Whether a start image is given, which CLIP sees, too."""
    num_steps: int = 50
    cfg_scale: float = 5.0
    flow_shift: float = 5.0
    flow_shift_480p: float = 5.0
    """The same at 832 x 480 and 480 x 832."""
    num_frames: int = 81
    sizes: tuple[tuple[int, int], ...] = SIZES_720P + SIZES_480P
    """(height, width) that the published transformer is trained at."""
    negative_prompt: str = NEGATIVE_PROMPT

    expected: ClassVar[str] = "a task of Wan2.1"
    """The rule, for messages."""

    @classmethod
    def parse(cls, text: str) -> WanTask:
        """Raises UserError: Wan2.1 has no such task."""
        return find_task(text)

    def __str__(self) -> str:
        return self.name

    def flow_shift_at(self, height: int, width: int) -> float:
        """The default at a size in pixels."""
        return self.flow_shift_480p if (height, width) in SIZES_480P else self.flow_shift

    def size_hint(self, height: int, width: int) -> str | None:
        """Advice about a size that the transformer may not do well."""
        if (height, width) in self.sizes:
            return None
        known = ", ".join(f"{h} {w}" for h, w in self.sizes)
        return f"{FLAG} {self.name} is not trained at height {height} and width {width}, but at {known}"


_T2V = {"kind": "t2v", "in_channels": 16}
_CONTROL = {"kind": "fun_control", "in_channels": 48}
_IMAGE = {"takes_image": True, "num_steps": 40}
TASKS = (
    WanTask(name="t2v-14B", size="14B", **_T2V),
    WanTask(name="t2v-1.3B", size="1.3B", sizes=SIZES_480P, **_T2V),
    WanTask(name="t2i-14B", size="14B", num_frames=1, sizes=(*SIZES_720P, *SIZES_480P, (1024, 1024)), **_T2V),
    WanTask(name="i2v-14B", size="14B", kind="i2v", in_channels=36, flow_shift_480p=3.0, **_IMAGE),
    WanTask(
        name="flf2v-14B",
        size="14B",
        kind="flf2v",
        in_channels=36,
        negative_prompt=NO_CUTS + NEGATIVE_PROMPT,
        **_IMAGE,
    ),
    WanTask(name="t2v-1.3B-FC", size="1.3B", sizes=SIZES_480P, **_CONTROL),
    WanTask(name="t2v-14B-FC", size="14B", **_CONTROL),
    WanTask(name="i2v-14B-FC", size="14B", flow_shift_480p=3.0, **_CONTROL, **_IMAGE),
)
DEFAULT_TASK = TASKS[0]


def find_task(name: str, where: str = FLAG) -> WanTask:
    """The task of this name.

    Raises:
        UserError: there is none, or it is one of Wan2.2's.
    """
    names = [task.name for task in TASKS]
    if name in names:
        return TASKS[names.index(name)]
    remedy = WAN21_ONLY if name in WAN22_TASKS else did_you_mean(name, names, "change it")
    raise UserError(where, name or "nothing", f"a task of Wan2.1: {', '.join(names)}", remedy)


def check_frames(task: WanTask, num_frames: int, where: str = "--video_length") -> None:
    """Raises UserError for a number of frames that the task cannot make."""
    if num_frames < 1:
        raise UserError(where, num_frames, "1 frame or more", f"use {task.num_frames}, say")
    if task.num_frames == 1 and num_frames != 1:
        raise UserError(where, num_frames, f"1, for {FLAG} {task.name}", f"use {FLAG} t2v-14B for videos")


def check_transformer(task: WanTask, kind: TransformerKind, in_channels: int, where: str = "--dit") -> None:
    """Refuses a checkpoint that the task is not for.

    Raises:
        UserError: it names the tasks that the checkpoint is for.
    """
    if (kind, in_channels) == (task.kind, task.in_channels):
        return
    fitting = [other.name for other in TASKS if (other.kind, other.in_channels) == (kind, in_channels)]
    got = f"{_described(kind, in_channels)} with {FLAG} {task.name}"
    remedy = f"use {FLAG} {' or '.join(fitting)}, or another checkpoint" if fitting else "use another checkpoint"
    raise UserError(where, got, _described(task.kind, task.in_channels), remedy)


def width_hint(task: WanTask, width: int) -> str | None:
    """Advice about a transformer of the other published size; it works, but the defaults are not its own."""
    size = next((size for size, known in WIDTHS.items() if known == width), task.size)
    if size == task.size:
        return None
    fitting = [other.name for other in TASKS if other.kind == task.kind and other.size == size]
    remedy = f"; {FLAG} {' or '.join(fitting)} is for it" if fitting else ""
    return f"--dit is a transformer of {size} (width {width}), {FLAG} {task.name} is for {task.size}{remedy}"


def _described(kind: TransformerKind, in_channels: int) -> str:
    return f"{'an' if kind == 'i2v' else 'a'} {TITLES[kind]} transformer ({in_channels} input channels)"
