"""What generation leaves on disk: latents, pictures and videos, each whole or not at all.

Legend: F frames (of latents: latent frames), H W picture size, h w latent size, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.files import atomic_file, atomic_folder, existing_file, sort_safetensors_metadata
from common.media import open_image, write_video
from common.weights import open_checkpoint
from options.errors import UserError

if TYPE_CHECKING:
    import torch

SETTINGS_KEY = "oneframe-tuner"
"""Name of the settings in PNG texts and safetensors metadata; in MP4 they are the comment."""
LATENT_CHANNELS = 16
"""Of both families, HunyuanVideo and Wan2.1."""


# ---- names ----


def unused_stem(folder: Path, seed: int, *, now: datetime | None = None) -> str:
    """`{YYYYmmdd-HHMMSS-mmm}_{seed}`, local time, moved on by milliseconds until no output of that stem is there."""
    taken = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    moment = now or datetime.now()
    while True:
        stem = f"{moment:%Y%m%d-%H%M%S}-{moment.microsecond // 1000:03d}_{seed}"
        if not any(name == stem or name.startswith((f"{stem}.", f"{stem}_")) for name in taken):
            return stem
        moment += timedelta(milliseconds=1)


# ---- latents ----


def save_latents(latents: torch.Tensor, folder: Path, stem: str, *, metadata: Mapping[str, str]) -> Path:
    """Writes (16, F, h, w) as float32 under the key `latent` of `{stem}_latent.safetensors`.

    Raises:
        ValueError: another shape.
    """
    import torch
    from safetensors.torch import save_file

    if latents.ndim != 4 or latents.shape[0] != LATENT_CHANNELS:
        raise ValueError(f"latents of shape {tuple(latents.shape)}, expected ({LATENT_CHANNELS}, F, h, w)")
    path = folder / f"{stem}_latent.safetensors"
    tensor = latents.detach().to("cpu", torch.float32).contiguous()
    with atomic_file(path) as temporary:
        save_file({"latent": tensor}, temporary, metadata=dict(metadata))
        sort_safetensors_metadata(temporary)
    return path


def check_latents(path: str | Path, *, flag: str = "--latent_path") -> tuple[int, int, int, int]:
    """The shape (16, F, h, w) that `load_latents` will give; of a safetensors file only the header is read.

    Raises:
        UserError: nothing there, damaged, or no latents in it.
    """
    path = _existing(path, flag)
    if path.suffix.lower() != ".safetensors":
        return tuple(load_latents(path, flag=flag)[0].shape)
    return _latent_shape(_latent_entry(path, flag)[1], path, flag)


def load_latents(path: str | Path, *, flag: str = "--latent_path") -> tuple[torch.Tensor, dict[str, str]]:
    """Latents (16, F, h, w) float32 on the CPU and the file's metadata.

    A safetensors file gives its key `latent`, else the first that starts so and has four dimensions or more; any other
    suffix is a torch file, with a tensor or a dictionary under the same rule. 4-D and, as a batch of one, 5-D load.

    Raises:
        UserError: nothing there, damaged, no latents in it, or NaN among them.
    """
    import torch

    path = _existing(path, flag)
    read = _read_safetensors if path.suffix.lower() == ".safetensors" else _read_torch
    tensor, metadata = read(path, flag)
    latents = tensor.to(torch.float32).reshape(_latent_shape(tensor.shape, path, flag)).contiguous()
    if not torch.isfinite(latents).all():
        raise UserError(flag, f"{path}, with NaN or infinity in it", "finite latents", "generate it again")
    return latents, metadata


def _existing(path: str | Path, flag: str) -> Path:
    return existing_file(path, flag=flag, expected="a file with latents")


def _latent_key(shapes: Mapping[str, tuple[int, ...]], path: Path, flag: str) -> str:
    if "latent" in shapes:
        return "latent"
    key = next((key for key, shape in shapes.items() if key.startswith("latent") and len(shape) >= 4), None)
    if key is None:
        found = ", ".join(list(shapes)[:3]) or "nothing"
        raise UserError(flag, f"{path}, which holds {found}", "a tensor named latent", "give a file of saved latents")
    return key


def _latent_shape(shape: tuple[int, ...], path: Path, flag: str) -> tuple[int, int, int, int]:
    """`shape` without a batch of one."""
    inner = tuple(shape[1:]) if len(shape) == 5 and shape[0] == 1 else tuple(shape)
    if len(inner) != 4 or inner[0] != LATENT_CHANNELS or 0 in inner:
        expected = f"({LATENT_CHANNELS}, frames, height, width) with or without a batch of 1 in front"
        raise UserError(flag, f"{path} with latents of shape {tuple(shape)}", expected, "give a file of saved latents")
    return inner


def _latent_entry(path: Path, flag: str) -> tuple[str, tuple[int, ...]]:
    """Key and shape from a safetensors header; the keys come in the order of the header."""
    shapes = open_checkpoint(path, flag=flag).shapes
    key = _latent_key(shapes, path, flag)
    return key, shapes[key]


def _read_safetensors(path: Path, flag: str) -> tuple[torch.Tensor, dict[str, str]]:
    from safetensors import safe_open

    key, _ = _latent_entry(path, flag)
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key), dict(file.metadata() or {})


def _read_torch(path: Path, flag: str) -> tuple[torch.Tensor, dict[str, str]]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own kinds for damaged files.
        reason = str(error).split(". ")[0].replace(str(path), "the file")
        raise UserError(flag, path, "latents in a torch file", f"it is damaged or unsafe ({reason})") from error
    if isinstance(content, torch.Tensor):
        return content, {}
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(key): value for key, value in items if isinstance(value, torch.Tensor)}
    return tensors[_latent_key({key: tuple(value.shape) for key, value in tensors.items()}, path, flag)], {}


# ---- pictures and videos ----


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """Decoded pixels (C, F, H, W) in [-1, 1] -> (F, H, W, C) uint8, by (x + 1) / 2 · 255, clamped and truncated.

    Raises:
        ValueError: NaN or infinity, which a cast would turn into black or white without a word.
    """
    import torch

    channels, num_frames, height, width = pixels.shape
    frames = np.empty((num_frames, height, width, channels), np.uint8)
    for index in range(num_frames):  # One by one: a whole video in float32 can be larger than the memory.
        frame = pixels[:, index].detach().to(torch.float32)
        if not torch.isfinite(frame).all():
            what = "NaN" if torch.isnan(frame).any() else "infinity"
            raise ValueError(f"the decoded pixels hold {what}, first in frame {index} of {num_frames}")
        levels = ((frame + 1) / 2).clamp(0, 1) * 255
        frames[index] = levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return frames


def save_pictures(frames: np.ndarray, folder: Path, stem: str, *, settings: str | None = None) -> list[Path]:
    """Writes (F, H, W, 3) uint8 as `{stem}.png` when there is one frame, else as `{stem}/{frame:03d}.png`.

    Every picture carries `settings` as a text.

    Raises:
        ValueError: no frames.
    """
    if len(frames) == 0:
        raise ValueError("there are no frames to save")
    if len(frames) == 1:
        path = folder / f"{stem}.png"
        with atomic_file(path) as temporary:
            write_png(temporary, Image.fromarray(frames[0]), settings)
        return [path]
    target = folder / stem
    names = [f"{index:03d}.png" for index in range(len(frames))]
    with atomic_folder(target) as temporary:
        for name, frame in zip(names, frames, strict=True):
            write_png(temporary / name, Image.fromarray(frame), settings)
    return [target / name for name in names]


def save_video(frames: np.ndarray, folder: Path, stem: str, *, fps: float, settings: str | None = None) -> Path:
    """Writes (F, H, W, 3) uint8 as `{stem}.mp4`, with `settings` as its comment.

    Raises:
        ValueError: no frames, or an odd size.
    """
    path = folder / f"{stem}.mp4"
    with atomic_file(path) as temporary:
        write_video(temporary, frames, fps=fps, comment=settings)
    return path


def write_png(path: Path, picture: Image.Image, settings: str | None) -> None:
    """Writes a PNG that carries `settings` as a text."""
    text = PngInfo()
    if settings is not None:
        text.add_itxt(SETTINGS_KEY, settings)
    picture.save(path, format="PNG", pnginfo=text)


# ---- settings ----


def read_settings(path: str | Path, *, flag: str) -> str:
    """The settings that a picture, video or latent of ours carries.

    Raises:
        UserError: not such a file, or it carries none.
    """
    path = existing_file(path, flag=flag, expected="a picture, video or latent")
    readers = {".png": _png_settings, ".mp4": _video_settings, ".safetensors": _latent_settings}
    reader = readers.get(path.suffix.lower())
    settings = reader(path, flag) if reader else None
    if settings is None:
        raise UserError(
            flag, path, "a .png, .mp4 or .safetensors with its settings", "it was saved without, or elsewhere"
        )
    return settings


def _png_settings(path: Path, flag: str) -> str | None:
    return open_image(path, flag=flag).info.get(SETTINGS_KEY)


def _video_settings(path: Path, flag: str) -> str | None:
    import av

    try:
        with path.open("rb") as file, av.open(file) as container:
            return container.metadata.get("comment")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(flag, path, "a video", "it is damaged") from error


def _latent_settings(path: Path, flag: str) -> str | None:
    check_latents(path, flag=flag)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return (file.metadata() or {}).get(SETTINGS_KEY)
