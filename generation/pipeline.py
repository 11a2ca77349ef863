"""What a model family offers to the runner: encode → denoise → decode, each stage with only its models resident."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from torch import Tensor

from generation.settings import Provenance
from options.memory_size import MemorySize
from options.request import GenerationRequest

Cond = TypeVar("Cond", bound="Conditioning")
Frames = np.ndarray
"""(F, H, W, 3) uint8 pictures in time order."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A request that could not be encoded, and why."""

    error: Exception


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A section begins, or one of its denoising steps is done."""

    section: int
    """Count of the section in order of generation, from 0."""
    num_sections: int
    step: int
    """How many are done; 0 when the section begins."""
    num_steps: int
    latents: Tensor | None = None
    """(C, F, h, w) all frames so far in time order, when a section is done."""


OnProgress = Callable[[Progress], None]
Encode = Callable[[Sequence[GenerationRequest]], Iterator[Cond | Failure]]
Denoise = Callable[[GenerationRequest, Cond, OnProgress], Tensor]


class Conditioning(Protocol):
    """What the runner may know about an encoded request."""

    pictures: Sequence[tuple[Tensor, np.ndarray]]
    """Its input images, as latents (C, h, w) and as RGB in [0, 1] of the same size (h, w, 3); previews learn from
    them what a latent looks like."""


class Pipeline(Protocol[Cond]):
    """Each stage is a context manager: entering makes its models resident on the device, leaving frees the device."""

    def encoder(self) -> AbstractContextManager[Encode]:
        """Text, images and control latents of many requests; one encoder is resident at a time, equal inputs are
        encoded once."""

    def denoiser(self) -> AbstractContextManager[Denoise]:
        """(request, conditioning, on_progress) → latents (C, F, h, w), float32 on the CPU."""

    def check(self, request: GenerationRequest) -> None:
        """Raises UserError for what only the models' headers tell: a LoRA of another model."""

    def num_operations(self, request: GenerationRequest) -> int:
        """About how many floating-point operations a request takes. Needs no weights."""

    def plan(self, request: GenerationRequest, size: MemorySize) -> str:
        """What a request costs and, for a size, what makes it fit: one screen of text. Needs no weights."""

    def provenance(self, *, with_paths: bool) -> Provenance:
        """What results say about the models and types that made them."""

    def decode(self, request: GenerationRequest, latents: Tensor) -> Frames:
        """Latents (C, F, h, w) → pictures. Brings its VAE in and out, also while the denoiser is open."""
