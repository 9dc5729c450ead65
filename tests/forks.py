"""Runs what a test does in forked processes."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable
from typing import Any

CHILD_S = 8  # then the system kills it


class Child:
    """A forked process that calls ``function`` and ends.

    OpenMP's threads do not survive a fork: torch must compute with one thread there, or not at all.
    """

    def __init__(self, function: Callable[[], Any], limit_s: int = CHILD_S) -> None:
        self._reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            signal.alarm(limit_s)
            try:
                try:
                    outcome = (True, function())
                except BaseException:
                    outcome = (False, traceback.format_exc())
                with os.fdopen(writing, "wb") as pipe:
                    pickle.dump(outcome, pipe)
            finally:
                os._exit(0)
        os.close(writing)

    def result(self) -> Any:
        """What the function returned, or its traceback as an AssertionError."""
        raw, signal_number = self._end()
        assert not signal_number, f"the child was killed by signal {signal_number}: it hung, or crashed"
        succeeded, value = pickle.loads(raw)
        assert succeeded, value
        return value

    def killed(self) -> None:
        """Wait for one that is killed."""
        assert self._end() == (b"", signal.SIGKILL)

    def _end(self) -> tuple[bytes, int]:
        with os.fdopen(self._reading, "rb") as pipe:
            raw = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        return raw, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def in_child(function: Callable[[], Any], limit_s: int = CHILD_S) -> Any:
    """:meth:`Child.result` of a new one."""
    return Child(function, limit_s).result()
