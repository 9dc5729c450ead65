"""From a model whose weights are deferred tensors to one whose weights are offloaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from pylomin.io.files import Extent
from pylomin.lazy.distributed import distributed_parameter, is_distributed
from pylomin.lazy.offload import Tie, find_ties, offload, residency_for, slots_of
from pylomin.lazy.sources import expect_parts
from pylomin.pretrained.computed import ComputedStore
from pylomin.pretrained.deferred import DeferredTensor, Stored
from pylomin.residency.weight import Layout, Source, contiguous_stride
from pylomin.store.base import WeightInfo, WeightStore
from pylomin.store.extents import ExtentStore, StoredWeight
from pylomin.store.virtual import VirtualStore, VirtualWeight

_CPU = torch.device("cpu")


def offload_deferred(model: nn.Module, *, device: torch.device | None, memory_budget: int | None) -> None:
    """Replace deferred parameters by offloaded ones, and deferred buffers by their values.

    Parameters that have values (those which the checkpoint lacks) stay in memory, on ``device``.
    """
    ties = [tie for tie in find_ties(slots_of(model)) if isinstance(tie.parameter, DeferredTensor)]
    tensors = {tie.fqn: tie.parameter for tie in ties if isinstance(tie.parameter, DeferredTensor)}
    sources = _sources(tensors)
    for tie, source in zip(ties, sources, strict=True):
        if is_distributed(tie.owned):
            expect_parts(source)
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
            if parameter is not None and not is_distributed(parameter) and parameter.device.type != "meta":
                parameter.data = parameter.data.to(device)
    offload(model, ties, sources, residency_for(model), device=device, memory_budget=memory_budget)
    with torch.no_grad():
        for tie in ties:
            if tie.fqn in written:
                tie.parameter.copy_(written.pop(tie.fqn))


def _leave_metadata_only(tie: Tie) -> None:
    deferred = tie.parameter
    empty = torch.empty(deferred.size(), dtype=deferred.dtype, device="meta")
    owned = tie.owned
    if is_distributed(owned):
        parameter: nn.Parameter = distributed_parameter(empty, owned, requires_grad=owned.requires_grad)
    else:
        parameter = nn.Parameter(empty, requires_grad=owned.requires_grad)
    own = ("origin", "base", "written", "_is_param")
    parameter.__dict__.update({name: value for name, value in owned.__dict__.items() if name not in own})
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
            elif (run := _run_in_file(origin, shape)) is not None:
                store, name = run, origin.part.name
        sources.append(Source(store, name, Layout(dtype, shape, contiguous_stride(shape), _CPU)))
    return sources


def _virtual(origin: Stored, shape: tuple[int, ...]) -> VirtualWeight:
    part = origin.part
    if isinstance(part.store, VirtualStore) and part.nbytes == part.store.info(part.name).nbytes:
        composed = part.store.weight(part.name)
        return VirtualWeight(composed.dtype, shape, composed.parts, composed.blocks)
    return VirtualWeight(origin.dtype, shape, (part,))


def _run_in_file(origin: Stored, shape: tuple[int, ...]) -> ExtentStore | None:
    """Some rows of a weight that lies in a file as it is: they can be read past their store, or mapped."""
    part = origin.part
    stored = part.store.weight(part.name) if isinstance(part.store, ExtentStore) else None
    if not isinstance(part.store, ExtentStore) or not isinstance(stored, StoredWeight):
        return None
    start = stored.extent.start + part.offset_bytes
    info = WeightInfo(origin.dtype, shape, part.nbytes)
    rows = StoredWeight(info, stored.file, Extent(start, start + part.nbytes))
    return ExtentStore(part.store.path, {part.name: rows}, part.store.files)


def _is_whole(origin: Stored) -> bool:
    """It is a weight of the checkpoint, perhaps in another shape."""
    part = origin.part
    return not isinstance(part.store, VirtualStore) and part.nbytes == part.store.info(part.name).nbytes
