"""KeyboardInterrupt at a chosen moment.

CPython delivers a signal to the main thread between two instructions: when a function starts, after a call, and when
a loop goes round. :class:`InterruptAt` raises at the n-th such moment in the code that matters.
"""

from __future__ import annotations

import dis
import inspect
import os
import sys
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch

import pylomin

_PYLOMIN = os.path.dirname(pylomin.__file__)
_LIBRARY = os.path.dirname(os.__file__)
_WATCHED = (
    _PYLOMIN,
    *(os.path.join(_LIBRARY, name) for name in ("threading.py", "weakref.py", "contextlib.py", "concurrent")),
)


class InterruptAt:
    """Raises KeyboardInterrupt at the n-th moment inside the block, and swallows it; counts them if ``n`` is None."""

    def __init__(self, n: int | None) -> None:
        self.n = n
        self.count = 0
        self.where = ""
        self._names: dict[CodeType, dict[int, str]] = {}
        self._previous: dict[FrameType, int] = {}

    def __enter__(self) -> InterruptAt:
        self._outer = sys.gettrace()
        sys.settrace(self._on_call)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> bool:
        sys.settrace(self._outer)
        self._previous.clear()
        return kind is KeyboardInterrupt

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_WATCHED):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if not frame.f_code.co_flags & inspect.CO_GENERATOR:  # it may be called in order to be closed
            self._moment(frame)
        return self._on_event

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            previous = self._previous.get(frame)
            self._previous[frame] = frame.f_lasti
            if previous is not None and self._is_moment(frame.f_code, previous):
                self._moment(frame)
        elif event == "return":
            self._previous.pop(frame, None)
        return self._on_event

    def _is_moment(self, code: CodeType, offset: int) -> bool:
        if code not in self._names:
            self._names[code] = {step.offset: step.opname for step in dis.get_instructions(code)}
        name = self._names[code].get(offset, "")
        return name.startswith("CALL") or name in ("JUMP_BACKWARD", "JUMP_ABSOLUTE")

    def _moment(self, frame: FrameType) -> None:
        self.count += 1
        if self.count == self.n:
            self.where = f"{frame.f_code.co_filename.removeprefix(os.path.dirname(_PYLOMIN))}:{frame.f_lineno}"
            self.where += f" {frame.f_code.co_name}"
            sys.settrace(None)
            raise KeyboardInterrupt


def moments(model: torch.nn.Module, x: torch.Tensor) -> int:
    """How many there are in one forward."""
    with InterruptAt(None) as count, torch.no_grad():
        model(x)
    return count.count
