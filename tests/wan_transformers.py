"""Small Wan transformers with random weights, what they are told, and diffusers' twins of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from wan.config import Kind, WanConfig
from wan.model import Conditioning, WanTransformer

NUM_BLOCKS, HEIGHT, WIDTH, NUM_FRAMES = 3, 4, 6, 3
CONFIGS: dict[Kind, WanConfig] = {
    kind: WanConfig(num_blocks=NUM_BLOCKS, width=256, mlp_width=320, text_width=48, **sizes)
    for kind, sizes in {
        "t2v": {"in_channels": 16},
        "i2v": {"in_channels": 36, "image_width": 40},
        "flf2v": {"in_channels": 36, "image_width": 40, "num_image_positions": 514},
        "fun_control": {"in_channels": 48, "image_width": 40},
    }.items()
}


def build_transformer(kind: Kind = "i2v", seed: int = 0, **changes: int) -> WanTransformer:
    """Every parameter matters: none is at its neutral value. `changes` are of the configuration."""
    model = WanTransformer(replace(CONFIGS[kind], **changes)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(mean + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def diffusers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By diffusers' own converter, which leaves one tensor out."""
    converted = convert_wan_transformer_to_diffusers(dict(tensors))
    if (positions := converted.pop("img_emb.emb_pos", None)) is not None:
        converted["condition_embedder.image_embedder.pos_embed"] = positions
    return converted


def build_oracle(model: WanTransformer) -> WanTransformer3DModel:
    """diffusers' model with the same weights."""
    config = model.config
    oracle = WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.latent_channels,
        text_dim=config.text_width,
        ffn_dim=config.mlp_width,
        num_layers=config.num_blocks,
        image_dim=config.image_width,
        added_kv_proj_dim=None if config.image_width is None else config.width,
        pos_embed_seq_len=config.num_image_positions,
    )
    oracle.load_state_dict(diffusers_names(model.state_dict()))
    return oracle.eval().requires_grad_(False)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noisy(batch: int = 1, *, frames: int = NUM_FRAMES, seed: int = 9) -> Tensor:
    return random(batch, 16, frames, HEIGHT, WIDTH, seed=seed)


def conditioning(
    config: WanConfig, lengths: tuple[int, ...] = (5,), *, indices: Tensor | None = None, seed: int = 1
) -> Conditioning:
    """Frames count from 0 unless `indices` (B, F) say otherwise."""
    batch, extra = len(lengths), config.in_channels - config.latent_channels
    indices = torch.arange(NUM_FRAMES).expand(batch, -1) if indices is None else indices
    size = (indices.shape[1], HEIGHT, WIDTH)
    num_rows = config.num_image_positions or 257
    return Conditioning(
        text=random(batch, max(lengths) + 2, config.text_width, seed=seed),
        text_lengths=torch.tensor(lengths),
        image=random(batch, num_rows, config.image_width, seed=seed + 1) if config.image_width else None,
        latents=random(batch, extra, *size, seed=seed + 2) if extra else None,
        indices=indices,
    )


@torch.no_grad()
def diffusers_forward(oracle: WanTransformer3DModel, latents: Tensor, timesteps: Tensor, given: Conditioning) -> Tensor:
    text = torch.zeros(len(latents), 512, given.text.shape[2])
    for row, length in enumerate(given.text_lengths.tolist()):
        text[row, :length] = given.text[row, :length]
    # One row of features for each picture, as diffusers' pipelines give them.
    image = None if given.image is None else given.image.reshape(-1, 257, given.image.shape[2])
    whole = latents if given.latents is None else torch.cat([latents, given.latents], dim=1)
    return oracle(whole, timesteps, text, encoder_hidden_states_image=image, return_dict=False)[0]
