"""One way to open every kind of store."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeGuard

import torch

from pylomin.errors import StoreFormatError, StoreReadError
from pylomin.store.base import WeightStore
from pylomin.store.memory import MemoryStore
from pylomin.store.quantized import open_packed
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.sharded import ShardedStore

_MAX_NAMES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class FileFormat:
    """A format of weight files. A new one is one file with a store class, and one line below."""

    file_pattern: str  # of file names that the user gives
    directory_pattern: str  # of file names to look for in a directory that the user gives
    open: Callable[[str], WeightStore]


# In the order of preference within a directory: an index comes before the shards it lists.
FILE_FORMATS: tuple[FileFormat, ...] = (
    FileFormat("*.index.json", "*.safetensors.index.json", lambda path: open_packed(ShardedStore(path))),
    FileFormat("*.safetensors", "*.safetensors", lambda path: open_packed(SafetensorsStore(path))),
)


def open_store(
    source: str | os.PathLike[str] | Mapping[str, torch.Tensor] | WeightStore,
) -> WeightStore:
    """Open the weights at ``source`` without reading any.

    Args:
        source: a ``.safetensors`` file, a ``.safetensors.index.json`` file, a directory with
            exactly one index or exactly one ``.safetensors`` file, a mapping of names to tensors,
            or a store, which is returned as it is.

    Raises:
        StoreReadError: a file is missing or cannot be read.
        StoreFormatError: ``source`` is of no supported format, ambiguous or malformed.

    >>> store = open_store({"bias": torch.zeros(3)})
    >>> store.info("bias").shape
    (3,)
    """
    if _is_store(source):
        return source
    if isinstance(source, Mapping):
        return MemoryStore(source)
    if not isinstance(source, (str, os.PathLike)):
        raise StoreFormatError(f"cannot open a {type(source).__name__} as weights. {_supported()}")
    path = os.fspath(source)
    if not os.path.exists(path):
        raise StoreReadError(f"{path!r} does not exist. Expected a weight file or a directory.")
    if os.path.isdir(path):
        path = _find_in_directory(path)
    for format in FILE_FORMATS:
        if fnmatchcase(os.path.basename(path), format.file_pattern):
            return format.open(path)
    raise StoreFormatError(
        f"{path!r} is not of a supported format. {_supported()} To convert a PyTorch file: "
        f"safetensors.torch.save_file(torch.load({path!r}, weights_only=True), "
        "'model.safetensors')."
    )


def _find_in_directory(directory: str) -> str:
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise StoreReadError(f"cannot list directory {directory!r}: {error.strerror}.") from error
    for format in FILE_FORMATS:
        found = [name for name in names if fnmatchcase(name, format.directory_pattern)]
        if len(found) == 1:
            return os.path.join(directory, found[0])
        if found:
            raise StoreFormatError(
                f"directory {directory!r} has {len(found)} {format.directory_pattern} files: "
                f"{_enumerate(found)}. Give the path of the one to open."
            )
    raise StoreFormatError(
        f"directory {directory!r} has no weights in a supported format; found: "
        f"{_enumerate(names) or 'nothing'}. {_supported()}"
    )


def _is_store(source: object) -> TypeGuard[WeightStore]:
    return all(hasattr(source, method) for method in ("info", "describe", "read", "close"))


def _supported() -> str:
    patterns = ", ".join(format.file_pattern for format in FILE_FORMATS)
    return f"Supported: {patterns}, a directory with one of them, a mapping of tensors, a store."


def _enumerate(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:_MAX_NAMES_SHOWN])) + more
