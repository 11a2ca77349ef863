"""A run of `fpack_cache_text_encoder_outputs.py`, from flags to cache files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from dataset.caching_run import run_texts
from dataset.fingerprints import Fingerprint
from frame_pack.caching import FramePackCacheRules
from options.flags_fpack_cache import FramePackCacheTextsFlags

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dataset.text_caching import OpenEncoder

NUM_ROWS = 512
"""Of LLaMA's states in a cache, as in the incumbent's; a mask tells the valid ones."""


def run(flags: FramePackCacheTextsFlags) -> int:
    """See `dataset.caching_run.run_texts`."""
    return run_texts(flags.cache, FramePackCacheRules.arch, partial(_open_models, flags))


def _open_models(flags: FramePackCacheTextsFlags, device: torch.device) -> tuple[OpenEncoder, Fingerprint]:
    from common.device import pick_dtype
    from common.tokenizers import tokenizer_fingerprint
    from common.weights import check_names_and_shapes, fingerprint
    from hunyuan_model.text_encoders import (
        build_clip,
        build_llama,
        encode_clip,
        encode_llama,
        find_tokenizer,
        load_clip,
        load_llama,
        load_tokenizer,
        open_clip,
        open_llama,
    )

    models = flags.models
    dtype = pick_dtype(None, on_gpu="float16", device=device)
    llama, clip = open_llama(models.text_encoder1), open_clip(models.text_encoder2)
    check_names_and_shapes(build_llama(llama), llama)
    check_names_and_shapes(build_clip(clip), clip)
    tokenizers = (("llama", models.tokenizer1, llama), ("clip", models.tokenizer2, clip))
    places = [find_tokenizer(kind, given=given, checkpoint=encoder) for kind, given, encoder in tokenizers]

    @contextmanager
    def open_encoder() -> Iterator:
        words = [load_tokenizer(kind, given=given, checkpoint=encoder) for kind, given, encoder in tokenizers]
        place = {"dtype": dtype, "device": device}
        llama_model, clip_model = load_llama(llama, fp8=models.fp8_llm, **place), load_clip(clip, **place)

        def encode(caption: str) -> Mapping[str, Tensor]:
            states = encode_llama(llama_model, words[0], caption)
            return text_tensors(states, encode_clip(clip_model, words[1], caption))

        yield encode

    encoders = {
        "text_encoder1": fingerprint(llama),
        "text_encoder2": fingerprint(clip),
        "tokenizer1": tokenizer_fingerprint(places[0]),
        "tokenizer2": tokenizer_fingerprint(places[1]),
        "encoder_dtype": str(dtype).removeprefix("torch.") + (", LLaMA in fp8" if models.fp8_llm else ""),
    }
    return open_encoder, encoders


def text_tensors(states: Tensor, pooled: Tensor) -> dict[str, Tensor]:
    """What a text cache holds.

    Args:
        states: (L, text_width) LLaMA's valid rows.
        pooled: (pooled_width,) CLIP's.
    """
    import torch

    rows = torch.zeros(NUM_ROWS, states.shape[1], dtype=torch.float16)
    rows[: len(states)] = states.to("cpu", torch.float16)
    mask = torch.arange(NUM_ROWS) < len(states)
    return {"llama_vec": rows, "llama_attention_mask": mask, "clip_l_pooler": pooled.to("cpu", torch.float16)}
