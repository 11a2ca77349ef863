"""FramePack's transformer and LLaMA in 8 bits: quantised on loading, saved, from others' files, with LoRAs, trained."""

import json
import logging
import re
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fpack_generate_video
from common.weights import Checkpoint, open_checkpoint
from demo.models import ModelPaths
from frame_pack.architecture import FramePackArchitecture
from frame_pack.loading import build_transformer, load_transformer, open_transformer, save_fp8_transformer
from frame_pack.model import FramePackTransformer
from hunyuan_model.text_encoders import load_llama, open_llama
from modules.fp8 import Fp8Linear
from networks.lora_merge import plan_merge
from networks.prompt_loras import PromptLoras
from options.errors import UserError
from options.fp8 import Fp8Mode, fp8_mode
from options.lora import LoraChoice, PromptLora
from tests.training_builders import (
    batch_of,
    build_network,
    build_objective,
    difference,
    loss_and_gradients,
    one_frame_item,
)
from tests.training_builders import build_transformer as random_transformer

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn
MERGED = ("transformer_blocks.0.ff.net.2", "single_transformer_blocks.1.proj_out")
ELSEWHERE = ("proj_out", "x_embedder.proj", "norm_out.linear", "transformer_blocks.0.norm1.linear")
"""Layers that are not for fp8; the first two are of a kind that cannot compute with codes."""


# ---- the facts, written down once more ----


def is_target(name: str) -> bool:
    """As the facts have it: substrings of the key."""
    return name.endswith(".weight") and "transformer_blocks" in name and "norm" not in name


def block_scaled(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales as the incumbent stores them."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // 64, 64)
    scale = (groups.abs().max(dim=2, keepdim=True).values / 448).clamp(min=1e-8)
    codes = (groups / scale).clamp(-448, 448).to(E4M3).view(rows, columns)
    return codes, scale.to(torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32)


def opened(codes: Tensor, scale: Tensor) -> Tensor:
    """What they stand for, in the type of the scales."""
    if scale.ndim == 3:
        return (codes.to(scale.dtype).unflatten(1, (scale.shape[1], -1)) * scale).flatten(1)
    return codes.to(scale.dtype) * scale.view(-1, *[1] * (codes.ndim - 1))


# ---- what is loaded ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("八 [1]")


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[str, Tensor]:
    """A small transformer in bfloat16."""
    return {name: tensor.bfloat16() for name, tensor in random_transformer().state_dict().items()}


def saved(folder: Path, tensors: Mapping[str, Tensor], name: str) -> Checkpoint:
    save_file(dict(tensors), folder / f"{name}.safetensors")
    return open_transformer(str(folder / f"{name}.safetensors"))


@pytest.fixture(scope="module")
def checkpoint(folder: Path, stored: Mapping[str, Tensor]) -> Checkpoint:
    return saved(folder, stored, "変換器")


def load(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, **options) -> FramePackTransformer:
    return load_transformer(checkpoint, dtype=dtype, device=CPU, **options)


def plain_model(tensors: Mapping[str, Tensor]) -> FramePackTransformer:
    """A model with these weights in float32, as torch loads it."""
    model = random_transformer()
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """What the tensors of a model stand for, without scales."""
    found = model.state_dict()
    scales = {name for name in found if name.endswith(".scale_weight")}
    for name in scales:
        weight = name.removesuffix(".scale_weight") + ".weight"
        found[weight] = opened(found[weight], found[name])
    return {name: tensor.float() for name, tensor in found.items() if name not in scales}


def velocity(model: FramePackTransformer) -> Tensor:
    batch = batch_of({"猫": one_frame_item(1)})
    architecture = FramePackArchitecture(checkpoint=None, distilled_guidance=10.0, flags=None)
    with torch.no_grad():
        return architecture.predict_velocity(model, batch.contents["latents"].float(), torch.tensor([0.6]), batch)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def assert_computes_alike(model: FramePackTransformer, weights: Mapping[str, Tensor]) -> None:
    """As a model with these weights."""
    assert error(velocity(model), velocity(plain_model(weights))) < 1e-5


# ---- while loading ----


def test_scales_are_made_as_in_the_format_for_the_blocks_layers_only(checkpoint, stored) -> None:
    model = load(checkpoint, fp8="scaled")
    found = model.state_dict()
    targets = {name for name in stored if is_target(name)}
    assert targets and set(found) == {*stored, *(n.removesuffix("weight") + "scale_weight" for n in targets)}
    for name, tensor in stored.items():
        if name in targets:
            codes, scale = block_scaled(tensor)
            assert torch.equal(found[name].view(torch.uint8), codes.view(torch.uint8)), name
            assert torch.equal(found[name.removesuffix("weight") + "scale_weight"], scale), name
            assert isinstance(model.get_submodule(name.removesuffix(".weight")), Fp8Linear)
        else:
            assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor.float()), name
    assert model.dtype == torch.float32 and not any(parameter.requires_grad for parameter in model.parameters())


