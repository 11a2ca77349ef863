"""What the benchmarks of FramePack's transformer have in common as commands: sizes, checks, and how they end."""

import argparse
import sys
from collections.abc import Callable

from frame_pack.config import FramePackConfig
from options.errors import UserError
from options.geometry import VAE_STRIDE

HEAD_DIM = FramePackConfig.head_dim


def config_of(options: argparse.Namespace) -> FramePackConfig:
    """The transformer that `--width`, `--double_blocks` and `--single_blocks` ask for."""
    return FramePackConfig(
        width=options.width,
        mlp_width=4 * options.width,
        num_double_blocks=options.double_blocks,
        num_single_blocks=options.single_blocks,
    )


def check_sizes(parser: argparse.ArgumentParser, options: argparse.Namespace, *counts: str) -> None:
    """Ends the command for a width or a size that no model has, or for nothing of what `counts` names."""
    if options.width % HEAD_DIM or options.size % (2 * VAE_STRIDE):
        parser.error(f"expected a width in steps of {HEAD_DIM} and a size in steps of {2 * VAE_STRIDE}")
    if min(getattr(options, name) for name in ("width", "size", *counts)) < 1:
        parser.error("expected at least one of everything")


def printed(text: Callable[[], str]) -> int:
    """Prints a result, or the error of a user; the exit code."""
    try:
        sys.stdout.write(f"{text()}\n")
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0
