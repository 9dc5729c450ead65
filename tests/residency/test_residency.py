from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pylomin.errors import BudgetError, StoreReadError
from pylomin.residency import contents
from pylomin.residency.prefetcher import Prefetcher
from pylomin.residency.reading import Reading
from pylomin.residency.residency import Residency
from pylomin.residency.stats import Stats
from pylomin.residency.weight import State, Weight
from pylomin.store.memory import MemoryStore

from .common import CountingStore, groups, layout, value, weight_of

NUMEL = 1024  # 4 KiB, which is what the ledger counts for it, too
NBYTES = 4 * NUMEL


def use(residency: Residency, group: list[Weight]) -> float:
    with residency.hold(group):
        return float(value(group[0])[0])


def until_loaded(all_groups: list[list[Weight]]) -> None:
    """Wait for the background."""
    pause = threading.Event()
    for _ in range(6000):
        if not any(weight.state is State.LOADING for group in all_groups for weight in group):
            return
        pause.wait(0.005)
    raise AssertionError("a background read did not end")


# -- states -----------------------------------------------------------------------------------------------------------


def test_offloaded_resident_offloaded() -> None:
    residency, ((weight,), *_), _ = groups(1, NUMEL)
    assert (weight.state, weight.tensor, weight.holds) == (State.OFFLOADED, None, 0)
    with residency.hold([weight]):
        assert (weight.state, weight.holds) == (State.RESIDENT, 1)
        assert torch.equal(value(weight), torch.zeros(NUMEL))
        assert residency.pool.in_use_bytes() == NBYTES
    assert (weight.state, weight.tensor, weight.holds) == (State.OFFLOADED, None, 0)
    assert residency.pool.in_use_bytes() == 0


def test_loading_while_it_is_read() -> None:
    residency, (group,), store = groups(1, NUMEL)
    states: list[State] = []
    store.before_read = lambda: states.append(group[0].state)
    use(residency, group)
    assert states == [State.LOADING]


def test_the_resident_tensor_is_an_ordinary_parameter() -> None:
    residency, ((weight,),), _ = groups(1, NUMEL)
    with residency.hold([weight]):
        assert isinstance(weight.tensor, torch.nn.Parameter)
        assert not weight.tensor.requires_grad
        assert not weight.tensor.is_inference()


def test_a_hold_inside_a_hold() -> None:
    residency, (group,), store = groups(1, NUMEL)
    with residency.hold(group):
        first = group[0].tensor
        with residency.hold(group):
            assert group[0].tensor is first
            assert group[0].holds == 2
        assert group[0].tensor is first
        assert group[0].holds == 1
    assert group[0].tensor is None
    assert len(store.reads) == 1


def test_only_what_is_missing_is_read() -> None:
    residency, (first, second, third), store = groups(3, NUMEL)
    with residency.hold(first), residency.hold([*first, *second, *third]):
        assert [float(value(w)[0]) for w in (*first, *second, *third)] == [0.0, 1.0, 2.0]
    assert [[name for name, _, _ in read] for read in store.reads] == [["0"], ["1", "2"]]
    assert residency.pool.in_use_bytes() == 0


def test_groups_that_overlap_leave_when_nobody_holds_their_buffer() -> None:
    residency, (a, b, c), _ = groups(3, NUMEL)
    outer = residency.hold([*a, *b])
    outer.__enter__()
    with residency.hold([*b, *c]):
        outer.__exit__()
        assert b[0].state is State.RESIDENT
        assert a[0].holds == 0
    assert [w.state for w in (*a, *b, *c)] == [State.OFFLOADED] * 3
    assert residency.pool.in_use_bytes() == 0


def test_a_hold_on_nothing() -> None:
    residency, _, store = groups(1, NUMEL)
    with residency.hold([]):
        pass
    assert store.reads == []
    assert not residency._holders


def test_a_hold_that_is_dropped_lets_go() -> None:
    residency, (group,), _ = groups(1, NUMEL)
    hold = residency.hold(group)
    hold.__enter__()
    assert group[0].holds == 1
    del hold
    assert group[0].holds == 0
    assert residency.pool.in_use_bytes() == 0


