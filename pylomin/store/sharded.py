"""Weights in several files, listed by a ``*.index.json``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pylomin.errors import StoreFormatError, StoreReadError
from pylomin.io.files import WeightFile, opened
from pylomin.remote.urls import check_inside
from pylomin.store.extents import EncodedWeight, ExtentStore, StoredWeight
from pylomin.store.file_formats import open_file
from pylomin.store.inside import path_inside
from pylomin.store.strict_json import parse_object, shorten

_MAX_INDEX_BYTES = 100_000_000  # as for a header
_MAX_NAMES_SHOWN = 50
_OPENED_AT_ONCE = 8  # shards on other machines
WEIGHT_MAP = "weight_map"  # the key that transformers and diffusers use


class ShardedStore(ExtentStore):
    """The weights that a shard index lists; each shard, of any format, is opened once.

    Shards lie in the directory or below it. The one exception is the Hugging Face hub
    cache, whose ``<repo>/snapshots/<revision>/`` holds links into ``<repo>/blobs/``. Weights that a
    shard has and the index does not list are left out.

    Args:
        index_path: ``{"metadata": {...}, "weight_map": {weight name: shard file name}}``.
        weights_mapping_key: what stands in the place of ``"weight_map"``.
        directory: where the shards are. Default: where the index is.
        open_shard: opens a shard by the name that the index has for it, if they are on another machine. Then
            ``index_path`` is the open index; it is closed.

    Raises:
        StoreReadError: the index or a shard is missing or cannot be read.
        StoreFormatError: the index is malformed, points outside the directory, or lists weights
            that their shard does not have.
    """

    def __init__(
        self,
        index_path: str | os.PathLike[str] | WeightFile,
        *,
        weights_mapping_key: str = WEIGHT_MAP,
        directory: str | os.PathLike[str] | None = None,
        open_shard: Callable[[str], WeightFile] | None = None,
    ) -> None:
        path = index_path.path if isinstance(index_path, WeightFile) else os.fspath(index_path)
        index = read_index(index_path)
        weight_map = _parse_weight_map(index, weights_mapping_key, path)
        self._metadata = _strings(index.get("metadata"))
        shards: dict[str, ExtentStore] = {}
        try:
            if open_shard is None:
                folder = os.path.dirname(path) if directory is None else os.fspath(directory)
                paths = _shard_paths(weight_map, path, folder)
                for shard_path in dict.fromkeys(paths.values()):
                    shards[shard_path] = open_file(shard_path)
            else:
                paths = {file: file for file in dict.fromkeys(weight_map.values())}
                _open_remote_shards(paths, path, open_shard, shards)
            weights = _select(weight_map, paths, shards, path)
        except BaseException:
            for shard in shards.values():
                shard.close()
            raise
        self.shards = tuple(shards.values())
        super().__init__(path, weights, [file for shard in self.shards for file in shard.files])

    @property
    def metadata(self) -> Mapping[str, str]:
        """The strings under ``metadata`` in the index; each of ``shards`` has its own."""
        return self._metadata


def read_index(path: str | os.PathLike[str] | WeightFile) -> dict[str, Any]:
    """The JSON object in an index file, which is closed. Raises StoreReadError or StoreFormatError."""
    file = opened(path)
    try:
        if file.size_bytes > _MAX_INDEX_BYTES:
            raise StoreFormatError(
                f"shard index {file.path!r} has {file.size_bytes} bytes; expected at most "
                f"{_MAX_INDEX_BYTES}. It is not a shard index."
            )
        raw = bytearray(file.size_bytes)
        file.read(0, [memoryview(raw)])
    finally:
        file.close()
    return parse_object(raw, f"shard index {file.path!r}")


def _parse_weight_map(index: Mapping[str, Any], key: str, path: str) -> dict[str, str]:
    weight_map = index.get(key)
    if not isinstance(weight_map, dict):
        raise StoreFormatError(
            f"shard index {path!r} has {key} {shorten(weight_map)}; expected an object "
            f"{{weight name: shard file name}}. Its keys are {', '.join(map(shorten, list(index)[:10]))}; name another "
            "one with weights_mapping_key=."
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or "\0" in file or not file or file.endswith(".json"):
            raise StoreFormatError(
                f"shard index {path!r} maps weight {shorten(name)} to {shorten(file)}; "
                "expected the name of a weight file."
            )
    return weight_map


def _strings(metadata: object) -> dict[str, str]:
    items = metadata.items() if isinstance(metadata, dict) else ()
    return {key: value for key, value in items if isinstance(value, str)}


def _shard_paths(weight_map: Mapping[str, str], index_path: str, directory: str) -> dict[str, str]:
    """The path of each listed shard file, all checked; spellings of one file share one path."""
    paths: dict[str, str] = {}
    by_real_path: dict[str, str] = {}
    missing = []
    for file in sorted(set(weight_map.values())):
        path = path_inside(directory, file, f"shard index {index_path!r}")
        if not os.path.exists(path):
            missing.append(path)
        paths[file] = by_real_path.setdefault(os.path.realpath(path), path)
    if missing:
        raise StoreReadError(
            f"shard index {index_path!r} lists {len(missing)} of {len(paths)} shards that do not "
            f"exist: {_enumerate(missing)}. Download them again."
        )
    return paths


def _open_remote_shards(
    names: Iterable[str], index_path: str, open_shard: Callable[[str], WeightFile], shards: dict[str, ExtentStore]
) -> None:
    """Open shards several at a time, for each takes the time of some questions to a server."""
    for name in names:
        check_inside(name, f"shard index {index_path!r}")
    with ThreadPoolExecutor(_OPENED_AT_ONCE, "pylomin-open") as pool:
        opening = {name: pool.submit(lambda name=name: open_file(open_shard(name))) for name in names}  # type: ignore[misc]
    for name, future in opening.items():
        if future.exception() is None:
            shards[name] = future.result()  # for the caller to close, if another one failed
    for future in opening.values():
        future.result()


def _select(
    weight_map: Mapping[str, str],
    paths: Mapping[str, str],
    shards: Mapping[str, ExtentStore],
    index_path: str,
) -> dict[str, StoredWeight | EncodedWeight]:
    """The listed weights, shard by shard in file order."""
    lacking = [f"{name!r} in {file!r}" for name, file in weight_map.items() if name not in shards[paths[file]]]
    if lacking:
        raise StoreFormatError(
            f"shard index {index_path!r} lists {len(lacking)} weights that their shard does not "
            f"have: {_enumerate(lacking)}. Index and shards are of different models or versions."
        )
    return {
        name: shard.weight(name)
        for path, shard in shards.items()
        for name in shard
        if name in weight_map and paths[weight_map[name]] == path
    }


def _enumerate(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + more
