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


def _farthest_simulation(result: Result) -> float:
    ratios = [1 + row["relative_error"] for row in result["rows"] if "relative_error" in row]
    return float(max(max(ratio, 1 / ratio) for ratio in ratios))


def _of_first(key: str) -> Callable[[Result], float]:
    return lambda result: float(result["rows"][0][key])


def _writers_share(result: Result) -> float:
    return float(max(row["added_bytes"] for row in result["rows"])) / float(result["settings"]["allowed_bytes"])


def _smaller(difference: str) -> Callable[[Result], float]:
    return lambda result: float(_row(result, f"difference, {difference}")["times_smaller"])


def _speed(result: Result, scheme: str, peer: str) -> float:
    """How many times as fast as a peer, at the first budget, which is that of the container they share."""
    pairs = (pair for pair in result["speed_ratios"] if pair.startswith(f"{scheme},") and pair.endswith(f"/ {peer}"))
    return float(result["speed_ratios"][next(pairs)]["median"])


def _int8_times(result: Result) -> float:
    return _speed(result, "int8", "transformers, memory-mapped")


def _int8_row_times(result: Result) -> float:
    return _speed(result, ROUNDED, "transformers, memory-mapped")


def _over_llama_cpp(scheme: str) -> Callable[[Result], float]:
    return lambda result: 1 / _speed(result, scheme, "llama.cpp Q8_0")


