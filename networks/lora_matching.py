"""Which of a LoRA's modules go to which weights of a checkpoint, with an honest count of what does not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from networks.deltas import DIFF, Factors
from networks.lora_formats import LoraFile
from networks.lora_keys import without_prefixes
from networks.module_names import native_name
from options.errors import UserError

NUM_NAMED = 3
BIAS = ".bias"


@dataclass(frozen=True, kw_only=True)
class Matched:
    """A LoRA laid on a checkpoint."""

    lora: LoraFile
    factors: Mapping[str, Factors]
    """By the weight's name as the caller gave it, in the order of the checkpoint."""
    unmatched: tuple[str, ...]
    """The LoRA's modules (dotted names) for which there is no weight."""

    def summary(self) -> str:
        """One line for the log: what is used and what is not."""
        lines = [f"{self.lora.path.name}: {' and '.join(self._counts())}, {self.lora.format}"]
        if num_left_out := len(self.lora.dotted) - len(self.lora.modules):
            lines.append(f"{num_left_out} left out by patterns")
        lines += _listed("modules that the model does not have", self.unmatched)
        lines += _listed("unused tensors", self.lora.leftover)
        return "; ".join(lines)

    def _counts(self) -> Iterator[str]:
        differences = len(self.lora.differences)
        found = sum(factors.kind == DIFF for factors in self.factors.values())
        if modules := len(self.lora.modules) - differences:
            yield f"{len(self.factors) - found} of {modules} {self.lora.kind} modules"
        if differences:
            yield f"{found} of {differences} whole differences"


def _listed(what: str, names: tuple[str, ...]) -> Iterator[str]:
    if names:
        shown = ", ".join(names[:NUM_NAMED])
        yield f"{len(names)} {what} ({shown}{', …' if len(names) > NUM_NAMED else ''})"


def select(lora: LoraFile, *, include: str | None = None, exclude: str | None = None) -> LoraFile:
    """The modules that a pattern keeps, less those that another one drops.

    A pattern may be found anywhere in the module's dotted name, its native name, or its key in the file. A bias goes by
    the names of its module.

    Raises:
        UserError: an invalid regular expression, or nothing is left.
    """
    kept = list(lora.modules)
    for flag, text, keeps in (("--include_patterns", include, True), ("--exclude_patterns", exclude, False)):
        if text is not None:
            pattern = _compiled(text, flag)
            kept = [name for name in kept if _occurs(pattern, lora, name) == keeps]
            if not kept:
                first = next(iter(lora.dotted.values()))
                remedy = f"its {len(lora.modules)} modules have names such as {first}"
                raise UserError(flag, text, f"a pattern that leaves modules of {lora.path.name}", remedy)
    return lora.only(kept)


def _compiled(pattern: str, flag: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        remedy = "see Python's documentation of re (a literal dot is \\.)"
        raise UserError(flag, f"{pattern} ({error})", "a regular expression", remedy) from error


def _occurs(pattern: re.Pattern[str], lora: LoraFile, name: str) -> bool:
    module = lora.dotted[name].removesuffix(BIAS)
    return any(pattern.search(text) for text in (module, native_name(module), lora.key_of(name)))


def expect_factors(lora: LoraFile, remedy: str) -> None:
    """Raises UserError for a file with whole differences, where nothing but factors can be used."""
    if names := lora.differences:
        got = f"{lora.key_of(names[0])}" + (f" and {len(names) - 1} more whole differences" if names[1:] else "")
        raise UserError(lora.where, got, "LoRA, LoHa or LoKr factors only", remedy)


def match(lora: LoraFile, weights: Mapping[str, tuple[int, ...]]) -> Matched:
    """Finds the weight of every module, and the tensor of every difference; prefixes of the checkpoint's layout do not
    matter.

    Args:
        weights: dotted name -> shape of all tensors of a checkpoint.

    Raises:
        UserError: a module has another shape than its weight, or no module has one at all.
    """
    factors = {}
    for weight, shape in weights.items():
        if name := _module_of(weight, lora):
            factors[weight] = lora.modules[name]
            if not factors[weight].fits(shape):
                key = lora.key_of(name, factors[weight].misfit(shape))
                got = f"{key} for a weight of shape {factors[weight].delta_shape}"
                expected = f"{tuple(shape)}, as {weight} has"
                raise UserError(lora.where, got, expected, "the LoRA was trained on a model of another size")
    if not factors:
        first = lora.key_of(next(iter(lora.sources)))
        got = f"{len(lora.modules)} {lora.table.architecture} modules, {first} first"
        expected = f"modules that the model has ({len(weights)} tensors, {next(iter(weights), 'none')} first)"
        raise UserError(lora.where, got, expected, "LoRAs only work with the model that they were trained on")
    found = {_module_of(weight, lora) for weight in factors}
    unmatched = tuple(lora.dotted[name] for name in lora.modules if name not in found)
    return Matched(lora=lora, factors=factors, unmatched=unmatched)


def _module_of(weight: str, lora: LoraFile) -> str | None:
    """The native name of the module in `lora` that `weight` belongs to; of what is no weight, the tensor's own."""
    ending = BIAS if weight.endswith(BIAS) else ""
    rests = list(without_prefixes(weight.removesuffix(".weight").removesuffix(ending)))
    names = (native_name(name + ending) for name in [*rests, *map(lora.table.from_diffusers, rests)])
    return next((name for name in names if name in lora.modules), None)
