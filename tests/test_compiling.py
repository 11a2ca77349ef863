"""Compiled blocks give what they give as they are, in one piece each, and are not compiled again without need."""

import gc
import shlex
import sys
import weakref
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fpack_generate_video
import modules.compiling
from common.flags import parse
from frame_pack.architecture import FramePackArchitecture
from frame_pack.context import one_frame_context
from frame_pack.model import Conditioning, FramePackTransformer, guidance_input
from modules.attention import AttentionLayout, AttentionOptions, attend
from modules.checkpointing import Checkpointing
from modules.compiling import check_compiling, compile_blocks
from modules.execution import Execution
from networks.network import Network
from options.errors import UserError
from options.flags_compile import CACHE_SIZE_LIMIT, CompileChoice, check_compile
from options.flags_fpack_generate import FramePackGenerateFlags
from options.flags_fpack_train import FramePackTrainFlags
from options.one_frame import OneFrameOptions
from tests.training_builders import (
    EPOCH,
    NUM_BLOCKS,
    batch_of,
    build_network,
    build_objective,
    build_transformer,
    loss_and_gradients,
    one_frame_item,
    random,
    write_transformer,
)

CPU = torch.device("cpu")
LORA_TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Forgets what other tests have compiled, and their counts."""
    torch._dynamo.reset()
    counters.clear()


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def choice(backend: str = "eager", **changes) -> CompileChoice:
    return CompileChoice(flag="--compile", backend=backend, fullgraph=True, **changes)


def compiled(backend: str) -> FramePackTransformer:
    transformer = build_transformer()
    Execution(compiling=choice(backend)).apply_to(transformer)
    return transformer


# ---- generation ----


def conditioning(height: int, width: int) -> Conditioning:
    control = random(1, 16, 1, height, width, seed=1)
    parsed = OneFrameOptions.parse("target_index=9,control_index=0,no_2x,no_4x").resolve(1)
    return Conditioning(
        context=one_frame_context([control], [None], parsed, window=3, like=control),
        text=random(1, 9, 48, seed=2),
        text_mask=torch.ones(1, 9, dtype=torch.bool),
        pooled=random(1, 24, seed=3),
        image=random(1, 7, 36, seed=4),
        guidance=guidance_input(10.0, 1),
    )


def denoised(transformer: FramePackTransformer, height: int, width: int) -> list[Tensor]:
    """The velocities of four steps."""
    latents = random(1, 16, 1, height, width, seed=5)
    with torch.no_grad():
        prepared = transformer.prepare(conditioning(height, width), torch.tensor([[900.0], [700.0], [400.0], [100.0]]))
        return [transformer.step(latents, prepared, index) for index in range(4)]


def test_the_blocks_of_a_kind_share_one_graph_for_all_steps_and_a_second_for_all_sizes():
    transformer, plain = compiled("eager"), build_transformer()
    assert list(transformer.state_dict()) == list(plain.state_dict())
    for size, expected in {(6, 4): 2, (8, 4): 4, (10, 6): 4, (4, 12): 4}.items():
        for step, right in zip(denoised(transformer, *size), denoised(plain, *size), strict=True):
            assert torch.allclose(step, right, rtol=1e-5, atol=1e-6)
        assert num_graphs() == expected
    assert not counters["graph_break"]


# ---- training ----


def adapted(transformer: FramePackTransformer) -> tuple[FramePackTransformer, Network]:
    network = build_network(transformer)
    network.apply_to(transformer)
    transformer.checkpointing = Checkpointing(num_blocks=NUM_BLOCKS - 1)
    return transformer, network


def test_a_lora_that_comes_after_compiling_trains_as_without_and_leaves_nothing_when_it_goes():
    pairs = [adapted(compiled("aot_eager")), adapted(build_transformer())]
    unequal = batch_of({"猫": one_frame_item(1, length=4), "犬": one_frame_item(2)})
    (ours, gradients), (right, right_gradients) = (
        loss_and_gradients(build_objective(transformer), network, unequal) for transformer, network in pairs
    )
    assert torch.allclose(ours.losses, right.losses, rtol=LORA_TOLERANCE)
    for name, gradient in gradients.items():
        scale = right_gradients[name].abs().max()
        assert scale > 0 and (gradient - right_gradients[name]).abs().max() <= 1e-4 * scale, name
    assert not counters["graph_break"]

    before = num_graphs()
    again, _ = loss_and_gradients(build_objective(pairs[0][0]), pairs[0][1], unequal)
    assert torch.equal(again.losses, ours.losses) and num_graphs() == before

    losses = []
    for transformer, network in pairs:
        network.remove()
        losses.append(build_objective(transformer)(unequal, epoch=EPOCH).losses)
    assert torch.allclose(*losses, rtol=LORA_TOLERANCE)
    assert (losses[0] - ours.losses).abs().max() > 1e-3, "the adapters do something"


@pytest.mark.parametrize(
    "layout",
    [
        AttentionOptions().layout(torch.tensor([3, 5]), 5),
        AttentionOptions(split=True).layout(torch.tensor([3, 5]), 5),
        AttentionOptions(backend="flash").layout(torch.tensor([3, 5]), 5),
    ],
    ids=["mask", "split", "packed"],
)
def test_attention_of_unequal_lengths_is_compiled_in_one_piece(layout: AttentionLayout, monkeypatch):
    library = ModuleType("flash_attn")
    library.flash_attn_varlen_func = lambda q, k, v, **_: q + v
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    qkv = [random(2, 5, 2, 8, seed=seed) for seed in range(3)]
    ours = torch.compile(attend, backend="eager", fullgraph=True)(*qkv, layout)
    assert torch.allclose(ours, attend(*qkv, layout), atol=1e-6) and num_graphs() == 1


# ---- in the scripts ----


@pytest.fixture
def compiled_blocks(monkeypatch) -> list[tuple[int, str]]:
    """How many blocks were compiled by what, without doing it."""
    seen: list[tuple[int, str]] = []

    def record(blocks, choice) -> None:
        seen.append((len(list(blocks)), choice.backend))

    monkeypatch.setattr("modules.execution.compile_blocks", record)
    return seen


def test_training_runs_its_blocks_as_asked(compiled_blocks, tmp_path, caplog):
    argv = ["--dit", str(write_transformer(tmp_path / "変換器.safetensors"))]
    argv += ["--split_attn", "--compile", "--compile_backend", "eager"]
    architecture = FramePackArchitecture.open(parse(FramePackTrainFlags, description="", argv=argv))
    with caplog.at_level("INFO"):
        transformer = architecture.load_transformer(dtype=torch.float32, device=CPU)
    assert transformer.attention == AttentionOptions(split=True)
    assert compiled_blocks == [(NUM_BLOCKS, "eager")]
    assert sum("attention: PyTorch's own on cpu" in message for message in caplog.messages) == 1


def test_generation_runs_its_blocks_as_asked_and_records_it(compiled_blocks, demo_models):
    names = ("dit", "vae", "text_encoder1", "text_encoder2", "image_encoder")
    argv = [part for name in names for part in (f"--{name}", str(getattr(demo_models, name)))]
    argv += ["--device", "cpu", "--attn_mode", "sdpa", "--compile", "--compile_backend", "eager"]
    pipeline = fpack_generate_video.open_pipeline(parse(FramePackGenerateFlags, description="", argv=argv))
    assert compiled_blocks == [] and num_graphs() == 1, "the trial"
    with pipeline.denoiser():
        ((_, backend),) = compiled_blocks
    recorded = pipeline.provenance(with_paths=False).compute
    assert backend == "eager" and (recorded["attn_mode"], recorded["compile"]) == ("sdpa", True)


# ---- what compiling is told ----


class Doubling(nn.Module):
    """A block."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (2, 2), (8, 3)])
