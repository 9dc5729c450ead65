"""Does a single layer of 1 GiB run under a budget of 64 MiB, and how close to the bound?

One ``Linear(16384, 16384)``, batch 1, file cold. The layer in memory says how long computing takes.
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
from benchmarks.common import WorkerRun
from benchmarks.passes import Report
from benchmarks.suite import Conditions, Options, Variant, finish, parse, rows_of, run_variants, save

WIDTHS = {"full": 16_384, "tiny": 512}
BUDGETS = {"full": 64 << 20, "tiny": 256 << 10}  # 64 MiB of 1 GiB, 256 KiB of 1 MiB
ABOVE_BUDGET_BYTES = 600 << 20  # 600 MiB of the memory group are for the interpreter, torch and the caches
PASSES = 5


def work(variant: str, width: int, memory_budget: int, weights: Path) -> dict[str, Any]:
    """The layer in memory, or under the budget."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(width, width, bias=False))

    report = Report(None if variant == "resident" else weights)
    model = pylomin.load(build, weights, memory_budget=None if variant == "resident" else memory_budget)
    model = pylomin.restore(model) if variant == "resident" else pylomin.prefetch(model)
    row = torch.randn(1, width, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = model(row)
        report.paired_passes(lambda: model(row), PASSES, model)
        fields = report.finish(lambda: model(row), model)
    report.compare(output, weights.with_name("resident-output.safetensors"), is_reference=variant == "resident")
    return fields


def main() -> None:
    """Measure and write the result."""
    options = parse("big_linear", __doc__, rounds=3, limit_s=120)
    width, budget = WIDTHS[options.size], BUDGETS[options.size]
    weights = options.directory("big_linear") / "model.safetensors"
    if options.worker:
        print(json.dumps(work(options.worker["variant"], width, budget, weights)))
        return
    measure(options, width, budget, weights)


def measure(options: Options, width: int, budget: int, weights: Path) -> None:
    """Run both variants."""
    options.make_room("big_linear", 4 * width * width)
    random_checkpoint(lambda: nn.Sequential(nn.Linear(width, width, bias=False)), f"linear {width}", weights)
    conditions = Conditions(cold=[weights])
    limit_bytes = budget + ABOVE_BUDGET_BYTES
    variants = [
        Variant("resident", {"variant": "resident"}),
        Variant("pylomin", {"variant": "pylomin"}, limit_bytes, {"budget_bytes": budget, "limit_bytes": limit_bytes}),
    ]

    def report(runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]) -> None:
        settings = {
            "model": f"Linear({width}, {width})",
            "input": "batch 1",
            "checkpoint_bytes": weights.stat().st_size,
            "file_state": "cold",
            "conditions": sorted(conditions.notes),
        }
        save(options, settings, {"rows": rows_of(variants, runs, failures)})

    finish(options, run_variants(options, variants, conditions, report), required=["resident", "pylomin"])


if __name__ == "__main__":
    main()
