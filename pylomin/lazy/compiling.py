"""What ``torch.compile`` must leave alone: reads from files, and the locks around them, are no graph."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.disable``, without importing the compiler (a second or more) for those who do not use it."""
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            code = run.__code__  # type: ignore[attr-defined]
            torch._dynamo.eval_frame.skip_code(code)  # where torch itself calls it, from compiled code
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]  # where compiled code calls it
    return run
