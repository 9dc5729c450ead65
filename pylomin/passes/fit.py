"""``fit``: everything that makes a model run as fast as it can within a memory budget."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from pylomin.errors import BudgetError, PassError
from pylomin.io.modes import Mode
from pylomin.io.sizes import format_bytes, parse_bytes
from pylomin.lazy.distributed import local_of
from pylomin.lazy.module import LazyModule, whole_weights
from pylomin.lazy.offload import check_mode, offloaded_slots, residencies_of
from pylomin.lazy.sources import PINNED_CHUNK_BYTES
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.passes.chunked_embedding import chunked_embedding
from pylomin.passes.lazy_loading import lazy_loading
from pylomin.passes.memory_budget import set_memory_budget
from pylomin.passes.prefetch import prefetch
from pylomin.passes.selection import ModuleT, check_model
from pylomin.residency.device import device_of, execution_device, is_streamed_to
from pylomin.residency.memory_limits import MemoryLimits, anonymous_bytes, memory_limits
from pylomin.residency.residency import Residency
from pylomin.residency.trace import Key
from pylomin.residency.weight import used_from
from pylomin.store.base import WeightStore

CHUNK_BYTES = 4 << 20  # 4 MiB; rows of a table that are looked up at one time, where the budget is large
CHUNK_SHARE = 16  # of the budget, where it is small
SPARE_SHARE = 0.2  # of free memory, left for activations and everything else
SPARE_BYTES = 256 << 20  # 256 MiB; at least so much


def fit(
    model: ModuleT,
    memory_budget: int | str | None = None,
    *,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    weights: str | os.PathLike[str] | Mapping[str, torch.Tensor] | WeightStore | None = None,
    device: torch.device | str | None = None,
    storage: Literal["disk", "cpu"] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    reading_mode: Mode | None = None,
) -> ModuleT:
    """Apply the passes that suit a memory budget, and plan what stays in memory.

    Weights are offloaded (unless they are already), large embeddings are looked up in chunks, linears that are too
    large for the budget are multiplied by tiles, what streams is read ahead, and as much as fits stays.
    ``print(pylomin.plan_of(model))`` says what was chosen, and why.

    Args:
        model: changed in place and returned.
        memory_budget: ceiling on weights that are in memory at one time, as in :func:`pylomin.lazy_loading`. Default:
            what the container or the machine, or the device that is computed on, has free, less a fifth (at least
            256 MiB) for everything else.
        args: example inputs. With them the model is run three times, so that the order in which weights are used, the
            time that computing takes and the speed of the disk are measured, not assumed, and the plan can predict the
            time of a pass.
        kwargs: keyword arguments of the example.
        weights, device, output_dir, reading_mode: as in :func:`pylomin.lazy_loading`, for what is not offloaded yet.
        storage: as there. Default: for a device such as ``"cuda"``, host memory where the weights fit into what the
            container or the machine has free, less a fifth (at least 256 MiB); else the disk.

    Raises:
        BudgetError: the budget is too small for what one operation needs, naming it and what would work; or none was
            given and the system does not say what is free.
        PassError: an argument is wrong. The model is unchanged.

    >>> model = fit(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), "1MiB", args=[torch.ones(1, 8)])
    """
    check_model(model)
    check_mode(reading_mode)
    streamed_to = _device_of_weights(model, execution_device(device))
    if memory_budget is None:
        budget, why = _free_memory(streamed_to, model)
    else:
        budget, why = parse_bytes(memory_budget), "as given"
    if args is not None and not isinstance(args, (list, tuple)):
        raise PassError(f"args is a {type(args).__name__}; expected a list of positional arguments: args=[tokens].")
    why_stored: dict[str, str] = {}
    is_resident = any(not isinstance(local_of(parameter), OffloadedTensor) for parameter in model.parameters())
    if is_resident or weights is not None:
        if storage is None and streamed_to is not None and weights is None and output_dir is None:
            storage, why_stored["storage"] = _storage_for(model)
        lazy_loading(
            model,
            weights=weights,
            device=device,
            storage=storage or "disk",
            output_dir=output_dir,
            memory_budget=budget,
            reading_mode=reading_mode,
        )
    else:
        set_memory_budget(model, budget)
        if reading_mode is not None:
            for residency in residencies_of(model):
                residency.set_reading_mode(reading_mode)
    chunk_bytes = max(1, min(CHUNK_BYTES, budget // CHUNK_SHARE))
    tables = _chunk_tables(model, chunk_bytes)
    prefetch(model)
    for residency in residencies_of(model):
        residency.adopt(_order_of_definition(model, residency))
        residency.load_residents()
    if args is not None or kwargs is not None:
        _measure(model, args or (), kwargs or {})
    for residency in residencies_of(model):
        residency.choices = _choices(model, residency, why, tables, chunk_bytes) | why_stored
    return model


def _device_of_weights(model: nn.Module, device: torch.device | None) -> torch.device | None:
    """The device that weights are streamed to; None: they are used on the host."""
    devices = {parameter.device for parameter in model.parameters()} if device is None else {device}
    streamed = [device for device in devices if is_streamed_to(device)]
    return streamed[0] if streamed else None


def _free_memory(device: torch.device | None, model: nn.Module) -> tuple[int, str]:
    limits = memory_limits()
    if device is not None:
        parameters = map(local_of, model.parameters())
        weights = [p for p in parameters if p.device == device and not isinstance(p, OffloadedTensor)]
        free_bytes = device_of(device).free_bytes() + sum(weight.nbytes for weight in weights)  # they leave it
        limits = MemoryLimits(None, free_bytes, f"{device}: {format_bytes(free_bytes)} free")
    if limits.available_bytes is None:
        raise BudgetError(f"{limits.source}, so there is no default for memory_budget; give one, such as '4GiB'.")
    spare_bytes = _spare_bytes(limits.available_bytes)
    if spare_bytes >= limits.available_bytes:
        raise BudgetError(
            f"only {format_bytes(limits.available_bytes)} of memory are free ({limits.source}), and "
            f"{format_bytes(spare_bytes)} are left for other things by default. Give a memory_budget."
        )
    return limits.available_bytes - spare_bytes, f"what is free ({limits.source}), less {format_bytes(spare_bytes)}"


def _spare_bytes(available_bytes: int) -> int:
    return max(SPARE_BYTES, int(SPARE_SHARE * available_bytes))


def _storage_for(model: nn.Module) -> tuple[Literal["disk", "cpu"], str]:
    """Where the weights go that are in memory now, and why."""
    tensors = {id(p): p for p in model.parameters() if not isinstance(p, OffloadedTensor)}.values()
    nbytes = sum(tensor.nbytes for tensor in tensors)
    limits = memory_limits()
    if limits.available_bytes is None:
        return "disk", f"disk, for {limits.source}"
    # Those in ordinary memory move; pages of a mapped file come on top.
    moved_bytes = min(anonymous_bytes(), sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu"))
    room_bytes = limits.available_bytes - _spare_bytes(limits.available_bytes)
    fits = nbytes - moved_bytes + min(nbytes, PINNED_CHUNK_BYTES) <= room_bytes
    place: Literal["disk", "cpu"] = "cpu" if fits else "disk"
    where = "host memory" if fits else "disk"
    return place, f"{where}, for the host has {format_bytes(limits.available_bytes)} free ({limits.source})"


def _chunk_tables(model: nn.Module, chunk_bytes: int) -> int:
    """Bound the lookups of embeddings that are larger than a chunk; returns how many there are."""
    tables = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        and isinstance(local_of(module.weight), OffloadedTensor)
        and module.max_norm is None
        and local_of(module.weight).nbytes > chunk_bytes
    ]
    for table in tables:
        rows = local_of(table.weight)
        row_bytes = max(1, rows.nbytes // max(1, len(rows)))
        chunked_embedding(model, target_modules=[table], chunk_size=max(1, chunk_bytes // row_bytes))
    return len(tables)


def _order_of_definition(model: nn.Module, residency: Residency) -> list[Key]:
    """A first guess at the order of uses: that in which modules stand in the model."""
    order: list[Key] = []
    for module in model.modules():
        group = whole_weights(module) if isinstance(module, LazyModule) else []
        if group and group[0].residency is residency:
            order.append(tuple(weight.index for weight in used_from(group)))
    return order


def _measure(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Run three times: the first pass shows the order, the second settles, and the third is timed.

    In the second, memory is read into for the first time, and what was read by the former plan leaves.
    """
    for is_planned in (True, False, True):
        residencies = residencies_of(model)
        for residency in residencies:
            residency.start_recording()
        try:
            with torch.no_grad():
                model(*args, **kwargs)
        finally:
            recorded = [(residency, residency.stop_recording()) for residency in residencies]
        for residency, measured in recorded:
            if measured is not None and is_planned:
                residency.adopt(measured.order, measured)
                residency.load_residents()


def _choices(model: nn.Module, residency: Residency, why: str, tables: int, chunk_bytes: int) -> dict[str, str]:
    tiled = {p.weight: None for _, p in offloaded_slots(model) if p.weight.tiled and p.weight.residency is residency}
    choices = {"budget": why}
    if tiled:
        largest = max(tiled, key=lambda weight: weight.nbytes)
        choices["tiles"] = (
            f"{len(tiled)} linears, for they do not fit beside what comes next; the largest is '{largest.name}' "
            f"({format_bytes(largest.nbytes)})"
        )
    if tables:
        choices["embeddings"] = f"{tables} looked up by rows, {format_bytes(chunk_bytes)} of them at one time"
    if residency.reads_inline:
        choices["prefetch"] = "none, for mapped weights need no copy"
    elif residency.retention.schedule is not None and not residency.retention.streams:
        choices["prefetch"] = "none, for everything stays in memory"
    else:
        choices["prefetch"] = "what streams is read in the background, in the order of use"
    return choices
