"""From what a residency decided to a :class:`Plan` that can be looked at and saved, and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from torch import nn

from pylomin.errors import PassError
from pylomin.lazy.offload import offloaded_slots, residencies_of
from pylomin.passes.selection import check_model
from pylomin.residency.plan import Plan, PlannedGroup, weight_identity
from pylomin.residency.recording import UNKNOWN_COSTS
from pylomin.residency.residency import Residency
from pylomin.residency.simulation import Group, simulate
from pylomin.residency.trace import Key
from pylomin.residency.weight import Weight, used_from


def plan_of(model: nn.Module) -> Plan:
    """What is kept in memory, what streams and in which order, as it was decided for ``model``.

    There is a plan when the model has a memory budget and its order of uses is known: after :func:`pylomin.fit`, or
    after a pass and a half. ``print`` shows it; :meth:`Plan.save` keeps it for ``pylomin.prefetch(model, plan=...)``,
    so that a later run need not learn the order.

    Raises:
        PassError: there is no plan yet; the message says what is missing.
    """
    check_model(model)
    residency = _residency(model)
    budget, retention = residency.memory_budget, residency.retention
    if budget is None:
        raise PassError(
            "there is no plan, for the model has no memory budget: without one, weights leave as soon as they were "
            "used. Give one: pylomin.set_memory_budget(model, '512MiB'), or pylomin.fit(model, '512MiB')."
        )
    if retention.schedule is None:
        raise PassError(
            "there is no plan yet, for the order in which weights are used is not known. Run the model twice, or use "
            "pylomin.fit(model, memory_budget)."
        )
    groups = residency.footprints(retention.order)
    places = {key: place for place, key in enumerate(groups)}
    planned = tuple(
        PlannedGroup(
            tuple(weight.name for weight in residency.weights_of(key)),
            group.size_bytes,
            retention.stays(key),
            group.streamed_bytes,
        )
        for key, group in groups.items()
    )
    resident_bytes = sum(group.size_bytes for group in planned if group.resident)
    largest = max((group.sizes.need_bytes for group in planned if not group.resident), default=0)
    return Plan(
        weights=_identities(model),
        groups=planned,
        order=tuple(places[key] for key in retention.order),
        memory_budget=budget,
        window_bytes=max(largest, budget - resident_bytes),
        peak_bytes=_predicted_peak(residency, groups, budget),
        elapsed_s=_predicted_time(residency, groups),
        choices={"reading": f"{residency.reading.mode}: {residency.reading.why}", **residency.choices},
    )


def adoption(model: nn.Module, plan: Plan | str | os.PathLike[str]) -> Callable[[], None]:
    """Check a plan, and return what makes the model expect uses in its order.

    What stays is decided anew, for the budget that the model has then.

    Raises:
        PlanError: it was made for another model, or cannot be read.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    residency = _residency(model)
    plan.check_model(_identities(model))
    weights = _weights(model)
    order = [tuple(weights[name].index for name in names) for names in plan.uses()]
    return lambda: residency.adopt(order)


def _residency(model: nn.Module) -> Residency:
    residencies = residencies_of(model)
    if len(residencies) != 1:
        found = "nothing of it is offloaded" if not residencies else "its parts were offloaded separately"
        raise PassError(f"there is no one plan for this {type(model).__name__}: {found}.")
    return residencies[0]


def _weights(model: nn.Module) -> dict[str, Weight]:
    used = used_from([parameter.weight for _, parameter in offloaded_slots(model)])
    return {weight.name: weight for weight in used}


def _identities(model: nn.Module) -> dict[str, str]:
    return {name: weight_identity(w.layout.dtype, w.layout.shape) for name, w in _weights(model).items()}


def _predicted_peak(residency: Residency, groups: Mapping[Key, Group], budget: int) -> int:
    """Of the ledger.

    Read inline, or tile by tile, one group streams at a time; read ahead, as many as the window lets pass.
    """
    retention = residency.retention
    assert retention.schedule is not None
    resident_bytes = sum(group.size_bytes for key, group in groups.items() if retention.stays(key))
    streamed = [group for key, group in groups.items() if not retention.stays(key)]
    if not residency.reads_ahead or all(group.streamed_bytes is not None for group in streamed):
        return resident_bytes + max((group.need_bytes for group in streamed), default=0)
    measured, places = retention.measured, {key: place for place, key in enumerate(groups)}
    compute_s = measured.compute_s if measured is not None else [0.0] * len(retention.order)
    simulation = simulate(
        [places[key] for key in retention.order],
        list(groups.values()),
        retention.schedule.residents,
        retention.schedule.window_bytes,
        compute_s,
        measured.costs if measured is not None else UNKNOWN_COSTS,
    )
    return min(budget, simulation.peak_bytes)


def _predicted_time(residency: Residency, groups: Mapping[Key, Group]) -> float | None:
    """Of one cycle; None where nothing was measured."""
    retention = residency.retention
    measured = retention.measured
    if measured is None or retention.schedule is None:
        return None
    if residency.reads_ahead:
        return retention.schedule.elapsed_s
    streamed = [groups[key] for key in retention.order if not retention.stays(key)]
    read_s = 0.0 if residency.reads_inline else sum(measured.costs.read_s(group) for group in streamed)
    return sum(measured.compute_s) + read_s
