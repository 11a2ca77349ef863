"""A LoRA for the small transformer, made by hand like the path that it bends."""

from pathlib import Path

import torch

from demo.copying import COLOURS, CONTROL, NORM_OF_TOKEN
from networks.lora_metadata import write_lora

PLACES = 4
"""In a patch; a token's channels are ordered by latent channel, then by place."""
RANK = COLOURS * PLACES
MODULE = "lora_unet_single_transformer_blocks_0_attn_to_v"


def write_colour_lora(path: Path, width: int = 256) -> Path:
    """Red for green, green for blue, blue for red in whatever is copied from control images: a native file of rank 12.

    The first head's values are a control's patch; the LoRA adds the difference between its channels turned round by
    one and as they are.
    """
    identity = torch.eye(RANK)
    turned = identity.unflatten(0, (COLOURS, PLACES)).roll(1, dims=0).flatten(0, 1)
    down, up = torch.zeros(RANK, width), torch.zeros(width, RANK)
    down[:, CONTROL.start : CONTROL.start + RANK] = NORM_OF_TOKEN * (turned - identity)
    up[:RANK] = identity
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(RANK))}
    write_lora(path, {f"{MODULE}.{name}": tensor for name, tensor in tensors.items()}, {})
    return path
