"""Quantised weights and differences to a reference, seen as the weights that they stand for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from pylomin.errors import CheckpointError, StoreFormatError, StoreReadError
from pylomin.quantize.lossless import BLOCK_BYTES, restore
from pylomin.quantize.packing import CHUNK_BYTES, FULL, Packing
from pylomin.remote.urls import is_url
from pylomin.store.base import ReadRequest, WeightInfo
from pylomin.store.digests import DIGESTS_KEY, new_digest, parse_digests
from pylomin.store.dtypes import nbytes_of
from pylomin.store.extents import StoredWeight
from pylomin.store.packed_format import (
    QUANTIZED_KEY,
    SAME,
    XOR,
    Packed,
    ReferenceTo,
    file_digest,
    parse_packed,
)
from pylomin.store.pieces import read_pieces
from pylomin.store.requests import check_request, weight_not_found
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.sharded import ShardedStore
from pylomin.store.tensor_bytes import byte_view

MAX_CHAIN = 8  # differences to differences: each costs another read of the weight
_MAX_BATCH_BYTES = 4 * CHUNK_BYTES  # decoded at one time


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """The packed bytes of a weight, for those who read them now and decode them later.

    Attributes:
        info: of the weight that they stand for.
        packing: how to decode them: ``packing.decode_rows``, :func:`pylomin.quantize.codec.decode`.
        store: that has the parts.
        names: of the parts in it.
        parts: where the bytes of each part lie, in the order of ``packing.parts``. They follow each other.
    """

    info: WeightInfo
    packing: Packing
    store: SafetensorsStore | ShardedStore
    names: tuple[str, ...]
    parts: tuple[StoredWeight, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.info.nbytes for part in self.parts)


class QuantizedStore:
    """A :class:`~pylomin.store.base.WeightStore` of decoded weights over a file of packed ones.

    Reading decodes what is asked for, and reads only the rows (of differences, blocks) that it needs.

    Args:
        file: a file, or shards of which at least one has quantised weights. It is closed with this store.
        is_checked: compare a weight with its digest before it is first read, which reads all of it once more.
        level: files of differences that lead here.

    Raises:
        StoreFormatError: what the file says of its weights does not fit what is in it.
        CheckpointError: the reference of a file of differences is missing, or is another one.
    """

    def __init__(self, file: SafetensorsStore | ShardedStore, *, is_checked: bool = False, level: int = 0) -> None:
        self.file = file
        self.path = file.path
        self.reference: SafetensorsStore | QuantizedStore | None = None
        self._is_checked = is_checked
        self._checked: set[str] = set()
        self._digests: dict[str, str] = {}
        self._packed: dict[str, Packed] = {}
        reference: ReferenceTo | None = None
        for shard in _safetensors_of(file):
            if QUANTIZED_KEY in shard.metadata:
                packed, reference = parse_packed(shard.metadata[QUANTIZED_KEY], shard.path)
                if isinstance(file, ShardedStore):  # whose index may leave out some of what a shard holds
                    packed = {name: entry for name, entry in packed.items() if entry.scheme == SAME or name in file}
                self._packed |= packed
            if DIGESTS_KEY in shard.metadata:
                self._digests |= parse_digests(shard.metadata[DIGESTS_KEY], shard.path)[1]
        self._infos = self._check_parts()
        if reference is not None:
            self.reference = self._open_reference(reference, level + 1)
        try:
            self._check_reference()
        except BaseException:
            if self.reference is not None:
                self.reference.close()
            raise

    # -- the contract of a store ----------------------------------------------------------------------------------

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, name: str) -> WeightInfo:
        """Metadata of one weight, as it is once decoded. Raises WeightNotFoundError."""
        try:
            return self._infos[name]
        except KeyError:
            raise weight_not_found(name, self._infos, repr(self.path)) from None

    def describe(self, name: str) -> str:
        """The path of the file that holds the weight. Raises WeightNotFoundError."""
        self.info(name)
        return self.file.describe(name) if name in self.file else self.path

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Fill every destination with decoded bytes.

        Raises:
            WeightNotFoundError: a weight is not in the store.
            StoreReadError: naming the weight and the file; it cannot be read or is damaged.
        """
        direct: list[ReadRequest] = []
        packed: dict[str, list[ReadRequest]] = {}
        for request in requests:
            info = self.info(request.name)
            check_request(request, info, repr(self.path))
            if self._is_checked:
                self.check(request.name)
            entry = self._packed.get(request.name)
            if entry is None or entry.scheme == FULL:
                direct.append(request)
            elif len(request.destination):
                packed.setdefault(request.name, []).append(request)
        self.file.read(direct)
        for name, wanted in packed.items():
            scheme = self._packed[name].scheme
            if scheme == SAME:
                self._reference().read(wanted)
            elif scheme == XOR:
                for request in wanted:
                    self._apply_blocks(request)
            else:
                for batch in _batches(self._packed[name].packing, wanted):
                    self._decode(name, batch)

    def close(self) -> None:
        """Close the file, and that of the reference. Idempotent."""
        self.file.close()
        if self.reference is not None:
            self.reference.close()

    # -- what is special to this one --------------------------------------------------------------------------------

    @property
    def metadata(self) -> Mapping[str, str]:
        """As of the file."""
        return self.file.metadata

    @property
    def digest(self) -> str | None:
        """What identifies the content; None where the file keeps no digests."""
        return file_digest(self.metadata)

    @property
    def depth(self) -> int:
        """Files of differences from here to the first that is none."""
        if self.reference is None:
            return 0
        return 1 + (self.reference.depth if isinstance(self.reference, QuantizedStore) else 0)

    def report(self) -> dict[str, Packed]:
        """How each weight is stored that is not stored as it is, or was meant not to be."""
        return dict(self._packed)

    def packed(self, name: str) -> PackedWeight | None:
        """Where the packed bytes of a weight lie, and how to decode them.

        None for a weight that is stored as it is, for one that needs a reference, and where digests are compared with
        what is read through this store. Raises WeightNotFoundError.
        """
        info = self.info(name)
        entry = self._packed.get(name)
        if entry is None or entry.needs_reference or entry.scheme == FULL or self._is_checked:
            return None
        names = tuple(name + part.suffix for part in entry.packing.parts)
        return PackedWeight(info, entry.packing, self.file, names, tuple(map(self.file.location, names)))

    def weight(self, name: str) -> StoredWeight | None:
        """The file and extent of a weight that is stored as it is; None as :meth:`packed` says for the others."""
        self.info(name)
        entry = self._packed.get(name)
        if self._is_checked or (entry is not None and entry.scheme != FULL):
            return None
        return self.file.location(name)

    def check(self, name: str) -> None:
        """Compare the stored bytes of a weight with their digests, once. Raises StoreReadError."""
        if name in self._checked:
            return
        for stored in self._stored_names(name):
            if stored not in self._digests:
                continue
            digest = new_digest()
            for piece in read_pieces(self.file, stored):
                digest.update(byte_view(piece))
            if digest.hexdigest() != self._digests[stored]:
                raise self._damaged(name, f"sha256 {self._digests[stored]} was expected, found {digest.hexdigest()}")
        self._checked.add(name)

    # -- decoding -----------------------------------------------------------------------------------------------------

    def _decode(self, name: str, batch: Sequence[_Piece]) -> None:
        entry = self._packed[name]
        packing = entry.packing
        rows = sum(piece.rows for piece in batch)
        buffers = [torch.empty(rows, columns, dtype=dtype) for dtype, columns in packing.part_rows()]
        requests = []
        for part, buffer in zip(packing.parts, buffers, strict=True):
            row_bytes = buffer.shape[1] * buffer.element_size()
            requests += _whole_rows(name + part.suffix, row_bytes, batch, byte_view(buffer))
        self.file.read(requests)
        if packing.has_scales:
            check_scales(buffers[1], name, self.path)
        out = _view_of_rows(packing, batch[0]) if len(batch) == 1 else None
        values = torch.empty(rows, packing.matrix_shape[1], dtype=packing.dtype) if out is None else out
        if entry.is_difference:
            self._reference().read(_whole_rows(name, packing.row_bytes, batch, byte_view(values)))
        packing.decode_rows(tuple(buffers), values, add=entry.is_difference)
        if out is None:
            _scatter(batch, byte_view(values), packing.row_bytes)

    def _apply_blocks(self, request: ReadRequest) -> None:
        """Turn the bytes of the reference into those of the weight."""
        entry = self._packed[request.name]
        itemsize, nbytes = entry.packing.dtype.itemsize, self.info(request.name).nbytes
        start, stop = request.offset_bytes, request.offset_bytes + len(request.destination)
        position = sum(entry.blocks[: start // BLOCK_BYTES])
        for number in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            first, last = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, nbytes)
            begin, end = max(first, start), min(last, stop)
            block = bytearray(entry.blocks[number])
            self.file.read([ReadRequest(request.name, position, memoryview(block))])
            position += len(block)
            values = torch.empty(last - first, dtype=torch.uint8)
            self._reference().read([ReadRequest(request.name, first, byte_view(values))])
            if not restore(memoryview(block), values.view(-1, itemsize)):
                raise self._damaged(request.name, f"block {number} cannot be decompressed")
            request.destination[begin - start : end - start] = byte_view(values)[begin - first : end - first]

    def _damaged(self, name: str, problem: str) -> StoreReadError:
        return _damaged(name, self.path, problem)

    def _reference(self) -> SafetensorsStore | QuantizedStore:
        assert self.reference is not None  # checked when the file was opened
        return self.reference

    # -- opening ------------------------------------------------------------------------------------------------------

    def _stored_names(self, name: str) -> list[str]:
        entry = self._packed.get(name)
        if entry is None or entry.scheme in (FULL, XOR):
            return [name]
        return [] if entry.scheme == SAME else [name + part.suffix for part in entry.packing.parts]

    def _check_parts(self) -> dict[str, WeightInfo]:
        """Every part is there, as it should be. Returns what the weights are, in file order."""
        parts: set[str] = set()
        for name, entry in self._packed.items():
            expected = [(name + part.suffix, part.dtype, part.shape) for part in entry.packing.parts]
            if entry.scheme == XOR:
                expected = [(name, torch.uint8, (sum(entry.blocks),))]
            elif entry.scheme == SAME:
                expected = []
            for stored, dtype, shape in expected:
                found = self.file.info(stored) if stored in self.file else None
                if found is None or (found.dtype, found.shape) != (dtype, shape):
                    what = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                    raise StoreFormatError(
                        f"weight {name!r} of {self.path!r} is stored as {entry.scheme}, which needs {stored!r} of "
                        f"{dtype} {list(shape)}; found {what}. The file is damaged; write or download it again."
                    )
                parts.add(stored)
        infos: dict[str, WeightInfo] = {}
        for name in [*self.file, *(name for name, entry in self._packed.items() if entry.scheme == SAME)]:
            if name in self._packed:
                dtype, shape = self._packed[name].packing.dtype, self._packed[name].packing.shape
                infos[name] = WeightInfo(dtype, shape, nbytes_of(dtype, shape))
            elif name not in parts:
                infos[name] = self.file.info(name)
        return infos

    def _open_reference(self, reference: ReferenceTo, level: int) -> SafetensorsStore | QuantizedStore:
        if level > MAX_CHAIN:
            raise CheckpointError(f"{self.path!r} is a difference to a difference, {level} deep; {MAX_CHAIN} may be.")
        if is_url(self.path):
            raise CheckpointError(
                f"{self.path!r} holds differences to {reference.path!r}, which are not read over a network. "
                "Download both."
            )
        path = os.path.normpath(os.path.join(os.path.dirname(self.path), reference.path))
        try:
            store = open_packed(SafetensorsStore(path), is_checked=self._is_checked, level=level)
        except StoreReadError as error:
            raise CheckpointError(
                f"{self.path!r} holds differences to {path!r}, which cannot be read: {error} Put the reference, of "
                f"digest {reference.digest}, back there."
            ) from error
        found = file_digest(store.metadata)
        if found != reference.digest:
            store.close()
            raise CheckpointError(
                f"{self.path!r} holds differences to {path!r} of digest {reference.digest}; what is there has "
                f"{found or 'none'}. It was replaced or changed; put the right one back."
            )
        assert isinstance(store, (SafetensorsStore, QuantizedStore))
        return store

    def _check_reference(self) -> None:
        for name, entry in self._packed.items():
            if not entry.needs_reference:
                continue
            reference = self._reference()
            found = reference.info(name) if name in reference else None
            if found != self.info(name):
                raise CheckpointError(
                    f"weight {name!r} of {self.path!r} is a difference to one of {entry.packing.dtype} "
                    f"{list(entry.packing.shape)} in {reference.path!r}, which has {found or 'none'}."
                )


def check_scales(scales: torch.Tensor, name: str, path: str) -> None:
    """Raises StoreReadError for scales that no writer makes: of the weight ``name``, as they are in ``path``."""
    if scales.numel():
        low, high = torch.aminmax(scales)
        if not (low >= 0 and high < torch.inf):
            raise _damaged(name, path, f"its scales are from {float(low)} to {float(high)}")


def _damaged(name: str, path: str, problem: str) -> StoreReadError:
    return StoreReadError(f"weight {name!r} in {path!r} is damaged: {problem}. Write or download the file again.")


def open_packed(
    file: SafetensorsStore | ShardedStore, *, is_checked: bool = False, level: int = 0
) -> SafetensorsStore | ShardedStore | QuantizedStore:
    """A view of decoded weights where ``file`` has any that are not stored as they are; otherwise ``file`` itself."""
    if not any(QUANTIZED_KEY in shard.metadata for shard in _safetensors_of(file)) and not is_checked:
        return file
    try:
        return QuantizedStore(file, is_checked=is_checked, level=level)
    except BaseException:
        file.close()
        raise


def _safetensors_of(file: SafetensorsStore | ShardedStore) -> list[SafetensorsStore]:
    """Files that can say that their weights are quantised; shards may be of other formats."""
    shards = file.shards if isinstance(file, ShardedStore) else (file,)
    return [shard for shard in shards if isinstance(shard, SafetensorsStore)]


# -- rows of requests -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows ``[first, last)`` of a weight's matrix, of whose bytes those from ``skip`` on are wanted."""

    first: int
    last: int
    skip: int  # in bytes
    destination: memoryview

    @property
    def rows(self) -> int:
        return self.last - self.first


def _batches(packing: Packing, requests: Sequence[ReadRequest]) -> Iterator[list[_Piece]]:
    """The requests in pieces of whole rows; pieces that are decoded together."""
    row_bytes = packing.row_bytes
    most_rows = max(1, _MAX_BATCH_BYTES // row_bytes)
    batch: list[_Piece] = []
    rows = 0
    for request in requests:
        start, stop = request.offset_bytes, request.offset_bytes + len(request.destination)
        for first in range(start // row_bytes, -(-stop // row_bytes), most_rows):
            last = min(first + most_rows, -(-stop // row_bytes))
            begin, end = max(start, first * row_bytes), min(stop, last * row_bytes)
            piece = _Piece(first, last, begin - first * row_bytes, request.destination[begin - start : end - start])
            if batch and rows + piece.rows > most_rows:
                yield batch
                batch, rows = [], 0
            batch.append(piece)
            rows += piece.rows
    if batch:
        yield batch


def _view_of_rows(packing: Packing, piece: _Piece) -> torch.Tensor | None:
    """The destination as the matrix that is decoded into; None where it is none."""
    if len(piece.destination) != piece.rows * packing.row_bytes:
        return None
    values = torch.frombuffer(piece.destination, dtype=packing.dtype)
    if values.data_ptr() % packing.dtype.itemsize:
        return None
    return values.view(piece.rows, packing.matrix_shape[1])


def _whole_rows(name: str, row_bytes: int, batch: Sequence[_Piece], raw: memoryview) -> list[ReadRequest]:
    """The rows of all pieces, one after the other."""
    requests, done = [], 0
    for piece in batch:
        end = done + piece.rows * row_bytes
        requests.append(ReadRequest(name, piece.first * row_bytes, raw[done:end]))
        done = end
    return requests


def _scatter(batch: Sequence[_Piece], raw: memoryview, row_bytes: int) -> None:
    """Copy decoded rows, one after the other, to where they are wanted."""
    done = 0
    for piece in batch:
        piece.destination[:] = raw[done + piece.skip : done + piece.skip + len(piece.destination)]
        done += piece.rows * row_bytes
