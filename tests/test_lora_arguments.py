"""What users write in --network_args, and which layers of a transformer it chooses."""

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from torch import nn

from frame_pack.loading import load_transformer, open_transformer
from networks import loha, lokr, lora, lora_framepack, lora_wan
from networks.arguments import NetworkArguments
from networks.targets import WAN, choose_layers
from options.errors import UserError

DOUBLE = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
DOUBLE += ["attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
SINGLE = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"]


def framepack_paths(num_double: int, num_single: int) -> set[str]:
    doubles = {f"transformer_blocks.{i}.{leaf}" for i in range(num_double) for leaf in DOUBLE}
    return doubles | {f"single_transformer_blocks.{i}.{leaf}" for i in range(num_single) for leaf in SINGLE}


def tree(layers: dict[str, nn.Module]) -> nn.Module:
    """A model that has these layers at these dotted paths."""
    root = nn.Module()
    for path, layer in layers.items():
        *parents, leaf = path.split(".")
        module = root
        for name in parents:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module._modules[name]
        module.add_module(leaf, layer)
    return root


def published_framepack() -> nn.Module:
    """All linear layers and convolutions of the published checkpoint, without weights."""
    shapes = json.loads((Path(__file__).parent / "data" / "framepack_dit_shapes.json").read_text(encoding="utf-8"))
    shapes = shapes.get("tensors", shapes)
    layers = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(shape) == 2:
            layers[path] = nn.Linear(shape[1], shape[0], device="meta")
        elif leaf == "weight" and len(shape) == 5:
            layers[path] = nn.Conv3d(shape[1], shape[0], tuple(shape[2:]), device="meta")
    return tree(layers)


def small(path: str = "transformer_blocks.0.") -> dict[str, nn.Module]:
    names = ("attn.to_q", "attn.to_k", "ff.net.2", "norm1.linear", "norm1_context.linear")
    return {path + name: nn.Linear(4, 4) for name in names}


def parse(kind: str = "LoRA", dim=None, alpha=None, neuron_dropout=None, **args: str) -> NetworkArguments:
    return NetworkArguments.parse(kind, dim=dim, alpha=alpha, neuron_dropout=neuron_dropout, args=args)


def chosen(transformer: nn.Module, **args: str) -> set[str]:
    return set(lora_framepack.create_network(transformer, args=args).paths.values())


def test_published_framepack_has_440_layers_to_adapt() -> None:
    transformer = published_framepack()
    assert chosen(transformer) == framepack_paths(20, 40) and len(framepack_paths(20, 40)) == 440
    for module in (loha, lokr):
        assert set(module.create_network(transformer, dim=1, args={}).paths.values()) == framepack_paths(20, 40)


def test_loaded_transformer_and_diffusers_get_the_same_names(demo_models) -> None:
    transformer = load_transformer(open_transformer(demo_models.dit), dtype=torch.float32, device="cpu")
    config = transformer.config
    oracle = HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=1,
        num_layers=config.num_double_blocks,
        num_single_layers=config.num_single_blocks,
        num_refiner_layers=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        image_proj_dim=8,
        has_image_proj=True,
        has_clean_x_embedder=True,
    )
    assert chosen(transformer) == framepack_paths(config.num_double_blocks, config.num_single_blocks)
    assert chosen(transformer) == chosen(oracle)


@pytest.mark.parametrize(("num_blocks", "image", "count"), [(40, False, 400), (30, False, 300), (40, True, 480)])
def test_wan_layers_are_counted_as_published(num_blocks: int, image: bool, count: int) -> None:
    leaves = [f"{attn}.{x}" for attn in ("self_attn", "cross_attn") for x in "qkvo"] + ["ffn.0", "ffn.2"]
    leaves += ["cross_attn.k_img", "cross_attn.v_img"] if image else []
    paths = [f"blocks.{i}.{leaf}" for i in range(num_blocks) for leaf in leaves]
    others = ["text_embedding.0", "time_embedding.2", "time_projection.1", "head.head", "img_emb.proj.1"]
    transformer = tree({path: nn.Linear(2, 2) for path in paths + others})
    assert set(choose_layers(transformer, (WAN,), parse(), network_module="networks.lora_wan")) == set(paths)
    assert len(loha.create_network(transformer, args={}).paths) == len(lokr.create_network(transformer, args={}).paths)
    assert len(paths) == count