def test_no_more_forms_are_compiled_than_the_limit_says(limit, expected):
    block = Doubling()
    compile_blocks([block], CompileChoice(flag="--compile", backend="eager", dynamic=False, cache_size_limit=limit))
    for size in (3, 4, 5):
        assert torch.equal(block(torch.ones(size)), 2 * torch.ones(size))
    assert num_graphs() == expected


def test_hooks_of_a_block_stay_outside():
    block, seen = Doubling(), []
    block.register_forward_pre_hook(lambda *_: seen.append(torch.compiler.is_compiling()))
    compile_blocks([block], choice())
    block(torch.ones(3))
    assert seen == [False] and num_graphs() == 1


def test_compiled_blocks_are_freed_like_others():
    block = nn.Sequential(nn.Linear(4, 4))
    compile_blocks([block], choice())
    block(torch.ones(3, 4))
    weight = weakref.ref(block[0].weight)
    del block
    gc.collect()
    assert weight() is None and num_graphs() == 1


@pytest.mark.parametrize("flag", ["--compile", "--dynamo_backend"])
def test_a_backend_that_torch_does_not_have_is_told_with_those_that_it_has(flag):
    wrong = CompileChoice(flag=flag, backend="induktor")
    with pytest.raises(UserError) as error:
        check_compiling(wrong, AttentionOptions(), device=CPU, dtype=torch.float32)
    where = "--dynamo_backend" if flag == "--dynamo_backend" else "--compile_backend"
    line = str(error.value)
    assert line.startswith(f"{where}: got induktor; expected one of aot_eager, cudagraphs, eager, inductor, ")
    assert line.endswith("did you mean inductor?")


def test_a_trial_is_compiled_before_the_run():
    check_compiling(choice(), AttentionOptions(), device=CPU, dtype=torch.float32)
    assert num_graphs() == 1


