"""Weights in one file that torch.save wrote before torch 1.6, or writes without zip; read from where they lie.

Format (``_legacy_save`` in ``torch/serialization.py``): five pickles (a magic number, the protocol's version, facts
about the system, the object, the keys of its storages), then each storage: its length in elements in 8 bytes, and its
bytes.
"""

from __future__ import annotations

import os

from pylomin.errors import StoreFormatError
from pylomin.io.files import Extent, WeightFile, opened
from pylomin.store.cursor import Cursor, watch_extents
from pylomin.store.extents import ExtentStore
from pylomin.store.inert_pickle import read_pickle
from pylomin.store.strict_json import shorten
from pylomin.store.torch_checkpoint import select_weights
from pylomin.store.torch_objects import TorchObjects
from pylomin.store.torch_placement import place_tensors, report_ignored

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAX_PICKLE_BYTES = 100_000_000  # of all five
_LENGTH_BYTES = 8


class TorchLegacyStore(ExtentStore):
    """As :class:`~pylomin.store.torch_zip.TorchZipStore`, for files that are no zip files.

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
            cursor = Cursor(file, 0, _MAX_PICKLE_BYTES, "a pickle")
            objects = TorchObjects(file.path)
            magic, protocol, system, root, keys = [
                read_pickle(cursor, objects.rebuild, objects.persistent) for _ in range(5)
            ]
            if magic != _MAGIC or protocol != _PROTOCOL or not isinstance(system, dict):
                raise StoreFormatError(
                    f"{file.path!r} is a pickle, but not one of torch.save. To keep weights in a file, write them with "
                    "torch.save(model.state_dict(), path)."
                )
            if system.get("little_endian") is not True:
                raise StoreFormatError(
                    f"{file.path!r} was written on a big-endian machine. Save it again there with a newer torch."
                )
            tensors, self._ignored = select_weights(root, file.path, state_dict_key)
            pickles = Extent(0, cursor.position)
            storages = _locate(keys, objects, cursor.position, file)
            weights = place_tensors(tensors, lambda storage: storages[storage.key], file)
            watch_extents(file, [pickles])
        except BaseException:
            file.close()
            raise
        report_ignored(self._ignored, file.path)
        super().__init__(file.path, weights, [file])

    @property
    def ignored(self) -> tuple[str, ...]:
        """What else is in the checkpoint: optimizer states, epochs and the like, by name."""
        return self._ignored


def _locate(keys: object, objects: TorchObjects, position: int, file: WeightFile) -> dict[str, Extent]:
    """The extent of every storage; ``keys`` says in which order they follow each other from ``position`` on."""
    if (
        not isinstance(keys, list)
        or set(map(_text, keys)) != set(objects.storages)
        or len(keys) != len(objects.storages)
    ):
        raise StoreFormatError(
            f"{file.path!r} lists storages {shorten(keys)}; expected the {len(objects.storages)} that its tensors use. "
            "The file is damaged; download it again."
        )
    extents: dict[str, Extent] = {}
    for key in keys:
        storage = objects.storages[key]
        length = bytearray(min(_LENGTH_BYTES, max(0, file.size_bytes - position)))
        file.read(position, [memoryview(length)])
        position += _LENGTH_BYTES
        extent = Extent(position, position + storage.nbytes)
        if int.from_bytes(length, "little") != storage.numel or extent.stop > file.size_bytes:
            raise StoreFormatError(
                f"storage {key!r} of {file.path!r} has {int.from_bytes(length, 'little')} elements up to byte "
                f"{extent.stop}; expected {storage.numel} in a file of {file.size_bytes} bytes. The file is damaged or "
                "truncated; download it again."
            )
        extents[key] = extent
        position = extent.stop
    return extents


def _text(key: object) -> str | None:
    return key if isinstance(key, str) else None
