"""``lazy_loading``: weights leave memory, load on use, leave again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from pylomin.errors import PassError
from pylomin.io.modes import Mode
from pylomin.io.sizes import parse_bytes
from pylomin.lazy.distributed import check_distributed, mesh_device
from pylomin.lazy.offload import (
    Tie,
    check_budget,
    check_mode,
    find_ties,
    move_rest,
    offload,
    offloaded_slots,
    planned_footprints,
    residency_for,
    slots_of,
)
from pylomin.lazy.sources import fill_buffers, matched_sources, missing_error, pinned_sources, written_sources
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.passes.selection import ModuleT, check_model, select_modules
from pylomin.residency.device import execution_device
from pylomin.store.base import WeightStore
from pylomin.store.open import open_store


def lazy_loading(
    model: ModuleT,
    *,
    weights: str | os.PathLike[str] | Mapping[str, torch.Tensor] | WeightStore | None = None,
    target_classes: Iterable[type[nn.Module]] | None = None,
    target_modules: Iterable[nn.Module] | None = None,
    skip_modules: Iterable[nn.Module] | None = None,
    device: torch.device | str | None = None,
    storage: Literal["disk", "cpu"] = "disk",
    output_dir: str | os.PathLike[str] | None = None,
    memory_budget: int | str | None = None,
    reading_mode: Mode | None = None,
) -> ModuleT:
    """Keep the weights of ``model`` out of memory but while they are used.

    Args:
        model: changed in place and returned.
        weights: where the weights of this very model are stored already (anything that
            :func:`pylomin.open_store` takes). They are streamed from there and nothing is written. The model may have
            been built without values, on the meta device. Default: the values in memory are written to ``output_dir``.
        target_classes: offload modules of these classes only.
        target_modules: offload these modules only (themselves, not what is below them).
        skip_modules: keep these modules, and what is below them, in memory. A weight that is tied to one of theirs
            stays, too.
        device: where to compute; what stays in memory moves there. Default: where the parameters are.
        storage: ``"disk"``, or ``"cpu"`` to keep the weights in host memory (for computing on another device).
        output_dir: a directory that keeps the weights as ``model.safetensors``. Default: a fresh scratch directory,
            removed when the model is gone.
        memory_budget: ceiling, in bytes (int, or a string such as ``"512MiB"``), on weights that are in memory at one
            time; as many as fit stay. Default: weights leave as soon as they were used.
        reading_mode: ``"mapped"`` (pages of the file are used where they are, without a copy), ``"buffered"`` (copied
            through the page cache) or ``"direct"`` (read past it). Default: what suits the file and the memory that is
            free, chosen anew now and then; :func:`pylomin.stats` says which and why.

    Returns:
        ``model``, with the same outputs, names and hooks. :func:`pylomin.restore` undoes it. A second call offloads
        what the first left in memory; a model has one budget, the last that was given.

    Raises:
        PassError: an argument, or a parameter of the model, that this cannot work with. The model is unchanged.
        BudgetError: ``memory_budget`` is smaller than the largest group of weights used together. Of a linear, that
            is its bias and two rows: what does not fit twice runs by tiles; see :func:`pylomin.chunked_linear`.
        WeightNotFoundError, WeightMismatchError: ``weights`` are not this model's.
        ScratchError: the weights could not be written.

    >>> model = lazy_loading(nn.Linear(4, 2))
    >>> model(torch.ones(1, 4)).shape
    torch.Size([1, 2])
    """
    check_model(model)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    if storage not in ("disk", "cpu"):
        raise PassError(f"storage is {storage!r}; expected 'disk' or 'cpu'.")
    if storage == "cpu" and weights is not None:
        raise PassError("storage='cpu' keeps the values in memory, and weights= reads them from a store; give one.")
    if output_dir is not None and (storage == "cpu" or weights is not None):
        raise PassError("output_dir is for weights that are written; with storage='cpu' or weights=, none are.")
    check_mode(reading_mode)
    compute_device = execution_device(device)
    targets = select_modules(
        model, target_classes=target_classes, target_modules=target_modules, skip_modules=skip_modules
    )
    ties = _ties_of(model, set(targets))
    check_distributed(model, [(tie.fqn, tie.owned) for tie in ties])
    for tie in ties:
        check_parameter(tie, has_weights=weights is not None)
    compute_device = mesh_device([tie.owned for tie in ties], compute_device)
    check_budget(planned_footprints(ties, compute_device), budget)
    residency = residency_for(model)
    if weights is not None:
        store = open_store(weights)
        sources, missing = matched_sources(ties, store)
        if missing:
            raise missing_error(missing, [], store)
        fill_buffers(model, store)
    elif storage == "cpu":
        sources = pinned_sources(ties, compute_device)
    else:
        sources = written_sources(ties, residency, output_dir)
    offload(
        model,
        ties,
        sources,
        residency,
        device=compute_device,
        memory_budget=budget,
        reading_mode=reading_mode,
    )
    if compute_device is not None:
        move_rest(model, compute_device)
    return model


def _ties_of(model: nn.Module, targets: set[nn.Module]) -> list[Tie]:
    """The weights that only targets own and that are in memory now."""
    ties = [
        tie
        for tie in find_ties(slots_of(model))
        if all(slot.module in targets for slot in tie.slots) and not isinstance(tie.parameter, OffloadedTensor)
    ]
    if ties:
        return ties
    if next(model.parameters(), None) is None:
        raise PassError(f"{type(model).__name__} has no parameters to offload.")
    if offloaded_slots(model):
        raise PassError("lazy_loading was applied to this model already, and nothing is left in memory to offload.")
    raise PassError(
        "nothing to offload: no selected module owns a parameter (or it is tied to a module that is not selected). "
        "target_modules means the modules themselves; for all modules below one, use list(module.modules())."
    )


def check_parameter(tie: Tie, *, has_weights: bool = False) -> None:
    """Raises PassError if the parameter cannot be offloaded."""
    parameter, owned = tie.parameter, tie.owned
    problem = None
    if any(isinstance(slot.module, torch.jit.ScriptModule) for slot in tie.slots):
        problem = "belongs to a torch.jit module, whose code reads it without Python; skip its module"
    elif isinstance(parameter, nn.parameter.UninitializedParameter):
        problem = "is uninitialized; run the model once, so that it gets a shape"
    elif owned.grad is not None:
        problem = "has a gradient, which would be lost; call model.zero_grad(set_to_none=True)"
    elif owned._backward_hooks:
        problem = "has gradient hooks, which would never run; remove them"
    elif type(parameter).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        problem = f"is a {type(parameter).__name__}, whose memory is not that of a plain tensor; skip its module"
    elif parameter.layout != torch.strided or parameter.is_quantized:
        problem = "is sparse or quantized; skip its module"
    elif parameter.device.type == "meta" and not has_weights:
        problem = "is on the meta device and has no values; pass weights=, or build with pylomin.load"
    if problem is not None:
        raise PassError(f"parameter '{tie.fqn}' {problem} (skip_modules=[...] keeps a module in memory).")


def offload_modules(model: nn.Module, targets: Iterable[nn.Module]) -> None:
    """Offload what ``targets`` still have in memory, with what is tied to it.

    Raises:
        PassError: a parameter cannot be offloaded. The model is unchanged.
        ScratchError: the weights could not be written.
    """
    wanted = set(targets)
    ties = [
        tie
        for tie in find_ties(slots_of(model))
        if any(slot.module in wanted for slot in tie.slots) and not isinstance(tie.parameter, OffloadedTensor)
    ]
    for tie in ties:
        check_parameter(tie)
    if ties:
        residency = residency_for(model)
        offload(model, ties, written_sources(ties, residency, None), residency)
