"""Frozen text and image encoders with random weights, in the published layouts, and where a snapshot keeps models.

Random encoders are enough where the words are few: every word is a token, and a token's embedding passes through.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, SiglipVisionConfig, SiglipVisionModel

from demo.small_tokenizers import CORPUS, save_clip_tokenizer, save_llama_tokenizer

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class ModelPaths:
    """What a user would write behind the flags of the same names."""

    dit: Path
    vae: Path
    text_encoder1: Path
    text_encoder2: Path
    image_encoder: Path

    @classmethod
    def under(cls, folder: Path) -> "ModelPaths":
        """The snapshot tree that a download of the published models makes."""
        hunyuan = folder / "HunyuanVideo"
        return cls(
            dit=folder / "FramePackI2V_HY",
            vae=hunyuan,
            text_encoder1=hunyuan,
            text_encoder2=hunyuan,
            image_encoder=folder / "flux_redux_bfl",
        )


@dataclass(frozen=True, kw_only=True)
class EncoderSizes:
    """Widths of the encoders; heads are 64 wide, SigLIP's 72."""

    text: int
    pooled: int
    image: int
    image_size: int = 384
    """Pixels per side that SigLIP looks at, 14 x 14 of them for each of its rows."""


def save_encoders(folder: Path, sizes: EncoderSizes, *, seed: int, corpus: Iterable[str] = CORPUS) -> None:
    """Writes the three encoders with their tokenizers and settings into the snapshot tree under `folder`.

    Args:
        corpus: what the tokenizers know as whole words.
    """
    hunyuan, redux = folder / "HunyuanVideo", folder / "flux_redux_bfl"
    corpus = list(corpus)
    llama_vocabulary = save_llama_tokenizer(hunyuan / "tokenizer", corpus)
    clip_vocabulary = save_clip_tokenizer(hunyuan / "tokenizer_2", corpus)
    # Each model from its own seed: a change of one leaves the others as they are. The caller's random state is kept.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stored_as(torch.float16, _llama(llama_vocabulary, sizes.text)).save_pretrained(hunyuan / "text_encoder")
        torch.manual_seed(seed + 1)
        stored_as(torch.float16, _clip_text(clip_vocabulary, sizes.pooled)).save_pretrained(hunyuan / "text_encoder_2")
        torch.manual_seed(seed + 2)
        siglip = _siglip(sizes.image, sizes.image_size)
        stored_as(torch.float16, siglip).save_pretrained(redux / "image_encoder")
    _save_image_processor(redux / "feature_extractor", sizes.image_size)


def _llama(vocabulary: int, width: int) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=width // 128,
        num_key_value_heads=1,
        head_dim=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        initializer_range=width**-0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaModel(config)
    _enlarge(model.embed_tokens, 8.0)
    return model


def _clip_text(vocabulary: int, width: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        projection_dim=width,
        initializer_factor=2.0,
        bos_token_id=0,
        eos_token_id=2,
    )
    return CLIPTextModel(config)


def _siglip(width: int, image_size: int) -> SiglipVisionModel:
    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 72,
        image_size=image_size,
        patch_size=14,
    )
    return SiglipVisionModel(config)


def stored_as(dtype: torch.dtype, model: Model) -> Model:
    """The model in the type of the published file; tensor by tensor, as diffusers warns about `to`."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def _enlarge(module: nn.Module, factor: float) -> None:
    """Brings an embedding to the size that trained ones have, so that it is not lost among the biases."""
    module.weight *= factor


def _save_image_processor(folder: Path, size: int) -> None:
    settings = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
    }
    folder.mkdir(parents=True)
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8", newline="\n")
