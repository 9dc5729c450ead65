"""How long does planning take, and how far is the plan from the best one?

Times: orders of up to 10,000 groups. Distances: random instances, small enough to try every choice of residents, and
larger ones against the bound ``max(compute, reading)`` of the best residents if they could be taken in part. All in
simulation; what a plan is worth on a disk, the other benchmarks measure. Numbers of groups beyond those that are
simulated are planned by what is read alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, combinations
from typing import Any

from benchmarks.common import Spread
from benchmarks.suite import finish, parse, save
from pylomin.residency.schedule import TYPICAL_COSTS, choose_residents, smallest_budget
from pylomin.residency.simulation import Costs, Group, StreamedCycle, lower_bound, simulate

MIB = 1 << 20
COUNTS = (100, 300, 1_000, 3_000, 10_000)
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of all bytes, as budget
REPEATS = 5
INSTANCES = {"full": 300, "tiny": 5}  # random small ones; of larger ones a fifth
SEED = 0


@dataclass(frozen=True)
class Instance:
    """Something to plan for."""

    order: list[int]
    groups: list[Group]
    budget_bytes: int
    compute_s: list[float]
    costs: Costs


def random_instance(rng: random.Random, fewest: int, most: int) -> Instance:
    """Sizes alike, of a few kinds, or spread over decades; some groups used again; compute from little to much."""
    count = rng.randint(fewest, most)
    kinds: list[Callable[[], int]] = [
        lambda: 20 * MIB,
        lambda: rng.choice([2, 10, 40]) * MIB,
        lambda: rng.randint(1, 100) * MIB,
        lambda: int(10 ** rng.uniform(4, 8.5)),
    ]
    size = rng.choice(kinds)
    groups = [Group(size()) for _ in range(count)]
    groups = [Group(g.size_bytes, g.size_bytes // 4 if rng.random() < 0.1 else None) for g in groups]
    order = list(range(count))
    if rng.random() < 0.4:
        order += [rng.randrange(count) for _ in range(rng.randint(0, count))]
    costs = Costs(10 ** rng.uniform(8, 10), rng.choice([0.0, 1e-4, 1e-3]))
    for_reading = rng.choice([0.2, 0.6, 1.0, 2.0])
    uneven = rng.random() < 0.5
    compute_s = [costs.read_s(groups[i]) * for_reading * (2 * rng.random() if uneven else 1.0) for i in order]
    smallest = smallest_budget(order, groups)
    budget_bytes = rng.randint(smallest, max(smallest, sum(group.size_bytes for group in groups)))
    return Instance(order, groups, budget_bytes, compute_s, costs)


def simulated_s(instance: Instance, residents: frozenset[int]) -> float:
    """Time of a cycle with these residents and all the rest of the budget as window."""
    window_bytes = instance.budget_bytes - sum(instance.groups[index].size_bytes for index in residents)
    return simulate(
        instance.order, instance.groups, residents, window_bytes, instance.compute_s, instance.costs
    ).elapsed_s


def best_s(instance: Instance) -> float:
    """Time of a cycle with the best residents, by trying all choices."""
    used = sorted(set(instance.order))
    bounded = []
    for choice in chain.from_iterable(combinations(used, count) for count in range(len(used) + 1)):
        residents = frozenset(choice)
        window_bytes = instance.budget_bytes - sum(instance.groups[index].size_bytes for index in residents)
        if window_bytes >= smallest_budget(set(instance.order) - residents, instance.groups):
            bound_s = lower_bound(instance.order, instance.groups, residents, instance.compute_s, instance.costs)
            bounded.append((bound_s, window_bytes, residents))
    best = float("inf")
    for bound_s, window_bytes, residents in sorted(bounded, key=lambda choice: choice[0]):
        if bound_s >= best:
            break
        arguments = (instance.order, instance.groups, residents, window_bytes, instance.compute_s, instance.costs)
        best = min(best, StreamedCycle(*arguments).run())
    return best


def bound_s(instance: Instance) -> float:
    """No plan is quicker, even one that keeps a part of a group."""
    saved_s = dict.fromkeys(instance.order, 0.0)
    for index in instance.order:
        saved_s[index] += instance.costs.read_s(instance.groups[index])
    left_bytes, read_s = float(instance.budget_bytes), sum(saved_s.values())
    for index in sorted(saved_s, key=lambda index: saved_s[index] / instance.groups[index].size_bytes, reverse=True):
        part = min(1.0, left_bytes / instance.groups[index].size_bytes)
        read_s -= part * saved_s[index]
        left_bytes -= part * instance.groups[index].size_bytes
    return max(sum(instance.compute_s), read_s)


def distances(
    rng: random.Random, count: int, fewest: int, most: int, reference: Callable[[Instance], float]
) -> dict[str, Any]:
    """Ratios of planned to reference time, with costs known to the plan and without."""
    ratios: dict[str, list[float]] = {"costs_known": [], "costs_assumed": []}
    for _ in range(count):
        instance = random_instance(rng, fewest, most)
        reference_s = reference(instance)
        arguments = (instance.order, instance.groups, instance.budget_bytes)
        known = choose_residents(*arguments, compute_s=instance.compute_s, costs=instance.costs)
        assumed = choose_residents(*arguments)
        assert known is not None
        assert assumed is not None
        ratios["costs_known"].append(simulated_s(instance, known.residents) / reference_s)
        ratios["costs_assumed"].append(simulated_s(instance, assumed.residents) / reference_s)
    return {name: _quantiles(sorted(values)) for name, values in ratios.items()}


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    at = {"median": 0.5, "90%": 0.9, "99%": 0.99}
    found = {name: round(values[int(len(values) * share)], 4) for name, share in at.items()}
    return {"mean": round(sum(values) / len(values), 4), **found, "largest": round(values[-1], 4)}


def planning_times(counts: Sequence[int]) -> list[dict[str, Any]]:
    """For each number of groups, milliseconds of the processor, over budgets; the quickest of some repeats of each."""
    rows = []
    layer_mib = (16, 4, 4, 16, 43, 43, 43)  # of a decoder, and two norms
    for count in counts:
        layer = [*(size * MIB for size in layer_mib), 8192, 8192]
        groups = [Group(layer[index % len(layer)]) for index in range(count)]
        total_bytes = sum(group.size_bytes for group in groups)
        compute_s = [0.5 * TYPICAL_COSTS.read_s(group) for group in groups]
        times_ms = []
        for share in SHARES:
            repeats = []
            for _ in range(REPEATS):
                start = time.process_time()
                choose_residents(
                    range(count), groups, int(total_bytes * share), compute_s=compute_s, costs=TYPICAL_COSTS
                )
                repeats.append((time.process_time() - start) * 1e3)
            times_ms.append(min(repeats))  # interruptions only ever add time
        rows.append({"variant": f"{count:,} groups", "planning_ms": asdict(Spread.of(times_ms))})
    return rows


def main() -> None:
    """Measure and write the result."""
    options = parse("schedule", __doc__, rounds=1, limit_s=120)
    instances = INSTANCES[options.size]
    rng = random.Random(SEED)
    rows = planning_times(COUNTS if options.size == "full" else COUNTS[:2])
    for kind, count, fewest, most, reference in (
        ("the best of all choices", instances, 1, 8, best_s),
        ("the best of all choices", instances // 5, 11, 13, best_s),
        ("the bound", instances // 5, 30, 60, bound_s),
    ):
        for costs, quantiles in distances(rng, count, fewest, most, reference).items():
            name = f"plans for {fewest} to {most} groups, {costs.replace('_', ' ')}, over {kind}"
            rows.append({"variant": name, "instances": count, "over": quantiles})
    settings = {
        "model": "groups of weights in simulation",
        "input": f"random instances, seed {SEED}; budgets of {', '.join(f'{share:.0%}' for share in SHARES)} for times",
        "file_state": "not read",
        "rounds": REPEATS,
    }
    save(options, settings, {"rows": rows})
    finish(options, {})


if __name__ == "__main__":
    main()