def test_a_hold_never_entered() -> None:
    residency, (group,), store = groups(1, NUMEL)
    residency.hold(group)
    assert group[0].holds == 0
    assert store.reads == []


def test_exceptions_pass_through() -> None:
    residency, (group,), _ = groups(1, NUMEL)
    with pytest.raises(ArithmeticError), residency.hold(group):
        raise ArithmeticError
    assert group[0].holds == 0
    assert residency.pool.in_use_bytes() == 0


def test_a_released_tensor_stays_valid_as_long_as_somebody_has_it() -> None:
    residency, (first, second), _ = groups(2, NUMEL)
    with residency.hold(first):
        kept = value(first[0])
    assert residency.pool.in_use_bytes() == NBYTES
    use(residency, second)
    assert torch.equal(kept, torch.zeros(NUMEL))
    del kept
    assert residency.pool.in_use_bytes() == 0


def test_a_residency_knows_its_weights_only_as_long_as_others_do() -> None:
    residency, weights, _ = groups(2, NUMEL)
    reference = weakref.ref(weights[0][0])
    assert len(residency._weights) == 2
    del weights[0]
    assert reference() is None
    assert len(residency._weights) == 1
    gone = weakref.ref(residency)
    del residency, weights
    assert gone() is None


def test_weights_in_memory_cost_nothing() -> None:
    residency = Residency(memory_budget=1)
    tensor = torch.randn(1000)
    address = tensor.data_ptr()  # asking again would make the copy that is otherwise made before a write
    weight = weight_of(MemoryStore({"a": tensor}), "a", residency)
    with residency.hold([weight]):
        assert torch._C._data_address(value(weight)) == address
    assert residency.pool.peak_bytes == 0


# -- counters ---------------------------------------------------------------------------------------------------------


def test_counters() -> None:
    residency, (a, b), store = groups(2, NUMEL)
    use(residency, a)
    with residency.hold(a), residency.hold(a):
        pass
    use(residency, b)
    stats = residency.stats()
    assert (stats.loads, stats.hits) == (3, 1)
    assert stats.bytes_read == store.bytes_read == 3 * NBYTES
    assert stats.resident_bytes == 0
    assert stats.peak_bytes == NBYTES
    assert stats.memory_budget is None
    assert (stats.prefetched, stats.wasted) == (0, 0)
    assert stats.stall_s > 0


def test_counters_of_lookups() -> None:
    residency, (a,), store = groups(1, NUMEL)
    assert residency.load_runs(a[0], [(0, 2), (5, 6)]).tolist() == [0.0] * 3
    stats = residency.stats()
    assert (stats.loads, stats.bytes_read) == (1, 12)
    assert store.bytes_read == 12
    assert residency.pool.in_use_bytes() == 0


def test_a_failed_load_counts_nothing() -> None:
    residency, (a,), store = groups(1, NUMEL)

    def fail() -> None:
        raise StoreReadError("no")

    store.before_read = fail
    with pytest.raises(StoreReadError):
        use(residency, a)
    stats = residency.stats()
    assert (stats.loads, stats.hits, stats.bytes_read) == (0, 0, 0)


def test_stats_are_a_snapshot() -> None:
    residency, (a,), _ = groups(1, NUMEL)
    before = residency.stats()
    use(residency, a)
    assert before.loads == 0
    assert residency.stats().loads == 1


def test_stats_add_up() -> None:
    first = Stats(1, 2, 3, 4, 5, 0.5, 0.5, 6, 7, None, "buffered")
    second = Stats(10, 20, 30, 40, 50, 2.5, 0.25, 60, 70, 100, "direct")
    total = first + second
    assert total == Stats(11, 22, 33, 44, 55, 3.0, 0.75, 66, 77, 100, "buffered+direct")
    assert (second + second).memory_budget == 200
    assert (first + first).memory_budget is None


def test_prefetched_ends_as_a_hit_or_wasted() -> None:
    residency, all_groups, _ = groups(3, 100_000)
    residency.set_depth(1)
    for _ in range(4):
        for group in all_groups:
            use(residency, group)
    until_loaded(all_groups)
    residency.set_depth(0)
    stats = residency.stats()
    assert stats.prefetched > 0
    assert stats.prefetched == (4 * 3 - stats.loads) + stats.wasted
    assert stats.hits == 4 * 3 - stats.loads
    assert stats.bytes_read == (stats.loads + stats.prefetched) * 400_000


