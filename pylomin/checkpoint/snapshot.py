"""Copies of a state that another thread can write while training changes the original."""

from __future__ import annotations

import torch

from pylomin.checkpoint.encoding import EncodedCheckpoint
from pylomin.lazy.tensor import OffloadedTensor


class Snapshot:
    """Memory for one copy, used again for the next: copying into fresh memory takes longer."""

    def __init__(self) -> None:
        self._weights: dict[str, torch.Tensor] = {}
        self._state: dict[str, torch.Tensor] = {}

    def take(self, encoded: EncodedCheckpoint) -> EncodedCheckpoint:
        """The same, with all tensors copied to the CPU; valid until the next call."""
        self._weights = _copied(encoded.weights, self._weights)
        self._state = _copied(encoded.state, self._state)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return EncodedCheckpoint(encoded.sections, self._weights, self._state)


def _copied(tensors: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    copies: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, OffloadedTensor):
            copies[name] = tensor  # frozen, and perhaps too large for memory
            continue
        copy = old.get(name)
        if copy is None or (copy.shape, copy.dtype, copy.stride()) != (tensor.shape, tensor.dtype, tensor.stride()):
            copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor, non_blocking=True)
    return copies
