"""The example, and the benchmark of how much memory loading takes, in this process."""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks import from_pretrained as benchmark
from benchmarks import suite
from benchmarks.common import ROOT, WorkerRun
from examples import generate


def run_example(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    torch.manual_seed(0)
    generate.main()


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gc.collect()  # `peak_memory` counts the weights of all models, and some wait for the collector
    run_example("--tokens", "6", "--budget", "600KiB", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Once upon a time")
    assert len(printed[0]) == len("Once upon a time") + 6
    assert printed[1].startswith("6 tokens, ")
    assert re.fullmatch(r"weights in memory: at most 0\.[1-6] of 2\.7 MB", printed[2])

    with generate.tiny_model() as directory:
        run_example(str(directory), "abc", "--tokens", "6", "--dtype", "bfloat16", monkeypatch=monkeypatch)
        text = capsys.readouterr().out.splitlines()[0]
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        plain = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="bfloat16")
        tokens = plain.generate(**tokenizer("abc", return_tensors="pt", return_token_type_ids=False), max_new_tokens=6)
        assert text == tokenizer.decode(tokens[0])


def test_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loaded: list[str] = []

    def run(arguments: Sequence[str]) -> WorkerRun:
        worker = json.loads(arguments[-1])
        loaded.append(worker["name"])
        report: dict[str, Any] = benchmark.work(worker["name"], Path(worker["path"]))
        assert report["peak_rss_bytes"] > 1 << 20
        return WorkerRun(report | {"peak_rss_bytes": 5 << 20 if worker["name"] == "imports" else 7 << 20}, [])

    monkeypatch.setattr(benchmark, "run_worker", run)
    monkeypatch.setattr(suite, "DIRECTORY", tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "from_pretrained.py"), "--size", "tiny"])
    sys.argv += ["--output", str(tmp_path)]
    benchmark.main()
    rows = json.loads((tmp_path / "from_pretrained.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["single", "sharded", "experts"]
    assert loaded == list(benchmark.WORKERS) * 3
    directory = tmp_path / "tiny" / "from_pretrained"
    for row in rows:
        assert row["load_added_bytes"] == 2 << 20
        assert row["checkpoint_bytes"] == _tensor_bytes(directory / f"tiny-{row['variant']}")
        assert row["allowed_bytes"] == 2 * row["largest_tensor_bytes"] + (64 << 20)
    assert not list(directory.glob("*/saved"))
    assert not list(directory.glob("*/written"))

    monkeypatch.setattr(benchmark, "ALLOWED_BYTES", -(1 << 30))
    with pytest.raises(SystemExit, match="failed: experts, sharded, single"):
        benchmark.main()


def _tensor_bytes(directory: Path) -> int:
    paths = list(directory.glob("*.safetensors"))
    return sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in paths)
