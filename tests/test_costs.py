"""What is counted of FramePack's work, against torch's own counters and published figures."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from frame_pack.config import FramePackConfig
from frame_pack.context import PackedContext, one_frame_context
from frame_pack.costs import FramePackCosts, Tokens, context_of
from frame_pack.model import Conditioning, FramePackTransformer, Prepared, StepInputs
from modules.checkpointing import Checkpointing
from modules.plan import training_flops
from modules.rope import Rope
from modules.transformer_plan import Kept, Work
from networks.lora_framepack import create_network
from options.fpack_request import FramePackRequestFlags
from options.one_frame import OneFrameOptions
from tests.counted_flops import counted_flops
from tests.live_bytes import LiveBytes, use_fused_kernels

SMALL = FramePackConfig(
    num_double_blocks=2,
    num_single_blocks=3,
    width=256,
    mlp_width=1024,
    text_width=96,
    pooled_width=64,
    image_width=72,
)
PUBLISHED = FramePackConfig()
SHORT = replace(PUBLISHED, num_double_blocks=2, num_single_blocks=3)
"""Of the published width; the blocks are all alike."""


def costs(config: FramePackConfig, tokens: Tokens) -> FramePackCosts:
    return FramePackCosts(config=config, tokens=tokens)


def transformer_of(config: FramePackConfig, device: str = "cpu", dtype: torch.dtype = torch.float32):
    with torch.device(device):
        return FramePackTransformer(config).to(dtype).requires_grad_(False)


def conditioning_of(
    config: FramePackConfig, context: PackedContext, *, num_text: int, batch: int = 1, num_image: int = 11
) -> Conditioning:
    return Conditioning(
        context=context,
        text=torch.ones(batch, num_text, config.text_width),
        text_mask=torch.ones(batch, num_text, dtype=torch.bool),
        pooled=torch.ones(batch, config.pooled_width),
        image=torch.ones(batch, num_image, config.image_width),
        guidance=torch.full((batch,), 1000.0),
    )


def context_with(*, height: int, width: int, controls: int = 2) -> PackedContext:
    """Of rows and columns that 4x groups do not divide."""
    like = torch.zeros(1, 16, 1, height, width)
    options = OneFrameOptions(target_index=9, control_indices=tuple(range(controls)))
    return one_frame_context([like] * controls, [None] * controls, options, window=9, like=like)


# ---- tokens ----


def test_tokens_are_those_that_the_model_makes() -> None:
    context, transformer = context_with(height=10, width=14), transformer_of(SMALL)
    tokens = Tokens.of(context, num_text=7, num_image=11)
    prepared = transformer.prepare(conditioning_of(SMALL, context, num_text=7), torch.ones(2, 1))
    assert prepared.clean_tokens.shape[1] == tokens.history
    assert prepared.steps[0].text.shape[1] == tokens.texts
    assert prepared.steps[0].rope.cos.shape[1] == tokens.total
    assert sum(tokens.by_group().values()) == tokens.total


def request_of(**flags: object):
    given = {"prompt": "猫", "video_size": (640, 640)} | flags
    return FramePackRequestFlags(**given).resolve(image_size=lambda path: (640, 640))


@pytest.mark.parametrize(
    ("flags", "pictures"),
    [
        ({"one_frame_inference": "no_2x,no_4x,no_post"}, 1600 + 1600),
        ({"one_frame_inference": "no_2x,no_4x"}, 1600 + 3200),
        ({"one_frame_inference": "no_4x"}, 1600 + 3200 + 400),
        ({"one_frame_inference": "default"}, 1600 + 3200 + 400 + 400),
        ({}, 14400 + 3200 + 400 + 400),
        ({"f1": True}, 14400 + 3200 + 400 + 400),
    ],
)
def test_requests_have_the_published_numbers_of_tokens(flags: dict, pictures: int) -> None:
    assert Tokens.of(context_of(request_of(**flags)), num_text=100).pictures == pictures


# ---- operations ----


def test_operations_of_a_step_are_those_that_torch_counts() -> None:
    context, transformer = context_with(height=8, width=12), transformer_of(SMALL)
    tokens = Tokens.of(context, num_text=7, num_image=11)
    prepared = transformer.prepare(conditioning_of(SMALL, context, num_text=7), torch.ones(3, 1))
    latents = torch.zeros(1, 16, 1, 8, 12)
    assert counted_flops(lambda: transformer.step(latents, prepared, 1)) == costs(SMALL, tokens).step_flops()


@pytest.mark.parametrize(("num_steps", "num_text"), [(1, 7), (5, 9)])
def test_operations_of_preparing_are_those_that_torch_counts(num_steps: int, num_text: int) -> None:
    context, transformer = context_with(height=10, width=14), transformer_of(SMALL)
    tokens = Tokens.of(context, num_text=num_text, num_image=11)
    conditioning = conditioning_of(SMALL, context, num_text=num_text)
    found = counted_flops(lambda: transformer.prepare(conditioning, torch.ones(num_steps, 1)))
    assert found == costs(SMALL, tokens).prepare_flops(num_steps=num_steps)


def test_operations_of_a_batch_are_those_that_torch_counts() -> None:
    like = torch.zeros(2, 16, 1, 8, 12)
    options = OneFrameOptions(target_index=1, control_indices=(0,), no_2x=True, no_4x=True)
    context = one_frame_context([like], [None], options, window=9, like=like)
    indices = {"indices": context.indices.expand(2, -1)}
    context = replace(context, clean=replace(context.clean, indices=context.clean.indices.expand(2, -1)), **indices)
    transformer, tokens = transformer_of(SMALL), Tokens.of(context, num_text=7, num_image=11)
    conditioning = conditioning_of(SMALL, context, num_text=7, batch=2)
    found = counted_flops(lambda: transformer(like, torch.ones(2), conditioning))
    wanted = costs(SMALL, tokens).step_flops(batch=2) + costs(SMALL, tokens).prepare_flops(batch=2)
    assert found.total == wanted.total  # torch batches some linear layers, too


CASES = {
    "c0": ((1600, 1600, 0, 0), (55.1, 12.0), (223, 155), 1.5),
    "post": ((1600, 3200, 0, 0), (76.8, 23.4), (340, 239), 2.1),
    "2x": ((1600, 3200, 400, 0), (82.2, 26.8), (372, 262), 2.2),
    "default": ((1600, 3200, 400, 400), (87.7, 30.5), (406, 286), 2.4),
    "section": ((14400, 3200, 400, 400), (261.6, 272.6), (2027, 1489), 7.1),
}
"""Tokens; TFLOP of a step, counted with the refiner over 512 rows; of training with checkpoints and without; GB of
checkpointed inputs. Source: the figures of the published architecture."""


@pytest.mark.parametrize("case", CASES)
def test_figures_are_the_published_ones(case: str) -> None:
    groups, (linear, attention), (with_checkpoints, without), kept = CASES[case]
    names = ("target", "clean", "clean_2x", "clean_4x")
    tokens = Tokens(**dict(zip(names, groups, strict=True)), image=729, text=100)
    step, prepared = costs(PUBLISHED, tokens).step_flops(), costs(PUBLISHED, replace(tokens, text=512)).prepare_flops()
    assert (step + prepared).linear / 1e12 == pytest.approx(linear, abs=0.06)
    assert step.attention / 1e12 == pytest.approx(attention, abs=0.06)
    for recomputed, wanted in ((1, with_checkpoints), (0, without)):
        # Which has what adapters of rank 32 compute in it, some 4 TFLOP at c0.
        assert training_flops(step, recomputed=recomputed).total / 1e12 == pytest.approx(wanted, rel=0.03)
    every = Kept(checkpointed=frozenset(range(60)))
    assert costs(PUBLISHED, tokens).kept_bytes(Work(itemsize=2), every) / 1e9 == pytest.approx(kept, abs=0.15)


def test_rows_are_those_that_go_through_a_layer() -> None:
    context, transformer = context_with(height=8, width=12), transformer_of(SMALL)
    tokens = Tokens.of(context, num_text=7, num_image=11)
    network, found = create_network(transformer, dim=1, alpha=1.0, args={}), {}
    for path in network.adapters:

        def note(layer: torch.nn.Linear, given: tuple[Tensor, ...], path: str = path) -> None:
            found[path] = given[0].numel() // layer.in_features

        transformer.get_submodule(path).register_forward_pre_hook(note)
    prepared = transformer.prepare(conditioning_of(SMALL, context, num_text=7), torch.ones(1, 1))
    transformer.step(torch.zeros(1, 16, 1, 8, 12), prepared, 0)
    assert found == {path: costs(SMALL, tokens).num_rows(path) for path in network.adapters}
    assert set(found.values()) == {tokens.texts, tokens.pictures, tokens.total}


# ---- bytes ----


def prepared_on_meta(config: FramePackConfig, tokens: Tokens, dtype: torch.dtype) -> Prepared:
    """One step of it, without any content."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    width, doubles = config.width, range(config.num_double_blocks)
    tables = [torch.empty(1, tokens.total, 1, config.head_dim // 2, device="meta") for _ in range(2)]
    step = StepInputs(
        text=empty(1, tokens.texts, width),
        rope=Rope(*tables),
        double_image=tuple(empty(1, 1, 6 * width) for _ in doubles),
        double_text=tuple(empty(1, 1, 6 * width) for _ in doubles),
        single=tuple(empty(1, 1, 3 * width) for _ in range(config.num_single_blocks)),
        final=empty(1, 1, 2 * width),
    )
    layout = FramePackTransformer(replace(SMALL, num_double_blocks=0, num_single_blocks=0)).attention.layout
    whole = layout(torch.tensor([tokens.total]), tokens.total)
    return Prepared(clean_tokens=empty(1, tokens.history, width), layout=whole, steps=(step,))


C0 = Tokens(target=1600, clean=1600, clean_2x=0, clean_4x=0, image=729, text=100)
SECTION = Tokens(target=14400, clean=3200, clean_2x=400, clean_4x=400, image=729, text=100)


def latents_on_meta(tokens: Tokens) -> Tensor:
    return torch.empty(1, 16, tokens.target // 1600, 80, 80, device="meta")


@pytest.mark.parametrize("tokens", [C0, SECTION], ids=["c0", "section"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_of_a_step_are_those_that_are_alive(tokens: Tokens, dtype: torch.dtype, monkeypatch) -> None:
    use_fused_kernels(monkeypatch)
    transformer, prepared = transformer_of(SHORT, "meta", dtype), prepared_on_meta(SHORT, tokens, dtype)
    latents = latents_on_meta(tokens)
    with torch.no_grad(), LiveBytes() as live:
        transformer.step(latents, prepared, 0)
    assert costs(SHORT, tokens).step_bytes(Work(itemsize=dtype.itemsize)) == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize("num_steps", [1, 6])
def test_bytes_of_preparing_are_those_that_are_alive(num_steps: int) -> None:
    context, transformer = context_with(height=24, width=24), transformer_of(SMALL)
    tokens = Tokens.of(context, num_text=120, num_image=200)
    conditioning = conditioning_of(SMALL, context, num_text=120, num_image=200)
    with torch.no_grad(), LiveBytes() as live:
        prepared = transformer.prepare(conditioning, torch.ones(num_steps, 1))
    work = Work(itemsize=4, num_steps=num_steps)
    assert prepared is not None and costs(SMALL, tokens).prepared_bytes(work) == pytest.approx(live.now, rel=0.05)
    assert costs(SMALL, tokens).prepare_bytes(work) == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize("num_checkpointed", [0, 3, 5])
@pytest.mark.parametrize("tokens", [C0, SECTION], ids=["c0", "section"])
def test_bytes_of_training_are_those_that_are_alive(num_checkpointed: int, tokens: Tokens, monkeypatch) -> None:
    use_fused_kernels(monkeypatch)
    transformer = transformer_of(SHORT, "meta", torch.bfloat16)
    network = create_network(transformer, dim=32, alpha=1.0, args={}).to("meta", torch.bfloat16)
    network.apply_to(transformer)
    network.train()
    transformer.checkpointing = Checkpointing(num_blocks=num_checkpointed)
    prepared, latents = prepared_on_meta(SHORT, tokens, torch.bfloat16), latents_on_meta(tokens)
    with LiveBytes() as live:
        loss = transformer.step(latents, prepared, 0).sum()
        kept_by_torch = live.now
        loss.backward()
    kept, work = Kept(checkpointed=frozenset(range(num_checkpointed))), Work(itemsize=2)
    gradients = 2 * sum(parameter.numel() for parameter in network.parameters())
    counted_kept = costs(SHORT, tokens).kept_bytes(work, kept)
    assert counted_kept == pytest.approx(kept_by_torch, rel=0.03)
    assert counted_kept + costs(SHORT, tokens).backward_bytes(work, kept) == pytest.approx(
        live.peak, rel=0.06, abs=gradients
    )


def test_blocks_that_keep_less_take_less() -> None:
    work, sizes = Work(itemsize=2, batch=2), []
    for number in range(61):
        sizes.append(costs(PUBLISHED, C0).kept_bytes(work, Kept(checkpointed=frozenset(range(number)))))
    in_ram = costs(PUBLISHED, C0).kept_bytes(work, Kept(checkpointed=frozenset(range(60)), in_ram=True))
    assert sizes == sorted(sizes, reverse=True) and in_ram < sizes[-1] / 3
    assert sizes[0] == pytest.approx(2 * costs(PUBLISHED, C0).kept_bytes(replace(work, batch=1), Kept()), rel=1e-6)
    assert math.isclose(
        costs(PUBLISHED, C0).step_bytes(replace(work, unpacked=7)) - costs(PUBLISHED, C0).step_bytes(work), 7
    )
