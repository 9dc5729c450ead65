"""The command line: ``pylomin``, or ``python -m pylomin``."""

from __future__ import annotations

import sys

_NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command that ``sys.argv`` names, and exit."""
    try:
        from pylomin.cli.app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _NEEDED:
            raise
        print(f"pylomin: the command line needs {package}: pip install 'pylomin[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    app(prog_name="pylomin")
