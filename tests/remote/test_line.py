"""The thread that talks to a server, without one."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from pylomin.errors import StoreReadError
from pylomin.remote.line import IN_FLIGHT, Line, Running, Slots, Turn
from pylomin.remote.transport import Begin
from pylomin.remote.urls import Url


class NoServer:
    """Counts what is done to it."""

    def __init__(self) -> None:
        self.started = self.closed = 0

    async def start(self) -> None:
        self.started += 1

    async def get(self, url: Url, start: int, stop: int, begin: Begin) -> None:
        raise AssertionError

    async def names(self, url: Url) -> list[str]:
        raise AssertionError

    async def close(self) -> None:
        self.closed += 1


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pylomin-remote"]


def test_the_thread_begins_and_ends_with_its_line():
    server = NoServer()
    line = Line(lambda: server)
    assert not line.is_running
    assert threads() == []

    async def connected(running: Running) -> bool:
        return await running.transport() is server

    assert line.run(connected)
    assert line.run(connected)
    assert line.is_running
    assert len(threads()) == 1
    del line
    gc.collect()
    assert threads() == []
    assert (server.started, server.closed) == (1, 1)


def test_many_threads_share_it():
    line = Line(NoServer)
    found: list[int] = []

    async def number(running: Running) -> int:
        return id(running)

    together = [threading.Thread(target=lambda line=line: found.append(line.run(number))) for _ in range(20)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert len(found) == 20
    assert len(set(found)) == 1
    assert len(threads()) == 1
    del line


def test_who_waits_when_it_ends_is_told():
    line = Line(NoServer)
    begun = threading.Event()
    errors: list[BaseException] = []

    async def forever(running: Running) -> None:
        begun.set()
        await asyncio.Event().wait()

    def wait(line: Line) -> None:
        try:
            line.run(forever)
        except StoreReadError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait, args=(line,))
    waiting.start()
    assert begun.wait(30)
    running = line.running()
    running.loop.call_soon_threadsafe(running.loop.stop)
    waiting.join(30)
    assert not waiting.is_alive()
    assert "closed" in str(errors[0])
    del line, running


def test_ends_while_its_thread_does(monkeypatch):
    """The loop is closed and its thread not yet gone."""
    line = Line(NoServer)
    running = line.running()
    close, closed, go_on = running.loop.close, threading.Event(), threading.Event()

    def close_and_wait() -> None:
        close()
        closed.set()
        go_on.wait(30)

    monkeypatch.setattr(running.loop, "close", close_and_wait)
    running.loop.call_soon_threadsafe(running.loop.stop)
    assert closed.wait(30)
    join = running.thread.join
    monkeypatch.setattr(running.thread, "join", lambda: (go_on.set(), join()))
    del line
    gc.collect()
    assert go_on.is_set()
    assert threads() == []


def test_what_is_to_be_finished_is():
    line = Line(NoServer)
    done: list[int] = []

    async def later(running: Running) -> None:
        await asyncio.sleep(0.05)
        done.append(1)

    line.post(later)
    del line
    assert done == [1]


def test_a_transport_that_does_not_start_is_tried_again():
    class Failing(NoServer):
        async def start(self) -> None:
            await super().start()
            if self.started == 1:
                raise StoreReadError("not yet")

    server = Failing()
    line = Line(lambda: server)

    async def connected(running: Running) -> bool:
        return await running.transport() is server

    with pytest.raises(StoreReadError, match="not yet"):
        line.run(connected)
    assert line.run(connected)
    assert server.started == 2
    del line
    gc.collect()
    assert threads() == []


def test_who_is_urgent_goes_first():
    order: list[str] = []

    async def one(slots: Slots, name: str, turn: Turn) -> None:
        await slots.take(turn)
        order.append(name)
        slots.give()

    async def main() -> None:
        slots = Slots(1)
        await slots.take(Turn(urgent=True))
        turns = {name: Turn(urgent=name.isupper()) for name in ("a", "b", "C", "d", "E")}
        tasks = [asyncio.ensure_future(one(slots, name, turn)) for name, turn in turns.items()]
        await asyncio.sleep(0)
        slots.hurry(turns["d"])
        tasks[0].cancel()
        await asyncio.sleep(0)
        slots.give()
        await asyncio.gather(*tasks, return_exceptions=True)
        await slots.take(Turn(urgent=False))  # all were given back

    asyncio.run(main())
    assert order == ["C", "E", "d", "b"]


def test_no_more_than_there_are_slots():
    running_now = most = 0

    async def one(slots: Slots) -> None:
        nonlocal running_now, most
        await slots.take(Turn(urgent=False))
        running_now += 1
        most = max(most, running_now)
        await asyncio.sleep(0)
        running_now -= 1
        slots.give()

    async def main() -> None:
        slots = Slots(IN_FLIGHT)
        await asyncio.gather(*(one(slots) for _ in range(100)))

    asyncio.run(main())
    assert most == IN_FLIGHT
