"""Does ``pylomin.fit`` know what it promises: its predicted peak memory and time against the measured ones?

The model and the tokens of the decoding benchmark, at a few budgets, file cold, in memory groups that grow with the
budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import pylomin
from benchmarks.common import WorkerRun
from benchmarks.decode import ABOVE_BUDGET_BYTES, INPUT, PIECE_BYTES, decode
from benchmarks.llama import NEEDED_BYTES, TorchDecoder, checkpoint, prepare, resident, run_benchmark
from benchmarks.passes import Report
from benchmarks.suite import Conditions, Options, Variant, finish, rows_of, run_variants, save
from pylomin.io.sizes import format_bytes

SHARES = (0.1, 0.35, 0.75, 1.02)  # of all weights


def fitted(config: LlamaConfig, weights: Path, memory_budget: int) -> nn.Module:
    """The model as ``fit`` makes it, with a token as example of what it will be given."""
    model = pylomin.load(lambda: LlamaForCausalLM(config), weights, memory_budget=memory_budget)
    with torch.inference_mode():
        result: nn.Module = pylomin.fit(
            model.eval(), memory_budget, args=[torch.tensor([[3]])], kwargs={"use_cache": False}
        )
    return result


def predicted(model: nn.Module) -> dict[str, float | None]:
    """What ``fit`` expects of a pass."""
    plan = pylomin.plan_of(model)
    return {"peak_bytes": plan.peak_bytes, "time_s": plan.elapsed_s}


def work(variant: str, memory_budget: int, config: LlamaConfig, directory: Path) -> dict[str, Any]:
    """One budget, or the resident model."""
    if variant == "resident":
        report = Report()
        decode(resident(config, directory), report, config, directory, is_reference=True)
    else:
        report = Report(checkpoint(directory), piece_bytes=PIECE_BYTES)
        model = fitted(config, checkpoint(directory), memory_budget)
        report.fields["predicted"] = predicted(model)  # before the passes, from which it would learn
        decode(TorchDecoder(model), report, config, directory)
    return report.fields


def main() -> None:
    """Measure and write the result."""
    run_benchmark("fit", __doc__, work, measure, rounds=3, limit_s=300)


def measure(options: Options, config: LlamaConfig, directory: Path) -> None:
    """Run all budgets."""
    options.make_room("llama", NEEDED_BYTES)
    weights = prepare(config, directory)
    conditions = Conditions(cold=[weights])
    variants = [Variant("resident", {"variant": "resident", "memory_budget": 0})]
    for share in SHARES:
        budget = int(share * weights.stat().st_size)
        name, limit_bytes = f"fit, {format_bytes(budget)}", budget + ABOVE_BUDGET_BYTES
        settings = {"budget_bytes": budget, "limit_bytes": limit_bytes}
        variants.append(Variant(name, {"variant": name, "memory_budget": budget}, limit_bytes, settings))

    def report(runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]) -> None:
        settings = {
            "model": f"LlamaForCausalLM, {config.num_hidden_layers} layers, hidden size {config.hidden_size}",
            "input": INPUT,
            "checkpoint_bytes": weights.stat().st_size,
            "file_state": "cold",
            "conditions": sorted(conditions.notes),
        }
        save(options, settings, {"rows": rows_of(variants, runs, failures)})

    failures = run_variants(options, variants, conditions, report)
    finish(options, failures, required=[variant.name for variant in variants])


if __name__ == "__main__":
    main()
