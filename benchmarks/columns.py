"""Which columns the table of each benchmark has, and what is said under it. Pure: from results to text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.common import OUT_OF_MEMORY
from benchmarks.rows import process_constant_bytes

Cell = Callable[[Mapping[str, Any]], str]
NOTHING = "–"


def mebibytes(key: str) -> Cell:
    """``row[key]`` bytes in MiB."""
    return lambda row: f"{row[key] / (1 << 20):,.0f} MiB" if row.get(key) is not None else NOTHING


def median(key: str, form: str, *, factor: float = 1, spread: bool = False) -> Cell:
    """The median of a spread, with the smallest and largest behind it if asked."""

    def cell(row: Mapping[str, Any]) -> str:
        if key not in row:
            return NOTHING
        middle, least, most = (form.format(row[key][name] * factor) for name in ("median", "smallest", "largest"))
        return f"{middle} ({least}–{most})" if spread else middle

    return cell


def value(key: str, form: str) -> Cell:
    """``row[key]`` as it is."""
    return lambda row: form.format(row[key]) if row.get(key) is not None else NOTHING


def quantile(name: str) -> Cell:
    """Of how far plans are from what they are compared with: 1 is no worse."""
    return lambda row: f"{row['over'][name]:.3f}" if "over" in row else NOTHING


def speedup(network: str) -> Cell:
    """Over one machine, with this network."""
    return lambda row: f"{row['speedups'][network]:.3g}" if "speedups" in row else NOTHING


def grown(row: Mapping[str, Any]) -> str:
    """Growth of the process over what it had after its imports."""
    if "peak_process_bytes" not in row:
        return NOTHING
    return f"{(row['peak_process_bytes'] - row['start_process_bytes']) / (1 << 20):,.0f} MiB"


def per_second(row: Mapping[str, Any]) -> str:
    """Passes a second."""
    return f"{1 / row['pass_s']['median']:.3g}"


def within_budget(row: Mapping[str, Any]) -> str:
    """Who saw more than the budget, if anybody."""
    if "within_budget" not in row:
        return NOTHING
    return ", ".join(f"{name}: no" for name, kept in row["within_budget"].items() if not kept) or "yes"


def largest_mebibytes(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]['largest'] / (1 << 20):,.0f} MiB" if key in row else NOTHING


PASS_S = median("pass_s", "{:.3g} s", spread=True)
SHARE = median("share_of_resident", "{:.0%}", spread=True)
DIFFERENCE = value("difference", "{:.2g}")
AGAINST_BOUND: list[tuple[str, Cell]] = [
    ("read", lambda row: mebibytes("read_bytes_per_pass")(row) if "bound_s" in row else NOTHING),
    ("disk", median("bandwidth_bytes_per_s", "{:.2f} GB/s", factor=1e-9)),
    ("bound", median("bound_s", "{:.3g} s")),
    ("× bound", median("times_bound", "{:.2f}", spread=True)),
]
TOGETHER: list[tuple[str, Cell]] = [
    ("disk while computing", median("bandwidth_together", "{:.2f} GB/s", factor=1e-9)),
    ("computing meanwhile", median("computing_together", "{:.0%}")),
    ("× bound of both together", median("times_shared_bound", "{:.2f}", spread=True)),
]
MEMORY: list[tuple[str, Cell]] = [
    ("peak weights", mebibytes("ledger_peak_bytes")),
    ("process grows by", grown),
]
BUDGET: list[tuple[str, Cell]] = [("within budget", within_budget)]
MODE: list[tuple[str, Cell]] = [("reading", value("reading_mode", "{}"))]

COLUMNS: dict[str, list[tuple[str, Cell]]] = {
    "bert": [
        ("time of a pass", PASS_S),
        ("share of resident speed", SHARE),
        ("peak tensor memory", lambda row: f"{row['peak_tensor_bytes'] / (1 << 20):,.1f} MiB"),
        ("times less", value("less_memory", "{:.0f}")),
        ("process grows by", grown),
        *MODE,
        ("largest difference", DIFFERENCE),
    ],
    "bert_cold": [
        ("limit", mebibytes("limit_bytes")),
        ("time of a pass", PASS_S),
        *AGAINST_BOUND,
        *MEMORY,
        *MODE,
        ("largest difference", DIFFERENCE),
    ],
    "decode": [
        ("limit", mebibytes("limit_bytes")),
        ("time of a token", PASS_S),
        ("tokens/s", per_second),
        ("share of resident speed", SHARE),
        *AGAINST_BOUND,
        *TOGETHER,
        *MEMORY,
        *BUDGET,
        *MODE,
        ("largest difference", DIFFERENCE),
    ],
    "quantized_decode": [
        ("limit", mebibytes("limit_bytes")),
        ("time of a token", PASS_S),
        ("tokens/s", per_second),
        ("share of resident speed", SHARE),
        *AGAINST_BOUND,
        *MEMORY,
        *BUDGET,
        *MODE,
        ("largest difference", DIFFERENCE),
    ],
    "module_overhead": [
        ("µs per call", median("us_per_call", "{:.1f}")),
        ("added µs per call", median("added_us_per_call", "{:.1f}", spread=True)),
    ],
    "stages": [
        ("ms of a pass", median("ms_per_pass", "{:.1f}", spread=True)),
        ("calls", value("calls", "{}")),
        ("µs of a call", value("us_per_call", "{:.0f}")),
    ],
    "schedule": [
        ("planning takes", median("planning_ms", "{:.1f} ms", spread=True)),
        ("instances", value("instances", "{}")),
        *((name, quantile(name)) for name in ("mean", "median", "90%", "99%", "largest")),
    ],
    "many_tensors": [
        ("shards", value("shards", "{}")),
        ("weights", mebibytes("weight_bytes")),
        ("load", median("load_s", "{:.3f} s", spread=True)),
        ("of that, building the model", median("construct_s", "{:.3f} s")),
        ("µs per tensor", value("us_per_tensor", "{:.0f}")),
    ],
    "moe": [
        ("limit", mebibytes("limit_bytes")),
        ("time of a token", PASS_S),
        ("read ÷ needed", median("times_needed", "{:.3f}", spread=True)),
        *AGAINST_BOUND,
        *MEMORY,
        *MODE,
        ("largest difference", DIFFERENCE),
    ],
    "remote": [
        ("time of a pass", PASS_S),
        ("over the line", mebibytes("line_bytes")),
        ("share of the line's speed", median("share_of_line", "{:.0%}", spread=True)),
        ("share of resident speed", SHARE),
        *MEMORY,
        *MODE,
        ("largest difference", DIFFERENCE),
    ],
    "big_linear": [
        ("budget", mebibytes("budget_bytes")),
        ("time of a pass", PASS_S),
        *AGAINST_BOUND,
        *MEMORY,
        *BUDGET,
        *MODE,
        ("largest difference", DIFFERENCE),
    ],
    "onramps": [
        ("opened in", median("opening_s", "{:.1f} ms", factor=1e3)),
        ("read to open", lambda row: f"{row['opening_bytes_read'] / 1024:,.0f} KiB"),
        ("a pass takes", median("forward_s", "{:.3g} s")),
        ("× safetensors", median("times_safetensors", "{:.2f}", spread=True)),
        ("process grows by", mebibytes("peak_growth_bytes")),
    ],
    "export_onnx": [
        ("time of the processor", value("export_cpu_s", "{:.1f} s")),
        ("with imports", value("process_cpu_s", "{:.1f} s")),
        ("peak of the process", mebibytes("peak_bytes")),
        ("weights read", mebibytes("bytes_read")),
        ("the file has", lambda row: f"{row['onnx_bytes'] / 1e6:.2f} MB"),
        ("largest difference", value("largest_difference", "{:.1e}")),
        ("of logits up to", value("largest_logit", "{:.2g}")),
    ],
    "save": [
        ("takes", median("elapsed_s", "{:.2f} s", spread=True)),
        ("× plain copy", median("times_copy", "{:.2f}", spread=True)),
        ("time of the processor", median("cpu_s", "{:.2f} s")),
        ("process grows by", mebibytes("added_bytes")),
    ],
    "from_pretrained": [
        ("weights", mebibytes("checkpoint_bytes")),
        ("largest", mebibytes("largest_tensor_bytes")),
        ("load", mebibytes("load_added_bytes")),
        ("and run", mebibytes("load_and_run_added_bytes")),
        ("and save_model", mebibytes("load_and_write_added_bytes")),
        ("and save_pretrained", mebibytes("load_and_save_added_bytes")),
        ("transformers' own load", mebibytes("load_with_transformers_added_bytes")),
    ],
    "quantize": [
        ("size", lambda row: f"{row['result_bytes'] / 1e9:.4f} GB"),
        ("times smaller", value("times_smaller", "{:.2f}")),
        ("relative RMS error of a weight", median("rms_error", "{:.3%}", spread=True)),
        ("takes", median("elapsed_s", "{:.2f} s", spread=True)),
        ("share of the slower of reading and writing", median("share_of_slower", "{:.2f}", spread=True)),
        ("of both at the same time", median("share_of_both", "{:.2f}", spread=True)),
        ("process grows by", lambda row: largest_mebibytes(row, "added_bytes")),
    ],
    "training_checkpoints": [
        ("times smaller", value("times_smaller", "{:.1f}")),
        ("RMS error", value("rms_error", "{:.1e}")),
        ("relative", value("relative_rms_error", "{:.1e}")),
        ("times as long as one copy", median("times_copy", "{:.2f}", spread=True)),
        ("", value("found", "{}")),
    ],
    "lockstep": [
        ("limit", mebibytes("limit_bytes")),
        ("time of all inputs", PASS_S),
        ("share of resident speed", SHARE),
        *AGAINST_BOUND,
        *MEMORY,
        ("hidden states", value("hidden_bytes", "{:,} B")),
        *BUDGET,
        *MODE,
        ("largest difference", DIFFERENCE),
    ],
    "lora": [
        ("limit", mebibytes("limit_bytes")),
        ("time of a step", PASS_S),
        *AGAINST_BOUND,
        *MEMORY,
        *BUDGET,
        *MODE,
        ("largest difference of a gradient ÷ the largest gradient", DIFFERENCE),
    ],
    "readers": [
        ("speed", median("bytes_per_s", "{:.2f} GB/s", factor=1e-9, spread=True)),
        ("times one thread", median("times_one", "{:.2f}", spread=True)),
    ],
    "machines": [
        ("a machine reads", mebibytes("read_bytes")),
        ("resident", value("resident_share", "{:.0%}")),
        ("computing", value("compute_s", "{:.3g} s")),
        ("all-reduces, 25 GbE", value("communication_s", "{:.2g} s")),
        ("time of a pass", value("simulated_s", "{:.3g} s")),
        ("bound", value("least_s", "{:.3g} s")),
        ("× bound", value("times_least", "{:.2f}")),
        *((f"times as fast, {network}", speedup(network)) for network in ("10 GbE", "25 GbE", "100 GbE", "loopback")),
        ("pipeline", value("pipeline_speedup", "{:.3g}")),
        ("measured", value("measured_s", "{:.3g} s")),
    ],
    "tensor_parallel": [
        ("time of a pass", PASS_S),
        ("× one rank", median("time_of_one_rank", "{:.2f}", spread=True)),
        ("a rank reads", median("rank_read_bytes", "{:,.0f} MiB", factor=2**-20)),
        ("÷ (its part + what all have)", median("read_of_allowed", "{:.3f}", spread=True)),
        *MODE,
        ("largest difference ÷ largest logit", DIFFERENCE),
    ],
    "gpu": [
        ("budget", mebibytes("budget_bytes")),
        ("time of a pass", PASS_S),
        ("share of resident speed", SHARE),
        ("peak device memory", mebibytes("peak_device_bytes")),
        ("copied", mebibytes("copied_bytes_per_pass")),
        ("bound", median("copy_bound_s", "{:.3g} s")),
        ("× bound", median("times_copy_bound", "{:.2f}", spread=True)),
        ("pinned", mebibytes("pinned_bytes")),
        ("process grows by", grown),
        ("largest difference", DIFFERENCE),
    ],
    "fit": [
        ("time of a token", PASS_S),
        ("predicted", median("predicted_s", "{:.3g} s")),
        ("measured ÷ predicted", median("time_of_predicted", "{:.2f}", spread=True)),
        ("peak weights", mebibytes("ledger_peak_bytes")),
        ("predicted", mebibytes("predicted_peak_bytes")),
        ("measured ÷ predicted", median("peak_of_predicted", "{:.2f}")),
        ("process grows by", grown),
        *BUDGET,
        *MODE,
    ],
}


def cells(name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and body; a row that failed says so in its first column."""
    columns = COLUMNS[name]
    body = [
        [row["variant"], row["error"] if row["error"] == OUT_OF_MEMORY else "failed", *[""] * (len(columns) - 1)]
        if "error" in row
        else [row["variant"], *(cell(row) for _, cell in columns)]
        for row in rows
    ]
    return ["", *(header for header, _ in columns)], body


