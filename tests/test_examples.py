"""The examples and the measuring around them work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.common import Spread, WorkerError, WorkerRun, paired_ratios, run_rounds, run_worker
from examples import bert

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> str:
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_custom_module() -> None:
    assert "equal to the model in memory: True" in run("examples/custom_module.py")


def test_gpt2_generates_what_it_would_in_memory() -> None:
    assert "as in memory True" in run("examples/gpt2.py", "--tokens", "6")


def test_lora_learns_within_its_budget(tmp_path: Path) -> None:
    printed = run("examples/lora.py", "--steps", "12", "--output", str(tmp_path / "adapter"))
    assert "within the budget: True" in printed
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", printed).groups())  # type: ignore[union-attr]
    assert last < first
    peak, base = map(float, re.search(r"at most ([\d.]+) of ([\d.]+) MB", printed).groups())  # type: ignore[union-attr]
    assert peak < base / 5
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_tensor_parallel_reads_half() -> None:
    printed = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/tensor_parallel.py")
    found = re.findall(r"rank \d read ([\d,]+) of ([\d,]+) bytes; next token (\d+)", printed)
    assert len(found) == 2
    assert len({token for *_, token in found}) == 1
    for read, whole, _ in found:
        assert int(read.replace(",", "")) < 0.55 * int(whole.replace(",", ""))


def run_demo(directory: Path, monkeypatch: pytest.MonkeyPatch, broken: str | None = None) -> dict[str, object]:
    """The demo in small, its variants in this process: starting six takes half a minute."""

    def work(arguments: Sequence[str]) -> WorkerRun:
        name = arguments[arguments.index("--worker") + 1]
        if name == broken:
            raise WorkerError("it failed\nMemoryError: no room")
        report = bert.work(name, bert.SIZES["tiny"], directory / "tiny", "--memory" in arguments)
        return WorkerRun(report, [(report["started_s"], 1 << 30), (report["finished_s"], 1 << 30)])

    monkeypatch.setattr(common, "run_worker", work)
    arguments = ["--size", "tiny", "--rounds", "2", "--directory", str(directory)]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "examples" / "bert.py"), *arguments])
    bert.main()
    result: dict[str, object] = json.loads((directory / "tiny" / "demo.json").read_text())
    return result


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_demo(tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    rows = result["rows"]
    assert isinstance(rows, list)
    assert [row["variant"] for row in rows] == list(bert.VARIANTS)
    for row in rows:
        assert row["largest_difference"] == 0, row["variant"]
        assert f"| {row['variant']} " in printed
    for picture in ("demo-memory.png", "demo-speed.png"):
        assert (tmp_path / "tiny" / picture).read_bytes().startswith(b"\x89PNG")

    checkpoint = tmp_path / "tiny" / "model.safetensors"
    written = checkpoint.stat().st_mtime_ns
    run_demo(tmp_path, monkeypatch)
    assert checkpoint.stat().st_mtime_ns == written, "the checkpoint is kept"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    run_demo(tmp_path, monkeypatch)
    assert checkpoint.stat().st_mtime_ns != written, "a truncated one is not"


def test_demo_keeps_the_row_of_a_failed_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"failed: lazy$"):
        run_demo(tmp_path, monkeypatch, broken="lazy")
    assert "failed" in capsys.readouterr().out
    rows = json.loads((tmp_path / "tiny" / "demo.json").read_text())["rows"]
    assert rows[1] == {"variant": "lazy", "error": "MemoryError: no room"}


def test_worker_is_watched() -> None:
    script = "import json, time; block = b'x' * 50_000_000; time.sleep(0.3); print(json.dumps([1]))"
    worker = run_worker(["-c", script])
    assert worker.report == [1]
    assert max(rss_bytes for _, rss_bytes in worker.samples) > 50_000_000


def test_worker_failure_shows_its_error() -> None:
    with pytest.raises(WorkerError, match="exited with 3:\nout of luck"):
        run_worker(["-c", "import sys; print('out of luck', file=sys.stderr); sys.exit(3)"])


def test_rounds_alternate_and_stop_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def work(arguments: Sequence[str]) -> WorkerRun:
        seen.append(tuple(arguments))
        return WorkerRun({}, [])

    monkeypatch.setattr(common, "run_worker", work)
    commands = {"a": ["a"], "b": ["b"]}
    run_rounds(commands, 2, time.perf_counter() + 1000, first=["--memory"])
    assert seen == [("a", "--memory"), ("b", "--memory"), ("a",), ("b",)]
    runs, failures = run_rounds(commands, 5, deadline=0)
    assert (len(runs["a"]), len(runs["b"]), failures) == (1, 1, {})


def test_paired_ratios() -> None:
    assert paired_ratios([1, 2, 30], [2, 2, 10]) == Spread(1, 0.5, 3)
