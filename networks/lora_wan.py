"""LoRA for Wan: `--network_module networks.lora_wan`."""

from __future__ import annotations

from functools import partial

from networks.creation import build_network
from networks.lora import LoraLayer
from networks.targets import WAN

create_network = partial(build_network, kind=LoraLayer, families=(WAN,), network_module=__name__)
"""LoRA on the blocks: 400 layers of the 14B model, 480 with those for pictures, 300 of the 1.3B model."""
