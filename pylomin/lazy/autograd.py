"""Gradients through offloaded weights: the graph keeps pointers to them, not their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from pylomin.residency.weight import Weight

_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True, slots=True)
class _SavedView:
    """A strided view of a weight that backward needs, and how often the weight had been written to."""

    weight: Weight
    writes: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def values(self) -> torch.Tensor:
        weight = self.weight
        if weight.writes != self.writes:
            raise RuntimeError(
                f"weight '{weight.name}' is needed for gradient computation but was modified by an in-place operation "
                "after the forward. Run backward before writing to it."
            )
        with weight.residency.hold([weight]):
            assert weight.tensor is not None
            return weight.tensor.detach().as_strided(self.size, self.stride, self.offset)


def saving_pointers(weights: Sequence[Weight]) -> AbstractContextManager[Any]:
    """Inside the block, autograd saves views of ``weights`` as pointers; backward loads them again.

    Other tensors go to the hooks around this block, if there are any (activation checkpointing sets some).
    Same mechanism as ``torch.autograd.graph.save_on_cpu``.
    """
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]  # under torch.func transforms
        return nullcontext()
    by_storage = {w.tensor.untyped_storage()._cdata: w for w in weights if w.tensor is not None}
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    outer_pack: Callable[[torch.Tensor], Any] = outer[0] if outer else _same
    outer_unpack: Callable[[Any], torch.Tensor] = outer[1] if outer else _same

    def pack(tensor: torch.Tensor) -> Any:
        if isinstance(tensor, _PLAIN) and tensor.layout is torch.strided and tensor.device.type != "meta":
            weight = by_storage.get(tensor.untyped_storage()._cdata)
            if weight is not None and tensor.dtype == weight.layout.dtype:
                return _SavedView(weight, weight.writes, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return outer_pack(tensor)

    def unpack(saved: Any) -> torch.Tensor:
        return saved.values() if isinstance(saved, _SavedView) else outer_unpack(saved)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _same(tensor: Any) -> Any:
    return tensor
