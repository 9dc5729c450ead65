"""Run benchmarks, each in a process of its own: ``python -m benchmarks.run [NAME ...]``."""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.common import ROOT

# Name: (the question, arguments of python)
BENCHMARKS: dict[str, tuple[str, list[str]]] = {
    "demo": (
        "Memory and speed of a 1.6 GiB BERT: resident, offloaded, and under accelerate",
        ["-m", "examples.bert", "--output", "benchmarks/results"],
    ),
    "module_overhead": (
        "Time that a rewritten module adds to each call",
        ["-m", "benchmarks.module_overhead"],
    ),
    "quantize": (
        "Size and error of each scheme; speed and memory of quantising",
        ["-m", "benchmarks.quantize"],
    ),
    "training_checkpoints": (
        "Size of differences, waiting for saves, resuming, and kills in the middle of them",
        ["-m", "benchmarks.training_checkpoints"],
    ),
}


def main() -> None:
    """Run the benchmarks that are named, or all; fail if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - BENCHMARKS.keys():
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if arguments.list:
        for name, (question, _) in BENCHMARKS.items():
            print(f"{name:20} {question}")
        return
    failed = []
    for name in arguments.names or BENCHMARKS:
        question, command = BENCHMARKS[name]
        print(f"--- {name}: {question}", flush=True)
        if subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode != 0:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
