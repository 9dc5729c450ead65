"""What the benchmarks are to show, and whether they do. Pure: from results to rows of one table."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]
HEADER = ("work", "measured", "goal", "reached")


@dataclass(frozen=True)
class Goal:
    """One number of one benchmark, and what it should be."""

    benchmark: str
    work: str
    measure: Callable[[Result], float]
    compare: Callable[[float, float], bool]
    aim: float
    form: str

    def cells(self, result: Result) -> tuple[str, str, str, str]:
        """A row of the table."""
        sign = "≥" if self.compare is operator.ge else "≤"
        aim = f"{sign} {self.form.format(self.aim)}"
        try:
            measured = self.measure(result)
        except (KeyError, StopIteration):  # that row failed
            return self.work, "failed", aim, "no"
        return self.work, self.form.format(measured), aim, "yes" if self.compare(measured, self.aim) else "no"


def _row(result: Result, variant: str) -> Mapping[str, Any]:
    return next(row for row in result["rows"] if row["variant"] == variant)


def _of(variant: str, key: str) -> Callable[[Result], float]:
    """Median of a spread in one row."""
    return lambda result: float(_row(result, variant)[key]["median"])


def _as_fast_as(peer: str) -> Callable[[Result], float]:
    return lambda result: float(result["times_as_fast_as"][peer]["median"])


def _with_budget(result: Result) -> list[Mapping[str, Any]]:
    return sorted((row for row in result["rows"] if "budget_bytes" in row), key=lambda row: row["budget_bytes"])


def _load_ratio(result: Result, key: str) -> float:
    """Largest ÷ smallest of ``load_s`` for each tensor, among rows alike in ``key`` (tensors, or bytes of a tensor)."""
    groups: dict[float, list[float]] = {}
    for row in result["rows"]:
        kind = row["tensors"] if key == "tensors" else row["weight_bytes"] / row["tensors"]
        groups.setdefault(kind, []).append(row["us_per_tensor"])
    return max(max(values) / min(values) for values in groups.values())


def _farthest_prediction(result: Result) -> float:
    ratios = [row[key]["median"] for row in _with_budget(result) for key in ("time_of_predicted", "peak_of_predicted")]
    return float(max(max(ratio, 1 / ratio) for ratio in ratios))


GE, LE = operator.ge, operator.le
TILED = "lazy + 4 MiB tiles"
ONE_INPUT = "one input at a time"
GOALS = (
    Goal("bert", "BERT, cached: share of resident speed", _of("lazy", "share_of_resident"), GE, 0.97, "{:.2f}"),
    Goal("bert", "the same with 4 MiB tiles", _of(TILED, "share_of_resident"), GE, 0.92, "{:.2f}"),
    Goal(
        "bert",
        "its peak of weights and hidden states",
        lambda r: _row(r, TILED)["peak_tensor_bytes"] / (1 << 20),
        LE,
        24,
        "{:.1f} MiB",
    ),
    Goal(
        "bert_cold",
        "BERT, cold, small container: × bound",
        _of("fit, 300MiB", "times_bound"),
        LE,
        1.10,
        "{:.2f}",
    ),
    Goal(
        "decode",
        "decoding, 800 MiB: × transformers, memory-mapped",
        _as_fast_as("transformers, memory-mapped"),
        GE,
        1.6,
        "{:.2f}",
    ),
    Goal("decode", "the same: × llama.cpp F32", _as_fast_as("llama.cpp F32"), GE, 1.3, "{:.2f}"),
    Goal("decode", "the same: × bound", _of("pylomin, 800.0 MiB", "times_bound"), LE, 1.10, "{:.2f}"),
    Goal(
        "decode",
        "the same at five budgets: × bound at most",
        lambda r: max(row["times_bound"]["median"] for row in _with_budget(r)),
        LE,
        1.15,
        "{:.2f}",
    ),
    Goal("decode", "never slower with a larger budget (1: so)", lambda r: float(r["never_falls"]), GE, 1, "{:.0f}"),
    Goal(
        "decode",
        "everything resident: share of resident speed",
        lambda r: float(_with_budget(r)[-1]["share_of_resident"]["median"]),
        GE,
        0.98,
        "{:.2f}",
    ),
    Goal(
        "module_overhead",
        "added to each module call",
        _of("pylomin, all resident", "added_us_per_call"),
        LE,
        15,
        "{:.1f} µs",
    ),
    Goal(
        "many_tensors",
        "load of 10,000 tensors",
        lambda r: max(row["load_s"]["median"] for row in r["rows"]),
        LE,
        2,
        "{:.2f} s",
    ),
    Goal(
        "many_tensors",
        "time of a tensor, most ÷ least over their number",
        lambda r: _load_ratio(r, "bytes"),
        LE,
        1.5,
        "{:.2f}",
    ),
    Goal(
        "many_tensors",
        "time of a tensor, most ÷ least over their size",
        lambda r: _load_ratio(r, "tensors"),
        LE,
        1.2,
        "{:.2f}",
    ),
    Goal("moe", "mixture of experts: bytes read ÷ needed", _of("pylomin", "times_needed"), LE, 1.05, "{:.3f}"),
    Goal("big_linear", "1 GiB layer, 64 MiB budget: × bound", _of("pylomin", "times_bound"), LE, 1.15, "{:.2f}"),
    Goal("lockstep", "32 inputs in lockstep: × one at a time", _as_fast_as(ONE_INPUT), GE, 20, "{:.1f}"),
    Goal(
        "lockstep",
        "their hidden states ÷ 32 times those of one",
        lambda r: _row(r, "lockstep")["hidden_bytes"] / (32 * _row(r, ONE_INPUT)["hidden_bytes"]),
        LE,
        1,
        "{:.2f}",
    ),
    Goal("lora", "LoRA step, 300 MiB budget: × bound", _of("pylomin", "times_bound"), LE, 1.15, "{:.2f}"),
    Goal(
        "lora",
        "its peak of weights",
        lambda r: max(_row(r, "pylomin")[key] for key in ("ledger_peak_bytes", "peak_weight_bytes")) / (1 << 20),
        LE,
        300,
        "{:.0f} MiB",
    ),
    Goal(
        "lora",
        "its gradients: largest difference ÷ largest gradient",
        lambda r: _row(r, "pylomin")["difference"],
        LE,
        1e-5,
        "{:.1g}",
    ),
    Goal("fit", "fit: measured against predicted, farthest", _farthest_prediction, LE, 1.15, "{:.2f}"),
)


def goal_rows(results: Mapping[str, Result]) -> list[tuple[str, str, str, str]]:
    """A row for each goal whose benchmark has a result."""
    return [goal.cells(results[goal.benchmark]) for goal in GOALS if goal.benchmark in results]
