"""The pure parts of the GPU benchmark, and that it says so where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import gpu as gpu_module
from benchmarks import gpu_device, gpu_work, readers, suite
from benchmarks.common import ROOT, WorkerError, WorkerRun
from benchmarks.gpu import LLAMAS, REQUIRED
from benchmarks.gpu_rows import PEERS, Task, against_peers, overlap, rows_of, tasks
from benchmarks.gpu_work import llama, size_of
from benchmarks.plots import plot_speed_against_device_memory, plot_timeline
from benchmarks.tables import table
from pylomin.residency import device as devices
from tests.benchmarks.test_tables import result
from tests.residency.fake_device import FAKE, FakeDevice, computing_on_the_host, installed, shuffled

GIB = 1 << 30


def run(s: float, **fields: Any) -> WorkerRun:
    report = {
        "started_s": 0.0,
        "finished_s": 1.0,
        "start_process_bytes": GIB,
        "passes": [{"s": s, "read_bytes": fields.pop("read_bytes", 0)}],
        "peak_device_bytes": GIB,
        **fields,
    }
    return WorkerRun(report, [(0.5, 2 * GIB)])


def runs() -> Mapping[str, list[WorkerRun]]:
    streamed = run(2.0, read_bytes=10**9, budget_bytes=GIB, ledger_peak_bytes=GIB, pinned_bytes=1 << 26, difference=0.0)
    found = {task.name: [streamed] for task in tasks()}
    found |= {task.reference: [run(1.0, difference=0.0)] for task in tasks() if task.work != "timeline"}
    found |= {f"{work}: {peer}": [run(4.0, difference=0.0)] for work in ("prefill", "decode") for peer in PEERS}
    found[REQUIRED[0]] = [WorkerRun({"bytes_per_s": 1e9}, [])]
    found["timeline: pylomin from host memory, 15% of weights"] = [WorkerRun({"copies_ms": [], "layers_ms": []}, [])]
    return found


def test_every_task_has_a_name_and_a_reference_before_it() -> None:
    names = [task.name for task in tasks()]
    assert len(set(names)) == len(names)
    assert set(REQUIRED) <= set(names)
    for place, task in enumerate(tasks()):
        if task.work not in ("bandwidth", "timeline"):
            assert task.reference in names[: place + 1]


def test_sizes_are_those_of_the_models() -> None:
    with torch.device("meta"):
        for config in LLAMAS.values():
            model: nn.Module = llama(config)
            assert size_of(config) == sum(parameter.nbytes for parameter in model.parameters())
    assert size_of(LLAMAS["full"]) >= 8e9


def test_rows_are_compared_with_the_bound_and_the_resident_model() -> None:
    rows = {row["variant"]: row for row in rows_of(tasks(), runs(), {})}
    row = rows["decode: pylomin from disk, 15% of weights"]
    assert row["share_of_resident"]["median"] == 0.5
    assert row["copy_bound_s"]["median"] == 1.0
    assert row["times_copy_bound"]["median"] == 2.0
    assert row["within_host"] is False
    assert rows["decode: pylomin from host memory, 15% of weights"]["within_host"] is True
    assert "bandwidth: pinned host to device" not in rows


def test_failures_stay_in_the_table() -> None:
    failed = {"decode: diffusers group offloading": "ImportError: no", "decode: resident": "out of memory"}
    rows = rows_of(tasks(), {k: v for k, v in runs().items() if k not in failed}, failed)
    lines = table("gpu", result(rows=rows)).splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    (broken,) = [line for line in lines if "decode: diffusers" in line]
    assert "failed" in broken
    assert "out of memory" in next(line for line in lines if "decode: resident" in line)


def test_peers_are_compared_in_no_more_memory_than_theirs() -> None:
    rows = rows_of(tasks(), runs(), {})
    assert against_peers(rows) == dict.fromkeys(PEERS, 2.0)
    small = [{**row, "peak_device_bytes": 1} if PEERS[0] in row["variant"] else row for row in rows]
    assert PEERS[0] not in against_peers(small)


@pytest.mark.parametrize(
    ("copies", "layers", "share"),
    [([], [], 0.0), ([(0, 1)], [], 0.0), ([(0, 1)], [(0, 1)], 1.0), ([(0, 4)], [(1, 2), (1.5, 3)], 0.5)],
)
def test_overlap(copies: list[tuple[float, float]], layers: list[tuple[float, float]], share: float) -> None:
    assert overlap(copies, layers) == share


def test_pictures(tmp_path: Path) -> None:
    plot_speed_against_device_memory(rows_of(tasks(), runs(), {"decode: resident": "no"}), tmp_path / "a.png")
    plot_timeline([(0.0, 1.0), (1.0, 2.0)], [(0.5, 1.5)], tmp_path / "b.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        return
    command = [sys.executable, "-m", "benchmarks.gpu", "--size", "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "measures a CUDA device" in done.stderr


class HostAsGpu:
    """In the place of :class:`benchmarks.gpu_device.Gpu`: a fake device, and the clock of the host."""

    device, name = FAKE, "no GPU"

    def __init__(self, fake: FakeDevice) -> None:
        self._fake = fake

    def synchronize(self) -> None:
        self._fake.finish()

    def reset_peak(self) -> None:
        """Its memory is not counted by torch."""

    def peak_bytes(self) -> int:
        return self._fake._used_bytes + 1

    def now(self) -> float:
        return time.perf_counter()

    def ms_between(self, first: float, last: float) -> float:
        return 1e3 * (last - first)


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_all_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row, in this process, with a fake device: from checkpoints to tables and pictures."""
    fake, directory = computing_on_the_host(shuffled(0)), tmp_path / "checkpoints"
    monkeypatch.setattr(gpu_device, "gpu", HostAsGpu(fake))
    monkeypatch.setattr(suite, "DIRECTORY", directory)
    monkeypatch.setattr(gpu_module, "tasks", lambda: [task for task in tasks() if task.batch == 1])
    monkeypatch.setattr(gpu_work, "BERT_TOKENS", 16)

    def in_this_process(arguments: list[str], *, timeout_s: float) -> WorkerRun:
        assert arguments[:4] == ["-m", "benchmarks.gpu", "--size", "tiny"]
        task = Task(**json.loads(arguments[-1]))
        try:
            report = gpu_module.work(task, "tiny", options.directory("gpu"))
        except Exception as error:
            raise WorkerError(f"{type(error).__name__}: {error}") from error
        return WorkerRun(json.loads(json.dumps(report)), [(time.time() - 1e-3, GIB), (report.get("started_s", 0), GIB)])

    monkeypatch.setattr(gpu_module, "run_worker", in_this_process)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "gpu.py"), "--size", "tiny"])
    options = suite.Options("gpu", "tiny", 1, time.perf_counter() + 600, tmp_path, publish=False, worker=None)
    with installed(fake, slot_bytes=1 << 20, slots=4):
        gpu_module.measure(options, options.directory("gpu"))
    written = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["variant"]: row for row in written["rows"]}
    failed = {name: row["error"] for name, row in rows.items() if "error" in row}
    # Peers need a device that torch itself tells from the host.
    assert not [name for name in failed if not any(peer in name for peer in PEERS)], failed
    assert len(rows) == len([task for task in tasks() if task.batch == 1]) - 2
    for name, row in rows.items():
        if "pylomin" in name:
            assert row["difference"] <= 0.1, name
            assert row["ledger_peak_bytes"] <= row["budget_bytes"], name
            assert "75%" in name or "100%" in name or row["copied_bytes_per_pass"] > 0, name
    assert written["bandwidth_bytes_per_s"] > 0
    assert written["timeline"]["copies_ms"]
    assert written["timeline"]["layers_ms"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("gpu.png", "gpu_timeline.png"))
    assert "decode: pylomin from host memory, 25% of weights" in capsys.readouterr().out


def test_names_say_what_is_run() -> None:
    assert Task("decode", "pylomin", "cpu", 0.5).name == "decode: pylomin from host memory, 50% of weights"


def test_the_ring_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "DIRECTORY", tmp_path / "checkpoints")
    monkeypatch.setattr(suite.signal, "signal", lambda *_: None)  # of the process that runs the tests
    arguments = ["--size", "tiny", "--rounds", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "readers.py"), *arguments])
    try:
        readers.main()
    finally:
        devices.provide(readers.NOWHERE, None)
    rows = json.loads((tmp_path / "readers.json").read_text())["rows"]
    assert [row["variant"] for row in rows][:2] == ["cold, direct, 1 thread", "cold, direct, 2 threads"]
    assert all(row["bytes_per_s"]["median"] > 0 for row in rows)
    assert "times one thread" in capsys.readouterr().out
