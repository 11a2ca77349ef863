"""The toy world's FramePack transformer: all its weights are trained, on sections of clips and on single frames.

What the model sees, its noise and its target come from the functions that the product trains LoRAs with. A batch is of
one of three kinds:

    still    one frame: the picture at 0, the target at 1 ... 9; post and history as `--one_frame_inference` has them
    dress    kisekaeichi: two masked pictures at 0 and 10, the target at 1
    section  a section of a clip by inverted anti-drifting, the last one or an earlier one
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoFramepackTransformer3DModel
from torch import Tensor, nn

from dataset.epochs import ItemKey, Position
from dataset.loss_masks import LOSS_MASK
from dataset.training_dataset import TrainBatch
from demo.encoders import EncoderSizes
from demo.toy.pieces import Plan, train
from demo.toy.pool import LAST_INDEX, Pool
from demo.toy.world import FRAMES_PER_INDEX, TOGETHER, Scene
from frame_pack.architecture import POOLED, TEXT, TEXT_MASK, predict_velocity
from frame_pack.cached_context import CLEAN, CLEAN_2X, CLEAN_4X, FEATURES, TARGET, TARGET_INDICES, clip_contexts
from frame_pack.context import PackedContext, one_frame_context
from frame_pack.loading import load_transformer, open_transformer
from frame_pack.model import FramePackTransformer
from frame_pack.pictures import latent_mask
from options.flags_timesteps import TimestepFlags
from options.geometry import VAE_STRIDE
from options.one_frame import OneFrameOptions
from training.objective import Objective

SEED = 2
SIZES = EncoderSizes(text=128, pooled=64, image=72, image_size=56)
PLAN = Plan(name="dit", steps=6000, learning_rate=1e-3, averaged=0.999)
POLISH = Plan(name="polish", steps=3600, learning_rate=8e-4, averaged=0.999)
"""Goes on from the average of the first part's weights."""
WINDOW = 9
GUIDANCE = 10.0
"""The distilled guidance that the model is told, which is what generation tells it by default."""
TIMESTEPS = TimestepFlags(timestep_sampling="shift", discrete_flow_shift=3.0)
BATCH_SIZES = {"still": 32, "dress": 32, "section": 10}
SHARES, POLISH_SHARES = (0.45, 0.2, 0.35), (0.45, 0.35, 0.2)
"""Of the steps, by kind: the masks of a kisekaeichi take longest."""
DRESSED = OneFrameOptions(target_index=1, control_indices=(0, 10), no_2x=True, no_4x=True, no_post=True)
SHAPES_FROM = 2000
"""The step from which the loss looks at shapes above all: backgrounds are learned by then, and outnumber them."""
BACKGROUND_WEIGHT = 0.1
MASK_MARGIN = 2
"""Pixels around a shape that its mask keeps."""


def write_untrained(folder: Path) -> None:
    """A transformer with seeded random weights as a snapshot folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        empty_dit().save_pretrained(folder)


def empty_dit() -> HunyuanVideoFramepackTransformer3DModel:
    """FramePack's architecture in diffusers' words: 2 heads of 64, 2 double and 4 single blocks."""
    return HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        guidance_embeds=True,
        text_embed_dim=SIZES.text,
        pooled_projection_dim=SIZES.pooled,
        rope_theta=256.0,
        rope_axes_dim=(8, 28, 28),
        has_image_proj=True,
        image_proj_dim=SIZES.image,
        has_clean_x_embedder=True,
    )


def train_dit(
    start: Path, pool: Pool, folder: Path, *, device: torch.device, stop_at: int | None = None
) -> tuple[FramePackTransformer, bool]:
    """Trains the transformer in the snapshot folder `start`, in pieces if `stop_at` says so.

    Returns:
        The transformer as it is now, and whether its training is complete.
    """
    model = load_transformer(open_transformer(str(start)), dtype=torch.float32, device=device)
    model.train().requires_grad_(True)
    objective = Objective(architecture=_Velocity(), transformer=model, timesteps=TIMESTEPS, seed=SEED, masked=True)

    def loss_at(step: int) -> Tensor:
        return objective(batch_at(pool, step), epoch=step).weighted

    if not train(model, loss_at, PLAN, folder, stop_at=stop_at):
        return model.eval(), False
    more = None if stop_at is None else max(stop_at - PLAN.steps, 0)
    done = train(model, lambda step: loss_at(PLAN.steps + step), POLISH, folder, stop_at=more)
    return model.eval(), done


class _Velocity:
    """The part of an architecture that an objective asks."""

    def predict_velocity(self, transformer: nn.Module, noisy: Tensor, sigmas: Tensor, batch: TrainBatch) -> Tensor:
        return predict_velocity(transformer, noisy, sigmas, batch, distilled_guidance=GUIDANCE)


@dataclass(frozen=True, kw_only=True)
class _Example:
    """One sample before it is put into a batch."""

    target: Tensor
    """(1, C, T, h, w)"""
    context: PackedContext
    features: Tensor
    """(I, image_width)"""
    caption: str
    shapes: np.ndarray
    """(T, SIZE, SIZE): where shapes are, or have to vanish."""


def batch_at(pool: Pool, step: int) -> TrainBatch:
    """The batch of a step: a function of the step's number."""
    random = np.random.default_rng([SEED, step])
    shares = SHARES if step < PLAN.steps else POLISH_SHARES
    kind = str(random.choice(list(BATCH_SIZES), p=shares))
    make = {"still": _stills, "dress": _dresses, "section": _sections}[kind]
    examples = make(pool, random, BATCH_SIZES[kind])
    keys = tuple(ItemKey(dataset=0, name=str(number), repeat=0) for number in range(len(examples)))
    return TrainBatch(contents=_contents(pool, examples, with_shapes=step >= SHAPES_FROM), items=keys, after=Position())


