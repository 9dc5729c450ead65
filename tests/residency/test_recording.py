from __future__ import annotations

from types import SimpleNamespace

import pytest

from pylomin.residency import recording
from pylomin.residency.recording import Recording


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as its last element."""
    now = [0.0]
    monkeypatch.setattr(recording, "time", SimpleNamespace(perf_counter=lambda: now[-1]))
    return now


def test_time_between_uses_is_computing_or_stall(clock: list[float]) -> None:
    recorded = Recording()
    for at, (key, stall_s) in enumerate([((0,), 0.25), ((1,), 0.75)]):
        clock.append(float(at))
        recorded.use(key, stall_s)
    clock.append(4.0)
    measured = recorded.measured(1.0)
    assert measured.order == ((0,), (1,))
    assert measured.compute_s == [0.5, 2.75]
    assert measured.costs is recording.UNKNOWN_COSTS


def test_reads_at_one_time_share_the_disk(clock: list[float]) -> None:
    recorded = Recording()
    recorded.use((0,), 0.0)
    for end, read_s in ((2.0, 1.0), (3.0, 2.0), (8.0, 1.0)):  # from 1 to 3, and from 7 to 8
        clock.append(end)
        recorded.read(100, read_s)
    assert recorded.measured(0.0).costs.bandwidth_bytes_per_s == 100.0
