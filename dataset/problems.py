"""What keeps data sets of one kind or the other from being cached, whatever the model."""

from __future__ import annotations

from collections.abc import Iterator

from dataset.config import ImageDataset, VideoDataset
from dataset.items import MediaItem
from options.errors import UserError


def wrong_kind(dataset: ImageDataset | VideoDataset, expected: str, remedy: str) -> UserError:
    """For a data set of images where videos are expected, or the other way round."""
    is_image = isinstance(dataset, ImageDataset)
    source = "image" if is_image else "video"
    source += "_jsonl_file" if getattr(dataset, f"{source}_jsonl_file") else "_directory"
    return UserError(f"{dataset.where} {source}", "images" if is_image else "videos", expected, remedy)


def missing_controls(dataset: ImageDataset) -> Iterator[UserError]:
    """Images of a folder have their controls in another; lines of a JSONL file are looked at one by one."""
    if dataset.image_directory and not dataset.control_directory:
        remedy = "add the folder of the control images"
        yield UserError(f"{dataset.where} control_directory", "nothing", "control images with --one_frame", remedy)


def unusable_keys(dataset: ImageDataset) -> Iterator[UserError]:
    """Keys that ask for several targets, or for control images of another size than their image."""
    where = dataset.where
    if dataset.multiple_target:
        yield UserError(f"{where} multiple_target", "true", "one target image for each item", "remove it")
    for key in ("no_resize_control", "control_resolution"):
        if value := getattr(dataset, key):
            got = "true" if value is True else "{} x {}".format(*value)
            yield UserError(f"{where} {key}", got, "control images of the size of their image", "remove it")


def too_short(dataset: VideoDataset, shortest: int, expected: str, remedy: str = "") -> Iterator[UserError]:
    """A data set that asks for no clip of at least `shortest` frames."""
    full = dataset.frame_extraction == "full"
    key, lengths = ("max_frames", (dataset.max_frames,)) if full else ("target_frames", dataset.target_frames)
    if max(lengths) < shortest:
        write = f"write {key} = {shortest if full else [shortest]}, say{remedy}"
        yield UserError(f"{dataset.where} {key}", ", ".join(map(str, lengths)), expected, write)


def check_number_of_controls(item: MediaItem, dataset: ImageDataset) -> None:
    """Raises UserError for an image without a control for each index: no line of a JSONL file may name any."""
    count = len(item.control_paths)
    if count != dataset.num_controls:
        expected = f"{dataset.num_controls}, one for each of fp_1f_clean_indices"
        raise UserError(item.where, f"{count} control images", expected, "add control_path to its line")
