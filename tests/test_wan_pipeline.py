"""What the transformer is shown in generation, when it is called, and what becomes of its answers."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from modules.block_swap import SwapOptions, Swapping, attach
from options.wan_request import WanRequest, WanRequestFlags
from options.wan_tasks import find_task
from tests.wan_driver import relative
from tests.wan_transformers import build_transformer, random
from wan import sampling
from wan.conditioning import WanConditioning
from wan.context import WanContext
from wan.sampling import generate_latents, initial_noise

SIDE = 32
LATENT = SIDE // 8
POSITIVE, NEGATIVE, SKIPPING = 10.0, 20.0, 100.0
"""What prompts are filled with, and what is added where blocks are left out."""


@dataclass
class RecordingTransformer:
    """Answers velocities towards a clip: a sample's prompt, and the number of the frame."""

    config: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(latent_channels=16))
    device: torch.device = torch.device("cpu")
    swapping: Swapping = field(default_factory=Swapping)
    shown: list = field(default_factory=list)
    timesteps: list[list[float]] = field(default_factory=list)
    passes: list[tuple[int, str]] = field(default_factory=list)
    noise: Tensor | None = None

    def prepare(self, conditioning, timesteps: Tensor) -> "Recorded":
        assert timesteps.shape[1] in (1, len(conditioning.text))
        self.shown.append(conditioning)
        self.timesteps.append(timesteps[:, 0].tolist())
        return Recorded(conditioning.text[:, 0, 0], timesteps)

    def step(self, latents: Tensor, prepared: "Recorded", index: int, *, skip_blocks=frozenset()) -> Tensor:
        if self.noise is None:
            self.noise = latents[:1].clone()
        names = {POSITIVE: "+", NEGATIVE: "-"}
        told = "".join(names[value] for value in prepared.prompts.tolist())
        self.passes.append((index, told + "".join(map(str, sorted(skip_blocks)))))
        wanted = prepared.prompts[:, None] + torch.arange(latents.shape[2]) + (SKIPPING if skip_blocks else 0)
        sigma = prepared.timesteps[index, 0].item() / 1000
        return (latents - wanted[:, None, :, None, None]) / sigma

    def passes_by_step(self) -> list[list[str]]:
        return [[told for step, told in self.passes if step == index] for index in range(len(self.timesteps[0]))]


@dataclass
class Recorded:
    """In place of what is prepared."""

    prompts: Tensor
    timesteps: Tensor

    def sample(self, number: int) -> "Recorded":
        return Recorded(self.prompts[number : number + 1], self.timesteps)


FLAGS = WanRequestFlags(
    prompt="猫", video_size=(SIDE, SIDE), infer_steps=4, seed=5, sample_solver="vanilla", video_length=9
)
PICTURE = {"video_length": 1}


def request(**changes) -> WanRequest:
    return replace(FLAGS, **changes).resolve(image_size=lambda path, flag: (SIDE, SIDE))


def one_frame_request(**changes) -> WanRequest:
    own = {"one_frame_inference": "target_index=1,control_index=0", "control_image_path": ("a.png",)}
    return request(task=find_task("i2v-14B"), **{**own, **changes})


def conditioning(*indices: int, target: int | None = None, width: int = 8, **changes) -> WanConditioning:
    """Texts of unequal length."""
    context = WanContext(latents=None, indices=torch.tensor([indices]), target=target)
    texts = {"text": torch.full((2, width), POSITIVE), "negative": torch.full((3, width), NEGATIVE)}
    return WanConditioning(**{**texts, "features": None, "context": context, "pictures": (), **changes})


def generate(asked: WanRequest, cond: WanConditioning) -> tuple[list[float], RecordingTransformer]:
    """The value that fills each latent frame of the result, and the recording."""
    transformer = RecordingTransformer()
    latents = generate_latents(transformer, asked, cond, lambda progress: None)
    assert latents.dtype == torch.float32 and latents.device.type == "cpu"
    assert torch.allclose(latents, latents[:1, :, :1, :1].expand_as(latents), atol=1e-3)
    return [round(value, 3) for value in latents[0, :, 0, 0].tolist()], transformer


