"""One training step: the loss and the LoRA's gradients, against diffusers' transformer with PEFT and plain autograd."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fpack_train_network
from dataset.training_dataset import TrainBatch
from frame_pack.model import FramePackTransformer
from modules.checkpointing import Checkpointing
from networks.network import Network
from tests.training_builders import (
    EPOCH,
    HEIGHT,
    NORMS,
    NUM_BLOCKS,
    SEED,
    WIDTH,
    Contents,
    batch_of,
    build_network,
    build_objective,
    build_oracle,
    build_transformer,
    difference,
    gradients_of,
    loss_and_gradients,
    one_frame_item,
    oracle_gradients,
    oracle_loss,
    section_item,
    singles,
    write_data_set,
    write_transformer,
)
from training.timesteps import draw_noise, item_seed

ORACLE_TOLERANCE, TOLERANCE = 1e-4, 1e-5
MASK = "latents_loss_mask"
ITEMS: dict[str, Callable[[], Contents]] = {
    "one frame alone": lambda: one_frame_item(1, "target_index=1,control_index=0;10,no_post,no_2x,no_4x"),
    "one frame with post and histories": lambda: one_frame_item(2, "target_index=9,control_index=0", num_controls=1),
    "one frame, unsorted and far": lambda: one_frame_item(3, "target_index=40,control_index=13;0,no_4x", length=4),
    "section": lambda: section_item(4),
    "last section": lambda: section_item(5, section=2, length=6),
    "f1 section": lambda: section_item(6, f1=True, section=1),
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same model with the same LoRA twice."""

    transformer: FramePackTransformer
    network: Network
    oracle: HunyuanVideoFramepackTransformer3DModel

    def oracle_step(self, batch: TrainBatch, items: list[Contents], sigmas: Tensor, masks=None):
        """(losses of the items, gradients of their mean) by the oracle, item by item."""
        masks = masks or [None] * len(items)
        rows = zip(items, noise_of(batch), sigmas, masks, strict=True)
        losses = torch.stack([oracle_loss(self.oracle, *row) for row in rows])
        losses.mean().backward()
        return losses.detach(), oracle_gradients(self.oracle, self.network)


def build_pair(**args: str) -> Pair:
    transformer = build_transformer()
    network = build_network(transformer, **args)
    oracle = build_oracle(transformer, network)
    network.apply_to(transformer)
    return Pair(transformer=transformer, network=network, oracle=oracle)


@pytest.fixture(scope="module")
def pair() -> Pair:
    """With LoRA where it is by default. Not to be changed."""
    return build_pair()


@pytest.fixture
def adapted() -> tuple[FramePackTransformer, Network]:
    """The same without an oracle; may be changed."""
    transformer = build_transformer()
    network = build_network(transformer)
    network.apply_to(transformer)
    return transformer, network


def noise_of(batch: TrainBatch) -> Tensor:
    return draw_noise([item_seed(SEED, EPOCH, key) for key in batch.items], batch.contents["latents"].shape[1:])


# ---- against the oracle ----


@pytest.mark.parametrize("name", ITEMS)
def test_loss_and_gradients_equal_those_of_diffusers_and_peft(name: str, pair: Pair) -> None:
    batch = batch_of({"猫": ITEMS[name]()})
    result, gradients = loss_and_gradients(build_objective(pair.transformer), pair.network, batch)
    losses, wanted = pair.oracle_step(batch, [ITEMS[name]()], result.sigmas)
    torch.testing.assert_close(result.weighted, losses[0], rtol=ORACLE_TOLERANCE, atol=0)
    assert difference(gradients, wanted) <= ORACLE_TOLERANCE
    assert len(gradients) == 2 * (2 * 12 + 2 * 5), "12 layers in a double block, 5 in a single one"


