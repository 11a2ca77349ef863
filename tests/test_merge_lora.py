"""`merge_lora.py`: one LoRA for several, against PEFT's weighted adapters and numpy; and merged models."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import merge_lora
from common.weights import open_checkpoint
from frame_pack.loading import load_transformer, open_transformer
from networks.deltas import Factors
from networks.lora_combine import combine, reduce_rank
from networks.lora_formats import LoraFile, read_lora
from networks.lora_metadata import write_lora
from options.errors import UserError

OUT, IN = 20, 14
FIRST, SECOND = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp"
Tensors = dict[str, Tensor]


def native(module: str) -> str:
    return f"lora_unet_{module.replace('.', '_')}"


def lora(module: str, rank: int = 4, alpha: float | None = 1.0, shape: tuple[int, ...] = (OUT, IN)) -> Tensors:
    out, size, *kernel = shape
    ones = [1] * len(kernel)
    parts = {"lora_down.weight": torch.randn(rank, size, *kernel), "lora_up.weight": torch.randn(out, rank, *ones)}
    parts |= {} if alpha is None else {"alpha": torch.tensor(alpha)}
    return {f"{native(module)}.{part}": tensor for part, tensor in parts.items()}


def loha(module: str, rank: int = 2, shape: tuple[int, int] = (OUT, IN)) -> Tensors:
    parts = {f"hada_w{i}_a": torch.randn(shape[0], rank) for i in (1, 2)}
    parts |= {f"hada_w{i}_b": torch.randn(rank, shape[1]) for i in (1, 2)}
    return {f"{native(module)}.{part}": tensor for part, tensor in (parts | {"alpha": torch.tensor(0.5)}).items()}


def lokr(module: str, rank: int | None = 1, first: tuple[int, int] = (4, 2)) -> Tensors:
    rows, columns = OUT // first[0], IN // first[1]
    second = {"lokr_w2": torch.randn(rows, columns)}
    if rank is not None:
        second = {"lokr_w2_a": torch.randn(rows, rank), "lokr_w2_b": torch.randn(rank, columns)}
    parts = {"lokr_w1": torch.randn(*first), **second, "alpha": torch.tensor(2.0)}
    return {f"{native(module)}.{part}": tensor for part, tensor in parts.items()}


def saved(path: Path, tensors: Tensors, **metadata: str) -> Path:
    write_lora(path, tensors, metadata)
    return path


def read(path: Path) -> LoraFile:
    return read_lora(path, flag="--lora_weight")


def read_all(folder: Path, *files: Tensors) -> list[LoraFile]:
    return [read(saved(folder / f"{number}.safetensors", tensors)) for number, tensors in enumerate(files)]


def deltas(path: Path) -> dict[str, Tensor]:
    return {name: factors.delta() for name, factors in read(path).modules.items()}


def summed(loras: Iterable[tuple[LoraFile, float]]) -> dict[str, Tensor]:
    """What the files do together, module by module, in float64."""
    result: dict[str, Tensor] = {}
    for file, multiplier in loras:
        for name, factors in file.modules.items():
            result[name] = result.get(name, 0) + multiplier * factors.delta().double()
    return result


def assert_does(path: Path, expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    found = deltas(path)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert (found[name] - delta).norm() <= tolerance * delta.norm()


def best(delta: Tensor, rank: int) -> tuple[np.ndarray, float]:
    """The closest matrix of this rank and what it leaves out, relative, by numpy's singular values."""
    left, values, right = np.linalg.svd(delta.double().flatten(1).numpy(), full_matrices=False)
    error = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
    return (left[:, :rank] * values[:rank]) @ right[:rank], float(error)


def run(*arguments: object) -> int:
    return merge_lora.main([str(argument) for argument in arguments])


def combined(output: Path, *arguments: object) -> Path:
    assert run("--save_merged_lora", output, "--lora_weight", *arguments) == 0
    return output


