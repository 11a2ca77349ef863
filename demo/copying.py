"""A hand-made path through otherwise random weights, so that pictures show which input goes where.

Nothing here is trained. The VAE gets a path that keeps a picture's colours, 8 times coarser; the transformer gets one
attention head that finds the place it is at in the control images and pulls the latents there. So a generated picture
shows the control images it was given, where their masks let them through, the more the closer they lie before it on the
time axis; text, SigLIP, zero latents and everything else act through the random weights, as texture.
"""

import math

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel
from torch import nn

COLOURS = 3
CENTRE, MEAN_OF_PAIR, BLUR = (0.0, 1.0, 0.0), (0.0, 0.5, 0.5), (0.25, 0.5, 0.25)
# Far to the right SiLU is the identity: a channel that is moved there and back passes unchanged.
LINEAR_OFFSET = 6.0

# The channels of a small DiT's tokens: the noisy patch, a control's patch, what was copied of it, and the token's kind.
PATCH = 64
NOISY, CONTROL, COPIED, KIND = (slice(i * PATCH, (i + 1) * PATCH) for i in range(4))
KIND_SIZE = 4.0
KIND_OF_CONTROL = KIND_SIZE * torch.tensor([1.0, -1.0]).repeat(PATCH // 2)
KIND_OF_OTHERS = KIND_SIZE * torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(PATCH // 4)
# A layer norm divides a token by about this, because the channels of its kind outweigh the others.
NORM_OF_TOKEN = KIND_SIZE / 2
PULL = 4.0
GAIN = 2.0


@torch.no_grad()
def let_colours_through(vae: AutoencoderKLHunyuanVideo) -> None:
    """Gives the first three channels of a random VAE an (almost) linear path from pixels to latents and back."""
    for name, module in vae.named_modules():
        if name.endswith((".conv2", "to_out.0")):
            weights = module.conv if name.endswith("conv2") else module
            weights.weight *= 0.1
            weights.bias *= 0.1
        elif name.endswith("conv_shortcut.conv"):
            _pass_on(module, (1.0,))
        elif name.endswith("downsamplers.0.conv.conv"):
            _pass_on(module, MEAN_OF_PAIR)
        elif name.endswith("upsamplers.0.conv.conv"):
            _pass_on(module, BLUR)
        elif name.endswith("conv_in.conv"):
            _pass_on(module, CENTRE)
    _pass_on(vae.quant_conv, (1.0,))
    _pass_on(vae.post_quant_conv, (1.0,))
    for coder, size in ((vae.encoder, 2.0), (vae.decoder, 0.45)):
        coder.conv_norm_out.bias[:COLOURS] = LINEAR_OFFSET
        coder.conv_out.conv.weight *= 0.3
        _pass_on(coder.conv_out.conv, CENTRE, size=size, keep=0.3)
        coder.conv_out.conv.bias[:COLOURS] -= size * LINEAR_OFFSET


def _pass_on(conv: nn.Conv3d, taps: tuple[float, ...], *, size: float = 1.0, keep: float = 0.0) -> None:
    """Makes each of the first channels of `conv` the same channel of its input, filtered by `taps` in x and y."""
    line = torch.tensor(taps)
    conv.weight[:COLOURS] *= keep
    conv.bias[:COLOURS] = 0
    for channel in range(COLOURS):
        conv.weight[channel, channel, -1] = size * torch.outer(line, line)


@torch.no_grad()
def copy_controls(dit: HunyuanVideoFramepackTransformer3DModel) -> None:
    """Gives a random DiT of two heads a velocity that leads from the noise to the control latents.

    With v = PULL·(x - GAIN·c) the noise that is left at sigma 0 is exp(-PULL) of what was there at sigma 1.
    """
    _mark_tokens(dit)
    _treat_patches_as_one(dit)
    for block in dit.transformer_blocks:
        _listen_to_text(block)
    _attend_to_same_place(dit.single_transformer_blocks[0])
    dit.proj_out.weight[:, KIND] = 0
    dit.proj_out.bias[:] = 0
    identity = PULL * NORM_OF_TOKEN * torch.eye(PATCH)
    dit.proj_out.weight[:, NOISY] += identity
    dit.proj_out.weight[:, COPIED] -= GAIN * identity


def _mark_tokens(dit: HunyuanVideoFramepackTransformer3DModel) -> None:
    """Every embedding keeps its patch in channels of its own and says what kind of token it makes."""
    clean = dit.clean_x_embedder
    for conv in (dit.x_embedder.proj, clean.proj, clean.proj_2x, clean.proj_4x):
        conv.weight *= 0.1
        conv.bias[KIND] = KIND_OF_CONTROL if conv is clean.proj else KIND_OF_OTHERS
    for conv, channels in ((dit.x_embedder.proj, NOISY), (clean.proj, CONTROL)):
        conv.weight[channels] = torch.eye(PATCH).reshape(PATCH, *conv.weight.shape[1:])


def _treat_patches_as_one(dit: HunyuanVideoFramepackTransformer3DModel) -> None:
    """Lets random weights move the four places of a patch together.

    Much of what they add is the same for every patch; with a value of its own for each place it would be a grid.
    """
    writers = [linear for block in dit.transformer_blocks for linear in (block.attn.to_out[0], block.ff.net[2])]
    writers += [block.proj_out for block in dit.single_transformer_blocks]
    width = dit.proj_out.in_features
    rows = [(linear, channels.start) for linear in writers for channels in (NOISY, COPIED)]
    rows += [(dit.norm_out.linear, start + channels.start) for start in (0, width) for channels in (NOISY, COPIED)]
    for linear, start in [*rows, (dit.proj_out, 0)]:
        for tensor in (linear.weight, linear.bias):
            places = tensor[start : start + PATCH].unflatten(0, (-1, 4))
            places[:] = 2 * places.mean(dim=1, keepdim=True)


def _listen_to_text(block: nn.Module) -> None:
    """Lets the few text tokens of a double block stand out among the many of the pictures."""
    block.attn.norm_added_k.weight *= 3
    block.attn.add_v_proj.weight *= 3


def _attend_to_same_place(block: nn.Module) -> None:
    """The first head of a single block: constant queries, keys for control tokens only, their patches as values."""
    query, key = _place_vectors()
    head, attention = slice(0, 128), block.attn
    kinds = (KIND_OF_CONTROL - KIND_OF_OTHERS) * NORM_OF_TOKEN / (PATCH * KIND_SIZE**2)
    for linear in (attention.to_q, attention.to_k):
        linear.weight[head] = 0
    attention.to_q.bias[head] = query
    attention.to_k.weight[head, KIND] = torch.outer(key, kinds)
    attention.to_k.bias[head] = -0.5 * key
    attention.norm_q.weight[:] = attention.norm_k.weight[:] = math.sqrt(6.0)

    attention.to_v.weight[:PATCH] = 0
    attention.to_v.weight[:PATCH, CONTROL] = NORM_OF_TOKEN * torch.eye(PATCH)
    attention.to_v.bias[:PATCH] = 0
    block.proj_out.weight *= 0.3
    block.proj_out.weight[COPIED, :PATCH] = torch.eye(PATCH)

    width = block.proj_out.out_features
    block.norm.linear.weight *= 0.3
    block.norm.linear.bias[: 2 * width] = 0
    block.norm.linear.bias[2 * width :] = 1


def _place_vectors() -> tuple[torch.Tensor, torch.Tensor]:
    """A query and a key (128,) whose product, once both are rotated, is largest in the same place and for the past.

    The fast frequencies of y (channels 16-71) and x (72-127) make a sharp peak at no distance; one slow frequency of
    time, a quarter turn apart, prefers controls with a lower index to those with a higher one, mildly.
    """
    query, key = torch.zeros(128), torch.zeros(128)
    for start in (16, 72):
        query[start : start + 24 : 2] = key[start : start + 24 : 2] = 1
    query[6], key[7] = 0.42, 0.42
    return query, key
