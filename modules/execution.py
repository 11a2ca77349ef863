"""How a transformer's blocks are run: by which attention, compiled or as they are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from modules.attention import AttentionOptions, check_attention, describe
from modules.compiling import check_compiling, compile_blocks
from options.flags_compile import CompileChoice
from options.flags_train import AttentionFlags, TrainCompileFlags

logger = logging.getLogger(__name__)


class Blocks(Protocol):
    """A transformer, as far as its blocks go."""

    attention: AttentionOptions
    block_lists: Sequence[nn.ModuleList]
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What was asked for."""

    attention: AttentionOptions = AttentionOptions()
    attention_flag: str = "--attn_mode"
    """That the choice came from, for messages."""
    compiling: CompileChoice | None = None

    @classmethod
    def of_training(cls, attention: AttentionFlags, compilation: TrainCompileFlags) -> Execution:
        return cls(
            attention=AttentionOptions(backend=attention.backend, split=attention.split_attn),
            attention_flag=attention.backend_flag,
            compiling=compilation.choice,
        )

    def check(self, *, device: torch.device, dtype: torch.dtype, training: bool = False) -> None:
        """Tries everything on a few tokens of `dtype`.

        Raises:
            UserError: something is not installed, or does not work with this device or type.
        """
        place = {"device": device, "dtype": dtype}
        check_attention(self.attention, flag=self.attention_flag, training=training, **place)
        if self.compiling is not None:
            check_compiling(self.compiling, self.attention, **place)

    def apply_to(self, transformer: Blocks) -> None:
        """Logs what is used, too."""
        logger.info("attention: %s", describe(self.attention, device=transformer.device, dtype=transformer.dtype))
        transformer.attention = self.attention
        if self.compiling is not None:
            compile_blocks((block for blocks in transformer.block_lists for block in blocks), self.compiling)
