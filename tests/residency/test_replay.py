from __future__ import annotations

import threading
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylomin.residency.replay import Replay
from pylomin.residency.trace import Key


def keys(text: str) -> list[Key]:
    return [(ord(letter),) for letter in text]


def text(order: object) -> str:
    return "".join(chr(key[0]) for key in order)  # type: ignore[attr-defined]


def replay(order: str, resident: str = "") -> Replay:
    return Replay(keys(order), set(keys(resident)))


def follow(replay: Replay, uses: str) -> list[bool]:
    """Each use in turn; where it is not what the order says, it is looked for."""
    followed = []
    for key in keys(uses):
        followed.append(replay.follow(key))
        if not followed[-1]:
            replay.seek(key)
    return followed


def test_from_the_start_and_round_again() -> None:
    assert follow(replay("abc"), "abcabcab") == [True] * 8


def test_what_is_not_next_is_looked_for() -> None:
    one = replay("abcd")
    assert follow(one, "abdabcd") == [True, True, False, True, True, True, True]
    assert text(islice(one.streamed_ahead(), 4)) == "abcd"


def test_of_a_key_that_comes_twice_the_next_place_is_taken() -> None:
    one = replay("asbsc")
    assert follow(one, "ab") == [True, False]
    assert text(islice(one.streamed_ahead(), 2)) == "sc"
    follow(one, "c")
    follow(one, "s")
    assert text(islice(one.streamed_ahead(), 2)) == "bs"


def test_off_the_order_and_back() -> None:
    one = replay("abc")
    assert follow(one, "axy") == [True, False, False]
    assert one.last_two() is None
    assert follow(one, "c") == [False], "it is not known where an order that was left goes on"
    assert one.last_two() == tuple(keys("bc"))
    assert follow(one, "ab") == [True, True]


@pytest.mark.parametrize(("resident", "ahead"), [("", "cdab"), ("c", "dab"), ("ab", "cd"), ("abcd", "")])
def test_only_what_streams_is_to_be_read(resident: str, ahead: str) -> None:
    one = replay("abcd", resident)
    follow(one, "ab")
    assert text(one.streamed_ahead()) == ahead
    assert one.streams == bool(ahead)


def test_each_thread_has_its_own_place_and_the_latest_counts() -> None:
    one = replay("abcd")
    follow(one, "abc")

    def other() -> None:
        assert follow(one, "ab") == [True, True]

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert text(islice(one.streamed_ahead(), 2)) == "cd"
    assert follow(one, "d") == [True]
    assert text(islice(one.streamed_ahead(), 2)) == "ab"


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=12), st.sets(st.sampled_from("abcde")))
def test_an_order_that_is_followed_is_read_in_that_order(order: list[str], resident: set[str]) -> None:
    one = replay("".join(order), "".join(resident))
    for place, key in enumerate(order * 2):
        assert one.follow((ord(key),))
        rest = [*order, *order][place % len(order) + 1 :][: len(order)]
        assert text(one.streamed_ahead()) == "".join(key for key in rest if key not in resident)
