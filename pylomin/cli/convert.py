"""``pylomin convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pylomin.cli.arguments import Dtype, Overwrite, Scheme, ShardSize, SourceOrUrl, Target, dtype_name
from pylomin.errors import PassError, PlanError


def convert(
    source: SourceOrUrl,
    target: Target,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Convert floating-point weights.", show_default="as stored")
    ] = None,
    quantize: Annotated[
        Scheme | None, typer.Option(help="Quantise large matrices; see 'pylomin quantize'.", show_default="none")
    ] = None,
    max_shard_size: ShardSize = None,
    order: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Weights in the order of their use: a plan that 'pylomin plan --save' wrote, or one name in a line.",
            show_default="as in SOURCE",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write weights as safetensors, from any format, a piece in memory at a time.

    The target is there when it is whole. Prints the path to open.
    """
    import torch

    from pylomin.save import save_store

    path = save_store(
        source,
        target,
        dtype=None if dtype is None else getattr(torch, dtype_name(dtype)),
        quantize=None if quantize is None else quantize.value,
        max_shard_size=max_shard_size,
        order=None if order is None else read_order(order),
        overwrite=overwrite,
    )
    typer.echo(str(path))


def read_order(path: Path) -> list[str]:
    """Names of weights, each once, from a plan or from lines.

    Raises:
        PlanError, PassError: the file is neither.
    """
    from pylomin.residency.plan import Plan

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PassError(f"{path} is neither a plan nor a list of names: {error}.") from error
    if text.lstrip().startswith("{"):
        names = [name for use in Plan.load(path).uses() for name in use]
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise PlanError(f"{path} names no weights. Expected a plan, or one name in a line.")
    return list(dict.fromkeys(names))
