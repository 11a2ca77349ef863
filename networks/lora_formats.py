"""LoRA files: read in whatever format they are, told from all their keys, and described by native module names.

A file is taken apart key by key (`lora_keys`), its module names are looked up in the tables of the architectures
(`TABLES`: another architecture is another table), and fused modules are split into those that the model has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint_kinds import LORA, expect_kind
from common.files import existing_file
from common.weights import TORCH_DTYPES, Checkpoint, open_checkpoint
from networks.deltas import ALPHA, DIFF, FactorError, Factors, is_finite
from networks.framepack_names import FRAMEPACK_NAMES
from networks.lora_keys import (
    Key,
    foreign_family,
    foreign_twin,
    is_text_encoder,
    parse_key,
    spelling,
    unsupported,
    without_prefixes,
)
from networks.lora_metadata import read_metadata
from networks.module_names import NameTable, flat_name, native_name
from networks.peft_config import PEFT_FILE, Config, adapter_file, alpha_of, read_config
from networks.scale_folding import unfold
from networks.wan_names import WAN_NAMES
from options.errors import UserError

logger = logging.getLogger(__name__)

TABLES = (FRAMEPACK_NAMES, WAN_NAMES)
Sources = dict[str, str]
"""Part of a module -> the key in the file that it came from."""


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """One file, its tensors by the model's own modules."""

    flag: str
    """The flag that named it, for messages."""
    path: Path
    """The file itself, where a folder was given."""
    format: str
    """In whose spelling it came, for people to read."""
    table: NameTable
    """The architecture whose names it knows most of."""
    modules: Mapping[str, Factors]
    """By native module name, `lora_unet_transformer_blocks_0_attn_to_q`, which stands for the module's weight. Whole
    differences of a bias, or of a tensor that belongs to no layer, have names of their own, `…_attn_to_q_bias`."""
    dotted: Mapping[str, str]
    """Native name -> dotted name, `transformer_blocks.0.attn.to_q`; also of modules that `only` has left out."""
    sources: Mapping[str, Sources]
    """Native name -> the keys in the file that the module was made of; as `dotted`."""
    leftover: tuple[str, ...]
    """Keys that are not used: text encoders, modules and tensors that no table knows."""
    metadata: Mapping[str, str]

    @property
    def where(self) -> str:
        """The file as error messages name it."""
        return f"{self.flag} {self.path}"

    @property
    def kind(self) -> str:
        """`lora`, `loha`, `lokr`, or several of them with a plus; `diff` is not counted."""
        return "+".join(sorted({factors.kind for factors in self.modules.values()} - {DIFF}))

    @property
    def differences(self) -> tuple[str, ...]:
        """Native names of the modules and tensors of which the file has whole differences."""
        return tuple(name for name, factors in self.modules.items() if factors.kind == DIFF)

    def key_of(self, name: str, part: str | None = None) -> str:
        """The key in the file of a part of the module `name`; of its first factor when there is no such part."""
        return _key_of(self.sources[name], part)

    def only(self, names: Iterable[str]) -> LoraFile:
        """The same with these modules."""
        names = list(names)
        return replace(self, modules={name: self.modules[name] for name in names})


def read_lora(path: str | Path, *, flag: str, shapes_only: bool = False) -> LoraFile:
    """Reads a LoRA, LoHa or LoKr of any known format, and whole differences of weights and biases beside it.

    Args:
        path: the file, or a folder that PEFT has written.
        shapes_only: leaves all tensors on the meta device; for checking a file before the model is loaded.

    Raises:
        UserError: no such file, a truncated one, no LoRA, another architecture's, factors that are missing, do not
            fit or hold NaN, or tensors that change the result in a way that is not supported; the first offending key
            is named.
    """
    path = _file_of(path, flag)
    # No memory map: on Windows it would lock the file for as long as the LoRA is in use.
    checkpoint = open_checkpoint(path, flag=flag, memmap=False)
    where = f"{flag} {path}"
    by_module, leftover = _sort_keys(checkpoint, where)
    metadata = read_metadata(checkpoint)
    table, meaning = _look_up(by_module, metadata, where)
    known = {module: keys for module, keys in by_module.items() if module in meaning}
    unknown = [key.text for module, keys in by_module.items() if module not in meaning for key in keys.values()]
    config = read_config(metadata, checkpoint.files[0])
    tensors = _shapes(checkpoint, where)
    if not shapes_only:
        tensors = dict(checkpoint.read())
    whole = {module: _factors(module, keys, tensors, config, where) for module, keys in known.items()}
    modules, sources = _split_all(whole, known, meaning, where)
    if not shapes_only:
        modules = unfold(modules, metadata)
    lora = LoraFile(
        flag=flag,
        path=path,
        format=_format(known, meaning, table),
        table=table,
        modules={native_name(name): factors for name, factors in modules.items()},
        dotted={native_name(name): name for name in modules},
        sources={native_name(name): source for name, source in sources.items()},
        leftover=(*leftover, *unknown),
        metadata=metadata,
    )
    if not shapes_only:
        _check_numbers(lora)
    return lora


