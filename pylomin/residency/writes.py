"""Writes to weights: they take effect, and never reach the store that a weight came from."""

from __future__ import annotations

import torch

from pylomin.errors import ScratchError, without_frames
from pylomin.residency.overlay import Overlay
from pylomin.residency.rooms import Rooms
from pylomin.residency.waiting import Waiter
from pylomin.residency.weight import State, Weight


class Writes(Rooms):
    """Keeps what was written in a scratch file, or in memory, of this model's own."""

    def __init__(self, memory_budget: int | None = None) -> None:
        super().__init__(memory_budget)
        self._overlay = Overlay()

    def write(self, weight: Weight, values: torch.Tensor) -> None:
        """Replace the values. The store that they came from is not touched."""
        waiter = Waiter()
        while True:
            with self.lock:
                if weight.state is not State.LOADING:
                    self._write(weight, values)
                    return
                waiter.enlist(self._waiters)
            waiter.wait()

    def _keep_writes(self, weight: Weight, tensor: torch.Tensor) -> ScratchError | None:
        """A forward that wrote to its resident weight wrote to the weight; or did not, and here is why."""
        weight.loaded_version = tensor._version
        try:
            self._redirect(weight, tensor)
        except ScratchError as error:
            weight.loaded.spoiled = True
            without_frames(error)
            return error
        return None

    def _write(self, weight: Weight, values: torch.Tensor) -> None:
        self._redirect(weight, values)
        if weight.tensor is None:
            return
        if not self._is_held(weight.loaded):
            self._drop(weight.loaded)
        else:  # a forward that runs now sees the new values, as it would in an ordinary model
            for arrival in weight.loaded.arrivals:
                arrival.use()
            with torch.no_grad():
                weight.tensor.copy_(values)
            weight.loaded_version = weight.tensor._version

    def _redirect(self, weight: Weight, values: torch.Tensor) -> None:
        """From now on the weight's bytes are a copy of ``values`` that is this model's own."""
        layout = weight.layout
        weight.source = self._overlay.keep(weight, values, layout)
        weight.writes += 1
        weight.parts = ()
        weight.conversions = () if weight.source.layout == layout else (layout,)
        weight.shared = None
        weight.error = None  # it was about bytes that nobody needs any more
