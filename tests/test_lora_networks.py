"""Networks on whole transformers: applied, trained, limited, taken off, rebuilt."""

import copy
import hashlib
import logging
from dataclasses import dataclass

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from frame_pack.context import one_frame_context
from frame_pack.loading import load_transformer, open_transformer
from frame_pack.model import Conditioning, FramePackTransformer
from networks import loha, lokr, lora_framepack
from networks.arguments import NetworkArguments
from networks.lora import LoraLayer
from networks.network import Network
from networks.rebuild import network_from_tensors
from options.errors import UserError
from options.one_frame import OneFrameOptions

MODULES = {"LoRA": lora_framepack, "LoHa": loha, "LoKr": lokr}
FILE = "--network_weights 名前.safetensors"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A transformer and one set of inputs."""

    transformer: FramePackTransformer
    latents: Tensor
    timesteps: Tensor
    conditioning: Conditioning

    def __call__(self, weights: dict[str, Tensor] | None = None) -> Tensor:
        inputs = (self.latents, self.timesteps, self.conditioning)
        return self.transformer(*inputs) if weights is None else functional_call(self.transformer, weights, inputs)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def loaded(demo_models) -> FramePackTransformer:
    return load_transformer(open_transformer(demo_models.dit), dtype=torch.float32, device="cpu")


@pytest.fixture
def run(loaded) -> Run:
    transformer = copy.deepcopy(loaded)
    config, control = transformer.config, random(1, 16, 1, 4, 6)
    context = one_frame_context(
        [control], [None], OneFrameOptions.parse("target_index=1,control_index=0").resolve(1), window=9, like=control
    )
    conditioning = Conditioning(
        context=context,
        text=random(1, 5, config.text_width, seed=1),
        text_mask=torch.ones(1, 5, dtype=torch.bool),
        pooled=random(1, config.pooled_width, seed=2),
        image=random(1, 3, config.image_width, seed=3),
        guidance=torch.tensor([9984.0]),
    )
    latents = random(1, 16, 1, 4, 6, seed=4)
    return Run(transformer=transformer, latents=latents, timesteps=torch.tensor([700.0]), conditioning=conditioning)


def randomised(network: Network, std: float = 0.05) -> Network:
    """No factor at zero."""
    generator = torch.Generator().manual_seed(9)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return network


def trained(transformer: nn.Module, kind: str = "LoRA", **args: str) -> Network:
    return randomised(MODULES[kind].create_network(transformer, dim=2, alpha=3.0, args=args))


def merged_weights(transformer: nn.Module, state: dict[str, Tensor], multiplier: float = 1.0) -> dict[str, Tensor]:
    """The transformer's weights with a LoRA in them, differentiable; names are put together from the file's keys."""
    weights = {}
    for path, module in transformer.named_modules():
        name = "lora_unet_" + path.replace(".", "_")
        if f"{name}.alpha" in state:
            down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
            scale = multiplier * state[f"{name}.alpha"].detach() / len(down)
            weights[f"{path}.weight"] = module.weight + scale * up @ down
    return weights


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    return float((got - wanted).detach().abs().max()) <= tolerance * float(wanted.detach().abs().max())


def test_applied_network_equals_merged_weights(run) -> None:
    network = trained(run.transformer, include_patterns="['.*']")
    weights = merged_weights(run.transformer, network.state_dict(), 0.8)
    wanted, base = run(weights), run()
    assert any("norm" in path for path in network.paths.values()) and len(weights) == len(network.paths)
    network.multiplier = 0.8
    network.apply_to(run.transformer)
    assert close(run(), wanted) and not close(run(), base, 1e-2)


def test_gradients_are_those_through_merged_weights_and_the_base_has_none(run) -> None:
    network = trained(run.transformer)
    state = {key: tensor.detach().clone().requires_grad_() for key, tensor in network.state_dict().items()}
    run(merged_weights(run.transformer, state)).square().sum().backward()
    network.apply_to(run.transformer)
    run().square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert all(close(gradient, state[name].grad, 1e-4) for name, gradient in gradients.items())
    assert not any(p.requires_grad for p in run.transformer.parameters())
    assert all(p.requires_grad for p in network.parameters())


def test_applying_leaves_the_state_dict_and_removal_every_bit(run) -> None:
    before, keys = run(), list(run.transformer.state_dict())
    attributes = {path: (type(m), set(vars(m))) for path, m in run.transformer.named_modules()}
    network = trained(run.transformer)
    network.apply_to(run.transformer)
    assert list(run.transformer.state_dict()) == keys and not torch.equal(run(), before)
    network.remove()
    network.remove()
    assert torch.equal(run(), before)
    assert {path: (type(m), set(vars(m))) for path, m in run.transformer.named_modules()} == attributes


def test_several_networks_add_up_and_leave_in_any_order(run) -> None:
    base = run()
    first, second = trained(run.transformer), trained(run.transformer, exclude_patterns="['.*attn.*']")
    randomised(second, 0.07)
    first.multiplier, second.multiplier = 0.5, -1.5
    only_second = run(merged_weights(run.transformer, second.state_dict(), -1.5))
    weights = merged_weights(run.transformer, first.state_dict(), 0.5)
    for key, weight in merged_weights(run.transformer, second.state_dict(), -1.5).items():
        weights[key] = weights[key] + weight - run.transformer.get_parameter(key)
    both = run(weights)
    first.apply_to(run.transformer)
    second.apply_to(run.transformer)
    assert close(run(), both)
    first.remove()
    assert close(run(), only_second) and not close(run(), both)
    first.apply_to(run.transformer)
    assert close(run(), both)
    second.remove()
    first.remove()
    assert torch.equal(run(), base)


def test_multiplier_zero_is_the_base_to_the_bit(run) -> None:
    base, network = run(), trained(run.transformer)
    network.apply_to(run.transformer)
    changed = run()
    network.multiplier = 0
    assert torch.equal(run(), base) and network.multiplier == 0
    network.multiplier = 1
    assert torch.equal(run(), changed)
    for parameter in network.parameters():
        nn.init.constant_(parameter, float("nan"))
    network.multiplier = 0
    assert torch.equal(run(), base)


def test_applying_twice_or_to_another_model_is_refused(run) -> None:
    network = trained(run.transformer)
    with pytest.raises(ValueError, match="no layer transformer_blocks.0.attn.to_q"):
        network.apply_to(nn.Linear(2, 2))
    network.apply_to(run.transformer)
    with pytest.raises(RuntimeError, match="applied already"):
        network.apply_to(run.transformer)


def test_float32_network_works_on_the_bfloat16_transformer(run) -> None:
    network = trained(run.transformer)
    exact = run(merged_weights(run.transformer, network.state_dict()))
    run.transformer.bfloat16()
    base = run()
    network.apply_to(run.transformer)
    assert close(run(), exact, 0.05) and not close(run(), base, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        run().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters())


def test_layers_of_others_are_called_and_their_weights_not_read() -> None:
    class Packed(nn.Linear):
        """Computes with something else than its weight."""

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.packed

    layer = Packed(4, 4)
    layer.packed = torch.randn(4, 4)
    layer.weight = None
    transformer = nn.Module()
    transformer.transformer_blocks = nn.ModuleList([nn.ModuleDict({"layer": layer})])
    network, x = trained(transformer), torch.randn(3, 4)
    network.apply_to(transformer)
    adapter = network.adapters["transformer_blocks.0.layer"]
    assert torch.allclose(layer(x), x @ layer.packed + 1.5 * adapter.lora_up(adapter.lora_down(x)))


def test_a_replaced_forward_is_refused_before_and_respected_after(run) -> None:
    layer = run.transformer.get_submodule("transformer_blocks.0.ff.net.2")
    x = torch.ones(2, layer.in_features)
    plain, network = layer(x), trained(run.transformer)
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    with pytest.raises(RuntimeError, match="forward of transformer_blocks.0.ff.net.2 has been replaced"):
        network.apply_to(run.transformer)
    assert type(run.transformer.get_submodule("transformer_blocks.0.attn.to_q")) is nn.Linear
    del layer.forward
    network.apply_to(run.transformer)
    changed, adapted = layer(x), layer.forward
    layer.forward = lambda x: 3 * adapted(x)
    assert torch.equal(layer(x), 3 * changed) and not close(changed, plain, 0.01)
    network.remove()
    assert torch.equal(layer(x), 3 * plain)
    network.apply_to(run.transformer)
    del layer.forward
    network.remove()
    assert torch.equal(layer(x), plain) and type(layer) is nn.Linear


def test_compiled_blocks_notice_networks_and_share_one_graph() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(x.relu())

    transformer, x = nn.Module(), torch.randn(2, 4).requires_grad_()
    transformer.transformer_blocks = nn.ModuleList([Block() for _ in range(3)]).requires_grad_(False)
    counter = CompileCounterWithBackend("aot_eager")

    def run(compiled: bool) -> Tensor:
        y = x  # requires a gradient, so that the first block sees what the others see
        for block in transformer.transformer_blocks:
            y = block(y) if compiled else Block.forward(block, y)
        return y

    def agrees() -> bool:
        return close(run(compiled=True), run(compiled=False))

    torch._dynamo.reset()
    for block in transformer.transformer_blocks:
        block.compile(backend=counter, fullgraph=True)
    base = run(compiled=True)
    assert agrees() and counter.frame_count == 1
    network = trained(transformer, module_dropout="0.1", rank_dropout="0.1").eval()
    network.apply_to(transformer)
    assert agrees() and not close(run(compiled=True), base) and counter.frame_count == 2
    network.multiplier = 0.5
    assert agrees() and not close(run(compiled=True), base) and counter.frame_count == 3
    network.train()
    run(compiled=True).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    network.remove()
    assert torch.equal(run(compiled=True), base)
    torch._dynamo.reset()


def test_initial_values_depend_on_seed_and_layer_only(run) -> None:
    generator_state = torch.get_rng_state()
    networks = [
        lora_framepack.create_network(run.transformer, args={}, seed=5),
        lora_framepack.create_network(run.transformer, args={"exclude_patterns": "['transformer_blocks.*']"}, seed=5),
        lora_framepack.create_network(run.transformer, args={}, seed=6),
    ]
    assert torch.equal(torch.get_rng_state(), generator_state)
    whole, part, other = (network.state_dict() for network in networks)
    assert 0 < len(part) < len(whole) and all(torch.equal(whole[key], tensor) for key, tensor in part.items())
    downs = [tensor for key, tensor in whole.items() if "lora_down" in key]
    assert len({tuple(down.flatten()[:4].tolist()) for down in downs}) == len(downs)
    assert not any(torch.equal(whole[key], other[key]) for key in whole if "lora_down" in key)


def test_initial_values_stay_what_they_are_in_every_version() -> None:
    """They are part of the promise that a seed repeats a training: computed with numpy's Mersenne Twister."""
    transformer, name = nn.Module(), "lora_unet_transformer_blocks_0_layer"
    transformer.transformer_blocks = nn.ModuleList([nn.ModuleDict({"layer": nn.Linear(4, 4)})])
    down = lora_framepack.create_network(transformer, args={}, seed=42).state_dict()[f"{name}.lora_down.weight"]
    seed = int.from_bytes(hashlib.sha256(f"42 {name}".encode()).digest()[:4], "little")
    words = numpy.random.RandomState(seed).randint(0, 2**32, 16, dtype=numpy.uint32)
    assert torch.equal(down.flatten(), torch.tensor((words % 2**24) / 2**24 * 2 - 1).float() / 2)


