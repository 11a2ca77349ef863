"""One sheet for each prompt: what the LoRA made of it at every step that samples were made at."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from common.files import atomic_file
from common.media import open_image
from common.sheets import MAX_ASPECT, contact_sheet
from generation.outputs import SETTINGS_KEY, read_settings
from options.errors import one_line

logger = logging.getLogger(__name__)

MAX_CELLS = 40
COLUMNS, CELL_WIDTH = 8, 256
MAX_TITLE = 160
TRAINING_KEY = "training"
"""Where a sample's settings say which run made it, and at which step."""


def sample_name(name: str, number: int, *, step: int, epoch: int | None, time: str, seed: int) -> str:
    """The file name of a sample, without suffix: `my_lora_e000002_00_20250417120000_42`.

    Args:
        number: of the prompt, from 0.
        epoch: the one that ended with this step; it then stands in the step's place.
        time: 14 digits.
    """
    when = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
    return f"{name}_{when}_{number:02d}_{time}_{seed}"


def earlier_samples(folder: Path, name: str, number: int, *, session: int) -> dict[int, Path]:
    """The samples that a run has made of a prompt, by step; of several at one step the latest."""
    pattern = re.compile(rf"{re.escape(name)}_e?\d{{6,}}_{number:02d}_(\d{{14}})_\d+(?:_000\.png|\.mp4)")
    matches = [match for path in folder.iterdir() if (match := pattern.fullmatch(path.name))] if folder.is_dir() else []
    found = {}
    for match in sorted(matches, key=lambda match: match[1]):
        path = folder / match[0]
        made = _made_at(path)
        if made.get("session") == session and isinstance(made.get("step"), int):
            found[made["step"]] = path
    return found


def thinned(steps: Sequence[int]) -> list[int]:
    """At most `MAX_CELLS` of them at even distances, the first and the last always.

    What is left out stays out when more are added, so that no picture has to be read again.
    """
    stride = 1
    while len(kept := list(dict.fromkeys([*steps[::stride], *steps[-1:]]))) > MAX_CELLS:
        stride *= 2
    return kept


class SampleSheet:
    """`{name}_{number}_sheet.png`, drawn anew with every sample.

    Args:
        number: of the prompt, from 0.
    """

    def __init__(self, folder: Path, name: str, number: int, *, title: str) -> None:
        self.path = folder / f"{name}_{number:02d}_sheet.png"
        self._name, self._number = name, number
        self._title = title if len(title) <= MAX_TITLE else f"{title[: MAX_TITLE - 3]}..."
        self._samples: dict[int, Path] | None = None
        self._pictures: dict[int, Image.Image] = {}

    def add(self, sample: Path, *, step: int, session: int) -> None:
        """Takes a sample in, beside the earlier ones of this run.

        Later ones are left out: they were made before the run was set back to an earlier state.
        """
        if self._samples is None:
            self._samples = earlier_samples(self.path.parent, self._name, self._number, session=session)
        self._samples = {other: path for other, path in self._samples.items() if other < step} | {step: sample}
        kept = thinned(sorted(self._samples))
        pictures = {other: self._pictures.get(other) or _picture(self._samples[other]) for other in kept[:-1]}
        pictures[step] = _picture(sample)
        self._pictures = {step: picture for step, picture in pictures.items() if picture is not None}
        cells = [(f"step {step}", picture) for step, picture in self._pictures.items()]
        if cells:
            sheet = contact_sheet(cells, columns=COLUMNS, cell_width=CELL_WIDTH, title=self._title)
            with atomic_file(self.path) as temporary:
                sheet.save(temporary, format="PNG")


def _made_at(path: Path) -> Mapping[str, object]:
    """What a sample says about the training that made it; nothing if it does not, or is damaged."""
    try:
        made = json.loads(_settings(path))[TRAINING_KEY]
    except Exception:  # whatever a reader stumbles over: it is none of ours
        return {}
    return made if isinstance(made, Mapping) else {}


def _settings(path: Path) -> str | None:
    if path.suffix != ".png":
        return read_settings(path, flag="sample")
    with Image.open(path) as image:  # only the header: there may be hundreds
        return image.info.get(SETTINGS_KEY)


def _picture(path: Path) -> Image.Image | None:
    """A sample at the size of a cell, of a video its middle frame; None when it cannot be read."""
    try:
        picture = _middle_frame(path) if path.suffix == ".mp4" else open_image(path, flag="sample").convert("RGB")
    except Exception as error:  # the others are worth a sheet still
        logger.warning("%s is left out of the sheet: %s", path.name, one_line(str(error)))
        return None
    picture.thumbnail((CELL_WIDTH, int(CELL_WIDTH * MAX_ASPECT)))
    return picture


def _middle_frame(path: Path) -> Image.Image:
    import av

    with path.open("rb") as file, av.open(file) as container:
        stream = container.streams.video[0]
        return next(islice(container.decode(stream), stream.frames // 2, None)).to_image()
