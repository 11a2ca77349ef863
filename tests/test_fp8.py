"""Weights in 8 bits, and layers that compute with them, against the formats' formulas in NumPy and float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.fp8 import BLOCK, E4M3, Fp8Linear, become_fp8, cast, dequantised, quantised, scale_shape, scale_type

ROWS, COLUMNS = 5, 3 * BLOCK
CODES = torch.arange(256, dtype=torch.uint8).view(E4M3).double().nan_to_num(0).unique().numpy()
"""Every number that a code can be."""


def random(*shape: int, seed: int = 0, scale: float = 0.02) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fp8_layer(weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Fp8Linear:
    """A layer with these codes."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).requires_grad_(False)
    become_fp8(layer, scale=scale if scale is None else (tuple(scale.shape), scale.dtype))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.scale_weight = scale
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def layers(dtype: torch.dtype, *, columns: int = COLUMNS) -> tuple[Fp8Linear, nn.Linear]:
    """One in fp8, and a plain one with the weight that this one stands for."""
    codes, scale = quantised(random(ROWS, columns, seed=1))
    bias = random(ROWS, seed=2).to(dtype)
    scale = scale.bfloat16()
    plain = nn.Linear(columns, ROWS)
    plain.weight = nn.Parameter(dequantised(codes, scale, dtype), requires_grad=False)
    plain.bias = nn.Parameter(bias, requires_grad=False)
    return fp8_layer(codes, bias, scale), plain


# ---- the format ----


