"""From data sets to what can be trained: latent caches with their text caches, checked, and all that is odd reported.

Every file's header is read once; tensors are not, but for the indices of files without a fingerprint.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.architecture import CacheRules
from dataset.cache_checks import Complaint, latent_complaint, missing_clips, num_source_frames, text_complaint
from dataset.cache_files import CacheHeader, cache_header, read_indices
from dataset.cache_names import LatentFile, comparable, latent_files, text_path_of
from dataset.config import DatasetConfig, ImageDataset, VideoDataset
from dataset.sources import MediaItem, list_items
from options.errors import UserError, UserErrors, one_line

logger = logging.getLogger(__name__)

NAMES_SHOWN = 5
COMPLAINTS_SHOWN = 20
OF_ONE_ITEM = re.compile(r"data_set|source(_.*)?|control_\d+(_.*)?|loss_mask(_.*)?|size|frame_rate|start|count|caption")
"""Settings in a fingerprint that differ from item to item of a data set."""


@dataclass(frozen=True, kw_only=True)
class CachingScripts:
    """What messages tell to run."""

    latents: str
    """`fpack_cache_latents.py`"""
    texts: str
    """`fpack_cache_text_encoder_outputs.py`"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the tensors of an item look like; items of one layout can be stacked."""

    stacked: tuple[tuple[str, tuple[int, ...], str], ...]
    """(content, shape, torch's name of the type) of everything that is stacked, sorted."""
    varlen: tuple[str, ...]
    """Contents whose length differs from item to item, sorted; a batch has lists of them."""

    @classmethod
    def of(cls, headers: Iterable[CacheHeader]) -> Layout:
        """That of a latent and a text cache together."""
        found = [(c, header.shapes[c], header.dtypes[c], c in header.varlen) for header in headers for c in header.keys]
        return cls(
            stacked=tuple(sorted((content, shape, dtype) for content, shape, dtype, varlen in found if not varlen)),
            varlen=tuple(sorted(content for content, _, _, varlen in found if varlen)),
        )

    @property
    def contents(self) -> frozenset[str]:
        """The names of everything that an item holds."""
        return frozenset(self.varlen).union(name for name, _, _ in self.stacked)

    def check_contents(self, needed: Iterable[str]) -> None:
        """Raises UserError when an item lacks any of this."""
        for name in needed:
            if name not in self.contents:
                got, expected = f"caches without {name}", f"caches with {name}"
                raise UserError("--dataset_config", got, expected, "run both caching scripts")

    def shape(self, content: str) -> tuple[int, ...]:
        """Of something that is stacked."""
        return next(shape for name, shape, _ in self.stacked if name == content)


@dataclass(frozen=True, kw_only=True)
class CachedItem:
    """One image, clip or section that can be trained."""

    dataset: int
    """The number of its data set, from 0."""
    latents: Path
    text: Path
    layout: Layout

    @property
    def name(self) -> str:
        """The latent cache's file name, spelled alike on every system."""
        return unicodedata.normalize("NFC", self.latents.name)


def find_cached_items(config: DatasetConfig, rules: CacheRules, scripts: CachingScripts) -> tuple[CachedItem, ...]:
    """All items of all data sets, which `rules` have checked, by data set and name.

    What is missing is logged, and how many files have no fingerprint. Caches whose source is gone are used, as who has
    no room for the sources any more may still train.

    Raises:
        UserErrors: caches that are damaged, stale or mixed, or no item at all.
    """
    searches = [_Search(number, dataset, rules, scripts) for number, dataset in enumerate(config.datasets)]
    for search in searches:
        search.run()
    if complaints := [complaint for search in searches for complaint in search.complaints]:
        more = [f"and {len(complaints) - COMPLAINTS_SHOWN} more cache files"] * (len(complaints) > COMPLAINTS_SHOWN)
        raise UserErrors([*complaints[:COMPLAINTS_SHOWN], *more])
    items = tuple(item for search in searches for item in search.items)
    if not items:
        raise UserErrors([search.nothing() for search in searches])
    if num_unknown := sum(search.num_unknown for search in searches):
        logger.warning(
            "%d cache files have no fingerprint: another tool wrote them. They are used; whether they belong to the "
            "present sources and settings can be told by their names, sizes and indices only",
            num_unknown,
        )
    return items


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """A latent cache and, where there is one, its text cache."""

    file: LatentFile
    header: CacheHeader
    text: CacheHeader | None
    item: MediaItem | None
    """None when the data set has no such source."""