def test_parameter_groups_follow_the_learning_rate_and_lora_plus(run) -> None:
    network = trained(run.transformer, loraplus_lr_ratio="16")
    num_layers = len(network.paths)
    names = {id(parameter): name for name, parameter in network.named_parameters()}

    def summary(groups: list[dict]) -> list[tuple[str, float, int]]:
        return [(group["name"], group["lr"], len(group["params"])) for group in groups]

    groups = network.parameter_groups(1e-3)
    assert summary(groups) == [("unet", 1e-3, num_layers), ("unet plus", 16e-3, num_layers)]
    assert all("lora_up" in names[id(parameter)] for parameter in groups[1]["params"])
    assert summary(network.parameter_groups(1e-3, 4.0))[1][1] == 4e-3
    assert summary(trained(run.transformer).parameter_groups(1e-3)) == [("unet", 1e-3, 2 * num_layers)]
    assert network.parameter_groups(0.0) == network.parameter_groups(None) == []
    optimizer = torch.optim.AdamW(groups)
    assert [group["name"] for group in optimizer.param_groups] == ["unet", "unet plus"]


@pytest.mark.parametrize("limit", [0.05, 0.3, 1e6])
def test_norms_are_limited_by_the_published_formula(run, limit: float) -> None:
    network = trained(run.transformer)
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    norms, scaled = [], 0
    for index, name in enumerate(network.paths):
        if index % 2:  # a spread of norms, so that some exceed the limit and some do not
            state[f"{name}.lora_up.weight"] *= 0.2
        down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
        norm = max(float((up @ down * 1.5).norm()), limit / 2)
        ratio = min(norm, limit) / norm
        norms.append(float((up @ down * 1.5).norm()) * ratio)
        scaled += ratio != 1
    network.load_state_dict(state)
    report = network.scale_weight_norms(limit)
    after = network.state_dict()
    found = [float((after[f"{n}.lora_up.weight"] @ after[f"{n}.lora_down.weight"] * 1.5).norm()) for n in network.paths]
    assert found == pytest.approx(norms, rel=1e-4) and max(found) <= limit * 1.0001
    assert report.num_scaled == scaled and (limit != 0.3 or 0 < scaled < len(norms))
    assert report.mean == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    assert report.max == pytest.approx(max(norms), rel=1e-4)
    if limit == 1e6:
        assert all(torch.equal(tensor, state[key]) for key, tensor in after.items())


