"""What stays in memory, and what is read next: by a plan where uses repeat, by prediction where they do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Protocol, TypeVar

from pylomin.residency.cycle import Cycle
from pylomin.residency.eviction import evict
from pylomin.residency.lane import Lanes
from pylomin.residency.recording import Measured
from pylomin.residency.replay import Replay
from pylomin.residency.schedule import Schedule, choose_residents
from pylomin.residency.simulation import Group
from pylomin.residency.trace import Key, Trace

LOOKAHEAD = 8  # uses, small groups included, among which the ones to read ahead are looked for
HORIZON = 64  # uses, among which the next one of what may be evicted is looked for


class InMemory(Protocol):
    """What was loaded together."""

    members: Key
    last_use: int
    nbytes: int

    def __hash__(self) -> int: ...


InMemoryT = TypeVar("InMemoryT", bound=InMemory)


class Retention:
    """Follows the uses of one model's groups, and decides. Called under the lock of the residency.

    Without a budget nothing stays, and there is nothing to plan. With one, a complete cycle of uses is planned for,
    until another one comes. Before the first, and for what is not in the plan, the next uses are predicted from the
    last ones.
    """

    def __init__(self) -> None:
        self.lanes = Lanes()
        self.trace = Trace(self.lanes)
        self.order: tuple[Key, ...] = ()  # of the last cycle that was planned for
        self.schedule: Schedule | None = None
        self._residents: frozenset[int] = frozenset()  # indices of weights
        self._replay: Replay | None = None
        self._measured: Measured | None = None
        self._has_budget = False
        self._plan: object = None  # a new one for each plan

    # -- uses -------------------------------------------------------------------------------------------------------

    def used(self, key: Key) -> Sequence[Key] | None:
        """``key`` is used now, by this thread. Returns the order to plan for, when it has become known or changed."""
        replay, lane = self._replay, self.lanes.here
        cycle = lane.cycle if lane.cycle_of is self._plan else None
        if replay is not None:
            if not replay.follow(key):
                last_two = replay.last_two()
                replay.seek(key)
                if last_two is not None:
                    self.trace.resume(*last_two)
            elif cycle is None:
                return None
        self.trace.record(key)
        if not self._has_budget:
            return None
        if cycle is None:
            cycle = lane.cycle = Cycle(self.order)
            lane.cycle_of = self._plan
        order: Sequence[Key] | None = cycle.record(key)
        if order is not None:
            lane.cycle = None
        return order if order != self.order else None

    def plan(
        self, order: Sequence[Key], groups: Mapping[Key, Group], budget_bytes: int | None, *, reads_ahead: bool
    ) -> None:
        """Decide what stays, for uses that repeat in this order; the first after that is expected next."""
        self.order, self._has_budget = tuple(order), budget_bytes is not None
        self.schedule, self._replay, self._residents = None, None, frozenset()
        self._plan = object()  # what was observed of another order no longer counts
        if not order or budget_bytes is None:
            return
        numbers = {key: number for number, key in enumerate(groups)}
        measured = self.measured
        compute_s = measured.compute_s if measured is not None else None
        if not reads_ahead:  # computing hides no reading: the least reading is best, whatever the window
            compute_s = [0.0] * len(order)
        costs = measured.costs if measured is not None else None
        sizes, uses = list(groups.values()), [numbers[key] for key in order]
        if reads_ahead:
            uses, compute_s = _merged(uses, compute_s, sizes)
        schedule = choose_residents(uses, sizes, budget_bytes, compute_s=compute_s, costs=costs)
        if schedule is None:
            return
        resident = {key for key, number in numbers.items() if number in schedule.residents}
        self.schedule = schedule
        self._residents = frozenset(index for key in resident for index in key)
        self._replay = Replay(self.order, resident, self.lanes)

    @property
    def measured(self) -> Measured | None:
        """What one cycle of the planned order takes, if that was measured."""
        measured = self._measured
        return measured if measured is not None and measured.order == self.order else None

    def learn(self, order: Sequence[Key], measured: Measured | None) -> None:
        """Uses will come in this order, and take what was measured."""
        self._measured = measured
        for key in (*order, *order[:2]):
            self.trace.record(key)

    def resume(self, key: Key) -> None:
        """This thread uses ``key`` now, in a plan that has just been made."""
        if self._replay is not None:
            self._replay.seek(key)

    # -- decisions --------------------------------------------------------------------------------------------------

    def stays(self, members: Key) -> bool:
        """Whether what was loaded is resident by the plan."""
        return self._residents.issuperset(members)

    @property
    def streams(self) -> bool:
        """Whether the plan leaves something out of memory."""
        return self._replay is not None and self._replay.streams

    def now(self) -> Key:
        """The group that was used last; none where there is no plan, or it was not followed yet."""
        return () if self._replay is None else self._replay.last()

    def ahead(self) -> Iterator[Key]:
        """Groups that may have to be read next, nearest first."""
        return self.trace.upcoming(LOOKAHEAD) if self._replay is None else self._replay.streamed_ahead()

    def place(self) -> tuple[Replay, int] | None:
        """What :meth:`ahead` depends on: the plan, and how far it was followed; None where there is no plan."""
        return None if self._replay is None else (self._replay, self._replay.next_streamed())

    def victim(self, idle: Sequence[InMemoryT]) -> InMemoryT:
        """What to give up first for something that is needed now.

        By a plan that is what streams, the last that was read first; where there is none, what is predicted to be used
        last.
        """
        if self.schedule is not None:
            return max(reversed(idle), key=lambda loaded: (not self.stays(loaded.members), loaded.last_use))
        chosen = evict(*self._predicted(idle), needed_bytes=1)
        return idle[-1] if chosen is None else chosen[0]

    def later(self, loaded: InMemoryT, others: Sequence[InMemoryT], needed_bytes: int) -> list[InMemoryT]:
        """Those of ``others`` to give up so that ``loaded`` may stay: all used later than it is; none if too few."""
        sizes, next_use = self._predicted([loaded, *others])
        if loaded not in next_use:
            return []
        del sizes[loaded]
        return evict(sizes, next_use, needed_bytes, used_at=next_use[loaded]) or []

    def _predicted(self, idle: Sequence[InMemoryT]) -> tuple[dict[InMemoryT, int], dict[InMemoryT, int]]:
        """Sizes, in order of last use, and how many uses away the next one of each is, as far as that is predicted."""
        by_weight: dict[int, int] = {}
        for distance, key in enumerate(self.trace.upcoming(HORIZON)):
            for index in key:
                by_weight.setdefault(index, distance)
        next_use = {
            loaded: min(distances)
            for loaded in idle
            if (distances := [by_weight[index] for index in loaded.members if index in by_weight])
        }
        return {loaded: loaded.nbytes for loaded in sorted(idle, key=lambda loaded: loaded.last_use)}, next_use


def _merged(
    uses: Sequence[int], compute_s: Sequence[float] | None, groups: Sequence[Group]
) -> tuple[list[int], list[float] | None]:
    """Uses of one group that follow each other are one: it is not read again. Of what is used by tiles, it is."""
    runs = [list(run) for _, run in groupby(range(len(uses)), key=lambda at: uses[at])]
    if len(runs) > 1 and uses[0] == uses[-1]:  # round the end of the cycle
        runs[0] = [*runs.pop(), *runs[0]]
    merged: list[list[int]] = []
    for run in runs:
        is_tiled = groups[uses[run[0]]].streamed_bytes is not None
        merged += [[at] for at in run] if is_tiled else [run]
    times_s = None if compute_s is None else [sum(compute_s[at] for at in run) for run in merged]
    return [uses[run[0]] for run in merged], times_s
