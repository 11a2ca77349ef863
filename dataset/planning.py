"""From a data set to its jobs: its pictures and clips, their sizes and the names of their caches; nothing is decoded.

What is known about a video (size, frames) stands in the fingerprint of its caches, so that a video whose content still
has the same hash is not even opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.media import image_info
from dataset.architecture import CacheRules
from dataset.buckets import pick_bucket
from dataset.cache_files import cache_header
from dataset.cache_names import image_latent_path, latent_files, text_path, video_latent_path
from dataset.config import ImageDataset, VideoDataset
from dataset.crops import crops_of
from dataset.fingerprints import Fingerprint, source_identity
from dataset.frames import control_rate, examine_video
from dataset.jobs import Job, Size, TextJob, Unit
from dataset.loss_masks import check_mask_size
from dataset.sources import MediaItem, list_items
from options.errors import UserError, one_line


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Something that could not be cached."""

    stem: str | None
    """Of the item; None when it is not about one item."""
    message: str
    """One line with place, reason and remedy."""

    @classmethod
    def of(cls, item: MediaItem, error: Exception) -> Failure:
        if isinstance(error, UserError):
            return cls(stem=item.stem, message=f"{item.where}: {error.complaint}")
        return cls(stem=item.stem, message=one_line(f"{item.where}: {type(error).__name__}: {error}"))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done for one data set."""

    dataset: ImageDataset | VideoDataset
    num_items: int
    """Everything that the source holds, usable or not."""
    jobs: tuple[Job, ...] | tuple[TextJob, ...]
    """Of latents by size and length, so that few batches are open at a time; then as listed."""
    failures: tuple[Failure, ...]
    dropped: tuple[str, ...] = ()
    """Items of which no clip is long enough, one line each."""
    trimmed: tuple[str, ...] = ()
    """Items of which not everything is used, one line each."""
    notes: tuple[str, ...] = ()
    """What else is worth knowing: rotated pictures, converted rates, files that belong to nothing."""


def plan_latents(dataset: ImageDataset | VideoDataset, rules: CacheRules, *, reuse: bool) -> Plan:
    """Lists the items of a data set and plans their latent caches.

    Args:
        reuse: trust what valid-looking caches say about videos of equal content, instead of opening these.
    """
    listing = list_items(dataset)
    planner = _Planner(dataset, rules, reuse=reuse)
    failures = [Failure(stem=None, message=problem) for problem in listing.problems]
    jobs = []
    for item in listing.items:
        try:
            job = planner.plan(item)
        except (UserError, OSError) as error:
            failures.append(Failure.of(item, error))
            continue
        if job:
            jobs.append(job)
    return Plan(
        dataset=dataset,
        num_items=listing.num_found,
        jobs=tuple(sorted(jobs, key=lambda job: (job.size, [unit.num_frames for unit in job.units]))),
        failures=tuple(failures),
        dropped=tuple(planner.dropped),
        trimmed=tuple(planner.trimmed),
        notes=(*listing.notes, *planner.notes),
    )


def plan_texts(dataset: ImageDataset | VideoDataset, arch: str) -> Plan:
    """Lists the captions of a data set: one for each image or video, however many clips it has."""
    listing = list_items(dataset)
    folder = dataset.cache_directory
    return Plan(
        dataset=dataset,
        num_items=listing.num_found,
        jobs=tuple(TextJob(item=item, path=text_path(folder, item.path, arch)) for item in listing.items),
        failures=tuple(Failure(stem=None, message=problem) for problem in listing.problems),
        notes=listing.notes,
    )


class _Planner:
    """Plans item by item and gathers what is said on the way."""

    def __init__(self, dataset: ImageDataset | VideoDataset, rules: CacheRules, *, reuse: bool) -> None:
        self.dataset, self.rules = dataset, rules
        self.settings = dict(rules.settings(dataset))
        self.dropped: list[str] = []
        self.trimmed: list[str] = []
        self.notes: list[str] = []
        self._known = _known_videos(dataset, rules.arch) if reuse else {}

    def plan(self, item: MediaItem) -> Job | None:
        """None when there is nothing to encode in a video.

        Raises:
            UserError: its header cannot be read, or something that belongs to it is missing.
        """
        self.rules.check_item(item, self.dataset)
        return self._image(item) if isinstance(self.dataset, ImageDataset) else self._video(item)

    def _bucket(self, size: Size) -> Size:
        chosen = self.dataset
        return pick_bucket(size, chosen.resolution, enabled=chosen.enable_bucket, no_upscale=chosen.bucket_no_upscale)

    def _image(self, item: MediaItem) -> Job:
        paths = (item.path, *item.control_paths, *filter(None, [item.mask_path]))
        infos = [image_info(path, flag=str(path)) for path in paths]
        info = infos[0]
        if item.mask_path:
            check_mask_size(item.mask_path, infos[-1].size, info.size)
        if turned := [path.name for path, found in zip(paths, infos, strict=True) if found.is_turned]:
            self.notes.append(f"{item.where}: turned upright by EXIF orientation: {', '.join(turned)}")
        size = self._bucket(info.size)
        settings = self.settings | {"size": _x(size), "source_size": _x(info.size)}
        path = image_latent_path(self.dataset.cache_directory, item.path, info.size, self.rules.arch)
        unit = Unit(paths=(path,), crop=None, num_frames=1, settings=settings)
        return Job(item=item, dataset=self.dataset, size=size, source_size=info.size, units=(unit,))

    def _video(self, item: MediaItem) -> Job | None:
        dataset = self.dataset
        rate = f"{self.rules.fps} from {dataset.source_fps or 'the file'}"
        control = item.control_paths[0] if self.rules.uses_control_videos and item.control_paths else None
        known = self._known_video(item, rate)
        source_size, length = known or self._examined(item)
        if control and not known:
            self._look_at_control(item, control, length)
        size = self._bucket(source_size)
        plan = crops_of(dataset, length)
        common = self.settings | {"size": _x(size), "source_size": _x(source_size)}
        common |= {"frame_rate": rate, "source_frames": str(length)}
        units, remarks = [], list(plan.notes)
        for crop in plan.crops:
            trim = self.rules.trim(crop.length, dataset)
            if trim.note:
                remarks.append(trim.note)
            if trim.num_sections:
                sections = range(trim.num_sections) if self.rules.has_sections else (None,)
                place = {"start": crop.start, "count": crop.length}
                folder, arch = dataset.cache_directory, self.rules.arch
                paths = (video_latent_path(folder, item.path, size, arch, section=s, **place) for s in sections)
                settings = common | {name: str(value) for name, value in place.items()}
                units.append(Unit(paths=tuple(paths), crop=crop, num_frames=trim.length, settings=settings))
        if remarks:
            line = f"{item.where}: {'; '.join(dict.fromkeys(remarks))}"
            (self.trimmed if units else self.dropped).append(line)
        if not units:
            return None
        job = {"item": item, "dataset": dataset, "size": size, "source_size": source_size}
        return Job(**job, units=tuple(units), control_video=control)

    def _examined(self, item: MediaItem) -> tuple[Size, int]:
        """(size, frames at the model's rate)."""
        given = self.dataset.source_fps
        info = examine_video(item.path, flag=str(item.path))
        length = info.timing.length(target_fps=self.rules.fps, source_fps=given)
        if info.timing.num_frames < info.num_announced:
            there = f"{info.timing.num_frames} of the {info.num_announced} frames that its header names are there"
            self.trimmed.append(f"{item.where}: {there}: the file may be cut off")
        if length != info.timing.num_frames:
            source = given or info.timing.fps
            rate = f"{float(source):.6g}" if source else "a variable number of"
            change = f"{info.timing.num_frames} frames become {length}"
            self.notes.append(f"{item.where}: {rate} frames per second brought to {self.rules.fps}, {change}")
        return info.size, length

    def _look_at_control(self, item: MediaItem, control: Path, length: int) -> None:
        rate = control_rate(control, item.path, self.dataset.source_fps)
        timing = examine_video(control, flag=str(control)).timing
        num_frames = timing.length(target_fps=self.rules.fps, source_fps=rate)
        if num_frames < length:
            there = f"{num_frames} frames of the control {control.name} for {length}"
            self.notes.append(f"{item.where}: {there}: its last one is repeated")

    def _known_video(self, item: MediaItem, rate: str) -> tuple[Size, int] | None:
        stored = self._known.get(item.stem)
        if stored is None or stored.get("frame_rate") != rate:
            return None
        if not source_identity(item.path).items() <= stored.items():
            return None
        try:
            width, height = map(int, stored["source_size"].split("x"))
            return (width, height), int(stored["source_frames"])
        except (KeyError, ValueError):
            return None


def _known_videos(dataset: ImageDataset | VideoDataset, arch: str) -> dict[str, Fingerprint]:
    """Stem -> the fingerprint of one of its caches."""
    known: dict[str, Fingerprint] = {}
    if isinstance(dataset, ImageDataset):
        return known
    for file in latent_files(dataset.cache_directory, arch, video=True):
        if file.stem in known:
            continue
        try:
            stored = cache_header(file.path).fingerprint
        except UserError:
            continue
        if stored:
            known[file.stem] = stored
    return known


def _x(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
