"""How close to the bound is a model that is read from the disk in every pass, in a small container?

BERT-like, 1.6 GiB, batch 1 × 512 tokens, weight file cold, in a memory group of 500 MiB above what the interpreter
needs with its imports. The resident model, without a limit, says how long computing takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel

import pylomin
from benchmarks.bert import NEEDED_BYTES, tokens
from benchmarks.checkpoints import random_checkpoint
from benchmarks.common import WorkerRun
from benchmarks.passes import Report
from benchmarks.suite import (
    Conditions,
    Options,
    Variant,
    finish,
    interpreter_bytes,
    parse,
    rows_of,
    run_variants,
    save,
)
from examples.bert import SIZES, checkpoint, lazy, prefetched, resident

PASSES = 3
ABOVE_INTERPRETER_BYTES = 500 << 20  # 500 MiB
BUDGET = "300MiB"  # what the container leaves beside hidden states and the rest of the process
FITTED = f"fit, {BUDGET}"


def fitted(config: BertConfig, directory: Path) -> nn.Module:
    """With as much in memory as the container has room for."""
    return pylomin.fit(lazy(config, directory).eval(), BUDGET, args=[tokens(config)])


BUILDERS = {"resident": resident, "lazy": lazy, "lazy + chunked + prefetch": prefetched, FITTED: fitted}


def work(variant: str, config: BertConfig, directory: Path) -> dict[str, Any]:
    """One variant in this process."""
    is_resident = variant == "resident"
    report = Report(None if is_resident else checkpoint(directory))
    model = BUILDERS[variant](config, directory).eval()
    batch = tokens(config)
    with torch.inference_mode():
        output = model(batch).last_hidden_state  # also records the order of the weights
        report.measure_disk(model)
        report.passes(lambda: model(batch), PASSES, model)
        fields = report.finish(lambda: model(batch), model)
    report.compare(output, directory / "resident-output.safetensors", is_reference=is_resident)
    return fields


def limited(name: str, limit_bytes: int | None) -> Variant:
    """The variant ``name`` in a memory group, or outside."""
    return Variant(name, {"variant": name}, limit_bytes, {"limit_bytes": limit_bytes})


def main() -> None:
    """Measure and write the result."""
    options = parse("bert_cold", __doc__, rounds=3, limit_s=180)
    config, directory = SIZES[options.size], options.directory("bert")
    if options.worker:
        print(json.dumps(work(options.worker["variant"], config, directory)))
        return
    measure(options, config, directory)


def measure(options: Options, config: BertConfig, directory: Path) -> None:
    """Run all variants."""
    options.make_room("bert", NEEDED_BYTES)
    weights = random_checkpoint(
        lambda: BertModel(config), f"BertModel {config.to_json_string(use_diff=True)}", checkpoint(directory)
    )
    conditions = Conditions(cold=[weights])
    own_bytes = interpreter_bytes("benchmarks.bert_cold", conditions)
    limit_bytes = own_bytes + ABOVE_INTERPRETER_BYTES
    variants = [limited(name, None if name == "resident" else limit_bytes) for name in BUILDERS]

    def report(runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]) -> None:
        settings = {
            "model": f"BertModel, {config.num_hidden_layers} layers, hidden size {config.hidden_size}",
            "input": "batch 1 x 512 tokens",
            "checkpoint_bytes": weights.stat().st_size,
            "file_state": "cold",
            "interpreter_bytes": own_bytes,
            "conditions": sorted(conditions.notes),
        }
        save(options, settings, {"rows": rows_of(variants, runs, failures)})

    finish(options, run_variants(options, variants, conditions, report), required=BUILDERS)


if __name__ == "__main__":
    main()
