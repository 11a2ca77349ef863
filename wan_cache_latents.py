"""Caches what Wan2.1 is trained on: the latents of images or videos with the pictures that stand beside them.

One-frame training, on images with control images:

    python wan_cache_latents.py --dataset_config data.toml --vae Wan2.1_VAE.pth
        --clip models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth --one_frame --skip_existing

Image-to-video: --clip without --one_frame; first and last frame: add --flf2v; text-to-video and text-to-image: neither.
Control videos of a data set, for Fun-Control, are cached with them. Data set files: docs/dataset.md.
With --preview FOLDER sheets are drawn that show what the model will see. On several GPUs: accelerate launch.
"""

import sys
from collections.abc import Sequence

from common.flags import run_script
from options.flags_wan_cache import WanCacheLatentsFlags


def cache_latents(flags: WanCacheLatentsFlags) -> int:
    from wan.cache_latents import run

    return run(flags)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(WanCacheLatentsFlags, cache_latents, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
