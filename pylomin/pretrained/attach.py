"""From a model whose weights are deferred tensors to one whose weights are offloaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from pylomin.lazy.offload import Tie, find_ties, offload, residency_for, slots_of
from pylomin.pretrained.computed import ComputedStore
from pylomin.pretrained.deferred import DeferredTensor, Stored
from pylomin.residency.weight import Layout, Source, contiguous_stride
from pylomin.store.base import WeightStore
from pylomin.store.virtual import VirtualStore, VirtualWeight

_CPU = torch.device("cpu")


def offload_deferred(model: nn.Module, *, device: torch.device | None, memory_budget: int | None) -> None:
    """Replace deferred parameters by offloaded ones, and deferred buffers by their values.

    Parameters that have values (those which the checkpoint lacks) stay in memory, on ``device``.
    """
    ties = [tie for tie in find_ties(slots_of(model)) if isinstance(tie.parameter, DeferredTensor)]
    tensors = {tie.fqn: tie.parameter for tie in ties if isinstance(tie.parameter, DeferredTensor)}
    sources = _sources(tensors)
    written = {name: tensor.evaluate() for name, tensor in tensors.items() if tensor.base.written is not None}
    for tie in ties:
        _leave_metadata_only(tie)
    buffers: dict[int, torch.Tensor] = {}  # by id of what they replace, which several modules may own
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in buffers:
                    values = buffer.evaluate() if isinstance(buffer, DeferredTensor) else buffer
                    buffers[id(buffer)] = values.to(device)
                module._buffers[name] = buffers[id(buffer)]
        for parameter in module._parameters.values():
            if parameter is not None and parameter.device.type != "meta":
                parameter.data = parameter.data.to(device)
    offload(model, ties, sources, residency_for(model), device=device, memory_budget=memory_budget)
    with torch.no_grad():
        for tie in ties:
            if tie.fqn in written:
                tie.parameter.copy_(written.pop(tie.fqn))


def _leave_metadata_only(tie: Tie) -> None:
    deferred = tie.parameter
    empty = torch.empty(deferred.size(), dtype=deferred.dtype, device="meta")
    parameter = nn.Parameter(empty, requires_grad=deferred.requires_grad)
    own = ("origin", "base", "written", "_is_param")
    parameter.__dict__.update({name: value for name, value in deferred.__dict__.items() if name not in own})
    for slot in tie.slots:
        slot.module._parameters[slot.name] = parameter


def _sources(tensors: Mapping[str, DeferredTensor]) -> list[Source]:
    """Whole weights of the checkpoint as they are; what is composed of them, or computed, through stores of its own."""
    virtual: dict[str, VirtualWeight] = {}
    computed: dict[str, DeferredTensor] = {}
    for name, tensor in tensors.items():
        origin = tensor.origin
        if not isinstance(origin, Stored):
            computed[name] = tensor
        elif not _is_whole(origin):
            virtual[name] = _virtual(origin, tuple(tensor.shape))
    virtual_store, computed_store = VirtualStore(virtual), ComputedStore(computed)
    sources = []
    for name, tensor in tensors.items():
        origin, shape = tensor.origin, tuple(tensor.shape)
        store: WeightStore = computed_store if name in computed else virtual_store
        dtype = tensor.dtype
        if isinstance(origin, Stored):
            dtype = origin.dtype
            if _is_whole(origin):
                store, name = origin.part.store, origin.part.name
        sources.append(Source(store, name, Layout(dtype, shape, contiguous_stride(shape), _CPU)))
    return sources


def _virtual(origin: Stored, shape: tuple[int, ...]) -> VirtualWeight:
    part = origin.part
    if isinstance(part.store, VirtualStore) and part.nbytes == part.store.info(part.name).nbytes:
        composed = part.store.weight(part.name)
        return VirtualWeight(composed.dtype, shape, composed.parts, composed.blocks)
    return VirtualWeight(origin.dtype, shape, (part,))


def _is_whole(origin: Stored) -> bool:
    """It is a weight of the checkpoint, perhaps in another shape."""
    part = origin.part
    return not isinstance(part.store, VirtualStore) and part.nbytes == part.store.info(part.name).nbytes
