"""Brings ranges of one remote file: into its place in the cache, or past it. Everything here runs in a line's loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence

from pylomin.errors import PylominError, StoreChangedError
from pylomin.remote.cache import Cache
from pylomin.remote.download import Write, download
from pylomin.remote.entry import Entry
from pylomin.remote.line import Running, Turn
from pylomin.remote.transport import ObjectState, Part
from pylomin.remote.urls import Url

REQUEST_BLOCKS = 16  # 4 MiB, at multiples of it; larger requests gain nothing, smaller ones share a line more finely
KEEP_BYTES = 256 << 20  # 256 MiB are written out to the disk together
CLAIM_POLL_S = 0.02  # another process says nothing when it has fetched what it claimed
CLAIM_S = 60.0  # who claims for so long without a result was stopped


class _Job(Turn):
    """Blocks that are fetched with one request."""

    task: asyncio.Task[None]

    def __init__(self, first: int, last: int, *, urgent: bool) -> None:
        super().__init__(urgent=urgent)
        self.first = first
        self.last = last


class Fetcher:
    """Fetches each block once, however many wait for it.

    Args:
        url: what to ask for.
        state: what it must be.
        entry: its place in ``cache``; closed with :meth:`close`.
    """

    def __init__(self, url: Url, state: ObjectState, entry: Entry, cache: Cache) -> None:
        self.url = url
        self.state = state
        self.entry = entry
        self.cache = cache
        self._jobs: dict[int, _Job] = {}  # by block
        self._running: Running | None = None  # whose tasks these are
        self._keeping: asyncio.Task[None] | None = None

    async def provide(
        self, running: Running, ranges: Iterable[tuple[int, int]], ahead: Iterable[tuple[int, int]] = ()
    ) -> bool:
        """Bring byte ranges, (start, stop exclusive), into the cache; begin to bring those of ``ahead``.

        Returns:
            False where not all of them are there in the end, because the cache cannot take them.

        Raises:
            StoreReadError: they cannot be had.
        """
        ranges = list(ranges)
        jobs = self._jobs_of(running, ranges, urgent=True)
        self._jobs_of(running, ahead, urgent=False)
        if jobs:
            await asyncio.wait([job.task for job in jobs])
        for job in jobs:
            if not job.task.cancelled() and (error := job.task.exception()) is not None:
                raise type(error)(*error.args) if isinstance(error, PylominError) else error  # several may raise it
        return all(self.entry.is_local(start, stop) for start, stop in ranges)

    async def begin(self, running: Running, ranges: Sequence[tuple[int, int]], urgent: bool) -> None:
        """Begin to bring byte ranges. What goes wrong is noticed by who asks for them."""
        self._jobs_of(running, ranges, urgent=urgent)

    async def read_past_cache(self, running: Running, ranges: Iterable[tuple[int, int]], write: Write) -> None:
        """Bring byte ranges, and give them to ``write``. Raises as :meth:`provide`."""
        step = self.entry.bytes_of(0, REQUEST_BLOCKS)[1]
        pieces = [(at, min(at + step, stop)) for start, stop in ranges for at in range(start, stop, max(step, 1))]
        tasks = [running.loop.create_task(self._read_past_cache(running, piece, write)) for piece in pieces]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # nobody writes there any more

    async def adopt(self, running: Running, beginning: bytes) -> None:
        """Keep the beginning of the file, which came when it was opened."""
        entry = self.entry
        whole = entry.missing(0, len(beginning))[:1]
        for first, last in whole:
            if first or entry.bytes_of(first, last)[1] > len(beginning) or not self.cache.reserve(entry, last - first):
                return
            self._put(first, last, beginning)

    async def close(self, running: Running) -> None:
        """Stop what is under way, let what was fetched be written out, leave the cache."""
        self._forget_those_of_others(running)
        jobs = set(self._jobs.values())
        for job in jobs:
            job.task.cancel()
        await asyncio.gather(*(job.task for job in jobs), return_exceptions=True)
        if self._keeping is not None:
            await asyncio.wait([self._keeping])
        self.cache.close(self.entry)

    def _jobs_of(self, running: Running, ranges: Iterable[tuple[int, int]], *, urgent: bool) -> list[_Job]:
        """The jobs that bring what is missing of ranges: those under way, and new ones."""
        self._forget_those_of_others(running)
        jobs: dict[_Job, None] = {}
        for start, stop in ranges:
            for first, last in self.entry.missing(start, stop):
                if not self.entry.writable:
                    self.entry.refresh(first, last)  # another process may write
                    continue
                block = first
                while block < last:
                    job = self._jobs.get(block)
                    if job is None:
                        end = min(last, block + REQUEST_BLOCKS - block % REQUEST_BLOCKS)
                        end = next((b for b in range(block, end) if b in self._jobs), end)
                        job = self._start(running, block, end, urgent=urgent)
                    elif urgent:
                        running.slots.hurry(job)
                    jobs[job] = None
                    block = job.last
        return list(jobs)

    def _forget_those_of_others(self, running: Running) -> None:
        """After a fork, the tasks of the parent's loop are not here."""
        if self._running is not running:
            self._jobs, self._keeping, self._running = {}, None, running

    def _start(self, running: Running, first: int, last: int, *, urgent: bool) -> _Job:
        job = _Job(first, last, urgent=urgent)
        for block in range(first, last):
            self._jobs[block] = job
        job.task = running.loop.create_task(self._bring(running, job))
        job.task.add_done_callback(_seen)
        return job

    async def _bring(self, running: Running, job: _Job) -> None:
        entry, loop = self.entry, running.loop
        deadline = math.inf
        try:
            while not entry.refresh(job.first, job.last):
                await running.slots.take(job)
                try:
                    if entry.claim(job.first, job.last) or loop.time() > deadline:
                        await self._fetch(running, job)
                        return
                finally:
                    running.slots.give()
                deadline = min(deadline, loop.time() + CLAIM_S)
                await asyncio.sleep(CLAIM_POLL_S)
        finally:
            for block in range(job.first, job.last):
                if self._jobs.get(block) is job:
                    del self._jobs[block]

    async def _fetch(self, running: Running, job: _Job) -> None:
        """What is still missing of claimed blocks."""
        entry = self.entry
        try:
            entry.refresh(job.first, job.last)
            start, stop = entry.bytes_of(job.first, job.last)
            for first, last in entry.missing(start, stop):
                if not self.cache.reserve(entry, last - first):
                    return
                kept = False
                try:
                    kept = self._put(first, last, await self._content(running, *entry.bytes_of(first, last)))
                finally:
                    if not kept:
                        entry.granted += last - first
                if not kept:
                    return
        finally:
            entry.unclaim(job.first, job.last)
        if self._keeping is None and self._is_much_unkept():
            self._keeping = running.finish(self._write_out())

    async def _content(self, running: Running, start: int, stop: int) -> bytearray:
        """In one piece: of what is written in small ones, the page cache is slower to map."""
        content = bytearray(stop - start)

        def take(offset_bytes: int, chunk: bytes) -> None:
            at = offset_bytes - start
            content[at : at + len(chunk)] = chunk

        await self._download(running, start, stop, take)
        return content

    def _put(self, first: int, last: int, content: bytes | bytearray) -> bool:
        """Write blocks into the cache and mark them; False where there is no room."""
        try:
            self.entry.write(self.entry.bytes_of(first, last)[0], content)
            self.entry.mark(first, last)
        except OSError as error:
            self.entry.writable = False
            self.cache.report(f"{error.strerror or error} (errno {error.errno})")
            return False
        return True

    def _is_much_unkept(self) -> bool:
        unkept_bytes = self.entry.unkept_bytes
        return unkept_bytes >= KEEP_BYTES or (unkept_bytes > 0 and self.entry.is_complete)

    async def _write_out(self) -> None:
        try:
            while self._is_much_unkept():  # more comes meanwhile
                modified_ns = await asyncio.to_thread(self.entry.keep)
                if modified_ns is not None:
                    self.cache.seal(self.entry, modified_ns)
        except (OSError, RuntimeError):  # a failing disk, or the interpreter ends: what is not kept is fetched again
            return
        finally:
            self._keeping = None

    async def _read_past_cache(self, running: Running, piece: tuple[int, int], write: Write) -> None:
        await running.slots.take(Turn(urgent=True))
        try:
            await self._download(running, *piece, write)
        finally:
            running.slots.give()

    async def _download(self, running: Running, start: int, stop: int, write: Write) -> None:
        await download(running, self.url, start, stop, self._check, write)

    def _check(self, part: Part) -> None:
        if part.state != self.state:
            raise StoreChangedError(
                f"{self.url.shown!r} was changed after it was opened: expected {self.state}, found {part.state}. Open "
                "it again to use what it holds now."
            )


def _seen(task: asyncio.Task[None]) -> None:
    """Whoever waits raises the error; where nobody does, it is no news."""
    if not task.cancelled():
        task.exception()