def test_limiting_norms_divides_the_change_between_both_factors(run) -> None:
    network = trained(run.transformer)
    name = next(iter(network.paths))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    network.scale_weight_norms(0.05)
    ratios = [
        network.state_dict()[f"{name}.{p}.weight"] / before[f"{name}.{p}.weight"] for p in ("lora_up", "lora_down")
    ]
    assert float(ratios[0].mean()) < 0.9 and torch.allclose(ratios[0].mean(), ratios[1].mean())


def test_limiting_norms_is_for_lora_and_needs_a_limit(run, caplog) -> None:
    network = trained(run.transformer, "LoHa")
    before = copy.deepcopy(network.state_dict())
    reports = [network.scale_weight_norms(0.01) for _ in range(3)]
    assert {(report.num_scaled, report.mean, report.max) for report in reports} == {(0, 0.0, 0.0)}
    assert [record.message for record in caplog.records] == ["--scale_weight_norms has no effect on LoHa"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="--scale_weight_norms: got"):
            trained(run.transformer).scale_weight_norms(limit)


@pytest.mark.parametrize("kind", MODULES)
def test_network_is_rebuilt_from_its_tensors(run, kind: str, caplog) -> None:
    caplog.set_level(logging.INFO)
    network = trained(run.transformer, kind)
    network.apply_to(run.transformer)
    wanted = run()
    network.remove()
    caplog.clear()
    rebuilt = network_from_tensors(run.transformer, network.state_dict(), where=FILE)
    assert not caplog.records
    rebuilt.apply_to(run.transformer)
    assert torch.equal(run(), wanted) and not rebuilt.training
    assert rebuilt.kinds == kind and set(rebuilt.state_dict()) == set(network.state_dict())


