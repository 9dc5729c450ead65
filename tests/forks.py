"""Runs what a test does in a forked process."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable
from typing import Any

CHILD_S = 8  # then the system kills it


def in_child(function: Callable[[], Any], limit_s: int = CHILD_S) -> Any:
    """What ``function`` returns in a forked process, or its traceback as an AssertionError.

    OpenMP's threads do not survive a fork: torch must compute with one thread there, or not at all.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
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
    with os.fdopen(reading, "rb") as pipe:
        raw = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert not os.WIFSIGNALED(status), f"the child was killed by signal {os.WTERMSIG(status)}: it hung, or crashed"
    succeeded, value = pickle.loads(raw)
    assert succeeded, value
    return value
