"""``pylomin checkpoint``: training checkpoints that ``pylomin.save_checkpoint`` and ``pylomin.checkpoints`` wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from pylomin.cli.arguments import Dtype, Json, Overwrite, ShardSize, Target, dtype_name
from pylomin.cli.failures import NOT_OK
from pylomin.cli.output import note, print_json, print_table
from pylomin.errors import PylominError
from pylomin.io.sizes import format_bytes

checkpoint_commands = typer.Typer(no_args_is_help=True, help="List, show, compare and export training checkpoints.")

First = Annotated[Path, typer.Argument(exists=True, file_okay=False, metavar="FIRST", help="A checkpoint.")]
Second = Annotated[Path, typer.Argument(exists=True, file_okay=False, metavar="SECOND", help="Another one.")]
Checkpoint = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, metavar="DIRECTORY", help="The directory of a checkpoint.")
]


@checkpoint_commands.command("ls")
def list_checkpoints(
    directory: Annotated[
        Path,
        typer.Argument(
            exists=True,
            file_okay=False,
            metavar="DIRECTORY",
            help="A directory with checkpoints, or one of them.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """List checkpoints, the oldest first. Exits 1 if one is not whole, or there is none."""
    found = [_listed(path) for path in _find(directory)]
    if as_json:
        print_json(found)
    elif found:
        print_table(
            ["checkpoint", ">step", ">epoch", ">size", "state"],
            [
                (
                    os.path.basename(entry["path"]),
                    _text(entry["step"]),
                    _text(entry["epoch"]),
                    format_bytes(entry["stored_bytes"]),
                    entry["problem"] or (f"difference to {entry['reference']}" if entry["reference"] else "whole"),
                )
                for entry in found
            ],
        )
    if not found:
        note(f"No checkpoints in {directory}.")
    if not found or any(entry["problem"] for entry in found):
        raise typer.Exit(NOT_OK)


@checkpoint_commands.command("show")
def show_checkpoint(directory: Checkpoint, as_json: Json = False) -> None:
    """Show what a checkpoint holds: its step, what of the training run is in it, and how its tensors are stored."""
    from pylomin.checkpoint.directory import FILES, load_checkpoint, read_document

    checkpoint = load_checkpoint(directory)
    document = read_document(os.fspath(directory))
    sections = [_section(directory, name) for name in FILES]
    # Numbers and strings of the user's; tensors among them are shown by name only.
    extra = {
        name: value if isinstance(value, (int, float, str, bool)) else "..." for name, value in checkpoint.extra.items()
    }
    reference = (document.get("reference") or {}).get("path")
    parts = [part for part in ("optimizer", "scheduler", "scaler", "rng") if document["sections"].get(part) is not None]
    if as_json:
        print_json(
            {
                "path": os.fspath(directory),
                "step": checkpoint.step,
                "epoch": checkpoint.epoch,
                "extra": extra,
                "parts": parts,
                "reference": reference,
                "files": sections,
            }
        )
        return
    rows = [
        ("step", _text(checkpoint.step)),
        ("epoch", _text(checkpoint.epoch)),
        ("beside the model", ", ".join(parts) or "nothing"),
        ("reference", reference or "none"),
        *((f"extra {name}", str(value)) for name, value in extra.items()),
    ]
    print_table(["", "value"], rows)
    typer.echo()
    print_table(
        ["file", ">tensors", ">size", ">stored", "stored as", ">largest RMS error"],
        [
            (
                section["file"],
                str(section["tensors"]),
                format_bytes(section["size_bytes"]),
                format_bytes(section["stored_bytes"]),
                ", ".join(f"{count} {layout}" for layout, count in section["layouts"].items()),
                "" if section["rms_error"] is None else f"{section['rms_error']:.3%}",
            )
            for section in sections
        ],
    )


@checkpoint_commands.command("diff")
def diff_checkpoints(
    first: First,
    second: Second,
    every: Annotated[bool, typer.Option("--all", help="List tensors that are equal, too.")] = False,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor. Exits 1 if they differ.

    Of each tensor that differs, the largest difference and the root mean square of the difference over that of the
    tensor in FIRST.
    """
    from pylomin.checkpoint.directory import FILES
    from pylomin.cli.comparing import compare_stores

    compared = [found for name in FILES for found in compare_stores(first / name, second / name)]
    documents = [_progress(path) for path in (first, second)]
    compared += [
        {"name": name, "difference": f"{_text(mine)} became {_text(other)}", "max": None, "rms": None}
        for (name, mine), other in zip(documents[0].items(), documents[1].values(), strict=True)
        if mine != other
    ]
    different = [found for found in compared if found["difference"]]
    shown = compared if every else different
    if as_json:
        print_json(shown)
    elif shown:
        print_table(
            ["tensor", "difference", ">max", ">relative RMS"],
            [
                (
                    found["name"],
                    found["difference"] or "none",
                    "" if found["max"] is None else f"{found['max']:.3e}",
                    "" if found["rms"] is None else f"{found['rms']:.3e}",
                )
                for found in shown
            ],
        )
    if different:
        raise typer.Exit(NOT_OK)


@checkpoint_commands.command("export")
def export_checkpoint(
    directory: Checkpoint,
    target: Target,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Convert floating-point weights.", show_default="as stored")
    ] = None,
    max_shard_size: ShardSize = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the weights of the model alone, in full, as safetensors that any program reads. Prints the path."""
    import torch

    from pylomin.checkpoint.directory import MODEL_FILE, read_document
    from pylomin.save import save_store

    read_document(os.fspath(directory))
    path = save_store(
        directory / MODEL_FILE,
        target,
        dtype=None if dtype is None else getattr(torch, dtype_name(dtype)),
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    typer.echo(str(path))


def _find(directory: Path) -> list[Path]:
    from pylomin.checkpoint.directory import DOCUMENT
    from pylomin.checkpoint.series import find_checkpoints

    if (directory / DOCUMENT).exists():
        return [directory]
    series = find_checkpoints(directory)
    others = sorted(path for path in directory.iterdir() if path not in series and (path / DOCUMENT).exists())
    return [*others, *series]


def _listed(path: Path) -> dict[str, Any]:
    from pylomin.checkpoint.directory import read_document

    entry: dict[str, Any] = {
        "path": os.fspath(path),
        "step": None,
        "epoch": None,
        "stored_bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "reference": None,
        "problem": None,
    }
    try:
        entry |= _progress(path)
        entry["reference"] = (read_document(os.fspath(path)).get("reference") or {}).get("path")
    except PylominError as error:
        entry["problem"] = str(error)
    return entry


def _progress(path: Path) -> dict[str, Any]:
    from pylomin.checkpoint.directory import load_checkpoint

    checkpoint = load_checkpoint(path)
    return {"step": checkpoint.step, "epoch": checkpoint.epoch}


def _section(directory: Path, file: str) -> dict[str, Any]:
    from collections import Counter

    from pylomin.cli.layout import lines_of
    from pylomin.store.open import open_store

    store = open_store(directory / file)
    try:
        lines = lines_of(store)
    finally:
        store.close()
    errors = [line.rms_error for line in lines if line.rms_error is not None]
    return {
        "file": file,
        "tensors": len(lines),
        "size_bytes": sum(line.size_bytes for line in lines),
        "stored_bytes": sum(line.stored_bytes or 0 for line in lines),
        "layouts": dict(Counter("exact" if line.layout == "contiguous" else line.layout for line in lines)),
        "rms_error": max(errors, default=None),
    }


def _text(value: object) -> str:
    return "" if value is None else str(value)
