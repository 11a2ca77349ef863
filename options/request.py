"""One picture or video, fully decided: what flags and prompt lines become before anything is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol, Self

from options.lora import PromptLora
from options.one_frame import OneFrameOptions


class ImageSize(Protocol):
    """Looks into an image file."""

    def __call__(self, path: str, *, flag: str) -> tuple[int, int]:
        """(width, height).

        Args:
            flag: that names the file, for messages.
        """


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(ABC):
    """What requests of both families have. Nothing is left to decide here, and nothing refers to flags."""

    negative_prompt: str
    end_image_path: str | None
    control_image_paths: tuple[str, ...]
    control_mask_paths: tuple[str, ...]
    """By position; may be shorter than the images."""
    one_frame: OneFrameOptions | None
    height: int
    """Pixels, a multiple of 16."""
    width: int
    num_steps: int
    seed: int
    cfg_scale: float
    flow_shift: float | None
    """None is by resolution (FramePack)."""
    fps: int
    loras: tuple[PromptLora, ...] = ()
    """Beside those that are merged into the model."""

    path_fields: ClassVar[tuple[str, ...]] = ("end_image_path",)
    """Fields that hold a path or None; in JSON something else stands for them."""
    path_list_fields: ClassVar[tuple[str, ...]] = ("control_image_paths", "control_mask_paths")

    @property
    def uses_cfg(self) -> bool:
        """Classifier-free guidance of scale 1 is the positive prediction, so the negative pass is not run."""
        return self.cfg_scale != 1.0

    @property
    @abstractmethod
    def title(self) -> str:
        """The prompt, or the first of several."""

    @property
    @abstractmethod
    def is_picture(self) -> bool:
        """Whether a single frame comes out."""

    @property
    @abstractmethod
    def start_images(self) -> list[str]:
        """The paths of `--image_path`."""

    @property
    def other_images(self) -> list[tuple[str, str | None]]:
        """(flag, path) of what else is read."""
        return [("--end_image_path", self.end_image_path)]

    @property
    def input_paths(self) -> list[tuple[str, str]]:
        """(flag, path) of every image that is read."""
        paths = [("--image_path", path) for path in self.start_images]
        paths += [("--control_image_path", path) for path in self.control_image_paths]
        paths += [("--control_image_mask_path", path) for path in self.control_mask_paths]
        return paths + [(flag, path) for flag, path in self.other_images if path]

    @abstractmethod
    def remarks(self) -> list[str]:
        """Advice about settings that work but may not be meant, and about options that have no effect together."""

    @abstractmethod
    def incumbent_metadata(self) -> dict[str, str]:
        """The entries that other tools expect in a latent file. Source: the incumbent's latent files."""

    @abstractmethod
    def check(self) -> None:
        """What flags would have been told, for a request that comes from a file.

        Raises:
            UserError: values that flags could not have given.
            TypeError: values of another type.
        """

    def to_json(self, refer: Callable[[str], str]) -> dict[str, object]:
        """All fields as JSON values; `refer` turns a path into what stands for it."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in self.path_fields:
            data[name] = data[name] and refer(data[name])
        for name in self.path_list_fields:
            data[name] = [refer(path) for path in data[name]]
        data["loras"] = [{"file": refer(lora.path), "multiplier": lora.multiplier} for lora in self.loras]
        data["one_frame"] = None if self.one_frame is None else str(self.one_frame)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, object], find: Callable[[str], str]) -> Self:
        """The reverse; `find` turns what `refer` gave into a path.

        Raises:
            TypeError, ValueError, KeyError, AttributeError: the data are not of `to_json`.
            UserError: from `find`.
        """
        values = dict(data)
        for name in cls.path_fields:
            values[name] = data[name] and find(data[name])
        for name in cls.path_list_fields:
            values[name] = tuple(find(key) for key in data[name])
        loras = data.get("loras", ())  # missing in older results
        values["loras"] = tuple(
            PromptLora(path=find(lora["file"]), multiplier=float(lora["multiplier"])) for lora in loras
        )
        if data["one_frame"] is not None:
            values["one_frame"] = OneFrameOptions.parse(data["one_frame"]).resolve(len(values["control_image_paths"]))
        return cls(**values)
