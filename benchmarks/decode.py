"""How fast does a model decode that does not fit, at every budget from a mere window to everything?

Llama-shaped, 2.3 GB of float32 streamed for each token, batch 1, file cold. At 800 MiB, in a memory group of 1.4 GB
(page cache counted), against transformers, accelerate and llama.cpp under the same limit; at other budgets, in groups
that grow with the budget. The resident model, without a limit, says how long computing takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import pylomin
from benchmarks.common import WorkerRun, paired_ratios
from benchmarks.llama import NEEDED_BYTES, PEERS, Decoder, checkpoint, offloaded, prepare, run_benchmark
from benchmarks.passes import Report
from benchmarks.plots import plot_speed_against_budget
from benchmarks.rows import pass_s
from benchmarks.suite import Conditions, Options, Variant, finish, rows_of, run_variants, save
from pylomin.io.sizes import format_bytes

PROMPT_TOKENS = 8
WARM_UP_TOKENS = 2  # the order of the weights is known, and what stays has been loaded
TOKENS = 6
INPUT = f"{TOKENS} tokens at batch 1, every other one after {PROMPT_TOKENS + WARM_UP_TOKENS}"
LIMIT_BYTES = 1_400_000_000  # 1.4 GB
BUDGET_BYTES = 800 << 20  # 800 MiB
ABOVE_BUDGET_BYTES = LIMIT_BYTES - BUDGET_BYTES
PIECE_BYTES = 44 << 20  # 44 MiB, the largest weights of a layer
WINDOW_BYTES = 64 << 20  # 64 MiB; a smaller budget would be for its own sake
SHARES = (0.55, 0.8)  # of all weights, between 800 MiB and everything


def work(variant: str, memory_budget: int | None, config: LlamaConfig, directory: Path) -> dict[str, Any]:
    """One variant in this process."""
    is_offloaded = variant not in PEERS
    report = Report(checkpoint(directory) if is_offloaded else None, piece_bytes=PIECE_BYTES)
    decoder = offloaded(config, directory, memory_budget) if is_offloaded else PEERS[variant](config, directory)
    decode(decoder, report, config, directory, is_reference=variant == "resident")
    report.measure_together(decoder.model)
    return report.fields


def decode(
    decoder: Decoder, report: Report, config: LlamaConfig, directory: Path, *, is_reference: bool = False
) -> None:
    """Prompt, warm-up, and the tokens that are measured: the same for every variant, whatever it answers."""
    count = PROMPT_TOKENS + WARM_UP_TOKENS + 2 * TOKENS + 2  # two more: to compare, and for the memory of tensors
    tokens = torch.randint(3, config.vocab_size, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    rest = iter(tokens[PROMPT_TOKENS:])
    with torch.inference_mode():
        decoder(tokens[:PROMPT_TOKENS])
        for _ in range(WARM_UP_TOKENS):
            decoder([next(rest)])
        report.paired_passes(lambda: decoder([next(rest)]), TOKENS, decoder.model)
        logits = decoder([next(rest)])
        report.finish(lambda: decoder([next(rest)]), decoder.model)
    report.compare(logits, directory / "resident-logits.safetensors", is_reference=is_reference)


def budgets(config: LlamaConfig, directory: Path) -> list[int]:
    """Five, from a window to everything."""
    weights_bytes = checkpoint(directory).stat().st_size
    window_bytes = min(max(smallest_budget(config, directory), WINDOW_BYTES), weights_bytes)
    between = [min(BUDGET_BYTES, weights_bytes // 3), *(int(share * weights_bytes) for share in SHARES)]
    # A little above everything: blocks of memory are rounded up to pages.
    return [window_bytes, *between, weights_bytes + (4 << 20)]


def smallest_budget(config: LlamaConfig, directory: Path) -> int:
    """The smallest budget that works, which is what pylomin says when it refuses a smaller one."""
    try:
        offloaded(config, directory, 1)
    except pylomin.BudgetError as error:
        if found := re.search(r"at least (\d+)", str(error)):
            return int(found[1])
        raise
    return 1


def variants(of_budgets: list[int]) -> list[Variant]:
    """The peers at 1.4 GB, and pylomin at every budget."""
    result = [
        Variant(name, worker(name, None), limit_bytes, {"limit_bytes": limit_bytes})
        for name in PEERS
        for limit_bytes in [None if name == "resident" else LIMIT_BYTES]
    ]
    for budget in of_budgets:
        name = variant_name(budget)
        limit_bytes = budget + ABOVE_BUDGET_BYTES
        settings = {"budget_bytes": budget, "limit_bytes": limit_bytes}
        result.append(Variant(name, worker(name, budget), limit_bytes, settings))
    return result


def variant_name(budget: int) -> str:
    """What the row of a budget is called."""
    return f"pylomin, {format_bytes(budget)}"


def worker(name: str, budget: int | None) -> dict[str, Any]:
    """What the process of one variant is told."""
    return {"variant": name, "memory_budget": budget}


def against_peers(main: str, runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]) -> dict[str, Any]:
    """How many times as fast the variant ``main`` is as the peers under the same limit, in pairs of a round."""
    if main in failures:
        return {}
    times_s = [pass_s(run) for run in runs[main]]
    return {
        name: vars(paired_ratios([pass_s(run) for run in runs[name]], times_s))
        for name in PEERS
        if name not in failures and name != "resident"
    }


def never_falls(rows: list[dict[str, Any]]) -> bool:
    """Whether speed never falls from one budget to the next larger one, as far as the spread of the rounds tells."""
    times = [row["pass_s"] for row in sorted(rows, key=lambda row: row["budget_bytes"]) if "pass_s" in row]
    return all(later["smallest"] <= earlier["median"] for earlier, later in pairwise(times))


def main() -> None:
    """Measure and write the result."""
    run_benchmark("decode", __doc__, work, measure, rounds=3, limit_s=540)


def measure(options: Options, config: LlamaConfig, directory: Path) -> None:
    """Run all variants."""
    options.make_room("llama", NEEDED_BYTES)
    weights = prepare(config, directory)
    conditions = Conditions(cold=[weights, directory / "model.gguf"])
    of_budgets = budgets(config, directory)
    all_variants = variants(of_budgets)
    main = variant_name(of_budgets[1])

    def report(runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]) -> None:
        settings = {
            "model": f"LlamaForCausalLM, {config.num_hidden_layers} layers, hidden size {config.hidden_size}",
            "input": INPUT,
            "checkpoint_bytes": weights.stat().st_size,
            "file_state": "cold",
            "conditions": sorted(conditions.notes),
        }
        rows = rows_of(all_variants, runs, failures)
        results = {
            "rows": rows,
            "times_as_fast_as": against_peers(main, runs, failures),
            "never_falls": never_falls([row for row in rows if "budget_bytes" in row]),
        }
        plot_speed_against_budget(rows, options.output / "decode.png")
        save(options, settings, results)

    failures = run_variants(options, all_variants, conditions, report)
    finish(options, failures, required=[variant.name for variant in all_variants if variant.name not in PEERS])


if __name__ == "__main__":
    main()
