"""Every way to attend gives what the formula gives; libraries are stood in for by plain mathematics in their place."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from frame_pack.compute import Compute
from modules.attention import PLAIN, AttentionLayout, AttentionOptions, attend, check_attention, describe, try_attention
from modules.execution import Execution
from options.errors import UserError
from options.flags_fpack_generate import FramePackComputeFlags
from tests.training_builders import (
    NUM_BLOCKS,
    batch_of,
    build_network,
    build_objective,
    build_transformer,
    loss_and_gradients,
    one_frame_item,
)

BATCH, TOTAL, HEADS, HEAD_DIM = 3, 7, 2, 8
LIBRARIES = ["flash", "flash3", "xformers", "sageattn"]
LENGTHS = {"equal": [7, 7, 7], "unequal": [4, 6, 1]}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOLERANCE = 1e-5


def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(L, N, D) of one sample, in float64."""
    scores = torch.einsum("qnd,knd->nqk", query.double(), key.double()) / query.shape[-1] ** 0.5
    return torch.einsum("nqk,knd->qnd", scores.softmax(dim=-1), value.double()).to(query.dtype)


def each(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, L, N, D)."""
    return torch.stack([formula(*sample) for sample in zip(query, key, value, strict=True)])


@dataclass
class StandIns:
    """The four libraries, as far as they are used, with the signatures that they have."""

    calls: list[str] = field(default_factory=list)
    fails: bool = False
    is_wrong: bool = False

    def whole(self, name: str, *qkv: Tensor) -> Tensor:
        self.calls.append(name)
        if self.fails:
            raise RuntimeError("no kernel image is available\nfor execution")
        assert all(x.ndim == 4 and x.stride(-1) == 1 for x in qkv)
        return each(*qkv) * (0.5 if self.is_wrong else 1)

    def packed(self, name: str, starts: Tensor, longest: int, *qkv: Tensor) -> Tensor:
        self.calls.append(name)
        assert starts.dtype == torch.int32 and all(x.ndim == 3 and x.stride(-1) == 1 for x in qkv)
        bounds = starts.tolist()
        sizes = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
        assert bounds[0] == 0 and bounds[-1] == len(qkv[0]) and longest == max(sizes)
        return torch.cat([formula(*sample) for sample in zip(*(x.split(sizes) for x in qkv), strict=True)])


@pytest.fixture
def stand_ins(monkeypatch) -> StandIns:
    found = StandIns()
    for name, functions in _modules(found).items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    return found


class BlockDiagonalMask:
    """xformers' description of samples end to end."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.device = sizes, None

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None):
        assert isinstance(q_seqlen, list)
        return cls(q_seqlen)

    def to(self, device):
        self.device = device
        return self


def _modules(found: StandIns) -> dict[str, dict[str, Any]]:
    def flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        return found.whole("flash", q, k, v)

    def flash_packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        return found.packed("flash packed", cu_seqlens_q, max_seqlen_q, q, k, v)

    def flash3(q, k, v, softmax_scale=None, causal=False):
        return found.whole("flash3", q, k, v), torch.zeros(1)  # as older versions answer

    def flash3_packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, causal=False
    ):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        return found.packed("flash3 packed", cu_seqlens_q, max_seqlen_q, q, k, v)

    def sage(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
        assert tensor_layout == "NHD"
        return found.whole("sageattn", q, k, v)

    def sage_packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=False, sm_scale=None, smooth_k=True
    ):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        return found.packed("sageattn packed", cu_seqlens_q, max_seqlen_q, q, k, v)

    return {
        "flash_attn": {"flash_attn_func": flash, "flash_attn_varlen_func": flash_packed},
        "flash_attn_interface": {"flash_attn_func": flash3, "flash_attn_varlen_func": flash3_packed},
        **_xformers(found),
        "sageattention": {"sageattn": sage, "sageattn_varlen": sage_packed},
    }


def _xformers(found: StandIns) -> dict[str, dict[str, Any]]:
    def xformers(query, key, value, attn_bias=None, p=0.0, scale=None):
        if attn_bias is None:
            return found.whole("xformers", query, key, value)
        assert len(query) == 1 and attn_bias.device == query.device
        starts = torch.tensor([0, *attn_bias.sizes]).cumsum(0).int()
        return found.packed("xformers packed", starts, max(attn_bias.sizes), query[0], key[0], value[0])[None]

    return {
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": xformers},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": BlockDiagonalMask},
    }