def test_a_lora_on_norms_is_trained_as_by_diffusers_and_peft_whatever_is_checkpointed() -> None:
    pair = build_pair(**NORMS)
    items = {"猫": one_frame_item(1, length=5), "b": one_frame_item(2)}
    batch = batch_of(items)
    for num_blocks in (0, 3, NUM_BLOCKS):
        pair.transformer.checkpointing = Checkpointing(num_blocks=num_blocks)
        result, gradients = loss_and_gradients(build_objective(pair.transformer), pair.network, batch)
        losses, wanted = pair.oracle_step(batch, list(items.values()), result.sigmas)
        torch.testing.assert_close(result.losses, losses, rtol=ORACLE_TOLERANCE, atol=0)
        assert difference(gradients, wanted) <= ORACLE_TOLERANCE
        assert sum("norm" in name for name in gradients) == 2 * (2 * 2 + 2 * 1)


@pytest.mark.parametrize("num_blocks", [0, NUM_BLOCKS])
def test_a_batch_of_unequal_items_is_what_the_oracle_makes_of_each(num_blocks: int, pair: Pair) -> None:
    items = [section_item(7, length=2), section_item(8, f1=True, section=2, length=7), section_item(9, section=1)]
    batch = batch_of(dict(zip("a猫c", items, strict=True)))
    pair.transformer.checkpointing = Checkpointing(num_blocks=num_blocks)
    result, gradients = loss_and_gradients(build_objective(pair.transformer), pair.network, batch)
    pair.transformer.checkpointing = Checkpointing()
    losses, wanted = pair.oracle_step(batch, items, result.sigmas)
    torch.testing.assert_close(result.losses, losses, rtol=ORACLE_TOLERANCE, atol=0)
    assert difference(gradients, wanted) <= ORACLE_TOLERANCE


