"""A plan as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pylomin.errors import MissingPackageError, PassError
from pylomin.io.sizes import format_bytes

if TYPE_CHECKING:
    from pylomin.residency.plan import Plan

_STAYS, _STREAMS, _FREE = "#3b6ea5", "#e08a3c", "#d9d9d9"
_MIB = 1 << 20


def draw_plan(plan: Plan, path: Path) -> None:
    """Above, the sizes of what is used, in order, and what of it streams; below, the budget beside all weights.

    Raises:
        MissingPackageError: matplotlib is not installed.
        PassError: it has no format of that name.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise MissingPackageError(f"a picture needs matplotlib: pip install 'pylomin[plot]'. ({error})") from error

    figure = Figure(figsize=(9, 4.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    uses, memory = figure.subplots(2, 1, height_ratios=(4, 1))
    groups = [plan.groups[index] for index in plan.order]
    sizes = [group.size_bytes / _MIB for group in groups]
    uses.bar(
        range(1, len(groups) + 1),
        sizes,
        width=0.85 if len(groups) <= 100 else 1.0,
        color=[_STAYS if group.resident else _STREAMS for group in groups],
    )
    read_bytes = sum(group.size_bytes for group in groups if not group.resident)
    time = "" if plan.elapsed_s is None else f", {plan.elapsed_s:.3g} s predicted"
    uses.set_title(f"One pass: {len(groups)} uses, {format_bytes(read_bytes)} read{time}", loc="left")
    uses.set_xlabel("uses, in order")
    uses.set_ylabel("MiB of weights")
    uses.set_xlim(0.4, len(groups) + 0.6)
    uses.legend(
        handles=[Patch(color=_STAYS, label="stays in memory"), Patch(color=_STREAMS, label="streams")],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=2,
        frameon=False,
    )
    total_bytes = sum(group.size_bytes for group in plan.groups)
    memory.barh(1, plan.resident_bytes / _MIB, color=_STAYS)
    memory.barh(1, plan.window_bytes / _MIB, left=plan.resident_bytes / _MIB, color=_STREAMS)
    memory.barh(0, total_bytes / _MIB, color=_FREE)
    memory.set_yticks([1, 0], ["budget", "all weights"])
    memory.set_xlabel(
        f"MiB: {format_bytes(plan.resident_bytes)} of residents and a window of {format_bytes(plan.window_bytes)}"
    )
    for axes in (uses, memory):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise PassError(f"cannot draw {str(path)!r}: {error}.") from error
