"""Weight differences from factors, against PEFT's own layers with the same tensors."""

import math

import peft
import pytest
import torch
from torch import Tensor, nn

from networks.deltas import DIFF, DOWN, UP, FactorError, Factors, is_finite

OUT, IN, RANK = 24, 18, 4
NAMES = {"lora_A": DOWN, "lora_B": UP}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def lora(out: int = OUT, size: int = IN, rank: int = RANK, **others) -> Factors:
    return Factors(tensors={DOWN: random(rank, size), UP: random(out, rank)}, **others)


def loha(out: int = OUT, size: int = IN, rank: int = RANK, **others) -> Factors:
    tensors = {f"hada_w{i}_a": random(out, rank) for i in (1, 2)} | {f"hada_w{i}_b": random(rank, size) for i in (1, 2)}
    return Factors(tensors=tensors, **others)


def lokr(first: tuple[int, int] = (4, 3), second: tuple[int, int] = (6, 6), rank: int = 2, **others) -> Factors:
    tensors = {"lokr_w1": random(*first), "lokr_w2_a": random(second[0], rank), "lokr_w2_b": random(rank, second[1])}
    return Factors(tensors=tensors, **others)


def whole_lokr(first: tuple[int, int] = (4, 3), second: tuple[int, int] = (6, 6), **others) -> Factors:
    return Factors(tensors={"lokr_w1": random(*first), "lokr_w2": random(*second)}, **others)


ALL_KINDS = {"lora": lora, "loha": loha, "lokr": lokr, "whole lokr": whole_lokr}


