"""Blocks whose weights live in RAM: the same results to the last bit, however late copies come and early slots go."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.residency import Resident
from frame_pack.config import FramePackConfig
from frame_pack.loading import build_transformer as build_empty
from frame_pack.loading import load_transformer, open_transformer
from frame_pack.model import FramePackTransformer
from modules.activation_offload import ActivationOffload, PlainPorter
from modules.block_swap import (
    SwapOptions,
    attach,
    device_bytes,
    evenly_spaced,
    swapped_names,
)
from modules.checkpointing import Checkpointing
from modules.fp8 import Fp8Linear
from modules.weight_ring import Copies
from networks.network import Network
from tests.test_weight_ring import LateCopies
from tests.training_builders import (
    CONFIG,
    EPOCH,
    NORMS,
    NUM_BLOCKS,
    Gradients,
    batch_of,
    build_network,
    build_objective,
    build_transformer,
    loss_and_gradients,
    one_frame_item,
)
from training.objective import BatchLoss

CPU = torch.device("cpu")
ALL = SwapOptions(counts=(2, 2), invariant="of swapped blocks")
SOME = SwapOptions(counts=(1, 2))
CHOICES = [ALL, SOME, SwapOptions(counts=(0, 1), ring_size=1), SwapOptions(counts=(2, 1), ring_size=3)]
MODULATIONS = {"norm1.linear.weight", "norm1_context.linear.weight", "norm.linear.weight"}


def swapped(options: SwapOptions, copies: Copies | None = None) -> FramePackTransformer:
    transformer = build_transformer()
    attach(transformer, options, CPU, copies=copies or LateCopies())
    return transformer


def two_items():
    """With texts of unequal length."""
    return batch_of({"猫": one_frame_item(1, length=4), "b": one_frame_item(2)})


def adapted(transformer: FramePackTransformer, *, dropout: float | None = None, **args: str) -> Network:
    network = build_network(transformer, dropout=dropout, **args)
    network.apply_to(transformer)
    return network


def trained(transformer: FramePackTransformer, network: Network) -> tuple[BatchLoss, Gradients]:
    torch.manual_seed(3)
    return loss_and_gradients(build_objective(transformer), network, two_items())


def sampled(transformer: FramePackTransformer, num_steps: int = 3) -> list[Tensor]:
    """Velocities of steps whose noise levels differ, made in one loop."""
    with torch.no_grad():
        return [build_objective(transformer)(two_items(), epoch=step).losses for step in range(num_steps)]


def assert_same_gradients(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys() and len(expected) > 0
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# ---- results ----


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_sampling_gives_the_same_bits(options: SwapOptions) -> None:
    assert all(torch.equal(a, b) for a, b in zip(sampled(swapped(options)), sampled(build_transformer()), strict=True))


@pytest.mark.parametrize("args", [{}, NORMS], ids=["usual places", "norms too"])
@pytest.mark.parametrize("num_checkpointed", [0, 3])
@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_training_gives_the_same_bits(options: SwapOptions, num_checkpointed: int, args: dict) -> None:
    """Step after step, with a sample in between. Slots are spoilt as soon as they may be overwritten."""
    plain, transformer = build_transformer(), swapped(options)
    network, other = adapted(transformer, **args), adapted(plain, **args)
    transformer.checkpointing = Checkpointing(num_blocks=num_checkpointed)
    loss, gradients = trained(plain, other)
    for _ in range(2):
        found = trained(transformer, network)
        assert torch.equal(found[0].weighted, loss.weighted)
        assert_same_gradients(found[1], gradients)
        assert torch.equal(sampled(transformer, 1)[0], sampled(plain, 1)[0])


def test_dropout_and_inputs_in_ram_change_nothing_either() -> None:
    plain, transformer = build_transformer(), swapped(ALL)
    network, other = adapted(transformer, dropout=0.3), adapted(plain, dropout=0.3)
    offload = ActivationOffload(PlainPorter(), min_bytes=1)
    transformer.checkpointing = Checkpointing(num_blocks=0, has_dropout=True, offload=offload)
    (loss, gradients), (found_loss, found) = trained(plain, other), trained(transformer, network)
    assert torch.equal(loss.weighted, found_loss.weighted)
    assert_same_gradients(found, gradients)


def test_gradients_of_several_batches_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the gradients of the first are taken after the second was computed."""

    def total(transformer: FramePackTransformer) -> Gradients:
        network, objective = adapted(transformer), build_objective(transformer)
        losses = [objective(two_items(), epoch=EPOCH + i).weighted for i in range(2)]
        for loss in losses:
            loss.backward()
        return {name: parameter.grad for name, parameter in network.named_parameters()}

    assert_same_gradients(total(swapped(ALL)), total(build_transformer()))


