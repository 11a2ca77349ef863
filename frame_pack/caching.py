"""FramePack's latent caches: what a data set must say, what is encoded, and the encoder that does it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from dataset.cache_files import CacheHeader
from dataset.config import ImageDataset, VideoDataset
from dataset.crops import Trim, trim
from dataset.fingerprints import Fingerprint
from dataset.jobs import Sample
from dataset.loss_masks import mask_tensors
from dataset.problems import check_number_of_controls, missing_controls, too_short, unusable_keys, wrong_kind
from dataset.sources import MediaItem
from options.errors import UserError, UserErrors
from options.geometry import FRAMEPACK_FPS, FRAMES_PER_LATENT
from options.one_frame import OneFrameOptions

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo
    from PIL import Image
    from torch import Tensor
    from transformers import SiglipVisionModel

logger = logging.getLogger(__name__)

Mode = Literal["sections", "f1", "one_frame"]
RULES_VERSION = "1"
"""Of everything that happens to pixels and latents here: a change of it makes all caches stale."""


@dataclass(frozen=True, kw_only=True)
class FramePackCacheRules:
    """See `dataset.architecture.CacheRules`. torch is not needed, but for `cells`."""

    mode: Mode
    """Videos for FramePack or FramePack-F1, or images with control images."""
    no_2x: bool = False
    """One-frame: leave out the (zero) history at half resolution."""
    no_4x: bool = False
    """One-frame: leave out the (zero) history at quarter resolution."""
    window: int | None = None
    """Latent frames of a section, for all data sets; None is each one's `fp_latent_window_size`."""

    arch: ClassVar[str] = "fp"
    fps: ClassVar[int] = FRAMEPACK_FPS
    has_sections: ClassVar[bool] = True
    uses_control_videos: ClassVar[bool] = False

    def check(self, dataset: ImageDataset | VideoDataset) -> None:
        """Raises `UserErrors` with all that keeps a data set from being cached in this mode; logs what is only odd."""
        find = self._video_problems if isinstance(dataset, VideoDataset) else self._image_problems
        if problems := list(find(dataset)):
            raise UserErrors(problems)
        for remark in self._remarks(dataset):
            logger.warning("%s %s", dataset.where, remark)

    def check_item(self, item: MediaItem, dataset: ImageDataset | VideoDataset) -> None:
        """Raises UserError for an image without a control for each index: no line of a JSONL file may name any."""
        if isinstance(dataset, ImageDataset):
            check_number_of_controls(item, dataset)

    def settings(self, dataset: ImageDataset | VideoDataset) -> Fingerprint:
        """Only what has an effect in this mode, so that nothing else makes a cache stale."""
        common = {"rules": RULES_VERSION, "mode": self.mode}
        window = {"window": str(self.window_of(dataset))}
        if isinstance(dataset, VideoDataset):
            return common | window
        options = self.one_frame_options(dataset)
        source = dataset.embedded_control
        # Nothing but post and histories stands behind the window.
        common |= {} if options.no_post and options.no_2x and options.no_4x else window
        return common | {
            "target_index": str(options.target_index),
            "control_indices": ";".join(map(str, options.control_indices)),
            "no_post": _yes_or_no(options.no_post),
            "no_2x": _yes_or_no(options.no_2x),
            "no_4x": _yes_or_no(options.no_4x),
            "image_embedding_source": "target" if source is None else f"control {source}",
        }

    def like(self, stored: Fingerprint) -> FramePackCacheRules:
        return self

    def trim(self, length: int, dataset: VideoDataset) -> Trim:
        return trim(length, self.window_of(dataset))

    def complaint(
        self, header: CacheHeader, indices: Mapping[str, Tensor], dataset: ImageDataset | VideoDataset
    ) -> str | None:
        from frame_pack.cache_evidence import settings_shown

        if not {"latent_indices", "clean_latent_indices"} <= indices.keys():
            return "it has no FramePack indices"
        num_controls = dataset.num_controls if isinstance(dataset, ImageDataset) else 0
        shown = settings_shown(frozenset(header.keys), indices, num_controls=num_controls)
        expected = self.like(shown).settings(dataset)
        differing = (name for name in shown if expected.get(name) != shown[name])
        return next((f"{name} is {shown[name]} in the cache, {expected.get(name)} now" for name in differing), None)

    def cells(self, sample: Sample) -> Sequence[tuple[str, Image.Image]]:
        from frame_pack.cache_preview import one_frame_cells, section_cells

        dataset = sample.job.dataset
        window = self.window_of(dataset)
        if isinstance(dataset, VideoDataset):
            return section_cells(sample, window=window, f1=self.mode == "f1")
        return one_frame_cells(
            sample, self.one_frame_options(dataset), window=window, embedding_source=dataset.embedded_control
        )

    def window_of(self, dataset: ImageDataset | VideoDataset) -> int:
        """Latent frames of a section; in one-frame mode what post and histories stand behind."""
        return self.window or dataset.fp_latent_window_size

    def one_frame_options(self, dataset: ImageDataset) -> OneFrameOptions:
        """What `--one_frame_inference` would be told for a picture like those of the data set."""
        return OneFrameOptions(
            target_index=dataset.fp_1f_target_index,
            control_indices=dataset.fp_1f_clean_indices or (0,),
            no_2x=self.no_2x,
            no_4x=self.no_4x,
            no_post=dataset.fp_1f_no_post,
        )

    def _video_problems(self, dataset: VideoDataset) -> Iterator[UserError]:
        if self.mode == "one_frame":
            remedy = "leave out --one_frame, or give a data set file with images only"
            yield wrong_kind(dataset, "images with --one_frame", remedy)
            return
        window = self.window_of(dataset)
        shortest = FRAMES_PER_LATENT * window + 1
        expected = f"at least {shortest} frames, which is one section of {window} latent frames and the first frame"
        yield from too_short(dataset, shortest, expected, remedy=", or a smaller fp_latent_window_size")

    def _image_problems(self, dataset: ImageDataset) -> Iterator[UserError]:
        if self.mode != "one_frame":
            remedy = "add --one_frame for images, or give a data set file with videos only"
            yield wrong_kind(dataset, "videos without --one_frame", remedy)
            return
        if dataset.fp_1f_target_index is None:
            remedy = "write fp_1f_target_index = 9, say (1 for kisekaeichi)"
            yield UserError(f"{dataset.where} fp_1f_target_index", "nothing", "the time index of the images", remedy)
        yield from missing_controls(dataset)
        yield from unusable_keys(dataset)

    def _remarks(self, dataset: ImageDataset | VideoDataset) -> Iterator[str]:
        if isinstance(dataset, VideoDataset):
            if dataset.control_directory:
                yield "control_directory: FramePack does not use control videos"
            return
        if dataset.fp_1f_clean_indices is None:
            yield "fp_1f_clean_indices: not given, so the control image stands at index 0"
        yield from self.one_frame_options(dataset).hints(self.window_of(dataset))