def peft_layer(layer: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """`layer` as PEFT adapts it, all factors random."""
    return peft.get_peft_model(nn.ModuleDict({"layer": layer}), config).base_model.model["layer"]


def factors_of(layer: nn.Module, alpha: float) -> Factors:
    tensors = {}
    for name, parameter in layer.named_parameters():
        if ".default" in name:
            part = name.split(".")[0]
            tensors[NAMES.get(part, part)] = parameter.detach().clone().normal_()
            parameter.data.copy_(tensors[NAMES.get(part, part)])
    return Factors(tensors=tensors, alpha=torch.tensor(alpha))


LINEAR = {"r": RANK, "target_modules": ["layer"]}
PEFT_CONFIGS = {
    "lora": lambda: peft.LoraConfig(lora_alpha=3, **LINEAR),
    "loha": lambda: peft.LoHaConfig(alpha=3, **LINEAR),
    "lokr": lambda: peft.LoKrConfig(alpha=3, r=2, target_modules=["layer"]),
    "lokr with both factors decomposed": lambda: peft.LoKrConfig(
        alpha=3, r=1, target_modules=["layer"], decompose_both=True
    ),
    "lokr of whole factors": lambda: peft.LoKrConfig(alpha=64, r=64, target_modules=["layer"]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_deltas_are_those_of_peft(name: str) -> None:
    config = PEFT_CONFIGS[name]()
    layer = peft_layer(nn.Linear(IN, OUT), config)
    factors = factors_of(layer, config.lora_alpha if name == "lora" else config.alpha)
    torch.testing.assert_close(factors.delta(), layer.get_delta_weight("default"))
    assert factors.kind == name.split()[0]
    assert factors.rank == (None if "whole" in name else config.r)


@torch.no_grad()
@pytest.mark.parametrize("layer_class", [nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("kernel", [1, 2])
def test_convolutions_are_those_of_peft(layer_class: type[nn.Module], kernel: int) -> None:
    config = peft.LoraConfig(lora_alpha=3, **LINEAR)
    layer = peft_layer(layer_class(6, 10, kernel), config)
    factors, base = factors_of(layer, 3), layer.base_layer
    assert factors.fits(base.weight.shape)
    x = random(1, 6, *[5] * (base.weight.ndim - 2))
    adapted = layer(x)
    base.weight += factors.delta(base.weight.shape)
    torch.testing.assert_close(base(x), adapted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_a_missing_alpha_counts_as_the_rank(kind: str) -> None:
    factors = ALL_KINDS[kind]()
    with_rank = Factors(tensors=factors.tensors, alpha=torch.tensor(float(factors.rank)))
    with_half = Factors(tensors=factors.tensors, alpha=torch.tensor(factors.rank / 2))
    assert torch.equal(factors.delta(), with_rank.delta())
    torch.testing.assert_close(factors.delta() / 2, with_half.delta())


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_an_alpha_of_zero_counts_as_the_rank(kind: str) -> None:
    """As the trainers that write one mean it."""
    factors = ALL_KINDS[kind]()
    with_zero = Factors(tensors=factors.tensors, alpha=torch.tensor(0.0))
    assert torch.equal(with_zero.delta(), factors.delta()) and factors.delta().any()
    assert with_zero.has_zero_alpha == (kind != "whole lokr") and not factors.has_zero_alpha


def test_whole_kronecker_factors_are_never_scaled() -> None:
    factors = whole_lokr(alpha=torch.tensor(7.0))
    assert torch.equal(factors.delta(), torch.kron(factors.tensors["lokr_w1"], factors.tensors["lokr_w2"]))


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("rows", [(0, 6), (6, 24), (5, 13), (23, 24)])
def test_slices_are_rows_of_the_delta(kind: str, rows: tuple[int, int]) -> None:
    factors = ALL_KINDS[kind](alpha=torch.tensor(2.0))
    part = factors.slice_rows(*rows)
    assert part.delta_shape == (rows[1] - rows[0], IN)
    torch.testing.assert_close(part.delta(), factors.delta()[slice(*rows)])


def test_slices_of_slices_count_from_the_slice() -> None:
    factors = lokr()
    part = factors.slice_rows(5, 20).slice_rows(2, 4)
    torch.testing.assert_close(part.delta(), factors.delta()[7:9])
    back_on_the_grid = factors.slice_rows(5, 20).slice_rows(1, 7)
    torch.testing.assert_close(back_on_the_grid.delta(), factors.delta()[6:12])


def test_kronecker_factors_are_sliced_themselves_where_the_rows_allow_it() -> None:
    assert lokr().slice_rows(6, 18).rows is None
    assert lokr().slice_rows(6, 17).rows == (6, 17)


@pytest.mark.parametrize("second", [("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")])
@pytest.mark.parametrize("alpha", [None, torch.tensor(3.0)])
def test_a_first_kronecker_factor_multiplied_out_changes_no_delta(
    second: tuple[str, ...], alpha: Tensor | None
) -> None:
    shapes = {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 3), "lokr_w2": (6, 6), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 6)}
    tensors = {name: random(*shapes[name], dtype=torch.bfloat16) for name in ("lokr_w1_a", "lokr_w1_b", *second)}
    factors = Factors(tensors=tensors, alpha=alpha)
    whole = factors.with_whole_first()
    assert set(whole.tensors) == {"lokr_w1", *second}
    torch.testing.assert_close(whole.delta(), factors.delta())
    rows = factors.slice_rows(5, 13)
    torch.testing.assert_close(rows.with_whole_first().delta(), rows.delta())


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_deltas_are_computed_in_float32_whatever_the_file_holds(kind: str, dtype: torch.dtype) -> None:
    factors = ALL_KINDS[kind](alpha=torch.tensor(2.0)).to(dtype=dtype)
    delta = factors.delta()
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta, factors.to(dtype=torch.float64).delta())
    assert not torch.equal(delta, factors.delta().to(dtype).float())


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_shapes_are_known_without_any_content(kind: str) -> None:
    factors = ALL_KINDS[kind]().to("meta")
    assert factors.delta_shape == (OUT, IN)
    assert factors.fits((OUT, IN))
    assert factors.fits((OUT, IN, 1, 1)) and factors.fits((OUT, IN // 2, 1, 2))
    assert not factors.fits((OUT, IN + 1))
    assert not factors.fits((OUT + 6, IN))
    assert not factors.fits((OUT * 2, IN // 2))
    assert not factors.slice_rows(0, 7).fits((OUT, IN))


def test_a_kernel_does_not_fit_another_one() -> None:
    factors = Factors(tensors={DOWN: random(RANK, 6, 1, 2, 2), UP: random(10, RANK, 1, 1, 1)})
    assert factors.fits((10, 6, 1, 2, 2))
    assert not factors.fits((10, 6, 2, 2, 1))
    assert not factors.fits((10, 24))


def test_a_pointwise_convolution_fits_a_linear_layer() -> None:
    factors = Factors(tensors={DOWN: random(RANK, 6, 1, 1), UP: random(10, RANK, 1, 1)})
    assert factors.fits((10, 6))
    assert factors.delta((10, 6)).shape == (10, 6)


MISFITS = {
    "lora": (UP, DOWN),
    "loha": ("hada_w1_a", "hada_w1_b"),
    "lokr": ("lokr_w2_a", "lokr_w2_b"),
    "whole lokr": ("lokr_w2", "lokr_w2"),
}


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6, 4), (6, 4, 1, 2, 2)])
def test_a_whole_difference_is_its_own_delta_and_fits_its_own_shape_only(shape: tuple[int, ...]) -> None:
    """Not even a flattened one, which factors may be."""
    tensor = random(*shape, dtype=torch.bfloat16)
    whole = Factors(tensors={DIFF: tensor}, alpha=torch.tensor(3.0))
    assert (whole.kind, whole.rank, whole.delta_shape) == (DIFF, None, shape) and not whole.has_zero_alpha
    assert whole.delta().dtype == torch.float32 and torch.equal(whole.delta(shape), tensor.float())
    assert whole.fits(shape) and whole.misfit((5, *shape[1:])) == DIFF
    assert not any(map(whole.fits, [(5, *shape[1:]), (*shape, 1), (math.prod(shape),) * (len(shape) > 1)]))
    assert torch.equal(whole.slice_rows(0, 1).delta(), tensor[:1].float())


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_rows_and_columns_that_do_not_fit_have_their_own_culprits(kind: str) -> None:
    factors, (of_rows, of_columns) = ALL_KINDS[kind]().to("meta"), MISFITS[kind]
    assert factors.misfit((OUT * 2, IN)) == of_rows
    assert factors.misfit((OUT, IN * 2)) == of_columns
    assert factors.misfit((OUT, IN, 2, 1)) == of_columns


def test_a_first_kronecker_factor_that_divides_nothing_is_the_culprit() -> None:
    assert lokr().misfit((OUT + 1, IN)) == "lokr_w1" == lokr().misfit((OUT, IN + 1))
    shapes = {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 3), "lokr_w2": (6, 6)}
    both = Factors(tensors={name: random(*shape) for name, shape in shapes.items()})
    assert (both.misfit((OUT + 1, IN)), both.misfit((OUT, IN + 1))) == ("lokr_w1_a", "lokr_w1_b")


BAD = {
    "nothing": ({}, "factors", "none"),
    "rank 0": ({DOWN: (0, 8), UP: (8, 0)}, DOWN, "(0, 8)"),
    "loha of rank 0": ({"hada_w1_b": (0, 8)} | {f"hada_w{i}": (8, 0) for i in ("1_a", "2_a")}, "hada_w1_b", "(0, 8)"),
    "an empty lokr": ({"lokr_w2": (0, 8), "lokr_w1": (2, 2)}, "lokr_w2", "(0, 8)"),
    "another rank": ({DOWN: (4, 8), UP: (8, 5)}, UP, "rank 5"),
    "no up": ({DOWN: (4, 8)}, UP, "nothing"),
    "a vector": ({DOWN: (4,), UP: (8, 4)}, DOWN, "(4,)"),
    "a kernel in up": ({DOWN: (4, 8, 3, 3), UP: (8, 4, 3, 3)}, UP, "(8, 4, 3, 3)"),
    "two kinds": ({DOWN: (4, 8), UP: (8, 4), "hada_w1_a": (8, 4)}, "hada_w1_a", "lora and loha"),
    "half a loha": ({"hada_w1_a": (8, 4), "hada_w1_b": (4, 8)}, "hada_w2_a", "nothing"),
    "two products": (
        {"hada_w1_a": (8, 4), "hada_w1_b": (4, 8), "hada_w2_a": (8, 4), "hada_w2_b": (4, 9)},
        "hada_w2_a",
        "(8, 9)",
    ),
    "half a lokr": ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 2)}, "lokr_w2_b", "nothing"),
    "lokr ranks": ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (3, 4)}, "lokr_w2_a", "rank 2"),
    "a lokr kernel": ({"lokr_w1": (2, 2), "lokr_w2": (4, 2, 3, 3)}, "lokr_w2", "(4, 2, 3, 3)"),
    "whole and factors": ({"lokr_w1": (2, 2), "lokr_w2": (4, 2), "lokr_w2_a": (4, 2)}, "lokr_w2", "too"),
}


