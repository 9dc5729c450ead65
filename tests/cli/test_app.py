"""What all commands have in common: help, exit codes, errors, and what a shell sees."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.main import get_command

import pylomin
from pylomin.cli.app import app
from pylomin.cli.arguments import Dtype, Scheme, dtype_name
from pylomin.cli.failures import exit_code
from pylomin.quantize.packing import SCHEMES

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **options,  # type: ignore[call-overload]
    )


def finished(*arguments: object) -> tuple[int, str, str]:
    process = start(*arguments)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def unstyled(text: str) -> str:
    """Typer writes colours wherever it finds itself in certain services of continuous integration."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def every_command() -> list[list[str]]:
    commands = []
    for name, command in get_command(app).commands.items():
        commands += [[name], *([name, inner] for inner in getattr(command, "commands", {}))]
    return commands


@pytest.mark.parametrize("command", every_command(), ids=" ".join)
def test_help(run, command):
    text = run(*command, "--help").stdout
    assert f"Usage: pylomin {' '.join(command)} " in unstyled(text)
    assert run(*command, "-h").stdout == text


def test_the_commands_are_there():
    assert {" ".join(command) for command in every_command()} == {
        *("info", "verify", "convert", "quantize", "plan", "bench", "generate", "export-onnx"),
        *("checkpoint", "checkpoint ls", "checkpoint show", "checkpoint diff", "checkpoint export"),
    }


def test_help_comes_without_torch():
    script = (
        "import sys; from pylomin.cli import main; sys.argv = ['pylomin', '--help']\n"
        "try: main()\nexcept SystemExit as e: assert not e.code\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy', 'transformers')])"
    )
    code, stdout, stderr = finished("-c", script)
    assert code == 0, stderr
    assert stdout.splitlines()[-1] == "[]"


def test_version():
    assert finished("-m", "pylomin", "--version") == (0, f"pylomin {pylomin.__version__}\n", "")


def test_no_command_is_a_mistake():
    code, stdout, stderr = finished("-m", "pylomin")
    assert code == 2
    assert "Usage" in stdout + stderr


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra(package):
    script = f"import sys; sys.modules[{package!r}] = None; from pylomin.cli import main; main()"
    code, stdout, stderr = finished("-c", script)
    assert (code, stdout) == (2, "")
    assert stderr == f"pylomin: the command line needs {package}: pip install 'pylomin[cli]'\n"


def test_another_package_that_is_missing_is_not_ours_to_explain(monkeypatch):
    from pylomin.cli import main

    monkeypatch.setitem(sys.modules, "pylomin.cli.app", None)
    with pytest.raises(ModuleNotFoundError, match=r"pylomin\.cli\.app"):
        main()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (pylomin.PassError("x"), 2),
        (pylomin.OutputExistsError("x"), 2),
        (pylomin.MissingPackageError("x"), 2),
        (PermissionError("x"), 2),
        (pylomin.StoreFormatError("x"), 1),
        (pylomin.StoreWriteError("x"), 1),
        (pylomin.BudgetError("x"), 1),
    ],
)
def test_exit_codes(error, code):
    assert exit_code(error) == code


def test_a_wrong_path(run, tmp_path):
    assert "does not exist" in unstyled(run("info", tmp_path / "none", code=2).stderr)


def test_a_corrupt_file(run, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(64)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    result = run("info", path, code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(tmp_path):
    path = tmp_path / "none.safetensors"
    path.write_bytes(b"nothing")
    code, _, stderr = finished("-m", "pylomin", "--debug", "info", path)
    assert code == 1
    assert "Traceback" in stderr
    assert "StoreFormatError" in stderr


def test_markup_in_names_is_shown_as_it_is(run, tmp_path):
    save_file({"[bold]w[/bold]": torch.ones(2)}, tmp_path / "model.safetensors")
    assert "[bold]w[/bold]" in run("info", tmp_path).stdout


def test_a_reader_that_has_seen_enough(tmp_path):
    save_file({f"weight.{place}": torch.ones(1) for place in range(5000)}, tmp_path / "model.safetensors")
    process = start("-m", "pylomin", "info", tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait(120) == 1


def test_interrupt(llama):
    process = start("-m", "pylomin", "generate", llama, "-p", "w2", "--budget", "1MiB", "-n", "1000")
    assert process.stdout is not None
    assert process.stdout.read(1) == "w"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr


def test_completion():
    process = subprocess.run(
        [sys.executable, "-m", "pylomin"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "_PYLOMIN_COMPLETE": "complete_bash",
            "COMP_WORDS": "pylomin ver",
            "COMP_CWORD": "1",
        },
    )
    assert process.stdout.split() == ["verify"]


def test_names_of_schemes_and_dtypes_are_those_of_the_library():
    assert {scheme.value for scheme in Scheme} == set(SCHEMES)
    assert all(getattr(torch, dtype_name(dtype)).is_floating_point for dtype in Dtype)