class FramePackLatentEncoder:
    """See `dataset.architecture.LatentEncoder`. Each role's pictures of a batch go through a model together."""

    def __init__(
        self, rules: FramePackCacheRules, *, vae: AutoencoderKLHunyuanVideo, siglip: SiglipVisionModel
    ) -> None:
        self._rules, self._vae, self._siglip = rules, vae, siglip

    def encode(self, samples: Sequence[Sample]) -> list[list[Mapping[str, Tensor]]]:
        """As the protocol says, latents in float16."""
        return self._one_frame(samples) if self._rules.mode == "one_frame" else self._sections(samples)

    def _one_frame(self, samples: Sequence[Sample]) -> list[list[Mapping[str, Tensor]]]:
        from common.pictures import latent_mask
        from frame_pack.cached_context import to_cache
        from frame_pack.context import one_frame_context
        from frame_pack.image_encoder import encode_images
        from frame_pack.pictures import encode_clips, encode_pictures

        targets = encode_clips(self._vae, np.stack([sample.frames for sample in samples]))
        roles = zip(*(sample.controls for sample in samples), strict=True)
        controls = [encode_pictures(self._vae, [picture.rgb for picture in role]) for role in roles]
        features = encode_images(self._siglip, [_embedded(sample) for sample in samples])
        entries = []
        for i, sample in enumerate(samples):
            target, dataset = targets[i : i + 1], sample.job.dataset
            context = one_frame_context(
                [control[i : i + 1] for control in controls],
                [latent_mask(picture.alpha) for picture in sample.controls],
                self._rules.one_frame_options(dataset),
                window=self._rules.window_of(dataset),
                like=target,
            )
            entries.append(
                [to_cache(target, context, features[i], with_history=False) | mask_tensors(sample.loss_mask)]
            )
        return entries

    def _sections(self, samples: Sequence[Sample]) -> list[list[Mapping[str, Tensor]]]:
        from frame_pack.cached_context import clip_contexts, to_cache
        from frame_pack.image_encoder import encode_images
        from frame_pack.pictures import encode_clips

        clips = encode_clips(self._vae, np.stack([sample.frames for sample in samples]))
        features = encode_images(self._siglip, [sample.frames[0] for sample in samples])
        entries = []
        for i, sample in enumerate(samples):
            clip, window = clips[i : i + 1], self._rules.window_of(sample.job.dataset)
            targets = clip[:, :, 1:].split(window, dim=2)
            contexts = clip_contexts(clip, window=window, f1=self._rules.mode == "f1")
            pairs = zip(targets, contexts, strict=True)
            entries.append([to_cache(target, context, features[i], with_history=True) for target, context in pairs])
        return entries


def _embedded(sample: Sample) -> np.ndarray:
    """The picture (H, W, 3) that SigLIP looks at: whole, whatever its mask hides."""
    source = sample.job.dataset.embedded_control
    return sample.frames[0] if source is None else sample.controls[source].rgb


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"
