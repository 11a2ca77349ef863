"""A hand-made path through the otherwise random weights of a small Wan VAE, so that pictures survive it.

Nothing is trained. Three channels carry a picture's colours, 8 times coarser at the narrowest place, and three their
negatives: SiLU(x) - SiLU(-x) = x, so that the two together pass the activation before the last convolution unchanged. A
seventh channel is a constant that outweighs all others, so that the norms divide every pixel by about the same number.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping

import torch
from torch import Tensor

from wan.vae import LATENT_MEAN, LATENT_STD

Tensors = MutableMapping[str, Tensor]

COLOURS = 3
POSITIVE, NEGATIVE, CONSTANT = range(3), range(3, 6), 6
SIZE = 24.0
"""Of the constant."""
GAIN = 2.0
"""From colours to normalised latents, which are about as large as noise."""
CENTRE, MEAN_OF_PAIR, BLUR = (0.0, 1.0, 0.0), (0.5, 0.5, 0.0), (0.25, 0.5, 0.25)


@torch.no_grad()
def let_colours_through(tensors: Tensors) -> None:
    """Changes a VAE's random tensors, under their official names, in place."""
    for name, tensor in tensors.items():
        if ".residual.6." in name or ".proj." in name:
            tensor *= 0.1
    for name in [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]:
        is_encoder = name.startswith("encoder.")
        if name.endswith(".shortcut"):
            _pass_on(tensors, name, (1.0,))
        elif name.endswith(".resample.1"):
            _pass_on(tensors, name, MEAN_OF_PAIR if is_encoder else BLUR)
        elif name.endswith(".time_conv"):
            _pass_on_in_time(tensors, name)
    for half, size in (("encoder", 1.0), ("decoder", 1 / GAIN)):
        _enter(tensors, half, size)
        _leave(tensors, half)
    _normalise_latents(tensors)


def _pass_on(tensors: Tensors, name: str, taps: tuple[float, ...]) -> None:
    """Makes the first channels of a convolution those of its input, filtered by `taps` in x and y."""
    weight = tensors[f"{name}.weight"]
    plane = torch.outer(torch.tensor(taps), torch.tensor(taps))
    _keep_constant(tensors, name)
    for channel in (*POSITIVE, *NEGATIVE):
        weight[channel] = 0
        weight[channel, channel] = plane
        tensors[f"{name}.bias"][channel] = 0


def _pass_on_in_time(tensors: Tensors, name: str) -> None:
    """The same along time: the last of three frames, twice where frames are doubled."""
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    for start in range(0, len(weight), weight.shape[1]):
        _keep_constant(tensors, name, start)
        for channel in (*POSITIVE, *NEGATIVE):
            weight[start + channel] = 0
            weight[start + channel, channel, -1] = 1
            bias[start + channel] = 0


def _keep_constant(tensors: Tensors, name: str, start: int = 0) -> None:
    """Gives the constant to what comes out, whatever went in, and to no other channel."""
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    weight[:, CONSTANT] = 0
    weight[start + CONSTANT] = 0
    bias[start + CONSTANT] = SIZE


def _enter(tensors: Tensors, half: str, size: float) -> None:
    """The first convolution: colours and their negatives, times `size`."""
    name = f"{half}.conv1"
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    offset = bias.clone()
    for colour in range(COLOURS):
        for channel, sign in ((POSITIVE[colour], 1), (NEGATIVE[colour], -1)):
            weight[channel], offset[channel] = 0, 0
            weight[channel, colour, -1, 1, 1] = sign * size
    weight[CONSTANT], offset[CONSTANT] = 0, SIZE
    bias[:] = offset


def _leave(tensors: Tensors, half: str) -> None:
    """Norm, SiLU and the last convolution give back the colours, with a little of everything else."""
    gamma, name = tensors[f"{half}.head.0.gamma"], f"{half}.head.2"
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    gamma[:CONSTANT] = 1
    weight[:, CONSTANT] = 0
    back = SIZE / math.sqrt(len(gamma))
    for colour in range(COLOURS):
        weight[colour] *= 0.1
        weight[colour, POSITIVE[colour], -1, 1, 1] += back
        weight[colour, NEGATIVE[colour], -1, 1, 1] -= back
        bias[colour] = 0


def _normalise_latents(tensors: Tensors) -> None:
    """Brings the latents to the published mean and deviation, which are taken out of them again."""
    mean, deviation = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
    channels = slice(0, len(mean))
    gain = deviation.clone()
    gain[:COLOURS] *= GAIN
    gain[COLOURS:] *= SIZE  # the constant has made all others small
    weight, bias = tensors["encoder.head.2.weight"], tensors["encoder.head.2.bias"]
    weight[channels] *= gain.view(-1, 1, 1, 1, 1)
    bias[channels] = bias[channels] * deviation + mean
    for name in ("conv1", "conv2"):
        tensors[f"{name}.weight"][channels] = torch.eye(len(tensors[f"{name}.weight"]))[channels, :, None, None, None]
        tensors[f"{name}.bias"][channels] = 0
    weight, bias = tensors["decoder.conv1.weight"], tensors["decoder.conv1.bias"]
    weight /= deviation.view(-1, 1, 1, 1)
    bias -= (weight.sum(dim=(2, 3, 4)) * mean).sum(dim=1)
