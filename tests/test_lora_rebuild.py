"""Files of any format laid over a transformer's layers, and what can only be merged."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from networks.lora_formats import LoraFile, read_lora
from networks.lora_matching import match
from networks.rebuild import check_can_be_applied, network_for
from options.errors import UserError

WIDTH, MLP = 8, 32


@pytest.fixture
def transformer() -> nn.Module:
    """A few layers under FramePack's names, one of them a convolution."""

    class Embedder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv3d(4, WIDTH, (1, 2, 2), stride=(1, 2, 2))

    block = nn.Module()
    block.attn = nn.ModuleDict({f"to_{letter}": nn.Linear(WIDTH, WIDTH) for letter in "qkv"})
    block.proj_mlp = nn.Linear(WIDTH, MLP)
    model = nn.Module()
    model.x_embedder = Embedder()
    model.single_transformer_blocks = nn.ModuleList([block])
    return model.requires_grad_(False)


def read(folder: Path, tensors: dict[str, Tensor], *, shapes_only: bool = False) -> LoraFile:
    save_file(tensors, folder / "画風.safetensors")
    return read_lora(folder / "画風.safetensors", flag="--lora", shapes_only=shapes_only)


def lora(module: str, out: int, size: tuple[int, ...], ones: int = 0) -> dict[str, Tensor]:
    """Of rank 2, with that many kernel dimensions of 1 behind `up`."""
    down, up = torch.randn(2, *size), torch.randn(out, 2, *[1] * ones)
    return {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}


TO_Q, PROJ = "single_transformer_blocks.0.attn.to_q", "x_embedder.proj"
SHAPES = {
    "as the layers have them": lora(TO_Q, WIDTH, (WIDTH,)) | lora(PROJ, WIDTH, (4, 1, 2, 2), 3),
    "a kernel of 1 for a linear layer": lora(TO_Q, WIDTH, (WIDTH, 1, 1), 2),
    "no kernel for a convolution": lora(PROJ, WIDTH, (16,)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_whatever_can_be_merged_can_be_applied(name: str, transformer, tmp_path: Path) -> None:
    file = read(tmp_path, SHAPES[name])
    inputs = {TO_Q: torch.randn(3, WIDTH), PROJ: torch.randn(1, 4, 2, 4, 6)}
    network = network_for(transformer, file)
    network.apply_to(transformer)
    got = {path: transformer.get_submodule(path)(x) for path, x in inputs.items()}
    network.remove()
    for native, factors in file.modules.items():
        weight = transformer.get_submodule(file.dotted[native]).weight
        weight += factors.delta(weight.shape)
    assert {network.paths[native] for native in file.modules} == set(network.adapters)
    for path, x in inputs.items():
        torch.testing.assert_close(got[path], transformer.get_submodule(path)(x), rtol=1e-5, atol=1e-5)


def test_modules_that_the_transformer_lacks_are_left_out(transformer, tmp_path: Path, caplog) -> None:
    """The report on them was given when the file was checked."""
    file = read(tmp_path, SHAPES["as the layers have them"] | lora("transformer_blocks.7.attn.to_q", WIDTH, (WIDTH,)))
    assert set(network_for(transformer, file).adapters) == {TO_Q, PROJ}
    assert not caplog.records


def test_another_size_and_no_match_name_the_files_own_key(transformer, tmp_path: Path) -> None:
    for tensors in (lora(TO_Q, WIDTH, (9,)), lora("transformer_blocks.7.attn.to_q", WIDTH, (WIDTH,))):
        with pytest.raises(UserError, match=rf"^--lora .*画風\.safetensors: got .*{next(iter(tensors))}"):
            network_for(transformer, read(tmp_path, tensors))


def lokr_of_fused_layers() -> dict[str, Tensor]:
    """Query, key and value of 8 rows each and the MLP's 32: block 0 is cut between rows of w1, block 1 inside them."""
    return {
        "single_blocks.0.linear1.lokr_w1": torch.randn(7, 2),
        "single_blocks.0.linear1.lokr_w2": torch.randn(8, 4),
        "single_blocks.1.linear1.lokr_w1": torch.randn(4, 2),
        "single_blocks.1.linear1.lokr_w2": torch.randn(14, 4),
    }


def loha_of_a_convolution() -> dict[str, Tensor]:
    shapes = {"hada_w1_a": (WIDTH, 2), "hada_w1_b": (2, 16), "hada_w2_a": (WIDTH, 2), "hada_w2_b": (2, 16)}
    return {f"transformer.{PROJ}.{part}": torch.randn(shape) for part, shape in shapes.items()}


UNFIT = {
    "rows": (lokr_of_fused_layers, "single_blocks.1.linear1.lokr_w1, a LoKr of a fused layer"),
    "convolution": (loha_of_a_convolution, f"transformer.{PROJ}.hada_w1_a, a LoHa for {PROJ}.weight, a convolution"),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("at_the_door", [True, False])
def test_what_can_only_be_merged_is_refused_with_the_way_out(name, at_the_door, transformer, tmp_path: Path) -> None:
    """At the door the model is known by its header, and the file by its own."""
    make, complaint = UNFIT[name]
    transformer.single_transformer_blocks.append(copy.deepcopy(transformer.single_transformer_blocks[0]))
    file = read(tmp_path, make(), shapes_only=at_the_door)
    shapes = {key: tuple(tensor.shape) for key, tensor in transformer.state_dict().items()}
    with pytest.raises(UserError) as error:
        check_can_be_applied(match(file, shapes), shapes) if at_the_door else network_for(transformer, file)
    assert complaint in str(error.value) and str(error.value).startswith("--lora ")
    assert str(error.value).endswith("merge the file into the model with --lora_weight")


def test_an_alpha_of_zero_counts_as_the_rank_over_a_layer_too(transformer, tmp_path: Path) -> None:
    tensors = lora(TO_Q, WIDTH, (WIDTH,))
    zero = {f"transformer.{TO_Q}.alpha": torch.tensor(0.0)}
    layer, x = transformer.get_submodule(TO_Q), torch.randn(3, WIDTH)
    down, up = tensors.values()
    network = network_for(transformer, read(tmp_path, tensors | zero))
    base = layer(x)
    network.apply_to(transformer)
    torch.testing.assert_close(layer(x) - base, x @ (up @ down).T, rtol=1e-5, atol=1e-5)
    assert float(network.state_dict()[f"lora_unet_{TO_Q.replace('.', '_')}.alpha"]) == 0


def test_a_lokr_of_a_fused_layer_that_can_be_split_is_applied(transformer, tmp_path: Path) -> None:
    tensors = {key: tensor for key, tensor in lokr_of_fused_layers().items() if ".0." in key}
    file = read(tmp_path, tensors)
    network = network_for(transformer, file)
    network.apply_to(transformer)
    x = torch.randn(3, WIDTH)
    got = torch.cat([transformer.get_submodule(file.dotted[name])(x) for name in file.modules], dim=-1)
    network.remove()
    base = torch.cat([transformer.get_submodule(file.dotted[name])(x) for name in file.modules], dim=-1)
    delta = torch.kron(*tensors.values())
    assert len(file.modules) == 4
    torch.testing.assert_close(got - base, x @ delta.T, rtol=1e-5, atol=1e-5)
