"""The flags of `fpack_generate_video.py`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from options.flag_fields import flag, later
from options.flags_compile import CompileFlags
from options.flags_generate import (
    ComputeFlags,
    OutputFlags,
    SeriesFlags,
    SolverName,
    VaeMemoryFlags,
    check_vae_memory,
)
from options.flags_lora import LoraFlags
from options.fpack_request import FramePackRequestFlags
from options.swap_count import SwapCount


@dataclass(frozen=True, kw_only=True)
class FramePackModelFlags:
    """Where the five models and two tokenizers lie."""

    dit: str | None = flag("transformer: safetensors file, first of several shards, or snapshot folder")
    vae: str | None = flag("HunyuanVideo VAE: safetensors, .pt, or snapshot folder")
    text_encoder1: str | None = flag("LLaMA: safetensors, first shard, or snapshot folder")
    text_encoder2: str | None = flag("CLIP-L: safetensors, or snapshot folder")
    image_encoder: str | None = flag("SigLIP: safetensors, or snapshot folder")
    tokenizer1: str | None = flag("LLaMA tokenizer: folder or hub id (default: beside --text_encoder1, else the hub)")
    tokenizer2: str | None = flag("CLIP tokenizer: folder or hub id (default: beside --text_encoder2, else the hub)")
    disable_numpy_memmap: bool = flag("read safetensors with plain file reads instead of memory maps", default=False)


@dataclass(frozen=True, kw_only=True)
class FramePackComputeFlags(ComputeFlags, VaeMemoryFlags):
    """Device, types and memory."""

    bulk_decode: bool = flag("decode a video in one piece", default=False)
    fp8_llm: bool = flag("LLaMA in fp8 with scales", default=False)
    blocks_to_swap: SwapCount = flag(
        "transformer blocks kept in RAM, up to 38, or auto: as many as it takes", default=SwapCount()
    )
    sample_solver: SolverName = flag("sampler", default="unipc", not_yet=("dpm++", "vanilla"))

    recorded_types: ClassVar[Mapping[str, tuple[type, ...]]] = ComputeFlags.recorded_types | {
        "vae_spatial_tile_sample_min_size": (int, type(None)),
        "vae_chunk_size": (int, type(None)),
        "bulk_decode": (bool,),
        "fp8_llm": (bool,),
    }
    not_in_older: ClassVar[Mapping[str, object]] = {
        **{"attn_mode": "sdpa", "compile": False},
        **{"fp8": False, "fp8_scaled": False, "fp8_llm": False},
    }
    replayed: ClassVar[tuple[str, ...]] = (
        *("vae_spatial_tile_sample_min_size", "vae_chunk_size"),
        *("bulk_decode", "fp8_llm"),
    )

    def check(self) -> None:
        check_vae_memory(self)


@dataclass(frozen=True, kw_only=True)
class MagCacheFlags:
    """Steps that are skipped."""

    magcache_mag_ratios: str | None = later("turns MagCache on: comma list, or 0 for the built-in ratios")
    magcache_retention_ratio: float = later("first fraction of steps that is never skipped", default=0.2)
    magcache_threshold: float = later("limit of the accumulated error", default=0.24)
    magcache_k: int = later("steps skipped in a row at most", default=6)
    magcache_calibration: bool = later("measure ratios instead of skipping", default=False)


@dataclass(frozen=True, kw_only=True)
class FramePackGenerateFlags:
    """All of them."""

    models: FramePackModelFlags
    request: FramePackRequestFlags
    output: OutputFlags
    compute: FramePackComputeFlags
    lora: LoraFlags
    compilation: CompileFlags
    magcache: MagCacheFlags
    series: SeriesFlags