def test_rebuilding_takes_kinds_ranks_and_alphas_from_each_module(run) -> None:
    width = run.transformer.config.width
    # The last projection and a norm's linear too: no block's layers, or not adapted by default.
    paths = ("transformer_blocks.0.attn.to_q", "proj_out", "single_transformer_blocks.0.norm.linear")
    layers = [run.transformer.get_submodule(path) for path in paths]
    sizes = [(layer.out_features, layer.in_features) for layer in layers]
    names = ["lora_unet_" + path.replace(".", "_") for path in paths]
    tensors = {
        f"{names[0]}.lokr_w1": random(4, 2) * 0.1,
        f"{names[0]}.lokr_w2": random(width // 4, width // 2, seed=1) * 0.1,
        f"{names[0]}.alpha": torch.tensor(7.0),
        f"{names[1]}.lora_down.weight": random(5, sizes[1][1], seed=2) * 0.1,
        f"{names[1]}.lora_up.weight": random(sizes[1][0], 5, seed=3) * 0.1,
        f"{names[2]}.hada_w1_a": random(sizes[2][0], 3, seed=4) * 0.1,
        f"{names[2]}.hada_w1_b": random(3, sizes[2][1], seed=5),
        f"{names[2]}.hada_w2_a": random(sizes[2][0], 3, seed=6) * 0.1,
        f"{names[2]}.hada_w2_b": random(3, sizes[2][1], seed=7),
        f"{names[2]}.alpha": torch.tensor(1),
    }
    deltas = [torch.kron(tensors[f"{names[0]}.lokr_w1"], tensors[f"{names[0]}.lokr_w2"])]
    deltas.append(tensors[f"{names[1]}.lora_up.weight"] @ tensors[f"{names[1]}.lora_down.weight"])
    first, second = (tensors[f"{names[2]}.hada_w{i}_a"] @ tensors[f"{names[2]}.hada_w{i}_b"] for i in (1, 2))
    deltas.append(first * second / 3)
    base = run()
    single = [run({f"{p}.weight": layer.weight + d}) for p, layer, d in zip(paths, layers, deltas, strict=True)]
    assert not any(close(result, base, 1e-3) for result in single)
    wanted = run({f"{p}.weight": layer.weight + d for p, layer, d in zip(paths, layers, deltas, strict=True)})
    network = network_from_tensors(run.transformer, tensors, where=FILE)
    network.apply_to(run.transformer)
    assert network.kinds == "LoKr and LoRA and LoHa" and close(run(), wanted)


def renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): tensor for key, tensor in state.items()}


