"""Arguments and options that several commands have."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pylomin.io.sizes import parse_bytes
from pylomin.remote.urls import Url, is_url


class Dtype(str, Enum):
    """Floating-point dtypes of torch, by their own names and the short ones."""

    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    f64 = "f64"
    f32 = "f32"
    bf16 = "bf16"
    f16 = "f16"


class Scheme(str, Enum):
    """What ``pylomin.save_store`` can quantise to."""

    int8 = "int8"
    int4 = "int4"
    int8_row = "int8-row"
    bf16 = "bf16"
    f16 = "f16"


_LONG = {"f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def dtype_name(dtype: Dtype) -> str:
    """As an attribute of torch."""
    return _LONG.get(dtype.value, dtype.value)


def parse_size(text: str) -> int:
    """``800MiB`` as bytes, for an option."""
    try:
        return parse_bytes(text, what="the size")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Source = Annotated[
    Path,
    typer.Argument(
        exists=True,
        metavar="SOURCE",
        help="A weight file (safetensors, .pt, .bin, .gguf, .npz, .npy), an index of shards, or a directory with one.",
    ),
]


def _checked(source: str) -> str:
    if not is_url(source) and not os.path.exists(source):
        raise typer.BadParameter(f"Path '{source}' does not exist.")
    return source


def shown(source: str) -> str:
    """A source as it may be printed: of a URL, without what may be secret."""
    return Url.parse(source).shown if is_url(source) else source


SourceOrUrl = Annotated[
    str,
    typer.Argument(
        callback=_checked,
        metavar="SOURCE",
        help="A weight file (safetensors, .pt, .bin, .gguf, .npz, .npy), an index of shards, a directory with one, or "
        "the URL of one of these (https://, s3://, hf://).",
        show_default=False,
    ),
]
Directory = Annotated[
    Path,
    typer.Argument(
        exists=True, file_okay=False, metavar="DIRECTORY", help="A directory that save_pretrained of transformers made."
    ),
]
Target = Annotated[
    Path, typer.Argument(metavar="TARGET", help="A file NAME.safetensors, or a directory, which is created.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]
Budget = Annotated[
    int | None,
    typer.Option(
        parser=parse_size,
        metavar="SIZE",
        help="Ceiling on weights in memory, such as 800MiB. Default: what is free, less a fifth.",
        show_default=False,
    ),
]
ModelDtype = Annotated[
    Dtype | None, typer.Option(help="Convert the weights as they are loaded.", show_default="as stored")
]
ShardSize = Annotated[
    int | None,
    typer.Option(parser=parse_size, metavar="SIZE", help="Most bytes in a file, such as 5GB.", show_default="one file"),
]
