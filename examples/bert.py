"""Run a BERT of 1.6 GiB in several ways and compare their memory and speed: ``make demo``.

Each variant runs in a process of its own. The variants take turns, round after round, so that a
slow spell of the machine hits all of them. The checkpoint is written tensor by tensor on the first
run and kept in ``.demo/``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import disk_offload, init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel

import pylomin
from benchmarks.checkpoints import accelerate_folder, random_checkpoint
from benchmarks.common import (
    ROOT,
    Spread,
    WorkerRun,
    paired_ratios,
    read_rate,
    run_rounds,
    time_call,
    write_result,
)
from benchmarks.plots import plot_memory_over_time, plot_speed_against_memory
from benchmarks.tables import RESULTS, demo_caption, demo_table, fill_all

EMBEDDING = "embeddings.word_embeddings"
SIZES = {
    "full": BertConfig(
        vocab_size=119_547,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
    ),
    "tiny": BertConfig(
        vocab_size=5_000,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
    ),
}
TIMED_PASSES = 2


# --- The variants: from a config and a directory with the checkpoint to a model ready to run.


def resident(config: BertConfig, directory: Path) -> nn.Module:
    """All weights in ordinary memory: what the other variants are compared with."""
    with init_empty_weights(include_buffers=False):
        model: nn.Module = BertModel(config)
    weights = {}
    for name in model.state_dict():
        # Opened for each weight, and copied: a mapped file would count as memory of this process.
        with safe_open(checkpoint(directory), "pt") as file:
            weights[name] = file.get_tensor(name).clone()
    model.load_state_dict(weights, assign=True)
    return model


def lazy(config: BertConfig, directory: Path) -> nn.Module:
    """Every weight stays in the file and is in memory only while its module runs."""
    model: nn.Module = pylomin.load(lambda: BertModel(config), checkpoint(directory))
    return model


def kept_embedding(config: BertConfig, directory: Path) -> nn.Module:
    """As ``lazy``, with the word embedding kept in memory."""
    with init_empty_weights(include_buffers=False):
        model: nn.Module = BertModel(config)
    embedding = model.get_submodule(EMBEDDING)
    with safe_open(checkpoint(directory), "pt") as file:
        weight = file.get_tensor(f"{EMBEDDING}.weight").clone()
    embedding.load_state_dict({"weight": weight}, assign=True)
    return pylomin.lazy_loading(model, weights=checkpoint(directory), skip_modules=[embedding])


def chunked_embedding(config: BertConfig, directory: Path) -> nn.Module:
    """As ``lazy``, with a word embedding of chunks that load when one of their rows is needed."""
    model = lazy(config, directory)
    return pylomin.chunked_embedding(model, target_module_name=EMBEDDING, chunk_size=2048)


def prefetched(config: BertConfig, directory: Path) -> nn.Module:
    """As ``chunked_embedding``, and the next layer loads while this one computes."""
    return pylomin.prefetch(chunked_embedding(config, directory))


def accelerate(config: BertConfig, directory: Path) -> nn.Module:
    """The same model under accelerate, from the folder that its ``disk_offload`` keeps."""
    with init_empty_weights(include_buffers=False):
        model: nn.Module = BertModel(config)
    disk_offload(model, str(directory / "accelerate"), execution_device=torch.device("cpu"))
    return model


def checkpoint(directory: Path) -> Path:
    """Where the weights are."""
    return directory / "model.safetensors"


VARIANTS: dict[str, Callable[[BertConfig, Path], nn.Module]] = {
    "resident": resident,
    "lazy": lazy,
    "lazy + kept embedding": kept_embedding,
    "lazy + chunked embedding": chunked_embedding,
    "lazy + chunked + prefetch": prefetched,
    "accelerate disk_offload": accelerate,
}


# --- One variant, in a process of its own


def work(name: str, config: BertConfig, directory: Path, measure_memory: bool) -> dict[str, Any]:
    """Build one variant and run it; report times, memory and the difference from resident."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (1, 512), generator=generator)
    report: dict[str, Any] = {"started_s": time.time()}
    model = VARIANTS[name](config, directory).eval()
    with torch.inference_mode():
        output = model(tokens).last_hidden_state  # this pass also records the order of the weights
        report["pass_s"] = time_call(lambda: model(tokens), TIMED_PASSES)
        report["finished_s"] = time.time()
        if measure_memory:
            with pylomin.peak_memory(model) as peak:
                model(tokens)
            report["peak_tensor_bytes"] = peak.tensor_bytes
            report["peak_process_bytes"] = peak.process_bytes
    reference = directory / "resident-output.safetensors"
    if name == "resident":
        save_file({"output": output}, reference)
    report["difference"] = (output - load_file(reference)["output"]).abs().max().item()
    return report