def test_a_bare_cast_spares_all_but_the_same_layers(checkpoint, stored) -> None:
    found = load(checkpoint, fp8="plain").state_dict()
    assert set(found) == set(stored)
    for name, tensor in stored.items():
        wanted = tensor.to(E4M3) if is_target(name) else tensor.float()
        assert found[name].dtype == wanted.dtype and torch.equal(found[name].float(), wanted.float()), name


@pytest.mark.parametrize("mode", ["plain", "scaled"])
def test_a_model_in_fp8_computes_what_its_weights_stand_for(checkpoint, stored, mode) -> None:
    model = load(checkpoint, fp8=mode)
    assert_computes_alike(model, whole_weights(model))
    assert 1e-4 < error(velocity(model), velocity(plain_model(stored))) < {"plain": 0.5, "scaled": 0.05}[mode]


def test_the_16_bit_model_is_never_in_memory(checkpoint, stored, monkeypatch) -> None:
    """When a tensor is read, of those before it the last one is left at most."""
    alive, most, read = weakref.WeakSet(), 0, Checkpoint.read

    def watched(self):
        nonlocal most
        for name, tensor in read(self):
            if is_target(name):
                tensor = tensor.clone()
                alive.add(tensor)
            most = max(most, len(alive))
            yield name, tensor
            del tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    model = load(checkpoint, torch.bfloat16, fp8="scaled")
    assert 1 <= most <= 2
    wanted = sum(t.numel() * (1 + 2 / 64 if is_target(name) else 2) for name, t in stored.items())
    assert sum(t.numel() * t.element_size() for t in model.state_dict().values()) == wanted


def test_each_tensor_goes_where_it_is_told(checkpoint) -> None:
    """Swapped blocks lie in RAM from the start, their scales too."""
    from common.weights import fill

    model = build_transformer(checkpoint, fp8="scaled")
    tensors = ((name, torch.empty_like(tensor, device="cpu")) for name, tensor in model.state_dict().items())
    fill(model, checkpoint, tensors, lambda name: "meta" if name.startswith("transformer_blocks.1.") else "cpu")
    devices = {name: tensor.device.type for name, tensor in model.state_dict().items()}
    assert {name for name, device in devices.items() if device == "meta"} == {
        name for name in devices if name.startswith("transformer_blocks.1.")
    }


def test_the_layers_that_a_model_will_have_are_known_without_weights(checkpoint) -> None:
    for mode in ("off", "plain", "scaled"):
        empty, full = build_transformer(checkpoint, fp8=mode), load(checkpoint, fp8=mode)
        assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in full.state_dict().items()}
        assert [type(m) for m in empty.modules()] == [type(m) for m in full.modules()]


def test_weights_that_are_no_numbers_are_named(stored, tmp_path: Path) -> None:
    name = "transformer_blocks.1.attn.to_k.weight"
    broken = stored | {name: torch.full_like(stored[name], torch.nan)}
    with pytest.raises(UserError, match=f"--dit .*{name} with numbers that are not finite"):
        load(saved(tmp_path, broken, "壊"), fp8="scaled")


# ---- LoRAs ----


@pytest.fixture(scope="module")
def lora(folder: Path, stored) -> str:
    tensors = {}
    for seed, module in enumerate(MERGED):
        rows, columns = stored[f"{module}.weight"].shape
        name, generator = f"lora_unet_{module.replace('.', '_')}", torch.Generator().manual_seed(seed)
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, columns, generator=generator) * 0.1
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) * 0.1
    save_file(tensors, folder / "絵.safetensors")
    return str(folder / "絵.safetensors")


