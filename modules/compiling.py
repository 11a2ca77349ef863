"""torch.compile, block by block: the blocks of one kind share what is compiled, and nothing else is."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.attention import AttentionLayout, AttentionOptions, attend
from options.errors import UserError, did_you_mean, one_line
from options.flags_compile import CompileChoice

logger = logging.getLogger(__name__)


def compile_blocks(blocks: Iterable[nn.Module], choice: CompileChoice) -> None:
    """Lets each block compile its forward when it is first called. Names of parameters stay as they are.

    Hooks of a block stay outside. Adapters may come and go afterwards: compiled code notices, and another form of it is
    made where there is none yet.
    """
    arguments = _arguments(choice)
    for block in blocks:
        block.forward = torch.compile(block.forward, **arguments)


def check_compiling(
    choice: CompileChoice, attention: AttentionOptions, *, device: torch.device, dtype: torch.dtype
) -> None:
    """Compiles a little of what blocks do, and logs how long that took.

    Raises:
        UserError: torch has no such backend, or it does not work on this machine.
    """
    from torch import _dynamo

    known = _dynamo.list_backends(exclude_tags=())
    if choice.backend not in known:
        offered = sorted({*_dynamo.list_backends(), "eager", "aot_eager"})
        where = choice.flag if choice.flag == "--dynamo_backend" else "--compile_backend"
        remedy = did_you_mean(choice.backend, offered, f"leave {where} out")
        raise UserError(where, choice.backend, f"one of {', '.join(offered)}", remedy)
    start = time.perf_counter()
    try:
        _try(choice, attention, device, dtype)
    except Exception as error:  # whatever a backend may raise that lacks its compiler
        told = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0]
        reason = one_line(f"{type(error).__name__}: {told}")[:200]
        expected = "a backend that works on this machine"
        got, remedy = f"{choice.backend}, which fails ({reason})", f"{_help(choice, device)}leave {choice.flag} out"
        raise UserError(choice.flag, got, expected, remedy) from error
    logger.info("blocks are compiled by %s (a trial took %.1f s)", choice.backend, time.perf_counter() - start)


def _try(choice: CompileChoice, attention: AttentionOptions, device: torch.device, dtype: torch.dtype) -> None:
    layout = AttentionLayout(backend=attention.backend)

    def block(x: Tensor) -> Tensor:
        return F.silu(attend(x, x + 1, 2 * x, layout))

    tokens = torch.ones(1, 256, 2, 128, device=device, dtype=dtype)
    with torch.no_grad():
        torch.compile(block, **_arguments(choice))(tokens)


def _help(choice: CompileChoice, device: torch.device) -> str:
    """What inductor usually lacks."""
    if choice.backend != "inductor":
        return ""
    if device.type == "cpu":
        return "install a C++ compiler (on Windows Visual Studio's), or "
    return "install Triton (on Windows: pip install triton-windows), or "


def _arguments(choice: CompileChoice) -> dict[str, object]:
    """Of `torch.compile`."""
    arguments = {
        "backend": choice.backend,
        "mode": None if choice.mode == "default" else choice.mode,
        "dynamic": choice.dynamic,
        "fullgraph": choice.fullgraph,
    }
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return arguments | {"recompile_limit": choice.cache_size_limit}
    # Older versions of torch have one limit for the whole process.
    from torch import _dynamo

    _dynamo.config.cache_size_limit = choice.cache_size_limit
    return arguments
