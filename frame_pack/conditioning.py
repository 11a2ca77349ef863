"""From a request's texts and images to what the transformer is conditioned on; every input is encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from common.media import fit, load_mask, load_picture, to_model_range
from common.residency import Resident
from frame_pack.context import apply_mask
from frame_pack.image_encoder import encode_image
from frame_pack.pictures import encode_pixels, latent_mask
from generation.encoding import ImageInput, Results, encode_each, without_frames
from generation.pipeline import Failure
from hunyuan_model.text_encoders import encode_clip, encode_llama
from options.fpack_request import FramePackRequest
from options.geometry import VAE_STRIDE


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
    pictures: Sequence[tuple[Tensor, np.ndarray]]
    """The input images as latents (C, h, w) and as RGB (h, w, 3) in [0, 1]."""


@dataclass(frozen=True)
class TextInput:
    """What decides `TextStates`."""

    prompt: str
    system_prompt: str | None


@dataclass(frozen=True, kw_only=True)
class ImageLatent:
    """One encoded picture."""

    latent: Tensor
    """(1, C, 1, h, w)"""
    mask: Tensor | None
    """(h, w) in [0, 1], from its alpha channel."""
    thumbnail: np.ndarray
    """(h, w, 3) RGB in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The models, and what they have encoded lately."""

    llama: Resident
    clip: Resident
    siglip: Resident
    vae: Resident
    tokenizers: Callable[[], tuple[Any, Any]]
    """LLaMA's and CLIP's, loaded on the first call."""
    llama_states: dict[TextInput, Tensor] = field(default_factory=dict)
    clip_states: dict[TextInput, Tensor] = field(default_factory=dict)
    features: dict[ImageInput, Tensor] = field(default_factory=dict)
    latents: dict[ImageInput, ImageLatent] = field(default_factory=dict)


def encode_requests(
    encoders: Encoders, requests: Sequence[FramePackRequest]
) -> Iterator[FramePackConditioning | Failure]:
    """Encodes all texts, then all SigLIP features, then all latents, so that each encoder comes in once, if at all.

    A request whose input fails becomes a `Failure`; the others go on.
    """
    inputs = [_Inputs.of(request) for request in requests]
    tokenizers = encoders.tokenizers()

    def encode_with_llama(llama: Any, text: TextInput) -> Tensor:
        return encode_llama(llama, tokenizers[0], text.prompt, system_prompt=text.system_prompt).cpu()

    def encode_with_clip(clip: Any, text: TextInput) -> Tensor:
        return encode_clip(clip, tokenizers[1], text.prompt).cpu()

    texts = [text for needed in inputs for text in needed.all_texts()]
    starts = [image for needed in inputs for image in needed.starts.values()]
    pictures = [image for needed in inputs for image in needed.all_latents()]
    encoded = _Encoded(
        llama=encode_each(texts, encoders.llama, encode_with_llama, encoders.llama_states),
        clip=encode_each(texts, encoders.clip, encode_with_clip, encoders.clip_states),
        features=encode_each(starts, encoders.siglip, _features, encoders.features),
        latents=encode_each(pictures, encoders.vae, _image_latent, encoders.latents),
    )
    for request, needed in zip(requests, inputs, strict=True):
        try:
            yield _assemble(request, needed, encoded)
        except Exception as error:  # one request must not take the others with it
            yield Failure(error=without_frames(error))


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """Everything of one request that goes through an encoder."""

    texts: Mapping[int, TextInput]
    negative: TextInput | None
    starts: Mapping[int, ImageInput]
    end: ImageInput | None
    controls: tuple[ImageInput, ...]
    is_one_frame: bool

    @classmethod
    def of(cls, request: FramePackRequest) -> _Inputs:
        system, uses_end = request.system_prompt, request.end_image_path and not request.f1
        is_one_frame, size = request.one_frame is not None, (request.width, request.height)
        return cls(
            texts={section: TextInput(prompt, system) for section, prompt in request.prompts.items()},
            negative=TextInput(request.negative_prompt, system) if request.uses_cfg else None,
            starts={s: ImageInput.of(path, *size) for s, path in (request.image_paths or {0: None}).items()},
            end=ImageInput.of(request.end_image_path, *size) if uses_end and not is_one_frame else None,
            controls=tuple(ImageInput.of(path, *size) for path in request.control_image_paths),
            is_one_frame=is_one_frame,
        )

    def all_texts(self) -> list[TextInput]:
        return [*self.texts.values(), *([self.negative] if self.negative else [])]

    def all_latents(self) -> list[ImageInput]:
        """In one-frame mode the start image is only looked at by SigLIP."""
        images = self.controls if self.is_one_frame else (*self.starts.values(), *([self.end] if self.end else []))
        return list(images)


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """What every encoder made of all requests."""

    llama: Results
    """(L, text_width) by `TextInput`"""
    clip: Results
    """(pooled_width,) by `TextInput`"""
    features: Results
    """(729, image_width) by `ImageInput`"""
    latents: Results
    """`ImageLatent` by `ImageInput`"""


def _features(siglip: Any, image: ImageInput) -> Tensor:
    """(729, image_width)"""
    if image.path is None:
        return encode_image(siglip, np.zeros((image.height, image.width, 3), dtype=np.uint8)).cpu()
    picture = load_picture(image.path, width=image.width, height=image.height, flag="input image")
    return encode_image(siglip, picture.rgb).cpu()


def _image_latent(vae: Any, image: ImageInput) -> ImageLatent:
    if image.path is None:
        pixels, alpha = np.zeros((image.height, image.width, 3), dtype=np.float32), None
    else:
        picture = load_picture(image.path, width=image.width, height=image.height, flag="input image")
        pixels, alpha = to_model_range(picture.rgb), picture.alpha
    latent = encode_pixels(vae, pixels[None, None])
    levels = ((pixels + 1) * 127.5).round().astype(np.uint8)
    thumbnail = fit(levels, image.width // VAE_STRIDE, image.height // VAE_STRIDE) / 255
    return ImageLatent(latent=latent, mask=latent_mask(alpha), thumbnail=thumbnail)


def _assemble(request: FramePackRequest, inputs: _Inputs, encoded: _Encoded) -> FramePackConditioning:
    """One request's share, masks applied where they belong to a start image."""

    def states(text: TextInput) -> TextStates:
        return TextStates(llama=encoded.llama[text], pooled=encoded.clip[text])

    latents = encoded.latents

    controls = [latents[image] for image in inputs.controls]
    starts = {} if inputs.is_one_frame else {section: latents[image].latent for section, image in inputs.starts.items()}
    if request.image_mask_path and starts:
        starts[0] = apply_mask(starts[0], _mask_file(request.image_mask_path, request, "--image_mask_path"))
    given = [_mask_file(path, request, "--control_image_mask_path") for path in request.control_mask_paths]
    shown = [image for image in dict.fromkeys(inputs.all_latents()) if image.path is not None]
    return FramePackConditioning(
        texts={section: states(text) for section, text in inputs.texts.items()},
        negative=states(inputs.negative) if inputs.negative else None,
        siglip={section: encoded.features[image] for section, image in inputs.starts.items()},
        starts=starts,
        end=latents[inputs.end].latent if inputs.end else None,
        controls=tuple(control.latent for control in controls),
        # A mask file goes before the picture's own alpha channel.
        control_masks=(*given, *(control.mask for control in controls[len(given) :])),
        pictures=[(latents[image].latent[0, :, 0], latents[image].thumbnail) for image in shown],
    )


def _mask_file(path: str, request: FramePackRequest, flag: str) -> Tensor:
    return latent_mask(load_mask(path, width=request.width, height=request.height, flag=flag))
