"""Scaled dot-product attention behind one function, so that models never name a backend.

A model keeps an `AttentionOptions`, makes one `AttentionLayout` of it for each batch, and hands that to every block.
PyTorch's own attention takes masks; the libraries take sequences laid end to end, without the padding.

Shapes: B batch, L tokens, N heads, D head_dim, T valid tokens of all samples together.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from options.errors import UserError, one_line

SDPA = "sdpa"
TRIAL_HEADS, TRIAL_HEAD_DIM = 24, 128
"""As both model families have them."""
TRIALS = ((192, 256), (256, 256))
"""Texts of unequal and of equal length; how long they are decides nothing."""
MAX_TRIAL_ERROR = 0.05
"""On average, of outputs of about 1; 8-bit attention is a few percent off, and a mix-up of axes is off by about 1."""


class Packing(NamedTuple):
    """The samples of a batch end to end, without padding."""

    places: Tensor
    """(T,) where the valid tokens stand among all B·L."""
    starts: Tensor
    """(B + 1,) int32, where each sample begins among the T; the last is T."""
    longest: int


class AttentionLayout(NamedTuple):
    """How one batch is attended: by what, and which of its tokens are valid. All are, unless something says otherwise.

    A plain tuple with no more in it than the backend needs, so that compiled blocks need not be compiled again for it.
    """

    backend: str = SDPA
    mask: Tensor | None = None
    """bool, broadcastable to (B, N, L_query, L_key), True where a key may be seen. SDPA only."""
    lengths: tuple[int, ...] | None = None
    """Attend the first so many tokens of each sample, one sample at a time."""
    packing: Packing | None = None
    bias: Any = None
    """xformers' description of a packing."""


PLAIN = AttentionLayout()


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Which attention a model uses."""

    backend: str = SDPA
    """`sdpa`, or a key of `LIBRARIES`."""
    split: bool = False
    """One sample of a batch at a time."""

    def layout(self, lengths: Tensor, total: int) -> AttentionLayout:
        """For samples whose first `lengths[b]` (B,) of `total` tokens are valid; what comes out for others is not said.

        Without a mask or packing the fast kernels are at their fastest, which is why full samples get none. Queries and
        keys are the same tokens, except where all are valid.
        """
        is_full = bool((lengths == total).all())
        if self.split and len(lengths) > 1:
            return AttentionLayout(backend=self.backend, lengths=tuple(lengths.tolist()))
        if is_full:
            return AttentionLayout(backend=self.backend)
        valid = torch.arange(total, device=lengths.device) < lengths[:, None]
        if self.backend == SDPA:
            return AttentionLayout(mask=valid[:, None, None])
        packing = Packing(
            places=valid.flatten().nonzero()[:, 0],
            starts=F.pad(lengths.cumsum(0), (1, 0)).int(),
            longest=int(lengths.max()),
        )
        bias = _block_diagonal(tuple(lengths.tolist()), lengths.device) if self.backend == "xformers" else None
        return AttentionLayout(backend=self.backend, packing=packing, bias=bias)


def attend(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout = PLAIN) -> Tensor:
    """softmax(q·kᵀ/√d)·v over all heads.

    Args:
        query, key, value: (B, L, N, D); the lengths of query and key may differ where all tokens are valid.

    Returns:
        (B, L_query, N·D); zeros, or anything finite, for tokens that are not valid.
    """
    if layout.lengths is not None:
        attended = _one_by_one(query, key, value, layout)
    elif layout.packing is not None:
        attended = _packed(query, key, value, layout)
    else:
        attended = _whole(query, key, value, layout)
    return attended.flatten(2)


def _whole(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
    if layout.backend == SDPA:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=layout.mask).transpose(1, 2)
    return LIBRARIES[layout.backend].whole(query, key, value)


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
    """What has no valid tokens' place is filled up with zeros."""
    alone, parts = AttentionLayout(backend=layout.backend), []
    for number, length in enumerate(layout.lengths):
        q, k, v = (x[number, None, :length] for x in (query, key, value))
        parts.append(F.pad(_whole(q, k, v, alone), (0, 0, 0, 0, 0, query.shape[1] - length)))
    return torch.cat(parts)


