"""What a LoRA, LoHa or LoKr module adds to a weight, computed from its factors; or a file's own whole difference.

    LoRA   ΔW = s · up @ down                          s = alpha / r, r = rows of down
    LoHa   ΔW = s · (w1_a @ w1_b) * (w2_a @ w2_b)      r = rows of w1_b
    LoKr   ΔW = s · w1 ⊗ w2                            w1, w2 whole or a product; s = 1 when both are whole
    diff   Δ = diff                                    of a weight, a bias or any other tensor; there is no scale

Without an alpha, or with one of 0, alpha counts as r. Convolutions: down is (r, in, *kernel), up (out, r, 1, …).
Everything but `delta` looks at shapes only, so it works on the meta device: for files of which only headers were read.

Shapes: r rank, (out, in) the base weight, (l, m) and (k, n) LoKr's factors with out = l·k, in = m·n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

DOWN, UP, ALPHA, DIFF = "lora_down.weight", "lora_up.weight", "alpha", "diff"
PARTS = {
    "lora": (DOWN, UP),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    DIFF: (DIFF,),
}
"""Names of the factors as native files spell them."""
KIND_OF_PART = {part: kind for kind, parts in PARTS.items() for part in parts}


class FactorError(ValueError):
    """Factors that do not fit together.

    Args:
        part: the first one that is wrong or missing.
        got: what is there.
        expected: the rule.
    """

    def __init__(self, part: str, got: str, expected: str) -> None:
        super().__init__(f"{part}: got {got}; expected {expected}")
        self.part, self.got, self.expected = part, got, expected


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The tensors of one module.

    Raises:
        FactorError: one is missing, empty, of another kind or type, or of a shape that does not fit the others.
    """

    tensors: Mapping[str, Tensor]
    """By their native names (`PARTS`), of any floating-point type."""
    alpha: Tensor | None = None
    """One number as the file has it; None and 0 count as the rank."""
    rows: tuple[int, int] | None = None
    """Only these rows of the delta, start and stop; LoKr's only, the other kinds' factors are sliced themselves."""

    def __post_init__(self) -> None:
        if not self.tensors:
            raise FactorError("factors", "none", "those of LoRA, LoHa or LoKr")
        kinds = {KIND_OF_PART[part]: part for part in self.tensors}
        if len(kinds) > 1:
            raise FactorError(list(kinds.values())[-1], f"factors of {' and '.join(kinds)}", "one kind")
        for part, tensor in self.tensors.items():
            _check_tensor(part, tensor)
        _CHECKS[self.kind](self)
        if self.alpha is not None:
            _check_alpha(self.alpha)

    @cached_property
    def kind(self) -> str:
        """`lora`, `loha`, `lokr`, or `diff` for a whole difference."""
        return KIND_OF_PART[next(iter(self.tensors))]

    @property
    def rank(self) -> int | None:
        """None for a LoKr of two whole factors, and for a whole difference."""
        names = {"lora": (DOWN,), "loha": ("hada_w1_b",), "lokr": ("lokr_w2_b", "lokr_w1_b"), DIFF: ()}[self.kind]
        return next((self.tensors[name].shape[0] for name in names if name in self.tensors), None)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return 1.0 if self.alpha is None or self.rank is None else (float(self.alpha) or self.rank) / self.rank

    @property
    def has_zero_alpha(self) -> bool:
        """Whether there is an alpha of 0 where it counts as the rank, for reports."""
        return self.alpha is not None and self.rank is not None and float(self.alpha) == 0

    @property
    def delta_shape(self) -> tuple[int, ...]:
        """(out, in), or (out, in, *kernel); of a whole difference its own."""
        if self.kind == DIFF:
            return tuple(self.tensors[DIFF].shape)
        if self.kind == "lora":
            return (self.tensors[UP].shape[0], *self.tensors[DOWN].shape[1:])
        if self.kind == "loha":
            return (self.tensors["hada_w1_a"].shape[0], self.tensors["hada_w1_b"].shape[1])
        first, second = self._product_shape("lokr_w1"), self._product_shape("lokr_w2")
        num_rows = first[0] * second[0] if self.rows is None else self.rows[1] - self.rows[0]
        return (num_rows, first[1] * second[1])

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the delta can be added to a weight of this shape: the same, or flattened, or with a kernel of 1.

        A whole difference fits the same shape only.
        """
        own, base = self.delta_shape, tuple(shape)
        if self.kind == DIFF:
            return own == base
        if len(own) == 2:
            return own == (base[0], math.prod(base[1:]))
        return _without_ones(own) == _without_ones(base)

    def misfit(self, shape: Sequence[int]) -> str:
        """The factor to blame where the delta does not fit: rows and columns come from different ones."""
        if self.kind == DIFF:
            return DIFF
        rows, columns = shape[0], math.prod(shape[1:])
        are_rows = self.delta_shape[0] != rows
        if self.kind == "lora":
            return UP if are_rows else DOWN
        if self.kind == "loha":
            return "hada_w1_a" if are_rows else "hada_w1_b"
        first_rows, first_columns = self._product_shape("lokr_w1")
        does_divide = rows % first_rows == 0 if are_rows else columns % first_columns == 0
        name = "lokr_w2" if does_divide else "lokr_w1"
        return name if name in self.tensors else f"{name}_{'a' if are_rows else 'b'}"

    def delta(self, shape: Sequence[int] | None = None) -> Tensor:
        """ΔW in float32, scale included, on the factors' device.

        Args:
            shape: the base weight's, when it should be given that shape (see `fits`).
        """
        delta = _DELTAS[self.kind](self) * self.scale
        if self.rows is not None:
            delta = delta[self.rows[0] : self.rows[1]]
        return delta.reshape(self.delta_shape if shape is None else tuple(shape))

    def slice_rows(self, start: int, stop: int) -> Factors:
        """The factors of rows start…stop of the delta, with the same rank and alpha."""
        if self.kind in ("lora", DIFF):
            part = UP if self.kind == "lora" else DIFF
            return self._with(**{part: self.tensors[part][start:stop]})
        if self.kind == "loha":
            return self._with(**{name: self.tensors[name][start:stop] for name in ("hada_w1_a", "hada_w2_a")})
        offset = self.rows[0] if self.rows else 0
        start, stop = start + offset, stop + offset
        k = self._product_shape("lokr_w2")[0]
        if start % k or stop % k:
            return replace(self, rows=(start, stop))
        name = "lokr_w1" if "lokr_w1" in self.tensors else "lokr_w1_a"
        return replace(self._with(**{name: self.tensors[name][start // k : stop // k]}), rows=None)

    def with_whole_first(self) -> Factors:
        """A LoKr with its first factor multiplied out, in float32; all others as they are. The delta stays the same."""
        if "lokr_w1_a" not in self.tensors:
            return self
        kept = {name: tensor for name, tensor in self.tensors.items() if not name.startswith("lokr_w1_")}
        first = self._product("lokr_w1")
        if "lokr_w2" not in kept:
            return replace(self, tensors={"lokr_w1": first, **kept})
        # Two whole factors have no rank any more, and so no scale.
        return replace(self, tensors={"lokr_w1": first * self.scale, **kept}, alpha=None)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factors:
        """The same elsewhere or in another type. Alpha keeps its own."""
        tensors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    def _with(self, **tensors: Tensor) -> Factors:
        return replace(self, tensors={**self.tensors, **tensors})

    def _product_shape(self, name: str) -> tuple[int, int]:
        if name in self.tensors:
            return tuple(self.tensors[name].shape)
        return self.tensors[f"{name}_a"].shape[0], self.tensors[f"{name}_b"].shape[1]

    def _product(self, name: str) -> Tensor:
        if name in self.tensors:
            return self.tensors[name].float()
        return self.tensors[f"{name}_a"].float() @ self.tensors[f"{name}_b"].float()


def as_tensors(modules: Mapping[str, Factors]) -> dict[str, Tensor]:
    """What a native file holds, from its modules by native name; nothing is added where there is no alpha."""
    tensors = {}
    for name, factors in modules.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in factors.tensors.items()}
        if factors.alpha is not None:
            tensors[f"{name}.{ALPHA}"] = factors.alpha
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor an infinite number."""
    # torch has no such test for float8.
    return bool((tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite().all())


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(out, in, kernel) with trailing kernel dimensions of 1 taken off."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _lora_delta(factors: Factors) -> Tensor:
    return factors.tensors[UP].float().flatten(1) @ factors.tensors[DOWN].float().flatten(1)


def _loha_delta(factors: Factors) -> Tensor:
    return factors._product("hada_w1") * factors._product("hada_w2")


def _lokr_delta(factors: Factors) -> Tensor:
    return torch.kron(factors._product("lokr_w1"), factors._product("lokr_w2"))


def _whole_delta(factors: Factors) -> Tensor:
    return factors.tensors[DIFF].float()


def _check_tensor(part: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise FactorError(part, f"type {_name(tensor.dtype)}", "floating-point numbers")
    if tensor.numel() == 0:
        raise FactorError(part, f"shape {tuple(tensor.shape)}", "a rank and sizes of at least 1")


def _check_alpha(alpha: Tensor) -> None:
    if alpha.numel() != 1:
        raise FactorError(ALPHA, f"shape {tuple(alpha.shape)}", "a single number")
    if alpha.dtype == torch.bool or alpha.is_complex():
        raise FactorError(ALPHA, f"type {_name(alpha.dtype)}", "a real number")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_lora(factors: Factors) -> None:
    down, up = _present(factors, DOWN), _present(factors, UP)
    for name, tensor in ((DOWN, down), (UP, up)):
        if tensor.ndim < 2:
            raise FactorError(name, f"shape {tuple(tensor.shape)}", "at least two dimensions")
    if math.prod(up.shape[2:]) != 1:
        raise FactorError(UP, f"shape {tuple(up.shape)}", "a kernel of 1, as only lora_down carries the convolution's")
    _check_ranks(factors, UP, DOWN)


def _check_loha(factors: Factors) -> None:
    for number in (1, 2):
        _check_product(factors, f"hada_w{number}")
    first, second = (factors._product_shape(name) for name in ("hada_w1", "hada_w2"))
    if first != second:
        raise FactorError("hada_w2_a", f"a product of shape {second}", f"{first}, as that of hada_w1_a and hada_w1_b")


def _check_lokr(factors: Factors) -> None:
    for name in ("lokr_w1", "lokr_w2"):
        if name not in factors.tensors:
            _check_product(factors, name)
        elif f"{name}_a" in factors.tensors or f"{name}_b" in factors.tensors:
            raise FactorError(name, "it and its factors too", "one of them")
        else:
            _check_matrix(factors, name)


def _check_whole(factors: Factors) -> None:
    """One tensor of any shape has nothing to fit."""


def _check_product(factors: Factors, name: str) -> None:
    _check_matrix(factors, f"{name}_a")
    _check_matrix(factors, f"{name}_b")
    _check_ranks(factors, f"{name}_a", f"{name}_b")


def _check_matrix(factors: Factors, name: str) -> None:
    shape = tuple(_present(factors, name).shape)
    if len(shape) != 2:
        raise FactorError(name, f"shape {shape}", "two dimensions")


def _check_ranks(factors: Factors, left: str, right: str) -> None:
    columns, rows = factors.tensors[left].shape[1], factors.tensors[right].shape[0]
    if columns != rows:
        raise FactorError(left, f"rank {columns}", f"rank {rows}, as {right} has")


def _present(factors: Factors, name: str) -> Tensor:
    if name not in factors.tensors:
        raise FactorError(name, "nothing", f"it beside {next(iter(factors.tensors))}")
    return factors.tensors[name]


_DELTAS = {"lora": _lora_delta, "loha": _loha_delta, "lokr": _lokr_delta, DIFF: _whole_delta}
_CHECKS = {"lora": _check_lora, "loha": _check_loha, "lokr": _check_lokr, DIFF: _check_whole}
