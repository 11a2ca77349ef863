"""A run of `fpack_cache_text_encoder_outputs.py`, from flags to cache files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.processes import Processes, joined_processes
from dataset.config import DatasetConfig, load_dataset_config
from frame_pack.cache_latents import caching_options
from frame_pack.caching import FramePackCacheRules
from options.flags_cache import check_cache_flags
from options.flags_fpack_cache import FramePackCacheTextsFlags

if TYPE_CHECKING:
    from torch import Tensor

NUM_ROWS = 512
"""Of LLaMA's states in a cache, as in the incumbent's; a mask tells the valid ones."""


def run(flags: FramePackCacheTextsFlags) -> int:
    """Checks everything that needs no weights, then encodes and reports.

    Returns:
        The exit code: 1 when something failed.
    """
    check_cache_flags(flags.cache)
    config = load_dataset_config(flags.cache.dataset_config)
    with joined_processes() as processes:
        return _encode(flags, config, processes)


def _encode(flags: FramePackCacheTextsFlags, config: DatasetConfig, processes: Processes) -> int:
    from common.device import pick_device, pick_dtype
    from common.weights import check_names_and_shapes, fingerprint
    from dataset.text_caching import cache_texts
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
        tokenizer_fingerprint,
    )

    models = flags.models
    device = pick_device(processes.device_name(flags.cache.device))
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
    options = caching_options(flags.cache)
    return cache_texts(config, FramePackCacheRules.arch, open_encoder, encoders, options, processes)


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
