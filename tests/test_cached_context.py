"""Contexts of data set clips, and contexts as cache tensors and back, against the published tables."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from frame_pack.cached_context import clip_contexts, from_batch, to_cache
from frame_pack.conditioning import FramePackConditioning, TextStates
from frame_pack.context import CleanFrames, PackedContext, one_frame_context
from frame_pack.sampling import generate_latents
from options.fpack_request import FramePackRequestFlags
from options.one_frame import OneFrameOptions

HEIGHT, WIDTH = 2, 4
FEATURES = torch.arange(729 * 8.0).reshape(729, 8) / 729


def clip(num_frames: int) -> torch.Tensor:
    """(1, 16, F, h, w) with latent frame i filled with 100 + i, so that zeros and frames can be told apart."""
    return (100.0 + torch.arange(num_frames)).view(1, 1, -1, 1, 1).expand(1, 16, -1, HEIGHT, WIDTH).clone()


def numbers(latents: torch.Tensor) -> list[int | None]:
    """Which frame of the clip each one is; None for zeros."""
    assert torch.equal(latents, latents[..., :1, :1].expand_as(latents))
    return [int(value) - 100 if value else None for value in latents[0, 0, :, 0, 0].tolist()]


def seen(context: PackedContext) -> dict[str, list[int | None]]:
    groups = {"1x": context.clean, "2x": context.clean_2x, "4x": context.clean_4x}
    return {name: numbers(group.latents) for name, group in groups.items()}


def places(context: PackedContext) -> dict[str, list[int]]:
    groups = {"target": context, "1x": context.clean, "2x": context.clean_2x, "4x": context.clean_4x}
    return {name: group.indices[0].tolist() for name, group in groups.items()}


def test_two_sections_of_nine_have_the_published_places():
    first, second = clip_contexts(clip(19), window=9, f1=False)
    assert places(second) == {
        "target": [10, 11, 12, 13, 14, 15, 16, 17, 18],
        "1x": [0, 19],
        "2x": [20, 21],
        "4x": [22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37],
    }
    assert places(first) == {
        "target": [1, 2, 3, 4, 5, 6, 7, 8, 9],
        "1x": [0, 10],
        "2x": [11, 12],
        "4x": [13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28],
    }


def test_a_section_sees_the_later_frames_of_its_clip_and_zeros_behind_the_end():
    first, second = clip_contexts(clip(19), window=9, f1=False)
    assert seen(second) == {"1x": [0, None], "2x": [None] * 2, "4x": [None] * 16}
    assert seen(first) == {"1x": [0, 10], "2x": [11, 12], "4x": [13, 14, 15, 16, 17, 18] + [None] * 10}


def test_a_history_ends_nineteen_frames_behind_its_section():
    first = clip_contexts(clip(31), window=5, f1=False)[0]
    assert seen(first) == {"1x": [0, 6], "2x": [7, 8], "4x": list(range(9, 25))}


def test_sections_from_the_fifth_on_stand_nearer_than_they_are():
    contexts = clip_contexts(clip(13), window=2, f1=False)
    assert [places(c)["target"] for c in contexts] == [[1, 2], [3, 4], [5, 6], [5, 6], [5, 6], [7, 8]]
    assert [places(c)["1x"] for c in contexts] == [[0, 3], [0, 5], [0, 7], [0, 7], [0, 7], [0, 9]]
    assert [seen(c)["1x"] for c in contexts] == [[0, 3], [0, 5], [0, 7], [0, 9], [0, 11], [0, None]]
    four = clip_contexts(clip(9), window=2, f1=False)
    assert [places(c)["target"] for c in four] == [[1, 2], [3, 4], [5, 6], [7, 8]]


def test_f1_sections_share_their_places_and_see_the_frames_before_them():
    contexts = clip_contexts(clip(19), window=9, f1=True)
    for context in contexts:
        assert places(context) == {
            "target": [20, 21, 22, 23, 24, 25, 26, 27, 28],
            "1x": [0, 19],
            "2x": [17, 18],
            "4x": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
        }
    assert seen(contexts[0]) == {"1x": [0, 0], "2x": [None, None], "4x": [None] * 16}
    assert seen(contexts[1]) == {"1x": [0, 9], "2x": [7, 8], "4x": [None] * 9 + [0, 1, 2, 3, 4, 5, 6]}
    assert places(clip_contexts(clip(3), window=2, f1=True)[0])["target"] == [20, 21]
    assert seen(clip_contexts(clip(31), window=5, f1=True)[5])["4x"] == list(range(7, 23))


@pytest.mark.parametrize("num_frames", [1, 9, 11, 18])
def test_frames_that_make_no_whole_sections_are_refused(num_frames: int):
    with pytest.raises(ValueError, match=f"{num_frames} latent frames"):
        clip_contexts(clip(num_frames), window=9, f1=False)


@dataclass
class PerfectTransformer:
    """Generates the sections of a clip without any error, and records what it is shown meanwhile."""

    sections: list[torch.Tensor]
    config: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(latent_channels=16))
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    shown: list[PackedContext] = field(default_factory=list)

    def prepare(self, conditioning, timesteps, rope_scaling=None):
        self.shown.append(conditioning.context)
        return SimpleNamespace(sigmas=timesteps[:, 0] / 1000, answer=self.sections[len(self.shown) - 1])

    def step(self, latents, prepared, index):
        return (latents - prepared.answer) / prepared.sigmas[index]


@pytest.mark.parametrize("f1", [False, True])
def test_cached_sections_are_shown_what_a_perfect_generation_would_show(f1: bool):
    window, num_sections = 2, 5
    latents = torch.randn(1, 16, 1 + window * num_sections, HEIGHT, WIDTH)
    sections = [*latents[:, :, 1:].split(window, dim=2)]
    flags = FramePackRequestFlags(
        prompt="", image_path="a.png", video_size=(8 * HEIGHT, 8 * WIDTH), latent_window_size=window, f1=f1,
        video_sections=num_sections, infer_steps=3, seed=1,
    )  # fmt: skip
    request = flags.resolve(image_size=lambda path: (8 * WIDTH, 8 * HEIGHT))
    text = TextStates(llama=torch.zeros(1, 8), pooled=torch.zeros(8))
    cond = FramePackConditioning(
        texts={0: text}, negative=None, siglip={0: FEATURES}, starts={0: latents[:, :, :1]}, end=None, controls=(),
        control_masks=(), pictures=(),
    )  # fmt: skip
    transformer = PerfectTransformer(sections if f1 else sections[::-1])
    generate_latents(transformer, request, cond, lambda progress: None)
    generated = transformer.shown if f1 else transformer.shown[::-1]
    for cached, wanted in zip(clip_contexts(latents, window=window, f1=f1), generated, strict=True):
        assert torch.equal(cached.indices, wanted.indices)
        for name in ("clean", "clean_2x", "clean_4x"):
            found, expected = getattr(cached, name), getattr(wanted, name)
            assert torch.equal(found.indices, expected.indices)
            assert torch.allclose(found.latents, expected.latents, atol=1e-4)


# ---- to the tensors of a file and back ----


def one_frame(text: str) -> PackedContext:
    options = OneFrameOptions.parse(text).resolve(2)
    controls = [torch.randn(1, 16, 1, HEIGHT, WIDTH) for _ in range(2)]
    return one_frame_context(controls, [None, None], options, window=9, like=controls[0])


def batched(*files: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([file[name] for file in files]) for name in files[0]}


def in_float16(group: CleanFrames | None) -> CleanFrames | None:
    return group and CleanFrames(latents=group.latents.half(), indices=group.indices)


def assert_same(found: PackedContext, wanted: list[PackedContext]) -> None:
    """`found` has the samples of `wanted`, as float16 keeps them."""
    assert torch.equal(found.indices, torch.cat([context.indices for context in wanted]))
    for name in ("clean", "clean_2x", "clean_4x"):
        groups = [in_float16(getattr(context, name)) for context in wanted]
        if groups[0] is None:
            assert getattr(found, name) is None
            continue
        assert torch.equal(getattr(found, name).latents, torch.cat([group.latents for group in groups]))
        assert torch.equal(getattr(found, name).indices, torch.cat([group.indices for group in groups]))


def test_sections_come_back_from_a_batch_of_files():
    latents = [torch.randn(1, 16, 7, HEIGHT, WIDTH) for _ in range(2)]
    contexts = [clip_contexts(clip, window=3, f1=False)[0] for clip in latents]
    files = [
        to_cache(clip[:, :, 1:4], context, FEATURES, with_history=True)
        for clip, context in zip(latents, contexts, strict=True)
    ]
    assert {name: tuple(tensor.shape) for name, tensor in files[0].items()} == {
        "latents": (16, 3, HEIGHT, WIDTH),
        "latents_clean": (16, 2, HEIGHT, WIDTH),
        "latents_clean_2x": (16, 2, HEIGHT, WIDTH),
        "latents_clean_4x": (16, 16, HEIGHT, WIDTH),
        "latent_indices": (3,),
        "clean_latent_indices": (2,),
        "clean_latent_2x_indices": (2,),
        "clean_latent_4x_indices": (16,),
        "image_embeddings": (729, 8),
    }
    assert {name: tensor.dtype for name, tensor in files[0].items()} == {
        name: torch.int64 if name.endswith("indices") else torch.float16 for name in files[0]
    }
    assert torch.equal(files[1]["latents"], latents[1][0, :, 1:4].half())
    assert torch.equal(files[1]["image_embeddings"], FEATURES.half())
    assert_same(from_batch(batched(*files)), contexts)


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ("control_index=0;10", set()),
        ("control_index=0;10,no_post,no_2x", {"clean_latent_2x_indices"}),
        ("control_index=10;0,target_index=1,no_4x", {"clean_latent_4x_indices"}),
    ],
)
def test_one_frame_histories_are_kept_as_indices_only(options: str, absent: set[str]):
    contexts = [one_frame(options), one_frame(options)]
    target = torch.randn(1, 16, 1, HEIGHT, WIDTH)
    files = [to_cache(target, context, FEATURES, with_history=False) for context in contexts]
    always = {"latents", "latents_clean", "latent_indices", "clean_latent_indices", "image_embeddings"}
    assert set(files[0]) == (always | {"clean_latent_2x_indices", "clean_latent_4x_indices"}) - absent
    assert_same(from_batch(batched(*files)), contexts)


def test_a_batch_of_the_incumbents_files_is_understood():
    batch = {
        "latents": torch.zeros(2, 16, 1, HEIGHT, WIDTH),
        "latent_indices": torch.tensor([[1], [5]]),
        "latents_clean": torch.ones(2, 16, 2, HEIGHT, WIDTH, dtype=torch.float16),
        "clean_latent_indices": torch.tensor([[0, 10], [0, 13]]),
        "clean_latent_4x_indices": torch.arange(32).reshape(2, 16),
        "llama_vec": torch.zeros(2, 512, 8),
    }
    context = from_batch(batch)
    assert context.indices.tolist() == [[1], [5]] and context.clean.indices.tolist() == [[0, 10], [0, 13]]
    assert context.clean_2x is None
    assert context.clean_4x.latents.shape == (2, 16, 16, HEIGHT, WIDTH) and not context.clean_4x.latents.any()
    assert context.clean_4x.latents.dtype == torch.float16
    assert torch.equal(context.clean_4x.indices, torch.arange(32).reshape(2, 16))
