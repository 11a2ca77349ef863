"""Flags that every generating script has: what is asked for, where results go, how and how often."""

from dataclasses import dataclass
from typing import Literal

from options.errors import UserError
from options.flag_fields import flag
from options.fp8 import Fp8Mode, fp8_mode
from options.memory_size import ANY, PLAN, MemorySize
from options.swap_count import PINNED, SwapCount

DEFAULT_TILE = 256
"""Pixels per side with `--vae_tiling` alone."""


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
    lora: tuple[str, ...] = flag(
        "LoRA of this prompt only, PATH or PATH:0.8, applied without loading the model anew", default=(), repeats=True
    )


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
class ComputeFlags(VaeMemoryFlags):
    """Device, types and memory."""

    device: str | None = flag("torch device (default: cuda if there is one, else cpu)")
    dit_dtype: Literal["bfloat16", "bf16", "float16", "fp16", "float32", "fp32"] | None = flag(
        "compute type of the transformer (default: bfloat16 on a GPU, float32 on a CPU)"
    )
    attn_mode: Literal["flash", "flash2", "flash3", "torch", "sageattn", "xformers", "sdpa"] = flag(
        "attention; torch and sdpa are the same, so are flash and flash2", default="torch"
    )
    bulk_decode: bool = flag("decode a video in one piece", default=False)
    fp8: bool = flag("transformer in fp8: two thirds of the memory in bfloat16, and less precise", default=False)
    fp8_scaled: bool = flag("the same with scales, which keep much more of it; needs no --fp8", default=False)
    fp8_llm: bool = flag("LLaMA in fp8 with scales", default=False)
    blocks_to_swap: SwapCount = flag(
        "transformer blocks kept in RAM, up to 38, or auto: as many as it takes", default=SwapCount()
    )
    use_pinned_memory_for_block_swap: bool = flag(PINNED, default=False)
    offload_invariant: Literal["auto", "always", "never"] = flag(
        "keep weights that a prompt needs once (a quarter of FramePack) in RAM; auto: when memory is short",
        default="auto",
    )
    sample_solver: Literal["unipc", "dpm++", "vanilla"] = flag("sampler", default="unipc", not_yet=("dpm++", "vanilla"))

    @property
    def attention(self) -> str:
        """`--attn_mode` by its one name in the code."""
        return {"torch": "sdpa", "flash2": "flash"}.get(self.attn_mode, self.attn_mode)

    @property
    def fp8_mode(self) -> Fp8Mode:
        return fp8_mode(fp8=self.fp8, scaled=self.fp8_scaled)


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


def check_vae_memory(flags: VaeMemoryFlags) -> None:
    """Raises UserError for tile and chunk sizes that the VAE cannot use."""
    tile, chunk = flags.vae_spatial_tile_sample_min_size, flags.vae_chunk_size
    if tile is not None and (tile < 32 or tile % 32):
        expected = "a positive multiple of 32"
        raise UserError("--vae_spatial_tile_sample_min_size", tile, expected, f"use {max(32, tile // 32 * 32)}, say")
    if chunk is not None and chunk < 0:
        raise UserError("--vae_chunk_size", chunk, "a positive number of columns, or 0 for no chunks", "use 32, say")
