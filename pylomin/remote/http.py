"""HTTP servers, by the session that fsspec makes: its options and its configuration hold here too."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from pylomin.errors import PylominError, StoreReadError
from pylomin.remote.packages import file_system
from pylomin.remote.transport import (
    CONNECT_S,
    IDLE_S,
    Begin,
    ObjectState,
    Part,
    SinkError,
    Unavailable,
    error_of_status,
    parse_content_range,
    without_secrets,
)
from pylomin.remote.urls import Url


class HttpTransport:
    """Range requests over HTTP.

    Args:
        options: for ``fsspec.implementations.http.HTTPFileSystem``: ``headers``, ``client_kwargs`` and the like.
        pinned: the state of a file whose URL never leads to another content, whatever ETags say.
    """

    def __init__(self, options: Mapping[str, Any], pinned: Mapping[str, ObjectState] | None = None) -> None:
        self._options = dict(options)
        self._pinned = pinned or {}
        self._fs: Any = None
        self._session: Any = None

    async def start(self) -> None:
        self._fs = file_system("https", self._options)
        self._session = await self._fs.set_session()

    async def get(self, url: Url, start: int, stop: int, begin: Begin) -> None:
        import aiohttp

        options = dict(self._fs.kwargs)
        # Compressed, offsets would be those of something else.
        headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        options.setdefault("timeout", aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=IDLE_S))
        try:
            request = self._session.get(self._fs.encode_url(url.text), headers=headers, **options)
            async with request as answer:
                sink = begin(self._part(url, answer, start))
                async for chunk in answer.content.iter_any():
                    sink(chunk)
            return
        except (PylominError, SinkError, Unavailable):
            raise
        except (aiohttp.InvalidURL, aiohttp.TooManyRedirects, TypeError, ValueError) as error:
            final: Exception = StoreReadError(f"{url.shown!r} cannot be asked for: {without_secrets(error, url)}.")
        except aiohttp.ClientConnectorCertificateError as error:
            final = StoreReadError(f"the server of {url.shown!r} is not trusted: {without_secrets(error, url)}.")
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            final = Unavailable(without_secrets(error, url))
        # Outside of the handler: tracebacks and logs would show the URL that the caught error holds.
        raise final

    async def names(self, url: Url) -> list[str]:
        raise StoreReadError(
            f"{url.shown!r} looks like a directory, which HTTP cannot list. Give the URL of the weight file, or of the "
            "index of shards (*.index.json)."
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _part(self, url: Url, answer: Any, start: int) -> Part:
        content_range = answer.headers.get("Content-Range")
        of_nothing = answer.status == 200 and answer.headers.get("Content-Length") == "0"
        if start == 0 and (of_nothing or (answer.status == 416 and content_range == "bytes */0")):
            return Part(self._state(url, answer, 0), 0, 0)
        if answer.status != 206:
            raise error_of_status(answer.status, url, answer.headers.get("Retry-After"))
        coding = answer.headers.get("Content-Encoding", "identity")
        if coding != "identity":
            raise StoreReadError(
                f"the server of {url.shown!r} compresses what it sends (Content-Encoding {coding}), so that no part "
                "can be asked for. Download the file and open it from disk."
            )
        first, last, size = parse_content_range(content_range, url)
        length = answer.headers.get("Content-Length")
        if length is not None and length != str(last - first):
            raise StoreReadError(
                f"the server of {url.shown!r} announced {length} bytes for the range from {first} to {last} "
                "(exclusive). Download the file and open it from disk."
            )
        return Part(self._state(url, answer, size), first, last)

    def _state(self, url: Url, answer: Any, size_bytes: int) -> ObjectState:
        pinned = self._pinned.get(url.text)
        if pinned is not None:
            return ObjectState(size_bytes, pinned.tag)
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if not tag:
            raise StoreReadError(
                f"the server of {url.shown!r} sends neither ETag nor Last-Modified: a change of the file would go "
                "unnoticed. Download it and open it from disk."
            )
        return ObjectState(size_bytes, tag)