# -- budget -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "fit"), [(5, 1), (5, 2), (5, 3), (5, 4), (5, 5), (10, 7), (3, 10)])
def test_residents_hit_k_of_n_on_a_cyclic_order(count: int, fit: int) -> None:
    """All but one slot of the budget, through which the others stream; or everything, where that fits."""
    residency, all_groups, store = groups(count, NUMEL, memory_budget=fit * NBYTES)
    kept = fit - 1 if fit < count else count
    for round_ in range(4):
        before = residency.stats()
        store.reads.clear()
        for i, group in enumerate(all_groups):
            assert use(residency, group) == i
        after = residency.stats()
        hits = after.hits - before.hits
        assert hits == (kept if round_ else 0)
        assert store.bytes_read == (count - hits) * NBYTES
        assert residency.pool.peak_bytes <= fit * NBYTES


def test_a_budget_in_which_everything_fits_reads_once() -> None:
    residency, all_groups, store = groups(6, NUMEL, memory_budget=7 * NBYTES)
    for _ in range(3):
        for group in all_groups:
            use(residency, group)
    assert store.bytes_read == 6 * NBYTES
    assert residency.stats().resident_bytes == 6 * NBYTES


def test_a_budget_of_exactly_the_model_reads_almost_once() -> None:
    """Nothing needs to stream when all of it fits."""
    residency, all_groups, store = groups(6, NUMEL, memory_budget=6 * NBYTES)
    for _ in range(5):
        for group in all_groups:
            use(residency, group)
    assert store.bytes_read == 6 * NBYTES


def test_residents_make_way_for_a_larger_group() -> None:
    store = CountingStore(
        {**{str(i): torch.full((NUMEL,), float(i)) for i in range(4)}, "large": torch.ones(4 * NUMEL)}
    )
    residency = Residency(5 * NBYTES)
    small = [[weight_of(store, str(i), residency)] for i in range(4)]
    large = [weight_of(store, "large", residency)]
    for group in small:
        use(residency, group)
    assert residency.pool.in_use_bytes() == 4 * NBYTES
    assert use(residency, large) == 1.0
    assert residency.pool.peak_bytes <= 5 * NBYTES
    for _ in range(3):
        before = store.bytes_read
        for i, group in enumerate(small):
            assert use(residency, group) == i
        assert use(residency, large) == 1.0
    assert store.bytes_read - before == 4 * NBYTES, "the large one stays, and the small ones pass by it"
    assert residency.pool.peak_bytes <= 5 * NBYTES


def test_too_much_at_once() -> None:
    residency, (a, b, c), _ = groups(3, NUMEL, memory_budget=2 * NBYTES)
    with residency.hold(a), residency.hold(b):
        with pytest.raises(BudgetError, match=r"weight '2' needs 4\.0 KiB") as caught, residency.hold(c):
            pass
        assert f"at least {3 * NBYTES}" in str(caught.value)
        assert c[0].holds == 0
    assert use(residency, c) == 2.0


def test_a_tensor_that_outlives_its_use_counts() -> None:
    residency, (a, b), _ = groups(2, NUMEL, memory_budget=NBYTES)
    with residency.hold(a):
        kept = value(a[0])
    with pytest.raises(BudgetError, match="outlive their use"):
        use(residency, b)
    assert kept.shape == (NUMEL,)
    del kept
    gc.collect()
    assert use(residency, b) == 1.0


def test_waiting_for_memory_ends_when_another_thread_lets_go() -> None:
    residency, (a, b), _ = groups(2, NUMEL, memory_budget=NBYTES)
    got: list[float] = []
    thread = threading.Thread(target=lambda: got.append(use(residency, b)), daemon=True)
    with residency.hold(a):
        thread.start()
        thread.join(0.2)
        assert got == []
    thread.join(30)
    assert got == [1.0]