def _stills(pool: Pool, random: np.random.Generator, size: int) -> list[_Example]:
    without_history, without_post = random.random() < 0.5, random.random() < 0.5
    examples = []
    for number in random.integers(len(pool.stills), size=size):
        index = int(random.integers(1, LAST_INDEX + 1))
        options = OneFrameOptions(
            target_index=index, no_2x=without_history, no_4x=without_history, no_post=without_post
        )
        stills = pool.stills[number][None].float()
        start = stills[:, :, :1]
        context = one_frame_context([start], [None], options, window=WINDOW, like=start)
        features = pool.still_features[number]
        target, scene = stills[:, :, index : index + 1], pool.still_scenes[number]
        shapes = np.maximum(scene.coverage(), scene.coverage(index * FRAMES_PER_INDEX))[None]
        examples.append(
            _Example(target=target, context=context, features=features, caption=scene.caption, shapes=shapes)
        )
    return examples


def _dresses(pool: Pool, random: np.random.Generator, size: int) -> list[_Example]:
    examples = []
    for number in random.integers(len(pool.stills), size=size):
        following = (number + 1) % len(pool.stills)
        pair = pool.still_scenes[number], pool.still_scenes[following]
        masks = dress_masks(*pair)
        controls = [pool.stills[i][None, :, :1].float() for i in (number, following)]
        context = one_frame_context(
            controls, [latent_mask(mask) for mask in masks], DRESSED, window=WINDOW, like=controls[0]
        )
        target = pool.dressed[number][None].float()
        features = pool.still_features[number]
        shapes = np.maximum(*(scene.coverage() for scene in pair))[None]
        examples.append(_Example(target=target, context=context, features=features, caption=TOGETHER, shapes=shapes))
    return examples


def _sections(pool: Pool, random: np.random.Generator, size: int) -> list[_Example]:
    """All of the same kind: the first of two, the second of two, or the only one."""
    kind, examples = int(random.integers(3)), []
    for number in random.integers(len(pool.clips), size=size):
        clip = pool.clips[number][None].float()
        section, latents = (0, clip[:, :, : WINDOW + 1]) if kind == 2 else (kind, clip)
        context = clip_contexts(latents, window=WINDOW, f1=False)[section]
        first = 1 + section * WINDOW
        target, scene = latents[:, :, first : first + WINDOW], pool.clip_scenes[number]
        # A latent frame covers the way from the one before it.
        ways = [
            (FRAMES_PER_INDEX * (index - 1) + 1, FRAMES_PER_INDEX * index) for index in range(first, first + WINDOW)
        ]
        shapes = np.stack([np.maximum(*(scene.coverage(frame) for frame in way)) for way in ways])
        features = pool.clip_features[number]
        examples.append(
            _Example(target=target, context=context, features=features, caption=scene.caption, shapes=shapes)
        )
    return examples


def dress_masks(ground: Scene, shape: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Masks (SIZE, SIZE) uint8 for a kisekaeichi, white keeps: of a picture without both shapes, and of a shape.

    They follow the latent grid, so that what is to be seen is seen whole.
    """
    own, other = (
        _touched(scene.coverage()[None])[0].numpy().repeat(VAE_STRIDE, axis=0).repeat(VAE_STRIDE, axis=1)
        for scene in (ground, shape)
    )
    return np.where(own | other, 0, 255).astype(np.uint8), np.where(other, 255, 0).astype(np.uint8)


def _touched(coverage: np.ndarray) -> Tensor:
    """(T, SIZE, SIZE) -> (T, h, w) bool: the latent pixels whose squares a shape or its margin touches."""
    around = F.max_pool2d(torch.from_numpy(coverage)[:, None], 2 * MASK_MARGIN + 1, stride=1, padding=MASK_MARGIN)
    return F.max_pool2d(around, VAE_STRIDE)[:, 0] > 0.05


def _contents(pool: Pool, examples: list[_Example], *, with_shapes: bool) -> Mapping[str, Tensor]:
    """A batch as the caches would give it."""
    groups: dict[str, list[Tensor]] = {}

    def add(name: str, tensor: Tensor) -> None:
        groups.setdefault(name, []).append(tensor)

    for example in examples:
        context, caption = example.context, pool.caption_number[example.caption]
        add(TARGET, example.target[0])
        add(TARGET_INDICES, context.indices[0])
        for group, (latents, indices) in (
            (context.clean, CLEAN),
            (context.clean_2x, CLEAN_2X),
            (context.clean_4x, CLEAN_4X),
        ):
            if group is not None:
                add(latents, group.latents[0])
                add(indices, group.indices[0])
        if with_shapes:
            add(LOSS_MASK, torch.where(_touched(example.shapes), 1.0, BACKGROUND_WEIGHT)[None])
        add(FEATURES, example.features)
        add(TEXT, pool.texts[caption])
        add(TEXT_MASK, torch.arange(pool.texts.shape[1]) < pool.lengths[caption])
        add(POOLED, pool.pooled[caption])
    return {name: torch.stack(tensors) for name, tensors in groups.items()}
