"""Pieces of many weights: across their borders, in another order than announced, and when all is left half-way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from pylomin.errors import StoreReadError
from pylomin.store.in_turn import PiecesInTurn
from pylomin.store.pieces import AHEAD
from pylomin.store.writer import WeightToWrite

SIZES = (5, 0, 1, 12, 3)


def weights(log: list[int], *, broken: int | None = None) -> list[WeightToWrite]:
    """Weight ``i`` has ``SIZES[i]`` elements ``i``, two in a piece."""

    def pieces(number: int) -> Iterator[torch.Tensor]:
        for start in range(0, SIZES[number], 2):
            if number == broken:
                raise StoreReadError("gone")
            log.append(number)
            yield torch.full((min(2, SIZES[number] - start),), number)

    return [WeightToWrite(str(i), torch.int64, (size,), partial(pieces, i)) for i, size in enumerate(SIZES)]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pylomin-made-ahead")]


def joined(weight: WeightToWrite) -> list[int]:
    return [int(value) for piece in weight.pieces() for value in piece]


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (0, 2, 3, 3, 1, 4)])
def test_each_weight_has_its_own_pieces_in_any_order(order):
    in_turn = PiecesInTurn()
    added = [in_turn.add(weight) for weight in weights([])]
    for number in order:
        assert joined(added[number]) == [number] * SIZES[number]
    in_turn.close()
    assert not threads()


def test_reading_goes_on_from_one_weight_to_the_next():
    log: list[int] = []
    in_turn = PiecesInTurn()
    first, *others = [in_turn.add(weight) for weight in weights(log)]
    pieces = first.pieces()
    for _ in range(3):
        next(pieces)
    assert next(pieces, None) is None
    deadline_s = time.monotonic() + 10
    while len(log) < 3 + AHEAD and time.monotonic() < deadline_s:  # a thread of its own gets there
        time.sleep(0.001)
    assert log == [0, 0, 0, 2, 3, 3][: 3 + AHEAD]
    assert [joined(weight) for weight in others] == [[i] * SIZES[i] for i in range(1, len(SIZES))]
    assert sorted(log) == log, "nothing was read twice"
    assert not threads(), "nothing follows"


def test_what_is_left_half_way_is_begun_anew():
    in_turn = PiecesInTurn()
    added = [in_turn.add(weight) for weight in weights([])]
    pieces = added[3].pieces()
    next(pieces)
    pieces.close()
    assert joined(added[4]) == [4] * 3
    assert joined(added[3]) == [3] * 12
    in_turn.close()
    assert not threads()


def test_errors_come_with_the_weight_that_has_them():
    in_turn = PiecesInTurn()
    added = [in_turn.add(weight) for weight in weights([], broken=3)]
    assert joined(added[2]) == [2]
    with pytest.raises(StoreReadError, match="gone"):
        joined(added[3])
    assert joined(added[4]) == [4] * 3
    in_turn.close()
    assert not threads()
