"""Caches what FramePack is trained on: the latents of images or videos with everything that stands around them.

One-frame training, on images with control images:

    python fpack_cache_latents.py --dataset_config data.toml --vae hunyuan_vae.safetensors
        --image_encoder sigclip_vision.safetensors --one_frame --one_frame_no_2x --one_frame_no_4x --skip_existing

Videos: leave out the options with one_frame; for FramePack-F1 add --f1. Data set files: docs/dataset.md.
With --preview FOLDER sheets are drawn that show what the model will see. On several GPUs: accelerate launch.
"""

import sys
from collections.abc import Sequence

from common.flags import run_script
from options.flags_fpack_cache import FramePackCacheLatentsFlags


def cache_latents(flags: FramePackCacheLatentsFlags) -> int:
    from frame_pack.cache_latents import run

    return run(flags)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(FramePackCacheLatentsFlags, cache_latents, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
