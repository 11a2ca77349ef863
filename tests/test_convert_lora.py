"""`convert_lora.py`: exact there and back, and loaded by diffusers' own loader with the right strength."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import HunyuanVideoFramepackPipeline, HunyuanVideoFramepackTransformer3DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
from networks.lora_formats import read_lora
from networks.lora_keys import DOTTED_PREFIXES
from networks.lora_matching import match
from networks.lora_metadata import write_lora
from tests.diffusers_builders import build_small, small_shapes

WIDTH = 32
METADATA = {"ss_network_dim": "4", "ss_training_comment": "着せ替え", "modelspec.title": "one frame"}
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    return small_shapes()


def native_lora(shapes: Mapping, ranks: tuple[int, ...] = (4,), alphas: tuple[float, ...] = (1.0,)) -> Tensors:
    """A native file's tensors for all modules; ranks and alphas alternate."""
    tensors = {}
    for i, (module, (out, size, *kernel)) in enumerate(shapes.items()):
        name, rank = f"lora_unet_{module.replace('.', '_')}", ranks[i % len(ranks)]
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, size, *kernel) / size
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, rank, *[1] * len(kernel))
        tensors[f"{name}.alpha"] = torch.tensor(alphas[i % len(alphas)])
    return tensors


def native_loha(shapes: Mapping, alpha: float = 1.0) -> Tensors:
    tensors = {}
    for module, (out, size) in linear(shapes).items():
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{name}.hada_w{i}_a": torch.randn(out, 3) for i in (1, 2)}
        tensors |= {f"{name}.hada_w{i}_b": torch.randn(3, size) for i in (1, 2)}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def native_lokr(shapes: Mapping, alpha: float = 1.0, rank: int = 2) -> Tensors:
    """As the trainer makes it with `factor=4`; every third second factor is whole, its alpha its rank."""
    tensors = {}
    for i, (module, (out, size)) in enumerate(linear(shapes).items()):
        name, longest = f"lora_unet_{module.replace('.', '_')}", max(out, size) // 4
        tensors[f"{name}.lokr_w1"] = torch.randn(4, 4) / size**0.5
        if i % 3:
            tensors[f"{name}.lokr_w2_a"] = torch.randn(out // 4, rank)
            tensors[f"{name}.lokr_w2_b"] = torch.randn(rank, size // 4)
        else:
            tensors[f"{name}.lokr_w2"] = torch.randn(out // 4, size // 4)
        tensors[f"{name}.alpha"] = torch.tensor(alpha if i % 3 else float(longest))
    return tensors


def linear(shapes: Mapping) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in shapes.items() if len(shape) == 2 and "blocks" in name}


def run(source: Path, output: Path, target: str, prefix: str | None = None) -> int:
    extra = [] if prefix is None else ["--diffusers_prefix", prefix]
    return convert_lora.main(["--input", str(source), "--output", str(output), "--target", target, *extra])


def converted(source: Path, name: str, target: str, prefix: str | None = None) -> Path:
    output = source.with_name(name)
    assert run(source, output, target, prefix) == 0
    return output


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="np") as file:
        return file.metadata()


# ---- there and back ----

PREFIXES = [None, "transformer", ""]
LORAS = {
    "as the trainer writes it": {"ranks": (4,), "alphas": (1.0,)},
    "scale 1": {"ranks": (4,), "alphas": (4.0,)},
    "several ranks": {"ranks": (4, 2, 4), "alphas": (1.0, 4.0)},
    "thirds": {"ranks": (6, 3), "alphas": (1.0, 4.0)},
    "mixed": {"ranks": (4, 6, 3, 8), "alphas": (0.3, 8.0, 5.0)},
    "alpha 0": {"ranks": (4,), "alphas": (0.0, 1.0)},
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", LORAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_lora_comes_back_byte_for_byte(prefix, name, dtype, shapes, tmp_path: Path) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in native_lora(shapes, **LORAS[name]).items()}
    source = tmp_path / "和風 LoRA.safetensors"
    write_lora(source, tensors, METADATA)
    other = converted(source, "other.safetensors", "other", prefix)
    assert not any(key.startswith("lora_unet_") for key in load_file(other))
    assert converted(other, "back.safetensors", "default").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("make", [native_loha, native_lokr])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loha_and_lokr_come_back_byte_for_byte(prefix, make, dtype, shapes, tmp_path: Path) -> None:
    source = tmp_path / "native.safetensors"
    write_lora(source, {key: tensor.to(dtype) for key, tensor in make(shapes).items()}, METADATA)
    other = converted(source, "other.safetensors", "other", prefix)
    assert converted(other, "back.safetensors", "default").read_bytes() == source.read_bytes()


def test_tiny_half_precision_numbers_survive_the_folded_scale(shapes, tmp_path: Path) -> None:
    """1/32 of them is no float16 any more."""
    tensors = {k: t.half() for k, t in native_lora(shapes, ranks=(32,)).items()}
    tensors = {k: (t / 4096 if k.endswith("lora_up.weight") else t).contiguous() for k, t in tensors.items()}
    source = tmp_path / "native.safetensors"
    write_lora(source, tensors, METADATA)
    other = converted(source, "other.safetensors", "other", "transformer")
    dtypes = {t.dtype for k, t in load_file(other).items() if k.endswith("lora_B.weight")}
    assert dtypes == {torch.float32}
    assert converted(other, "back.safetensors", "default").read_bytes() == source.read_bytes()


def test_other_comes_back_too(shapes, tmp_path: Path) -> None:
    """From what diffusers users have: no alphas, scale 1."""
    tensors = {f"transformer.{name}.lora_A.weight": torch.randn(4, size) for name, (_, size) in linear(shapes).items()}
    tensors |= {f"transformer.{name}.lora_B.weight": torch.randn(out, 4) for name, (out, _) in linear(shapes).items()}
    source = tmp_path / "theirs.safetensors"
    save_file(tensors, source)
    native = converted(source, "native.safetensors", "default")
    alphas = {float(tensor) for key, tensor in load_file(native).items() if key.endswith(".alpha")}
    assert alphas == {4.0}
    back = load_file(converted(native, "back.safetensors", "other", "transformer"))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_the_same_command_writes_the_same_bytes(shapes, tmp_path: Path) -> None:
    source = tmp_path / "native.safetensors"
    write_lora(source, native_lora(shapes, **LORAS["mixed"]), METADATA)
    first = converted(source, "1.safetensors", "other", "transformer")
    assert converted(source, "2.safetensors", "other", "transformer").read_bytes() == first.read_bytes()


def test_metadata_is_copied_and_hashes_are_made_anew(shapes, tmp_path: Path) -> None:
    source = tmp_path / "native.safetensors"
    write_lora(source, native_lora(shapes), METADATA)
    other = converted(source, "other.safetensors", "other")
    before, after = metadata_of(source), metadata_of(other)
    assert {key: after[key] for key in METADATA} == METADATA
    assert before.keys() == after.keys()
    assert before["sshs_model_hash"] != after["sshs_model_hash"]
    write_lora(tmp_path / "fresh.safetensors", load_file(other), METADATA)
    assert metadata_of(tmp_path / "fresh.safetensors") == after


# ---- names ----


@pytest.mark.parametrize(
    ("module", "native"),
    [
        ("transformer_blocks.17.attn.to_out.0", "transformer_blocks_17_attn_to_out_0"),
        ("transformer_blocks.0.attn.add_k_proj", "transformer_blocks_0_attn_add_k_proj"),
        ("transformer_blocks.3.ff.net.0.proj", "transformer_blocks_3_ff_net_0_proj"),
        ("transformer_blocks.3.ff_context.net.2", "transformer_blocks_3_ff_context_net_2"),
        ("single_transformer_blocks.39.attn.to_q", "single_transformer_blocks_39_attn_to_q"),
        ("single_transformer_blocks.3.proj_mlp", "single_transformer_blocks_3_proj_mlp"),
        ("single_transformer_blocks.0.norm.linear", "single_transformer_blocks_0_norm_linear"),
    ],
)
@pytest.mark.parametrize("prefix", [None, "transformer"])
def test_names_are_the_models_own(module: str, native: str, prefix: str | None, tmp_path: Path) -> None:
    source = tmp_path / "native.safetensors"
    parts = {"lora_down.weight": torch.ones(4, 8), "lora_up.weight": torch.ones(8, 4), "alpha": torch.tensor(2.0)}
    save_file({f"lora_unet_{native}.{part}": tensor for part, tensor in parts.items()}, source)
    start = f"{prefix or 'diffusion_model'}.{module}"
    names = {f"{start}.lora_A.weight", f"{start}.lora_B.weight"} | ({f"{start}.alpha"} if prefix is None else set())
    tensors = load_file(converted(source, "other.safetensors", "other", prefix))
    assert set(tensors) == names
    assert float(tensors[f"{start}.lora_B.weight"][0, 0]) == (1.0 if prefix is None else 0.5)


def test_hunyuan_video_becomes_framepack(tmp_path: Path) -> None:
    source = tmp_path / "hunyuan.safetensors"
    down, up = torch.randn(4, WIDTH), torch.randn(7 * WIDTH, 4)
    save_file({"single_blocks.5.linear1.lora_A.weight": down, "single_blocks.5.linear1.lora_B.weight": up}, source)
    tensors = load_file(converted(source, "native.safetensors", "default"))
    starts = {"attn_to_q": 0, "attn_to_k": 32, "attn_to_v": 64, "proj_mlp": 96}
    assert len(tensors) == 3 * len(starts)
    for part, start in starts.items():
        name = f"lora_unet_single_transformer_blocks_5_{part}"
        rows = up[start : start + 32] if part != "proj_mlp" else up[start:]
        assert torch.equal(tensors[f"{name}.lora_up.weight"], rows)
        assert torch.equal(tensors[f"{name}.lora_down.weight"], down)
        assert float(tensors[f"{name}.alpha"]) == 4


# ---- diffusers ----


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {
        "hidden_states": torch.randn(1, 16, 3, 4, 6),
        "timestep": torch.tensor([613.0]),
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
        "pooled_projections": torch.randn(1, 20),
        "image_embeds": torch.randn(1, 7, 28),
        "guidance": torch.tensor([9984.0]),
        "indices_latents": torch.arange(3),
        "latents_clean": torch.randn(1, 16, 2, 4, 6),
        "indices_latents_clean": torch.tensor([0, 4]),
        "latents_history_2x": torch.randn(1, 16, 2, 4, 6),
        "indices_latents_history_2x": torch.tensor([5, 6]),
        "latents_history_4x": torch.randn(1, 16, 16, 4, 6),
        "indices_latents_history_4x": torch.arange(7, 23),
    }


def merged_by_hand(source: Path) -> HunyuanVideoFramepackTransformer3DModel:
    transformer = build_small()
    weights = transformer.state_dict()
    matched = match(read_lora(source, flag="--lora_weight"), {name: tuple(w.shape) for name, w in weights.items()})
    assert matched.unmatched == ()
    for name, factors in matched.factors.items():
        weights[name] += factors.delta(weights[name].shape)
    return transformer


def load_by_pipeline(transformer: HunyuanVideoFramepackTransformer3DModel, file: Path) -> None:
    rest = ("text_encoder", "tokenizer", "vae", "scheduler", "text_encoder_2", "tokenizer_2", "image_encoder")
    pipeline = HunyuanVideoFramepackPipeline(transformer=transformer, feature_extractor=None, **dict.fromkeys(rest))
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)


def load_by_transformer(transformer: HunyuanVideoFramepackTransformer3DModel, file: Path) -> None:
    transformer.load_lora_adapter(str(file))


def load_by_transformer_with_metadata(transformer: HunyuanVideoFramepackTransformer3DModel, file: Path) -> None:
    transformer.load_lora_adapter(str(file), use_safetensors=True)


def load_tensors(transformer: HunyuanVideoFramepackTransformer3DModel, file: Path) -> None:
    transformer.load_lora_adapter(load_file(file))


ALL_WAYS = [load_by_pipeline, load_by_transformer, load_by_transformer_with_metadata, load_tensors]
WITH_METADATA = [load_by_pipeline, load_by_transformer_with_metadata]


@torch.no_grad()
def assert_diffusers_agrees(source: Path, load, num_modules: int) -> None:
    other = converted(source, "other.safetensors", "other", "transformer")
    transformer, plain, by_hand = build_small(), build_small(), merged_by_hand(source)
    load(transformer, other)
    assert sum(isinstance(m, BaseTunerLayer) for m in transformer.modules()) == num_modules
    theirs, ours, base = (model(**inputs(), return_dict=False)[0] for model in (transformer, by_hand, plain))
    size = ours.abs().max()
    assert (theirs - ours).abs().max() <= 1e-5 * size
    assert (ours - base).abs().max() > 0.05 * size


@pytest.mark.parametrize("load", ALL_WAYS)
@pytest.mark.parametrize("name", ["as the trainer writes it", "scale 1", "several ranks"])
def test_diffusers_loads_it_with_the_right_strength(name: str, load, shapes, tmp_path: Path) -> None:
    source = tmp_path / "native.safetensors"
    write_lora(source, native_lora(shapes, **LORAS[name]), METADATA)
    assert_diffusers_agrees(source, load, len(shapes))


@pytest.mark.parametrize("load", WITH_METADATA)
@pytest.mark.parametrize("name", ["thirds", "mixed"])
def test_diffusers_takes_scales_that_cannot_be_folded_from_the_metadata(name, load, shapes, tmp_path: Path) -> None:
    source = tmp_path / "native.safetensors"
    write_lora(source, native_lora(shapes, **LORAS[name]), METADATA)
    assert_diffusers_agrees(source, load, len(shapes))


def test_a_scale_that_not_every_loader_sees_is_warned_about(shapes, tmp_path: Path, caplog) -> None:
    write_lora(tmp_path / "a.safetensors", native_lora(shapes), METADATA)
    converted(tmp_path / "a.safetensors", "b.safetensors", "other", "transformer")
    assert "use_safetensors=True" not in caplog.text
    write_lora(tmp_path / "a.safetensors", native_lora(shapes, **LORAS["thirds"]), METADATA)
    converted(tmp_path / "a.safetensors", "b.safetensors", "other", "transformer")
    assert "use_safetensors=True" in caplog.text


@pytest.mark.parametrize("load", [load_by_transformer, load_by_transformer_with_metadata])
@pytest.mark.parametrize("alpha", [1.0, 1.3])
def test_diffusers_loads_a_lokr_with_the_right_strength(alpha: float, load, shapes, tmp_path: Path) -> None:
    source = tmp_path / "native.safetensors"
    write_lora(source, native_lokr(shapes, alpha), METADATA)
    assert_diffusers_agrees(source, load, len(linear(shapes)))


def test_a_lokr_scale_that_is_no_power_of_two_comes_back_to_the_last_bit_but_one(shapes, tmp_path: Path) -> None:
    source = tmp_path / "native.safetensors"
    write_lora(source, native_lokr(shapes, 1.3), METADATA)
    other = converted(source, "other.safetensors", "other", "transformer")
    back, before = load_file(converted(other, "back.safetensors", "default")), load_file(source)
    for key, tensor in before.items():
        torch.testing.assert_close(back[key], tensor, rtol=2e-7, atol=0)


@pytest.mark.parametrize("make", [native_lora, native_loha, native_lokr])
@pytest.mark.parametrize("prefix", [None, "transformer"])
def test_an_alpha_of_zero_does_the_same_in_both_spellings_and_keeps_its_bytes(make, prefix, shapes, tmp_path) -> None:
    source = tmp_path / "native.safetensors"
    tensors = {key: t * 0 if key.endswith(".alpha") else t for key, t in make(shapes).items()}
    write_lora(source, tensors, METADATA)
    other = converted(source, "other.safetensors", "other", prefix)
    ours, theirs = (read_lora(file, flag="--lora_weight").modules for file in (source, other))
    assert all(torch.equal(theirs[name].delta(), factors.delta()) for name, factors in ours.items())
    assert all(factors.delta().any() for factors in ours.values())
    assert converted(other, "back.safetensors", "default").read_bytes() == source.read_bytes()


def test_diffusers_does_not_load_loha_and_we_say_so(shapes, tmp_path: Path, caplog) -> None:
    write_lora(tmp_path / "a.safetensors", native_loha(shapes), METADATA)
    converted(tmp_path / "a.safetensors", "b.safetensors", "other", "transformer")
    assert "diffusers loads LoRA and LoKr, not loha" in caplog.text


# ---- a record that does not fit ----


RECORD = {"alpha": 2.0, "alpha_dtype": "float32", "dtype": "float32", "folded": 0.5, "rank": 4}
RECORDS = ["{", "[]", '{"": {"rank": 4}}', '{"": 3}', '{"": {"rank": 8, "folded": 0.5}}']
RECORDS += [json.dumps({"": RECORD | {"dtype": name}}) for name in ("save", "int8", "bool", "float4_e2m1fn_x2", "nn")]
RECORDS += [json.dumps({"": RECORD | {"alpha_dtype": name}}) for name in ("save", "bool", "float4_e2m1fn_x2")]


def test_the_record_in_these_tests_is_one_that_counts(tmp_path: Path) -> None:
    up, down = torch.randn(8, 4), torch.randn(4, 8)
    tensors = {"transformer.proj_out.lora_A.weight": down, "transformer.proj_out.lora_B.weight": up}
    save_file(tensors, tmp_path / "a.safetensors", {"oneframe_folded_scales": json.dumps({"": RECORD})})
    (factors,) = read_lora(tmp_path / "a.safetensors", flag="--lora_weight").modules.values()
    assert torch.equal(factors.tensors["lora_up.weight"], up * 2) and float(factors.alpha) == 2


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_of_another_file_changes_no_delta(record: str, tmp_path: Path) -> None:
    up, down = torch.randn(8, 4), torch.randn(4, 8)
    tensors = {"transformer.proj_out.lora_A.weight": down, "transformer.proj_out.lora_B.weight": up}
    save_file(tensors, tmp_path / "a.safetensors", {"oneframe_folded_scales": record})
    lora = read_lora(tmp_path / "a.safetensors", flag="--lora_weight")
    assert torch.equal(lora.modules["lora_unet_proj_out"].delta(), up @ down)


def test_a_record_is_passed_over_when_another_program_has_added_an_alpha(shapes, tmp_path: Path) -> None:
    """The factors still hold the folded scale; taking it out would need another alpha than the file has now."""
    write_lora(tmp_path / "native.safetensors", native_lora(shapes), METADATA)
    other = converted(tmp_path / "native.safetensors", "other.safetensors", "other", "transformer")
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    tensors = load_file(other) | {f"{name}.alpha": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata_of(other))
    checked, read = (
        read_lora(tmp_path / "theirs.safetensors", flag="--lora_weight", shapes_only=b) for b in (True, False)
    )
    assert checked.modules.keys() == read.modules.keys()
    delta = read.modules["lora_unet_single_transformer_blocks_0_attn_to_q"].delta()
    torch.testing.assert_close(delta, tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] * 3 / 4)


