"""What a training step keeps in its graph, and what it computes again: the same gradients from less memory."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.training import saved_bytes
from dataset.training_dataset import TrainBatch
from frame_pack.model import Conditioning, FramePackTransformer, Prepared
from modules.checkpointing import Checkpointing
from networks.network import Network
from tests.training_builders import (
    EPOCH,
    NORMS,
    NUM_BLOCKS,
    batch_of,
    build_network,
    build_objective,
    build_transformer,
    loss_and_gradients,
    one_frame_item,
    random,
)

MODULATIONS = ("norm1.linear", "norm1_context.linear", "norm.linear")
QUERIES = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"]
QUERIES += ["single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_q"]
"""A layer of each block, in the order of the blocks."""


def adapted(*, dropout: float | None = None, **args: str) -> tuple[FramePackTransformer, Network]:
    transformer = build_transformer()
    network = build_network(transformer, dropout=dropout, **args)
    network.apply_to(transformer)
    return transformer, network


def two_items() -> TrainBatch:
    """With texts of unequal length, so that a mask is needed."""
    return batch_of({"猫": one_frame_item(1, length=4), "b": one_frame_item(2)})


def calls_in(transformer: FramePackTransformer, names: list[str]) -> Counter[str]:
    """Counts calls from now on."""
    calls: Counter[str] = Counter()
    for name in names:
        transformer.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def modulations_of(transformer: FramePackTransformer) -> list[str]:
    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    return [name for name, _ in transformer.named_modules() if name.startswith(blocks) and name.endswith(MODULATIONS)]


def tensors_in(value: object) -> Iterator[Tensor]:
    """All of them, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_in(part)


# ---- AdaLN ----


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Prepared, int]]:
    """What steps are given from now on, and how many bytes autograd has kept of the way there."""
    seen: list[tuple[Prepared, int]] = []
    prepare = FramePackTransformer.prepare

    def spy(self: FramePackTransformer, conditioning: Conditioning, timesteps: Tensor) -> Prepared:
        with saved_bytes([]) as kept:
            found = prepare(self, conditioning, timesteps)
        seen.append((found, kept.total))
        return found

    monkeypatch.setattr(FramePackTransformer, "prepare", spy)
    return seen


@pytest.mark.parametrize("num_blocks", [0, NUM_BLOCKS])
def test_nothing_that_is_prepared_is_in_the_graph_of_a_lora_in_its_usual_places(num_blocks: int, prepared) -> None:
    transformer, _ = adapted()
    transformer.checkpointing = Checkpointing(num_blocks=num_blocks)
    result = build_objective(transformer)(two_items(), epoch=EPOCH)
    ((context, num_bytes),) = prepared
    (inputs,) = context.steps
    found = [context.clean_tokens, *tensors_in(tuple(inputs))]
    assert len(found) > 2 * 2 + 2 and all(not tensor.requires_grad and tensor.grad_fn is None for tensor in found)
    assert num_bytes == 0 and result.weighted.requires_grad


@pytest.mark.parametrize("num_blocks", [0, 3, NUM_BLOCKS])
@pytest.mark.parametrize("args", [{}, NORMS], ids=["usual places", "norms too"])
def test_modulations_are_computed_once_in_a_step_whatever_is_checkpointed(args: dict, num_blocks: int) -> None:
    transformer, network = adapted(**args)
    transformer.checkpointing = Checkpointing(num_blocks=num_blocks)
    calls = calls_in(transformer, [*modulations_of(transformer), *QUERIES])
    loss_and_gradients(build_objective(transformer), network, two_items())
    again = [calls[name] - 1 for name in QUERIES]
    assert again == [1] * num_blocks + [0] * (NUM_BLOCKS - num_blocks), "the first blocks, twice"
    assert len(modulations_of(transformer)) == 2 * 2 + 2
    assert {calls[name] for name in modulations_of(transformer)} == {1}


