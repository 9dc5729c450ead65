"""Checkpoints as directories that appear whole or not at all.

::

    model.safetensors             the model's weights, under their own names: the directory opens as a store
    training/state.safetensors    the tensors of optimizer, schedulers, random number generators, ...
    checkpoint.json               everything else, and the digests of both files
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pylomin.checkpoint.checkpoint import SECTIONS, Checkpoint
from pylomin.checkpoint.encoding import EncodedCheckpoint, decode_section, encode_checkpoint
from pylomin.errors import (
    CheckpointError,
    OutputExistsError,
    PassError,
    StoreFormatError,
    StoreReadError,
    StoreWriteError,
)
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.quantize.choose import Filter, chooser
from pylomin.quantize.packing import GROUP_SIZE
from pylomin.residency.residency import Residency
from pylomin.residency.weight import Layout, Source, Weight, contiguous_stride
from pylomin.save import weights_of
from pylomin.store.base import ReadRequest
from pylomin.store.disk import disk_error
from pylomin.store.packed_format import file_digest
from pylomin.store.quantized import QuantizedStore, open_packed
from pylomin.store.quantizing import QuantizingEncoder, write_quantized
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.saving import SaveOptions, save_weights
from pylomin.store.staging import Staging, sync_directory
from pylomin.store.strict_json import parse_object, shorten
from pylomin.store.tensor_bytes import byte_view

MODEL_FILE = "model.safetensors"
STATE_FILE = os.path.join("training", "state.safetensors")
DOCUMENT = "checkpoint.json"
_FORMAT = "pylomin.checkpoint"
_VERSION = 1
_STAGING = "checkpoint"  # one name for all: a writer removes what any other that was killed left beside its target


@dataclass(frozen=True, slots=True)
class SaveAs:
    """How a checkpoint is stored; see :func:`save_checkpoint`."""

    quantize: str | None = None
    filter: Filter | None = None
    group_size: int = GROUP_SIZE
    max_error: float | None = None
    reference: str | os.PathLike[str] | None = None
    lossless: bool = False


def save_checkpoint(
    checkpoint: Checkpoint,
    directory: str | os.PathLike[str],
    quantize: str | None = None,
    filter: Filter | None = None,
    reference: str | os.PathLike[str] | None = None,
    max_error: float | None = None,
    *,
    lossless: bool = False,
    group_size: int = GROUP_SIZE,
) -> Path:
    """Write a checkpoint as safetensors and JSON. It appears under its name when it is whole and on disk.

    Args:
        checkpoint: from :func:`pylomin.build_checkpoint`.
        directory: the name of a directory that is not there yet, or is empty.
        quantize: store weights of the model as ``"int8"``, ``"int4"``, ``"int8-row"``, ``"bf16"`` or ``"f16"``; with
            ``reference``, their differences to it, which makes errors smaller by orders of magnitude. Default: exact.
        filter: which tensors ``quantize`` applies to: a regular expression that is searched for in the name, names, or
            a function ``(name, info) -> scheme | None``. Names are those of the model's state dict, and such as
            ``"optimizer.state.0.exp_avg"``. Default: larger matrices of the model; the optimizer's state stays exact.
        reference: the directory of another checkpoint. Weights that are equal there are not stored again. The new
            checkpoint can be read while the reference is where it is, seen from the new one, and unchanged.
        max_error: the largest relative RMS error of a tensor; where a scheme exceeds it, a finer one is taken.
        lossless: with ``reference``: store exact differences, compressed. Needs ``pip install 'pylomin[zstd]'``.
        group_size: neighbours that share a scale.

    Returns:
        The directory.

    Raises:
        OutputExistsError: there is something of that name.
        StoreWriteError: no space or no permission. Nothing is left behind.
        CheckpointError: something cannot be stored, or ``reference`` is no checkpoint that can be referred to.
        PassError: arguments that exclude each other.
    """
    save_as = SaveAs(quantize, filter, group_size, max_error, reference, lossless)
    _check(save_as)
    return write_checkpoint(encode_checkpoint(checkpoint), directory, save_as)


def load_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint. Its sections are read when they are first asked for; each tensor is compared with its digest.

    The weights of the model are offloaded tensors: they are read whenever they are used.

    Raises:
        StoreReadError: a file is missing or cannot be read.
        StoreFormatError: a file is malformed, for instance truncated.
        CheckpointError: the files are not of one checkpoint, or the reference is missing or another one.
    """
    path = os.fspath(directory)
    document = read_document(path)
    weights, state = (open_packed(SafetensorsStore(os.path.join(path, name)), is_checked=True) for name in FILES)
    for name, store in zip(FILES, (weights, state), strict=True):
        found, expected = file_digest(store.metadata), document["files"].get(name)
        if found != expected:
            raise CheckpointError(
                f"{store.path!r} is of digest {found}, but {os.path.join(path, DOCUMENT)!r} is of one of {expected}. "
                "The files are not of one checkpoint; copy all of them again."
            )
    residency = Residency()
    offloaded: dict[str, torch.Tensor] = {}

    def get_weight(name: str) -> torch.Tensor:
        if name not in offloaded:
            info = weights.info(name)
            layout = Layout(info.dtype, info.shape, contiguous_stride(info.shape), torch.device("cpu"))
            offloaded[name] = OffloadedTensor(Weight(name, Source(weights, name, layout), residency))
        return offloaded[name]

    def get_tensor(name: str) -> torch.Tensor:
        info = state.info(name)
        values = torch.empty(info.shape, dtype=info.dtype)
        state.read([ReadRequest(name, 0, byte_view(values))])
        return values

    def read_section(section: str) -> Any:
        return decode_section(document["sections"], section, get_weight, get_tensor, repr(path))

    return Checkpoint({}, read_section)


