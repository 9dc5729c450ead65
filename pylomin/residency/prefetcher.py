"""Background reads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Prefetcher:
    """One reader thread, started with the first task.

    It ends with :meth:`close`, when nobody refers to this object any more, and before the interpreter does.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pylomin-prefetch")

    def submit(self, task: Callable[[], None], abandon: Callable[[], None]) -> None:
        """Run ``task`` in the background; or ``abandon``, if it will never run."""
        try:
            future = self._executor.submit(task)
        except RuntimeError:  # closed, or the interpreter is shutting down
            abandon()
            return
        future.add_done_callback(lambda done: _after(done, abandon))

    def close(self) -> None:
        """Let the running task finish, abandon the others, end the thread. Idempotent."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _after(done: Future[None], abandon: Callable[[], None]) -> None:
    if done.cancelled():
        abandon()
