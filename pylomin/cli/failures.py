"""What goes wrong in a command: one message and an exit code, not a traceback."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from pylomin.cli.output import show_error
from pylomin.errors import (
    MissingPackageError,
    OutputExistsError,
    PassError,
    PlanError,
    PylominError,
    WeightNotFoundError,
)

NOT_OK = 1  # what was asked about
MISTAKE = 2  # the user's, as for wrong options

_MISTAKES = (MissingPackageError, OutputExistsError, PassError, PlanError, WeightNotFoundError)


class Commands(TyperGroup):
    """A group of commands that fail with a message; ``--debug`` before the command shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # whoever read our output has seen enough, which typer knows how to end
        except (PylominError, OSError, ModuleNotFoundError) as error:
            if ctx.params.get("debug"):
                raise
            show_error(str(error))
            raise typer.Exit(exit_code(error)) from None


def exit_code(error: BaseException) -> int:
    """For errors that a command lets pass."""
    if isinstance(error, PylominError):
        return MISTAKE if isinstance(error, _MISTAKES) else NOT_OK
    return MISTAKE  # no permission, no such directory, a package that is not installed
