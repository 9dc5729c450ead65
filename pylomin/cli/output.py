"""Tables, JSON and messages. What is piped is plain text without limits on its width."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """A table on stdout. Columns whose name begins with ``>`` are aligned to the right."""
    right = [column.startswith(">") for column in columns]
    names = [column.removeprefix(">") for column in columns]
    console = Console()
    if not console.is_terminal:
        typer.echo(_plain(names, right, rows, title))
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, is_right in zip(names, right, strict=True):
        table.add_column(name, justify="right" if is_right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # names may hold what rich takes for markup
    console.print(table)


def _plain(names: Sequence[str], right: Sequence[bool], rows: Sequence[Sequence[str]], title: str | None) -> str:
    lines = [names, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(names))]
    text = [
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([title, *text] if title else text)


def print_json(document: Any) -> None:
    """JSON on stdout, and nothing else."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def show_error(message: str) -> None:
    """One message on stderr, red where it is a terminal."""
    Console(stderr=True).print(Text(f"Error: {message}", style="bold red"), soft_wrap=True)


def note(message: str) -> None:
    """Beside the result: on stderr."""
    Console(stderr=True).print(Text(message), soft_wrap=True)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show that something is going on whose end nobody knows, where somebody sees it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(f"{what} ..."):
        yield
