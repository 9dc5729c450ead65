from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.columns import COLUMNS, caption
from benchmarks.goals import GOALS, ONE_INPUT, OUR_STEPS, QUANTIZED, ROUNDED, SLOW, TILED, goal_rows
from benchmarks.plots import plot_speed_against_budget
from benchmarks.run import BENCHMARKS
from benchmarks.tables import PAGES, TABLES, fill, table

SPREAD = {"median": 2.0, "smallest": 1.0, "largest": 3.0}
MACHINE = {"processor": "P", "cores": 2, "memory_bytes": 1 << 30, "system": "Linux", "torch": "2"}
ROW: dict[str, Any] = {
    "variant": "offloaded",
    "rounds": 3,
    "pass_s": SPREAD,
    "share_of_resident": SPREAD,
    "bound_s": SPREAD,
    "times_bound": SPREAD,
    "times_shared_bound": SPREAD,
    "bandwidth_bytes_per_s": SPREAD,
    "read_bytes_per_pass": 1 << 20,
    "budget_bytes": 64 << 20,
    "limit_bytes": 128 << 20,
    "peak_tensor_bytes": 5 << 20,
    "ledger_peak_bytes": 60 << 20,
    "start_process_bytes": 10 << 20,
    "peak_process_bytes": 80 << 20,
    "within_budget": {"ledger": True, "process": False},
    "reading_mode": "direct",
    "difference": 0.0,
}
FAILED = [{"variant": "peer", "error": "out of memory"}, {"variant": "broken", "error": "ValueError: no"}]


def result(**more: Any) -> dict[str, Any]:
    settings = {"model": "M", "input": "I", "file_state": "cold", "conditions": ["no memory limit: not allowed."]}
    return {
        "command": "python -m benchmarks.x",
        "commit": "abc",
        "date": "2024-01-02",
        "machine": MACHINE,
        "settings": settings,
        "rows": [ROW, *FAILED],
        **more,
    }


@pytest.mark.parametrize("name", ["bert_cold", "decode", "big_linear", "moe", "fit", "bert"])
def test_rows_of_failures_stay_in_the_table(name: str) -> None:
    lines = table(name, result()).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| peer ")
    assert "out of memory" in lines[3]
    assert "failed" in lines[4]


def test_who_saw_more_than_the_budget_is_named() -> None:
    assert "process: no" in table("decode", result())


def test_caption_says_what_the_numbers_need() -> None:
    ratios = {"transformers": {"median": 1.7, "smallest": 1.6, "largest": 1.8}}
    text = caption("decode", result(times_as_fast_as=ratios, never_falls=False))
    for part in ("**cold**", "not allowed", "commit abc", "python -m benchmarks.x", "1.70 times (1.60–1.80)", "falls"):
        assert part in text


def test_pages_have_a_table_for_every_benchmark_and_none_is_stale() -> None:
    found = set()
    for page in PAGES:
        text = page.read_text()
        assert fill(text) == text, "run python -m benchmarks.tables"
        found |= set(re.findall(r"<!-- table: (\w+) -->", text))
    assert found - {"goals"} == set(TABLES) == {"demo", *COLUMNS}
    assert set(TABLES) == set(BENCHMARKS)
    assert {goal.benchmark for goal in GOALS} < set(TABLES)


def test_goals_say_what_was_reached_and_what_failed(tmp_path: Path) -> None:
    text = "<!-- table: goals -->\n<!-- end of table -->"
    assert "Not measured yet" in fill(text, tmp_path)
    (tmp_path / "big_linear.json").write_text(json.dumps(result(rows=[{**ROW, "variant": "pylomin"}])))
    (tmp_path / "moe.json").write_text(json.dumps(result(rows=[{"variant": "pylomin", "error": "out of memory"}])))
    lines = fill(text, tmp_path).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[2:-1]] == ["failed", "≤ 1.050", "no"]
    assert [cell.strip() for cell in lines[4].split("|")[2:-1]] == ["2.00", "≤ 1.15", "no"]