def test_who_waited_in_vain_does_not_count_as_waiting_later() -> None:
    """After a lookup that found no room, the same thread works on, and others wait for it as for any thread."""
    residency, (a, b), _ = groups(2, NUMEL, memory_budget=NBYTES)
    with residency.hold(a), pytest.raises(BudgetError):
        residency.load_runs(b[0], [(0, NUMEL)])
    outcomes: list[object] = []

    def want() -> None:
        try:
            outcomes.append(use(residency, b))
        except BudgetError as error:
            outcomes.append(error)

    thread = threading.Thread(target=want, daemon=True)
    with residency.hold(a):
        thread.start()
        thread.join(0.5)
        assert outcomes == []
    thread.join(30)
    assert outcomes == [1.0]


def test_waiting_for_memory_ends_when_another_thread_brought_the_weight() -> None:
    """Two threads want the same weight and there is room for one: whoever is second uses the first one's."""
    residency, (a, b), store = groups(2, NUMEL, memory_budget=NBYTES)
    outcomes: list[object] = []

    def want() -> None:
        try:
            outcomes.append(use(residency, b))
        except BudgetError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=want, daemon=True) for _ in range(3)]
    with residency.hold(a):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(0.1)
    for thread in threads:
        thread.join(30)
    assert outcomes == [1.0, 1.0, 1.0]
    assert store.bytes_read <= 4 * NBYTES


