"""One training step: the loss and the LoRA's gradients, against diffusers' transformer with PEFT and plain autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dataset.training_dataset import TrainBatch
from frame_pack.model import FramePackTransformer
from networks.network import Network
from tests.training_builders import (
    EPOCH,
    NORMS,
    SEED,
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
)
from training.objective import BatchLoss
from training.timesteps import draw_noise, item_seed

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def base() -> FramePackTransformer:
    """Not to be changed."""
    return build_transformer()


@pytest.fixture(params=["usual layers", "norms too"])
def pair(request, transformer):
    """A network that is applied, and the oracle with the same one."""


ITEMS: Mapping[str, Callable[[], Contents]] = {
    "one frame alone": lambda: one_frame_item(1, "target_index=1,control_index=0;10,no_post,no_2x,no_4x"),
    "one frame with post and histories": lambda: one_frame_item(2, "target_index=9,control_index=0", num_controls=1),
    "one frame, unsorted and far": lambda: one_frame_item(3, "target_index=40,control_index=13;0,no_4x", length=4),
    "section": lambda: section_item(4),
    "last section": lambda: section_item(5, section=2, length=6),
    "f1 section": lambda: section_item(6, f1=True, section=1),
}


def noise_of(batch: TrainBatch) -> Tensor:
    return draw_noise([item_seed(SEED, EPOCH, key) for key in batch.items], batch.contents["latents"].shape[1:])


def test_x(base):
    network = build_network(base)
    oracle = build_oracle(base, network)
    network.apply_to(base)
    objective = build_objective(base)
    for name, item in ITEMS.items():
        batch = batch_of({"猫": item()})
        result, gradients = loss_and_gradients(objective, network, batch)
        wanted = oracle_loss(oracle, item(), noise_of(batch)[0], result.sigmas[0])
        wanted.backward()
        print(name, float(result.weighted), float(wanted), float(result.sigmas))
        print(difference(gradients, oracle_gradients(oracle, network)))