def test_modules_that_the_transformer_lacks_are_listed_or_an_error(run, caplog) -> None:
    state = trained(run.transformer).state_dict()
    partly = renamed(state, "_single_transformer_blocks_0_", "_single_transformer_blocks_99_")
    network = network_from_tensors(run.transformer, partly, where=FILE)
    assert (
        "名前.safetensors: 5 of " in caplog.text and "lora_unet_single_transformer_blocks_99_attn_to_q" in caplog.text
    )
    assert 0 < len(network.state_dict()) == len(state) - 15
    with pytest.raises(UserError, match="first, none of which the transformer has; expected names such as lora_unet_"):
        network_from_tensors(run.transformer, renamed(state, "transformer_blocks", "layers"), where=FILE)
    with pytest.raises(UserError, match="0 modules, none first"):
        network_from_tensors(run.transformer, {}, where=FILE)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda d, n: d.pop(f"{n}.lora_up.weight"), "to_q.lora_up.weight: nothing; expected it beside"),
        (lambda d, n: [d.pop(f"{n}.lora_{p}.weight") for p in ("up", "down")], "to_q.alpha alone"),
        (lambda d, n: d.update({f"{n}.dora_scale": torch.ones(1)}), "to_q.dora_scale; expected LoRA, LoHa or LoKr"),
        (lambda d, n: d.update({f"{n}.lora_up.weight": torch.ones(7, 2)}), r"to_q.lora_up.weight of shape \(7, 2\)"),
        (lambda d, n: d.update({f"{n}.lora_up.weight": torch.ones(7, 3)}), "to_q.lora_up.weight: rank 3"),
        (lambda d, n: d.update({f"{n}.alpha": torch.ones(2)}), "to_q.alpha"),
        (lambda d, n: d.update({f"{n}.hada_w1_a": torch.ones(2, 2)}), "to_q.*one kind"),
        (lambda d, n: d.update({f"{n}.lora_down.weight": torch.tensor(1.0)}), "to_q.lora_down.weight: shape"),
    ],
)
def test_tensors_that_make_no_module_are_errors_that_name_the_first(run, change, wanted: str) -> None:
    state = dict(trained(run.transformer).state_dict())
    change(state, "lora_unet_transformer_blocks_0_attn_to_q")
    with pytest.raises(UserError, match=wanted) as caught:
        network_from_tensors(run.transformer, state, where=FILE)
    assert str(caught.value).startswith(FILE)


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [((5, 2), (3, 3), r"lokr_w1 of shape \(5, 2\) for .*divide"), ((2, 2), (3, 3), r"lokr_w2 of shape \(3, 3\)")],
)
def test_lokr_factors_that_do_not_split_the_layer_are_errors(run, first, second, wanted: str) -> None:
    name = "lora_unet_transformer_blocks_0_attn_to_q"
    tensors = {f"{name}.lokr_w1": torch.ones(first), f"{name}.lokr_w2": torch.ones(second)}
    with pytest.raises(UserError, match=wanted):
        network_from_tensors(run.transformer, tensors, where=FILE)


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_lokr_with_a_factored_first_matrix_is_rebuilt_with_its_scale(run, is_whole: bool, alpha: float | None) -> None:
    path, name = "transformer_blocks.0.attn.to_q", "lora_unet_transformer_blocks_0_attn_to_q"
    layer = run.transformer.get_submodule(path)
    rank, size = 2, layer.in_features // 4
    tensors = {f"{name}.lokr_w1_a": random(4, rank) * 0.3, f"{name}.lokr_w1_b": random(rank, 4, seed=1)}
    if is_whole:
        tensors[f"{name}.lokr_w2"] = second = random(size, size, seed=2) * 0.1
    else:
        tensors[f"{name}.lokr_w2_a"], tensors[f"{name}.lokr_w2_b"] = random(size, rank, seed=2), random(rank, size)
        second = tensors[f"{name}.lokr_w2_a"] @ tensors[f"{name}.lokr_w2_b"]
    if alpha:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    delta = torch.kron(tensors[f"{name}.lokr_w1_a"] @ tensors[f"{name}.lokr_w1_b"], second) * (alpha or rank) / rank
    network = network_from_tensors(run.transformer, tensors, where=FILE)
    x = random(3, layer.in_features, seed=4)
    wanted = layer(x) + x @ delta.T
    network.apply_to(run.transformer)
    assert close(layer(x), wanted) and not close(layer(x) - x @ delta.T, wanted, 0.05)


