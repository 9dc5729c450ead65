"""Markdown tables from result files.

``python -m benchmarks.tables`` puts them into README.md and pages of docs/, between ``<!-- table: NAME -->`` and
``<!-- end of table -->``; with ``--check`` it changes nothing and fails if they are stale.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.columns import COLUMNS, caption, cells
from benchmarks.goals import HEADER, goal_rows

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "machines.md")
RESULTS = ROOT / "docs" / "results"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns also line up as plain text, all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        for row in (header, rule, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def demo_table(result: Mapping[str, Any]) -> str:
    """The comparison that ``make demo`` prints."""
    header = (
        "variant",
        "peak tensor memory",
        "peak process memory",
        "sequences/s",
        "share of resident speed",
        "largest difference",
    )
    rows = []
    for row in result["rows"]:
        if "error" in row:
            rows.append((row["variant"], "failed", *[""] * 4))
            continue
        share = row["share_of_resident"]
        rows.append(
            (
                row["variant"],
                _mebibytes(row["peak_tensor_bytes"]),
                _mebibytes(row["peak_process_bytes"]),
                f"{row['sequences_per_s']['median']:.3f}",
                f"{share['median']:.0%} ({share['smallest']:.0%}–{share['largest']:.0%})",
                f"{row['largest_difference']:.3g}",
            )
        )
    return markdown_table(header, rows)


def demo_caption(result: Mapping[str, Any]) -> str:
    """What has to be said under the table for its numbers to mean something."""
    machine, settings, bound = result["machine"], result["settings"], result["bound"]
    imported_gib = result["memory_over_time"]["resident"][0][1]  # before the model is built
    limit_s = max(bound["compute_s"], bound["read_s"])
    return "\n".join(
        (
            f"{settings['model']}, {_mebibytes(settings['checkpoint_bytes'])} of float32 weights, "
            f"{settings['input']}; weight file {settings['file_state']}.",
            f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, torch {machine['torch']}, "
            f"transformers {machine['transformers']}, accelerate {machine['accelerate']}.",
            f"Speed: median of {settings['rounds']} alternating rounds; share: median of the rounds' ratios "
            "(smallest–largest).",
            f"Process memory includes {imported_gib * 1024:,.0f} MiB of Python, torch and transformers.",
            f"A resident pass takes {bound['compute_s']:.2f} s. Reading all weights once takes {bound['read_s']:.2f} s "
            f"at {bound['read_bytes_per_s'] / 1e9:.1f} GB/s: were reads and computing to overlap fully, a pass over "
            f"weights on disk would take {limit_s:.2f} s.",
        )
    )


def _mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):,.0f} MiB"


def _demo(result: Mapping[str, Any]) -> str:
    pictures = (
        "![Process memory over time, one line per variant](docs/results/demo-memory.png)\n"
        "![Speed against peak process memory, one point per variant](docs/results/demo-speed.png)"
    )
    return f"{demo_table(result)}\n\n{demo_caption(result)}\n\n{pictures}"


def table(name: str, result: Mapping[str, Any]) -> str:
    """The table of a benchmark."""
    return markdown_table(*cells(name, result["rows"]))


# Name: (what is to be seen, file) of the pictures under its table, as docs/benchmarks.md refers to them
PICTURES = {
    "bert": ("Process memory over time, one line per variant", "results/bert-memory.png"),
    "decode": ("Tokens per second against the budget, beside the bound and the peers", "results/decode.png"),
    "machines": ("Times as fast as one machine against the number of machines, by network", "results/machines.png"),
}


def _benchmark(name: str, result: Mapping[str, Any]) -> str:
    parts = [table(name, result), caption(name, result)]
    if name in PICTURES:
        parts.append("![{}]({})".format(*PICTURES[name]))
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "demo": _demo,
    **{name: partial(_benchmark, name) for name in COLUMNS},
}


def goals_table(results: Path) -> str:
    """What was to be shown, and what was measured, over all result files there are."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    rows = goal_rows(found)
    return markdown_table(HEADER, rows) if rows else '*Not measured yet: `make bench ARGS="--publish"`.*'


def fill(text: str, results: Path = RESULTS) -> str:
    """``text`` with every marked table made anew from its result file; without one it says so."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        path = results / f"{name}.json"
        if name == "goals":
            return f"<!-- table: {name} -->\n{goals_table(results)}\n<!-- end of table -->"
        command = "make demo ARGS=--publish" if name == "demo" else f'make bench ARGS="{name} --publish"'
        content = TABLES[name](json.loads(path.read_text())) if path.exists() else f"*Not measured yet: `{command}`.*"
        return f"<!-- table: {name} -->\n{content}\n<!-- end of table -->"

    return re.sub(r"<!-- table: (?P<name>\w+) -->.*?<!-- end of table -->", replace, text, flags=re.DOTALL)


def fill_all() -> None:
    """Put the tables into the pages."""
    for page in PAGES:
        page.write_text(fill(page.read_text()))


def main() -> None:
    """Fill in the tables of the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if stale")
    if not parser.parse_args().check:
        fill_all()
    elif stale := [page.name for page in PAGES if fill(page.read_text()) != page.read_text()]:
        raise SystemExit(f"stale tables in {', '.join(stale)}; run python -m benchmarks.tables")


if __name__ == "__main__":
    main()