def with_lora(weights: Mapping[str, Tensor], lora: str, multiplier: float) -> dict[str, Tensor]:
    """In float32 wherever there is something to add."""
    factors, found = load_file(lora), dict(weights)
    for module in MERGED:
        down, up = (factors[f"lora_unet_{module.replace('.', '_')}.lora_{part}.weight"] for part in ("down", "up"))
        found[f"{module}.weight"] = found[f"{module}.weight"].float() + multiplier * up @ down
    return found


def merge_of(lora: str, checkpoint: Checkpoint, multiplier: float = 0.5):
    return plan_merge([LoraChoice(path=lora, multiplier=multiplier)], checkpoint)


def test_loras_are_merged_in_float32_and_then_quantised(checkpoint, stored, lora) -> None:
    found = load(checkpoint, fp8="scaled", merge=merge_of(lora, checkpoint)).state_dict()
    merged = with_lora(stored, lora, 0.5)
    for name in filter(is_target, stored):
        codes, scale = block_scaled(merged[name])
        assert torch.equal(found[name].view(torch.uint8), codes.view(torch.uint8)), name
        scale_name = name.removesuffix("weight") + "scale_weight"
        assert found[scale_name].dtype == torch.bfloat16 and torch.equal(found[scale_name], scale.bfloat16())


@pytest.mark.parametrize("mode", ["plain", "scaled"])
def test_a_lora_in_a_file_of_codes_is_not_lost(checkpoint, stored, lora, tmp_path, caplog, mode) -> None:
    """What they stand for, plus the LoRA, is quantised once more, with scales; the others stay as they are."""
    save_fp8_transformer(checkpoint, [], tmp_path / "八.safetensors", mode=mode, device=CPU, flag="--save_fp8_model")
    ready = open_transformer(str(tmp_path / "八.safetensors"))
    before = load(ready)
    with caplog.at_level(logging.WARNING):
        model = load(ready, merge=merge_of(lora, ready))
    assert "2 weights are quantised once more" in caplog.text
    wanted = with_lora(whole_weights(before), lora, 0.5)
    found = whole_weights(model)
    for name, tensor in whole_weights(before).items():
        if name.removesuffix(".weight") in MERGED:
            delta = wanted[name] - tensor
            assert error(found[name] - tensor, delta) < 0.25, "the LoRA is in it"
            assert error(found[name], opened(*block_scaled(wanted[name]))) < 2**-7
        else:
            assert torch.equal(found[name], tensor), name
    assert_computes_alike(model, found)


def test_a_prompts_lora_lies_over_codes(checkpoint, lora) -> None:
    model = load(checkpoint, fp8="scaled")
    before, weights = velocity(model), whole_weights(model)
    loras = PromptLoras(checkpoint)
    loras.check([PromptLora(path=lora, multiplier=0.5)])
    with loras.on(model, [PromptLora(path=lora, multiplier=0.5)]):
        found = velocity(model)
    assert error(found, velocity(plain_model(with_lora(weights, lora, 0.5)))) < 1e-5
    assert error(found, before) > 1e-3
    assert torch.equal(velocity(model), before)


@pytest.mark.parametrize("mode", ["plain", "scaled"])
def test_training_on_codes_is_training_on_what_they_stand_for(checkpoint, mode) -> None:
    results = []
    batch = batch_of({"猫": one_frame_item(1), "b": one_frame_item(2, length=3)})
    model = load(checkpoint, fp8=mode)
    for transformer in (model, plain_model(whole_weights(model))):
        network = build_network(transformer)
        network.apply_to(transformer)
        results.append(loss_and_gradients(build_objective(transformer), network, batch))
        network.remove()
    (loss, gradients), (wanted_loss, wanted) = results
    assert loss.weighted.item() == pytest.approx(wanted_loss.weighted.item(), rel=1e-5)
    assert len(gradients) > 20 and difference(gradients, wanted) < 1e-5


# ---- files ----


