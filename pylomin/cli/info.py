"""``pylomin info``."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

import typer

from pylomin.cli.arguments import Json, SourceOrUrl, shown
from pylomin.cli.output import print_json, print_table
from pylomin.io.sizes import format_bytes

if TYPE_CHECKING:
    from pylomin.cli.layout import WeightLine


def info(source: SourceOrUrl, as_json: Json = False) -> None:
    """Show what is in a checkpoint: names, dtypes, shapes, sizes, where each weight lies, what is shared or tied.

    Only headers are read. "where" is the file and the offset of the first byte. Weights that share bytes, are not
    contiguous, compressed or quantised say so in the last column.
    """
    from pylomin.cli.layout import lines_of, sizes_of, ties_of
    from pylomin.store.open import open_store

    store = open_store(source)
    try:
        lines, ties, files = lines_of(store), ties_of(store), sizes_of(store)
    finally:
        store.close()
    if as_json:
        print_json(
            {
                "source": shown(source),
                "size_bytes": sum(line.size_bytes for line in lines),
                "files": [{"path": path, "size_bytes": size} for path, size in files.items()],
                "ties": ties,
                "weights": [line.to_json() for line in lines],
            }
        )
        return
    print_table(
        ["weight", "dtype", "shape", ">size", "where", "notes"],
        [
            (line.name, line.dtype, shape_text(line.shape), format_bytes(line.size_bytes), _where(line), _notes(line))
            for line in lines
        ],
    )
    for other, name in ties.items():
        typer.echo(f"{other} is tied to {name}")
    typer.echo(_summary(lines, files))


def shape_text(shape: tuple[int, ...]) -> str:
    """``(768, 3072)`` as ``768 × 3072``."""
    return " × ".join(map(str, shape)) or "scalar"


def _where(line: WeightLine) -> str:
    name = os.path.basename(line.path)
    return name if line.start is None else f"{name} @ {line.start}"


def _notes(line: WeightLine) -> str:
    notes = [] if line.layout == "contiguous" else [line.layout]
    if line.layout not in ("contiguous", "strided") and line.stored_bytes is not None:
        notes.append(f"{format_bytes(line.stored_bytes)} stored")
    if line.rms_error:
        notes.append(f"RMS error {line.rms_error:.2%}")
    if line.shares_with is not None:
        notes.append(f"shares bytes with {line.shares_with}")
    return ", ".join(notes)


def _summary(lines: list[WeightLine], files: dict[str, int]) -> str:
    by_dtype: Counter[str] = Counter()
    for line in lines:
        by_dtype[line.dtype] += line.size_bytes
    kinds = ", ".join(f"{dtype} {format_bytes(nbytes)}" for dtype, nbytes in by_dtype.most_common())
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    total = f"{len(lines)} weights, {format_bytes(by_dtype.total())} ({kinds})" if lines else "no weights"
    return f"{total} in {count} of {format_bytes(sum(files.values()))}"
