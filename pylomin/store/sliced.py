"""A store of parts of another one's weights: of each, what one process of several computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pylomin.errors import StoreReadError
from pylomin.io.files import Extent, WeightFile
from pylomin.store.base import ReadRequest, WeightInfo, WeightStore
from pylomin.store.dtypes import nbytes_of
from pylomin.store.extents import EncodedWeight, ExtentStore, StoredWeight
from pylomin.store.requests import check_request, weight_not_found
from pylomin.store.selection import Selection

_MAX_GAP_BYTES = 1 << 16  # 64 KiB that are read for nothing rather than asking a store again
_MAX_SPAN_BYTES = 1 << 22  # 4 MiB at a time while parts of them are copied

Reader = Callable[[int, memoryview], None]


@dataclass(frozen=True, slots=True)
class Part:
    """The selected elements of a weight in another store."""

    name: str  # there
    selection: Selection


def sliced(store: WeightStore, parts: Mapping[str, Part]) -> WeightStore:
    """The parts as weights of a store, under names of their own. Nothing is read or copied.

    Of a weight that lies in a file as it is, rows are an extent of the file, and are read or mapped as any other
    weight is. Of columns, only the pages that they touch are read.

    Args:
        store: where the weights are. Closed with the returned store.
        parts: by name in the returned store. What has none is not in it.

    Raises:
        WeightNotFoundError: ``store`` does not have a weight.
    """
    if isinstance(store, ExtentStore):  # stays one, so that its extents are seen
        weights = {name: _part_of(store.weight(part.name), part.selection) for name, part in parts.items()}
        return ExtentStore(store.path, weights, store.files)
    return SlicedStore(store, parts)


def _info(info: WeightInfo, selection: Selection) -> WeightInfo:
    shape = selection.selected_shape
    return WeightInfo(info.dtype, shape, nbytes_of(info.dtype, shape))


def _part_of(weight: StoredWeight | EncodedWeight, selection: Selection) -> StoredWeight | EncodedWeight:
    if selection.is_whole:
        return weight
    info = _info(weight.info, selection)
    if not isinstance(weight, StoredWeight):
        return PartOfEncoded(info, weight, selection)
    if not selection.is_run:
        return ScatteredWeight(info, weight, selection)
    first = next(selection.runs(info.dtype.itemsize, 0, info.nbytes), (0, 0))[0]
    start = weight.extent.start + first
    return StoredWeight(info, weight.file, Extent(start, start + info.nbytes))


@dataclass(frozen=True, slots=True)
class ScatteredWeight:
    """Elements of a weight that lies in a file as it is, which do not follow each other there."""

    info: WeightInfo
    weight: StoredWeight
    selection: Selection

    @property
    def file(self) -> WeightFile:
        return self.weight.file

    def read_into(self, offset_bytes: int, destination: memoryview) -> None:
        """As of an :class:`~pylomin.store.extents.EncodedWeight`."""
        begin = self.weight.extent.start
        runs = self.selection.runs(self.info.dtype.itemsize, offset_bytes, offset_bytes + len(destination))
        self.file.read_scattered([Extent(begin + first, begin + last) for first, last in runs], destination)


@dataclass(frozen=True, slots=True)
class PartOfEncoded:
    """Elements of a weight that has to be decoded."""

    info: WeightInfo
    weight: EncodedWeight
    selection: Selection

    @property
    def file(self) -> WeightFile:
        return self.weight.file

    def read_into(self, offset_bytes: int, destination: memoryview) -> None:
        """As of an :class:`~pylomin.store.extents.EncodedWeight`."""
        runs = self.selection.runs(self.info.dtype.itemsize, offset_bytes, offset_bytes + len(destination))
        gather(self.weight.read_into, runs, destination)


class SlicedStore:
    """A :class:`~pylomin.store.base.WeightStore` of parts of weights that are asked for by their bytes.

    Args:
        store: where the weights are.
        parts: by name in this store.

    Raises:
        WeightNotFoundError: ``store`` does not have a weight.
    """

    def __init__(self, store: WeightStore, parts: Mapping[str, Part]) -> None:
        self._store = store
        self._parts = dict(parts)
        self._infos = {name: _info(store.info(part.name), part.selection) for name, part in parts.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def info(self, name: str) -> WeightInfo:
        """Metadata of the part. Raises WeightNotFoundError."""
        try:
            return self._infos[name]
        except KeyError:
            raise weight_not_found(name, self._parts, "a sliced store") from None

    def describe(self, name: str) -> str:
        """Where the weight is. Raises WeightNotFoundError."""
        self.info(name)
        return self._store.describe(self._parts[name].name)

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """As :meth:`~pylomin.store.base.WeightStore.read`."""
        for request in requests:
            info = self.info(request.name)
            check_request(request, info, self.describe(request.name))
            part = self._parts[request.name]
            stop = request.offset_bytes + len(request.destination)
            runs = part.selection.runs(info.dtype.itemsize, request.offset_bytes, stop)
            try:
                gather(self._reader(part.name), runs, request.destination)
            except StoreReadError as error:
                raise type(error)(f"could not read weight {request.name!r}: {error}") from error

    def close(self) -> None:
        """Close the other store. Idempotent."""
        self._store.close()

    def _reader(self, name: str) -> Reader:
        def read(offset_bytes: int, destination: memoryview) -> None:
            self._store.read([ReadRequest(name, offset_bytes, destination)])

        return read


def gather(read: Reader, runs: Iterable[tuple[int, int]], destination: memoryview) -> None:
    """Fill ``destination`` with runs of bytes, those close to each other in one call of ``read``."""
    position = 0
    span: list[tuple[int, int]] = []
    for first, last in runs:
        close = span and 0 <= first - span[-1][1] <= _MAX_GAP_BYTES and last - span[0][0] <= _MAX_SPAN_BYTES
        if span and not close:
            position = _read_span(read, span, destination, position)
            span = []
        span.append((first, last))
    if span:
        _read_span(read, span, destination, position)


def _read_span(read: Reader, span: Sequence[tuple[int, int]], destination: memoryview, position: int) -> int:
    start, stop = span[0][0], span[-1][1]
    if len(span) == 1:
        read(start, destination[position : position + stop - start])
        return position + stop - start
    raw = memoryview(bytearray(stop - start))
    read(start, raw)
    for first, last in span:
        destination[position : position + last - first] = raw[first - start : last - start]
        position += last - first
    return position