class _Search:
    """Looks through one data set and gathers what is found."""

    def __init__(
        self, number: int, dataset: ImageDataset | VideoDataset, rules: CacheRules, scripts: CachingScripts
    ) -> None:
        self.number, self.dataset, self.rules, self.scripts = number, dataset, rules, scripts
        self.items: list[CachedItem] = []
        self.complaints: list[UserError | str] = []
        self.num_unknown = 0
        """Files without a fingerprint."""
        self._is_video = isinstance(dataset, VideoDataset)
        self._kind = "videos" if self._is_video else "images"
        self._files = latent_files(dataset.cache_directory, rules.arch, video=self._is_video)
        self._texts: dict[Path, CacheHeader] = {}
        self._layouts: dict[Layout, Layout] = {}
        """One object for equal layouts: workers get a copy of all items."""

    def run(self) -> None:
        """Fills `items`, `complaints` and `num_unknown`; logs what is missing."""
        listing = list_items(self.dataset)
        sources = {comparable(item.stem): item for item in listing.items}
        self._read_texts(sources)
        pairs = [pair for file in self._files if (pair := self._pair(file, sources.get(comparable(file.stem))))]
        headers = [*(pair.header for pair in pairs), *self._texts.values()]
        self.num_unknown = sum(header.fingerprint is None for header in headers)
        self._refuse_doubles(pairs)
        self._refuse_mixtures(pairs)
        self.items = [self._item(pair) for pair in pairs if pair.text]
        self._report_sources(sources, listing.problems, pairs)
        self._report_missing_parts(pairs)

    def nothing(self) -> UserError:
        """What to say when no data set has anything to train."""
        got, script = f"no *_{self.rules.arch}.safetensors in it", self.scripts.latents
        if self._files:
            got, script = f"{len(self._files)} latent caches and no text cache in it", self.scripts.texts
        where = f"{self.dataset.where} cache_directory {self.dataset.cache_directory}"
        return UserError(where, got, "latent and text caches", f"run {script}")

    # ---- reading ----

    def _read_texts(self, sources: Mapping[str, MediaItem]) -> None:
        """Reads each text cache once, though all clips of a video share it."""
        stems = {text_path_of(file, self.rules.arch): comparable(file.stem) for file in self._files}
        for path, stem in stems.items():
            header = self._header(path, self.scripts.texts) if os.path.isfile(path) else None
            if header is None:
                continue
            self._texts[path] = header
            self._refuse(path, text_complaint(header, sources.get(stem), self.rules.arch), self.scripts.texts)

    def _pair(self, file: LatentFile, item: MediaItem | None) -> _Pair | None:
        """None for a file that is refused."""
        header = self._header(file.path, self.scripts.latents)
        if header is None:
            return None
        complaint = latent_complaint(file, header, item, self.dataset, self.rules)
        self._refuse(file.path, complaint, self.scripts.latents)
        text = self._texts.get(text_path_of(file, self.rules.arch))
        return None if complaint else _Pair(file=file, header=header, text=text, item=item)

    def _header(self, path: Path, script: str) -> CacheHeader | None:
        try:
            return cache_header(path)
        except UserError as error:
            self.complaints.append(f"{error}: run {script} --skip_existing")
            return None

    def _item(self, pair: _Pair) -> CachedItem:
        path = text_path_of(pair.file, self.rules.arch)
        if both := sorted(set(pair.header.keys) & set(pair.text.keys)):
            expected, remedy = "each content in one of the two", "cache both again"
            self.complaints.append(UserError(str(path), f"{both[0]}, as in {pair.file.path.name}", expected, remedy))
        layout = Layout.of([pair.header, pair.text])
        return CachedItem(
            dataset=self.number, latents=pair.file.path, text=path, layout=self._layouts.setdefault(layout, layout)
        )

    # ---- refusing ----

    def _refuse(self, path: Path, complaint: Complaint | None, script: str) -> None:
        if complaint:
            remedy = f"run {script} {'--skip_existing' if complaint.is_noticed else 'without --skip_existing'}"
            expected = "a cache of the present sources and settings"
            self.complaints.append(UserError(str(path), complaint.reason, expected, remedy))

    def _refuse_doubles(self, pairs: Sequence[_Pair]) -> None:
        """The source was replaced, or the size changed, and the older file is still there."""
        first: dict[tuple, LatentFile] = {}
        for file in (pair.file for pair in pairs):
            other = first.setdefault((comparable(file.stem), file.crop, file.section), file)
            if other is not file:
                got = f"a second cache of the same {'clip' if self._is_video else 'image'} beside {other.path.name}"
                remedy = f"run {self.scripts.latents} --skip_existing, or remove one"
                self.complaints.append(UserError(str(file.path), got, "one", remedy))

    def _refuse_mixtures(self, pairs: Sequence[_Pair]) -> None:
        latents = {pair.file.path: pair.header for pair in pairs}
        odd: dict[Path, UserError] = {}  # the first reason is enough for a file

        def refuse(found: Mapping[Path, Mapping[str, str]], default: str, remedy: str) -> None:
            for path, got in _odd_ones(found, default):
                odd.setdefault(path, UserError(str(path), got, "caches that were made alike", f"run {remedy}"))

        for headers, script in ((latents, self.scripts.latents), (self._texts, self.scripts.texts)):
            contents = {path: _contents(header) for path, header in headers.items()}
            encoders = {path: self._encoders(header) for path, header in headers.items() if header.fingerprint}
            refuse(contents, "missing", f"{script} without --skip_existing")
            refuse(encoders, "not recorded", f"{script} --skip_existing")
        if hasattr(self.rules, "left_open"):
            settings = {path: self._left_open(path, header) for path, header in latents.items()}
            refuse(settings, "not recorded", f"{self.scripts.latents} without --skip_existing")
        self.complaints += odd.values()

    def _left_open(self, path: Path, header: CacheHeader) -> Mapping[str, str]:
        """What no data set file says, of our caches and of those without a fingerprint alike."""
        indices = {} if header.fingerprint else read_indices(path, header)
        return self.rules.left_open(header, indices)

    def _encoders(self, header: CacheHeader) -> dict[str, str]:
        """What the fingerprint says about the models: all that is neither of one item nor the data set's settings."""
        settings = self.rules.settings(self.dataset)
        return {k: v for k, v in header.fingerprint.items() if k not in settings and not OF_ONE_ITEM.fullmatch(k)}

    # ---- reporting ----

    def _report_sources(
        self, sources: Mapping[str, MediaItem], problems: Sequence[str], pairs: Sequence[_Pair]
    ) -> None:
        if not sources:
            reason = problems[0] if problems else "there are none"
            self._warn(f"none of its {self._kind} can be listed, so that caches are used as they are ({reason})")
            return
        if problems:
            self._warn(_counted(problems, "of its files or lines cannot be used", separator=" | "))
        cached = {comparable(file.stem) for file in self._files}
        if missing := [item.path.name for stem, item in sources.items() if stem not in cached]:
            what = f"of {len(sources)} {self._kind} have no latent cache and are not trained"
            self._warn(f"{_counted(missing, what)}; run {self.scripts.latents} --skip_existing")
        if orphans := [pair.file.path.name for pair in pairs if pair.item is None]:
            what = "latent caches belong to no item of the data set and are trained all the same"
            self._warn(f"{_counted(orphans, what)}; {self.scripts.latents} --skip_existing removes them")

    def _report_missing_parts(self, pairs: Sequence[_Pair]) -> None:
        if without := [pair.file.path.name for pair in pairs if not os.path.isfile(self._text_of(pair))]:
            what = "latent caches have no text cache and are not trained"
            self._warn(f"{_counted(without, what)}; run {self.scripts.texts} --skip_existing")
        by_stem: dict[str, list[_Pair]] = defaultdict(list)
        for pair in pairs if self._is_video else ():
            by_stem[pair.file.stem].append(pair)
        gaps = []
        for stem, same in by_stem.items():
            known = (num_source_frames(pair.header) for pair in same)
            num_frames = next((number for number in known if number is not None), None)
            missing = missing_clips([pair.file for pair in same], num_frames, self.dataset, self.rules)
            gaps += [f"{stem} {clip}" for clip in missing]
        if gaps:
            what = "clips or sections of cached videos have no cache and are not trained"
            self._warn(f"{_counted(gaps, what)}; run {self.scripts.latents} --skip_existing")

    def _text_of(self, pair: _Pair) -> Path:
        return text_path_of(pair.file, self.rules.arch)

    def _warn(self, text: str) -> None:
        logger.warning("%s: %s", self.dataset.where, one_line(text))


def _counted(names: Sequence[str], what: str, separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{len(names)} {what}: {separator.join(names[:NAMES_SHOWN])}{more}"


def _contents(header: CacheHeader) -> dict[str, str]:
    return {content: "of varying length" if content in header.varlen else "present" for content in header.keys}


def _odd_ones(found: Mapping[Path, Mapping[str, str]], default: str) -> Iterator[tuple[Path, str]]:
    """The files that say otherwise than most, with the first difference."""
    if not found:
        return
    counts = Counter(frozenset(values.items()) for values in found.values())
    usual = counts.most_common(1)[0][0]
    example = next(path for path, values in found.items() if values.items() == usual)
    for path, values in found.items():
        if values.items() != usual:
            here, there = dict(values), dict(usual)
            name = min(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            yield path, f"{name} is {here.get(name, default)} here, {there.get(name, default)} in {example.name}"
