"""LoRA, LoHa and LoKr on single layers against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import loha, lokr, lora_framepack
from networks.lokr import factorization
from networks.network import Network

MODULES = {"LoRA": lora_framepack, "LoHa": loha, "LoKr": lokr}


def around(layer: nn.Module) -> nn.Module:
    """A transformer whose only block has only this layer."""
    transformer, block = nn.Module(), nn.Module()
    block.layer = layer
    transformer.transformer_blocks = nn.ModuleList([block])
    return transformer


def network_on(
    layer: nn.Module, kind: str = "LoRA", randomised: bool = True, neuron_dropout=None, **options
) -> Network:
    """Applied, and with no factor at zero; `options` with names of creation arguments go there, others are strings."""
    direct = {name: options.pop(name) for name in ("dim", "alpha", "seed") if name in options}
    args = {name: str(value) for name, value in options.items()}
    transformer = around(layer.requires_grad_(False))
    network = MODULES[kind].create_network(transformer, neuron_dropout=neuron_dropout, args=args, **direct)
    if randomised:
        for parameter in network.parameters():
            nn.init.normal_(parameter)
    network.apply_to(transformer)
    return network


def part(network: Network, name: str) -> Tensor:
    return network.state_dict()[f"lora_unet_transformer_blocks_0_layer.{name}"]


def delta(network: Network, kind: str) -> Tensor:
    """The weight difference without its scale."""
    if kind == "LoRA":
        return part(network, "lora_up.weight") @ part(network, "lora_down.weight")
    if kind == "LoHa":
        first = part(network, "hada_w1_a") @ part(network, "hada_w1_b")
        return first * (part(network, "hada_w2_a") @ part(network, "hada_w2_b"))
    return torch.kron(part(network, "lokr_w1"), part(network, "lokr_w2_a") @ part(network, "lokr_w2_b"))


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    return float((got - wanted).detach().abs().max()) <= tolerance * float(wanted.detach().abs().max())


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 24), (2, 3, 5, 24)])
def test_linear_layer_adds_the_scaled_difference(kind: str, shape: tuple[int, ...]) -> None:
    layer, x = nn.Linear(24, 30), torch.randn(shape)
    network = network_on(layer, kind, dim=2, alpha=3.0).eval()
    for multiplier in (1.0, -0.7, 0.0):
        network.multiplier = multiplier
        weight = layer.weight + multiplier * 3.0 / 2 * delta(network, kind)
        assert close(layer(x), F.linear(x, weight, layer.bias))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 10, 1),
        nn.Conv2d(6, 10, 3, stride=2, padding=1),
        nn.Conv2d(6, 10, 3, dilation=2, padding="same", padding_mode="circular"),
        nn.Conv3d(6, 10, (1, 3, 2), stride=(1, 2, 1)),
    ],
    ids=["point", "strided", "dilated", "3d"],
)
def test_convolution_adds_the_convolved_difference(layer: nn.Module) -> None:
    x = torch.randn(2, 6, *[9] * (len(layer.kernel_size)))
    network = network_on(layer, dim=4, alpha=3.0, conv_dim=4, conv_alpha=3.0)
    adapted = layer(x)
    network.remove()
    down, up = part(network, "lora_down.weight"), part(network, "lora_up.weight")
    assert down.shape == (4, 6, *layer.kernel_size) and up.shape == (10, 4, *[1] * len(layer.kernel_size))
    layer.weight += 3.0 / 4 * torch.einsum("or,ri...->oi...", up.flatten(1), down)
    assert close(adapted, layer(x))


def test_lokr_with_a_whole_second_factor_has_scale_1_and_alpha_of_the_rank() -> None:
    layer, x = nn.Linear(24, 30), torch.randn(3, 24)
    network = network_on(layer, "LoKr", dim=3, alpha=1.0)  # 24 = 4 · 6, 30 = 5 · 6: 3 is no less than half of 6
    assert set(network.state_dict()) == {
        f"lora_unet_transformer_blocks_0_layer.{name}" for name in ("lokr_w1", "lokr_w2", "alpha")
    }
    weight = layer.weight + torch.kron(part(network, "lokr_w1"), part(network, "lokr_w2"))
    assert close(layer(x), F.linear(x, weight, layer.bias)) and part(network, "alpha") == 3


@pytest.mark.parametrize(("dim", "is_whole"), [(31, False), (32, True)])
def test_lokr_is_whole_from_half_of_the_larger_side(dim: int, is_whole: bool) -> None:
    network = network_on(nn.Linear(3072, 3072, device="meta"), "LoKr", randomised=False, dim=dim)
    shapes = {key.partition(".")[2]: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    second = {"lokr_w2": (64, 64)} if is_whole else {"lokr_w2_a": (64, dim), "lokr_w2_b": (dim, 64)}
    assert shapes == {"lokr_w1": (48, 48), **second, "alpha": ()}


def test_lokr_factor_splits_both_sides() -> None:
    network = network_on(nn.Linear(24, 36), "LoKr", dim=1, factor=4)
    assert part(network, "lokr_w1").shape == (4, 4) and part(network, "lokr_w2_a").shape == (9, 1)
    assert part(network, "lokr_w2_b").shape == (1, 6)


@pytest.mark.parametrize(
    ("size", "factor", "wanted"),
    [
        *[(1536, -1, (32, 48)), (3072, -1, (48, 64)), (5120, -1, (64, 80)), (8960, -1, (80, 112))],
        *[(12288, -1, (96, 128)), (13824, -1, (108, 128)), (15360, -1, (120, 128))],
        *[
            (3072, 4, (4, 768)),
            (3072, 7, (6, 512)),
            (12, 6, (2, 6)),
            (7, -1, (1, 7)),
            (1, -1, (1, 1)),
            (16, -1, (4, 4)),
        ],
    ],
)
def test_sizes_are_split_as_published(size: int, factor: int, wanted: tuple[int, int]) -> None:
    assert factorization(size, factor) == wanted


@pytest.mark.parametrize("kind", MODULES)
def test_new_network_changes_nothing(kind: str) -> None:
    layer, x = nn.Linear(24, 30), torch.randn(4, 24)
    before = layer(x)
    network_on(layer, kind, randomised=False)
    assert torch.equal(layer(x), before)


def test_lora_starts_kaiming_uniform_and_zero() -> None:
    network = network_on(nn.Linear(900, 200), randomised=False, dim=64)
    down, up = part(network, "lora_down.weight"), part(network, "lora_up.weight")
    assert not up.any() and float(down.abs().max()) == pytest.approx(1 / 30, rel=1e-3)
    assert float(down.mean()) == pytest.approx(0, abs=5e-4)
    assert float(down.std()) == pytest.approx(1 / 30 / math.sqrt(3), rel=0.01)
    conv = network_on(nn.Conv2d(100, 20, 3), randomised=False, conv_dim=64)
    assert float(part(conv, "lora_down.weight").abs().max()) == pytest.approx(1 / 30, rel=1e-3)


def test_loha_starts_normal_and_zero() -> None:
    network = network_on(nn.Linear(500, 400), "LoHa", randomised=False, dim=32)
    assert not part(network, "hada_w2_a").any()
    for name, std in (("hada_w1_a", 0.1), ("hada_w1_b", 1.0), ("hada_w2_b", 1.0)):
        assert float(part(network, name).std()) == pytest.approx(std, rel=0.03), name
        assert float(part(network, name).mean()) == pytest.approx(0, abs=0.03 * std), name
    assert not torch.equal(part(network, "hada_w1_b"), part(network, "hada_w2_b"))


def test_lokr_starts_kaiming_uniform_and_zero() -> None:
    low = network_on(nn.Linear(3072, 3072), "LoKr", randomised=False, dim=16)
    whole = network_on(nn.Linear(3072, 3072), "LoKr", randomised=False, dim=64)
    assert not part(low, "lokr_w2_b").any() and not part(whole, "lokr_w2").any()
    assert float(part(low, "lokr_w1").abs().max()) == pytest.approx(1 / math.sqrt(48), rel=0.01)
    assert float(part(low, "lokr_w2_a").abs().max()) == pytest.approx(1 / 4, rel=0.01)


@pytest.mark.parametrize("kind", MODULES)
def test_float32_adapter_works_on_a_bfloat16_layer(kind: str) -> None:
    layer, x = nn.Linear(24, 30).bfloat16(), torch.randn(4, 24, dtype=torch.bfloat16)
    network = network_on(layer, kind, dim=2)
    out = layer(x)
    out.float().square().sum().backward()
    exact = F.linear(x.float(), layer.weight.float() + delta(network, kind) / 2, layer.bias.float())
    assert out.dtype == torch.bfloat16 and close(out.float(), exact, 0.01)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in network.parameters())


def test_outside_autocast_the_adapter_computes_in_float32() -> None:
    layer, x = nn.Linear(24, 30).bfloat16(), torch.randn(4, 24, dtype=torch.bfloat16)
    network = network_on(layer, dim=2)
    hidden = F.linear(x.float(), part(network, "lora_down.weight")) * 0.5
    exact = F.linear(x, layer.weight, layer.bias) + F.linear(hidden, part(network, "lora_up.weight"))
    assert exact.dtype == torch.float32 and torch.equal(layer(x), exact.bfloat16())


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_type_of_the_base(kind: str, base_dtype: torch.dtype) -> None:
    layer, x = nn.Linear(24, 30).to(base_dtype), torch.randn(4, 24)
    network = network_on(layer, kind, dim=2)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    exact = F.linear(x, layer.weight.float() + delta(network, kind) / 2, layer.bias.float())
    assert out.dtype == torch.bfloat16 and close(out.float(), exact, 0.03)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


def test_autocast_spares_the_copy_of_the_input_in_float32(monkeypatch) -> None:
    layer, x = nn.Linear(24, 30).bfloat16(), torch.randn(4, 24, dtype=torch.bfloat16)
    (adapter,) = network_on(layer, dim=2).adapters.values()
    seen, change = [], adapter.change
    monkeypatch.setattr(adapter, "change", lambda x, scale: (seen.append(x.dtype), change(x, scale))[1])
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert seen == [torch.float32, torch.bfloat16]


def test_shapes_can_be_counted_on_the_meta_device() -> None:
    layer = nn.Linear(24, 30, device="meta", dtype=torch.bfloat16)
    network_on(layer, randomised=False).to("meta")
    assert layer(torch.empty(4, 24, device="meta", dtype=torch.bfloat16)).shape == (4, 30)


def ones(network: Network) -> Network:
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    return network


def silent(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    return layer.requires_grad_(False).apply(lambda m: (nn.init.zeros_(m.weight), nn.init.zeros_(m.bias)))


def test_neuron_dropout_drops_single_activations() -> None:
    layer = silent(1, 1)
    network = ones(network_on(layer, neuron_dropout=0.25, dim=1))
    out = layer(torch.ones(50, 400, 1))
    values, counts = out.unique(return_counts=True)
    assert torch.allclose(values, torch.tensor([0.0, 1 / 0.75])) and counts[0] / out.numel() == pytest.approx(
        0.25, abs=0.02
    )
    network.eval()
    assert (layer(torch.ones(50, 400, 1)) == 1).all()


def test_rank_dropout_of_lora_drops_ranks_of_whole_samples() -> None:
    layer = silent(1, 500)
    network = network_on(layer, rank_dropout=0.3, dim=500, alpha=500.0)
    for key, parameter in network.named_parameters():
        parameter.data = torch.eye(500) if "up" in key else torch.ones_like(parameter)
    out = layer(torch.ones(8, 7, 1))
    assert (out == out[:, :1]).all() and not torch.equal(out[0], out[1])
    assert torch.allclose(out.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert float((out[:, 0] == 0).float().mean()) == pytest.approx(0.3, abs=0.03)
    network.eval()
    assert (layer(torch.ones(8, 7, 1)) == 1).all()


def test_rank_dropout_of_a_convolution_drops_ranks_of_whole_samples() -> None:
    layer = (
        nn.Conv2d(1, 64, 3).requires_grad_(False).apply(lambda m: (nn.init.zeros_(m.weight), nn.init.zeros_(m.bias)))
    )
    network = network_on(layer, rank_dropout=0.5, conv_dim=64, conv_alpha=64.0)
    for key, parameter in network.named_parameters():
        parameter.data = torch.eye(64)[..., None, None] if "up" in key else torch.ones_like(parameter)
    out = layer(torch.ones(4, 1, 5, 5))
    assert (out == out[..., :1, :1]).all() and set(out.unique().tolist()) == {0.0, 18.0}
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_rank_dropout_of_loha_and_lokr_drops_outputs_of_all_samples(kind: str) -> None:
    layer, x = silent(16, 900), torch.randn(3, 16)
    network = network_on(layer, kind, rank_dropout=0.3, dim=1)
    out, whole = layer(x), network.eval() and layer(x)
    kept = out[0] != 0
    assert torch.allclose(out, whole * kept / 0.7)
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize("kind", MODULES)
def test_module_dropout_drops_the_whole_change_of_a_step(kind: str) -> None:
    layer, x = nn.Linear(16, 12), torch.randn(3, 16)
    network = network_on(layer, kind, module_dropout=0.3, dim=1)
    base, whole = F.linear(x, layer.weight, layer.bias), network.eval() and layer(x)
    network.train()
    outs = [layer(x) for _ in range(400)]
    dropped = sum(torch.equal(out, base) for out in outs)
    assert dropped + sum(torch.equal(out, whole) for out in outs) == 400
    assert dropped / 400 == pytest.approx(0.3, abs=0.06)
    network.eval()
    assert all(torch.equal(layer(x), whole) for _ in range(20))


def test_dropout_gives_the_same_gradients_under_checkpointing() -> None:
    layer, x = nn.Linear(16, 12), torch.randn(3, 16)
    options = {"neuron_dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3, "dim": 8}
    network = network_on(layer, **options)
    gradients = []
    for forward in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        network.zero_grad()
        torch.manual_seed(1)
        for _ in range(5):
            forward(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(a.any() and torch.equal(a, b) for a, b in zip(*gradients, strict=True))