# ---- PEFT ----


class PeftPair:
    """Two random adapters on two layers, as PEFT has them and as files."""

    def __init__(self, folder: Path, ranks: tuple[int, int], alphas: tuple[float, float]) -> None:
        layers = nn.ModuleDict({"proj_out": nn.Linear(IN, OUT), "x_embedder": nn.ModuleDict({"proj": nn.Linear(9, 7)})})
        names = ["proj_out", "x_embedder.proj"]
        configs = [peft.LoraConfig(r=r, lora_alpha=a, target_modules=names) for r, a in zip(ranks, alphas, strict=True)]
        self.model = peft.get_peft_model(layers, configs[0], adapter_name="first")
        self.model.add_adapter("second", configs[1])
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_()
        self.paths = [folder / f"{name}.safetensors" for name in ("first", "second")]
        for path, name, alpha in zip(self.paths, ("first", "second"), alphas, strict=True):
            tensors = peft.get_peft_model_state_dict(self.model, adapter_name=name)
            alphas_too = {f"base_model.model.{module}.alpha": torch.tensor(alpha) for module in names}
            save_file({key: tensor.clone() for key, tensor in tensors.items()} | alphas_too, path)

    def merged(self, weights: tuple[float, float], **options: object) -> dict[str, Tensor]:
        self.model.add_weighted_adapter(["first", "second"], list(weights), "merged", **options)
        layers = self.model.base_model.model.named_modules()
        return {native(n): m.get_delta_weight("merged").detach() for n, m in layers if isinstance(m, BaseTunerLayer)}


@pytest.mark.parametrize(("ranks", "alphas"), [((4, 4), (4.0, 4.0)), ((3, 5), (1.0, 2.5)), ((2, 16), (7.0, 0.5))])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 1.3), (2.0, 0.0)])
def test_side_by_side_is_what_peft_calls_cat(ranks, alphas, weights, tmp_path: Path) -> None:
    pair = PeftPair(tmp_path, ranks, alphas)
    output = combined(tmp_path / "合成.safetensors", *pair.paths, "--lora_multiplier", *weights)
    assert_does(output, pair.merged(weights, combination_type="cat"))
    ups = {key: tensor for key, tensor in load_file(output).items() if "lora_up" in key}
    assert {tensor.shape[1] for tensor in ups.values()} == {sum(ranks)}


@pytest.mark.parametrize(("ranks", "alphas"), [((4, 4), (4.0, 4.0)), ((2, 16), (7.0, 0.5))])
@pytest.mark.parametrize("rank", [1, 5])
def test_a_given_rank_is_what_peft_calls_svd(ranks, alphas, rank: int, tmp_path: Path) -> None:
    pair, weights = PeftPair(tmp_path, ranks, alphas), (0.7, 1.3)
    output = combined(tmp_path / "a+b.safetensors", *pair.paths, "--lora_multiplier", *weights, "--rank", rank)
    assert_does(output, pair.merged(weights, combination_type="svd", svd_rank=rank), 1e-5)
    assert {factors.rank for factors in read(output).modules.values()} == {rank}


# ---- side by side ----


def test_modules_that_only_some_files_have_are_kept(tmp_path: Path) -> None:
    loras = read_all(tmp_path, lora(FIRST), lora(FIRST, 2, None) | lora(SECOND, 3, 9.0), lora("proj_out", 1))
    pairs = list(zip(loras, (0.5, -1.0, 3.0), strict=True))
    tensors, _ = combine(pairs, rank=None)
    assert_does(saved(tmp_path / "out.safetensors", tensors), summed(pairs))
    ranks = {FIRST: 6, SECOND: 3, "proj_out": 1}
    assert {k: float(t) for k, t in tensors.items() if "alpha" in k} == {
        f"{native(m)}.alpha": r for m, r in ranks.items()
    }


