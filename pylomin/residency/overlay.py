"""Where writes to offloaded weights go: never to the user's file."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from pylomin.errors import ScratchError
from pylomin.residency.weight import Layout, Source, Weight
from pylomin.store.memory import MemoryStore
from pylomin.store.scratch import OverlayStore, ScratchDirectory


class Overlay:
    """The new values of the weights of one residency that were written to; on disk, or in memory for those there."""

    def __init__(self) -> None:
        self._store: OverlayStore | None = None
        self._in_child = False
        self._count = 0

    def keep(self, weight: Weight, values: torch.Tensor, layout: Layout) -> Source:
        """A copy of ``values``, as a source for ``weight``; ``layout`` is that of compute memory.

        Raises:
            ScratchError: no space; nothing changed.
        """
        stored = replace(layout, device=torch.device("cpu"))
        with torch.inference_mode(False), torch.no_grad():
            flat = stored.empty().copy_(values).as_strided((layout.numel,), (1,))
        if weight.source.memory is not None:
            return Source(MemoryStore({weight.name: flat}), weight.name, stored)
        if self._store is None:
            scratch = ScratchDirectory()
            self._store = OverlayStore(scratch)
            if self._in_child:
                # Children end without exit handlers. The file lives on, without a name, while it is open.
                scratch.close()
        self._count += 1
        name = f"{weight.name}#{self._count}"
        try:
            self._store.write(name, flat)
        except ScratchError as error:
            raise ScratchError(f"new values of weight '{weight.name}' could not be kept: {error}") from error
        return Source(self._store, name, stored, on_unused=partial(self._store.discard, name))

    def reset_after_fork(self) -> None:
        """The file is the parent's: what is read from it stays readable, new writes go to another."""
        self._store = None
        self._in_child = True
