from __future__ import annotations

import threading
from itertools import cycle, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylomin.residency.trace import Key, Trace


def keys(text: str) -> list[Key]:
    return [(ord(letter),) for letter in text]


def record(trace: Trace, order: list[Key]) -> None:
    for key in order:
        trace.record(key)


def upcoming(trace: Trace, limit: int) -> str:
    return "".join(chr(key[0]) for key in trace.upcoming(limit))


def test_nothing_is_known_at_first() -> None:
    trace = Trace()
    assert list(trace.upcoming(5)) == []
    trace.record((1,))
    assert list(trace.upcoming(5)) == []


@pytest.mark.parametrize(
    ("learnt", "expected"),
    [
        ("abcd", ""),  # never seen what comes after the last
        ("abcda", "bcdab"),
        ("abcdabcd", "abcda"),
        ("aaa", "aaaaa"),
        ("abab", "ababa"),
        ("xabcabca", "bcabc"),  # something before that happens once
        ("abxaabxaab", "xaabx"),  # a module that is used twice, in two places
        ("abcbabcbabc", "babcb"),  # there and back
        ("sasbscsasbsc", "sasbs"),  # a module shared by all layers
    ],
)
def test_predictions(learnt: str, expected: str) -> None:
    trace = Trace()
    record(trace, keys(learnt))
    assert upcoming(trace, 5) == expected


def test_a_decoder_wraps_round() -> None:
    """The next token's forward comes after this one's; the first forward (longer, with an extra module) differs."""
    trace = Trace()
    record(trace, keys("pe0123h" + "e0123h" * 3))
    assert upcoming(trace, 7) == "e0123he"


def test_encoder_once_then_decoder_loop() -> None:
    trace = Trace()
    record(trace, keys("EFGdefhdefhdefh" * 2))
    assert upcoming(trace, 2)[0] in "dE"
    record(trace, keys("EFGd"))
    assert upcoming(trace, 3) == "efh"


def test_an_order_that_changes_is_learnt_anew() -> None:
    trace = Trace()
    record(trace, keys("abcd" * 3))
    record(trace, keys("acbd" * 3))
    record(trace, keys("a"))
    assert upcoming(trace, 3) == "cbd"


def test_limit() -> None:
    trace = Trace()
    record(trace, keys("abcabc"))
    assert [len(list(trace.upcoming(n))) for n in (0, 1, 2, 10)] == [0, 1, 2, 10]


def test_looking_changes_nothing() -> None:
    trace = Trace()
    record(trace, keys("abcabc"))
    assert upcoming(trace, 4) == upcoming(trace, 4) == "abca"


def test_each_thread_has_its_own_order_and_shares_what_was_learnt() -> None:
    trace = Trace()
    record(trace, keys("abcabc"))
    seen: list[str] = []

    def other() -> None:
        seen.append(upcoming(trace, 3))
        record(trace, keys("b"))
        seen.append(upcoming(trace, 3))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == ["", "cab"]
    assert upcoming(trace, 3) == "abc"


def test_interleaved_threads_do_not_look_like_one_order() -> None:
    trace = Trace()
    turn = [threading.Semaphore(1), threading.Semaphore(0)]
    orders = [keys("abcd" * 3), keys("wxyz" * 3)]

    def run(me: int) -> None:
        for key in orders[me]:
            assert turn[me].acquire(timeout=30)
            trace.record(key)
            turn[1 - me].release()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    record(trace, keys("ab"))
    assert upcoming(trace, 6) == "cdabcd"


@given(st.permutations("abcdefgh"), st.integers(2, 4), st.integers(1, 20))
def test_a_cycle_of_distinct_keys_is_predicted_exactly(order: list[str], rounds: int, limit: int) -> None:
    trace = Trace()
    record(trace, keys("".join(order)) * rounds)
    assert upcoming(trace, limit) == "".join(islice(cycle(order), limit))


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
def test_a_cycle_whose_pairs_tell_what_follows(order: list[str]) -> None:
    doubled = order * 3
    after: dict[tuple[str, str], set[str]] = {}
    for a, b, c in zip(doubled, doubled[1:], doubled[2:], strict=False):
        after.setdefault((a, b), set()).add(c)
    trace = Trace()
    record(trace, keys("".join(order)) * 4)
    predicted = upcoming(trace, 10)
    if all(len(following) == 1 for following in after.values()):
        assert predicted == "".join(islice(cycle(order), 10))
    else:
        assert set(predicted) <= set(order)


@given(st.lists(st.integers(0, 5), max_size=300))
def test_what_is_remembered_is_bounded_by_pairs(order: list[int]) -> None:
    trace = Trace()
    for key in order:
        trace.record((key,))
    assert len(trace._after) <= (6 + 1) * 6 + 6
