"""What every benchmark needs: the machine in words, watched processes, ratios, result files."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cgroup import MemoryGroup

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_INTERVAL_S = 0.02
PACKAGES = ("torch", "safetensors", "transformers", "accelerate", "llama-cpp-python", "pylomin")


def describe_machine() -> dict[str, Any]:
    """Hardware and versions that a result depends on. Does not import torch."""
    return {
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


OUT_OF_MEMORY = "out of memory"


class WorkerError(RuntimeError):
    """A measured process failed; the message holds the end of what it wrote to stderr."""


@dataclass(frozen=True)
class WorkerRun:
    """What a measured process reported, and its resident set size as seen from outside."""

    report: dict[str, Any]
    samples: list[tuple[float, int]]
    """(seconds since the epoch, bytes), every ``SAMPLE_INTERVAL_S``"""


def run_worker(arguments: Sequence[str], *, timeout_s: float = 600, group: MemoryGroup | None = None) -> WorkerRun:
    """Run ``python *arguments`` in a process of its own; the last line of its output is JSON.

    Raises:
        WorkerError: the process failed, was killed or ran past ``timeout_s``. Where the limit of ``group`` killed
            it, the last line of the message is ``OUT_OF_MEMORY``.
    """
    samples: list[tuple[float, int]] = []
    deadline = time.monotonic() + timeout_s
    command = [sys.executable, *arguments]
    with (
        subprocess.Popen(
            command if group is None else group.wrap(command),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)  # before waiting for it; without effect once it has ended
        watched = psutil.Process(process.pid)
        while True:
            try:
                output, errors = process.communicate(timeout=SAMPLE_INTERVAL_S)
                break
            except subprocess.TimeoutExpired:
                with contextlib.suppress(psutil.Error):
                    samples.append((time.time(), watched.memory_info().rss))
                if time.monotonic() > deadline:
                    process.kill()
                    process.communicate()
                    raise WorkerError(f"{shlex.join(arguments)} ran\nlonger than {timeout_s:.0f} s") from None
    if process.returncode == -signal.SIGKILL and group is not None and group.killed():
        raise WorkerError(f"{shlex.join(arguments)} exited for want of memory:\n{OUT_OF_MEMORY}")
    if process.returncode != 0:
        raise WorkerError(f"{shlex.join(arguments)} exited with {process.returncode}:\n{errors[-2000:]}")
    return WorkerRun(json.loads(output.splitlines()[-1]), samples)


def run_rounds(
    commands: Mapping[str, Sequence[str]],
    rounds: int,
    deadline: float,
    *,
    first: Sequence[str] = (),
    run: Callable[[str, Sequence[str]], WorkerRun] | None = None,
    after_round: Callable[[Mapping[str, list[WorkerRun]], Mapping[str, str]], None] | None = None,
) -> tuple[dict[str, list[WorkerRun]], dict[str, str]]:
    """Run every command once a round, in turn; a command that failed is left out from then on.

    Args:
        commands: what is compared: name to arguments of ``run_worker``.
        rounds: how many rounds to run.
        deadline: on the clock of ``time.perf_counter``; a round that would end later is not begun,
            except the first one.
        first: further arguments in the first round, for what need not be measured more than once.
        run: called with name and arguments instead of ``run_worker``, for what needs preparing.
        after_round: called with what will be returned, as it is so far.

    Returns:
        The runs of each command, and the last line of the error of those that failed.
    """
    runs: dict[str, list[WorkerRun]] = {name: [] for name in commands}
    failures: dict[str, str] = {}
    start = time.perf_counter()
    for done in range(rounds):
        now = time.perf_counter()
        if done and now + (now - start) / done > deadline:
            print(f"Stopping after {done} of {rounds} rounds, for the limit on time.")
            break
        for name, command in commands.items():
            if name in failures:
                continue
            print(f"round {done + 1}: {name}", flush=True)
            try:
                options = [*command, *(first if done == 0 else ())]
                runs[name].append(run(name, options) if run else run_worker(options))
            except WorkerError as error:
                print(error, file=sys.stderr)
                failures[name] = str(error).splitlines()[-1]
        if after_round is not None:
            after_round(runs, failures)
    return runs, failures


def time_call(function: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls."""
    times_s = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times_s.append(time.perf_counter() - start)
    return times_s


@dataclass(frozen=True)
class Spread:
    """Median of repeated measurements, with the smallest and the largest."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ``statistics.StatisticsError`` for an empty sequence."""
        return cls(statistics.median(values), min(values), max(values))


def paired_ratios(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """Spread of ``value / reference``, round by round.

    The rounds alternate between what is compared, so a slow spell of the machine hits both of a
    pair and cancels.
    """
    return Spread.of([value / other for value, other in zip(values, reference, strict=True)])


def read_rate(*paths: Path) -> float:
    """Bytes per second of one sequential read, which also leaves the files in the page cache."""
    buffer = bytearray(16 << 20)  # 16 MiB
    start = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return sum(path.stat().st_size for path in paths) / (time.perf_counter() - start)


def status_bytes(field: str) -> int:
    """A field of ``/proc/self/status``: ``VmRSS`` is resident now, ``VmHWM`` the most since the program began.

    Not getrusage, whose peak begins with that of the parent process.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, text = line.partition(":")
            if name == field:
                return int(text.split()[0]) << 10
    except OSError:
        pass
    raise SystemExit(f"this benchmark reads {field} from /proc/self/status, which is not there; run it on Linux")


def write_result(path: Path, settings: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``results`` with all that is needed to repeat them, as JSON; return the document."""
    document = {
        "command": shlex.join(["python", "-m", _main_module(), *sys.argv[1:]]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "settings": dict(settings),
        **results,
    }
    text = json.dumps(document, indent=2)
    # Lists of numbers on one line each.
    text = re.sub(r"\[[\s\d.,eE+-]+\]", lambda match: re.sub(r"\s+", " ", match[0]).replace("[ ", "["), text).replace(
        " ]", "]"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_text(text + "\n")
    scratch.replace(path)
    return document


def commit() -> str | None:
    """The commit that is checked out, with "-dirty" where code differs from it; None outside of a repository."""
    try:
        found = _git("rev-parse", "--short=12", "HEAD")
        # Results of other benchmarks, and the tables made of them, change nothing that is measured.
        changed = _git("status", "--porcelain", "--", ":!docs", ":!*.md")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{found}-dirty" if changed else found


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return run.stdout.strip()


def _main_module() -> str:
    return Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