def test_modulations_are_in_the_graph_where_a_pattern_puts_a_lora_on_one_of_them(prepared) -> None:
    transformer, network = adapted(include_patterns="['transformer_blocks.1.norm1.linear']")
    _, gradients = loss_and_gradients(build_objective(transformer), network, two_items())
    ((context, num_bytes),) = prepared
    (inputs,) = context.steps
    assert num_bytes > 0
    assert [part.requires_grad for part in inputs.double_image] == [False, True]
    others = (inputs.text, inputs.double_text, inputs.single, inputs.final)
    assert not any(tensor.requires_grad for tensor in tensors_in(others))
    assert all(bool(gradient.any()) for name, gradient in gradients.items() if "norm1" in name)


# ---- the same gradients ----


DROPOUTS = {
    "none": {},
    "neurons": {"dropout": 0.3},
    "ranks": {"rank_dropout": "0.3"},
    "modules": {"module_dropout": "0.3"},
    "none, norms too": NORMS,
    "neurons, norms too": {"dropout": 0.3} | NORMS,
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_loss_and_gradients_are_equal_to_the_bit_with_any_number_of_checkpointed_blocks(name: str) -> None:
    transformer, network = adapted(**DROPOUTS[name])
    objective, batch = build_objective(transformer), two_items()
    assert network.has_dropout == (not name.startswith("none"))

    def step(num_blocks: int, seed: int):
        transformer.checkpointing = Checkpointing(num_blocks=num_blocks, has_dropout=network.has_dropout)
        torch.manual_seed(seed)
        result, gradients = loss_and_gradients(objective, network, batch)
        return result.weighted, gradients, torch.get_rng_state()

    loss, wanted, rng = step(0, seed=7)
    for num_blocks in range(1, NUM_BLOCKS + 1):
        same_loss, gradients, same_rng = step(num_blocks, seed=7)
        assert torch.equal(same_loss, loss)
        assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)
        assert torch.equal(same_rng, rng), "the next step draws the same numbers too"
    assert torch.equal(step(NUM_BLOCKS, seed=8)[0], loss) != network.has_dropout


def test_half_precision_is_equal_to_the_bit_too() -> None:
    transformer, network = adapted()
    transformer.bfloat16()
    network.compute_in(torch.bfloat16)
    found = []
    for num_blocks in (0, NUM_BLOCKS):
        transformer.checkpointing = Checkpointing(num_blocks=num_blocks)
        found.append(loss_and_gradients(build_objective(transformer), network, two_items())[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# ---- less memory ----


def test_every_checkpointed_block_saves_memory() -> None:
    transformer, network = adapted()
    objective, weights = build_objective(transformer), [*transformer.parameters(), *network.parameters()]
    sizes = []
    for num_blocks in range(NUM_BLOCKS + 1):
        transformer.checkpointing = Checkpointing(num_blocks=num_blocks)
        with saved_bytes(weights) as kept:
            objective(two_items(), epoch=EPOCH)
        sizes.append(kept.total)
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[-1] < sizes[0] / 4


def test_saved_bytes_are_those_of_storages_that_no_weight_owns() -> None:
    layer = nn.Linear(8, 4)
    x = random(5, 8, seed=1)
    with saved_bytes(layer.parameters()) as kept:
        layer(x)
    assert kept.total == 5 * 8 * 4
    with saved_bytes([]) as kept:
        layer(x)
    assert kept.total == 5 * 8 * 4, "no gradient reaches x, so that the weight is not needed"
    x.requires_grad_()
    with saved_bytes(layer.parameters()) as kept:
        layer(x)
    assert kept.total == 5 * 8 * 4, "now it is, but it is there anyway"
    with saved_bytes([]) as kept:
        product = layer(x)
        first, second = product[:2], product[2:4]
        (first * second).sum()
    assert kept.total == (5 * 8 + 8 * 4 + 5 * 4) * 4, "x, the weight, and two views of one product"
