"""What the GPU benchmark runs, and rows from what its processes report. Pure: no process, no device, no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.common import Spread, WorkerRun, paired_ratios
from benchmarks.rows import bound_s, pass_s, process_memory

BUDGET_SHARES = (0.1, 0.15, 0.25, 0.5, 0.75, 1.0)  # of the weights
BERT_BATCHES = (1, 2, 4, 8, 16)
BERT_VARIANTS = ("resident", "lazy", "kept embedding", "chunked", "chunked + prefetch", "chunked + prefetch + tiles")
STORAGES = {"disk": "from disk", "cpu": "from host memory"}
PEERS = ("accelerate cpu_offload", "accelerate disk_offload", "diffusers group offloading")
LLAMA_WORKS = ("prefill", "decode")
RING_SPARE_BYTES = 512 << 20  # that the host may take beside the ring


@dataclass(frozen=True)
class Task:
    """One row: what one process is told."""

    work: str  # "bert 4 x 512", "prefill", "decode", "bandwidth", "timeline"
    variant: str
    storage: str | None = None
    budget_share: float | None = None  # of the weights
    batch: int = 1

    @property
    def name(self) -> str:
        storage = "" if self.storage is None else f" {STORAGES[self.storage]}"
        budget = "" if self.budget_share is None else f", {self.budget_share:.0%} of weights"
        return f"{self.work}: {self.variant}{storage}{budget}"

    @property
    def reference(self) -> str:
        """The row that says how long computing takes."""
        return f"{self.work}: resident"


def tasks() -> list[Task]:
    """All rows, in the order in which they run; the resident model of each kind of work is before the others."""
    found = [Task("bandwidth", "pinned host to device")]
    found += [Task(f"BERT {batch} x 512", variant, batch=batch) for batch in BERT_BATCHES for variant in BERT_VARIANTS]
    for work in LLAMA_WORKS:
        found.append(Task(work, "resident"))
        found += [Task(work, "pylomin", storage, share) for storage in STORAGES for share in BUDGET_SHARES]
        found += [Task(work, peer) for peer in PEERS]
    return [*found, Task("timeline", "pylomin", "cpu", 0.15)]


def llama_bytes(
    *, vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, itemsize: int
) -> int:
    """Bytes of the weights of a Llama whose head is not tied to its embedding."""
    kv = hidden // heads * kv_heads
    of_layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate + 2 * hidden
    return itemsize * (2 * vocabulary * hidden + layers * of_layer + hidden)


def rows_of(
    tasks: Sequence[Task], runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row for every task that was begun, also for those that failed; but the first and the last, which have none."""
    rows = []
    bandwidth = bandwidth_of(runs)
    for task in tasks:
        if task.name in failures:
            rows.append({"variant": task.name, "error": failures[task.name]})
        elif runs.get(task.name) and "passes" in runs[task.name][0].report:
            rows.append(_row(task, runs[task.name], runs.get(task.reference, []), bandwidth))
    return rows


def bandwidth_of(runs: Mapping[str, list[WorkerRun]]) -> float | None:
    """Bytes per second from pinned host memory to the device, the median of the rounds."""
    found = [run.report["bytes_per_s"] for of_task in runs.values() for run in of_task if "bytes_per_s" in run.report]
    return statistics.median(found) if found else None


def _row(
    task: Task, runs: Sequence[WorkerRun], resident: Sequence[WorkerRun], bandwidth: float | None
) -> dict[str, Any]:
    times_s = [pass_s(run) for run in runs]
    row: dict[str, Any] = {
        "variant": task.name,
        "rounds": len(runs),
        "passes_per_round": len(runs[0].report["passes"]),
        "pass_s": asdict(Spread.of(times_s)),
        **{key: max(process_memory(run)[key] for run in runs) for key in process_memory(runs[0])},
    }
    for key in ("peak_device_bytes", "budget_bytes", "ledger_peak_bytes", "pinned_bytes", "difference"):
        if key in runs[0].report:
            row[key] = max(run.report[key] for run in runs)
    compared = [pass_s(run) for run in resident[: len(runs)]]
    if len(compared) < len(runs):
        return row
    row["share_of_resident"] = asdict(paired_ratios(compared, times_s))
    copied = statistics.median([one["read_bytes"] for run in runs for one in run.report["passes"]])
    if bandwidth is not None and copied:
        bounds = [bound_s(compute_s, copied, bandwidth) for compute_s in compared]
        row["copied_bytes_per_pass"] = copied
        row["copy_bound_s"] = asdict(Spread.of(bounds))
        row["times_copy_bound"] = asdict(paired_ratios(times_s, bounds))
    if "pinned_bytes" in row:
        grown_bytes = row["peak_process_bytes"] - row["start_process_bytes"]
        row["within_host"] = task.storage != "disk" or grown_bytes <= row["pinned_bytes"] + RING_SPARE_BYTES
    return row


def against_peers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How many times as fast pylomin decodes as each peer, at the most memory that is no more than the peer's."""
    own = [row for row in rows if row["variant"].startswith("decode: pylomin") and "peak_device_bytes" in row]
    found = {}
    for peer in PEERS:
        other = next((row for row in rows if row["variant"] == f"decode: {peer}" and "pass_s" in row), None)
        if other is None:
            continue
        fitting = [row for row in own if row["peak_device_bytes"] <= other["peak_device_bytes"]]
        if fitting:
            found[peer] = other["pass_s"]["median"] / min(row["pass_s"]["median"] for row in fitting)
    return found


Interval = tuple[float, float]


def overlap(copies: Sequence[Interval], computations: Sequence[Interval]) -> float:
    """The share of the time of copies during which something was computed.

    >>> overlap([(0.0, 2.0), (3.0, 5.0)], [(1.0, 4.0)])
    0.5
    """
    merged = _merged(computations)
    copied = _merged(copies)
    total = sum(end - begin for begin, end in copied)
    both = sum(max(0.0, min(end, stop) - max(begin, start)) for begin, end in copied for start, stop in merged)
    return both / total if total else 0.0


def _merged(intervals: Sequence[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged
