from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylomin.residency.cycle import FORGOTTEN, UNSETTLED, Cycle


def cycles(uses: Iterable[str], planned: str = "") -> list[tuple[int, str]]:
    """(uses so far, order) of each cycle that was found."""
    cycle = Cycle(planned)
    found = ((at, cycle.record(key)) for at, key in enumerate(uses, start=1))
    return [(at, "".join(order)) for at, order in found if order is not None]


@pytest.mark.parametrize(
    ("uses", "expected"),
    [
        ("", []),
        ("abcdef", []),
        ("abcdef" + "abc", []),
        ("abcdef" + "abcd", [(10, "abcdef")]),
        ("aa", [(2, "a")]),
        ("abab", [(4, "ab")]),
        ("sasbsc" + "sasb", [(10, "sasbsc")]),  # a module that all layers share
        ("abcddcba" + "abcd", [(12, "abcddcba")]),  # forward, then backward
        ("abcdacbd" + "abcd", [(12, "abcdacbd")]),  # two orders in turn
        ("abcdb" + "abcdb", [(9, "abcdb")]),  # a submodule is called between forwards
        ("peabch" + "eabch" * 3, [(19, "peabcheabcheabcheab")]),  # something that is used once
    ],
)
def test_what_repeats_is_found(uses: str, expected: list[tuple[int, str]]) -> None:
    assert cycles(uses) == expected


def test_a_cycle_goes_on_being_found_as_it_was_given() -> None:
    found = cycles("abcdef" * 8)
    assert found[0] == (10, "abcdef")
    assert {order for _, order in found} == {"abcdef"}


def test_a_rotation_of_the_planned_order_is_the_planned_order() -> None:
    assert cycles("cdabcdab", planned="abcd") == [(8, "abcd")]
    assert cycles("acbdacbd", planned="abcd") == [(8, "acbd")]


def test_a_loop_over_tokens_after_an_encoder() -> None:
    generation = "EFG" + "defh" * 60
    found = cycles(generation * 2)
    first, later = found[0], [order for _, order in found[1:]]
    assert first == (22, "EFG" + "defh" * 4 + "def")
    assert later[0] == "hdef"  # many tokens later the encoder gives way
    assert first[1] in later  # and comes back with the next generation


def test_a_short_loop_over_tokens_does_not_replace_what_includes_the_encoder() -> None:
    found = cycles(("EFG" + "defh" * 8) * 6)
    assert {order for _, order in found} >= {"EFG" + "defh" * 4 + "def"}
    assert all(set(order) == set("EFGdefh") for _, order in found)


def test_a_short_loop_over_tokens_is_found_with_its_encoder() -> None:
    """Once the whole of it has come twice."""
    last = cycles(("EFG" + "defh" * 8) * 6)[-1][1]
    assert sorted(last) == sorted("EFG" + "defh" * 8)


@pytest.mark.parametrize("begun_at", range(8))
@pytest.mark.parametrize("inner", ["L", "qkvof"])
def test_an_inner_loop_is_not_taken_for_the_pass(inner: str, begun_at: int) -> None:
    """As in ALBERT: one layer, applied twelve times."""
    forward = "e" + inner * 12 + "h"
    found = cycles((forward * 8)[begun_at:])
    settled = [order for at, order in found if at > 5 * len(forward)]
    assert settled
    assert len(set(settled)) == 1
    assert settled[0] in forward * 2
    assert len(settled[0]) == len(forward)


def test_a_submodule_that_is_called_now_and_then() -> None:
    found = cycles("abcd" * 3 + "x" + "abcd" * 30)
    assert found[0] == (8, "abcd")
    assert [sorted(set(order)) for _, order in found[1:3]] == [list("abcdx"), list("abcd")]


def test_one_use_out_of_order_does_not_replace_a_plan() -> None:
    assert {frozenset(order) for _, order in cycles("abcd" * 3 + "b" + "abcd" * 3 + "b" + "abcd" * 3)} == {
        frozenset("abcd")
    }


def test_what_is_new_is_planned_for_soon() -> None:
    assert cycles("xyxyxy", planned="abcd")[0] == (4, "xy")
    assert cycles("abcdx" * 3, planned="abcd")[0][0] <= 5 + 5 + 5


def test_random_experts_have_no_cycle_and_little_is_remembered() -> None:
    rng = random.Random(0)
    cycle: Cycle[int] = Cycle()
    experts = 50
    found = []
    for _ in range(20_000):
        order = cycle.record(rng.randrange(experts))
        if order is not None:
            found.append(order)
        assert len(cycle._window) == len(cycle._borders) <= FORGOTTEN * experts
    assert len(found) < 10  # the counts of a while are planned for, and then kept
    assert max(map(len, found)) <= UNSETTLED * experts + 1


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=400))
def test_any_uses(uses: list[str]) -> None:
    seen: set[str] = set()
    cycle: Cycle[str] = Cycle()
    for key in uses:
        seen.add(key)
        order = cycle.record(key)
        assert order is None or (order and set(order) <= seen)
        assert len(cycle._window) <= FORGOTTEN * len(seen)


@given(st.permutations("abcdefgh"), st.integers(0, 7))
def test_a_stack_is_found_in_its_second_pass(order: list[str], begun_at: int) -> None:
    found = cycles((order * 3)[begun_at:])
    assert found[0] == (len(order) + 4, "".join((order * 2)[begun_at : begun_at + len(order)]))


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12), st.integers(0, 11))
def test_any_cycle_is_confirmed_where_it_is_planned_for(order: list[str], begun_at: int) -> None:
    planned = "".join(order)
    found = cycles((order * 12)[begun_at % len(order) :], planned=planned)
    period = next(p for p in range(1, len(order) + 1) if (planned * 2).startswith(planned[p:] + planned[:p]))
    if period == len(order):
        assert found
        assert found[0] == (2 * len(order), planned)


def test_the_work_for_each_use_is_bounded_on_average() -> None:
    """Comparisons, not time."""
    compared = 0

    class Key:
        def __init__(self, name: int) -> None:
            self.name = name

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return isinstance(other, Key) and self.name == other.name

        def __hash__(self) -> int:
            return hash(self.name)

    rng = random.Random(0)
    passes = [[*range(20)], [*range(5)] * 12, [rng.randrange(20) for _ in range(100)], [0] * 30 + [1]]
    cycle: Cycle[Key] = Cycle()
    uses = 0
    for _ in range(20):
        for numbers in passes:
            for number in numbers * 5:
                cycle.record(Key(number))
                uses += 1
    assert compared < 12 * uses
