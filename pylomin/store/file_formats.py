"""One way to open every kind of file that holds weights: by what it begins with."""

from __future__ import annotations

import os
from collections.abc import Callable
from fnmatch import fnmatchcase

from pylomin.errors import StoreFormatError
from pylomin.io.files import WeightFile, opened
from pylomin.store import npy_header, zip_directory
from pylomin.store.extents import ExtentStore
from pylomin.store.gguf import MAGIC as GGUF_MAGIC
from pylomin.store.gguf import GGUFStore
from pylomin.store.npy import NpyStore
from pylomin.store.npz import SUFFIX, NpzStore
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.torch_legacy import TorchLegacyStore
from pylomin.store.torch_zip import PICKLE, TorchZipStore

SUPPORTED = "*.safetensors, files of torch.save (*.pt, *.pth, *.bin, *.ckpt), *.gguf, *.npz, *.npy"
_BEGINNING_BYTES = 9  # a safetensors header begins behind 8 bytes of length


def open_file(path: str | WeightFile) -> ExtentStore:
    """Open a weight file of any format. Its name counts only where its first bytes say nothing.

    Args:
        path: the file; one that is open already is closed with the store, or where none comes of it.

    Raises:
        StoreReadError: it is missing or cannot be read.
        StoreFormatError: it is of no supported format, or malformed.
    """
    file = opened(path)
    try:
        open_as = _format_of(file)
    except BaseException:
        file.close()
        raise
    return open_as(file)


def _format_of(file: WeightFile) -> Callable[[WeightFile], ExtentStore]:
    raw = bytearray(min(_BEGINNING_BYTES, file.size_bytes))
    file.read(0, [memoryview(raw)])
    beginning = bytes(raw)
    if beginning.startswith(zip_directory.SIGNATURE):
        return _format_of_zip(file)
    if beginning.startswith(npy_header.MAGIC):
        return NpyStore
    if beginning.startswith(GGUF_MAGIC):
        return GGUFStore
    if beginning[8:] == b"{":  # before pickles: the length of a header may begin as they do
        return SafetensorsStore
    if beginning.startswith(b"\x80"):  # a pickle
        return TorchLegacyStore
    if fnmatchcase(os.path.basename(file.path), "*.safetensors"):
        return SafetensorsStore
    raise StoreFormatError(
        f"{file.path!r} is not of a supported format: it begins with {beginning[:8]!r}. Supported: {SUPPORTED}. It may "
        "be truncated, a link to the real file (git lfs), or an error page: download it again."
    )


def _format_of_zip(file: WeightFile) -> Callable[[WeightFile], ExtentStore]:
    names = zip_directory.read_zip_directory(file).entries
    if any(name.endswith(PICKLE) for name in names):
        return TorchZipStore
    if any(name.endswith(SUFFIX) for name in names) or not names:
        return NpzStore
    raise StoreFormatError(
        f"zip file {file.path!r} holds neither what torch.save nor what numpy.savez writes; found: {list(names)[:10]}. "
        "If it holds weight files, unpack it."
    )
