"""A hand-made path through the otherwise random weights of a small Wan transformer, so that a LoRA learns in seconds.

Nothing is trained. The head gives out the noisy patch that the embedding took in, which is most of a velocity. The
first block's two attention heads look at the same place in the frame before and in the frame behind, and lay what is
shown there into directions that no patch is embedded in. What is to become of it, a LoRA has to learn: without one it
is lost, and the picture is noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from common.files import atomic_file
from demo.wan_models import WanModelPaths, build_wan_models, stored_as
from wan.config import HEAD_DIM
from wan.context import NUM_MASKS
from wan.model import PATCH
from wan.rope import THETA

if TYPE_CHECKING:
    from wan.config import Kind

Tensors = MutableMapping[str, Tensor]

SEED = 7
CALM = 0.3
"""How much of themselves the random layers keep that write to the tokens."""
ROTATED = 2 * (HEAD_DIM // 6)
"""A head's channels for rows and for columns; what is left is for frames."""
PAIRS = 8
"""Of these channels, the fastest pairs, which tell neighbours apart."""
NEAREST_FRAME, NEAREST_PLACE = 6.0, 2.0
"""How strongly a head prefers one frame, sharply, and one place, with some of its surroundings."""
BEFORE, BEHIND = -1, 1


def build_teachable_models(folder: Path, kinds: Iterable[Kind]) -> dict[Kind, WanModelPaths]:
    """Builds the small models in a new `folder`, with the path through each kind's transformer."""
    models = {kind: build_wan_models(folder, kind=kind) for kind in kinds}
    for paths in models.values():
        tensors = stored_as(torch.float32, load(paths.dit.read_bytes()))
        lay_path(tensors)
        with atomic_file(paths.dit) as temporary:
            save_file(stored_as(torch.bfloat16, tensors), temporary)
    return models


@torch.no_grad()
def lay_path(tensors: Tensors) -> None:
    """Changes a transformer's random tensors, under their official names, in place."""
    generator = torch.Generator().manual_seed(SEED)
    for name, tensor in tensors.items():
        if name.endswith((".o.weight", ".ffn.2.weight")):
            tensor *= CALM
    convolution = tensors["patch_embedding.weight"]
    width, num_inputs = convolution.flatten(1).shape
    others = torch.randn(width, width - num_inputs, generator=generator) / math.sqrt(width)
    embedding, free = _orthonormal(torch.cat([convolution.flatten(1), others], dim=1)).split(
        (num_inputs, width - num_inputs), dim=1
    )
    tensors["patch_embedding.weight"] = embedding.reshape(convolution.shape).contiguous()
    num_latent = len(tensors["head.head.weight"]) // PATCH**2
    by_channel = embedding.unflatten(1, (-1, PATCH**2))
    noisy, shown = by_channel[:, :num_latent], by_channel[:, num_latent + NUM_MASKS :].flatten(1)
    tensors["head.head.weight"] = noisy.permute(2, 1, 0).flatten(0, 1).contiguous()
    _look_around(tensors, shown, free, generator)


def _look_around(tensors: Tensors, shown: Tensor, free: Tensor, generator: torch.Generator) -> None:
    """The first block's attention: what is shown in the frames beside a token goes into free directions.

    Args:
        shown: (width, patch) directions in which a shown patch is embedded.
        free: (width, n) directions in which nothing is.
    """
    attention, offsets = "blocks.0.self_attn", (BEFORE, BEHIND)
    looks = [_look(offset) for offset in offsets]
    for name, vectors in zip("qk", zip(*looks, strict=True), strict=True):
        wanted = torch.cat(vectors)
        tensors[f"{attention}.{name}.weight"].zero_()
        tensors[f"{attention}.{name}.bias"] = wanted
        tensors[f"{attention}.norm_{name}.weight"].fill_(wanted.square().mean().sqrt().item())
    values, outputs = [], []
    for part in free.chunk(len(offsets), dim=1):
        within = _orthonormal(torch.randn(HEAD_DIM, shown.shape[1], generator=generator))
        mixed = torch.randn(part.shape[1], shown.shape[1], generator=generator) / math.sqrt(shown.shape[1])
        values.append(within @ shown.T)
        outputs.append(part @ mixed @ within.T)
    tensors[f"{attention}.v.weight"], tensors[f"{attention}.o.weight"] = torch.cat(values), torch.cat(outputs, dim=1)
    for name in "vo":
        tensors[f"{attention}.{name}.bias"].zero_()
    gate = 2
    tensors["blocks.0.modulation"][0, gate] = 1


def _look(offset: int) -> tuple[Tensor, Tensor]:
    """A constant query and key (HEAD_DIM,) whose product, once both are rotated, is largest `offset` frames away."""
    query, key = torch.zeros(HEAD_DIM), torch.zeros(HEAD_DIM)
    num_frame = HEAD_DIM - 2 * ROTATED
    for start, channels, strength, distance in (
        (0, num_frame, NEAREST_FRAME, offset),
        (num_frame, ROTATED, NEAREST_PLACE, 0),
        (num_frame + ROTATED, ROTATED, NEAREST_PLACE, 0),
    ):
        size = math.sqrt(strength * math.sqrt(HEAD_DIM))
        angles = distance * THETA ** -(torch.arange(PAIRS) * 2 / channels)
        pairs = slice(start, start + 2 * PAIRS)
        key[pairs] = size * torch.tensor([1.0, 0.0]).repeat(PAIRS)
        query[pairs] = size * torch.stack([angles.cos(), angles.sin()], dim=1).flatten()
    return query, key


def _orthonormal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q
