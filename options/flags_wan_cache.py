"""The flags of `wan_cache_latents.py` and `wan_cache_text_encoder_outputs.py`."""

from dataclasses import dataclass
from typing import Literal

from options.errors import UserError
from options.flag_fields import flag
from options.flags_cache import CacheFlags, CachePreviewFlags

VaeDtype = Literal["bfloat16", "bf16", "float16", "fp16", "float32", "fp32"]


@dataclass(frozen=True, kw_only=True)
class WanLatentModelFlags:
    """Where the two image models lie."""

    vae: str | None = flag("Wan2.1 VAE: safetensors, .pth, or snapshot folder")
    vae_dtype: VaeDtype | None = flag(
        "type of the VAE and of cached latents (default: bfloat16; on a CPU the VAE runs in float32)"
    )
    vae_cache_cpu: bool = flag("keep what the VAE remembers of earlier frames in RAM", default=False)
    clip: str | None = flag("Wan2.1 CLIP: safetensors, .pth, or snapshot folder; not needed for t2v")
    disable_cudnn_backend: bool = flag("do without cuDNN", default=False)


@dataclass(frozen=True, kw_only=True)
class WanContextFlags:
    """What is trained."""

    i2v: bool = flag("show the first frame, for i2v; --clip alone means it too", default=False)
    flf2v: bool = flag("show the first and the last frame of videos, for flf2v", default=False)
    one_frame: bool = flag("one-frame training: images with control images, for i2v and flf2v", default=False)

    @property
    def pictures_flag(self) -> str | None:
        """The flag that asks for pictures to be shown; None for none."""
        return next((f"--{name}" for name in ("one_frame", "flf2v", "i2v") if getattr(self, name)), None)


@dataclass(frozen=True, kw_only=True)
class WanCacheLatentsFlags:
    """All of them."""

    cache: CacheFlags
    models: WanLatentModelFlags
    context: WanContextFlags
    preview: CachePreviewFlags


@dataclass(frozen=True, kw_only=True)
class WanTextModelFlags:
    """Where the text encoder and its tokenizer lie."""

    t5: str = flag("UMT5-XXL: safetensors, .pth, or snapshot folder", required=True)
    t5_tokenizer: str | None = flag("its tokenizer: folder or hub id (default: beside --t5, else the hub)")
    fp8_t5: bool = flag("UMT5 in fp8 with scales", default=False)


@dataclass(frozen=True, kw_only=True)
class WanCacheTextsFlags:
    """All of them."""

    cache: CacheFlags
    models: WanTextModelFlags


def check_wan_context(flags: WanContextFlags) -> None:
    """Raises UserError for flags that exclude each other."""
    if flags.one_frame and flags.flf2v:
        remedy = "leave out --flf2v: one-frame caches are the same for i2v and flf2v"
        raise UserError("--flf2v", "--flf2v and --one_frame", "one of them", remedy)
    if flags.i2v and flags.flf2v:
        raise UserError("--flf2v", "--flf2v and --i2v", "one of them", "--flf2v shows the first frame too")
