"""Several LoRAs made into one that does the same.

    Σ mᵢ·sᵢ·upᵢ @ downᵢ = [m₁s₁·up₁ … mₙsₙ·upₙ] @ [down₁; …; downₙ]

so putting the factors side by side is exact, and the ranks add up. A smaller rank is the best there is: the largest
singular values of the sum, found through thin factors (QR) where they are thin. LoHa and LoKr become LoRAs that way.

Shapes: r rank, R sum of the ranks, (out, in) the base weight.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from networks import peft_config, scale_folding
from networks.deltas import ALPHA, DOWN, UP, Factors, is_finite
from networks.lora_formats import LoraFile, read_lora
from networks.lora_matching import expect_factors, select
from networks.lora_metadata import check_output, save_lora
from options.errors import UserError
from options.lora import LoraChoice

logger = logging.getLogger(__name__)

FLAG = "--lora_weight"
METADATA_KEY = "combined_loras"
"""Names and multipliers of the files that a combined LoRA was made of."""
REMEDY = "merge them into the model with --save_merged_model, or leave those out with --exclude_patterns '\\.diff'"
NOT_COMMON = ("sshs_", "ss_network_", peft_config.METADATA_KEY, scale_folding.METADATA_KEY)
"""How metadata keys begin that would be wrong for the result even where all files agree."""
Tensors = dict[str, Tensor]
Part = tuple[Factors, float]
"""What one file adds to a module, and its multiplier."""


@dataclass(frozen=True, kw_only=True)
class Combined:
    """One module of the result, in float32, with an alpha equal to its rank."""

    up: Tensor
    """(out, r), for convolutions (out, r, 1, …)."""
    down: Tensor
    """(r, in, *kernel)."""
    error: float = 0.0
    """The Frobenius norm of what the cut leaves out, relative to that of the whole."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def combine_files(
    choices: Sequence[LoraChoice],
    output: str | Path,
    *,
    rank: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
    flag: str,
) -> None:
    """Writes one native LoRA file that does what the chosen ones do together; see `combine`.

    Args:
        flag: the one that named `output`, for messages.

    Raises:
        UserError: as `read_lora`, `select` and `combine`, or the file cannot be written.
    """
    check_output(output, flag=flag, inputs=[choice.path for choice in choices], input_flag=FLAG)
    loras = []
    for choice in choices:
        lora = read_lora(choice.path, flag=FLAG)
        if choice.include or choice.exclude:
            lora = select(lora, include=choice.include, exclude=choice.exclude)
        _report(lora, choice.multiplier)
        loras.append((lora, choice.multiplier))
    tensors, metadata = combine(loras, rank=rank, dtype=dtype, device=device)
    save_lora(output, tensors, metadata, flag=flag)
    ranks = sorted({tensor.shape[0] for key, tensor in tensors.items() if key.endswith(DOWN)})
    spread = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    logger.info("%s: %d modules of %s", output, len(tensors) // 3, spread)


def _report(lora: LoraFile, multiplier: float) -> None:
    """One line in the log; a warning when something in the file is not used."""
    line = f"{lora.path.name}: {len(lora.modules)} {lora.kind} modules, {lora.format}; multiplier {multiplier:g}"
    if lora.leftover:
        logger.warning("%s; %d unused tensors, %s first", line, len(lora.leftover), lora.leftover[0])
    else:
        logger.info("%s", line)


def combine(
    loras: Sequence[tuple[LoraFile, float]],
    *,
    rank: int | None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a native file that does what these LoRAs do together, each with its multiplier.

    Args:
        rank: the largest that a module may have; None adds the ranks up.
        dtype: of the factors. Alphas stay float32, as not every rank is a number in bfloat16.
        device: where sums are cut to `rank`.

    Raises:
        UserError: LoRAs of different architectures or shapes, LoHa or LoKr without a rank, whole differences, or
            numbers that `dtype` cannot hold.
    """
    _check_architectures([lora for lora, _ in loras])
    for lora, _ in loras:
        expect_factors(lora, REMEDY)
    # Side by side is done at once; only cutting takes long enough to be watched.
    names = tqdm(_names(loras), desc=f"rank {rank}", leave=False, disable=True if rank is None else None)
    modules = {name: _combined(name, loras, rank, device) for name in names}
    if rank is not None:
        _log_errors(modules, rank)
    tensors: Tensors = {}
    for name, module in modules.items():
        tensors[f"{name}.{DOWN}"] = module.down.to(dtype)
        tensors[f"{name}.{UP}"] = module.up.to(dtype)
        tensors[f"{name}.{ALPHA}"] = torch.tensor(float(module.rank))
    _check_finite(tensors, dtype)
    return tensors, _metadata(loras, {module.rank for module in modules.values()})


def _names(loras: Sequence[tuple[LoraFile, float]]) -> dict[str, None]:
    """Every module that some file has, once."""
    return dict.fromkeys(name for lora, _ in loras for name in lora.modules)


def _check_architectures(loras: Sequence[LoraFile]) -> None:
    first = loras[0]
    for lora in loras[1:]:
        if lora.table.architecture != first.table.architecture:
            got = f"a LoRA of {lora.table.architecture}"
            expected = f"one of {first.table.architecture}, as {first.path.name} is"
            raise UserError(lora.where, got, expected, "combine LoRAs of one model only")


def _combined(
    name: str, loras: Sequence[tuple[LoraFile, float]], rank: int | None, device: torch.device | str
) -> Combined:
    """One module of all files that have it."""
    having = [(lora, multiplier) for lora, multiplier in loras if name in lora.modules]
    parts = [(lora.modules[name], multiplier) for lora, multiplier in having]
    shape = max((factors.delta_shape for factors, _ in parts), key=len)
    for lora, _ in having:
        _check_module(lora, name, shape, rank)
    if all(factors.kind == "lora" for factors, _ in parts):
        if rank is None or sum(factors.rank for factors, _ in parts) <= rank:
            return _in_shape(*_side_by_side(parts), shape)
    try:
        return reduce_rank(parts, shape, rank, device)
    except OverflowError as error:
        expected, remedy = "sums that float32 can hold", "give smaller multipliers"
        raise UserError("--lora_multiplier", f"infinite sums for {name}", expected, remedy) from error


def _check_module(lora: LoraFile, name: str, shape: tuple[int, ...], rank: int | None) -> None:
    factors = lora.modules[name]
    if not factors.fits(shape):
        got = f"{lora.key_of(name, factors.misfit(shape))} for a weight of shape {factors.delta_shape}"
        raise UserError(lora.where, got, f"{shape}, as in the others", "combine LoRAs of one model only")
    if rank is None and factors.kind != "lora":
        remedy = "give --rank: the closest LoRA of that rank is made"
        raise UserError(lora.where, f"{lora.key_of(name)}, a {factors.kind}", "LoRA only, whose ranks add up", remedy)


def reduce_rank(parts: Sequence[Part], shape: tuple[int, ...], rank: int, device: torch.device | str) -> Combined:
    """The LoRA of at most this rank that is closest to the sum, by singular values in float64.

    Raises:
        OverflowError: the sum is beyond the numbers of float32.
    """
    parts = [(factors.to(device), multiplier) for factors, multiplier in parts]
    smaller = min(shape[0], torch.Size(shape[1:]).numel())
    if sum(_thin_rank(factors) for factors, _ in parts) < smaller:
        up, down, error = _cut_product(*map(_finite, _side_by_side(parts)), rank)
    else:
        whole = sum(m * factors.delta(shape).flatten(1) for factors, m in parts)
        up, down, error = _cut_whole(_finite(whole), rank)
    return _in_shape(up.cpu(), down.cpu(), shape, error)


def _finite(tensor: Tensor) -> Tensor:
    if not is_finite(tensor):
        raise OverflowError
    return tensor


def _in_shape(up: Tensor, down: Tensor, shape: tuple[int, ...], error: float = 0.0) -> Combined:
    """Factors (out, r) and (r, in) of a weight of this shape."""
    kernel = [1] * (len(shape) - 2)
    return Combined(
        up=up.float().reshape(*up.shape, *kernel).contiguous(),
        down=down.float().reshape(-1, *shape[1:]).contiguous(),
        error=error,
    )


def _side_by_side(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """(out, R) and (R, in) with the sum as their product; multipliers and scales are in the first."""
    pairs = [(_thin_factors(factors), factors.scale * multiplier) for factors, multiplier in parts]
    return torch.cat([left * scale for (left, _), scale in pairs], 1), torch.cat([right for (_, right), _ in pairs])


def _thin_rank(factors: Factors) -> int:
    """The width of `_thin_factors`, told from shapes."""
    if factors.kind == "lora":
        return factors.rank
    left, _ = _thin_factors(factors.to("meta"))
    return left.shape[1]


def _thin_factors(factors: Factors) -> tuple[Tensor, Tensor]:
    """(out, r) and (r, in) in float32 whose product is the delta without its scale.

    LoHa's r is the product of its two ranks, row by row products of the columns; LoKr's that of its two factors:
    (a @ b) ⊗ (c @ d) = (a ⊗ c) @ (b ⊗ d).
    """
    tensors = {part: tensor.float() for part, tensor in factors.tensors.items()}
    if factors.kind == "lora":
        return tensors[UP].flatten(1), tensors[DOWN].flatten(1)
    if factors.kind == "loha":
        left = tensors["hada_w1_a"].unsqueeze(2) * tensors["hada_w2_a"].unsqueeze(1)
        right = tensors["hada_w1_b"].unsqueeze(1) * tensors["hada_w2_b"].unsqueeze(0)
        return left.flatten(1), right.flatten(0, 1)
    (a, b), (c, d) = _pair(tensors, "lokr_w1"), _pair(tensors, "lokr_w2")
    left = torch.kron(a, c)
    return left if factors.rows is None else left[slice(*factors.rows)], torch.kron(b, d)


def _pair(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """A factor of a LoKr as a product, with an identity where it is whole."""
    if name not in tensors:
        return tensors[f"{name}_a"], tensors[f"{name}_b"]
    whole = tensors[name]
    rows, columns = whole.shape
    identity = torch.eye(min(rows, columns), device=whole.device)
    return (identity, whole) if rows < columns else (whole, identity)


def _cut_product(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best (out, r), (r, in) for left @ right, and the error; only (R, R) is decomposed. See `reduce_rank`."""
    left_basis, left_rest = torch.linalg.qr(left.double())
    right_basis, right_rest = torch.linalg.qr(right.double().T)
    up, values, down = torch.linalg.svd(left_rest @ right_rest.T, full_matrices=False)
    # The values are shared out evenly: factors of like sizes lose least in a small type.
    root = values[:rank].sqrt()
    return left_basis @ up[:, :rank] * root, root[:, None] * down[:rank] @ right_basis.T, _error(values.square(), rank)


def _cut_whole(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The same for a matrix, by the eigenvectors of its smaller square, several times as fast as an SVD."""
    delta = delta.double()
    if delta.shape[0] > delta.shape[1]:
        down, up, error = _cut_whole(delta.T, rank)
        return up.T, down.T, error
    squares, vectors = torch.linalg.eigh(delta @ delta.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)[:, :rank]
    # Left and right of the cut the same projection, so no small value is divided by; zeros need no root.
    root = squares[:rank].sqrt().sqrt()
    inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
    return vectors * root, inverse[:, None] * (vectors.T @ delta), _error(squares, rank)


def _error(squares: Tensor, rank: int) -> float:
    """From the squared singular values, largest first."""
    whole = squares.sum()
    return float((squares[rank:].sum() / whole).sqrt()) if whole > 0 else 0.0


def _log_errors(modules: Mapping[str, Combined], rank: int) -> None:
    worst = max(modules, key=lambda name: modules[name].error)
    mean = sum(module.error for module in modules.values()) / len(modules)
    logger.info(
        "rank %d leaves out %.3g of the weight difference on average over %d modules, at most %.3g (%s)",
        *(rank, mean, len(modules), modules[worst].error, worst),
    )


def _check_finite(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            name = str(dtype).removeprefix("torch.")
            remedy = "use fp32 or bf16" if dtype == torch.float16 else "give smaller multipliers"
            raise UserError("--save_precision", f"{name}, too small for {key}", "a type that can hold it", remedy)


def _metadata(loras: Sequence[tuple[LoraFile, float]], ranks: set[int]) -> dict[str, str]:
    """What all files say alike, the rank, and what the result was made of."""
    first, *others = [lora.metadata for lora, _ in loras]
    metadata = {
        key: value
        for key, value in first.items()
        if not key.startswith(NOT_COMMON) and all(other.get(key) == value for other in others)
    }
    rank = str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic"
    sources = [{"name": lora.path.name, "multiplier": multiplier} for lora, multiplier in loras]
    return metadata | {
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        METADATA_KEY: json.dumps(sources, ensure_ascii=False),
    }
