"""What the toy world's transformer is trained on: scenes as latents, embeddings and caption states.

Everything goes through the functions by which the product's caching scripts and generation encode pictures and texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from common.files import atomic_file
from demo.encoders import ModelPaths
from demo.toy.vae import single_frames_in_2d
from demo.toy.world import FRAMES_PER_INDEX, Scene, captions, scenes, to_uint8
from frame_pack.image_encoder import encode_images, load_siglip, open_siglip
from frame_pack.pictures import encode_clips, encode_pictures
from hunyuan_model.text_encoders import (
    encode_clip,
    encode_llama,
    load_clip,
    load_llama,
    load_tokenizer,
    open_clip,
    open_llama,
)
from hunyuan_model.vae import load_vae, open_vae

STILLS_SEED, CLIPS_SEED = 100, 200
NUM_STILLS, NUM_CLIPS = 2000, 320
LAST_INDEX = 9
"""Of the stills; the first is 0."""
CLIP_INDICES = 18
"""Two sections of nine latent frames follow the first frame."""
BATCH = 50
ON_CPU = {"dtype": torch.float32, "device": torch.device("cpu")}


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Encoded scenes. N scenes with stills, M with clips, V captions, L rows of the longest caption, I image rows."""

    stills: Tensor
    """(N, C, 10, h, w): the pictures at the indices 0 ... 9, each encoded as a picture."""
    dressed: Tensor
    """(N, C, 1, h, w): the next scene's shape on a scene's background."""
    still_features: Tensor
    """(N, I, image_width): the picture at index 0."""
    clips: Tensor
    """(M, C, 19, h, w)"""
    clip_features: Tensor
    """(M, I, image_width)"""
    texts: Tensor
    """(V, L, text_width), zeros behind a caption's last row."""
    lengths: Tensor
    """(V,) valid rows."""
    pooled: Tensor
    """(V, pooled_width)"""

    @cached_property
    def still_scenes(self) -> list[Scene]:
        """The N scenes."""
        return list(itertools.islice(scenes(STILLS_SEED), len(self.stills)))

    @cached_property
    def clip_scenes(self) -> list[Scene]:
        """The M scenes."""
        return list(itertools.islice(scenes(CLIPS_SEED), len(self.clips)))

    @cached_property
    def caption_number(self) -> dict[str, int]:
        """A caption's row in `texts`."""
        return {caption: number for number, caption in enumerate(captions())}


def load_pool(path: Path, models: ModelPaths) -> Pool:
    """The pool in `path`, which is made from `models` when it is not there."""
    if not path.is_file():
        tensors = _encode_pictures(models) | _encode_texts(models)
        with atomic_file(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    return Pool(**load_file(path))


def dressed_picture(ground: Scene, shape: Scene) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8: what a kisekaeichi of two first pictures is to make of them."""
    return to_uint8(shape.over(ground.ground()))


def _encode_pictures(models: ModelPaths) -> dict[str, Tensor]:
    vae = load_vae(open_vae(models.vae), **ON_CPU)
    siglip = load_siglip(open_siglip(models.image_encoder), **ON_CPU)
    still_scenes = list(itertools.islice(scenes(STILLS_SEED), NUM_STILLS))
    stills, dressed, still_features = [], [], []
    for start in tqdm(range(0, NUM_STILLS, BATCH), desc="stills"):
        batch = still_scenes[start : start + BATCH]
        rows = [[scene.picture_at(index) for scene in batch] for index in range(LAST_INDEX + 1)]
        following = [still_scenes[(start + i + 1) % NUM_STILLS] for i in range(len(batch))]
        rows.append([dressed_picture(*pair) for pair in zip(batch, following, strict=True)])
        with single_frames_in_2d(vae):
            *moments, composed = [encode_pictures(vae, row).half() for row in rows]
        stills.append(torch.cat(moments, dim=2))
        dressed.append(composed)
        still_features.append(encode_images(siglip, rows[0]).half())
    clips, clip_features = [], []
    for scene in tqdm(list(itertools.islice(scenes(CLIPS_SEED), NUM_CLIPS)), desc="clips"):
        frames = scene.clip(CLIP_INDICES * FRAMES_PER_INDEX + 1)
        clips.append(encode_clips(vae, frames[None]).half())
        clip_features.append(encode_images(siglip, frames[:1]).half())
    groups = {"stills": stills, "dressed": dressed, "still_features": still_features}
    groups |= {"clips": clips, "clip_features": clip_features}
    return {name: torch.cat(parts) for name, parts in groups.items()}


def _encode_texts(models: ModelPaths) -> dict[str, Tensor]:
    llama_file, clip_file = open_llama(models.text_encoder1), open_clip(models.text_encoder2)
    words = load_tokenizer("llama", given=None, checkpoint=llama_file)
    tags = load_tokenizer("clip", given=None, checkpoint=clip_file)
    llama, clip = load_llama(llama_file, **ON_CPU), load_clip(clip_file, **ON_CPU)
    rows = [encode_llama(llama, words, caption).half() for caption in tqdm(captions(), desc="captions")]
    return {
        "texts": _padded(rows),
        "lengths": torch.tensor([len(states) for states in rows]),
        "pooled": torch.stack([encode_clip(clip, tags, caption).half() for caption in captions()]),
    }


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
