"""``save_store`` and ``save_model``: writers that never hold more than one tensor."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pylomin.errors import PassError, StoreFormatError
from pylomin.io.sizes import parse_bytes
from pylomin.lazy.distributed import is_distributed
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.quantize.choose import Choose, Filter, chooser
from pylomin.quantize.packing import GROUP_SIZE
from pylomin.residency.plan import Plan
from pylomin.store.base import WeightStore
from pylomin.store.digests import DIGESTS_KEY
from pylomin.store.dtypes import STORED_DTYPES
from pylomin.store.open import open_store
from pylomin.store.packed_format import QUANTIZED_KEY
from pylomin.store.pieces import Buffers, read_pieces, slices_of
from pylomin.store.progress import Progress
from pylomin.store.quantized import QuantizedStore
from pylomin.store.quantizing import QuantizingEncoder, write_quantized
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.saving import Cast, SaveOptions, save_weights
from pylomin.store.sharded import ShardedStore
from pylomin.store.writer import WeightToWrite


def save_store(
    source: str | os.PathLike[str] | Mapping[str, torch.Tensor] | WeightStore,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    quantize_filter: Filter | None = None,
    group_size: int = GROUP_SIZE,
    max_error: float | None = None,
    filter: Callable[[str], bool] | None = None,
    max_shard_size: int | str | None = None,
    order: Iterable[str] | Plan | None = None,
    digests: bool = True,
    progress: Progress = None,
    overwrite: bool = False,
) -> Path:
    """Write weights as safetensors: another format, dtype, order or number of files. A piece is in memory at a time.

    The files grow in a hidden directory beside the target and are renamed when all is there and on disk: the target is
    complete or absent, whatever happens. What a killed process left behind, the next one that writes the same target
    removes. Reading from the file that is written over works: who has it open keeps the old bytes.

    Args:
        source: anything that :func:`pylomin.open_store` takes.
        path: a file ``<name>.safetensors``, or a directory for ``model.safetensors``, which is created.
        dtype: convert the weights of 16 to 64 bits floating point to this dtype. Default: as they are.
        quantize: store weights as ``"int8"`` or ``"int4"`` with a scale for each ``group_size`` neighbours in a row,
            ``"int8-row"`` with one for each row, ``"bf16"`` or ``"f16"``. Opened again, they have the dtype that they
            have now. Weights with values that are not finite stay as they are.
        quantize_filter: which weights to quantise: a regular expression that is searched for in the name, names, or a
            function ``(name, info) -> scheme | None``. Default: matrices of floating type with at least 4096 elements.
        group_size: neighbours that share a scale.
        max_error: the largest relative RMS error of a weight; where a scheme exceeds it, a finer one or none is taken.
            :func:`pylomin.quantization_report` says which.
        filter: called with each name; False leaves that weight out.
        max_shard_size: most bytes in a file (int, or a string such as ``"5GB"``). Where there are more, write
            ``<name>-00001-of-0000N.safetensors`` and ``<name>.safetensors.index.json``, in the layout of Hugging Face.
            A weight that is larger has a file of its own.
        order: names in the order in which weights are used, or a plan (:func:`pylomin.plan_of`): they come first and
            lie next to each other, so that one read gets what is used together. Default: the order of ``source``.
        digests: True to keep a SHA-256 of each weight in the header, for :func:`pylomin.verify`.
        progress: True for a progress bar (needs rich), False for none, or a function that is called with bytes
            written and bytes in all. Default: a bar if rich is installed and stderr is a terminal.
        overwrite: True to replace a checkpoint of that name.

    Returns:
        The path to open: of the file, or of the index where there are several.

    Raises:
        OutputExistsError: there is such a checkpoint already.
        StoreWriteError: no space or no permission. Nothing is left behind.
        StoreReadError, StoreFormatError: ``source`` cannot be read, or safetensors cannot hold a weight of it.
        WeightNotFoundError: ``order`` has a name that ``source`` does not have.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_store({"w": torch.ones(2)}, directory, dtype=torch.bfloat16).name
    'model.safetensors'
    """
    options = _options(dtype, max_shard_size, order, digests, progress, overwrite)
    choose = _chooser(quantize, quantize_filter, dtype)
    store = open_store(source)
    try:
        buffers = Buffers()
        weights = [_stored(store, name, buffers) for name in store if filter is None or filter(name)]
        return _save(
            weights,
            path,
            options,
            _encoder(choose, weights, group_size, max_error),
            metadata=_metadata_of(store),
            aliases={},
            where=_describe(store),
        )
    finally:
        if store is not source:
            store.close()


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    quantize_filter: Filter | None = None,
    group_size: int = GROUP_SIZE,
    max_error: float | None = None,
    filter: Callable[[str], bool] | None = None,
    max_shard_size: int | str | None = None,
    order: Iterable[str] | Plan | None = None,
    digests: bool = True,
    progress: Progress = None,
    overwrite: bool = False,
) -> Path:
    """Write the state dict of a model as safetensors; offloaded weights are read a piece at a time.

    A weight with several names is written once, under the first of them in the state dict; the header notes the others
    as ``{other name: first name}``, as ``safetensors.torch.save_model`` does. Buffers are written as the state dict has
    them: not those that are not persistent. The file may be the very one that the model streams from.

    Args:
        model: offloaded, in part or as a whole, or an ordinary model.
        path, dtype, quantize, quantize_filter, group_size, max_error, max_shard_size, digests, progress, overwrite: as
            in :func:`save_store`.
        filter: called with each name; False leaves that name out.
        order: as in :func:`save_store`; any name of a weight will do.

    Returns:
        The path to open, for instance with :func:`pylomin.load`.

    Raises:
        StoreFormatError: the state dict holds something that safetensors cannot.
        OutputExistsError, StoreWriteError, StoreReadError, WeightNotFoundError: as :func:`save_store`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     sorted(open_store(save_model(nn.Linear(2, 1), directory)))
    ['bias', 'weight']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as the first argument, found {type(model).__name__}.")
    options = _options(dtype, max_shard_size, order, digests, progress, overwrite)
    choose = _chooser(quantize, quantize_filter, dtype)
    weights, aliases = weights_of(model.state_dict(keep_vars=True), filter)
    metadata = {**aliases, "format": "pt"}
    where = f"the state dict of {type(model).__name__}"
    encoder = _encoder(choose, weights, group_size, max_error)
    return _save(weights, path, options, encoder, metadata=metadata, aliases=aliases, where=where)


