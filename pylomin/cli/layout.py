"""How the weights of a store lie in its files."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

from pylomin.quantize.packing import FULL, SCHEMES
from pylomin.store.base import WeightStore
from pylomin.store.deflated import DeflatedWeight
from pylomin.store.extents import ExtentStore, StoredWeight
from pylomin.store.gguf_blocks import QuantisedWeight
from pylomin.store.packed_format import Packed
from pylomin.store.quantized import QuantizedStore
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.sharded import ShardedStore
from pylomin.store.strided import StridedWeight


@dataclass(frozen=True, slots=True)
class WeightLine:
    """What there is to say of one weight."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int  # of its values
    layout: str  # "contiguous", "strided", "deflated", "blocks", or the scheme it is quantised with
    path: str
    start: int | None = None  # file offset of its first byte
    stored_bytes: int | None = None  # in the file; None where only reading it would tell
    shares_with: str | None = None  # another weight whose bytes are also bytes of this one
    rms_error: float | None = None  # of what was quantised, relative
    max_error: float | None = None  # absolute
    reason: str | None = None  # why the scheme is not the one that was asked for

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def lines_of(store: WeightStore) -> list[WeightLine]:
    """One for each weight, in file order."""
    report = store.report() if isinstance(store, QuantizedStore) else {}
    return _with_sharing([_line(store, name, report.get(name)) for name in store])


def ties_of(store: WeightStore) -> dict[str, str]:
    """Names that are stored under another one: ``{other name: name in the file}``, as the files' metadata say."""
    stored = store.file if isinstance(store, QuantizedStore) else store
    files = stored.shards if isinstance(stored, ShardedStore) else (stored,)
    return {
        other: name
        for file in files
        if isinstance(file, SafetensorsStore)
        for other, name in file.metadata.items()
        if name in store and other not in store
    }


def files_of(store: WeightStore) -> list[str]:
    """Paths of the files that weights are read from, those of a reference left out."""
    return list(dict.fromkeys(path for name in store if os.path.isfile(path := store.describe(name))))


def sizes_of(store: WeightStore) -> dict[str, int]:
    """Bytes of the files that weights are read from, by path or URL, those of a reference left out."""
    file = store.file if isinstance(store, QuantizedStore) else store
    assert isinstance(file, ExtentStore)
    sizes = {one.path: one.size_bytes for one in file.files}
    return {path: sizes[path] for path in dict.fromkeys(map(store.describe, store)) if path in sizes}


def _line(store: WeightStore, name: str, packed: Packed | None) -> WeightLine:
    info = store.info(name)
    line = WeightLine(
        name, str(info.dtype).removeprefix("torch."), info.shape, info.nbytes, "contiguous", store.describe(name)
    )
    file = store.file if isinstance(store, QuantizedStore) else store
    assert isinstance(file, ExtentStore)
    if packed is None or packed.scheme == FULL:
        line = _placed(line, file, name)
        return line if packed is None else replace(line, reason=packed.reason or None)
    parts = [name + part.suffix for part in packed.packing.parts] if name in file else []
    extents = [file.location(part).extent for part in parts if part in file]
    return replace(
        line,
        layout=f"{packed.scheme} difference" if packed.is_difference else packed.scheme,
        start=extents[0].start if extents else None,
        stored_bytes=sum(extent.nbytes for extent in extents),
        rms_error=packed.rms_error if packed.scheme in SCHEMES else None,
        max_error=packed.max_error if packed.scheme in SCHEMES else None,
        reason=packed.reason or None,
    )


def _placed(line: WeightLine, file: ExtentStore, name: str) -> WeightLine:
    weight = file.weight(name)
    if isinstance(weight, StoredWeight):
        return replace(line, start=weight.extent.start, stored_bytes=weight.extent.nbytes)
    if isinstance(weight, StridedWeight):
        span = 1 + sum((size - 1) * step for size, step in zip(weight.info.shape, weight.stride, strict=True))
        return replace(
            line, layout="strided", start=weight.start, stored_bytes=max(0, span) * weight.info.dtype.itemsize
        )
    if isinstance(weight, QuantisedWeight):
        numel = line.size_bytes // weight.info.dtype.itemsize
        return replace(
            line, layout="blocks", start=weight.start, stored_bytes=numel // weight.block.elements * weight.block.nbytes
        )
    return replace(line, layout="deflated" if isinstance(weight, DeflatedWeight) else "encoded")


def _with_sharing(lines: list[WeightLine]) -> list[WeightLine]:
    """Note for each weight one before it in the file whose bytes it overlaps with."""
    furthest: dict[str, tuple[int, str]] = {}  # by path: where the one that reaches furthest so far ends, and its name
    shares: dict[str, str] = {}
    placed = [
        (line.start, line.start + line.stored_bytes, line)
        for line in lines
        if line.start is not None and line.stored_bytes
    ]
    for start, stop, line in sorted(placed, key=lambda entry: entry[0]):
        reached, other = furthest.get(line.path, (0, ""))
        if reached > start:
            shares[line.name] = other
        if stop > reached:
            furthest[line.path] = (stop, line.name)
    return [replace(line, shares_with=shares.get(line.name)) for line in lines]
