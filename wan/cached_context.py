"""A context and CLIP features as the tensors of a cache file, and a batch of such files as a context again.

Shapes: B batch, C latent channels, F latent frames, h w latent size, N pictures that CLIP looked at, D its width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wan.context import NUM_MASKS, WanContext, fun_control_context, seen_by_clip, text_context

LATENTS, SHOWN, CONTROL, FEATURES = "latents", "latents_image", "latents_control", "clip"
INDICES = "f_indices"
"""(F,) of one-frame caches: the place of every latent frame."""
FEATURE_INDICES = "clip_indices"
"""(N,) the places of the pictures that CLIP looked at, where these are not in the order of time."""


def to_cache(
    latents: Tensor,
    context: WanContext | None,
    *,
    control: Tensor | None = None,
    features: Tensor | None = None,
    feature_indices: Sequence[int] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """The tensors of one cache file by content name, on the CPU, without the batch dimension.

    Args:
        latents: (1, C, F, h, w) what is trained.
        context: of one sample, with masks; None where a text is all that is given.
        control: (1, C, F, h, w) latents of the control clip.
        features: (257, D) of one picture, or (N, 257, D).
        feature_indices: one-frame mode, where N pictures have a row each: their places, in the same order.
        dtype: of latents.
    """
    tensors = {LATENTS: latents[0].to(dtype)}
    if context is not None:
        tensors[SHOWN] = context.latents[0].to(dtype)
        if context.target is not None:
            tensors[INDICES] = context.indices[0].to(torch.int32)
    if control is not None:
        tensors[CONTROL] = control[0].to(dtype)
    if features is not None:
        tensors[FEATURES] = features.to(torch.float16)
    if list(feature_indices) != sorted(feature_indices):
        tensors[FEATURE_INDICES] = torch.tensor(list(feature_indices), dtype=torch.int32)
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def from_batch(batch: Mapping[str, Tensor], *, shows_images: bool, shows_control: bool = False) -> WanContext:
    """The context of a batch of cache files, (B, …) tensors by content name, as `to_cache` or the incumbent made them.

    What a model is not shown may be there all the same.

    Args:
        shows_images: the model is given frames: i2v, flf2v, image-to-video Fun-Control.
        shows_control: the model is given a control clip: Fun-Control.
    """
    latents = batch[LATENTS]
    if not shows_images and not shows_control:
        return text_context(latents.shape[2], batch=latents.shape[0])
    image = _image_context(batch) if shows_images else None
    return fun_control_context(batch[CONTROL], image) if shows_control else image


def _image_context(batch: Mapping[str, Tensor]) -> WanContext:
    shown = batch[SHOWN]
    if INDICES not in batch:
        return WanContext(latents=shown, indices=text_context(shown.shape[2], batch=shown.shape[0]).indices)
    # The picture is the only frame without marks, at the same place in all samples: they belong to one data set.
    marks = shown[0, :NUM_MASKS].float().amax(dim=(0, 2, 3))
    return WanContext(latents=shown, indices=batch[INDICES].long(), target=int(marks.argmin()))


def features_from_batch(batch: Mapping[str, Tensor], *, both_ends: bool) -> Tensor:
    """The CLIP features that a model is shown of a batch, (B, 257, D).

    Args:
        both_ends: flf2v: (B, 514, D), the first and the last picture by their places; of a single picture twice.
    """
    features = batch[FEATURES]
    if features.ndim == 3:
        features = features[:, None]
    indices = batch[FEATURE_INDICES][0].tolist() if FEATURE_INDICES in batch else range(features.shape[1])
    return features[:, list(seen_by_clip(indices, both_ends=both_ends))].flatten(1, 2)