@pytest.mark.parametrize("mode", ["plain", "scaled"])
def test_a_saved_model_is_the_one_that_was_quantised_while_loading(checkpoint, stored, lora, tmp_path, mode) -> None:
    output = tmp_path / "新しい" / "八.safetensors"
    choices = [LoraChoice(path=lora, multiplier=0.5)]
    save_fp8_transformer(checkpoint, choices, output, mode=mode, device=CPU, flag="--save_fp8_model")
    wanted = load(checkpoint, torch.bfloat16, fp8=mode, merge=merge_of(lora, checkpoint)).state_dict()
    written = load_file(output)
    assert {n: t.dtype for n, t in written.items() if not is_target(n) and "scale_weight" not in n} == {
        n: t.dtype for n, t in stored.items() if not is_target(n)
    }
    with safe_open(output, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["fp8"] == mode
    assert json.loads(metadata["merged_loras"]) == [{"name": "絵.safetensors", "multiplier": 0.5}]
    for given in ("off", mode):
        found = load(open_transformer(str(output)), torch.bfloat16, fp8=given).state_dict()
        assert found.keys() == wanted.keys() == written.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype == written[name].dtype
            assert torch.equal(found[name].float(), tensor.float()), name
            assert torch.equal(written[name].float(), tensor.float()), name


def test_a_saved_model_is_never_in_memory_as_a_whole(checkpoint, tmp_path, monkeypatch) -> None:
    alive, most, read = weakref.WeakSet(), 0, Checkpoint.read

    def watched(self):
        nonlocal most
        for name, tensor in read(self):
            alive.add(tensor)
            most = max(most, len(alive))
            yield name, tensor
            del tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    save_fp8_transformer(checkpoint, [], tmp_path / "o.safetensors", mode="scaled", device=CPU, flag="--o")
    assert 1 <= most <= 2


def test_flags_that_contradict_the_file_answer_in_one_line(checkpoint, tmp_path) -> None:
    ready = {}
    for mode in ("plain", "scaled"):
        path = tmp_path / f"{mode}.safetensors"
        save_fp8_transformer(checkpoint, [], path, mode=mode, device=CPU, flag="--save_fp8_model")
        ready[mode] = open_transformer(str(path))
    with pytest.raises(UserError, match="^--fp8_scaled: got .*plain.*without scales.*16-bit model"):
        build_transformer(ready["plain"], fp8="scaled")
    with pytest.raises(UserError, match="^--fp8: got .*scaled.*with scales"):
        build_transformer(ready["scaled"], fp8="plain")
    for mode in ready:
        with pytest.raises(UserError, match="^--o: got .*in fp8 already"):
            save_fp8_transformer(ready[mode], [], tmp_path / "o.safetensors", mode=mode, device=CPU, flag="--o")


def quantised_elsewhere(stored: Mapping[str, Tensor], layout: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(a file of another program's, what its tensors stand for)."""
    tensors, meant = dict(stored), {name: tensor.float() for name, tensor in stored.items()}
    names = [name for name in stored if is_target(name)] + [f"{path}.weight" for path in ELSEWHERE]
    for name in names:
        weight = stored[name].float()
        if layout == "32 of a row" and weight.ndim == 2:
            largest = weight.abs().unflatten(1, (-1, 32)).amax(2, keepdim=True)
        elif layout == "row":
            largest = weight.abs().flatten(1).amax(1, keepdim=True)
        else:
            largest = weight.abs().max()
        scale = largest / 448
        expanded = scale
        if scale.ndim == 3:
            expanded = scale.expand(-1, -1, 32).flatten(1)
        elif scale.ndim == 2:
            expanded = scale.view(-1, *[1] * (weight.ndim - 1))
        codes = (weight / expanded).clamp(-448, 448).to(E4M3)
        meant[name] = codes.float() * expanded
        path = name.removesuffix(".weight")
        tensors[name] = codes
        if layout == "ComfyUI now":
            tensors |= {f"{path}.weight_scale": scale, f"{path}.input_scale": torch.ones(())}
            tensors[f"{path}.comfy_quant"] = torch.frombuffer(
                bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8
            )
        else:
            tensors[f"{path}.scale_weight"] = scale.reshape(1) if layout == "one number" else scale
            if layout == "ComfyUI":
                tensors[f"{path}.scale_input"] = torch.ones(())
    if layout == "ComfyUI":
        tensors["scaled_fp8"] = torch.zeros(0).to(E4M3)
    if layout.startswith("ComfyUI"):
        tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    return tensors, meant


@pytest.mark.parametrize("layout", ["ComfyUI", "ComfyUI now", "one number", "row", "32 of a row"])
def test_files_of_other_programs_are_what_they_mean(stored, layout, tmp_path) -> None:
    tensors, meant = quantised_elsewhere(stored, layout)
    found = saved(tmp_path, tensors, "他")
    model = load(found)
    for name, tensor in whole_weights(model).items():
        torch.testing.assert_close(tensor, meant[name], rtol=1e-6, atol=0)
    assert_computes_alike(model, meant)
    state = model.state_dict()
    assert state["transformer_blocks.0.attn.to_q.weight"].dtype == E4M3
    assert state["x_embedder.proj.weight"].dtype == state["proj_out.weight"].dtype == model.dtype == torch.float32


def test_codes_in_shards_find_their_scales(stored, tmp_path, lora) -> None:
    """A weight and its scale may be in different files; with a LoRA both are needed at once."""
    tensors, meant = quantised_elsewhere(stored, "row")
    scales = {name: tensor for name, tensor in tensors.items() if "scale_weight" in name}
    save_file({n: t for n, t in tensors.items() if n not in scales}, tmp_path / "x-00001-of-00002.safetensors")
    save_file(scales, tmp_path / "x-00002-of-00002.safetensors")
    checkpoint = open_transformer(str(tmp_path / "x-00001-of-00002.safetensors"))
    model = load(checkpoint, merge=merge_of(lora, checkpoint))
    wanted = with_lora(meant, lora, 0.5)
    for name, tensor in whole_weights(model).items():
        rtol = 0.05 if name.removesuffix(".weight") in MERGED else 1e-6
        assert error(tensor, wanted[name]) < rtol, name


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_file_that_was_cast_as_a_whole_loads(stored, tmp_path, dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in stored.items()}
    model = load(saved(tmp_path, tensors, "全"))
    for name, tensor in model.state_dict().items():
        owner = model.get_submodule(name.rpartition(".")[0])
        assert tensor.dtype == (dtype if isinstance(owner, Fp8Linear) and name.endswith("weight") else torch.float32)
    assert_computes_alike(model, tensors)


def test_a_file_that_some_other_scheme_made_is_refused(stored, tmp_path) -> None:
    name = "transformer_blocks.0.attn.to_q"
    codes = stored[f"{name}.weight"].to(E4M3)
    for tensors, words in (
        ({f"{name}.weight": torch.zeros(codes.shape, dtype=torch.int8)}, f"{name}.weight of type I8"),
        (
            {f"{name}.weight": codes, f"{name}.scale_weight": torch.ones(7)},
            f"{name}.scale_weight of type F32 and shape",
        ),
        ({f"{name}.weight": codes, f"{name}.scale_weight": torch.ones(256, 5, 1)}, f"{name}.scale_weight"),
        ({f"{name}.weight": codes, f"{name}.scale_weight": torch.ones(1, dtype=torch.int32)}, "type I32"),
        ({"transformer_blocks.0.attn.to_x.scale_weight": torch.ones(1)}, "unexpected tensors"),
    ):
        found = saved(tmp_path, {**stored, **tensors}, "異")
        with pytest.raises(UserError, match=f"^--dit .*{re.escape(words)}"):
            build_transformer(found)


# ---- LLaMA ----


def rows_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None], use_cache=False).last_hidden_state


def as_linear(model: nn.Module) -> nn.Module:
    """The same model with whole weights."""
    for layer in model.modules():
        if isinstance(layer, Fp8Linear):
            weight = opened(layer.weight, layer.scale_weight)
            layer.__class__ = nn.Linear
            del layer.scale_weight
            layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    return model


def test_llama_keeps_its_embedding_and_norms(demo_models: ModelPaths) -> None:
    files = open_llama(demo_models.text_encoder1)
    whole = load_llama(files, dtype=torch.float32, device=CPU)
    model = load_llama(files, dtype=torch.float32, device=CPU, fp8=True)
    codes = {name for name, tensor in model.state_dict().items() if tensor.dtype == E4M3}
    assert codes == {f"{name}.weight" for name, m in whole.named_modules() if isinstance(m, nn.Linear)} and codes
    for name, tensor in model.state_dict().items():
        if name.endswith("scale_weight"):
            assert tensor.dtype == torch.float32, "the file is in float16, whose scales would be too small"
        elif name not in codes:
            assert torch.equal(tensor, whole.state_dict()[name])
    found = rows_of(model)
    assert 1e-4 < error(found, rows_of(whole)) < 0.1
    assert error(found, rows_of(as_linear(model))) < 1e-5


def test_comfyuis_scaled_llama_loads(demo_models: ModelPaths, tmp_path) -> None:
    tensors = dict(open_checkpoint(demo_models.text_encoder1, flag="x", subfolder="text_encoder").read())
    file, meant = {}, {}
    for name, tensor in {**tensors, "lm_head.weight": tensors["embed_tokens.weight"].clone()}.items():
        if name.endswith("_proj.weight") or name == "lm_head.weight":
            scale = tensor.float().abs().max() / 448
            file[f"model.{name}"] = (tensor.float() / scale).to(E4M3)
            file[f"model.{name.removesuffix('weight')}scale_weight"] = scale
            meant[name] = file[f"model.{name}"].float() * scale
        else:
            file[f"model.{name}"] = tensor
    file = {name.replace("model.lm_head", "lm_head"): tensor for name, tensor in file.items()}
    save_file(file | {"scaled_fp8": torch.zeros(0).to(E4M3)}, tmp_path / "羊.safetensors")
    files = open_llama(tmp_path / "羊.safetensors")
    model = load_llama(files, dtype=torch.float32, device=CPU, fp8=True)
    oracle = load_llama(open_llama(demo_models.text_encoder1), dtype=torch.float32, device=CPU)
    oracle.load_state_dict({name: meant.get(name, tensors[name]).float() for name in oracle.state_dict()})
    assert isinstance(model.layers[0].mlp.up_proj, Fp8Linear)
    assert error(rows_of(model), rows_of(oracle)) < 1e-5


# ---- what users write ----


def main(argv: Iterable[object]) -> int:
    return fpack_generate_video.main([str(part) for part in argv])


@pytest.mark.parametrize(
    ("fp8", "scaled", "mode"),
    [(False, False, "off"), (True, False, "plain"), (False, True, "scaled"), (True, True, "scaled")],
)
def test_scales_imply_fp8(fp8: bool, scaled: bool, mode: Fp8Mode) -> None:
    assert fp8_mode(fp8=fp8, scaled=scaled) == mode


@pytest.mark.parametrize(
    ("more", "mode"), [([], "scaled"), (["--fp8"], "plain"), (["--fp8_scaled", "--fp8"], "scaled")]
)
def test_a_model_is_saved_in_fp8_without_generating(checkpoint, tmp_path, more, mode) -> None:
    output = tmp_path / "八.safetensors"
    assert main(["--dit", checkpoint.path, "--save_fp8_model", output, "--device", "cpu", *more]) == 0
    with safe_open(output, framework="pt") as file:
        assert file.metadata()["fp8"] == mode


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--save_fp8_model 八.safetensors", "--dit: got nothing"),
        ("--dit {dit} --save_fp8_model 八.pt", "--save_fp8_model: got 八.pt"),
        ("--dit {dit} --save_fp8_model {dit}", "--save_fp8_model: got {dit}; expected another file"),
        ("--dit {dit} --save_fp8_model a.safetensors --save_merged_model b.safetensors", "one of them"),
        ("--dit {dit} --save_merged_model b.safetensors --fp8_scaled", "--fp8_scaled: got --fp8_scaled beside"),
        ("--dit {dit} --save_merged_model b.safetensors --fp8", "use --save_fp8_model"),
        ("--dit {dit} --save_fp8_model a.safetensors --lora x.safetensors", "--lora: got x.safetensors"),
    ],
)
def test_what_cannot_be_saved_answers_in_one_line(checkpoint, argv, message, tmp_path, monkeypatch, capsys) -> None:
    dit = str(checkpoint.path)
    monkeypatch.chdir(tmp_path)
    assert main([part.replace("{dit}", dit) for part in argv.split()]) == 2
    said = capsys.readouterr().err
    assert message.replace("{dit}", dit) in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
