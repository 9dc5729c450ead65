"""Everything in the README works: its code, its tables, its commands, its links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from benchmarks.tables import fill

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in order, with the names and files that a reader is assumed to have."""
    monkeypatch.chdir(tmp_path)
    config = BertConfig(
        vocab_size=5000,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    config.to_json_file("config.json")
    save_file(BertModel(config).state_dict(), "model.safetensors")
    namespace = {"tokens": torch.randint(5000, (1, 16))}
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE))
    assert blocks
    for block in blocks:
        # Blank lines in front, so that a traceback has the README's line numbers.
        source = "\n" * README.count("\n", 0, block.start(1)) + block[1]
        exec(compile(source, "README.md", "exec"), namespace)


def test_tables_match_result_files() -> None:
    assert fill(README) == README, "run python -m benchmarks.tables"


def test_commands_are_targets() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert {"demo", "test"} <= commands <= targets


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
