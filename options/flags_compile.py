"""The flags of torch.compile, which generation and training share."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from options.errors import UserError
from options.flag_fields import flag

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
CACHE_SIZE_LIMIT = 32
"""torch's own limit of 8 is soon reached: with and without gradients, masks and adapters, for a few sizes."""
DYNAMIC = {"true": True, "false": False, "auto": None}


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
    compile_mode: CompileMode = flag("its mode", default="default")
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
            dynamic=DYNAMIC.get(self.compile_dynamic),
            fullgraph=self.compile_fullgraph,
            cache_size_limit=self.compile_cache_size_limit or CACHE_SIZE_LIMIT,
        )

    def hints(self) -> Iterator[str]:
        """What has no effect, for the log."""
        if not self.compile:
            yield from _unread(self, "compile_", "without --compile")


@dataclass(frozen=True, kw_only=True)
class CompileArgsFlags(CompileFlags):
    """Compilation of the transformer's blocks; `--compile_args` says it all at once, as it once had to be said."""

    compile_args: tuple[str, str, str, str] | None = flag("in place of the others: backend, mode, dynamic, fullgraph")

    @property
    def choice(self) -> CompileChoice | None:
        """None where nothing is compiled.

        Raises:
            UserError: `--compile_args` with something else in it.
        """
        if not self.compile or self.compile_args is None:
            return super().choice
        backend, mode, dynamic, fullgraph = self.compile_args
        dynamic, fullgraph = dynamic.lower().replace("none", "auto"), fullgraph.lower()
        if mode not in get_args(CompileMode) or dynamic not in DYNAMIC or fullgraph not in ("true", "false"):
            expected = "a backend, a mode, true, false or auto, and true or false"
            remedy = "write inductor default auto false, say"
            raise UserError("--compile_args", " ".join(self.compile_args), expected, remedy)
        values = {"compile_backend": backend, "compile_mode": mode, "compile_dynamic": dynamic}
        return replace(self, compile_args=None, compile_fullgraph=fullgraph == "true", **values).choice

    def hints(self) -> Iterator[str]:
        yield from super().hints()
        if self.compile and self.compile_args is not None:
            own = ("compile_args", "compile_cache_size_limit")
            yield from _unread(self, "compile_", "beside --compile_args", besides=own)


@dataclass(frozen=True, kw_only=True)
class TrainCompileFlags(CompileFlags):
    """Compilation of the transformer's blocks; `--dynamo_backend` asks for the same in accelerate's words."""

    dynamo_backend: str = flag("torch.compile the blocks with this backend; NO is off", default="NO")
    dynamo_mode: CompileMode | None = flag("its mode")
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
            yield from _unread(self, "dynamo_", "beside --compile")
        elif self.dynamo_backend.upper() == "NO":
            yield from super().hints()
            yield from _unread(self, "dynamo_", "without --dynamo_backend")
        else:
            yield from _unread(self, "compile_", "without --compile", besides=("compile_cache_size_limit",))


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


def _unread(flags: CompileFlags, prefix: str, why: str, besides: tuple[str, ...] = ()) -> Iterator[str]:
    """Flags of one kind that were given for nothing."""
    for field in fields(flags):
        is_given = getattr(flags, field.name) != field.default
        if field.name.startswith(prefix) and field.name not in besides and is_given:
            yield f"--{field.name} has no effect {why}"
