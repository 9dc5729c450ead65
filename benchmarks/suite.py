"""What the benchmark scripts share: their options, and running their variants cold or under a memory limit."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cgroup import GroupUnavailableError, memory_group
from benchmarks.columns import caption
from benchmarks.common import ROOT, WorkerRun, run_rounds, run_worker, write_result
from benchmarks.disk import drop_caches
from benchmarks.rows import summarise
from benchmarks.tables import RESULTS, fill_all, table

DIRECTORY = ROOT / ".bench"
DISK_BYTES = 8 << 30  # 8 GiB for the checkpoints of all benchmarks together


@dataclass(frozen=True)
class Options:
    """How one benchmark was asked to run."""

    name: str
    size: str
    rounds: int
    deadline: float  # on the clock of time.perf_counter
    output: Path
    publish: bool
    worker: dict[str, Any] | None  # this process is to measure this, not to run the benchmark

    @property
    def result(self) -> Path:
        return self.output / f"{self.name}.json"

    def make_room(self, checkpoint: str, needed_bytes: int) -> None:
        """Make :meth:`directory`; ``needed_bytes`` are those of the full size."""
        make_room(self.directory(checkpoint), needed_bytes if self.size == "full" else 0)

    def directory(self, checkpoint: str) -> Path:
        """Where a checkpoint and what is made of it are kept."""
        return DIRECTORY / self.size / checkpoint


def parse(name: str, description: str | None, *, rounds: int, limit_s: float) -> Options:
    """Read the options that every script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: does it work at all?")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--limit", type=float, default=limit_s, help="seconds after which no further round begins")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--publish", action="store_true", help="result to docs/results, tables filled in")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # So that being ended also ends the worker and removes its memory group.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if arguments.publish and arguments.size != "full":
        parser.error("--publish is for --size full")
    return Options(
        name,
        arguments.size,
        arguments.rounds,
        time.perf_counter() + arguments.limit,
        RESULTS if arguments.publish else arguments.output.resolve(),
        arguments.publish,
        arguments.worker,
    )


@dataclass(frozen=True)
class Variant:
    """One row: what its worker is told, and under which conditions it runs."""

    name: str
    worker: Mapping[str, Any]
    limit_bytes: int | None = None  # of the memory group; None: no group
    settings: Mapping[str, Any] = field(default_factory=dict)  # what the row says besides


@dataclass
class Conditions:
    """What was done to the machine, in words, for the result."""

    cold: Sequence[Path] = ()
    notes: set[str] = field(default_factory=set)

    def run(self, arguments: Sequence[str], limit_bytes: int | None, *, timeout_s: float = 300) -> WorkerRun:
        """One worker, cold and limited as asked; what the system does not allow is noted."""
        if self.cold:
            self.notes.add(drop_caches(self.cold))
        with ExitStack() as stack:
            group = None
            if limit_bytes is not None:
                try:
                    group = stack.enter_context(memory_group(limit_bytes))
                except GroupUnavailableError as error:
                    self.notes.add(str(error))
            run = run_worker(arguments, timeout_s=timeout_s, group=group)
            if group is not None and (peak_bytes := group.peak_bytes()) is not None:
                run.report["group_peak_bytes"] = peak_bytes
        return run


def run_variants(
    options: Options,
    variants: Sequence[Variant],
    conditions: Conditions,
    report: Callable[[Mapping[str, list[WorkerRun]], Mapping[str, str]], None],
) -> dict[str, str]:
    """Run all variants in turn, round after round; returns what failed and why.

    ``report`` gets what there is after every round, so that an interrupted benchmark leaves a result behind. The
    variant "resident" is what others are compared with; without it there is nothing to report.
    """
    limits = {variant.name: variant.limit_bytes for variant in variants}
    commands = {
        variant.name: [
            "-m",
            f"benchmarks.{options.name}",
            "--size",
            options.size,
            "--worker",
            json.dumps(variant.worker),
        ]
        for variant in variants
    }
    _, failures = run_rounds(
        commands,
        options.rounds,
        options.deadline,
        run=lambda name, arguments: conditions.run(arguments, limits[name]),
        after_round=lambda runs, failures: None if "resident" in failures else report(runs, failures),
    )
    return failures


def rows_of(
    variants: Sequence[Variant], runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row for every variant, also for those that failed."""
    return [
        {"variant": variant.name, **variant.settings, "error": failures[variant.name]}
        if variant.name in failures
        else summarise(variant.name, runs[variant.name], runs["resident"], variant.settings)
        for variant in variants
    ]


def interpreter_bytes(module: str, conditions: Conditions) -> int:
    """Memory of a process that has only imported ``module``: what is there before any weight."""
    script = f"import {module}, json; from {{}} as needed; print(json.dumps({{{{'bytes': needed()}}}}))"
    try:
        with memory_group(None) as group:
            drop_caches(conditions.cold)  # what other processes brought in would not count here
            own = "benchmarks.cgroup import own_process_bytes"
            return int(run_worker(["-c", script.format(own)], group=group).report["bytes"])
    except GroupUnavailableError as error:
        conditions.notes.add(str(error))
        seen = "pylomin.measure import process_bytes"
        return int(run_worker(["-c", script.format(seen)]).report["bytes"])


def make_room(directory: Path, needed_bytes: int) -> Path:
    """``directory``, made; checkpoints that were not used for the longest time go if they would not all fit."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "used").touch()
    kept = sorted(
        (other for other in DIRECTORY.glob("*/*") if other != directory and other.is_dir()),
        key=lambda other: (other / "used").stat().st_mtime if (other / "used").exists() else 0,
    )
    while kept and needed_bytes + sum(map(_size_bytes, kept)) > DISK_BYTES:
        print(f"Removing {kept[0]}", flush=True)
        shutil.rmtree(kept.pop(0))
    return directory


def _size_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def save(options: Options, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write the result."""
    write_result(options.result, {"size": options.size, **settings}, results)


def finish(options: Options, failures: Mapping[str, str], required: Iterable[str] = ("resident",)) -> None:
    """Show the result, fill in the tables if asked; exit with an error if what may not fail did."""
    if options.result.exists():
        result = json.loads(options.result.read_text())
        text = f"{table(options.name, result)}\n\n{caption(options.name, result)}"
        print(f"\n{text}\n\nWritten: {options.result}\n", flush=True)
    if options.publish:
        fill_all()
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if broken := set(required) & failures.keys():
        raise SystemExit(f"failed: {', '.join(sorted(broken))}")