def test_noise_levels_are_those_of_the_method_at_this_size_and_quantile(pair: Pair) -> None:
    """flux_shift by the facts: mu is on a line through 0.5 at 256 tokens and 1.15 at 4096."""
    batch = batch_of({"a": one_frame_item(1), "猫": one_frame_item(2)})
    given = dict(zip(batch.items, (0.3, 0.9), strict=True))
    objective = build_objective(pair.transformer, timestep_sampling="flux_shift", sigmoid_scale=1.5)
    with torch.no_grad():
        sigmas = objective(batch, epoch=EPOCH, quantiles=given).sigmas
    k = math.exp(0.5 + (1.15 - 0.5) * ((HEIGHT // 2) * (WIDTH // 2) - 256) / (4096 - 256))
    normal = math.sqrt(2) * torch.erfinv(2 * torch.tensor([0.3, 0.9], dtype=torch.float64) - 1)
    s = torch.sigmoid(1.5 * normal)
    torch.testing.assert_close(sigmas.double(), s * k / (1 + (k - 1) * s), rtol=1e-6, atol=0)


# ---- batches ----

BATCHES: dict[str, Callable[[], dict[str, Contents]]] = {
    "one frame, other places for each": lambda: {
        "a": one_frame_item(1, "target_index=1,control_index=0;10,no_4x", length=3),
        "猫": one_frame_item(2, "target_index=13,control_index=4;0,no_4x", length=7),
        "c": one_frame_item(3, "target_index=9,control_index=0;1,no_4x", length=5),
    },
    "texts of full length": lambda: {"a": one_frame_item(1), "b": one_frame_item(2)},
    "sections": lambda: {"a": section_item(1, length=1), "b": section_item(2, section=2)},
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_is_the_mean_of_its_items(name: str, adapted) -> None:
    transformer, network = adapted
    objective, items = build_objective(transformer), BATCHES[name]()
    together, gradients = loss_and_gradients(objective, network, batch_of(items))
    alone = [loss_and_gradients(objective, network, single) for single in singles(items)]
    torch.testing.assert_close(together.losses, torch.cat([r.losses for r, _ in alone]), rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(together.weighted, together.losses.mean())
    assert together.sigmas.tolist() == [float(result.sigmas) for result, _ in alone]
    assert len(set(together.sigmas.tolist())) == len(items)
    mean = {n: torch.stack([found[n] for _, found in alone]).mean(dim=0) for n in gradients}
    assert difference(gradients, mean) <= TOLERANCE


def test_accumulated_batches_are_one_larger_batch(adapted) -> None:
    transformer, network = adapted
    objective, items = build_objective(transformer), BATCHES["one frame, other places for each"]()
    _, wanted = loss_and_gradients(objective, network, batch_of(items))
    for single in singles(items):
        (objective(single, epoch=EPOCH).weighted / len(items)).backward()
    assert difference(gradients_of(network), wanted) <= TOLERANCE


def test_an_item_gets_the_same_draws_in_any_order_and_others_in_the_next_epoch(adapted) -> None:
    transformer, _ = adapted
    objective, items = build_objective(transformer), BATCHES["texts of full length"]()
    with torch.no_grad():
        forwards, again = objective(batch_of(items), epoch=1), objective(batch_of(items), epoch=1)
        backwards = objective(batch_of(dict(reversed(items.items()))), epoch=1)
        later = objective(batch_of(items), epoch=2)
        other = replace(objective, seed=SEED + 1)(batch_of(items), epoch=1)
    assert torch.equal(forwards.losses, again.losses)
    torch.testing.assert_close(forwards.losses, backwards.losses.flip(0), rtol=TOLERANCE, atol=0)
    for result in (later, other):
        assert not set(result.sigmas.tolist()) & set(forwards.sigmas.tolist())


@pytest.mark.parametrize(
    ("scheme", "weight"),
    [
        ("cosmap", lambda sigma: 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))),
        ("sigma_sqrt", lambda sigma: sigma**-2),
    ],
)
def test_weights_count_in_the_gradients_and_not_in_the_reported_losses(scheme: str, weight, adapted) -> None:
    transformer, network = adapted
    items = BATCHES["texts of full length"]()
    plain = build_objective(transformer)
    single = [loss_and_gradients(plain, network, batch) for batch in singles(items)]
    result, gradients = loss_and_gradients(
        build_objective(transformer, weighting_scheme=scheme), network, batch_of(items)
    )
    weights = [weight(float(sigma)) for sigma in result.sigmas]
    torch.testing.assert_close(result.losses, torch.cat([r.losses for r, _ in single]), rtol=TOLERANCE, atol=0)
    assert not result.losses.requires_grad
    weighted = sum(w * float(r.losses) for w, (r, _) in zip(weights, single, strict=True)) / len(items)
    torch.testing.assert_close(result.weighted.item(), weighted, rtol=TOLERANCE, atol=0)
    mean = {n: sum(w * found[n] for w, (_, found) in zip(weights, single, strict=True)) / len(items) for n in gradients}
    assert difference(gradients, mean) <= TOLERANCE


# ---- masks ----


def masks_of(*parts: float) -> list[Tensor]:
    """(1, F, h, w) each: the given part of the columns at full strength, half of the next column."""
    masks = []
    for part in parts:
        mask = torch.zeros(1, 1, HEIGHT, WIDTH)
        mask[..., : round(part * WIDTH)] = 1.0
        mask[..., :2, -1] = 0.5
        masks.append(mask)
    return masks


def with_masks(items: list[Contents], masks: list[Tensor]) -> TrainBatch:
    return batch_of(
        {f"猫{i}": item | {MASK: mask.half()} for i, (item, mask) in enumerate(zip(items, masks, strict=True))}
    )


def test_a_masked_loss_is_the_mean_over_what_the_mask_lets_through_sample_by_sample(pair: Pair) -> None:
    items, masks = [one_frame_item(1), one_frame_item(2, length=4)], masks_of(0.25, 0.75)
    batch = with_masks(items, masks)
    result, gradients = loss_and_gradients(build_objective(pair.transformer, masked=True), pair.network, batch)
    losses, wanted = pair.oracle_step(batch, items, result.sigmas, masks)
    torch.testing.assert_close(result.losses, losses, rtol=ORACLE_TOLERANCE, atol=0)
    torch.testing.assert_close(result.weighted, losses.mean(), rtol=ORACLE_TOLERANCE, atol=0)
    assert difference(gradients, wanted) <= ORACLE_TOLERANCE
    with torch.no_grad():
        unmasked = build_objective(pair.transformer)(batch, epoch=EPOCH).losses
    assert not torch.isclose(unmasked, losses, rtol=1e-2).any()


@torch.no_grad()
def test_a_mask_of_ones_and_a_mask_without_the_flag_change_nothing(adapted) -> None:
    transformer, _ = adapted
    items = [section_item(1), section_item(2)]
    plain = build_objective(transformer)(with_masks(items, masks_of(0.5, 0.75)), epoch=EPOCH).losses
    ones = [torch.ones(1, len(item["latent_indices"]), HEIGHT, WIDTH) for item in items]
    masked = build_objective(transformer, masked=True)
    torch.testing.assert_close(masked(with_masks(items, ones), epoch=EPOCH).losses, plain)
    without = batch_of({f"猫{i}": item for i, item in enumerate(items)})
    assert torch.equal(masked(without, epoch=EPOCH).losses, plain)
    assert torch.equal(build_objective(transformer)(without, epoch=EPOCH).losses, plain)


def test_a_mask_that_lets_nothing_through_trains_nothing(adapted) -> None:
    transformer, network = adapted
    batch = with_masks([one_frame_item(1)], [torch.zeros(1, 1, HEIGHT, WIDTH)])
    result, gradients = loss_and_gradients(build_objective(transformer, masked=True), network, batch)
    assert float(result.losses) == 0 and all(not gradient.any() for gradient in gradients.values())


# ---- half precision ----


def cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of all gradients as one vector."""
    return torch.cosine_similarity(
        *(torch.cat([found[n].flatten() for n in one]) for found in (one, other)), dim=0
    ).item()


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, None], ids=["mixed", "lora in float32"])
def test_half_precision_gives_float32_gradients_near_the_exact_ones(compute_dtype, adapted) -> None:
    transformer, network = adapted
    batch = batch_of(BATCHES["one frame, other places for each"]())
    transformer.bfloat16().float()  # so that only computing differs, and not the weights
    exact, wanted = loss_and_gradients(build_objective(transformer), network, batch)
    transformer.bfloat16()
    network.compute_in(compute_dtype)
    types = set()
    adapter = next(iter(network.adapters.values()))
    adapter.lora_down.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    for num_blocks in (0, NUM_BLOCKS):
        transformer.checkpointing = Checkpointing(num_blocks=num_blocks)
        result, gradients = loss_and_gradients(build_objective(transformer), network, batch)
        torch.testing.assert_close(result.losses, exact.losses, rtol=2e-2, atol=0)
        assert result.losses.dtype == torch.float32 and not torch.equal(result.losses, exact.losses)
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
        assert cosine(gradients, wanted) > 0.999
        assert min(cosine({n: gradients[n]}, wanted) for n in wanted) > 0.99
    assert types == {compute_dtype or torch.float32}


# ---- steps of the trainer ----


@pytest.fixture
def train(tmp_path: Path):
    """Trains for a few steps with plain gradient descent, and gives what the file holds."""
    dit = write_transformer(tmp_path / "変換器.safetensors")

    def run(data_set: Path, *more: str, steps: int = 3) -> dict[str, Tensor]:
        arguments = ["--dit", dit, "--dataset_config", data_set, "--network_module", "networks.lora_framepack"]
        arguments += ["--output_dir", tmp_path / "出力", "--output_name", "lora", "--device", "cpu", "--seed", 3]
        arguments += ["--optimizer_type", "SGD", "--learning_rate", 0.5, "--max_grad_norm", 0]
        arguments += ["--timestep_sampling", "uniform", "--max_data_loader_n_workers", 0, "--max_train_steps", steps]
        arguments += more
        assert fpack_train_network.main(list(map(str, arguments))) == 0
        return load_file(tmp_path / "出力" / "lora.safetensors")

    return run


def ups(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What training has made of zeros."""
    return {name: tensor for name, tensor in tensors.items() if "lora_up" in name}


def two_items(**masks: Tensor) -> dict[str, Contents]:
    def item(number: int) -> Contents:
        options = "target_index=9,control_index=0,no_2x,no_4x"
        return one_frame_item(number, options, num_controls=1, length=3 + 2 * number) | masks

    return {"a": item(0), "猫": item(1)}


def test_accumulating_two_batches_trains_like_a_batch_of_two(train, tmp_path: Path) -> None:
    pairs = write_data_set(tmp_path / "pairs", two_items(), batch_size=2)
    in_turn = write_data_set(tmp_path / "in turn", two_items(), batch_size=1)
    wanted = train(pairs)
    accumulated = train(in_turn, "--gradient_accumulation_steps", "2")
    assert difference(ups(accumulated), ups(wanted)) <= ORACLE_TOLERANCE
    assert difference(ups(train(in_turn, steps=6)), ups(wanted)) > 1e-2


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_trains_like_float32(
    precision: str, dtype: torch.dtype, train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set, clipped = write_data_set(tmp_path / "猫", two_items(), batch_size=2), ("--max_grad_norm", "0.01")
    wanted, asked = ups(train(data_set, *clipped)), []
    compute_in = Network.compute_in
    monkeypatch.setattr(Network, "compute_in", lambda self, dtype: (asked.append(dtype), compute_in(self, dtype)))
    found = ups(train(data_set, *clipped, "--mixed_precision", precision, "--gradient_checkpointing"))
    assert asked == [dtype] and {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert cosine(found, wanted) > 0.999
    assert 0 < difference(found, wanted) < 0.1, "no step was left out"


def test_runs_with_any_number_of_checkpointed_blocks_are_equal_to_the_bit(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def spy(*arguments, **options):
        calls.append(1)
        return checkpoint(*arguments, **options)

    monkeypatch.setattr("modules.checkpointing.checkpoint", spy)
    data_set = write_data_set(tmp_path / "猫", two_items(), batch_size=2)
    wanted, dropout = None, ("--network_dropout", "0.3")
    for flags, num_blocks in (((), 0), (("--checkpoint_blocks", "3"), 3), (("--gradient_checkpointing",), NUM_BLOCKS)):
        found = train(data_set, *dropout, *flags)
        wanted = wanted or found
        assert len(calls) == 3 * num_blocks, "in each of three steps"
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        calls.clear()


def test_a_gradient_that_overflows_in_another_process_leaves_the_step_out_here_too(
    train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only averaging brings it here."""

    def average(parameters, processes) -> None:
        for parameter in parameters:
            parameter.grad += torch.inf

    monkeypatch.setattr("training.step.average_gradients", average)
    data_set = write_data_set(tmp_path / "猫", two_items(), batch_size=2)
    found = train(data_set, "--mixed_precision", "fp16", steps=1)
    assert all(not tensor.any() for tensor in ups(found).values())


def test_masks_in_caches_count_with_the_flag_only(train, tmp_path: Path) -> None:
    plain = write_data_set(tmp_path / "plain", two_items(), batch_size=2)
    masked = write_data_set(tmp_path / "masked", two_items(**{MASK: masks_of(0.5)[0].half()}), batch_size=2)
    for path in (tmp_path / "masked" / "images").iterdir():  # where masks come from is not looked at then
        path.unlink()
    wanted = ups(train(plain))
    assert difference(ups(train(masked)), wanted) == 0
    assert difference(ups(train(masked, "--masked_loss")), wanted) > 1e-2
