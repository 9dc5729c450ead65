"""Run benchmarks, each in a process of its own: ``python -m benchmarks.run [NAME ...] [OPTION ...]``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import ROOT, commit
from benchmarks.tables import RESULTS

# Name: (the question, arguments of python)
BENCHMARKS: dict[str, tuple[str, list[str]]] = {
    "demo": (
        "Memory and speed of a 1.6 GiB BERT: resident, offloaded, and under accelerate",
        ["-m", "examples.bert"],
    ),
    **{
        name: (question, ["-m", f"benchmarks.{name}"])
        for name, question in {
            "schedule": "Time that planning takes, and how far plans are from the best",
            "module_overhead": "Time that a rewritten module adds to each call",
            "onramps": "Time to open, bytes read and peak memory for a checkpoint of each format",
            "many_tensors": "Time to load a checkpoint of 10,000 tensors",
            "big_linear": "One layer of 1 GiB under a budget of 64 MiB",
            "moe": "Bytes read for each token of a mixture of experts",
            "bert": "Speed and memory of a BERT whose weights leave memory after use, file cached",
            "stages": "Where the time goes that weights in a cached file take",
            "bert_cold": "The same from a cold file in a small container",
            "decode": "Decoding at five budgets, beside transformers, accelerate and llama.cpp",
            "quantized_decode": "Decoding from int8 in a small container, beside float32 and llama.cpp Q8_0",
            "remote": "First and second pass over weights behind a line of 100 MB/s",
            "export_onnx": "Time and memory that exporting a 2 GB model to ONNX takes",
            "save": "Memory and speed of the writers, on a 2 GB checkpoint",
            "from_pretrained": "Memory that loading, running and saving a transformers checkpoint takes",
            "quantize": "Size, error and speed of quantised stores",
            "training_checkpoints": "Training checkpoints: deltas, standing still, kills",
            "fit": "What fit predicts against what is measured",
            "lockstep": "32 inputs in lockstep, beside one at a time",
            "lora": "A step of LoRA fine-tuning under a budget of 300 MiB",
            "readers": "Threads that fill the ring which weights pass through on their way to a GPU",
            "machines": "2 to 64 machines, in simulation from what one of them does",
            "tensor_parallel": "Bytes that each of two ranks reads of a model that is sharded over them",
            "gpu": "A CUDA device: speed and memory of models that stream from disk and from host memory",
        }.items()
    },
}
HARD_LIMIT_S = 900  # of any one; each stops itself long before
LIMITS_S = {"gpu": 2 * 3600}  # of those that take longer
ON_REQUEST = {"demo", "gpu"}  # the one has its own target, the other needs a machine that few have


def main() -> None:
    """Run the benchmarks that are named, or all that need no special machine; fail if one fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="other options go to each benchmark, such as --publish"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all but demo and gpu")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    parser.add_argument("--resume", action="store_true", help="leave out what was measured at this commit already")
    arguments, options = parser.parse_known_args()
    if unknown := set(arguments.names) - BENCHMARKS.keys():
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if arguments.list:
        for name, (question, _) in BENCHMARKS.items():
            print(f"{name:20} {question}")
        return
    results = RESULTS if "--publish" in options else ROOT / "benchmarks" / "results"
    now = commit()
    failed = []
    for name in arguments.names or [name for name in BENCHMARKS if name not in ON_REQUEST]:
        if arguments.resume and _measured_at(results / f"{name}.json", now):
            print(f"--- {name}: measured at {now} already", flush=True)
        elif not _run(name, options):
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _run(name: str, options: list[str]) -> bool:
    question, command = BENCHMARKS[name]
    limit_s = LIMITS_S.get(name, HARD_LIMIT_S)
    print(f"--- {name}: {question}", flush=True)
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *command, *options], cwd=ROOT) as process:
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # which also ends its worker
            print(f"--- {name}: stopped after {limit_s} s", flush=True)
            return False
    print(f"--- {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return process.returncode == 0


def _measured_at(path: Path, commit_now: str | None) -> bool:
    try:
        return commit_now is not None and json.loads(path.read_text()).get("commit") == commit_now
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    main()
