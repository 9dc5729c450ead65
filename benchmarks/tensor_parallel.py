"""Does each of two ranks read half of the shards?

A Llama of the shape of Llama 3.2 1B (hidden size 2048, 8192 inside) in float32, 2.1 GB of linears, sharded by
transformers' own plan over two processes on this machine; file cold. What each process reads from the disk is counted
by the system (``read_bytes`` of ``/proc/self/io``). Both use one disk and half of the processor each: on two machines
each would have its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import pylomin
from benchmarks.checkpoints import random_checkpoint
from benchmarks.common import ROOT, Spread, WorkerRun, paired_ratios
from benchmarks.disk import forget
from benchmarks.llama import checkpoint, llama_config, resident
from benchmarks.passes import Report
from benchmarks.rows import pass_s
from benchmarks.suite import Conditions, Options, Variant, finish, parse, rows_of, run_variants, save
from pylomin.lazy.distributed import is_distributed

SIZES = {
    "full": llama_config(32_000, 2048, 8192, 8, 16, 2048),
    "tiny": llama_config(2_000, 64, 128, 2, 2, 256),
}
NEEDED_BYTES = 3 << 30  # 3 GiB
TOKENS = 32
PASSES = 3
TIMEOUT_S = 60
RANKS = {"one rank": 1, "two ranks": 2}


def rank_of(rank: int, ranks: int, meeting: str, config: LlamaConfig, directory: Path) -> dict[str, Any]:
    """What one of the processes does, and reports."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=timeout)
    sharded: dict[str, Any] = {"tp_plan": "auto", "tp_size": ranks} if ranks > 1 else {}
    model = pylomin.from_pretrained(LlamaForCausalLM, directory, dtype=torch.float32, **sharded)
    report = Report()
    passes(model, config, report, directory)
    replicated = [parameter for parameter in model.parameters() if not is_distributed(parameter)]
    report.fields["replicated_bytes"] = sum(p.nbytes for p in replicated if p.dim() == 1)  # of a table, some rows
    report.fields["finished_s"] = time.time()
    dist.destroy_process_group()
    return report.fields


def passes(model: nn.Module, config: LlamaConfig, report: Report, directory: Path) -> None:
    """Time them, and count what the system reads for them."""
    weights = checkpoint(directory)
    tokens = torch.randint(3, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    pylomin.prefetch(model)
    with torch.inference_mode():
        output = model(input_ids=tokens, use_cache=False).logits
        for _ in range(PASSES):
            dist.barrier()
            forget(weights)
            dist.barrier()
            before, start = disk_bytes(), time.perf_counter()
            model(input_ids=tokens, use_cache=False)
            report.fields["passes"].append({"s": time.perf_counter() - start, "read_bytes": disk_bytes() - before})
    report.fields["reading_mode"] = pylomin.stats(model).reading_mode
    report.compare(output, directory / "tensor-parallel.safetensors")
    report.fields["difference"] /= output.abs().max().item()


def disk_bytes() -> int:
    """What the system has read from the disk for this process."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise SystemExit("this benchmark reads read_bytes from /proc/self/io, which does not have it")


def in_memory(config: LlamaConfig, directory: Path) -> dict[str, Any]:
    """The model in one process, in memory: what the others should answer."""
    report = Report()
    model = resident(config, directory).model
    assert model is not None
    tokens = torch.randint(3, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = model(input_ids=tokens, use_cache=False).logits
        report.passes(lambda: model(input_ids=tokens, use_cache=False), PASSES)
    report.fields["finished_s"] = time.time()
    report.compare(output, directory / "tensor-parallel.safetensors", is_reference=True)
    return report.fields


def together(ranks: int, size: str) -> dict[str, Any]:
    """Start the processes; the report of the first, with what the greediest read in each pass."""
    with tempfile.TemporaryDirectory() as directory:
        commands = [
            {"rank": rank, "ranks": ranks, "meeting": os.path.join(directory, "rendezvous")} for rank in range(ranks)
        ]
        script = [sys.executable, "-m", "benchmarks.tensor_parallel", "--size", size, "--worker"]
        processes = [
            subprocess.Popen([*script, json.dumps(command)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for command in commands
        ]
        try:
            said = [process.communicate(timeout=TIMEOUT_S * 4)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    reports: list[dict[str, Any]] = [json.loads(text.splitlines()[-1]) for text in said]
    first = reports[0]
    for index, one in enumerate(first["passes"]):
        of_ranks = [report["passes"][index] for report in reports]
        one["read_bytes"] = max(other["read_bytes"] for other in of_ranks)
        one["s"] = max(other["s"] for other in of_ranks)
    first["difference"] = max(report["difference"] for report in reports)
    return first


def main() -> None:
    """Measure and write the result."""
    options = parse("tensor_parallel", __doc__, rounds=3, limit_s=300)
    config, directory = SIZES[options.size], options.directory("tensor_parallel")
    if options.worker is None:
        measure(options, config, directory)
        return
    worker = options.worker
    if "rank" in worker:
        print(json.dumps(rank_of(**worker, config=config, directory=directory)))
    else:
        is_resident = "resident" in worker
        print(json.dumps(in_memory(config, directory) if is_resident else together(worker["processes"], options.size)))


def measure(options: Options, config: LlamaConfig, directory: Path) -> None:
    """Run the variants."""
    options.make_room("tensor_parallel", NEEDED_BYTES)
    recipe = f"LlamaForCausalLM {config.to_json_string(use_diff=True)}"
    weights = random_checkpoint(lambda: LlamaForCausalLM(config), recipe, checkpoint(directory))
    config.save_pretrained(directory)
    conditions = Conditions(cold=[weights])
    variants = [
        Variant("resident", {"resident": True}),
        *(Variant(name, {"processes": ranks}) for name, ranks in RANKS.items()),
    ]

    def report(runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]) -> None:
        settings = {
            "model": f"LlamaForCausalLM, {config.num_hidden_layers} layers, hidden size {config.hidden_size}",
            "input": f"1 x {TOKENS} tokens",
            "checkpoint_bytes": weights.stat().st_size,
            "file_state": "cold",
            "conditions": sorted(conditions.notes),
        }
        rows = rows_of(variants, runs, failures)
        for row in rows:
            if row["variant"] in RANKS and "error" not in row:
                row |= read_of(row["variant"], runs)
        save(options, settings, {"rows": rows})

    failures = run_variants(options, variants, conditions, report)
    finish(options, failures, required=[variant.name for variant in variants])


def read_of(variant: str, runs: Mapping[str, list[WorkerRun]]) -> dict[str, Any]:
    """Bytes of the rank that read most, and what it may read: its part of what one rank reads, and what all have."""
    ranks, read, allowed = RANKS[variant], [], []
    for alone, run in zip(runs["one rank"], runs[variant], strict=True):
        replicated = run.report["replicated_bytes"]
        for one, whole in zip(run.report["passes"], alone.report["passes"], strict=True):
            read.append(one["read_bytes"])
            allowed.append((whole["read_bytes"] - replicated) / ranks + replicated)
    times = [pass_s(run) for run in runs[variant]], [pass_s(run) for run in runs["one rank"]]
    return {
        "rank_read_bytes": vars(Spread.of(read)),
        "read_of_allowed": vars(paired_ratios(read, allowed)),
        "time_of_one_rank": vars(paired_ratios(*times)),
    }


if __name__ == "__main__":
    main()
