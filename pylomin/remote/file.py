"""A remote file as a weight file: what is in the cache is read there, in every way that local files are."""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import accumulate

from pylomin.errors import StoreReadError
from pylomin.io.buffers import PAGE_BYTES
from pylomin.io.files import Extent, WeightFile
from pylomin.remote.cache import Cache
from pylomin.remote.entry import Entry
from pylomin.remote.fetching import Fetcher
from pylomin.remote.line import Line
from pylomin.remote.transport import ObjectState, SinkError
from pylomin.remote.urls import Url

# What follows is fetched while what was read computes: enough to keep a line busy that is slower than that.
AHEAD_FACTOR = 8  # times as much as is read
AHEAD_BYTES = 256 << 20  # 256 MiB at most


class RemoteFile(WeightFile):
    """Reads wait for what is not in the cache; afterwards it is there, if there is room.

    That the remote file is still the one that was opened is checked whenever something is fetched. What was fetched is
    used whatever becomes of it.

    Args:
        url: what to ask for.
        shown: what errors call it.
        state: what it must be.
        entry: its place in ``cache``.
    """

    def __init__(self, url: Url, shown: str, state: ObjectState, entry: Entry, cache: Cache, line: Line) -> None:
        super().__init__(shown, watched=False, descriptor=entry.data)
        self._map_refusal = None  # other than of scratch files, no byte changes once it may be read
        self._entry = entry
        self._cache = cache
        self._line: Line | None = line
        self._fetcher = Fetcher(url, state, entry, cache)
        self._next: weakref.ref[RemoteFile] | None = None
        self._reads_ahead = False
        self._leave = weakref.finalize(self, _leave, line, self._fetcher)

    def read_ahead(self, following: RemoteFile | None = None) -> None:
        """From now on, fetch what follows what is read: headers were read, and weights come next.

        Args:
            following: the file that is read when this one was read to its end.
        """
        self._reads_ahead = True
        self._next = None if following is None else weakref.ref(following)

    def adopt(self, beginning: bytes) -> None:
        """Keep the beginning of the file, which came when it was opened."""
        if self._entry.missing(0, len(beginning)):
            self._connected().run(partial(self._fetcher.adopt, beginning=beginning))

    def read(self, offset_bytes: int, buffers: Sequence[memoryview], *, drop_cache: bool = False) -> None:
        """As :meth:`WeightFile.read`."""
        if self._provide([(offset_bytes, offset_bytes + sum(map(len, buffers)))]):
            super().read(offset_bytes, buffers, drop_cache=drop_cache)
        else:
            self._read_past_cache(offset_bytes, buffers, drop_cache=drop_cache)

    def read_direct(self, offset_bytes: int, nbytes: int, buffer: memoryview) -> None:
        """As :meth:`WeightFile.read_direct`."""
        if self._provide([(offset_bytes, offset_bytes + nbytes)]):
            super().read_direct(offset_bytes, nbytes, buffer)
        else:
            target = buffer[offset_bytes % PAGE_BYTES :][:nbytes]
            self._read_past_cache(offset_bytes, [target], drop_cache=True)

    def announce(self, extents: Sequence[Extent]) -> None:
        """Begin to fetch them all."""
        self._begin([(extent.start, extent.stop) for extent in extents], urgent=True)

    def prefetch_hint(self, offset_bytes: int, length_bytes: int) -> None:
        """Begin to fetch; of what is here already, as :meth:`WeightFile.prefetch_hint`."""
        stop = offset_bytes + length_bytes
        if self._entry.is_local(offset_bytes, stop):
            super().prefetch_hint(offset_bytes, length_bytes)
        else:
            self._begin([(offset_bytes, stop)], urgent=True)

    def cached_fraction(self, extents: Sequence[Extent], samples: int = 64) -> float | None:
        """How much of the extents is in the page cache of this machine, 0 to 1."""
        here = [extent for extent in extents if self._entry.is_local(extent.start, extent.stop)]
        total = sum(extent.nbytes for extent in extents)
        if not here or not total:
            return 0.0 if self._descriptor is not None else None
        cached = super().cached_fraction(here, samples)
        return None if cached is None else cached * sum(extent.nbytes for extent in here) / total

    def is_at_path(self) -> bool:
        """False: nobody else finds a file under this URL."""
        return False

    def close(self) -> None:
        """Stop what is under way, and give everything back as soon as no read uses it. Idempotent."""
        super().close()
        leave = getattr(self, "_leave", None)
        if leave is not None:
            leave()
            self._line = None  # which ends with the last file that uses it

    def _provide(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Get byte ranges into the cache; False where it cannot take them."""
        self._opened()
        entry = self._entry
        ranges = [(start, min(stop, self.size_bytes)) for start, stop in ranges if start < self.size_bytes]
        ahead = self._ahead(ranges)
        if all(entry.is_local(start, stop) for start, stop in ranges):
            if ahead:
                self._begin(ahead, urgent=False)
            return True
        provided = self._connected().run(partial(self._fetcher.provide, ranges=ranges, ahead=ahead))
        self._continue(ranges)
        if not provided:
            self._cache.warn()
        return provided

    def _connected(self) -> Line:
        line = self._line
        if line is None:
            self._opened()  # says that it is closed
            raise StoreReadError(f"weight file {self.path!r} is being closed. Open its store again to read from it.")
        return line

    def _ahead(self, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """What is to be fetched before somebody asks for it."""
        entry = self._entry
        if not ranges or not entry.writable or not self._reads_ahead:
            return []
        start = max(stop for _, stop in ranges)
        stop = min(start + _ahead_bytes(ranges), self.size_bytes)
        return [] if entry.is_local(start, stop) else [(start, stop)]

    def _continue(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch ahead into the next file, where this one ends first."""
        following = None if self._next is None else self._next()
        if following is None or not ranges:
            return
        beyond = max(stop for _, stop in ranges) + _ahead_bytes(ranges) - self.size_bytes
        if beyond > 0 and following._entry.writable:
            following._begin([(0, min(beyond, following.size_bytes))], urgent=False)

    def _begin(self, ranges: Sequence[tuple[int, int]], *, urgent: bool) -> None:
        line = self._line
        if (
            line is not None
            and self._entry.writable
            and not all(self._entry.is_local(start, stop) for start, stop in ranges)
        ):
            line.post(partial(self._fetcher.begin, ranges=ranges, urgent=urgent))

    def _read_past_cache(self, offset_bytes: int, buffers: Sequence[memoryview], *, drop_cache: bool) -> None:
        """What is here from here, the rest from the server."""
        destination = _Destination(offset_bytes, buffers)
        stop = min(offset_bytes + destination.nbytes, self.size_bytes)
        position = offset_bytes
        absent = []
        for first, last in self._entry.missing(offset_bytes, stop):
            begin, end = self._entry.bytes_of(first, last)
            begin, end = max(begin, offset_bytes), min(end, stop)
            absent.append((begin, end))
            super().read(position, destination.slices(position, begin), drop_cache=drop_cache)
            position = end
        # Also where that is nothing: a file that is closed, or ends early, is noticed here.
        super().read(position, destination.slices(position, offset_bytes + destination.nbytes), drop_cache=drop_cache)
        try:
            self._connected().run(partial(self._fetcher.read_past_cache, ranges=absent, write=destination.write))
        finally:
            destination.abandon()  # an interrupt ends the wait, and others may get this memory


class _Destination:
    """Buffers that bytes go to by their offset in the file, until they are abandoned."""

    def __init__(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        self._buffers = [buffer for buffer in buffers if len(buffer)]
        self._starts = [offset_bytes, *accumulate(map(len, self._buffers), initial=offset_bytes)][1:]
        self._lock = threading.Lock()
        self.nbytes = sum(map(len, self._buffers))

    def slices(self, start: int, stop: int) -> list[memoryview]:
        """The memory for bytes ``[start, stop)``."""
        slices = []
        for begin, buffer in zip(self._starts, self._buffers, strict=False):
            part = buffer[max(0, start - begin) : max(0, stop - begin)]
            if len(part):
                slices.append(part)
        return slices

    def write(self, offset_bytes: int, chunk: bytes) -> None:
        view = memoryview(chunk)
        with self._lock:
            if not self._buffers:
                raise SinkError
            while len(view):
                i = bisect_right(self._starts, offset_bytes) - 1
                part = self._buffers[i][offset_bytes - self._starts[i] :][: len(view)]
                part[:] = view[: len(part)]
                offset_bytes += len(part)
                view = view[len(part) :]

    def abandon(self) -> None:
        with self._lock:
            self._buffers = []


def _ahead_bytes(ranges: Sequence[tuple[int, int]]) -> int:
    return min(AHEAD_FACTOR * sum(stop - start for start, stop in ranges), AHEAD_BYTES)


def _leave(line: Line, fetcher: Fetcher) -> None:
    """Runs also in finalizers, and in forked children."""
    if line.is_running:
        line.run_at_end(fetcher.close)
    else:
        fetcher.cache.close(fetcher.entry)
