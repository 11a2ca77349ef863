"""Gradients of several processes: their mean, and the limit of their norm."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from common.processes import Processes, joined_processes
from tests.training_builders import (
    EPOCH,
    batch_of,
    build_network,
    build_objective,
    build_transformer,
    difference,
    gradients_of,
    loss_and_gradients,
    one_frame_item,
    random,
    singles,
)
from training.gradients import average_gradients, clip_gradients

SHAPES = ((3, 4), (5,), (2, 2, 2), (6,))
WORLD = 2


def gradients(rank: int) -> list[Tensor | None]:
    """The second process lacks one, and no process has the last one."""
    found = [random(*shape, seed=10 * rank + i) for i, shape in enumerate(SHAPES)]
    return [found[0], found[1], None if rank else found[2], None]


def parameters_with(found: list[Tensor | None]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient
    return parameters


def two_items() -> dict:
    return {"a": one_frame_item(1, "target_index=1,control_index=0;10", length=3), "猫": one_frame_item(2)}


def process(rank: int, port: int, folder: str) -> None:
    """One of them: averages the gradients above, then those of a training step on its own item."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launched.items()})
    torch.set_num_threads(1)
    with joined_processes() as processes:
        parameters = parameters_with(gradients(rank))
        average_gradients(parameters, processes)
        transformer = build_transformer()
        network = build_network(transformer)
        network.apply_to(transformer)
        build_objective(transformer)(singles(two_items())[rank], epoch=EPOCH).weighted.backward()
        average_gradients(list(network.parameters()), processes)
        found = {"averaged": [parameter.grad for parameter in parameters], "step": gradients_of(network)}
        torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes has got."""
    folder = tmp_path_factory.mktemp("勾配")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_every_process_gets_the_mean_and_a_missing_gradient_counts_as_zeros(averaged: list[dict]) -> None:
    zeros = [torch.zeros(shape) for shape in SHAPES]
    pairs = zip(gradients(0), gradients(1), zeros, strict=True)
    wanted = [((zero if one is None else one) + (zero if other is None else other)) / 2 for one, other, zero in pairs]
    for found in averaged:
        assert all(map(torch.equal, found["averaged"], wanted))


def test_two_processes_step_like_one_with_the_same_items_in_a_batch(averaged: list[dict]) -> None:
    transformer = build_transformer()
    network = build_network(transformer)
    network.apply_to(transformer)
    objective = build_objective(transformer)
    _, wanted = loss_and_gradients(objective, network, batch_of(two_items()))
    assert all(torch.equal(averaged[0]["step"][name], averaged[1]["step"][name]) for name in wanted)
    assert difference(averaged[0]["step"], wanted) <= 1e-5
    _, alone = loss_and_gradients(objective, network, singles(two_items())[0])
    assert difference(averaged[0]["step"], alone) > 1e-2


def test_a_single_process_keeps_its_gradients() -> None:
    parameters = parameters_with(gradients(1))
    average_gradients(parameters, Processes())
    assert torch.equal(parameters[0].grad, gradients(1)[0])
    assert parameters[2].grad is None and parameters[3].grad is None


@pytest.mark.parametrize("part", [0.5, 1.5])
def test_the_norm_of_all_gradients_together_is_limited_as_by_torch(part: float) -> None:
    ours, theirs = parameters_with(gradients(0)), parameters_with(gradients(0))
    before = torch.cat([gradient.flatten() for gradient in gradients(0) if gradient is not None]).norm()
    limit = part * float(before)
    norm = clip_gradients(ours, limit)
    torch.testing.assert_close(norm, before)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, limit))
    for mine, wanted in zip(ours[:3], theirs[:3], strict=True):
        assert torch.equal(mine.grad, wanted.grad)
    after = torch.cat([parameter.grad.flatten() for parameter in ours[:3]]).norm()
    torch.testing.assert_close(after, before * min(part, 1))
    assert ours[3].grad is None


def test_a_limit_of_0_is_none() -> None:
    parameters = parameters_with(gradients(0))
    norm = clip_gradients(parameters, 0)
    assert float(norm) > 1
    assert all(torch.equal(mine.grad, given) for mine, given in zip(parameters[:3], gradients(0)[:3], strict=True))
