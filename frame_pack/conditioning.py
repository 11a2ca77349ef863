"""From a request's texts and images to what the transformer is conditioned on; every input is encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from common.media import load_mask, load_picture, mask_to_latent, to_model_range
from common.residency import Resident
from frame_pack.context import apply_mask
from frame_pack.image_encoder import encode_image
from generation.pipeline import Failure
from hunyuan_model import vae as hunyuan_vae
from hunyuan_model.text_encoders import encode_clip, encode_llama
from options.geometry import VAE_STRIDE
from options.request import GenerationRequest


@dataclass(frozen=True, kw_only=True)
class TextStates:
    """One prompt."""

    llama: Tensor
    """(L, text_width) valid rows only."""
    pooled: Tensor
    """(pooled_width,) CLIP-L."""


@dataclass(frozen=True, kw_only=True)
class FramePackConditioning:
    """One request, encoded; on the CPU."""

    texts: Mapping[int, TextStates]
    """By section, 0 is always there."""
    negative: TextStates | None
    """None without classifier-free guidance."""
    siglip: Mapping[int, Tensor]
    """(729, image_width) by section."""
    starts: Mapping[int, Tensor]
    """(1, C, 1, h, w) start latents by section, masks applied; without any in one-frame mode."""
    end: Tensor | None
    """(1, C, 1, h, w) latent of the end image."""
    controls: tuple[Tensor, ...]
    """(1, C, 1, h, w) control latents in the user's order."""
    control_masks: tuple[Tensor | None, ...]
    """(h, w) in [0, 1] for each."""


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The models, and what they have encoded so far."""

    llama: Resident
    clip: Resident
    siglip: Resident
    vae: Resident
    tokenizers: Callable[[], tuple[object, object]]
    """LLaMA's and CLIP's, loaded on the first call."""


Encode = Callable[[GenerationRequest], dict]
"""A request → some fields of its `FramePackConditioning`."""


def encode_requests(
    encoders: Encoders, requests: Sequence[GenerationRequest]
) -> Iterator[FramePackConditioning | Failure]:
    """Encodes texts, then SigLIP features, then latents of all requests, so that each encoder comes in once.

    A request whose input fails becomes a `Failure`; the others go on.
    """
    fields: list[dict] = [{} for _ in requests]
    failures: dict[int, Failure] = {}
    for stage in (_text_stage, _siglip_stage, _latent_stage):
        with stage(encoders) as encode:
            for i, request in enumerate(requests):
                if i in failures:
                    continue
                try:
                    fields[i] |= encode(request)
                except Exception as error:  # one request must not take the others with it
                    failures[i] = Failure(error=error)
    for i in range(len(requests)):
        yield failures.get(i) or FramePackConditioning(**fields[i])


@contextmanager
def _text_stage(encoders: Encoders) -> Iterator[Encode]:
    """Prompts of all sections, and the negative prompt where guidance needs one."""
    llama_tokenizer, clip_tokenizer = encoders.tokenizers()
    with encoders.llama.use() as llama, encoders.clip.use() as clip:

        @cache
        def states(prompt: str, system_prompt: str | None) -> TextStates:
            return TextStates(
                llama=encode_llama(llama, llama_tokenizer, prompt, system_prompt=system_prompt).cpu(),
                pooled=encode_clip(clip, clip_tokenizer, prompt).cpu(),
            )

        def encode(request: GenerationRequest) -> dict:
            system = request.system_prompt
            texts = {section: states(prompt, system) for section, prompt in request.prompts.items()}
            return {"texts": texts, "negative": states(request.negative_prompt, system) if request.uses_cfg else None}

        yield encode


@contextmanager
def _siglip_stage(encoders: Encoders) -> Iterator[Encode]:
    """What SigLIP sees in the start images; black when there is none."""
    with encoders.siglip.use() as siglip:

        @cache
        def features(path: str | None, width: int, height: int) -> Tensor:
            if path is None:
                return encode_image(siglip, np.zeros((height, width, 3), dtype=np.uint8)).cpu()
            picture = load_picture(path, width=width, height=height, flag="--image_path")
            return encode_image(siglip, picture.rgb).cpu()

        def encode(request: GenerationRequest) -> dict:
            paths = request.image_paths or {0: None}
            return {"siglip": {s: features(path, request.width, request.height) for s, path in paths.items()}}

        yield encode


@contextmanager
def _latent_stage(encoders: Encoders) -> Iterator[Encode]:
    """Latents of start, end and control images, and the masks at latent size."""
    with encoders.vae.use() as vae:

        @cache
        def picture_latent(path: str | None, width: int, height: int, flag: str) -> tuple[Tensor, Tensor | None]:
            """The latent of one picture, grey for None, and its alpha at latent size."""
            if path is None:
                pixels, alpha = np.zeros((height, width, 3), dtype=np.float32), None
            else:
                picture = load_picture(path, width=width, height=height, flag=flag)
                pixels, alpha = to_model_range(picture.rgb), picture.alpha
            stacked = torch.from_numpy(pixels).permute(2, 0, 1)[None, :, None]
            return hunyuan_vae.encode(vae, stacked).cpu(), _latent_mask(alpha)

        yield lambda request: _latents(request, picture_latent)


def _latents(request: GenerationRequest, picture_latent: Callable) -> dict:
    """The latents of one request. In one-frame mode only control images have any."""
    size = (request.width, request.height)
    if request.one_frame is not None:
        encoded = [picture_latent(path, *size, "--control_image_path") for path in request.control_image_paths]
        given = [_mask_file(path, request, "--control_image_mask_path") for path in request.control_mask_paths]
        alphas = [alpha for _, alpha in encoded]
        masks = (*given, *alphas[len(given) :])  # a mask file goes before the picture's own alpha
        return {"starts": {}, "end": None, "controls": tuple(c for c, _ in encoded), "control_masks": masks}

    paths = request.image_paths or {0: None}
    starts = {section: picture_latent(path, *size, "--image_path")[0] for section, path in paths.items()}
    if request.image_mask_path:
        starts[0] = apply_mask(starts[0], _mask_file(request.image_mask_path, request, "--image_mask_path"))
    uses_end = request.end_image_path and not request.f1
    end = picture_latent(request.end_image_path, *size, "--end_image_path")[0] if uses_end else None
    return {"starts": starts, "end": end, "controls": (), "control_masks": ()}


def _mask_file(path: str, request: GenerationRequest, flag: str) -> Tensor:
    return _latent_mask(load_mask(path, width=request.width, height=request.height, flag=flag))


def _latent_mask(mask: np.ndarray | None) -> Tensor | None:
    """(H, W) uint8 → (h, w) in [0, 1]."""
    if mask is None:
        return None
    height, width = mask.shape
    return torch.from_numpy(mask_to_latent(mask, width // VAE_STRIDE, height // VAE_STRIDE))
