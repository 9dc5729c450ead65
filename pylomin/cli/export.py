"""``pylomin export-onnx``."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated

import typer

from pylomin.cli.arguments import Directory, Overwrite
from pylomin.cli.output import working


def export_onnx(
    directory: Directory,
    out: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="The file to write, in DIRECTORY or above it.")],
    tokens: Annotated[int, typer.Option(min=2, help="Length of the example that is traced; any length runs.")] = 8,
    opset: Annotated[int | None, typer.Option(min=1, help="Version of ONNX operators.", show_default="torch's")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Export a transformers model to ONNX without loading a weight.

    The graph refers to the weights where they are, if OUT.onnx is in the directory of the safetensors file or above it:
    they are copied beside it otherwise. The cache of keys and values is no part of the graph.
    """
    from pylomin.cli.models import dynamic_shapes, example_inputs, open_model
    from pylomin.errors import ExportError, PassError
    from pylomin.export import export_onnx

    with working("Opening the model"):
        model = open_model(directory)
        inputs = example_inputs(model, tokens, batch=2)  # torch takes a size of 1 for a constant
    if inputs is None:
        raise PassError(
            f"{type(model).__name__} takes {model.main_input_name!r}, for which no example can be made here. Export it "
            "from Python: pylomin.export_onnx(model, args, path)."
        )
    model.config.use_cache = False
    # Torch warns of itself, and logs which operators of packages that are not there it leaves out.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with working("Exporting"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            path = export_onnx(
                model,
                (),
                out,
                kwargs=inputs,
                dynamic_shapes=dynamic_shapes(inputs),
                input_names=list(inputs),
                opset=opset,
                overwrite=overwrite,
                progress=False,
            )
        except RuntimeError as error:  # torch.onnx.OnnxExporterError
            raise ExportError(f"torch cannot export {type(model).__name__}: {error}") from error
    typer.echo(str(path))
