from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pylomin.residency.eviction import evict

IDLE = {"a": 10, "b": 10, "c": 10, "d": 10}
NEXT = {"a": 2, "b": 5, "c": 9}


def test_furthest_first_and_what_is_not_predicted_before_it() -> None:
    assert evict(IDLE, NEXT, 10) == ["d"]
    assert evict(IDLE, NEXT, 11) == ["d", "c"]
    assert evict(IDLE, NEXT, 40) == ["d", "c", "b", "a"]


def test_nothing_that_is_needed_sooner_than_what_is_loaded() -> None:
    assert evict(IDLE, NEXT, 20, used_at=4) == ["d", "c"]
    assert evict(IDLE, NEXT, 30, used_at=4) == ["d", "c", "b"]
    assert evict(IDLE, NEXT, 40, used_at=4) is None
    assert evict(IDLE, NEXT, 30, used_at=5) is None


def test_what_is_needed_now_takes_anything() -> None:
    assert evict(IDLE, dict.fromkeys(IDLE, 1), 40) is not None
    assert evict(IDLE, NEXT, 41) is None


def test_of_what_is_not_predicted_the_latest_goes_first() -> None:
    assert evict(IDLE, {}, 20) == ["d", "c"]


def test_nothing_goes_for_nothing() -> None:
    assert evict(IDLE, NEXT, 0) == []
    assert evict({}, {}, 1) is None


def test_what_a_larger_one_makes_needless_stays() -> None:
    assert evict({"small": 1, "large": 50}, {"small": 9, "large": 8}, 50) == ["large"]


@given(
    st.dictionaries(st.integers(0, 20), st.integers(0, 100), max_size=12),
    st.dictionaries(st.integers(0, 20), st.integers(0, 50), max_size=12),
    st.integers(0, 600),
    st.none() | st.integers(0, 50),
)
def test_any(idle: dict[int, int], next_use: dict[int, int], needed: int, used_at: int | None) -> None:
    allowed = [key for key in idle if used_at is None or next_use.get(key, 51) > used_at]
    chosen = evict(idle, next_use, needed, used_at=used_at)
    if chosen is None:
        assert sum(idle[key] for key in allowed) < needed
        return
    assert set(chosen) <= set(allowed)
    assert len(set(chosen)) == len(chosen)
    freed = sum(idle[key] for key in chosen)
    assert freed >= needed
    assert all(freed - idle[key] < needed for key in chosen)
    # Furthest first: whatever stays although it is used later than something that goes would not have been enough.
    kept_further = [
        k for k in allowed if k not in chosen and any(next_use.get(k, 51) > next_use.get(c, 51) for c in chosen)
    ]
    assert all(freed - idle[c] + idle[k] < needed + idle[k] for k in kept_further for c in chosen)
