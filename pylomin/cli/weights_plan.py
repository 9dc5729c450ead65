"""A plan for weights whose model nobody knows."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from pylomin.cli.layout import files_of
from pylomin.cli.reading import measure
from pylomin.errors import BudgetError, PassError
from pylomin.io.modes import Mode
from pylomin.io.sizes import format_bytes
from pylomin.residency.plan import Plan, PlannedGroup, weight_identity
from pylomin.residency.schedule import TYPICAL_COSTS, choose_residents, smallest_budget
from pylomin.residency.simulation import Costs, Group, simulate
from pylomin.store.base import WeightStore
from pylomin.store.open import open_store

_MEASURED_BYTES = 256 << 20  # 256 MiB tell the speed of a disk


def plan_of_weights(source: Path, budget_bytes: int) -> Plan:
    """Weights whose names differ in the last part only are a group; each is used once, in the order of the file.

    Raises:
        BudgetError: the budget is smaller than the largest group.
        PassError: there are no weights.
    """
    store = open_store(source)
    try:
        grouped = groups_of(store)
        weights = {name: weight_identity((info := store.info(name)).dtype, info.shape) for name in store}
        paths = files_of(store)
    finally:
        store.close()
    if not grouped:
        raise PassError(f"{source} has no weights, and needs no plan.")
    groups = [Group(nbytes) for _, nbytes in grouped]
    order = range(len(groups))
    costs, why = _costs(paths)
    compute_s = [0.0] * len(groups)
    schedule = choose_residents(order, groups, budget_bytes, compute_s=compute_s, costs=costs)
    if schedule is None:
        largest = max(range(len(groups)), key=lambda index: groups[index].size_bytes)
        needed = smallest_budget(order, groups)
        raise BudgetError(
            f"the weights {', '.join(map(repr, grouped[largest][0]))}, which are used together, need "
            f"{format_bytes(needed)}, but the budget is {format_bytes(budget_bytes)}. Use at least {needed} bytes. "
            "(With the model, large weights can be used tile by tile, and less will do.)"
        )
    simulation = simulate(order, groups, schedule.residents, schedule.window_bytes, compute_s, costs)
    return Plan(
        weights=weights,
        groups=tuple(
            PlannedGroup(names, nbytes, index in schedule.residents) for index, (names, nbytes) in enumerate(grouped)
        ),
        order=tuple(order),
        memory_budget=budget_bytes,
        window_bytes=schedule.window_bytes,
        peak_bytes=simulation.peak_bytes,
        elapsed_s=simulation.elapsed_s or None,
        choices={
            "order": "that of the file, for the model is not known",
            "time": f"reading alone, {why}; computing comes on top where it takes longer",
        },
    )


def groups_of(store: WeightStore) -> list[tuple[tuple[str, ...], int]]:
    """Names and bytes of neighbours that have all but the last part of their names in common."""
    grouped = []
    for _, names in groupby(store, key=lambda name: name.rpartition(".")[0] or name):
        together = tuple(names)
        grouped.append((together, sum(store.info(name).nbytes for name in together)))
    return grouped


def _costs(paths: list[str]) -> tuple[Costs, str]:
    modes: tuple[Mode, ...] = ("direct", "buffered")
    for mode in modes:
        speed = measure(paths, mode, "cold", _MEASURED_BYTES)
        if speed.bytes_per_s is not None:
            return Costs(speed.bytes_per_s), f"at {format_bytes(int(speed.bytes_per_s))}/s from this disk"
    costs = TYPICAL_COSTS
    return costs, f"at {format_bytes(int(costs.bandwidth_bytes_per_s))}/s, which is assumed: {speed.why_not}"
