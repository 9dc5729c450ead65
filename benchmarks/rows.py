"""From what measured processes report to rows of a result. Pure: no process, no file, no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from benchmarks.common import Spread, WorkerRun, paired_ratios

# What a process needs beside its weights and what it had after its imports: hidden states, key-value cache, scratch
# space of the kernels, threads, the modules themselves. Stated in every table that checks process memory.
PROCESS_CONSTANT_BYTES = 160 << 20  # 160 MiB


def bound_s(compute_s: float, streamed_bytes: float, bytes_per_s: float) -> float:
    """Least time a pass can take when reading and computing overlap fully.

    >>> bound_s(2.0, 3e9, 1e9)
    3.0
    """
    return max(compute_s, streamed_bytes / bytes_per_s)


def shared_bound_s(compute_s: float, streamed_bytes: float, bytes_per_s: float, together: tuple[float, float]) -> float:
    """The same where reading and computing slow each other down, until one of them has finished.

    Args:
        together: bytes per second while there is computing, and the speed of computing meanwhile, where 1 is its speed
            alone; as measured, so that more than alone means as much.

    >>> shared_bound_s(2.0, 3e9, 1e9, (1e9, 1.0))
    3.0
    >>> shared_bound_s(2.0, 3e9, 1e9, (0.5e9, 0.5))
    5.0
    """
    meanwhile_bytes_per_s, computing_share = min(together[0], bytes_per_s), min(together[1], 1.0)
    both_s = min(compute_s / computing_share, streamed_bytes / meanwhile_bytes_per_s)
    rest_s = bound_s(compute_s - both_s * computing_share, streamed_bytes - both_s * meanwhile_bytes_per_s, bytes_per_s)
    return both_s + rest_s


def pass_s(run: WorkerRun) -> float:
    """Median time of the passes of one run."""
    return float(statistics.median(one["s"] for one in run.report["passes"]))


def process_memory(run: WorkerRun) -> dict[str, int]:
    """Resident set seen from outside: when the model was begun (after all imports), and the peak from there on."""
    start_s, end_s = run.report["started_s"], run.report["finished_s"]
    seen = [rss_bytes for at_s, rss_bytes in run.samples if start_s <= at_s <= end_s]
    first = run.report["start_process_bytes"]
    return {"start_process_bytes": first, "peak_process_bytes": max(seen, default=first)}


def memory_line(run: WorkerRun) -> list[tuple[float, float]]:
    """(seconds, GiB) from where the model is begun to the end of its passes."""
    start_s, end_s = run.report["started_s"], run.report["finished_s"]
    return [
        (round(at_s - start_s, 3), round(rss_bytes / (1 << 30), 4))
        for at_s, rss_bytes in run.samples
        if start_s <= at_s <= end_s
    ]


def process_constant_bytes(row: Mapping[str, Any]) -> int:
    """``PROCESS_CONSTANT_BYTES``, and of a row that says so also its ``beside_bytes``."""
    return PROCESS_CONSTANT_BYTES + int(row.get("beside_bytes", 0))


def budget_truth(row: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each witness of memory stayed within the row's budget: ledger, allocator, the process from outside."""
    budget = row["budget_bytes"]
    grown_bytes = row["peak_process_bytes"] - row["start_process_bytes"]
    truth = {
        "ledger": row["ledger_peak_bytes"] <= budget,
        "process": grown_bytes <= budget + process_constant_bytes(row),
    }
    if "peak_weight_bytes" in row:
        truth["allocator"] = row["peak_weight_bytes"] <= budget
    return truth


