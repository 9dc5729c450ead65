from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.common import WorkerRun
from benchmarks.rows import (
    PROCESS_CONSTANT_BYTES,
    bound_s,
    budget_truth,
    process_memory,
    shared_bound_s,
    summarise,
)
from benchmarks.suite import Variant, rows_of

SIZES = st.floats(1, 1e12)


def run(*passes: tuple[float, int], **fields: Any) -> WorkerRun:
    report = {
        "started_s": 10.0,
        "finished_s": 20.0,
        "start_process_bytes": 100,
        "passes": [{"s": s, "read_bytes": read_bytes} for s, read_bytes in passes],
        **fields,
    }
    return WorkerRun(report, [(5.0, 900), (11.0, 200), (12.0, 300), (21.0, 800)])


@given(SIZES, SIZES, SIZES)
def test_bound_is_the_larger_of_computing_and_reading(compute_s: float, streamed: float, bandwidth: float) -> None:
    bound = bound_s(compute_s, streamed, bandwidth)
    assert bound >= compute_s
    assert bound >= streamed / bandwidth
    assert bound in (compute_s, streamed / bandwidth)


@given(SIZES, SIZES, SIZES, st.tuples(SIZES, st.floats(0.01, 2)))
def test_bound_of_both_together_is_never_less(
    compute_s: float, streamed: float, bandwidth: float, together: tuple[float, float]
) -> None:
    alone = bound_s(compute_s, streamed, bandwidth)
    shared = shared_bound_s(compute_s, streamed, bandwidth, together)
    assert shared >= alone * (1 - 1e-9)
    assert shared_bound_s(compute_s, streamed, bandwidth, (bandwidth, 1.0)) == pytest.approx(alone)


def test_row_says_how_both_went_together() -> None:
    both = run((3.0, 1000), bandwidth_bytes_per_s=[1000.0], together=(500.0, 0.75))
    row = summarise("offloaded", [both], [run((1.5, 0))], {})
    assert row["bandwidth_together"]["median"] == 500.0
    assert row["computing_together"]["median"] == 0.75
    assert row["times_shared_bound"]["median"] == 1.5  # 2 s for both, of which 1.5 s of computing, and all that is read


def test_process_memory_counts_from_the_model_to_the_end_of_its_passes() -> None:
    assert process_memory(run((1.0, 0))) == {"start_process_bytes": 100, "peak_process_bytes": 300}


def test_row_pairs_rounds_with_the_resident_model_and_the_disk() -> None:
    resident = [run((1.0, 0)), run((2.0, 0))]
    runs = [
        run((2.0, 3000), (4.0, 3000), (3.0, 3000), bandwidth_bytes_per_s=[1000.0, 1000.0], ledger_peak_bytes=50),
        run((4.0, 1000), bandwidth_bytes_per_s=[1000.0, 1000.0], ledger_peak_bytes=60),
    ]
    row = summarise("offloaded", runs, resident, {"budget_bytes": 60})
    assert row["pass_s"] == {"median": 3.5, "smallest": 3.0, "largest": 4.0}
    assert row["share_of_resident"]["smallest"] == pytest.approx(1 / 3)
    assert row["share_of_resident"]["largest"] == pytest.approx(1 / 2)
    # Reading is the bound in the first round, 3 s; computing in the second, 2 s.
    assert (row["bound_s"]["smallest"], row["bound_s"]["largest"]) == (2.0, 3.0)
    assert (row["times_bound"]["smallest"], row["times_bound"]["largest"]) == (1.0, 2.0)
    assert row["ledger_peak_bytes"] == 60
    assert row["within_budget"] == {"ledger": True, "process": True}


def test_disk_speed_is_the_mean_over_bytes_not_over_rates() -> None:
    row = summarise("offloaded", [run((1.0, 10), bandwidth_bytes_per_s=[1.0, 3.0])], [run((0.1, 0))], {})
    assert row["bandwidth_bytes_per_s"]["median"] == pytest.approx(1.5)


def test_passes_are_paired_with_the_disk_before_and_after_them() -> None:
    report = run((2.0, 30), (5.0, 30), (4.0, 30), bandwidth_bytes_per_s=[10.0, 30.0, 10.0, 10.0])
    row = summarise("offloaded", [report], [run((0.1, 0))], {})
    assert row["bound_s"]["median"] == pytest.approx(2.0)  # 2, 2 and 3 s
    assert row["times_bound"]["median"] == pytest.approx(4 / 3)  # 1, 5 / 2 and 4 / 3


def test_what_is_read_is_compared_with_what_is_needed() -> None:
    one = run((1.0, 110), ledger_peak_bytes=1)
    one.report["passes"][0]["needed_bytes"] = 100
    assert summarise("offloaded", [one], [run((1.0, 0))], {})["times_needed"]["largest"] == pytest.approx(1.1)


def test_predictions_are_paired_with_what_was_measured() -> None:
    runs = [run((2.0, 0), ledger_peak_bytes=90, predicted={"peak_bytes": 100, "time_s": 4.0})]
    row = summarise("fit", runs, [run((1.0, 0))], {})
    assert row["time_of_predicted"]["median"] == 0.5
    assert row["peak_of_predicted"]["median"] == 0.9


def test_each_witness_of_memory_is_held_against_the_budget() -> None:
    row = {
        "budget_bytes": 100,
        "ledger_peak_bytes": 101,
        "peak_weight_bytes": 100,
        "start_process_bytes": 1000,
        "peak_process_bytes": 1000 + 100 + PROCESS_CONSTANT_BYTES + 1,
    }
    assert budget_truth(row) == {"ledger": False, "process": False, "allocator": True}
    assert budget_truth(row | {"beside_bytes": 1}) == {"ledger": False, "process": True, "allocator": True}


def test_failed_variants_keep_their_row() -> None:
    variants = [Variant("resident", {}), Variant("peer", {}, 5, {"limit_bytes": 5})]
    rows = rows_of(variants, {"resident": [run((1.0, 0))], "peer": []}, {"peer": "out of memory"})
    assert rows[0]["variant"] == "resident"
    assert rows[1] == {"variant": "peer", "limit_bytes": 5, "error": "out of memory"}
