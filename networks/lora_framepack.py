"""LoRA for FramePack: `--network_module networks.lora_framepack`."""

from __future__ import annotations

from functools import partial

from networks.creation import build_network
from networks.lora import LoraLayer
from networks.targets import FRAMEPACK

create_network = partial(build_network, kind=LoraLayer, families=(FRAMEPACK,), network_module=__name__)
"""LoRA on the double and single blocks: 440 layers at full size, the norms' excluded."""