def _packed(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
    places = layout.packing.places
    q, k, v = (x.flatten(0, 1)[places] for x in (query, key, value))
    attended = LIBRARIES[layout.backend].packed(q, k, v, layout)
    everywhere = attended.new_zeros(query.shape[0] * query.shape[1], *attended.shape[1:])
    return everywhere.index_copy(0, places, attended).unflatten(0, query.shape[:2])


# ---- libraries ----


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(query, key, value)


def _flash_packed(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(query, key, value, **_cumulative(layout.packing))


def _flash3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    return _first(flash_attn_func(query, key, value))


def _flash3_packed(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    return _first(flash_attn_varlen_func(query, key, value, **_cumulative(layout.packing)))


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some versions of FlashAttention 3 also return the logarithm of the softmax's sum."""
    return result[0] if isinstance(result, tuple) else result


def _xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query, key, value)


def _xformers_packed(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query[None], key[None], value[None], attn_bias=layout.bias)[0]


def _block_diagonal(lengths: tuple[int, ...], device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens(list(lengths))
    # Older versions have no `to`, and move it themselves in every call.
    return bias.to(device) if hasattr(bias, "to") else bias


def _sage(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from sageattention import sageattn

    return sageattn(query, key, value, tensor_layout="NHD", is_causal=False)


def _sage_packed(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
    from sageattention import sageattn_varlen

    return sageattn_varlen(query, key, value, **_cumulative(layout.packing), is_causal=False)


def _cumulative(packing: Packing) -> dict[str, Any]:
    return {
        "cu_seqlens_q": packing.starts,
        "cu_seqlens_k": packing.starts,
        "max_seqlen_q": packing.longest,
        "max_seqlen_k": packing.longest,
    }


class Library(NamedTuple):
    """An attention that is not PyTorch's own."""

    title: str
    module: str
    install: str
    """What to do where the module is missing."""
    whole: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(B, L, N, D) thrice → (B, L_query, N, D)."""
    packed: Callable[[Tensor, Tensor, Tensor, AttentionLayout], Tensor]
    """(T, N, D) thrice → (T, N, D)."""
    half_only: bool = True
    """Whether it takes bfloat16 and float16 only."""
    has_backward: bool = True


LIBRARIES = {
    "flash": Library(
        title="FlashAttention 2",
        module="flash_attn",
        install="pip install flash-attn --no-build-isolation",
        whole=_flash,
        packed=_flash_packed,
    ),
    "flash3": Library(
        title="FlashAttention 3",
        module="flash_attn_interface",
        install="build it from the hopper folder of github.com/Dao-AILab/flash-attention",
        whole=_flash3,
        packed=_flash3_packed,
    ),
    "xformers": Library(
        title="xformers",
        module="xformers.ops",
        install="pip install xformers",
        whole=_xformers,
        packed=_xformers_packed,
        half_only=False,
    ),
    "sageattn": Library(
        title="SageAttention",
        module="sageattention",
        install="build it from github.com/thu-ml/SageAttention, or pip install sageattention for version 1",
        whole=_sage,
        packed=_sage_packed,
        has_backward=False,
    ),
}


# ---- before a run ----


def check_attention(
    options: AttentionOptions, *, device: torch.device, dtype: torch.dtype, flag: str, training: bool = False
) -> None:
    """Tries the attention on a few tokens of `dtype`. PyTorch's own needs no trial.

    Args:
        flag: the one that the choice came from.
        training: whether gradients are wanted.

    Raises:
        UserError: the library is not installed, or does not work with this device or type.
    """
    if options.backend == SDPA:
        return
    library = LIBRARIES[options.backend]
    title, remedy = library.title, "leave it out for PyTorch's own attention"
    if device.type == "cpu":
        raise UserError(flag, f"{title} on a CPU", "a GPU", remedy)
    if library.half_only and dtype not in (torch.bfloat16, torch.float16):
        got = f"{title} with {str(dtype).removeprefix('torch.')}"
        raise UserError(flag, got, "bfloat16 or float16", f"use --dit_dtype bfloat16, or {remedy}")
    if training and not library.has_backward:
        raise UserError(flag, f"{title} in training", "an attention that has gradients", remedy)
    try:
        importlib.import_module(library.module)
    except ImportError as error:
        got = f"{title}, which is not installed ({one_line(str(error))[:120]})"
        raise UserError(flag, got, f"the Python module {library.module}", f"{library.install}, or {remedy}") from error
    try_attention(options, device=device, dtype=dtype, flag=flag, training=training)


def try_attention(
    options: AttentionOptions, *, device: torch.device, dtype: torch.dtype, flag: str, training: bool
) -> None:
    """Attends a few tokens of equal and of unequal lengths.

    Raises:
        UserError: the library could not.
    """
    title, expected = LIBRARIES[options.backend].title, "a version that works on this machine"
    remedy = "leave it out for PyTorch's own attention"
    try:
        for lengths in TRIALS:
            error = _trial_error(options, lengths, device, dtype, training)
            if not error < MAX_TRIAL_ERROR:  # not a number is wrong, too
                raise UserError(flag, f"{title}, whose results are wrong by {error:.2g}", expected, remedy)
    except UserError:
        raise
    except Exception as error:  # whatever a library that was built for another machine may raise
        reason = one_line(f"{type(error).__name__}: {error}")[:200]
        raise UserError(flag, f"{title}, which fails ({reason})", expected, remedy) from error


def _trial_error(
    options: AttentionOptions, lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype, training: bool
) -> float:
    """The mean difference from PyTorch's own attention over the valid tokens."""
    total, generator = max(lengths), torch.Generator().manual_seed(0)
    # Queries are keys and values, so that each token attends mostly to itself and comes out about as it went in.
    tokens = torch.randn(len(lengths), total, TRIAL_HEADS, TRIAL_HEAD_DIM, generator=generator).to(device, dtype)
    valid = torch.arange(total) < torch.tensor(lengths)[:, None]
    found, right = (
        attend(query, query, query, choice.layout(torch.tensor(lengths, device=device), total))[valid.to(device)]
        for choice, query in ((options, tokens.clone().requires_grad_(training)), (AttentionOptions(), tokens))
    )
    if training:
        found.sum().backward()
    return (found.detach() - right).abs().float().mean().item()


def describe(options: AttentionOptions, *, device: torch.device, dtype: torch.dtype) -> str:
    """For the log; of PyTorch's own attention also which kernels it chooses here."""
    split = ", one item of a batch at a time" if options.split else ""
    if options.backend != SDPA:
        return f"{LIBRARIES[options.backend].title}{split}"
    if not hasattr(torch, "_fused_sdp_choice"):  # not a public function
        return f"PyTorch's own{split}"
    from torch.nn.attention import SDPBackend

    query = torch.empty(1, TRIAL_HEADS, max(TRIALS[0]), TRIAL_HEAD_DIM, device=device, dtype=dtype)
    mask = torch.ones(1, 1, 1, query.shape[2], device=device, dtype=torch.bool)
    whole, masked = (SDPBackend(torch._fused_sdp_choice(query, query, query, attn_mask=m)).name for m in (None, mask))
    unequal = "" if options.split else f", {masked} for texts of unequal length in a batch"
    return f"PyTorch's own on {device.type}, kernel {whole}{unequal}{split}"