def test_a_network_on_the_last_blocks_only_trains_too() -> None:
    """The way back ends in the middle, and the next step begins at the front all the same."""
    args = {"exclude_patterns": "['^transformer_blocks.*', 'single_transformer_blocks.0.*']"}
    plain, transformer = build_transformer(), swapped(ALL)
    network, other = adapted(transformer, **args), adapted(plain, **args)
    _, gradients = trained(plain, other)
    for _ in range(2):
        assert_same_gradients(trained(transformer, network)[1], gradients)


def test_the_stand_in_notices_weights_that_are_overwritten_too_early() -> None:
    """Without the checkpoint autograd keeps views of slots, which other blocks have meanwhile."""
    transformer = swapped(ALL)
    network = adapted(transformer)
    for number in range(NUM_BLOCKS):
        berth = transformer.swapping.berth(number)
        berth.contexts = lambda: pytest.fail("it was checkpointed")
    transformer.checkpointing = _NeverCheckpointing()
    _, gradients = trained(transformer, network)
    assert any(gradient.isnan().any() for gradient in gradients.values())


class _NeverCheckpointing:
    def of(self, block, number, berth):
        return berth.around(block)


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("重み") / "変換器.safetensors"
    save_file(build_transformer().state_dict(), path)
    return str(path)


@pytest.mark.parametrize("fp8", ["off", "plain", "scaled"])
def test_a_model_that_is_swapped_while_it_is_loaded_is_the_same_model(fp8, dit) -> None:
    """In 8 bits and with their scales, too, under a LoRA and in training."""
    place = {"dtype": torch.bfloat16, "device": CPU, "fp8": fp8}
    plain = load_transformer(open_transformer(dit), **place)
    transformer = load_transformer(open_transformer(dit), swap=ALL, **place)
    assert transformer.swapping.num_blocks == NUM_BLOCKS and transformer.swapping.ram_bytes > 0
    assert any(isinstance(layer, Fp8Linear) for layer in transformer.modules()) == (fp8 != "off")
    found, expected = transformer.state_dict(), plain.state_dict()
    assert found.keys() == expected.keys()
    as_bytes = [(found[name].view(-1).view(torch.uint8), expected[name].view(-1).view(torch.uint8)) for name in found]
    assert all(torch.equal(a, b) for a, b in as_bytes)
    assert torch.equal(sampled(transformer, 1)[0], sampled(plain, 1)[0])
    _, gradients = trained(plain, adapted(plain))
    assert_same_gradients(trained(transformer, adapted(transformer))[1], gradients)


# ---- copies ----


def tracked(options: SwapOptions) -> tuple[FramePackTransformer, Callable[[], list[str]]]:
    """With what tells which units were copied since it was last asked, by the module that they belong to."""
    transformer = swapped(options, copies := LateCopies())
    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    modules = {n: module for n, module in transformer.named_modules() if n.startswith(blocks)}
    units = {n: m for n, m in modules.items() if n.count(".") == 1 or n.endswith(("norm1", "norm", "norm1_context"))}
    weights = {name: next(_own(module, name)).weight for name, module in units.items()}
    masters = [unit.master for unit in transformer.swapping._units]
    names = {id(m): name for m in masters for name, weight in weights.items() if _lies_in(weight, m)}

    def copied() -> list[str]:
        found = [names[id(master)] for master in copies.started]
        copies.log.clear()
        return found

    return transformer, copied


