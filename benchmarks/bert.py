"""Does a model whose weights leave memory after each use keep its speed, and how little memory does it take?

BERT-like, 1.6 GiB, batch 1 × 512 tokens, weight file cached, no memory budget. Each pass of an offloaded model is
paired with one of the resident model next to it, in one process, so that both meet the same spell of the machine; each
model also runs in a process of its own, in turn with accelerate, for the memory of the process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel

import pylomin
from benchmarks.checkpoints import accelerate_folder, random_checkpoint
from benchmarks.common import Spread, WorkerRun, paired_ratios, read_rate
from benchmarks.disk import drop_caches
from benchmarks.passes import Report
from benchmarks.plots import plot_memory_over_time
from benchmarks.rows import memory_line, summarise
from benchmarks.suite import Conditions, Options, Variant, finish, parse, run_variants, save
from examples.bert import SIZES, accelerate, checkpoint, chunked_embedding, lazy, resident

PASSES = {"together": 12, "alone": 2}  # "together": pairs of each offloaded model
CHUNK_SIZE = "4MiB"
NEEDED_BYTES = int(3.5 * (1 << 30))  # checkpoint and accelerate's folder


def tiled(config: BertConfig, directory: Path) -> nn.Module:
    """As ``lazy``, with every linear layer run in tiles."""
    model: nn.Module = pylomin.chunked_linear(lazy(config, directory), chunk_size=CHUNK_SIZE)
    return model


TOGETHER: dict[str, Callable[[BertConfig, Path], nn.Module]] = {
    "resident": resident,
    "lazy": lazy,
    "lazy + 4 MiB tiles": tiled,
    "lazy + chunked embedding": chunked_embedding,
}
ALONE = {**TOGETHER, "accelerate disk_offload": accelerate}


def tokens(config: BertConfig) -> torch.Tensor:
    """The input, of shape (1, 512)."""
    return torch.randint(config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(1))


def work_alone(variant: str, config: BertConfig, directory: Path) -> dict[str, Any]:
    """One variant in this process."""
    report = Report()
    model = ALONE[variant](config, directory).eval()
    batch = tokens(config)
    with torch.inference_mode():
        output = model(batch).last_hidden_state  # also records the order of the weights
        report.passes(lambda: model(batch), PASSES["alone"], model)
        fields = report.finish(lambda: model(batch), model)
    report.compare(output, directory / "resident-output.safetensors", is_reference=variant == "resident")
    return fields


def work_together(config: BertConfig, directory: Path) -> dict[str, Any]:
    """All of pylomin's variants in this process, each pass next to one of the resident model, either of them first."""
    models = {name: build(config, directory).eval() for name, build in TOGETHER.items()}
    batch = tokens(config)
    offloaded = [name for name in models if name != "resident"]
    times_s: dict[str, dict[str, list[float]]] = {name: {"resident": [], name: []} for name in offloaded}
    with torch.inference_mode():
        for model in models.values():
            model(batch)
        for turn in range(PASSES["together"]):
            for name in offloaded:
                for one in ("resident", name) if turn % 2 else (name, "resident"):
                    start = time.perf_counter()
                    models[one](batch)
                    times_s[name][one].append(time.perf_counter() - start)
    return {"times_s": times_s}


def paired_times(runs: list[WorkerRun], name: str) -> tuple[list[float], list[float]]:
    """Seconds of the resident model's passes, and of those of ``name`` next to them."""
    pairs = [pair for run in runs for of, pair in run.report["times_s"].items() if name in ("resident", of)]
    resident_s, own_s = ([time_s for pair in pairs for time_s in pair[one]] for one in ("resident", name))
    return resident_s, own_s


def rows(runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row for each variant."""
    result: list[dict[str, Any]] = []
    for name in ALONE:
        if name in failures:
            result.append({"variant": name, "error": failures[name]})
            continue
        row = summarise(name, runs[name], runs["resident"], {})
        if name in TOGETHER and runs["together"]:
            resident_s, own_s = paired_times(runs["together"], name)
            row["pass_s"] = asdict(Spread.of(own_s))
            row["share_of_resident"] = asdict(paired_ratios(resident_s, own_s))
        row["less_memory"] = runs["resident"][0].report["peak_tensor_bytes"] / row["peak_tensor_bytes"]
        result.append(row)
    return result


def main() -> None:
    """Measure and write the result."""
    options = parse("bert", __doc__, rounds=2, limit_s=720)
    config, directory = SIZES[options.size], options.directory("bert")
    if options.worker:
        variant = options.worker["variant"]
        report = work_together(config, directory) if variant == "together" else work_alone(variant, config, directory)
        print(json.dumps(report))
        return
    measure(options, config, directory)


def measure(options: Options, config: BertConfig, directory: Path) -> None:
    """Run all variants."""
    options.make_room("bert", NEEDED_BYTES)
    weights = random_checkpoint(
        lambda: BertModel(config), f"BertModel {config.to_json_string(use_diff=True)}", checkpoint(directory)
    )
    folder = accelerate_folder(weights, directory / "accelerate")
    drop_caches([weights])  # how large the pages of a cached file are depends on how they came there
    read_rate(*folder.iterdir())
    read_rate(weights)
    bandwidth = read_rate(weights)
    conditions = Conditions()

    def report(runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]) -> None:
        settings = {
            "model": f"BertModel, {config.num_hidden_layers} layers, hidden size {config.hidden_size}",
            "input": "batch 1 x 512 tokens",
            "checkpoint_bytes": weights.stat().st_size,
            "file_state": "cached",
            "memory_limit": "none",
            "pairs_of_passes": PASSES["together"] * len(runs["together"]),
            "cached_read_bytes_per_s": bandwidth,
        }
        lines = {name: memory_line(done[0]) for name, done in runs.items() if name in ALONE and name not in failures}
        plot_memory_over_time(lines, options.output / "bert-memory.png")
        save(options, settings, {"rows": rows(runs, failures)})

    names = [*ALONE, "together"]
    failures = run_variants(options, [Variant(name, {"variant": name}) for name in names], conditions, report)
    finish(options, failures, required=[*TOGETHER, "together"])


if __name__ == "__main__":
    main()
