"""The example for many machines, on this one: job and workers are killed, and the result is what the model gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pyarrow.parquet
import torch
from safetensors.torch import load_file
from transformers import BertModel

from examples.ray_data_embeddings import CONFIG, embed
from pylomin.io.sizes import parse_bytes

ROOT = Path(__file__).resolve().parent.parent
ROWS, SHARDS, BUDGET = 2000, 20, "4MiB"
WAIT_S = 100


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


class Job:
    """The example, and the processes that come of it."""

    def __init__(self, directory: Path, scratch: str, log: Path) -> None:
        arguments = ["examples/ray_data_embeddings.py", str(directory), "--rows", str(ROWS), "--budget", BUDGET]
        # Ray keeps a key in the one directory, logs and sockets in the other.
        environment = {**os.environ, "HOME": scratch, "RAY_TMPDIR": scratch, "RAY_USAGE_STATS_ENABLED": "0"}
        with log.open("w") as file:
            self.process = psutil.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        self._seen: set[psutil.Process] = set()

    def ended(self) -> bool:
        """Also looks which processes there are by now."""
        with suppress(psutil.NoSuchProcess):
            self._seen.update(self.process.children(recursive=True))
        return self.process.poll() is not None

    def running(self) -> list[psutil.Process]:
        """All that it started."""
        self.ended()
        found = []
        for process in self._seen:
            with suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:  # which has ended, and its parent has not asked for it
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in self.running():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if "Embedder" in " ".join(process.cmdline()):
                    found.append(process)
        return found


@contextmanager
def job(directory: Path, scratch: str, log: Path) -> Iterator[Job]:
    """One that does not outlive the test, whatever happens."""
    started = Job(directory, scratch, log)
    try:
        yield started
    finally:
        for process in started.running():
            process.kill()
        if not started.ended():
            started.process.kill()
        started.process.wait()


def test_killed_workers_and_a_killed_job_change_nothing(tmp_path: Path) -> None:
    directory, log = tmp_path / "embeddings", tmp_path / "log"
    shared_memory = set(Path("/dev/shm").glob("*"))

    def shards() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in directory.glob("rows-*.parquet")}

    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:  # in which Ray makes sockets, whose paths must be short
        with job(directory, scratch, log) as first:
            wait_until(lambda: len(shards()) >= 2 or first.ended())
            first.process.kill()
            wait_until(lambda: first.ended() and not first.workers())
        written = shards()
        assert 2 <= len(written) < SHARDS, log.read_text()

        with job(directory, scratch, log) as second:
            wait_until(lambda: len(shards()) > len(written) or second.ended())
            for worker in (killed := second.workers()):
                worker.kill()
            assert len(killed) == 2, log.read_text()
            assert len(shards()) < SHARDS
            wait_until(second.ended)
            printed = log.read_text()
            assert second.process.wait() == 0, printed
            wait_until(lambda: not second.running())
        size_bytes = sum(path.stat().st_size for path in Path(scratch).rglob("*") if path.is_file())
    assert size_bytes < 4 << 20, "only logs"
    assert set(Path("/dev/shm").glob("*")) <= shared_memory

    assert f"{100 * len(written):,} of {ROWS:,} rows were there" in printed
    assert f"\n{ROWS:,} of {ROWS:,} rows after" in printed
    assert {path: mtime_ns for path, mtime_ns in shards().items() if path in written} == written
    assert sorted(path.suffix for path in directory.iterdir()) == [".parquet"] * SHARDS + [".safetensors"]
    peak, whole = map(float, re.search(r"at most ([\d.]+) of ([\d.]+) MB", printed).groups())  # type: ignore[union-attr]
    assert 0 < peak * 1e6 <= parse_bytes(BUDGET) < whole * 1e6 / 2

    model = BertModel(CONFIG).eval()
    model.load_state_dict(load_file(directory / "model.safetensors"))
    table = pyarrow.parquet.read_table(sorted(shards()))
    assert table["row"].to_pylist() == list(range(ROWS))
    vectors = torch.tensor(table["embedding"].to_pylist())
    assert (vectors - embed(model, range(ROWS))).abs().max() < 1e-5