def _own(module: nn.Module, name: str) -> Iterator[nn.Linear]:
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and (name.count(".") > 1 or not path.startswith("norm")):
            yield layer


def _lies_in(weight: Tensor, master: Tensor) -> bool:
    return 0 <= weight.data_ptr() - master.data_ptr() < len(master)


D0, D1, S0, S1 = (f"{kind}transformer_blocks.{i}" for kind in ("", "single_") for i in range(2))
PREPARE = [f"{D0}.norm1", f"{D1}.norm1", f"{D0}.norm1_context", f"{D1}.norm1_context", f"{S0}.norm", f"{S1}.norm"]


def test_a_step_of_sampling_copies_every_swapped_block_once_and_the_next_step_is_prepared() -> None:
    transformer, copied = tracked(SwapOptions(counts=(2, 2)))
    sampled(transformer, 1)
    assert copied() == [D0, D1, S0, S1, D0, D1]
    sampled(transformer, 2)
    assert copied() == 2 * [S0, S1, D0, D1]


def test_a_step_of_training_goes_out_and_back() -> None:
    transformer, copied = tracked(ALL)
    network = adapted(transformer)
    trained(transformer, network)
    assert copied() == [*PREPARE, D0, D1, S0, S1, D1, D0]
    trained(transformer, network)
    assert copied() == [*PREPARE, S0, S1, D1, D0]


def test_most_on_the_device_are_the_slots_and_what_is_not_swapped() -> None:
    """While blocks are computed there are two slots as large as the largest block; nothing more comes for a while."""
    transformer = swapped(ALL)
    block_bytes = sum(layer.weight.nbytes for layer in _own(transformer.transformer_blocks[0], "transformer_blocks.0"))
    modulation_bytes = transformer.transformer_blocks[0].norm1.linear.weight.nbytes
    seen = []
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.register_forward_pre_hook(lambda *_: seen.append(transformer.swapping.device_bytes))
    transformer.transformer_blocks[0].norm1.register_forward_hook(
        lambda *_: seen.append(transformer.swapping.device_bytes)
    )
    trained(transformer, adapted(transformer))
    assert seen == [2 * modulation_bytes] + [2 * block_bytes] * 2 * NUM_BLOCKS
    sampled(transformer, 1)
    assert seen[-1] == 2 * block_bytes and max(seen) == 2 * (block_bytes + modulation_bytes)
    stays = build_transformer().state_dict()
    in_ram = swapped_names(transformer, ALL)
    staying = sum(tensor.nbytes for name, tensor in stays.items() if name not in in_ram)
    assert device_bytes(transformer, ALL, torch.float32) == staying + 2 * block_bytes + 2 * modulation_bytes


def test_masters_and_parameters_stay_what_they_are() -> None:
    plain, transformer = build_transformer(), swapped(ALL)
    parameters = dict(transformer.named_parameters())
    network = adapted(transformer)
    trained(transformer, network)
    sampled(transformer, 1)
    network.remove()
    assert all(parameter is parameters[name] for name, parameter in transformer.named_parameters())
    assert not any(parameter.requires_grad for parameter in parameters.values())
    expected = plain.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in transformer.state_dict().items())


# ---- which ----


def test_swapped_blocks_stand_as_the_facts_say() -> None:
    assert evenly_spaced(10, 40) == [2, 6, 10, 14, 18, 22, 26, 30, 34, 38]
    assert evenly_spaced(9, 20) == [1, 3, 5, 7, 10, 12, 14, 16, 18]
    assert evenly_spaced(0, 20) == []
    for total in range(1, 41):
        assert evenly_spaced(total, total) == list(range(total))
        for count in range(total + 1):
            found = evenly_spaced(count, total)
            assert len(set(found)) == count and all(0 <= number < total for number in found)


def layer_names(names: frozenset[str]) -> set[str]:
    """Without numbers."""
    return {".".join(part for part in name.split(".") if not part.isdigit()) for name in names}


