"""For the API reference: docstrings are written for reStructuredText roles and doctest, the site reads Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod):`(?P<short>~?)(?P<path>[\w.]+)`")
_DOCTEST = re.compile(r"^>>> .*(?:\n(?!\n|>>> ).+)*(?:\n>>> .*(?:\n(?!\n|>>> ).+)*)*", re.MULTILINE)
_LITERAL = re.compile(r"^::\n\n", re.MULTILINE)  # what follows is indented, which is code in Markdown, too


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for everything that has a docstring, and more."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called when a package is complete: a function goes before the module of its name, as it does for users."""
        for name in pkg.exports or []:
            member = pkg.members.get(str(name))
            if isinstance(member, griffe.Module):
                function = member.members[str(name)]
                assert isinstance(function, griffe.Function)
                pkg.set_member(str(name), function)


def to_markdown(docstring: str) -> str:
    """Roles become links, or code where there is no page to link to; doctests become blocks of code."""
    docstring = _LITERAL.sub("", docstring)
    docstring = _DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", docstring)
    return _ROLE.sub(_link, docstring)


def _link(role: re.Match[str]) -> str:
    path = role["path"]
    text = path.rpartition(".")[2] if role["short"] else path
    return f'<autoref identifier="{path}" optional><code>{text}</code></autoref>'
