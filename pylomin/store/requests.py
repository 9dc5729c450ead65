"""What every store checks before it reads, and what it says when a weight is missing."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from pylomin.errors import StoreReadError, WeightNotFoundError
from pylomin.store.base import ReadRequest, WeightInfo


def check_request(request: ReadRequest, info: WeightInfo, where: str) -> None:
    """Raise StoreReadError unless the requested bytes lie within the weight."""
    start = request.offset_bytes
    stop = start + len(request.destination)
    if not 0 <= start <= stop <= info.nbytes:
        raise StoreReadError(
            f"bytes {start} to {stop} (exclusive) of weight {request.name!r} in {where} were asked "
            f"for; it has {info.nbytes} bytes (dtype {info.dtype}, shape {info.shape})."
        )


def weight_not_found(name: str, names: Collection[str], where: str) -> WeightNotFoundError:
    """The error for a weight that a store lacks, with the most similar names it has."""
    similar = difflib.get_close_matches(str(name), names, n=3)
    hint = (
        f"Similar names there: {', '.join(map(repr, similar))}."
        if similar
        else (f"No name of the {len(names)} there is similar.")
    )
    return WeightNotFoundError(f"weight {name!r} is not in {where}. {hint}")