def caption(name: str, result: Mapping[str, Any]) -> str:
    """What has to be said under the table for its numbers to mean something."""
    machine, settings, rows = result["machine"], result["settings"], result["rows"]
    lines = [_what(settings), _machine(machine), _how(settings, rows)]
    if any("bound_s" in row for row in rows):
        lines.append(
            "Bound: the larger of the resident model's time and the bytes read ÷ the disk's speed, measured by direct "
            "reads in the same process before and after the passes; × bound: in pairs with it."
        )
    if any("times_shared_bound" in row for row in rows):
        lines.append(
            "Bound of both together: the same, with the speeds that reading, and products of a matrix and a vector, "
            "have in the same process while both go on."
        )
    constants = [process_constant_bytes(row) for row in rows if "within_budget" in row]
    if constants:
        lines.append(
            "Within budget: the ledger and the tensors that hold weights never exceed it, and the process grows, seen "
            f"from outside, by no more than the budget and {max(constants) >> 20} MiB."
        )
    for peer, ratio in result.get("times_as_fast_as", {}).items():
        lines.append(
            f"At the same limit, pylomin is {ratio['median']:.2f} times ({ratio['smallest']:.2f}–"
            f"{ratio['largest']:.2f}) as fast as {peer}."
        )
    for pair, ratio in result.get("speed_ratios", {}).items():
        spread = f"{ratio['smallest']:.2f}–{ratio['largest']:.2f}"
        lines.append(f"Speed, {pair}: {ratio['median']:.2f} ({spread}).")
    compared = [row for row in rows if "relative_error" in row]
    for row in compared:
        lines.append(f"{row['variant']}, simulated against measured: {row['relative_error']:+.1%}.")
    if "two_processes" in result:
        two = result["two_processes"]
        lines.append(f"Two processes that share this machine, simulated: {two['simulated']:.2f} times as fast as one.")
        if two["measured"] is not None:
            lines.append(
                f"Measured by benchmarks.tensor_parallel, another shape without a budget: {two['measured']:.2f}."
            )
    if "never_slower_than_float32" in result:
        slower = "never slower" if result["never_slower_than_float32"] else "**slower**"
        lines.append(f"Quantised weights are {slower} than float32 ones at any budget by more than the rounds differ.")
    if "never_falls" in result:
        falls = "never falls" if result["never_falls"] else "**falls**"
        lines.append(f"From one budget to the next larger one, speed {falls} by more than the rounds differ.")
    lines.append(f"`{result['command']}`, {result['date']}, commit {result['commit']}.")
    return "  \n".join(lines)  # two spaces: a line break in Markdown


def _what(settings: Mapping[str, Any]) -> str:
    size = f", {mebibytes('checkpoint_bytes')(settings)} of float32" if "checkpoint_bytes" in settings else ""
    conditions = "".join(f"; {condition}" for condition in settings.get("conditions", ()))
    state = settings["file_state"]
    return f"{settings['model']}{size}; input: {settings['input']}; weight file **{state}**{conditions}."


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(
        f"{name} {machine[name]}"
        for name in ("torch", "transformers", "accelerate", "llama-cpp-python")
        if machine.get(name)
    )
    memory = f"{machine['memory_bytes'] / (1 << 30):.0f} GiB"
    return f"{machine['processor']}, {machine['cores']} cores, {memory}, {machine['system']}, {versions}."


def _how(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    rounds = max((row.get("rounds", 0) for row in rows), default=0) or settings.get("rounds", 0)
    pairs = f", {settings['pairs_of_passes']} pairs of passes of each" if "pairs_of_passes" in settings else ""
    return f"Medians of {rounds} rounds in which the rows take turns{pairs}; in brackets the smallest and the largest."
