"""UMT5-XXL, which reads Wan's prompts, through transformers: its encoder alone, from any of the published layouts."""

from __future__ import annotations

import html
import logging
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common import tokenizers
from common.checkpoint_kinds import UMT5, expect_kind
from common.tokenizers import TokenizerPlace
from common.weights import Checkpoint, check_names_and_shapes, empty_model, fill, open_checkpoint
from modules.fp8 import Fp8Linear
from modules.fp8_weights import common_names, expect_codes, plan_fp8

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.models.umt5.modeling_umt5 import UMT5Stack

logger = logging.getLogger(__name__)

MAX_TOKENS = 512
"""Of a prompt, with the end token."""
T5_TOKENIZER = TokenizerPlace(
    flag="--t5_tokenizer",
    subfolders=("google/umt5-xxl", "tokenizer"),
    encoder_subfolder="text_encoder",
    hub="Wan-AI/Wan2.1-T2V-14B/google/umt5-xxl",
    embedding="embed_tokens.weight",
)
FP8_LAYERS = re.compile(r"block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.w\w+)")
PUBLISHED = {
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}

BLOCK = re.compile(r"blocks\.(?P<index>\d+)\.(?P<layer>.+)")
LAYERS = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{name}": f"layer.0.SelfAttention.{name}" for name in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
"""Parts of a block by their official names and by transformers'."""
OTHERS = {"token_embedding": "embed_tokens", "shared": "embed_tokens", "norm": "final_layer_norm"}
LEFT_OUT = ("decoder.", "lm_head.", "spiece_model")
"""The rest of the whole model, and the tokenizer that ComfyUI puts into the file."""


def open_t5(path: str | Path, *, flag: str = "--t5", memmap: bool = True) -> Checkpoint:
    """Reads the header of a UMT5: the official `.pth`, a file in its or in transformers' layout, or a snapshot folder.

    Returns:
        With the names of transformers' encoder, `embed_tokens.weight` for example.

    Raises:
        UserError: nothing there, a damaged file, a missing shard, or not a UMT5.
    """
    checkpoint = open_checkpoint(path, flag=flag, subfolder=T5_TOKENIZER.encoder_subfolder, memmap=memmap)
    expect_kind(checkpoint, UMT5)
    return common_names(checkpoint.rename(_transformers_name))


def _transformers_name(name: str) -> str | None:
    """The name in transformers' encoder; None for what is none of it."""
    if name.startswith(LEFT_OUT):
        return None
    module, _, leaf = name.removeprefix("encoder.").rpartition(".")
    if block := BLOCK.fullmatch(module):
        module = f"block.{block['index']}.{LAYERS.get(block['layer'], block['layer'])}"
    return f"{OTHERS.get(module, module)}.{leaf}" if module else leaf


def load_t5(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str, fp8: bool = False) -> UMT5Stack:
    """Builds the encoder and loads it strictly.

    Args:
        fp8: its linear layers keep their weights in 8 bits with scales; embedding, norms and position biases stay.
            Weights that are in 8 bits in the file stay so in any case.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    model = build_t5(checkpoint)
    check_names_and_shapes(model, checkpoint)
    plan = plan_fp8(model, checkpoint, mode="scaled" if fp8 else "off", layers=FP8_LAYERS)
    plan.apply_to(model)
    fill(model, checkpoint, plan.read(dtype=dtype, device=device), device)
    for block in model.block:
        feed_forward = block.layer[-1].DenseReluDense
        if isinstance(feed_forward.wo, Fp8Linear):
            feed_forward.forward = partial(_feed_forward, feed_forward)
    return model


def _feed_forward(module: nn.Module, hidden: Tensor) -> Tensor:
    """That of transformers without its last cast, which would bring the activations into the type of the codes."""
    return module.wo(module.act(module.wi_0(hidden)) * module.wi_1(hidden))


def build_t5(checkpoint: Checkpoint) -> UMT5Stack:
    """The encoder without its weights, for comparison with the header."""
    model = empty_model(checkpoint, partial(_build, checkpoint))
    expect_codes(model, checkpoint)
    return model


def _build(checkpoint: Checkpoint) -> UMT5Stack:
    from transformers import UMT5Config, UMT5EncoderModel

    config = checkpoint.config if checkpoint.config.get("model_type") == "umt5" else {}
    vocab_size, width = checkpoint.shape("embed_tokens.weight", 2)
    attention, feed_forward = "block.0.layer.0.SelfAttention", "block.0.layer.1.DenseReluDense"
    num_buckets, num_heads = checkpoint.shape(f"{attention}.relative_attention_bias.weight", 2)
    settings = UMT5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=checkpoint.shape(f"{attention}.q.weight", 2)[0] // num_heads,
        d_ff=checkpoint.shape(f"{feed_forward}.wo.weight", 2)[1],
        num_layers=checkpoint.count("block.{}.layer.0.SelfAttention.q.weight"),
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
        **{key: config.get(key, published) for key, published in PUBLISHED.items()},
    )
    return UMT5EncoderModel(settings).encoder


def find_tokenizer(*, given: str | None, checkpoint: Checkpoint) -> str:
    """Where `load_tokenizer` will look for UMT5's tokenizer; see `common.tokenizers`."""
    return tokenizers.find_tokenizer(T5_TOKENIZER, given=given, checkpoint=checkpoint)


def load_tokenizer(*, given: str | None, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """UMT5's tokenizer; see `common.tokenizers`."""
    return tokenizers.load_tokenizer(T5_TOKENIZER, given=given, checkpoint=checkpoint)


def clean_prompt(text: str) -> str:
    """The prompt as the official code reads it: broken characters repaired, no HTML entities, single spaces."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """What UMT5 reads of a prompt as the user wrote it: at most 512 tokens, the last of them the end token."""
    text = clean_prompt(prompt)
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) > MAX_TOKENS:
        logger.warning("the prompt has %d tokens; the first %d are used", len(ids) - 1, MAX_TOKENS - 1)
        ids = tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return ids


@torch.no_grad()
def encode_t5(model: UMT5Stack, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """UMT5's rows for a prompt as the user wrote it: (L, width) with L <= 512, no padding.

    Padding behind the prompt would be masked, and biases depend on distances only, so leaving it out changes no row.

    Args:
        model: from `load_t5`.

    Returns:
        In the model's type on its device.
    """
    ids = torch.tensor([prompt_tokens(tokenizer, prompt)], device=model.device)
    return model(input_ids=ids).last_hidden_state[0]
