"""HunyuanVideo's two text encoders: LLaMA-3 8B for the words, CLIP-L for one vector, through transformers.

LLaMA reads the prompt inside a chat template. Its rows are taken three hidden states before the end, after the
template's prefix, so that two layers and the last norm are never run and are not loaded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from common import tokenizers
from common.checkpoint_kinds import CLIP_L, LLAMA, expect_kind
from common.tokenizers import TokenizerPlace
from common.weights import Checkpoint, check_names_and_shapes, empty_model, fill, load_weights, open_checkpoint
from modules.fp8_weights import common_names, expect_codes, plan_fp8

if TYPE_CHECKING:
    from transformers import CLIPTextModel, LlamaModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SYSTEM_PROMPT = (
    "Describe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:"
)
"""As published: no spaces between the numbered items."""
PREFIX = "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
SUFFIX = "<|eot_id|>"
MAX_LLAMA_TOKENS = 256
"""Of the prompt and the suffix; the prefix comes on top."""
LLAMA_LAYERS_LEFT_OUT = 2

LLAMA_HEAD_DIM = 128
LLAMA_FP8_LAYERS = re.compile(r"layers\.\d+\..+_proj")
LLAMA_PUBLISHED = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
LLAMA_FROM_CONFIG = (*LLAMA_PUBLISHED, "rope_parameters", "rope_scaling")
CLIP_HEAD_DIM = 64
CLIP_PUBLISHED = {"hidden_act": "quick_gelu", "eos_token_id": 2, "layer_norm_eps": 1e-5}


TOKENIZERS = {
    "llama": TokenizerPlace(
        flag="--tokenizer1",
        subfolders=("tokenizer",),
        encoder_subfolder="text_encoder",
        hub="hunyuanvideo-community/HunyuanVideo/tokenizer",
        embedding="embed_tokens.weight",
    ),
    "clip": TokenizerPlace(
        flag="--tokenizer2",
        subfolders=("tokenizer_2",),
        encoder_subfolder="text_encoder_2",
        hub="hunyuanvideo-community/HunyuanVideo/tokenizer_2",
        embedding="embeddings.token_embedding.weight",
    ),
}


def open_llama(path: str | Path, *, flag: str = "--text_encoder1", memmap: bool = True) -> Checkpoint:
    """Reads the header of a LLaMA: a file (ComfyUI's too), the first shard, or a snapshot folder with `text_encoder/`.

    Raises:
        UserError: nothing there, a damaged file, a missing shard, or not a LLaMA.
    """
    checkpoint = open_checkpoint(path, flag=flag, subfolder=TOKENIZERS["llama"].encoder_subfolder, memmap=memmap)
    expect_kind(checkpoint, LLAMA)
    return common_names(checkpoint.rename(_llama_name))


def open_clip(path: str | Path, *, flag: str = "--text_encoder2", memmap: bool = True) -> Checkpoint:
    """Reads the header of a CLIP-L text encoder: a file, or a snapshot folder with `text_encoder_2/`.

    Raises:
        UserError: nothing there, a damaged file, or not a CLIP text encoder.
    """
    checkpoint = open_checkpoint(path, flag=flag, subfolder=TOKENIZERS["clip"].encoder_subfolder, memmap=memmap)
    expect_kind(checkpoint, CLIP_L)
    return checkpoint.rename(_clip_name)


def _llama_name(name: str) -> str | None:
    """Drops what only a language model's head or an old transformers wrote."""
    if name == "tokenizer" or name.startswith("lm_head.") or name.endswith(".rotary_emb.inv_freq"):
        return None
    return name.removeprefix("model.")


def _clip_name(name: str) -> str | None:
    """Drops the projection of the joint CLIP model and the position numbers that an old transformers wrote."""
    name = name.removeprefix("text_model.")
    extras = ("text_projection", "text_projection.weight", "logit_scale", "embeddings.position_ids")
    return None if name in extras else name


def load_llama(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str, fp8: bool = False
) -> LlamaModel:
    """Builds LLaMA and loads it strictly, up to the layer that `encode_llama` takes its rows from.

    Its last hidden state is the whole model's `hidden_states[-3]`.

    Args:
        fp8: its linear layers keep their weights in 8 bits with scales; embedding and norms, which are small or looked
            up by row, stay. Weights that are in 8 bits in the file stay so in any case.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape, also in the layers that are left out.
    """
    model = build_llama(checkpoint)
    check_names_and_shapes(model, checkpoint)
    model.layers = model.layers[:-LLAMA_LAYERS_LEFT_OUT]
    model.config.num_hidden_layers = len(model.layers)
    model.norm = nn.Identity()
    used = model.state_dict().keys()
    part = checkpoint.rename(lambda name: name if name in used else None)
    plan = plan_fp8(model, part, mode="scaled" if fp8 else "off", layers=LLAMA_FP8_LAYERS)
    plan.apply_to(model)
    fill(model, part, plan.read(dtype=dtype, device=device), device)
    return model


def load_clip(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str) -> CLIPTextModel:
    """Builds CLIP's text model and loads it strictly.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    model = build_clip(checkpoint)
    load_weights(model, checkpoint, dtype=dtype, device=device)
    return model


def build_llama(checkpoint: Checkpoint) -> LlamaModel:
    """LLaMA without its weights, all layers, for comparison with the header."""
    model = empty_model(checkpoint, partial(_build_llama, checkpoint))
    expect_codes(model, checkpoint)
    return model


def build_clip(checkpoint: Checkpoint) -> CLIPTextModel:
    """CLIP's text model without its weights, for comparison with the header."""
    return empty_model(checkpoint, partial(_build_clip, checkpoint))


def _build_llama(checkpoint: Checkpoint) -> LlamaModel:
    from transformers import LlamaConfig, LlamaModel

    config = checkpoint.config if checkpoint.config.get("model_type") == "llama" else {}
    vocab_size, hidden_size = checkpoint.shape("embed_tokens.weight", 2)
    head_dim = _head_dim(config, LLAMA_HEAD_DIM)
    settings = LLAMA_PUBLISHED | {key: config[key] for key in LLAMA_FROM_CONFIG if config.get(key) is not None}
    if "rope_parameters" in settings:
        del settings["rope_theta"]  # transformers 5 keeps it in there
    return LlamaModel(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            head_dim=head_dim,
            num_hidden_layers=checkpoint.count("layers.{}.self_attn.q_proj.weight"),
            num_attention_heads=checkpoint.shape("layers.0.self_attn.q_proj.weight", 2)[0] // head_dim,
            num_key_value_heads=checkpoint.shape("layers.0.self_attn.k_proj.weight", 2)[0] // head_dim,
            intermediate_size=checkpoint.shape("layers.0.mlp.gate_proj.weight", 2)[0],
            **settings,
        )
    )


