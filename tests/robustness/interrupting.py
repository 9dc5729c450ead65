"""KeyboardInterrupt at a chosen moment.

CPython delivers a signal to the main thread between two instructions: when a function starts, after a call, and when
a loop goes round. :class:`InterruptAt` raises at such a moment in the code that matters.
"""

from __future__ import annotations

import dis
import functools
import inspect
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from types import CodeType, FrameType, TracebackType
from typing import Any

import pylomin

_PYLOMIN = os.path.dirname(pylomin.__file__)
_LIBRARY = os.path.dirname(os.__file__)
_WATCHED = (
    _PYLOMIN,
    *(os.path.join(_LIBRARY, name) for name in ("threading.py", "weakref.py", "contextlib.py", "concurrent")),
)


@functools.cache
def _moments(code: CodeType) -> set[int]:
    """Offsets of the instructions after which a signal is delivered."""
    jumps = ("JUMP_BACKWARD", "JUMP_ABSOLUTE")
    return {
        step.offset for step in dis.get_instructions(code) if step.opname.startswith("CALL") or step.opname in jumps
    }


class InterruptAt:
    """Raises KeyboardInterrupt inside the block when a place is passed for the n-th time, and swallows it.

    Without a place, it only lists those that are passed.
    """

    def __init__(self, place: str | None = None, n: int = 1) -> None:
        self.place = place
        self.n = n
        self.passed: list[str] = []
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
            self._moment(frame, -1)
        return self._on_event

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            previous = self._previous.get(frame)
            self._previous[frame] = frame.f_lasti
            if previous is not None and previous in _moments(frame.f_code):
                self._moment(frame, previous)
        elif event == "return":
            self._previous.pop(frame, None)
        return self._on_event

    def _moment(self, frame: FrameType, offset: int) -> None:
        code = frame.f_code
        file = code.co_filename.removeprefix(os.path.dirname(_PYLOMIN))
        place = f"{file}:{frame.f_lineno} {code.co_name} after {offset}"
        self.passed.append(place)
        if place == self.place and self.passed.count(place) == self.n:
            sys.settrace(None)
            raise KeyboardInterrupt


def places(run: Callable[[], object], *, library: bool = True) -> list[tuple[str, int]]:
    """All places that ``run()`` passes, each with a time at which to stop there; maybe not those in the library."""
    with InterruptAt() as interrupt:
        run()
    chance, times = random.Random(0), Counter(interrupt.passed)
    if not library:
        times = Counter({place: n for place, n in times.items() if place.startswith("/pylomin")})
    return [(place, chance.randint(1, n)) for place, n in times.items()]
