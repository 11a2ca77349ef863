"""Our Wan transformer against diffusers' `WanTransformer3DModel`: same weights, same inputs, float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor
from torch._dynamo.utils import counters

from modules.activation_offload import ActivationOffload, PlainPorter
from modules.attention import AttentionOptions
from modules.block_swap import SwapOptions, attach, swapped_names
from modules.checkpointing import Checkpointing
from modules.execution import Execution
from networks.lora_wan import create_network
from options.errors import UserError
from options.flags_compile import CompileChoice
from tests.published import described, published_wan
from tests.test_weight_ring import LateCopies
from tests.wan_transformers import (
    CONFIGS,
    HEIGHT,
    NUM_BLOCKS,
    NUM_FRAMES,
    WIDTH,
    build_oracle,
    build_transformer,
    conditioning,
    diffusers_forward,
    noisy,
)
from wan.config import Kind, WanConfig
from wan.model import WanTransformer
from wan.rope import ClipRope

CPU = torch.device("cpu")
TOLERANCE = 1e-5
KINDS = get_args(Kind)
TIMESTEPS = torch.tensor([[1000.0], [892.2], [341.0]])


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


# ---- the same numbers ----


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_equals_diffusers_for_every_kind(kind: Kind) -> None:
    model = build_transformer(kind)
    given, timesteps = conditioning(model.config), torch.tensor([613.5])
    assert model.config.kind == kind
    ours = model(noisy(), timesteps, given)
    assert ours.dtype == torch.float32
    assert_equal(ours, diffusers_forward(build_oracle(model), noisy(), timesteps, given))


@torch.no_grad()
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", ["t2v", "flf2v"])
def test_batch_with_unequal_text_lengths_equals_diffusers(kind: Kind, split: bool) -> None:
    model = build_transformer(kind)
    model.attention = AttentionOptions(split=split)
    given, timesteps = conditioning(model.config, lengths=(9, 2)), torch.tensor([900.0, 120.0])
    ours = model(noisy(2), timesteps, given)
    assert_equal(ours, diffusers_forward(build_oracle(model), noisy(2), timesteps, given))


@torch.no_grad()
def test_rows_past_a_texts_end_do_not_matter_and_those_past_the_512th_neither() -> None:
    model = build_transformer("t2v")
    given, timesteps = conditioning(model.config, lengths=(4,)), torch.tensor([500.0])
    wanted = model(noisy(), timesteps, given)
    spoilt = torch.cat([given.text[:, :4], torch.full((1, 600, given.text.shape[2]), torch.nan)], dim=1)
    assert torch.equal(model(noisy(), timesteps, replace(given, text=spoilt)), wanted)
    shorter = replace(given, text_lengths=torch.tensor([3]))
    assert not torch.equal(model(noisy(), timesteps, shorter), wanted)


@torch.no_grad()
def test_frames_stand_where_their_indices_say(monkeypatch) -> None:
    """Sample by sample, with diffusers' own table read at these frames."""
    model = build_transformer("i2v")
    oracle, timesteps = build_oracle(model), torch.tensor([700.0, 650.0])
    indices = torch.tensor([[0, 1, 13], [9, 0, 1023]])
    given = conditioning(model.config, lengths=(5, 3), indices=indices)
    ours = model(noisy(2), timesteps, given)

    def gathered(rows: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        table = WanRotaryPosEmbed(128, (1, 2, 2), 1024)
        whole = table(torch.empty(1, 16, 1024, HEIGHT, WIDTH))
        return lambda hidden: tuple(part.unflatten(1, (1024, -1))[:, rows].flatten(1, 2) for part in whole)

    for number, rows in enumerate(indices):
        monkeypatch.setattr(oracle.rope, "forward", gathered(rows))
        single = slice(number, number + 1)
        alone = replace(
            given,
            **{name: getattr(given, name)[single] for name in ("text", "text_lengths", "image", "latents", "indices")},
        )
        assert_equal(ours[single], diffusers_forward(oracle, noisy(2)[single], timesteps[single], alone))


@pytest.mark.parametrize("head_dim", [128, 64, 32])
def test_rotary_tables_are_diffusers_to_the_last_bits_up_to_the_last_index(head_dim: int) -> None:
    config = WanConfig(num_blocks=1, width=head_dim, mlp_width=1, head_dim=head_dim)
    theirs = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)(torch.empty(1, 16, 1024, 4, 6))
    ours = ClipRope(torch.arange(1024)[None], config.rope_axes).of(2, 3)
    for mine, other, offset in ((ours.cos, theirs[0], 0), (ours.sin, theirs[1], 1)):
        torch.testing.assert_close(mine, other[..., offset::2], rtol=0, atol=2e-7)


