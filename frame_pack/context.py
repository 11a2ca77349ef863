"""What the transformer sees around the frames that it generates: clean frames, and where on the time axis they stand.

FramePack never generates a picture from noise alone. Beside the noisy target frames it gets *clean* frames, and every
frame, noisy or clean, carries an index: its place on a time axis (the RoPE position, see `frame_pack/rope.py`). There
is nothing else to "one-frame inference" than choosing these clean frames and these indices:

    default, n = 9        clean: start@0, zero "post"@10                 target@9     history of zeros @11…@28
    kisekaeichi           clean: start@0, clothes@10, both masked        target@1     no post, no history
    1f-mc                 clean: first@0, second@1, zero "post"@10       target@9     no history

A video is the same with real neighbours. *Inverted anti-drifting* generates the last section first, so a section's
clean frames are the start picture and the frames that come *after* it; *F1* goes forward and looks back:

    inverted, padding p   start@0 | p·n blank | target | post (1) | 2x (2) | 4x (16)
    F1                    start@0 | 4x (16) | 2x (2) | 1x (1) | target

Older or farther frames are shown at half (2x) and quarter (4x) resolution in time, rows and columns.
A *mask* multiplies a clean frame's latent: what is masked out is zero, that is, the model has to invent it.

The same functions assemble contexts for generation, for caches and for training samples.

Shapes: B batch, C latent channels, F frames of a group, T target frames, h w latent size. n is `latent_window_size`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from options.one_frame import OneFrameOptions

NUM_POST, NUM_2X, NUM_4X = 1, 2, 16
HISTORY_FRAMES = NUM_POST + NUM_2X + NUM_4X
"""Clean latent frames that a section looks at, beside its start picture."""


@dataclass(frozen=True, kw_only=True)
class CleanFrames:
    """A group of clean frames of one resolution."""

    latents: Tensor
    """(B, C, F, h, w), scaled; always at full resolution, the model coarsens 2x and 4x groups itself."""
    indices: Tensor
    """(B, F) int64 places on the time axis, in any order, also repeated."""


@dataclass(frozen=True, kw_only=True)
class PackedContext:
    """Clean frames by resolution, and the target's own indices. An absent group costs the model no tokens."""

    indices: Tensor
    """(B, T) int64 places of the target frames."""
    clean: CleanFrames
    clean_2x: CleanFrames | None
    clean_4x: CleanFrames | None

    @property
    def num_target_frames(self) -> int:
        return self.indices.shape[1]

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of target tokens, 2×2 latent pixels each."""
        height, width = self.clean.latents.shape[-2:]
        return height // 2, width // 2

    @property
    def num_target_tokens(self) -> int:
        height, width = self.token_grid
        return self.num_target_frames * height * width

    def coarse_to_fine(self) -> list[tuple[CleanFrames, int]]:
        """The groups that are there, with how many times coarser than the target they are, in token order."""
        groups = ((self.clean_4x, 4), (self.clean_2x, 2), (self.clean, 1))
        return [(group, pool) for group, pool in groups if group is not None]

    def to(self, device: torch.device, dtype: torch.dtype) -> PackedContext:
        """Indices move, latents move and change type."""

        def move(group: CleanFrames | None) -> CleanFrames | None:
            return group and CleanFrames(latents=group.latents.to(device, dtype), indices=group.indices.to(device))

        groups = {name: move(getattr(self, name)) for name in ("clean", "clean_2x", "clean_4x")}
        return replace(self, indices=self.indices.to(device), **groups)


def section_context(start: Tensor, later: Tensor, *, padding: int, window: int) -> PackedContext:
    """One section of a video by inverted anti-drifting: the start picture before it, later frames behind it.

    Args:
        start: (1, C, 1, h, w) the picture at time 0.
        later: (1, C, ≥19, h, w) the frames after this section in time order, zeros where none exist yet.
        padding: sections of blank time between start and target; 0 lets the target follow the start directly.
        window: n, latent frames in the target.
    """
    pre, _, target, post, far_2x, far_4x = _places(1, padding * window, window, NUM_POST, NUM_2X, NUM_4X)
    post_latent, latents_2x, latents_4x = later[:, :, :HISTORY_FRAMES].split([NUM_POST, NUM_2X, NUM_4X], dim=2)
    return PackedContext(
        indices=_indices(target),
        clean=CleanFrames(latents=_join(start, post_latent), indices=_indices([*pre, *post])),
        clean_2x=CleanFrames(latents=latents_2x, indices=_indices(far_2x)),
        clean_4x=CleanFrames(latents=latents_4x, indices=_indices(far_4x)),
    )


def f1_context(start: Tensor, earlier: Tensor, *, window: int) -> PackedContext:
    """One section of a video by FramePack-F1: everything clean lies before the target.

    Args:
        start: (1, C, 1, h, w) the picture at time 0.
        earlier: (1, C, ≥19, h, w) all frames up to this section in time order, zeros in front where none exist.
        window: n, latent frames in the target.
    """
    pre, far_4x, far_2x, last, target = _places(1, NUM_4X, NUM_2X, NUM_POST, window)
    latents_4x, latents_2x, last_latent = earlier[:, :, -HISTORY_FRAMES:].split([NUM_4X, NUM_2X, NUM_POST], dim=2)
    return PackedContext(
        indices=_indices(target),
        clean=CleanFrames(latents=_join(start, last_latent), indices=_indices([*pre, *last])),
        clean_2x=CleanFrames(latents=latents_2x, indices=_indices(far_2x)),
        clean_4x=CleanFrames(latents=latents_4x, indices=_indices(far_4x)),
    )


def one_frame_context(
    controls: Sequence[Tensor], masks: Sequence[Tensor | None], options: OneFrameOptions, *, window: int, like: Tensor
) -> PackedContext:
    """One picture among control images, each at the index that the user gave it.

    Args:
        controls: latents (1, C, 1, h, w) in the user's order; none means one zero latent at index 0.
        masks: one per control, (h, w) in [0, 1] or None; 1 keeps the control, 0 hides it.
        options: `target_index`, `control_indices`, `no_post`, `no_2x`, `no_4x`.
        window: n, which gives the target its default index and post and history their places.
        like: (1, C, 1, h, w) any latent of the picture's size, for zeros.

    Raises:
        ValueError: the numbers of controls, masks and indices differ. `OneFrameOptions.resolve` reports that earlier.
    """
    zero = torch.zeros_like(like)
    masked = [apply_mask(control, mask) for control, mask in zip(controls, masks, strict=True)] or [zero]
    places = list(options.control_indices or (0,))
    if len(places) != len(masked):
        raise ValueError(f"{len(masked)} control latents, but {len(places)} control indices")
    # The post frame has no content, but the model has always seen something there, and pictures are calmer with it.
    post, far_2x, far_4x = _places(NUM_POST, NUM_2X, NUM_4X, start=window + 1)
    if not options.no_post:
        masked.append(zero)
        places += post
    target = window if options.target_index is None else options.target_index
    return PackedContext(
        indices=_indices([target]),
        clean=CleanFrames(latents=_join(*masked), indices=_indices(places)),
        clean_2x=None if options.no_2x else _zero_frames(like, far_2x),
        clean_4x=None if options.no_4x else _zero_frames(like, far_4x),
    )


def apply_mask(latent: Tensor, mask: Tensor | None) -> Tensor:
    """latent (1, C, F, h, w) times mask (h, w); None keeps everything."""
    return latent if mask is None else latent * mask.to(latent)


def section_paddings(num_sections: int, override: Sequence[int] | None = None) -> list[int]:
    """Blank sections between start picture and target, in order of generation (last section first).

    From the fifth section on, real distances would leave what the model was trained on: they are capped to 3 and 2.
    `override` replaces the first values; surplus ones are ignored.
    """
    paddings = list(range(num_sections))[::-1]
    if num_sections > 4:
        paddings = [3] + [2] * (num_sections - 3) + [1, 0]
    given = list(override or ())[:num_sections]
    return given + paddings[len(given) :]


def _places(*counts: int, start: int = 0) -> list[range]:
    """Consecutive indices from `start` on, cut into runs of the given lengths."""
    ends = [*itertools.accumulate(counts, initial=start)]
    return [range(begin, end) for begin, end in itertools.pairwise(ends)]


def _indices(values: Sequence[int]) -> Tensor:
    return torch.tensor([list(values)], dtype=torch.int64)


def _join(*latents: Tensor) -> Tensor:
    return torch.cat(latents, dim=2)


def _zero_frames(like: Tensor, indices: Sequence[int]) -> CleanFrames:
    batch, channels, _, height, width = like.shape
    latents = like.new_zeros(batch, channels, len(indices), height, width)
    return CleanFrames(latents=latents, indices=_indices(indices))
