"""LoRAs that a model has for one prompt only: laid over its layers, and taken off again to the last bit."""

from __future__ import annotations

import logging
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
            report(matched, lora.multiplier)
            self._checked.add(key)

    @contextmanager
    def on(self, transformer: nn.Module, loras: Sequence[PromptLora]) -> Iterator[None]:
        """`transformer` with these LoRAs, in its own type and on its device."""
        keys = [_key(lora.path) for lora in loras]
        self._networks = {key: network for key, network in self._networks.items() if key in keys}
        applied = []
        try:
            for key, lora in zip(keys, loras, strict=True):
                if lora.multiplier == 0:
                    continue
                if key not in self._networks:
                    self._networks[key] = network_for(transformer, read_lora(lora.path, flag=FLAG))
                network = self._networks[key]
                if network in applied:
                    network.multiplier += lora.multiplier
                    continue
                # Float32 factors would make every layer compute in float32; merged weights are rounded too.
                network.to(transformer.device, transformer.dtype)
                network.multiplier = lora.multiplier
                network.apply_to(transformer)
                applied.append(network)
            yield
        finally:
            for network in applied:
                network.remove()
                network.to("cpu")


def _key(path: str) -> FileKey:
    stat = Path(path).stat()
    return path, stat.st_mtime_ns, stat.st_size
