"""What the API reference makes of docstrings before it parses them.

They have roles of reStructuredText and doctests; the site reads Markdown.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod):`(?P<short>~?)(?P<path>[\w.]+)`")
_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_LITERAL = re.compile(r"^::\n\n", re.MULTILINE)  # indented text is code anyway


class Docstrings(griffe.Extension):
    """Rewrites each docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for everything that may have a docstring."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(docstring: str) -> str:
    """Roles become links, or code where there is no page to link to.

    Doctests become blocks of code.
    """
    docstring = _LITERAL.sub("", docstring)
    docstring = _DOCTEST.sub(
        lambda found: f"```pycon\n{found[0]}\n```", docstring
    )
    return _ROLE.sub(_link, docstring)


def _link(role: re.Match[str]) -> str:
    path = role["path"]
    text = path.rpartition(".")[2] if role["short"] else path
    return (
        f'<autoref identifier="{path}" optional><code>{text}</code></autoref>'
    )
