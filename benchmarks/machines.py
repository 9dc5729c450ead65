"""How much faster is a model whose weights stream from disk on 2 to 64 machines? A simulation from what one does.

Products by shape, the disk and passes of the decoding benchmark's model are measured on this machine, an all-reduce
between two processes on it; networks between machines are assumed, and named. The simulator is the one that plans are
made with; with one machine it is compared with measured passes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import pylomin
from benchmarks.common import WorkerRun
from benchmarks.decode import ABOVE_BUDGET_BYTES, PIECE_BYTES
from benchmarks.llama import NEEDED_BYTES, checkpoint, prepare, resident, run_benchmark
from benchmarks.machines_rows import (
    ASSUMED_NETWORKS,
    Network,
    Shape,
    Times,
    computing_s,
    linears_of,
    rows_of,
    tensor_parallel,
)
from benchmarks.machines_work import linears, loopback, read_latency
from benchmarks.passes import Report
from benchmarks.plots import plot_speed_against_machines
from benchmarks.rows import pass_s
from benchmarks.suite import Conditions, Options, Variant, finish, run_variants, save
from pylomin.residency.simulation import Costs

TOKENS = (1, 32)  # of a pass
WARM_UP, PASSES = 3, 6
BUDGETS = {"full": 300 << 20, "tiny": 1 << 20}  # of each machine, for the model that is measured
LARGE = {
    "full": Shape("Llama, 70B", 80, 8192, 28_672, 64, 8, 32_000, "bfloat16", 2, 8 << 30),  # that of Llama 2; 8 GiB
    "tiny": Shape("Llama, 70B", 4, 128, 448, 8, 2, 2_000, "bfloat16", 2, 256 << 10),
}


def shapes(size: str, config: LlamaConfig) -> list[Shape]:
    """The model that is measured, and a larger one."""
    measured = Shape(
        "Llama, 2.3 GB",
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
        "float32",
        4,
        BUDGETS[size],
    )
    return [measured, LARGE[size]]


def work(part: str, tokens: int, size: str, config: LlamaConfig, directory: Path) -> dict[str, Any]:
    """One part, in this process."""
    if part == "linears":
        return {"linears": linears(linears_of(shapes(size, config), TOKENS), size)}
    if part == "disk":
        return read_latency(checkpoint(directory), PIECE_BYTES)
    if part == "loopback":
        return loopback()
    report = Report(None if part == "resident" else checkpoint(directory), piece_bytes=PIECE_BYTES)
    model = resident(config, directory).model if part == "resident" else streamed(config, directory, BUDGETS[size])
    assert model is not None
    inputs = torch.randint(3, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))

    def run() -> torch.Tensor:
        logits: torch.Tensor = model(inputs, use_cache=False, logits_to_keep=1).logits
        return logits

    with torch.inference_mode():
        for _ in range(WARM_UP):
            run()
        report.measure_disk(model)
        report.passes(run, PASSES, model)
        return report.finish(run, model)


def streamed(config: LlamaConfig, directory: Path, memory_budget: int) -> nn.Module:
    """Read as it is simulated: directly, in the background, one group after the other."""
    model: nn.Module = pylomin.load(
        lambda: LlamaForCausalLM(config), checkpoint(directory), memory_budget=memory_budget, reading_mode="direct"
    )
    return pylomin.prefetch(model).eval()


def variants(size: str) -> list[Variant]:
    """What is measured."""
    found = []
    for tokens in TOKENS:
        for part in ("resident", "pylomin"):
            limit_bytes = BUDGETS[size] + ABOVE_BUDGET_BYTES if part == "pylomin" else None
            worker = {"part": part, "tokens": tokens, "size": size}
            found.append(Variant(name_of(part, tokens), worker, limit_bytes))
    return [
        *found,
        *(Variant(part, {"part": part, "tokens": 0, "size": size}) for part in ("disk", "linears", "loopback")),
    ]


def name_of(part: str, tokens: int) -> str:
    """Of the variant that passes ``tokens``."""
    return part if tokens == 1 else f"{part}, {tokens} tokens"


def main() -> None:
    """Measure, simulate and write the result."""
    run_benchmark("machines", __doc__, work, measure, rounds=3, limit_s=480)


def measure(options: Options, config: LlamaConfig, directory: Path) -> None:
    """Run all parts."""
    options.make_room("llama", NEEDED_BYTES)
    weights = prepare(config, directory)
    conditions = Conditions(cold=[weights])
    all_variants = variants(options.size)

    def report(runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]) -> None:
        if failures:
            return
        results = simulated(shapes(options.size, config), runs)
        network = Network(**results["measured"]["loopback"])
        results["two_processes"]["measured"] = speedup_of_two(options.output / "tensor_parallel.json")
        settings = {
            "model": f"LlamaForCausalLM, {config.num_hidden_layers} layers, hidden size {config.hidden_size}, and the "
            "shape of one of 70 billion in bfloat16, in simulation",
            "input": f"{' or '.join(map(str, TOKENS))} tokens",
            "checkpoint_bytes": weights.stat().st_size,
            "file_state": "cold",
            "rounds": len(runs["resident"]),
            "conditions": [
                *sorted(conditions.notes),
                f"all-reduce of two processes on this machine: {network.latency_s * 1e6:.0f} µs and "
                f"{network.bandwidth_bytes_per_s / 1e9:.2f} GB/s",
            ],
            "networks": [asdict(network) for network in ASSUMED_NETWORKS],
        }
        plot_speed_against_machines(results["rows"], options.output / "machines.png")
        save(options, settings, results)

    failures = run_variants(options, all_variants, conditions, report)
    finish(options, failures, required=[variant.name for variant in all_variants])


def simulated(of_shapes: list[Shape], runs: Mapping[str, list[WorkerRun]]) -> dict[str, Any]:
    """Medians of what was measured, what follows from them, and how far that is from measured passes."""

    def median(part: str, key: str) -> float:
        return float(statistics.median(run.report[key] for run in runs[part]))

    timed: dict[str, dict[tuple[int, int, int], list[float]]] = {}
    for run in runs["linears"]:
        for dtype, output, input_, tokens, seconds in run.report["linears"]:
            timed.setdefault(dtype, {}).setdefault((output, input_, tokens), []).append(seconds)
    linear_s = {
        dtype: {kind: statistics.median(seconds) for kind, seconds in kinds.items()} for dtype, kinds in timed.items()
    }
    small, (bandwidth, latency_s) = of_shapes[0], ("bandwidth_bytes_per_s", "latency_s")
    # As it was beside the passes that the simulation is compared with.
    beside = [one for tokens in TOKENS for run in runs[name_of("pylomin", tokens)] for one in run.report[bandwidth]]
    costs = Costs(statistics.median(beside), median("disk", latency_s))
    loop = Network("loopback", median("loopback", bandwidth), median("loopback", latency_s))
    passes_s = {
        part: {tokens: statistics.median(map(pass_s, runs[name_of(part, tokens)])) for tokens in TOKENS}
        for part in ("resident", "pylomin")
    }
    products = Times(linear_s[small.dtype], dict.fromkeys(TOKENS, 0.0), costs)
    rest_s = {
        tokens: max(0.0, passes_s["resident"][tokens] - computing_s(small, tokens, products)) / small.layers
        for tokens in TOKENS
    }
    rows = []
    for shape in of_shapes:
        # Norms and attention grow with the width, what Python does not: more for the larger model than it will be.
        scaled = {tokens: seconds * shape.width / small.width for tokens, seconds in rest_s.items()}
        for tokens in TOKENS:
            rows += rows_of(shape, tokens, Times(linear_s[shape.dtype], scaled, costs), [*ASSUMED_NETWORKS, loop])
    for row in rows:
        if row["shape"] == small.name and row["machines"] == 1:
            row["measured_s"] = passes_s["pylomin"][row["tokens"]]
            row["relative_error"] = row["simulated_s"] / row["measured_s"] - 1
    times = Times(linear_s[small.dtype], rest_s, costs)
    one = tensor_parallel(small, 1, TOKENS[-1], times, loop)
    two = tensor_parallel(small, 2, TOKENS[-1], times.shared_by(2), loop)
    return {
        "rows": rows,
        "two_processes": {"simulated": one.elapsed_s / two.elapsed_s},
        "measured": {
            "disk": asdict(costs),
            "loopback": asdict(loop),
            "rest_of_layer_s": {str(tokens): seconds for tokens, seconds in rest_s.items()},
            "passes_s": {part: {str(tokens): s for tokens, s in of.items()} for part, of in passes_s.items()},
        },
    }


def speedup_of_two(path: Path) -> float | None:
    """What two processes of this machine gained over one in benchmarks.tensor_parallel, where that has been run."""
    if not path.exists():
        return None
    times_s = {
        row["variant"]: row["pass_s"]["median"] for row in json.loads(path.read_text())["rows"] if "pass_s" in row
    }
    return float(times_s["one rank"] / times_s["two ranks"])


if __name__ == "__main__":
    main()