@pytest.mark.parametrize("columns", [COLUMNS, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_of_a_row_shares_the_scale_that_gives_its_largest_number_the_largest_code(columns, dtype) -> None:
    weight = random(ROWS, columns).to(dtype)
    codes, scale = quantised(weight)
    size = BLOCK if columns % BLOCK == 0 else columns
    assert scale.shape == ((ROWS, columns // BLOCK, 1) if size == BLOCK else (ROWS, 1)) == scale_shape((ROWS, columns))
    assert codes.dtype == E4M3 and codes.shape == weight.shape and scale.dtype == torch.float32
    values, scales = weight.float().numpy(), scale.reshape(ROWS, -1).numpy()
    for row in range(ROWS):
        for number, begin in enumerate(range(0, columns, size)):
            block = values[row, begin : begin + size]
            wanted = np.float32(np.abs(block).max()) / np.float32(448)
            assert scales[row, number] == wanted
            ratios = np.clip(block / wanted, -448, 448).astype(np.float64)
            found = codes[row, begin : begin + size].double().numpy()
            assert np.abs(found).max() == 448
            nearest = np.abs(ratios[:, None] - CODES[None]).min(axis=1)
            np.testing.assert_array_equal(np.abs(ratios - found), nearest)


def test_zeros_stay_zeros_and_small_numbers_are_kept() -> None:
    weight = torch.zeros(2, 2 * BLOCK)
    weight[1, 0] = 1e-6
    codes, scale = quantised(weight)
    assert scale.min() > 0
    assert torch.equal(dequantised(codes, scale, torch.float32)[0], weight[0])
    assert float(dequantised(codes, scale, torch.float32)[1, 0]) == pytest.approx(1e-6, rel=0.07)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_noticed(odd: float) -> None:
    weight = random(ROWS, COLUMNS)
    weight[2, 70] = odd
    for make in (quantised, cast):
        with pytest.raises(ValueError, match="finite"):
            make(weight)


def test_a_cast_ends_at_the_largest_code() -> None:
    weight = torch.tensor([[1e4, -460.0, 448.0, 0.3, -0.0008]])
    assert cast(weight).double().tolist() == [[448, -448, 448, 0.3125, 0]]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (ROWS,), (ROWS, 1), (ROWS, 3, 1), (ROWS, 6, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_of_every_layout_are_multiplied_where_they_belong(shape, dtype) -> None:
    codes = torch.randint(0, 120, (ROWS, COLUMNS), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    codes, scale = codes.view(E4M3), (0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(4))).to(dtype)
    blocks = scale.double().numpy().reshape(ROWS if scale.numel() >= ROWS else 1, -1)
    wanted = codes.double().numpy() * np.repeat(
        np.broadcast_to(blocks, (ROWS, blocks.shape[1])), COLUMNS // blocks.shape[1], 1
    )
    found = dequantised(codes, scale, torch.float64).numpy()
    np.testing.assert_allclose(found, wanted, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6)
    assert codes.dtype == E4M3, "the codes are as they were"


def test_codes_without_scales_are_the_weight() -> None:
    codes = random(ROWS, COLUMNS, scale=1).to(E4M3)
    assert torch.equal(dequantised(codes, None, torch.bfloat16), codes.bfloat16())


def test_scales_of_half_precision_weights_do_not_vanish() -> None:
    """A block of a float16 weight whose scale float16 could not hold."""
    assert scale_type(torch.bfloat16) == torch.bfloat16
    weight = random(1, BLOCK, scale=1e-6).half()
    codes, scale = quantised(weight)
    found = dequantised(codes, scale.to(scale_type(torch.float16)), torch.float32)
    assert float((found - weight.float()).norm() / weight.float().norm()) < 0.05


# ---- the layer ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [COLUMNS, 96])
def test_a_layer_computes_what_its_weight_stands_for(dtype, columns) -> None:
    layer, plain = layers(dtype, columns=columns)
    x, gradient = random(2, 7, columns, seed=5, scale=1).to(dtype), random(2, 7, ROWS, seed=6, scale=1).to(dtype)
    found, wanted = [], []
    for one, results in ((layer, found), (plain, wanted)):
        own = x.clone().requires_grad_()
        output = one(own)
        output.backward(gradient)
        results += [output, own.grad]
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == dtype and torch.equal(got, want)
    assert layer.weight.grad is None and layer.bias.grad is None


def test_gradients_are_the_formulas() -> None:
    layer, _ = layers(torch.float32)
    x = random(4, COLUMNS, seed=5, scale=1).requires_grad_()
    gradient = random(4, ROWS, seed=6, scale=1)
    layer(x).backward(gradient)
    weight = layer.weight.double().view(ROWS, -1, BLOCK) * layer.scale_weight.double()
    torch.testing.assert_close(x.grad.double(), gradient.double() @ weight.view(ROWS, -1), rtol=5e-3, atol=5e-4)


def test_a_layer_without_bias_or_scales_works_too() -> None:
    codes = random(ROWS, COLUMNS, scale=1).to(E4M3)
    x = random(4, COLUMNS, seed=5, scale=1)
    assert torch.equal(fp8_layer(codes, None, None)(x), F.linear(x, codes.float()))


def test_the_backward_pass_keeps_codes_and_scales_only() -> None:
    layer, plain = layers(torch.bfloat16)
    kept: dict[nn.Module, list[Tensor]] = {layer: [], plain: []}
    for one, tensors in kept.items():
        x = random(2, COLUMNS, scale=1).bfloat16().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=tensors: to.append(t) or t, lambda t: t):
            output = one(x)
        output.sum().backward()
    assert {t.data_ptr() for t in kept[layer]} == {layer.weight.data_ptr(), layer.scale_weight.data_ptr()}
    num_bytes = sum(t.numel() * t.element_size() for t in kept[layer])
    assert num_bytes == ROWS * COLUMNS * (1 + 2 / BLOCK) < sum(t.numel() * t.element_size() for t in kept[plain])


def test_a_layer_is_still_a_linear_one_with_its_state() -> None:
    layer, _ = layers(torch.float32)
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (COLUMNS, ROWS)
    assert set(layer.state_dict()) == {"weight", "scale_weight", "bias"}
    assert set(fp8_layer(layer.weight.data, None, None).state_dict()) == {"weight"}


def test_a_layer_that_is_cast_as_a_whole_computes_the_same() -> None:
    """`.to(dtype)` of a whole model reaches the codes, too: they stay the same numbers."""
    layer, _ = layers(torch.float32)
    x = random(4, COLUMNS, seed=5, scale=1)
    before = layer(x)
    scale = layer.scale_weight
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == scale.dtype == torch.bfloat16
    codes = layer.weight.clone()
    assert torch.equal(
        layer(x.bfloat16()), F.linear(x.bfloat16(), dequantised(codes, scale, torch.bfloat16), layer.bias)
    )
    assert torch.equal(layer.weight, codes)
    torch.testing.assert_close(layer(x.bfloat16()).float(), before, rtol=0.02, atol=0.02)


def test_a_layer_compiles_into_one_graph() -> None:
    layer, _ = layers(torch.float32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for x in (random(4, COLUMNS, seed=5, scale=1), random(4, COLUMNS, seed=6, scale=1).requires_grad_()):
        output = compiled(x)
        torch.testing.assert_close(output, layer(x.detach()), rtol=1e-5, atol=1e-6)
    output.sum().backward()
    own = x.detach().clone().requires_grad_()
    layer(own).sum().backward()
    torch.testing.assert_close(x.grad, own.grad)
