"""How many bytes of tensors are alive at a time, and how many were at most; on any device, the meta device too."""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that are made within; what was there before does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if storage._cdata in self._known or storage._cdata in given:
            return
        self._known[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._remove, storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int) -> None:
        self.now -= self._known.pop(key)


class _Fused(torch.autograd.Function):
    """Attention that keeps no scores, as every fast kernel does it."""

    @staticmethod
    def forward(ctx, query, key, value):
        result = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps its input and a number for each row, as a GPU's does it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.empty_like(gradient)


def use_fused_kernels(monkeypatch) -> None:
    """The meta device has no fast attention and norm; these stand-ins take the memory that a GPU's take."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: _Fused.apply(q, k, v))
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: _FusedNorm.apply(x))
