"""Classes that users name: found, checked against the arguments that they are to be given, and built."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar

from options.errors import UserError, did_you_mean, nearest

Built = TypeVar("Built")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What kind of class a flag names, and where such classes are."""

    where: str
    """The flag, for messages."""
    noun: str
    """As in `an optimizer`."""
    fits: Callable[[type], bool]
    """Whether a class is of the kind."""
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    """Name in lower case → full name, of known classes outside of the module of names without a dot."""


def find_class(name: str, home: str, wanted: Wanted) -> type:
    """The class of a name such as `AdamW` or `package.module.Class`.

    Args:
        home: the module of names without a dot, which may be written in any case.

    Raises:
        UserError: there is no such module or class, or it is of another kind.
    """
    module_name, _, class_name = name.rpartition(".")
    module = _import(module_name or home, name, wanted.where)
    found = getattr(module, class_name, None)
    if isinstance(found, type) and wanted.fits(found):
        return found
    classes = [key for key, value in vars(module).items() if isinstance(value, type) and wanted.fits(value)]
    by_lower = {key.lower(): key for key in classes if not key.startswith("_")}
    if not module_name and name.lower() in by_lower:
        return getattr(module, by_lower[name.lower()])
    if full := wanted.elsewhere.get(name.lower()):
        remedy = f"write {full}, and install its package"
    elif like := nearest(class_name.lower(), by_lower):
        remedy = f"did you mean {module_name + '.' if module_name else ''}{by_lower[like]}?"
    else:
        remedy = f"{module.__name__} has {', '.join(sorted(by_lower.values())) or 'none'}"
    raise UserError(wanted.where, name, f"{wanted.noun} of {module.__name__}", remedy)


def check_arguments(where: str, target: Callable, given: Mapping[str, Any], *, automatic: Collection[str]) -> None:
    """Raises UserError when `target` would not take `given`, or lacks an argument.

    Args:
        where: the flag that the arguments come from.
        automatic: the names of arguments that users do not give.
    """
    parameters = [p for p in inspect.signature(target).parameters.values() if p.name not in automatic]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    expected = f"arguments of {target.__name__}: {', '.join(names) or 'it has none'}"
    for name in given:
        if name not in names and not open_ended:
            raise UserError(where, name, expected, did_you_mean(name, names, "remove it"))
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in given:
            raise UserError(where, f"no {parameter.name}", expected, f"add {parameter.name}=...")


def attempt(where: str, what: str, action: Callable[[], Built]) -> Built:
    """What `action` returns; whatever a foreign class complains about becomes a UserError.

    Args:
        where: the flag that the class or its arguments come from.
        what: what is attempted, as in `AdamW with betas=2`.
    """
    try:
        return action()
    except UserError:
        raise
    except Exception as error:
        got = f"{what}, which fails ({type(error).__name__}: {error})"
        raise UserError(where, got, "one that works here", "change the arguments, or use another") from error


def accepts(target: Callable, name: str) -> bool:
    """Whether `target` has a parameter of this name or takes any."""
    parameters = inspect.signature(target).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def shown(name: str, arguments: Mapping[str, Any]) -> str:
    """`Class(key=value,...)`, or the name alone."""
    return name + (f"({','.join(f'{key}={value}' for key, value in arguments.items())})" if arguments else "")


def _import(module: str, name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # what a module does when it is imported is its own affair
        remedy = f"install the package that holds it, or correct the name ({error})"
        raise UserError(where, name, f"a module {module} that can be imported", remedy) from error
