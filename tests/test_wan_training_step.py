"""What Wan's training shows the transformer and what it minimises, against diffusers and the published formulas."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from networks import lora_wan
from networks.network import Network
from tests.training_builders import difference as largest_difference
from tests.training_driver import final_file
from tests.wan_training_builders import (
    Contents,
    FirstStep,
    WanShop,
    clip_item,
    first_step,
    loss_mask,
    one_frame_item,
    oracle_velocity,
    write_data,
    write_dit,
)
from tests.wan_transformers import build_oracle, build_transformer, diffusers_names, random
from wan.model import WanTransformer

TOLERANCE = 1e-5
NAMES = ("a", "猫")
KINDS = {"t2v-1.3B": "t2v", "t2i-14B": "t2v", "i2v-14B": "i2v", "flf2v-14B": "flf2v"}
CASES: dict[str, tuple[str, Callable[[int], Contents]]] = {
    "text to video": ("t2v-1.3B", clip_item),
    "text to picture": ("t2i-14B", lambda number: clip_item(number, num_frames=1)),
    "image to video": ("i2v-14B", clip_item),
    "first and last frame": ("flf2v-14B", lambda number: clip_item(number, both_ends=True)),
    "control, from a text": ("t2v-1.3B-FC", clip_item),
    "control, from an image": ("i2v-14B-FC", clip_item),
    "one frame": ("i2v-14B", one_frame_item),
    "one frame in the middle": ("flf2v-14B", lambda number: one_frame_item(number, (0, 1, 2))),
    "one frame, far away": ("i2v-14B", lambda number: one_frame_item(number, (0, 40), target=40)),
    "one frame before two controls": ("flf2v-14B", lambda number: one_frame_item(number, (2, 7, 1023), target=2)),
}


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Callable[..., tuple[WanShop, dict[str, Contents]]]:
    """(a workshop, what it has cached) for a case. Texts differ in length."""
    folder = tmp_path_factory.mktemp("一枚 [1]")

    def make(name: str, **more: Callable[[Contents], Tensor]) -> tuple[WanShop, dict[str, Contents]]:
        task, item = CASES[name]
        items = {stem: item(number) for number, stem in enumerate(NAMES)}
        for contents in items.values():
            contents |= {content: make_one(contents) for content, make_one in more.items()}
        target = {"far": {"target": 40}, "before": {"target": 2}}
        keys = next((keys for word, keys in target.items() if word in name), {})
        data = write_data(folder / f"{name} {' '.join(more)}", items, **keys)
        kind = "fun_control" if task.endswith("-FC") else KINDS[task]
        return WanShop(folder=folder, dit=write_dit(folder, kind), data=data, task=task), items

    return make


def by_the_oracle(step: FirstStep, shop: WanShop, items: dict[str, Contents]) -> tuple[Tensor, Tensor]:
    """(velocities, squared errors) of the batch's items."""
    kind = "fun_control" if shop.task.endswith("-FC") else KINDS[shop.task]
    oracle, found, errors = build_oracle(build_transformer(kind)), [], []
    for key, noise, sigma in zip(step.batch.items, step.noise, step.sigmas, strict=True):
        contents = items[key.name.partition("_")[0]]
        clean = contents["latents"].float()
        with torch.no_grad():
            velocity = oracle_velocity(oracle, contents, shop.task, (1 - sigma) * clean + sigma * noise, sigma)
        found.append(velocity)
        errors.append((velocity - (noise - clean)) ** 2)
    return torch.stack(found), torch.stack(errors)


