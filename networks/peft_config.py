"""Alpha where PEFT and diffusers keep it: in an adapter's configuration instead of beside the tensors.

diffusers puts it into a file's metadata, PEFT into `adapter_config.json` beside `adapter_model.safetensors`. Ranks and
alphas that differ from the common one stand under patterns, which match the end of a dotted module name.
Source: peft's `get_pattern_key`, `LoraConfig`, `LoKrConfig`; diffusers' `load_lora_adapter`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from networks.deltas import Factors
from options.errors import UserError

METADATA_KEY = "lora_adapter_metadata"
PEFT_FILE, PEFT_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_PREFIX = "transformer"
"""The component's name, before tensors and configuration entries alike."""
Config = Mapping[str, object]


def adapter_file(path: str | Path) -> str | Path:
    """The file that `path` means: PEFT's own in a folder that holds one, else `path`."""
    file = os.path.join(path, PEFT_FILE)
    return file if os.path.isfile(file) else path


def read_config(metadata: Mapping[str, str], file: Path) -> Config:
    """The transformer's configuration from the metadata, or beside PEFT's own file; empty when there is none.

    Raises:
        UserError: it is no JSON object.
    """
    text, where, beside = metadata.get(METADATA_KEY), f"{file}, {METADATA_KEY}", file.with_name(PEFT_CONFIG_FILE)
    if text is None and file.name == PEFT_FILE and beside.is_file():
        # As bytes: some editors on Windows save UTF-16, or a mark in front, and json tells them apart.
        text, where = beside.read_bytes(), str(beside)
    try:
        entries = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(where, f"no JSON ({error})", "PEFT's configuration", "the file is damaged") from error
    if not isinstance(entries, dict):
        raise UserError(where, type(entries).__name__, "a JSON object", "the file is damaged")
    split = {key: key.rpartition(".") for key in entries}
    return {name: entries[key] for key, (owner, _, name) in split.items() if owner in ("", DIFFUSERS_PREFIX)}


def alpha_of(config: Config, module: str, factors: Factors) -> float | None:
    """The alpha that, divided by the rank, gives the scale that PEFT would use; None when the configuration has none.

    Args:
        module: dotted, without prefix.

    Raises:
        ValueError: a LoKr of whole factors that PEFT would scale, or values that cannot be computed with. An alpha of
            0 is one of them: PEFT switches the module off, a file's own means the rank.
    """
    try:
        alpha = _alpha_of(config, module, factors)
    except (TypeError, AttributeError, ArithmeticError, re.error) as error:
        raise ValueError(f"a damaged configuration ({error})") from error
    if alpha is not None and (alpha == 0 or not math.isfinite(alpha)):
        raise ValueError(f"an alpha of {alpha:g} in its configuration")
    return alpha


def _alpha_of(config: Config, module: str, factors: Factors) -> float | None:
    alpha = _value(config, "alpha_pattern", module, config.get("lora_alpha", config.get("alpha")))
    if alpha is None:
        return None
    if factors.kind == "lora":
        return float(alpha * math.sqrt(factors.rank) if config.get("use_rslora") else alpha)
    rank = _value(config, "rank_pattern", module, config.get("r"))
    if factors.rank is None and rank not in (None, alpha):
        raise ValueError(f"alpha {alpha} and rank {rank} for whole factors, which are never scaled")
    return float(alpha if None in (rank, factors.rank) else alpha * factors.rank / rank)


def _value(config: Config, patterns: str, module: str, default: object) -> object:
    """As `get_pattern_key` finds it."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def write_config(ranks: Mapping[str, int], scales: Mapping[str, float]) -> dict[str, str]:
    """The metadata entry from which diffusers learns ranks and scales; none when it finds them out itself.

    That is when all scales are 1 and all ranks alike: with several ranks older versions get the scales wrong.

    Args:
        ranks: by dotted module name.
        scales: what is still to be multiplied with the product of the factors.
    """
    if len(set(ranks.values())) == 1 and set(scales.values()) == {1.0}:
        return {}
    alphas = {name: scales[name] * rank for name, rank in ranks.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    config = {
        "r": rank,
        "lora_alpha": alpha,
        # The circumflex keeps the pattern "proj_out" from "single_transformer_blocks.0.proj_out".
        "rank_pattern": {f"^{name}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": list(ranks),
    }
    entries = {f"{DIFFUSERS_PREFIX}.{key}": value for key, value in config.items()}
    return {METADATA_KEY: json.dumps(entries, sort_keys=True)}
