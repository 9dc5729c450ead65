"""Stores of weights on other machines."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Any

from pylomin.errors import without_frames
from pylomin.io.files import WeightFile
from pylomin.remote.file import RemoteFile
from pylomin.remote.opening import Remote
from pylomin.remote.transport import NotThereError
from pylomin.remote.urls import Url
from pylomin.store.extents import ExtentStore
from pylomin.store.file_formats import open_file
from pylomin.store.sharded import WEIGHT_MAP, ShardedStore

Choose = Callable[[Sequence[str], str], str]  # of names in a directory, which the second argument is for messages
_INDEX = "*index.json"


def open_remote(
    url: str,
    *,
    choose: Choose,
    weights_mapping_key: str | None,
    storage_options: Mapping[str, Any] | None,
    cache_dir: str | os.PathLike[str] | None,
    cache_size: int | str | None,
) -> ExtentStore:
    """The store of the weights at a URL. Arguments and errors as of :func:`pylomin.open_store`."""
    remote = Remote(url, storage_options=storage_options, cache_dir=cache_dir, cache_size=cache_size)
    try:
        file, at = _open(remote, choose)
        if fnmatchcase(at.name, _INDEX) or weights_mapping_key is not None:
            return _open_shards(remote, file, at, weights_mapping_key or WEIGHT_MAP)
        store = open_file(file)
        file.read_ahead()
        return store
    except Exception as error:
        raise without_frames(error)  # noqa: B904 - they would keep the connection open
    finally:
        del remote


def _open(remote: Remote, choose: Choose) -> tuple[RemoteFile, Url]:
    """The file at the URL; of a directory, the one to open in it."""
    url = remote.url
    try:
        if url.name and not _is_repository(url):
            return remote.open(url), url
        missing = None
    except NotThereError as error:
        missing = error
    if missing is not None and url.scheme in ("http", "https"):
        raise missing
    names = remote.names(url)
    if missing is not None and not names:
        raise missing
    url = url.below(choose(names, f"directory {url.shown!r}"))
    return remote.open(url), url


def _open_shards(remote: Remote, file: RemoteFile, at: Url, key: str) -> ShardedStore:
    shards: dict[str, RemoteFile] = {}

    def open_shard(name: str) -> WeightFile:
        shards[name] = remote.open(at.beside(name))
        return shards[name]

    store = ShardedStore(file, weights_mapping_key=key, open_shard=open_shard)
    in_order = [shards[name] for name in sorted(shards)]
    for one, following in zip_longest(in_order, in_order[1:]):
        one.read_ahead(following)
    return store


def _is_repository(url: Url) -> bool:
    """``hf://owner/name``, with ``datasets/`` and the like before it or a revision behind it."""
    parts = url.text.split("://")[1].strip("/").split("/")
    kinds = ("models", "datasets", "spaces", "kernels")
    return url.scheme == "hf" and len(parts) <= (3 if parts[0] in kinds else 2)
