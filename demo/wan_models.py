"""Small Wan2.1 models with seeded random weights, in the official layouts and under the official files' names.

    wan2.1_i2v_480p_14B_bf16.safetensors ...    a transformer for each kind of task, made when it is asked for
    Wan2.1_VAE.pth
    models_t5_umt5-xxl-enc-bf16.pth
    models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors
    google/umt5-xxl/                            the tokenizer

Tests compare the layouts with the published ones, so that what loads these files loads the real ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.files import atomic_file, atomic_folder
from demo.small_tokenizers import save_t5_tokenizer
from demo.wan_colours import let_colours_through
from demo.wan_layouts import Shapes, clip_shapes, t5_shapes, vae_shapes

if TYPE_CHECKING:
    from wan.config import Kind

TRANSFORMERS: Mapping[Kind, str] = {
    "t2v": "wan2.1_t2v_1.3B_bf16.safetensors",
    "i2v": "wan2.1_i2v_480p_14B_bf16.safetensors",
    "flf2v": "wan2.1_flf2v_720p_14B_bf16.safetensors",
    "fun_control": "wan2.1_fun_control_1.3B_bf16.safetensors",
}
VAE = "Wan2.1_VAE.pth"
T5 = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors"
TOKENIZER = "google/umt5-xxl"
STAMP_NAME = "recipe.txt"

VAE_BASE = 8
TEXT_WIDTH, IMAGE_WIDTH = 64, 160
NUM_BLOCKS, WIDTH, MLP_WIDTH = 3, 256, 512
NUM_PICTURE_ROWS = 257


@dataclass(frozen=True, kw_only=True)
class WanModelPaths:
    """What a user would write behind the flags of the same names."""

    dit: Path
    vae: Path
    t5: Path
    clip: Path
    t5_tokenizer: Path

    @classmethod
    def under(cls, folder: Path, kind: Kind) -> WanModelPaths:
        """The files of a folder to which everything was downloaded, with the transformer of one kind."""
        return cls(
            dit=folder / TRANSFORMERS[kind],
            vae=folder / VAE,
            t5=folder / T5,
            clip=folder / CLIP,
            t5_tokenizer=folder / TOKENIZER,
        )

    def for_kind(self, kind: Kind) -> WanModelPaths:
        """The same with another transformer, which is built if it is not there."""
        return _with_transformer(replace(self, dit=self.dit.with_name(TRANSFORMERS[kind])), kind)


def build_wan_models(folder: Path, *, kind: Kind = "i2v", seed: int = 0) -> WanModelPaths:
    """Builds the encoders, the VAE and a transformer in `folder`, unless they are there from the same recipe."""
    stamp, recipe = folder / STAMP_NAME, f"{seed} {_recipe()}"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != recipe:
        with atomic_folder(folder) as new:
            _build(WanModelPaths.under(new, kind), seed)
            (new / STAMP_NAME).write_text(recipe, encoding="utf-8")
    return _with_transformer(WanModelPaths.under(folder, kind), kind)


def _recipe() -> str:
    """A hash over the code that makes the models and the versions of the libraries that it uses."""
    demo = Path(__file__).parent
    sources = [demo / f"{name}.py" for name in ("wan_models", "wan_layouts", "wan_colours", "small_tokenizers")]
    sources += [demo.parent / "wan" / f"{name}.py" for name in ("config", "layers", "model")]
    libraries = [f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers")]
    text = "\n".join([*libraries, *(source.read_text(encoding="utf-8") for source in sources)])
    return hashlib.sha256(text.encode()).hexdigest()


def _build(paths: WanModelPaths, seed: int) -> None:
    """Everything but the transformer; each model from its own seed: a change of one leaves the others as they are."""
    vocabulary = save_t5_tokenizer(paths.t5_tokenizer)
    vae = random_tensors(vae_shapes(VAE_BASE), seed=seed)
    let_colours_through(vae)
    _save_pickle(vae, paths.vae)
    t5 = t5_shapes(vocabulary=vocabulary, width=TEXT_WIDTH, inner=128, mlp=2 * TEXT_WIDTH, heads=2, blocks=2)
    _save_pickle(stored_as(torch.bfloat16, random_tensors(t5, seed=seed + 1)), paths.t5)
    clip = clip_shapes(width=IMAGE_WIDTH, mlp=2 * IMAGE_WIDTH, blocks=3, head=64)
    clip |= {"log_scale": (), "textual.norm.weight": (64,), "textual.norm.bias": (64,)}
    save_file(stored_as(torch.float16, random_tensors(clip, seed=seed + 2)), paths.clip)


def _save_pickle(tensors: Mapping[str, Tensor], file: Path) -> None:
    with file.open("wb") as stream:  # given a path, torch would write its name into the file, or not
        torch.save(tensors, stream)


def _with_transformer(paths: WanModelPaths, kind: Kind) -> WanModelPaths:
    if not paths.dit.is_file():
        seed = int((paths.dit.parent / STAMP_NAME).read_text(encoding="utf-8").split()[0])
        save_transformer(paths.dit, kind, seed=seed + 3)
    return paths


def save_transformer(file: Path, kind: Kind, *, seed: int) -> None:
    """Writes a transformer in bfloat16 that takes what the small encoders give."""
    from wan.config import WanConfig
    from wan.model import WanTransformer

    takes_pictures = kind != "t2v"
    config = WanConfig(
        num_blocks=NUM_BLOCKS,
        width=WIDTH,
        mlp_width=MLP_WIDTH,
        in_channels={"t2v": 16, "i2v": 36, "flf2v": 36, "fun_control": 48}[kind],
        text_width=TEXT_WIDTH,
        image_width=IMAGE_WIDTH if takes_pictures else None,
        num_image_positions=2 * NUM_PICTURE_ROWS if kind == "flf2v" else None,
    )
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in WanTransformer(config).state_dict().items()}
    with atomic_file(file) as temporary:
        save_file(stored_as(torch.bfloat16, random_tensors(shapes, seed=seed)), temporary)


def random_tensors(shapes: Shapes, *, seed: int) -> dict[str, Tensor]:
    """Numbers of a size that keeps activations about where they are; none is at its neutral value."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _random(name, shape, generator) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    numbers = torch.randn(shape, generator=generator)
    if name.endswith(".gamma") or "norm" in name and name.endswith(".weight"):
        return 1 + 0.1 * numbers
    if name.endswith(("embedding", "embedding.weight")) and "patch" not in name:
        return numbers
    if name.endswith((".bias", ".modulation", ".emb_pos")):
        return 0.1 * numbers
    return numbers / math.sqrt(max(math.prod(shape[1:]), 1))


def stored_as(dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the type of the published file."""
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}
