"""Flags that every generating script has: what is asked for, where results go, how and how often."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, Self, TypeVar

from options.errors import UserError
from options.flag_fields import flag
from options.fp8 import Fp8Mode, fp8_mode
from options.line_options import LineOption
from options.memory_size import ANY, PLAN, MemorySize
from options.request import GenerationRequest, ImageSize
from options.swap_count import PINNED, SwapCount

Flags = TypeVar("Flags", bound="RequestFlags")
SolverName = Literal["unipc", "dpm++", "vanilla"]
DEFAULT_TILE = 256
"""Pixels per side with `--vae_tiling` alone."""


@dataclass(frozen=True, kw_only=True)
class RequestFlags(ABC):
    """What is generated; everything here may differ from one prompt to the next. Each family adds its own."""

    prompt: str | None = flag("prompt")
    negative_prompt: str | None = flag("used when --guidance_scale is not 1")
    video_size: tuple[int, int] = flag("height and width, multiples of 16", default=(256, 256))
    image_path: str | None = flag("start image")
    end_image_path: str | None = flag("image that the video ends with")
    one_frame_inference: str | None = flag("one picture: target_index=1,control_index=0, say")
    control_image_path: tuple[str, ...] = flag("control images of one-frame inference", default=())
    control_image_mask_path: tuple[str, ...] = flag("their masks, by position; white is used", default=())
    infer_steps: int | None = flag("denoising steps")
    seed: int | None = flag("seed of the noise (default: random)")
    guidance_scale: float | None = flag("classifier-free guidance; 1 is off")
    flow_shift: float | None = flag("flow shift")
    fps: int = flag("frame rate of the video file", default=30)
    lora: tuple[str, ...] = flag(
        "LoRA of this prompt only, PATH or PATH:0.8, applied without loading the model anew", default=(), repeats=True
    )

    request_type: ClassVar[type[GenerationRequest]]
    """What these flags become."""
    of_models: ClassVar[tuple[str, ...]] = ()
    """Fields that say what the models are for, and so may be given beside a result that is made once more."""
    limits: ClassVar[Mapping[str, tuple[float, float]]]
    """Lowest and highest value of each number. Far beyond what is useful; what lies outside is a typing error, and
    would fail late or never end."""
    line_options: ClassVar[Mapping[str, LineOption]]
    """Inline options of prompts for generation, by letter."""
    sample_options: ClassVar[Mapping[str, LineOption]]
    """Those of prompts for training samples; each has its key in TOML and JSON."""

    @property
    @abstractmethod
    def num_frames(self) -> int:
        """Pixel frames that are asked for, as far as flags tell."""

    @abstractmethod
    def check(self) -> None:
        """Raises UserError for whatever is wrong with a single flag; how they go together, `resolve` finds out."""

    @abstractmethod
    def resolve(self, *, image_size: ImageSize) -> GenerationRequest:
        """Decides everything that is left open.

        Args:
            image_size: asked for the image whose aspect ratio is taken.

        Raises:
            UserError: a value that cannot work, alone or with the others.
        """

    def given_images(self) -> list[tuple[str, str]]:
        """(flag, path) of every image that is named, before it is known how they go together."""
        flags = split_image_list(self)
        found = [("--image_path", path) for path in flags.start_images()]
        for name in ("control_image_path", "control_image_mask_path"):
            found += [(f"--{name}", path) for path in getattr(flags, name)]
        return found + ([("--end_image_path", flags.end_image_path)] if flags.end_image_path else [])

    def start_images(self) -> Sequence[str]:
        """The paths in `--image_path`."""
        return [self.image_path] if self.image_path else []

    def for_models_of(self, request: GenerationRequest) -> Self:
        """These flags with `of_models` as a recorded request has them.

        Raises:
            UserError: one of them was given, and otherwise.
        """
        recorded = {name: getattr(request, name) for name in self.of_models}
        defaults = {field.name: field.default for field in fields(self)}
        for name, value in recorded.items():
            if (given := getattr(self, name)) not in (defaults[name], value):
                raise UserError(f"--{name}", given, f"{value}, as the result has it", f"leave --{name} out")
        return replace(self, **recorded)

    def with_values(self, values: Mapping[str, object]) -> Self:
        """These flags with what a prompt says in their place."""
        return replace(self, **values)

    def remarks_on_samples(self, request: GenerationRequest, one_frame: str) -> list[str]:
        """Advice about a training sample that works but may not be meant.

        Args:
            one_frame: what the one-frame option is called in its prompt.
        """
        return []


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Where results go, and in which form."""

    save_path: str | None = flag("folder for results")
    output_type: Literal["video", "images", "latent", "both", "latent_images"] | None = flag(
        "both: latent and video; latent_images: latent and pictures (default: video, of one frame a picture)"
    )
    no_metadata: bool = flag("save no settings with results", default=False)
    metadata_paths: bool = flag("save the paths of inputs too, not only names and hashes", default=False)
    preview: bool = flag("save a small preview of the latents after every section", default=False)
    latent_path: tuple[str, ...] = flag("decode these saved latents instead of generating", default=())

    @property
    def saves_latents(self) -> bool:
        return self.output_type in ("latent", "both", "latent_images")

    @property
    def saves_video(self) -> bool:
        return self.output_type in (None, "video", "both")

    @property
    def saves_pictures(self) -> bool:
        return self.output_type in ("images", "latent_images")


