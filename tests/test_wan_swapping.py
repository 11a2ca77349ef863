"""`--blocks_to_swap` of Wan: how many blocks there may be, and that results are the same to the last bit."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import wan_generate_video
from demo.wan_models import WanModelPaths, build_wan_models
from modules.block_swap import SwapOptions, attach, device_bytes
from modules.checkpointing import Checkpointing
from modules.swapping import RESERVE, SHARE, SwapWish, check_swap, choose_swap
from networks import transformer_stage
from networks.lora_wan import create_network
from options.errors import UserError
from options.fp8 import Fp8Mode
from options.swap_count import SwapCount
from tests.published import described, published_wan
from tests.test_weight_ring import LateCopies
from tests.training_driver import repeatable
from tests.wan_training_builders import WanShop, one_frame_item, train, trained, write_data, write_dit
from tests.wan_transformers import build_transformer, conditioning, noisy
from wan import loading, pipeline
from wan.config import WanConfig
from wan.model import WanTransformer
from wan.swapping import swap_limits

NUM_BLOCKS = 5
LIMITS = swap_limits(WanConfig(num_blocks=NUM_BLOCKS, width=256, mlp_width=320))
TIMESTEPS = torch.tensor([[1000.0], [620.5], [341.0]])
CPU = torch.device("cpu")


# ---- how many ----


@pytest.mark.parametrize("for_training", [False, True])
@pytest.mark.parametrize(("name", "most"), [("t2v_1.3B", 29), ("t2v_14B", 39), ("i2v_14B", 39), ("flf2v_14B", 39)])
def test_all_blocks_but_one_may_be_swapped(name: str, most: int, for_training: bool) -> None:
    limits = swap_limits(WanConfig.from_checkpoint(described("--dit", published_wan(name), "BF16")))

    def wish(number: int) -> SwapWish:
        return SwapWish(blocks=SwapCount(value=number), for_training=for_training)

    check_swap(wish(most), limits)
    with pytest.raises(UserError, match=rf"^--blocks_to_swap: got {most + 1}; expected at most {most} in "):
        check_swap(wish(most + 1), limits)
    assert [len(limits.numbers(number)) for number in (0, 1, most)] == [0, 1, most]
    assert limits.numbers(most)[-1] == most and limits.described(7) == "7"


# ---- the same bits ----


def swapped(number: int, *, for_training: bool = False, offload: bool = False, ring_size: int = 2) -> WanTransformer:
    """With so many blocks in RAM, as flags ask for it; slots are filled as late and spoilt as early as may be."""
    model = build_transformer("i2v", num_blocks=NUM_BLOCKS)
    wish = SwapWish(for_training=for_training, ring_size=ring_size)
    attach(model, wish.options(LIMITS, number, offload=offload), CPU, copies=LateCopies())
    assert model.swapping.num_blocks == number
    return model


@torch.no_grad()
def velocities(model: WanTransformer) -> list[Tensor]:
    prepared = model.prepare(conditioning(model.config), TIMESTEPS)
    return [model.step(noisy(), prepared, index) for index in range(len(TIMESTEPS))]


@pytest.mark.parametrize("offload", [False, True])
def test_every_number_of_swapped_blocks_samples_the_same(offload: bool) -> None:
    wanted = velocities(build_transformer("i2v", num_blocks=NUM_BLOCKS))
    for number in range(LIMITS.most_in_generation + 1):
        found = velocities(swapped(number, offload=offload, ring_size=1 + number % 3))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), number


def gradients(model: WanTransformer) -> dict[str, Tensor]:
    """Of a LoRA that has an effect, over two batches."""
    network = create_network(model, dim=4, args={}, seed=4)
    generator = torch.Generator().manual_seed(4)
    for parameter in network.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    network.apply_to(model)
    for seed in (1, 2):
        given = conditioning(model.config, lengths=(5, 2), seed=seed)
        model(noisy(2, seed=seed), torch.tensor([800.0, 300.0]), given).square().mean().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("num_checkpointed", [0, 3])
def test_every_number_of_swapped_blocks_has_the_same_gradients(num_checkpointed: int) -> None:
    wanted = gradients(build_transformer("i2v", num_blocks=NUM_BLOCKS))
    assert any("cross_attn_v_img" in name for name in wanted) and all(g.any() for g in wanted.values())
    for number in range(1, LIMITS.most_in_training + 1):
        model = swapped(number, for_training=True, ring_size=1 + number % 3)
        model.checkpointing = Checkpointing(num_blocks=num_checkpointed)
        found = gradients(model)
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == [], number


# ---- where weights are ----


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> WanModelPaths:
    return build_wan_models(tmp_path_factory.mktemp("模型"))


@pytest.mark.parametrize("fp8", ["off", "scaled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_are_counted_in_the_types_that_they_are_loaded_in(models, dtype: torch.dtype, fp8: Fp8Mode) -> None:
    """Modulations and the norms before cross-attention stay in float32."""
    checkpoint = loading.open_transformer(str(models.dit))
    model = loading.load_transformer(checkpoint, dtype=dtype, device=CPU, fp8=fp8)
    empty = loading.build_transformer(checkpoint, fp8=fp8)
    none, sizes = SwapOptions(counts=(0,)), [tensor.nbytes for tensor in model.state_dict().values()]
    assert device_bytes(empty, none, dtype, loading.FLOAT32) == sum(sizes)
    if dtype == torch.bfloat16:
        assert device_bytes(empty, none, dtype) < sum(sizes)


# ---- generation ----


@pytest.fixture
def swaps(monkeypatch: pytest.MonkeyPatch) -> list[SwapOptions]:
    """How transformers are loaded from now on."""
    seen: list[SwapOptions] = []

    def spy(*arguments, swap, **rest):
        seen.append(swap)
        return loading.load_transformer(*arguments, swap=swap, **rest)

    monkeypatch.setattr(pipeline, "load_transformer", spy)
    return seen


def latents(models: WanModelPaths, material, folder: Path, *more: str) -> Tensor:
    """One frame, with guidance, so that there are two prompts to prepare."""
    argv = [part for name, path in vars(models).items() for part in (f"--{name}", path)]
    argv += ["--task", "i2v-14B", "--prompt", "窓辺の猫", "--seed", 1, "--infer_steps", 2, "--video_size", 64, 64]
    argv += ["--control_image_path", material.chelsea, "--one_frame_inference", "target_index=1,control_index=0"]
    argv += ["--guidance_scale", 2.0, "--output_type", "latent", "--save_path", folder, "--device", "cpu", *more]
    assert wan_generate_video.main([str(part) for part in argv]) == 0
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("latent")


def test_generated_latents_are_the_same_to_the_last_bit(models, material, tmp_path, swaps) -> None:
    expected = latents(models, material, tmp_path / "a")
    assert not swaps.pop()
    for number, more in enumerate((["--blocks_to_swap", "2"], ["--offload_invariant", "always"])):
        assert torch.equal(latents(models, material, tmp_path / str(number), *more), expected)
    assert [(options.counts, options.invariant) for options in swaps] == [((2,), "all"), ((0,), "all")]


def test_auto_counts_what_the_request_takes(models, material, tmp_path, swaps, monkeypatch) -> None:
    """A device that is short of memory by a little, then by a lot."""
    expected = latents(models, material, tmp_path / "a")
    sizes: list[int] = []
    choose = transformer_stage.choose_swap

    def spy(*arguments, needed, **rest):
        sizes.append(needed(0, False))
        return choose(*arguments, needed=needed, **rest)

    monkeypatch.setattr(transformer_stage, "choose_swap", spy)
    monkeypatch.setattr("modules.swapping.RESERVE", 0)
    for number, share in enumerate((1.2, 0.95, 0.3)):
        monkeypatch.setattr(transformer_stage, "free_memory", lambda device, share=share: share * (sizes or [10**6])[0])
        found = latents(models, material, tmp_path / str(number), "--blocks_to_swap", "auto")
        assert torch.equal(found, expected)
    assert sizes[0] == sizes[1] > 10**6
    assert (swaps[-2].counts, swaps[-2].invariant) == ((0,), "all") and swaps[-1].counts == (2,)


@pytest.mark.parametrize("script", ["generate", "train"])
def test_too_many_blocks_are_refused_before_anything_is_loaded(script, models, shop, tmp_path, capsys) -> None:
    out, files = tmp_path / "出力", [part for n, path in vars(models).items() for part in (f"--{n}", str(path))]
    prompt = ["--task", "t2v-14B", "--prompt", "猫", "--blocks_to_swap", "3", "--save_path", str(out)]
    if script == "generate":
        assert wan_generate_video.main([*files, *prompt, "--dit", str(models.for_kind("t2v").dit)]) == 2
    else:
        assert train(shop.command(out, blocks_to_swap=3)) == 2
    word = "generation" if script == "generate" else "training"
    assert f"--blocks_to_swap: got 3; expected at most 2 in {word}" in capsys.readouterr().err
    assert not out.exists()


# ---- training ----


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> WanShop:
    folder = tmp_path_factory.mktemp("学習")
    data = write_data(folder / "データ", {name: one_frame_item(number) for number, name in enumerate(("a", "猫"))})
    return WanShop(folder=folder, dit=write_dit(folder, "i2v"), data=data, task="i2v-14B")


def test_training_ends_with_the_same_network(shop, tmp_path) -> None:
    """With everything at once."""
    options = {"blocks_to_swap": 2, "use_pinned_memory_for_block_swap": True, "block_swap_ring_size": 1}
    options |= {"gradient_checkpointing": True, "gradient_checkpointing_cpu_offload": True}
    with repeatable():
        expected = trained(shop.command(tmp_path / "plain", max_train_steps=3))
        with patch("modules.activation_offload.MIN_BYTES", 1):
            found = trained(shop.command(tmp_path / "出力", max_train_steps=3, **options))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(tensor.any() for name, tensor in found.items() if "lora_up" in name)


def test_auto_in_training_looks_at_what_is_free(shop, tmp_path, monkeypatch) -> None:
    seen: list[SwapOptions] = []
    sizes: list[int] = []

    def spy(wish, limits, *, free, needed):
        sizes.extend(needed(number, False) for number in range(3))
        seen.append(choose_swap(wish, limits, free=(sizes[1] + RESERVE) / SHARE, needed=needed))
        return seen[-1]

    monkeypatch.setattr("training.plan.choose_swap", spy)
    assert train(shop.command(tmp_path / "出力", blocks_to_swap="auto", max_train_steps=1)) == 0
    assert [(options.num_blocks, options.invariant) for options in seen] == [(1, "with their blocks")]
    assert sizes == sorted(sizes, reverse=True) and sizes[1] < sizes[0]
