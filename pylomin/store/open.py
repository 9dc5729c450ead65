"""One way to open every kind of store."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

import torch

from pylomin.errors import PassError, StoreFormatError, StoreReadError
from pylomin.remote.urls import is_url
from pylomin.store.accelerate_folder import AccelerateFolderStore, is_index
from pylomin.store.base import WeightStore
from pylomin.store.callable import CallableStore, WeightsFunction
from pylomin.store.file_formats import SUPPORTED, open_file
from pylomin.store.memory import MemoryStore
from pylomin.store.npy import NpyStore
from pylomin.store.numpy_arrays import MemmapStore, are_mapped, as_tensor, is_array
from pylomin.store.quantized import open_packed
from pylomin.store.remote import open_remote
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.sharded import WEIGHT_MAP, ShardedStore, read_index

Source = str | os.PathLike[str] | Mapping[str, Any] | WeightsFunction | WeightStore

_MAX_NAMES_SHOWN = 20
_INDEX = "*index.json"
# What to look for in a directory, in the order of preference: an index comes before the shards it lists, and the file
# of the weights before those that training leaves beside it (training_args.bin, optimizer.pt).
_IN_DIRECTORY = (
    "*.safetensors.index.json",
    "*.safetensors",
    "*.bin.index.json",
    "pytorch_model.bin",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.npz",
    "index.json",
    "*.index.json",
)


def open_store(
    source: Source,
    *,
    weights_mapping_key: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_size: int | str | None = None,
) -> WeightStore:
    """Open the weights at ``source`` without reading any.

    Args:
        source: one of

            * a file, recognised by its content: safetensors; what ``torch.save`` wrote (``.pt``, ``.pth``, ``.bin``,
              ``.ckpt``: read in place, no code from it runs); GGUF; ``.npz`` and ``.npy``;
            * an index of shards (``model.safetensors.index.json``, ``pytorch_model.bin.index.json``), or the
              ``index.json`` of an accelerate offload folder;
            * a directory with exactly one of these, or with ``.npy`` files;
            * a URL of a file or an index, ``https://...``, ``s3://...`` or ``hf://...``, or of a directory of the
              latter two. Only what is used is fetched, once; it is kept in a cache;
            * a mapping of names to tensors or numpy arrays;
            * a function ``(module_name, weight_names) -> {name: tensor}``
              (:class:`~pylomin.store.callable.CallableStore`), for :func:`pylomin.load`;
            * a store, which is returned as it is.
        weights_mapping_key: of an index of shards: where in it the names of the shards are. Default: ``"weight_map"``.
        storage_options: of a URL: for the file system of fsspec, such as ``{"anon": True}`` for public files on S3,
            ``{"headers": {...}}`` for HTTP, ``{"token": ...}`` for the Hugging Face hub.
        cache_dir: of a URL: where to keep what was fetched, on a local disk. Default: the environment variable
            ``PYLOMIN_CACHE_DIR``, or ``~/.cache/pylomin``.
        cache_size: of a URL: most bytes to keep there (int, or a string such as ``"50GB"``); what was used longest ago
            makes room. Default: the environment variable ``PYLOMIN_CACHE_SIZE``, or half of what the disk has free.

    Raises:
        StoreReadError: a file is missing or cannot be read; of a URL: the server cannot be reached, refuses, or sends
            no parts of files.
        StoreChangedError: a remote file changed while it was opened.
        MissingPackageError: a URL was given, and the extra ``remote`` is not installed.
        PassError: an argument for URLs was given with something else.
        StoreFormatError: ``source`` is of no supported format, ambiguous or malformed.

    >>> store = open_store({"bias": torch.zeros(3)})
    >>> store.info("bias").shape
    (3,)
    """
    if is_url(source):
        store: WeightStore = open_remote(
            str(source),
            choose=_choose,
            weights_mapping_key=weights_mapping_key,
            storage_options=storage_options,
            cache_dir=cache_dir,
            cache_size=cache_size,
        )
        return open_packed(store) if isinstance(store, (SafetensorsStore, ShardedStore)) else store
    if any(argument is not None for argument in (storage_options, cache_dir, cache_size)):
        raise PassError("storage_options, cache_dir and cache_size are for URLs, such as 's3://bucket/weights'.")
    if _is_store(source):
        return source
    if isinstance(source, Mapping):
        return _open_mapping(source)
    if _is_function(source):
        return CallableStore(source)
    if not isinstance(source, (str, os.PathLike)):
        raise StoreFormatError(f"cannot open a {type(source).__name__} as weights. {_supported()}")
    path = os.fspath(source)
    if not os.path.exists(path):
        raise StoreReadError(f"{path!r} does not exist. Expected a weight file or a directory.")
    if os.path.isdir(path):
        found = _find_in_directory(path)
        if found is None:
            return NpyStore(path)
        path = found
    if fnmatchcase(os.path.basename(path), _INDEX) or weights_mapping_key is not None:
        store = _open_index(path, weights_mapping_key)
    else:
        store = open_file(path)
    return open_packed(store) if isinstance(store, (SafetensorsStore, ShardedStore)) else store


def _open_mapping(source: Mapping[str, Any]) -> WeightStore:
    if are_mapped(source.values()):
        return MemmapStore(source)
    return MemoryStore({name: as_tensor(value, name) if is_array(value) else value for name, value in source.items()})


def _open_index(path: str, weights_mapping_key: str | None) -> WeightStore:
    if weights_mapping_key is None and is_index(read_index(path)):
        return AccelerateFolderStore(path)
    return ShardedStore(path, weights_mapping_key=weights_mapping_key or WEIGHT_MAP)


def _find_in_directory(directory: str) -> str | None:
    """The path of the file to open, or None where the directory's ``.npy`` files are the weights."""
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise StoreReadError(f"cannot list directory {directory!r}: {error.strerror}.") from error
    if _matching(names) is None and any(name.endswith(".npy") for name in names):
        return None
    return os.path.join(directory, _choose(names, f"directory {directory!r}"))


def _choose(names: Sequence[str], directory: str) -> str:
    """The name of the file to open."""
    match _matching(sorted(names)):
        case _, [name]:
            return name
        case pattern, [*found]:
            raise StoreFormatError(
                f"{directory} has {len(found)} {pattern} files: {_enumerate(found)}. Give the path of the one to open."
            )
    raise StoreFormatError(
        f"{directory} has no weights in a supported format; found: {_enumerate(sorted(names)) or 'nothing'}. "
        f"{_supported()}"
    )


def _matching(names: Sequence[str]) -> tuple[str, list[str]] | None:
    """The first pattern that names match, and those that do."""
    for pattern in _IN_DIRECTORY:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if found:
            return pattern, found
    return None


def _is_store(source: object) -> TypeGuard[WeightStore]:
    return all(hasattr(source, method) for method in ("info", "describe", "read", "close"))


def _is_function(source: object) -> TypeGuard[Callable[[str, list[str]], Mapping[str, torch.Tensor]]]:
    return callable(source) and not isinstance(source, (type, torch.nn.Module))


def _supported() -> str:
    return (
        f"Supported: {SUPPORTED}, *.index.json, a directory with one of them, a mapping of tensors or arrays, a "
        "function (module_name, weight_names) -> {name: tensor}, a store."
    )


def _enumerate(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:_MAX_NAMES_SHOWN])) + more
