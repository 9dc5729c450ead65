from __future__ import annotations

import pytest
from hypothesis import given, settings

from pylomin.residency.simulation import Costs, Group, Simulation, StreamedCycle, lower_bound, simulate
from tests.residency.instances import Instance, instances, step_by_step

SECOND = Costs(bandwidth_bytes_per_s=1.0)  # a byte takes a second


def equal_groups(count: int, size_bytes: int = 10) -> list[Group]:
    return [Group(size_bytes)] * count


def test_all_resident() -> None:
    assert simulate([0, 1, 0], equal_groups(2), {0, 1}, 0, [1, 2, 3], SECOND) == Simulation(6, 0, 0, 20)


def test_nothing_is_used() -> None:
    assert simulate([], [], set(), 0, [], SECOND) == Simulation(0, 0, 0, 0)


def test_a_window_for_one_reads_and_computes_in_turn() -> None:
    assert simulate([0, 1], equal_groups(2), set(), 10, [3, 3], SECOND) == Simulation(26, 20, 20, 10)


def test_a_window_for_two_overlaps() -> None:
    assert simulate([0, 1, 2], equal_groups(3), set(), 20, [3, 3, 3], SECOND) == Simulation(30, 21, 30, 20)
    assert simulate([0, 1, 2], equal_groups(3), set(), 20, [13, 13, 13], SECOND) == Simulation(39, 0, 30, 20)


def test_residents_hide_reads_wherever_they_are_in_the_cycle() -> None:
    for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1]):
        found = simulate(order, equal_groups(3), {0, 1}, 10, [4, 4, 4], SECOND)
        assert found == Simulation(14, 2, 10, 30)


def test_latency_counts_for_each_read() -> None:
    found = simulate([0, 1, 2], equal_groups(3), set(), 20, [0, 0, 0], Costs(1.0, latency_s=5))
    assert found.elapsed_s == pytest.approx(45)


def test_a_tiled_group_is_read_while_it_computes() -> None:
    """A quarter before, and a quarter of the computation after the last byte."""
    group = Group(40, streamed_bytes=10)
    assert simulate([0], [group], set(), 10, [8], SECOND).elapsed_s == pytest.approx(42)
    assert simulate([0], [group], set(), 10, [80], SECOND).elapsed_s == pytest.approx(90)
    assert simulate([0], [group], set(), 10, [8], SECOND).peak_bytes == 10


def test_streamed_bytes_are_never_more_than_all() -> None:
    assert Group(10, streamed_bytes=20).need_bytes == 10
    assert Group(10).need_bytes == 10
    assert Group(10, streamed_bytes=3).need_bytes == 3
    assert Costs(1.0, 1.0).read_s(Group(10, streamed_bytes=3)) == 14  # four tiles
    assert Costs(1.0, 1.0).read_s(Group(0)) == 1


def test_a_window_that_does_not_hold_a_group() -> None:
    with pytest.raises(ValueError, match="window of 9 bytes does not hold 10"):
        simulate([0], equal_groups(1), set(), 9, [1], SECOND)


@settings(deadline=None)
@given(instances(max_groups=6))
def test_against_a_step_by_step_account(given_: Instance) -> None:
    order, groups, compute_s, costs = given_.order, given_.groups, given_.compute_s, given_.costs
    window_bytes = given_.budget_bytes - given_.resident_bytes
    found = simulate(order, groups, given_.residents, window_bytes, compute_s, costs)
    elapsed_s, peak_bytes = step_by_step(given_)
    assert found.elapsed_s == pytest.approx(elapsed_s, rel=1e-3)
    assert found.peak_bytes <= peak_bytes <= given_.budget_bytes
    assert found.elapsed_s == pytest.approx(found.stall_s + sum(compute_s))
    assert found.read_bytes == sum(groups[index].size_bytes for index in order if index not in given_.residents)
    assert lower_bound(order, groups, given_.residents, compute_s, costs) <= found.elapsed_s * (1 + 1e-9)


@settings(deadline=None)
@given(instances(max_groups=6))
def test_a_larger_window_is_never_slower(given_: Instance) -> None:
    def elapsed_s(more_bytes: int) -> float:
        window_bytes = given_.budget_bytes - given_.resident_bytes + more_bytes
        cycle = StreamedCycle(
            given_.order, given_.groups, given_.residents, window_bytes, given_.compute_s, given_.costs
        )
        return cycle.run()

    times = [elapsed_s(more_bytes) for more_bytes in (0, 1, 10, 30, 100)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(times, times[1:], strict=False))
