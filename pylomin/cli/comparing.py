"""How far the weights of two stores are apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pylomin.store.base import ReadRequest, WeightStore
from pylomin.store.open import open_store
from pylomin.store.progress import progress_of
from pylomin.store.tensor_bytes import byte_view

PIECE_BYTES = 16 << 20  # 16 MiB of each store at one time


def compare_stores(first: Path, second: Path) -> list[dict[str, Any]]:
    """For each name that either has: ``difference`` in words ("" where equal), ``max`` absolute and ``rms`` relative.

    A few times ``PIECE_BYTES`` is in memory, however large a weight is.
    """
    one, other = open_store(first), open_store(second)
    try:
        done_bytes, total_bytes = 0, sum(one.info(name).nbytes for name in one)
        compared = []
        with progress_of(None, "Comparing") as report:
            for name in dict.fromkeys([*one, *other]):
                compared.append({"name": name, **_compare(one, other, name)})
                if report is not None and name in one:
                    done_bytes += one.info(name).nbytes
                    report(done_bytes, total_bytes)
        return compared
    finally:
        one.close()
        other.close()


def _compare(one: WeightStore, other: WeightStore, name: str) -> dict[str, Any]:
    if name not in other or name not in one:
        return {"difference": f"only in the {'first' if name in one else 'second'}", "max": None, "rms": None}
    mine, theirs = one.info(name), other.info(name)
    if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
        found = " became ".join(
            f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}" for info in (mine, theirs)
        )
        return {"difference": found, "max": None, "rms": None}
    is_equal, largest, squares, square_of_first = True, 0.0, 0.0, 0.0
    for a, b in zip(_pieces(one, name), _pieces(other, name), strict=True):
        wide = _wide(a)
        square_of_first += float(wide.abs().square().sum())
        if byte_view(a) != byte_view(b):
            apart = (_wide(b) - wide).abs()
            is_equal, largest = False, max(largest, float(apart.max()))
            squares += float(apart.square().sum())
    if is_equal:
        return {"difference": "", "max": None, "rms": None}
    relative = math.sqrt(squares / square_of_first) if square_of_first else math.inf
    return {"difference": "values", "max": largest, "rms": relative}


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _pieces(store: WeightStore, name: str) -> Iterator[torch.Tensor]:
    info = store.info(name)
    itemsize, numel = info.dtype.itemsize, math.prod(info.shape)
    step = max(1, PIECE_BYTES // itemsize)
    for start in range(0, numel, step):
        piece = torch.empty(min(step, numel - start), dtype=info.dtype)
        store.read([ReadRequest(name, start * itemsize, byte_view(piece))])
        yield piece
