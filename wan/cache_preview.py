"""What Wan will see of a data set's item, as labelled pictures for a contact sheet.

Places and marks come from the contexts that the encoder and generation use too, built around stand-in latents.
"""

from __future__ import annotations

import torch
from PIL import Image

from common.pictures import latent_mask
from dataset.jobs import Sample
from dataset.preview_cells import Cell, dimmed, spread, squeezed, target_cell
from options.geometry import FRAMES_PER_LATENT, VAE_STRIDE
from options.one_frame import OneFrameOptions
from wan.caching import Mode
from wan.context import image_context, one_frame_context, seen_by_clip

CLIP_SIDE = 224
MAX_FRAMES = 6
CONTROL_FRAMES = 3
GREY = -1.0


def one_frame_cells(sample: Sample, options: OneFrameOptions, *, embedding_source: int | None) -> list[Cell]:
    """All frames in the order of their places: controls with what their masks hide, and the target, with where its loss
    does not count; then what CLIP looks at.

    Args:
        embedding_source: number of a control image; 0 is all of them, None is the target.
    """
    _, height, width, _ = sample.frames.shape
    one = torch.ones(1, 1, 1, height // VAE_STRIDE, width // VAE_STRIDE)
    masks = [latent_mask(picture.alpha) for picture in sample.controls]
    # Controls of ones come out of the context as what is left of them, numbers as what stands where.
    left = one_frame_context([one] * len(masks), masks, options, grey=GREY * one)
    numbered = one_frame_context([one * i for i in range(len(masks))], [None] * len(masks), options, grey=GREY * one)
    numbers = numbered.latents[0, -1, :, 0, 0].int().tolist()
    cells = []
    for place, number, share in zip(left.indices[0].tolist(), numbers, left.latents[0, -1], strict=True):
        if number == GREY:
            cells.append(target_cell(sample, f"{place}, made from grey"))
            continue
        note = "" if masks[number] is None else ", masked"
        picture = dimmed(sample.controls[number].rgb, share.numpy())
        cells.append((f"control {number} @ {place}{note}", picture))
    return cells + _clip_cells(sample, options, embedding_source)


def _clip_cells(sample: Sample, options: OneFrameOptions, source: int | None) -> list[Cell]:
    size = f"unmasked, {CLIP_SIDE}x{CLIP_SIDE}"
    if source != 0:
        name = "target" if source is None else f"control {source}"
        rgb = sample.frames[0] if source is None else sample.controls[source].rgb
        return [(f"CLIP: {name}, {size}", squeezed(rgb, CLIP_SIDE))]
    (first,) = seen_by_clip(options.control_indices, both_ends=False)
    ends = seen_by_clip(options.control_indices, both_ends=True)
    cells = []
    for number in dict.fromkeys((first, *ends)):
        users = ["i2v"] * (number == first) + ["flf2v"] * (number in ends)
        label = f"CLIP ({' and '.join(users)}): control {number}, {size}"
        cells.append((label, squeezed(sample.controls[number].rgb, CLIP_SIDE)))
    return cells


def clip_cells(sample: Sample, mode: Mode) -> list[Cell]:
    """Some frames of a clip, evenly spread, with those that the model is given marked; then some of its control."""
    frames = sample.frames
    num_latents = (len(frames) - 1) // FRAMES_PER_LATENT + 1
    given = _given_frames(num_latents, mode)
    cells = []
    for number in _shown(len(frames), MAX_FRAMES):
        label = f"frame {number}" if num_latents > 1 else "image"
        if number in given:
            label += ": given, seen by CLIP too"
        if number == 0 and num_latents > 1:
            label += f"; frames: {len(frames)}, latents: {num_latents}"
        cells.append((label, Image.fromarray(frames[number])))
    if sample.controls:
        cells.append(("control", Image.fromarray(sample.controls[0].rgb)))
    elif sample.control_frames is not None:
        control = sample.control_frames
        cells += [(f"control, frame {i}", Image.fromarray(control[i])) for i in _shown(len(control), CONTROL_FRAMES)]
    return cells


def _given_frames(num_latents: int, mode: Mode) -> set[int]:
    """Pixel frames that the masks mark."""
    if mode == "t2v":
        return set()
    context = image_context(torch.zeros(1, 1, num_latents, 1, 1), shows_end=mode == "flf2v")
    marks = context.latents[0, :-1, :, 0, 0].T.flatten()
    # The first latent frame stands for a single pixel frame, and has four marks all the same.
    return {max(i - FRAMES_PER_LATENT + 1, 0) for i in marks.nonzero().flatten().tolist()}


def _shown(num_frames: int, count: int) -> list[int]:
    return list(dict.fromkeys(spread(0, num_frames - 1, min(count, num_frames))))
