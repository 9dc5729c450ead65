"""torch's recurrent modules cache their weights in a list; for lazy ones it is made when it is read."""

from __future__ import annotations

from typing import Any

from torch import nn


class LazyRNN(nn.Module):
    """Mixed into lazy ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        """What the base class assigns is what the getter makes."""

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return state | {"_flat_weights": self._flat_weights}  # the ordinary class has no getter

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({k: v for k, v in state.items() if k != "_flat_weights"})
