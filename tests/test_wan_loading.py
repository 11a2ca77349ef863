"""Wan's transformer from files in every layout, in 16 bits and in 8, with LoRAs and with weights in RAM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.weights import Checkpoint
from frame_pack.loading import open_transformer as open_framepack
from modules.block_swap import SwapOptions
from modules.fp8 import Fp8Linear
from networks.lora_merge import plan_merge
from options.errors import UserError
from options.lora import LoraChoice
from tests.training_builders import build_transformer as build_framepack
from tests.wan_transformers import (
    CONFIGS,
    build_oracle,
    build_transformer,
    conditioning,
    diffusers_forward,
    diffusers_names,
    noisy,
)
from wan.config import Kind, WanConfig
from wan.loading import build_transformer as build_empty
from wan.loading import load_transformer, open_transformer, save_fp8_transformer
from wan.model import WanTransformer

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn
TIMESTEPS = torch.tensor([640.0])
PRECISE = ("modulation", "norm3.weight", "norm3.bias")
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "模型 [1]").mkdir()
    return tmp_path / "模型 [1]"


def saved(folder: Path, tensors: Mapping[str, Tensor], name: str = "変換器") -> Checkpoint:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    return open_transformer(str(folder / f"{name}.safetensors"))


def load(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, **options) -> WanTransformer:
    return load_transformer(checkpoint, dtype=dtype, device=CPU, **options)


@torch.no_grad()
def velocity(model: WanTransformer) -> Tensor:
    return model(noisy(), TIMESTEPS, conditioning(model.config))


def plain_model(tensors: Mapping[str, Tensor], kind: Kind = "i2v") -> WanTransformer:
    model = build_transformer(kind)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def prefixed(tensors: Tensors) -> Tensors:
    return {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}


def with_unused_norms(tensors: Tensors) -> Tensors:
    """As the published snapshots for pictures have them."""
    norms = {f"blocks.{i}.attn2.norm_added_q.weight": torch.ones(256) for i in range(3)}
    return diffusers_names(tensors) | norms


LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "official": dict,
    "ComfyUI's": prefixed,
    "diffusers'": with_unused_norms,
}


# ---- layouts ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_layout_gives_the_same_model(kind: Kind, layout: str, folder: Path) -> None:
    wanted = build_transformer(kind).state_dict()
    checkpoint = saved(folder, LAYOUTS[layout](wanted))
    found = load(checkpoint).state_dict()
    assert WanConfig.from_checkpoint(checkpoint) == CONFIGS[kind]
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("subfolder", ["", "transformer"])
@pytest.mark.parametrize("kind", ["t2v", "flf2v"])
def test_shards_that_diffusers_has_written_load_from_a_snapshots_folder(kind: Kind, subfolder: str, folder) -> None:
    model = build_transformer(kind)
    oracle = build_oracle(model)
    oracle.save_pretrained(folder / subfolder, max_shard_size="500KB")
    shards = sorted((folder / subfolder).glob("*.safetensors"))
    assert len(shards) > 2
    for path in (folder, shards[1]):
        found = load(open_transformer(str(path)))
        assert torch.equal(velocity(found), velocity(model))


def test_the_size_of_heads_comes_from_diffusers_configuration(folder: Path) -> None:
    """Shapes do not tell it."""
    oracle = build_oracle(build_transformer("t2v", head_dim=64))
    oracle.save_pretrained(folder / "transformer")
    found = load(open_transformer(str(folder)))
    assert found.config.head_dim == 64
    wanted = diffusers_forward(oracle, noisy(), TIMESTEPS, conditioning(found.config))
    assert float((velocity(found) - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_a_torch_file_loads(folder: Path) -> None:
    model = build_transformer("t2v")
    torch.save(model.state_dict(), folder / "学.pth")
    assert torch.equal(velocity(load(open_transformer(str(folder / "学.pth")))), velocity(model))


# ---- number types ----


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_what_reaches_every_token_stays_as_precise_as_the_file_has_it(stored: torch.dtype, folder: Path) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in build_transformer("i2v").state_dict().items()}
    model = load(saved(folder, tensors), torch.bfloat16)
    found = model.state_dict()
    for name, tensor in tensors.items():
        wanted = tensor.float() if name.endswith(PRECISE) else tensor.bfloat16()
        assert found[name].dtype == wanted.dtype and torch.equal(found[name], wanted), name
    assert model.dtype == torch.bfloat16
    assert error(velocity(model), velocity(plain_model(tensors))) < 0.02


# ---- 8 bits ----


def is_target(name: str) -> bool:
    """As the facts have it: substrings of the key."""
    excluded = ("norm", "patch_embedding", "text_embedding", "time_embedding", "time_projection", "head", "modulation")
    return name.endswith(".weight") and "blocks" in name and not any(word in name for word in (*excluded, "img_emb"))


def whole_weights(model: WanTransformer) -> Tensors:
    """What the tensors of a model stand for, without scales, in whose type they are multiplied."""
    found = model.state_dict()
    for name in [name for name in found if name.endswith(".scale_weight")]:
        weight, scale = name.removesuffix(".scale_weight") + ".weight", found.pop(name)
        codes = found[weight].to(scale.dtype)
        groups = codes.unflatten(1, (scale.shape[1], -1)) if scale.ndim == 3 else codes
        found[weight] = (groups * scale).reshape(codes.shape)
    return {name: tensor.float() for name, tensor in found.items()}


@pytest.mark.parametrize("mode", ["plain", "scaled"])
def test_fp8_is_for_the_blocks_layers_and_computes_what_its_codes_stand_for(mode, folder: Path) -> None:
    stored = {name: tensor.bfloat16() for name, tensor in build_transformer("i2v").state_dict().items()}
    checkpoint = saved(folder, stored)
    model = load(checkpoint, fp8=mode)
    targets = {name for name in stored if is_target(name)}
    assert len(targets) == 3 * 12
    assert {f"{path}.weight" for path, layer in model.named_modules() if isinstance(layer, Fp8Linear)} == targets
    assert error(velocity(model), velocity(plain_model(whole_weights(model)))) < 1e-5
    assert 1e-4 < error(velocity(model), velocity(plain_model(stored))) < {"plain": 0.2, "scaled": 0.1}[mode]
    empty = build_empty(checkpoint, fp8=mode)
    assert [type(layer) for layer in empty.modules()] == [type(layer) for layer in model.modules()]


def quantised_by_comfyui(tensors: Tensors, layers: list[str]) -> Tensors:
    """One scale for each weight; a mark, and scales for activations."""
    made: Tensors = {"scaled_fp8": torch.empty(0, dtype=E4M3)}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if layer in layers:
            scale = tensor.abs().max() / 448
            made[name] = (tensor / scale).clamp(-448, 448).to(E4M3)
            made |= {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.tensor(1.0)}
        else:
            made[name] = tensor.half()
    return prefixed(made)


def test_comfyuis_files_in_8_bits_load_with_codes_in_any_layer(folder: Path) -> None:
    """Also in those that compute in float32, where codes are opened."""
    tensors = build_transformer("i2v").state_dict()
    layers = ["blocks.1.self_attn.q", "blocks.2.cross_attn.k_img", "text_embedding.0", "time_projection.1", "head.head"]
    layers += ["img_emb.proj.3", "time_embedding.2"]
    files = quantised_by_comfyui(tensors, layers)
    model = load(saved(folder, files))
    wanted = {name: tensor.half().float() for name, tensor in tensors.items()}
    for layer in layers:
        key = f"model.diffusion_model.{layer}"
        wanted[f"{layer}.weight"] = files[f"{key}.weight"].float() * files[f"{key}.scale_weight"]
    assert isinstance(model.get_submodule("blocks.1.self_attn.q"), Fp8Linear)
    assert not isinstance(model.get_submodule("time_projection.1"), Fp8Linear)
    assert error(velocity(model), velocity(plain_model(wanted))) < 1e-5


# ---- LoRAs, and a file for the next time ----


def write_lora(path: Path, tensors: Mapping[str, Tensor], modules: tuple[str, ...]) -> tuple[str, Tensors]:
    """A LoRA file, and the model's tensors with it."""
    changed, factors = dict(tensors), {}
    for seed, module in enumerate(modules):
        rows, columns = tensors[f"{module}.weight"].shape
        generator = torch.Generator().manual_seed(seed)
        up, down = (0.3 * torch.randn(*shape, generator=generator) for shape in ((rows, 2), (2, columns)))
        name = f"lora_unet_{module.replace('.', '_')}"
        factors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(1.0)}
        changed[f"{module}.weight"] = tensors[f"{module}.weight"] + up @ down / 2
    save_file(factors, path)
    return str(path), changed


