"""Gradients through offloaded weights: the graph keeps pointers to them, not their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from pylomin.lazy.distributed import Sharding, is_distributed, local_of
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.residency.lane import Lane
from pylomin.residency.weight import Layout, Weight

_PLAIN = (torch.Tensor, torch.nn.Parameter)
COMPARED_NUMEL = 1 << 20  # elements of a weight that are converted at one time, to see whether a tensor is its copy


@dataclass(frozen=True, slots=True)
class _SavedView:
    """A strided view of a weight, or of a copy of it in another dtype, that backward needs."""

    weight: Weight
    group: Sequence[Weight]  # what is used together with it in the forward, which predicts what comes when
    lane: Lane  # of the forward
    writes: int  # to the weight, until then
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: torch.Tensor, weight: Weight, group: Sequence[Weight]) -> _SavedView:
        lane = weight.residency.retention.lanes.here
        geometry = (tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return _SavedView(weight, group, lane, weight.writes, *geometry)

    def values(self) -> torch.Tensor:
        """The weight's values now, loaded for as long as somebody has them.

        Raises:
            RuntimeError: it was written to, as autograd says of weights in memory.
        """
        weight = self.weight
        if weight.writes != self.writes:
            raise RuntimeError(
                f"weight '{weight.name}' is needed for gradient computation but was modified by an in-place operation "
                "after the forward. Run backward before writing to it."
            )
        residency = weight.residency
        residency.retention.lanes.here = self.lane  # a thread of autograd's goes on where the forward's is
        # What is used by tiles is not loaded here; nor what a graph of this backward would keep.
        if weight.tiled or torch.is_grad_enabled():
            if not weight.parts:
                with residency.hold([], self.group):
                    pass  # it is used now
            return self._offloaded()
        with residency.hold([weight], self.group):
            if weight.tensor is None:  # there was no room for it whole
                return self._offloaded()
            values = weight.tensor.detach()
            if self.dtype != values.dtype:
                values = values.to(self.dtype)
            return values.as_strided(self.size, self.stride, self.offset)

    def _offloaded(self) -> torch.Tensor:
        weight = self.weight
        if self.dtype != weight.layout.dtype:
            layout = weight.layout
            weight = weight.convert(Layout(self.dtype, layout.shape, layout.stride, layout.device))
        return OffloadedTensor(weight, self.size, self.stride, self.offset)


@dataclass(frozen=True, slots=True)
class _SavedShard:
    """A DTensor whose local shard is a view of a weight."""

    sharding: Sharding
    view: _SavedView


def saving_pointers(group: Sequence[Weight]) -> AbstractContextManager[Any]:
    """Inside the block, autograd saves views of the weights of ``group`` as pointers; backward loads them again.

    So it does with copies of them in another dtype, as autocast makes them. Other tensors go to the hooks around this
    block, if there are any (activation checkpointing sets some). Same mechanism as
    ``torch.autograd.graph.save_on_cpu``.
    """
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]  # under torch.func transforms
        return nullcontext()
    held = [weight for weight in group if weight.tensor is not None]
    by_storage = {w.tensor.untyped_storage()._cdata: w for w in held if w.tensor is not None}
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    outer_pack: Callable[[torch.Tensor], Any] = outer[0] if outer else _same
    outer_unpack: Callable[[Any], torch.Tensor] = outer[1] if outer else _same

    def pack(tensor: torch.Tensor) -> Any:
        if is_distributed(tensor):
            saved = pack(local_of(tensor))
            return _SavedShard(Sharding.of(tensor), saved) if isinstance(saved, _SavedView) else outer_pack(tensor)
        if isinstance(tensor, OffloadedTensor):
            return _SavedView.of(tensor, tensor.weight, group if tensor.weight in group else (tensor.weight,))
        if isinstance(tensor, _PLAIN) and _is_strided(tensor):
            weight = by_storage.get(tensor.untyped_storage()._cdata)
            if weight is None or tensor.dtype != weight.layout.dtype:
                weight = _copied_from(tensor, held)
            if weight is not None:
                return _SavedView.of(tensor, weight, group)
        return outer_pack(tensor)

    def unpack(saved: Any) -> torch.Tensor:
        if isinstance(saved, _SavedShard):
            return saved.sharding.around(saved.view.values())
        return saved.values() if isinstance(saved, _SavedView) else outer_unpack(saved)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _is_strided(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return False
    return not (tensor.is_conj() or tensor.is_neg())


def _copied_from(tensor: torch.Tensor, weights: Sequence[Weight]) -> Weight | None:
    """The weight whose values, converted to the dtype of ``tensor``, fill its memory; bit for bit."""
    dtype, nbytes = tensor.dtype, tensor.untyped_storage().nbytes()
    for weight in weights:
        values = weight.tensor
        if values is None or values.dtype == dtype or nbytes != values.numel() * dtype.itemsize:
            continue
        if values.device == tensor.device and dtype.is_floating_point and _are_copies(tensor, values):
            return weight
    return None


def _are_copies(tensor: torch.Tensor, values: torch.Tensor) -> bool:
    count = values.numel()
    with torch.no_grad(), _without_modes():
        copies = tensor.detach().as_strided((count,), (1,), 0)
        originals = values.detach().as_strided((count,), (1,), values.storage_offset())
        for first in range(0, count, COMPARED_NUMEL):
            last = min(first + COMPARED_NUMEL, count)
            converted = originals[first:last].to(tensor.dtype).view(torch.uint8)
            if not torch.equal(converted, copies[first:last].view(torch.uint8)):
                return False
    return True


def _without_modes() -> AbstractContextManager[Any]:
    """What watches operations (a cache of selective checkpointing, a counter) is not to see those of comparing."""
    if not torch._C._len_torch_dispatch_stack():
        return nullcontext()
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def _same(tensor: Any) -> Any:
    return tensor