# ---- what is refused ----


@pytest.fixture
def source(shapes, tmp_path: Path) -> Path:
    path = tmp_path / "native.safetensors"
    write_lora(path, native_lora(shapes), METADATA)
    return path


def complaint(capsys) -> str:
    text = capsys.readouterr().err.splitlines()[-1]
    assert "Traceback" not in text
    return text


def test_the_input_is_not_overwritten(source: Path, capsys, monkeypatch) -> None:
    before = source.read_bytes()
    monkeypatch.chdir(source.parent)
    for name in (str(source), source.name, f"../{source.parent.name}/{source.name}"):
        assert run(source, name, "other") == 2
        assert complaint(capsys).startswith("--output: got")
    assert source.read_bytes() == before


def test_an_existing_output_is_replaced_whole(source: Path) -> None:
    output = source.with_name("other.safetensors")
    output.write_bytes(b"old")
    converted(source, output.name, "other")
    assert load_file(output)
    assert sorted(os.listdir(source.parent)) == ["native.safetensors", "other.safetensors"]


def test_the_file_in_a_folder_of_peft_is_not_overwritten(shapes, tmp_path: Path, capsys) -> None:
    source = tmp_path / "adapter_model.safetensors"
    write_lora(source, native_lora(shapes), METADATA)
    before = source.read_bytes()
    assert run(tmp_path, source, "other") == 2
    assert complaint(capsys).startswith("--output: got") and source.read_bytes() == before
    assert run(tmp_path, tmp_path / "other.safetensors", "other") == 0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_full_disk_is_one_line(error: Exception, source: Path, capsys, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    assert run(source, source.with_name("出力.safetensors"), "other") == 2
    line = complaint(capsys)
    assert line.startswith("--output: got ") and "出力.safetensors" in line and "No space left" in line
    assert os.listdir(source.parent) == [source.name]


@pytest.mark.parametrize("prefix", [known.rstrip(".") for known in DOTTED_PREFIXES])
def test_files_behind_every_accepted_prefix_can_be_read_back(prefix: str, source: Path) -> None:
    other = converted(source, "other.safetensors", "other", prefix)
    assert all(key.startswith(f"{prefix}.") for key in load_file(other))
    assert converted(other, "back.safetensors", "default").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("prefix", ["foo.bar", "lora_unet_", "transfomer"])
def test_prefixes_that_we_could_not_read_back_are_refused(prefix: str, source: Path, capsys) -> None:
    output = source.with_name("other.safetensors")
    assert run(source, output, "other", prefix) == 2
    line = complaint(capsys)
    assert line.startswith(f"--diffusers_prefix: got {prefix}; expected one of") and not output.exists()
    assert ("did you mean transformer?" in line) == (prefix == "transfomer")
    assert run(source, output, "default", prefix) == 0


def test_only_what_is_shared_is_copied(shapes, source: Path, monkeypatch) -> None:
    """Parts of a fused module have their first factor in common, which the format refuses."""
    copies, original = [], torch.Tensor.clone

    def counted(tensor: Tensor, *arguments, **options) -> Tensor:
        copies.append(tensor.shape)
        return original(tensor, *arguments, **options)

    fused = source.with_name("fused.safetensors")
    down, up = torch.randn(4, WIDTH), torch.randn(3 * WIDTH, 4)
    save_file({"double_blocks.0.img_attn_qkv.lora_A": down, "double_blocks.0.img_attn_qkv.lora_B": up}, fused)
    monkeypatch.setattr(torch.Tensor, "clone", counted)
    converted(source, "other.safetensors", "other")
    assert copies == []
    converted(fused, "native.safetensors", "default")
    assert copies == [down.shape, down.shape]


@pytest.mark.parametrize("name", ["other.pt", "other", "folder.safetensors"])
def test_outputs_that_nobody_could_load_are_refused(name: str, source: Path, capsys) -> None:
    source.with_name("folder.safetensors").mkdir()
    assert run(source, source.with_name(name), "other") == 2
    assert complaint(capsys).startswith("--output: got")


def test_a_wrong_target_and_a_missing_input_are_named(source: Path, capsys) -> None:
    assert run(source, source.with_name("b.safetensors"), "defualt") == 2
    assert "did you mean default?" in complaint(capsys)
    assert run(source.with_name("none.safetensors"), source.with_name("b.safetensors"), "default") == 2
    assert complaint(capsys).startswith("--input: got")


def test_rows_of_a_lokr_without_factors_are_refused(tmp_path: Path, capsys) -> None:
    tensors = {"lora_unet_single_blocks_0_linear1.lokr_w1": torch.ones(4, 4)}
    tensors["lora_unet_single_blocks_0_linear1.lokr_w2"] = torch.ones(56, 8)
    save_file(tensors, tmp_path / "a.safetensors")
    for target in ("default", "other"):
        assert run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", target) == 2
        assert "lora_unet_single_blocks_0_linear1.lokr_w1" in complaint(capsys)
    assert not (tmp_path / "b.safetensors").exists()


def test_what_is_not_converted_is_named(source: Path, caplog) -> None:
    stray = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}
    save_file(load_file(source) | stray, source.with_name("more.safetensors"))
    converted(source.with_name("more.safetensors"), "b.safetensors", "other")
    assert "not converted: 1 tensors, lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha first" in caplog.text


def test_the_configuration_names_every_module_once(shapes, tmp_path: Path) -> None:
    """A top-level `proj_out` must not stand for those of the single blocks too."""
    write_lora(tmp_path / "a.safetensors", native_lora(shapes, **LORAS["mixed"]), METADATA)
    other = converted(tmp_path / "a.safetensors", "b.safetensors", "other", "transformer")
    config = json.loads(metadata_of(other)["lora_adapter_metadata"])
    for pattern in config["transformer.rank_pattern"]:
        assert [name for name in shapes if re.match(rf"(.*\.)?({pattern})$", name)] == [pattern.removeprefix("^")]
