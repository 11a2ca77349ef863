"""What the model will see of a data set's item, as labelled pictures for a contact sheet.

Places come from the contexts that the encoder and generation use too, built around stand-in latents.
"""

from __future__ import annotations

import torch
from PIL import Image

from common.pictures import latent_mask
from dataset.jobs import Sample
from dataset.preview_cells import Cell, dimmed, span, spread, squeezed, target_cell
from frame_pack.cached_context import clip_contexts
from frame_pack.context import HISTORY_FRAMES, PackedContext, one_frame_context
from frame_pack.image_encoder import IMAGE_SIZE
from options.geometry import FRAMES_PER_LATENT, VAE_STRIDE
from options.one_frame import OneFrameOptions

MAX_CELLS = 12
MAX_FRAMES_PER_SECTION = 4
ZERO = (128, 128, 128)


def one_frame_cells(
    sample: Sample, options: OneFrameOptions, *, window: int, embedding_source: int | None
) -> list[Cell]:
    """The controls with what their masks hide, the target with where its loss does not count, the groups of zeros, and
    what SigLIP looks at.

    Args:
        embedding_source: number of a control image; None is the target.
    """
    _, height, width, _ = sample.frames.shape
    zero = torch.zeros(1, 1, 1, height // VAE_STRIDE, width // VAE_STRIDE)
    masks = [latent_mask(picture.alpha) for picture in sample.controls]
    # Controls of ones come out of the context as what is left of them.
    context = one_frame_context([zero + 1] * len(masks), masks, options, window=window, like=zero)
    places, left = context.clean.indices[0].tolist(), context.clean.latents[0, 0]
    cells = []
    for number, picture in enumerate(sample.controls):
        note = "" if masks[number] is None else ", masked"
        cells.append((f"control {number} @ {places[number]}{note}", dimmed(picture.rgb, left[number].numpy())))
    cells.append(target_cell(sample, span(context.indices[0])))
    if zeros := _zero_groups(context, len(masks)):
        cells.append((", ".join(zeros), Image.new("RGB", (width, height), ZERO)))
    embedded = sample.frames[0] if embedding_source is None else sample.controls[embedding_source].rgb
    name = "target" if embedding_source is None else f"control {embedding_source}"
    return [*cells, (f"SigLIP: {name}, unmasked, {IMAGE_SIZE}x{IMAGE_SIZE}", squeezed(embedded, IMAGE_SIZE))]


def section_cells(sample: Sample, *, window: int, f1: bool) -> list[Cell]:
    """The start picture, and of every section some frames, the first one with all places; at most `MAX_CELLS`.

    Of a clip with more sections than cells some sections are shown, evenly spread.
    """
    num_latents = (len(sample.frames) - 1) // FRAMES_PER_LATENT + 1
    # Numbered from 1, so that what is still zero in a history is none of the clip's frames.
    numbers = torch.arange(1.0, num_latents + 1).view(1, 1, -1, 1, 1)
    contexts = clip_contexts(numbers, window=window, f1=f1)
    per_section = min(max((MAX_CELLS - 1) // len(contexts), 1), MAX_FRAMES_PER_SECTION)
    start = f"start @ {span(contexts[0].clean.indices[0, :1])}, seen by SigLIP too"
    cells = [(f"{start}; frames: {len(sample.frames)}, sections: {len(contexts)}", Image.fromarray(sample.frames[0]))]
    for section in spread(0, len(contexts) - 1, min(len(contexts), MAX_CELLS - 1)):
        first, last = section * window * FRAMES_PER_LATENT + 1, (section + 1) * window * FRAMES_PER_LATENT
        for frame in spread(first, last, per_section):
            label = f"section {section}, frame {frame}"
            if frame == first:
                label += f": {_section_places(contexts[section], f1)}"
            cells.append((label, Image.fromarray(sample.frames[frame])))
    return cells


def _section_places(context: PackedContext, f1: bool) -> str:
    groups = (context.clean.latents[:, :, 1:], context.clean_2x.latents, context.clean_4x.latents)
    known = sum(int(latents.count_nonzero()) for latents in groups)
    return (
        f"target @ {span(context.indices[0])}, sees {known} of {HISTORY_FRAMES} {'earlier' if f1 else 'later'}: "
        f"1x @ {span(context.clean.indices[0, 1:])}, 2x @ {span(context.clean_2x.indices[0])}, "
        f"4x @ {span(context.clean_4x.indices[0])}"
    )


def _zero_groups(context: PackedContext, num_controls: int) -> list[str]:
    groups = {"post": context.clean.indices[0, num_controls:]}
    for name, group in (("2x", context.clean_2x), ("4x", context.clean_4x)):
        if group is not None:
            groups[name] = group.indices[0]
    return [f"{name} @ {span(indices)} (zero)" for name, indices in groups.items() if len(indices)]