def test_waiting_for_memory_ends_when_nobody_can_let_go() -> None:
    """Two threads each hold what the other waits for."""
    residency, (a, b, c, d), _ = groups(4, NUMEL, memory_budget=2 * NBYTES)
    both = threading.Barrier(2)
    outcomes: list[object] = []

    def work(mine: list[Weight], other: list[Weight]) -> None:
        try:
            with residency.hold(mine):
                both.wait(30)
                with residency.hold(other):
                    outcomes.append("done")
        except BudgetError as error:
            outcomes.append(error.__class__)

    threads = [threading.Thread(target=work, args=arguments, daemon=True) for arguments in ((a, c), (b, d))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert Counter(map(str, outcomes))[str(BudgetError)] in (1, 2)
    assert residency.pool.in_use_bytes() <= 2 * NBYTES


def test_the_budget_shrinks_and_grows() -> None:
    residency, all_groups, _ = groups(6, NUMEL, memory_budget=7 * NBYTES)

    def hits() -> int:
        before = residency.stats().hits
        for i, group in enumerate(all_groups):
            assert use(residency, group) == i
        return residency.stats().hits - before

    assert [hits(), hits()] == [0, 6]
    residency.set_budget(3 * NBYTES)
    assert residency.pool.in_use_bytes() <= 3 * NBYTES
    assert residency.pool.live_bytes + residency.pool.free_bytes <= 3 * NBYTES
    hits()
    assert hits() == 2
    residency.set_budget(7 * NBYTES)
    hits()
    assert hits() == 6
    residency.set_budget(None)
    assert residency.stats().memory_budget is None
    hits()
    residency.set_budget(NBYTES)
    assert residency.pool.in_use_bytes() <= NBYTES
    hits()
    assert hits() == 0


def test_the_budget_goes_away() -> None:
    """Without one, weights leave as soon as they were used; also those that were kept before."""
    residency, all_groups, _ = groups(3, NUMEL, memory_budget=4 * NBYTES)
    for group in all_groups:
        use(residency, group)
    assert residency.pool.in_use_bytes() == 3 * NBYTES
    residency.set_budget(None)
    for group in all_groups:
        use(residency, group)
    assert residency.pool.in_use_bytes() == 0


def test_the_budget_shrinks_while_much_is_held() -> None:
    """What is held stays until it is released; then the new budget holds."""
    residency, all_groups, _ = groups(5, 32 * NUMEL, memory_budget=10 * 32 * NBYTES)
    with residency.hold([weight for group in all_groups for weight in group]):
        residency.set_budget(32 * NBYTES)
    assert residency.pool.in_use_bytes() <= 32 * NBYTES
    for i, group in enumerate(all_groups):
        assert use(residency, group) == i
        assert residency.pool.live_bytes + residency.pool.free_bytes <= 32 * NBYTES


def test_the_budget_shrinks_while_separate_groups_are_held() -> None:
    residency, all_groups, _ = groups(4, 32 * NUMEL, memory_budget=10 * 32 * NBYTES)
    holds = [residency.hold(group) for group in all_groups]
    for hold in holds:
        hold.__enter__()
    residency.set_budget(32 * NBYTES)
    for hold in holds:
        hold.__exit__()
    for i, group in enumerate(all_groups):
        assert use(residency, group) == i


# -- writes -----------------------------------------------------------------------------------------------------------


def test_a_write_replaces_the_value() -> None:
    residency, ((weight,),), store = groups(1, NUMEL)
    original = residency.load_private(weight)
    residency.write(weight, torch.full((NUMEL,), 5.0))
    assert use(residency, [weight]) == 5.0
    residency.write(weight, torch.full((NUMEL,), 6.0))
    assert use(residency, [weight]) == 6.0
    assert torch.equal(original, torch.zeros(NUMEL))
    assert torch.equal(store._tensors.tensor("0"), torch.zeros(NUMEL)), "the store is not touched"


def test_a_write_while_held_shows_at_once() -> None:
    residency, ((weight,),), _ = groups(1, NUMEL)
    with residency.hold([weight]):
        residency.write(weight, torch.full((NUMEL,), 5.0))
        assert float(value(weight)[0]) == 5.0
    assert use(residency, [weight]) == 5.0
    assert weight.writes == 1


@pytest.mark.parametrize("budget", [None, 10 * NBYTES])
def test_a_write_into_the_resident_tensor_is_kept(budget: int | None) -> None:
    residency, ((weight,),), _ = groups(1, NUMEL, memory_budget=budget)
    with residency.hold([weight]), torch.no_grad():
        assert weight.tensor is not None
        weight.tensor.add_(1)
        weight.tensor.data.mul_(3)
    assert use(residency, [weight]) == 3.0
    residency.set_budget(1)
    residency.set_budget(None)
    assert use(residency, [weight]) == 3.0


def test_a_write_to_a_kept_weight() -> None:
    residency, ((weight,),), _ = groups(1, NUMEL, memory_budget=10 * NBYTES)
    assert use(residency, [weight]) == 0.0
    assert weight.state is State.RESIDENT
    residency.write(weight, torch.full((NUMEL,), 5.0))
    assert use(residency, [weight]) == 5.0
    assert residency.pool.in_use_bytes() == NBYTES
    assert residency._kept_bytes == NBYTES


def test_a_write_to_one_of_a_group_that_is_held_elsewhere() -> None:
    """The weights of one buffer leave together; a write to an unheld one must not take a held one along."""
    residency, (a, b), _ = groups(2, NUMEL)
    both = residency.hold([*a, *b])
    both.__enter__()
    only_a = residency.hold(a)
    only_a.__enter__()
    both.__exit__()
    assert (a[0].holds, b[0].holds) == (1, 0)
    residency.write(b[0], torch.full((NUMEL,), 9.0))
    assert a[0].tensor is not None, "still held"
    assert float(value(a[0])[0]) == 0.0
    only_a.__exit__()
    assert use(residency, b) == 9.0
    assert use(residency, a) == 0.0
    assert residency.pool.in_use_bytes() == 0


def test_a_write_with_a_conversion_keeps_the_dtype() -> None:
    residency = Residency()
    store = CountingStore({"a": torch.ones(8, dtype=torch.bfloat16)})
    weight = weight_of(store, "a", residency, layout(torch.float32, 8))
    residency.write(weight, torch.full((8,), 1.0000001))
    with residency.hold([weight]):
        assert torch.equal(value(weight), torch.full((8,), 1.0000001))


def test_take_over() -> None:
    residency, ((weight,),), _ = groups(1, NUMEL)
    other = residency.take_over(weight, torch.arange(6).view(2, 3))
    assert other.layout == layout(torch.int64, 2, 3)
    with residency.hold([other]):
        assert value(other).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert use(residency, [weight]) == 0.0


def test_load_private_is_nobody_elses() -> None:
    residency, ((weight,),), _ = groups(1, NUMEL, memory_budget=10 * NBYTES)
    residency.load_private(weight).add_(1)
    assert use(residency, [weight]) == 0.0


def test_load_runs_within_a_budget() -> None:
    residency, all_groups, _ = groups(3, NUMEL, memory_budget=2 * NBYTES)
    for group in all_groups:
        use(residency, group)
    rows = residency.load_runs(all_groups[2][0], [(0, NUMEL)])
    assert rows[0] == 2.0
    with pytest.raises(BudgetError):
        residency.load_runs(all_groups[1][0], [(0, NUMEL), (0, NUMEL)])
    del rows
    assert residency.pool.in_use_bytes() <= 2 * NBYTES


# -- errors of background reads ---------------------------------------------------------------------------------------


def test_an_error_is_handed_over_once_for_the_whole_group() -> None:
    residency, (a, b), _ = groups(2, NUMEL)
    error = StoreReadError("in the background")
    for weight in (*a, *b):
        weight.error = error
    with pytest.raises(StoreReadError, match="in the background"):
        residency.hold([*a, *b]).__enter__()
    with residency.hold([*a, *b]):
        assert [weight.error for weight in (*a, *b)] == [None, None]


def test_an_error_is_handed_to_the_one_who_uses_the_weight() -> None:
    residency, (a, b), _ = groups(2, NUMEL)
    a[0].error = StoreReadError("in the background")
    assert use(residency, b) == 1.0
    with pytest.raises(StoreReadError, match="in the background"):
        use(residency, a)
    assert use(residency, a) == 0.0
    assert residency.pool.in_use_bytes() == 0


def test_a_write_clears_an_error() -> None:
    residency, (a,), _ = groups(1, NUMEL)
    a[0].error = StoreReadError("in the background")
    residency.write(a[0], torch.full((NUMEL,), 5.0))
    assert use(residency, a) == 5.0


# -- copies -----------------------------------------------------------------------------------------------------------


def test_a_copy_has_the_settings_and_a_ledger_of_its_own() -> None:
    residency, (a,), _ = groups(1, NUMEL, memory_budget=5 * NBYTES)
    residency.set_depth(2)
    use(residency, a)
    clone = residency.copy()
    assert (clone.memory_budget, clone.depth) == (5 * NBYTES, 2)
    assert clone.pool is not residency.pool
    assert clone.stats().loads == 0
    residency.set_depth(0)
    assert clone.depth == 2
    clone.set_depth(0)


# -- properties -------------------------------------------------------------------------------------------------------


class HoldMachine(RuleBasedStateMachine):
    """Holds in any order, writes, budgets and evictions, against a model that keeps plain numbers."""

    COUNT = 5

    @initialize(slots=st.one_of(st.none(), st.integers(COUNT, 2 * COUNT)))
    def start(self, slots: int | None) -> None:
        self.residency, all_groups, self.store = groups(self.COUNT, NUMEL, slots and slots * NBYTES)
        self.weights = [weight for group in all_groups for weight in group]
        self.values = [float(i) for i in range(self.COUNT)]
        self.holds: list[tuple[object, list[int]]] = []
        self.uses = 0

    @rule(chosen=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=4, unique=True))
    @precondition(lambda self: len(self.holds) < 6)
    def enter(self, chosen: list[int]) -> None:
        hold = self.residency.hold([self.weights[i] for i in chosen])
        try:
            hold.__enter__()
        except BudgetError:  # what was loaded together leaves together, so less may fit than is held
            assert self.residency.memory_budget is not None
            assert self.residency.pool.in_use_bytes() + NBYTES > self.residency.memory_budget - 3 * NBYTES
            return
        self.uses += 1
        self.holds.append((hold, chosen))

    @rule(index=st.integers(0, 10))
    @precondition(lambda self: self.holds)
    def leave(self, index: int) -> None:
        hold, _ = self.holds.pop(index % len(self.holds))
        hold.__exit__()  # type: ignore[attr-defined]

    @rule(i=st.integers(0, COUNT - 1), new=st.integers(0, 1000))
    def write(self, i: int, new: int) -> None:
        self.residency.write(self.weights[i], torch.full((NUMEL,), float(new)))
        self.values[i] = float(new)

    @rule(index=st.integers(0, 10), new=st.integers(0, 1000))
    @precondition(lambda self: self.holds)
    def write_in_place(self, index: int, new: int) -> None:
        _, chosen = self.holds[index % len(self.holds)]
        tensor = self.weights[chosen[0]].tensor
        assert tensor is not None
        with torch.no_grad():
            tensor.fill_(float(new))
        self.values[chosen[0]] = float(new)

    @rule(slots=st.one_of(st.none(), st.integers(COUNT, 2 * COUNT)))
    def set_budget(self, slots: int | None) -> None:
        self.residency.set_budget(slots and slots * NBYTES)

    @rule(i=st.integers(0, COUNT - 1), first=st.integers(0, NUMEL - 2))
    def look_up(self, i: int, first: int) -> None:
        weight = self.weights[i]
        if weight.tensor is None:  # as the operators do
            try:
                rows = self.residency.load_runs(weight, [(first, first + 2)])
            except BudgetError:
                assert self.residency.memory_budget is not None
                return
            assert rows.tolist() == [self.values[i]] * 2

    @rule()
    def drop_free_blocks(self) -> None:
        self.residency.pool.trim()

    @invariant()
    def holds_are_counted(self) -> None:
        expected = Counter(i for _, chosen in self.holds for i in chosen)
        assert [weight.holds for weight in self.weights] == [expected[i] for i in range(self.COUNT)]
        assert sum(self.residency._holders.values()) == len(self.holds)

    @invariant()
    def what_is_held_is_resident_and_right(self) -> None:
        for i, weight in enumerate(self.weights):
            assert weight.state is not State.LOADING
            assert (weight.state is State.RESIDENT) == (weight.tensor is not None)
            if weight.holds:
                assert weight.tensor is not None
            if weight.tensor is not None:
                assert float(weight.tensor.detach()[-1]) == self.values[i]

    @invariant()
    def the_ledger_is_right(self) -> None:
        in_use = self.residency.pool.in_use_bytes()
        resident = sum(weight.tensor is not None for weight in self.weights) * NBYTES
        assert in_use >= resident
        # What was loaded together leaves together, so a member that nobody holds may still be in memory.
        assert in_use <= self.COUNT * 2 * NBYTES
        if self.residency.memory_budget is None and not self.holds:
            kept = {weight.loaded for weight in self.weights if weight.loaded is not None}
            assert all(loaded.kept for loaded in kept)
            assert in_use == sum(loaded.nbytes for loaded in kept)
        stats = self.residency.stats()
        assert stats.loads + stats.hits >= self.uses

    def teardown(self) -> None:
        if not hasattr(self, "holds"):
            return
        while self.holds:
            self.leave(0)
        for i, weight in enumerate(self.weights):
            assert float(self.residency.load_private(weight)[0]) == self.values[i]
        self.residency.set_budget(1)
        assert self.residency.pool.in_use_bytes() == 0
        assert self.residency._kept_bytes == 0
        assert not self.residency._in_memory
        assert not self.residency._holders