def _chooser(quantize: str | None, filter: Filter | None, dtype: torch.dtype | None) -> Choose | None:
    if quantize is None and filter is None:
        return None
    if dtype is not None:
        raise PassError("dtype and quantize both say how weights are stored; give one of them.")
    return chooser(quantize, filter)


def _encoder(
    choose: Choose | None, weights: Sequence[WeightToWrite], group_size: int, max_error: float | None
) -> QuantizingEncoder | None:
    if choose is None:
        return None
    names = [weight.name for weight in weights]
    return QuantizingEncoder(choose, names, group_size=group_size, max_error=max_error)


def _save(
    weights: Sequence[WeightToWrite],
    path: str | os.PathLike[str],
    options: SaveOptions,
    encoder: QuantizingEncoder | None,
    *,
    metadata: Mapping[str, str],
    aliases: Mapping[str, str],
    where: str,
) -> Path:
    if encoder is None:
        return save_weights(weights, path, options, metadata=metadata, aliases=aliases, where=where)
    options = replace(options, encoder=encoder)
    with contextlib.closing(encoder):
        return write_quantized(
            encoder, lambda: save_weights(weights, path, options, metadata=metadata, aliases=aliases, where=where)
        )


def _options(
    dtype: torch.dtype | None,
    max_shard_size: int | str | None,
    order: Iterable[str] | Plan | None,
    digests: bool,
    progress: Progress,
    overwrite: bool,
) -> SaveOptions:
    if dtype is not None and not (dtype.is_floating_point and dtype in STORED_DTYPES):
        raise PassError(f"dtype is {dtype}; expected a floating-point dtype such as torch.bfloat16.")
    names: object = () if order is None else order
    if isinstance(order, Plan):
        names = [name for use in order.uses() for name in use]
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise PassError(f"order is {names!r}; expected a list of names of weights, in the order of their use.")
    return SaveOptions(
        encoder=None if dtype is None else Cast(dtype),
        max_shard_bytes=None if max_shard_size is None else parse_bytes(max_shard_size, what="max_shard_size"),
        order=tuple(dict.fromkeys(names)),
        digests=digests,
        progress=progress,
        overwrite=overwrite,
    )


