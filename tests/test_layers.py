"""Imports go down the layers only, and importing the package is quick."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pylomin"

LAYERS = [
    {"__init__", "__main__"},
    {"cli"},
    {"checkpoint", "passes"},
    {"export"},
    {"loading", "pretrained", "save"},
    {"measure"},
    {"lazy"},
    {"residency"},
    {"store"},
    {"quantize", "remote"},
    {"io"},
    {"errors"},
]
HEIGHT = {name: len(LAYERS) - level for level, names in enumerate(LAYERS) for name in names}
THIRD_PARTY = {"torch", "safetensors"}
COMMAND_LINE = {"typer", "rich"}  # of the package cli, whose __init__.py says so where they are missing
HEAVY = ("numpy", "transformers", "accelerate", "sympy", "torch._dynamo", "torch._inductor", "torch.fx.experimental")
FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: Path) -> str:
    parts = ["pylomin", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree: ast.AST, module: str, is_package: bool, *, everywhere: bool) -> list[tuple[int, str]]:
    """(line, absolute name) of each import; without ``everywhere`` those that run when the module is imported."""
    found: list[tuple[int, str]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            # `from pylomin.lazy import partial` imports a module; a name that is none does no harm here.
            found += [(node.lineno, base)] + [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.stmt) and is_for_types(node):
            continue
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found += imports(node, module, is_package, everywhere=everywhere)
    return found


def imports_of(path: Path, *, everywhere: bool) -> list[tuple[int, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return imports(tree, module_of(path), path.name == "__init__.py", everywhere=everywhere)


def test_every_file_belongs_to_a_layer() -> None:
    assert {layer_of(module_of(path)) for path in FILES} <= set(HEIGHT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = layer_of(module_of(path))
    up = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports_of(path, everywhere=True)
        if name.split(".")[0] == "pylomin"
        and name != "pylomin"
        and HEIGHT.get(layer_of(name), 0) > HEIGHT[own]
        and layer_of(name) != own
    ]
    same_height = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports_of(path, everywhere=True)
        if name.startswith("pylomin.") and layer_of(name) != own and HEIGHT.get(layer_of(name)) == HEIGHT[own]
    ]
    assert up == []
    assert same_height == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_torch_and_safetensors_are_needed(path: Path) -> None:
    is_command = layer_of(module_of(path)) == "cli" and path.name != "__init__.py"
    allowed = THIRD_PARTY | {"pylomin"} | (COMMAND_LINE if is_command else set())
    foreign = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports_of(path, everywhere=False)
        if (top := name.split(".")[0]) not in sys.stdlib_module_names and top not in allowed
    ]
    assert foreign == []


def test_nobody_imports_the_whole_package() -> None:
    """The layers could not be told apart otherwise. The command line, above all of them, may."""
    whole = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES
        for line, name in imports_of(path, everywhere=True)
        if name == "pylomin" and path.name != "__init__.py" and layer_of(module_of(path)) != "cli"
    ]
    assert whole == []


def modules_after(*statements: str) -> list[set[str]]:
    """What is imported after each statement, in one fresh interpreter."""
    script = ["import json, sys", "seen = []"]
    for statement in statements:
        script += [statement, "seen.append(sorted(sys.modules))"]
    script.append("print(json.dumps(seen))")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return [set(names) for names in json.loads(done.stdout)]


def test_what_an_import_costs() -> None:
    """No time is measured: what would cost any is not imported.

    The first operation on any tensor subclass makes torch import its distributed tensors; that is not ours to avoid.
    """
    pylomin_alone, with_torch, with_all = modules_after(
        "import pylomin", "import torch", "for name in pylomin.__all__: getattr(pylomin, name)"
    )
    assert "torch" not in pylomin_alone
    added = with_all - with_torch
    assert {name for name in added if name.split(".")[0] == "torch"} <= set(), "torch modules that torch does not need"
    assert not [name for name in added if name.startswith(HEAVY)]
    assert len([name for name in added if not name.startswith("pylomin")]) < 40
