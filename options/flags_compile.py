"""The flags of torch.compile, which generation and training share."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from options.errors import UserError
from options.flag_fields import flag

CACHE_SIZE_LIMIT = 32
"""torch's own limit of 8 is soon reached: with and without gradients, masks and adapters, for a few sizes."""


@dataclass(frozen=True, kw_only=True)
class CompileChoice:
    """What torch.compile is told."""

    flag: str
    """That asked for it, for messages."""
    backend: str = "inductor"
    mode: str = "default"
    dynamic: bool | None = None
    """Shapes: any, fixed, or as torch finds fit."""
    fullgraph: bool = False
    cache_size_limit: int = CACHE_SIZE_LIMIT
    """How many forms of a block there may be before others run uncompiled."""


@dataclass(frozen=True, kw_only=True)
class CompileFlags:
    """Compilation of the transformer's blocks."""

    compile: bool = flag("torch.compile the blocks: slow to begin with, faster then", default=False)
    compile_backend: str = flag("its backend", default="inductor")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = flag(
        "its mode", default="default"
    )
    compile_dynamic: Literal["true", "false", "auto"] | None = flag("shapes that may change (default: auto)")
    compile_fullgraph: bool = flag("fail where a block cannot be compiled in one piece", default=False)
    compile_cache_size_limit: int | None = flag(f"forms of a block that are compiled (default: {CACHE_SIZE_LIMIT})")

    @property
    def choice(self) -> CompileChoice | None:
        """None where nothing is compiled."""
        if not self.compile:
            return None
        return CompileChoice(
            flag="--compile",
            backend=self.compile_backend,
            mode=self.compile_mode,
            dynamic={"true": True, "false": False}.get(self.compile_dynamic),
            fullgraph=self.compile_fullgraph,
            cache_size_limit=self.compile_cache_size_limit or CACHE_SIZE_LIMIT,
        )

    def hints(self) -> Iterator[str]:
        """What has no effect, for the log."""
        if not self.compile:
            yield from _unread(self, "compile_", "--compile")


@dataclass(frozen=True, kw_only=True)
class TrainCompileFlags(CompileFlags):
    """Compilation of the transformer's blocks; `--dynamo_backend` asks for the same in accelerate's words."""

    dynamo_backend: str = flag("torch.compile the blocks with this backend; NO is off", default="NO")
    dynamo_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = flag(
        "its mode"
    )
    dynamo_fullgraph: bool = flag("fail where a block cannot be compiled in one piece", default=False)
    dynamo_dynamic: bool = flag("compile for any shape from the first", default=False)

    @property
    def choice(self) -> CompileChoice | None:
        if self.compile or self.dynamo_backend.upper() == "NO":
            return super().choice
        return CompileChoice(
            flag="--dynamo_backend",
            backend=self.dynamo_backend.lower(),
            mode=self.dynamo_mode or "default",
            dynamic=True if self.dynamo_dynamic else None,
            fullgraph=self.dynamo_fullgraph,
            cache_size_limit=self.compile_cache_size_limit or CACHE_SIZE_LIMIT,
        )

    def hints(self) -> Iterator[str]:
        if self.compile:
            yield from _unread(self, "dynamo_", None)
        elif self.dynamo_backend.upper() == "NO":
            yield from super().hints()
            yield from _unread(self, "dynamo_", "--dynamo_backend")
        else:
            yield from _unread(self, "compile_", "--compile", besides=("compile_cache_size_limit",))


GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Record CUDA graphs, which read weights where they lay."""


def check_compile(flags: CompileFlags, *, swaps: bool) -> None:
    """Raises UserError for a limit that lets nothing be compiled, or a mode that swapped blocks would mislead.

    Args:
        swaps: whether blocks come and go.
    """
    if swaps and flags.choice is not None and flags.choice.mode in GRAPH_MODES:
        got = f"{flags.choice.mode} with --blocks_to_swap"
        raise UserError(flags.choice.flag, got, "weights that stay in one place", "use max-autotune-no-cudagraphs")
    limit = flags.compile_cache_size_limit
    if limit is not None and limit < 1:
        raise UserError("--compile_cache_size_limit", limit, "1 or more", "leave it out, or change it")


def _unread(flags: CompileFlags, prefix: str, needed: str | None, besides: tuple[str, ...] = ()) -> Iterator[str]:
    """Flags of one kind that were given for nothing."""
    why = "beside --compile" if needed is None else f"without {needed}"
    for field in fields(flags):
        is_given = getattr(flags, field.name) != field.default
        if field.name.startswith(prefix) and field.name not in besides and is_given:
            yield f"--{field.name} has no effect {why}"
