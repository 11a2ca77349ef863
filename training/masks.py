"""Whether `--masked_loss` has anything to go by."""

from __future__ import annotations

import logging

from dataset.loss_masks import LOSS_MASK
from dataset.training_dataset import TrainingDataset
from options.errors import UserError

logger = logging.getLogger(__name__)

FLAG = "--masked_loss"


def check_masks(dataset: TrainingDataset, masked: bool) -> None:
    """Warns of data sets that `--masked_loss` does nothing for, and of masks that are cached in vain.

    Args:
        masked: whether `--masked_loss` was given.

    Raises:
        UserError: it was, and no data set has masks.
    """
    having = [place for place, contents in dataset.contents.items() if LOSS_MASK in contents]
    lacking = [place for place in dataset.contents if place not in having]
    if masked and not having:
        remedy = "give a data set mask_directory, or its JSONL lines mask_path, and cache its latents again"
        raise UserError(FLAG, "no mask in any cache", "masks in at least one data set", f"{remedy}, or leave it out")
    if masked and lacking:
        logger.warning("%s: no masks in the caches of %s: their loss counts everywhere", FLAG, ", ".join(lacking))
    if having and not masked:
        logger.warning("%s is not given: the masks of %s are not used", FLAG, ", ".join(having))