# -- where the values come from -----------------------------------------------------------------------------------


def _stored(store: WeightStore, name: str, buffers: Buffers) -> WeightToWrite:
    info = store.info(name)
    return WeightToWrite(name, info.dtype, info.shape, partial(read_pieces, store, name, buffers))


def _metadata_of(store: WeightStore) -> dict[str, str]:
    """What the files of ``store`` say of themselves, but for what is computed anew."""
    stored = store.file if isinstance(store, QuantizedStore) else store
    shards = stored.shards if isinstance(stored, ShardedStore) else (stored,)
    files = [shard for shard in shards if isinstance(shard, SafetensorsStore)]
    computed = (DIGESTS_KEY, QUANTIZED_KEY)
    metadata = {key: value for file in files for key, value in file.metadata.items() if key not in computed}
    return metadata or {"format": "pt"}


def _describe(store: WeightStore) -> str:
    return next((repr(store.describe(name)) for name in store), "an empty store")


def weights_of(
    state: Mapping[str, object], filter: Callable[[str], bool] | None = None, *, tied: bool = True
) -> tuple[list[WeightToWrite], dict[str, str]]:
    """The weights of a state dict, and the other names of those that have several; with ``tied``, each weight once.

    Raises:
        StoreFormatError: a value is no tensor, or one that is distributed over processes.
    """
    first: dict[object, str] = {}
    weights: list[WeightToWrite] = []
    aliases: dict[str, str] = {}
    for name, value in state.items():
        if filter is not None and not filter(name):
            continue
        if not isinstance(value, torch.Tensor):
            raise StoreFormatError(
                f"{name!r} in the state dict is a {type(value).__name__}; safetensors holds tensors only. Leave it "
                f"out: filter=lambda name: name != {name!r}."
            )
        if is_distributed(value):
            raise StoreFormatError(
                f"{name!r} in the state dict is a DTensor: this process has a shard of it. Take the weights from the "
                "store that they are read from, or save the shards with torch.distributed.checkpoint."
            )
        known = first.setdefault(identity_of(value), name) if tied else name
        if known == name:
            weights.append(WeightToWrite(name, value.dtype, tuple(value.shape), partial(values_of, value)))
        else:
            aliases[name] = known
    return weights, aliases


def identity_of(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same memory, or the same offloaded weight, seen in the same way."""
    geometry = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
    if isinstance(tensor, OffloadedTensor):
        return (id(tensor.weight), *geometry)
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return id(tensor)  # all tensors without data have the same address
    return (tensor.device, tensor.untyped_storage().data_ptr(), *geometry)


def values_of(tensor: torch.Tensor) -> torch.Tensor | Iterator[torch.Tensor]:
    """What :class:`~pylomin.store.writer.WeightToWrite` wants: of an offloaded tensor, a piece at a time."""
    if isinstance(tensor, OffloadedTensor):
        return _offloaded_pieces(tensor) or tensor.materialize()
    is_plain = tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type != "meta"
    return slices_of(tensor.detach()) if is_plain and tensor.is_contiguous() else tensor


def _offloaded_pieces(tensor: OffloadedTensor) -> Iterator[torch.Tensor] | None:
    """Straight from the store, so that no resident weight has to make room; None where that is not the whole truth."""
    weight = tensor.weight
    source, conversions = weight.source, weight.conversions
    is_as_stored = weight.tensor is None and weight.keeps_order and source.layout.is_contiguous
    if not is_as_stored or not tensor.is_whole:
        return None

    def pieces() -> Iterator[torch.Tensor]:
        for piece in read_pieces(source.store, source.name):
            values = piece.view(source.layout.dtype)
            for layout in conversions:
                values = values.to(layout.dtype)
            yield values

    return pieces()
