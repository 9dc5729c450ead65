"""``pylomin verify``."""

from __future__ import annotations

import typer

from pylomin.cli.arguments import Json, SourceOrUrl, shown
from pylomin.cli.failures import NOT_OK
from pylomin.cli.output import note, print_json, print_table


def verify(source: SourceOrUrl, as_json: Json = False) -> None:
    """Compare every weight with the digest that its file keeps. Exits 1 if anything differs.

    pylomin writes digests (convert, quantize, save_store). Of weights that another library wrote, which have none,
    nothing can be said.
    """
    from pylomin.store.verify import verify

    report = verify(source)
    if as_json:
        print_json(
            {
                "source": shown(source),
                "ok": report.ok,
                "checked": list(report.checked),
                "differences": [
                    {"weight": found.name, "path": found.path, "problem": found.problem} for found in report.differences
                ],
                "without_digest": list(report.without_digest),
            }
        )
    else:
        if report.differences:
            rows = [(found.name or "(header)", found.path, found.problem) for found in report.differences]
            print_table(["weight", "file", "problem"], rows)
        typer.echo(str(report).splitlines()[0])
    if report.without_digest and not report.checked and report.ok:
        note("Nothing could be compared: no weight has a digest. Those that pylomin convert writes have one.")
    if not report.ok:
        raise typer.Exit(NOT_OK)