def tokens(batch: int = BATCH, total: int = TOTAL, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(batch, total, HEADS, HEAD_DIM, generator=generator) for _ in range(3))


def valid_parts(attended: Tensor, lengths: list[int]) -> Iterator[Tensor]:
    for sample, length in zip(attended, lengths, strict=True):
        yield sample[:length]


# ---- one function ----


@pytest.mark.parametrize("backend", ["sdpa", *LIBRARIES])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_valid_tokens_attend_valid_tokens_as_the_formula_says(backend, split, name, stand_ins):
    qkv, lengths = tokens(), LENGTHS[name]
    layout = AttentionOptions(backend=backend, split=split).layout(torch.tensor(lengths), TOTAL)
    attended = attend(*qkv, layout)
    assert attended.shape == (BATCH, TOTAL, HEADS * HEAD_DIM) and bool(attended.isfinite().all())
    for number, part in enumerate(valid_parts(attended, lengths)):
        right = formula(*(x[number, : lengths[number]] for x in qkv)).flatten(1)
        assert torch.allclose(part, right, rtol=TOLERANCE, atol=TOLERANCE)
    if backend == "sdpa":
        assert stand_ins.calls == []
    elif split:
        assert stand_ins.calls == [backend] * BATCH
    else:
        assert stand_ins.calls == [backend if name == "equal" else f"{backend} packed"]


