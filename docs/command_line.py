"""Fills the page of the command line from the program itself.

A hook of mkdocs: ``<!-- pylomin plan -->`` becomes what ``pylomin plan --help``
says.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from pylomin.cli.app import app

PAGE = "command-line.md"
_MARK = re.compile(r"^<!-- pylomin (?P<command>.+?) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """Called by mkdocs for each page."""
    return fill(markdown) if page.file.src_uri == PAGE else markdown


def fill(markdown: str) -> str:
    """Each mark replaced by the help of its command."""
    known = dict(commands())
    return _MARK.sub(lambda mark: _described(known[mark["command"]]), markdown)


def commands(command: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Name and command, those of groups one by one: ``checkpoint ls``."""
    command = command or get_command(app)
    below = getattr(command, "commands", None)
    if below is None:
        yield name, command
        return
    for part, one in below.items():
        yield from commands(one, f"{name} {part}".strip())


def _described(command: Any) -> str:
    options = "\n".join(map(_line, command.params))
    return f"{inspect.cleandoc(command.help)}\n\n{options}"


def _line(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        names = f"`{(parameter.metavar or parameter.name).upper()}`"
    else:
        names = ", ".join(f"`{option}`" for option in parameter.opts)
    text = " ".join((parameter.help or "").split())
    default = getattr(parameter.default, "value", parameter.default)
    if isinstance(parameter.show_default, str):
        text += f" Default: {parameter.show_default}."
    elif isinstance(default, (str, int, float)) and default is not False:
        text += f" Default: {default}."
    return f"* {names}: {text}"
