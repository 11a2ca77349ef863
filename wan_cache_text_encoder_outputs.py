"""Caches the captions that Wan2.1 is trained on, as its text encoder sees them.

    python wan_cache_text_encoder_outputs.py --dataset_config data.toml --t5 models_t5_umt5-xxl-enc-bf16.pth
        --skip_existing

On several GPUs: accelerate launch.
"""

import sys
from collections.abc import Sequence

from common.flags import run_script
from options.flags_wan_cache import WanCacheTextsFlags


def cache_texts(flags: WanCacheTextsFlags) -> int:
    from wan.cache_texts import run

    return run(flags)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(WanCacheTextsFlags, cache_texts, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
