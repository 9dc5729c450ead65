"""The commands and what they have in common. Nothing here imports torch: help and completion come at once."""

from __future__ import annotations

from typing import Annotated

import typer

from pylomin import __version__
from pylomin.cli.bench import bench
from pylomin.cli.checkpoints import checkpoint_commands
from pylomin.cli.convert import convert
from pylomin.cli.export import export_onnx
from pylomin.cli.failures import Commands
from pylomin.cli.generate import generate
from pylomin.cli.info import info
from pylomin.cli.plan import plan
from pylomin.cli.quantize import quantize
from pylomin.cli.verify import verify

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # joins the lines of a paragraph
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"pylomin {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Run PyTorch models whose weights do not fit in memory, and look after their weight files.

    Exit codes: 0 for success, 1 where what was asked about is not as it should be, 2 for a mistake in the command.
    """


app.command()(info)
app.command()(verify)
app.command()(convert)
app.command()(quantize)
app.command()(plan)
app.command()(bench)
app.command()(generate)
app.command("export-onnx")(export_onnx)
app.add_typer(checkpoint_commands, name="checkpoint")
