"""``pylomin plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pylomin.cli.arguments import Budget, ModelDtype, Source, dtype_name
from pylomin.cli.output import print_table, working
from pylomin.errors import PassError
from pylomin.io.sizes import format_bytes

if TYPE_CHECKING:
    from pylomin.residency.plan import Plan


def plan(
    source: Source,
    budget: Budget = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the passes that are measured.")] = 1,
    picture: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the plan: .png, .svg or .pdf.", show_default="none")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="JSON", help="Keep the plan, for pylomin.prefetch and 'pylomin convert'.", show_default="not kept"
        ),
    ] = None,
    groups: Annotated[bool, typer.Option("--groups", help="List all groups of weights, in the order of use.")] = False,
    dtype: ModelDtype = None,
) -> None:
    """Show what a memory budget means: what stays in memory, what streams, the peak and the speed to expect.

    A directory of a transformers model is opened and run three times, so that order and speeds are measured. Of weights
    alone, the order is that of the file, a group is what a module owns by its name, and the time is that of reading.
    Exits 1 if the budget is too small.
    """
    from pylomin.cli.models import is_pretrained

    if is_pretrained(source):
        with working("Running the model"):
            made = _plan_of_model(source, budget, tokens, None if dtype is None else dtype_name(dtype))
    else:
        from pylomin.cli.weights_plan import plan_of_weights

        if budget is None:
            raise PassError("weights without a model need --budget, such as --budget 800MiB.")
        if dtype is not None:
            raise PassError("--dtype is for models; of weights without one, convert a copy: pylomin convert --dtype.")
        with working("Measuring the disk"):
            made = plan_of_weights(source, budget)
    print_table(["", ">amount", ""], _summary(made))
    if groups:
        typer.echo()
        print_table(
            [">use", ">size", "in memory", "weights"],
            [
                (
                    str(place + 1),
                    format_bytes(group.size_bytes),
                    "stays" if group.resident else "streams" if group.streamed_bytes is None else "streams by tiles",
                    ", ".join(group.weights),
                )
                for place, group in enumerate(made.groups[index] for index in made.order)
            ],
        )
    for name, choice in made.choices.items():
        typer.echo(f"{name}: {choice}")
    if save is not None:
        made.save(save)
    if picture is not None:
        from pylomin.cli.picture import draw_plan

        draw_plan(made, picture)


def _plan_of_model(directory: Path, budget: int | None, tokens: int, dtype: str | None) -> Plan:
    from pylomin.cli.models import example_inputs, open_model
    from pylomin.passes.fit import fit
    from pylomin.passes.planning import plan_of

    model = open_model(directory, dtype=dtype)
    return plan_of(fit(model, budget, kwargs=example_inputs(model, tokens)))


def _summary(plan: Plan) -> list[tuple[str, str, str]]:
    residents = sum(group.resident for group in plan.groups)
    streamed = [plan.groups[index] for index in plan.order if not plan.groups[index].resident]
    total_bytes = sum(group.size_bytes for group in plan.groups)
    rows = [
        ("budget", format_bytes(plan.memory_budget), f"for {format_bytes(total_bytes)} of weights"),
        ("resident", format_bytes(plan.resident_bytes), f"{residents} of {len(plan.groups)} groups stay in memory"),
        ("window", format_bytes(plan.window_bytes), f"{len(plan.groups) - residents} groups stream through it"),
        ("read", format_bytes(sum(group.size_bytes for group in streamed)), f"for each pass, in {len(streamed)} reads"),
    ]
    if plan.peak_bytes is not None:
        rows.append(("peak", format_bytes(plan.peak_bytes), "of weights, predicted"))
    if plan.elapsed_s is not None:
        per_s = f", {1 / plan.elapsed_s:.3g} passes per second" if plan.elapsed_s else ""
        rows.append(("time", f"{plan.elapsed_s:.3g} s", f"for each pass, predicted{per_s}"))
    return rows
