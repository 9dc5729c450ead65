"""Weights in one file that ``torch.save`` wrote (since torch 1.6: a zip file), read from where they lie."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from pylomin.errors import StoreFormatError
from pylomin.io.files import Extent, WeightFile, opened
from pylomin.store.cursor import Cursor, watch_extents
from pylomin.store.extents import ExtentStore
from pylomin.store.inert_pickle import read_pickle
from pylomin.store.torch_checkpoint import select_weights
from pylomin.store.torch_objects import StorageRecord, TorchObjects
from pylomin.store.torch_placement import place_tensors, report_ignored
from pylomin.store.zip_directory import STORED, ZipDirectory, ZipEntry, read_zip_directory

PICKLE = "/data.pkl"  # below the one folder that everything is in
_MAX_PICKLE_BYTES = 100_000_000  # as for a safetensors header


class TorchZipStore(ExtentStore):
    """The weights of one ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file; no code from it runs, and nothing is converted.

    Only the zip directory and the pickle that describes the tensors are read. The pickle is read as data; one that
    asks for anything but tensors and plain values is refused. Weights that share memory share bytes here too; views
    and transposed weights are read element by element where they must be.

    Args:
        path: the file; one that is open already is closed with this store.
        state_dict_key: which mapping of the checkpoint holds the weights. Default: see
            :func:`~pylomin.store.torch_checkpoint.select_weights`.

    Raises:
        StoreReadError: the file is missing or cannot be read.
        StoreFormatError: it is no valid file of torch.save, or asks to run code.
    """

    def __init__(self, path: str | os.PathLike[str] | WeightFile, *, state_dict_key: str | None = None) -> None:
        file = opened(path)
        try:
            directory = read_zip_directory(file)
            folder, pickle = _find_pickle(directory, file.path)
            objects = TorchObjects(file.path)
            cursor = Cursor(file, pickle.extent.start, pickle.extent.stop, "the pickle")
            root = read_pickle(cursor, objects.rebuild, objects.persistent)
            tensors, self._ignored = select_weights(root, file.path, state_dict_key)

            def locate(storage: StorageRecord) -> Extent:
                return _locate(storage, directory.entries, folder, file.path)

            swapped = _byte_order(file, directory.entries.get(f"{folder}/byteorder")) != sys.byteorder
            weights = place_tensors(tensors, locate, file, swapped=swapped)
            watch_extents(file, [pickle.extent, directory.extent])
        except BaseException:
            file.close()
            raise
        report_ignored(self._ignored, file.path)
        super().__init__(file.path, weights, [file])

    @property
    def ignored(self) -> tuple[str, ...]:
        """What else is in the checkpoint: optimizer states, epochs and the like, by name."""
        return self._ignored


def _find_pickle(directory: ZipDirectory, path: str) -> tuple[str, ZipEntry]:
    """The folder that everything is in, and the pickle in it."""
    folders = [name.removesuffix(PICKLE) for name in directory.entries if name.endswith(PICKLE)]
    folders = [folder for folder in folders if "/" not in folder]
    if len(folders) != 1:
        raise StoreFormatError(
            f"zip file {path!r} has {len(folders)} entries */data.pkl; expected one. It was not written by torch.save."
        )
    folder = folders[0]
    if f"{folder}/constants.pkl" in directory.entries:
        raise StoreFormatError(
            f"{path!r} is a TorchScript archive, a program with its weights. Save the weights alone: "
            "torch.save(torch.jit.load(path).state_dict(), other_path)."
        )
    pickle = directory.entries[folder + PICKLE]
    _check_stored(pickle, path)
    if pickle.extent.nbytes > _MAX_PICKLE_BYTES:
        raise StoreFormatError(
            f"the pickle of {path!r} has {pickle.extent.nbytes} bytes; expected at most {_MAX_PICKLE_BYTES}. Save only "
            "the weights: torch.save(model.state_dict(), path)."
        )
    return folder, pickle


def _locate(storage: StorageRecord, entries: Mapping[str, ZipEntry], folder: str, path: str) -> Extent:
    entry = entries.get(f"{folder}/data/{storage.key}")
    if entry is None:
        if storage.nbytes == 0:
            return Extent(0, 0)
        raise StoreFormatError(f"{path!r} has no entry for storage {storage.key[:200]!r}. Download it again.")
    _check_stored(entry, path)
    if storage.nbytes > entry.extent.nbytes:
        raise StoreFormatError(
            f"storage {storage.key[:200]!r} of {path!r} has {entry.extent.nbytes} bytes; expected {storage.nbytes}. "
            "The file is damaged; download it again."
        )
    return Extent(entry.extent.start, entry.extent.start + storage.nbytes)


def _check_stored(entry: ZipEntry, path: str) -> None:
    if entry.method != STORED:
        raise StoreFormatError(
            f"entry {entry.name[:200]!r} of {path!r} is compressed; torch.save does not compress. Save it again with "
            "torch.save."
        )


def _byte_order(file: WeightFile, entry: ZipEntry | None) -> str:
    if entry is None:
        return "little"  # as torch takes files from before it wrote the order
    raw = bytearray(min(entry.extent.nbytes, 8))
    file.read(entry.extent.start, [memoryview(raw)])
    order = bytes(raw)
    if entry.method != STORED or order not in (b"little", b"big"):
        raise StoreFormatError(f"{file.path!r} has byte order {order!r}; expected b'little' or b'big'.")
    return order.decode()
