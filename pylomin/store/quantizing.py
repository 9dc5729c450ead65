"""Quantising while writing: what is stored in the place of each weight, made a piece at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, TypeVar

import torch

from pylomin.errors import CheckpointError, PassError
from pylomin.quantize.choose import Choose
from pylomin.quantize.codec import candidates, exceeds, is_smaller
from pylomin.quantize.error_sum import ErrorSum
from pylomin.quantize.lossless import BLOCK_BYTES, check_available, compress
from pylomin.quantize.packing import FULL, GROUP_SIZE, NON_FINITE, SCHEMES, NotEncodable, Packing, Workspace
from pylomin.store.base import ReadRequest, WeightInfo
from pylomin.store.in_turn import PiecesInTurn
from pylomin.store.packed_format import (
    QUANTIZED_KEY,
    SAME,
    UNKNOWN,
    XOR,
    Packed,
    ReferenceTo,
    file_digest,
    format_packed,
)
from pylomin.store.pieces import Buffers, made_ahead
from pylomin.store.quantized import MAX_CHAIN, QuantizedStore
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.tensor_bytes import byte_view
from pylomin.store.writer import WeightToWrite

T = TypeVar("T")
HANDED_BYTES = 2 << 20  # 2 MiB: to hand over less to other threads costs more time
ENCODED_BYTES = 2 << 20  # 2 MiB of values at one time: with fewer, calls and waiting for the GIL took a fifth longer


class Rejected(Exception):  # an answer, not an error
    """Schemes turned out not to suit their weights while these were written; write again with finer ones."""


@dataclass(slots=True)
class _Written:
    """What was made of one weight."""

    packed: Packed
    parts: tuple[str, ...]  # names of the tensors that are stored for it
    problem: str = ""  # for which the scheme must not be used


class QuantizingEncoder:
    """Decides what is stored for each weight of one file, or of the shards of one checkpoint.

    Layouts are announced before the values are seen. Where these do not suit, :class:`Rejected` is raised at the end,
    and the encoder knows better when all is written again: :func:`write_quantized`. The values of a weight may be
    asked for several times.

    Args:
        choose: a scheme for each weight, or None.
        names: of all weights.
        group_size: neighbours that share a scale.
        max_error: the largest relative RMS error of a weight; where it is exceeded, a finer scheme is taken.
        reference: store differences to its weights, as decoded; those that are equal are not stored at all.
        reference_path: of the reference's file, relative to the directory of the new one.
        lossless: store exact differences.
        scratch_directory: for compressed differences until they are written.
    """

    def __init__(
        self,
        choose: Choose,
        names: Collection[str],
        *,
        group_size: int = GROUP_SIZE,
        max_error: float | None = None,
        reference: SafetensorsStore | QuantizedStore | None = None,
        reference_path: str = "",
        lossless: bool = False,
        scratch_directory: str | None = None,
    ) -> None:
        if type(group_size) is not int or group_size < 1:
            raise PassError(f"group_size is {group_size!r}; expected a positive integer.")
        self._choose = choose
        self._names = frozenset(names)
        self._group_size = group_size
        self._max_error = max_error
        self._reference = reference
        self._reference_to = None if reference is None else _reference_to(reference, reference_path)
        self._lossless = lossless
        self._scratch_directory = scratch_directory
        self._scratch: IO[bytes] | None = None
        self._sources = PiecesInTurn()
        self._buffers = Buffers()
        self._rejected: dict[str, list[str]] = {}  # reasons, one for each scheme that did not suit
        self._written: dict[str, _Written] = {}
        if lossless:
            check_available()

    def close(self) -> None:
        """Remove what was put aside, end what was begun. Idempotent."""
        self._sources.close()
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None

    def encode(self, weight: WeightToWrite) -> Sequence[WeightToWrite]:
        """What to write in the place of ``weight``, next to each other and in one file."""
        has_reference = self._has_reference(weight)
        if has_reference and self._is_same(weight):
            self._note(weight, Packed(Packing(SAME, weight.dtype, weight.shape)))
            return []
        reasons = self._rejected.get(weight.name, [])
        schemes = self._schemes(weight)
        scheme = schemes[len(reasons)] if len(reasons) < len(schemes) else FULL
        reason = reasons[-1] if reasons else ""
        if has_reference and self._lossless:
            sizes, blocks = self._compress(weight)
            if sum(sizes) < weight.nbytes:
                stored = WeightToWrite(weight.name, torch.uint8, (sum(sizes),), blocks)
                self._note(weight, Packed(Packing(XOR, weight.dtype, weight.shape), blocks=sizes), stored)
                return [stored]
        packing = Packing(scheme, weight.dtype, weight.shape, self._group_size)
        if scheme == FULL:
            if reason:
                self._note(weight, Packed(packing, reason=reason), weight)
            return [weight]
        entry = Packed(packing, has_reference, max_error=UNKNOWN, rms_error=UNKNOWN, reason=reason)
        reference_rows = self._reference_rows if has_reference else None
        rows = _EncodedRows(self._sources.add(weight), packing, reference_rows, self._finish, self._buffers)
        first, *others = packing.parts
        stored_parts = [WeightToWrite(weight.name, first.dtype, first.shape, rows.codes)]
        stored_parts += [WeightToWrite(weight.name + p.suffix, p.dtype, p.shape, rows.scales) for p in others]
        self._note(weight, entry, *stored_parts)
        return stored_parts

    def metadata(self, names: Sequence[str]) -> Mapping[str, str]:
        """Strings for the header of the file that holds the tensors ``names``; final once they are written.

        Raises:
            Rejected: all is written, but some schemes did not suit.
        """
        problems = {name: written.problem for name, written in self._written.items() if written.problem}
        if problems:
            for name, problem in problems.items():
                # No scheme holds values that are not finite; others may do where one did not.
                times = len(SCHEMES) if problem == NON_FINITE else 1
                self._rejected.setdefault(name, []).extend([problem] * times)
            self._written.clear()
            self._sources.close()
            raise Rejected
        here = set(names)
        entries = {
            name: written.packed
            for name, written in self._written.items()
            if not written.parts or here.intersection(written.parts)
        }
        if not entries and self._reference_to is None:
            return {}
        return {QUANTIZED_KEY: format_packed(entries, self._reference_to)}

    def report(self) -> dict[str, Packed]:
        """How each weight was stored that is not stored as it is, or was meant not to be."""
        return {name: written.packed for name, written in self._written.items()}

    def _note(self, weight: WeightToWrite, packed: Packed, *stored: WeightToWrite) -> None:
        self._written[weight.name] = _Written(packed, tuple(part.name for part in stored))

    def _finish(self, name: str, errors: ErrorSum, problem: str) -> None:
        written = self._written[name]
        if not problem and self._max_error is not None and errors.rms_error > self._max_error:
            problem = exceeds(written.packed.scheme, errors.rms_error)
        written.problem = problem
        max_error, rms_error = (float(f"{error:.6g}") for error in (errors.max_error, errors.rms_error))
        written.packed = replace(written.packed, max_error=max_error, rms_error=rms_error)

    def _schemes(self, weight: WeightToWrite) -> list[str]:
        """Schemes to try, the coarsest first; full precision comes after them."""
        scheme = self._choose(weight.name, WeightInfo(weight.dtype, weight.shape, weight.nbytes))
        if scheme is None or self._lossless:
            return []
        packings = [Packing(name, weight.dtype, weight.shape, self._group_size) for name in candidates(scheme)]
        if f"{weight.name}_scale" in self._names:  # a weight of the model's own is called as the scales would be
            packings = [packing for packing in packings if not packing.has_scales]
        return [packing.scheme for packing in packings if is_smaller(packing)]

    # -- the reference ------------------------------------------------------------------------------------------------

    def _has_reference(self, weight: WeightToWrite) -> bool:
        if self._reference is None or weight.name not in self._reference or not weight.nbytes:
            return False
        return self._reference.info(weight.name) == WeightInfo(weight.dtype, tuple(weight.shape), weight.nbytes)

    def _reference_rows(self, name: str, offset_bytes: int, like: torch.Tensor) -> torch.Tensor:
        """What the reference has in the place of ``like``, which is contiguous."""
        assert self._reference is not None
        rows = torch.empty_like(like)
        self._reference.read([ReadRequest(name, offset_bytes, byte_view(rows))])
        return rows

    def _compress(self, weight: WeightToWrite) -> tuple[tuple[int, ...], Callable[[], Iterator[torch.Tensor]]]:
        """The sizes of the blocks of an exact difference, and the blocks."""
        if self._scratch is None:
            self._scratch = tempfile.TemporaryFile(dir=self._scratch_directory)  # noqa: SIM115  # see `close`
        file, begin, sizes = self._scratch, self._scratch.seek(0, os.SEEK_END), []
        itemsize, done_bytes = weight.dtype.itemsize, 0
        numel = BLOCK_BYTES // itemsize
        for chunk in runs_of(made_ahead(weight.pieces()), numel, numel):
            reference = self._reference_rows(weight.name, done_bytes, chunk)
            done_bytes += chunk.nbytes
            values, old = (numbers.view(torch.uint8).view(-1, itemsize) for numbers in (chunk, reference))
            block = compress(values, old)
            sizes.append(file.write(block))

        def blocks() -> Iterator[torch.Tensor]:
            file.seek(begin)
            for size in sizes:
                yield torch.frombuffer(bytearray(file.read(size)), dtype=torch.uint8)

        return tuple(sizes), blocks

    def _is_same(self, weight: WeightToWrite) -> bool:
        offset_bytes = 0
        numel = BLOCK_BYTES // weight.dtype.itemsize
        for chunk in runs_of(weight.pieces(), numel, numel):
            reference = self._reference_rows(weight.name, offset_bytes, chunk)
            if not torch.equal(chunk.view(torch.uint8), reference.view(torch.uint8)):
                return False
            offset_bytes += chunk.nbytes
        return True


def write_quantized(encoder: QuantizingEncoder, write: Callable[[], T]) -> T:
    """Call ``write``, which writes with ``encoder``, until every scheme suits its weight."""
    while True:
        try:
            return write()
        except Rejected:
            continue


def _reference_to(store: SafetensorsStore | QuantizedStore, path: str) -> ReferenceTo:
    digest = file_digest(store.metadata)
    if digest is None:
        raise CheckpointError(
            f"{store.path!r} keeps no digests, so it cannot be told from another file later. Save it again with "
            "pylomin.save_checkpoint to use it as a reference."
        )
    if isinstance(store, QuantizedStore) and store.depth >= MAX_CHAIN:
        raise CheckpointError(
            f"{store.path!r} already is a difference to a difference, {store.depth} deep; {MAX_CHAIN} may be. Use an "
            "earlier reference, or save a full checkpoint."
        )
    return ReferenceTo(path, digest)


@dataclass(slots=True)
class _EncodedRows:
    """The parts of one weight: first all codes, then all scales."""

    weight: WeightToWrite
    packing: Packing
    reference_rows: Callable[[str, int, torch.Tensor], torch.Tensor] | None
    finish: Callable[[str, ErrorSum, str], None]
    buffers: Buffers
    _scales: list[torch.Tensor] = field(default_factory=list)

    def codes(self) -> Iterator[torch.Tensor]:
        packing, errors, workspace, problem = self.packing, ErrorSum(), Workspace(), ""
        rows_left, columns = packing.matrix_shape
        chunk_numel = ENCODED_BYTES // packing.dtype.itemsize
        most_rows = max(1, chunk_numel // max(1, columns), HANDED_BYTES * rows_left // max(1, packing.parts[0].nbytes))
        parts, filled, done_bytes = self._empty(min(rows_left, most_rows)), 0, 0
        for run in runs_of(self.weight.pieces(), max(1, columns), chunk_numel):
            rows = run.view(-1, columns)
            if filled + len(rows) > len(parts[0]):
                yield self._filled(parts, filled)
                parts, filled = self._empty(min(rows_left, most_rows)), 0
            reference = self.reference_rows(self.weight.name, done_bytes, rows) if self.reference_rows else None
            out = tuple(part[filled : filled + len(rows)] for part in parts)
            filled, rows_left, done_bytes = filled + len(rows), rows_left - len(rows), done_bytes + rows.nbytes
            try:
                packing.encode_rows(rows, out, errors, workspace, reference)
            except NotEncodable as reason:
                problem = str(reason)
        if filled:
            yield self._filled(parts, filled)
        self.finish(self.weight.name, errors, problem)

    def _empty(self, rows: int) -> list[torch.Tensor]:
        """Memory for the parts of so many rows: that of codes is used again, unless they are all of the weight's."""
        (dtype, columns), *others = self.packing.part_rows()
        nbytes = rows * columns * dtype.itemsize
        if nbytes < self.packing.parts[0].nbytes:
            codes = self.buffers.next(nbytes)[:nbytes].view(dtype).view(rows, columns)
        else:
            codes = torch.empty(rows, columns, dtype=dtype)
        return [codes, *(torch.empty(rows, columns, dtype=dtype) for dtype, columns in others)]

    def _filled(self, parts: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
        """The codes; the scales are kept until the codes are all written."""
        self._scales += [part[:rows].reshape(-1) for part in parts[1:]]
        return parts[0][:rows].reshape(-1)

    def scales(self) -> Iterator[torch.Tensor]:
        if self._scales:
            yield torch.cat(self._scales)
            self._scales.clear()


# -- pieces of weights ------------------------------------------------------------------------------------------------


def runs_of(pieces: Iterator[torch.Tensor], unit: int, most: int) -> Iterator[torch.Tensor]:
    """The elements, on the CPU, in runs of whole ``unit``s but for the last, of which none has more than ``most``."""
    begun: torch.Tensor | None = None
    for piece in pieces:
        flat = piece.detach().reshape(-1).to("cpu").resolve_conj().resolve_neg()
        if begun is not None:
            missing = unit - len(begun)
            begun, flat = torch.cat([begun, flat[:missing]]), flat[missing:]
            if len(begun) < unit:
                continue
            yield begun
        whole = len(flat) // unit * unit
        yield from flat[:whole].split(max(unit, most // unit * unit)) if whole else ()
        # A copy: the memory of the piece is used again for another one.
        begun = flat[whole:].clone() if whole < len(flat) else None
    if begun is not None:
        yield begun