# --- All of them


def summarise(name: str, runs: list[WorkerRun], resident_runs: list[WorkerRun]) -> dict[str, Any]:
    """One row of the table: memory from the first round, speed from all of them."""
    speeds = [1 / statistics.median(run.report["pass_s"]) for run in runs]
    resident_speeds = [1 / statistics.median(run.report["pass_s"]) for run in resident_runs]
    return {
        "variant": name,
        "peak_tensor_bytes": runs[0].report["peak_tensor_bytes"],
        "peak_process_bytes": runs[0].report["peak_process_bytes"],
        "sequences_per_s": asdict(Spread.of(speeds)),
        "share_of_resident": asdict(paired_ratios(speeds, resident_speeds)),
        "largest_difference": max(run.report["difference"] for run in runs),
    }


def memory_line(run: WorkerRun) -> list[tuple[float, float]]:
    """(seconds, GiB) from where the variant is built to the end of its timed passes."""
    start_s, end_s = run.report["started_s"], run.report["finished_s"]
    return [
        (round(at_s - start_s, 3), round(rss_bytes / (1 << 30), 4))
        for at_s, rss_bytes in run.samples
        if start_s <= at_s <= end_s
    ]


def main() -> None:
    """Prepare the checkpoint, run all variants, print the table, write results and pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=225, help="seconds for all of it")
    parser.add_argument("--directory", type=Path, default=ROOT / ".demo", help="for the checkpoint")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--output", type=Path, help="for results (default: beside the checkpoint)")
    parser.add_argument("--publish", action="store_true", help="results to docs/results, README")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.publish and arguments.size != "full":
        parser.error("--publish is for --size full")
    deadline = time.perf_counter() + arguments.limit
    config, directory = SIZES[arguments.size], arguments.directory.resolve() / arguments.size
    if arguments.worker:
        print(json.dumps(work(arguments.worker, config, directory, arguments.memory)))
        return

    recipe = f"BertModel {config.to_json_string(use_diff=True)}"
    weights = random_checkpoint(lambda: BertModel(config), recipe, checkpoint(directory))
    read_rate(*accelerate_folder(weights, directory / "accelerate").iterdir())
    read_rate(weights)  # once to have it in the page cache, once to know how fast that is
    read_bytes_per_s = read_rate(weights)
    options = ["-m", "examples.bert", "--directory", str(arguments.directory.resolve())]
    options += ["--size", arguments.size, "--worker"]
    commands = {name: [*options, name] for name in VARIANTS}
    runs, failures = run_rounds(commands, arguments.rounds, deadline, first=["--memory"])
    if "resident" in failures:
        raise SystemExit("The resident variant failed, so there is nothing to compare with.")

    settings = {
        "model": f"BertModel, {config.num_hidden_layers} layers, hidden size {config.hidden_size}",
        "input": "batch 1 x 512 tokens",
        "checkpoint_bytes": weights.stat().st_size,
        "file_state": "cached",
        "rounds": len(runs["resident"]),
        "passes_per_round": TIMED_PASSES,
    }
    rows: list[dict[str, Any]] = [
        {"variant": name, "error": failures[name]} if name in failures else summarise(name, done, runs["resident"])
        for name, done in runs.items()
    ]
    bound = {
        "compute_s": 1 / rows[0]["sequences_per_s"]["median"],
        "read_s": weights.stat().st_size / read_bytes_per_s,
        "read_bytes_per_s": read_bytes_per_s,
    }
    lines = {name: memory_line(done[0]) for name, done in runs.items() if name not in failures}

    output = RESULTS if arguments.publish else arguments.output or directory
    results = {"rows": rows, "bound": bound, "memory_over_time": lines}
    result = write_result(output / "demo.json", settings, results)
    plot_memory_over_time(lines, output / "demo-memory.png")
    plot_speed_against_memory([row for row in rows if "error" not in row], output / "demo-speed.png")
    print(f"\n{demo_table(result)}\n\n{demo_caption(result)}\n\nWritten: {output}/demo*")
    if arguments.publish:
        fill_all()
    if failures:
        raise SystemExit(f"failed: {', '.join(failures)}")


if __name__ == "__main__":
    main()
