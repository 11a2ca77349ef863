"""`--show_timesteps`: how often which timestep is drawn, and how much its loss weighs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common.files import atomic_file
from common.plots import Bars, Chart, Line, draw_chart, stacked
from dataset.epochs import ItemKey
from modules.flow_matching import NUM_TIMESTEPS
from options.flags_timesteps import TimestepFlags, settings_read
from options.geometry import VAE_STRIDE
from training.timesteps import draw_sigmas, item_seed, loss_weights, stratified_quantiles

logger = logging.getLogger(__name__)

FILE_NAME = "timesteps.png"
NUM_DRAWS = 50_000
NUM_BARS, NUM_ROWS = 50, 20
"""Intervals of the picture and of the text."""
ROW_WIDTH = 50
USUAL_LATENT_SIZE = 80, 80
"""640x640 pixels, at which FramePack is at home."""


def show_timesteps(
    flags: TimestepFlags,
    *,
    folder: str | Path | None,
    latent_size: tuple[int, int] = USUAL_LATENT_SIZE,
    num_draws: int = NUM_DRAWS,
) -> None:
    """Does what `--show_timesteps` asks for; needs neither weights nor data.

    Args:
        flags: that have been checked.
        folder: where the picture goes; None is the current folder.
        latent_size: (h, w), which some methods look at.
    """
    sigmas = _sigmas_of_an_epoch(flags, num_draws, latent_size)
    title = _title(flags, latent_size)
    if flags.show_timesteps == "console":
        sys.stdout.write("\n".join([title, _settings(flags), *_rows(flags, sigmas)]) + "\n")
        return
    path = Path(folder or ".") / FILE_NAME
    with atomic_file(path) as temporary:
        _picture(flags, sigmas, title).save(temporary)
    logger.info("timesteps are shown in %s", path)


def _sigmas_of_an_epoch(flags: TimestepFlags, num_draws: int, latent_size: tuple[int, int]) -> Tensor:
    keys = [ItemKey(dataset=0, name=str(number), repeat=0) for number in range(num_draws)]
    quantiles = None
    if flags.num_strata:
        found = stratified_quantiles(keys, seed=0, epoch=0, num_buckets=flags.num_strata)
        quantiles = [found[key] for key in keys]
    seeds = [item_seed(0, 0, key) for key in keys]
    return draw_sigmas(flags, seeds, latent_size=latent_size, quantiles=quantiles)


def _title(flags: TimestepFlags, latent_size: tuple[int, int]) -> str:
    height, width = (side * VAE_STRIDE for side in latent_size)
    return f"Timesteps of {flags.timestep_sampling}, drawn for {width}x{height}"


def _settings(flags: TimestepFlags) -> str:
    """What the method reads, as it would be written in a command."""
    left_out = ("timestep_sampling", "show_timesteps")
    values = {name: getattr(flags, name) for name in settings_read(flags) if name not in left_out}
    written = [name if value is True else f"{name} {value}" for name, value in values.items() if value is not None]
    return ", ".join(text for text in written if not text.endswith(" False"))


def _shares(sigmas: Tensor, num: int) -> list[float]:
    """Percentages of the draws in `num` equal intervals; timesteps on an edge belong to the interval below it."""
    timesteps = (NUM_TIMESTEPS * sigmas.double()).round(decimals=3)  # whole ones, which are common, are whole again
    edges = torch.arange(1, num, dtype=torch.float64) * (NUM_TIMESTEPS / num)
    counts = torch.bincount(torch.bucketize(timesteps, edges), minlength=num)
    return (100 * counts / len(sigmas)).tolist()


def _middles(num: int) -> Tensor:
    return (torch.arange(num) + 0.5) / num


def _weights(flags: TimestepFlags, sigmas: Tensor) -> Tensor:
    weights = loss_weights(flags.weighting_scheme, sigmas)
    return torch.ones_like(sigmas) if weights is None else weights


def _weighting(flags: TimestepFlags) -> str:
    has_weights = loss_weights(flags.weighting_scheme, torch.ones(1)) is not None
    return flags.weighting_scheme if has_weights else f"{flags.weighting_scheme}: all timesteps weigh the same"


def _rows(flags: TimestepFlags, sigmas: Tensor) -> Sequence[str]:
    """A line for each interval, in ASCII, which every console shows."""
    shares, weights = _shares(sigmas, NUM_ROWS), _weights(flags, _middles(NUM_ROWS)).tolist()
    step, most = NUM_TIMESTEPS // NUM_ROWS, max(shares)
    rows = [f"{'timesteps':>11}  {'draws':>6}  {'loss weight':>11}"]
    for number, (share, weight) in enumerate(zip(shares, weights, strict=True)):
        interval = f"{number * step:>4} - {(number + 1) * step:>4}"
        bar = "#" * round(ROW_WIDTH * share / most)
        rows.append(f"{interval:>11}  {share:5.1f}%  {weight:11.4g}  {bar}".rstrip())
    return rows


def _picture(flags: TimestepFlags, sigmas: Tensor, title: str) -> Image.Image:
    edges = torch.linspace(0, NUM_TIMESTEPS, NUM_BARS + 1).tolist()
    scale = _middles(2 * NUM_TIMESTEPS)
    weights = _weights(flags, scale)
    axis = {"x_label": "timestep (0 is clean, 1000 is noise)", "x_range": (0, NUM_TIMESTEPS)}
    draws = Chart(
        title=title,
        y_label=f"% of {len(sigmas):,} draws, in steps of {NUM_TIMESTEPS // NUM_BARS}",
        layers=[Bars(label="", edges=edges, heights=_shares(sigmas, NUM_BARS))],
        caption=_settings(flags),
        **axis,
    )
    weighting = Chart(
        title=f"Loss weights of {_weighting(flags)}",
        y_label="weight of the loss",
        layers=[Line(label="", points=list(zip((NUM_TIMESTEPS * scale).tolist(), weights.tolist(), strict=True)))],
        is_logarithmic=bool(weights.max() > 100 * weights.min()),
        **axis,
    )
    return stacked([draw_chart(draws), draw_chart(weighting, size=(900, 340))])
