"""Does running 32 inputs in lockstep take little longer than one, where reading limits it?

Decode-like work: vectors through 140 blocks of two linears, 2.3 GB of float32 under a budget of 64 MiB, file cold. A
weight of 8 MiB may stay in the processor's cache from one input to the next; then computing all 32 with it takes about
as long as reading it. One at a time, each input reads everything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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

INPUTS = 32
SHAPES = {"full": (140, 1024, 2048), "tiny": (4, 64, 128)}  # blocks, width, width inside
BUDGETS = {"full": 64 << 20, "tiny": 72 << 10}  # 64 MiB of 2.2 GiB, 72 KiB of 256 KiB
ONE = "one input at a time"


class Block(nn.Module):
    """What is between attentions in a decoder."""

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inside, bias=False)
        self.down = nn.Linear(inside, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A vector to a vector."""
        return x + self.down(nn.functional.gelu(self.up(x)))  # type: ignore[no-any-return]


def build(shape: tuple[int, int, int]) -> nn.Module:
    """The model, with weights of torch's own."""
    blocks, width, inside = shape
    return nn.Sequential(*(Block(width, inside) for _ in range(blocks)))


def work(variant: str, shape: tuple[int, int, int], memory_budget: int, weights: Path) -> dict[str, Any]:
    """All inputs, with the model in memory, or offloaded: one after the other, or in lockstep."""
    is_resident = variant == "resident"
    report = Report(None if is_resident else weights, piece_bytes=4 * shape[1] * shape[2])
    model = pylomin.load(lambda: build(shape), weights, memory_budget=None if is_resident else memory_budget)
    model = pylomin.restore(model) if is_resident else pylomin.prefetch(model)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(1, shape[1], generator=generator) for _ in range(INPUTS)]

    def run() -> list[torch.Tensor]:
        return pylomin.lockstep(model, inputs) if variant == "lockstep" else [model(x) for x in inputs]

    with torch.inference_mode():
        for _ in range(2):
            model(inputs[0])  # the order of the weights is known, and what stays has been loaded
        outputs = torch.cat(run())
        report.measure_disk(model)
        report.passes(run, 1, model)
        fields = report.finish(run, model)
    fields["hidden_bytes"] = fields["peak_tensor_bytes"] - fields["peak_weight_bytes"]
    report.compare(outputs, weights.with_name("resident-outputs.safetensors"), is_reference=is_resident)
    return fields


def main() -> None:
    """Measure and write the result."""
    options = parse("lockstep", __doc__, rounds=2, limit_s=360)
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
        Variant(ONE, {"variant": ONE}, limit_bytes, settings),
        Variant("lockstep", {"variant": "lockstep"}, limit_bytes, settings),
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
        if not {ONE, "lockstep"} & failures.keys():
            ratio = paired_ratios([pass_s(run) for run in runs[ONE]], [pass_s(run) for run in runs["lockstep"]])
            results["times_as_fast_as"] = {ONE: vars(ratio)}
        save(options, settings, results)

    failures = run_variants(options, variants, conditions, report)
    finish(options, failures, required=[variant.name for variant in variants])


if __name__ == "__main__":
    main()