@dataclass(frozen=True, kw_only=True)
class VaeMemoryFlags:
    """How a VAE saves memory."""

    vae_tiling: bool = flag("encode and decode in tiles of 256 pixels", default=False)
    vae_spatial_tile_sample_min_size: int | None = flag("the same in tiles of this size, a multiple of 32")
    vae_chunk_size: int | None = flag("convolve in chunks of this width: less memory, same result")

    @property
    def tile_size(self) -> int | None:
        """Pixels per side of a tile; None is the whole picture."""
        return self.vae_spatial_tile_sample_min_size or (DEFAULT_TILE if self.vae_tiling else None)


@dataclass(frozen=True, kw_only=True)
class ComputeFlags:
    """Device, types and memory; each family adds what its own models need."""

    device: str | None = flag("torch device (default: cuda if there is one, else cpu)")
    dit_dtype: Literal["bfloat16", "bf16", "float16", "fp16", "float32", "fp32"] | None = flag(
        "compute type of the transformer (default: bfloat16 on a GPU, float32 on a CPU)"
    )
    attn_mode: Literal["flash", "flash2", "flash3", "torch", "sageattn", "xformers", "sdpa"] = flag(
        "attention; torch and sdpa are the same, so are flash and flash2", default="torch"
    )
    fp8: bool = flag("transformer in fp8: two thirds of the memory in bfloat16, and less precise", default=False)
    fp8_scaled: bool = flag("the same with scales, which keep much more of it; needs no --fp8", default=False)
    blocks_to_swap: SwapCount = flag(
        "transformer blocks kept in RAM, or auto: as many as it takes (at most: see the guide)", default=SwapCount()
    )
    use_pinned_memory_for_block_swap: bool = flag(PINNED, default=False)
    offload_invariant: Literal["auto", "always", "never"] = flag(
        "keep weights that a prompt needs once (a quarter of the model) in RAM; auto: when memory is short",
        default="auto",
    )

    recorded_types: ClassVar[Mapping[str, tuple[type, ...]]] = {
        "device": (str,),
        "dit_dtype": (str,),
        "attn_mode": (str,),
        "compile": (bool,),
        "fp8": (bool,),
        "fp8_scaled": (bool,),
    }
    """What a result says about how it was computed."""
    not_in_older: ClassVar[Mapping[str, object]] = {}
    """What results were computed with before there was a choice."""
    replayed: ClassVar[tuple[str, ...]] = ()
    """Flags that a repeated result brings along, beside those of all families."""
    number_types: ClassVar[tuple[str, ...]] = ("dit_dtype",)
    """Those of them that it brings along to the same kind of device only: float32 on a GPU is twice the memory."""

    @property
    def attention(self) -> str:
        """`--attn_mode` by its one name in the code."""
        return {"torch": "sdpa", "flash2": "flash"}.get(self.attn_mode, self.attn_mode)

    @property
    def fp8_mode(self) -> Fp8Mode:
        return fp8_mode(fp8=self.fp8, scaled=self.fp8_scaled)

    def check(self) -> None:
        """Raises UserError for what cannot work."""


@dataclass(frozen=True, kw_only=True)
class SeriesFlags:
    """Many prompts in one run."""

    from_file: str | None = flag("text file with one prompt and its options per line; # begins a comment")
    resume_batch: bool = flag("skip the lines of --from_file that are finished", default=False)
    interactive: bool = flag("prompts from the console", default=False)
    sweep: tuple[str, ...] = flag(
        "one result per value: target_index=1..9, seed=1,2,3, control_index.1=4..16:4; two make a grid",
        default=(),
        repeats=True,
    )
    from_metadata: str | None = flag("run again what made this picture, video or latent")
    search_dir: str | None = flag("where --from_metadata looks for the input images, folders below included")
    check: bool = flag("check everything that needs no weights, then exit", default=False)
    plan: MemorySize | None = flag(PLAN, alone=ANY)


def split_image_list(flags: Flags) -> Flags:
    """The comma list of one-frame mode, `--image_path "background.png,character.png"`.

    The first image is looked at, and all are control images unless `--control_image_path` names others. A file of
    exactly that name is one image.
    """
    path = flags.image_path or ""
    if flags.one_frame_inference is None or "," not in path or os.path.exists(path):
        return flags
    images = tuple(part.strip() for part in path.split(","))
    return replace(flags, image_path=images[0], control_image_path=flags.control_image_path or images)


def check_vae_memory(flags: VaeMemoryFlags) -> None:
    """Raises UserError for tile and chunk sizes that the VAE cannot use."""
    tile, chunk = flags.vae_spatial_tile_sample_min_size, flags.vae_chunk_size
    if tile is not None and (tile < 32 or tile % 32):
        expected = "a positive multiple of 32"
        raise UserError("--vae_spatial_tile_sample_min_size", tile, expected, f"use {max(32, tile // 32 * 32)}, say")
    if chunk is not None and chunk < 0:
        raise UserError("--vae_chunk_size", chunk, "a positive number of columns, or 0 for no chunks", "use 32, say")
