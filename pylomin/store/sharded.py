"""Weights in several ``.safetensors`` files, listed by a ``*.safetensors.index.json``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pylomin.errors import StoreFormatError, StoreReadError
from pylomin.io.files import WeightFile
from pylomin.store.extents import ExtentStore, StoredWeight
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.strict_json import parse_object, shorten

_MAX_INDEX_BYTES = 100_000_000  # as for a header
_MAX_NAMES_SHOWN = 50


class ShardedStore(ExtentStore):
    """The weights that a shard index lists; each shard is opened once.

    Shards lie in the index's directory or below it. The one exception is the Hugging Face hub
    cache, whose ``<repo>/snapshots/<revision>/`` holds links into ``<repo>/blobs/``. Weights that a
    shard has and the index does not list are left out.

    Args:
        index_path: ``{"metadata": {...}, "weight_map": {weight name: shard file name}}``.

    Raises:
        StoreReadError: the index or a shard is missing or cannot be read.
        StoreFormatError: the index is malformed, points outside its directory, or lists weights
            that their shard does not have.
    """

    def __init__(self, index_path: str | os.PathLike[str]) -> None:
        path = os.fspath(index_path)
        index = parse_object(_read_index(path), f"shard index {path!r}")
        weight_map = _parse_weight_map(index, path)
        self._metadata = _strings(index.get("metadata"))
        paths = _shard_paths(weight_map, path)
        shards: dict[str, SafetensorsStore] = {}
        try:
            for shard_path in dict.fromkeys(paths.values()):
                shards[shard_path] = SafetensorsStore(shard_path)
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


def _read_index(path: str) -> bytearray:
    file = WeightFile(path)
    try:
        if file.size_bytes > _MAX_INDEX_BYTES:
            raise StoreFormatError(
                f"shard index {path!r} has {file.size_bytes} bytes; expected at most "
                f"{_MAX_INDEX_BYTES}. It is not a shard index."
            )
        raw = bytearray(file.size_bytes)
        file.read(0, [memoryview(raw)])
    finally:
        file.close()
    return raw


def _parse_weight_map(index: Mapping[str, Any], path: str) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise StoreFormatError(
            f"shard index {path!r} has weight_map {shorten(weight_map)}; expected an object "
            "{weight name: shard file name}."
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or "\0" in file or not file.endswith(".safetensors"):
            raise StoreFormatError(
                f"shard index {path!r} maps weight {shorten(name)} to {shorten(file)}; "
                "expected the name of a .safetensors file."
            )
    return weight_map


def _strings(metadata: object) -> dict[str, str]:
    items = metadata.items() if isinstance(metadata, dict) else ()
    return {key: value for key, value in items if isinstance(value, str)}


def _shard_paths(weight_map: Mapping[str, str], index_path: str) -> dict[str, str]:
    """The path of each listed shard file, all checked; spellings of one file share one path."""
    directory = Path(index_path).parent
    root = Path(os.path.realpath(directory))
    paths: dict[str, str] = {}
    by_real_path: dict[Path, str] = {}
    missing = []
    for file in sorted(set(weight_map.values())):
        path = directory / file
        real = Path(os.path.realpath(path))
        if Path(file).is_absolute() or ".." in Path(file).parts or not _is_allowed(real, root):
            raise StoreFormatError(
                f"shard index {index_path!r} points to {file!r}, which is {str(real)!r}: outside "
                f"its directory {str(root)!r}. Expected the name of a file in that directory."
            )
        if not os.path.exists(path):
            missing.append(str(path))
        paths[file] = by_real_path.setdefault(real, str(path))
    if missing:
        raise StoreReadError(
            f"shard index {index_path!r} lists {len(missing)} of {len(paths)} shards that do not "
            f"exist: {_enumerate(missing)}. Download them again."
        )
    return paths


def _is_allowed(real: Path, root: Path) -> bool:
    """Is a shard's real path below the index's real directory, or where the hub cache keeps it?"""
    if real.is_relative_to(root):
        return True
    # <repo>/snapshots/<revision>/[folder/]: compared as a real path, so a linked blobs/ does not
    # pass.
    snapshots = next((parent for parent in root.parents if parent.name == "snapshots"), None)
    return snapshots is not None and real.parent == snapshots.parent / "blobs"


def _select(
    weight_map: Mapping[str, str],
    paths: Mapping[str, str],
    shards: Mapping[str, SafetensorsStore],
    index_path: str,
) -> dict[str, StoredWeight]:
    """The listed weights, shard by shard in file order."""
    lacking = [f"{name!r} in {file!r}" for name, file in weight_map.items() if name not in shards[paths[file]]]
    if lacking:
        raise StoreFormatError(
            f"shard index {index_path!r} lists {len(lacking)} weights that their shard does not "
            f"have: {_enumerate(lacking)}. Index and shards are of different models or versions."
        )
    return {
        name: shard.location(name)
        for path, shard in shards.items()
        for name in shard
        if name in weight_map and paths[weight_map[name]] == path
    }


def _enumerate(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + more