def test_goals_read_every_kind_of_result() -> None:
    variants = [{**ROW, "variant": name} for name in ("lazy", TILED, "fit, 300MiB", "pylomin")]
    variants.append({**ROW, "share_of_line": SPREAD, "variant": "remote, first pass"})
    more = {
        "times_needed": SPREAD,
        "time_of_predicted": SPREAD,
        "peak_of_predicted": SPREAD,
        "added_us_per_call": SPREAD,
        "read_of_allowed": SPREAD,
        "peak_weight_bytes": 1,
        "hidden_bytes": 1,
        "difference": 0.0,
    }
    variants += [{**ROW, **more, "variant": name} for name in ("pylomin, 800.0 MiB", "pylomin, all resident")]
    variants += [{**ROW, **more, "variant": name} for name in (ONE_INPUT, "lockstep", "two ranks")]
    quantized = {"result_bytes": 1, "rms_error": SPREAD, "share_of_slower": SPREAD, "added_bytes": SPREAD}
    variants += [{**quantized, "variant": name} for name in ("DistilBERT, int8", "decoder, int8")]
    variants += [
        {"times_smaller": 2.0, "rms_error": 1e-5, "variant": f"difference, {n}"} for n in ("int4", "exact, bfloat16")
    ]
    variants += [{"times_copy": SPREAD, "variant": "training waits for a save"}]
    variants += [{"opening_s": SPREAD, "times_safetensors": SPREAD, "variant": "torch zip"}]
    variants = [
        {**more, "load_s": SPREAD, "tensors": 1, "weight_bytes": 1, "us_per_tensor": 1.0, **row} for row in variants
    ]
    ratios = {"transformers, memory-mapped": SPREAD, "llama.cpp F32": SPREAD}
    everything = result(rows=variants, times_as_fast_as=ratios, never_falls=True)
    everything |= {"never_slower_than_float32": True, "kills": {"kills": 2, "restored": 2}}
    everything["speed_ratios"] = {
        f"{scheme}, 800.0 MiB / {peer}": SPREAD
        for scheme in ("int8", ROUNDED, QUANTIZED)
        for peer in ("transformers, memory-mapped", "llama.cpp Q8_0")
    }
    of_one_row = {
        "export_onnx": [{"process_cpu_s": 1.0, "peak_bytes": 1, "onnx_bytes": 1}],
        "onramps": [{**variants[-1], "peak_growth_bytes": 1}],
        "save": [{"added_bytes": 1}],
        "machines": [{"relative_error": -0.1}],
        "from_pretrained": [{"allowed_bytes": 1, **{f"{step}_added_bytes": 1 for step in OUR_STEPS}}],
    }
    everything["speed_ratios"]["remote, second pass ÷ local file"] = SPREAD
    everything["speed_ratios"][f"lockstep{SLOW} / {ONE_INPUT}{SLOW}"] = SPREAD
    everything["settings"] |= {"limit_bytes": 1, "allowed_bytes": 1}
    found = dict.fromkeys({goal.benchmark for goal in GOALS}, everything)
    rows = goal_rows(found | {name: {**everything, "rows": rows} for name, rows in of_one_row.items()})
    assert len(rows) == len(GOALS)
    assert not [row for row in rows if row[1] == "failed"]


def test_filling_needs_no_more_than_the_result_file(tmp_path: Path) -> None:
    text = "before\n<!-- table: big_linear -->\nold\n<!-- end of table -->\nafter"
    assert 'make bench ARGS="big_linear --publish"' in fill(text, tmp_path)
    (tmp_path / "big_linear.json").write_text(json.dumps(result()))
    filled = fill(text, tmp_path)
    assert "| offloaded |" in filled
    assert filled.startswith("before")
    assert filled.endswith("after")
    assert fill(filled, tmp_path) == filled


def test_picture_of_budgets(tmp_path: Path) -> None:
    peer = {"variant": "peer", "pass_s": SPREAD, "limit_bytes": ROW["limit_bytes"]}
    plot_speed_against_budget([ROW, peer, {"variant": "resident", "pass_s": SPREAD}, *FAILED], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
