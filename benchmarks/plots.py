"""Pictures of results. Needs matplotlib (extra ``plot``), imported when a picture is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def plot_memory_over_time(samples: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Draw one line of (seconds, GiB) per variant."""
    figure, axes = _figure()
    for (name, line), colour in zip(samples.items(), COLOURS, strict=False):
        axes.plot(*zip(*line, strict=True), label=name, color=colour, linewidth=1.4)
    axes.set(xlabel="seconds since the model is built", ylabel="process memory (RSS), GiB")
    axes.set_title("Memory while a model is loaded and runs")
    _save(figure, axes, path)


def plot_speed_against_memory(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw one point per row that has ``peak_process_bytes`` and ``sequences_per_s``."""
    figure, axes = _figure()
    for row, colour, marker in zip(rows, COLOURS, MARKERS, strict=False):
        memory_gib = row["peak_process_bytes"] / (1 << 30)
        speed = row["sequences_per_s"]["median"]
        axes.plot(
            memory_gib,
            speed,
            label=row["variant"],
            color=colour,
            marker=marker,
            markersize=9,
            linestyle="none",
        )
    axes.set(xlabel="peak process memory (RSS), GiB", ylabel="sequences per second")
    axes.set_title("Speed against memory: up and to the left is better")
    axes.margins(0.12)
    _save(figure, axes, path)


def plot_speed_against_budget(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw tokens per second of rows with a budget, and the bound beside them; rows without one where their limit is.

    A row without a limit is drawn as a line across.
    """
    figure, axes = _figure()
    done = [row for row in rows if "bound_s" in row and "budget_bytes" in row]
    done.sort(key=lambda row: row["budget_bytes"])
    budgets_gib = [row["budget_bytes"] / (1 << 30) for row in done]
    speeds = {name: [1 / row["pass_s"][name] for row in done] for name in ("median", "smallest", "largest")}
    bounds = [1 / row["bound_s"]["median"] for row in done]
    axes.plot(budgets_gib, bounds, label="bound", color=COLOURS[0], linestyle="--", linewidth=1.6)
    axes.plot(budgets_gib, speeds["median"], label="pylomin", color=COLOURS[1], marker=MARKERS[0], linewidth=1.6)
    axes.fill_between(budgets_gib, speeds["largest"], speeds["smallest"], color=COLOURS[1], alpha=0.2, linewidth=0)
    others = [row for row in rows if "pass_s" in row and row not in done]
    budget_at_limit = {row["limit_bytes"]: row["budget_bytes"] / (1 << 30) for row in done}
    for row, colour, marker in zip(others, COLOURS[2:], MARKERS[1:], strict=False):
        speed = 1 / row["pass_s"]["median"]
        if at_gib := budget_at_limit.get(row.get("limit_bytes")):
            label = f"{row['variant']}\n(limit {row['limit_bytes'] / 1e9:.1f} GB)"
            axes.plot(at_gib, speed, label=label, color=colour, marker=marker, markersize=9, linestyle="none")
        else:
            axes.axhline(speed, label=row["variant"], color=colour, linewidth=1.2)
    axes.set(xlabel="memory budget for weights, GiB", ylabel="tokens per second")
    axes.set_title("Decoding speed against the budget, file cold")
    _save(figure, axes, path)


def plot_speed_against_device_memory(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw passes per second of decoding against peak device memory, a line for each way that has budgets."""
    figure, axes = _figure()
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "pass_s" in row and row["variant"].startswith("decode: "):
            name = row["variant"].removeprefix("decode: ").partition(",")[0]
            point = (row["peak_device_bytes"] / (1 << 30), 1 / row["pass_s"]["median"])
            lines.setdefault(name, []).append(point)
    for (name, points), colour, marker in zip(lines.items(), COLOURS, MARKERS, strict=False):
        axes.plot(*zip(*sorted(points), strict=True), label=name, color=colour, marker=marker, linewidth=1.4)
    axes.set(xlabel="peak device memory, GiB", ylabel="tokens per second")
    axes.set_title("Decoding on a GPU: up and to the left is better")
    _save(figure, axes, path)


def plot_speed_against_machines(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw how many times as fast as one machine, for the passes of one token: a panel for each model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(4.5 * len(models) + 1.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        shown = [row for row in rows if row["shape"] == model and row["tokens"] == 1]
        machines = [row["machines"] for row in shown]
        axes.plot(machines, machines, label="in proportion", color="0.7", linewidth=1)
        axes.plot(
            machines, [row["bound_speedup"] for row in shown], label="bound, 25 GbE", color=COLOURS[0], linestyle="--"
        )
        for network, colour, marker in zip(shown[0]["speedups"], COLOURS[1:], MARKERS, strict=False):
            speedups = [row["speedups"][network] for row in shown]
            axes.plot(machines, speedups, label=network, color=colour, marker=marker, markersize=5, linewidth=1.4)
        staged = [(row["machines"], row["pipeline_speedup"]) for row in shown if "pipeline_speedup" in row]
        axes.plot(*zip(*staged, strict=True), label="pipeline, 25 GbE", color=COLOURS[-2], marker="X", linewidth=1.4)
        if held := [row["machines"] for row in shown if row["resident_share"] > 1 - 1e-9]:
            axes.axvline(held[0], color="0.5", linestyle=":", linewidth=1.2, label="nothing is read any more")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(machines, [str(count) for count in machines])
        axes.yaxis.set_major_formatter(lambda speed, _: f"{speed:g}")
        axes.set(xlabel="machines", ylabel="times as fast as one", title=f"{model}, one token a pass")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def plot_timeline(copies_ms: Sequence[Sequence[float]], layers_ms: Sequence[Sequence[float]], path: Path) -> None:
    """Draw when copies and layers ran on the device, one above the other."""
    figure, axes = _figure()
    for at, (name, intervals) in enumerate({"layers": layers_ms, "copies": copies_ms}.items()):
        bars = [(begin, end - begin) for begin, end in intervals]
        axes.broken_barh(
            bars, (at + 0.1, 0.8), facecolors=COLOURS[at + 1], edgecolor="white", linewidth=0.3, label=name
        )
    axes.set(xlabel="milliseconds", ylabel="")
    axes.set_yticks([])
    axes.set_title("Copies beside the computation, by events of the device")
    _save(figure, axes, path)


def _figure() -> tuple[Any, Any]:
    # The object interface: no global state, and no display is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:  # something was measured
        figure.legend(loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
