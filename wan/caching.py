"""Wan's latent caches: what a data set must say, what is encoded, and the encoder that does it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from dataset.cache_files import CacheHeader
from dataset.config import ImageDataset, VideoDataset
from dataset.crops import Trim
from dataset.fingerprints import Fingerprint
from dataset.jobs import Sample
from dataset.loss_masks import mask_tensors
from dataset.problems import check_number_of_controls, missing_controls, too_short, unusable_keys, wrong_kind
from dataset.sources import MediaItem
from options.errors import UserError, UserErrors
from options.geometry import FRAMES_PER_LATENT, WAN_FPS, whole_latents
from options.one_frame import OneFrameOptions, wan_place_problems

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLWan
    from PIL import Image
    from torch import Tensor
    from transformers import CLIPVisionModel

logger = logging.getLogger(__name__)

Mode = Literal["t2v", "i2v", "flf2v", "one_frame"]
"""What is shown of an item: nothing, its first frame, its first and its last frame, its control images."""
MODES: tuple[Mode, ...] = ("t2v", "i2v", "flf2v", "one_frame")
RULES_VERSION = "1"
"""Of everything that happens to pixels and latents here: a change of it makes all caches stale."""
SHORTEST_FLF2V = FRAMES_PER_LATENT + 1
"""Frames that have a first and a last latent frame."""


@dataclass(frozen=True, kw_only=True)
class WanCacheRules:
    """See `dataset.architecture.CacheRules`. torch is not needed, but for `cells`."""

    mode: Mode

    arch: ClassVar[str] = "wan"
    fps: ClassVar[int] = WAN_FPS
    has_sections: ClassVar[bool] = False
    uses_control_videos: ClassVar[bool] = True

    def check(self, dataset: ImageDataset | VideoDataset) -> None:
        """Raises `UserErrors` with all that keeps a data set from being cached in this mode; logs what is only odd."""
        find = self._video_problems if isinstance(dataset, VideoDataset) else self._image_problems
        if problems := list(find(dataset)):
            raise UserErrors(problems)
        for remark in self._remarks(dataset) if isinstance(dataset, ImageDataset) else ():
            logger.warning("%s %s", dataset.where, remark)

    def check_item(self, item: MediaItem, dataset: ImageDataset | VideoDataset) -> None:
        """Raises UserError for a one-frame image without a control for each index."""
        if self.mode == "one_frame" and isinstance(dataset, ImageDataset):
            check_number_of_controls(item, dataset)

    def settings(self, dataset: ImageDataset | VideoDataset) -> Fingerprint:
        """Only what has an effect in this mode, so that nothing else makes a cache stale."""
        common = {"rules": RULES_VERSION, "mode": self.mode}
        if self.mode != "one_frame" or isinstance(dataset, VideoDataset):
            return common
        options, source = one_frame_options(dataset), dataset.embedded_control
        return common | {
            "target_index": "nothing" if options.target_index is None else str(options.target_index),
            "control_indices": ";".join(map(str, options.control_indices or ())) or "nothing",
            "image_embedding_source": {None: "target", 0: "controls"}.get(source, f"control {source}"),
        }

    def like(self, stored: Fingerprint) -> WanCacheRules:
        return self

    def trim(self, length: int, dataset: VideoDataset) -> Trim:
        if self.mode == "flf2v" and length < SHORTEST_FLF2V:
            note = f"clips of {length} are too short for --flf2v, which needs {SHORTEST_FLF2V} frames"
            return Trim(num_sections=0, length=0, note=note)
        used = whole_latents(length)
        note = f"{length} frames cut to {used}, as clips have 4n + 1 frames" if used < length else None
        return Trim(num_sections=1, length=used, note=note)

    def complaint(
        self, header: CacheHeader, indices: Mapping[str, Tensor], dataset: ImageDataset | VideoDataset
    ) -> str | None:
        from wan.cache_evidence import mode_shown, one_frame_complaint

        shown = mode_shown(header)
        expected = self.like({"mode": shown}).mode
        if shown != expected:
            return f"mode is {shown} in the cache, {expected} now"
        is_picture = shown == "one_frame" and isinstance(dataset, ImageDataset)
        return one_frame_complaint(indices, one_frame_options(dataset)) if is_picture else None

    def cells(self, sample: Sample) -> Sequence[tuple[str, Image.Image]]:
        from wan.cache_preview import clip_cells, one_frame_cells

        if self.mode == "one_frame":
            dataset = sample.job.dataset
            return one_frame_cells(sample, one_frame_options(dataset), embedding_source=dataset.embedded_control)
        return clip_cells(sample, self.mode)

    def _video_problems(self, dataset: VideoDataset) -> Iterator[UserError]:
        if self.mode == "one_frame":
            remedy = "leave out --one_frame, or give a data set file with images only"
            yield wrong_kind(dataset, "images with --one_frame", remedy)
        if self.mode == "flf2v":
            expected = f"at least {SHORTEST_FLF2V} frames, so that the first and the last one differ"
            yield from too_short(dataset, SHORTEST_FLF2V, expected)

    def _image_problems(self, dataset: ImageDataset) -> Iterator[UserError]:
        if self.mode == "flf2v":
            remedy = "use --one_frame for images with control images, or give a data set file with videos only"
            yield wrong_kind(dataset, "videos with --flf2v", remedy)
            return
        yield from unusable_keys(dataset)
        if self.mode != "one_frame":
            return
        yield from missing_controls(dataset)
        where, target, controls = dataset.where, dataset.fp_1f_target_index, dataset.fp_1f_clean_indices
        if target is None:
            remedy = "write fp_1f_target_index = 1, say"
            yield UserError(f"{where} fp_1f_target_index", "nothing", "the time index of the images", remedy)
        if controls is None:
            remedy = "write fp_1f_clean_indices = [0], say"
            expected = "the time index of each control image"
            yield UserError(f"{where} fp_1f_clean_indices", "nothing", expected, remedy)
        yield from wan_place_problems(target, controls or (), f"{where} fp_1f_target_index, fp_1f_clean_indices")

    def _remarks(self, dataset: ImageDataset) -> Iterator[str]:
        if self.mode == "one_frame":
            yield from one_frame_options(dataset).wan_hints()
            if dataset.embedded_control != 0:
                got = f"fp_1f_image_embedding_source = {dataset.fp_1f_image_embedding_source}"
                yield f"{got}: CLIP sees this picture alone; a flf2v model, which is shown two, sees it twice"
            return
        if dataset.fp_1f_target_index is not None:
            yield "fp_1f_target_index: only used with --one_frame"
        if self.mode == "i2v":
            yield "images with --i2v: each is shown to the model, which has nothing left to learn from it"


def one_frame_options(dataset: ImageDataset) -> OneFrameOptions:
    """What `--one_frame_inference` would be told for a picture like those of the data set."""
    return OneFrameOptions(
        target_index=dataset.fp_1f_target_index,
        control_indices=dataset.fp_1f_clean_indices,
        no_post=dataset.fp_1f_no_post,
    )


class WanLatentEncoder:
    """See `dataset.architecture.LatentEncoder`. All pictures or clips of one role in a batch go through a model
    together."""

    def __init__(
        self,
        rules: WanCacheRules,
        *,
        vae: AutoencoderKLWan,
        clip: CLIPVisionModel | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            clip: not needed for t2v.
            dtype: of stored latents; None is bfloat16.
        """
        import torch

        self._rules, self._vae, self._clip = rules, vae, clip
        self._dtype = dtype or torch.bfloat16
        self._grey: dict[tuple[int, int], Tensor] = {}
        """By height and width."""

    def encode(self, samples: Sequence[Sample]) -> list[list[Mapping[str, Tensor]]]:
        """As the protocol says, one file for each sample."""
        files = self._one_frame(samples) if self._rules.mode == "one_frame" else self._clips(samples)
        return [[tensors] for tensors in files]

    def _clips(self, samples: Sequence[Sample]) -> Iterator[Mapping[str, Tensor]]:
        """Videos, and images as videos of one frame."""
        from wan.cached_context import to_cache
        from wan.context import image_context
        from wan.pictures import encode_clips, encode_pixels, start_clip

        clips, controls = [sample.frames for sample in samples], [_control_clip(sample) for sample in samples]
        latents = encode_clips(self._vae, np.stack(clips))
        control = None if controls[0] is None else encode_clips(self._vae, np.stack(controls))
        shown, both_ends = None, self._rules.mode == "flf2v"
        features: Sequence[Tensor | None] = [None] * len(samples)
        if self._rules.mode != "t2v":
            starts = [start_clip(clip[0], len(clip), clip[-1] if both_ends else None) for clip in clips]
            shown = encode_pixels(self._vae, np.stack(starts))
            features = self._features([clip[[0, -1]] if both_ends else clip[:1] for clip in clips])
        for i, sample in enumerate(samples):
            here = slice(i, i + 1)
            tensors = to_cache(
                latents[here],
                None if shown is None else image_context(shown[here], shows_end=both_ends),
                control=None if control is None else control[here],
                features=features[i] if both_ends or features[i] is None else features[i][0],
                dtype=self._dtype,
            )
            yield tensors | mask_tensors(sample.loss_mask)

    def _one_frame(self, samples: Sequence[Sample]) -> Iterator[Mapping[str, Tensor]]:
        from common.pictures import latent_mask
        from wan.cached_context import to_cache
        from wan.context import arranged, one_frame_context
        from wan.pictures import encode_clips, encode_pictures

        targets = encode_clips(self._vae, np.stack([sample.frames for sample in samples]))
        roles = zip(*(sample.controls for sample in samples), strict=True)
        controls = [encode_pictures(self._vae, [picture.rgb for picture in role]) for role in roles]
        features = self._features([_seen_pictures(sample) for sample in samples])
        grey = self._grey_of(*samples[0].frames.shape[1:3])
        for i, sample in enumerate(samples):
            options = one_frame_options(sample.job.dataset)
            own, target = [control[i : i + 1] for control in controls], targets[i : i + 1]
            masks = [latent_mask(picture.alpha) for picture in sample.controls]
            tensors = to_cache(
                arranged(own, target, options),
                one_frame_context(own, masks, options, grey=grey),
                features=features[i],
                feature_indices=options.control_indices if len(features[i]) == len(own) else (),
                dtype=self._dtype,
            )
            yield tensors | _arranged_loss_mask(sample, options)

    def _features(self, pictures: Sequence[Sequence[np.ndarray]]) -> Sequence[Tensor]:
        """(N, 257, D) for each sample's N pictures."""
        from wan.image_encoder import encode_pictures

        features = encode_pictures(self._clip, [picture for own in pictures for picture in own])
        return features.split([len(own) for own in pictures])

    def _grey_of(self, height: int, width: int) -> Tensor:
        from wan.pictures import encode_grey

        if (height, width) not in self._grey:
            self._grey[height, width] = encode_grey(self._vae, height, width)
        return self._grey[height, width]


def _control_clip(sample: Sample) -> np.ndarray | None:
    """(F, H, W, 3) what Fun-Control is shown: the control video, of an image its first control image."""
    return sample.controls[0].rgb[None] if sample.controls else sample.control_frames


def _seen_pictures(sample: Sample) -> Sequence[np.ndarray]:
    """The pictures (H, W, 3) that CLIP looks at, whole, whatever their masks hide: all controls, unless the data set
    names one picture."""
    source = sample.job.dataset.embedded_control
    if source == 0:
        return [picture.rgb for picture in sample.controls]
    return [sample.frames[0] if source is None else sample.controls[source].rgb]


def _arranged_loss_mask(sample: Sample, options: OneFrameOptions) -> Mapping[str, Tensor]:
    """The mask of the target among controls whose loss counts everywhere."""
    from wan.context import arranged

    masks = {}
    for name, mask in mask_tensors(sample.loss_mask).items():
        whole = [mask.new_ones(1, *mask.shape)] * len(sample.controls)
        masks[name] = arranged(whole, mask[None], options)[0]
    return masks
