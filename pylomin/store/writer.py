"""Writing ``.safetensors`` files with one tensor, or a piece of one, in memory at a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from pylomin.errors import OutputExistsError, ScratchError, StoreFormatError, StoreWriteError, WeightMismatchError
from pylomin.store.digests import DIGESTS_KEY, EMPTY_DIGEST, format_digests, layout_digest, new_digest
from pylomin.store.disk import DiskWriter, GrowingFile, check_room
from pylomin.store.dtypes import nbytes_of
from pylomin.store.header import PREFIX_BYTES, build_header
from pylomin.store.pieces import is_small, made_ahead
from pylomin.store.staging import Staging
from pylomin.store.tensor_bytes import byte_view, contiguous_cpu

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_MIN_PARALLEL_BYTES = 1 << 20  # 1 MiB: handing less to another thread takes longer than hashing it


@dataclass(frozen=True, slots=True)
class WeightToWrite:
    """A weight that is made only when its turn to be written comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    get_values: Callable[[], torch.Tensor | Iterator[torch.Tensor]]
    """Called once: the tensor (any device and strides), or runs of its elements in row-major order, one after the
    other, each of which must stay as it is until ``AHEAD`` more were made, and another is asked for."""

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)

    def pieces(self) -> Iterator[torch.Tensor]:
        """The values, checked: what comes is what was announced.

        Raises:
            WeightMismatchError: it is not.
        """
        values = self.get_values()
        if isinstance(values, torch.Tensor):
            self._check(values, tuple(values.shape) == tuple(self.shape))
            yield values
            return
        numel = math.prod(self.shape)
        for piece in values:
            numel -= piece.numel()
            self._check(piece, numel >= 0)
            yield piece
        if numel:
            raise WeightMismatchError(
                f"weight {self.name!r} was to be written with shape {tuple(self.shape)}; its pieces end {numel} "
                "elements before that."
            )

    def _check(self, found: torch.Tensor, fits: bool) -> None:
        if found.dtype != self.dtype or not fits:
            raise WeightMismatchError(
                f"weight {self.name!r} was to be written with dtype {self.dtype} and shape "
                f"{tuple(self.shape)}; the tensor has {found.dtype} and {tuple(found.shape)}."
            )


Metadata = Callable[[Sequence[str]], Mapping[str, str]]
"""Strings for the header of a file that holds these weights.

Asked for before they are written and again afterwards, when it may know more; what it says then must not be longer.
"""


def write_safetensors(
    path: str | os.PathLike[str],
    weights: Sequence[WeightToWrite],
    *,
    metadata: Mapping[str, str] | None = None,
    durable: bool = False,
    overwrite: bool = False,
) -> None:
    """Write weights, in the given order, to a safetensors file that appears complete or not at all.

    The file grows in a temporary directory beside ``path`` and is renamed when it is whole; on any
    failure it is removed and ``path`` is as before.

    Args:
        path: the file to write; its directory exists.
        weights: what to write. Weights that are used together should follow each other here: then
            one read gets them all.
        metadata: strings for the header.
        durable: True to return only when the file would survive a power failure.
        overwrite: True to replace a file at ``path``.

    Raises:
        OutputExistsError: there is a file at ``path``.
        StoreFormatError: safetensors cannot hold a weight's dtype. Nothing was written.
        WeightMismatchError: a tensor has another dtype or shape than announced.
        ScratchError: no space or no permission, naming directory, needed and free bytes.
    """
    directory, name = os.path.split(os.path.abspath(path))
    file = FileToWrite(name, weights, (lambda names: metadata) if metadata else None)
    target = _Target(directory, name, (name,), overwrite)
    _write(target, [file], [], durable=durable, error_class=ScratchError)


