"""What the caching scripts and the training data set need to know of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from dataset.cache_files import CacheHeader
from dataset.config import ImageDataset, VideoDataset
from dataset.crops import Trim
from dataset.fingerprints import Fingerprint
from dataset.jobs import Sample
from dataset.sources import MediaItem

if TYPE_CHECKING:
    import torch
    from PIL import Image


class CacheRules(Protocol):
    """How a model's latent caches are made and named, known without any weights."""

    arch: str
    """`fp` or `wan`, as in file names."""
    fps: int
    """The frame rate that videos are brought to."""
    has_sections: bool
    """Whether a crop becomes a file for each section."""
    uses_control_videos: bool
    """Whether the model is shown the control video of a video, frame by frame."""

    def check(self, dataset: ImageDataset | VideoDataset) -> None:
        """Raises UserErrors when a data set cannot be cached for this model in this mode: another kind, no indices."""

    def check_item(self, item: MediaItem, dataset: ImageDataset | VideoDataset) -> None:
        """Raises UserError when an item lacks what this mode needs."""

    def settings(self, dataset: ImageDataset | VideoDataset) -> Fingerprint:
        """All settings that decide the tensors of a data set's caches, beside sizes, frames and encoders."""

    def like(self, stored: Fingerprint) -> CacheRules:
        """These rules, with what they leave open taken from a cache's fingerprint. Rules without this method leave
        nothing open."""

    def left_open(self, header: CacheHeader, indices: Mapping[str, torch.Tensor]) -> Fingerprint:
        """What these rules leave open, as a latent cache shows it: it has to be the same in all caches of a data set.

        Args:
            indices: as of `complaint`; nothing for a file with a fingerprint.
        """

    def trim(self, length: int, dataset: VideoDataset) -> Trim:
        """What is used of a crop of `length` frames."""

    def complaint(
        self, header: CacheHeader, indices: Mapping[str, torch.Tensor], dataset: ImageDataset | VideoDataset
    ) -> str | None:
        """What in a latent cache without a fingerprint (the incumbent's) contradicts `settings(dataset)`; else None.

        Training asks this for what nothing but the tensors can tell, such as one frame or sections, the number of
        controls, where they stand. Rules without this method accept every such file.

        Args:
            header: names, shapes and types of everything in the file.
            indices: the contents that end with `_indices`.

        Returns:
            Both sides in one phrase: "target_index is 9 in the cache, 1 now".
        """

    def cells(self, sample: Sample) -> Sequence[tuple[str, Image.Image]]:
        """What the model will see of a sample, as labelled pictures: one row of a contact sheet."""


class LatentEncoder(Protocol):
    """Makes cache tensors of samples; its models are on the device while it is used."""

    def encode(self, samples: Sequence[Sample]) -> Sequence[Sequence[Mapping[str, torch.Tensor]]]:
        """For each sample, for each of its unit's paths: content name -> CPU tensor in the type that is stored.

        All samples have frames of one shape and the same number of controls, and all or none have a loss mask. The main
        latent is called `latents`, the mask's `latents_loss_mask`.
        """