def test_another_size_has_a_table_of_its_own() -> None:
    axes, indices = WanConfig(num_blocks=1, width=128, mlp_width=1).rope_axes, torch.tensor([[0, 7]])
    table = ClipRope(indices, axes)
    for size in ((2, 3), (3, 2), (2, 3)):
        for found, wanted in zip(table.of(*size), ClipRope(indices, axes).of(*size), strict=True):
            assert torch.equal(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["i2v", "flf2v"])
def test_features_are_embedded_as_in_diffusers(kind: Kind) -> None:
    """On their own: in what comes out in the end, their part is small. Large numbers tell one GELU from another."""
    model = build_transformer(kind)
    image = conditioning(model.config).image
    model.img_emb.proj[1].weight.mul_(4)
    theirs = build_oracle(model).condition_embedder.image_embedder(image.reshape(-1, 257, image.shape[2]))
    torch.testing.assert_close(model.img_emb(image), theirs, rtol=1e-5, atol=1e-5)


# ---- prepare and step ----


@torch.no_grad()
@pytest.mark.parametrize("kind", ["t2v", "flf2v"])
def test_preparing_all_steps_at_once_equals_one_forward_per_step(kind: Kind) -> None:
    model = build_transformer(kind)
    given = conditioning(model.config)
    prepared = model.prepare(given, TIMESTEPS)
    for index, timestep in enumerate(TIMESTEPS):
        latents = noisy(seed=30 + index)
        assert_equal(model.step(latents, prepared, index), model(latents, timestep, given))


def calls_of(model: WanTransformer, names: list[str], run: Callable[[], object]) -> dict[str, int]:
    calls: Counter[str] = Counter()
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name])) for name in names
    ]
    run()
    for hook in hooks:
        hook.remove()
    return dict(calls)


@torch.no_grad()
def test_what_the_latents_do_not_change_is_computed_once_for_all_steps() -> None:
    model = build_transformer("i2v")
    once = ["time_embedding.0", "time_projection.1", "text_embedding.2", "img_emb"]
    once += [f"blocks.1.cross_attn.{name}" for name in ("k", "v", "norm_k", "k_img", "v_img", "norm_k_img")]
    each = ["patch_embedding", "blocks.1.self_attn.k", "blocks.2.cross_attn.q", "blocks.0.ffn.0", "head.head"]

    def run() -> None:
        prepared = model.prepare(conditioning(model.config), TIMESTEPS)
        for index in range(3):
            model.step(noisy(), prepared, index)

    assert calls_of(model, once + each, run) == dict.fromkeys(once, 1) | dict.fromkeys(each, 3)


def test_in_training_blocks_make_their_own_keys_and_values() -> None:
    """Made beforehand, those of all blocks would be kept for the backward pass, whatever is checkpointed."""
    model = build_transformer("i2v")
    prepared = model.prepare(conditioning(model.config), TIMESTEPS)
    assert prepared.known == (None,) * model.num_blocks


@torch.no_grad()
def test_skipped_blocks_are_left_out_whole() -> None:
    model, shorter = build_transformer("t2v"), build_transformer("t2v")
    del shorter.blocks[1]
    given = conditioning(model.config)
    prepared = model.prepare(given, TIMESTEPS[1:2])
    skipped = model.step(noisy(), prepared, 0, skip_blocks=frozenset({1}))
    assert torch.equal(skipped, shorter(noisy(), TIMESTEPS[1], given))
    assert not torch.equal(skipped, model.step(noisy(), prepared, 0))


@torch.no_grad()
@pytest.mark.parametrize(("kind", "image", "got"), [("i2v", False, "no features"), ("t2v", True, "unwanted")])
def test_features_and_model_must_go_together(kind: Kind, image: bool, got: str) -> None:
    model = build_transformer(kind)
    given = replace(conditioning(model.config), image=torch.zeros(1, 257, 40) if image else None)
    with pytest.raises(ValueError, match=got):
        model(noisy(), TIMESTEPS[0], given)


# ---- number types ----


@torch.no_grad()
def test_what_timesteps_tell_is_float32_in_a_bfloat16_model() -> None:
    """As if weights were in float32, rounded to bfloat16 before."""
    exact, model = build_transformer("t2v"), build_transformer("t2v").bfloat16()
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    prepared, wanted = (m.prepare(conditioning(m.config), TIMESTEPS) for m in (model, exact))
    assert torch.equal(prepared.modulations, wanted.modulations) and torch.equal(prepared.time, wanted.time)
    assert prepared.context.text.dtype == torch.bfloat16
    velocity = model.step(noisy(), prepared, 0)
    assert velocity.dtype == torch.float32
    assert float((velocity - exact.step(noisy(), wanted, 0)).norm() / velocity.norm()) < 0.03


