"""S3 and what speaks its language, by s3fs: its options and its ways to find credentials hold here too."""

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

_CHUNK_BYTES = 1 << 18  # 256 KiB


class S3Transport:
    """Range requests to S3.

    Args:
        options: for ``s3fs.S3FileSystem``: ``key``, ``secret``, ``anon``, ``endpoint_url``, ``profile`` and the like.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        config = {"connect_timeout": CONNECT_S, "read_timeout": IDLE_S, "retries": {"max_attempts": 0}}
        self._options = {**options, "config_kwargs": {**config, **options.get("config_kwargs", {})}}
        self._fs: Any = None

    async def start(self) -> None:
        self._fs = file_system("s3", self._options)
        self._fs.retries = 1  # whoever asks tries again

    async def get(self, url: Url, start: int, stop: int, begin: Begin) -> None:
        bucket, key, _ = self._fs.split_path(url.text)
        try:
            answer = await self._fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
            async with answer["Body"] as body:
                sink = begin(_part(url, answer))
                while chunk := await body.read(_CHUNK_BYTES):
                    sink(chunk)
            return
        except (PylominError, SinkError, Unavailable):
            raise
        except Exception as error:  # of botocore, aiohttp and s3fs, which translates some into built-in ones
            if _status(error) == 416 and start == 0 and await self._is_empty(url, bucket, key, begin):
                return
            final = _meaning(error, url)
        # Outside of the handler: tracebacks and logs would show what the caught error holds.
        raise final

    async def names(self, url: Url) -> list[str]:
        path = url.text.rstrip("/")
        try:
            self._fs.invalidate_cache()
            found = await self._fs._ls(path, detail=False)
        except Exception as error:
            final = _meaning(error, url)
        else:
            return [name.rpartition("/")[2] for name in found]
        raise final

    async def close(self) -> None:
        if self._fs is not None and self._fs._s3 is not None:
            await self._fs._s3creator.__aexit__(None, None, None)

    async def _is_empty(self, url: Url, bucket: str, key: str, begin: Begin) -> bool:
        """Of nothing there is no part to ask for."""
        try:
            head = await self._fs._call_s3("head_object", Bucket=bucket, Key=key)
        except Exception:
            return False
        if head["ContentLength"] != 0:
            return False
        begin(Part(ObjectState(0, head["ETag"]), 0, 0))
        return True


def _part(url: Url, answer: Mapping[str, Any]) -> Part:
    status = answer["ResponseMetadata"]["HTTPStatusCode"]
    if status != 206:
        raise error_of_status(status, url)
    first, last, size = parse_content_range(answer.get("ContentRange"), url)
    return Part(ObjectState(size, answer["ETag"]), first, last)


def _status(error: BaseException) -> int | None:
    """Of the answer that an error is about."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if not isinstance(response, Mapping):
        return None
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def _meaning(error: Exception, url: Url) -> Exception:
    import aiohttp
    import botocore.exceptions as boto

    status = _status(error)
    if status is not None:
        return error_of_status(status, url, said=without_secrets(error, url))
    if isinstance(error, FileNotFoundError):
        return error_of_status(404, url)
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound)):
        return StoreReadError(
            f"{url.shown!r} cannot be asked for: {without_secrets(error, url)}. Give credentials as AWS's tools expect "
            "them, or storage_options={'key': ..., 'secret': ...}, or {'anon': True} for what is public."
        )
    passing = (boto.HTTPClientError, boto.ConnectionError, aiohttp.ClientError, asyncio.TimeoutError, OSError)
    if isinstance(error, passing):
        return Unavailable(without_secrets(error, url))
    return StoreReadError(f"{url.shown!r} cannot be asked for: {without_secrets(error, url)}.")
