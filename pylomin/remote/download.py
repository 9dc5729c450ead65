"""Brings one range from a server, with as many requests as it takes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from pylomin.errors import StoreReadError
from pylomin.remote.line import Running
from pylomin.remote.transport import Part, Sink, Unavailable
from pylomin.remote.urls import Url

ATTEMPTS = 6  # without progress in between
PROGRESS_BYTES = 1 << 18  # 256 KiB
FIRST_WAIT_S = 0.5  # doubled each time
LONGEST_WAIT_S = 30.0

Write = Callable[[int, bytes], None]  # offset in the file, bytes


async def download(
    running: Running, url: Url, start: int, stop: int, check: Callable[[Part], None], write: Write
) -> int:
    """Bring ``[start, stop)``, with as many requests as it takes; what has come already is not asked for again.

    Args:
        check: raises if what the server announces is not what is wanted.
        write: is given the bytes, in order.

    Returns:
        Where it ended: before ``stop`` only at the end of the file.

    Raises:
        StoreReadError: naming the URL and what is wrong with it.
    """
    position, end = start, stop

    def begin(part: Part) -> Sink:
        nonlocal end
        check(part)
        end = min(stop, part.state.size_bytes)
        if part.start != position or not position <= part.stop <= end or (part.stop == position) != (position == end):
            raise StoreReadError(
                f"the server of {url.shown!r} was asked for bytes {position} to {end} (exclusive) and announced "
                f"{part.start} to {part.stop}. Download the file and open it from disk."
            )
        return take

    def take(chunk: bytes) -> None:
        nonlocal position
        if position + len(chunk) > end:
            raise StoreReadError(
                f"the server of {url.shown!r} sends more than it was asked for: expected bytes {start} to {end} "
                "(exclusive). Download the file and open it from disk."
            )
        write(position, chunk)
        position += len(chunk)

    attempt, reached = 0, position
    while True:
        wait_s = 0.0
        try:
            await (await running.transport()).get(url, position, stop, begin)
            problem = f"the answer ended after {position - start} of {end - start} bytes"
        except Unavailable as error:
            problem, wait_s = str(error), error.wait_s
        if position == end:
            return position
        if position - reached >= PROGRESS_BYTES:
            attempt, reached = 0, position
        attempt += 1
        if attempt == ATTEMPTS:
            raise StoreReadError(
                f"reading bytes {position} to {stop} (exclusive) of {url.shown!r} failed {attempt} times, the last "
                f"time with: {problem}. Check the network and the server, then try again."
            )
        backoff_s = FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1)
        await asyncio.sleep(min(max(wait_s, backoff_s), LONGEST_WAIT_S))
