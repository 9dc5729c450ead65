"""On a GPU: how fast do models run whose weights come from disk or from host memory, and in how much device memory?

The speed of copies from pinned host memory is the bound. A BERT, as the first benchmark of this project measured it;
and a Llama of 8.6 GB in bfloat16, prefill and decode, at budgets from a tenth of its weights to all of them, beside
accelerate and diffusers. Needs a CUDA device, 10 GiB of disk and 20 GiB of host memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, LlamaConfig

from benchmarks import gpu_device, gpu_work
from benchmarks.checkpoints import random_checkpoint
from benchmarks.common import WorkerRun, run_rounds, run_worker
from benchmarks.gpu_rows import Task, against_peers, bandwidth_of, overlap, rows_of, tasks
from benchmarks.llama import index_for_accelerate, llama_config
from benchmarks.plots import plot_speed_against_device_memory, plot_timeline
from benchmarks.suite import Options, finish, parse, save
from examples.bert import SIZES as BERTS

NEEDED_BYTES = 11 << 30  # 11 GiB: both checkpoints
WORKER_S = 300
LLAMAS = {
    "full": llama_config(32_000, 4096, 11_008, 20, 32, 4096),
    "tiny": llama_config(2_000, 64, 176, 4, 2, 256),
}
REQUIRED = ("bandwidth: pinned host to device", "prefill: resident", "decode: resident")


def work(task: Task, size: str, directory: Path) -> dict[str, Any]:
    """One row, in this process."""
    if task.work == "bandwidth":
        return gpu_work.bandwidth(size)
    if task.work.startswith("BERT"):
        return gpu_work.bert(task, BERTS[size], directory / "bert" / "model.safetensors")
    weights = directory / "llama" / "model.safetensors"
    if task.work == "timeline":
        return gpu_work.timeline(task, LLAMAS[size], weights, size)
    return gpu_work.generate(task, LLAMAS[size], weights, size)


def prepare(bert: BertConfig, llama: LlamaConfig, directory: Path) -> None:
    """Write the checkpoints, tensor by tensor, unless they are there."""
    recipe = f"BertModel {bert.to_json_string(use_diff=True)}"
    random_checkpoint(lambda: BertModel(bert), recipe, directory / "bert" / "model.safetensors")
    recipe = f"LlamaForCausalLM bfloat16 {llama.to_json_string(use_diff=True)}"
    weights = directory / "llama" / "model.safetensors"
    random_checkpoint(lambda: gpu_work.llama(llama), recipe, weights)
    index_for_accelerate(weights, weights.parent / "accelerate", dtype="bfloat16")


def main() -> None:
    """Measure and write the result; refuse where there is no GPU."""
    options = parse("gpu", __doc__, rounds=3, limit_s=3600)
    if not torch.cuda.is_available():
        raise SystemExit(
            f"benchmarks.gpu measures a CUDA device, and torch {torch.__version__} finds none here "
            f"(built for CUDA {torch.version.cuda}). Run it on a machine with an NVIDIA GPU and a CUDA build of torch."
        )
    directory = options.directory("gpu")
    if options.worker:
        print(json.dumps(work(Task(**options.worker), options.size, directory)))
        return
    measure(options, directory)


def measure(options: Options, directory: Path) -> None:
    """Run all rows in turn."""
    options.make_room("gpu", NEEDED_BYTES)
    prepare(BERTS[options.size], LLAMAS[options.size], directory)
    all_tasks = tasks()
    commands = {
        task.name: ["-m", "benchmarks.gpu", "--size", options.size, "--worker", json.dumps(asdict(task))]
        for task in all_tasks
    }

    def report(runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]) -> None:
        write(options, all_tasks, runs, failures)

    _, failures = run_rounds(
        commands,
        options.rounds,
        options.deadline,
        run=lambda name, arguments: run_worker(arguments, timeout_s=WORKER_S),
        after_round=report,
    )
    finish(options, failures, required=REQUIRED)


def write(
    options: Options, all_tasks: list[Task], runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]
) -> None:
    """The result so far, and its pictures."""
    rows = rows_of(all_tasks, runs, failures)
    bandwidth = bandwidth_of(runs)
    llama = LLAMAS[options.size]
    settings = {
        "model": f"BertModel of 1.6 GiB, LlamaForCausalLM of {gpu_work.size_of(llama) / 1e9:.1f} GB in bfloat16",
        "input": f"BERT: 512 tokens; prefill: {gpu_work.PREFILL_TOKENS[options.size]} tokens; decode: batch 1",
        "file_state": "cached",
        "device": gpu_device.gpu.name,
        "conditions": [
            gpu_device.gpu.name,
            "bound: the larger of the resident model's time and the bytes copied ÷ the speed of copies from pinned "
            "memory",
        ],
    }
    results: dict[str, Any] = {
        "rows": rows,
        "bandwidth_bytes_per_s": bandwidth,
        "times_as_fast_as_peers_in_their_memory": against_peers(rows),
    }
    seen = [run.report for of_task in runs.values() for run in of_task if "copies_ms" in run.report]
    if seen:
        results["timeline"] = seen[-1]
        results["copies_overlapped"] = overlap(seen[-1]["copies_ms"], seen[-1]["layers_ms"])
        plot_timeline(seen[-1]["copies_ms"], seen[-1]["layers_ms"], options.output / "gpu_timeline.png")
    plot_speed_against_device_memory(rows, options.output / "gpu.png")
    save(options, settings, results)


if __name__ == "__main__":
    main()