@pytest.mark.parametrize("name", CASES)
def test_velocity_and_loss_of_a_batch_are_diffusers(name: str, shop, tmp_path: Path) -> None:
    """The caches are as another tool writes them: no fingerprints."""
    place, items = shop(name)
    step = first_step(place.command(tmp_path / "出力"))
    velocities, errors = by_the_oracle(step, place, items)
    assert {key.name.partition("_")[0] for key in step.batch.items} == set(NAMES)
    assert difference(step.velocity, velocities) <= TOLERANCE
    torch.testing.assert_close(step.loss.losses, errors.flatten(1).mean(dim=1), rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(step.loss.weighted.detach(), errors.mean(), rtol=TOLERANCE, atol=0)


def test_places_of_frames_count(shop, tmp_path: Path) -> None:
    """The same tensors, noise and noise levels: only `f_indices` differ."""
    near, far = (first_step(shop(name)[0].command(tmp_path / name)) for name in ("one frame", "one frame, far away"))
    assert torch.equal(near.noisy, far.noisy) and near.batch.items == far.batch.items
    assert difference(near.velocity, far.velocity) > 1e-3


# ---- which errors count ----

WEIGHTED: dict[str, tuple[dict[str, object], Callable[[Tensor], Tensor]]] = {
    "everything": ({}, torch.ones_like),
    "the picture": ({"one_frame_target_loss_only": True}, lambda mask: marked(mask)),
    "what the mask lets through": ({"masked_loss": True}, lambda mask: mask),
    "both": ({"masked_loss": True, "one_frame_target_loss_only": True}, lambda mask: mask * marked(mask)),
}
PLACE = 1
"""Of the picture among the frames."""


def marked(mask: Tensor) -> Tensor:
    """1 in the picture, 0 in the controls."""
    weights = torch.zeros_like(mask)
    weights[:, PLACE] = 1
    return weights


@pytest.mark.parametrize("name", WEIGHTED)
def test_the_loss_is_the_mean_over_what_counts_of_each_item(name: str, shop, tmp_path: Path) -> None:
    flags, weights_of = WEIGHTED[name]
    masks = {"latents_loss_mask": lambda contents: loss_mask(contents["latents"].shape[1], PLACE)}
    place, items = shop("one frame in the middle", **masks)
    step = first_step(place.command(tmp_path / "出力", **flags))
    _, errors = by_the_oracle(step, place, items)
    weights = weights_of(loss_mask(3, PLACE).float()).expand(16, -1, -1, -1)
    wanted = torch.stack([(own * weights).sum() / weights.sum() for own in errors])
    torch.testing.assert_close(step.loss.losses, wanted, rtol=TOLERANCE, atol=0)
    if flags:
        assert not torch.isclose(wanted, errors.flatten(1).mean(dim=1), rtol=1e-2).any()


# ---- gradients ----


def test_gradients_are_those_of_diffusers_and_peft(shop, tmp_path: Path) -> None:
    """Of a LoRA on all layers of the blocks, those of pictures too; one step shows them."""
    place, items = shop("one frame in the middle")
    model = build_transformer("flf2v")
    network = lora_wan.create_network(model, dim=3, alpha=2.0, args={})
    for seed, parameter in enumerate(network.parameters()):
        parameter.data = 0.1 * random(*parameter.shape, seed=seed)
    network.save(tmp_path / "前.safetensors", metadata={})
    given = {"network_weights": tmp_path / "前.safetensors", "network_alpha": 2, "optimizer_type": "SGD"}
    command = place.command(tmp_path / "出力", **given, learning_rate=100, max_grad_norm=0)
    step = first_step(command)
    before, after = load_file(tmp_path / "前.safetensors"), load_file(final_file(command))
    found = {name: (before[name] - after[name]) / 100 for name in before if not name.endswith(".alpha")}

    oracle, theirs = build_oracle(model), their_paths(model, network)
    oracle.add_adapter(peft.LoraConfig(r=3, lora_alpha=2, target_modules=list(theirs.values())))
    for path, adapter in network.adapters.items():
        layer = oracle.get_submodule(theirs[path])
        layer.lora_A["default"].weight.data.copy_(adapter.lora_down.weight)
        layer.lora_B["default"].weight.data.copy_(adapter.lora_up.weight)
    squares = []
    for key, noise, sigma in zip(step.batch.items, step.noise, step.sigmas, strict=True):
        contents = items[key.name.partition("_")[0]]
        clean = contents["latents"].float()
        noisy = (1 - sigma) * clean + sigma * noise
        squares.append((oracle_velocity(oracle, contents, place.task, noisy, sigma) - (noise - clean)) ** 2)
    torch.stack(squares).mean().backward()
    wanted = {}
    for name, path in network.paths.items():
        layer = oracle.get_submodule(theirs[path])
        wanted[f"{name}.lora_down.weight"] = layer.lora_A["default"].weight.grad
        wanted[f"{name}.lora_up.weight"] = layer.lora_B["default"].weight.grad
    assert len(wanted) == 2 * 3 * 12 and largest_difference(found, wanted) <= 1e-4


def their_paths(model: WanTransformer, network: Network) -> dict[str, str]:
    """Our layers' paths -> those of diffusers, as its own converter has them."""
    numbered = {f"{path}.weight": torch.tensor(float(number)) for number, path in enumerate(network.adapters)}
    whole = {name: numbered.get(name, torch.tensor(-1.0)) for name in model.state_dict()}
    found = {int(n): name.removesuffix(".weight") for name, n in diffusers_names(whole).items() if n >= 0}
    return {path: found[number] for number, path in enumerate(network.adapters)}