def test_loading_is_strict_and_takes_the_files_alpha(run, caplog) -> None:
    caplog.set_level(logging.INFO)
    network, source = trained(run.transformer), trained(run.transformer)
    name = next(iter(network.paths))
    state = {key: tensor.half() * 3 for key, tensor in source.state_dict().items()}
    network.load_tensors(state, where=FILE)
    assert {adapter.scale for adapter in network.adapters.values()} == {4.5}
    assert "its alphas replace the network's" in caplog.text
    assert all(torch.equal(tensor, state[key].float()) for key, tensor in network.state_dict().items())
    network.load_tensors({key: t for key, t in state.items() if "alpha" not in key}, where=FILE)
    assert {adapter.scale for adapter in network.adapters.values()} == {1.0} and network.state_dict()[
        f"{name}.alpha"
    ] == 2

    missing = {key: tensor for key, tensor in state.items() if key != f"{name}.lora_up.weight"}
    with pytest.raises(UserError, match=f"got no {name}.lora_up.weight .1 missing"):
        network.load_tensors(missing, where=FILE)
    typo = renamed(state, f"{name}.lora_up.weight", f"{name}.lora_upp.weight")
    with pytest.raises(UserError, match=f"got {name}.lora_upp.weight, which .* did you mean {name}.lora_up.weight"):
        network.load_tensors(typo, where=FILE)
    other = lora_framepack.create_network(run.transformer, dim=8, args={}).state_dict()
    with pytest.raises(UserError, match=rf"{name}.lora_down.weight of shape \(8, \d+\); expected \(2, \d+\); .*dim"):
        network.load_tensors(other, where=FILE)


def test_loaded_state_brings_its_scale(run) -> None:
    network = trained(run.transformer)
    state = {key: tensor * 2 if "alpha" in key else tensor for key, tensor in network.state_dict().items()}
    network.load_state_dict(state)
    assert {adapter.scale for adapter in network.adapters.values()} == {3.0}


def test_names_that_fall_together_in_files_are_refused() -> None:
    layer, arguments = nn.Linear(2, 2), NetworkArguments()
    with pytest.raises(ValueError, match="share a name"):
        Network({path: LoraLayer.for_layer(layer, path, arguments) for path in ("a.b_c", "a_b.c")})
