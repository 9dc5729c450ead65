"""Opens remote files: one connection for all files of a store."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from pylomin.errors import PassError, StoreChangedError
from pylomin.io.sizes import parse_bytes
from pylomin.remote.cache import Cache
from pylomin.remote.download import download
from pylomin.remote.entry import BLOCK_BYTES
from pylomin.remote.file import RemoteFile
from pylomin.remote.http import HttpTransport
from pylomin.remote.hub import Hub
from pylomin.remote.line import Line, Running
from pylomin.remote.packages import check_packages
from pylomin.remote.s3 import S3Transport
from pylomin.remote.transport import ObjectState, Part, Transport
from pylomin.remote.urls import Url


class Remote:
    """Where a store's files are.

    Args:
        url: one of them, or a directory: what it begins with counts.
        storage_options: for the file system of fsspec: credentials, headers, endpoints.
        cache_dir, cache_size: as of :func:`pylomin.open_store`.

    Raises:
        MissingPackageError: the extra ``remote`` is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        storage_options: Mapping[str, Any] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_size: int | str | None = None,
    ) -> None:
        self.url = Url.parse(url)
        if storage_options is not None and not isinstance(storage_options, Mapping):
            raise PassError(f"storage_options is a {type(storage_options).__name__}; expected a mapping.")
        options = dict(storage_options or {})
        limit_bytes = None if cache_size is None else parse_bytes(cache_size, what="cache_size")
        check_packages(self.url.scheme)
        self._cache = Cache(None if cache_dir is None else os.fspath(cache_dir), limit_bytes)
        self._hub = Hub(options) if self.url.scheme == "hf" else None
        self._pinned: dict[str, ObjectState] = {}
        self._line = Line(partial(_connect, self.url.scheme, options, self._hub, self._pinned))

    def open(self, url: Url) -> RemoteFile:
        """Open a file. Its size, its ETag and its beginning come with one request.

        Raises:
            NotThereError, StoreReadError: as of the server.
        """
        shown, cached_as = url.shown, url
        expected = None
        if self._hub is not None:
            found = self._hub.find(url)
            url, cached_as, expected = found.url, found.cached_as, found.state
            self._pinned[url.text] = expected
        state, beginning = self._line.run(partial(_begin, url=url))
        if expected is not None and state != expected:
            raise StoreChangedError(f"{shown!r}: expected {expected}, found {state}. Open it again.")
        file = RemoteFile(url, shown, state, self._cache.open(cached_as, state), self._cache, self._line)
        file.adopt(beginning)
        return file

    def names(self, url: Url) -> list[str]:
        """Names of the files in a directory. Raises StoreReadError where it cannot be listed."""
        if self._hub is not None:
            return self._hub.names(url)
        return self._line.run(partial(_names, url=url))


def _connect(scheme: str, options: Mapping[str, Any], hub: Hub | None, pinned: Mapping[str, ObjectState]) -> Transport:
    if hub is not None:
        return HttpTransport({"headers": hub.headers}, pinned)
    return S3Transport(options) if scheme == "s3" else HttpTransport(options)


async def _begin(running: Running, url: Url) -> tuple[ObjectState, bytes]:
    """What a file is, and its first block."""
    beginning = bytearray()
    state: ObjectState | None = None

    def check(part: Part) -> None:
        nonlocal state
        if state is not None and part.state != state:
            beginning.clear()
            raise StoreChangedError(f"{url.shown!r} was changed while it was opened. Open it again.")
        state = part.state

    def take(offset_bytes: int, chunk: bytes) -> None:
        beginning.extend(chunk)

    await download(running, url, 0, BLOCK_BYTES, check, take)
    assert state is not None
    return state, bytes(beginning)


async def _names(running: Running, url: Url) -> list[str]:
    return await (await running.transport()).names(url)
