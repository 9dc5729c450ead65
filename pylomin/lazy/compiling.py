"""What ``torch.compile`` and ``torch.jit.trace`` must leave alone: reads from files are no graph."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ParamSpec, TypeVar

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


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` is recording this thread."""
    tracing: bool = torch._C._is_tracing()
    return tracing


class Untraced:
    """A context manager whose entry and exit ``torch.jit.trace`` does not record; what is between, it does."""

    def __init__(self, inner: AbstractContextManager[Any]) -> None:
        self._inner = inner

    def __enter__(self) -> None:
        with _tracing_off():
            self._inner.__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        with _tracing_off():
            self._inner.__exit__(*exc_info)


@contextmanager
def _tracing_off() -> Iterator[None]:
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
