"""Averages the LoRAs that one training saved, the later ones counting more: often smoother than the last one alone.

Each file in its turn replaces 5 % of the average:

    python lora_post_hoc_ema.py saved/mine-*.safetensors --output_file mine_ema.safetensors

10 % at the second file, 1 % at the last:

    python lora_post_hoc_ema.py saved/mine-*.safetensors --beta 0.9 --beta2 0.99 --output_file mine_ema.safetensors

An average over about a fifth of the training (power function EMA, 0.05 to 0.28; smaller means later files only):

    python lora_post_hoc_ema.py saved/mine-*.safetensors --sigma_rel 0.2 --output_file mine_ema.safetensors

The weight of each file in the result is logged. Files are taken oldest first; copying can change modification times:
with --no_sort they are taken as given.
"""

import sys
from collections.abc import Sequence

from common.flags import run_script
from options.flags_post_hoc_ema import PostHocEmaFlags


def average(flags: PostHocEmaFlags) -> None:
    from networks.post_hoc_ema import average_files

    average_files(flags)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(PostHocEmaFlags, average, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
