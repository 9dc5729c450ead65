"""Random things to plan for, and a plain account of how they run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations

from hypothesis import strategies as st

from pylomin.residency.schedule import smallest_budget
from pylomin.residency.simulation import Costs, Group


@dataclass(frozen=True)
class Instance:
    order: list[int]
    groups: list[Group]
    budget_bytes: int
    compute_s: list[float]
    costs: Costs
    residents: frozenset[int]  # some that fit

    @property
    def resident_bytes(self) -> int:
        return sum(self.groups[index].size_bytes for index in self.residents)

    def fits(self, residents: frozenset[int]) -> bool:
        resident_bytes = sum(self.groups[index].size_bytes for index in residents)
        return resident_bytes + smallest_budget(set(self.order) - residents, self.groups) <= self.budget_bytes

    def choices(self) -> Iterator[frozenset[int]]:
        used = sorted(set(self.order))
        subsets = chain.from_iterable(combinations(used, count) for count in range(len(used) + 1))
        return filter(self.fits, map(frozenset, subsets))


@st.composite
def instances(draw: st.DrawFn, *, max_groups: int, min_groups: int = 1) -> Instance:
    count = draw(st.integers(min_groups, max_groups))
    sizes = draw(st.lists(st.integers(1, 100) | st.sampled_from([8, 40]), min_size=count, max_size=count))
    tiled = draw(st.lists(st.sampled_from([None, None, None, 4, 20]), min_size=count, max_size=count))
    groups = [Group(size, tile) for size, tile in zip(sizes, tiled, strict=True)]
    order = draw(st.permutations(range(count))) + draw(st.lists(st.integers(0, count - 1), max_size=count))
    compute_s = draw(st.lists(st.floats(0.0, 20.0), min_size=len(order), max_size=len(order)))
    costs = Costs(draw(st.floats(0.5, 50.0)), draw(st.sampled_from([0.0, 0.1, 3.0])))
    budget_bytes = draw(st.integers(smallest_budget(order, groups), max(sum(sizes), smallest_budget(order, groups))))
    residents: frozenset[int] = frozenset()
    instance = Instance(order, groups, budget_bytes, compute_s, costs, residents)
    for index in draw(st.permutations(range(count)))[: draw(st.integers(0, count))]:
        if instance.fits(residents | {index}):
            residents |= {index}
    return Instance(order, groups, budget_bytes, compute_s, costs, residents)


def step_by_step(instance: Instance, cycles: int = 24) -> tuple[float, int]:
    """Seconds per cycle and peak bytes: use after use, over several cycles, with no thought of what repeats."""
    window_bytes = instance.budget_bytes - instance.resident_bytes
    streamed = sum(index not in instance.residents for index in instance.order)
    spans: list[tuple[float, float, int]] = []  # from when to when so many bytes are taken
    ends = []
    reader_free = compute_free = 0.0
    for _ in range(cycles):
        for index, use_s in zip(instance.order, instance.compute_s, strict=True):
            if index in instance.residents:
                compute_free += use_s
                continue
            group = instance.groups[index]
            recent = spans[-streamed:]  # those of a cycle ago are over before the same use is read again
            for begin in sorted([reader_free, *(end for _, end, _ in recent if end > reader_free)]):
                held = [taken for _, end, taken in recent if end > begin]
                if sum(held) + group.need_bytes <= window_bytes and len(held) < streamed:
                    break
            read_s = instance.costs.read_s(group)
            share = group.need_bytes / group.size_bytes
            head_read = begin + read_s * share
            started = max(compute_free, head_read)
            if share < 1:
                reader_free = started + read_s * (1 - share)
                compute_free = max(started + use_s, reader_free + use_s * share)
            else:
                reader_free, compute_free = head_read, started + use_s
            spans.append((begin, compute_free, group.need_bytes))
        ends.append(compute_free)
    peak_bytes = max((sum(taken for begin, end, taken in spans if begin <= at < end) for at, _, _ in spans), default=0)
    half = cycles // 2
    return (ends[-1] - ends[-1 - half]) / half, peak_bytes + instance.resident_bytes