def _build_clip(checkpoint: Checkpoint) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = checkpoint.config if checkpoint.config.get("model_type") == "clip_text_model" else {}
    vocab_size, hidden_size = checkpoint.shape("embeddings.token_embedding.weight", 2)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            max_position_embeddings=checkpoint.shape("embeddings.position_embedding.weight", 2)[0],
            num_hidden_layers=checkpoint.count("encoder.layers.{}.self_attn.q_proj.weight"),
            num_attention_heads=hidden_size // _head_dim(config, CLIP_HEAD_DIM),
            intermediate_size=checkpoint.shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
            **{key: config.get(key, published) for key, published in CLIP_PUBLISHED.items()},
        )
    )


def _head_dim(config: Mapping, published: int) -> int:
    if config.get("head_dim"):
        return config["head_dim"]
    heads = config.get("num_attention_heads")
    return config["hidden_size"] // heads if heads and config.get("hidden_size") else published


def find_tokenizer(kind: Literal["llama", "clip"], *, given: str | None, checkpoint: Checkpoint) -> str:
    """Where `load_tokenizer` will look for an encoder's tokenizer; see `common.tokenizers`."""
    return tokenizers.find_tokenizer(TOKENIZERS[kind], given=given, checkpoint=checkpoint)


def load_tokenizer(
    kind: Literal["llama", "clip"], *, given: str | None, checkpoint: Checkpoint
) -> PreTrainedTokenizerBase:
    """The tokenizer of an encoder; see `common.tokenizers`."""
    return tokenizers.load_tokenizer(TOKENIZERS[kind], given=given, checkpoint=checkpoint)


@torch.no_grad()
def encode_llama(
    model: LlamaModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, system_prompt: str | None = None
) -> Tensor:
    """LLaMA's rows for a prompt: those after the template's prefix, (L, width) with L <= 256, no padding.

    LLaMA is causal, so leaving out the padding behind the prompt changes no row.

    Args:
        model: from `load_llama`.
        system_prompt: instead of the published one.

    Returns:
        In the model's type on its device.
    """
    ids, num_prefix = prompt_tokens(tokenizer, prompt, system_prompt=system_prompt)
    hidden = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).last_hidden_state
    return hidden[0, num_prefix:]


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, system_prompt: str | None = None
) -> tuple[list[int], int]:
    """What LLaMA reads, and how much of it is the template's prefix. See `encode_llama`."""
    prefix = PREFIX.format(system_prompt if system_prompt is not None else SYSTEM_PROMPT)
    num_prefix = len(tokenizer(prefix)["input_ids"])
    text, limit = prefix + prompt + SUFFIX, num_prefix + MAX_LLAMA_TOKENS
    ids = tokenizer(text)["input_ids"]
    if len(ids) > limit:
        logger.warning("the prompt has %d tokens; the first %d are used", len(ids) - num_prefix, MAX_LLAMA_TOKENS)
        ids = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
    return ids, num_prefix


@torch.no_grad()
def encode_clip(model: CLIPTextModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """CLIP's pooled output (width,) for a prompt, padded and cut to 77 tokens; in the model's type on its device."""
    length = model.config.max_position_embeddings
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=length)["input_ids"]
    return model(input_ids=torch.tensor([ids], device=model.device)).pooler_output[0]
