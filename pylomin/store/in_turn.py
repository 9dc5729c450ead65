"""The pieces of many weights, read ahead by one thread."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from pylomin.store.pieces import is_small, made_ahead
from pylomin.store.writer import WeightToWrite


class PiecesInTurn:
    """Weights that are added first, and then asked for their pieces, one weight after the other in the same order.

    Another thread makes the next piece while one is used, also from the end of one weight to the beginning of the next:
    a thread for each weight would leave the disk idle between them. In another order, each weight is begun anew. To be
    closed.
    """

    def __init__(self) -> None:
        self._weights: list[WeightToWrite] = []
        self._pieces: Iterator[torch.Tensor] = iter(())
        self._next = -1  # the weight that they have come to the beginning of, if any

    def add(self, weight: WeightToWrite) -> WeightToWrite:
        """The same weight, whose pieces come from here; each stays as it is until the next is asked for."""
        self._weights.append(weight)
        return replace(weight, get_values=partial(self._pieces_of, len(self._weights) - 1))

    def close(self) -> None:
        """End the thread, and forget the weights. Idempotent."""
        self._weights.clear()
        self._begin(0)

    def _pieces_of(self, number: int) -> Iterator[torch.Tensor]:
        if self._next != number:
            self._begin(number)
        self._next = -1
        numel = math.prod(self._weights[number].shape)
        while numel > 0:
            piece = next(self._pieces)
            numel -= piece.numel()
            yield piece
            del piece
        self._next = number + 1
        if self._next == len(self._weights):
            self._begin(self._next)

    def _begin(self, number: int) -> None:
        del self._pieces  # its thread ends
        weights = self._weights[number:]
        self._pieces = made_ahead((piece for weight in weights for piece in weight.pieces()), beside=is_small)
