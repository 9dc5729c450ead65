"""The contract between what talks to a server and what asks it for ranges; and what answers mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pylomin.errors import StoreChangedError, StoreReadError
from pylomin.remote.urls import Url

CONNECT_S = 15.0
IDLE_S = 30.0  # without a byte, then a connection counts as dead
_RETRIED = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True, slots=True)
class ObjectState:
    """What tells one content of a remote file from another."""

    size_bytes: int
    tag: str  # its ETag; of a server that has none, when it was modified

    def __str__(self) -> str:
        return f"{self.size_bytes} bytes of ETag {self.tag}"


@dataclass(frozen=True, slots=True)
class Part:
    """What an answer says that it brings."""

    state: ObjectState
    start: int  # offset in bytes (inclusive)
    stop: int  # offset in bytes (exclusive)


Sink = Callable[[bytes], None]
Begin = Callable[[Part], Sink]


class Unavailable(Exception):
    """The server did not answer, or not to the end; asked again, it may."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s  # at least, as the server asks for


class SinkError(Exception):
    """What takes the bytes cannot take more. Passes through every transport."""


class NotThereError(StoreReadError):
    """There is no such file."""


class Transport(Protocol):
    """Talks to a server. All methods run in one event loop, the one that :meth:`start` ran in."""

    async def start(self) -> None:
        """Once, before anything else."""
        ...

    async def get(self, url: Url, start: int, stop: int, begin: Begin) -> None:
        """Ask for bytes ``[start, stop)``.

        ``begin`` is called with what the answer says, before its bytes are taken, and returns what takes them.
        What ``begin`` and the sink raise passes. Less than was said may arrive: whoever asks counts.

        Raises:
            Unavailable: asked again, the server may answer.
            StoreReadError: asked again, it would answer the same.
        """
        ...

    async def names(self, url: Url) -> list[str]:
        """Names of the files in a directory. Raises as :meth:`get`."""
        ...

    async def close(self) -> None:
        """Once, after everything else."""
        ...


def parse_content_range(text: str | None, url: Url) -> tuple[int, int, int]:
    """``bytes 0-9/100`` as start, stop (exclusive) and size of the whole."""
    match = re.fullmatch(r"\s*bytes\s+(\d+)-(\d+)/(\d+)\s*", text or "", re.IGNORECASE)
    if match is None:
        raise StoreReadError(
            f"the server of {url.shown!r} answered a range request with Content-Range {text!r}; expected "
            "'bytes FIRST-LAST/SIZE'. Download the file and open it from disk."
        )
    return int(match[1]), int(match[2]) + 1, int(match[3])


def error_of_status(status: int, url: Url, retry_after: str | None = None, said: str = "") -> Exception:
    """What a status other than 206 means; to raise."""
    said = f" ({said})" if said else ""
    if status == 200:
        return StoreReadError(
            f"the server of {url.shown!r} does not send parts of files: it answered a range request with status 200 "
            "and all of it. Download the file and open it from disk."
        )
    if status in _RETRIED:
        return Unavailable(f"status {status}{said}", _seconds(retry_after))
    if status in (401, 403):
        return StoreReadError(
            f"{url.shown!r} may not be read: status {status}{said}. Check that the credentials are there, allow it, "
            "and have not expired; give them with storage_options=, or as its tools expect them."
        )
    if status in (404, 410):
        return NotThereError(f"{url.shown!r} does not exist: status {status}{said}. Check the URL.")
    if status in (412, 416):
        return StoreChangedError(
            f"{url.shown!r} was changed after it was opened: it is shorter than before, or another (status "
            f"{status}{said}). Open it again to use what it holds now."
        )
    return StoreReadError(f"reading {url.shown!r} failed: status {status}{said}. Check the URL and the server.")


def without_secrets(error: BaseException, url: Url) -> str:
    """What an error says, but for the URL, in whose place is what may be shown of it."""
    # Libraries quote URLs in their own spelling, so that whatever looks like one goes.
    text = re.sub(r"[a-zA-Z][a-zA-Z0-9+.-]*://\S+", f"<{url.shown}>", str(error))[:300].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _seconds(retry_after: str | None) -> float:
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        return 0.0  # a date: our own waits do