ROUNDED = "int8-row, inputs in bfloat16"  # as benchmarks.quantized_decode calls it
QUANTIZED = "int8-row, inputs in int8"  # and this
OUR_STEPS = ("load", "load_and_run", "load_and_write")  # of benchmarks.from_pretrained; the others are transformers'
GE, LE = operator.ge, operator.le
TILED = "lazy + 4 MiB tiles"
ONE_INPUT, SLOW = "one input at a time", ", 500 MB/s"  # of benchmarks.lockstep
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
    Goal(
        "decode",
        "the same: × bound of reading and computing together",
        lambda r: max(row["times_shared_bound"]["median"] for row in _with_budget(r)),
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
    Goal("onramps", "2 GB torch .bin: opened in", _of("torch zip", "opening_s"), LE, 0.5, "{:.3f} s"),
    Goal("onramps", "then × the time of safetensors", _of("torch zip", "times_safetensors"), LE, 1.05, "{:.2f}"),
    Goal(
        "onramps",
        "memory of every on-ramp ÷ (2 × largest + 64 MiB)",
        lambda r: max(row["peak_growth_bytes"] for row in r["rows"]) / r["settings"]["limit_bytes"],
        LE,
        1,
        "{:.2f}",
    ),
    Goal(
        "lockstep",
        "32 inputs in lockstep, disk of 500 MB/s: × one at a time",
        lambda r: float(r["speed_ratios"][f"lockstep{SLOW} / {ONE_INPUT}{SLOW}"]["median"]),
        GE,
        20,
        "{:.1f}",
    ),
    Goal(
        "lockstep",
        "their hidden states ÷ 32 times those of one",
        lambda r: _row(r, "lockstep")["hidden_bytes"] / (32 * _row(r, ONE_INPUT)["hidden_bytes"]),
        LE,
        1,
        "{:.2f}",
    ),
    Goal(
        "from_pretrained",
        "the same, from_pretrained and save_model",
        lambda r: max(row[f"{step}_added_bytes"] / row["allowed_bytes"] for row in r["rows"] for step in OUR_STEPS),
        LE,
        1,
        "{:.2f}",
    ),
    Goal("save", "the same, writers", _writers_share, LE, 1, "{:.2f}"),
    Goal("export_onnx", "ONNX export of 2 GB: CPU", _of_first("process_cpu_s"), LE, 60, "{:.0f} s"),
    Goal("export_onnx", "its memory", lambda r: _of_first("peak_bytes")(r) / 2**20, LE, 1024, "{:.0f} MiB"),
    Goal("export_onnx", "its file", lambda r: _of_first("onnx_bytes")(r) / 1e6, LE, 5, "{:.1f} MB"),
    Goal(
        "quantize",
        "DistilBERT as int8",
        lambda r: _row(r, "DistilBERT, int8")["result_bytes"] / 1e9,
        LE,
        0.072,
        "{:.4f} GB",
    ),
    Goal(
        "quantize",
        "its relative RMS error, of a weight",
        lambda r: 100 * _row(r, "DistilBERT, int8")["rms_error"]["largest"],
        LE,
        0.6,
        "{:.2f} %",
    ),
    Goal(
        "quantize",
        "2.7 GB to int8: share of the disk's speed",
        _of("decoder, int8", "share_of_slower"),
        GE,
        0.7,
        "{:.2f}",
    ),
    Goal(
        "quantize",
        "its memory ÷ (2 × largest + 64 MiB)",
        lambda r: _row(r, "decoder, int8")["added_bytes"]["largest"] / r["settings"]["allowed_bytes"],
        LE,
        1,
        "{:.2f}",
    ),
    Goal("quantized_decode", "int8, 800 MiB: × float32 transformers, memory-mapped", _int8_times, GE, 10, "{:.1f}"),
    Goal("quantized_decode", f"{ROUNDED}: the same", _int8_row_times, GE, 20, "{:.1f}"),
    Goal("quantized_decode", "the same: time × llama.cpp Q8_0", _over_llama_cpp(ROUNDED), LE, 1.5, "{:.2f}"),
    Goal("quantized_decode", f"{QUANTIZED}: time × llama.cpp Q8_0", _over_llama_cpp(QUANTIZED), LE, 1.5, "{:.2f}"),
    Goal(
        "quantized_decode",
        "never slower than float32 (1: so)",
        lambda r: float(r["never_slower_than_float32"]),
        GE,
        1,
        "{:.0f}",
    ),
    Goal("training_checkpoints", "int4 difference: times smaller", _smaller("int4"), GE, 7, "{:.1f}"),
    Goal(
        "training_checkpoints",
        "its RMS error",
        lambda r: float(_row(r, "difference, int4")["rms_error"]),
        LE,
        2e-5,
        "{:.1e}",
    ),
    Goal("training_checkpoints", "exact, bfloat16: times smaller", _smaller("exact, bfloat16"), GE, 6, "{:.1f}"),
    Goal(
        "training_checkpoints",
        "training waits: × one copy of the state",
        _of("training waits for a save", "times_copy"),
        LE,
        1.1,
        "{:.2f}",
    ),
    Goal(
        "training_checkpoints",
        "restored after kill -9",
        lambda r: r["kills"]["restored"] / r["kills"]["kills"],
        GE,
        1,
        "{:.0%}",
    ),
    Goal(
        "remote",
        "remote, first pass: share of the line's 100 MB/s",
        _of("remote, first pass", "share_of_line"),
        GE,
        0.9,
        "{:.2f}",
    ),
    Goal(
        "remote",
        "remote, second pass: share of local speed",
        lambda r: float(r["speed_ratios"]["remote, second pass ÷ local file"]["median"]),
        GE,
        0.95,
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
    Goal("machines", "one machine: simulated against measured, farthest", _farthest_simulation, LE, 1.15, "{:.2f}"),
    Goal(
        "tensor_parallel",
        "a rank of two: bytes read ÷ (its half + what all have)",
        lambda r: _row(r, "two ranks")["read_of_allowed"]["largest"],
        LE,
        1.02,
        "{:.3f}",
    ),
    Goal(
        "tensor_parallel",
        "its logits: largest difference ÷ largest logit",
        lambda r: _row(r, "two ranks")["difference"],
        LE,
        1e-5,
        "{:.1g}",
    ),
    Goal("fit", "fit: measured against predicted, farthest", _farthest_prediction, LE, 1.15, "{:.2f}"),
)


def goal_rows(results: Mapping[str, Result]) -> list[tuple[str, str, str, str]]:
    """A row for each goal whose benchmark has a result."""
    return [goal.cells(results[goal.benchmark]) for goal in GOALS if goal.benchmark in results]
