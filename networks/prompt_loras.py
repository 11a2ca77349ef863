"""LoRAs that a model has for one prompt only: laid over its layers, and taken off again to the last bit."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from common.weights import Checkpoint
from networks.lora_formats import read_lora
from networks.lora_matching import match
from networks.lora_merge import report
from networks.network import Network
from networks.rebuild import check_can_be_applied, network_for
from options.lora import PromptLora

logger = logging.getLogger(__name__)

FLAG = "--lora"
FileKey = tuple[str, int, int]


class PromptLoras:
    """The LoRAs of the prompts of a run. Those of the last prompt stay in RAM, as the next one often has them too."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """
        Args:
            checkpoint: of the transformer; only its header is used.
        """
        self._checkpoint = checkpoint
        self._checked: set[FileKey] = set()
        self._networks: dict[FileKey, Network] = {}

    def check(self, loras: Sequence[PromptLora]) -> None:
        """Compares the files' headers with the transformer's; says in the log, once per file, what of it is used.

        Raises:
            UserError: as `read_lora` and `match`, or a LoRA that cannot be laid over a layer.
        """
        for lora in loras:
            if (key := _key(lora.path)) in self._checked:
                continue
            shapes = self._checkpoint.shapes
            matched = match(read_lora(lora.path, flag=FLAG, shapes_only=True), shapes)
            check_can_be_applied(matched, shapes)
            report(matched)
            self._checked.add(key)

    @contextmanager
    def on(self, transformer: nn.Module, loras: Sequence[PromptLora]) -> Iterator[None]:
        """`transformer` with these LoRAs, in its own type and on its device."""
        strengths: dict[FileKey, float] = defaultdict(float)
        for lora in loras:
            strengths[_key(lora.path)] += lora.multiplier
        self._networks = {key: network for key, network in self._networks.items() if key in strengths}
        applied: list[Network] = []
        try:
            for key, strength in strengths.items():
                if strength == 0:
                    continue
                network = self._open(key, transformer)
                network.multiplier = strength
                applied.append(network)  # before it is: an interrupt while it is applied leaves nothing behind
                network.apply_to(transformer)
            yield
        finally:
            for network in applied:
                network.remove()

    def _open(self, key: FileKey, transformer: nn.Module) -> Network:
        if key not in self._networks:
            self._networks[key] = network_for(transformer, read_lora(key[0], flag=FLAG))
        # Float32 factors would make every layer compute in float32; merged weights are rounded too.
        return self._networks[key].to(transformer.device, transformer.dtype)

    def leave_device(self) -> None:
        """Moves what is kept for the next prompt into RAM."""
        for network in self._networks.values():
            network.to("cpu")


def _key(path: str) -> FileKey:
    stat = Path(path).stat()
    return path, stat.st_mtime_ns, stat.st_size
