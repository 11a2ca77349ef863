"""A run of `wan_cache_text_encoder_outputs.py`, from flags to cache files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from dataset.caching_run import run_texts
from dataset.fingerprints import Fingerprint
from options.flags_wan_cache import WanCacheTextsFlags
from wan.caching import WanCacheRules

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dataset.text_caching import OpenEncoder

TEXT = "t5"
"""The content of a text cache: (L, text_width) bfloat16, the rows that the prompt has."""


def run(flags: WanCacheTextsFlags) -> int:
    """See `dataset.caching_run.run_texts`."""
    return run_texts(flags.cache, WanCacheRules.arch, partial(_open_models, flags), varlen=(TEXT,))


def _open_models(flags: WanCacheTextsFlags, device: torch.device) -> tuple[OpenEncoder, Fingerprint]:
    import torch

    from common.device import pick_dtype
    from common.tokenizers import tokenizer_fingerprint
    from common.weights import check_names_and_shapes, fingerprint
    from wan.text_encoder import build_t5, encode_t5, find_tokenizer, load_t5, load_tokenizer, open_t5

    models = flags.models
    dtype = pick_dtype(None, on_gpu="bfloat16", device=device)
    t5 = open_t5(models.t5)
    check_names_and_shapes(build_t5(t5), t5)
    source = find_tokenizer(given=models.t5_tokenizer, checkpoint=t5)

    @contextmanager
    def open_encoder() -> Iterator:
        tokenizer = load_tokenizer(given=models.t5_tokenizer, checkpoint=t5)
        model = load_t5(t5, dtype=dtype, device=device, fp8=models.fp8_t5)

        def encode(caption: str) -> Mapping[str, Tensor]:
            return {TEXT: encode_t5(model, tokenizer, caption).to("cpu", torch.bfloat16)}

        yield encode

    encoders = {
        "t5": fingerprint(t5),
        "t5_tokenizer": tokenizer_fingerprint(source),
        "encoder_dtype": str(dtype).removeprefix("torch.") + (", in fp8" if models.fp8_t5 else ""),
    }
    return open_encoder, encoders
