"""``load``: a model that never was in memory."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Container, Mapping
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pylomin.errors import PassError
from pylomin.io.modes import Mode
from pylomin.io.sizes import parse_bytes
from pylomin.lazy.collector import paused_collector
from pylomin.lazy.distributed import Sharding, check_distributed, is_distributed, mesh_device
from pylomin.lazy.offload import Tie, check_mode, find_ties, move_rest, offload, residency_for, slots_of
from pylomin.lazy.sources import expected_infos, fill_buffers, matched_sources, missing_error
from pylomin.residency.device import execution_device
from pylomin.store.callable import CallableStore
from pylomin.store.open import Source, open_store
from pylomin.store.renamed import KeyMap, renamed

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def load(
    model_fn: Callable[[], ModuleT],
    weights: Source,
    *,
    key_map: KeyMap | None = None,
    prefix: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    memory_budget: int | str | None = None,
    reading_mode: Mode | None = None,
    strict: bool = True,
) -> ModuleT:
    """Build a model whose weights stay where they are stored.

    Args:
        model_fn: builds the model, without arguments: ``lambda: BertModel(config)``. Its parameters get no memory;
            its buffers are computed as usual.
        weights: anything that :func:`pylomin.open_store` takes. Tied weights may be stored under any of their names.
            A function ``(module_name, weight_names) -> {name: tensor}`` is asked for a module's weights, by their full
            names, when they are used (persistent buffers: now); whatever ``strict`` is, it must have them all.
        key_map: stored name to the model's name: a mapping, in which a name that stays may be left out, or a function,
            which returns None for a weight to leave out.
        prefix: what the stored names begin with and the model's do not, ``"model."``. It is taken off before
            ``key_map`` is asked; weights without it are left out.
        device: where to compute. Default: the CPU.
        dtype: convert floating-point weights, and stored buffers, to this dtype as they are loaded. Default: the
            stored dtypes, which must be the model's.
        memory_budget, reading_mode: as in :func:`pylomin.lazy_loading`.
        strict: False to allow names in ``weights`` that the model does not have, and parameters that ``weights``
            does not have: those are initialised by ``model_fn`` (called a second time) and stay in memory.

    Returns:
        The model, in the mode (``train`` or ``eval``) in which ``model_fn`` left it.

    Raises:
        WeightNotFoundError: listing missing and unexpected names.
        WeightMismatchError: listing weights of another shape or dtype.
        PassError: ``model_fn`` does not return a module, or reads a parameter's value; or ``key_map`` or ``prefix``
            is given for a function, which is asked by the model's names.
        StoreReadError, StoreFormatError: as of :func:`pylomin.open_store`.

    >>> model = load(lambda: nn.Linear(2, 1), {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    >>> model(torch.ones(1, 2)).tolist()
    [[2.0]]
    """
    if isinstance(model_fn, nn.Module) or not callable(model_fn):
        raise PassError(f"model_fn is a {type(model_fn).__name__}; expected a function: lambda: Model(config).")
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    if dtype is not None and not dtype.is_floating_point:
        raise PassError(f"dtype is {dtype}; expected a floating-point dtype.")
    check_mode(reading_mode)
    compute_device = execution_device(device)
    store = open_store(weights)
    if isinstance(store, CallableStore):
        if key_map is not None or prefix is not None:
            raise PassError(
                "weights is a function, asked by the model's names: rename there, not with key_map or prefix."
            )
    else:
        store = renamed(store, key_map=key_map, prefix=prefix)
    model, registered, origins = _build(model_fn)
    ties = _ties_of(model, origins)
    check_distributed(model, [(tie.fqn, tie.owned) for tie in ties])
    compute_device = mesh_device([tie.owned for tie in ties], compute_device)
    if isinstance(store, CallableStore):
        store.expect(expected_infos(model, ties, dtype), cast=dtype is not None)
    sources, missing = matched_sources(ties, store, cast=dtype is not None)
    missing_buffers = fill_buffers(model, store, dtype=dtype)
    known = {name for tie in ties for name in tie.names}
    unexpected = [name for name in store if name not in known]
    if unexpected:  # or buffers, or what a module says it keeps; making a state dict of many weights takes long
        others = model.state_dict().keys()
        unexpected = [name for name in unexpected if name not in others]
    if strict and (missing or missing_buffers or unexpected):
        raise missing_error(missing + missing_buffers, unexpected, store)
    if missing:
        kept = {registered[id(tie.parameter)] for tie in ties if tie.fqn in missing if id(tie.parameter) in registered}
        model, _, origins = _build(model_fn, keep=kept)
        ties = _ties_of(model, origins)
        _check_initialised(ties, missing)
        fill_buffers(model, store, dtype=dtype)
        if dtype is not None:
            for tie in ties:
                if tie.fqn in missing and tie.parameter.is_floating_point():
                    tie.parameter.data = tie.parameter.data.to(dtype)
    found = [tie for tie in ties if tie.fqn not in missing]
    residency = residency_for(model)
    offload(
        model,
        found,
        sources,
        residency,
        device=compute_device,
        dtype=dtype,
        memory_budget=budget,
        reading_mode=reading_mode,
    )
    if compute_device is not None:
        move_rest(model, compute_device)
    return model


def _build(
    model_fn: Callable[[], ModuleT], keep: Container[int] = ()
) -> tuple[ModuleT, dict[int, int], dict[nn.Parameter, nn.Parameter]]:
    """Call ``model_fn`` so that the parameters that this thread registers get shape and dtype only.

    Parameters that are tied stay one object. Those whose number, in the order of first registration, is in ``keep``
    are left as they are. Returns the model, the numbers by ``id`` of the stand-ins, and for each DTensor the parameter
    in whose place it was registered.
    """
    stand_ins: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}
    made: list[nn.Parameter] = []  # alive while building, so that no id is used twice
    numbers: dict[int, int] = {}

    def replace(parameter: nn.Parameter) -> nn.Parameter | None:
        if id(parameter) in numbers:
            return None
        known = stand_ins.get(id(parameter))
        if known is None or known[0]() is not parameter:
            number = len(made)
            if number in keep:
                stand_in = parameter
            else:
                empty = torch.empty_like(parameter, device="meta")
                stand_in = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                stand_in.__dict__.update(parameter.__dict__)
            made.append(stand_in)
            numbers[id(stand_in)] = number
            known = stand_ins[id(parameter)] = (weakref.ref(parameter), stand_in)
        return known[1]

    outer = getattr(_building, "replace", None), getattr(_building, "origins", None)
    _building.replace, _building.origins = replace, {}
    try:
        model = model_fn()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if "meta" not in str(error):
            raise
        raise PassError(
            f"model_fn reads the value of a parameter, which has none while the model is built: {error} "
            "Compute it from something else, or build the model in memory and use pylomin.lazy_loading."
        ) from error
    finally:
        origins = _building.origins
        _building.replace, _building.origins = outer
    if not isinstance(model, nn.Module):
        raise PassError(f"model_fn returned a {type(model).__name__}; expected a torch.nn.Module.")
    alive = {id(parameter) for parameter in model.parameters()}
    return model, {key: number for key, number in numbers.items() if key in alive}, origins


_building = threading.local()  # how the thread that builds a model replaces its parameters


def _replace_while_building(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    replace: Callable[[nn.Parameter], nn.Parameter | None] | None = getattr(_building, "replace", None)
    if replace is None or parameter is None:
        return None
    if is_distributed(parameter):
        if (former := module._parameters.get(name)) is not None:
            _building.origins[parameter] = former
        return None
    return None if parameter.device.type == "meta" else replace(parameter)


# Registered for good: torch walks its hooks without a lock, and other threads may be building models.
register_module_parameter_registration_hook(_replace_while_building)  # type: ignore[arg-type]


@paused_collector()
def _ties_of(model: nn.Module, origins: Mapping[nn.Parameter, nn.Parameter]) -> list[Tie]:
    """The weights of the model. What was tied before it was distributed is tied again, if it is sharded alike.

    Args:
        origins: of DTensors, the parameters that they were made of.
    """
    alike: dict[object, nn.Parameter] = {}
    for slot in slots_of(model):
        owned = slot.owned
        if owned in origins:
            sharding = Sharding.of(owned)
            key = (origins[owned], sharding.mesh, sharding.placements)
            slot.module._parameters[slot.name] = alike.setdefault(key, owned)
    ties = find_ties(slots_of(model))
    same: dict[nn.Parameter, list[str]] = {}
    for tie in ties:
        same.setdefault(origins.get(tie.owned, tie.owned), []).extend(tie.names)
    for tie in ties:
        tie.aliases = [name for name in same[origins.get(tie.owned, tie.owned)] if name not in tie.names]
    return ties


def _check_initialised(ties: list[Tie], missing: list[str]) -> None:
    for tie in ties:
        if tie.fqn in missing and tie.parameter.device.type == "meta":
            raise PassError(
                f"parameter '{tie.fqn}' is not in the weights, and model_fn gives it no value: it is on the meta "
                "device, or model_fn does not build the same model each time it is called."
            )