FILES = (MODEL_FILE, STATE_FILE)


def write_checkpoint(encoded: EncodedCheckpoint, directory: str | os.PathLike[str], save_as: SaveAs) -> Path:
    """The last step of :func:`save_checkpoint`."""
    target = os.path.abspath(directory)
    parent, name = os.path.split(target)
    with _writing(parent):
        os.makedirs(parent, exist_ok=True)
        staging = Staging(parent, _STAGING)
    try:
        _check_absent(target)
        staged = os.path.join(staging.path, name)
        with _writing(parent):
            os.makedirs(os.path.join(staged, os.path.dirname(STATE_FILE)))
        _write_files(encoded, staged, target, save_as)
        with _writing(parent):
            sync_directory(os.path.join(staged, os.path.dirname(STATE_FILE)))
            sync_directory(staged)
            _check_absent(target)
            os.rename(staged, target)
            sync_directory(parent)
    finally:
        staging.discard()
    return Path(directory)


def remove_checkpoint(directory: str | os.PathLike[str]) -> None:
    """Remove a checkpoint, which disappears in one step. Lets OSError pass."""
    target = os.path.abspath(directory)
    parent, name = os.path.split(target)
    staging = Staging(parent, _STAGING)
    try:
        os.rename(target, os.path.join(staging.path, name))
    finally:
        staging.discard()


def read_document(directory: str) -> dict[str, Any]:
    """What ``checkpoint.json`` says, checked as far as it is the same for all.

    Raises:
        StoreReadError, StoreFormatError: it is missing, or none of this format.
    """
    path = os.path.join(directory, DOCUMENT)
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise StoreReadError(
            f"{directory!r} is no checkpoint that can be read: {DOCUMENT}: {error.strerror}. Expected a directory that "
            "pylomin.save_checkpoint wrote."
        ) from error
    document = parse_object(raw, repr(path))
    if document.get("format") != _FORMAT or document.get("version") != _VERSION:
        raise StoreFormatError(
            f"{path!r} is of format {shorten(document.get('format'))} {shorten(document.get('version'))}; this pylomin "
            f"reads {_FORMAT} {_VERSION}."
        )
    for field in ("sections", "files"):
        if not isinstance(document.get(field), dict):
            raise StoreFormatError(f"{path!r} has no {field!r}. The file is damaged; copy the checkpoint again.")
    return document


def _check(save_as: SaveAs) -> None:
    chooser(save_as.quantize, save_as.filter)
    if save_as.lossless and save_as.reference is None:
        raise PassError("lossless stores differences to a reference; give reference=, or leave lossless out.")
    if save_as.lossless and (save_as.quantize is not None or save_as.filter is not None):
        raise PassError("lossless and quantize exclude each other; give one of them.")


def _write_files(encoded: EncodedCheckpoint, staged: str, target: str, save_as: SaveAs) -> None:
    digests: dict[str, str | None] = {}
    document: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "files": digests}
    reference: SafetensorsStore | QuantizedStore | None = None
    reference_path = ""
    if save_as.reference is not None:
        read_document(os.fspath(save_as.reference))
        file = os.path.join(os.path.abspath(save_as.reference), MODEL_FILE)
        opened = open_packed(SafetensorsStore(file))
        assert isinstance(opened, (SafetensorsStore, QuantizedStore))
        reference = opened
        reference_path = os.path.relpath(file, target)
        document["reference"] = {"path": os.path.dirname(reference_path), "digest": file_digest(reference.metadata)}
    try:
        for name, tensors in zip(FILES, (encoded.weights, encoded.state), strict=True):
            is_model = name == MODEL_FILE
            # The default filter takes large matrices, and those of an optimizer must be asked for.
            quantize = save_as.quantize if is_model or save_as.filter is not None else None
            encoder = QuantizingEncoder(
                chooser(quantize, save_as.filter),
                tensors.keys(),
                group_size=save_as.group_size,
                max_error=save_as.max_error,
                reference=reference if is_model else None,
                reference_path=reference_path,
                lossless=save_as.lossless and is_model,
                scratch_directory=staged,
            )
            with contextlib.closing(encoder):
                path = os.path.join(staged, name)
                write_quantized(encoder, partial(_write_tensors, tensors, path, encoder))
            written = SafetensorsStore(path)
            digests[name] = file_digest(written.metadata)
            written.close()
    finally:
        if reference is not None:
            reference.close()
    document["sections"] = {section: encoded.sections[section] for section in SECTIONS}
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    with _writing(os.path.dirname(target)), open(os.path.join(staged, DOCUMENT), "xb") as output:
        output.write(text.encode())
        output.flush()
        os.fsync(output.fileno())


def _write_tensors(tensors: dict[str, torch.Tensor], path: str, encoder: QuantizingEncoder) -> None:
    weights, _ = weights_of(tensors, tied=False)
    options = SaveOptions(encoder=encoder, progress=False)
    save_weights(weights, path, options, metadata={"format": "pt"}, aliases={}, where=repr(path))


def _check_absent(target: str) -> None:
    if os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target)):
        raise OutputExistsError(f"{target!r} already exists. Choose another name, or remove it.")


@contextlib.contextmanager
def _writing(directory: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, (StoreWriteError, OutputExistsError)):
            raise
        raise disk_error(error, directory, 0, StoreWriteError) from error