def _file_of(path: str | Path, flag: str) -> Path:
    """Of a folder, PEFT's file only: it may hold the LoRAs of every epoch, and none is meant more than the others."""
    expected = f"a LoRA file, or a folder with {PEFT_FILE}"
    if not str(path):
        raise UserError(flag, "an empty name", expected, "give the file")
    return existing_file(adapter_file(path), flag=flag, expected=expected)


def _check_numbers(lora: LoraFile) -> None:
    """Logs alphas that do not mean what they say; raises UserError for numbers that would spoil a model."""
    for name, factors in lora.modules.items():
        alpha = {} if factors.alpha is None else {ALPHA: factors.alpha}
        for part, tensor in (factors.tensors | alpha).items():
            if not is_finite(tensor):
                got = f"{lora.key_of(name, part)} with infinite numbers or NaN"
                raise UserError(lora.where, got, "finite numbers", "the file is damaged, or its training failed")
    if zero := [name for name, factors in lora.modules.items() if factors.has_zero_alpha]:
        key = lora.key_of(zero[0], ALPHA)
        logger.info("%s: an alpha of 0 counts as the rank in %d modules, %s first", lora.path.name, len(zero), key)


def _sort_keys(checkpoint: Checkpoint, where: str) -> tuple[dict[str, dict[str, Key]], list[str]]:
    """(module as in the file -> part -> key, keys that are no factor's)."""
    by_module: dict[str, dict[str, Key]] = {}
    leftover = []
    for text in checkpoint.tensors:
        if is_text_encoder(text):
            leftover.append(text)
        elif reason := unsupported(text):
            raise UserError(where, f"{text}: {reason}", "LoRA, LoHa or LoKr", f"{reason} is not supported")
        elif key := parse_key(text):
            parts = by_module.setdefault(key.module, {})
            if key.part in parts:
                got, expected = f"{parts[key.part].text} and {text}", "one of them"
                raise UserError(where, got, expected, "the file holds two LoRAs")
            parts[key.part] = key
        else:
            leftover.append(text)
    # An alpha whose factors are of an unknown kind is no module.
    alone = [module for module, keys in by_module.items() if set(keys) == {ALPHA}]
    leftover += [by_module.pop(module)[ALPHA].text for module in alone]
    if not by_module:
        _refuse_without_factors(checkpoint, leftover, where)
    return by_module, leftover


def _refuse_without_factors(checkpoint: Checkpoint, leftover: list[str], where: str) -> None:
    if not any(is_text_encoder(text) for text in leftover):
        expect_kind(checkpoint, LORA)
    got = f"{len(leftover)} tensors, {leftover[0]} first"
    raise UserError(where, got, "LoRA, LoHa or LoKr factors of a transformer", "the file has none that are known here")


def _look_up(
    by_module: Mapping[str, Mapping[str, Key]], metadata: Mapping[str, str], where: str
) -> tuple[NameTable, dict[str, tuple[str, ...]]]:
    """The table that knows most modules, and what each known one means: the model's modules, several for a fused one.

    Factors are known of modules with a matrix only, differences of any tensor.

    Raises:
        UserError: no table knows any, or the names are known but metadata or block counts say another family.
    """
    candidates = {module: [flat_name(rest) for rest in without_prefixes(module)] for module in by_module}

    def find(table: NameTable, module: str) -> tuple[str, ...]:
        look = table.find_tensor if by_module[module].keys() <= {DIFF, ALPHA} else table.find
        return next(filter(None, map(look, candidates[module])), ())

    best = max(TABLES, key=lambda table: sum(bool(find(table, module)) for module in by_module))
    found = {module: find(best, module) for module in by_module}
    meaning = {module: names for module, names in found.items() if names}
    expected = f"a LoRA of {' or '.join(name for table in TABLES for name in table.takes)}"
    if not meaning:
        family = foreign_family(names[-1] for names in candidates.values())
        first = next(iter(candidates))
        looks = f", which looks like a LoRA of {family}" if family else ", which is no module known here"
        raise UserError(where, f"{first}{looks}", expected, "LoRAs only work with the model that they were trained on")
    family = foreign_twin((name for names in meaning.values() for name in names), metadata)
    if family and family not in best.takes:
        got = f"{next(iter(meaning))} and others that look like a LoRA of {family}, whose modules have the same names"
        raise UserError(where, got, expected, "LoRAs only work with the model that they were trained on")
    return best, meaning