def summarise(
    variant: str, runs: Sequence[WorkerRun], resident: Sequence[WorkerRun], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """One row: times of all rounds, in pairs with those of the resident model, and memory of the worst round.

    Args:
        variant: what the row is called.
        runs: one for each round.
        resident: the runs of the model in memory in the same rounds: how long computing takes.
        settings: what the row should say besides, such as ``budget_bytes`` and ``limit_bytes``.
    """
    times_s = [pass_s(run) for run in runs]
    compute_s = [pass_s(run) for run in resident[: len(runs)]]
    row: dict[str, Any] = {
        "variant": variant,
        **settings,
        "rounds": len(runs),
        "passes_per_round": len(runs[0].report["passes"]),
        "pass_s": asdict(Spread.of(times_s)),
        "share_of_resident": asdict(paired_ratios(compute_s, times_s)),
        **{key: max(process_memory(run)[key] for run in runs) for key in process_memory(runs[0])},
    }
    for key in (
        "ledger_peak_bytes",
        "peak_tensor_bytes",
        "peak_weight_bytes",
        "difference",
        "group_peak_bytes",
        "hidden_bytes",
    ):
        if key in runs[0].report:
            row[key] = max(run.report[key] for run in runs)
    for key in ("reading_mode", "stall_s", "cached_share"):
        if key in runs[-1].report:
            row[key] = runs[-1].report[key]
    if "bandwidth_bytes_per_s" in runs[0].report:
        row |= _against_the_bound(runs, compute_s)
    if "needed_bytes" in runs[0].report["passes"][0] and "ledger_peak_bytes" in row:
        passes = [one for run in runs for one in run.report["passes"]]
        row["times_needed"] = asdict(Spread.of([one["read_bytes"] / one["needed_bytes"] for one in passes]))
    if "predicted" in runs[0].report:
        row |= _against_the_prediction(runs)
    if "budget_bytes" in row and "ledger_peak_bytes" in row:
        row["within_budget"] = budget_truth(row)
    return row


def _bandwidths(run: WorkerRun) -> list[float]:
    """The disk's speed of each pass: a slow spell hits a pass and the reads before and after it alike."""
    measured, count = run.report["bandwidth_bytes_per_s"], len(run.report["passes"])
    if len(measured) == count + 1:
        return [statistics.harmonic_mean(around) for around in pairwise(measured)]
    return [statistics.harmonic_mean(measured)] * count


def _against_the_bound(runs: Sequence[WorkerRun], compute_s: Sequence[float]) -> dict[str, Any]:
    bounds_s, times_bound, times_shared, bandwidths, together = [], [], [], [], []
    for run, resident_s in zip(runs, compute_s, strict=True):
        passes = list(zip(run.report["passes"], _bandwidths(run), strict=True))
        bounds = [bound_s(resident_s, one["read_bytes"], bandwidth) for one, bandwidth in passes]
        bandwidths.append(statistics.harmonic_mean(run.report["bandwidth_bytes_per_s"]))
        bounds_s.append(statistics.median(bounds))
        times_bound.append(statistics.median(one["s"] / bound for (one, _), bound in zip(passes, bounds, strict=True)))
        if "together" in run.report:
            together.append(run.report["together"])
            times_shared.append(
                statistics.median(
                    one["s"] / shared_bound_s(resident_s, one["read_bytes"], bandwidth, together[-1])
                    for one, bandwidth in passes
                )
            )
    row = {
        "read_bytes_per_pass": statistics.median(
            statistics.median(one["read_bytes"] for one in run.report["passes"]) for run in runs
        ),
        "bandwidth_bytes_per_s": asdict(Spread.of(bandwidths)),
        "bound_s": asdict(Spread.of(bounds_s)),
        "times_bound": asdict(Spread.of(times_bound)),
    }
    if together:
        row["bandwidth_together"] = asdict(Spread.of([bandwidth for bandwidth, _ in together]))
        row["computing_together"] = asdict(Spread.of([share for _, share in together]))
        row["times_shared_bound"] = asdict(Spread.of(times_shared))
    return row


def _against_the_prediction(runs: Sequence[WorkerRun]) -> dict[str, Any]:
    predictions = [run.report["predicted"] for run in runs]
    return {
        "predicted_peak_bytes": max(one["peak_bytes"] for one in predictions),
        "predicted_s": asdict(Spread.of([one["time_s"] for one in predictions])),
        "peak_of_predicted": asdict(
            paired_ratios([run.report["ledger_peak_bytes"] for run in runs], [one["peak_bytes"] for one in predictions])
        ),
        "time_of_predicted": asdict(
            paired_ratios([pass_s(run) for run in runs], [one["time_s"] for one in predictions])
        ),
    }