@torch.no_grad()
def test_a_large_layer_is_never_whole_in_float32(monkeypatch) -> None:
    model = build_transformer("t2v").bfloat16()
    wanted = model.prepare(conditioning(model.config), TIMESTEPS)
    monkeypatch.setattr("modules.layers.MAX_ROWS", 100)
    assert torch.equal(model.prepare(conditioning(model.config), TIMESTEPS).modulations, wanted.modulations)


# ---- training ----


def trained(model: WanTransformer, *, seed: int = 4) -> dict[str, Tensor]:
    """Gradients of a LoRA on all blocks; it has an effect already."""
    network = create_network(model, dim=4, args={}, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "lora_up" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    network.apply_to(model)
    given = conditioning(model.config, lengths=(5, 2))
    model(noisy(2), torch.tensor([800.0, 300.0]), given).square().mean().backward()
    network.remove()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_gradients_reach_the_layers_of_the_context_too() -> None:
    gradients = trained(build_transformer("i2v"))
    for layer in ("cross_attn_k", "cross_attn_v", "cross_attn_k_img", "cross_attn_v_img", "self_attn_q", "ffn_2"):
        for block in range(NUM_BLOCKS):
            assert gradients[f"lora_unet_blocks_{block}_{layer}.lora_down.weight"].abs().max() > 0


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("num_blocks", [1, NUM_BLOCKS])
def test_checkpointed_blocks_give_the_same_gradients(num_blocks: int, offload: bool) -> None:
    model = build_transformer("i2v")
    wanted = trained(model)
    in_ram = ActivationOffload(PlainPorter(), min_bytes=1) if offload else None
    model.checkpointing = Checkpointing(num_blocks=num_blocks, offload=in_ram)
    assert_same_gradients(trained(model), wanted)


# ---- compiled ----


def test_compiled_blocks_share_one_graph_for_all_steps_and_a_second_for_all_sizes() -> None:
    torch._dynamo.reset()
    counters.clear()
    plain, model = build_transformer("i2v"), build_transformer("i2v")
    Execution(compiling=CompileChoice(flag="--compile", backend="eager", fullgraph=True)).apply_to(model)
    for num_frames, num_graphs in ((2, 1), (3, 2), (5, 2)):
        latents, given = noisy(frames=num_frames), conditioning(plain.config, indices=torch.arange(num_frames)[None])
        with torch.no_grad():
            prepared, wanted = model.prepare(given, TIMESTEPS), plain.prepare(given, TIMESTEPS)
            for index in range(len(TIMESTEPS)):
                assert_equal(model.step(latents, prepared, index), plain.step(latents, wanted, index))
        assert counters["stats"]["unique_graphs"] == num_graphs
    model.checkpointing = Checkpointing(num_blocks=1)
    found, right = trained(model), trained(plain)
    assert all(torch.allclose(found[name], right[name], rtol=1e-4, atol=1e-8) for name in right)
    assert not counters["graph_break"]


# ---- weights in RAM ----

IN_TRAINING = SwapOptions(counts=(2,), invariant="with their blocks")
CHOICES = [SwapOptions(counts=(2,)), SwapOptions(counts=(1,), invariant="all", ring_size=1), IN_TRAINING]
CHOICES += [SwapOptions(counts=(0,), invariant="all"), SwapOptions(counts=(3,), invariant="of swapped blocks")]


def swapped(options: SwapOptions) -> WanTransformer:
    """Slots are filled as late and spoilt as early as the rules allow."""
    model = build_transformer("i2v")
    attach(model, options, CPU, copies=LateCopies())
    return model


@torch.no_grad()
@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_swapped_blocks_give_the_same_bits_in_sampling(options: SwapOptions) -> None:
    plain, model = build_transformer("i2v"), swapped(options)
    given = conditioning(plain.config)
    wanted, prepared = plain.prepare(given, TIMESTEPS), model.prepare(given, TIMESTEPS)
    for index in range(len(TIMESTEPS)):
        assert torch.equal(model.step(noisy(), prepared, index), plain.step(noisy(), wanted, index))


def test_swapped_blocks_give_the_same_bits_in_training_and_in_samples_between() -> None:
    plain, model = build_transformer("i2v"), swapped(IN_TRAINING)
    wanted, given = trained(plain), conditioning(plain.config)
    for _ in range(2):
        assert_same_gradients(trained(model), wanted)
        with torch.no_grad():
            assert torch.equal(model(noisy(), TIMESTEPS[0], given), plain(noisy(), TIMESTEPS[0], given))


def test_what_a_step_does_not_need_is_not_copied_in_every_step() -> None:
    """Keys and values of the context stay, or wait in RAM; in training they go with their block."""
    model = build_transformer("i2v")
    of_context = {f"blocks.{i}.cross_attn.{x}.weight" for i in range(NUM_BLOCKS) for x in ("k", "v", "k_img", "v_img")}
    once = {"time_embedding.0", "time_embedding.2", "time_projection.1", "text_embedding.0", "text_embedding.2"}
    once = {f"{name}.weight" for name in (*once, "img_emb.proj.1", "img_emb.proj.3")} | of_context

    def in_ram(**options) -> frozenset[str]:
        return swapped_names(model, SwapOptions(**options))

    assert in_ram(counts=(0,), invariant="all") == once
    assert in_ram(counts=(3,)).isdisjoint(of_context)
    assert in_ram(counts=(3,), invariant="with their blocks") == in_ram(counts=(3,)) | of_context
    assert in_ram(counts=(1,), invariant="with their blocks") == {
        f"blocks.1.{name}.weight"
        for name in (
            *(f"{attn}.{x}" for attn in ("self_attn", "cross_attn") for x in "qkvo"),
            *("cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"),
        )
    }


@torch.no_grad()
def test_blocks_whose_weights_come_with_them_make_keys_and_values_themselves() -> None:
    """In samples between training steps: when a prompt is prepared, these weights are not on the device."""
    for options, at_once in ((SwapOptions(counts=(2,)), [True] * 3), (IN_TRAINING, [False, True, False])):
        model = swapped(options)
        prepared = model.prepare(conditioning(model.config), TIMESTEPS)
        assert [known is not None for known in prepared.known] == at_once


def test_swapped_weights_stay_in_ram_wherever_the_model_goes() -> None:
    options, sizes = SwapOptions(counts=(2,), invariant="all"), []
    model = swapped(options)
    model._apply(lambda tensor: sizes.append(tensor.numel()) or tensor)  # what `to` and `cuda` come down to
    assert sizes.count(0) == len(swapped_names(model, options)) > 20
    with torch.no_grad():
        found, wanted = (m(noisy(), TIMESTEPS[0], conditioning(m.config)) for m in (model, build_transformer("i2v")))
    assert torch.equal(found, wanted)


# ---- full size ----

PUBLISHED = {
    "t2v_1.3B": (825, "t2v", 30, 1536, 8960),
    "t2v_14B": (1095, "t2v", 40, 5120, 13824),
    "i2v_14B": (1303, "i2v", 40, 5120, 13824),
    "flf2v_14B": (1304, "flf2v", 40, 5120, 13824),
    "fun_control_1.3B": (983, "fun_control", 30, 1536, 8960),
    "fun_control_14B": (1303, "fun_control", 40, 5120, 13824),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_full_size_models_are_the_published_ones(name: str) -> None:
    num_tensors, kind, num_blocks, width, mlp_width = PUBLISHED[name]
    shapes = published_wan(name)
    config = WanConfig.from_checkpoint(described("--dit", shapes, "BF16"))
    assert (config.kind, config.num_blocks, config.width, config.mlp_width) == (kind, num_blocks, width, mlp_width)
    assert (config.head_dim, config.num_heads, config.rope_axes) == (128, width // 128, (44, 42, 42))
    assert (config.text_width, config.text_length, config.time_width, config.latent_channels) == (4096, 512, 256, 16)
    assert config.image_width == (None if kind == "t2v" else 1280)
    with torch.device("meta"):
        model = WanTransformer(config)
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    assert len(shapes) == num_tensors


def test_heads_that_do_not_divide_the_width_are_an_error() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in build_transformer("t2v").state_dict().items()}
    checkpoint = described("--dit", shapes, "F32")
    others = {"_class_name": "LlamaModel", "attention_head_dim": 96}
    assert WanConfig.from_checkpoint(replace(checkpoint, config=others)).head_dim == 128
    for own, head_dim in (({"attention_head_dim": 64}, 64), ({"num_heads": 8}, 32), ({"num_heads": 0}, 128), ({}, 128)):
        config = {"_class_name": "WanModel", **own}
        assert WanConfig.from_checkpoint(replace(checkpoint, config=config)).head_dim == head_dim
    with pytest.raises(UserError, match="width 256 with heads of 96 channels; expected a width that heads divide"):
        WanConfig.from_checkpoint(replace(checkpoint, config={**others, "_class_name": "WanTransformer3DModel"}))
    assert CONFIGS["t2v"].head_dim == 128 and NUM_FRAMES == 3