@pytest.mark.parametrize("rank", [None, 3])
def test_convolutions_keep_their_kernels(rank: int | None, tmp_path: Path) -> None:
    shape = (8, 3, 1, 2, 2)
    loras = read_all(
        tmp_path, lora("clean_x_embedder.proj", 2, 1.0, shape), lora("clean_x_embedder.proj", 3, 2.0, shape)
    )
    pairs = [(file, 1.0) for file in loras]
    tensors, _ = combine(pairs, rank=rank)
    name = native("clean_x_embedder.proj")
    total = rank or 5
    assert tensors[f"{name}.lora_down.weight"].shape == (total, 3, 1, 2, 2)
    assert tensors[f"{name}.lora_up.weight"].shape == (8, total, 1, 1, 1)
    (expected,) = summed(pairs).values()
    (found,) = deltas(saved(tmp_path / "out.safetensors", tensors)).values()
    wanted = expected.flatten(1).numpy() if rank is None else best(expected, rank)[0]
    np.testing.assert_allclose(found.flatten(1).numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_a_pointwise_convolution_joins_a_linear_layer(turned: bool, tmp_path: Path) -> None:
    loras = read_all(tmp_path, lora(FIRST), lora(FIRST, shape=(OUT, IN, 1, 1)))
    pairs = [(file, 1.0) for file in (reversed(loras) if turned else loras)]
    tensors, _ = combine(pairs, rank=None)
    expected = sum(file.modules[native(FIRST)].delta((OUT, IN)) for file in loras)
    (found,) = deltas(saved(tmp_path / "out.safetensors", tensors)).values()
    torch.testing.assert_close(found.reshape(OUT, IN), expected)


@pytest.mark.parametrize("turned", [False, True])
def test_a_flattened_convolution_joins_one_with_a_kernel(turned: bool, tmp_path: Path) -> None:
    module, shape = "clean_x_embedder.proj", (8, 3, 1, 2, 2)
    loras = read_all(tmp_path, lora(module, shape=(8, 12)), lora(module, shape=shape))
    tensors, _ = combine([(file, 1.0) for file in (reversed(loras) if turned else loras)], rank=None)
    (found,) = deltas(saved(tmp_path / "out.safetensors", tensors)).values()
    torch.testing.assert_close(found, sum(file.modules[native(module)].delta(shape) for file in loras))


def test_other_formats_and_split_layers_come_together(tmp_path: Path) -> None:
    """A HunyuanVideo LoRA, whose fused layer is four of FramePack's, and a native one of one of these."""
    down, up = torch.randn(4, 16), torch.randn(7 * 16, 4)
    fused = {"single_blocks.1.linear1.lora_A.weight": down, "single_blocks.1.linear1.lora_B.weight": up}
    save_file(fused, tmp_path / "混元.safetensors")
    saved(tmp_path / "native.safetensors", lora(SECOND, 2, 1.0, (64, 16)))
    paths = [tmp_path / "混元.safetensors", tmp_path / "native.safetensors"]
    output = combined(tmp_path / "out.safetensors", *paths, "--lora_multiplier", 0.5)
    pairs = list(zip(map(read, paths), (0.5, 1.0), strict=True))
    assert len(summed(pairs)) == 4
    assert_does(output, summed(pairs))


def test_patterns_choose_by_position(tmp_path: Path) -> None:
    both = lora(FIRST) | lora(SECOND)
    paths = [saved(tmp_path / f"{number}.safetensors", both) for number in range(3)]
    options = ["--include_patterns", "attn", "", "proj_mlp", "--exclude_patterns", "", r"^single"]
    output = combined(tmp_path / "out.safetensors", *paths, *options)
    ranks = {name: factors.rank for name, factors in read(output).modules.items()}
    assert ranks == {native(FIRST): 8, native(SECOND): 4}


# ---- ranks ----

KINDS = {
    "loha, thin": (lambda: [loha(FIRST)], 4),
    "loha, too wide to be thin": (lambda: [loha(FIRST, 5)], 14),
    "lokr, thin": (lambda: [lokr(FIRST, 1, (2, 7))], 2),
    "lokr, thin the other way": (lambda: [lokr(FIRST, 1, (10, 2))], 2),
    "lokr of whole factors": (lambda: [lokr(FIRST, None)], 14),
    "lora, wider than the layer": (lambda: [lora(FIRST, 16)], 14),
    "all three, thin": (lambda: [lora(FIRST, 2), loha(FIRST), lokr(FIRST, 1, (2, 7))], 8),
    "all three": (lambda: [lora(FIRST), loha(FIRST, 3), lokr(FIRST)], 14),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rank", [1, 3, 14, 40])
def test_a_rank_gives_the_closest_lora_of_that_rank(name: str, rank: int, tmp_path: Path) -> None:
    make, true_rank = KINDS[name]
    pairs = [
        (file, multiplier) for file, multiplier in zip(read_all(tmp_path, *make()), (1.0, -0.5, 2.0), strict=False)
    ]
    (expected,) = summed(pairs).values()
    closest, error = best(expected, rank)
    assert (error > 0.05) == (rank < min(true_rank, 4))
    module = reduce_rank([(f.modules[native(FIRST)], m) for f, m in pairs], (OUT, IN), rank, "cpu")
    assert module.error == pytest.approx(error, abs=2e-6)
    tensors, _ = combine(pairs, rank=rank)
    (found,) = deltas(saved(tmp_path / "out.safetensors", tensors)).values()
    np.testing.assert_allclose(found.numpy(), closest, atol=2e-5 * np.abs(closest).max())
    assert tensors[f"{native(FIRST)}.lora_down.weight"].shape[0] <= rank


def test_tall_and_wide_layers_are_cut_alike(tmp_path: Path) -> None:
    for shape in ((6, 30), (30, 6)):
        (file,) = read_all(tmp_path, lora(FIRST, 8, 1.0, shape))
        tensors, _ = combine([(file, 1.0)], rank=2)
        (found,) = deltas(saved(tmp_path / "out.safetensors", tensors)).values()
        np.testing.assert_allclose(found.numpy(), best(file.modules[native(FIRST)].delta(), 2)[0], atol=1e-5)


def test_rows_of_a_fused_lokr_can_be_cut(tmp_path: Path) -> None:
    tensors = {"lora_unet_single_blocks_0_linear1.lokr_w1": torch.randn(4, 4)}
    tensors |= {"lora_unet_single_blocks_0_linear1.lokr_w2_a": torch.randn(28, 1)}
    tensors |= {"lora_unet_single_blocks_0_linear1.lokr_w2_b": torch.randn(1, 4)}
    file = read(saved(tmp_path / "a.safetensors", tensors))
    assert any(factors.rows for factors in file.modules.values())
    result, _ = combine([(file, 1.0)], rank=4)
    assert_does(saved(tmp_path / "out.safetensors", result), summed([(file, 1.0)]), 1e-5)


def test_a_thin_delta_is_never_built(tmp_path: Path, monkeypatch) -> None:
    pairs = [(file, 1.0) for file in read_all(tmp_path, lora(FIRST), loha(FIRST), lora(FIRST))]

    def fail(*_: object) -> Tensor:
        raise AssertionError("built")

    monkeypatch.setattr(Factors, "delta", fail)
    combine(pairs, rank=3)


def test_a_rank_that_is_enough_changes_nothing(tmp_path: Path) -> None:
    pairs = [(file, 0.5) for file in read_all(tmp_path, lora(FIRST), lora(FIRST) | lora(SECOND))]
    exact, cut = combine(pairs, rank=None)[0], combine(pairs, rank=8)[0]
    assert exact.keys() == cut.keys() and all(torch.equal(exact[key], cut[key]) for key in exact)


def test_loras_that_cancel_out_can_be_cut(tmp_path: Path) -> None:
    (file,) = read_all(tmp_path, lora(FIRST, 16))
    for rank in (2, 20):
        tensors, _ = combine([(file, 1.0), (file, -1.0)], rank=rank)
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        (found,) = deltas(saved(tmp_path / "out.safetensors", tensors)).values()
        assert found.abs().max() < 1e-4


@pytest.mark.parametrize("num_files", [1, 4])
def test_a_lora_of_zeros_loses_nothing(num_files: int, tmp_path: Path) -> None:
    """One is cut by its thin factors, four are as wide as the layer."""
    (file,) = read_all(tmp_path, {key: tensor * 0 for key, tensor in lora(FIRST, alpha=None).items()})
    module = reduce_rank([(file.modules[native(FIRST)], 1.0)] * num_files, (OUT, IN), 2, "cpu")
    assert module.error == 0
    assert not module.up.any() and not module.down.any()


def test_a_rank_beyond_the_deltas_own_stays_finite(tmp_path: Path) -> None:
    """As wide as the layer only because the same columns come twice; whole numbers, so the other values are zero."""
    (file,) = read_all(tmp_path, {key: tensor.round() for key, tensor in lora(FIRST, 8, 8.0).items()})
    pairs = [(file, 1.0), (file, 2.0)]
    tensors, _ = combine(pairs, rank=IN)
    assert_does(saved(tmp_path / "out.safetensors", tensors), summed(pairs), 1e-5)


def test_the_log_says_how_much_is_left_out(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    path = saved(tmp_path / "a.safetensors", lora(FIRST, 6) | lora(SECOND, 2))
    combined(tmp_path / "out.safetensors", path, "--rank", 3)
    _, error = best(deltas(path)[native(FIRST)], 3)
    (line,) = [message for message in caplog.messages if "leaves out" in message]
    assert f"{error / 2:.3g} of the weight difference on average over 2 modules, at most {error:.3g}" in line
    assert native(FIRST) in line


# ---- files ----


@pytest.mark.parametrize("name", ["float", "fp32", "fp16", "bf16"])
def test_the_saved_type_is_the_one_asked_for(name: str, tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{number}.safetensors", lora(FIRST, 200, 3.0)) for number in range(2)]
    output = combined(tmp_path / "out.safetensors", *paths, "--save_precision", name)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(name, torch.float32)
    assert {tensor.dtype for key, tensor in load_file(output).items() if "lora" in key.split(".", 1)[1]} == {dtype}
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert_does(output, summed((read(path), 1.0) for path in paths), tolerance)


def test_the_rank_is_exact_where_bfloat16_has_no_such_number(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", lora(FIRST, 257, None))
    output = combined(tmp_path / "out.safetensors", path, "--save_precision", "bf16")
    assert read(output).modules[native(FIRST)].scale == 1


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="np") as file:
        return file.metadata()


def test_metadata_is_what_all_files_say_alike_and_where_it_comes_from(tmp_path: Path) -> None:
    common = {"ss_base_model_version": "framepack", "ss_network_dim": "4", "ss_network_args": '{"factor": 4}'}
    first = saved(tmp_path / "顔.safetensors", lora(FIRST), **common, ss_epoch="1")
    second = saved(tmp_path / "b.safetensors", lora(FIRST), **common, ss_epoch="2", ss_seed="3")
    output = combined(tmp_path / "out.safetensors", first, second, "--lora_multiplier", 0.5)
    metadata = metadata_of(output)
    hashes = {key: metadata.pop(key) for key in ("sshs_model_hash", "sshs_legacy_hash")}
    assert "顔" in metadata["combined_loras"]
    made_of = [{"name": "顔.safetensors", "multiplier": 0.5}, {"name": "b.safetensors", "multiplier": 1.0}]
    assert json.loads(metadata.pop("combined_loras")) == made_of
    assert metadata == {"ss_base_model_version": "framepack", "ss_network_dim": "8", "ss_network_alpha": "8"}
    write_lora(tmp_path / "fresh.safetensors", load_file(output), metadata)
    assert hashes.items() <= metadata_of(tmp_path / "fresh.safetensors").items()


def test_scales_in_the_metadata_are_not_applied_twice(tmp_path: Path) -> None:
    tensors = {
        f"transformer.{FIRST}.lora_A.weight": torch.ones(2, 3),
        f"transformer.{FIRST}.lora_B.weight": torch.ones(4, 2),
    }
    config = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 1})}
    save_file(tensors, tmp_path / "a.safetensors", config)
    output = combined(tmp_path / "out.safetensors", tmp_path / "a.safetensors")
    torch.testing.assert_close(deltas(output)[native(FIRST)], torch.full((4, 3), 1.0))


def test_ranks_that_differ_are_called_dynamic(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", lora(FIRST, 2) | lora(SECOND, 3))
    assert metadata_of(combined(tmp_path / "out.safetensors", path))["ss_network_dim"] == "Dynamic"


def test_the_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{number}.safetensors", lora(FIRST, 6) | loha(SECOND, 4)) for number in range(2)]
    outputs = [combined(tmp_path / f"out{number}.safetensors", *paths, "--rank", 5) for number in range(2)]
    contents = [output.read_bytes() for output in outputs]
    assert contents[0] == contents[1]


# ---- models ----


def lora_of_the_demo(dit: Path, folder: Path, modules: int = 6) -> list[Path]:
    """Two LoRAs of overlapping modules of the demo model, one of them in diffusers' names."""
    shapes = {name.removesuffix(".weight"): s for name, s in open_checkpoint(dit, flag="--dit").shapes.items()}
    names = [name for name, shape in shapes.items() if len(shape) == 2 and "blocks" in name][:modules]
    first = {key: t / 8 for name in names[:-2] for key, t in lora(name, 4, 4.0, shapes[name]).items()}
    tensors = {}
    for name in names[2:]:
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(3, shapes[name][1])
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(shapes[name][0], 3)
    save_file(tensors, folder / "その二.safetensors")
    return [saved(folder / "a.safetensors", first), folder / "その二.safetensors"]


def merged_by_hand(dit: Path, pairs: list[tuple[Path, float]]) -> Tensors:
    weights = dict(open_checkpoint(dit, flag="--dit").read())
    total = summed((read(path), multiplier) for path, multiplier in pairs)
    assert total
    for name, weight in weights.items():
        delta = total.get(native(name.removesuffix(".weight")), torch.zeros(()))
        weights[name] = (weight.double() + delta).to(weight.dtype)
    return weights


def test_a_merged_model_loads_and_has_the_weights_made_by_hand(demo_models, tmp_path: Path) -> None:
    paths = lora_of_the_demo(demo_models.dit, tmp_path)
    output = tmp_path / "結果 [v1]" / "merged.safetensors"
    options = ["--dit", demo_models.dit, "--lora_weight", *paths, "--lora_multiplier", 0.5, -2, "--device", "cpu"]
    assert run(*options, "--save_merged_model", output) == 0
    transformer = load_transformer(open_transformer(str(output)), dtype=torch.bfloat16, device="cpu")
    plain = load_transformer(open_transformer(str(demo_models.dit)), dtype=torch.bfloat16, device="cpu").state_dict()
    expected = merged_by_hand(demo_models.dit, [(paths[0], 0.5), (paths[1], -2.0)])
    found = transformer.state_dict()
    assert found.keys() == expected.keys()
    changed = [name for name in expected if not torch.equal(found[name], plain[name])]
    assert len(changed) == 6
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=2**-7, atol=1e-6)


def test_one_lora_of_several_merges_to_the_same_model(demo_models, tmp_path: Path) -> None:
    paths = lora_of_the_demo(demo_models.dit, tmp_path)
    one = combined(tmp_path / "one.safetensors", *paths, "--lora_multiplier", 0.5, -2)
    outputs = [tmp_path / "two.safetensors", tmp_path / "one into it.safetensors"]
    model = ["--dit", demo_models.dit, "--device", "cpu", "--save_merged_model"]
    assert run(*model, outputs[0], "--lora_weight", *paths, "--lora_multiplier", 0.5, -2) == 0
    assert run(*model, outputs[1], "--lora_weight", one) == 0
    two, once = (load_file(output) for output in outputs)
    for name, weight in two.items():
        torch.testing.assert_close(once[name], weight, rtol=2**-7, atol=1e-6)


# ---- what is refused ----


def complaint(capsys, *arguments: object) -> str:
    assert run(*arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "got" in line]
    return line


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return saved(tmp_path / "a.safetensors", lora(FIRST))


WRONG_FLAGS = {
    "no output": (["--lora_weight", "{a}"], "command line: got no output"),
    "both outputs": (
        ["--lora_weight", "{a}", "--save_merged_lora", "{o}", "--save_merged_model", "{o}", "--dit", "x"],
        "command line: got both outputs",
    ),
    "no dit": (["--lora_weight", "{a}", "--save_merged_model", "{o}"], "--dit: got nothing"),
    "no lora": (["--save_merged_lora", "{o}"], "--lora_weight: got nothing"),
    "no lora for a model": (["--save_merged_model", "{o}", "--dit", "x"], "--lora_weight: got nothing"),
    "rank 0": (["--lora_weight", "{a}", "--save_merged_lora", "{o}", "--rank", "0"], "--rank: got 0"),
    "multipliers": (
        ["--lora_weight", "{a}", "--save_merged_lora", "{o}", "--lora_multiplier", "1", "0.5"],
        "--lora_multiplier: got 2 values for 1 LoRA",
    ),
    "pattern": (
        ["--lora_weight", "{a}", "--save_merged_lora", "{o}", "--include_patterns", "ff"],
        "--include_patterns: got ff",
    ),
    "precision": (
        ["--lora_weight", "{a}", "--save_merged_lora", "{o}", "--save_precision", "fp61"],
        "did you mean fp16?",
    ),
    "suffix": (["--lora_weight", "{a}", "--save_merged_lora", "{o}.pt"], "--save_merged_lora: got"),
    "itself": (["--lora_weight", "{a}", "--save_merged_lora", "{a}"], "--save_merged_lora: got"),
    "nothing there": (["--lora_weight", "{o}", "--save_merged_lora", "{o}"], "--lora_weight: got"),
}


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_wrong_command_lines_are_explained_in_one_line(name: str, path: Path, capsys) -> None:
    arguments, message = WRONG_FLAGS[name]
    output, before = path.with_name("出力.safetensors"), path.read_bytes()
    line = complaint(capsys, *[argument.format(a=path, o=output) for argument in arguments])
    assert message in line
    assert os.listdir(path.parent) == [path.name] and path.read_bytes() == before


def test_a_missing_multiplier_is_one(path: Path) -> None:
    output = combined(path.with_name("out.safetensors"), path, path, "--lora_multiplier", 0.5)
    assert_does(output, summed([(read(path), 1.5)]))


def test_loha_and_lokr_need_a_rank(tmp_path: Path, capsys) -> None:
    for name, tensors in (("loha", loha(FIRST)), ("lokr", lokr(FIRST))):
        source = saved(tmp_path / f"{name}.safetensors", tensors)
        output = tmp_path / "out.safetensors"
        line = complaint(capsys, "--lora_weight", source, "--save_merged_lora", output)
        assert source.name in line and f"a {name}" in line and "give --rank" in line
        combined(output, source, "--rank", 2)
        output.unlink()


def test_shapes_that_differ_are_named(path: Path, capsys) -> None:
    other = saved(path.with_name("other.safetensors"), lora(FIRST, shape=(OUT, IN + 1)))
    output = path.with_name("out.safetensors")
    for options in ([], ["--rank", 2]):
        line = complaint(capsys, "--lora_weight", path, other, "--save_merged_lora", output, *options)
        assert other.name in line and f"{native(FIRST)}.lora_down.weight" in line and f"({OUT}, {IN + 1})" in line
    saved(other, lora(FIRST, shape=(OUT + 1, IN)))
    line = complaint(capsys, "--lora_weight", path, other, "--save_merged_lora", output)
    assert f"{native(FIRST)}.lora_up.weight" in line


def test_architectures_are_not_mixed(path: Path) -> None:
    file = read(path)
    other = replace(file, table=replace(file.table, architecture="Wan"))
    with pytest.raises(UserError, match="got a LoRA of Wan; expected one of FramePack, as a.safetensors is"):
        combine([(file, 1.0), (other, 1.0)], rank=None)


def test_damaged_numbers_and_small_types_are_named(path: Path, capsys) -> None:
    output = path.with_name("out.safetensors")
    for part in ("lora_up.weight", "alpha"):
        tensors = lora(FIRST)
        tensors[f"{native(FIRST)}.{part}"].view(-1)[0] = float("nan")
        broken = saved(path.with_name("壊れた.safetensors"), tensors)
        for options in ([], ["--rank", 2]):
            line = complaint(capsys, "--lora_weight", path, broken, "--save_merged_lora", output, *options)
            assert broken.name in line and f"got {native(FIRST)}.{part} with infinite numbers or NaN" in line
    large = ["--lora_weight", path, "--lora_multiplier", "1e6", "--save_merged_lora", output]
    line = complaint(capsys, *large, "--save_precision", "fp16")
    assert line.startswith("--save_precision: got float16") and "use fp32 or bf16" in line
    assert not output.exists()


def test_a_full_disk_is_one_line(path: Path, capsys, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    output = path.with_name("出力.safetensors")
    line = complaint(capsys, "--lora_weight", path, "--save_merged_lora", output)
    assert line.startswith("--save_merged_lora: got ") and output.name in line and "No space left" in line
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("num_files", [2, 5])
def test_multipliers_beyond_all_numbers_are_one_line(num_files: int, path: Path, capsys) -> None:
    """Two are cut by their thin factors, five are as wide as the layer."""
    output = path.with_name("out.safetensors")
    multipliers = ["--lora_multiplier", "1e300", "1e38"]
    for options in ([], ["--rank", 2]):
        files = ["--lora_weight", *[path] * num_files]
        line = complaint(capsys, *files, *multipliers, "--save_merged_lora", output, *options)
        assert native(FIRST) in line and "give smaller multipliers" in line and not output.exists()


def test_flags_without_effect_are_named(path: Path, caplog) -> None:
    output = path.with_name("out.safetensors")
    combined(output, path)
    assert "no effect" not in caplog.text
    combined(output, path, "--dit", "x", "--dit_in_channels", 16)
    assert "--dit has no effect" in caplog.text and "--dit_in_channels has no effect" in caplog.text


def test_flags_of_the_other_output_are_named(demo_models, tmp_path: Path, caplog) -> None:
    paths, output = lora_of_the_demo(demo_models.dit, tmp_path), tmp_path / "out.safetensors"
    options = ["--dit", demo_models.dit, "--lora_weight", *paths, "--save_merged_model", output, "--device", "cpu"]
    assert run(*options, "--rank", 4, "--save_precision", "bf16") == 0
    assert "--rank has no effect" in caplog.text and "--save_precision has no effect" in caplog.text


def test_what_is_not_used_is_named(path: Path, caplog) -> None:
    stray = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}
    save_file(load_file(path) | stray, path.with_name("more.safetensors"))
    combined(path.with_name("out.safetensors"), path.with_name("more.safetensors"))
    assert "1 unused tensors, lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha first" in caplog.text