def test_hunyuan_video_keeps_its_modulations_out() -> None:
    names = ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mod.linear", "single_blocks.1.modulation.linear")
    transformer = tree({name: nn.Linear(4, 4) for name in (*names, "single_blocks.1.linear1", "txt_in.linear1")})
    network = lora.create_network(transformer, args={})
    assert set(network.paths.values()) == {"double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"}


@pytest.mark.parametrize(
    ("module", "prefix", "wanted"),
    [
        (lora, "transformer_blocks.0.", "networks.lora: got a FramePack transformer; .*use networks.lora_framepack$"),
        (lora_framepack, "blocks.0.", "got a Wan transformer; .*use networks.lora_wan$"),
        (
            lora_wan,
            "transformer_blocks.0.",
            "got a FramePack transformer; expected a Wan .*use networks.lora_framepack$",
        ),
        (loha, "double_blocks.0.", "got a HunyuanVideo transformer; expected a FramePack or Wan .*use networks.lora$"),
        (lora, "layers.0.", "got a Module without known blocks; .*use networks.lora_framepack or networks.lora_wan$"),
    ],
)
def test_network_of_another_family_is_an_error_that_names_the_right_one(module, prefix: str, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        module.create_network(tree(small(prefix)), args={})


def test_wrapped_blocks_keep_their_published_paths() -> None:
    transformer = tree(small())
    plain = chosen(transformer)
    transformer.transformer_blocks.add_module("0", torch.compile(transformer.transformer_blocks.get_submodule("0")))
    assert chosen(transformer) == plain


def test_exclude_patterns_match_whole_paths_and_come_on_top_of_the_default() -> None:
    transformer = tree(small())
    assert chosen(transformer, exclude_patterns="['.*attn.*']") == {"transformer_blocks.0.ff.net.2"}
    assert chosen(transformer, exclude_patterns="['attn']") == chosen(transformer)
    assert chosen(transformer, exclude_patterns="[r'.*to_q', '.*ff.*']") == {"transformer_blocks.0.attn.to_k"}


def test_include_patterns_rescue_what_is_excluded_and_restrict_nothing() -> None:
    transformer = tree(small())
    assert chosen(transformer, include_patterns=r"[r'.*norm1\.linear']") == chosen(transformer) | {
        "transformer_blocks.0.norm1.linear"
    }
    assert chosen(transformer, include_patterns="['.*to_q']") == chosen(transformer)
    only = chosen(transformer, include_patterns="['.*to_q']", exclude_patterns="['.*']")
    assert only == {"transformer_blocks.0.attn.to_q"}


@pytest.mark.parametrize(
    ("key", "pattern", "wanted"),
    [("exclude", "['attn']", "matches no layer"), ("include", "['norm']", "matches no layer")]
    + [("include", "['.*to_q']", "add exclude_patterns=['.*']")],
)
def test_pattern_without_effect_is_reported(key: str, pattern: str, wanted: str, caplog) -> None:
    chosen(tree(small()), **{f"{key}_patterns": pattern})
    assert wanted in caplog.text


def test_patterns_with_effect_are_not_reported(caplog) -> None:
    chosen(tree(small()), exclude_patterns="['.*to_q']", include_patterns="['.*norm1.*']")
    assert not caplog.records


def test_excluding_everything_is_an_error() -> None:
    with pytest.raises(UserError, match="exclude all 5 layers.*such as transformer_blocks.0.attn.to_q"):
        chosen(tree(small()), exclude_patterns="['.*']")


def test_larger_convolutions_are_adapted_only_when_asked_for() -> None:
    layers = {"transformer_blocks.0.point": nn.Conv2d(4, 6, 1), "transformer_blocks.0.wide": nn.Conv3d(4, 6, (1, 3, 3))}
    transformer = tree(small() | layers)
    assert chosen(transformer) == chosen(tree(small())) | {"transformer_blocks.0.point"}
    network = lora_framepack.create_network(transformer, dim=3, alpha=1.5, args={"conv_dim": "8", "conv_alpha": "2"})
    ranks = {path: (adapter.rank, adapter.scale) for path, adapter in network.adapters.items()}
    assert ranks["transformer_blocks.0.point"] == (3, 0.5) and ranks["transformer_blocks.0.wide"] == (8, 0.25)


def test_layers_without_a_form_are_errors_that_name_them() -> None:
    point = tree(small() | {"transformer_blocks.0.point": nn.Conv2d(4, 6, 1)})
    for module, kind in ((loha, "LoHa"), (lokr, "LoKr")):
        with pytest.raises(UserError, match=f"transformer_blocks.0.point, a convolution, for {kind}"):
            module.create_network(point, args={})
    grouped = tree(small() | {"transformer_blocks.0.point": nn.Conv2d(4, 6, 1, groups=2)})
    with pytest.raises(UserError, match="transformer_blocks.0.point, a convolution in 2 groups"):
        lora_framepack.create_network(grouped, args={})


def test_defaults_are_rank_4_alpha_1_and_zero_alpha_is_the_rank() -> None:
    assert (parse().dim, parse().alpha) == (4, 1.0)
    assert parse(dim=16, alpha=0).alpha == 16
    arguments = parse(dim=16, alpha=8, conv_dim="4", conv_alpha="0")
    assert (arguments.dim, arguments.alpha, arguments.conv_dim, arguments.conv_alpha) == (16, 8.0, 4, 4)
    assert parse(conv_dim="4").conv_alpha == 1.0
    assert parse("LoKr").factor == -1 and parse("LoKr", factor="8").factor == 8


def test_scale_and_size_are_logged(caplog) -> None:
    caplog.set_level(logging.INFO)
    lora_framepack.create_network(tree(small()), dim=16, args={"verbose": "True"})
    assert "LoRA: 3 layers, 384 parameters, rank 16, alpha 1; scale alpha/rank: 0.0625" in caplog.text
    assert "LoRA on transformer_blocks.0.ff.net.2" in caplog.text


@pytest.mark.parametrize(
    ("kind", "key", "value", "wanted"),
    [
        ("LoRA", "rank_drop", "0.1", "got rank_drop; .*did you mean rank_dropout"),
        ("LoRA", "train_blocks", "double", "got train_blocks; expected one of conv_dim, "),
        ("LoRA", "factor", "4", "factor for LoRA; .*factor is for LoKr only"),
        ("LoHa", "conv_dim", "4", "conv_dim for LoHa; .*conv_dim is for LoRA only"),
        ("LoRA", "conv_alpha", "4", "conv_alpha=4 without conv_dim"),
        ("LoRA", "conv_dim", "0", "conv_dim: got 0; expected an integer above 0"),
        ("LoRA", "conv_dim", "4.5", "got 4.5; expected an integer"),
        ("LoRA", "rank_dropout", "1", "got 1; expected a chance from 0 to less than 1"),
        ("LoRA", "module_dropout", "nan", "got nan; expected a chance"),
        ("LoRA", "loraplus_lr_ratio", "0", "got 0; expected a number above 0"),
        ("LoRA", "loraplus_lr_ratio", "inf", "got inf; expected a number above 0"),
        ("LoRA", "verbose", "true", "got true; expected True or False"),
        ("LoKr", "factor", "0", "got 0; expected an integer above 0, or -1"),
        ("LoRA", "exclude_patterns", ".*norm.*", "a Python list of regular expressions"),
        ("LoRA", "exclude_patterns", "'.*norm.*'", "a Python list of regular expressions"),
        ("LoRA", "include_patterns", "[1]", "a Python list of regular expressions"),
        ("LoRA", "include_patterns", "['(unclosed']", r"valid regular expressions \('\(unclosed': missing \)"),
        ("LoRA", "include_patterns", "__import__('os').getcwd()", "a Python list of regular expressions"),
    ],
)
def test_arguments_that_cannot_be_are_named_with_the_rule(kind: str, key: str, value: str, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted) as caught:
        parse(kind, **{key: value})
    assert str(caught.value).startswith("--network_args")


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("dim", 0, "--network_dim: got 0"),
        ("dim", -4, "--network_dim: got -4"),
        ("alpha", -1.0, "--network_alpha: got -1.0"),
        ("alpha", float("nan"), "--network_alpha: got nan"),
        ("neuron_dropout", 1.0, "--network_dropout: got 1.0"),
    ],
)
def test_flags_that_cannot_be_are_named_with_the_rule(name: str, value: float, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        parse(**{name: value})


def test_options_without_effect_on_a_kind_are_reported(caplog) -> None:
    for module in (loha, lokr):
        network = module.create_network(tree(small()), neuron_dropout=0.1, args={"loraplus_lr_ratio": "4"})
        network.parameter_groups(1e-3)
    assert caplog.text.count("--network_dropout has no effect on") == 2
    assert caplog.text.count("loraplus_lr_ratio has no effect") == 2