@pytest.mark.parametrize(
    ("device", "backend", "remedy"),
    [
        ("cpu", "inductor", "install a C++ compiler (on Windows Visual Studio's), or leave --compile out"),
        ("cuda", "inductor", "install Triton (on Windows: pip install triton-windows), or leave --compile out"),
        ("cuda", "eager", "; leave --compile out"),
    ],
)
def test_a_backend_without_its_compiler_is_told_in_one_line(device, backend, remedy, monkeypatch):
    def fail(*_):
        raise RuntimeError("No working C++ compiler found\nin the path\n\nSet TORCHDYNAMO_VERBOSE=1 for more")

    monkeypatch.setattr(modules.compiling, "_try", fail)
    with pytest.raises(UserError) as error:
        check_compiling(choice(backend), AttentionOptions(), device=torch.device(device), dtype=torch.float32)
    line = str(error.value)
    assert line.startswith(f"--compile: got {backend}, which fails (RuntimeError: No working C++ compiler found in the")
    assert "\n" not in line and "TORCHDYNAMO" not in line and line.endswith(remedy)


CHOICES = {
    "": None,
    "--compile": {"flag": "--compile", "backend": "inductor", "mode": "default", "dynamic": None, "fullgraph": False},
    "--compile --compile_backend eager --compile_mode max-autotune": {"backend": "eager", "mode": "max-autotune"},
    "--compile --compile_dynamic true --compile_fullgraph": {"dynamic": True, "fullgraph": True},
    "--compile --compile_dynamic false": {"dynamic": False},
    "--compile --compile_dynamic auto": {"dynamic": None},
    "--compile --compile_cache_size_limit 5": {"cache_size_limit": 5},
}
DYNAMO_CHOICES = {
    "--dynamo_backend NO": None,
    "--dynamo_backend no --dynamo_fullgraph": None,
    "--dynamo_backend INDUCTOR": {"flag": "--dynamo_backend", "backend": "inductor", "mode": "default"},
    "--dynamo_backend AOT_EAGER --dynamo_mode reduce-overhead": {"backend": "aot_eager", "mode": "reduce-overhead"},
    "--dynamo_backend eager --dynamo_dynamic --dynamo_fullgraph": {"dynamic": True, "fullgraph": True},
    "--dynamo_backend EAGER --compile_cache_size_limit 5": {"dynamic": None, "cache_size_limit": 5},
    "--compile --dynamo_backend EAGER": {"flag": "--compile", "backend": "inductor"},
}


@pytest.mark.parametrize(("argv", "expected"), (CHOICES | DYNAMO_CHOICES).items(), ids=[*CHOICES, *DYNAMO_CHOICES])
def test_flags_say_how_to_compile(argv, expected):
    found = [parse(FramePackTrainFlags, description="", argv=shlex.split(argv)).compilation.choice]
    if argv in CHOICES:
        found.append(parse(FramePackGenerateFlags, description="", argv=shlex.split(argv)).compilation.choice)
    for ours in found:
        if expected is None:
            assert ours is None
        else:
            assert {name: getattr(ours, name) for name in expected} == expected
            assert ours.cache_size_limit == expected.get("cache_size_limit", CACHE_SIZE_LIMIT)


HINTS = {
    "": [],
    "--compile --compile_mode max-autotune": [],
    "--compile_mode max-autotune --compile_fullgraph": ["--compile_mode", "--compile_fullgraph"],
    "--dynamo_mode default": ["--dynamo_mode"],
    "--dynamo_backend EAGER --compile_cache_size_limit 3": [],
    "--dynamo_backend EAGER --compile_backend eager": ["--compile_backend"],
    "--compile --dynamo_backend EAGER --dynamo_dynamic": ["--dynamo_backend", "--dynamo_dynamic"],
}


@pytest.mark.parametrize(("argv", "expected"), HINTS.items(), ids=HINTS)
def test_what_has_no_effect_on_compiling_is_said(argv, expected):
    hints = list(parse(FramePackTrainFlags, description="", argv=shlex.split(argv)).compilation.hints())
    assert [hint.split()[0] for hint in hints] == expected and all("has no effect" in hint for hint in hints)


def test_generation_says_so_too_and_wants_a_limit_that_lets_something_be_compiled():
    flags = parse(FramePackGenerateFlags, description="", argv=["--compile_mode", "max-autotune"])
    check_compile(flags.compilation, swaps=True)
    assert list(flags.compilation.hints()) == ["--compile_mode has no effect without --compile"]
    wrong = parse(
        FramePackGenerateFlags, description="", argv=["--compile", "--compile_cache_size_limit", "0"]
    ).compilation
    with pytest.raises(UserError, match="--compile_cache_size_limit: got 0; expected 1 or more"):
        check_compile(wrong, swaps=False)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_recorded_graphs_are_refused_where_weights_come_and_go(mode):
    argv = ["--compile", "--compile_mode", mode, "--blocks_to_swap", "2"]
    flags = parse(FramePackGenerateFlags, description="", argv=argv).compilation
    check_compile(flags, swaps=False)
    with pytest.raises(UserError, match=f"--compile: got {mode} with --blocks_to_swap; .*max-autotune-no-cudagraphs"):
        check_compile(flags, swaps=True)
