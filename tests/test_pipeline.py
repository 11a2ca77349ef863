"""The section loops, seen by a stand-in transformer that records what it is shown."""

import weakref
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from common.residency import Resident
from frame_pack.conditioning import FramePackConditioning, TextStates
from frame_pack.sampling import generate_latents
from options.fpack_request import FramePackRequestFlags
from options.request import GenerationRequest

SIZE = 32
LATENT = SIZE // 8
N = 3


@dataclass
class RecordingTransformer:
    """Answers velocities that make the denoised latent a constant: 10, 20, 30 … for the first, second … context."""

    config: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(latent_channels=16))
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    shown: list = field(default_factory=list)
    noises: list = field(default_factory=list)
    steps: int = 0

    def prepare(self, conditioning, timesteps, rope_scaling=None):
        self.shown.append(conditioning)
        return SimpleNamespace(timesteps=timesteps, answer=10.0 * len(self.shown), scaling=rope_scaling)

    def step(self, latents, prepared, index):
        self.steps += 1
        if index == 0:
            self.noises.append(latents.clone())
        sigma = prepared.timesteps[index].item() / 1000
        return (latents - prepared.answer) / sigma


def request(**changes) -> GenerationRequest:
    flags = FramePackRequestFlags(
        prompt="a cat", image_path="a.png", video_size=(SIZE, SIZE), latent_window_size=N, infer_steps=4, seed=5
    )
    return replace(flags, **changes).resolve(image_size=lambda path: (SIZE, SIZE))


def text(value: float) -> TextStates:
    return TextStates(llama=torch.full((2, 8), value), pooled=torch.full((8,), value))


def start(value: float) -> torch.Tensor:
    return torch.full((1, 16, 1, LATENT, LATENT), value)


def conditioning(**changes) -> FramePackConditioning:
    values = {
        "texts": {0: text(0.0)},
        "negative": None,
        "siglip": {0: torch.full((729, 8), 0.0)},
        "starts": {0: start(0.5)},
        "end": None,
        "controls": (),
        "control_masks": (),
        "pictures": (),
    }
    return FramePackConditioning(**(values | changes))


def generate(asked: GenerationRequest, cond: FramePackConditioning) -> tuple[list[float], RecordingTransformer]:
    """The value that fills each latent frame of the result, and the recording."""
    transformer = RecordingTransformer()
    latents = generate_latents(transformer, asked, cond, lambda progress: None)
    assert latents.dtype == torch.float32
    assert torch.allclose(latents, latents[:1, :, :1, :1].expand_as(latents), atol=1e-4)
    return [round(v, 3) for v in latents[0, :, 0, 0].tolist()], transformer


def values(latents: torch.Tensor) -> list[float]:
    return [round(v, 3) for v in latents[0, 0, :, 0, 0].tolist()]


def test_inverted_sections_are_generated_last_first_and_stand_in_time_order():
    result, transformer = generate(request(video_sections=3), conditioning())
    assert result == [0.5] + [30.0] * N + [20.0] * N + [10.0] * N
    second, first = transformer.shown[1].context, transformer.shown[2].context
    assert values(second.clean.latents) == [0.5, 10]
    assert values(second.clean_2x.latents) == [10, 10]
    assert values(second.clean_4x.latents) == [0.0] * 16
    assert values(first.clean_4x.latents) == [10] * 3 + [0.0] * 13
    assert [c.context.indices[0, 0].item() for c in transformer.shown] == [1 + 2 * N, 1 + N, 1]


def test_f1_sections_are_generated_in_time_order_and_look_back():
    result, transformer = generate(request(video_sections=2, f1=True), conditioning(end=start(9.0)))
    assert result == [0.5] + [10.0] * N + [20.0] * N
    first, second = (shown.context for shown in transformer.shown)
    assert values(first.clean.latents) == [0.5, 0.5]
    assert values(first.clean_2x.latents) == [0, 0]
    assert values(second.clean.latents) == [0.5, 10]
    assert values(second.clean_2x.latents) == [10, 10]
    assert values(second.clean_4x.latents) == [0.0] * 15 + [0.5]


def test_the_end_image_is_the_first_thing_after_the_last_section():
    _, transformer = generate(request(video_sections=2), conditioning(end=start(9.0)))
    assert values(transformer.shown[0].context.clean.latents) == [0.5, 9]
    assert values(transformer.shown[1].context.clean_4x.latents)[:2] == [9, 0]


def test_sections_use_their_own_texts_and_images():
    images = {0: start(0.0), 1: start(1.0), -1: start(2.0)}
    siglip = {index: torch.full((729, 8), image[0, 0, 0, 0, 0]) for index, image in images.items()}
    texts = {0: text(0.0), 1: text(1.0), -1: text(2.0)}
    result, transformer = generate(request(video_sections=3), conditioning(starts=images, siglip=siglip, texts=texts))
    for shown, value in zip(transformer.shown, (2.0, 1.0, 0.0), strict=True):
        inputs = (shown.text, shown.image, shown.pooled, shown.context.clean.latents[:, :, :1])
        assert [tensor.flatten()[0].item() for tensor in inputs] == [value] * 4
    assert result[0] == 0.0


def test_given_paddings_move_the_sections():
    _, transformer = generate(request(video_sections=3, latent_paddings="0,0,0"), conditioning())
    assert [c.context.indices[0, 0].item() for c in transformer.shown] == [1, 1, 1]