TestHolds = HoldMachine.TestCase
TestHolds.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@settings(max_examples=40, deadline=None)
@given(
    order=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    slots=st.integers(1, 7),
    sizes=st.lists(st.integers(1, 3), min_size=5, max_size=5),
)
def test_any_order_in_any_budget(order: list[int], slots: int, sizes: list[int]) -> None:
    """Right values, exact counters, and never more than the budget."""
    store = CountingStore({str(i): torch.full((sizes[i] * NUMEL,), float(i)) for i in range(5)})
    budget = max(slots, max(sizes)) * NBYTES
    residency = Residency(budget)
    all_groups = [[weight_of(store, str(i), residency)] for i in range(5)]
    for i in order:
        assert use(residency, all_groups[i]) == i
        assert residency.pool.live_bytes + residency.pool.free_bytes <= budget
    stats = residency.stats()
    assert stats.loads + stats.hits == len(order)
    assert stats.loads == len(store.reads)
    assert stats.bytes_read == store.bytes_read
    assert stats.peak_bytes <= budget
    if sum(sizes) * NBYTES + max(sizes) * NBYTES <= budget:
        assert stats.loads == len(set(order))


@settings(max_examples=15, deadline=None)
@given(
    order=st.lists(st.integers(0, 4), min_size=3, max_size=12),
    slots=st.integers(1, 7),
    depth=st.integers(1, 3),
    rounds=st.integers(1, 3),
)
def test_prefetch_never_changes_a_result(order: list[int], slots: int, depth: int, rounds: int) -> None:
    numel = 70_000  # large enough to be read ahead
    residency, all_groups, store = groups(5, numel, slots * 282_624)
    residency.set_depth(depth)
    for i in order * rounds:
        assert use(residency, all_groups[i]) == i
    until_loaded(all_groups)
    residency.set_depth(0)
    stats = residency.stats()
    assert stats.loads + stats.hits == len(order) * rounds
    assert stats.bytes_read == store.bytes_read
    assert len(store.reads) == stats.loads + stats.prefetched
    assert stats.peak_bytes <= slots * 282_624
    assert residency._prefetcher is None


def test_a_tensor_that_gets_in_place_writes_after_its_hold_does_not_corrupt_others() -> None:
    """The write is lost, as documented nowhere; what matters is that no other weight sees it."""
    residency, (a, b), _ = groups(2, 32 * NUMEL)
    with residency.hold(a):
        stale = value(a[0])
    with residency.hold(b):
        stale.fill_(77)
        assert float(value(b[0])[0]) == 1.0
    assert use(residency, b) == 1.0


@pytest.mark.parametrize("turned_cached", [False, True])
def test_a_plan_is_made_anew_when_a_file_has_become_cached(
    monkeypatch: pytest.MonkeyPatch, turned_cached: bool
) -> None:
    """Reading ahead ends then, and with it the reason for a larger window."""
    cached = False
    monkeypatch.setattr(contents, "choose_reading", lambda *args, **kwargs: Reading("mapped", is_cached=cached))
    monkeypatch.setattr(contents, "REVIEW_S", 0.0)
    residency, all_groups, _ = groups(6, NUMEL, 3 * NBYTES)
    residency.set_depth(1)
    residency.set_reading_mode(None)
    for _ in range(4):
        for group in all_groups:
            use(residency, group)
    until_loaded(all_groups)
    assert residency.reads_ahead
    plans = []
    plan = residency._plan
    monkeypatch.setattr(residency, "_plan", lambda order: (plans.append(order), plan(order)))
    cached, residency._review_at = turned_cached, 0
    use(residency, all_groups[0])
    assert residency.reads_ahead != turned_cached
    assert bool(plans) == turned_cached


