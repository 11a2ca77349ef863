"""Small checkpoints with seeded random weights in the published layouts and key names, in one snapshot tree.

    FramePackI2V_HY/                config.json, three shards in bfloat16
    HunyuanVideo/                   vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2
    flux_redux_bfl/image_encoder/

They are made by diffusers' and transformers' own classes, so nothing of ours decides what a checkpoint looks like.
"""

import hashlib
import math
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel

from common.files import atomic_folder
from demo.copying import copy_controls, let_colours_through
from demo.encoders import EncoderSizes, ModelPaths, save_encoders, stored_as

SEED = 20250417
NUM_SHARDS = 3
TEXT_WIDTH, POOLED_WIDTH, IMAGE_WIDTH = 256, 128, 144
STAMP_NAME = "recipe.txt"


def build_models(folder: Path) -> ModelPaths:
    """Builds the tree in `folder` unless it is there from the same recipe."""
    stamp = folder / STAMP_NAME
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != recipe():
        with atomic_folder(folder) as new:
            _build(new)
            (new / STAMP_NAME).write_text(recipe(), encoding="utf-8")
    return ModelPaths.under(folder)


def recipe() -> str:
    """A hash over the code that makes the models and the versions of the libraries that it uses."""
    folder = Path(__file__).parent
    names = ("models.py", "encoders.py", "small_tokenizers.py", "copying.py")
    sources = [folder / name for name in names]
    libraries = [f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "tokenizers")]
    text = "\n".join([*libraries, *(source.read_text(encoding="utf-8") for source in sources)])
    return hashlib.sha256(text.encode()).hexdigest()


def _build(folder: Path) -> None:
    # Each model from its own seed: a change of one leaves the others as they are. The caller's random state is kept.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        _save_in_shards(stored_as(torch.bfloat16, _transformer()), folder / "FramePackI2V_HY")
        torch.manual_seed(SEED + 1)
        stored_as(torch.float16, _vae()).save_pretrained(folder / "HunyuanVideo" / "vae")
    sizes = EncoderSizes(text=TEXT_WIDTH, pooled=POOLED_WIDTH, image=IMAGE_WIDTH)
    save_encoders(folder, sizes, seed=SEED + 2)


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
