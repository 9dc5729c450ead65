"""The pages of docs/ are true: their code runs and prints what they show, and no public name is left out.

Blocks of ``python`` run, page by page; a block of ``text`` behind one is what it prints. ``py`` is for fragments.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import pylomin
from pylomin import errors

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SECONDS = re.compile(r"[\d.]+(e-\d+)? s\b")  # differ from run to run
ERROR_CLASSES = {name for name, value in vars(errors).items() if isinstance(value, type)}


def blocks_of(page: str) -> list[tuple[str, str, int]]:
    """Of each block: language, content, number of lines above it."""
    text = (DOCS / page).read_text()
    return [(match[1], match[2], text.count("\n", 0, match.start(2))) for match in BLOCK.finditer(text)]


def run(source: str, page: str, namespace: dict[str, Any]) -> str:
    """What a block prints, then the error of ours that it ends with."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(source, page, "exec"), namespace)
        except pylomin.PylominError as error:
            print(f"{type(error).__name__}: {error}")
    return printed.getvalue()


def shows(shown: str, printed: str) -> bool:
    """Is ``shown`` what was printed, but for line breaks, seconds, and what ``...`` stands for?"""
    shown, printed = (SECONDS.sub("N s", " ".join(text.split())) for text in (shown, printed))
    return re.fullmatch(re.escape(shown).replace(r"\.\.\.", ".*"), printed) is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("page", [path.name for path in sorted(DOCS.glob("*.md")) if "```python\n" in path.read_text()])
def test_code_runs_and_prints_what_is_shown(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gc.collect()  # models of earlier tests: what is measured counts the weights of all that there are
    if page == "troubleshooting.md":
        monkeypatch.setitem(sys.modules, "zstandard", None)  # it shows what happens where that is not installed
    namespace: dict[str, Any] = {"__name__": page}
    blocks = [*blocks_of(page), ("", "", 0)]
    for (language, content, lines_above), (next_language, shown, _) in pairwise(blocks):
        if language == "python":
            printed = run("\n" * lines_above + content, page, namespace)  # so that tracebacks have the page's lines
            assert shows(shown if next_language == "text" else "", printed), f"{page} prints:\n{printed}"


def test_every_public_name_is_in_the_reference() -> None:
    documented = re.findall(r"^::: pylomin\.(?:[\w.]+\.)?(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert not (set(pylomin.__all__) | ERROR_CLASSES) - set(documented)


def test_every_error_has_a_section_with_its_text() -> None:
    sections = re.split(r"^## ", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)[1:]
    by_name = {section.split("\n", 1)[0]: section for section in sections}
    assert not ERROR_CLASSES - set(by_name)
    for name in ERROR_CLASSES - {"PylominError"}:  # the base of the others
        assert f"```text\n{name}: " in by_name[name], name


def test_every_command_is_shown_and_its_examples_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    hook = importlib.import_module("command_line")
    page = (DOCS / hook.PAGE).read_text()
    monkeypatch.chdir(tmp_path)
    for path in ("llama", "run/step-00000100", "run/step-00000200"):
        Path(path).mkdir(parents=True)
    for path in ("model.safetensors", "pytorch_model.bin"):
        Path(path).touch()
    for name, command in hook.commands():
        section = page.partition(f"## {name}\n")[2]
        example, _, rest = section.partition("\n```\n")
        assert rest.partition("\n## ")[0].rstrip().endswith(f"<!-- pylomin {name} -->")
        arguments = shlex.split(example.removeprefix(f"\n```sh\npylomin {name} "))
        command.make_context(name, arguments).close()
        for parameter in command.params:
            assert parameter.help in hook.fill(page)


def test_what_is_shown_is_compared() -> None:
    assert shows("a ... c\n  in 0.1 s", "a b c in 22 s\n")
    assert not shows("a", "b")
    assert not shows("", "something is printed and not shown")
