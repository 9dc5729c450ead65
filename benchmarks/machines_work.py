"""What is measured of one machine for the simulation of many: products by shape, reads, an all-reduce, passes."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed
from torch.nn import functional

from benchmarks.common import time_call
from benchmarks.disk import disk_bandwidth

POOL_BYTES = {"full": 1 << 30, "tiny": 16 << 20}  # of weights that take turns, so that none is in the processor's cache
LEAST_S = 0.1  # for each product, and at least three times
REDUCED_BYTES = (4 << 10, 64 << 10, 1 << 20, 16 << 20)
REDUCTIONS = 30
TIMEOUT_S = 120


def linears(kinds: list[tuple[str, int, int, int]], size: str) -> list[tuple[str, int, int, int, float]]:
    """Seconds of products of (tokens, columns) by (rows, columns)ᵀ, behind dtype, rows, columns and tokens."""
    pools: dict[str, torch.Tensor] = {}
    found = []
    for name, rows, columns, tokens in kinds:
        dtype: torch.dtype = getattr(torch, name)
        if name not in pools:
            pools = {name: torch.empty(POOL_BYTES[size] // dtype.itemsize, dtype=dtype).fill_(0.01)}
        pool, count = pools[name], rows * columns
        x = torch.full((tokens, columns), 0.5, dtype=dtype)
        starts = list(range(0, pool.numel() - count + 1, count))
        times_s: list[float] = []
        began = time.perf_counter()
        while len(times_s) < 4 or time.perf_counter() - began < LEAST_S:
            at = starts[len(times_s) % len(starts)]
            weight = pool[at : at + count].view(rows, columns)
            times_s += time_call(lambda: functional.linear(x, weight), 1)  # noqa: B023 # called at once
        found.append((name, rows, columns, tokens, statistics.median(times_s[1:])))
    return found


def read_latency(file: Path, piece_bytes: int) -> dict[str, float]:
    """What a cold, direct read takes longer than its bytes do at the bandwidth of large ones."""
    bandwidth = disk_bandwidth(file, "direct", piece_bytes)
    small_bytes = max(4096, piece_bytes // 44)  # 1 MiB
    small_s = small_bytes / disk_bandwidth(file, "direct", small_bytes)
    return {"latency_s": max(0.0, small_s - small_bytes / bandwidth)}


def loopback() -> dict[str, float]:
    """All-reduce (gloo) of two processes on this machine: seconds of the smallest, bandwidth of the largest."""
    with tempfile.TemporaryDirectory() as directory:
        context = multiprocessing.get_context("spawn")
        other = context.Process(target=_reduce, args=(1, f"{directory}/store"), daemon=True)
        other.start()
        try:
            times_s = _reduce(0, f"{directory}/store")
            other.join(TIMEOUT_S)
        finally:
            other.kill()
    latency_s = times_s[0]
    return {"latency_s": latency_s, "bandwidth_bytes_per_s": REDUCED_BYTES[-1] / max(times_s[-1] - latency_s, 1e-9)}


def _reduce(rank: int, store: str) -> list[float]:
    """Medians, for each size."""
    from datetime import timedelta

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT_S)
    )
    medians_s = []
    for nbytes in REDUCED_BYTES:
        values = torch.ones(nbytes // 4)
        distributed.all_reduce(values)
        medians_s.append(statistics.median(time_call(lambda: distributed.all_reduce(values), REDUCTIONS)))  # noqa: B023
    distributed.destroy_process_group()
    return medians_s
