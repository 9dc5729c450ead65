from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import schedule as benchmark
from pylomin.residency import schedule as module
from pylomin.residency.schedule import Schedule, choose_residents, smallest_budget
from pylomin.residency.simulation import Costs, Group, StreamedCycle, lower_bound, simulate
from tests.residency.instances import Instance, instances, step_by_step


def plan(given_: Instance, budget_bytes: int | None = None) -> Schedule:
    found = choose_residents(
        given_.order,
        given_.groups,
        given_.budget_bytes if budget_bytes is None else budget_bytes,
        compute_s=given_.compute_s,
        costs=given_.costs,
    )
    assert found is not None
    return found


def best_s(given_: Instance) -> float:
    """Of all choices of residents, by exhaustive search."""
    best = float("inf")
    for residents in given_.choices():
        window_bytes = given_.budget_bytes - sum(given_.groups[index].size_bytes for index in residents)
        arguments = (given_.order, given_.groups, residents)
        if lower_bound(*arguments, given_.compute_s, given_.costs) < best:
            best = min(best, StreamedCycle(*arguments, window_bytes, given_.compute_s, given_.costs).run())
    return best


@settings(deadline=None)
@given(instances(max_groups=8))
def test_close_to_the_best_of_all_choices(given_: Instance) -> None:
    found = plan(given_)
    assert found.elapsed_s is not None
    assert found.elapsed_s <= 1.05 * best_s(given_)


def test_the_search_of_larger_instances_is_close_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """On small ones, where the best is known."""
    monkeypatch.setattr(module, "FEW_GROUPS", 0)
    ratios = benchmark.distances(random.Random(0), 150, 1, 8, benchmark.best_s)["costs_known"]
    assert ratios["mean"] < 1.02
    assert ratios["90%"] < 1.05


@settings(deadline=None, max_examples=50)
@given(instances(max_groups=8))
def test_the_time_and_the_memory_are_those_of_a_step_by_step_account(given_: Instance) -> None:
    found = plan(given_)
    followed = Instance(
        given_.order, given_.groups, given_.budget_bytes, given_.compute_s, given_.costs, found.residents
    )
    elapsed_s, peak_bytes = step_by_step(followed)
    assert found.elapsed_s == pytest.approx(elapsed_s, rel=1e-3)
    assert peak_bytes <= given_.budget_bytes