MERGED = ("blocks.0.self_attn.q", "blocks.2.cross_attn.v_img", "blocks.1.ffn.2", "time_projection.1")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loras_are_merged_into_every_layout(layout: str, folder: Path) -> None:
    tensors = build_transformer("i2v").state_dict()
    lora, changed = write_lora(folder / "絵.safetensors", tensors, MERGED)
    checkpoint = saved(folder, LAYOUTS[layout](tensors))
    merge = plan_merge([LoraChoice(path=lora, multiplier=1.0)], checkpoint)
    found = load(checkpoint, merge=merge).state_dict()
    for name, tensor in changed.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["plain", "scaled"])
def test_a_saved_model_in_8_bits_is_the_one_that_was_quantised_while_loading(mode, folder: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in build_transformer("i2v").state_dict().items()}
    lora, _ = write_lora(folder / "絵.safetensors", tensors, MERGED)
    checkpoint, choices = saved(folder, diffusers_names(tensors)), [LoraChoice(path=lora, multiplier=1.0)]
    output = folder / "八.safetensors"
    save_fp8_transformer(checkpoint, choices, output, mode=mode, device=CPU, flag="--save_fp8_model")
    wanted = load(checkpoint, torch.bfloat16, fp8=mode, merge=plan_merge(choices, checkpoint)).state_dict()
    found = load(open_transformer(str(output)), torch.bfloat16, fp8=mode).state_dict()
    assert found.keys() == wanted.keys() == load_file(output).keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float()), name