# ---- what comes out ----


def test_a_video_is_all_that_was_denoised():
    assert generate(request(guidance_scale=1.0), conditioning(0, 1, 2, negative=None))[0] == [10.0, 11.0, 12.0]


@pytest.mark.parametrize(("indices", "target"), [((0, 1), 1), ((0, 1, 2), 1), ((1, 3), 0), ((0, 4, 9, 30), 2)])
def test_of_one_frame_only_the_picture_is_kept(indices, target):
    """Control frames are denoised, too."""
    made, transformer = generate(one_frame_request(guidance_scale=1.0), conditioning(*indices, target=target))
    assert made == [POSITIVE + target]
    assert transformer.noise.shape == (1, 16, len(indices), LATENT, LATENT)


def test_the_noise_is_one_draw_of_the_seed():
    for asked, frames in ((request(), 3), (one_frame_request(), 2)):
        _, transformer = generate(asked, conditioning(*range(frames)))
        expected = torch.randn(16, frames, LATENT, LATENT, generator=torch.Generator().manual_seed(5))
        assert torch.equal(transformer.noise[0], expected)


@pytest.mark.parametrize(("cpu_noise", "place"), [(False, "cuda"), (True, "cpu")])
def test_noise_is_drawn_on_the_device_unless_it_is_to_be_the_same_everywhere(cpu_noise, place, monkeypatch):
    places = []

    class Generator:
        def __init__(self, device: torch.device) -> None:
            places.append(device.type)

        def manual_seed(self, seed: int) -> "Generator":
            places.append(seed)
            return self

    class Noise:
        def to(self, device: torch.device) -> str:
            return f"on {device.type}"

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "randn", lambda shape, *, device, **k: places.append(device.type) or Noise())
    made = initial_noise((16, 1, 4, 4), request(cpu_noise=cpu_noise), torch.device("cuda"))
    assert (places, made) == ([place, 5, place], "on cuda")


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        ("unipc", [999, 952, 882, 768, 555]),
        ("dpm++", [1000, 952, 882, 769, 555]),
        ("vanilla", [1000, 952.381, 882.353, 769.231, 555.556]),
    ],
)
def test_the_model_is_told_the_solvers_timesteps(solver, expected):
    asked = request(sample_solver=solver, infer_steps=5, flow_shift=5.0)
    transformer = RecordingTransformer()
    generate_latents(transformer, asked, conditioning(0, 1, 2), lambda progress: None)
    assert transformer.timesteps == [pytest.approx(expected, abs=1e-3)] * 2


def test_progress_counts_every_step_and_shows_the_latents_in_the_end():
    seen = []
    generate_latents(RecordingTransformer(), request(), conditioning(0, 1, 2), seen.append)
    assert [(p.step, p.num_steps, p.section, p.num_sections) for p in seen] == [(i, 4, 0, 1) for i in (*range(5), 4)]
    assert [p.latents is None for p in seen] == [True] * 5 + [False] and seen[-1].latents.shape[1] == 3


# ---- guidance ----


def test_guidance_of_one_costs_no_second_pass():
    made, transformer = generate(request(guidance_scale=1.0), conditioning(0, 1, 2, negative=None))
    assert transformer.passes_by_step() == [["+"]] * 4 and len(transformer.shown) == 1


@pytest.mark.parametrize(("changes", "both"), [({}, ["+", "-"]), (PICTURE, ["+-"])])
def test_guidance_extrapolates_from_the_negative_prompt(changes, both):
    """20 + 3·(10 - 20); of a picture both passes are one batch."""
    frames = 1 if changes else 3
    made, transformer = generate(request(guidance_scale=3.0, **changes), conditioning(*range(frames)))
    assert made == [-10.0 + number for number in range(frames)]
    assert transformer.passes_by_step() == [both] * 4
    lengths = [shown.text_lengths.tolist() for shown in transformer.shown]
    assert lengths == ([[2, 3]] if changes else [[2], [3]])


