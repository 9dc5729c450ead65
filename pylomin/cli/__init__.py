"""The command line: ``pylomin``, or ``python -m pylomin``."""

from __future__ import annotations

import sys

_NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command that ``sys.argv`` names, and exit."""
    try:
        from pylomin.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _NEEDED:
            raise
        print(f"pylomin: the command line needs {error.name}: pip install 'pylomin[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    app(prog_name="pylomin")
