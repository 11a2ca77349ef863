"""What is counted of Wan's work, against torch's own counters and published figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modules.checkpointing import Checkpointing
from modules.plan import training_flops
from modules.transformer_plan import Kept, Work
from networks.lora_wan import create_network
from options.wan_request import WanRequest, WanRequestFlags
from options.wan_tasks import find_task
from tests.counted_flops import counted_flops
from tests.live_bytes import LiveBytes, use_fused_kernels
from tests.published import described, published_wan
from tests.wan_transformers import CONFIGS
from wan.config import Kind, WanConfig
from wan.costs import Tokens, WanCosts, num_features, num_target_frames, num_tokens
from wan.model import PATCH, Conditioning, WanTransformer

ROWS, COLUMNS = 4, 6
"""Of the latents here, which have three frames."""
NUM_TOKENS = 3 * ROWS * COLUMNS // PATCH**2


def published(name: str, **changes: int) -> WanConfig:
    return replace(WanConfig.from_checkpoint(described("--dit", published_wan(name), "BF16")), **changes)


def costs_of(config: WanConfig, num_tokens: int, *, in_training: bool = False) -> WanCosts:
    return WanCosts(config=config, tokens=Tokens(target=num_tokens), in_training=in_training)


def transformer_of(config: WanConfig, dtype: torch.dtype = torch.float32, device: str = "cpu") -> WanTransformer:
    with torch.device(device):
        return WanTransformer(config).to(dtype).requires_grad_(False)


def conditioning_of(
    config: WanConfig, frames: int, *, batch: int = 1, size: tuple[int, int] = (ROWS, COLUMNS), device: str = "cpu"
) -> Conditioning:
    beside = config.in_channels - config.latent_channels

    def ones(*shape: int) -> Tensor:
        """In no type that a model computes with here, so that it makes a copy."""
        return torch.ones(batch, *shape, dtype=torch.float16, device=device)

    return Conditioning(
        text=ones(7, config.text_width),
        text_lengths=torch.full((batch,), 7, device=device),
        image=ones(num_features(config), config.image_width) if config.image_width else None,
        latents=ones(beside, frames, *size) if beside else None,
        indices=torch.zeros(batch, frames, dtype=torch.int64, device=device),
    )


# ---- tokens ----


I2V, FLF2V = {"task": find_task("i2v-14B")}, {"task": find_task("flf2v-14B")}
ONE_FRAME = {**I2V, "one_frame_inference": "target_index=1,control_index=0", "control_image_path": ("絵.png",)}
TWO_CONTROLS = {**ONE_FRAME, "one_frame_inference": "target_index=1,control_index=0;5"}
TWO_CONTROLS |= {"control_image_path": ("絵.png", "b.png")}


def request_of(**flags: object) -> WanRequest:
    given = {"prompt": "猫", "video_size": (480, 832), "exact_size": True} | flags
    return WanRequestFlags(**given).resolve(image_size=lambda path: (832, 480))


@pytest.mark.parametrize(
    ("flags", "kept", "controls"),
    [
        ({}, 21, 0),
        ({"task": find_task("t2i-14B")}, 1, 0),
        ({"task": find_task("t2v-1.3B-FC"), "control_path": "動.mp4", "video_length": 17}, 5, 0),
        ({**I2V, "image_path": "始.png"}, 21, 0),
        ({**I2V, "image_path": "始.png", "end_image_path": "終.png"}, 22, 0),
        ({**FLF2V, "image_path": "始.png", "end_image_path": "終.png"}, 21, 0),
        (ONE_FRAME, 1, 1),
        (TWO_CONTROLS, 1, 2),
        ({**ONE_FRAME, "end_image_path": "終.png"}, 1, 1),
    ],
)
def test_requests_have_tokens_for_every_frame_that_is_denoised(flags: dict, kept: int, controls: int) -> None:
    request = request_of(**flags)
    tokens = Tokens.of(request)
    assert (tokens.target, tokens.controls) == (1560 * kept, 1560 * controls)
    assert num_tokens(request) == tokens.total == sum(tokens.by_group().values()) == 1560 * (kept + controls)
    assert num_target_frames(request) == kept
    assert list(tokens.by_group()) == (["target", "controls"] if controls else ["target"])


# ---- operations ----


@pytest.mark.parametrize("kind", CONFIGS)
def test_operations_of_a_step_are_those_that_torch_counts(kind: Kind) -> None:
    config = CONFIGS[kind]
    transformer, latents = transformer_of(config), torch.zeros(1, 16, 3, ROWS, COLUMNS)
    with torch.no_grad():
        prepared = transformer.prepare(conditioning_of(config, 3), torch.ones(2, 1))
    costs = costs_of(config, NUM_TOKENS)
    assert counted_flops(lambda: transformer.step(latents, prepared, 1)) == costs.step_flops()
    skipping = counted_flops(lambda: transformer.step(latents, prepared, 1, skip_blocks=frozenset({0, 2})))
    assert skipping == costs.without(2).step_flops() != costs.step_flops()


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("kind", CONFIGS)
def test_operations_of_preparing_are_those_that_torch_counts(kind: Kind, num_steps: int) -> None:
    config = CONFIGS[kind]
    found = counted_flops(lambda: transformer_of(config).prepare(conditioning_of(config, 3), torch.ones(num_steps, 1)))
    assert found == costs_of(config, NUM_TOKENS).prepare_flops(num_steps=num_steps)


@pytest.mark.parametrize("kind", ["t2v", "flf2v"])
def test_training_computes_keys_and_values_in_the_blocks(kind: Kind) -> None:
    """The same operations in all, but these belong to the step, which checkpointing repeats."""
    config, latents = CONFIGS[kind], torch.zeros(2, 16, 3, ROWS, COLUMNS)
    transformer, given = transformer_of(config), conditioning_of(config, 3, batch=2)
    costs, sampling = costs_of(config, NUM_TOKENS, in_training=True), costs_of(config, NUM_TOKENS)
    prepared = counted_flops(lambda: transformer.prepare(given, torch.ones(1, 2)), in_training=True)
    assert prepared == costs.prepare_flops(batch=2)
    whole = counted_flops(lambda: transformer(latents, torch.ones(2), given), in_training=True)
    assert whole.total == (costs.step_flops(batch=2) + prepared).total  # torch batches some linear layers, too
    assert costs.step_flops() + costs.prepare_flops() == sampling.step_flops() + sampling.prepare_flops()
    assert costs.step_flops().linear > sampling.step_flops().linear


PAIR, ONE = 2 * 1560, 1560
"""Tokens at 832 x 480."""


def test_figures_are_the_published_ones() -> None:
    """TFLOP of a forward pass in which nothing is known beforehand: keys and values of text and picture are in it."""
    pair = costs_of(published("i2v_14B"), PAIR)
    whole = pair.step_flops() + pair.prepare_flops()
    assert whole.linear / 1e12 == pytest.approx(77.9, abs=0.06)
    assert whole.attention / 1e12 == pytest.approx(9.9, abs=0.06)
    # Without keys and values 3.2 less, and embeddings make some 0.05 of what is done once.
    assert pair.step_flops().linear / 1e12 == pytest.approx(77.9 - 3.2 - 0.05, abs=0.06)
    square = costs_of(published("i2v_14B"), 2 * 1600)
    whole = square.step_flops() + square.prepare_flops()
    assert (whole.linear / 1e12, whole.attention / 1e12) == pytest.approx((79.8, 10.4), abs=0.1)
    small = costs_of(published("t2v_1.3B"), ONE)
    assert (small.step_flops() + small.prepare_flops()).total / 1e12 == pytest.approx(4.65, abs=0.05)


def test_figures_of_training_are_the_published_ones() -> None:
    """With adapters of rank 32, some 4 TFLOP with checkpoints."""
    pair = costs_of(published("i2v_14B"), PAIR, in_training=True)
    for recomputed, wanted in ((1, 282), (0, 193)):
        found = training_flops(pair.step_flops(), recomputed=recomputed) + pair.prepare_flops()
        assert found.total / 1e12 == pytest.approx(wanted, rel=0.02)
    every = Kept(checkpointed=frozenset(range(40)))
    assert pair.kept_bytes(Work(itemsize=2), every) / 1e9 == pytest.approx(1.3, abs=0.05)


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_are_those_that_go_through_a_layer(kind: Kind) -> None:
    config, found = CONFIGS[kind], {}
    transformer = transformer_of(config)
    network = create_network(transformer, dim=1, alpha=1.0, args={})
    for path in network.adapters:

        def note(layer: torch.nn.Linear, given: tuple[Tensor, ...], path: str = path) -> None:
            found[path] = given[0].numel() // layer.in_features

        transformer.get_submodule(path).register_forward_pre_hook(note)
    transformer(torch.zeros(1, 16, 3, ROWS, COLUMNS), torch.ones(1), conditioning_of(config, 3))
    assert found == {path: costs_of(config, NUM_TOKENS).num_rows(path) for path in network.adapters}
    assert set(found.values()) == {NUM_TOKENS, 512} | {"t2v": set(), "flf2v": {514}}.get(kind, {257})
    assert costs_of(config, NUM_TOKENS).num_rows("time_projection.1") == 1


# ---- bytes ----


SIZES = [("i2v_14B", 2, 60, 104), ("t2v_1.3B", 1, 60, 104), ("flf2v_14B", 21, 60, 104)]
"""Model, latent frames and their size."""
BLOCKS = 4
"""That are left of it; they are all alike."""


def on_meta(
    name: str, frames: int, height: int, width: int, dtype: torch.dtype, *, batch: int = 1
) -> tuple[WanTransformer, Conditioning, Tensor, WanCosts]:
    config = published(name, num_blocks=BLOCKS)
    conditioning = conditioning_of(config, frames, batch=batch, size=(height, width), device="meta")
    latents = torch.empty(batch, 16, frames, height, width, device="meta")
    costs = costs_of(config, frames * height * width // PATCH**2)
    return transformer_of(config, dtype, "meta"), conditioning, latents, costs


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_of_a_step_are_those_that_are_alive(size: tuple, dtype: torch.dtype, batch: int, monkeypatch) -> None:
    use_fused_kernels(monkeypatch)
    transformer, conditioning, latents, costs = on_meta(*size, dtype, batch=batch)
    work = Work(itemsize=dtype.itemsize, batch=batch)
    with LiveBytes() as live:
        prepared = transformer.prepare(conditioning, torch.ones(1, batch, device="meta"))
        prepared.rope.of(size[2] // PATCH, size[3] // PATCH)
    assert costs.prepared_bytes(work) == pytest.approx(live.now, rel=0.01)
    with LiveBytes() as live:
        transformer.step(latents, prepared, 0)
    assert costs.step_bytes(work) == pytest.approx(live.peak, rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [1, 40])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("num_blocks", [1, 30])
def test_bytes_of_preparing_are_those_that_are_alive(size: tuple, num_steps: int, num_blocks: int, monkeypatch) -> None:
    """The rotary tables, which the first step makes, are in it."""
    use_fused_kernels(monkeypatch)
    config = published(size[0], num_blocks=num_blocks)
    conditioning = conditioning_of(config, size[1], size=size[2:], device="meta")
    transformer = transformer_of(config, torch.bfloat16, "meta")
    costs, work = costs_of(config, size[1] * ONE), Work(itemsize=2, num_steps=num_steps)
    with LiveBytes() as live:
        prepared = transformer.prepare(conditioning, torch.ones(num_steps, 1, device="meta"))
        peak = live.peak
        tables = prepared.rope.of(size[2] // PATCH, size[3] // PATCH)
    assert costs.prepared_bytes(work) == pytest.approx(live.now, rel=0.01)
    assert costs.prepare_bytes(work) == pytest.approx(peak, abs=0.03 * peak + sum(x.nbytes for x in tables))
    twice, bare = replace(work, num_prepared=2), replace(work, unpacked=7)
    assert costs.prepared_bytes(twice) == 2 * costs.prepared_bytes(work)
    assert costs.prepare_bytes(twice) == costs.prepare_bytes(work) + costs.prepared_bytes(work)
    assert costs.prepare_bytes(bare) - costs.prepare_bytes(work) == 7


@pytest.mark.parametrize("num_checkpointed", [0, 2, BLOCKS])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_of_training_are_those_that_are_alive(
    num_checkpointed: int, size: tuple, dtype: torch.dtype, monkeypatch
) -> None:
    use_fused_kernels(monkeypatch)
    transformer, conditioning, latents, costs = on_meta(*size, dtype)
    costs = replace(costs, in_training=True)
    network = create_network(transformer, dim=32, alpha=1.0, args={}).to("meta", dtype)
    network.apply_to(transformer)
    network.train()
    transformer.checkpointing = Checkpointing(num_blocks=num_checkpointed)
    with LiveBytes() as live:
        prepared = transformer.prepare(conditioning, torch.ones(1, 1, device="meta"))
        prepared.rope.of(size[2] // PATCH, size[3] // PATCH)
        ready = live.now
        loss = transformer.step(latents, prepared, 0).sum()
        kept_by_torch = live.now - ready
        loss.backward()
    kept, work = Kept(checkpointed=frozenset(range(num_checkpointed))), Work(itemsize=dtype.itemsize)
    assert costs.prepared_bytes(work) == pytest.approx(ready, rel=0.01)
    counted_kept = costs.kept_bytes(work, kept)
    assert counted_kept == pytest.approx(kept_by_torch, rel=0.015)
    gradients = dtype.itemsize * sum(parameter.numel() for parameter in network.parameters())
    found = counted_kept + costs.backward_bytes(work, kept)
    assert found == pytest.approx(live.peak - ready, rel=0.025, abs=gradients)


def test_blocks_that_keep_less_take_less() -> None:
    costs, work = costs_of(published("i2v_14B"), PAIR, in_training=True), Work(itemsize=2, batch=2)
    sizes = [costs.kept_bytes(work, Kept(checkpointed=frozenset(range(number)))) for number in range(41)]
    assert sizes == sorted(sizes, reverse=True)
    every = Kept(checkpointed=frozenset(range(40)), in_ram=True)
    assert costs.kept_bytes(work, every) < sizes[-1] / 10
    assert costs.backward_bytes(work, every) > costs.backward_bytes(work, replace(every, in_ram=False))
    assert sizes[0] == pytest.approx(2 * costs.kept_bytes(replace(work, batch=1), Kept()), rel=1e-6)
    for count in (costs.step_bytes, lambda w: costs.backward_bytes(w, every)):
        assert count(replace(work, unpacked=7)) - count(work) == 7
