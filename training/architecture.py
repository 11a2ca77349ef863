"""What the trainer needs to know of a model family. See `frame_pack/architecture.py` for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from common.weights import Checkpoint
from dataset.architecture import CacheRules
from dataset.cached_items import CachingScripts, Layout
from dataset.training_dataset import TrainBatch, TrainingDataset
from generation.pipeline import Pipeline
from modules.block_swap import SwapOptions, Swapping
from modules.checkpointing import Checkpointing
from modules.training_plan import TrainingPlan
from networks.lora_merge import LoraMerge
from networks.network import Network
from options.flags_generate import RequestFlags


class Transformer(Protocol):
    """What every trained model has besides being a module."""

    checkpointing: Checkpointing
    swapping: Swapping
    num_blocks: int


class Architecture(Protocol):
    """One model family, opened: headers are checked, no weight has been read."""

    version: str
    """`framepack` or `wan`: what LoRA files call the base model."""
    model_name: str
    """`framepack` or `wan2.1`: what modelspec calls it."""
    implementation: str
    """The address of its published code."""
    rules: CacheRules
    scripts: CachingScripts
    """Which make the caches."""
    checkpoint: Checkpoint
    """The transformer's."""

    @property
    def sample_defaults(self) -> RequestFlags:
        """What sample prompts leave open."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What of the family's own flags decides what is learnt; it may change from a state to its continuation."""

    def empty_transformer(self) -> nn.Module:
        """The transformer on the meta device: what a network can be tried on before weights are loaded."""

    def check_batch(self, layout: Layout) -> None:
        """Raises UserError when what is cached lacks something that `predict_velocity` needs."""

    def training_plan(
        self, dataset: TrainingDataset, network: Network, *, dtype: torch.dtype, state_bytes: float, merge: LoraMerge
    ) -> TrainingPlan:
        """What one step of one batch costs, and what makes it fit. Needs no weights.

        Args:
            dtype: of the transformer.
            state_bytes: that the optimizer remembers for each trained number.
        """

    def load_transformer(
        self, *, dtype: torch.dtype, device: torch.device, merge: LoraMerge, swap: SwapOptions
    ) -> nn.Module:
        """The frozen transformer, a `Transformer` too."""

    def predict_velocity(self, transformer: nn.Module, noisy: Tensor, sigmas: Tensor, batch: TrainBatch) -> Tensor:
        """What `transformer` says noise - latents is.

        Args:
            noisy: (B, C, F, h, w) float32, on the transformer's device.
            sigmas: (B,) in [0, 1], likewise.
            batch: on the CPU, as it was cached.

        Returns:
            (B, C, F, h, w), float32.
        """

    def loss_weights(self, batch: TrainBatch) -> Tensor | None:
        """How much the errors of a batch's frames count, (B, 1, F, 1, 1); None: all alike."""

    def pipeline(self, *, dtype: torch.dtype, device: torch.device, transformer: nn.Module | None) -> Pipeline:
        """Generation with the models of the command line and, but for encoding, a transformer that is lent.

        Raises:
            UserError: a model is not given, missing, damaged, or another one than its flag says.
        """
