"""The examples run as a user runs them, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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


def test_demo(tmp_path: Path) -> None:
    output = run(
        "-m", "examples.bert", "--size", "tiny", "--rounds", "1", "--directory", str(tmp_path)
    )
    result = json.loads((tmp_path / "tiny" / "demo.json").read_text())
    assert len(result["rows"]) == 6
    for row in result["rows"]:
        assert row["largest_difference"] == 0, row["variant"]
        assert row["variant"] in output
    assert result["machine"]["torch"]
    for picture in ("demo-memory.png", "demo-speed.png"):
        assert (tmp_path / "tiny" / picture).read_bytes().startswith(b"\x89PNG")
