"""LoRA files written in native names, or in those of diffusers and ComfyUI.

A scale that is not 1 has to reach the other loader. ComfyUI reads `.alpha` tensors, so nothing changes but names.
diffusers refuses them, and reads PEFT's configuration from the metadata only when it is asked for a safetensors file:
there the scale goes into the factors (`scale_folding`), and into the configuration where that would cost a bit. The
prefix tells which of them is meant. Either way the file converts back to the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from networks import peft_config, scale_folding
from networks.deltas import ALPHA, DOWN, UP, Factors, as_tensors
from networks.lora_formats import LoraFile, read_lora
from networks.lora_keys import DOTTED_PREFIXES
from networks.lora_matching import expect_factors
from networks.lora_metadata import check_output, save_lora
from networks.peft_config import DIFFUSERS_PREFIX, write_config
from networks.scale_folding import fold
from options.errors import UserError, did_you_mean
from options.flags_convert_lora import ConvertLoraFlags

logger = logging.getLogger(__name__)

COMFYUI_PREFIX = "diffusion_model"
PEFT_NAMES = {DOWN: "lora_A.weight", UP: "lora_B.weight"}
ABOUT_SCALES = (peft_config.METADATA_KEY, scale_folding.METADATA_KEY)
Tensors = dict[str, Tensor]


def to_native(lora: LoraFile) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a native file; a LoRA without alpha gets its rank, which means the same.

    Raises:
        UserError: as `_check_whole`.
    """
    _check_whole(lora)
    return as_tensors({name: _with_alpha(factors) for name, factors in lora.modules.items()}), _plain_metadata(lora)


def _with_alpha(factors: Factors) -> Factors:
    if factors.kind != "lora" or factors.alpha is not None:
        return factors
    return replace(factors, alpha=torch.tensor(float(factors.rank)))


def to_other(lora: LoraFile, prefix: str = COMFYUI_PREFIX) -> tuple[Tensors, dict[str, str]]:
    """The same in dotted names behind `prefix`; behind `transformer` as diffusers' model has them.

    Raises:
        UserError: as `_check_whole`.
    """
    _check_whole(lora)
    modules = {lora.dotted[name]: factors for name, factors in lora.modules.items()}
    metadata = _plain_metadata(lora)
    is_for_diffusers = prefix == DIFFUSERS_PREFIX
    if is_for_diffusers:
        if lora.kind in ("lora", "lokr"):
            modules, added = _without_alphas(modules, lora)
            metadata |= added
        else:
            logger.warning("%s: diffusers loads LoRA and LoKr, not %s", lora.path.name, lora.kind)
    start = f"{prefix}." if prefix else ""
    tensors: Tensors = {}
    for name, factors in modules.items():
        named = {PEFT_NAMES.get(part, part): tensor for part, tensor in factors.tensors.items()}
        if factors.alpha is not None:
            named[ALPHA] = factors.alpha
        module = lora.table.to_diffusers(name) if is_for_diffusers else name
        tensors |= {f"{start}{module}.{part}": tensor for part, tensor in named.items()}
    return tensors, metadata


def _without_alphas(modules: Mapping[str, Factors], lora: LoraFile) -> tuple[dict[str, Factors], dict[str, str]]:
    """The modules with their scales folded in, and the metadata that says so."""
    folded = {name: fold(factors) for name, factors in modules.items()}
    metadata = scale_folding.metadata_of({name: module.record for name, module in folded.items()})
    if lora.kind == "lora":
        theirs = {lora.table.to_diffusers(name): module for name, module in folded.items()}
        ranks = {name: module.factors.rank for name, module in theirs.items()}
        rests = {name: module.rest for name, module in theirs.items()}
        metadata |= write_config(ranks, rests)
        if set(rests.values()) != {1.0}:
            logger.warning(
                "%s: a scale of %g is kept in the metadata; in diffusers use the pipeline's load_lora_weights, or "
                "load_lora_adapter with use_safetensors=True",
                lora.path.name,
                next(rest for rest in rests.values() if rest != 1.0),
            )
    return {name: module.factors for name, module in folded.items()}, metadata


def _check_whole(lora: LoraFile) -> None:
    """Raises UserError for rows of a LoKr, which are no Kronecker product themselves, and for whole differences."""
    expect_factors(lora, "such a file can only be merged: with --lora_weight, or in training with --base_weights")
    if (name := next((name for name, factors in lora.modules.items() if factors.rows), None)) is not None:
        got = f"{lora.key_of(name)}, a LoKr of a fused layer whose rows for {lora.dotted[name]} have no factors"
        remedy = "use the file as it is with --lora_weight, or merge it into the model"
        raise UserError(lora.where, got, "a LoKr that can be split", remedy)


def _plain_metadata(lora: LoraFile) -> dict[str, str]:
    """The file's own, less what was about scales: they are in the factors' alphas now."""
    return {key: value for key, value in lora.metadata.items() if key not in ABOUT_SCALES}


def convert_file(flags: ConvertLoraFlags) -> None:
    """What `convert_lora.py` does.

    Raises:
        UserError: as `read_lora`, `to_native` and `to_other`; a prefix that no file of this suite could be read back
            with; or the output cannot be written.
    """
    check_output(flags.output, flag="--output", inputs=(flags.input,), input_flag="--input")
    prefix = COMFYUI_PREFIX if flags.diffusers_prefix is None else flags.diffusers_prefix.rstrip(".")
    if flags.diffusers_prefix is not None and flags.target == "default":
        logger.warning("--diffusers_prefix has no effect with --target default")
    elif flags.target == "other":
        _check_prefix(prefix)
    lora = read_lora(flags.input, flag="--input")
    if lora.leftover:
        logger.warning("not converted: %d tensors, %s first", len(lora.leftover), lora.leftover[0])
    tensors, metadata = to_native(lora) if flags.target == "default" else to_other(lora, prefix)
    save_lora(flags.output, _without_shared(tensors), metadata, flag="--output")
    count, target = len(lora.modules), "native" if flags.target == "default" else f"{prefix or 'no'} prefix"
    logger.info("%s: %d %s modules, from %s to %s", flags.output, count, lora.kind, lora.format, target)


def _check_prefix(prefix: str) -> None:
    known = [known.rstrip(".") for known in DOTTED_PREFIXES]
    if prefix and prefix not in known:
        expected, remedy = f"one of {', '.join(known)}, or an empty one", "files behind others could not be read back"
        raise UserError("--diffusers_prefix", prefix, expected, did_you_mean(prefix, known, remedy))


def _without_shared(tensors: Tensors) -> Tensors:
    """With a copy of what has the memory of another one, which the format refuses: parts of one fused module do."""
    unshared: Tensors = {}
    seen = set()
    for key, tensor in tensors.items():
        place = tensor.data_ptr()
        unshared[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return unshared