@pytest.mark.parametrize("backend", ["sdpa", *LIBRARIES])
def test_queries_and_keys_may_differ_in_number(backend, stand_ins):
    query, (_, key, value) = tokens(total=5)[0], tokens(total=9, seed=1)
    attended = attend(query, key, value, AttentionLayout(backend=backend))
    assert torch.allclose(attended, each(query, key, value).flatten(2), rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.allclose(attend(query, key, value), attended, atol=TOLERANCE)


@pytest.mark.parametrize("split", [False, True])
def test_one_sample_needs_neither_mask_nor_packing_nor_splitting(split):
    assert AttentionOptions(split=split).layout(torch.tensor([TOTAL]), TOTAL) == PLAIN
    options = AttentionOptions(backend="flash", split=split)
    assert options.layout(torch.tensor([TOTAL]), TOTAL) == AttentionLayout(backend="flash")


@pytest.mark.parametrize("options", [AttentionOptions(backend=name) for name in LIBRARIES[:3]], ids=LIBRARIES[:3])
def test_gradients_come_back_through_the_packing(options, stand_ins):
    lengths = torch.tensor(LENGTHS["unequal"])
    valid = torch.arange(TOTAL) < lengths[:, None]
    found = []
    for choice in (AttentionOptions(), options):
        qkv = [x.requires_grad_() for x in tokens()]
        attended = attend(*qkv, choice.layout(lengths, TOTAL))
        attended[valid].square().sum().backward()
        found.append([x.grad for x in qkv])
    for right, ours in zip(*found, strict=True):
        assert torch.allclose(ours, right, rtol=1e-4, atol=1e-4) and bool(right.any())
        assert not ours[~valid].any()


# ---- in the transformer ----


def batch():
    return batch_of({"猫": one_frame_item(1, length=4), "犬": one_frame_item(2)})


@pytest.fixture(scope="module")
def trained() -> tuple:
    """Losses and gradients with PyTorch's own attention."""
    return _train(AttentionOptions())


def _train(options: AttentionOptions) -> tuple:
    transformer = build_transformer()
    network = build_network(transformer)
    network.apply_to(transformer)
    Execution(attention=options).apply_to(transformer)
    return loss_and_gradients(build_objective(transformer), network, batch())


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", *LIBRARIES[:3]])
def test_a_training_step_on_texts_of_unequal_length_is_the_same_with_each(backend, split, trained, stand_ins):
    result, gradients = _train(AttentionOptions(backend=backend, split=split))
    right, right_gradients = trained
    assert torch.allclose(result.losses, right.losses, rtol=TOLERANCE)
    for name, gradient in gradients.items():
        scale = right_gradients[name].abs().max()
        assert (gradient - right_gradients[name]).abs().max() <= 1e-4 * scale + 1e-7, name
    kind = [backend] * 2 if split else [f"{backend} packed"]
    assert stand_ins.calls == ([] if backend == "sdpa" else kind * NUM_BLOCKS)


def test_sage_predicts_what_pytorch_does(trained, stand_ins):
    transformer = build_transformer()
    transformer.attention = AttentionOptions(backend="sageattn")
    other = build_transformer()
    with torch.no_grad():
        losses = [build_objective(model)(batch(), epoch=1).losses for model in (transformer, other)]
    assert torch.allclose(*losses, rtol=TOLERANCE)
    assert stand_ins.calls == ["sageattn packed"] * NUM_BLOCKS, "and the other model has its own attention"


# ---- what cannot work ----


def complaint(backend: str, *, device=CUDA, dtype=torch.bfloat16, training: bool = False) -> str:
    options = AttentionOptions(backend=backend)
    with pytest.raises(UserError) as error:
        check_attention(options, device=device, dtype=dtype, flag="--attn_mode", training=training)
    assert "\n" not in str(error.value) and str(error.value).startswith("--attn_mode: got ")
    return str(error.value)


@pytest.mark.parametrize("backend", LIBRARIES)
def test_libraries_need_a_gpu(backend):
    assert "on a CPU; expected a GPU; leave it out" in complaint(backend, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("backend", ["flash", "flash3", "sageattn"])
def test_half_precision_is_asked_for_where_there_is_nothing_else(backend):
    line = complaint(backend, dtype=torch.float32)
    assert "with float32; expected bfloat16 or float16; use --dit_dtype bfloat16" in line


@pytest.mark.parametrize(
    ("backend", "module", "install"),
    [
        ("flash", "flash_attn", "pip install flash-attn --no-build-isolation"),
        ("flash3", "flash_attn_interface", "hopper"),
        ("xformers", "xformers.ops", "pip install xformers"),
        ("sageattn", "sageattention", "pip install sageattention"),
    ],
)
def test_what_is_not_installed_is_named_with_the_way_to_get_it(backend, module, install, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    line = complaint(backend)
    assert "not installed" in line and f"expected the Python module {module}" in line and install in line


def test_sage_has_no_gradients():
    assert "SageAttention in training" in complaint("sageattn", training=True)


def trial(backend: str, training: bool = True) -> None:
    options = AttentionOptions(backend=backend)
    try_attention(options, device=CPU, dtype=torch.float32, flag="--flash_attn", training=training)


@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_trial_attends_texts_of_equal_and_of_unequal_length(backend, stand_ins):
    trial(backend)
    assert sorted(stand_ins.calls) == [backend, f"{backend} packed"]


def test_a_library_that_was_built_for_another_gpu_is_noticed_before_the_run(stand_ins):
    stand_ins.fails = True
    with pytest.raises(UserError) as error:
        trial("flash")
    line = str(error.value)
    assert "RuntimeError: no kernel image is available for execution" in line and "\n" not in line
    assert line.startswith("--flash_attn: got FlashAttention 2, which fails")


def test_a_library_that_computes_something_else_is_noticed_before_the_run(stand_ins):
    stand_ins.is_wrong = True
    with pytest.raises(UserError, match=r"FlashAttention 2, whose results are wrong by 0\.(39|4)"):
        trial("flash")


def test_pytorchs_own_needs_nothing(monkeypatch):
    for name in ("flash_attn", "xformers", "sageattention"):
        monkeypatch.setitem(sys.modules, name, None)
    check_attention(AttentionOptions(split=True), device=CPU, dtype=torch.float32, flag="--sdpa", training=True)


# ---- what is said of it ----


def test_the_log_says_which_kernels_pytorch_chooses():
    line = describe(AttentionOptions(), device=CPU, dtype=torch.float32)
    assert "PyTorch's own on cpu, kernel " in line and "_ATTENTION" in line and "unequal length" in line
    line = describe(AttentionOptions(backend="xformers", split=True), device=CUDA, dtype=torch.bfloat16)
    assert line == "xformers, one item of a batch at a time"


@pytest.mark.parametrize(
    ("mode", "backend"),
    [("torch", "sdpa"), ("sdpa", "sdpa"), ("flash", "flash"), ("flash2", "flash")]
    + [(name, name) for name in ("flash3", "xformers", "sageattn")],
)
def test_results_record_what_attended(mode, backend):
    compute = Compute.from_flags(replace(FramePackComputeFlags(), attn_mode=mode, device="cpu"))
    assert compute.execution.attention == AttentionOptions(backend=backend)
    assert compute.recorded()["attn_mode"] == backend and compute.recorded()["compile"] is False
