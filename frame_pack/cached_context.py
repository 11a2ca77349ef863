"""Contexts of data set items: those of a clip's sections, and a context as the tensors of a cache file and back.

Shapes: B batch, C latent channels, F frames of a group, T target frames, h w latent size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from frame_pack.context import (
    HISTORY_FRAMES,
    CleanFrames,
    PackedContext,
    f1_context,
    section_context,
    section_paddings,
)

TARGET, TARGET_INDICES, FEATURES = "latents", "latent_indices", "image_embeddings"
CLEAN = ("latents_clean", "clean_latent_indices")
CLEAN_2X = ("latents_clean_2x", "clean_latent_2x_indices")
CLEAN_4X = ("latents_clean_4x", "clean_latent_4x_indices")


def clip_contexts(latents: Tensor, *, window: int, f1: bool) -> list[PackedContext]:
    """What generation would see in every section of a clip if it made no mistakes; section 0 is the first in time.

    The frames after a section (before it with F1) are the clip's own, and zeros where there are none.

    Args:
        latents: (1, C, sections·window + 1, h, w) the whole clip.
    """
    num_sections, rest = divmod(latents.shape[2] - 1, window)
    if rest or num_sections < 1:
        raise ValueError(f"{latents.shape[2]} latent frames are not 1 + whole sections of {window}")
    start = latents[:, :, :1]
    nothing = torch.zeros_like(start).expand(-1, -1, HISTORY_FRAMES, -1, -1)
    paddings = section_paddings(num_sections)[::-1]  # they come in the order of generation, last section first

    def context(section: int) -> PackedContext:
        begin, end = 1 + section * window, 1 + (section + 1) * window
        if f1:
            return f1_context(start, torch.cat([nothing, latents[:, :, :begin]], dim=2), window=window)
        later = torch.cat([latents[:, :, end:], nothing], dim=2)
        return section_context(start, later, padding=paddings[section], window=window)

    return [context(section) for section in range(num_sections)]


def to_cache(target: Tensor, context: PackedContext, features: Tensor, *, with_history: bool) -> dict[str, Tensor]:
    """The tensors of one cache file by content name, on the CPU, latents in float16, without the batch dimension.

    Args:
        target: (1, C, T, h, w).
        context: of one sample.
        features: (729, image_width) SigLIP states.
        with_history: False leaves out the latents of the 2x and 4x groups, which are zeros in one-frame caches.
    """
    tensors = {TARGET: target[0], TARGET_INDICES: context.indices[0], FEATURES: features}
    for group, (latents, indices) in (
        (context.clean, CLEAN),
        (context.clean_2x, CLEAN_2X),
        (context.clean_4x, CLEAN_4X),
    ):
        if group is None:
            continue
        tensors[indices] = group.indices[0]
        if with_history or group is context.clean:
            tensors[latents] = group.latents[0]
    return {name: _stored(tensor) for name, tensor in tensors.items()}


def from_batch(batch: Mapping[str, Tensor]) -> PackedContext:
    """The context of a batch of cache files, (B, …) tensors by content name, as `to_cache` or the incumbent made them.

    A history without indices is absent, one with indices but no latents is zeros.
    """
    clean = CleanFrames(latents=batch[CLEAN[0]], indices=batch[CLEAN[1]])
    return PackedContext(
        indices=batch[TARGET_INDICES],
        clean=clean,
        clean_2x=_history(batch, CLEAN_2X, clean.latents),
        clean_4x=_history(batch, CLEAN_4X, clean.latents),
    )


def _history(batch: Mapping[str, Tensor], names: tuple[str, str], like: Tensor) -> CleanFrames | None:
    latents, indices = (batch.get(name) for name in names)
    if indices is None:
        return None
    if latents is None:
        latents = like.new_zeros(*like.shape[:2], indices.shape[1], *like.shape[3:])
    return CleanFrames(latents=latents, indices=indices)


def _stored(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float16 if tensor.is_floating_point() else torch.int64)
