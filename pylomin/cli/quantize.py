"""``pylomin quantize``."""

from __future__ import annotations

from typing import Annotated

import typer

from pylomin.cli.arguments import Json, Overwrite, Scheme, ShardSize, SourceOrUrl, Target
from pylomin.cli.output import print_json, print_table
from pylomin.io.sizes import format_bytes


def quantize(
    source: SourceOrUrl,
    target: Target,
    scheme: Annotated[
        Scheme, typer.Option(help="int8 and int4 have a scale for each group, int8-row one for each row.")
    ] = Scheme.int8,
    filter: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Quantise the weights whose name it is found in.",
            show_default="matrices with at least 4096 elements",
        ),
    ] = None,
    group_size: Annotated[int, typer.Option(min=1, help="Neighbours in a row that share a scale.")] = 64,
    max_error: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Largest relative RMS error of a weight, such as 0.01: beyond it, a finer scheme is taken.",
            show_default="any",
        ),
    ] = None,
    max_shard_size: ShardSize = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write weights in fewer bits, and report sizes and errors. What is written runs as it is, and opens anywhere here.

    Errors are relative root mean square ones, and the largest absolute one, of each weight.
    """
    from pylomin.cli.layout import lines_of
    from pylomin.save import save_store
    from pylomin.store.open import open_store

    path = save_store(
        source,
        target,
        quantize=scheme.value,
        quantize_filter=filter,
        group_size=group_size,
        max_error=max_error,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    store = open_store(path)
    try:
        lines = lines_of(store)
    finally:
        store.close()
    before = sum(line.size_bytes for line in lines)
    after = sum(line.size_bytes if line.stored_bytes is None else line.stored_bytes for line in lines)
    if as_json:
        weights = [line.to_json() for line in lines]
        print_json({"path": str(path), "size_bytes": before, "stored_bytes": after, "weights": weights})
        return
    print_table(
        ["weight", "scheme", ">size", ">stored", ">RMS error", ">max error", "notes"],
        [
            (
                line.name,
                line.dtype if line.rms_error is None else line.layout,
                format_bytes(line.size_bytes),
                format_bytes(line.stored_bytes or 0),
                "" if line.rms_error is None else f"{line.rms_error:.3%}",
                "" if line.max_error is None else f"{line.max_error:.2e}",
                line.reason or "",
            )
            for line in lines
        ],
    )
    typer.echo(f"{format_bytes(before)} became {format_bytes(after)} ({before / max(1, after):.2f} times smaller)")
    typer.echo(str(path))
