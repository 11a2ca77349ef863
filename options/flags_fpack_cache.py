"""The flags of `fpack_cache_latents.py` and `fpack_cache_text_encoder_outputs.py`."""

from dataclasses import dataclass

from options.flag_fields import flag
from options.flags_cache import CacheFlags, CachePreviewFlags
from options.flags_generate import VaeMemoryFlags


@dataclass(frozen=True, kw_only=True)
class LatentModelFlags:
    """Where the two image models lie."""

    vae: str | None = flag("HunyuanVideo VAE: safetensors, .pt, or snapshot folder")
    vae_dtype: str | None = flag("leave it out: it is float16 on a GPU, float32 on a CPU")
    image_encoder: str | None = flag("SigLIP: safetensors, or snapshot folder")
    disable_cudnn_backend: bool = flag("do without cuDNN", default=False)


@dataclass(frozen=True, kw_only=True)
class ContextFlags:
    """What is trained."""

    f1: bool = flag("sections for FramePack-F1, forwards", default=False, alias="vanilla_sampling")
    one_frame: bool = flag("one-frame training: images with control images", default=False)
    one_frame_no_2x: bool = flag("one frame: leave out the (zero) history at half resolution", default=False)
    one_frame_no_4x: bool = flag("one frame: leave out the (zero) history at quarter resolution", default=False)
    latent_window_size: int | None = flag("latent frames per section (default: fp_latent_window_size of the data set)")


@dataclass(frozen=True, kw_only=True)
class FramePackCacheLatentsFlags:
    """All of them."""

    cache: CacheFlags
    models: LatentModelFlags
    context: ContextFlags
    vae_memory: VaeMemoryFlags
    preview: CachePreviewFlags


@dataclass(frozen=True, kw_only=True)
class TextModelFlags:
    """Where the text encoders and their tokenizers lie."""

    text_encoder1: str = flag("LLaMA: safetensors, first shard, or snapshot folder", required=True)
    text_encoder2: str = flag("CLIP-L: safetensors, or snapshot folder", required=True)
    tokenizer1: str | None = flag("LLaMA tokenizer: folder or hub id (default: beside --text_encoder1, else the hub)")
    tokenizer2: str | None = flag("CLIP tokenizer: folder or hub id (default: beside --text_encoder2, else the hub)")
    fp8_llm: bool = flag("LLaMA in fp8 with scales", default=False)


@dataclass(frozen=True, kw_only=True)
class FramePackCacheTextsFlags:
    """All of them."""

    cache: CacheFlags
    models: TextModelFlags