CFG, NONE = ["+", "-"], ["+"]
SLG = {"slg_layers": "1,0", "slg_start": 0.2, "slg_end": 0.5}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cfg_skip_mode": "early", "cfg_apply_ratio": 0.4}, [NONE] * 6 + [CFG] * 4),
        ({"cfg_skip_mode": "late", "cfg_apply_ratio": 0.4}, [CFG] * 4 + [NONE] * 6),
        ({"cfg_skip_mode": "middle", "cfg_apply_ratio": 0.4}, [CFG] * 2 + [NONE] * 6 + [CFG] * 2),
        ({"cfg_skip_mode": "early_late", "cfg_apply_ratio": 0.4}, [NONE] * 3 + [CFG] * 4 + [NONE] * 3),
        ({"cfg_skip_mode": "alternate", "cfg_apply_ratio": 0.5}, [NONE, CFG] * 5),
        ({"slg_mode": "original", **SLG}, [CFG] * 2 + [["+", "-", "-01"]] * 3 + [CFG] * 5),
        ({"slg_mode": "uncond", **SLG}, [CFG] * 2 + [["+", "-01"]] * 3 + [CFG] * 5),
        ({"slg_mode": "original", "guidance_scale": 1.0, **SLG}, [NONE] * 2 + [["+", "-01"]] * 3 + [NONE] * 5),
    ],
)
def test_skipped_steps_and_blocks_reach_the_transformer_as_planned(changes, expected):
    """Also where passes are joined; only whole pairs are."""
    _, transformer = generate(request(infer_steps=10, **changes), conditioning(0, 1, 2))
    assert transformer.passes_by_step() == expected
    _, joined = generate(request(infer_steps=10, **PICTURE, **changes), conditioning(0))
    assert joined.passes_by_step() == [["+-", *told[2:]] if told[:2] == CFG else told for told in expected]


@pytest.mark.parametrize(("mode", "expected"), [("original", -230.0), ("uncond", -210.0)])
def test_skip_layer_guidance_leads_away_from_what_skips(mode, expected):
    """20 + 3·(10 - 20) + 2·(10 - 120), and 120 + 3·(10 - 120)."""
    slg = {"slg_mode": mode, "slg_layers": "1", "slg_scale": 2.0, "slg_end": 1.0}
    for changes in ({}, PICTURE):
        made, _ = generate(request(guidance_scale=3.0, **slg, **changes), conditioning(*range(1 if changes else 3)))
        assert made[0] == expected


@pytest.mark.parametrize(("kind", "is_swapped"), [("i2v", False), ("flf2v", True)])
def test_joined_passes_are_what_two_passes_are(kind, is_swapped, monkeypatch):
    """With every kind of step; also where swapped blocks make keys and values themselves, as in training."""
    model = build_transformer(kind)
    if is_swapped:
        attach(model, SwapOptions(counts=(2,), invariant="with their blocks"), torch.device("cpu"))
    rows = model.config.num_image_positions or 257
    cond = conditioning(0, 4, 9, target=1, text=random(4, 48, seed=1), negative=random(7, 48, seed=2))
    shown = replace(cond.context, latents=random(1, 20, 3, LATENT, LATENT, seed=3))
    cond = replace(cond, context=shown, features=random(rows, 40, seed=4))
    asked = one_frame_request(slg_mode="original", slg_layers="1", slg_end=0.5, cfg_skip_mode="late",
                              cfg_apply_ratio=0.75, sample_solver="unipc")  # fmt: skip
    found = []
    for joins in (True, False):
        monkeypatch.setattr(sampling, "joins_passes", lambda request, joins=joins: joins)
        calls, step = [], model.step
        monkeypatch.setattr(model, "step", lambda x, *a, c=calls, s=step, **k: c.append(len(x)) or s(x, *a, **k))
        with torch.no_grad():
            found.append(generate_latents(model, asked, cond, lambda progress: None))
        monkeypatch.undo()
        assert calls == ([2, 1, 2, 1, 2, 1] if joins else [1, 1, 1, 1, 1, 1, 1, 1, 1])
    assert relative(found[0], found[1]) < 1e-5
