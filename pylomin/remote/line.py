"""The thread that talks to one server: a few requests at a time, those that somebody waits for first."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import heapq
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pylomin.errors import PylominError, StoreReadError, without_frames
from pylomin.remote.transport import Transport

IN_FLIGHT = 8  # requests

T = TypeVar("T")


class Turn:
    """A request that waits for its turn. In the loop's thread only."""

    def __init__(self, *, urgent: bool) -> None:
        self.urgent = urgent
        self.comes: asyncio.Future[None] | None = None


class Slots:
    """As many at a time as there are slots; who is urgent goes first."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: list[tuple[bool, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    async def take(self, turn: Turn) -> None:
        if self._free:
            self._free -= 1
            return
        turn.comes = asyncio.get_running_loop().create_future()
        self._push(turn)
        try:
            await turn.comes
        except asyncio.CancelledError:
            if turn.comes.done() and not turn.comes.cancelled():
                self.give()
            raise
        finally:
            turn.comes = None

    def give(self) -> None:
        """What was taken."""
        while self._waiting:
            comes = heapq.heappop(self._waiting)[2]
            if not comes.done():
                comes.set_result(None)
                return
        self._free += 1

    def hurry(self, turn: Turn) -> None:
        """Somebody waits for it now."""
        if not turn.urgent:
            turn.urgent = True
            if turn.comes is not None:
                self._push(turn)  # the other place in the queue is passed over

    def _push(self, turn: Turn) -> None:
        assert turn.comes is not None
        heapq.heappush(self._waiting, (not turn.urgent, next(self._order), turn.comes))


class Running:
    """The thread of one process, its loop and what lives in it."""

    def __init__(self, connect: Callable[[], Transport]) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._serve, name="pylomin-remote", daemon=True)
        self.slots = Slots(IN_FLIGHT)
        self.finishing: set[asyncio.Task[None]] = set()  # what is not cut short at the end
        self._connect = connect
        self._transport: Transport | None = None
        self._starting = asyncio.Lock()

    async def transport(self) -> Transport:
        """Started; one that did not start is forgotten."""
        async with self._starting:
            if self._transport is None:
                transport = self._connect()
                await transport.start()
                self._transport = transport
            return self._transport

    def finish(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Let something run to its end, even if the line is closed meanwhile."""
        task = self.loop.create_task(work)
        self.finishing.add(task)
        task.add_done_callback(self.finishing.discard)
        return task

    def _serve(self) -> None:
        with contextlib.closing(self.loop):
            self.loop.run_forever()
            self.loop.run_until_complete(self._wind_up())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())

    async def _wind_up(self) -> None:
        others = asyncio.all_tasks() - self.finishing - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, *self.finishing, return_exceptions=True)
        if self._transport is not None:
            await self._transport.close()


class Line:
    """Runs coroutines in its thread, for callers in any other. The thread ends with this object.

    In a forked child it starts anew.
    """

    def __init__(self, connect: Callable[[], Transport]) -> None:
        self._connect = connect
        self._started: list[Running] = []  # in this process; the first one counts
        _lines.add(self)

    @property
    def is_running(self) -> bool:
        """In this process; at its end, not any more."""
        return bool(self._started) and self._started[0].thread.is_alive()

    def run(self, function: Callable[[Running], Coroutine[Any, Any, T]]) -> T:
        """The result of a coroutine. An interrupt ends the wait and not the coroutine."""
        running = self.running()
        future = asyncio.run_coroutine_threadsafe(function(running), running.loop)
        try:
            return future.result()
        except (asyncio.CancelledError, concurrent.futures.CancelledError):
            final: BaseException = StoreReadError("the store was closed while it was read. Open it again.")
        except PylominError as error:
            # A copy: what the loop keeps must not keep our frames, nor ours those of the loop.
            final = type(error)(*error.args)
            final.__cause__ = without_frames(error).__cause__
        raise final

    def post(self, function: Callable[[Running], Coroutine[Any, Any, None]]) -> None:
        """Let a coroutine run, and do not wait for it."""
        running = self.running()
        running.loop.call_soon_threadsafe(lambda: running.finish(function(running)))

    def run_at_end(self, function: Callable[[Running], Coroutine[Any, Any, None]]) -> None:
        """As :meth:`run`, but from finalizers, which any thread may run: the loop's own does not wait for itself."""
        running = self.running()
        if threading.current_thread() is running.thread:
            running.finish(function(running))
        else:
            self.run(function)

    def running(self) -> Running:
        """Of this process; it begins with the first call."""
        if not self._started:
            # In this order: an interrupt in between leaves nothing that never ends, or that never begins.
            new = Running(self._connect)
            weakref.finalize(self, _end, new)
            new.thread.start()
            self._started.append(new)
            if self._started[0] is not new:  # another thread came here at the same time
                _end(new)
        return self._started[0]

    def reset_after_fork(self) -> None:
        """The thread stayed in the parent; what lives in its loop is never collected here.

        To collect it would take the parent's sockets out of the selector, which both processes share.
        """
        _of_parents.extend(self._started)
        self._started = []


def _end(running: Running) -> None:
    if running.thread is threading.current_thread():
        running.loop.call_soon(running.loop.stop)
    elif running.thread.is_alive():  # not so in a forked child
        with contextlib.suppress(RuntimeError):  # the loop is closed: the thread is about to end by itself
            running.loop.call_soon_threadsafe(running.loop.stop)
        running.thread.join()


_lines: weakref.WeakSet[Line] = weakref.WeakSet()
_of_parents: list[Running] = []


def _reset_all_after_fork() -> None:
    for line in list(_lines):
        line.reset_after_fork()


os.register_at_fork(after_in_child=_reset_all_after_fork)
