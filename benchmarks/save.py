"""What memory do the writers take, and how near to a plain copy of the file are they?

A 2 GB checkpoint with one table of 0.5 GB is written again in several ways, each in a process of its own whose resident
memory is watched from outside; beside it, a process that imports and opens the same and writes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

import pylomin
from benchmarks.checkpoints import random_checkpoint
from benchmarks.common import Spread, WorkerRun, paired_ratios, run_worker
from benchmarks.suite import finish, parse, save

SIZES = {"full": (32000, 4096, 24), "tiny": (320, 64, 2)}  # rows and width of the table, and layers
NEEDED_BYTES = 7 << 30  # the checkpoint, the same with digests, and what is written
ALLOWED_BYTES = 64 << 20  # beside twice the largest tensor
NOTHING, COPY = "nothing written", "plain copy"


class Model(nn.Module):
    """A table and layers."""

    def __init__(self, rows: int, width: int, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))


def open_only(checkpoint: Path, target: Path) -> nn.Module:
    """The memory that is no writer's."""
    with safe_open(checkpoint, "pt") as file:
        rows, width = file.get_slice("table.weight").get_shape()
        layers = len(file.keys()) - 1
    return pylomin.load(lambda: Model(rows, width, layers), checkpoint)


def copy_file(checkpoint: Path, target: Path) -> None:
    """The bound: copied by the system, and on disk at the end."""
    target.mkdir()
    shutil.copyfile(checkpoint, target / "model.safetensors")
    with open(target / "model.safetensors", "rb") as file:
        os.fsync(file.fileno())


VARIANTS: dict[str, Callable[[Path, Path], Any]] = {
    NOTHING: open_only,
    COPY: copy_file,
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
    options = parse("save", __doc__, rounds=3, limit_s=300)
    options.make_room("save", NEEDED_BYTES)
    sizes, directory = SIZES[options.size], options.directory("save")
    checkpoint = directory / "model.safetensors"
    if options.worker:
        print(json.dumps(work(options.worker["variant"], checkpoint)))
        return
    random_checkpoint(lambda: Model(*sizes), f"save {sizes}", checkpoint)
    pylomin.save_store(checkpoint, directory / "digests", overwrite=True)  # for verify
    runs: dict[str, list[WorkerRun]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name in VARIANTS:
            worker = json.dumps({"variant": name})
            runs[name].append(run_worker(["-m", "benchmarks.save", "--size", options.size, "--worker", worker]))
    seconds = {name: [run.report["s"] for run in of_variant] for name, of_variant in runs.items()}
    peaks = {name: max(bytes_ for run in of_variant for _, bytes_ in run.samples) for name, of_variant in runs.items()}
    rows: list[dict[str, Any]] = [
        {
            "variant": name,
            "elapsed_s": asdict(Spread.of(seconds[name])),
            "times_copy": asdict(paired_ratios(seconds[name], seconds[COPY])),
            "cpu_s": asdict(Spread.of([run.report["cpu_s"] for run in runs[name]])),
            "added_bytes": max(0, peaks[name] - peaks[NOTHING]),
        }
        for name in VARIANTS
    ]
    rows_of_table, width, layers = sizes
    largest_bytes = rows_of_table * width * 4
    settings = {
        "model": f"a table of {largest_bytes >> 20} MiB and {layers} layers of {width * width * 4 >> 20} MiB",
        "checkpoint_bytes": checkpoint.stat().st_size,
        "input": "none",
        "file_state": "cached",
        "rounds": options.rounds,
        "allowed_bytes": 2 * largest_bytes + ALLOWED_BYTES,
    }
    save(options, settings, {"rows": rows})
    finish(options, {})


if __name__ == "__main__":
    main()
