"""``export_onnx``: a graph whose weights stay in the file where they are."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pylomin.errors import ExportError, StoreWriteError
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.save import identity_of, values_of
from pylomin.store.base import WeightStore
from pylomin.store.disk import check_room
from pylomin.store.dtypes import STORED_DTYPES
from pylomin.store.extents import StoredWeight
from pylomin.store.progress import Progress, progress_of
from pylomin.store.writer import FileToWrite, WeightToWrite, check_free, write_files

_INLINE_BYTES = 1 << 14  # 16 KiB: constants of at most this size are part of the graph, weights never are
_SOURCE_KEYS = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    overwrite: bool = False,
    progress: Progress = None,
) -> Path:
    """Export a model to ONNX; no weight is loaded, and none is copied that the graph can refer to where it is.

    An ONNX file may refer to bytes of files in its own directory or below, and runtimes refuse all others. So write it
    beside the weight file that the model streams from: then a model of any size is exported in the time that tracing
    takes. Weights that are elsewhere, were written to, are converted as they are loaded, or are in memory or in a
    scratch file, are written to ``<path>.data``, a piece at a time. The weight file must stay as it is, and where it
    is, for as long as the ONNX file is used.

    Args:
        model: offloaded, in part or as a whole, or an ordinary model; call ``eval()`` first. It is not changed.
        args: example inputs, as for ``torch.onnx.export``.
        path: a file ``<name>.onnx`` in a directory that exists.
        kwargs, dynamic_shapes, input_names, output_names: as for ``torch.onnx.export``.
        opset: version of the ONNX operators. Default: that of ``torch.onnx.export``.
        overwrite: True to replace the files of an earlier export.
        progress: of what is written; as in :func:`pylomin.save_store`.

    Returns:
        ``path``.

    Raises:
        ExportError: weights are stored in a coded form (quantised, for instance), which ONNX cannot refer to.
        OutputExistsError, StoreWriteError: as :func:`pylomin.save_store`.
        ModuleNotFoundError: onnxscript is not installed.
        torch.onnx.OnnxExporterError: the model cannot be traced, or ONNX lacks an operator of it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as the first argument, found {type(model).__name__}.")
    directory, name = os.path.split(os.path.abspath(path))
    if not name.endswith(".onnx"):
        raise ExportError(f"path is {os.fspath(path)!r}; expected the name of a file that ends in '.onnx'.")
    if importlib.util.find_spec("onnxscript") is None:
        raise ModuleNotFoundError("export_onnx needs onnxscript: pip install 'pylomin[onnx]'.")
    data_name = name + ".data"
    check_free(directory, [name, data_name], overwrite)
    check_room(directory, 0, StoreWriteError)  # is there such a directory?
    for fqn, parameter in model.named_parameters():
        if isinstance(parameter, OffloadedTensor) and _is_coded(parameter):
            source = parameter.weight.source
            raise ExportError(
                f"weight {fqn!r} is stored in a coded form in {source.store.describe(source.name)}, which ONNX cannot "
                "refer to. Write the decoded values to a file of their own, and export the model that streams from it: "
                "pylomin.save_model(model, 'decoded.safetensors')."
            )
    # Torch's own optimisation would compute with the weights, which need not fit in memory.
    program = torch.onnx.export(
        model,
        args,
        kwargs=None if kwargs is None else dict(kwargs),
        dynamic_shapes=dynamic_shapes,
        input_names=input_names,
        output_names=output_names,
        opset_version=opset,
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    assert program is not None
    graph = program.model.graph
    _simplify(program.model)
    tensors = {key: raw for key, value in graph.initializers.items() if (raw := _torch_tensor(value)) is not None}
    file, places = _place(tensors, directory, {name, data_name}, data_name)
    _refer(graph, places, directory)
    content = _serialized(program.model)
    with progress_of(progress, f"Writing {name}") as report:
        write_files(
            directory,
            [file] if file.weights else [],
            (name, content),
            replaced=[data_name],
            overwrite=overwrite,
            progress=report,
        )
    return Path(directory, name)


def _simplify(model: Any) -> None:
    """Compute what depends on constants alone, but for weights, and leave out where in the source each node is from."""
    from onnxscript import optimizer

    weights = {name for name, value in model.graph.initializers.items() if _torch_tensor(value) is not None}

    def should_fold(node: Any) -> bool | None:
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    optimizer.fold_constants(model, should_fold=should_fold)
    optimizer.remove_unused_nodes(model)
    for node in model.graph.all_nodes():
        for key in _SOURCE_KEYS:
            node.metadata_props.pop(key, None)


def _torch_tensor(value: Any) -> torch.Tensor | None:
    """What an initialiser was made of; None for a constant that was computed since."""
    raw = getattr(value.const_value, "raw", None)
    return raw if isinstance(raw, torch.Tensor) else None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the bytes of an initialiser are."""

    location: str  # of a file, relative to the directory of the ONNX file
    offset: int  # bytes
    nbytes: int


def _place(
    tensors: Mapping[str, torch.Tensor], directory: str, outputs: set[str], data_name: str
) -> tuple[FileToWrite, dict[str, _Place]]:
    """A place for each tensor that is not to be part of the graph, and the file to write for those without one."""
    places: dict[str, _Place] = {}
    to_write: dict[object, list[str]] = {}  # names by tensor
    for name, tensor in tensors.items():
        if not tensor.nbytes:
            continue
        place = _place_in_store(tensor, directory, outputs) if isinstance(tensor, OffloadedTensor) else None
        if place is not None:
            places[name] = place
        elif isinstance(tensor, nn.Parameter) or tensor.nbytes > _INLINE_BYTES:
            to_write.setdefault(identity_of(tensor), []).append(name)
    # Large elements first, so that each lies on a multiple of its size.
    groups = sorted(to_write.values(), key=lambda names: -tensors[names[0]].element_size())
    file = FileToWrite(data_name, [_to_write(names[0], tensors[names[0]]) for names in groups], None, digests=True)
    for names, (_, offset) in zip(groups, file.offsets().items(), strict=True):
        places |= {name: _Place(data_name, offset, tensors[name].nbytes) for name in names}
    return file, places


def _to_write(name: str, tensor: torch.Tensor) -> WeightToWrite:
    if tensor.dtype not in STORED_DTYPES:
        raise ExportError(f"initialiser {name!r} has dtype {tensor.dtype}, which no weight file can hold. Convert it.")
    return WeightToWrite(name, tensor.dtype, tuple(tensor.shape), partial(values_of, tensor))


def _place_in_store(tensor: OffloadedTensor, directory: str, outputs: set[str]) -> _Place | None:
    """Where the very bytes of ``tensor`` lie in a file that the ONNX file may refer to; None if they do not."""
    weight = tensor.weight
    source = weight.source
    was_written = weight.tensor is not None and weight.tensor._version != weight.loaded_version
    if was_written or weight.conversions or not tensor.is_whole or not source.layout.is_contiguous:
        return None
    stored = _location(source.store, source.name)
    if stored is None or stored.extent.nbytes != tensor.nbytes or stored.extent.start % tensor.element_size():
        return None
    file, scratch = stored.file, weight.residency.scratch
    if not file.is_at_path():
        return None
    # Runtimes compare real paths.
    real, root = os.path.realpath(file.path), os.path.realpath(directory)
    if scratch is not None and Path(real).is_relative_to(os.path.realpath(scratch.path)):
        return None  # it is removed with the model
    if not Path(real).is_relative_to(root):
        return None
    location = os.path.relpath(real, root)
    if location in outputs:
        return None
    return _Place(Path(location).as_posix(), stored.extent.start, stored.extent.nbytes)


def _location(store: WeightStore, name: str) -> StoredWeight | None:
    find: Callable[[str], StoredWeight] | None = getattr(store, "location", None)
    return None if find is None else find(name)


def _is_coded(tensor: OffloadedTensor) -> bool:
    """Whether the store computes the values from fewer bytes."""
    source = tensor.weight.source
    packed: Callable[[str], object] | None = getattr(source.store, "packed", None)
    if packed is not None:
        return packed(source.name) is not None
    stored = _location(source.store, source.name)
    return stored is not None and stored.extent.nbytes != stored.info.nbytes


def _refer(graph: Any, places: Mapping[str, _Place], directory: str) -> None:
    """Let the initialisers of an ``onnx_ir`` graph refer to their places."""
    import onnx_ir

    for name, place in places.items():
        value = graph.initializers[name]
        value.const_value = onnx_ir.ExternalTensor(
            place.location,
            place.offset,
            place.nbytes,
            value.const_value.dtype,
            shape=value.const_value.shape,
            name=name,
            base_dir=directory,
        )


def _serialized(model: Any) -> bytes:
    import onnx_ir

    content: bytes = onnx_ir.to_proto(model).SerializeToString()
    return content
