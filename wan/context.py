"""What Wan is shown beside the latents that it denoises, and where every frame stands on the time axis.

Wan denoises all frames of a clip together. An image-to-video model is given a second clip of the same size beside them,
*y*, channel by channel: four mask channels and sixteen latent channels. A mask of 1 says "this frame is given, here it
is", a mask of 0 "this frame is to be made", and then grey stands in the latent channels. Every frame carries an index,
its place on the time axis (the RoPE position); in a video these are 0, 1, 2, …

    t2v                     nothing is shown
    i2v, 81 frames          start@0, grey@1…20
    flf2v, 81 frames        start@0, grey@1…19, end@20
    i2v with an end image   start@0, grey@1…20, end@21              not trained for, one latent frame more
    one frame               start@0, grey@1                         the frame at 1 is kept
    one frame, middle       first@0, grey@1, last@2                 the frame at 1 is kept

There is nothing else to "one-frame inference" than choosing these frames and indices: every control image is a frame
that is given, the picture is the one grey frame, all of them are denoised, and only the picture is kept. Indices may
have gaps, as in start@0, grey@10. A *mask* multiplies a control's latent: what is masked out is zero, that is, the
model has to invent it.

A latent frame stands for four pixel frames, the first one for a single pixel frame; the four mask channels say which of
them are given. So in flf2v only the last channel of the last frame is 1.

Fun-Control models are shown a control clip instead, frame by frame, and behind it the given frames without mask.

The same functions assemble contexts for generation, for caches and for training samples.

Shapes: B batch, C latent channels, F latent frames, K latent frames in one-frame mode, h w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor

from options.geometry import FRAMES_PER_LATENT
from options.one_frame import OneFrameOptions

NUM_MASKS = FRAMES_PER_LATENT
"""Mask channels in front of the latent channels of y."""
NUM_FEATURES = 257
"""CLIP states of one picture."""


@dataclass(frozen=True, kw_only=True)
class WanContext:
    """What is shown, and the index of every frame that is denoised."""

    latents: Tensor | None
    """y: (B, 4 + C, F, h, w), masks first; (B, 2C, F, h, w) of Fun-Control; None when only a text is given."""
    indices: Tensor
    """(B, F) int64 places on the time axis, ascending."""
    target: int | None = None
    """One-frame mode: the number of the frame that is kept. None keeps all."""

    @property
    def num_frames(self) -> int:
        """Latent frames that are denoised, given ones too."""
        return self.indices.shape[1]

    def kept(self, latents: Tensor) -> Tensor:
        """Of denoised latents (B, C, F, h, w) what was asked for: (B, C, 1, h, w) in one-frame mode, else all."""
        return latents if self.target is None else latents[:, :, self.target : self.target + 1]

    def to(self, device: torch.device, dtype: torch.dtype) -> WanContext:
        """Indices move, latents move and change type."""
        latents = None if self.latents is None else self.latents.to(device, dtype)
        return replace(self, latents=latents, indices=self.indices.to(device))


def text_context(num_frames: int, *, batch: int = 1) -> WanContext:
    """t2v and t2i: a text is all there is.

    Args:
        num_frames: latent frames.
    """
    return WanContext(latents=None, indices=_indices(range(num_frames), batch))


def image_context(clip: Tensor, *, shows_end: bool = False, appended: Tensor | None = None) -> WanContext:
    """i2v and flf2v: the first frame is given.

    Args:
        clip: (B, C, F, h, w) latents of [image, grey, …], with `shows_end` of [image, grey, …, end image], encoded in
            one piece; see `wan.pictures.start_clip`.
        shows_end: flf2v: the last pixel frame is given, too.
        appended: (B, C, 1, h, w) latent of an end image for an i2v model, which becomes one more frame behind the clip.

    Raises:
        ValueError: a clip of one latent frame has no end that is not its beginning.
    """
    batch, _, num_frames, height, width = clip.shape
    masks = clip.new_zeros(batch, NUM_MASKS, num_frames, height, width)
    masks[:, :, 0] = 1
    if shows_end:
        if num_frames == 1:
            raise ValueError("a clip of one latent frame cannot show both its first and its last frame")
        masks[:, -1, -1] = 1
    shown = torch.cat([masks, clip], dim=1)
    if appended is not None:
        shown = torch.cat([shown, _marked(appended, 1)], dim=2)
    return WanContext(latents=shown, indices=_indices(range(shown.shape[2]), batch))


def fun_control_context(control: Tensor, image: WanContext | None) -> WanContext:
    """Fun-Control: a control clip and, behind it, the frames that are given.

    The text-to-video variant is given none, neither here nor to CLIP: `no_features` stands for these.

    Args:
        control: (B, C, F, h, w) latents of the control clip.
        image: what `image_context` makes of the images, of as many frames; None for the text-to-video variant.

    Raises:
        ValueError: unequal numbers of frames.
    """
    given = torch.zeros_like(control)
    if image is not None:
        if image.num_frames != control.shape[2]:
            raise ValueError(f"{control.shape[2]} control frames for a context of {image.num_frames} frames")
        masks, latents = image.latents[:, :NUM_MASKS], image.latents[:, NUM_MASKS:]
        # Frames that are only partly given keep their whole latent: there is no mask to say more.
        given = latents * masks.amax(dim=1, keepdim=True)
    indices = _indices(range(control.shape[2]), control.shape[0])
    return WanContext(latents=torch.cat([control, given], dim=1), indices=indices)


def one_frame_context(
    controls: Sequence[Tensor], masks: Sequence[Tensor | None], options: OneFrameOptions, *, grey: Tensor
) -> WanContext:
    """One picture among control images, each at the index that the user gave it.

    Args:
        controls: latents (B, C, 1, h, w) in the user's order, at least one, each encoded alone.
        masks: one per control, (h, w) in [0, 1] or None; 1 keeps the control, 0 hides it.
        options: `target_index` and `control_indices`.
        grey: (B, C, 1, h, w) latent of a grey picture, which stands where the target is to be made.

    Raises:
        ValueError: see `arranged`; or unequal numbers of controls and masks.
    """
    given = [_marked(latent, 1, mask) for latent, mask in zip(controls, masks, strict=True)]
    shown = arranged(given, _marked(grey, 0), options)
    indices = sorted([*options.control_indices, options.target_index])
    return WanContext(
        latents=shown,
        indices=_indices(indices, grey.shape[0]),
        target=indices.index(options.target_index),
    )


def arranged(controls: Sequence[Tensor], target: Tensor, options: OneFrameOptions) -> Tensor:
    """The controls' and the target's frames in the order of their indices, whatever order the user wrote these in.

    Of latents this is what one-frame training has to predict, without any mask.

    Args:
        controls: (B, C, 1, h, w) each, in the user's order.
        target: (B, C, 1, h, w).

    Returns:
        (B, C, K, h, w) with K = controls + 1.

    Raises:
        ValueError: no controls, another number of indices, or the target stands where a control does.
            `OneFrameOptions.resolve_wan` reports that earlier.
    """
    indices = options.control_indices or ()
    if not controls or len(indices) != len(controls):
        raise ValueError(f"{len(controls)} control images, but {len(indices)} control indices")
    if options.target_index is None or options.target_index in indices:
        raise ValueError(f"target_index {options.target_index} with control indices {indices}")
    frames = [*zip(indices, controls, strict=True), (options.target_index, target)]
    return torch.cat([frame for _, frame in sorted(frames, key=itemgetter(0))], dim=2)


def seen_by_clip(control_indices: Sequence[int], *, both_ends: bool) -> tuple[int, ...]:
    """Which controls, by their numbers in the user's order, supply a model's CLIP features.

    Args:
        both_ends: flf2v looks at two pictures: those with the lowest and the highest index (twice at a single one);
            i2v looks at the user's first one, wherever it stands.
    """
    if not both_ends:
        return (0,)
    by_index = sorted(range(len(control_indices)), key=control_indices.__getitem__)
    return by_index[0], by_index[-1]


def no_features(width: int, *, batch: int = 1) -> Tensor:
    """(B, 257, width) zeros: the CLIP features of no picture, for text-to-video Fun-Control."""
    return torch.zeros(batch, NUM_FEATURES, width)


def _marked(latent: Tensor, value: float, mask: Tensor | None = None) -> Tensor:
    """`latent` (B, C, 1, h, w) times `mask` (h, w), behind mask channels of `value`."""
    batch, _, num_frames, height, width = latent.shape
    marks = latent.new_full((batch, NUM_MASKS, num_frames, height, width), value)
    return torch.cat([marks, latent if mask is None else latent * mask.to(latent)], dim=1)


def _indices(values: Sequence[int], batch: int) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64).repeat(batch, 1)
