"""Stores whose weights lie in files, whatever the format that says where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pylomin.errors import StoreFormatError, StoreReadError
from pylomin.io.buffers import PAGE_BYTES
from pylomin.io.files import Extent, WeightFile
from pylomin.io.placed import Placement, read_run
from pylomin.io.runs import coalesce
from pylomin.store.base import ReadRequest, WeightInfo
from pylomin.store.requests import check_request, weight_not_found


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight and the file bytes that hold it, contiguous and in row-major order."""

    info: WeightInfo
    file: WeightFile
    extent: Extent


class EncodedWeight(Protocol):
    """A weight that no extent holds as it is: its elements lie scattered, or are compressed or quantised.

    Callable from any thread.
    """

    @property
    def info(self) -> WeightInfo:
        """Of the weight as it is read."""
        ...

    @property
    def file(self) -> WeightFile:
        """Where its bytes are."""
        ...

    def read_into(self, offset_bytes: int, destination: memoryview) -> None:
        """Fill ``destination`` with the row-major bytes from ``offset_bytes`` on; both lie within the weight.

        Raises StoreReadError, or StoreFormatError where what is stored turns out to be malformed.
        """
        ...


class ExtentStore:
    """A :class:`~pylomin.store.base.WeightStore` over extents of files.

    The base of every file format: a format's own class finds the extents, everything else is here.

    Args:
        path: what the user opened, for error messages.
        weights: in file order.
        files: those that ``close()`` closes.
    """

    def __init__(
        self, path: str, weights: Mapping[str, StoredWeight | EncodedWeight], files: Iterable[WeightFile]
    ) -> None:
        self.path = path
        self.files = tuple(files)
        self._weights = dict(weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def weight(self, name: str) -> StoredWeight | EncodedWeight:
        """How one weight is stored. Raises WeightNotFoundError."""
        try:
            return self._weights[name]
        except KeyError:
            raise weight_not_found(name, self._weights, repr(self.path)) from None

    def location(self, name: str) -> StoredWeight:
        """The file and extent of one weight.

        Raises:
            WeightNotFoundError: the weight is not in the store.
            StoreFormatError: no extent holds it as it is (see :meth:`weight`); it can be read only.
        """
        weight = self.weight(name)
        if not isinstance(weight, StoredWeight):
            raise StoreFormatError(
                f"weight {name!r} of {weight.file.path!r} is no contiguous run of bytes ({type(weight).__name__}). "
                "Read it with the store's read(), or convert the file to safetensors."
            )
        return weight

    def info(self, name: str) -> WeightInfo:
        """Metadata of one weight. Raises WeightNotFoundError."""
        return self.weight(name).info

    def describe(self, name: str) -> str:
        """The path of the file that holds the weight. Raises WeightNotFoundError."""
        return self.weight(name).file.path

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Fill every destination; weights that lie next to each other are read together.

        Raises:
            WeightNotFoundError: a weight is not in the store.
            StoreReadError: naming the weights and the file.
            StoreFormatError: what a weight is decoded from is malformed.
        """
        pieces: list[tuple[StoredWeight, ReadRequest]] = []
        encoded: list[tuple[EncodedWeight, ReadRequest]] = []
        for request in requests:
            weight = self.weight(request.name)
            if isinstance(weight, StoredWeight):
                pieces.append((weight, request))
            else:
                check_request(request, weight.info, repr(weight.file.path))
                encoded.append((weight, request))
        read_extents(pieces)
        for weight, request in encoded:
            _read_encoded(weight, request)

    def close(self) -> None:
        """Close the files. Idempotent."""
        for file in self.files:
            file.close()


def _read_encoded(weight: EncodedWeight, request: ReadRequest) -> None:
    try:
        if len(request.destination):
            weight.read_into(request.offset_bytes, request.destination)
        else:
            weight.file.read(0, [])  # notices a file that is closed or changed
    except (StoreReadError, StoreFormatError) as error:
        raise type(error)(f"could not read weight {request.name!r}: {error}") from error


def read_extents(pieces: Iterable[tuple[StoredWeight, ReadRequest]]) -> None:
    """Fill the destinations of all requests, in file order and with one read per adjacent run."""
    by_file: dict[WeightFile, list[tuple[Extent, ReadRequest]]] = {}
    for weight, request in pieces:
        check_request(request, weight.info, repr(weight.file.path))
        start = weight.extent.start + request.offset_bytes
        extent = Extent(start, start + len(request.destination))
        by_file.setdefault(weight.file, []).append((extent, request))
    for file, wanted in by_file.items():
        runs = list(coalesce([extent for extent, _ in wanted]))
        if len(runs) > 1:
            file.announce([Extent(run.start, run.stop) for run in runs])
        for run in runs:
            requests = [wanted[i][1] for i in run.members]
            try:
                file.read(run.start, run.scatter([request.destination for request in requests]))
            except StoreReadError as error:
                raise _naming([request.name for request in requests], error) from error


def read_direct(weight: StoredWeight, name: str, offset_bytes: int, nbytes: int, buffer: memoryview) -> None:
    """Read a piece of a weight past the page cache; see :meth:`~pylomin.io.files.WeightFile.read_direct`.

    Raises:
        StoreReadError: naming the weight and the file.
    """
    try:
        weight.file.read_direct(weight.extent.start + offset_bytes, nbytes, buffer)
    except StoreReadError as error:
        raise _naming([name], error) from error


def read_placed(
    file: WeightFile,
    placement: Placement,
    names: Sequence[str],
    buffer: Any,
    *,
    drop_cache: bool = False,
    again: bool = False,
) -> bool:
    """Bring all extents of a placement into ``buffer``; ``names`` are those of their weights, in the same order.

    Args:
        again: they were mapped there already, and :meth:`Placement.drop` was called since.

    Returns:
        Whether all of them are mapped.

    Raises:
        StoreReadError: naming the weights and the file.
    """
    if len(placement.runs) > 1:
        file.announce([Extent(placed.run.start, placed.run.stop) for placed in placement.runs])
    mapped = True
    for placed in placement.runs:
        try:
            mapped &= read_run(file, placed, buffer, drop_cache=drop_cache, again=again)
        except StoreReadError as error:
            raise _naming([names[i] for i in placed.run.members], error) from error
    return mapped


def read_range(
    file: WeightFile,
    start: int,
    nbytes: int,
    buffer: memoryview,
    names: Sequence[str],
    *,
    direct: bool,
    drop_cache: bool = False,
) -> int:
    """Read ``nbytes`` at ``start`` of a file, which belong to weights of these names.

    Args:
        buffer: at the start of a page, with room for all the pages that the range touches.
        direct: past the page cache, where that can be.

    Returns:
        Where in ``buffer`` they begin.

    Raises:
        StoreReadError: naming the weights and the file.
    """
    at = start % PAGE_BYTES if direct else 0
    try:
        if direct:
            file.read_direct(start, nbytes, buffer)
        else:
            file.read(start, [buffer[:nbytes]], drop_cache=drop_cache)
    except StoreReadError as error:
        raise _naming(names, error) from error
    return at


def _naming(names: Sequence[str], error: StoreReadError) -> StoreReadError:
    quoted = ", ".join(repr(name) for name in dict.fromkeys(names))
    return type(error)(f"could not read weight {quoted}: {error}")
