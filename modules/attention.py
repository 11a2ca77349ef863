"""Scaled dot-product attention behind one function, so that models never name a backend."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√d)·v over all heads.

    Args:
        query, key, value: (B, L, N, head_dim); the lengths of query and key may differ.
        mask: bool, broadcastable to (B, N, L_query, L_key), True where a key may be seen; None sees all.

    Returns:
        (B, L_query, N * head_dim).
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def key_mask(lengths: Tensor, total: int) -> Tensor | None:
    """A mask (B, 1, 1, total) for samples whose first `lengths[b]` tokens are valid; None when all are.

    Without a mask SDPA may pick its fast kernels, which is why full samples get none.
    """
    if bool((lengths == total).all()):
        return None
    return (torch.arange(total, device=lengths.device) < lengths[:, None])[:, None, None]
