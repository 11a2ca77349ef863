"""Caches the captions that FramePack is trained on, as its two text encoders see them.

    python fpack_cache_text_encoder_outputs.py --dataset_config data.toml --text_encoder1 llama.safetensors
        --text_encoder2 clip_l.safetensors --skip_existing

On several GPUs: accelerate launch.
"""

import sys
from collections.abc import Sequence

from common.flags import run_script
from options.flags_fpack_cache import FramePackCacheTextsFlags


def cache_texts(flags: FramePackCacheTextsFlags) -> int:
    from frame_pack.cache_texts import run

    return run(flags)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(FramePackCacheTextsFlags, cache_texts, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
