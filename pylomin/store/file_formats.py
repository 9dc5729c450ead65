"""One way to open every kind of file that holds weights: by what it begins with."""

from __future__ import annotations

import os
from collections.abc import Callable
from fnmatch import fnmatchcase

from pylomin.errors import StoreFormatError
from pylomin.io.files import WeightFile
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


def open_file(path: str) -> ExtentStore:
    """Open a weight file of any format. Its name counts only where its first bytes say nothing.

    Raises:
        StoreReadError: it is missing or cannot be read.
        StoreFormatError: it is of no supported format, or malformed.
    """
    return _format_of(path)(path)


def _format_of(path: str) -> Callable[[str], ExtentStore]:
    file = WeightFile(path)
    try:
        raw = bytearray(min(_BEGINNING_BYTES, file.size_bytes))
        file.read(0, [memoryview(raw)])
        beginning = bytes(raw)
        if beginning.startswith(zip_directory.SIGNATURE):
            return _format_of_zip(file)
    finally:
        file.close()
    if beginning.startswith(npy_header.MAGIC):
        return NpyStore
    if beginning.startswith(GGUF_MAGIC):
        return GGUFStore
    if beginning[8:] == b"{":  # before pickles: the length of a header may begin as they do
        return SafetensorsStore
    if beginning.startswith(b"\x80"):  # a pickle
        return TorchLegacyStore
    if fnmatchcase(os.path.basename(path), "*.safetensors"):
        return SafetensorsStore
    raise StoreFormatError(
        f"{path!r} is not of a supported format: it begins with {beginning[:8]!r}. Supported: {SUPPORTED}. It may be "
        "truncated, a link to the real file (git lfs), or an error page: download it again."
    )


def _format_of_zip(file: WeightFile) -> Callable[[str], ExtentStore]:
    names = zip_directory.read_zip_directory(file).entries
    if any(name.endswith(PICKLE) for name in names):
        return TorchZipStore
    if any(name.endswith(SUFFIX) for name in names) or not names:
        return NpzStore
    raise StoreFormatError(
        f"zip file {file.path!r} holds neither what torch.save nor what numpy.savez writes; found: {list(names)[:10]}. "
        "If it holds weight files, unpack it."
    )