@pytest.mark.parametrize("few_groups", [0, module.FEW_GROUPS])
@settings(deadline=None, max_examples=50)
@given(given_=instances(max_groups=14), data=st.data())
def test_a_larger_budget_is_never_slower(few_groups: int, given_: Instance, data: st.DataObject) -> None:
    total_bytes = sum(group.size_bytes for group in given_.groups)
    smallest = smallest_budget(given_.order, given_.groups)
    budgets = data.draw(st.lists(st.integers(smallest, max(smallest, total_bytes)), min_size=2, max_size=6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FEW_GROUPS", few_groups)
        times = [plan(given_, budget_bytes).elapsed_s or 0.0 for budget_bytes in sorted(budgets)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(times))


@pytest.mark.parametrize("searched", [0, module.SEARCHED_USES])
@pytest.mark.parametrize("known", [False, True])
@settings(deadline=None, max_examples=40)
@given(given_=instances(max_groups=24))
def test_the_budget_is_kept_and_used(searched: int, known: bool, given_: Instance) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SEARCHED_USES", searched)
        costs = {"compute_s": given_.compute_s, "costs": given_.costs} if known else {}
        found = choose_residents(given_.order, given_.groups, given_.budget_bytes, **costs)  # type: ignore[arg-type]
    assert found is not None
    resident_bytes = sum(given_.groups[index].size_bytes for index in found.residents)
    assert resident_bytes + found.window_bytes == given_.budget_bytes
    assert found.window_bytes >= smallest_budget(set(given_.order) - found.residents, given_.groups)
    assert found.residents <= set(given_.order)
    simulated = simulate(
        given_.order, given_.groups, found.residents, found.window_bytes, given_.compute_s, given_.costs
    )
    assert simulated.peak_bytes <= given_.budget_bytes


@given(instances(max_groups=8))
def test_less_than_the_smallest_budget(given_: Instance) -> None:
    smallest = smallest_budget(given_.order, given_.groups)
    assert choose_residents(given_.order, given_.groups, smallest - 1) is None
    assert choose_residents(given_.order, given_.groups, smallest) is not None


def test_smallest_budget() -> None:
    groups = [Group(5), Group(100, streamed_bytes=7), Group(50)]
    assert smallest_budget([0, 1], groups) == 7
    assert smallest_budget([0, 1, 2], groups) == 50
    assert smallest_budget([], groups) == 0


def test_everything_fits() -> None:
    assert choose_residents([0, 1, 0], [Group(5), Group(6), Group(70)], 12) == Schedule(frozenset({0, 1}), 1)
    assert choose_residents([], [Group(5)], 12) == Schedule(frozenset(), 12)


@pytest.mark.parametrize("searched", [0, module.SEARCHED_USES])
@pytest.mark.parametrize("residents", [4, 8, 12, 16, 24])
def test_equal_layers_are_spread_evenly(monkeypatch: pytest.MonkeyPatch, searched: int, residents: int) -> None:
    monkeypatch.setattr(module, "SEARCHED_USES", searched)
    layer_bytes = 32 << 20
    found = choose_residents(range(32), [Group(layer_bytes)] * 32, (residents + 2) * layer_bytes)
    assert found is not None
    # One more where most are resident: then there is always one to read behind, and a window for one is enough.
    assert len(found.residents) in (residents, residents + 1)
    assert len(found.residents) * layer_bytes + found.window_bytes == (residents + 2) * layer_bytes
    at = sorted(found.residents)
    gaps = [after - before for before, after in itertools.pairwise([*at, at[0] + 32])]
    assert max(gaps) - min(gaps) <= 1


def test_what_is_used_often_and_what_is_small_stays() -> None:
    sizes = [64 << 20, 64 << 20, 64 << 20, 4096, 4096, 4096]
    groups = [Group(size) for size in sizes]
    found = choose_residents([0, 3, 1, 4, 0, 2, 5, 0], groups, 3 * (64 << 20) + 20_000)
    assert found is not None
    assert {0, 3, 4, 5} <= found.residents


def test_one_giant_does_not_make_the_window_large() -> None:
    """A large embedding of which all is used stays where the window for it would crowd out all the others."""
    megabyte = 1 << 20
    groups = [Group(1000 * megabyte), *[Group(10 * megabyte)] * 40]
    for searched in (0, module.SEARCHED_USES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "SEARCHED_USES", searched)
            found = choose_residents(range(41), groups, 1060 * megabyte)
        assert found is not None
        assert 0 in found.residents
        assert len(found.residents) >= 4


def test_depth_gives_way_to_residents_where_reading_is_the_limit() -> None:
    """A deeper window would only hold what has to be read again."""
    groups = [Group(10)] * 20
    found = choose_residents(range(20), groups, 100, compute_s=[1.0] * 20, costs=Costs(5.0))
    assert found is not None
    assert len(found.residents) == 8
    assert found.elapsed_s == pytest.approx(24.0)


def test_layers_that_compute_long_stream() -> None:
    """The reads of the others could not be hidden."""
    groups = [Group(10)] * 8
    compute_s = [11.0] * 4 + [0.1] * 4
    found = choose_residents(range(8), groups, 60, compute_s=compute_s, costs=Costs(1.0))
    assert found is not None
    assert found.elapsed_s == pytest.approx(sum(compute_s))


def test_the_work_of_a_large_plan_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: the uses that are simulated, and the groups that are looked at."""
    simulated = looked_at = 0
    run, spread = StreamedCycle.run, module._Weighed.spread

    def counted_run(cycle: StreamedCycle) -> float:
        nonlocal simulated
        elapsed_s = run(cycle)
        simulated += cycle.steps
        return elapsed_s

    def counted_spread(weighed: module._Weighed, indices: list[int], share: float) -> list[int]:
        nonlocal looked_at
        looked_at += len(indices)
        return spread(weighed, indices, share)

    monkeypatch.setattr(StreamedCycle, "run", counted_run)
    monkeypatch.setattr(module._Weighed, "spread", counted_spread)
    for count in (100, 1000, 10_000):
        sizes = [(1 + index * 7919 % 97) << 18 for index in range(count)]
        for share in (0.1, 0.5, 0.9):
            simulated = looked_at = 0
            choose_residents(range(count), [Group(size) for size in sizes], int(sum(sizes) * share))
            assert simulated <= module.SEARCH_STEPS + 65 * count
            assert looked_at <= module.SEARCH_STEPS + 20 * count
            if count > module.SEARCHED_USES:
                assert simulated == 0
