"""Small checkpoints with seeded random weights in the published layouts and key names, in one snapshot tree.

    FramePackI2V_HY/                config.json, three shards in bfloat16
    HunyuanVideo/                   vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2
    flux_redux_bfl/image_encoder/

They are made by diffusers' and transformers' own classes, so nothing of ours decides what a checkpoint looks like.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, SiglipVisionConfig, SiglipVisionModel

from common.files import atomic_folder
from demo.copying import copy_controls, let_colours_through
from demo.small_tokenizers import save_clip_tokenizer, save_llama_tokenizer

SEED = 20250417
NUM_SHARDS = 3
TEXT_WIDTH, POOLED_WIDTH, IMAGE_WIDTH = 256, 128, 144
STAMP_NAME = "recipe.txt"
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class ModelPaths:
    """What a user would write behind the flags of the same names."""

    dit: Path
    vae: Path
    text_encoder1: Path
    text_encoder2: Path
    image_encoder: Path


def build_models(folder: Path) -> ModelPaths:
    """Builds the tree in `folder` unless it is there from the same recipe."""
    stamp = folder / STAMP_NAME
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != recipe():
        with atomic_folder(folder) as new:
            _build(new)
            (new / STAMP_NAME).write_text(recipe(), encoding="utf-8")
    hunyuan = folder / "HunyuanVideo"
    return ModelPaths(
        dit=folder / "FramePackI2V_HY",
        vae=hunyuan,
        text_encoder1=hunyuan,
        text_encoder2=hunyuan,
        image_encoder=folder / "flux_redux_bfl",
    )


def recipe() -> str:
    """A hash over the code that makes the models and the versions of the libraries that it uses."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    libraries = [f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "tokenizers")]
    text = "\n".join([*libraries, *(source.read_text(encoding="utf-8") for source in sources)])
    return hashlib.sha256(text.encode()).hexdigest()


def _build(folder: Path) -> None:
    hunyuan = folder / "HunyuanVideo"
    llama_vocabulary = save_llama_tokenizer(hunyuan / "tokenizer")
    clip_vocabulary = save_clip_tokenizer(hunyuan / "tokenizer_2")
    # Each model from its own seed: a change of one leaves the others as they are. The caller's random state is kept.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        _save_in_shards(_stored_as(torch.bfloat16, _transformer()), folder / "FramePackI2V_HY")
        torch.manual_seed(SEED + 1)
        _stored_as(torch.float16, _vae()).save_pretrained(hunyuan / "vae")
        torch.manual_seed(SEED + 2)
        _stored_as(torch.float16, _llama(llama_vocabulary)).save_pretrained(hunyuan / "text_encoder")
        torch.manual_seed(SEED + 3)
        _stored_as(torch.float16, _clip_text(clip_vocabulary)).save_pretrained(hunyuan / "text_encoder_2")
        torch.manual_seed(SEED + 4)
        image_encoder = folder / "flux_redux_bfl" / "image_encoder"
        _stored_as(torch.float16, _siglip()).save_pretrained(image_encoder)
    _save_image_processor(folder / "flux_redux_bfl" / "feature_extractor")


def _transformer() -> HunyuanVideoFramepackTransformer3DModel:
    model = HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        guidance_embeds=True,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        rope_theta=256.0,
        rope_axes_dim=(16, 56, 56),
        has_image_proj=True,
        image_proj_dim=IMAGE_WIDTH,
        has_clean_x_embedder=True,
    )
    copy_controls(model)
    return model


def _save_in_shards(model: HunyuanVideoFramepackTransformer3DModel, folder: Path) -> None:
    """Writes as many shards as the published checkpoint has."""
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    # A shard ends before the tensor that would overfill it, so an exact third would leave a fourth one.
    model.save_pretrained(folder, max_shard_size=math.ceil(num_bytes / NUM_SHARDS * 1.1))
    found = len(list(folder.glob("*.safetensors")))
    if found != NUM_SHARDS:
        raise RuntimeError(f"{folder}: got {found} shards; expected {NUM_SHARDS}; adjust the size of a shard")


def _vae() -> AutoencoderKLHunyuanVideo:
    model = AutoencoderKLHunyuanVideo(block_out_channels=(32, 32, 64, 64), layers_per_block=1)
    let_colours_through(model)
    return model


def _llama(vocabulary: int) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        initializer_range=TEXT_WIDTH**-0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaModel(config)
    _enlarge(model.embed_tokens, 8.0)
    return model


def _clip_text(vocabulary: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=POOLED_WIDTH,
        intermediate_size=2 * POOLED_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=POOLED_WIDTH // 64,
        projection_dim=POOLED_WIDTH,
        initializer_factor=2.0,
        bos_token_id=0,
        eos_token_id=2,
    )
    return CLIPTextModel(config)


def _siglip() -> SiglipVisionModel:
    config = SiglipVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=2 * IMAGE_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=IMAGE_WIDTH // 72,
        image_size=384,
        patch_size=14,
    )
    return SiglipVisionModel(config)


def _stored_as(dtype: torch.dtype, model: Model) -> Model:
    """The model in the type of the published file; tensor by tensor, as diffusers warns about `to`."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def _enlarge(module: nn.Module, factor: float) -> None:
    """Brings an embedding to the size that trained ones have, so that it is not lost among the biases."""
    module.weight *= factor


def _save_image_processor(folder: Path) -> None:
    settings = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": 384, "width": 384},
    }
    folder.mkdir(parents=True)
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8", newline="\n")