@pytest.fixture(scope="module")
def published() -> FramePackTransformer:
    with torch.device("meta"):
        return FramePackTransformer(FramePackConfig())


def test_linear_weights_of_a_swapped_block_go_and_everything_else_stays(published) -> None:
    names = swapped_names(published, SwapOptions(counts=(19, 39)))
    assert names < published.state_dict().keys()
    assert len(names) == 19 * (8 + 4) + 39 * 5
    assert layer_names(names) == {
        *(f"transformer_blocks.attn.{part}.weight" for part in ("to_q", "to_k", "to_v", "to_out", "to_add_out")),
        *(f"transformer_blocks.attn.add_{part}_proj.weight" for part in "qkv"),
        *(f"transformer_blocks.{ff}.net.{part}weight" for ff in ("ff", "ff_context") for part in ("proj.", "")),
        *(f"single_transformer_blocks.attn.to_{part}.weight" for part in "qkv"),
        *("single_transformer_blocks.proj_mlp.weight", "single_transformer_blocks.proj_out.weight"),
    }
    with_modulations = swapped_names(published, SwapOptions(counts=(19, 39), invariant="of swapped blocks"))
    assert len(with_modulations - names) == 19 * 2 + 39
    assert {name.split(".", 2)[2] for name in with_modulations - names} == MODULATIONS


def test_what_a_prompt_needs_once_is_more_than_a_quarter_of_the_model(published) -> None:
    names = swapped_names(published, SwapOptions(counts=(0, 0), invariant="all"))
    sizes = {name: tensor.numel() for name, tensor in published.state_dict().items()}
    modulation = sum(sizes[name] for name in names if name.split(".", 2)[-1] in MODULATIONS)
    assert round(modulation / 1e9, 2) == 3.40 and round(sum(sizes.values()) / 1e9, 2) == 12.87
    roots = Counter(name.split(".")[0] for name in names)
    assert roots.keys() == {
        *("transformer_blocks", "single_transformer_blocks", "norm_out"),
        *("context_embedder", "image_projection", "time_text_embed"),
    }
    assert device_bytes(published, SwapOptions(counts=(0, 0)), torch.bfloat16) == 2 * sum(sizes.values())


def test_on_the_meta_device_the_same_names_are_told_as_later_lie_in_ram(dit) -> None:
    checkpoint = open_transformer(dit)
    for options in (ALL, SOME, SwapOptions(counts=(1, 0), invariant="all")):
        names = swapped_names(build_empty(checkpoint, fp8="scaled"), options)
        assert any(name.endswith("scale_weight") for name in names)
        transformer = load_transformer(checkpoint, dtype=torch.float32, device=CPU, fp8="scaled", swap=options)
        units = transformer.swapping._units
        lying = {
            name
            for name, tensor in transformer.state_dict().items()
            if any(_lies_in(tensor, unit.master) for unit in units)
        }
        assert lying == names


# ---- what a prompt needs once ----


def invariant(copies: LateCopies | None = None, counts: tuple[int, int] = (0, 0)) -> FramePackTransformer:
    return swapped(SwapOptions(counts=counts, invariant="all"), copies)


