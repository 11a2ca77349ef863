"""The flags of `wan_generate_video.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from options.flag_fields import flag, refused
from options.flags_compile import CompileArgsFlags
from options.flags_generate import ComputeFlags, OutputFlags, SeriesFlags
from options.flags_lora import LoraFlags
from options.swap_count import SwapCount
from options.wan_request import WanRequestFlags
from options.wan_tasks import WAN21_ONLY


@dataclass(frozen=True, kw_only=True)
class WanModelFlags:
    """Where the models and the tokenizer lie."""

    ckpt_dir: str | None = flag("folder of an official release, for everything that is not given by itself")
    dit: str | None = flag("transformer: safetensors file, first of several shards, or snapshot folder")
    vae: str | None = flag("Wan VAE: .pth, safetensors, or snapshot folder")
    t5: str | None = flag("UMT5: .pth, safetensors, or snapshot folder")
    clip: str | None = flag("CLIP (image-to-video tasks): .pth, safetensors, or snapshot folder")
    t5_tokenizer: str | None = flag("UMT5 tokenizer: folder or hub id (default: beside --t5, else the hub)")
    disable_numpy_memmap: bool = flag("read safetensors with plain file reads instead of memory maps", default=False)


@dataclass(frozen=True, kw_only=True)
class WanComputeFlags(ComputeFlags):
    """Device, types and memory."""

    vae_dtype: Literal["bfloat16", "bf16", "float16", "fp16", "float32", "fp32"] | None = flag(
        "compute type of the VAE (default: bfloat16 on a GPU, float32 on a CPU)"
    )
    vae_cache_cpu: bool = flag("keep in RAM what the VAE remembers of earlier frames", default=False)
    fp8_t5: bool = flag("UMT5 in fp8 with scales", default=False)
    fp8_fast: bool = refused(
        "products in fp8", why="not supported: scales are by blocks, which is more precise", default=False
    )
    blocks_to_swap: SwapCount = flag(
        "transformer blocks kept in RAM, up to 39 (14B) or 29 (1.3B), or auto: as many as it takes",
        default=SwapCount(),
    )

    recorded_types: ClassVar[Mapping[str, tuple[type, ...]]] = ComputeFlags.recorded_types | {
        "vae_dtype": (str,),
        "fp8_t5": (bool,),
    }
    replayed: ClassVar[tuple[str, ...]] = ("fp8_t5",)
    number_types: ClassVar[tuple[str, ...]] = ("dit_dtype", "vae_dtype")


@dataclass(frozen=True, kw_only=True)
class Wan22PairFlags:
    """What only Wan2.2's pair of transformers has."""

    dit_high_noise: str | None = refused("second transformer", why=WAN21_ONLY)
    timestep_boundary: float | None = refused("where the transformers change", why=WAN21_ONLY)
    offload_inactive_dit: bool = refused("one transformer in RAM", why=WAN21_ONLY, default=False)
    force_v2_1_time_embedding: bool = refused("embed timesteps as Wan2.1 does", why=WAN21_ONLY, default=False)


@dataclass(frozen=True, kw_only=True)
class Wan22Flags(Wan22PairFlags):
    """The same, with what only its generation has."""

    guidance_scale_high_noise: float | None = refused("guidance of the second transformer", why=WAN21_ONLY)
    lora_weight_high_noise: tuple[str, ...] = refused("its LoRAs", why=WAN21_ONLY, default=())
    lora_multiplier_high_noise: tuple[float, ...] = refused("their multipliers", why=WAN21_ONLY, default=())
    lazy_loading: bool = refused("load them in turn", why=WAN21_ONLY, default=False)


@dataclass(frozen=True, kw_only=True)
class WanGenerateFlags:
    """All of them."""

    models: WanModelFlags
    request: WanRequestFlags
    output: OutputFlags
    compute: WanComputeFlags
    lora: LoraFlags
    compilation: CompileArgsFlags
    series: SeriesFlags
    wan22: Wan22Flags
