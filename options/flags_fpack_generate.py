"""The flags of `fpack_generate_video.py`."""

from dataclasses import dataclass
from typing import Literal

from options.flag_fields import flag, later


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
class RequestFlags:
    """What is generated; everything here may differ from one prompt to the next."""

    prompt: str | None = flag('prompt; by section: "0:text;;;-1:text"')
    negative_prompt: str | None = flag("used when --guidance_scale is not 1")
    custom_system_prompt: str | None = flag("replaces the system prompt of the LLaMA text encoder")
    video_size: tuple[int, int] = flag("height and width, multiples of 16", default=(256, 256))
    video_seconds: float = flag("length of the video at 30 frames per second", default=5.0)
    video_sections: int | None = flag("length in sections; overrides --video_seconds")
    image_path: str | None = flag('start image; by section: "0:a.png;;;-1:b.png"')
    image_mask_path: str | None = flag("mask of the start image (one frame: of the first control image)")
    end_image_path: str | None = flag("image that the video ends with (not F1, not one frame)")
    one_frame_inference: str | None = flag(
        "one picture: default, or no_2x,no_4x,no_post,target_index=9,control_index=0;10"
    )
    one_frame_auto_resize: bool = flag("take the aspect ratio from the first control image", default=False)
    control_image_path: tuple[str, ...] = flag("control images of one-frame inference", default=())
    control_image_mask_path: tuple[str, ...] = flag("their masks, by position; white is used", default=())
    latent_paddings: str | None = flag("blank sections before each section, last section first: 3,2,1,0")
    f1: bool = flag("FramePack-F1: generate forwards", default=False)
    latent_window_size: int = flag("latent frames per section", default=9)
    infer_steps: int = flag("denoising steps", default=25)
    seed: int | None = flag("seed of the noise (default: random)")
    embedded_cfg_scale: float = flag("distilled guidance", default=10.0)
    guidance_scale: float = flag("classifier-free guidance; 1 is off", default=1.0)
    guidance_rescale: float = flag("guidance rescale, 0 to 1", default=0.0)
    flow_shift: float | None = flag("fixed flow shift (default: by resolution)")
    rope_scaling_timestep_threshold: int | None = flag("scale RoPE rows and columns at timesteps from here on")
    rope_scaling_factor: float = flag("the factor for that", default=0.5)
    fps: int = flag("frame rate of the video file", default=30)


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Where results go, and in which form."""

    save_path: str = flag("folder for results", required=True)
    output_type: Literal["video", "images", "latent", "both", "latent_images"] = flag(
        "both: latent and video", default="video"
    )
    no_metadata: bool = flag("save no settings with latents", default=False)
    latent_path: tuple[str, ...] = flag("decode these saved latents instead of generating", default=())

    @property
    def saves_latents(self) -> bool:
        return self.output_type in ("latent", "both", "latent_images")

    @property
    def saves_video(self) -> bool:
        return self.output_type in ("video", "both")

    @property
    def saves_pictures(self) -> bool:
        return self.output_type in ("images", "latent_images")


@dataclass(frozen=True, kw_only=True)
class ComputeFlags:
    """Device, types and memory."""

    device: str | None = flag("torch device (default: cuda if there is one, else cpu)")
    dit_dtype: Literal["bfloat16", "bf16", "float16", "fp16", "float32", "fp32"] | None = flag(
        "compute type of the transformer (default: bfloat16 on a GPU, float32 on a CPU)"
    )
    attn_mode: Literal["flash", "torch", "sageattn", "xformers", "sdpa"] = flag(
        "attention; torch and sdpa are the same", default="torch", not_yet=("flash", "sageattn", "xformers")
    )
    vae_tiling: bool = flag("encode and decode in tiles of 256 pixels", default=False)
    vae_spatial_tile_sample_min_size: int | None = flag("the same in tiles of this size, a multiple of 32")
    vae_chunk_size: int | None = flag("convolve in chunks of this width: less memory, same result")
    bulk_decode: bool = flag("decode a video in one piece", default=False)
    fp8: bool = later("fp8 transformer", default=False)
    fp8_scaled: bool = later("fp8 transformer with block scales", default=False)
    fp8_llm: bool = later("fp8 LLaMA", default=False)
    blocks_to_swap: int = later("transformer blocks kept in RAM", default=0)
    use_pinned_memory_for_block_swap: bool = later("pinned buffers for that", default=False)
    sample_solver: Literal["unipc", "dpm++", "vanilla"] = flag("sampler", default="unipc", not_yet=("dpm++", "vanilla"))


@dataclass(frozen=True, kw_only=True)
class LoraFlags:
    """LoRA weights merged into the transformer."""

    lora_weight: tuple[str, ...] = later("LoRA files", default=())
    lora_multiplier: tuple[float, ...] = later("their multipliers", default=())
    include_patterns: tuple[str, ...] = later("regular expressions for LoRA modules to use", default=())
    exclude_patterns: tuple[str, ...] = later("regular expressions for LoRA modules to leave out", default=())
    save_merged_model: str | None = later("save the merged transformer and exit")
    lycoris: bool = later("merge through the lycoris package", default=False)


@dataclass(frozen=True, kw_only=True)
class SpeedFlags:
    """Compilation and caching of steps."""

    compile: bool = later("torch.compile the blocks", default=False)
    compile_backend: str = later("its backend", default="inductor")
    compile_mode: str = later("its mode", default="default")
    compile_dynamic: str | None = later("its dynamic shapes: true, false, auto")
    compile_fullgraph: bool = later("no graph breaks", default=False)
    compile_cache_size_limit: int | None = later("graphs kept per function")
    magcache_mag_ratios: str | None = later("turns MagCache on: comma list, or 0 for the built-in ratios")
    magcache_retention_ratio: float = later("first fraction of steps that is never skipped", default=0.2)
    magcache_threshold: float = later("limit of the accumulated error", default=0.24)
    magcache_k: int = later("steps skipped in a row at most", default=6)
    magcache_calibration: bool = later("measure ratios instead of skipping", default=False)


@dataclass(frozen=True, kw_only=True)
class SeriesFlags:
    """Many prompts in one run."""

    from_file: str | None = later("file with one prompt per line")
    interactive: bool = later("prompts from the console", default=False)


@dataclass(frozen=True, kw_only=True)
class FramePackGenerateFlags:
    """All of them."""

    models: FramePackModelFlags
    request: RequestFlags
    output: OutputFlags
    compute: ComputeFlags
    lora: LoraFlags
    speed: SpeedFlags
    series: SeriesFlags
