"""Flags about compilation, the same in training and in generation."""

from dataclasses import dataclass

from options.flag_fields import later


@dataclass(frozen=True, kw_only=True)
class CompileFlags:
    """Compilation by torch."""

    compile: bool = later("torch.compile the blocks", default=False)
    compile_backend: str = later("its backend", default="inductor")
    compile_mode: str = later("its mode", default="default")
    compile_dynamic: str | None = later("its dynamic shapes: true, false, auto")
    compile_fullgraph: bool = later("no graph breaks", default=False)
    compile_cache_size_limit: int | None = later("graphs kept per function")