def test_one_frame_is_one_latent_frame_from_noise_of_the_seed():
    result, transformer = generate(
        request(one_frame_inference="target_index=4"), conditioning(starts={}, controls=(), control_masks=())
    )
    assert result == [10.0]
    assert transformer.shown[0].context.indices.tolist() == [[4]]
    expected = torch.randn(1, 16, 1, LATENT, LATENT, generator=torch.Generator().manual_seed(5))
    assert torch.equal(transformer.noises[0], expected)


def test_sections_draw_their_noise_one_after_the_other():
    _, transformer = generate(request(video_sections=2), conditioning())
    generator = torch.Generator().manual_seed(5)
    for noise in transformer.noises:
        assert torch.equal(noise, torch.randn(1, 16, N, LATENT, LATENT, generator=generator))


@pytest.mark.parametrize(("scale", "expected"), [(10.0, 9984.0), (6.0, 6016.0), (1.0, 1000.0)])
def test_distilled_guidance_is_rounded_as_published(scale, expected):
    _, transformer = generate(request(one_frame_inference="default", embedded_cfg_scale=scale), conditioning())
    assert transformer.shown[0].guidance.tolist() == [expected]


def test_guidance_of_one_costs_no_second_pass():
    _, transformer = generate(request(one_frame_inference="default"), conditioning())
    assert transformer.steps == 4
    _, transformer = generate(
        request(one_frame_inference="default", guidance_scale=2.0), conditioning(negative=text(3.0))
    )
    assert transformer.steps == 8
    assert transformer.shown[1].text[0, 0, 0] == 3.0


def test_guidance_extrapolates_from_the_negative_prompt():
    """Answers 10 (positive) and 20 (negative) at scale 3 must give 20 + 3·(10 - 20)."""
    result, _ = generate(request(one_frame_inference="default", guidance_scale=3.0), conditioning(negative=text(3.0)))
    assert result == [-10.0]


def test_flow_shift_replaces_the_shift_by_resolution():
    seen = {}

    class Timesteps(RecordingTransformer):
        def prepare(self, conditioning, timesteps, rope_scaling=None):
            seen[len(seen)] = timesteps[:, 0].tolist(), rope_scaling
            return super().prepare(conditioning, timesteps, rope_scaling)

    for changes in ({"flow_shift": 1.0}, {"rope_scaling_timestep_threshold": 800, "rope_scaling_factor": 0.7}):
        generate_latents(Timesteps(), request(one_frame_inference="default", **changes), conditioning(), lambda p: None)
    assert seen[0] == ([1000.0, 750.0, 500.0, 250.0], None)
    assert seen[1][0] != seen[0][0]
    assert (seen[1][1].factor, seen[1][1].timestep_threshold) == (0.7, 800)


def test_progress_counts_every_step_of_every_section():
    seen = []
    generate_latents(RecordingTransformer(), request(video_sections=2), conditioning(), seen.append)
    steps = [p for p in seen if p.latents is None]
    assert [(p.section, p.step) for p in steps] == [(s, i) for s in range(2) for i in range(5)]
    assert {(p.num_sections, p.num_steps) for p in seen} == {(2, 4)}


def test_progress_shows_all_frames_so_far_when_a_section_is_done():
    for f1, expected in ((False, [20.0] * N + [10.0] * N), (True, [0.5] + [10.0] * N + [20.0] * N)):
        seen = []
        generate_latents(RecordingTransformer(), request(video_sections=2, f1=f1), conditioning(), seen.append)
        done = [p.latents for p in seen if p.latents is not None]
        assert [len(latents[0]) for latents in done] == [len(expected) - N, len(expected)]
        assert values(done[-1][None]) == expected


def resident(**kwargs) -> tuple[Resident, list]:
    loads = []

    def load() -> torch.nn.Module:
        loads.append(1)
        return torch.nn.Linear(1, 1)

    return Resident("model", load, torch.device("cpu"), **kwargs), loads


def test_a_kept_model_is_loaded_once_and_a_freed_one_again():
    for keep, expected in ((True, 1), (False, 2)):
        model, loads = resident(keep=keep)
        for _ in range(2):
            with model.use():
                pass
        assert len(loads) == expected


def test_nothing_holds_a_model_when_its_memory_is_handed_back(monkeypatch):
    model, _ = resident(keep=False)
    released = []
    monkeypatch.setattr("common.residency.release_memory", lambda device: released.append(weak() is None))
    with model.use():
        weak = weakref.ref(model.model)
    assert released == [True]


def test_nested_uses_share_one_model():
    model, loads = resident(keep=False)
    with model.use():
        outer = model.model
        with model.use():
            assert model.model is outer
        assert model.model is outer
    assert len(loads) == 1
    with pytest.raises(RuntimeError, match="not in use"):
        _ = model.model


def test_a_lent_model_is_neither_loaded_nor_freed():
    lent = torch.nn.Linear(1, 1)
    model, loads = resident(keep=False, lent=lent)
    for _ in range(2):
        with model.use():
            model.step_aside()
            assert model.model is lent
    assert not loads


def test_a_model_that_stepped_aside_comes_back_when_it_is_asked_for(monkeypatch):
    model, _ = resident(keep=False)
    with model.use():
        moves = []
        monkeypatch.setattr(model.model, "to", lambda device: moves.append(str(device)))
        model.step_aside()
        model.step_aside()
        assert moves == ["cpu"]
        assert model.model is model.model
        assert moves == ["cpu", "cpu"]
    model.step_aside()
    assert len(moves) == 2
