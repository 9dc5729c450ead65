"""How close to the speed of the line is the first pass over weights on a server, and is the second one local?

Llama-shaped, 2.5 GB of float32, 64 tokens at a time, from nginx behind a line of 100 MB/s. The first pass begins with
an empty cache; the second is one of another process, with what the first one has left. Beside them the resident model
and the same weights in a local file, cached.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pylomin
from benchmarks.checkpoints import random_checkpoint
from benchmarks.common import Spread, WorkerRun, paired_ratios, read_rate
from benchmarks.line import Line, serve
from benchmarks.llama import SIZES, Decoder, TorchDecoder, checkpoint, offloaded, resident
from benchmarks.passes import Report
from benchmarks.rows import pass_s
from benchmarks.suite import Conditions, Options, Variant, finish, parse, rows_of, run_variants, save

TOKENS = 64
PASSES = 3
LINE_BYTES_PER_S = {"full": 100e6, "tiny": 4e6}
BUDGET_BYTES = 800 << 20  # 800 MiB
NEEDED_BYTES = 6 << 30  # 6 GiB: the checkpoint, and what is kept of it
FIRST, SECOND, LOCAL = "remote, first pass", "remote, second pass", "local file"


def work(
    variant: str, url: str, cache_dir: str, config: LlamaConfig, directory: Path, memory_budget: int
) -> dict[str, Any]:
    """One variant in this process."""
    report = Report()
    tokens = torch.randint(3, config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        decoder = build(variant, url, cache_dir, config, directory, memory_budget)
        outputs: list[torch.Tensor] = []

        def run() -> None:
            decoder._cache = None  # the same tokens each time
            outputs.append(decoder(tokens))

        if variant != FIRST:
            run()  # the order is known, and what stays has been loaded
        report.fields["passes_began_s"] = time.time()
        report.passes(run, 1 if variant == FIRST else PASSES, decoder.model)
        report.fields["passes_ended_s"] = time.time()
        report.finish(run, None if variant == FIRST else decoder.model)
    report.compare(outputs[-1], directory / "resident-64-logits.safetensors", is_reference=variant == "resident")
    return report.fields


def build(
    variant: str, url: str, cache_dir: str, config: LlamaConfig, directory: Path, memory_budget: int
) -> TorchDecoder:
    """The model of one variant."""
    made: Decoder
    if variant == "resident":
        made = resident(config, directory)
    elif variant == LOCAL:
        made = offloaded(config, directory, memory_budget)
    else:
        store = pylomin.open_store(url, cache_dir=cache_dir)
        model = pylomin.load(lambda: LlamaForCausalLM(config), store, memory_budget=memory_budget)
        made = TorchDecoder(pylomin.prefetch(model))
    assert isinstance(made, TorchDecoder)
    return made


def line_fields(runs: Sequence[WorkerRun], line: Line) -> dict[str, Any]:
    """What the line carried during the passes."""
    carried, shares = [], []
    for run in runs:
        began_s, ended_s = run.report["passes_began_s"], run.report["passes_ended_s"]
        carried.append(line.carried(began_s, ended_s))
        shares.append(carried[-1] / (ended_s - began_s) / line.bytes_per_s)
    return {"line_bytes": max(carried), "share_of_line": asdict(Spread.of(shares))}


def main() -> None:
    """Measure and write the result."""
    options = parse("remote", __doc__, rounds=3, limit_s=300)
    config, directory = SIZES[options.size], options.directory("llama")
    if options.worker:
        print(json.dumps(work(**options.worker, config=config, directory=directory)))
        return
    measure(options, config, directory)


def measure(options: Options, config: LlamaConfig, directory: Path) -> None:
    """Run all variants."""
    options.make_room("llama", NEEDED_BYTES)
    recipe = f"LlamaForCausalLM {config.to_json_string(use_diff=True)}"
    weights = random_checkpoint(lambda: LlamaForCausalLM(config), recipe, checkpoint(directory))
    cache = directory / "remote-cache"
    budget = BUDGET_BYTES if options.size == "full" else weights.stat().st_size // 2
    with serve(weights.parent, directory / "nginx", LINE_BYTES_PER_S[options.size]) as line:
        told = {
            "url": f"http://127.0.0.1:{line.port}/{weights.name}",
            "cache_dir": str(cache),
            "memory_budget": budget,
        }
        variants = [Variant(name, {"variant": name, **told}) for name in ("resident", LOCAL, FIRST, SECOND)]
        conditions = _Emptied(cache, FIRST, weights)

        def report(runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]) -> None:
            settings = {
                "model": f"LlamaForCausalLM, {config.num_hidden_layers} layers, hidden size {config.hidden_size}",
                "input": f"{TOKENS} tokens at batch 1",
                "checkpoint_bytes": weights.stat().st_size,
                "file_state": "as each row says",
                "line_bytes_per_s": line.bytes_per_s,
                "memory_budget_bytes": budget,
                "conditions": sorted(conditions.notes),
            }
            rows = rows_of(variants, runs, failures)
            for row in rows:
                if row["variant"] in (FIRST, SECOND) and "error" not in row:
                    row |= line_fields(runs[row["variant"]], line)
            results: dict[str, Any] = {"rows": rows}
            if not {LOCAL, SECOND} & failures.keys():
                ratio = paired_ratios([pass_s(run) for run in runs[LOCAL]], [pass_s(run) for run in runs[SECOND]])
                results["speed_ratios"] = {f"{SECOND} ÷ {LOCAL}": asdict(ratio)}
            save(options, settings, results)

        failures = run_variants(options, variants, conditions, report)
    shutil.rmtree(cache, ignore_errors=True)
    finish(options, failures, required=[variant.name for variant in variants])


class _Emptied(Conditions):
    """The cache is empty before one of the variants; the weight file is in the page cache before all of them."""

    def __init__(self, cache: Path, before: str, weights: Path) -> None:
        super().__init__()
        self._cache, self._before, self._weights = cache, before, weights

    def run(self, arguments: Sequence[str], limit_bytes: int | None, *, timeout_s: float = 300) -> WorkerRun:
        if json.loads(arguments[-1])["variant"] == self._before:
            shutil.rmtree(self._cache, ignore_errors=True)
        read_rate(self._weights)
        return super().run(arguments, limit_bytes, timeout_s=timeout_s)


if __name__ == "__main__":
    main()