# ---- weights in RAM ----


@pytest.mark.parametrize(
    "swap",
    [
        SwapOptions(counts=(2,), invariant="all"),
        SwapOptions(counts=(1,)),
        SwapOptions(counts=(2,), invariant="with their blocks"),
    ],
    ids=str,
)
def test_a_model_loaded_with_blocks_in_ram_computes_the_same(swap: SwapOptions, folder: Path) -> None:
    checkpoint = saved(folder, build_transformer("i2v").state_dict())
    model, plain = load(checkpoint, fp8="scaled", swap=swap), load(checkpoint, fp8="scaled")
    assert model.swapping.num_blocks == swap.num_blocks
    assert torch.equal(velocity(model), velocity(plain))


# ---- what is refused ----


def wan22_for_pictures() -> Tensors:
    """I2V-A14B: the picture's channels, but nothing for CLIP features."""
    return build_transformer("t2v").state_dict() | {"patch_embedding.weight": torch.zeros(256, 36, 1, 2, 2)}


def wan22_5b() -> Tensors:
    tensors = build_transformer("t2v").state_dict()
    tensors |= {"patch_embedding.weight": torch.zeros(256, 48, 1, 2, 2), "head.head.weight": torch.zeros(192, 256)}
    return tensors | {"head.head.bias": torch.zeros(192)}


def without(name: str) -> Tensors:
    return {key: tensor for key, tensor in build_transformer("i2v").state_dict().items() if key != name}


REFUSED = {
    "FramePack": (lambda: build_framepack().state_dict(), "a FramePack transformer; expected a Wan transformer; check"),
    "Wan2.2 for pictures": (wan22_for_pictures, "of Wan2.2 .36 channels.*; not supported: Wan2.1 only"),
    "Wan2.2 for pictures in diffusers' layout": (lambda: diffusers_names(wan22_for_pictures()), "of Wan2.2 .36"),
    "Wan2.2 5B": (wan22_5b, "of Wan2.2 .48 channels.*; not supported: Wan2.1 only"),
    "incomplete": (lambda: without("blocks.1.ffn.2.bias"), r"no blocks\.1\.ffn\.2\.bias \(1 missing"),
    "VACE": (
        lambda: build_transformer("t2v").state_dict() | {"vace_blocks.0.before_proj.weight": torch.zeros(4, 4)},
        r"1 unexpected tensors, vace_blocks\.0\.before_proj\.weight first",
    ),
    "another width": (
        lambda: build_transformer("t2v").state_dict() | {"patch_embedding.weight": torch.zeros(250, 16, 1, 2, 2)},
        "width 250 with heads of 128",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_in_one_line(name: str, folder: Path) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(UserError, match=reason) as caught:
        build_empty(saved(folder, make()))
    assert str(caught.value).startswith("--dit") and "\n" not in str(caught.value)


def test_framepack_refuses_wan(folder: Path) -> None:
    saved(folder, build_transformer("t2v").state_dict())
    with pytest.raises(UserError, match="a Wan transformer; expected a FramePack transformer"):
        open_framepack(str(folder / "変換器.safetensors"))
