"""Where what is loaded comes to lie in memory, and how much of that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pylomin.io.buffers import aligned, block_bytes
from pylomin.io.files import Extent, WeightFile
from pylomin.io.modes import Mode
from pylomin.io.placed import Placement, place
from pylomin.io.syscalls import may_keep_mappings
from pylomin.residency.carrier import Carrier, Shipment, carrier_to
from pylomin.residency.piece import Piece
from pylomin.residency.weight import Layout, Weight

if TYPE_CHECKING:
    from pylomin.residency.mapped_room import MappedRoom

SMALL_READ_BYTES = 64 << 10  # 64 KiB; so little is copied faster than it is mapped, and not worth a direct read


@dataclass(frozen=True, slots=True)
class _FromFile:
    """Pieces that are extents of one file, and where they come to lie."""

    file: WeightFile
    pieces: tuple[int, ...]  # positions in the list that is loaded
    names: tuple[str, ...]
    placement: Placement


class Places:
    """Where a list of pieces comes to lie in memory. Worked out once for what is loaded again and again."""

    __slots__ = (
        "carriers",
        "converted",
        "decoded",
        "from_files",
        "idle_room",
        "is_mapped",
        "layouts",
        "mode",
        "packed",
        "packed_bytes",
        "peak_bytes",
        "pieces",
        "read_bytes",
        "read_layouts",
        "resident_bytes",
        "shipments",
        "to_read",
    )

    def __init__(self, pieces: Sequence[Piece], mode: Mode, *, whole_huge: bool = False) -> None:
        self.mode = mode
        self.idle_room: MappedRoom | None = None  # of an earlier load
        self.pieces = tuple(pieces)
        self.layouts = [piece.layouts() for piece in pieces]
        self.to_read = [read for piece in pieces for read in piece.to_read()]
        self.read_layouts = [piece.layouts()[0] for piece in self.to_read]  # as they are stored
        self.read_bytes = 0
        self.packed: list[tuple[int, int]] = []  # (piece, offset) of those that a store reads itself
        self.packed_bytes = 0
        by_file: dict[WeightFile, list[tuple[int, Extent]]] = {}
        by_device: dict[torch.device, list[tuple[int, Piece]]] = {}
        for i, piece in enumerate(self.to_read):
            nbytes = self.read_layouts[i].nbytes
            self.read_bytes += nbytes
            if nbytes and (device := piece.device) is not None:
                by_device.setdefault(device, []).append((i, piece))
                continue
            if piece.source.memory is not None or nbytes == 0:
                continue
            if (stored := piece.stored) is not None:
                by_file.setdefault(stored.file, []).append((i, piece.extents(stored)[0]))
            else:
                self.packed.append((i, self.packed_bytes))
                self.packed_bytes += aligned(nbytes)
        self.from_files = [_from_file(file, placed, self.to_read, mode, whole_huge) for file, placed in by_file.items()]
        # The devices that pieces are streamed to, or decoded on.
        self.carriers = {device: carrier_to(device) for piece in pieces if (device := piece.device) is not None}
        self.shipments = [
            Shipment.of(self.carriers[device], of_device, direct=mode == "direct")
            for device, of_device in by_device.items()
        ]
        # What pieces are decoded and converted into, each into memory of its own.
        self.decoded = [
            layouts[0]
            for piece, layouts in zip(pieces, self.layouts, strict=True)
            if piece.unpacking is not None and layouts[0].nbytes
        ]
        self.converted = [layout for layouts in self.layouts for layout in layouts[1:]]
        # Whole weights, used where the file is mapped, as long as the system does not refuse that; and can be again.
        self.is_mapped = (
            0 < sum([len(part.pieces) for part in self.from_files]) == len(self.to_read)
            and all(piece.runs is None for piece in pieces)
            and all(part.placement.is_mapped for part in self.from_files)
            and not (self.decoded or self.converted)
            and may_keep_mappings()
        )
        buffer_bytes = block_bytes(self.packed_bytes) + sum(part.placement.memory_bytes for part in self.from_files)
        buffer_bytes += sum(block_bytes(shipment.nbytes, shipment.carrier) for shipment in self.shipments)
        decoded_bytes = sum(block_bytes(layout.nbytes, self.carrier_of(layout)) for layout in self.decoded)
        converted_bytes = sum(map(self._converted_bytes, self.converted))
        # Memory that loading takes at one time, as the pool counts it; and what of that stays: the last conversion of
        # each piece, or what it was read or decoded into.
        self.peak_bytes = self.resident_bytes = buffer_bytes + decoded_bytes + converted_bytes
        if all(len(layouts) > 1 for layouts in self.layouts):
            self.resident_bytes = sum(self._converted_bytes(layouts[-1]) for layouts in self.layouts)
        elif all(piece.unpacking is not None for piece in pieces):
            self.resident_bytes = decoded_bytes + converted_bytes

    def carrier_of(self, layout: Layout) -> Carrier | None:
        """What brings it to its device; None where nothing has to."""
        return self.carriers.get(layout.device) if self.carriers else None

    def _converted_bytes(self, layout: Layout) -> int:
        carrier = self.carrier_of(layout)
        return layout.nbytes if carrier is None else block_bytes(layout.nbytes, carrier)

    @property
    def is_pinned(self) -> bool:
        """There is nothing to read, so that beginning to load takes no time."""
        return (
            bool(self.shipments) and not (self.from_files or self.packed) and all(s.is_pinned for s in self.shipments)
        )

    def of_weights(self, weights: Sequence[Weight]) -> bool:
        """Whether these are the places of ``weights`` as they are stored now."""
        for piece, weight in zip(self.pieces, weights, strict=True):
            if piece.source is not weight.source or piece.conversions is not weight.conversions:
                return False
        return True


def _from_file(
    file: WeightFile, placed: Sequence[tuple[int, Extent]], pieces: Sequence[Piece], mode: Mode, whole_huge: bool
) -> _FromFile:
    extents = [extent for _, extent in placed]
    small = sum(extent.nbytes for extent in extents) < SMALL_READ_BYTES
    names = tuple(pieces[i].source.name for i, _ in placed)
    placement = place(extents, "buffered" if small else mode, whole_huge=whole_huge)
    return _FromFile(file, tuple(i for i, _ in placed), names, placement)