def streamed_by_plan(rounds: int = 4) -> tuple[Residency, list[list[Weight]], list[int]]:
    """Eight groups in the budget of four, read ahead by a plan; and which of them it streams."""
    residency, all_groups, _ = groups(8, 100_000, 4 * 401_408)  # in pages
    residency.set_depth(None)
    for _ in range(rounds):
        for group in all_groups:
            use(residency, group)
            until_loaded(all_groups)
    streamed = [i for i, group in enumerate(all_groups) if not residency.retention.stays((group[0].index,))]
    assert 0 < len(streamed) < 8
    return residency, all_groups, streamed


def test_uses_of_residents_look_for_nothing_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    residency, all_groups, streamed = streamed_by_plan()
    looks = []
    wanted = Prefetcher._wanted
    monkeypatch.setattr(Prefetcher, "_wanted", lambda *args: looks.append(args) or wanted(*args))
    before = residency.stats()
    for i, group in enumerate(all_groups):
        looks.clear()
        use(residency, group)
        until_loaded(all_groups)
        assert bool(looks) == (i in streamed)
    after = residency.stats()
    assert after.hits - before.hits == 8  # all the same, everything was there in time
    assert after.prefetched - before.prefetched == len(streamed)


def test_reading_ahead_goes_on_when_a_tensor_that_outlived_its_use_is_gone() -> None:
    residency, all_groups, streamed = streamed_by_plan()
    with residency.hold(all_groups[streamed[0]]):
        outlives = all_groups[streamed[0]][0].tensor
    until_loaded(all_groups)
    for round_ in range(3):
        loads = residency.stats().loads
        for group in all_groups:
            use(residency, group)
            until_loaded(all_groups)
        loads = residency.stats().loads - loads
        assert bool(loads) == (round_ == 0)
        outlives = None
    assert outlives is None