@pytest.mark.parametrize("name", BAD)
def test_factors_that_do_not_fit_name_the_first_wrong_one(name: str) -> None:
    shapes, part, got = BAD[name]
    with pytest.raises(FactorError) as caught:
        Factors(tensors={part: torch.empty(shape, device="meta") for part, shape in shapes.items()})
    assert caught.value.part == part
    assert got in caught.value.got


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_factors_are_floating_point_numbers(dtype: torch.dtype) -> None:
    tensors = {DOWN: random(RANK, IN), UP: random(OUT, RANK).to(dtype)}
    with pytest.raises(FactorError) as caught:
        Factors(tensors=tensors)
    assert (caught.value.part, caught.value.got) == (UP, f"type {str(dtype).removeprefix('torch.')}")


def test_an_alpha_may_be_a_whole_number_but_no_yes_or_no() -> None:
    assert lora(alpha=torch.tensor(2)).scale == 0.5
    for dtype in (torch.bool, torch.complex64):
        with pytest.raises(FactorError, match="alpha: got type"):
            lora(alpha=torch.tensor(1).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64])
def test_nan_and_infinity_are_seen_in_every_type(dtype: torch.dtype) -> None:
    assert is_finite(torch.ones(3).to(dtype))
    for value in ("nan", "inf", "-inf"):
        if dtype.is_floating_point and not (dtype == torch.float8_e4m3fn and "inf" in value):
            assert not is_finite(torch.tensor([1.0, float(value)]).to(dtype))


def test_an_alpha_is_one_number() -> None:
    assert math.isclose(lora(alpha=torch.tensor([2.0])).scale, 0.5)
    with pytest.raises(FactorError, match="alpha"):
        lora(alpha=torch.ones(2))
