"""What makes room where uses do not repeat, by what is predicted of them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


def evict(
    idle: Mapping[K, int], next_use: Mapping[K, int], needed_bytes: int, *, used_at: int | None = None
) -> list[K] | None:
    """The idle groups to give up, those first whose next use is furthest (Belady 1966).

    Never one that is used sooner than what is loaded, or no later: a read ahead must not cost another read that is
    more urgent (Cao, Felten, Karlin and Li 1995). Of those that are not predicted to be used, the last ones go first:
    ``idle`` is in order of last use, and where uses repeat in some order the latest comes last again.

    Args:
        idle: groups in memory that are not in use, with the bytes that each gives back.
        next_use: the position of the next use of each, as far as it is predicted.
        needed_bytes: what is to be made free.
        used_at: the position at which what is loaded is used; None: it is needed now, and anything may go.

    Returns:
        None where what may go is too little. Then the read has to wait, and nothing should go.

    >>> evict({"a": 5, "b": 5, "c": 5}, {"a": 3, "b": 9, "c": 4}, 8, used_at=3)
    ['b', 'c']
    """
    chosen: list[K] = []
    latest_first = list(idle)[::-1]
    furthest_first = sorted(latest_first, key=lambda key: next_use.get(key, math.inf), reverse=True)
    for key in furthest_first:
        if needed_bytes <= 0:
            break
        if used_at is not None and key in next_use and next_use[key] <= used_at:
            break
        chosen.append(key)
        needed_bytes -= idle[key]
    if needed_bytes > 0:
        return None
    for key in reversed(chosen):  # what a later, larger one made needless stays
        if needed_bytes + idle[key] <= 0:
            chosen.remove(key)
            needed_bytes += idle[key]
    return chosen
