"""Does running 32 inputs in lockstep take little longer than one, where reading limits it?

Decode-like work: vectors through 24 blocks of two linears, 384 MiB of float32 under a budget of 64 MiB, file cold. One
at a time, each input reads everything. From a disk as quick as this machine's, computing 32 inputs takes longer than
reading once; so the same is measured from a store that waits after each read until a disk of 500 MB/s would have done
it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pylomin
from benchmarks.checkpoints import random_checkpoint
from benchmarks.common import WorkerRun, paired_ratios
from benchmarks.decode import ABOVE_BUDGET_BYTES
from benchmarks.passes import Report
from benchmarks.rows import pass_s
from benchmarks.suite import Conditions, Options, Variant, finish, parse, rows_of, run_variants, save
from pylomin.store.base import ReadRequest, WeightInfo

INPUTS = 32
SHAPES = {"full": (24, 1024, 2048), "tiny": (4, 64, 128)}  # blocks, width, width inside
BUDGETS = {"full": 64 << 20, "tiny": 72 << 10}  # 64 MiB of 384 MiB, 72 KiB of 256 KiB
ONE = "one input at a time"
NAMES = (ONE, "lockstep")
SLOW = ", 500 MB/s"
SLOW_BYTES_PER_S = 500e6  # about what a SATA disk reads


class Block(nn.Module):
    """What is between attentions in a decoder."""

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inside, bias=False)
        self.down = nn.Linear(inside, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A vector to a vector."""
        return x + self.down(nn.functional.gelu(self.up(x)))  # type: ignore[no-any-return]


class SlowStore:
    """The weights of a file, no quicker than a disk of ``SLOW_BYTES_PER_S`` would read them."""

    def __init__(self, path: Path) -> None:
        self._store = pylomin.open_store(path)
        self._one_read = threading.Lock()

    def __contains__(self, name: object) -> bool:
        return name in self._store

    def __iter__(self) -> Iterator[str]:
        return iter(self._store)

    def __len__(self) -> int:
        return len(self._store)

    def info(self, name: str) -> WeightInfo:
        """As the file has it."""
        return self._store.info(name)

    def describe(self, name: str) -> str:
        """The path of the file."""
        return self._store.describe(name)

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Read, and wait as long as the slow disk would take."""
        with self._one_read:
            ends = time.perf_counter() + sum(len(request.destination) for request in requests) / SLOW_BYTES_PER_S
            self._store.read(requests)
            time.sleep(max(0.0, ends - time.perf_counter()))

    def close(self) -> None:
        """Close the file."""
        self._store.close()


def build(shape: tuple[int, int, int]) -> nn.Module:
    """The model, with weights of torch's own."""
    blocks, width, inside = shape
    return nn.Sequential(*(Block(width, inside) for _ in range(blocks)))


def work(variant: str, shape: tuple[int, int, int], memory_budget: int, weights: Path) -> dict[str, Any]:
    """All inputs, with the model in memory, or offloaded: one after the other, or in lockstep."""
    is_resident, is_slow = variant == "resident", variant.endswith(SLOW)
    report = Report(None if is_resident else weights, piece_bytes=4 * shape[1] * shape[2])
    store = SlowStore(weights) if is_slow else weights
    model = pylomin.load(lambda: build(shape), store, memory_budget=None if is_resident else memory_budget)
    model = pylomin.restore(model) if is_resident else pylomin.prefetch(model)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(1, shape[1], generator=generator) for _ in range(INPUTS)]

    def run() -> list[torch.Tensor]:
        return pylomin.lockstep(model, inputs) if variant.startswith("lockstep") else [model(x) for x in inputs]

    with torch.inference_mode():
        for _ in range(2):
            model(inputs[0])  # the order of the weights is known, and what stays has been loaded
        outputs = torch.cat(run())
        report.measure_disk(model)
        report.passes(run, 1, model)
        fields = report.finish(run, model)
    if is_slow:
        fields["bandwidth_bytes_per_s"] = [SLOW_BYTES_PER_S]
    fields["hidden_bytes"] = fields["peak_tensor_bytes"] - fields["peak_weight_bytes"]
    report.compare(outputs, weights.with_name("resident-outputs.safetensors"), is_reference=is_resident)
    return fields


def main() -> None:
    """Measure and write the result."""
    options = parse("lockstep", __doc__, rounds=2, limit_s=540)
    shape, budget = SHAPES[options.size], BUDGETS[options.size]
    weights = options.directory("lockstep") / "model.safetensors"
    if options.worker:
        print(json.dumps(work(options.worker["variant"], shape, budget, weights)))
        return
    measure(options, shape, budget, weights)


def measure(options: Options, shape: tuple[int, int, int], budget: int, weights: Path) -> None:
    """Run the variants."""
    options.make_room("lockstep", 8 * shape[0] * shape[1] * shape[2])
    random_checkpoint(lambda: build(shape), f"lockstep {shape}", weights)
    conditions = Conditions(cold=[weights])
    limit_bytes = budget + ABOVE_BUDGET_BYTES
    settings = {"budget_bytes": budget, "limit_bytes": limit_bytes}
    variants = [
        Variant("resident", {"variant": "resident"}),
        *(
            Variant(name + disk, {"variant": name + disk}, limit_bytes, settings)
            for disk in ("", SLOW)
            for name in NAMES
        ),
    ]

    def report(runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]) -> None:
        settings = {
            "model": f"{shape[0]} blocks of Linear({shape[1]}, {shape[2]}) and back",
            "input": f"{INPUTS} vectors, each at batch 1",
            "checkpoint_bytes": weights.stat().st_size,
            "file_state": "cold",
            "conditions": sorted(conditions.notes),
        }
        results: dict[str, Any] = {"rows": rows_of(variants, runs, failures)}
        results["speed_ratios"] = {}
        for disk in ("", SLOW):
            one, together = (name + disk for name in NAMES)
            if not {one, together} & failures.keys():
                ratio = paired_ratios([pass_s(run) for run in runs[one]], [pass_s(run) for run in runs[together]])
                results["speed_ratios"][f"{together} / {one}"] = vars(ratio)
        save(options, settings, results)

    failures = run_variants(options, variants, conditions, report)
    finish(options, failures, required=[variant.name for variant in variants])


if __name__ == "__main__":
    main()