@contextmanager
def calls(transformer: FramePackTransformer) -> Iterator[list[tuple[int, int]]]:
    """(number of the layer, bytes in slots) for each call of a layer that is needed once."""
    seen: list[tuple[int, int]] = []
    handles = [
        layer.register_forward_hook(lambda *_, number=number: seen.append((number, _bytes(transformer))), prepend=True)
        for number, layer in enumerate(transformer.prepare_layers)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def _bytes(transformer: FramePackTransformer) -> int:
    return transformer.swapping.device_bytes


@pytest.mark.parametrize("counts", [(0, 0), (1, 2)])
def test_results_are_the_same_and_nothing_of_it_is_there_in_between(counts) -> None:
    transformer = invariant(counts=counts)
    expected = sampled(build_transformer())
    in_steps = []
    transformer.single_transformer_blocks[0].register_forward_hook(lambda *_: in_steps.append(_bytes(transformer)))
    assert all(torch.equal(a, b) for a, b in zip(sampled(transformer), expected, strict=True))
    assert len(set(in_steps)) == 1 and (in_steps[0] == 0) == (counts == (0, 0))
    gc.collect()
    assert _bytes(transformer) == in_steps[0]


def test_each_layer_is_copied_once_for_a_prompt_and_ahead_of_its_call() -> None:
    transformer = invariant(copies := LateCopies())
    layers = transformer.prepare_layers
    masters = [next(layer.weight for layer in part.modules() if isinstance(layer, nn.Linear)) for part in layers]
    for _ in range(2):
        copies.log.clear()
        with calls(transformer) as seen:
            sampled(transformer, 1)
        assert [number for number, _ in seen] == list(range(len(layers))), "in the order that the model tells"
        order = [next(i for i, weight in enumerate(masters) if _lies_in(weight, m)) for m in copies.started]
        assert order == list(range(len(layers)))
        kinds = "".join(what[0] for what, _ in copies.log)
        assert kinds == "ss" + "ws" * (len(layers) - 2) + "ww", "the next one is copied while one is computed"
        assert len({num_bytes for _, num_bytes in seen}) == 1 and seen[0][1] > 0


def test_a_swapped_layer_that_would_pass_gradients_on_is_an_error() -> None:
    """Autograd would keep a view of a slot; nothing is checkpointed there."""
    transformer = invariant()
    with pytest.raises(RuntimeError, match="Modulation.*gradients"):
        transformer.norm_out(torch.ones(1, 1, CONFIG.width, requires_grad=True))
    with torch.no_grad():
        transformer.norm_out(torch.ones(1, 1, CONFIG.width, requires_grad=True))


# ---- moving ----


def test_moving_the_model_leaves_the_masters_in_ram_and_gives_the_slots_up() -> None:
    transformer = swapped(SOME)
    expected = sampled(transformer)
    masters = [unit.master for unit in transformer.swapping._units]
    moved: list[int] = []

    def move(tensor: Tensor) -> Tensor:
        moved.append(tensor.nbytes)
        return tensor.clone()

    assert _bytes(transformer) > 0
    transformer._apply(move)  # what to("cuda") does with each tensor
    assert _bytes(transformer) == 0
    in_ram = swapped_names(transformer, SOME)
    assert sum(moved) == sum(t.nbytes for name, t in transformer.state_dict().items() if name not in in_ram)
    assert [unit.master for unit in transformer.swapping._units] == masters
    assert all(torch.equal(a, b) for a, b in zip(sampled(transformer), expected, strict=True))
    transformer.to("cpu")
    assert _bytes(transformer) == 0
    assert all(torch.equal(a, b) for a, b in zip(sampled(transformer), expected, strict=True))


def test_a_resident_model_comes_and_goes_and_steps_aside_with_its_slots() -> None:
    expected = sampled(build_transformer())
    resident = Resident("transformer", lambda: swapped(SOME), CPU, keep=True)
    for _ in range(2):
        with resident.use():
            model = resident.model
            assert all(torch.equal(a, b) for a, b in zip(sampled(model), expected, strict=True))
            assert _bytes(model) > 0
            resident.step_aside()
            assert _bytes(model) == 0
            assert all(torch.equal(a, b) for a, b in zip(sampled(resident.model), expected, strict=True))
        assert _bytes(model) == 0


# ---- compiled blocks ----


def test_compiled_blocks_are_not_compiled_again_for_other_slots() -> None:
    from torch._dynamo.testing import CompileCounter

    counted = CompileCounter()
    torch._dynamo.reset()
    transformer = swapped(SwapOptions(counts=(2, 2), ring_size=3))
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.forward = torch.compile(block.forward, backend=counted, fullgraph=True)
    expected = sampled(build_transformer())
    assert torch.allclose(sampled(transformer, 1)[0], expected[0], rtol=1e-5)
    num_frames = counted.frame_count
    assert num_frames > 0
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(sampled(transformer), expected, strict=True))
    assert counted.frame_count == num_frames
    torch._dynamo.reset()
