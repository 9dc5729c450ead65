"""The simulation of many machines, against what must hold for any times and networks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.columns import caption
from benchmarks.llama import SIZES, prepare
from benchmarks.machines import (
    BUDGETS,
    LARGE,
    PASSES,
    TOKENS,
    name_of,
    shapes,
    simulated,
    speedup_of_two,
    variants,
    work,
)
from benchmarks.machines_rows import (
    ASSUMED_NETWORKS,
    MACHINES,
    Network,
    Shape,
    Times,
    computing_s,
    linears_of,
    pipeline,
    rows_of,
    tensor_parallel,
)
from benchmarks.machines_work import linears, loopback
from benchmarks.plots import plot_speed_against_machines
from benchmarks.tables import table
from pylomin.residency.simulation import Costs
from tests.benchmarks.test_gpu import run
from tests.benchmarks.test_tables import result

NETWORK = Network("slow", 1e9, 1e-4)
SHAPE = Shape("small", 4, 256, 512, 8, 4, 1000, "float32", 4, 1 << 20)


def times_of(shape: Shape, *, computing: float = 1e-9, rest_s: float = 1e-5, bandwidth: float = 1e9) -> Times:
    """Each multiplication takes ``computing``."""
    kinds = linears_of([shape], TOKENS)
    linear_s = {(rows, columns, tokens): rows * columns * tokens * computing for _, rows, columns, tokens in kinds}
    return Times(linear_s, dict.fromkeys(TOKENS, rest_s), Costs(bandwidth))


def test_parts_of_all_machines_are_the_model() -> None:
    for machines in (1, 2, 4):
        parts = sum(SHAPE.nbytes(linear) for linear in SHAPE.layer(machines)) * machines
        assert parts * SHAPE.layers + SHAPE.nbytes(SHAPE.head(machines)) * machines == SHAPE.weight_bytes
    assert sum(linear.is_summed for linear in SHAPE.layer(4)) == 2
    # A head is on one machine, however many there are.
    assert [linear.rows for linear in SHAPE.layer(64)[:3]] == [32, 32, 32]


def test_all_reduce_takes_the_quicker_way() -> None:
    assert NETWORK.all_reduce_s(1 << 20, 1) == 0.0
    assert NETWORK.all_reduce_s(1, 8) == pytest.approx(3 * NETWORK.latency_s, rel=1e-3)
    large = 1 << 30
    assert NETWORK.all_reduce_s(large, 8) == pytest.approx(2 * 7 / 8 * large / 1e9, rel=1e-2)


@settings(deadline=None, max_examples=10)
@given(st.floats(1e-11, 1e-8), st.floats(0, 1e-3), st.floats(1e8, 1e10), st.integers(1 << 19, 1 << 23))
def test_no_pass_is_below_its_bound_or_over_its_parts(
    computing: float, rest_s: float, bandwidth: float, budget_bytes: int
) -> None:
    shape = replace(SHAPE, budget_bytes=budget_bytes)
    times = times_of(shape, computing=computing, rest_s=rest_s, bandwidth=bandwidth)
    for machines in (1, 2, 4, 32):
        for way in (tensor_parallel, pipeline):
            done = way(shape, machines, 1, times, NETWORK)
            if done is None:
                assert way is pipeline
                assert shape.layers % machines
                continue
            assert done.elapsed_s >= done.bound_s * (1 - 1e-6)
            reads_s = machines * done.read_bytes / bandwidth
            assert done.elapsed_s <= (done.compute_s + done.communication_s + reads_s) * (1 + 1e-3)


def test_machines_that_hold_the_model_together_read_nothing() -> None:
    shape = replace(SHAPE, budget_bytes=SHAPE.weight_bytes // 4 + 4096)
    times = times_of(shape, computing=0.0, rest_s=0.0, bandwidth=1e8)
    free = Network("free", 1e18, 0.0)
    two, four = (tensor_parallel(shape, machines, 1, times, free) for machines in (2, 4))
    assert two.read_bytes > 0
    assert two.elapsed_s > 0
    assert four.read_bytes == 0
    assert four.elapsed_s == pytest.approx(0.0, abs=1e-12)
    staged = pipeline(shape, 4, 1, times, free)
    assert staged is not None
    assert staged.read_bytes <= 1


def test_one_machine_is_the_model_on_its_own() -> None:
    shape = replace(SHAPE, budget_bytes=2 * SHAPE.weight_bytes)
    times = times_of(shape)
    for way in (tensor_parallel, pipeline):
        done = way(shape, 1, 32, times, NETWORK)
        assert done is not None
        assert done.elapsed_s == pytest.approx(computing_s(shape, 32, times), rel=1e-3)
        assert done.communication_s == 0


def test_processes_of_one_machine_share_it() -> None:
    times, free = times_of(SHAPE, rest_s=0.0), Network("free", 1e18, 0.0)
    one = tensor_parallel(SHAPE, 1, 1, times, free)
    two = tensor_parallel(SHAPE, 2, 1, times.shared_by(2), free)
    assert two.compute_s == pytest.approx(one.compute_s, rel=1e-3)
    assert two.bound_s <= one.bound_s


def measured() -> dict[str, list[Any]]:
    """What the parts report, with one second for each pass."""
    of_shapes = shapes("tiny", SIZES["tiny"])
    found = {variant.name: [run(1.0, bandwidth_bytes_per_s=[1e9], latency_s=1e-5)] for variant in variants("tiny")}
    products = [[*kind, 1e-3] for kind in linears_of(of_shapes, TOKENS)]
    found["loopback"] = [run(1.0, bandwidth_bytes_per_s=1e9, latency_s=1e-5)]
    found["linears"] = [run(1.0, linears=products)]
    return found


def test_result_says_how_far_it_is_from_what_was_measured(tmp_path: Path) -> None:
    results = simulated(shapes("tiny", SIZES["tiny"]), measured())
    compared = {row["tokens"]: row for row in results["rows"] if "relative_error" in row}
    assert list(compared) == list(TOKENS)
    for row in compared.values():
        assert row["measured_s"] == 1.0
        assert row["relative_error"] == row["simulated_s"] - 1
    assert speedup_of_two(tmp_path / "tensor_parallel.json") is None
    passes = [{"variant": name, "pass_s": {"median": s}} for name, s in {"one rank": 1.0, "two ranks": 0.5}.items()]
    (tmp_path / "tensor_parallel.json").write_text(json.dumps({"rows": passes}))
    results["two_processes"]["measured"] = speedup_of_two(tmp_path / "tensor_parallel.json")
    text = caption("machines", result(**results))
    assert "another shape without a budget: 2.00." in text
    assert f"simulated against measured: {compared[1]['relative_error']:+.1%}" in text
    lines = table("machines", result(**results)).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 2 * len(TOKENS) * len(MACHINES)
    plot_speed_against_machines(results["rows"], tmp_path / "machines.png")
    assert (tmp_path / "machines.png").read_bytes().startswith(b"\x89PNG")


def test_speeds_are_over_one_machine_and_fall_with_slower_networks() -> None:
    rows = rows_of(SHAPE, 1, times_of(SHAPE), ASSUMED_NETWORKS)
    assert set(rows[0]["speedups"].values()) == {1.0}
    for row in rows[1:]:
        slow, middle, quick = row["speedups"].values()
        assert slow <= middle <= quick


def test_products_are_timed_for_every_shape() -> None:
    kinds = linears_of([LARGE["tiny"]], (1,))
    timed = linears(kinds, "tiny")
    assert {one[:4] for one in timed} == set(kinds)
    assert all(one[4] > 0 for one in timed)


def test_passes_and_reads_are_measured(tmp_path: Path) -> None:
    config = SIZES["tiny"]
    prepare(config, tmp_path)
    report = work("pylomin", 32, "tiny", config, tmp_path)
    assert len(report["passes"]) == PASSES
    assert report["ledger_peak_bytes"] <= BUDGETS["tiny"]
    assert all(one["read_bytes"] > 0 for one in report["passes"])
    assert report["reading_mode"] == "direct"
    assert work("disk", 0, "tiny", config, tmp_path)["latency_s"] >= 0


def test_two_processes_add_up() -> None:
    found = loopback()
    assert 0 < found["latency_s"] < 1
    assert found["bandwidth_bytes_per_s"] > 0


def test_names_tell_passes_apart() -> None:
    names = [variant.name for variant in variants("full")]
    assert len(set(names)) == len(names)
    assert name_of("resident", 1) == "resident"
