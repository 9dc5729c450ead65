"""From the tensors of a torch checkpoint to the bytes of its file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from pylomin.errors import StoreFormatError
from pylomin.io.files import Extent, WeightFile
from pylomin.store.base import WeightInfo
from pylomin.store.dtypes import nbytes_of
from pylomin.store.extents import EncodedWeight, StoredWeight
from pylomin.store.strict_json import shorten
from pylomin.store.strided import placed_weight, span_of
from pylomin.store.torch_objects import StorageRecord, TensorRecord

_log = logging.getLogger("pylomin")
_MAX_NAMES_SHOWN = 10


def place_tensors(
    tensors: Mapping[str, TensorRecord],
    locate: Callable[[StorageRecord], Extent],
    file: WeightFile,
    *,
    swapped: bool = False,
) -> dict[str, StoredWeight | EncodedWeight]:
    """Each tensor as a weight of ``file``, in file order.

    Raises:
        StoreFormatError: a tensor lies outside its storage.
    """
    placed: list[tuple[int, str, StoredWeight | EncodedWeight]] = []
    for name, tensor in tensors.items():
        itemsize = tensor.dtype.itemsize
        storage = locate(tensor.storage)
        stop_bytes = (tensor.offset + span_of(tensor.shape, tensor.stride)) * itemsize
        if 0 not in tensor.shape and stop_bytes > storage.nbytes:
            raise StoreFormatError(
                f"weight {shorten(name)} of {file.path!r} reaches to byte {stop_bytes} of its storage "
                f"{shorten(tensor.storage.key)}, which has {storage.nbytes}. The file is damaged; download it again."
            )
        start = storage.start + (tensor.offset * itemsize if 0 not in tensor.shape else 0)
        info = WeightInfo(tensor.dtype, tensor.shape, nbytes_of(tensor.dtype, tensor.shape))
        placed.append((start, name, placed_weight(info, file, start, tensor.stride, swapped=swapped)))
    placed.sort(key=lambda item: item[0])
    return {name: weight for _, name, weight in placed}


def report_ignored(ignored: Sequence[str], path: str) -> None:
    """Say in the log what of a checkpoint is not taken for a weight."""
    if ignored:
        more = ", ..." if len(ignored) > _MAX_NAMES_SHOWN else ""
        _log.info(
            "%s: %d entries are no weights: %s%s", path, len(ignored), ", ".join(ignored[:_MAX_NAMES_SHOWN]), more
        )
