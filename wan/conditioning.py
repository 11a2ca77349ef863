"""From a request's text and images to what the transformer is conditioned on; every input is encoded once.

Shapes: C latent channels, F pixel frames, F' latent frames, H W pixel size, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.media import Picture, fit, load_mask, load_picture, open_image
from common.pictures import latent_mask
from common.residency import Resident
from dataset.frames import examine_video, read_frames
from generation.encoding import ImageInput, Results, encode_each, without_frames
from generation.pipeline import Failure
from modules.guidance import needs_negative, plan_guidance
from options.errors import UserError
from options.geometry import FRAMES_PER_LATENT, VAE_STRIDE
from options.wan_request import WanRequest
from wan.context import (
    WanContext,
    fun_control_context,
    image_context,
    no_features,
    one_frame_context,
    seen_by_clip,
    text_context,
)
from wan.image_encoder import encode_pictures
from wan.pictures import encode_clips, encode_grey, encode_pixels, start_clip
from wan.pictures import encode_pictures as encode_latents
from wan.text_encoder import encode_t5

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


CONTROL_FLAG = "--control_path"


@dataclass(frozen=True, kw_only=True)
class WanConditioning:
    """One request, encoded; on the CPU."""

    text: Tensor
    """(L, text_width) valid rows only."""
    negative: Tensor | None
    """The same of the negative prompt; None when no step needs it."""
    features: Tensor | None
    """(257, image_width) CLIP states of what CLIP sees, (514, image_width) of two pictures; None for text-to-video."""
    context: WanContext
    """A batch of one."""
    pictures: Sequence[tuple[Tensor, np.ndarray]]
    """The input images as latents (C, h, w) and as RGB (h, w, 3) in [0, 1]."""


@dataclass(frozen=True)
class SizedPicture:
    """A picture that the VAE sees alone, a control image or an image that is put behind a clip."""

    image: ImageInput
    crops: bool = True
    """Whether it is cropped to its size; else it is resized, whatever its aspect ratio."""

    def load(self) -> Picture:
        size = {"width": self.image.width, "height": self.image.height}
        return load_picture(self.image.path, flag="input image", crops=self.crops, **size)

    def encode(self, vae: AutoencoderKLWan) -> EncodedPicture:
        picture = self.load()
        latent = encode_latents(vae, [picture.rgb])
        return EncodedPicture(latent=latent, mask=latent_mask(picture.alpha), thumbnail=thumbnail(picture.rgb))


@dataclass(frozen=True, kw_only=True)
class EncodedPicture:
    """A picture, or the first frame of a clip, with the latents that it is part of."""

    latent: Tensor
    """(1, C, F', h, w)"""
    mask: Tensor | None
    """(h, w) in [0, 1], from its alpha channel."""
    thumbnail: np.ndarray
    """(h, w, 3) RGB in [0, 1]."""


@dataclass(frozen=True)
class StartClip:
    """A start image and grey frames, of flf2v an end image behind them, encoded in one piece."""

    start: SizedPicture
    end: SizedPicture | None
    num_frames: int

    def encode(self, vae: AutoencoderKLWan) -> EncodedPicture:
        start = self.start.load().rgb
        pixels = start_clip(start, self.num_frames, self.end.load().rgb if self.end else None)
        return EncodedPicture(latent=encode_pixels(vae, pixels[None]), mask=None, thumbnail=thumbnail(start))


@dataclass(frozen=True)
class Grey:
    """What stands where a picture is to be made."""

    width: int
    height: int

    def encode(self, vae: AutoencoderKLWan) -> EncodedPicture:
        size = (self.height // VAE_STRIDE, self.width // VAE_STRIDE)
        grey = np.full((*size, 3), 0.5, dtype=np.float32)
        return EncodedPicture(latent=encode_grey(vae, self.height, self.width), mask=None, thumbnail=grey)


@dataclass(frozen=True)
class ControlClip:
    """The control video of Fun-Control."""

    video: ImageInput
    num_frames: int

    def encode(self, vae: AutoencoderKLWan) -> EncodedPicture:
        size = (self.video.width, self.video.height)
        frames = list(read_frames(self.video.path, size=size, limit=self.num_frames, flag=CONTROL_FLAG))
        self.check(len(frames))
        clip = np.stack(frames)[None]
        return EncodedPicture(latent=encode_clips(vae, clip), mask=None, thumbnail=thumbnail(frames[0]))

    def check(self, num_frames: int) -> None:
        """Raises UserError for a video of so many frames if they are not enough."""
        if num_frames < self.num_frames:
            got, remedy = f"{self.video.path}, {num_frames} frames", "give a longer one, or a smaller --video_length"
            raise UserError(CONTROL_FLAG, got, f"at least {self.num_frames} frames", remedy)


VaeInput = SizedPicture | StartClip | Grey | ControlClip


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The models, and what they have encoded lately."""

    t5: Resident
    clip: Resident | None
    """None where the task shows it nothing."""
    vae: Resident
    tokenizer: Callable[[], Any]
    """UMT5's, loaded on the first call."""
    image_width: int | None
    """Of CLIP's features, for what stands in for them."""
    texts: dict[str, Tensor] = field(default_factory=dict)
    features: dict[ImageInput, Tensor] = field(default_factory=dict)
    latents: dict[VaeInput, EncodedPicture] = field(default_factory=dict)


def encode_requests(encoders: Encoders, requests: Sequence[WanRequest]) -> Iterator[WanConditioning | Failure]:
    """Encodes all texts, then all CLIP features, then all latents, so that each encoder comes in once, if at all.

    A request whose input fails becomes a `Failure`; the others go on.
    """
    inputs = [_Inputs.of(request) for request in requests]
    tokenizer = encoders.tokenizer()
    texts = [text for needed in inputs for text in (needed.text, needed.negative) if text is not None]
    seen = [image for needed in inputs for image in needed.seen]
    shown = [image for needed in inputs for image in needed.shown.values()]
    encoded = _Encoded(
        texts=encode_each(texts, encoders.t5, lambda t5, text: encode_t5(t5, tokenizer, text).cpu(), encoders.texts),
        features=encode_each(seen, encoders.clip, _features, encoders.features) if seen else Results(),
        latents=encode_each(shown, encoders.vae, lambda vae, image: image.encode(vae), encoders.latents),
    )
    for request, needed in zip(requests, inputs, strict=True):
        try:
            yield _assemble(request, needed, encoded, encoders.image_width)
        except Exception as error:  # one request must not take the others with it
            yield Failure(error=without_frames(error))


def clip_images(request: WanRequest) -> list[str]:
    """The pictures that CLIP sees: start and end image, in one-frame mode a control image where one is not given."""
    if request.one_frame is None:
        ends = [request.end_image_path] if request.task.kind == "flf2v" else []
        return [path for path in (request.image_path, *ends) if path is not None]
    both = request.task.kind == "flf2v"
    chosen = seen_by_clip(request.one_frame.control_indices, both_ends=both)
    given = (request.image_path, request.end_image_path)
    controls = (request.control_image_paths[number] for number in chosen)
    return [path or control for path, control in zip(given, controls, strict=False)]


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """Everything of one request that goes through an encoder."""

    text: str
    negative: str | None
    seen: tuple[ImageInput, ...]
    """By CLIP, at their own size."""
    shown: Mapping[str, VaeInput]
    """To the VAE, by what they are for: `clip`, `end`, `control video`, `grey`, and the numbers of control images."""

    @classmethod
    def of(cls, request: WanRequest) -> _Inputs:
        steps = plan_guidance(request.num_steps, request.cfg_scale, request.guidance)
        return cls(
            text=request.prompt,
            negative=request.negative_prompt if needs_negative(steps) else None,
            seen=tuple(ImageInput.of(path, 0, 0) for path in clip_images(request)),
            shown=_controls(request) if request.one_frame is not None else _clips(request),
        )


def _controls(request: WanRequest) -> dict[str, VaeInput]:
    """One frame: every control image alone, cropped to the picture's size, and grey."""
    size = (request.width, request.height)
    images = [SizedPicture(ImageInput.of(path, *size)) for path in request.control_image_paths]
    return {str(number): image for number, image in enumerate(images)} | {"grey": Grey(*size)}


def _clips(request: WanRequest) -> dict[str, VaeInput]:
    shown: dict[str, VaeInput] = {}
    size, num_frames = (request.width, request.height), request.num_frames

    def sized(path: str) -> SizedPicture:
        return SizedPicture(ImageInput.of(path, *size), crops=request.crops_images)

    end = sized(request.end_image_path) if request.end_image_path else None
    if request.image_path is not None:
        within = None if request.appends_end else end
        shown["clip"] = StartClip(sized(request.image_path), within, num_frames)
    if request.appends_end:
        shown["end"] = end
    if request.control_path is not None:
        length = num_frames + (FRAMES_PER_LATENT if request.appends_end else 0)
        shown["control video"] = ControlClip(ImageInput.of(request.control_path, *size), length)
    return shown


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """What every encoder made of all requests."""

    texts: Results
    """(L, text_width) by text"""
    features: Results
    """(257, image_width) by `ImageInput`"""
    latents: Results
    """`EncodedPicture` by `VaeInput`"""


def _features(clip: Any, image: ImageInput) -> Tensor:
    """(257, image_width)"""
    picture = open_image(image.path, flag="input image")
    # The colour under transparent pixels is the file's, as for the VAE.
    colours = np.array(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))[..., :3]
    return encode_pictures(clip, [colours])[0].cpu()


def thumbnail(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 → (h, w, 3) in [0, 1]."""
    height, width = rgb.shape[:2]
    return fit(rgb, width // VAE_STRIDE, height // VAE_STRIDE) / 255


def _assemble(request: WanRequest, inputs: _Inputs, encoded: _Encoded, image_width: int | None) -> WanConditioning:
    """One request's share."""
    latents = {name: encoded.latents[image] for name, image in inputs.shown.items()}
    features = [encoded.features[image] for image in inputs.seen]
    if not features and image_width is not None:
        features = [no_features(image_width)[0]]
    return WanConditioning(
        text=encoded.texts[inputs.text],
        negative=None if inputs.negative is None else encoded.texts[inputs.negative],
        features=torch.cat(features) if features else None,
        context=_one_frame(request, latents) if request.one_frame is not None else _video(request, latents),
        pictures=[(image.latent[0, :, 0], image.thumbnail) for name, image in latents.items() if name != "grey"],
    )


def _one_frame(request: WanRequest, latents: Mapping[str, EncodedPicture]) -> WanContext:
    controls = [latents[str(number)] for number in range(len(request.control_image_paths))]
    given = [_mask_file(path, request) for path in request.control_mask_paths]
    # A mask file goes before the picture's own alpha channel.
    masks = [*given, *(control.mask for control in controls[len(given) :])]
    grey = latents["grey"].latent
    return one_frame_context([control.latent for control in controls], masks, request.one_frame, grey=grey)


def _mask_file(path: str, request: WanRequest) -> Tensor:
    flag = "--control_image_mask_path"
    return latent_mask(load_mask(path, width=request.width, height=request.height, flag=flag))


def _video(request: WanRequest, latents: Mapping[str, EncodedPicture]) -> WanContext:
    image = None
    if (clip := latents.get("clip")) is not None:
        appended = latents["end"].latent if request.appends_end else None
        image = image_context(clip.latent, shows_end=request.task.kind == "flf2v", appended=appended)
    if (control := latents.get("control video")) is not None:
        return fun_control_context(control.latent, image)
    return image or text_context(request.num_latent_frames)


def check_control(request: WanRequest) -> None:
    """Raises UserError for a control video that is not there, is none, or is too short; nothing of it is encoded."""
    for clip in _clips(request).values() if request.control_path is not None else ():
        if isinstance(clip, ControlClip):
            clip.check(examine_video(clip.video.path, flag=CONTROL_FLAG).timing.length())
