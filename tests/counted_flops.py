"""What torch counts of the operations of a call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modules.plan import Flops


def counted_flops(call: Callable[[], object], *, in_training: bool = False) -> Flops:
    """torch knows products only: those of attention are batched."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(in_training):
        call()
    by_kind = {str(kind): count for kind, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for kind, count in by_kind.items() if "bmm" in kind)
    return Flops(linear=sum(by_kind.values()) - attention, attention=attention)
