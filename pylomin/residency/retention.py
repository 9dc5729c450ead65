"""What stays in memory, and what is read next: by a plan where uses repeat, by prediction where they do not."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from pylomin.residency.cycle import Cycle
from pylomin.residency.replay import Replay
from pylomin.residency.schedule import Schedule, choose_residents
from pylomin.residency.simulation import Group
from pylomin.residency.trace import Key, Trace

LOOKAHEAD = 8  # uses, small groups included, among which the ones to read ahead are looked for
HORIZON = 64  # uses, among which the next one of what may be evicted is looked for


class InMemory(Protocol):
    """What was loaded together."""

    members: Key
    kept: bool
    last_use: int
    nbytes: int


InMemoryT = TypeVar("InMemoryT", bound=InMemory)


class Retention:
    """Follows the uses of one model's groups, and decides. Called under the lock of the residency.

    Without a budget nothing stays, and there is nothing to plan. With one, a complete cycle of uses is planned for,
    until another one comes. Before the first, and for what is not in the plan, the next uses are predicted from the
    last ones.
    """

    def __init__(self) -> None:
        self.trace = Trace()
        self.order: tuple[Key, ...] = ()  # of the last cycle that was planned for
        self.schedule: Schedule | None = None
        self._residents: frozenset[int] = frozenset()  # indices of weights
        self._replay: Replay | None = None
        self._has_budget = False
        self._cycles = threading.local()

    # -- uses -------------------------------------------------------------------------------------------------------

    def used(self, key: Key) -> Sequence[Key] | None:
        """``key`` is used now, by this thread. Returns the order to plan for, when it has become known or changed."""
        replay, cycle = self._replay, getattr(self._cycles, "of_thread", None)
        if replay is not None:
            last_two = replay.last_two()
            if not replay.follow(key):
                replay.seek(key)
                if last_two is not None:
                    self.trace.resume(*last_two)
            elif cycle is None:
                return None
        self.trace.record(key)
        if not self._has_budget:
            return None
        if cycle is None:
            cycle = self._cycles.of_thread = Cycle(self.order)
        order: Sequence[Key] | None = cycle.record(key)
        if order is not None:
            self._cycles.of_thread = None
        return order if order != self.order else None

    def plan(
        self, order: Sequence[Key], groups: Mapping[Key, Group], budget_bytes: int | None, *, reads_ahead: bool
    ) -> None:
        """Decide what stays, for uses that repeat in this order; the first after that is expected next."""
        self.order, self._has_budget = tuple(order), budget_bytes is not None
        self.schedule, self._replay, self._residents = None, None, frozenset()
        if not order or budget_bytes is None:
            return
        numbers = {key: number for number, key in enumerate(groups)}
        schedule = choose_residents([numbers[key] for key in order], list(groups.values()), budget_bytes)
        if schedule is None:
            return
        resident = {key for key, number in numbers.items() if number in schedule.residents}
        self.schedule = schedule
        self._residents = frozenset(index for key in resident for index in key)
        self._replay = Replay(self.order, resident)

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

    def ahead(self) -> Iterator[Key]:
        """Groups that may have to be read next, nearest first."""
        return self.trace.upcoming(LOOKAHEAD) if self._replay is None else self._replay.streamed_ahead()

    def victim(self, idle: Sequence[InMemoryT]) -> InMemoryT:
        """What to give up first for something that is needed now (Belady 1966, with predicted uses).

        By a plan that is what streams. Of what is not predicted to be used, the last used: where uses repeat in some
        order, that comes last again.
        """
        if self.schedule is not None:
            return max(reversed(idle), key=lambda loaded: (not self.stays(loaded.members), loaded.last_use))
        next_use = self._next_uses()
        return max(reversed(idle), key=lambda loaded: (_next_use(loaded, next_use), loaded.last_use))

    def later(self, loaded: InMemoryT, others: Iterable[InMemoryT], needed_bytes: int) -> list[InMemoryT]:
        """Those of ``others`` to give up so that ``loaded`` may stay: all used later than it is; none if too few.

        The rule of Cao, Felten, Karlin and Li (1995): never evict what is needed sooner than what is loaded.
        """
        next_use = self._next_uses()
        own = _next_use(loaded, next_use)
        chosen: list[InMemoryT] = []
        for other in sorted(others, key=lambda other: _next_use(other, next_use), reverse=True):
            if needed_bytes <= 0 or _next_use(other, next_use) <= own:
                break
            chosen.append(other)
            needed_bytes -= other.nbytes
        return chosen if needed_bytes <= 0 else []

    def _next_uses(self) -> dict[int, int]:
        """How many uses away the next one of each weight is, as far as that is predicted."""
        next_use: dict[int, int] = {}
        for distance, key in enumerate(self.trace.upcoming(HORIZON)):
            for index in key:
                next_use.setdefault(index, distance)
        return next_use


def _next_use(loaded: InMemory, next_use: Mapping[int, int]) -> int:
    return min([next_use.get(index, HORIZON) for index in loaded.members], default=HORIZON)
