"""What memory do the writers take, and how near to a plain copy of the file are they?

A 2 GB checkpoint with one table of 0.5 GB is written again in several ways, each in a process of its own whose resident
memory is watched from outside; beside it, a process that imports and opens the same and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pylomin
from benchmarks.checkpoints import random_checkpoint
from benchmarks.common import ROOT, run_worker, write_result
from benchmarks.tables import RESULTS

ROWS, WIDTH, LAYERS = 32000, 4096, 24


class Model(nn.Module):
    """A table and layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))


def open_only(checkpoint: Path, target: Path) -> nn.Module:
    """The memory that is no writer's."""
    return pylomin.load(Model, checkpoint)


def copy_file(checkpoint: Path, target: Path) -> None:
    """The bound: copied by the system, and on disk at the end."""
    target.mkdir()
    shutil.copyfile(checkpoint, target / "model.safetensors")
    with open(target / "model.safetensors", "rb") as file:
        os.fsync(file.fileno())


VARIANTS: dict[str, Callable[[Path, Path], Any]] = {
    "nothing written": open_only,
    "plain copy": copy_file,
    "save_store": lambda checkpoint, target: pylomin.save_store(checkpoint, target),
    "save_store, no digests": lambda checkpoint, target: pylomin.save_store(checkpoint, target, digests=False),
    "save_store, bfloat16": lambda checkpoint, target: pylomin.save_store(checkpoint, target, dtype=torch.bfloat16),
    "save_store, shards": lambda checkpoint, target: pylomin.save_store(checkpoint, target, max_shard_size="500MB"),
    "save_model": lambda checkpoint, target: pylomin.save_model(open_only(checkpoint, target), target),
    "verify": lambda checkpoint, target: pylomin.verify(checkpoint.parent / "digests" / "model.safetensors").checked,
}


def work(variant: str, checkpoint: Path) -> dict[str, float]:
    """Run one variant, and say how long it took."""
    target = checkpoint.parent / "target"
    shutil.rmtree(target, ignore_errors=True)
    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    VARIANTS[variant](checkpoint, target)
    times = {"s": time.perf_counter() - start_s, "cpu_s": time.process_time() - cpu_start_s}
    shutil.rmtree(target, ignore_errors=True)
    return times


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--publish", action="store_true", help="result to docs/results")
    parser.add_argument("--directory", type=Path, default=ROOT / ".demo" / "save", help="for 6 GB of checkpoints")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    checkpoint = directory / "model.safetensors"
    if arguments.worker:
        print(json.dumps(work(arguments.worker, checkpoint)))
        return
    random_checkpoint(Model, f"save {ROWS} {WIDTH} {LAYERS}", checkpoint)
    pylomin.save_store(checkpoint, directory / "digests", overwrite=True)  # for verify
    results: dict[str, dict[str, float]] = {}
    for name in VARIANTS:
        run = run_worker(["-m", "benchmarks.save", "--directory", str(directory), "--worker", name])
        peak_bytes = max(resident for _, resident in run.samples)
        results[name] = {**run.report, "peak_bytes": peak_bytes}
        added = peak_bytes - results["nothing written"]["peak_bytes"]
        print(f"{name:24} {run.report['s']:6.1f} s  {added / 2**20:+6.0f} MiB", flush=True)
    settings = {"weight_bytes": checkpoint.stat().st_size, "largest_tensor_bytes": ROWS * WIDTH * 4}
    path = (RESULTS if arguments.publish else arguments.output) / "save.json"
    write_result(path, settings, {"variants": results})
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