def write_checkpoint(
    directory: str,
    stem: str,
    shards: Sequence[Sequence[WeightToWrite]],
    *,
    metadata: Metadata | None = None,
    digests: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Write ``<stem>.safetensors``, or several shards and their index in the layout of Hugging Face.

    As :func:`write_safetensors`, durable. An old checkpoint of this stem is replaced in whichever of the two forms it
    is: single file by single file in one step, otherwise it is removed just before the new one takes its place.

    Args:
        shards: the weights of each file; with one, there is no index.
        metadata: of each file.
        digests: True to put a digest of every weight into the header; see :mod:`pylomin.store.digests`.
        progress: called with bytes written and bytes in all.

    Returns:
        The path of the single file, or of the index.

    Raises:
        OutputExistsError: such a checkpoint, or one of the files to write, exists.
        StoreWriteError: no space or no permission, naming directory, needed and free bytes.
        StoreFormatError, WeightMismatchError: as :func:`write_safetensors`.
    """
    count = len(shards)
    names = [f"{stem}-{i:05d}-of-{count:05d}{SUFFIX}" for i in range(1, count + 1)] if count > 1 else [stem + SUFFIX]
    files = [FileToWrite(name, weights, metadata, digests) for name, weights in zip(names, shards, strict=True)]
    if count > 1:
        names.append(stem + INDEX_SUFFIX)
    target = _Target(directory, stem, (stem + INDEX_SUFFIX, stem + SUFFIX, *names[:-1]), overwrite, has_shards=True)
    index = [(names[-1], _index(files))] if count > 1 else []
    _write(target, files, index, durable=True, error_class=StoreWriteError, progress=progress)
    return os.path.join(directory, names[-1])


def write_files(
    directory: str,
    files: Sequence[FileToWrite],
    last: tuple[str, bytes],
    *,
    replaced: Sequence[str] = (),
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write weights and a file that refers to them, durable; they appear together, ``last`` (name, content) last.

    Args:
        replaced: names, besides those that are written, that must be free or are removed with what was there before.

    Raises:
        OutputExistsError, StoreWriteError, StoreFormatError, WeightMismatchError: as :func:`write_checkpoint`.
    """
    names = dict.fromkeys([last[0], *(file.name for file in files), *replaced])
    target = _Target(directory, last[0], tuple(names), overwrite)
    _write(target, files, [last], durable=True, error_class=StoreWriteError, progress=progress)


def check_free(directory: str, names: Sequence[str], overwrite: bool) -> None:
    """Raise OutputExistsError if one of ``names`` is there, and is not a file that may be replaced."""
    for name in names:
        path = os.path.join(directory, name)
        if os.path.lexists(path) and (not overwrite or os.path.isdir(path)):
            raise OutputExistsError(
                f"{path!r} already exists. Choose another name, or pass overwrite=True to replace a file."
            )


@dataclass(frozen=True, slots=True)
class _Target:
    """What is written to, and what may be in its place already."""

    directory: str
    key: str  # tells it from other targets in the directory
    names: tuple[str, ...]  # that must be free, or are replaced; what makes an old checkpoint one comes first
    overwrite: bool
    has_shards: bool = False  # with names that begin with `key`

    def check(self) -> None:
        check_free(self.directory, self.names, self.overwrite)

    def old_files(self) -> list[str]:
        """Those of ``names`` that are there, and the shards of an old index."""
        found = [name for name in self.names if os.path.lexists(os.path.join(self.directory, name))]
        return found + [name for name in self._old_shards() if name not in found]

    def _old_shards(self) -> list[str]:
        """Only such as this library would have written: never a path, never a file of another name."""
        if not self.has_shards:
            return []
        try:
            with open(os.path.join(self.directory, self.key + INDEX_SUFFIX), "rb") as file:
                listed = set(json.load(file)["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return []
        pattern = re.compile(re.escape(self.key) + r"-\d{5}-of-\d{5}" + re.escape(SUFFIX))
        return sorted(name for name in listed if isinstance(name, str) and pattern.fullmatch(name))


class FileToWrite:
    """One safetensors file to write: its name and weights, with a digest of each if asked for."""

    def __init__(
        self, name: str, weights: Sequence[WeightToWrite], metadata: Metadata | None, digests: bool = False
    ) -> None:
        self.name = name
        self.weights = weights
        self._metadata = metadata
        self._layout = [(weight.name, weight.dtype, weight.shape) for weight in weights]
        self.digests = {weight.name: EMPTY_DIGEST for weight in weights} if digests else None
        self._layout_digest = layout_digest(self._layout)
        self.header = self._build_header()
        self.nbytes = len(self.header) + sum(weight.nbytes for weight in weights)

    def offsets(self) -> dict[str, int]:
        """Where in the file each weight begins, in bytes."""
        offsets, position = {}, len(self.header)
        for weight in self.weights:
            offsets[weight.name] = position
            position += weight.nbytes
        return offsets

    def _build_header(self) -> bytes:
        metadata = dict(self._metadata([name for name, _, _ in self._layout])) if self._metadata else {}
        if self.digests is not None:
            metadata[DIGESTS_KEY] = format_digests(self._layout_digest, self.digests)
        return build_header(self._layout, metadata)

    def final_header(self) -> bytes:
        """With all that is known now, in as many bytes as the first one."""
        header = self._build_header()
        missing = len(self.header) - len(header)
        if missing < 0:
            raise StoreFormatError(f"the metadata of {self.name!r} grew by {-missing} bytes while it was written.")
        length = len(header) - PREFIX_BYTES + missing
        return length.to_bytes(PREFIX_BYTES, "little") + header[PREFIX_BYTES:] + b" " * missing


def _index(files: Sequence[FileToWrite]) -> bytes:
    weight_map = {weight.name: file.name for file in files for weight in file.weights}
    if len(weight_map) < sum(len(file.weights) for file in files):
        raise StoreFormatError("a weight name is given twice, in different shards. Rename the weight.")
    total_bytes = sum(weight.nbytes for file in files for weight in file.weights)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    return json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"


def _write(
    target: _Target,
    files: Sequence[FileToWrite],
    others: Sequence[tuple[str, bytes]],
    *,
    durable: bool,
    error_class: type[StoreWriteError],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    total_bytes = sum(file.nbytes for file in files) + sum(len(content) for _, content in others)
    disk = DiskWriter(target.directory, total_bytes, error_class, progress)
    with disk.errors():
        staging = Staging(target.directory, target.key)
    try:
        target.check()  # not earlier: a killed writer may have left what is gone now
        check_room(target.directory, total_bytes, error_class)
        with ThreadPoolExecutor(1, thread_name_prefix="pylomin-digests") as hashing:
            for file in files:
                with disk.create(os.path.join(staging.path, file.name), durable) as output:
                    _write_weights(file, output, hashing)
        for name, content in others:
            with disk.create(os.path.join(staging.path, name), durable) as output:
                output.append(memoryview(content))
        names = [file.name for file in files] + [name for name, _ in others]
        with disk.errors():
            staging.publish(names, check=target.check, replaced=target.old_files, durable=durable)
    finally:
        staging.discard()


def _write_weights(file: FileToWrite, output: GrowingFile, hashing: Executor) -> None:
    output.append(memoryview(file.header))
    digest = new_digest()
    for batch in made_ahead(_batches(file.weights), one_core=True, beside=_all_small):
        for weight, piece in batch:
            if piece is None:
                if file.digests is not None:
                    file.digests[weight.name] = digest.hexdigest()
                digest = new_digest()
                continue
            view = byte_view(contiguous_cpu(piece, weight.name))
            if file.digests is None:
                output.append(view)
            elif len(view) < _MIN_PARALLEL_BYTES:
                digest.update(view)
                output.append(view)
            else:
                hashed = hashing.submit(digest.update, view)
                output.append(view)
                hashed.result()
            del piece, view
        batch.clear()  # it must not keep what it held while the next is made
    header = file.final_header()
    if header != file.header:
        output.rewrite_start(memoryview(header))


_Batch = list[tuple[WeightToWrite, torch.Tensor | None]]


def _all_small(batch: _Batch) -> bool:
    return all(piece is None or is_small(piece) for _, piece in batch)


def _batches(weights: Sequence[WeightToWrite]) -> Iterator[_Batch]:
    """The pieces of all weights, with None after the last of each; small weights together."""
    batch: _Batch = []
    nbytes = 0
    for weight in weights:
        for piece in weight.pieces():
            batch.append((weight, piece))
            nbytes += piece.nbytes
            is_run = piece.nbytes < weight.nbytes  # whose memory may be used again
            del piece
            if is_run or nbytes >= _MIN_PARALLEL_BYTES:
                yield batch
                batch, nbytes = [], 0
        batch.append((weight, None))
    yield batch
