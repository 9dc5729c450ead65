"""``pylomin bench``."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pylomin.cli.arguments import Json, ModelDtype, Source, dtype_name, parse_size
from pylomin.cli.output import note, print_json, print_table, working
from pylomin.errors import BudgetError
from pylomin.io.sizes import format_bytes


def bench(
    source: Source,
    budgets: Annotated[
        list[int] | None,
        typer.Option(
            "--budget",
            parser=parse_size,
            metavar="SIZE",
            help="Run the model under this budget; may be given several times.",
            show_default="a quarter, a half and all of the weights",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one pass.")] = 1,
    passes: Annotated[int, typer.Option(min=1, help="Passes to take the median of, after two others.")] = 3,
    limit: Annotated[
        int, typer.Option(parser=parse_size, metavar="SIZE", help="Most bytes to read in each mode.")
    ] = "1GiB",  # type: ignore[assignment]  # parsed like what the user gives
    dtype: ModelDtype = None,
    as_json: Json = False,
) -> None:
    """Measure this machine with a checkpoint of yours: how fast it reads, and how fast the model runs under budgets.

    Files are read in each of pylomin's modes, from the disk ("cold", their pages dropped first, as far as the system
    lets us) and from the page cache. The model runs if SOURCE is a directory that save_pretrained of transformers made.
    """
    from pylomin.cli.layout import files_of
    from pylomin.cli.models import is_pretrained
    from pylomin.cli.reading import speeds
    from pylomin.store.open import open_store

    store = open_store(source)
    try:
        paths, total_bytes = files_of(store), sum(store.info(name).nbytes for name in store)
    finally:
        store.close()
    with working("Reading the files in each mode"):
        found = speeds(paths, limit)
    runs = []
    if is_pretrained(source):
        chosen = budgets or [total_bytes // 4, total_bytes // 2, total_bytes + (4 << 20)]  # blocks are whole pages
        for budget in sorted(set(chosen)):
            with working(f"Running under {format_bytes(budget)}"):
                runs.append(_run(source, budget, tokens, passes, None if dtype is None else dtype_name(dtype)))
    elif budgets:
        note(f"{source} is no directory of a transformers model, so that nothing is run.")
    if as_json:
        print_json(
            {
                "source": os.fspath(source),
                "weight_bytes": total_bytes,
                "reading": [
                    {"mode": s.mode, "state": s.state, "bytes_per_s": s.bytes_per_s, "problem": s.why_not or None}
                    for s in found
                ],
                "runs": runs,
            }
        )
        return
    print_table(
        ["reading", "from", ">speed"],
        [
            (
                speed.mode,
                "disk" if speed.state == "cold" else "page cache",
                speed.why_not if speed.bytes_per_s is None else f"{format_bytes(int(speed.bytes_per_s))}/s",
            )
            for speed in found
        ],
    )
    if runs:
        typer.echo()
        unit = "token" if tokens == 1 else f"pass of {tokens} tokens"
        print_table(
            [">budget", f">seconds per {unit}", ">range", ">read", ">weights in memory", "mode"],
            [_run_row(run) for run in runs],
            title=f"{format_bytes(total_bytes)} of weights",
        )


def _run(directory: Path, budget: int, tokens: int, passes: int, dtype: str | None) -> dict[str, Any]:
    """One budget; one that cannot work is a row, too."""
    import torch

    from pylomin.cli.models import example_inputs, open_model
    from pylomin.measure import stats
    from pylomin.passes.fit import fit

    run: dict[str, Any] = {"budget_bytes": budget, "seconds": None, "problem": None}
    model = open_model(directory, dtype=dtype)
    inputs = example_inputs(model, tokens)
    if inputs is None:
        run["problem"] = f"no example is known for {model.main_input_name!r}"
        return run
    times = []
    try:
        fit(model, budget, kwargs=inputs)
        before = stats(model)
        with torch.inference_mode():
            for _ in range(passes):
                started = time.perf_counter()
                model(**inputs)
                times.append(time.perf_counter() - started)
    except BudgetError as error:
        run["problem"] = str(error).splitlines()[0]
        return run
    after = stats(model)
    run |= {
        "seconds": statistics.median(times),
        "seconds_min": min(times),
        "seconds_max": max(times),
        "read_bytes": (after.bytes_read - before.bytes_read) // passes,
        "peak_bytes": after.peak_bytes,
        "mode": after.reading_mode,
    }
    return run


def _run_row(run: dict[str, Any]) -> tuple[str, ...]:
    budget = format_bytes(run["budget_bytes"])
    if run["seconds"] is None:
        return (budget, "", "", "", "", run["problem"])
    return (
        budget,
        f"{run['seconds']:.4g}",
        f"{run['seconds_min']:.3g} to {run['seconds_max']:.3g}",
        format_bytes(run["read_bytes"]),
        format_bytes(run["peak_bytes"]),
        run["mode"],
    )