def _shapes(checkpoint: Checkpoint, where: str) -> dict[str, Tensor]:
    """All tensors without their content."""
    shapes = {}
    for name, info in checkpoint.tensors.items():
        dtype = getattr(torch, TORCH_DTYPES.get(info.dtype, info.dtype), None)
        if dtype is None:
            raise UserError(where, f"{name} of type {info.dtype}", "a type that torch knows", "convert the file")
        shapes[name] = torch.empty(info.shape, dtype=dtype, device="meta")
    return shapes


def _factors(
    module: str,
    keys: Mapping[str, Key],
    tensors: Mapping[str, Tensor],
    config: Config,
    where: str,
) -> Factors:
    """One module as it is in the file, fused or not. Its own alpha comes before the configuration's."""
    parts = {part: tensors[key.text] for part, key in keys.items()}
    alpha = parts.pop(ALPHA, None)
    first = _key_of({part: key.text for part, key in keys.items()})
    try:
        factors = Factors(tensors=parts, alpha=alpha)
        *_, name = without_prefixes(module)
        if alpha is None and factors.kind != DIFF and (value := alpha_of(config, name, factors)) is not None:
            factors = replace(factors, alpha=torch.tensor(value))
    except FactorError as error:
        key = keys[error.part].text if error.part in keys else f"{first} without {error.part}"
        got = f"{key} of {error.got}" if error.part in keys else key
        raise UserError(where, got, error.expected, "the file is incomplete or damaged") from error
    except ValueError as error:
        raise UserError(
            where, f"{first} with {error}", "a scale that its factors can have", "the file cannot be used"
        ) from error
    return factors


def _key_of(sources: Sources, part: str | None = None) -> str:
    """See `LoraFile.key_of`."""
    return sources.get(part) or next(key for factor, key in sources.items() if factor != ALPHA)


def _split_all(
    whole: Mapping[str, Factors],
    keys: Mapping[str, Mapping[str, Key]],
    meaning: Mapping[str, tuple[str, ...]],
    where: str,
) -> tuple[dict[str, Factors], dict[str, Sources]]:
    """The factors of the model's modules and the keys that they come from, both by dotted name.

    Args:
        whole, keys, meaning: by module as in the file.

    Raises:
        UserError: as `_split`, or two modules of the file mean the same one.
    """
    modules: dict[str, Factors] = {}
    sources: dict[str, Sources] = {}
    for module, factors in whole.items():
        own, names = {part: key.text for part, key in keys[module].items()}, meaning[module]
        layer = whole.get(module.removesuffix(".bias"), factors)
        for part, name in zip(_split(factors, names, own, where, layer), names, strict=True):
            if name in modules:
                got, expected = f"{_key_of(own)} and {_key_of(sources[name])}", f"one source for {name}"
                raise UserError(where, got, expected, "the file holds two LoRAs: convert them one by one")
            modules[name], sources[name] = part, own
    return modules, sources


def _split(factors: Factors, names: tuple[str, ...], sources: Sources, where: str, layer: Factors) -> list[Factors]:
    """The factors of each module that one fuses: query, key and value are as wide as the input, the rest is the MLP's.

    Args:
        layer: the same, or for a bias those of its layer.

    Raises:
        UserError: the rows do not split that way.
    """
    if len(names) == 1:
        return [factors]
    if len(layer.delta_shape) < 2:
        expected = "factors of that layer beside it, which tell where to split"
        raise UserError(where, f"{_key_of(sources)} of a fused layer", expected, "the file cannot be used")
    rows, width = factors.delta_shape[0], layer.delta_shape[1]
    num_square = min(len(names), 3)
    ends = [width * (i + 1) for i in range(num_square)] + [rows] * (len(names) - num_square)
    if rows != ends[-1] or ends != sorted(set(ends)):
        expected = f"{num_square} times its input width {width}" + (" and the MLP's width" if len(names) > 3 else "")
        got = f"{_key_of(sources, factors.misfit((0, width)))} for {rows} rows"
        raise UserError(where, got, expected, "the file is damaged or another model's")
    return [factors.slice_rows(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


def _format(
    by_module: Mapping[str, Mapping[str, Key]], meaning: Mapping[str, tuple[str, ...]], table: NameTable
) -> str:
    """`native (lora_down)`, `diffusers (lora_A)`, `ComfyUI (lokr), HunyuanVideo's names`, `PEFT and native (…)`."""
    marks = ("lora_A", "lora_down", "lora.down", "lora_linear_layer", "hada", "lokr", "diff")
    endings = {key.ending for keys in by_module.values() for key in keys.values()}
    found = ", ".join(mark for mark in marks if any(mark in ending for ending in endings))
    spellings = " and ".join(sorted({spelling(module) for module in by_module}))
    is_renamed = any(not flat_name(module).endswith(flat_name(meaning[module][0])) for module in by_module)
    return f"{spellings} ({found})" + (f", {table.aliases_of} names" if is_renamed else "")
