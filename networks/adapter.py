"""What LoRA, LoHa and LoKr layers have in common, and how they are hooked into a frozen model.

Shapes: (out, in) of the layer's weight, r rank.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from networks.arguments import Dropout, NetworkArguments
from networks.deltas import Factors


class Adapter(nn.Module):
    """A trainable change to one layer of a frozen model: output = layer(x) + multiplier · alpha / rank · change(x).

    Parameters are float32 and named as in native files. Subclasses fill them in `initialise`; until then they hold
    whatever was in memory.

    Args:
        rank: None when the scale is 1 whatever alpha is.
    """

    kind: ClassVar[str]
    """As users call it."""

    def __init__(self, *, rank: int | None, alpha: float, dropout: Dropout) -> None:
        super().__init__()
        self.rank, self.dropout = rank, dropout
        self.multiplier = 1.0
        self.compute_dtype: torch.dtype | None = None
        """Half precision to compute in with float32 parameters; None computes in the parameters' own type."""
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.scale = _scale(alpha, rank)
        self.register_load_state_dict_post_hook(_follow_loaded_alpha)

    @classmethod
    def for_layer(cls, layer: nn.Module, path: str, arguments: NetworkArguments) -> Self:
        """A new adapter, not initialised.

        Raises:
            UserError: there is no adapter of this kind for such a layer.
        """
        raise NotImplementedError

    @classmethod
    def for_factors(cls, layer: nn.Module, path: str, factors: Factors, where: str) -> Self:
        """An adapter with the rank and alpha of `factors`, whose tensors it does not take over yet.

        Raises:
            UserError: as `for_layer`, or the layer cannot have such factors.
        """
        raise NotImplementedError

    def initialise(self, generator: torch.Generator) -> None:
        """Fills the parameters so that the change is zero."""
        raise NotImplementedError

    def change(self, x: Tensor, scale: float | Tensor) -> Tensor:
        """`scale` times the change of the layer's output; x is the layer's input."""
        raise NotImplementedError

    def squared_norm(self) -> Tensor | None:
        """‖ΔW‖² (Frobenius) at multiplier 1; None where limiting it is not supported."""
        return None

    def shrink(self, factor: Tensor) -> None:
        """Multiplies ΔW by `factor`, a scalar tensor; only where `squared_norm` is supported."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """What to add to the layer's output."""
        scale = self.scale * self.multiplier
        if self.training and self.dropout.module:
            # A factor and no branch: the same graph in every step, the same gradients on every process.
            scale = scale * (torch.rand((), device=x.device) >= self.dropout.module)
        if self.compute_dtype is None:
            # Float32 parameters meet a bfloat16 model outside autocast too: in generation, and in models under test.
            return self.change(x if _is_autocast(x.device.type) else x.to(self.dtype), scale)
        # Around the adapters only: the model itself then computes in training as it does in generation.
        with torch.autocast(x.device.type, dtype=self.compute_dtype):
            return self.change(x, scale)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def thinned(self, x: Tensor, *mask_shape: int) -> Tensor:
        """`x` with rank dropout: times a random mask that is 0 with probability p, else 1 / (1 - p)."""
        p = self.dropout.rank
        if not (self.training and p):
            return x
        return x * ((torch.rand(mask_shape, device=x.device) > p).to(x.dtype) / (1 - p))


class Adapted:
    """Mixed into the class of a layer for as long as it has adapters, which may come and go in any order.

    The layer stays itself, with the attributes and the state dict that it had; its own forward is called, as its
    weight may be packed or elsewhere. A class and no replaced `forward`: compiled code notices when it changes, and
    blocks of one kind go on sharing one graph.
    """

    layer_class: ClassVar[type[nn.Module]]
    """The class without this."""
    adapters: list[Adapter]
    """Not registered as modules of the layer."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        total = output
        for adapter in self.adapters:
            if adapter.multiplier != 0:
                total = total + adapter(x)
        return total.to(output.dtype)


@cache
def _adapted_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{layer_class.__name__}", (Adapted, layer_class), {"layer_class": layer_class})


def can_attach(layer: nn.Module) -> bool:
    """Not where somebody has replaced the instance's `forward`: that would hide ours, and do nothing in silence."""
    return isinstance(layer, Adapted) or "forward" not in vars(layer)


def attach(layer: nn.Module, adapter: Adapter) -> None:
    if not isinstance(layer, Adapted):
        layer.__class__ = _adapted_class(type(layer))
        layer.adapters = []
    layer.adapters.append(adapter)


def detach(layer: nn.Module, adapter: Adapter) -> None:
    """The last one to go leaves the layer as it was. Does nothing where the adapter is not attached."""
    if not isinstance(layer, Adapted):
        return
    layer.adapters = [other for other in layer.adapters if other is not adapter]
    # A forward that was replaced meanwhile may call ours, which then gives what the layer gives.
    if not layer.adapters and "forward" not in vars(layer):
        del layer.adapters
        layer.__class__ = type(layer).layer_class


def alpha_of(factors: Factors) -> float:
    """A missing alpha counts as the rank."""
    return float(factors.rank or 1) if factors.alpha is None else float(factors.alpha)


def generator_for(seed: int, name: str) -> torch.Generator:
    """A source of random numbers for one layer: equal on every device, whatever other layers there are."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def fill_kaiming(parameter: nn.Parameter, generator: torch.Generator) -> None:
    """Kaiming-uniform with a = √5, which is uniform in ±1/√fan_in."""
    numbers = torch.rand(parameter.shape, generator=generator)
    bound = 1 / math.sqrt(math.prod(parameter.shape[1:]))
    parameter.data.copy_((2 * numbers - 1) * bound)


def fill_normal(parameter: nn.Parameter, std: float, generator: torch.Generator) -> None:
    # In float64, because processors differ in the last bit of float32 logarithms.
    parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _scale(alpha: float, rank: int | None) -> float:
    # An alpha of 0 counts as the rank, as in the files of the trainers that write one.
    return alpha / rank if rank and alpha else 1.0


def _follow_loaded_alpha(adapter: Adapter, _: object) -> None:
    """A file's alpha belongs to its tensors: with another one they would mean something else."""
    adapter.scale = _scale(float(adapter.alpha), adapter.rank)
